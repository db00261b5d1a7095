// SIMD registers of the instruction set this translation unit is compiled for, as one small interface: Simd<float>,
// Simd<double>. The register types are the compiler's vector types, so + - * / and < work on them.
#pragma once

#include "cpu/isa.h"

#include "cpu/range.h"

namespace lstm_ext::cpu::LSTM_EXT_ISA {
namespace {

template <typename T>
struct Simd;

// Numbers of 16 bits in memory, which become float32 when they are loaded.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// 2^(j / 16) in float32, for sets whose registers hold a table of 16 numbers: its bits, less j from bit 19 on, so that
// adding n * 2^19 for n = 16 m + j gives 2^(n / 16). And half of each rounding error.
alignas(64) constexpr uint32_t kPowerBits[] = {0x3F800000, 0x3F7DAAC3, 0x3F7B95C2, 0x3F79C3D3, 0x3F7837F0, 0x3F76F532,
                                               0x3F75FED7, 0x3F75583F, 0x3F7504F3, 0x3F7508A4, 0x3F75672A, 0x3F76248C,
                                               0x3F7744FD, 0x3F78CCDF, 0x3F7AC0C7, 0x3F7D257D};
alignas(64) constexpr float kPowerRest[] = {0.0f,
                                            2.41673507e-08f,
                                            -6.53877008e-09f,
                                            2.69311107e-08f,
                                            1.89881769e-08f,
                                            2.24841907e-08f,
                                            -2.00949969e-08f,
                                            -5.06167452e-09f,
                                            1.21016172e-08f,
                                            -2.25044935e-08f,
                                            4.03545231e-09f,
                                            4.91810859e-09f,
                                            -1.23776637e-08f,
                                            -4.61788519e-09f,
                                            -5.61963909e-09f,
                                            4.92266428e-09f};

#if defined(LSTM_EXT_ISA_AVX512)

constexpr int kVectorRegisters = 32;

template <>
struct Simd<float> {
  using Reg = __m512;
  typedef int Index __attribute__((vector_size(64)));
  typedef uint8_t Bytes __attribute__((vector_size(16)));
  static constexpr int kLanes = 16;
  static Reg zero() { return _mm512_setzero_ps(); }
  static Reg set1(float x) { return _mm512_set1_ps(x); }
  static Reg load(const float* p) { return _mm512_loadu_ps(p); }
  // Loads small integers.
  static Reg load(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static void store(float* p, Reg v) { _mm512_storeu_ps(p, v); }
  static Reg load(const BFloat16* p) { return widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), p); }
  static Reg load(const Float16* p) { return widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), p); }
  static Reg load_partial(const float* p, int n) { return _mm512_maskz_loadu_ps(mask(n), p); }
  template <typename W>
  static Reg load_partial(const W* p, int n) {
    return widened(_mm256_maskz_loadu_epi16(mask(n), p), p);
  }
  static void store_partial(float* p, Reg v, int n) { _mm512_mask_storeu_ps(p, mask(n), v); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
  // Both return `v` if it is NaN, because min and max then return their second operand.
  static Reg at_most(Reg v, float bound) { return _mm512_min_ps(set1(bound), v); }
  static Reg at_least(Reg v, float bound) { return _mm512_max_ps(set1(bound), v); }
  static Reg square_root(Reg v) { return _mm512_sqrt_ps(v); }
  // The error is little more than half a unit in the last place, at a third of a division's time; `v` is finite and not
  // 0.
  static Reg reciprocal(Reg v) {
    const Reg near = _mm512_rcp14_ps(v);
    return _mm512_fmadd_ps(near, _mm512_fnmadd_ps(near, v, set1(1.0f)), near);
  }
  static Reg abs(Reg v) { return _mm512_abs_ps(v); }
  static Reg copy_sign(Reg magnitude, Reg sign) {
    return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_castps_si512(magnitude), _mm512_castps_si512(sign),
                                                         _mm512_set1_epi32(INT32_MIN), 0xD8));
  }
  static Reg round(Reg v) { return _mm512_roundscale_ps(v, 8); }
  static Reg scale_by_power_of_two(Reg v, Reg n) { return _mm512_scalef_ps(v, n); }
  // 2^(n / 16) for the integer n in the last bits of a number; and for n from -15 to 0, the rounding error.
  static Reg power_of_sixteenth(Reg n) {
    const __m512i bits = _mm512_castps_si512(n);
    const __m512i power = _mm512_permutexvar_epi32(bits, _mm512_load_si512(kPowerBits));
    return _mm512_castsi512_ps(_mm512_add_epi32(power, _mm512_slli_epi32(bits, 19)));
  }
  static Reg rest_of_sixteenth(Reg n) {
    return _mm512_permutexvar_ps(_mm512_castps_si512(n), _mm512_load_ps(kPowerRest));
  }

 private:
  static __mmask16 mask(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
  static Reg widened(__m256i v, const BFloat16*) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
  }
  static Reg widened(__m256i v, const Float16*) { return _mm512_cvtph_ps(v); }
};

