#include "cuda/gpu_plan.h"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <string_view>

namespace lstm_ext::cuda {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t bytes_of(Number number) {
  switch (number) {
    case Number::kFloat64: return 8;
    case Number::kFloat32: return 4;
    default: return 2;
  }
}

std::string text(const char* format, double value) {
  char result[64];
  std::snprintf(result, sizeof result, format, value);
  return result;
}

// ---- the model. Its constants are estimates: from the makers' documents, published measurements of single cards, and
// the assembler's tables. No GPU has been asked.

constexpr double kLaunchUs = 0.8;           // from one kernel of a stream to the next
constexpr double kDependentLaunchUs = 0.5;  // the same, where the next one is there already
constexpr double kRampUs = 0.7;             // until a block has its first tiles
constexpr double kEpilogueUs = 0.3;         // cells, from sums to results
constexpr double kCellKernelUs = 2.1;       // a kernel of the pointwise part alone
constexpr double kProductUs = 2;            // ramp and tail of a product of a library
constexpr double kBytesOfClock = 50;        // into one multiprocessor, from the second-level cache
constexpr double kShareOfCache = 0.5;       // of what all multiprocessors together could read from it

// Clocks between two instructions of 16 x 8 x 16 products on one of a multiprocessor's four tensor cores.
int instruction_interval(int capability) {
  if (capability == 80 || capability == 100) return 8;
  return capability == 90 ? 6 : 16;
}

struct Model {
  const LayerFacts& layer;
  const DeviceFacts& device;
  double size, clocks_of_us, rows;

  Model(const LayerFacts& l, const DeviceFacts& d)
      : layer(l),
        device(d),
        size(static_cast<double>(bytes_of(l.number))),
        clocks_of_us(d.clock_ghz * 1e3),
        rows(static_cast<double>(l.batch)) {}

  double units() const { return static_cast<double>(layer.hidden_size); }
  double weight_bytes() const { return 4 * units() * units() * size; }
  // Floating-point operations a microsecond of one multiprocessor.
  double speed() const {
    const double tensor = 4 * 2 * 16 * 8 * 16.0 / instruction_interval(device.capability) * clocks_of_us;
    if (layer.number == Number::kFloat64) return 128 * clocks_of_us;
    if (layer.number == Number::kFloat32) return layer.tf32 ? tensor / 2 : 256 * clocks_of_us;
    return tensor;
  }
  // Reading so many bytes by all multiprocessors: `unique` of them differ, and may not fit into the cache.
  double read_us(double bytes, double unique) const {
    const double cache = bytes / (kShareOfCache * 64 * device.multiprocessors * clocks_of_us);
    const double beyond = std::max(0.0, unique - static_cast<double>(device.l2_bytes));
    // Some drivers do not say how fast the memory is.
    return cache + (device.memory_gb_per_s > 0 ? beyond / (device.memory_gb_per_s * 1e3) : 0);
  }

  double stepwise_us() const {
    const double product = std::max(read_us(weight_bytes(), weight_bytes()),
                                    8 * rows * units() * units() / (speed() * device.multiprocessors));
    return kProductUs + product + kCellKernelUs + 2 * kLaunchUs;
  }

  double step_us(const Plan& plan) const {
    const double tile_rows = plan.rows_of_block;
    const double block_bytes = (4 * kStepUnits + tile_rows) * units() * size;
    const double block_work = 2 * 4 * kStepUnits * tile_rows * units();
    const double waves =
        static_cast<double>(ceil_div(plan.blocks, plan.blocks_of_multiprocessor * device.multiprocessors));
    const double at_once = static_cast<double>(
        std::min<int64_t>(plan.blocks_of_multiprocessor, ceil_div(plan.blocks, device.multiprocessors)));
    const double of_block = at_once * std::max(block_bytes / (kBytesOfClock * clocks_of_us), block_work / speed());
    const double all = read_us(static_cast<double>(plan.blocks) * block_bytes, weight_bytes());
    const double launch = device.capability >= 90 ? kDependentLaunchUs : kLaunchUs;
    // Backward, the parts of a step are written, and read by the next one.
    const double parts = static_cast<double>(plan.parts_bytes) / layer.directions;
    return launch + kRampUs + kEpilogueUs + std::max(waves * of_block, all) + read_us(parts, parts);
  }
};

// The dynamic shared memory of the forward kernel: see ForwardTile.
int64_t shared_of_step(int rows) {
  const int64_t pitch = (rows > kStepRowsFew ? 128 : 256) + 16;
  return kStepStages * (4 * kStepUnits + rows) * pitch;
}

}  // namespace

const char* step_problem(const LayerFacts& layer) {
  if (layer.number == Number::kFloat64) return "there is none for float64";
  if (layer.number == Number::kFloat32 && !layer.tf32) return "products of float32 may not be rounded to TF32 here";
  if (layer.projected) return "there is none for projections";
  if (layer.normalised) return "there is none for layer normalisation";
  return nullptr;
}

