// A launch: checks it, makes blocks and threads, runs them in waves, reports what went wrong.
#include <algorithm>
#include <cstdlib>
#include <map>
#include <mutex>
#include <numeric>

#include "simt/machine.h"
#include "simt/weak_memory.h"

extern dim3 blockDim;
extern dim3 gridDim;

namespace simt {
namespace {

constexpr unsigned kMaxThreadsPerBlock = 1024;
constexpr size_t kMaxDynamicShared = 227 * 1024;
// Alive at once in launches that need not be co-resident, where options().resident_blocks does not say.
constexpr unsigned kMaxThreadsAlive = 8192;
constexpr unsigned kMaxBlocksAlive = 256;
constexpr unsigned kWarp = 32;

template <typename Value>
Value one_of(const char* variable, Value otherwise, std::initializer_list<std::pair<const char*, Value>> values) {
  const char* text = std::getenv(variable);
  if (text == nullptr) return otherwise;
  std::string known;
  for (const auto& [name, value] : values) {
    if (std::string(text) == name) return value;
    known += std::string(" ") + name;
  }
  throw Error(std::string("simt: ") + variable + "=" + text + ", and not one of:" + known);
}

void check(const LaunchConfig& config) {
  const auto require = [](bool holds, const std::string& what) {
    if (!holds) throw Error("simt: launch: " + what);
  };
  const uint64_t threads = uint64_t{config.block.x} * config.block.y * config.block.z;
  require(config.grid.x > 0 && config.grid.y > 0 && config.grid.z > 0 && threads > 0, "an empty grid or block");
  require(threads <= kMaxThreadsPerBlock, "more than 1024 threads in a block");
  require(config.block.z <= 64, "more than 64 threads in z");
  require(config.grid.x <= 0x7fffffffu && config.grid.y <= 65535 && config.grid.z <= 65535,
          "more than 2^31 - 1 blocks in x, or 65535 in y or z");
  require(config.dynamic_shared <= kMaxDynamicShared, "more than 227 KiB of dynamic shared memory");
}

Block& add_block(uint64_t number, uint64_t* priority) {
  const dim3& grid = machine.config.grid;
  const dim3& shape = machine.config.block;
  machine.blocks.push_back(std::make_unique<Block>());
  Block& block = *machine.blocks.back();
  block.number = static_cast<unsigned>(machine.blocks.size() - 1);
  block.index = {static_cast<unsigned>(number % grid.x), static_cast<unsigned>(number / grid.x % grid.y),
                 static_cast<unsigned>(number / grid.x / grid.y)};
  block.size = block.live = shape.x * shape.y * shape.z;
  block.warps.resize((block.size + kWarp - 1) / kWarp);
  const unsigned unit = options().seed % 3;  // who has a priority of its own: a thread, a warp or a block
  for (unsigned i = 0; i < block.size; ++i) {
    Thread& thread = machine.threads.emplace_back();
    thread.id = static_cast<unsigned>(machine.threads.size() - 1);
    thread.index = {i % shape.x, i / shape.x % shape.y, i / shape.x / shape.y};
    thread.lane = i % kWarp;
    thread.block = &block;
    thread.waited_for_launch = !machine.config.dependent;
    thread.warp = &block.warps[i / kWarp];
    thread.warp->live |= 1u << thread.lane;
    thread.priority = priority + (unit == 0 ? i : unit == 1 ? i / kWarp : 0);
    block.threads.push_back(&thread);
    make_ready(&thread);
  }
  return block;
}

std::string describe_deadlock() {
  std::map<std::string, unsigned> waiting;
  for (const Thread& thread : machine.threads) {
    if (thread.finished) continue;
    ++waiting[std::string(thread.doing) + " at " + place(thread.file, thread.line) + " in block " +
              std::to_string(thread.block->index.x) + "," + std::to_string(thread.block->index.y) + "," +
              std::to_string(thread.block->index.z)];
  }
  std::string text = "simt: deadlock: " + std::to_string(machine.live) + " threads wait for each other";
  constexpr int kListed = 8;
  int listed = 0;
  for (const auto& [where, threads] : waiting) {
    if (listed++ == kListed) break;
    text += "\n    " + std::to_string(threads) + " x " + where;
  }
  return text;
}

void add_line(std::string& text, const std::string& more) {
  if (more.empty()) return;
  text += text.empty() ? more : "\n" + more;
}

void run_wave(const std::vector<uint64_t>& numbers) {
  const dim3& shape = machine.config.block;
  const unsigned threads = shape.x * shape.y * shape.z;
  // Pointers to them are kept: no reallocation while the wave lives.
  machine.threads.reserve(numbers.size() * threads);
  machine.priorities.resize(numbers.size() * threads);
  for (uint64_t& priority : machine.priorities) priority = machine.random() | 1;
  machine.live = static_cast<unsigned>(numbers.size() * threads);
  note_progress();
  race::begin(machine.live);
  allocate_shared(numbers.size());
  for (size_t i = 0; i < numbers.size(); ++i) {
    Block& block = add_block(numbers[i], &machine.priorities[i * threads]);
    prepare_shared(block, i);
  }

  run_threads();

  std::string& error = machine.error;
  if (error.empty() && machine.live > 0) error = describe_deadlock();
  for (const auto& block : machine.blocks) {
    add_line(error, check_shared_fences(*block));
    retire_shared(*block);
  }
  add_line(error, check_global_fences());
  add_line(error, race::findings());
}

void clear_wave() {
  wavefronts::end_wave();
  weak::forget();
  for (Thread& thread : machine.threads) {
    if (thread.started && !thread.finished) machine.stacks.give_back(thread.context.stack);
  }
  machine.threads.clear();
  machine.blocks.clear();
  machine.ready.clear();
  machine.ready_head = 0;
  machine.running = false;
}

struct ClearWaveAtEnd {
  ~ClearWaveAtEnd() { clear_wave(); }
};

}  // namespace

Options options_of_environment() {
  Options set;
  set.schedule = one_of("SIMT_SCHEDULE", set.schedule,
                        {{"fifo", Schedule::Fifo}, {"random", Schedule::Random}, {"priority", Schedule::Priority}});
  const auto delivery = [](const char* variable, Delivery otherwise) {
    return one_of(variable, otherwise, {{"now", Delivery::Now}, {"late", Delivery::Late}, {"mixed", Delivery::Mixed}});
  };
  set.copies = delivery("SIMT_COPIES", set.copies);
  set.stores = delivery("SIMT_STORES", set.stores);
  set.torn = one_of("SIMT_PIECES", set.torn, {{"whole", false}, {"torn", true}});
  set.mma = one_of("SIMT_MMA", set.mma, {{"exact", MmaSum::Exact}, {"truncated", MmaSum::Truncated}});
  set.counts_wavefronts = one_of("SIMT_WAVEFRONTS", set.counts_wavefronts, {{"no", false}, {"yes", true}});
  if (const char* seed = std::getenv("SIMT_SEED")) set.seed = std::strtoull(seed, nullptr, 10);
  return set;
}

Options& options() {
  static Options set = options_of_environment();
  return set;
}

TranslatedKernel (*translated_kernel)(const void* kernel, size_t argument_bytes) = nullptr;

void launch(const LaunchConfig& config, std::function<void()> body) {
  if (current != nullptr) fail("a kernel cannot launch a kernel", current->file, current->line);
  // There is one machine. Autograd may call from a thread of its own.
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  check(config);
  ++statistics().launches;
  statistics().polls_of_launch = 0;
  if (options().stack_bytes == 0) options().stack_bytes = SIMT_ASAN ? 256 << 10 : 64 << 10;
  machine.config = config;
  machine.body = std::move(body);
  machine.random.seed(options().seed);
  machine.error.clear();
  machine.shared_arrays.clear();
  machine.static_shared_end = 0;
  blockDim = config.block;
  gridDim = config.grid;

  const uint64_t blocks = uint64_t{config.grid.x} * config.grid.y * config.grid.z;
  const unsigned threads = config.block.x * config.block.y * config.block.z;
  uint64_t wave = blocks;
  if (!config.cooperative) {
    wave = options().resident_blocks != 0 ? options().resident_blocks
                                          : std::min(kMaxBlocksAlive, std::max(1u, kMaxThreadsAlive / threads));
  }
  // Blocks start in any order.
  std::vector<uint64_t> order(blocks);
  std::iota(order.begin(), order.end(), 0);
  if (options().schedule != Schedule::Fifo) std::shuffle(order.begin(), order.end(), machine.random);

  std::vector<uint64_t> numbers;
  for (uint64_t first = 0; first < blocks && machine.error.empty(); first += wave) {
    numbers.assign(order.begin() + static_cast<ptrdiff_t>(first),
                   order.begin() + static_cast<ptrdiff_t>(std::min(blocks, first + wave)));
    const ClearWaveAtEnd clear;
    run_wave(numbers);
  }
  if (!machine.error.empty()) throw Error(machine.error);
}

}  // namespace simt