template <>
struct Simd<double> {
  using Reg = __m512d;
  typedef long long Index __attribute__((vector_size(64)));
  typedef uint8_t Bytes __attribute__((vector_size(8)));
  static constexpr int kLanes = 8;
  static Reg zero() { return _mm512_setzero_pd(); }
  static Reg set1(double x) { return _mm512_set1_pd(x); }
  static Reg load(const double* p) { return _mm512_loadu_pd(p); }
  static void store(double* p, Reg v) { _mm512_storeu_pd(p, v); }
  static Reg load_partial(const double* p, int n) { return _mm512_maskz_loadu_pd(mask(n), p); }
  static void store_partial(double* p, Reg v, int n) { _mm512_mask_storeu_pd(p, mask(n), v); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_pd(a, b, c); }
  static Reg at_most(Reg v, double bound) { return _mm512_min_pd(set1(bound), v); }
  static Reg at_least(Reg v, double bound) { return _mm512_max_pd(set1(bound), v); }
  static Reg square_root(Reg v) { return _mm512_sqrt_pd(v); }
  static Reg reciprocal(Reg v) { return set1(1.0) / v; }
  static Reg abs(Reg v) { return _mm512_abs_pd(v); }
  static Reg copy_sign(Reg magnitude, Reg sign) {
    return _mm512_castsi512_pd(_mm512_ternarylogic_epi64(_mm512_castpd_si512(magnitude), _mm512_castpd_si512(sign),
                                                         _mm512_set1_epi64(INT64_MIN), 0xD8));
  }
  static Reg round(Reg v) { return _mm512_roundscale_pd(v, 8); }
  static Reg scale_by_power_of_two(Reg v, Reg n) { return _mm512_scalef_pd(v, n); }

 private:
  static __mmask8 mask(int n) { return static_cast<__mmask8>((1u << n) - 1u); }
};

#elif defined(LSTM_EXT_ISA_AVX2)

constexpr int kVectorRegisters = 16;

alignas(64) constexpr int32_t kMask32[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};
alignas(64) constexpr int64_t kMask64[8] = {-1, -1, -1, -1, 0, 0, 0, 0};

