#include "cuda/gpu_plan.h"

#include <algorithm>
#include <atomic>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <system_error>
#include <tuple>

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

// ---- the model

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

struct Model {
  const LayerFacts& layer;
  const DeviceFacts& device;
  const ModelConstants& constant;
  double size, clocks_of_us, rows;

  Model(const LayerFacts& l, const DeviceFacts& d)
      : layer(l),
        device(d),
        constant(d.constants),
        size(static_cast<double>(bytes_of(l.number))),
        clocks_of_us(d.clock_ghz * 1e3),
        rows(static_cast<double>(l.batch)) {}

  double units() const { return static_cast<double>(layer.hidden_size); }
  double weight_bytes() const { return 4 * units() * units() * size; }
  // Floating-point operations a microsecond of one multiprocessor.
  double speed() const {
    const double tensor = 4 * 2 * 16 * 8 * clocks_of_us;  // for each number of depth, and each clock between two
    if (layer.number == Number::kFloat64) return 128 * clocks_of_us;
    if (layer.number != Number::kFloat32) return tensor * 16 / constant.instruction_clocks;
    return layer.tf32 ? tensor * 8 / constant.instruction_tf32_clocks : 256 * clocks_of_us;
  }
  // Reading so many bytes by all multiprocessors: `unique` of them differ, and may not fit into the cache.
  double read_us(double bytes, double unique) const {
    const double cache = bytes / (constant.share_of_cache * 64 * device.multiprocessors * clocks_of_us);
    const double beyond = std::max(0.0, unique - static_cast<double>(device.l2_bytes));
    // Some drivers do not say how fast the memory is.
    return cache + (device.memory_gb_per_s > 0 ? beyond / (device.memory_gb_per_s * 1e3) : 0);
  }

  double stepwise_us() const {
    const double product = std::max(read_us(weight_bytes(), weight_bytes()),
                                    8 * rows * units() * units() / (speed() * device.multiprocessors));
    return constant.product_us + product + constant.cell_kernel_us + 2 * constant.launch_us;
  }

  double step_us(const Plan& plan) const {
    const double tile_rows = plan.rows_of_block;
    const double block_bytes = (4 * kStepUnits + tile_rows) * units() * size;
    const double block_work = 2 * 4 * kStepUnits * tile_rows * units();
    const double waves =
        static_cast<double>(ceil_div(plan.blocks, plan.blocks_of_multiprocessor * device.multiprocessors));
    const double at_once = static_cast<double>(
        std::min<int64_t>(plan.blocks_of_multiprocessor, ceil_div(plan.blocks, device.multiprocessors)));
    const double tiles = units() * size / (plan.rows_of_block > kStepRowsFew ? 128 : 256);
    const double of_block =
        std::max(at_once * std::max(block_bytes / (constant.bytes_of_clock * clocks_of_us), block_work / speed()),
                 tiles * constant.tile_clocks / clocks_of_us);
    const double all = read_us(static_cast<double>(plan.blocks) * block_bytes, weight_bytes());
    const double launch = device.capability >= 90 ? constant.dependent_launch_us : constant.launch_us;
    // Backward, the parts of a step are written, and read by the next one.
    const double parts = static_cast<double>(plan.parts_bytes) / layer.directions;
    const double epilogue = constant.epilogue_us * tile_rows / kStepRowsFew;
    return launch + constant.ramp_us + epilogue + std::max(waves * of_block, all) + read_us(parts, parts);
  }

