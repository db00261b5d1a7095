#include "cuda/gpu_plan.h"

#include <algorithm>
#include <atomic>
#include <charconv>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <system_error>
#include <tuple>

namespace lstm_ext::cuda {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The bytes of an operand of the persistent kernel's product; the next function is how many operands a row leaves for
// the next step.
int operand_bytes(const LayerFacts& layer) {
  // Same as Types<T>::Gradient: float16 would lose gradients.
  return layer.number == Number::kFloat32 || (layer.number == Number::kFloat16 && layer.backward) ? 4 : 2;
}
int64_t persistent_length(const LayerFacts& layer, int number) {
  const int64_t numbers = kPieceBytes / number;
  return ceil_div(layer.hidden_size, numbers) * numbers * (layer.backward ? 4 : 1);
}

// The dynamic shared memory of the forward kernel: see ForwardTile.
int64_t shared_of_step(int rows) {
  const int64_t row_bytes = rows > kStepRowsFew ? 128 : 256;
  return kStepStages * (4 * kStepUnits + rows) * row_bytes;
}

}  // namespace

const char* step_problem(const LayerFacts& layer) {
  if (layer.number == Number::kFloat64) return "there is none for float64";
  if (layer.number == Number::kFloat32 && !layer.tf32) return "products of float32 may not be rounded to TF32 here";
  if (layer.projected) return "there is none for projections";
  if (layer.normalised) return "there is none for layer normalisation";
  if (layer.cell_options) return "there is none for another cell than the plain one";
  return nullptr;
}

namespace {

// The persistent kernel of a layer. A multiprocessor has one block: its registers are full of weights.
Plan::Persistent persistent_of(const LayerFacts& layer, const DeviceFacts& device,
                               const std::optional<int64_t>& most_blocks) {
  Plan::Persistent result;
  const int number = operand_bytes(layer);
  const int64_t length = persistent_length(layer, number), tiles = ceil_div(layer.batch, kPersistentRows);
  const PersistentShape shape = persistent_shape(layer.backward, number, 1);
  const int64_t missing = std::max<int64_t>(length - shape.depth(number), 0);
  result.extra = static_cast<int>(ceil_div(missing * number, int64_t{4} * kPersistentParts * kPieceBytes));
  result.shared_bytes = persistent_shared(layer.backward, number, 1, result.extra);
  constexpr int64_t kMost = int64_t{1} << 30;
  if (layer.steps < 2) {
    result.problem = "the sequence has one step";
  } else if (layer.steps > kMost || layer.batch > kMost) {
    result.problem = "it counts steps and rows in 32 bits";
  } else if (result.shared_bytes > device.shared_of_block) {
    result.problem = "its weights do not fit into registers and shared memory";
  } else if (device.shared) {
    result.problem = "the device is shared with other programs, and its blocks wait for each other";
  } else {
    const int64_t of_group = ceil_div(layer.hidden_size, shape.units) * layer.directions;
    const int64_t room = std::min<int64_t>(device.multiprocessors, most_blocks.value_or(device.multiprocessors));
    result.groups = static_cast<int>(std::min(tiles, room / of_group));
    // Two tiles at once, where the weights of a thread take half of its registers.
    const int64_t shared = persistent_shared(layer.backward, number, 2, 0);
    if (tiles > result.groups && length <= persistent_shape(layer.backward, number, 2).depth(number) &&
        shared <= device.shared_of_block) {
      result.row_tiles = 2;
      result.groups = static_cast<int>(std::min(ceil_div(tiles, 2), room / of_group));
      result.shared_bytes = shared;
    }
    result.blocks = of_group * result.groups;
    if (result.groups == 0) result.problem = "its blocks do not all find a multiprocessor at once";
  }
  return result;
}

// A step as products and kernels, which have both directions at once.
void count_launches(Plan& result, const LayerFacts& layer) {
  result.one_product = layer.directions == 2 && !layer.packed && !layer.projected && layer.steps >= kStepsOfOneProduct;
  result.products = (result.one_product ? 1 : layer.directions) * (layer.projected ? 2 : 1);
  // Forward, a projection has a kernel only if something is done to what it gives.
  const bool another = layer.projected && (layer.backward || layer.options);
  result.launches = result.products + (another ? 2 : 1);
}

// The kernel of a step: its grid, or why it cannot run.
void plan_step(Plan& result, const LayerFacts& layer, const DeviceFacts& device) {
  result.rows_of_block = step_rows(layer.batch);
  result.blocks = step_parts(layer.hidden_size) * ceil_div(layer.batch, result.rows_of_block);
  result.threads = kStepThreads;
  result.shared_bytes = shared_of_step(result.rows_of_block);
  if (layer.backward) {
    result.parts_bytes = 2 * layer.directions * step_parts(layer.hidden_size) * layer.batch * layer.hidden_size * 4;
  }
  // The grid's second axis has the rows.
  if (ceil_div(layer.batch, result.rows_of_block) > 65535) {
    result.step_problem = "its grid has no room for so many rows";
  } else if (result.shared_bytes > device.shared_of_block) {
    result.step_problem = "its tiles do not fit into a block's shared memory";
  }
}

// Why `auto` takes no kernel with this problem and this outcome, in words that follow its name; or nothing.
std::string_view refusal(std::string_view problem, Outcome outcome) {
  if (!problem.empty()) return problem;
  if (outcome == Outcome::kRight) return {};
  return outcome == Outcome::kWrong ? "it was wrong on this device" : "it has not been tried on this device yet";
}

}  // namespace

