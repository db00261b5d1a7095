// Simd<float> and Simd<double> for AArch64 (NEON); simd.h includes this within its namespaces.
#pragma once

#include "cpu/isa.h"

constexpr int kVectorRegisters = 32;

template <>
struct Simd<float> {
  using Reg = float32x4_t;
  typedef int Index __attribute__((vector_size(16)));
  typedef uint8_t Bytes __attribute__((vector_size(4)));
  static constexpr int kLanes = 4;
  static Reg zero() { return vdupq_n_f32(0.0f); }
  static Reg set1(float x) { return vdupq_n_f32(x); }
  static Reg load(const float* p) { return vld1q_f32(p); }
  static Reg load(const int8_t* p) {
    uint32_t four;
    __builtin_memcpy(&four, p, sizeof(four));
    const int8x8_t bytes = vreinterpret_s8_u32(vdup_n_u32(four));
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(bytes))));
  }
  static void store(float* p, Reg v) { vst1q_f32(p, v); }
  static Reg load(const BFloat16* p) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p)), 16));
  }
  static Reg load(const Float16* p) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p))));
  }
  static Reg load_partial(const float* p, int n) {
    if (n == kLanes) return load(p);
    Reg v = zero();
    if (n > 0) v = vld1q_lane_f32(p, v, 0);
    if (n > 1) v = vld1q_lane_f32(p + 1, v, 1);
    if (n > 2) v = vld1q_lane_f32(p + 2, v, 2);
    return v;
  }
  static void store_partial(float* p, Reg v, int n) {
    if (n == kLanes) return store(p, v);
    if (n > 0) vst1q_lane_f32(p, v, 0);
    if (n > 1) vst1q_lane_f32(p + 1, v, 1);
    if (n > 2) vst1q_lane_f32(p + 2, v, 2);
  }
  static Reg fma(Reg a, Reg b, Reg c) { return vfmaq_f32(c, a, b); }
  // A NaN stays one, and the bound is none.
  static Reg at_most(Reg v, float bound) { return vminq_f32(v, set1(bound)); }
  static Reg at_least(Reg v, float bound) { return vmaxq_f32(v, set1(bound)); }
  static Reg square_root(Reg v) { return vsqrtq_f32(v); }
  static Reg reciprocal(Reg v) { return set1(1.0f) / v; }
  static Reg abs(Reg v) { return vabsq_f32(v); }
  static Reg copy_sign(Reg magnitude, Reg sign) { return vbslq_f32(vdupq_n_u32(0x80000000u), sign, magnitude); }
  static Reg round(Reg v) { return vrndnq_f32(v); }
  static Reg scale_by_power_of_two(Reg v, Reg n) {
    const int32x4_t exponent = vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127));
    return v * vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23));
  }
};

template <>
struct Simd<double> {
  using Reg = float64x2_t;
  typedef long long Index __attribute__((vector_size(16)));
  typedef uint8_t Bytes __attribute__((vector_size(2)));
  static constexpr int kLanes = 2;
  static Reg zero() { return vdupq_n_f64(0.0); }
  static Reg set1(double x) { return vdupq_n_f64(x); }
  static Reg load(const double* p) { return vld1q_f64(p); }
  static void store(double* p, Reg v) { vst1q_f64(p, v); }
  static Reg load_partial(const double* p, int n) {
    return n == 0 ? zero() : n == 1 ? vld1q_lane_f64(p, zero(), 0) : load(p);
  }
  static void store_partial(double* p, Reg v, int n) {
    if (n == 1) vst1q_lane_f64(p, v, 0);
    if (n == 2) store(p, v);
  }
  static Reg fma(Reg a, Reg b, Reg c) { return vfmaq_f64(c, a, b); }
  static Reg at_most(Reg v, double bound) { return vminq_f64(v, set1(bound)); }
  static Reg at_least(Reg v, double bound) { return vmaxq_f64(v, set1(bound)); }
  static Reg square_root(Reg v) { return vsqrtq_f64(v); }
  static Reg reciprocal(Reg v) { return set1(1.0) / v; }
  static Reg abs(Reg v) { return vabsq_f64(v); }
  static Reg copy_sign(Reg magnitude, Reg sign) { return vbslq_f64(vdupq_n_u64(uint64_t{1} << 63), sign, magnitude); }
  static Reg round(Reg v) { return vrndnq_f64(v); }
  static Reg scale_by_power_of_two(Reg v, Reg n) {
    const int64x2_t exponent = vaddq_s64(vcvtq_s64_f64(n), vdupq_n_s64(1023));
    return v * vreinterpretq_f64_s64(vshlq_n_s64(exponent, 52));
  }
};
