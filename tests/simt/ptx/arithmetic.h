// What arithmetic.py's instructions compute.
#pragma once

#include <algorithm>

#include "simt/ptx/values.h"

namespace ptx {

// ---- modifiers

// .ftz: of subnormal numbers only the sign stays.
template <typename T>
T flushed(T a) {
  return std::fabs(a) < std::numeric_limits<T>::min() ? std::copysign(T(0), a) : a;
}

// .sat: clamped to [0, 1]; a NaN becomes 0.
template <typename T>
T saturated(T a) {
  if (a >= 1) return 1;
  return a > 0 ? a : 0;
}

// ---- floating point, f32 and f64

template <typename T, Rounding mode>
T float_add(T a, T b) {
  if constexpr (std::is_same_v<T, f64> || mode == Rounding::rn) {
    return a + b;
  } else {
    return narrow<T, mode>(rounded_to_odd(exact_sum(a, b)));
  }
}

template <typename T>
T float_neg(T a) {
  return -a;
}
template <typename T>
T float_abs(T a) {
  return std::fabs(a);
}

template <typename T, Rounding mode>
T float_sub(T a, T b) {
  return float_add<T, mode>(a, -b);
}

template <typename T, Rounding mode>
T float_mul(T a, T b) {
  // Exact in double for f32, which has less than half its digits.
  return narrow<T, mode>(wide(a) * wide(b));
}

template <typename T, Rounding mode>
T float_fma(T a, T b, T c) {
  if constexpr (std::is_same_v<T, f64> || mode == Rounding::rn) {
    return std::fma(a, b, c);
  } else {
    return narrow<T, mode>(rounded_to_odd(exact_sum(wide(a) * wide(b), c)));
  }
}

template <typename T>
T quotient(T a, T b) {
  return a / b;
}
template <typename T>
T float_ex2(T a) {
  return narrow<T>(std::exp2(wide(a)));
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
T copysign(T sign, T size) {
  return std::copysign(size, sign);
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
template <typename T>
T ones(u32 count) {
  return static_cast<T>(count < 8 * sizeof(T) ? shl<T>(1, count) - 1 : ~T{0});
}
template <typename T>
T bfi(T a, T b, u32 position, u32 length) {
  const T mask = shl(ones<T>(length & 255), position & 255);
  return static_cast<T>((b & ~mask) | (shl(a, position & 255) & mask));
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

// ---- conversions

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
