// What arithmetic.py's instructions compute.
#pragma once

#include <algorithm>

#include "simt/ptx/values.h"

namespace ptx {

// Does something to each element of a pair, or to the one value there is.
template <typename T, typename Function>
T elementwise(Function function, T a) {
  if constexpr (is_pair<T>) {
    return {function(a.low), function(a.high)};
  } else {
    return function(a);
  }
}
template <typename T, typename Function>
T elementwise(Function function, T a, T b) {
  if constexpr (is_pair<T>) {
    return {function(a.low, b.low), function(a.high, b.high)};
  } else {
    return function(a, b);
  }
}
template <typename T, typename Function>
T elementwise(Function function, T a, T b, T c) {
  if constexpr (is_pair<T>) {
    return {function(a.low, b.low, c.low), function(a.high, b.high, c.high)};
  } else {
    return function(a, b, c);
  }
}

// ---- modifiers

// .ftz: of subnormal numbers only the sign stays.
template <typename T>
T flushed(T a) {
  return elementwise(
      [](auto x) {
        using E = decltype(x);
        constexpr double kSmallest = std::is_same_v<E, f16> ? 0x1p-14 : 0x1p-126;
        static_assert(!std::is_same_v<E, f64>, "there is no .ftz for f64");
        return std::fabs(wide(x)) < kSmallest ? narrow<E>(std::copysign(0.0, wide(x))) : x;
      },
      a);
}
inline f64 flushed(f64 a) { return std::fabs(a) < 0x1p-1022 ? std::copysign(0.0, a) : a; }

// .sat: clamped to [0, 1]; a NaN becomes 0.
template <typename T>
T saturated(T a) {
  return elementwise(
      [](auto x) {
        if (wide(x) >= 1) return narrow<decltype(x)>(1);
        return wide(x) > 0 ? x : narrow<decltype(x)>(0);
      },
      a);
}

template <typename T>
T relu(T x) {
  return wide(x) > 0 || std::isnan(wide(x)) ? x : narrow<T>(0);
}

// ---- floating point

template <typename T, Rounding mode>
T float_add(T a, T b) {
  if constexpr (std::is_same_v<T, f64> || (std::is_same_v<T, f32> && mode == Rounding::rn)) {
    return a + b;
  } else {
    return elementwise(
        [](auto x, auto y) { return narrow<decltype(x), mode>(rounded_to_odd(exact_sum(wide(x), wide(y)))); }, a, b);
  }
}

template <typename T>
T float_neg(T a) {
  return elementwise([](auto x) { return narrow<decltype(x)>(-wide(x)); }, a);
}

template <typename T>
T float_abs(T a) {
  return elementwise([](auto x) { return narrow<decltype(x)>(std::fabs(wide(x))); }, a);
}

template <typename T, Rounding mode>
T float_sub(T a, T b) {
  return float_add<T, mode>(a, float_neg<T>(b));
}

template <typename T, Rounding mode>
T float_mul(T a, T b) {
  if constexpr (std::is_same_v<T, f64>) {
    return a * b;
  } else {
    // Exact in double: no format here has more than half its digits.
    return elementwise([](auto x, auto y) { return narrow<decltype(x), mode>(wide(x) * wide(y)); }, a, b);
  }
}

template <typename T, Rounding mode>
T float_fma(T a, T b, T c) {
  if constexpr (std::is_same_v<T, f64> || (std::is_same_v<T, f32> && mode == Rounding::rn)) {
    return std::fma(a, b, c);
  } else {
    return elementwise(
        [](auto x, auto y, auto z) {
          return narrow<decltype(x), mode>(rounded_to_odd(exact_sum(wide(x) * wide(y), wide(z))));
        },
        a, b, c);
  }
}

template <typename T>
T quotient(T a, T b) {
  return a / b;
}

// A NaN gives way to a number, unless it is to be kept.
template <typename T, bool keep_nan>
T float_min(T a, T b) {
  return elementwise(
      [](auto x, auto y) {
        if (std::isnan(wide(x))) return keep_nan ? x : y;
        if (std::isnan(wide(y))) return keep_nan ? y : x;
        if (wide(x) == wide(y)) return std::signbit(wide(x)) ? x : y;
        return wide(x) < wide(y) ? x : y;
      },
      a, b);
}
template <typename T, bool keep_nan>
T float_max(T a, T b) {
  return float_neg<T>(float_min<T, keep_nan>(float_neg<T>(a), float_neg<T>(b)));
}

template <typename T>
T float_ex2(T a) {
  return elementwise([](auto x) { return narrow<decltype(x)>(std::exp2(wide(x))); }, a);
}
template <typename T>
T float_tanh(T a) {
  return elementwise([](auto x) { return narrow<decltype(x)>(std::tanh(wide(x))); }, a);
}
template <typename T>
T float_lg2(T a) {
  return narrow<T>(std::log2(wide(a)));
}
template <typename T>
T float_sin(T a) {
  return narrow<T>(std::sin(wide(a)));
}
template <typename T>
T float_cos(T a) {
  return narrow<T>(std::cos(wide(a)));
}
template <typename T>
T float_rcp(T a) {
  return 1 / a;
}
template <typename T>
T float_sqrt(T a) {
  return std::sqrt(a);
}
template <typename T>
T float_rsqrt(T a) {
  return narrow<T>(1 / std::sqrt(wide(a)));
}

template <typename T>
T copysign(T sign, T size) {
  return std::copysign(size, sign);
}

template <typename T>
bool is_finite(T x) {
  return std::isfinite(x);
}
template <typename T>
bool is_infinite(T x) {
  return std::isinf(x);
}
template <typename T>
bool is_number(T x) {
  return !std::isnan(x);
}
template <typename T>
bool is_notanumber(T x) {
  return std::isnan(x);
}
template <typename T>
bool is_normal(T x) {
  return std::isnormal(x);
}
template <typename T>
bool is_subnormal(T x) {
  return std::fpclassify(x) == FP_SUBNORMAL;
}

// ---- integers

// They wrap around.
template <typename T>
using Unsigned = std::make_unsigned_t<T>;
// Narrower ones would be computed with as int, and a product of two 16-bit numbers may overflow that.
template <typename T>
using Wrapping = std::conditional_t<(sizeof(T) < 4), uint32_t, Unsigned<T>>;

template <typename T>
T integer_add(T a, T b) {
  return static_cast<T>(static_cast<Wrapping<T>>(a) + static_cast<Wrapping<T>>(b));
}
template <typename T>
T integer_sub(T a, T b) {
  return static_cast<T>(static_cast<Wrapping<T>>(a) - static_cast<Wrapping<T>>(b));
}
template <typename T>
T integer_neg(T a) {
  return integer_sub<T>(0, a);
}
template <typename T>
T integer_abs(T a) {
  return a < 0 ? integer_neg(a) : a;
}
template <typename T>
T integer_min(T a, T b) {
  return std::min(a, b);
}
template <typename T>
T integer_max(T a, T b) {
  return std::max(a, b);
}
// Division by zero, undefined in C++, gives some value in PTX: here all ones.
template <typename T>
T integer_div(T a, T b) {
  if (b == 0) return static_cast<T>(-1);
  if (std::is_signed_v<T> && b == static_cast<T>(-1)) return integer_neg(a);
  return static_cast<T>(a / b);
}
template <typename T>
T integer_rem(T a, T b) {
  if (b == 0) return a;
  if (std::is_signed_v<T> && b == static_cast<T>(-1)) return 0;
  return static_cast<T>(a % b);
}

template <typename T>
struct Doubled;
template <>
struct Doubled<u16> {
  using Type = u32;
};
template <>
struct Doubled<s16> {
  using Type = s32;
};
template <>
struct Doubled<u32> {
  using Type = u64;
};
template <>
struct Doubled<s32> {
  using Type = s64;
};
template <>
struct Doubled<u64> {
  using Type = unsigned __int128;
};
template <>
struct Doubled<s64> {
  using Type = __int128;
};

template <typename T>
typename Doubled<T>::Type product_wide(T a, T b) {
  using D = typename Doubled<T>::Type;
  return static_cast<D>(a) * static_cast<D>(b);
}
template <typename T>
T product_lo(T a, T b) {
  return static_cast<T>(static_cast<Wrapping<T>>(a) * static_cast<Wrapping<T>>(b));
}
template <typename T>
T product_hi(T a, T b) {
  return static_cast<T>(product_wide<T>(a, b) >> (8 * sizeof(T)));
}

// ---- bits

template <typename T>
T shl(T a, u32 amount) {
  return amount < 8 * sizeof(T) ? static_cast<T>(static_cast<Wrapping<T>>(a) << amount) : T{0};
}
template <typename T>
T shr(T a, u32 amount) {
  if (amount < 8 * sizeof(T)) return static_cast<T>(a >> amount);
  return a < 0 ? static_cast<T>(-1) : T{0};
}
// Funnel shifts: a is the lower half, b the upper one.
inline b32 shf_l_wrap(b32 a, b32 b, u32 amount) {
  return static_cast<b32>((packed<b64, b32>(a, b) << (amount & 31)) >> 32);
}
inline b32 shf_r_wrap(b32 a, b32 b, u32 amount) { return static_cast<b32>(packed<b64, b32>(a, b) >> (amount & 31)); }
inline b32 shf_l_clamp(b32 a, b32 b, u32 amount) { return amount < 32 ? shf_l_wrap(a, b, amount) : a; }
inline b32 shf_r_clamp(b32 a, b32 b, u32 amount) { return amount < 32 ? shf_r_wrap(a, b, amount) : b; }

template <typename T>
T ones(u32 count) {
  return static_cast<T>(count < 8 * sizeof(T) ? shl<T>(1, count) - 1 : ~T{0});
}
inline b32 bmsk(u32 position, u32 length) { return shl(ones<b32>(length), position); }
template <typename T>
T bfi(T a, T b, u32 position, u32 length) {
  const T mask = shl(ones<T>(length & 255), position & 255);
  return static_cast<T>((b & ~mask) | (shl(a, position & 255) & mask));
}
template <typename T>
T bfe(T a, u32 position, u32 length) {
  using U = Unsigned<T>;
  position &= 255, length &= 255;
  if (length == 0) return 0;
  // Bits past the end are copies of the sign.
  U field = static_cast<U>(shr<T>(a, position)) & ones<U>(length);
  if (std::is_signed_v<T>) {
    const u32 top = std::min<u32>(position + length - 1, 8 * sizeof(T) - 1);
    if (static_cast<U>(a) >> top & 1) field |= static_cast<U>(~ones<U>(length));
  }
  return static_cast<T>(field);
}
inline b32 lop3(b32 a, b32 b, b32 c, u32 table) {
  b32 result = 0;
  for (int row = 0; row < 8; ++row) {
    if (table >> row & 1) result |= (row & 4 ? a : ~a) & (row & 2 ? b : ~b) & (row & 1 ? c : ~c);
  }
  return result;
}
// Bytes of b:a, chosen by four bits each, of which the highest asks for eight copies of the byte's sign.
inline b32 prmt(b32 a, b32 b, b32 selector) {
  b32 result = 0;
  for (unsigned i = 0; i < 4; ++i) {
    const u32 choice = selector >> 4 * i & 15;
    u32 byte = static_cast<u32>(packed<b64, b32>(a, b) >> 8 * (choice & 7)) & 255;
    if (choice & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << 8 * i;
  }
  return result;
}
template <typename T>
T brev(T a) {
  T result = 0;
  for (unsigned i = 0; i < 8 * sizeof(T); ++i) result |= (a >> i & 1) << (8 * sizeof(T) - 1 - i);
  return result;
}
template <typename T>
u32 popc(T a) {
  return static_cast<u32>(__builtin_popcountll(a));
}
template <typename T>
u32 clz(T a) {
  return a == 0 ? 8 * sizeof(T) : static_cast<u32>(__builtin_clzll(a)) - (64 - 8 * sizeof(T));
}
// The highest bit that is not the sign's.
template <typename T>
u32 bfind(T a) {
  const auto bits = static_cast<Unsigned<T>>(a < 0 ? ~a : a);
  return bits == 0 ? ~0u : static_cast<u32>(8 * sizeof(T) - 1) - clz(bits);
}

// ---- comparisons

#define PTX_COMPARISON(name, sign)                                      \
  template <typename T>                                                 \
  bool compare_##name(T a, T b) {                                       \
    return a sign b;                                                    \
  }                                                                     \
  template <typename T>                                                 \
  bool float_compare_##name(T a, T b) {                                 \
    return !std::isunordered(wide(a), wide(b)) && wide(a) sign wide(b); \
  }                                                                     \
  template <typename T>                                                 \
  bool float_compare_##name##u(T a, T b) {                              \
    return std::isunordered(wide(a), wide(b)) || wide(a) sign wide(b);  \
  }