template <>
struct Simd<float> {
  using Reg = __m256;
  typedef int Index __attribute__((vector_size(32)));
  typedef uint8_t Bytes __attribute__((vector_size(8)));
  static constexpr int kLanes = 8;
  static Reg zero() { return _mm256_setzero_ps(); }
  static Reg set1(float x) { return _mm256_set1_ps(x); }
  static Reg load(const float* p) { return _mm256_loadu_ps(p); }
  static Reg load(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  static void store(float* p, Reg v) { _mm256_storeu_ps(p, v); }
  static Reg load(const BFloat16* p) {
    const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
  }
  static Reg load(const Float16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static Reg load_partial(const float* p, int n) { return _mm256_maskload_ps(p, mask(n)); }
  static void store_partial(float* p, Reg v, int n) { _mm256_maskstore_ps(p, mask(n), v); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
  static Reg at_most(Reg v, float bound) { return _mm256_min_ps(set1(bound), v); }
  static Reg at_least(Reg v, float bound) { return _mm256_max_ps(set1(bound), v); }
  static Reg square_root(Reg v) { return _mm256_sqrt_ps(v); }
  static Reg reciprocal(Reg v) { return set1(1.0f) / v; }
  static Reg abs(Reg v) { return _mm256_andnot_ps(set1(-0.0f), v); }
  static Reg copy_sign(Reg magnitude, Reg sign) {
    return _mm256_or_ps(abs(magnitude), _mm256_and_ps(set1(-0.0f), sign));
  }
  static Reg round(Reg v) { return _mm256_round_ps(v, 8); }
  static Reg scale_by_power_of_two(Reg v, Reg n) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_mul_ps(v, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
  }

 private:
  static __m256i mask(int n) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kMask32 + 8 - n)); }
};

template <>
struct Simd<double> {
  using Reg = __m256d;
  typedef long long Index __attribute__((vector_size(32)));
  typedef uint8_t Bytes __attribute__((vector_size(4)));
  static constexpr int kLanes = 4;
  static Reg zero() { return _mm256_setzero_pd(); }
  static Reg set1(double x) { return _mm256_set1_pd(x); }
  static Reg load(const double* p) { return _mm256_loadu_pd(p); }
  static void store(double* p, Reg v) { _mm256_storeu_pd(p, v); }
  static Reg load_partial(const double* p, int n) { return _mm256_maskload_pd(p, mask(n)); }
  static void store_partial(double* p, Reg v, int n) { _mm256_maskstore_pd(p, mask(n), v); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_pd(a, b, c); }
  static Reg at_most(Reg v, double bound) { return _mm256_min_pd(set1(bound), v); }
  static Reg at_least(Reg v, double bound) { return _mm256_max_pd(set1(bound), v); }
  static Reg square_root(Reg v) { return _mm256_sqrt_pd(v); }
  static Reg reciprocal(Reg v) { return set1(1.0) / v; }
  static Reg abs(Reg v) { return _mm256_andnot_pd(set1(-0.0), v); }
  static Reg copy_sign(Reg magnitude, Reg sign) {
    return _mm256_or_pd(abs(magnitude), _mm256_and_pd(set1(-0.0), sign));
  }
  static Reg round(Reg v) { return _mm256_round_pd(v, 8); }
  static Reg scale_by_power_of_two(Reg v, Reg n) {
    const __m256i exponent = _mm256_add_epi64(_mm256_cvtepi32_epi64(_mm256_cvtpd_epi32(n)), _mm256_set1_epi64x(1023));
    return _mm256_mul_pd(v, _mm256_castsi256_pd(_mm256_slli_epi64(exponent, 52)));
  }

 private:
  static __m256i mask(int n) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kMask64 + 4 - n)); }
};

#elif defined(LSTM_EXT_ISA_NEON)
#include "cpu/simd_neon.h"

#elif defined(LSTM_EXT_ISA_SOFTWARE)
#include LSTM_EXT_SOFTWARE_SIMD
#endif

template <typename T>
using Reg = typename Simd<T>::Reg;

// The first n numbers of W as a register of T.
template <typename T, typename W>
LSTM_EXT_INLINE Reg<T> load_first(const W* p, int n) {
#if !defined(LSTM_EXT_ISA_AVX512)
  constexpr bool kCopies = !std::is_same_v<T, W>;
#else
  constexpr bool kCopies = false;
#endif
  if constexpr (kCopies) {
    W numbers[Simd<T>::kLanes] = {};
    for (int i = 0; i < n; ++i) numbers[i] = p[i];
    return Simd<T>::load(numbers);
  } else {
    return Simd<T>::load_partial(p, n);
  }
}

