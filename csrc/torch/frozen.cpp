#include "torch/frozen.h"

#include <ATen/ATen.h>

#include <cstring>
#include <string>

#include "contract/cell.h"
#include "cpu/frozen.h"
#include "cpu/kernels.h"
#include "torch/backend.h"
#include "torch/scratch.h"
#include "torch/tensors.h"

namespace lstm_ext {
namespace {

constexpr char kMark[8] = {'l', 's', 't', 'm', 'i', 'c', 'e', '3'};
constexpr char kMarkOfGru[8] = {'g', 'r', 'u', '_', 'i', 'c', 'e', '4'};

struct Header {
  char mark[8];
  char instruction_set[24];
  int64_t input_size, hidden_size, output_size, bytes;
  int32_t float64, projected;
  WeightKind rounded_to;  // equal to plan.kind, or kOwn
  uint32_t checksum;      // see checksum_of
  cpu::FrozenPlan plan;
};
static_assert(std::is_trivially_copyable_v<Header>);
static_assert(std::has_unique_object_representations_v<Header>);  // its bytes are compared

// The checksum of a header, computed as if its checksum were 0. It finds damage; is_sound finds deliberate changes.
uint32_t checksum_of(Header header) {
  header.checksum = 0;
  uint64_t words[sizeof(Header) / sizeof(uint64_t)];
  static_assert(sizeof(words) == sizeof(Header));
  std::memcpy(words, &header, sizeof(words));
  uint64_t sum = 0xcbf29ce484222325;  // FNV-1a, by words
  for (const uint64_t word : words) sum = ((sum ^ word) * 0x100000001b3) ^ (sum >> 29);
  return static_cast<uint32_t>(sum ^ sum >> 32);
}

// The processor that weights of this kind are packed for: the instruction set, and whether it multiplies bytes.
constexpr char kVnni[] = "+vnni";
bool for_vnni(WeightKind kept) { return kept == WeightKind::kInt8 && cpu::kernels<float>().multiplies_int8(); }
bool is_for_this_processor(const Header& header) {
  const char* const name = cpu::capability().name;
  const size_t length = std::strlen(name);
  return std::strncmp(header.instruction_set, name, length) == 0 &&
         std::strcmp(header.instruction_set + length, for_vnni(header.plan.kind) ? kVnni : "") == 0;
}

const Header& header_of(const at::Tensor& frozen) { return *static_cast<const Header*>(frozen.const_data_ptr()); }

// The weights lie behind the header.
constexpr int64_t kWeightsAt = (sizeof(Header) + cpu::kCacheLine - 1) / cpu::kCacheLine * cpu::kCacheLine;

LayerShape shape_of(const Header& header) {
  return {1,       1,      header.input_size, header.hidden_size, header.output_size, header.projected != 0, false,
          nullptr, nullptr};
}

// Whether weights of these sizes have the header's plan, so that all places lie within the bytes.
template <typename T>
bool has_plan(const Header& header) {
  const cpu::Kernels<T>& kernels = cpu::kernels<T>();
  const cpu::FrozenPlan plan = kernels.plan_frozen(shape_of(header), {kernels.lanes, 1, kernels.engine},
                                                   header.plan.bf16_parts, header.plan.kind);
  return std::memcmp(&plan, &header.plan, sizeof(plan)) == 0 && kWeightsAt + plan.bytes == header.bytes;
}

// Whether freeze_direction could have written a header whose sizes are those of the layer. A file may hold any bytes.
bool is_sound(const Header& header) {
  const auto is_kept = [](WeightKind kind) {
    return kind == WeightKind::kOwn || kind == WeightKind::kBFloat16 || kind == WeightKind::kInt8;
  };
  if (header.checksum != checksum_of(header)) return false;
  const WeightKind kind = header.plan.kind;
  if (!is_kept(header.rounded_to) || (kind != WeightKind::kOwn && kind != header.rounded_to)) return false;
  if (header.float64 != 0 && header.rounded_to != WeightKind::kOwn) return false;
  if (!std::memchr(header.instruction_set, '\0', sizeof(header.instruction_set))) return false;
  if (header.plan.bf16_parts < 0 || header.plan.bf16_parts > 3) return false;
  if (!is_for_this_processor(header)) return true;  // then only the header is read
  return header.float64 != 0 ? has_plan<double>(header) : has_plan<float>(header);
}

// A weight rounded to int8, with a factor for each row.
struct Rounded {
  at::Tensor numbers, factors;
};
Rounded rounded_to_int8(const at::Tensor& weight, at::ScalarType type) {
  const at::Tensor w = weight.to(type);
  // With any factor, a row of zeros stays zeros.
  const at::Tensor factors = w.abs().amax(/*dim=*/1).div_(127).clamp_min_(std::numeric_limits<float>::min());
  return {w.div(factors.unsqueeze(1)).round_().clamp_(-127, 127).to(at::kChar), factors};
}
at::Tensor widened(const Rounded& rounded) { return rounded.numbers.to(at::kFloat).mul_(rounded.factors.unsqueeze(1)); }

template <typename T>
at::Tensor freeze_direction(const at::Tensor* weights, const WeightCount& count, bool has_bias, WeightKind kind,
                            bool gru) {
  const at::ScalarType type = c10::CppTypeToScalarType<T>::value;
  const int64_t H = weights[0].size(0) / (gru ? 3 : 4);
  const LayerShape shape{1, 1, weights[0].size(1), H, weights[1].size(1), count.projected, false, nullptr, nullptr};
  const cpu::Kernels<T>& kernels = cpu::kernels<T>();
  if (weights[0].scalar_type() == at::kBFloat16 && kind == WeightKind::kOwn) kind = WeightKind::kBFloat16;
  const WeightKind kept = cpu::kept_kind(shape, kind);
  const cpu::FrozenPlan plan =
      kernels.plan_frozen(shape, {kernels.lanes, 1, kernels.engine}, bf16_parts_for(weights[0].scalar_type()), kept);
  const at::Tensor frozen = at::empty({kWeightsAt + plan.bytes}, at::kByte);
  char* const data = static_cast<char*>(frozen.mutable_data_ptr());
  advise_huge_pages(data, frozen.nbytes());
  Header& header = *new (data) Header{};
  std::memcpy(header.mark, gru ? kMarkOfGru : kMark, sizeof(kMark));
  const std::string made_for = std::string(cpu::capability().name) + (for_vnni(kept) ? kVnni : "");
  TORCH_INTERNAL_ASSERT(made_for.size() < sizeof(header.instruction_set));
  std::strncpy(header.instruction_set, made_for.c_str(), sizeof(header.instruction_set) - 1);
  header.input_size = shape.input_size;
  header.hidden_size = H;
  header.output_size = shape.output_size;
  header.bytes = frozen.numel();
  header.float64 = std::is_same_v<T, double>;
  header.projected = count.projected;
  header.rounded_to = kind;
  header.plan = plan;
  header.checksum = checksum_of(header);

  // The weights that the layer computes with.
  std::vector<at::Tensor> used;
  for (int64_t i = 0; i < count.per_direction; ++i) used.push_back(weights[i].detach().to(type).contiguous());
  Rounded rounded[2];
  for (int i = 0; i < 2; ++i) {
    if (kind == WeightKind::kInt8) {
      rounded[i] = rounded_to_int8(used[i], type);
      used[i] = widened(rounded[i]);
    } else if (kind == WeightKind::kBFloat16) {
      used[i] = used[i].to(at::kBFloat16).to(type);
    }
  }
  // Biases and factors of a GRU have zeros for the gate that a weight does not have; see cell::GruRow.
  for (int64_t i = 0; gru && i < count.per_direction; ++i) {
    const int64_t gap = (i % 2 == 0 ? cell::kGruRecurrent : cell::kGruInput) * H;
    const auto spread = [&](const at::Tensor& t) {
      return at::cat({t.narrow(0, 0, gap), at::zeros_like(t.narrow(0, 0, H)), t.narrow(0, gap, 3 * H - gap)});
    };
    if (i >= 2) used[i] = spread(used[i]);
    if (i < 2 && kind == WeightKind::kInt8) rounded[i].factors = spread(rounded[i].factors);
  }
  const auto data_of = [&](int64_t i) { return used[i].const_data_ptr<T>(); };
  const LayerWeights<T> all{data_of(0), data_of(1), has_bias ? data_of(2) : nullptr, has_bias ? data_of(3) : nullptr,
                            count.projected ? data_of(count.per_direction - 1) : nullptr};
  const auto factors_of = [&](int i) -> const void* {
    return kind == WeightKind::kInt8 ? rounded[i].factors.const_data_ptr() : nullptr;
  };
  cpu::freeze(kernels, all, {factors_of(0), factors_of(1)}, shape, plan, data + kWeightsAt, gru);
  return frozen;
}

}  // namespace

std::vector<at::Tensor> freeze_weights(const std::vector<at::Tensor>& weights, bool has_bias, bool bidirectional,
                                       WeightKind kind, bool gru) {
  const WeightCount count = count_weights(static_cast<int64_t>(weights.size()), has_bias, bidirectional);
  const at::ScalarType dtype = weights[0].scalar_type();
  TORCH_CHECK(kind == WeightKind::kOwn || dtype != at::kDouble,
              "lstm_ext: float64 weights are frozen as they are, not in fewer bits");
  std::vector<at::Tensor> frozen;
  for (int64_t d = 0; d < (bidirectional ? 2 : 1); ++d) {
    const at::Tensor* const own = weights.data() + d * count.per_direction;
    for (int64_t i = 0; i < count.per_direction; ++i) {
      TORCH_CHECK(own[i].is_cpu() && own[i].scalar_type() == dtype,
                  "lstm_ext: weights to freeze must be of one dtype, on the CPU");
    }
    frozen.push_back(dtype == at::kDouble ? freeze_direction<double>(own, count, has_bias, kind, gru)
                                          : freeze_direction<float>(own, count, has_bias, kind, gru));
  }
  return frozen;
}

void check_frozen(const std::vector<at::Tensor>& frozen, const LayerSizes& sizes, const at::Tensor& input, bool gru) {
  TORCH_CHECK(static_cast<int64_t>(frozen.size()) == sizes.directions, "lstm_ext: got ", frozen.size(),
              " tensors of frozen weights, expected one for each direction, ", sizes.directions);
  for (size_t direction = 0; direction < frozen.size(); ++direction) {
    const at::Tensor& tensor = frozen[direction];
    const bool bytes = tensor.is_cpu() && tensor.scalar_type() == at::kByte && tensor.dim() == 1 &&
                       tensor.is_contiguous() && tensor.numel() > static_cast<int64_t>(sizeof(Header)) &&
                       reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % alignof(Header) == 0;
    TORCH_CHECK(bytes && std::memcmp(tensor.const_data_ptr(), gru ? kMarkOfGru : kMark, sizeof(kMark)) == 0 &&
                    header_of(tensor).bytes == tensor.numel(),
                "lstm_ext: frozen weights are not what freeze_weights gives", gru ? " for a GRU: " : ": ",
                tensor.toString(), " of shape ", tensor.sizes());
    const Header& header = header_of(tensor);
    TORCH_CHECK(header.input_size == sizes.input_size && header.hidden_size == sizes.hidden_size &&
                    header.output_size == sizes.output_size && (header.projected != 0) == sizes.projected,
                "lstm_ext: frozen weights are of a layer with ", header.input_size, " features and ",
                header.hidden_size, " units, expected ", sizes.input_size, " and ", sizes.hidden_size);
    TORCH_CHECK((header.float64 != 0) == (sizes.sum_type == at::kDouble),
                "lstm_ext: frozen weights are of another dtype than the input, ", input.scalar_type());
    TORCH_CHECK(is_sound(header), "lstm_ext: the frozen weights of the layer with ", sizes.input_size, " features and ",
                sizes.hidden_size, " units, direction ", direction,
                ", were made by another version of lstm_ext, or are damaged: freeze the layer again");
  }
}

bool is_ready(const std::vector<at::Tensor>& frozen) {
  for (const at::Tensor& tensor : frozen) {
    const Header& header = header_of(tensor);
    if (is_for_this_processor(header)) continue;
    TORCH_WARN_ONCE("lstm_ext: weights were frozen for ", header.instruction_set, ", and ", cpu::capability().name,
                    for_vnni(header.plan.kind) ? kVnni : "",
                    " is in use: each call packs them. Freeze them again in this process.");
    return false;
  }
  return true;
}

std::vector<at::Tensor> thawed(const std::vector<at::Tensor>& frozen, const std::vector<at::Tensor>& weights) {
  std::vector<at::Tensor> result = weights;
  const size_t per_direction = weights.size() / frozen.size();
  for (size_t d = 0; d < frozen.size(); ++d) {
    const WeightKind kind = header_of(frozen[d]).rounded_to;
    for (int i = 0; i < 2; ++i) {
      at::Tensor& weight = result[d * per_direction + i];
      if (kind == WeightKind::kBFloat16) weight = weight.to(at::kBFloat16).to(at::kFloat);
      if (kind == WeightKind::kInt8) weight = widened(rounded_to_int8(weight, at::kFloat));
    }
  }
  return result;
}

template <typename T>
FrozenWeights<T> frozen_weights(const at::Tensor& frozen) {
  const Header& header = header_of(frozen);
  cpu::Arena arena{const_cast<char*>(static_cast<const char*>(frozen.const_data_ptr())) + kWeightsAt};
  return cpu::place_frozen<T>(arena, shape_of(header), header.plan, cpu::kernels<T>().lanes);
}

template FrozenWeights<float> frozen_weights(const at::Tensor&);
template FrozenWeights<double> frozen_weights(const at::Tensor&);

}  // namespace lstm_ext
