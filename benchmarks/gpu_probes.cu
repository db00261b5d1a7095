// Measures on a GPU what the model of csrc/cuda/gpu_plan.cpp has constants for, and checks hand-offs between blocks:
//
//     nvcc -std=c++17 -arch=native -I csrc -o gpu_probes benchmarks/gpu_probes.cu && ./gpu_probes
//
// Prints one JSON object. "constants" has names and units of ModelConstants; what else was measured stands beside it.
// Ends with 0; 1: a piece was not what was sent; 2: an error of CUDA; 3: a piece did not come. Every wait is bounded.
// Not measured here, because it takes the kernels themselves, or a library: ramp_us, epilogue_us, cell_kernel_us,
// product_us, tile_clocks, cell_clocks, own_clocks.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "gpu_probes.cuh"

namespace {

using probes::HandOffs;
using probes::Wait;

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "gpu_probes: %s: %s\n", what, cudaGetErrorString(error));
  std::exit(2);
}
#define CHECK(call) check(call, #call)

template <typename T>
class Memory {
 public:
  explicit Memory(size_t count) : bytes_(count * sizeof(T)) {
    CHECK(cudaMalloc(&data_, bytes_));
    fill(0);
  }
  ~Memory() { cudaFree(data_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  T* data() const { return data_; }
  void fill(int byte) const { CHECK(cudaMemsetAsync(data_, byte, bytes_)); }
  void set(const std::vector<T>& values) const {
    CHECK(cudaMemcpy(data_, values.data(), bytes_, cudaMemcpyHostToDevice));
  }
  std::vector<T> values() const {
    std::vector<T> result(bytes_ / sizeof(T));
    CHECK(cudaMemcpy(result.data(), data_, bytes_, cudaMemcpyDeviceToHost));
    return result;
  }

 private:
  T* data_ = nullptr;
  size_t bytes_;
};

// ---- JSON

class Json {
 public:
  void add(const char* name, double value) {
    char text[32];
    std::snprintf(text, sizeof text, "%.6g", value);
    add_text(name, text);
  }
  void add(const char* name, const std::string& value) { add_text(name, "\"" + value + "\""); }
  void add(const char* name, const Json& value) { add_text(name, value.text()); }
  std::string text() const { return "{" + members_ + "}"; }

 private:
  void add_text(const char* name, const std::string& value) {
    members_ += (members_.empty() ? "\"" : ", \"") + std::string(name) + "\": " + value;
  }
  std::string members_;
};

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}
Json spread(const std::vector<double>& values) {
  Json result;
  result.add("min", *std::min_element(values.begin(), values.end()));
  result.add("median", median(values));
  result.add("max", *std::max_element(values.begin(), values.end()));
  return result;
}

// ---- the card

struct Card {
  int multiprocessors, capability;
  int64_t l2_bytes;
  size_t alone;      // dynamic shared memory of a block that lets no other one onto its multiprocessor
  double clock_ghz;  // measured
};

int attribute(cudaDeviceAttr which) {
  int value = 0;
  CHECK(cudaDeviceGetAttribute(&value, which, 0));
  return value;
}

template <typename Args>
void start(void (*kernel)(Args), unsigned grid, unsigned block, const Args& args, size_t shared = 0,
           bool cooperative = false, bool dependent = false) {
  lstm_ext::cuda::LaunchConfig config;
  config.grid = dim3(grid);
  config.block = dim3(block);
  config.dynamic_shared = shared;
  config.cooperative = cooperative;
  config.dependent = dependent;
  CHECK(lstm_ext::cuda::launch(kernel, config, args));
}

// ---- clocks

struct Timer {
  int64_t nanoseconds;  // to run for
  int64_t* found;       // clocks, nanoseconds, the smallest step of the timer
};
LSTM_KERNEL read_clocks(Timer a) {
  const int64_t begin = lstm_ext::cuda::now(), clocks = clock64();
  int64_t before = begin, step = int64_t{1} << 40;
  while (before - begin < a.nanoseconds) {
    const int64_t time = lstm_ext::cuda::now();
    if (time != before && time - before < step) step = time - before;
    before = time;
  }
  a.found[0] = clock64() - clocks;
  a.found[1] = before - begin;
  a.found[2] = step;
}

// ---- launches

struct Spin {
  int64_t clocks;
};
LSTM_DEVICE void spin_for(int64_t clocks) {
  const int64_t begin = clock64();
  while (clock64() - begin < clocks) {
  }
}
LSTM_KERNEL empty(Spin) {}
LSTM_KERNEL spin(Spin a) { spin_for(a.clocks); }
// Lets the next one begin where the kernels of a step do.
LSTM_KERNEL spin_and_let_begin(Spin a) {
  lstm_ext::cuda::grid_dependency_wait();
  lstm_ext::cuda::launch_dependents();
  spin_for(a.clocks);
}

struct Interval {
  double us;       // from one to the next, on the GPU
  double host_us;  // of a call of the launch
};
// What `begin` starts, so many times: all of it waits in the stream when the first one begins.
template <typename Begin>
Interval interval_of(int count, Begin begin) {
  cudaEvent_t first, last;
  CHECK(cudaEventCreate(&first));
  CHECK(cudaEventCreate(&last));
  Memory<int64_t> found(3);
  Interval result{};
  double enqueued_ms = 0;
  for (int64_t delay : {20, 20, 100}) {  // milliseconds. The first time, things are loaded; the last one, it was slow
    if (delay == 100 && enqueued_ms < 10) break;
    CHECK(cudaDeviceSynchronize());
    start(read_clocks, 1, 1, Timer{delay * 1000000, found.data()});
    CHECK(cudaEventRecord(first));
    const auto before = std::chrono::steady_clock::now();
    for (int i = 0; i < count; ++i) begin();
    enqueued_ms = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - before).count();
    CHECK(cudaEventRecord(last));
    CHECK(cudaDeviceSynchronize());
    float milliseconds = 0;
    CHECK(cudaEventElapsedTime(&milliseconds, first, last));
    result = {1e3 * milliseconds / count, 1e3 * enqueued_ms / count};
  }
  CHECK(cudaEventDestroy(first));
  CHECK(cudaEventDestroy(last));
  return result;
}

