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

// ---- tensor cores

// ----------------------------------------------------------------------------------------------------- Fragments are
// written down here as the tables of the PTX manual ("Matrix Fragments for mma.m16n8k16") have them, one register at a
// time.
struct MmaArguments {
  const uint16_t* a;    // (16, 16), f16 or bf16
  const uint16_t* b;    // (16, 8)
  const float* a_tf32;  // (16, 8)
  const float* b_tf32;  // (8, 8)
  const float* c;       // (16, 8)
  float* d;             // (16, 8)
  int kind;             // 0 f16, 1 bf16, 2 tf32; +10: by ldmatrix; +20: A by ldmatrix, B by ldmatrix.trans
};

uint32_t pair(uint16_t low, uint16_t high) { return low | uint32_t{high} << 16; }

LSTM_KERNEL mma_kernel(MmaArguments s) {
  LSTM_SHARED(uint16_t, a_rows, 16 * 24);       // (16, 16), rows 48 bytes apart
  LSTM_SHARED(uint16_t, b_transposed, 8 * 24);  // (8, 16)
  LSTM_SHARED(uint16_t, b_rows, 16 * 8);        // (16, 8)
  const int lane = static_cast<int>(threadIdx.x);
  const int group = lane >> 2;
  const int member = lane % 4;
  for (int i = lane; i < 256; i += 32) a_rows[i / 16 * 24 + i % 16] = s.a[i];
  for (int i = lane; i < 128; i += 32) {
    b_rows[i] = s.b[i];
    b_transposed[i % 8 * 24 + i / 8] = s.b[i];
  }
  __syncwarp();
  float d[4];
  for (int i = 0; i < 4; ++i) {
    const int row = i < 2 ? group : group + 8;
    d[i] = s.c[row * 8 + member * 2 + (i & 1)];
  }
  uint32_t a[4];
  uint32_t b[2];
  const int kind = s.kind % 10;
  if (kind == 2) {
    a[0] = to_tf32(s.a_tf32[group * 8 + member]);
    a[1] = to_tf32(s.a_tf32[(group + 8) * 8 + member]);
    a[2] = to_tf32(s.a_tf32[group * 8 + member + 4]);
    a[3] = to_tf32(s.a_tf32[(group + 8) * 8 + member + 4]);
    b[0] = to_tf32(s.b_tf32[member * 8 + group]);
    b[1] = to_tf32(s.b_tf32[(member + 4) * 8 + group]);
    mma_tf32_1688(d, a, b);
  } else {
    const auto at_a = [&](int row, int column) { return s.a[row * 16 + column]; };
    const auto at_b = [&](int row, int column) { return s.b[row * 8 + column]; };
    a[0] = pair(at_a(group, member * 2), at_a(group, member * 2 + 1));
    a[1] = pair(at_a(group + 8, member * 2), at_a(group + 8, member * 2 + 1));
    a[2] = pair(at_a(group, member * 2 + 8), at_a(group, member * 2 + 9));
    a[3] = pair(at_a(group + 8, member * 2 + 8), at_a(group + 8, member * 2 + 9));
    b[0] = pair(at_b(member * 2, group), at_b(member * 2 + 1, group));
    b[1] = pair(at_b(member * 2 + 8, group), at_b(member * 2 + 9, group));
    if (s.kind >= 10) ldmatrix_x4(a, a_rows + lane % 16 * 24 + lane / 16 * 8);
    if (s.kind >= 10) {
      uint32_t both[4];  // the two halves twice
      if (s.kind / 10 == 1) ldmatrix_x4(both, b_transposed + lane % 8 * 24 + lane / 8 % 2 * 8);
      if (s.kind / 10 == 2) ldmatrix_x4_trans(both, b_rows + lane % 16 * 8);
      b[0] = both[2];
      b[1] = both[3];
    }
    if (kind == 0) mma_f16_16816(d, a, b);
    if (kind == 1) mma_bf16_16816(d, a, b);
  }
  for (int i = 0; i < 4; ++i) s.d[(i < 2 ? group : group + 8) * 8 + member * 2 + (i & 1)] = d[i];
}

uint16_t bits_of(__half x) {
  uint16_t bits;
  std::memcpy(&bits, &x, 2);
  return bits;
}
uint16_t bits_of(__nv_bfloat16 x) {
  uint16_t bits;
  std::memcpy(&bits, &x, 2);
  return bits;
}

float as_tf32(float x) { return __uint_as_float(to_tf32(x)); }

