// Simd<float> for AArch64 with a tile engine: four registers of NEON side by side, which are a row of its tiles. simd.h
// includes this within its namespaces.
#pragma once

#include "cpu/isa.h"

constexpr int kVectorRegisters = 8;

template <>
struct Simd<float> {
  typedef float Reg __attribute__((vector_size(64)));
  typedef int Index __attribute__((vector_size(64)));
  typedef uint8_t Bytes __attribute__((vector_size(16)));
  using Part = float32x4_t;
  static constexpr int kLanes = 16, kParts = 4;

  // The register whose parts are f(0), f(1), f(2), f(3); and one part of a register.
  template <typename F>
  LSTM_EXT_INLINE static Reg each(const F& f) {
    Reg v;
#pragma GCC unroll kParts
    for (int n = 0; n < kParts; ++n) {
      const Part part = f(n);
      __builtin_memcpy(reinterpret_cast<char*>(&v) + n * sizeof(Part), &part, sizeof(Part));
    }
    return v;
  }
  LSTM_EXT_INLINE static Part part(const Reg& v, int n) {
    Part part;
    __builtin_memcpy(&part, reinterpret_cast<const char*>(&v) + n * sizeof(Part), sizeof(Part));
    return part;
  }

  static Reg zero() { return Reg{}; }
  static Reg set1(float x) { return x - Reg{}; }
  static Reg load(const float* p) {
    Reg v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
  }
  static Reg load(const int8_t* p) {
    typedef int8_t Numbers __attribute__((vector_size(16)));
    Numbers numbers;
    __builtin_memcpy(&numbers, p, sizeof(numbers));
    return __builtin_convertvector(numbers, Reg);
  }
  static Reg load(const BFloat16* p) {
    return each([&](int n) LSTM_EXT_LAMBDA_INLINE {
      return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p) + 4 * n), 16));
    });
  }
  static Reg load(const Float16* p) {
    return each([&](int n) LSTM_EXT_LAMBDA_INLINE {
      return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p) + 4 * n)));
    });
  }
  static void store(float* p, Reg v) { __builtin_memcpy(p, &v, sizeof(v)); }
  static Reg load_partial(const float* p, int n) {
    Reg v = {};
    __builtin_memcpy(&v, p, static_cast<size_t>(n) * sizeof(float));
    return v;
  }
  static void store_partial(float* p, Reg v, int n) { __builtin_memcpy(p, &v, static_cast<size_t>(n) * sizeof(float)); }
  static Reg fma(Reg a, Reg b, Reg c) {
    return each([&](int n) LSTM_EXT_LAMBDA_INLINE { return vfmaq_f32(part(c, n), part(a, n), part(b, n)); });
  }
  // A NaN stays one, and the bound is none.
  static Reg at_most(Reg v, float bound) {
    return each([&](int n) LSTM_EXT_LAMBDA_INLINE { return vminq_f32(part(v, n), vdupq_n_f32(bound)); });
  }
  static Reg at_least(Reg v, float bound) {
    return each([&](int n) LSTM_EXT_LAMBDA_INLINE { return vmaxq_f32(part(v, n), vdupq_n_f32(bound)); });
  }
  static Reg square_root(Reg v) {
    return each([&](int n) LSTM_EXT_LAMBDA_INLINE { return vsqrtq_f32(part(v, n)); });
  }
  static Reg reciprocal(Reg v) { return set1(1.0f) / v; }
  static Reg abs(Reg v) { return reinterpret_cast<Reg>(reinterpret_cast<Index>(v) & INT32_MAX); }
  static Reg copy_sign(Reg magnitude, Reg sign) {
    return reinterpret_cast<Reg>((reinterpret_cast<Index>(magnitude) & INT32_MAX) |
                                 (reinterpret_cast<Index>(sign) & INT32_MIN));
  }
  static Reg round(Reg v) {
    return each([&](int n) LSTM_EXT_LAMBDA_INLINE { return vrndnq_f32(part(v, n)); });
  }
  static Reg scale_by_power_of_two(Reg v, Reg n) {
    return v * reinterpret_cast<Reg>((__builtin_convertvector(n, Index) + 127) << 23);
  }
};

// Never used: float64 has no tile engine, and the kernels of NEON.
template <>
struct Simd<double>;