// What a launch of a chunk does before its first step: it clears a mailbox, and fills the registers with weights.
struct Weights {
  const uint4* data;  // 32 for each thread
  uint32_t* out;
};
LSTM_KERNEL LSTM_LAUNCH_BOUNDS(lstm_ext::cuda::kPersistentThreads) fill_registers(Weights a) {
  constexpr int kPieces = 32;
  uint4 pieces[kPieces];
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    pieces[i] = __ldcg(a.data + (int64_t{blockIdx.x} * kPieces + i) * lstm_ext::cuda::kPersistentThreads + threadIdx.x);
  }
  uint32_t all = 0;
#pragma unroll
  for (int i = 0; i < kPieces; ++i) all ^= pieces[i].x ^ pieces[i].y ^ pieces[i].z ^ pieces[i].w;
  if (all == 12345) *a.out = all;
}

void measure_launches(const Card& card, Json& constants, Json& measured) {
  const auto sms = static_cast<unsigned>(card.multiprocessors);
  constexpr int kCount = 300;
  constexpr int64_t kSpin = 5000;
  const double spin_us = kSpin / card.clock_ghz / 1e3;
  const Interval empty_one = interval_of(kCount, [&] { start(empty, sms, 128, Spin{0}); });
  measured.add("empty_kernel_us", empty_one.us);
  measured.add("launch_call_us", empty_one.host_us);
  const Interval together =
      interval_of(kCount, [&] { start(empty, sms, 128, Spin{0}, card.alone, /*cooperative=*/true); });
  measured.add("cooperative_empty_kernel_us", together.us);
  measured.add("cooperative_launch_call_us", together.host_us);
  constants.add("launch_us", interval_of(kCount, [&] { start(spin, sms, 128, Spin{kSpin}); }).us - spin_us);
  if (card.capability >= 90) {
    const auto begin = [&] { start(spin_and_let_begin, sms, 128, Spin{kSpin}, 0, false, /*dependent=*/true); };
    constants.add("dependent_launch_us", interval_of(kCount, begin).us - spin_us);
  }
  constexpr size_t kMailboxBytes = 1 << 20;
  Memory<unsigned char> mailbox(kMailboxBytes);
  Memory<uint4> weights(size_t{32} * lstm_ext::cuda::kPersistentThreads * sms);
  Memory<uint32_t> out(1);
  const Interval chunk = interval_of(kCount, [&] {
    mailbox.fill(0xff);
    start(fill_registers, sms, lstm_ext::cuda::kPersistentThreads, Weights{weights.data(), out.data()}, card.alone,
          /*cooperative=*/true);
  });
  constants.add("start_us", chunk.us);
}

