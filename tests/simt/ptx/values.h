// Values as PTX has them: registers are bits without a type, and every instruction says how it reads them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

namespace ptx {

using pred = bool;
using b8 = uint8_t;
using u8 = uint8_t;
using s8 = int8_t;
using b16 = uint16_t;
using u16 = uint16_t;
using s16 = int16_t;
using b32 = uint32_t;
using u32 = uint32_t;
using s32 = int32_t;
using b64 = uint64_t;
using u64 = uint64_t;
using s64 = int64_t;
using f32 = float;
using f64 = double;
struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};
struct tf32 {
  uint32_t bits;
};
// The lower bits of a register, read as a T.
template <typename T, typename Register>
T as(Register bits) {
  static_assert(sizeof(T) <= sizeof(Register), "a register narrower than what is read from it");
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// A value narrower than the register is extended by its sign, if it has one.
template <typename T, typename Register>
void set(Register& target, T value) {
  static_assert(sizeof(T) <= sizeof(Register), "a register narrower than what is written to it");
  if constexpr (std::is_integral_v<T> && !std::is_same_v<T, bool>) {
    target = static_cast<Register>(static_cast<std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>>(value));
  } else {
    target = 0;
    std::memcpy(&target, &value, sizeof value);
  }
}

// The equal parts of a value, the least significant first.
template <typename Part, typename Whole>
class Parts {
 public:
  explicit Parts(Whole value) : value_(value) {}
  Part operator[](unsigned i) const { return static_cast<Part>(value_ >> (8 * sizeof(Part) * i)); }

 private:
  Whole value_;
};

template <typename Whole, typename Part, typename... Others>
Whole packed(Part first, Others... others) {
  if constexpr (sizeof...(others) == 0) {
    return first;
  } else {
    return static_cast<Whole>(static_cast<Whole>(first) | packed<Whole, Part>(others...) << (8 * sizeof(Part)));
  }
}

// ---- rounding

enum class Rounding { rn, rz, rm, rp, rna };

// An exact sum or product in two parts, |rest| being at most half a unit in the last place of value.
struct Exact {
  double value;
  double rest;
};

inline Exact exact_sum(double a, double b) {
  const double sum = a + b, part = sum - a;
  const double rest = (a - (sum - part)) + (b - part);
  return {sum, std::isfinite(sum) ? rest : 0};
}

// Rounded to odd: what is lost makes the last bit a one, so that a second rounding, to fewer bits, is that of the exact
// number.
inline double rounded_to_odd(Exact x) {
  if (x.rest == 0) return x.value;
  if (as<b64>(x.value) & 1) return x.value;
  return std::nextafter(x.value, x.rest > 0 ? INFINITY : -INFINITY);
}

// As an integer.
template <Rounding mode>
double rounded_to_whole(double x) {
  switch (mode) {
    case Rounding::rn: return std::nearbyint(x);
    case Rounding::rz: return std::trunc(x);
    case Rounding::rm: return std::floor(x);
    case Rounding::rp: return std::ceil(x);
    case Rounding::rna: return std::round(x);
  }
}

// To a format of `digits` significant bits whose smallest normal number is 2^min_exponent and whose largest is `max`.
template <Rounding mode>
double rounded_to(double x, int digits, int min_exponent, double max) {
  if (x == 0 || !std::isfinite(x)) return x;
  const int exponent = std::max(std::ilogb(x), min_exponent);
  const int last = exponent - (digits - 1);
  const double result = std::ldexp(rounded_to_whole<mode>(std::ldexp(x, -last)), last);
  if (std::fabs(result) <= max) return std::copysign(result, x);
  const bool outward = mode == Rounding::rn || mode == Rounding::rna || (mode == Rounding::rm && x < 0) ||
                       (mode == Rounding::rp && x > 0);
  return std::copysign(outward ? INFINITY : max, x);
}

// ---- formats

// Encodes a number that the format has exactly.
template <int kExponentBits, int kMantissaBits>
uint32_t encoded(double x) {
  constexpr int kBias = (1 << (kExponentBits - 1)) - 1;
  constexpr uint32_t kInfinity = ((1u << kExponentBits) - 1) << kMantissaBits;
  const uint32_t sign = std::signbit(x) ? 1u << (kExponentBits + kMantissaBits) : 0;
  if (std::isnan(x)) return (1u << (kExponentBits + kMantissaBits)) - 1;
  if (std::isinf(x)) return sign | kInfinity;
  if (x == 0) return sign;
  const int exponent = std::max(std::ilogb(x), 1 - kBias);
  const auto mantissa = static_cast<uint32_t>(std::ldexp(std::fabs(x), kMantissaBits - exponent));
  // A subnormal number lacks the leading one, and has exponent field 0.
  return sign + ((static_cast<uint32_t>(exponent + kBias - 1) << kMantissaBits) + mantissa);
}

inline double wide(f32 x) { return x; }
inline double wide(f64 x) { return x; }
inline double wide(bf16 x) { return as<f32>(static_cast<b32>(x.bits) << 16); }
inline double wide(f16 x) {
  const int exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
  const double size = exponent == 31 ? (mantissa ? std::numeric_limits<double>::quiet_NaN() : INFINITY)
                                     : std::ldexp(exponent ? mantissa + 1024 : mantissa, std::max(exponent, 1) - 25);
  return x.bits >> 15 ? -size : size;
}

// A number in any of the formats.
template <typename T, Rounding mode = Rounding::rn>
T narrow(double x) {
  if constexpr (std::is_same_v<T, f64>) {
    return x;
  } else if constexpr (std::is_same_v<T, f32>) {
    if constexpr (mode == Rounding::rn) return static_cast<f32>(x);
    return static_cast<f32>(rounded_to<mode>(x, 24, -126, std::numeric_limits<f32>::max()));
  } else if constexpr (std::is_same_v<T, tf32>) {
    // Largest: eleven ones, as far up as they go.
    return {as<b32>(static_cast<f32>(rounded_to<mode>(x, 11, -126, 0x1.ffcp127)))};
  } else if constexpr (std::is_same_v<T, bf16>) {
    return {static_cast<b16>(encoded<8, 7>(rounded_to<mode>(x, 8, -126, 0x1.fep127)))};
  } else {
    static_assert(std::is_same_v<T, f16>);
    return {static_cast<b16>(encoded<5, 10>(rounded_to<mode>(x, 11, -14, 65504)))};
  }
}

}  // namespace ptx