  double persistent_us(const Plan::Persistent& plan) const {
    const bool mailbox = plan.exchange == Exchange::kMailbox;
    const int number = operand_bytes(layer);
    const PersistentShape shape = persistent_shape(layer.backward, plan.exchange, number);
    const int64_t length = persistent_length(layer, number);
    const auto pieces = static_cast<double>(
        std::min<int64_t>(shape.pieces, ceil_div(length * number, int64_t{4} * shape.parts * kPieceBytes)));
    // Two warps share a tensor core, and a piece is two instructions. A warp with one tile has two chains of them, else
    // as many as tiles. Weights in shared memory come by 128 bytes a clock.
    const double issued =
        shape.tiles * pieces * 2 * 2 * (number == 4 ? constant.instruction_tf32_clocks : constant.instruction_clocks);
    const double chain = pieces * (shape.tiles == 1 ? 1 : 2) * constant.chain_clocks;
    const double product = std::max(issued, chain) + static_cast<double>(plan.extra * shape.extra_bytes) / 128;
    const auto cells = static_cast<double>(kPersistentRows * std::min<int64_t>(layer.hidden_size, shape.units));
    double turn = product + constant.turn_clocks + constant.cell_clocks * std::max(1.0, cells / 128);
    const double tiles = static_cast<double>(ceil_div(layer.batch, kPersistentRows));
    const double start = constant.start_us / chunk_steps();
    if (!mailbox) {
      const double waves = static_cast<double>(ceil_div(plan.blocks, device.multiprocessors)) / layer.directions;
      return waves * (turn + constant.own_clocks) / clocks_of_us + start;
    }
    const double turns = std::ceil(tiles / plan.groups);
    // With several tiles, each begins with a load; and data that a block sends travels while it works on the others.
    turn += constant.own_clocks + (turns > 1 ? constant.load_clocks : 0);
    const double travel = std::max(0.0, constant.mailbox_clocks - constant.own_clocks - (turns - 1) * turn);
    const double blocks = static_cast<double>(plan.blocks) / layer.directions / plan.groups;
    const double bytes = blocks * rows * static_cast<double>(length * number);
    return (turns * turn + travel) / clocks_of_us + read_us(bytes, 0) + start;
  }
  // The steps of a chunk, as the layer cuts them.
  double chunk_steps() const {
    const int64_t of_row = 16 * layer.hidden_size, cache = std::max(device.l2_bytes / 2, int64_t{1} << 20);
    const int64_t bytes = layer.backward ? kChunkBytes : std::min(kChunkBytes, cache);
    const int64_t chunk = rows_of_chunk(bytes, of_row, layer.batch, kPersistentChunkTimes * kChunkBytes);
    return static_cast<double>(std::min(layer.steps, std::max<int64_t>(1, chunk / layer.batch)));
  }
};

// The dynamic shared memory of the forward kernel: see ForwardTile.
int64_t shared_of_step(int rows) {
  const int64_t row_bytes = rows > kStepRowsFew ? 128 : 256;
  return kStepStages * (4 * kStepUnits + rows) * row_bytes;
}

ModelConstants estimates_of(int capability, std::string_view name) {
  ModelConstants result;
  if (capability == 80 || capability == 100) result.instruction_clocks = 8;
  if (capability == 90) result.instruction_clocks = 6;
  if (capability == 90 || capability == 100) result.chain_clocks = 24;
  // The names of consumer cards: RTX 3090, NVIDIA GeForce RTX 4090.
  const bool consumer = name.find("GeForce") != name.npos || name.substr(0, 4) == "RTX ";
  if (consumer && capability > 80) result.instruction_clocks = 32;
  result.instruction_tf32_clocks = result.instruction_clocks;
  return result;
}

struct SetConstants {
  std::mutex one_at_a_time;
  std::map<int, std::map<std::string, double>> by_capability;
};
SetConstants& set_ones() {
  static SetConstants constants;
  return constants;
}

}  // namespace

const std::vector<ModelConstant>& model_constants() {
#define LSTM_EXT_CONSTANT(name)                                                \
  ModelConstant {                                                              \
    #name, [](ModelConstants& constants) -> double& { return constants.name; } \
  }
  static const std::vector<ModelConstant> constants = {
      LSTM_EXT_CONSTANT(launch_us),
      LSTM_EXT_CONSTANT(dependent_launch_us),
      LSTM_EXT_CONSTANT(ramp_us),
      LSTM_EXT_CONSTANT(epilogue_us),
      LSTM_EXT_CONSTANT(cell_kernel_us),
      LSTM_EXT_CONSTANT(product_us),
      LSTM_EXT_CONSTANT(tile_clocks),
      LSTM_EXT_CONSTANT(bytes_of_clock),
      LSTM_EXT_CONSTANT(share_of_cache),
      LSTM_EXT_CONSTANT(instruction_clocks),
      LSTM_EXT_CONSTANT(instruction_tf32_clocks),
      LSTM_EXT_CONSTANT(chain_clocks),
      LSTM_EXT_CONSTANT(mailbox_clocks),
      LSTM_EXT_CONSTANT(load_clocks),
      LSTM_EXT_CONSTANT(turn_clocks),
      LSTM_EXT_CONSTANT(cell_clocks),
      LSTM_EXT_CONSTANT(own_clocks),
      LSTM_EXT_CONSTANT(start_us),
  };
#undef LSTM_EXT_CONSTANT
  return constants;
}

ModelConstants constants_of(int capability, std::string_view name) {
  SetConstants& set = set_ones();
  const std::lock_guard<std::mutex> lock(set.one_at_a_time);
  ModelConstants result = estimates_of(capability, name);
  const auto& known = set.by_capability[capability];
  for (const ModelConstant& constant : model_constants()) {
    const auto found = known.find(constant.name);
    if (found != known.end()) constant.of(result) = found->second;
  }
  return result;
}