// ---- tensor cores

struct Multiply {
  int count;
  int64_t* clocks;
  float* out;
};
// Eight sums are enough for them not to wait for each other; one is a chain.
template <typename T, int kSums>
LSTM_KERNEL LSTM_LAUNCH_BOUNDS(256) multiply(Multiply a) {
  float sums[kSums][4] = {};
  const uint32_t left[4] = {threadIdx.x, 1, 2, 3}, right[2] = {0, threadIdx.x};
  __syncthreads();
  const int64_t begin = clock64();
  for (int i = 0; i < a.count; ++i) {
#pragma unroll
    for (int k = 0; k < kSums; ++k) lstm_ext::cuda::multiply_tile<T>(sums[k], left, right);
  }
  float all = 0;
#pragma unroll
  for (int k = 0; k < kSums; ++k) all += sums[k][0] + sums[k][1] + sums[k][2] + sums[k][3];
  if (all == 12345.f) *a.out = all;
  __syncthreads();
  if (threadIdx.x == 0) *a.clocks = clock64() - begin;
}

// Clocks between two instructions on one of the four tensor cores, by so many warps for each of them.
template <typename T, int kSums = 8>
double instruction_clocks(int warps) {
  constexpr int kCount = 2000;
  Memory<int64_t> clocks(1);
  Memory<float> out(1);
  for (int i = 0; i < 2; ++i) {
    start(multiply<T, kSums>, 1, static_cast<unsigned>(128 * warps), Multiply{kCount, clocks.data(), out.data()});
  }
  return static_cast<double>(clocks.values()[0]) / (static_cast<double>(kSums) * kCount * warps);
}

void measure_instructions(Json& constants, Json& measured) {
  // As the persistent kernels: two warps for each.
  constants.add("instruction_clocks", instruction_clocks<__nv_bfloat16>(2));
  constants.add("instruction_tf32_clocks", instruction_clocks<float>(2));
  constants.add("chain_clocks", instruction_clocks<__nv_bfloat16, 1>(1));
  measured.add("instruction_f16_clocks", instruction_clocks<__half>(2));
  measured.add("instruction_clocks_of_one_warp", instruction_clocks<__nv_bfloat16>(1));
  measured.add("instruction_tf32_clocks_of_one_warp", instruction_clocks<float>(1));
}

// ---- the second-level cache

struct Read {
  const uint4* data;
  int count;  // of pieces; all blocks read all of them, each from another one on
  int times;
  int64_t* clocks;
  uint32_t* out;
};
constexpr int kReadThreads = 512, kReadAtOnce = 8;
LSTM_KERNEL LSTM_LAUNCH_BOUNDS(kReadThreads) read_cache(Read a) {
  const int first = static_cast<int>(int64_t{a.count} * blockIdx.x / gridDim.x / kReadThreads) * kReadThreads;
  uint32_t all = 0;
  __syncthreads();
  const int64_t begin = clock64();
  for (int time = 0; time < a.times; ++time) {
    for (int i = 0; i < a.count; i += kReadThreads * kReadAtOnce) {
      uint4 pieces[kReadAtOnce];
#pragma unroll
      for (int k = 0; k < kReadAtOnce; ++k) {
        const int place = first + i + k * kReadThreads;
        pieces[k] = __ldcg(a.data + (place < a.count ? place : place - a.count) + threadIdx.x);
      }
#pragma unroll
      for (int k = 0; k < kReadAtOnce; ++k) all ^= pieces[k].x ^ pieces[k].y ^ pieces[k].z ^ pieces[k].w;
    }
  }
  if (all == 12345) *a.out = all;
  __syncthreads();
  if (threadIdx.x == 0) a.clocks[blockIdx.x] = clock64() - begin;
}

