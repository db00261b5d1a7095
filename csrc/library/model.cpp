// Models of the C library: the frozen weights of a weights file. And the instruction set that they are packed for.
#include "library/model.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>

#include "library/memory.h"

namespace lstm_ext::library {
namespace {

template <typename T>
void copy_options(const WeightsFile& file, const FileArrays& arrays, Arena& arena, StepOptions<T>& options) {
  const FileHeader& h = *file.header;
  const auto copied = [&](const void* from, int64_t times) -> const T* {
    if (!from) return nullptr;
    const int64_t count = times * static_cast<int64_t>(h.hidden_size);
    T* const to = arena.take<T>(count);
    if (to) std::memcpy(to, from, static_cast<size_t>(count) * sizeof(T));
    return to;
  };
  options.zoneout_h.share = static_cast<T>(h.zoneout_h);
  options.zoneout_c.share = static_cast<T>(h.zoneout_c);
  options.norm = {copied(arrays.gain_ih, 4), copied(arrays.gain_hh, 4), copied(arrays.gain_c, 1),
                  copied(arrays.bias_c, 1), file.has(kCarriesNormalisedCell)};
  cell::Options<T>& cell = options.cell;
  const void* const peepholes[] = {arrays.weight_ci, arrays.weight_cf, arrays.weight_co};
  for (int i = 0; i < cell::kParameters; ++i) cell.parameters[i] = copied(peepholes[i], 1);
#define BOUND(name) cell.name = static_cast<T>(h.name);
#include "contract/options.def"
  cell.coupled_gates = file.has(kIsCoupled);
  cell.other_activations = file.has(kHasOtherActivations);
  cell::Activation<T>* const activations[] = {&cell.gate_activation, &cell.candidate_activation,
                                              &cell.output_activation};
  for (int i = 0; i < 3; ++i) {
    const FileActivation& given = h.activations[i];
    *activations[i] = {static_cast<cell::Function>(given.function), static_cast<T>(given.alpha),
                       static_cast<T>(given.beta)};
  }
}

// The numbers of a weight: those in the file, or in `scratch` those that the rounded ones stand for.
const double* widened(WeightKind, const void* weight, const void*, int64_t, int64_t, double*) {
  return static_cast<const double*>(weight);  // float64 is never rounded
}
const float* widened(WeightKind kind, const void* weight, const void* factors, int64_t rows, int64_t columns,
                     float* scratch) {
  if (kind == WeightKind::kOwn) return static_cast<const float*>(weight);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = row * columns; i < (row + 1) * columns; ++i) {
      if (kind == WeightKind::kInt8) {
        scratch[i] =
            static_cast<float>(static_cast<const int8_t*>(weight)[i]) * static_cast<const float*>(factors)[row];
      } else {
        const uint32_t bits = uint32_t{static_cast<const uint16_t*>(weight)[i]} << 16;
        std::memcpy(&scratch[i], &bits, sizeof(bits));
      }
    }
  }
  return scratch;
}

// For the rounded weights of a direction, which are widened while they are packed.
int64_t scratch_bytes(const WeightsFile& file) {
  if (file.kind() == WeightKind::kOwn) return 0;
  int64_t most = 0;
  for (int64_t layer = 0; layer < std::min<int64_t>(2, file.header->num_layers); ++layer) {
    const LayerShape shape = file.shape(layer);
    most = std::max(most, 4 * shape.hidden_size * (shape.input_size + shape.output_size));
  }
  return most * static_cast<int64_t>(sizeof(float));
}

template <typename T>
FrozenWeights<T> pack(const WeightsFile& file, const LayerShape& shape, const FileArrays& arrays,
                      const cpu::Kernels<T>& kernels, const cpu::FrozenPlan& plan, char* data, T* scratch) {
  const int64_t rows = 4 * shape.hidden_size;
  const T* const w = widened(file.kind(), arrays.weight_ih, arrays.factors_ih, rows, shape.input_size, scratch);
  T* const rest = scratch ? scratch + rows * shape.input_size : nullptr;
  const T* const u = widened(file.kind(), arrays.weight_hh, arrays.factors_hh, rows, shape.output_size, rest);
  const LayerWeights<T> weights{w, u, static_cast<const T*>(arrays.bias_ih), static_cast<const T*>(arrays.bias_hh),
                                static_cast<const T*>(arrays.weight_hr)};
  return cpu::freeze(kernels, weights, {arrays.factors_ih, arrays.factors_hh}, shape, plan, data);
}

