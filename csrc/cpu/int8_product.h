// Products of float32 rows with int8 weights, with the instruction that sums four products of bytes.
//
// A row is read in pieces of kBlockK numbers. The numbers of a piece become integers of three or four int8 parts
// (int8x3, int8x4) times one factor. With four parts the largest number has 31 bits, and every number keeps all its
// float32 bits unless it is below 2^-7 of the largest. With three parts it has 23 bits, which is enough if many numbers
// are close to the largest. Sums of products of bytes are exact. The instruction multiplies unsigned bytes by signed
// ones, so weights are stored as w + 128, and 128 times the sum of a row's parts is subtracted. Next to one much larger
// number the others would lose their bits, which matters if the weight of the large one is 0: such a piece is
// multiplied in float32.
#pragma once

#include "cpu/isa.h"

#include "cpu/gates.h"
#include "cpu/range.h"
#include "cpu/simd.h"
#include "cpu/tile.h"

namespace lstm_ext::cpu::LSTM_EXT_ISA {
namespace {

// Whether the CPU has the instruction. kMayWidenInt8: the set may have to widen the weights instead.
#if defined(LSTM_EXT_ISA_SOFTWARE)  // emulates it
constexpr bool kMayWidenInt8 = false;
inline bool multiplies_int8() { return true; }
#else
constexpr bool kMayWidenInt8 = true;
inline bool multiplies_int8() {
#if defined(LSTM_EXT_ISA_AVX512)
  return has_avx512_vnni;
#elif defined(LSTM_EXT_ISA_AVX2)
  return has_avx_vnni;
#else
  return has_i8mm;
#endif
}
#endif

// For these products a panel holds four k of a unit side by side, [k / 4][gate][lane][k % 4], padded with 128.
// int8_place gives the place of a weight, int8_panel_size the bytes of a panel.
constexpr int kKsOfInt8 = 4;
LSTM_EXT_INLINE int64_t int8_place(int64_t k, int gate, int lane) {
  constexpr int n = Simd<float>::kLanes;
  return (k / kKsOfInt8 * kGates + gate) * kKsOfInt8 * n + lane * kKsOfInt8 + k % kKsOfInt8;
}
LSTM_EXT_INLINE int64_t int8_panel_size(int64_t count) {
  return kGates * Simd<float>::kLanes * divide_up(count, kKsOfInt8) * kKsOfInt8;
}

using Ints = Simd<float>::Index;
constexpr int kMostParts = 4;
constexpr int kFewParts = 3;
// The largest number of kParts parts: each part is 127.
template <int kParts>
constexpr int32_t kLargestOfParts = 0x7F7F7F7F >> 8 * (kMostParts - kParts);
// See Int8Row::parts.
constexpr float kMostOverMean = 512;
constexpr int32_t kLeastOfFew = 128;
constexpr int32_t kSmallSize = 64;
constexpr int32_t kSmallShare = 16;
constexpr int64_t kPiecesAtOnce = 8;                          // pieces of a row
constexpr int64_t kPanelStep = kGates * Simd<float>::kLanes;  // bytes of one k

// A piece of a row as sums of int8 parts times powers of 256, the lowest first: [k / 4][part][k % 4], so that a product
// reads four k of a part at once.
struct Int8Row {
  alignas(64) int8_t bytes[kMostParts * kBlockK];
  int32_t sums[kMostParts];
  float factor;
  // How many parts there are.
  // 0: the numbers have to be multiplied in float32. This holds for infinities, NaN, numbers too large or too small for
  // the factor, and a number of more than kMostOverMean times the mean of the others that are not 0.
  // kFewParts: all numbers are 0; or at least kLeastOfFew are not, and of these at most one in kSmallShare is smaller
  // than the largest divided by kSmallSize. A float32 sum of them has about the same error. A sum of a few numbers
  // would be more exact. Many small numbers beside large ones would lose bits, which matters to a unit whose weights
  // for the large ones are 0.
  // kMostParts otherwise.
  int parts;
};

// Reduces all lanes with f; every lane gets the result.
template <int kStep = Simd<float>::kLanes / 2, typename F>
LSTM_EXT_INLINE Ints over_lanes(Ints v, const F& f) {
  if constexpr (kStep > 0) {
    v = f(v, lanes_from<Ints, kStep>(v, std::make_integer_sequence<int, Simd<float>::kLanes>{}));
    return over_lanes<kStep / 2>(v, f);
  }
  return v;
}

// sum += the products of four bytes each.
LSTM_EXT_INLINE void add_products(Ints& sum, Ints weights, Ints bytes) {
#if defined(LSTM_EXT_ISA_SOFTWARE)
  for (int i = 0; i < kKsOfInt8; ++i) sum += ((weights >> 8 * i) & 255) * ((bytes << (24 - 8 * i)) >> 24);
#elif defined(LSTM_EXT_ISA_AVX2)  // in assembly, since the set is compiled for processors without it too
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(weights), "x"(bytes));
#elif defined(LSTM_EXT_ISA_NEON)  // the same
  asm(".arch_extension i8mm\n\tusdot %0.4s, %1.16b, %2.16b" : "+w"(sum) : "w"(weights), "w"(bytes));
#else                             // and GCC 12 copies the sums around the instruction
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(bytes));
#endif
}