// A thread that goes from piece to piece, each naming the next one.
struct Walk {
  const uint32_t* next;
  int count;
  int64_t* clocks;
  uint32_t* out;
};
LSTM_KERNEL LSTM_LAUNCH_BOUNDS(32) walk_cache(Walk a) {
  uint32_t at = 0;
  for (int i = 0; i < a.count; ++i) at = __ldcg(a.next + at);  // all into the cache
  const int64_t begin = clock64();
  for (int i = 0; i < a.count; ++i) at = __ldcg(a.next + at);
  *a.clocks = clock64() - begin;
  *a.out = at;
}

void measure_cache(const Card& card, Json& constants, Json& measured) {
  constexpr int kSteps = 1 << 12, kApart = 64;  // a quarter of a kibibyte apart: 1 MiB
  Memory<uint32_t> next(size_t{kSteps} * kApart), end(1);
  std::vector<uint32_t> places(size_t{kSteps} * kApart, 0);
  for (uint32_t i = 0; i < kSteps; ++i) places[size_t{i} * kApart] = (i * 1237 + 1) % kSteps * kApart;
  next.set(places);
  Memory<int64_t> walked(1);
  start(walk_cache, 1, 1, Walk{next.data(), kSteps, walked.data(), end.data()}, card.alone);
  constants.add("load_clocks", static_cast<double>(walked.values()[0]) / kSteps);
  constexpr int kPieces = 1 << 17;  // 2 MiB
  constexpr int kTimes = 8;
  Memory<uint4> data(kPieces);
  Memory<uint32_t> out(1);
  const auto bytes_of_clock = [&](int blocks) {
    Memory<int64_t> clocks(static_cast<size_t>(blocks));
    for (int i = 0; i < 2; ++i) {
      start(read_cache, static_cast<unsigned>(blocks), kReadThreads,
            Read{data.data(), kPieces, kTimes, clocks.data(), out.data()}, card.alone);
    }
    std::vector<double> found;
    for (const int64_t n : clocks.values()) found.push_back(16.0 * kPieces * kTimes / static_cast<double>(n));
    return found;
  };
  const std::vector<double> all = bytes_of_clock(card.multiprocessors);
  constants.add("bytes_of_clock", bytes_of_clock(1)[0]);
  constants.add("share_of_cache", median(all) / 64);
  measured.add("bytes_of_clock_of_each_of_all", spread(all));
}

// ---- a turn of a tile: barrier and partial sums, with as many threads as PersistentChunk

struct Turns {
  int count;
  int64_t* clocks;
  float* out;
};
LSTM_KERNEL LSTM_LAUNCH_BOUNDS(lstm_ext::cuda::kPersistentThreads) add_partial_sums(Turns a) {
  constexpr int kParts = probes::kShape.parts, kUnits = probes::kShape.units, kPitch = kUnits + 1;
  constexpr int kRows = lstm_ext::cuda::kPersistentRows;
  LSTM_SHARED(float4, partials, 2 * kParts * kRows * kPitch);
  static_assert(kParts == 8 && kUnits == 16);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, group = thread % 32 / 4, member = thread % 4;
  float value = static_cast<float>(thread);
  __syncthreads();
  const int64_t begin = clock64();
  for (int turn = 0; turn < a.count; ++turn) {
    float4* of_turn = partials + turn % 2 * kParts * kRows * kPitch;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      of_turn[(warp * kRows + member * 2 + i % 2) * kPitch + i / 2 * 8 + group] =
          make_float4(value, value + 1, value + 2, value + 3);
    }
    __syncthreads();
    if (thread >= kUnits * kRows) continue;
    float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const float4 more = of_turn[(part * kRows + thread / kUnits) * kPitch + thread % kUnits];
      sum.x += more.x;
      sum.y += more.y;
      sum.z += more.z;
      sum.w += more.w;
    }
    value = (sum.x + sum.y + sum.z + sum.w) * 0.01f;  // the next turn needs it
  }
  if (value == 12345.f) *a.out = value;
  __syncthreads();
  if (thread == 0) *a.clocks = clock64() - begin;
}