Plan plan(const LayerFacts& layer, const DeviceFacts& device, const Request& request) {
  Plan result;
  const auto because = [&](std::string_view first, std::string_view second = {}) {
    if (request.reasons) result.reasons.push_back(std::string(first).append(second));
  };
  if (device.capability < 80) {
    result.problem = "the kernels need compute capability 8.0 or later";
    return result;
  }
  if (const char* none = step_problem(layer)) {
    result.step_problem = result.persistent.problem = none;
  } else {
    plan_step(result, layer, device);
    result.persistent = persistent_of(layer, device, request.most_blocks);
  }
  if (request.any) {
    const std::string_view no_persistent = refusal(result.persistent.problem, request.persistent);
    std::string_view no_step = refusal(result.step_problem, request.step);
    const Kernel measured = request.measured.value_or(Kernel::kStepwise);
    if (request.measured &&
        (measured == Kernel::kStepwise || (measured == Kernel::kStep ? no_step : no_persistent).empty())) {
      result.kernel = measured;
      because("it was the fastest when calls like this one were measured on this device");
    } else if (no_persistent.empty()) {
      result.kernel = Kernel::kPersistent;
      because("it has been right on this device");
    } else {
      because("not persistent: ", no_persistent);
      if (no_step.empty() && 2 * result.parts_bytes > device.l2_bytes) {
        no_step = "its partial sums would fill the second-level cache";
      }
      if (no_step.empty()) {
        result.kernel = Kernel::kStep;
        because("it has been right on this device");
      } else {
        because("not step: ", no_step);
      }
    }
  } else {
    result.kernel = request.kernel;
    result.replaced = request.kernel == Kernel::kPersistent && !result.persistent.problem.empty();
    if (result.replaced) {
      result.kernel = Kernel::kStep;
      because("not persistent: ", result.persistent.problem);
    } else {
      because("it is requested");
    }
    if (result.kernel == Kernel::kStep && !result.step_problem.empty()) {
      result.problem = result.step_problem;
      result.kernel = Kernel::kStepwise;  // for a backward pass, which goes on
    }
  }
  if (result.kernel == Kernel::kStep) result.launches = 1;
  if (result.kernel == Kernel::kStepwise) count_launches(result, layer);
  return result;
}

namespace {

// Four bits a device; more than 16 of them in a process run stepwise.
std::atomic<uint64_t> validated_devices{0};
uint64_t bit_of(int device, Kernel kernel, bool tf32) {
  const int place = 4 * device + (kernel == Kernel::kPersistent ? 2 : 0) + (tf32 ? 1 : 0);
  return device >= 0 && device < 16 ? uint64_t{1} << place : 0;
}

constexpr int kNothing = -1;
std::atomic<int> request_of_process{kNothing};
thread_local int requested_by_thread = kNothing;
int number_of(const Request* request) { return request ? static_cast<int>(request->kernel) : kNothing; }

}  // namespace

void set_validated(int device, Kernel kernel, bool tf32, bool validated) {
  if (validated) {
    validated_devices |= bit_of(device, kernel, tf32);
  } else {
    validated_devices &= ~bit_of(device, kernel, tf32);
  }
}

bool is_validated(int device, Kernel kernel, bool tf32) {
  return (validated_devices & bit_of(device, kernel, tf32)) != 0;
}

namespace {
// Device, directions, number, TF32, projected, backward, packed, then hidden units, and buckets of steps and batch.
using SizesOfClass = std::tuple<int, int, Number, bool, bool, bool, bool, int64_t, int, int>;
struct Measured {
  std::mutex one_at_a_time;
  std::map<SizesOfClass, Kernel> kernels;
};
Measured& measured_ones() {
  static Measured all;
  return all;
}
int bucket(int64_t size) {
  int bits = 0;
  while (int64_t{1} << bits < size) ++bits;
  return bits;
}
SizesOfClass class_of(int device, const LayerFacts& layer) {
  return {device,         layer.directions, layer.number,      layer.tf32,          layer.projected,
          layer.backward, layer.packed,     layer.hidden_size, bucket(layer.steps), bucket(layer.batch)};
}
}  // namespace

void set_measured(int device, const LayerFacts& layer, std::optional<Kernel> kernel) {
  Measured& all = measured_ones();
  const std::lock_guard<std::mutex> lock(all.one_at_a_time);
  if (kernel) {
    all.kernels[class_of(device, layer)] = *kernel;
  } else {
    all.kernels.erase(class_of(device, layer));
  }
}