Plan plan(const LayerFacts& layer, const DeviceFacts& device, const Request& request) {
  constexpr int64_t kThreadsOfMultiprocessor = 1536;  // the fewest of the supported cards
  Plan result;
  const auto because = [&](auto&& reason) {
    if (request.reasons) result.reasons.push_back(reason());
  };
  if (device.capability < 80) {
    result.problem = "the kernels need compute capability 8.0 or later";
    return result;
  }
  // A step as products and kernels, which have both directions at once.
  const auto stepwise = [&] {
    result.one_product =
        layer.directions == 2 && !layer.packed && !layer.projected && layer.steps >= kStepsOfOneProduct;
    result.products = (result.one_product ? 1 : layer.directions) * (layer.projected ? 2 : 1);
    // Forward, a projection has a kernel only if something is done to what it gives.
    const bool another = layer.projected && (layer.backward || layer.extras);
    result.launches = result.products + (another ? 2 : 1);
  };
  const Model model(layer, device);
  result.stepwise_us = model.stepwise_us();
  const char* none = step_problem(layer);
  bool fits = false, too_many = false;
  if (!none) {
    result.rows_of_block = step_rows(layer.batch);
    result.blocks = step_parts(layer.hidden_size) * ceil_div(layer.batch, result.rows_of_block);
    result.threads = kStepThreads;
    result.shared_bytes = shared_of_step(result.rows_of_block);
    // The grid's second axis has the rows.
    too_many = ceil_div(layer.batch, result.rows_of_block) > 65535;
    fits = result.shared_bytes <= device.shared_of_block && !too_many;
    // A block's shared memory costs another kibibyte.
    const int known = device.step_blocks[result.rows_of_block == kStepRowsFew ? 0 : 1];
    result.blocks_of_multiprocessor =
        known > 0 ? known
                  : std::max<int64_t>(1, std::min(device.shared_of_multiprocessor / (result.shared_bytes + 1024),
                                                  kThreadsOfMultiprocessor / kStepThreads));
    if (layer.backward) {
      result.parts_bytes = 2 * layer.directions * step_parts(layer.hidden_size) * layer.batch * layer.hidden_size * 4;
    }
    result.step_us = model.step_us(result);
  }
  if (none || !fits) {
    const std::string why = none       ? none
                            : too_many ? "its grid has no room for so many rows"
                                       : "its tiles do not fit into a block's shared memory";
    if (!request.any && request.kernel == Kernel::kStep) {
      result.problem = why;
      return result;
    }
    because([&] { return "not the kernel that does a step at once: " + why; });
    stepwise();
    return result;
  }
  const bool small = 2 * result.parts_bytes <= device.l2_bytes;
  const bool faster = small && result.step_us < result.stepwise_us;
  because([&] {
    return text("a step is about %.1f us in one kernel and ", result.step_us) +
           text("%.1f us as a product and a kernel (a model, not measured)", result.stepwise_us);
  });
  if (!request.any) {
    result.kernel = request.kernel;
    because([] { return std::string("it is requested"); });
  } else if (!small) {
    because([] { return std::string("the partial sums of one kernel would fill the second-level cache"); });
  } else if (faster && request.step == Outcome::kRight) {
    result.kernel = Kernel::kStep;
    because([] { return std::string("it has been right on this device"); });
  } else if (faster) {
    because([&] {
      return std::string("the kernel that does a step at once ") +
             (request.step == Outcome::kWrong ? "was wrong on this device" : "has not been tried on this device yet");
    });
  }
  if (result.kernel == Kernel::kStep) {
    result.launches = 1;
  } else {
    stepwise();
  }
  return result;
}

namespace {

// Two bits a device; a process has no more than 32 of them.
std::atomic<uint64_t> validated_devices{0};
uint64_t bit_of(int device, bool tf32) {
  return device >= 0 && device < 32 ? uint64_t{1} << (2 * device + (tf32 ? 1 : 0)) : 0;
}

constexpr int kNothing = -1;
std::atomic<int> request_of_process{kNothing};
thread_local int requested_by_thread = kNothing;
int number_of(const Kernel* kernel) { return kernel ? static_cast<int>(*kernel) : kNothing; }

}  // namespace

void set_step_validated(int device, bool tf32, bool validated) {
  if (validated) {
    validated_devices |= bit_of(device, tf32);
  } else {
    validated_devices &= ~bit_of(device, tf32);
  }
}

bool is_step_validated(int device, bool tf32) { return (validated_devices & bit_of(device, tf32)) != 0; }

void set_request(const Kernel* kernel) { request_of_process = number_of(kernel); }
void set_request_of_thread(const Kernel* kernel) { requested_by_thread = number_of(kernel); }

std::optional<Kernel> request_of_thread() {
  if (requested_by_thread == kNothing) return {};
  return static_cast<Kernel>(requested_by_thread);
}

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
  if (chosen.empty() || chosen == "auto") return request;
  *known = chosen == "step" || chosen == "stepwise";
  request.any = false;
  if (chosen == "step") request.kernel = Kernel::kStep;
  return request;
}

const std::vector<DeviceFacts>& known_devices() {
  constexpr int64_t kKiB = 1024, kMiB = 1024 * kKiB;
  static const std::vector<DeviceFacts> devices = {
      {"A100", 80, 108, 40 * kMiB, 163 * kKiB, 164 * kKiB, 1.41, 1555},
      {"A30", 80, 56, 24 * kMiB, 163 * kKiB, 164 * kKiB, 1.44, 933},
      {"A10", 86, 72, 6 * kMiB, 99 * kKiB, 100 * kKiB, 1.695, 600},
      {"RTX 3090", 86, 82, 6 * kMiB, 99 * kKiB, 100 * kKiB, 1.695, 936},
      {"L4", 89, 58, 48 * kMiB, 99 * kKiB, 100 * kKiB, 2.04, 300},
      {"RTX 4090", 89, 128, 72 * kMiB, 99 * kKiB, 100 * kKiB, 2.52, 1008},
      {"H100", 90, 132, 50 * kMiB, 227 * kKiB, 228 * kKiB, 1.755, 3350},
      {"H200", 90, 132, 50 * kMiB, 227 * kKiB, 228 * kKiB, 1.755, 4800},
      {"B200", 100, 148, 126 * kMiB, 227 * kKiB, 228 * kKiB, 1.85, 8000},
      {"RTX 5090", 120, 170, 96 * kMiB, 99 * kKiB, 100 * kKiB, 2.41, 1792},
  };
  return devices;
}

}  // namespace lstm_ext::cuda