void check_mma() {
  std::mt19937 random(11);
  std::uniform_real_distribution<float> uniform(-1.f, 1.f);
  const auto draw = [&](size_t count) {
    std::vector<float> values(count);
    for (float& value : values) value = uniform(random);
    return values;
  };
  const std::vector<float> a = draw(256), b = draw(128), a_tf32 = draw(128), b_tf32 = draw(64), c = draw(128);
  for (const int kind : {0, 1, 2, 10, 11, 20, 21}) {
    const bool f16 = kind % 10 == 0;
    const bool tf32 = kind == 2;
    const auto stored = [&](float x) {
      return f16 ? to_float(from_float<__half>(x)) : to_float(from_float<__nv_bfloat16>(x));
    };
    const auto bits = [&](const std::vector<float>& values) {
      std::vector<uint16_t> out;
      for (const float x : values)
        out.push_back(f16 ? bits_of(from_float<__half>(x)) : bits_of(from_float<__nv_bfloat16>(x)));
      return out;
    };
    DeviceBuffer<uint16_t> a_bits(bits(a)), b_bits(bits(b));
    DeviceBuffer<float> a_float(a_tf32), b_float(b_tf32), c_float(c), d(128);
    for (const auto sum : {simt::MmaSum::Exact, simt::MmaSum::Truncated}) {
      simt::options().mma = sum;
      run(mma_kernel, shape(1, 32),
          MmaArguments{a_bits.data(), b_bits.data(), a_float.data(), b_float.data(), c_float.data(), d.data(), kind});
      simt::options().mma = simt::MmaSum::Exact;
      double worst = 0;
      for (int row = 0; row < 16; ++row) {
        for (int column = 0; column < 8; ++column) {
          double wanted = c[row * 8 + column];
          for (int k = 0; k < (tf32 ? 8 : 16); ++k) {
            wanted += tf32 ? double{as_tf32(a_tf32[row * 8 + k])} * as_tf32(b_tf32[k * 8 + column])
                           : double{stored(a[row * 16 + k])} * stored(b[k * 8 + column]);
          }
          worst = std::fmax(worst, std::fabs(d[row * 8 + column] - wanted));
          if (sum == simt::MmaSum::Exact) {
            expect(d[row * 8 + column] == static_cast<float>(wanted), "an exact mma is rounded once");
          }
        }
      }
      const double bound = sum == simt::MmaSum::Exact ? 2e-7 : 2e-6;
      expect(worst <= bound, "mma of kind " + std::to_string(kind) + " is off by " + std::to_string(worst));
      if (sum == simt::MmaSum::Truncated) expect(worst > 1e-8, "a truncated mma loses bits");
    }
  }
  expect(to_tf32(1.f + 0x1p-11f) == 0x3f802000u, "to_tf32 rounds ties away from zero");
  expect(to_tf32(-1.f - 0x1p-12f) == 0xbf800000u, "to_tf32 rounds to nearest");
}

// Half precision with its special values, through an mma with one.
void check_f16_values() {
  for (int bits = 0; bits < 65536; bits += 113) {
    std::vector<uint16_t> a(256, 0), b(128, 0);
    a[0] = static_cast<uint16_t>(bits);
    b[0] = bits_of(from_float<__half>(1.f));
    DeviceBuffer<uint16_t> a_bits(a), b_bits(b);
    DeviceBuffer<float> none(128, 0.f), d(128);
    run(mma_kernel, shape(1, 32),
        MmaArguments{a_bits.data(), b_bits.data(), none.data(), none.data(), none.data(), d.data(), 0});
    __half half;
    const auto value = static_cast<uint16_t>(bits);
    std::memcpy(static_cast<void*>(&half), &value, 2);
    const float wanted = to_float(half);
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
  s.out[64 + lane] = shuffled(simt::Shuffle::Up, lane, 3);
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
      expect(out[64 + lane] == (lane < 3 ? lane : lane - 3), "a shuffle up");
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

// ---- shared addresses

struct AddressArguments {
  uint32_t* bad;
};

// What code generated from PTX asks for.
LSTM_KERNEL address_kernel(AddressArguments s) {
  LSTM_SHARED(float, array, 8);
  const uint32_t address = simt::shared_address(&array[3], "driver", 0);
  bool good = simt::shared_pointer(address, "driver", 0) == &array[3];
  good = good && simt::dynamic_shared_bytes() == 64;
  good = good && simt::lane_index() == threadIdx.x % 32;
  if (!good) atomicAdd(s.bad, 1u);
}

void check_addresses() {
  DeviceBuffer<uint32_t> bad(1, 0u);
  run(address_kernel, shape(2, 40, 64), AddressArguments{bad.data()});
  expect(bad[0] == 0, "32-bit shared addresses");
}

void check_conversions() {
  expect(to_float(from_float<__half>(0.1f)) == 0.0999755859375f, "half");
  expect(to_float(from_float<__nv_bfloat16>(0.1f)) == 0.10009765625f, "bfloat16");
  expect(from_float<double>(0.5f) == 0.5 && to_float(0.5) == 0.5f && from_float<float>(0.5f) == 0.5f, "float, double");
  expect(narrow<double>(widen(0.1)) == 0.1, "float64 stays float64");
  expect(narrow<float>(widen(0.1f)) == 0.1f, "float32 stays float32");
  expect(to_float(narrow<__half>(widen(from_float<__half>(3.f)))) == 3.f, "half through float32");
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
    check_addresses();
    check_conversions();
  } catch (const simt::Error& error) {
    expect(false, error.what());
  }
  std::printf("%d failures\n", checks::failures);
  return checks::failures == 0 ? 0 : 1;
}