void set_constants(int capability, const std::map<std::string, double>& constants) {
  SetConstants& set = set_ones();
  const std::lock_guard<std::mutex> lock(set.one_at_a_time);
  for (const auto& [name, value] : constants) set.by_capability[capability][name] = value;
}

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
Plan::Persistent persistent_of(const LayerFacts& layer, const DeviceFacts& device, Exchange exchange,
                               const std::optional<int64_t>& most_blocks) {
  Plan::Persistent result;
  const int number = operand_bytes(layer);
  const int64_t length = persistent_length(layer, number), tiles = ceil_div(layer.batch, kPersistentRows);
  const PersistentShape shape = persistent_shape(layer.backward, exchange, number);
  const int64_t missing = std::max<int64_t>(length - shape.depth(number), 0);
  result.exchange = exchange;
  result.extra = static_cast<int>(ceil_div(missing * number, int64_t{4} * shape.parts * kPieceBytes));
  result.shared_bytes = persistent_shared(layer.backward, exchange, number, result.extra, length);
  constexpr int64_t kMost = int64_t{1} << 30;
  if (layer.steps < 2) {
    result.problem = "the sequence has one step";
  } else if (layer.steps > kMost || layer.batch > kMost) {
    result.problem = "it counts steps and rows in 32 bits";
  } else if (exchange == Exchange::kNone && layer.hidden_size > shape.units) {
    result.problem = "no block has room for all its units";
  } else if (result.shared_bytes > device.shared_of_block) {
    result.problem = "its weights do not fit into registers and shared memory";
  } else if (exchange == Exchange::kNone) {
    result.groups = static_cast<int>(tiles);
    result.blocks = tiles * layer.directions;
  } else if (device.shared) {
    result.problem = "the device is shared with other programs, and its blocks wait for each other";
  } else {
    const int64_t of_group = ceil_div(layer.hidden_size, shape.units) * layer.directions;
    const int64_t room = std::min<int64_t>(device.multiprocessors, most_blocks.value_or(device.multiprocessors));
    result.groups = static_cast<int>(std::min(tiles, room / of_group));
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

// The kernel of a step: its grid. Returns why it cannot run, or nothing.
std::string plan_step(Plan& result, const LayerFacts& layer, const DeviceFacts& device) {
  constexpr int64_t kThreadsOfMultiprocessor = 1536;  // the fewest of the supported cards
  result.rows_of_block = step_rows(layer.batch);
  result.blocks = step_parts(layer.hidden_size) * ceil_div(layer.batch, result.rows_of_block);
  result.threads = kStepThreads;
  result.shared_bytes = shared_of_step(result.rows_of_block);
  // A block's shared memory costs another kibibyte.
  const int known = device.step_blocks[result.rows_of_block == kStepRowsFew ? 0 : 1];
  result.blocks_of_multiprocessor =
      known > 0 ? known
                : std::max<int64_t>(1, std::min(device.shared_of_multiprocessor / (result.shared_bytes + 1024),
                                                kThreadsOfMultiprocessor / kStepThreads));
  if (layer.backward) {
    result.parts_bytes = 2 * layer.directions * step_parts(layer.hidden_size) * layer.batch * layer.hidden_size * 4;
  }
  // The grid's second axis has the rows.
  if (ceil_div(layer.batch, result.rows_of_block) > 65535) return "its grid has no room for so many rows";
  return result.shared_bytes > device.shared_of_block ? "its tiles do not fit into a block's shared memory" : "";
}

// The faster persistent kernel. If there is none, the last one says why.
void plan_persistent(Plan& result, const LayerFacts& layer, const DeviceFacts& device, const Request& request,
                     const Model& model) {
  for (const Exchange exchange : {Exchange::kNone, Exchange::kMailbox}) {
    if (request.exchange.value_or(exchange) != exchange) continue;
    const Plan::Persistent found = persistent_of(layer, device, exchange, request.most_blocks);
    const double us = found.problem.empty() ? model.persistent_us(found) : 0;
    if (result.persistent_us > 0 && !(us > 0 && us < result.persistent_us)) continue;
    result.persistent = found;
    result.persistent_us = us;
  }
}

// Adds the reasons of a plan, if they are requested.
struct Because {
  Plan& result;
  const Request& request;
  template <typename Reason>
  void operator()(const Reason& reason) const {
    if (request.reasons) result.reasons.push_back(reason());
  }
};

// The kernel that was measured as the fastest; else, by the model, of those that have been right on this device.
void choose_fastest(Plan& result, const DeviceFacts& device, const Request& request, const std::string& no_step) {
  const Because because{result, request};
  if (request.measured) {
    const Kernel kernel = *request.measured;
    const bool steps = kernel == Kernel::kStep;
    const bool runs = (steps ? no_step : result.persistent.problem).empty();
    if (kernel == Kernel::kStepwise || (runs && (steps ? request.step : request.persistent) == Outcome::kRight)) {
      result.kernel = kernel;
      because([] { return std::string("it was the fastest when calls like this one were measured on this device"); });
      return;
    }
  }
  double best = result.stepwise_us;
  // The faster of two kernels wins if it has been right; why one that would win may not.
  const auto offer = [&](Kernel kernel, const char* what, double us, Outcome outcome) {
    if (us >= best) return;
    if (outcome == Outcome::kRight) {
      best = us;
      result.kernel = kernel;
      return;
    }
    because([&] {
      return std::string("the kernel that does ") + what +
             (outcome == Outcome::kWrong ? " was wrong on this device" : " has not been tried on this device yet");
    });
  };
  if (no_step.empty() && 2 * result.parts_bytes > device.l2_bytes) {
    because([] { return std::string("the partial sums of a kernel a step would fill the second-level cache"); });
  } else if (no_step.empty()) {
    offer(Kernel::kStep, "a step at once", result.step_us, request.step);
  }
  if (result.persistent.problem.empty()) {
    offer(Kernel::kPersistent, "all steps at once", result.persistent_us, request.persistent);
  }
  if (result.kernel != Kernel::kStepwise) because([] { return std::string("it has been right on this device"); });
}

}  // namespace

Plan plan(const LayerFacts& layer, const DeviceFacts& device, const Request& request) {
  Plan result;
  const Because because{result, request};
  if (device.capability < 80) {
    result.problem = "the kernels need compute capability 8.0 or later";
    return result;
  }
  const Model model(layer, device);
  result.stepwise_us = model.stepwise_us();
  const char* none = step_problem(layer);
  std::string no_step = none ? none : "";
  if (none) {
    result.persistent.problem = none;
  } else {
    no_step = plan_step(result, layer, device);
    result.step_us = model.step_us(result);
    plan_persistent(result, layer, device, request, model);
  }
  const std::string& no_persistent = result.persistent.problem;
  if (!request.any) {
    result.kernel = request.kernel;
    result.replaced = request.kernel == Kernel::kPersistent && !no_persistent.empty();
    if (result.replaced) {
      because([&] { return "not the kernel that does all steps at once: " + no_persistent; });
      result.kernel = Kernel::kStep;
    }
    if (result.kernel == Kernel::kStep && !no_step.empty()) {
      result.problem = no_step;
      result.kernel = Kernel::kStepwise;  // for a backward pass, which goes on
      count_launches(result, layer);
      return result;
    }
  }
  if (none) {
    because([&] { return std::string("not a kernel that does a step at once: ") + none; });
    count_launches(result, layer);
    return result;
  }
  because([&] {
    return "a step is about " + text("%.1f us as a product and a kernel", result.stepwise_us) +
           (no_step.empty() ? text(", %.1f in one kernel", result.step_us) : "") +
           (no_persistent.empty() ? text(", %.1f where one kernel does all steps", result.persistent_us) : "") +
           " (an estimate)";
  });
  if (!no_step.empty()) because([&] { return "not the kernel that does a step at once: " + no_step; });
  if (request.any) {
    choose_fastest(result, device, request, no_step);
  } else if (!result.replaced) {
    because([] { return std::string("it is requested"); });
  }
  if (result.kernel == Kernel::kStep) {
    result.launches = 1;
  } else if (result.kernel == Kernel::kStepwise) {
    count_launches(result, layer);
  }
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
int number_of(const Request* request) {
  if (!request) return kNothing;
  return 3 * static_cast<int>(request->kernel) + (request->exchange ? 1 + static_cast<int>(*request->exchange) : 0);
}

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
  if (name == "auto") return request;
  request.any = false;
  if (name == "independent") request.exchange = Exchange::kNone;
  if (name == "mailbox") request.exchange = Exchange::kMailbox;
  if (request.exchange) name = name_of(Kernel::kPersistent);
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
    request.kernel = static_cast<Kernel>(asked / 3);
    if (asked % 3 != 0) request.exchange = static_cast<Exchange>(asked % 3 - 1);
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
  static const std::vector<DeviceFacts> devices = [] {
    std::vector<DeviceFacts> all = {
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
    for (DeviceFacts& device : all) device.constants = estimates_of(device.capability, device.name);
    return all;
  }();
  return devices;
}

}  // namespace lstm_ext::cuda