// The type of a register's numbers.
template <typename T>
struct NumberOf {
  using Type = T;
};
template <typename T>
using Number = typename NumberOf<T>::Type;

template <typename Mask, typename R>
LSTM_EXT_INLINE R choose(Mask mask, R a, R b) {
  return mask ? a : b;
}

// Two registers of T used like one, for functions that are one long chain. Each operation is done to both in turn, so
// that one chain computes while the other waits. Two<Two<T>> is four.
template <typename T>
struct Two;
template <typename T>
struct NumberOf<Two<T>> {
  using Type = Number<T>;
};
template <typename T>
struct Simd<Two<T>> {
  using One = Simd<T>;
  using R = typename One::Reg;
  struct Mask {
    decltype(R{} < R{}) a, b;
  };
  struct Reg {
    R a, b;
    LSTM_EXT_INLINE friend Reg operator+(Reg x, Reg y) { return {x.a + y.a, x.b + y.b}; }
    LSTM_EXT_INLINE friend Reg operator-(Reg x, Reg y) { return {x.a - y.a, x.b - y.b}; }
    LSTM_EXT_INLINE friend Reg operator*(Reg x, Reg y) { return {x.a * y.a, x.b * y.b}; }
    LSTM_EXT_INLINE friend Reg operator-(Reg x) { return {-x.a, -x.b}; }
    LSTM_EXT_INLINE friend Mask operator<(Reg x, Reg y) { return {x.a < y.a, x.b < y.b}; }
    LSTM_EXT_INLINE friend Reg choose(Mask mask, Reg x, Reg y) {
      return {choose(mask.a, x.a, y.a), choose(mask.b, x.b, y.b)};
    }
  };
  LSTM_EXT_INLINE static Reg set1(Number<T> x) { return {One::set1(x), One::set1(x)}; }
  LSTM_EXT_INLINE static Reg fma(Reg x, Reg y, Reg z) { return {One::fma(x.a, y.a, z.a), One::fma(x.b, y.b, z.b)}; }
  LSTM_EXT_INLINE static Reg at_most(Reg v, Number<T> bound) {
    return {One::at_most(v.a, bound), One::at_most(v.b, bound)};
  }
  LSTM_EXT_INLINE static Reg at_least(Reg v, Number<T> bound) {
    return {One::at_least(v.a, bound), One::at_least(v.b, bound)};
  }
  LSTM_EXT_INLINE static Reg reciprocal(Reg v) { return {One::reciprocal(v.a), One::reciprocal(v.b)}; }
  LSTM_EXT_INLINE static Reg abs(Reg v) { return {One::abs(v.a), One::abs(v.b)}; }
  LSTM_EXT_INLINE static Reg copy_sign(Reg magnitude, Reg sign) {
    return {One::copy_sign(magnitude.a, sign.a), One::copy_sign(magnitude.b, sign.b)};
  }
  LSTM_EXT_INLINE static Reg round(Reg v) { return {One::round(v.a), One::round(v.b)}; }
  LSTM_EXT_INLINE static Reg scale_by_power_of_two(Reg v, Reg n) {
    return {One::scale_by_power_of_two(v.a, n.a), One::scale_by_power_of_two(v.b, n.b)};
  }
  LSTM_EXT_INLINE static Reg power_of_sixteenth(Reg n) {
    return {One::power_of_sixteenth(n.a), One::power_of_sixteenth(n.b)};
  }
  LSTM_EXT_INLINE static Reg rest_of_sixteenth(Reg n) {
    return {One::rest_of_sixteenth(n.a), One::rest_of_sixteenth(n.b)};
  }
};