// Lays a model out and, where the arena has memory, makes it there. `scratch` has scratch_bytes.
template <typename T>
lstm_ext_model* make_model(const WeightsFile& file, const cpu::Capability& capability, Arena& arena, T* scratch) {
  auto* const model = arena.take<lstm_ext_model>(1);
  const int64_t count = int64_t{file.header->num_layers} * file.header->directions;
  auto* const directions = arena.take<Direction<T>>(count);
  if (model) new (model) lstm_ext_model{*file.header, &capability, directions, false};
  const cpu::Kernels<T>& kernels = cpu::kernels_of<T>(capability);
  file.visit_directions([&](int64_t layer, int64_t d, const FileArrays& arrays) {
    const LayerShape shape = file.shape(layer);
    const cpu::FrozenPlan plan =
        kernels.plan_frozen(shape, {kernels.lanes, 1, kernels.engine}, static_cast<int>(file.header->bf16_parts),
                            cpu::kept_kind(shape, file.kind()));
    char* const data = arena.take<char>(plan.bytes);
    Direction<T> direction{};
    copy_options(file, arrays, arena, direction.options);
    if (!data) return;
    direction.weights = pack(file, shape, arrays, kernels, plan, data, scratch);
    new (&directions[layer * file.header->directions + d]) Direction<T>(direction);
  });
  return model;
}

lstm_ext_model* build_model(const WeightsFile& file, const cpu::Capability& capability, Arena& arena, void* scratch) {
  return with_type(file.header->float64 != 0, [&](auto type) {
    return make_model(file, capability, arena, static_cast<decltype(type)*>(scratch));
  });
}

// Checks the file, and finds the bytes of a model without its scratch.
const char* open_file(const void* bytes, size_t size, WeightsFile& file, const cpu::Capability** capability,
                      int64_t* model_bytes) {
  if (const char* const error = file.open(bytes, size)) return error;
  if (const char* const error = cpu::lstm_ext_cpu_library()->capability(capability)) return error;
  Arena arena;
  build_model(file, **capability, arena, nullptr);
  *model_bytes = arena.used;
  return nullptr;
}

// The whole file, but not far beyond a header that is none, or that says less; the caller frees the bytes.
const char* read_file(const char* path, char** bytes, size_t* size) {
  std::FILE* const file = std::fopen(path, "rb");
  if (!file) return failure("could not open '%s': %s", path, std::strerror(errno));
  const char* error = nullptr;
  WeightsFile content;
  for (size_t room = sizeof(FileHeader); !error; room *= 2) {
    auto* const larger = static_cast<char*>(std::realloc(*bytes, room));
    if (!larger) {
      error = no_memory(static_cast<int64_t>(room));
      break;
    }
    *bytes = larger;
    *size += std::fread(larger + *size, 1, room - *size, file);
    error = std::ferror(file) ? failure("could not read '%s': %s", path, std::strerror(errno))
                              : content.open_header(larger, *size);
    if (*size < room || *size > content.header->total_bytes) break;
  }
  std::fclose(file);
  return error;
}

}  // namespace
}  // namespace lstm_ext::library

using namespace lstm_ext::library;

uint32_t lstm_ext_abi_version(void) { return LSTM_EXT_ABI_VERSION; }

const char* lstm_ext_capability(const char** name) {
  if (!name) return failure("name: expected a place for it, got NULL");
  const lstm_ext::cpu::Capability* found = nullptr;
  if (const char* const error = lstm_ext::cpu::lstm_ext_cpu_library()->capability(&found)) return error;
  *name = found->name;
  return nullptr;
}