void measure_turn(Json& constants) {
  constexpr int kCount = 2000;
  Memory<int64_t> clocks(1);
  Memory<float> out(1);
  for (int i = 0; i < 2; ++i) {
    start(add_partial_sums, 1, lstm_ext::cuda::kPersistentThreads, Turns{kCount, clocks.data(), out.data()});
  }
  constants.add("turn_clocks", static_cast<double>(clocks.values()[0]) / kCount);
}

// ---- hand-offs

class Mailbox {
 public:
  explicit Mailbox(const Card& card)
      : card_(card),
        // So much of the second-level cache as a chunk of a layer would take.
        pieces_(static_cast<size_t>(std::min<int64_t>(card.l2_bytes / 4, 16 << 20) / 16)),
        slots_(pieces_),
        words_(lstm_ext::cuda::kControlWords),
        status_(1),
        counts_(1),
        clocks_(static_cast<size_t>(card.multiprocessors)),
        nanoseconds_(static_cast<size_t>(card.multiprocessors)) {}

  struct Found {
    std::vector<double> clocks, nanoseconds;  // of a hand-off, or a turn
    int64_t hand_offs = 0;
    Json json() const {
      Json result;
      result.add("clocks", spread(clocks));
      result.add("ns", spread(nanoseconds));
      return result;
    }
  };

  // Until there were so many hand-offs, between other pairs each time.
  Found there_and_back(void (*kernel)(HandOffs), int blocks, int64_t wanted, unsigned back_off = 0) {
    blocks -= blocks % 2;
    const int most =
        static_cast<int>(pieces_ / static_cast<size_t>(probes::messages_of(blocks, 1) * probes::kMessagePieces));
    const int turns = std::max(2, std::min(most, 500));
    Found found;
    for (int shift = 0; found.hand_offs < wanted && !expired_; ++shift) {
      launch(kernel, blocks, probes::kMessagePieces, turns, shift, back_off);
      collect(found, blocks / 2, 2.0 * (turns - 1));
      found.hand_offs += probes::messages_of(blocks, turns);
    }
    return found;
  }

  Found all_to_all(int blocks, int launches) {
    const int most = static_cast<int>(pieces_ / static_cast<size_t>(probes::pieces_of_turn(blocks)));
    const int turns = std::max(2, std::min(most, 500));
    Found found;
    for (int i = 0; i < launches && !expired_; ++i) {
      launch(&probes::all_to_all, blocks, lstm_ext::cuda::kPersistentThreads, turns, 0, 0);
      collect(found, blocks, turns - 1.0);
      found.hand_offs += int64_t{turns} * blocks;
    }
    return found;
  }

  // Nanoseconds until the one that waits for a block that sends nothing has given up; 0: it has not.
  double wait_in_vain(int64_t limit) {
    limit_ = limit;
    silent_ = 1;
    launch(&probes::there_and_back<Wait::kAsTheKernels>, 2, probes::kMessagePieces, 2, 0, 0);
    limit_ = kLimit;
    silent_ = -1;
    const bool gave_up = expired_;
    expired_ = false;
    status_.fill(0);
    return gave_up ? static_cast<double>(nanoseconds_.values()[0]) : 0;
  }

  probes::Counts counts() const { return counts_.values()[0]; }
  bool expired() const { return expired_; }

 private:
  void launch(void (*kernel)(HandOffs), int blocks, int threads, int turns, int shift, unsigned back_off) {
    slots_.fill(0xff);
    words_.fill(0xff);
    HandOffs args{};
    args.mailbox = slots_.data();
    args.control = {words_.data(), nullptr, status_.data(), limit_};
    args.counts = counts_.data();
    args.clocks = clocks_.data();
    args.nanoseconds = nanoseconds_.data();
    args.seed = 977 * ++launches_;
    args.turns = turns;
    args.shift = shift;
    args.silent = silent_;
    args.back_off = back_off;
    start(kernel, static_cast<unsigned>(blocks), static_cast<unsigned>(threads), args, card_.alone,
          /*cooperative=*/true);
    expired_ = status_.values()[0] != 0;
  }
  void collect(Found& found, int count, double hand_offs) const {
    const std::vector<int64_t> clocks = clocks_.values(), nanoseconds = nanoseconds_.values();
    for (int i = 0; i < count; ++i) {
      found.clocks.push_back(static_cast<double>(clocks[static_cast<size_t>(i)]) / hand_offs);
      found.nanoseconds.push_back(static_cast<double>(nanoseconds[static_cast<size_t>(i)]) / hand_offs);
    }
  }