// kCount registers of T used like one.
template <typename T, int kCount>
struct SeveralOf {
  static_assert(kCount == 2 || kCount == 4);
  using Type = Two<typename SeveralOf<T, kCount / 2>::Type>;
};
template <typename T>
struct SeveralOf<T, 1> {
  using Type = T;
};
template <typename T, int kCount>
using Several = typename SeveralOf<T, kCount>::Type;
// The registers f(first), f(first + 1), ... as one.
template <typename T, int kCount, typename F>
LSTM_EXT_INLINE Reg<Several<T, kCount>> several(const F& f, int first = 0) {
  if constexpr (kCount == 1) {
    return f(first);
  } else {
    return {several<T, kCount / 2>(f, first), several<T, kCount / 2>(f, first + kCount / 2)};
  }
}
// Register n of them; n is known when the code is compiled.
template <int kCount, typename Register>
LSTM_EXT_INLINE auto one_of(const Register& registers, int n) {
  if constexpr (kCount == 1) {
    return registers;
  } else {
    return n < kCount / 2 ? one_of<kCount / 2>(registers.a, n) : one_of<kCount / 2>(registers.b, n - kCount / 2);
  }
}

// Numbers of W, T or narrower, as a register of T.
template <typename T, typename W>
LSTM_EXT_INLINE Reg<T> load_lanes(const W* p, int n) {
  return n == Simd<T>::kLanes ? Simd<T>::load(p) : load_first<T>(p, n);
}

// Rounds to nearest, ties to even; the result is in the low half of each word.
typedef uint32_t Words __attribute__((vector_size(sizeof(Reg<float>))));
LSTM_EXT_INLINE Words rounded(Reg<float> v, BFloat16) {
  const Words bits = reinterpret_cast<Words>(v);
  const Words number = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  return v == v ? number : Words{} + 0x7FC0;
}
LSTM_EXT_INLINE Words rounded(Reg<float> v, Float16) {
  const Words sign = reinterpret_cast<Words>(v) & 0x80000000, bits = reinterpret_cast<Words>(v) ^ sign;
  const Words number = (bits - (112u << 23) + 0xFFF + ((bits >> 13) & 1)) >> 13;
  // Below the smallest normal number, adding 0.5 leaves the bits that fit at the end.
  const Words small =
      reinterpret_cast<Words>(reinterpret_cast<Reg<float>>(bits) + Simd<float>::set1(0.5f)) - (126u << 23);
  const Words large = bits > 255u << 23 ? Words{} + 0x7E00 : Words{} + 0x7C00;  // NaN, or infinity
  return (bits >= 143u << 23 ? large : bits < 113u << 23 ? small : number) | sign >> 16;
}

template <typename W>
LSTM_EXT_INLINE void store_rounded(W* p, Reg<float> v, int n) {
  constexpr int kLanes = Simd<float>::kLanes;
  typedef uint16_t Halves __attribute__((vector_size(kLanes * sizeof(uint16_t))));
  const Halves halves = __builtin_convertvector(rounded(v, W{}), Halves);
  if (n == kLanes) {
    __builtin_memcpy(p, &halves, sizeof(halves));
  } else {
    for (int i = 0; i < n; ++i) p[i].bits = halves[i];
  }
}

template <typename T>
LSTM_EXT_INLINE void store_lanes(T* p, Reg<T> v, int n) {
  if (n == Simd<T>::kLanes) {
    Simd<T>::store(p, v);
  } else {
    Simd<T>::store_partial(p, v, n);
  }
}

template <typename T>
LSTM_EXT_INLINE void add_lanes(T* p, Reg<T> v, int n) {
  store_lanes<T>(p, load_lanes<T>(p, n) + v, n);
}

// For a number that several instructions use. Otherwise GCC reads it from memory for each of them, if there are two or
// three and a panel comes from the second-level cache.
template <typename Register>
LSTM_EXT_INLINE void keep_in_register([[maybe_unused]] Register& v) {
#if defined(LSTM_EXT_ISA_AVX512)
  asm("" : "+v"(v));
#elif defined(LSTM_EXT_ISA_NEON)
  asm("" : "+w"(v));
#elif !defined(LSTM_EXT_ISA_SOFTWARE)
  asm("" : "+x"(v));
#endif
}

