// What kernels are built from does what the CUDA and PTX manuals say: values, layouts, addresses, order.
#include <cmath>
#include <random>
#include <vector>

#include "cuda/numeric.cuh"
#include "simt/check.h"

namespace {

using namespace lstm_ext::cuda;
using checks::expect;
using checks::run;
using checks::shape;
using simt::DeviceBuffer;

constexpr unsigned kAll = 0xffffffffu;

// ---- tensor cores. Where a fragment has its numbers, ptx_cases/memory.py tests: here all numbers of a matrix are
// alike.

struct MmaArguments {
  float a, b, c;
  float* d;  // (16, 8)
  int kind;  // 0 f16, 1 bf16, 2 tf32
};

template <typename T>
uint32_t pair_of(float x) {
  const T value = from_float<T>(x);
  uint16_t bits;
  std::memcpy(&bits, &value, 2);
  return bits | uint32_t{bits} << 16;
}
uint32_t operand(float x, int kind) {
  if (kind == 2) return to_tf32(x);
  return kind == 0 ? pair_of<__half>(x) : pair_of<__nv_bfloat16>(x);
}

LSTM_KERNEL mma_kernel(MmaArguments s) {
  const uint32_t a_all = operand(s.a, s.kind), b_all = operand(s.b, s.kind);
  const uint32_t a[4] = {a_all, a_all, a_all, a_all}, b[2] = {b_all, b_all};
  float d[4] = {s.c, s.c, s.c, s.c};
  if (s.kind == 0) mma_f16_16816(d, a, b);
  if (s.kind == 1) mma_bf16_16816(d, a, b);
  if (s.kind == 2) mma_tf32_1688(d, a, b);
  for (int i = 0; i < 4; ++i) s.d[threadIdx.x * 4 + i] = d[i];
}

float as_stored(float x, int kind) {
  if (kind == 2) return __uint_as_float(to_tf32(x));
  return kind == 0 ? to_float(from_float<__half>(x)) : to_float(from_float<__nv_bfloat16>(x));
}

void check_mma() {
  std::mt19937 random(11);
  std::uniform_real_distribution<float> uniform(-1.f, 1.f);
  DeviceBuffer<float> d(128);
  for (const int kind : {0, 1, 2}) {
    double lost = 0;
    for (int draw = 0; draw < 50; ++draw) {
      const MmaArguments args{uniform(random), uniform(random) / 8, uniform(random), d.data(), kind};
      const double wanted = args.c + (kind == 2 ? 8 : 16) * double{as_stored(args.a, kind)} * as_stored(args.b, kind);
      run(mma_kernel, shape(1, 32), args);
      for (const float x : d) expect(x == static_cast<float>(wanted), "an exact mma is rounded once");
      simt::options().mma = simt::MmaSum::Truncated;
      run(mma_kernel, shape(1, 32), args);
      simt::options().mma = simt::MmaSum::Exact;
      for (const float x : d) {
        expect(std::fabs(x - wanted) <= 2e-6, "a truncated mma of kind " + std::to_string(kind));
        lost = std::fmax(lost, std::fabs(x - static_cast<float>(wanted)));
      }
    }
    expect(lost > 1e-8, "a truncated mma loses bits");
  }
  expect(to_tf32(1.f + 0x1p-11f) == 0x3f802000u, "to_tf32 rounds ties away from zero");
  expect(to_tf32(-1.f - 0x1p-12f) == 0xbf800000u, "to_tf32 rounds to nearest");
}

// Half precision with its special values.
void check_f16_values() {
  DeviceBuffer<float> d(128);
  for (int bits = 0; bits < 65536; bits += 113) {
    __half half;
    const auto value = static_cast<uint16_t>(bits);
    std::memcpy(static_cast<void*>(&half), &value, 2);
    const float wanted = to_float(half);
    run(mma_kernel, shape(1, 32), MmaArguments{wanted, 0.0625f, 0.f, d.data(), 0});
    expect(d[0] == wanted || (std::isnan(d[0]) && std::isnan(wanted)), "half of bits " + std::to_string(bits));
  }
}

// ---- warps

struct WarpArguments {
  int* out;  // (8, 32)
  double* wide;
};

// Shuffles that no kernel has yet.
int shuffled(simt::Shuffle kind, int value, uint32_t argument, int width = 32) {
  return static_cast<int>(simt::shuffle(kind, kAll, static_cast<uint64_t>(value), argument, width, __FILE__, __LINE__));
}

LSTM_KERNEL warp_kernel(WarpArguments s) {
  const int lane = static_cast<int>(threadIdx.x);
  s.out[lane] = shuffled(simt::Shuffle::Index, lane, 5 * lane + 3);
  s.out[32 + lane] = shuffled(simt::Shuffle::Index, lane, 5 * lane + 3, 8);
  s.out[96 + lane] = __shfl_down_sync(kAll, lane, 5, 16);
  s.out[128 + lane] = __shfl_xor_sync(kAll, lane, 9);
  s.out[160 + lane] = static_cast<int>(simt::ballot(kAll, lane % 3 == 0, __FILE__, __LINE__));
  s.out[192 + lane] = __any_sync(kAll, lane == 31) + 2 * __all_sync(kAll, lane < 32) + 4 * __all_sync(kAll, lane < 31);
  // Two halves of a warp, each on its own; one of them twice.
  int sum = lane;
  if (lane < 16) {
    for (int distance = 8; distance > 0; distance /= 2) sum += __shfl_xor_sync(0x0000ffffu, sum, distance, 16);
    sum += __any_sync(0x0000ffffu, 1);
  } else {
    sum = __shfl_xor_sync(0xffff0000u, sum, 1);
  }
  s.out[224 + lane] = sum;
  s.wide[lane] = __shfl_down_sync(kAll, 0.5 + lane, 1);
}

void check_warp() {
  for (const auto schedule : {simt::Schedule::Fifo, simt::Schedule::Random, simt::Schedule::Priority}) {
    simt::options().schedule = schedule;
    DeviceBuffer<int> out(256);
    DeviceBuffer<double> wide(32);
    run(warp_kernel, shape(1, 32), WarpArguments{out.data(), wide.data()});
    for (int lane = 0; lane < 32; ++lane) {
      expect(out[lane] == (5 * lane + 3) % 32, "a shuffle by index");
      expect(out[32 + lane] == lane / 8 * 8 + (5 * lane + 3) % 8, "a shuffle by index of width 8");
      expect(out[96 + lane] == (lane % 16 + 5 > 15 ? lane : lane + 5), "__shfl_down_sync of width 16");
      expect(out[128 + lane] == (lane ^ 9), "__shfl_xor_sync");
      expect(out[160 + lane] == 0x49249249, "a ballot");
      expect(out[192 + lane] == 3, "__any_sync and __all_sync");
      expect(out[224 + lane] == (lane < 16 ? 121 : lane ^ 1), "half a warp");
      expect(wide[lane] == 0.5 + (lane < 31 ? lane + 1 : lane), "a shuffle of 64 bits");
    }
  }
  simt::options().schedule = simt::Schedule::Fifo;
}

// ---- copies

struct CopyArguments {
  const float* from;
  float* out;  // (4, 32)
};

LSTM_KERNEL copy_kernel(CopyArguments s) {
  LSTM_DYNAMIC_SHARED(float, shared);
  if (threadIdx.x != 0) return;
  cp_async16(shared, s.from, 16);
  cp_async16(shared + 4, s.from + 4, 16);
  cp_async_commit();
  cp_async16(shared + 8, s.from + 8, 8);
  cp_async16(shared + 12, s.from + 12, 0);
  cp_async_commit();
  cp_async_wait<1>();
  for (int i = 0; i < 8; ++i) s.out[i] = shared[i];
  for (int i = 8; i < 16; ++i) s.out[i] = simt::options().copies == simt::Delivery::Late ? shared[i] : 0.f;
  cp_async_wait<0>();
  for (int i = 0; i < 16; ++i) s.out[32 + i] = shared[i];
}

void check_copies() {
  std::vector<float> values(32);
  for (int i = 0; i < 32; ++i) values[i] = static_cast<float>(i + 1);
  for (const auto delivery : {simt::Delivery::Now, simt::Delivery::Late, simt::Delivery::Mixed}) {
    simt::options().copies = delivery;
    DeviceBuffer<float> from(values), out(64);
    // Its reads before the wait are the point: the race detector has its say in another test.
    const bool late = delivery == simt::Delivery::Late;
    try {
      run(copy_kernel, shape(1, 32, 1024), CopyArguments{from.data(), out.data()});
    } catch (const simt::Error& error) {
      expect(late && std::string(error.what()).find("racy") != std::string::npos, error.what());
    }
    for (int i = 0; i < 8; ++i) expect(out[i] == values[i], "the first group has landed");
    for (int i = 8; i < 16 && late; ++i) expect(std::isnan(out[i]), "the second group has not, where late");
    for (int i = 0; i < 16; ++i) expect(out[32 + i] == (i < 10 ? values[i] : 0.f), "both have, the rest is zeros");
  }
  simt::options().copies = simt::Delivery::Late;
}

// ---- indices, waves, shared memory, atomics

struct IndexArguments {
  uint32_t* visits;
  uint32_t* total;
  uint32_t* bad;
};

LSTM_KERNEL index_kernel(IndexArguments s) {
  LSTM_SHARED(float, first, 5);
  LSTM_SHARED(double, second, 3);
  LSTM_DYNAMIC_SHARED(float, third);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  if (thread == 0) {
    bool good = std::isnan(first[4]) && std::isnan(second[2]) && std::isnan(third[7]);
    good = good && reinterpret_cast<uintptr_t>(third) % 128 == 0 && reinterpret_cast<uintptr_t>(first) % 16 == 0;
    if (!good) atomicAdd(s.bad, 1u);
  }
  __syncthreads();
  if (thread == 0) {
    first[4] = 1.f;
    second[2] = 2.;
    third[7] = 3.f;
  }
  __syncthreads();
  if (first[4] != 1.f || second[2] != 2. || third[7] != 3.f) atomicAdd(s.bad, 1u);
  s.visits[block * blockDim.x * blockDim.y * blockDim.z + thread] += 1 + block;
  atomicAdd(s.total, 1u);
}

void check_indices() {
  const dim3 grid(5, 3, 2), block(8, 3, 2);
  const unsigned threads = 48, blocks = 30;
  for (const unsigned resident : {0u, 1u, 7u}) {
    for (const auto schedule : {simt::Schedule::Fifo, simt::Schedule::Random}) {
      simt::options().schedule = schedule;
      simt::options().resident_blocks = resident;
      DeviceBuffer<uint32_t> visits(threads * blocks, 0u), total(1, 0u), bad(1, 0u);
      launch(index_kernel, grid, block, 32, nullptr, IndexArguments{visits.data(), total.data(), bad.data()});
      for (unsigned i = 0; i < visits.size(); ++i) expect(visits[i] == 1 + i / threads, "every thread runs once");
      expect(total[0] == threads * blocks, "atomicAdd");
      expect(bad[0] == 0, "shared arrays are separate, aligned and full of NaNs at first");
    }
  }
  simt::options().schedule = simt::Schedule::Fifo;
  simt::options().resident_blocks = 0;
}

struct AtomicArguments {
  uint32_t* word;
  uint64_t* wide;
  float* real;
};

LSTM_KERNEL atomic_kernel(AtomicArguments s) {
  atomicAdd(s.word, threadIdx.x);
  atomicAdd(s.wide, uint64_t{1} << 33);
  atomicAdd(s.real, 0.5f);
  atomicAdd(s.word + 1, 1u);
  if (threadIdx.x == 0) store_relaxed(s.word + 2, 7);
  while (load_relaxed(s.word + 2) != 7) {
  }
  atomicExch(s.word + 3, 9u);
}

void check_atomics() {
  for (const uint64_t seed : {1, 2, 3}) {
    simt::options().schedule = simt::Schedule::Random;
    simt::options().seed = seed;
    DeviceBuffer<uint32_t> word(4, 0u);
    DeviceBuffer<uint64_t> wide(1, uint64_t{0});
    DeviceBuffer<float> real(1, 0.f);
    run(atomic_kernel, shape(2, 64), AtomicArguments{word.data(), wide.data(), real.data()});
    expect(word[0] == 2 * 2016 && word[1] == 128 && word[2] == 7 && word[3] == 9, "atomics");
    expect(wide[0] == uint64_t{128} << 33 && real[0] == 64.f, "atomics of 64 bits and of floats");
  }
  simt::options().schedule = simt::Schedule::Fifo;
}

struct PieceArguments {
  uint4* pieces;    // one a thread, and one more a block
  uint32_t* tries;  // until a wait was over
};

LSTM_KERNEL piece_kernel(PieceArguments s) {
  const uint32_t thread = threadIdx.x;
  store_relaxed_16(s.pieces + thread, make_uint4(thread, thread + 100, thread + 200, thread + 300));
  __syncthreads();
  const uint4 other = load_relaxed_16(s.pieces + (thread ^ 1));
  if (thread == 0) s.pieces[blockDim.x] = other;
  if (thread == 1) {
    // The first look at the clock is where the time begins, the next one is 256 tries later.
    WaitLimit no_time(1), no_limit(0);
    while (!no_time.is_over()) ++s.tries[0];
    for (int i = 0; i < 100000; ++i) s.tries[1] += no_limit.is_over();
    // A wait that starts again has all of its time.
    no_time.start_again();
    while (!no_time.is_over()) ++s.tries[2];
  }
}

void check_pieces() {
  for (const auto stores : {simt::Delivery::Now, simt::Delivery::Late}) {
    simt::options().stores = stores;
    DeviceBuffer<uint4> pieces(65);
    DeviceBuffer<uint32_t> tries(3, 0u);
    run(piece_kernel, shape(1, 64), PieceArguments{pieces.data(), tries.data()});
    for (uint32_t i = 0; i < 64; ++i) {
      const uint4 piece = pieces[i];
      expect(piece.x == i && piece.y == i + 100 && piece.z == i + 200 && piece.w == i + 300, "a store of 16 bytes");
    }
    const uint4 piece = pieces[64];
    expect(piece.x == 1 && piece.y == 101 && piece.z == 201 && piece.w == 301, "a load of 16 bytes");
    expect(tries[0] >= 511 && tries[0] % 256 == 255, "a wait is over at a look at the clock");
    expect(tries[1] == 0, "a wait without limit is not over");
    expect(tries[2] >= 511 && tries[2] % 256 == 255, "a wait that starts again");
  }
  simt::options().stores = simt::Delivery::Now;
}

}  // namespace

int main() {
  try {
    check_mma();
    check_f16_values();
    check_warp();
    check_copies();
    check_indices();
    check_atomics();
    check_pieces();
  } catch (const simt::Error& error) {
    expect(false, error.what());
  }
  std::printf("%d failures\n", checks::failures);
  return checks::failures == 0 ? 0 : 1;
}