// Transposes four numbers of four bytes, side by side: byte j of number i becomes byte i of number j.
template <int... kByte>
LSTM_EXT_INLINE Ints transpose_bytes(Ints v, std::integer_sequence<int, kByte...>) {
  typedef int8_t Bytes __attribute__((vector_size(sizeof(Ints))));
  const Bytes bytes = reinterpret_cast<Bytes>(v);
#ifdef LSTM_EXT_SHUFFLES
  return reinterpret_cast<Ints>(
      __builtin_shufflevector(bytes, bytes, (kByte / 16 * 16 + kByte % 4 * 4 + kByte % 16 / 4)...));
#else
  return reinterpret_cast<Ints>(Bytes{bytes[kByte / 16 * 16 + kByte % 4 * 4 + kByte % 16 / 4]...});
#endif
}

// Splits a piece into parts; `largest` is the magnitude of its largest number. Returns how many numbers are small but
// not 0.
template <int kParts>
int32_t split_into(const float* x, int64_t count, float largest, Int8Row& row) {
  using S = Simd<float>;
  constexpr int32_t kLargest = kLargestOfParts<kParts>;
  row.parts = kParts;
  row.factor = largest / static_cast<float>(kLargest);
  const Reg<float> scale = S::set1(largest == 0 ? 0.0f : static_cast<float>(kLargest) / largest);
  const Ints bound = Ints{} + kLargest, small = Ints{} + kLargest / kSmallSize;
  // Adding 128 to each byte but the highest carries into the next one if a part would be above 127. The exclusive or
  // removes the 128 again. The largest number becomes 0x7FFFFFFF at most.
  const Ints halves = Ints{} + (0x808080 >> 8 * (kMostParts - kParts));
  Ints sums = {}, smaller_ones = {};
  for (int64_t k = 0; k < count; k += S::kLanes) {
    const auto lanes = static_cast<int>(smaller(count - k, S::kLanes));
    const Reg<float> value = load_lanes<float>(x + k, lanes);
    Ints number = __builtin_convertvector(S::round(value * scale), Ints);
    // Rounding may exceed the largest number that the bytes hold.
    number = number > bound ? bound : number;
    number = number < -bound ? -bound : number;
    smaller_ones -= (reinterpret_cast<Ints>(S::abs(value)) != 0) & (number < small) & (number > -small);
    const Ints parts = transpose_bytes((number + halves) ^ halves, std::make_integer_sequence<int, sizeof(Ints)>{});
    __builtin_memcpy(row.bytes + kMostParts * k, &parts, sizeof(parts));
    add_products(sums, Ints{} + 0x01010101, parts);
  }
  for (int part = 0; part < kParts; ++part) {
    row.sums[part] = 0;
    for (int lane = part; lane < S::kLanes; lane += kMostParts) row.sums[part] += sums[lane];
  }
  return over_lanes(smaller_ones, [](auto a, auto b) LSTM_EXT_LAMBDA_INLINE { return a + b; })[0];  // see split_row
}

inline void split_row(const float* x, int64_t count, Int8Row& row) {
  using S = Simd<float>;
  // Generic: the compiler would make functions of others, and warn about what these return.
  const auto larger = [](auto a, auto b) LSTM_EXT_LAMBDA_INLINE { return a > b ? a : b; };
  const auto sum = [](auto a, auto b) LSTM_EXT_LAMBDA_INLINE { return a + b; };
  Ints most = {}, not_zero = {};
  Reg<float> total = S::zero();
  for_each_register<float>(count, [&](int64_t k, int lanes) LSTM_EXT_LAMBDA_INLINE {
    const Reg<float> size = S::abs(load_lanes<float>(x + k, lanes));
    const Ints bits = reinterpret_cast<Ints>(size);
    most = larger(most, bits);
    not_zero -= bits != 0;
    total = total + size;
  });
  const int32_t bits = over_lanes(most, larger)[0];
  constexpr int32_t kLeast = (127 - 80) << 23, kMost = (127 + 80) << 23;
  float largest;
  __builtin_memcpy(&largest, &bits, sizeof(bits));
  const int32_t numbers = over_lanes(not_zero, sum)[0];
  const float of_others = sum_of_lanes<float>(total)[0] - largest;
  const bool even = static_cast<float>(numbers - 1) * largest <= kMostOverMean * of_others;
  row.parts = 0;
  if (numbers > 0 && !(bits >= kLeast && bits < kMost && even)) return;
  if (numbers == 0 || numbers >= kLeastOfFew) {
    if (kSmallShare * split_into<kFewParts>(x, count, largest, row) <= numbers) return;
  }
  split_into<kMostParts>(x, count, largest, row);
}