// Two-operand shuffle with indices known at compile time; lane j takes index(j), where b's lanes
// are numbered from kLanes on. Step of the transposing reduction below for groups of `Group` lanes.
template <typename T, int Group, int Offset, int... J>
LSTM_EXT_INLINE Reg<T> pick_groups(Reg<T> a, Reg<T> b, std::integer_sequence<int, J...>) {
  constexpr int n = Simd<T>::kLanes;
#if defined(__clang__)
  return __builtin_shufflevector(
      a, b, (J / (2 * Group) * 2 * Group + J % Group + Offset + (J % (2 * Group) < Group ? 0 : n))...);
#else
  using Index = typename Simd<T>::Index;
  return __builtin_shuffle(
      a, b, Index{(J / (2 * Group) * 2 * Group + J % Group + Offset + (J % (2 * Group) < Group ? 0 : n))...});
#endif
}

// Lane j of the result is the sum of the lanes of v[j], for kLanes vectors. Every v[j] is summed in the same order
// (neighbours first, then pairs of pairs), so a sum does not depend on its place. Fewer vectors, Count of them, are
// summed as far as their own lanes go: the results of kLanes / Count such sums are the vectors of another with
// Group = Count. Destroys v.
template <typename T, int Count, int Group = 1>
LSTM_EXT_INLINE Reg<T> sum_each(Reg<T>* v) {
  using Lanes = std::make_integer_sequence<int, Simd<T>::kLanes>;
  if constexpr (Count == 1) {
    return v[0];
  } else {
#pragma GCC unroll 8
    for (int i = 0; i < Count / 2; ++i) {
      v[i] = pick_groups<T, Group, 0>(v[2 * i], v[2 * i + 1], Lanes{}) +
             pick_groups<T, Group, Group>(v[2 * i], v[2 * i + 1], Lanes{});
    }
    return sum_each<T, Count / 2, 2 * Group>(v);
  }
}

// a if the flag is set, else b. Not a product with the flag, because the other value may be infinite.
template <typename T>
LSTM_EXT_INLINE Reg<T> where(const uint8_t* flags, int lanes, Reg<T> a, Reg<T> b) {
  using Index = typename Simd<T>::Index;
  typename Simd<T>::Bytes bytes = {};
  if (lanes == Simd<T>::kLanes) {
    __builtin_memcpy(&bytes, flags, sizeof(bytes));
  } else {
    for (int i = 0; i < lanes; ++i) bytes[i] = flags[i];
  }
  return __builtin_convertvector(bytes, Index) != 0 ? a : b;
}

// Clang and GCC 12 shuffle in registers. Older compilers go lane by lane through memory, and the sum waits for the
// stores.
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define LSTM_EXT_SHUFFLES
#endif
#endif
template <typename V, int kStep, int... kLane>
LSTM_EXT_INLINE V lanes_from(V v, std::integer_sequence<int, kLane...>) {
#ifdef LSTM_EXT_SHUFFLES
  return __builtin_shufflevector(v, v, (kLane ^ kStep)...);
#else
  return V{v[kLane ^ kStep]...};
#endif
}

// The sum of the lanes, in each of them.
template <typename T, int kStep = Simd<T>::kLanes / 2>
LSTM_EXT_INLINE Reg<T> sum_of_lanes(Reg<T> v) {
  if constexpr (kStep > 0) {
    v = v + lanes_from<Reg<T>, kStep>(v, std::make_integer_sequence<int, Simd<T>::kLanes>{});
    return sum_of_lanes<T, kStep / 2>(v);
  }
  return v;
}

// Calls f(first, lanes) for the registers that `count` numbers fill.
template <typename T, typename F>
LSTM_EXT_INLINE void for_each_register(int64_t count, F&& f) {
  constexpr int n = Simd<T>::kLanes;
  for (int64_t i = 0; i < count; i += n) f(i, static_cast<int>(smaller(count - i, n)));
}

}  // namespace
}  // namespace lstm_ext::cpu::LSTM_EXT_ISA