const char* lstm_ext_set_capability(const char* name) {
  if (!name) return failure("name: expected that of an instruction set, got NULL");
  const char* const error = lstm_ext::cpu::lstm_ext_cpu_library()->set_capability(name);
  if (!error) return nullptr;
  constexpr char kSource[] = "set_cpu_capability";  // the name of the function in Python
  constexpr size_t kLength = sizeof(kSource) - 1;
  const bool named = std::strncmp(error, kSource, kLength) == 0;
  return failure("%s%s", named ? "name" : "", named ? error + kLength : error);
}

const char* lstm_ext_model_load(const char* path, lstm_ext_model** model) {
  if (!path) return failure("path: expected that of a weights file, got NULL");
  char* bytes = nullptr;
  size_t size = 0;
  const char* error = read_file(path, &bytes, &size);
  if (!error) error = lstm_ext_model_create(bytes, size, model);
  std::free(bytes);
  return error;
}

const char* lstm_ext_model_create(const void* bytes, size_t size, lstm_ext_model** model) {
  if (!model) return failure("model: expected a place for it, got NULL");
  WeightsFile file;
  const lstm_ext::cpu::Capability* capability = nullptr;
  int64_t needed = 0;
  if (const char* const error = open_file(bytes, size, file, &capability, &needed)) return error;
  const int64_t scratch_needed = scratch_bytes(file);
  void* const memory = allocated(needed);
  void* const scratch = scratch_needed > 0 ? allocated(scratch_needed) : nullptr;
  if (!memory || (scratch_needed > 0 && !scratch)) {
    std::free(memory);
    std::free(scratch);
    return no_memory(needed + scratch_needed);
  }
  Arena arena{static_cast<char*>(memory)};
  *model = build_model(file, *capability, arena, scratch);
  (*model)->allocated = true;
  std::free(scratch);
  return nullptr;
}

const char* lstm_ext_model_size(const void* bytes, size_t size, size_t* needed) {
  if (!needed) return failure("needed: expected a place for it, got NULL");
  WeightsFile file;
  const lstm_ext::cpu::Capability* capability = nullptr;
  int64_t model_bytes = 0;
  if (const char* const error = open_file(bytes, size, file, &capability, &model_bytes)) return error;
  *needed = static_cast<size_t>(model_bytes + scratch_bytes(file) + kAlignment);
  return nullptr;
}

const char* lstm_ext_model_create_in(const void* bytes, size_t size, void* memory, size_t memory_size,
                                     lstm_ext_model** model) {
  if (!model) return failure("model: expected a place for it, got NULL");
  WeightsFile file;
  const lstm_ext::cpu::Capability* capability = nullptr;
  int64_t model_bytes = 0;
  if (const char* const error = open_file(bytes, size, file, &capability, &model_bytes)) return error;
  const auto needed = static_cast<size_t>(model_bytes + scratch_bytes(file) + kAlignment);
  if (!memory || memory_size < needed) return little_memory(needed, memory ? memory_size : 0);
  Arena arena{aligned(memory)};
  *model = build_model(file, *capability, arena, arena.base + model_bytes);
  return nullptr;
}

void lstm_ext_model_destroy(lstm_ext_model* model) {
  if (model && model->allocated) std::free(model);
}

const char* lstm_ext_model_describe(const lstm_ext_model* model, lstm_ext_description* description) {
  if (!model || !description) return failure("%s: expected one, got NULL", model ? "description" : "model");
  const FileHeader& h = model->header;
  *description = lstm_ext_description{};
  description->input_size = static_cast<int64_t>(h.input_size);
  description->hidden_size = static_cast<int64_t>(h.hidden_size);
  description->output_size = static_cast<int64_t>(h.output_size);
  description->num_layers = static_cast<int32_t>(h.num_layers);
  description->directions = static_cast<int32_t>(h.directions);
  description->dtype = h.float64 != 0 ? LSTM_EXT_FLOAT64 : LSTM_EXT_FLOAT32;
  description->weights = static_cast<int32_t>(h.weight_kind);
  description->capability = model->capability->name;
  return nullptr;
}