  const Card& card_;
  size_t pieces_;
  Memory<uint4> slots_;
  Memory<uint32_t> words_, status_;
  Memory<probes::Counts> counts_;
  Memory<int64_t> clocks_, nanoseconds_;
  static constexpr int64_t kLimit = 2000000000;  // nanoseconds
  int64_t limit_ = kLimit;
  int silent_ = -1;
  uint32_t launches_ = 0;
  bool expired_ = false;
};

// Returns the exit code.
int measure_hand_offs(const Card& card, Json& constants, Json& measured) {
  constexpr int64_t kFew = 100000, kMany = 1000000;
  Mailbox mailbox(card);
  const int blocks = card.multiprocessors;
  // The checked ones first: what is wrong shows in the others' times.
  const Mailbox::Found watched = mailbox.there_and_back(&probes::there_and_back<Wait::kWatched>, blocks, kMany);
  const Mailbox::Found all = mailbox.there_and_back(&probes::there_and_back<Wait::kAsTheKernels>, blocks, kFew);
  measured.add("hand_offs", static_cast<double>(watched.hand_offs));
  measured.add("pieces_of_a_hand_off", probes::kMessagePieces);
  measured.add("hand_off", all.json());
  measured.add("hand_off_of_one_pair",
               mailbox.there_and_back(&probes::there_and_back<Wait::kAsTheKernels>, 2, 5000).json());
  for (const unsigned back_off : {20u, 100u}) {
    const std::string name = "hand_off_with_sleeps_of_" + std::to_string(back_off) + "_ns";
    const Mailbox::Found slept =
        mailbox.there_and_back(&probes::there_and_back<Wait::kBackOff>, blocks, kFew, back_off);
    measured.add(name.c_str(), slept.json());
  }
  const int group = std::min({probes::most_blocks(), 48, blocks});  // 48: H 768
  measured.add("blocks_of_all_to_all", group);
  measured.add("turn_of_all_to_all", mailbox.all_to_all(group, 20).json());
  const double given_up = mailbox.expired() ? 0 : mailbox.wait_in_vain(1000000);
  measured.add("wait_in_vain_with_a_limit_of_1_ms_us", given_up / 1e3);
  const probes::Counts counts = mailbox.counts();
  measured.add("wrong_pieces", counts.wrong);
  measured.add("tries_that_found_a_part", counts.parts);
  measured.add("waits_expired", mailbox.expired() ? 1 : 0);
  constants.add("mailbox_clocks", median(all.clocks));
  return counts.wrong != 0 ? 1 : mailbox.expired() ? 3 : 0;
}

}  // namespace

int main() {
  cudaDeviceProp properties;
  CHECK(cudaGetDeviceProperties(&properties, 0));
  Card card{properties.multiProcessorCount, properties.major * 10 + properties.minor, attribute(cudaDevAttrL2CacheSize),
            static_cast<size_t>(attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor)) / 2 + 1024, 0};
  Memory<int64_t> found(3);
  // The clock takes a while to rise. All multiprocessors work.
  start(spin, static_cast<unsigned>(card.multiprocessors), 128, Spin{500000000});
  start(read_clocks, 1, 1, Timer{20000000, found.data()});
  const std::vector<int64_t> clocks = found.values();
  card.clock_ghz = static_cast<double>(clocks[0]) / static_cast<double>(clocks[1]);

  Json result, constants, measured;
  result.add("device", properties.name);
  result.add("capability", std::to_string(properties.major) + "." + std::to_string(properties.minor));
  result.add("multiprocessors", card.multiprocessors);
  result.add("clock_ghz", card.clock_ghz);
  result.add("timer_step_ns", static_cast<double>(clocks[2]));
  const int code = measure_hand_offs(card, constants, measured);
  measure_launches(card, constants, measured);
  measure_instructions(constants, measured);
  measure_cache(card, constants, measured);
  measure_turn(constants);
  result.add("constants", constants);
  result.add("measured", measured);
  std::printf("%s\n", result.text().c_str());
  return code;
}