std::optional<Kernel> measured(int device, const LayerFacts& layer) {
  Measured& all = measured_ones();
  const std::lock_guard<std::mutex> lock(all.one_at_a_time);
  if (all.kernels.empty()) return std::nullopt;
  const auto found = all.kernels.find(class_of(device, layer));
  return found == all.kernels.end() ? std::nullopt : std::optional<Kernel>(found->second);
}

namespace {
constexpr const char* kKernelNames[] = {"stepwise", "step", "persistent"};
}  // namespace

namespace {
thread_local std::optional<double> wait_limit_of_thread;
}  // namespace

void set_wait_limit_of_thread(const double* seconds) {
  wait_limit_of_thread = seconds ? std::optional<double>(*seconds) : std::nullopt;
}

std::optional<int64_t> wait_limit() {
  double seconds = 10;
  const char* text = std::getenv("LSTM_EXT_CUDA_WAIT_LIMIT");
  if (wait_limit_of_thread) {
    seconds = *wait_limit_of_thread;
  } else if (text && *text) {
    char* end = nullptr;
    seconds = std::strtod(text, &end);
    if (*end != 0) return {};
  }
  if (!(seconds >= 0 && seconds < 1e9)) return {};
  // A limit that is not 0 stays one.
  return seconds > 0 ? std::max<int64_t>(1, static_cast<int64_t>(seconds * 1e9)) : 0;
}

std::optional<int64_t> free_multiprocessors() {
  const char* text = std::getenv("LSTM_EXT_CUDA_FREE_MULTIPROCESSORS");
  if (!text || !*text) return 0;
  // Not strtoll: newer headers of glibc bind it to a symbol that systems of a wheel lack.
  const char* const end = text + std::strlen(text);
  int64_t number = 0;
  const auto [rest, error] = std::from_chars(text, end, number);
  if (error != std::errc() || rest != end || number < 0 || number > 10000) return {};
  return number;
}

namespace {
struct Refused {
  std::mutex one_at_a_time;
  std::map<const DeviceFacts*, int64_t> blocks;  // the fewest that were refused
};
Refused& refused_ones() {
  static Refused all;
  return all;
}
}  // namespace

void note_refused(const DeviceFacts* device, std::optional<int64_t> blocks) {
  Refused& all = refused_ones();
  const std::lock_guard<std::mutex> lock(all.one_at_a_time);
  if (!blocks) {
    all.blocks.erase(device);
    return;
  }
  const auto [known, is_new] = all.blocks.emplace(device, *blocks);
  if (!is_new) known->second = std::min(known->second, *blocks);
}

int64_t most_blocks(const DeviceFacts* device) {
  Refused& all = refused_ones();
  const std::lock_guard<std::mutex> lock(all.one_at_a_time);
  const auto known = all.blocks.find(device);
  const int64_t room = known == all.blocks.end() ? device->multiprocessors : known->second - 1;
  return std::max<int64_t>(0, std::min(room, device->multiprocessors - free_multiprocessors().value_or(0)));
}

std::optional<Request> request_named(std::string_view name) {
  Request request;
  if (name == "auto" || name == "torch") return request;
  request.any = false;
  for (int i = 0; i < 3; ++i) {
    request.kernel = static_cast<Kernel>(i);
    if (name == kKernelNames[i]) return request;
  }
  return {};
}
const char* name_of(Kernel kernel) { return kKernelNames[static_cast<int>(kernel)]; }

void set_request(const Request* request) { request_of_process = number_of(request); }
void set_request_of_thread(const Request* request) { requested_by_thread = number_of(request); }
bool has_request_of_thread() { return requested_by_thread != kNothing; }

Request current_request(bool* known) {
  Request request;
  *known = true;
  const int asked = requested_by_thread != kNothing ? requested_by_thread : request_of_process.load();
  if (asked != kNothing) {
    request.any = false;
    request.kernel = static_cast<Kernel>(asked);
    return request;
  }
  const char* name = std::getenv("LSTM_EXT_CUDA_KERNEL");
  const std::string_view chosen = name ? name : "";
  if (chosen.empty()) return request;
  const std::optional<Request> named = request_named(chosen);
  *known = named.has_value();
  return named.value_or(request);
}

const std::vector<DeviceFacts>& known_devices() {
  constexpr int64_t kKiB = 1024, kMiB = 1024 * kKiB;
  static const std::vector<DeviceFacts> devices = {
      {"A100", 80, 108, 40 * kMiB, 163 * kKiB},   {"A30", 80, 56, 24 * kMiB, 163 * kKiB},
      {"A10", 86, 72, 6 * kMiB, 99 * kKiB},       {"RTX 3090", 86, 82, 6 * kMiB, 99 * kKiB},
      {"L4", 89, 58, 48 * kMiB, 99 * kKiB},       {"RTX 4090", 89, 128, 72 * kMiB, 99 * kKiB},
      {"H100", 90, 132, 50 * kMiB, 227 * kKiB},   {"H200", 90, 132, 50 * kMiB, 227 * kKiB},
      {"B200", 100, 148, 126 * kMiB, 227 * kKiB}, {"RTX 5090", 120, 170, 96 * kMiB, 99 * kKiB},
  };
  return devices;
}

}  // namespace lstm_ext::cuda