PTX_COMPARISON(eq, ==)
PTX_COMPARISON(ne, !=)
PTX_COMPARISON(lt, <)
PTX_COMPARISON(le, <=)
PTX_COMPARISON(gt, >)
PTX_COMPARISON(ge, >=)
#undef PTX_COMPARISON
template <typename T>
bool float_compare_num(T a, T b) {
  return !std::isunordered(wide(a), wide(b));
}
template <typename T>
bool float_compare_nan(T a, T b) {
  return std::isunordered(wide(a), wide(b));
}

// ---- conversions

template <typename To, typename From>
To resized(From a) {
  return static_cast<To>(a);
}
template <typename To, typename From>
To clamped(From a) {
  const __int128 low = std::numeric_limits<To>::min(), high = std::numeric_limits<To>::max();
  return static_cast<To>(std::clamp<__int128>(a, low, high));
}
template <typename To, Rounding mode, typename From>
To to_integer(From a) {
  const double x = wide(a);
  if (std::isnan(x)) {
    const bool top_bit = std::is_same_v<From, f64> || sizeof(To) == 8;
    return static_cast<To>(top_bit ? Unsigned<To>{1} << (8 * sizeof(To) - 1) : 0);
  }
  const double y = rounded_to_whole<mode>(x);
  if (y <= static_cast<double>(std::numeric_limits<To>::min())) return std::numeric_limits<To>::min();
  if (y >= static_cast<double>(std::numeric_limits<To>::max())) return std::numeric_limits<To>::max();
  return static_cast<To>(y);
}
template <typename To, Rounding mode, typename From>
To from_integer(From a) {
  static_assert(mode == Rounding::rn || sizeof(From) < 8, "64 bits do not fit into a double");
  if constexpr (sizeof(From) == 8) {
    if constexpr (std::is_same_v<To, f32>) return static_cast<f32>(a);
    static_assert(std::is_same_v<To, f32> || std::is_same_v<To, f64>, "rounded twice");
  }
  return narrow<To, mode>(static_cast<double>(a));
}
template <typename T, Rounding mode>
T whole(T a) {
  return narrow<T>(rounded_to_whole<mode>(wide(a)));
}
template <typename To, Rounding mode, typename From>
To converted(From a) {
  return narrow<To, mode>(wide(a));
}

}  // namespace ptx