// Keeps the bytes in a register: otherwise GCC reads them again for each part, which takes longer than the products.
LSTM_EXT_INLINE Ints load_bytes(const uint8_t* p) {
  Ints v;
  __builtin_memcpy(&v, p, sizeof(v));
  keep_in_register(v);
  return v;
}

// sums = the products of a piece of a row with `count` k of some gates of a panel, without the factors of the units.
// Not inlined: the loop needs the registers that GCC would give to the surrounding code.
template <int kParts, int kSomeGates>
__attribute__((noinline)) void multiply_gates(const uint8_t* panel, const Int8Row& row, int64_t count,
                                              Reg<float>* sums) {
  using S = Simd<float>;
  constexpr int kGroup = kKsOfInt8 * kPanelStep;
  Ints acc[kParts][kSomeGates] = {};
  const int64_t groups = divide_up(count, kKsOfInt8);
  const int8_t* parts = row.bytes;
  const bool fetches = fetches_panels;
  for (int64_t k = 0; k < groups; ++k, panel += kGroup, parts += kMostParts * kKsOfInt8) {
#pragma GCC unroll 4
    for (int line = 0; fetches && line < kGroup; line += 64) __builtin_prefetch(panel + kPrefetchBytes + line);
    // The sums of three parts, the parts, and the weights of one gate fill 16 registers.
    Ints four[kParts];
#pragma GCC unroll 4
    for (int d = 0; d < kParts; ++d) {
      int32_t bytes;
      __builtin_memcpy(&bytes, parts + d * kKsOfInt8, sizeof(bytes));
      four[d] = Ints{} + bytes;
    }
#pragma GCC unroll kGates
    for (int gate = 0; gate < kSomeGates; ++gate) {
      const Ints w = load_bytes(panel + gate * static_cast<int64_t>(sizeof(Ints)));
#pragma GCC unroll 4
      for (int d = 0; d < kParts; ++d) add_products(acc[d][gate], w, four[d]);
    }
  }
#pragma GCC unroll kGates
  for (int gate = 0; gate < kSomeGates; ++gate) {
    Reg<float> sum = S::zero();
#pragma GCC unroll 4
    for (int d = kParts - 1; d >= 0; --d) {
      sum = S::fma(sum, S::set1(256.0f), __builtin_convertvector(acc[d][gate] - 128 * row.sums[d], Reg<float>));
    }
    sums[gate] = sum * S::set1(row.factor);
  }
}

// The same for all gates. With 16 registers the sums of four parts leave room for two gates at once.
template <int kParts>
LSTM_EXT_INLINE void multiply_parts(const uint8_t* panel, const Int8Row& row, int64_t count, Reg<float>* sums) {
  constexpr int kAtOnce = kVectorRegisters == 16 && kParts == kMostParts ? kGates / 2 : kGates;
#pragma GCC unroll 1
  for (int gate = 0; gate < kGates; gate += kAtOnce) {
    multiply_gates<kParts, kAtOnce>(panel + gate * static_cast<int64_t>(sizeof(Ints)), row, count, sums + gate);
  }
}

// The same in float32, for a piece that was not split.
inline void multiply_unsplit(const uint8_t* panel, const float* x, int64_t count, Reg<float>* sums) {
  using S = Simd<float>;
  for (int gate = 0; gate < kGates; ++gate) sums[gate] = S::zero();
  for (int64_t k = 0; k < count; ++k) {
    const uint8_t* const group = panel + k / kKsOfInt8 * kKsOfInt8 * kPanelStep;
    for (int gate = 0; gate < kGates; ++gate) {
      const Ints four = load_bytes(group + gate * static_cast<int64_t>(sizeof(Ints)));
      const Ints weight = ((four >> static_cast<int>(8 * (k % kKsOfInt8))) & 255) - 128;
      sums[gate] = S::fma(S::set1(x[k]), __builtin_convertvector(weight, Reg<float>), sums[gate]);
    }
  }
}

// `x` is the piece before it was split.
LSTM_EXT_INLINE void multiply_int8(const uint8_t* panel, const Int8Row& row, const float* x, int64_t count,
                                   Reg<float>* sums) {
  switch (row.parts) {
    case kFewParts: return multiply_parts<kFewParts>(panel, row, count, sums);
    case kMostParts: return multiply_parts<kMostParts>(panel, row, count, sums);
    default: return multiply_unsplit(panel, x, count, sums);
  }
}

}  // namespace
}  // namespace lstm_ext::cpu::LSTM_EXT_ISA
