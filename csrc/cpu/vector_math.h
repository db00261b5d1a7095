// exp, sigmoid and tanh on SIMD registers.
//
// exp(x) = 2^n e^r with n = round(x / ln 2), |r| <= a = ln 2 / 2. e^r - 1 = r + r^2 q(r) with q from
// the Taylor series: to r^11 in float64 (remainder r^14/14! < 5e-18); in float32 to r^5, with the
// last term economized, r^5 -> (5/4) a^2 r^3 - (5/16) a^4 r, the least change on [-a, a] that lowers
// the degree (error a^7/(16 * 7!) + a^8/8! < 1.3e-8, far below rounding).
// If a register holds a table of the powers 2^(j / 16), sigmoid and tanh in float32 use n = round(16 x / ln 2) instead,
// except with Exactness::kPrecise. Then |r| <= a = ln 2 / 32, and four terms of e^r are enough, three with r^4
// economized (error 2e-9).
// tanh goes through e^x - 1, which keeps the relative accuracy near zero that 1 - e^x loses.
// NaN propagates; infinities give the limits.
#pragma once

#include "cpu/isa.h"

#include "cpu/simd.h"

namespace lstm_ext::cpu::LSTM_EXT_ISA {
namespace {

template <typename T>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  // Beyond these limits, sigmoid is about the smallest normal number or 1, and tanh is 1. The product of a denominator
  // of sigmoid and one of tanh is still finite, and its reciprocal a normal number.
  static constexpr float kLimit = 86.5f;
  static constexpr float kTanhLimit = 10.0f;
  static constexpr float kLn2High = 0.693359375f;  // few bits: n * high is exact
  static constexpr float kLn2Low = -2.12194440e-4f;
  static constexpr float kHalfLn2 = 0.34657359f;
  static constexpr float kFifth = 1.0f / 5040;  // factor of r^5 in q
  static constexpr float kSquare = kHalfLn2 * kHalfLn2;
  static constexpr int kTerms = 5;
  static constexpr float kQ[kTerms] = {1.0f / 2, 1.0f / 6 - kFifth * kSquare * kSquare * 5 / 16, 1.0f / 24,
                                       1.0f / 120 + kFifth * kSquare * 5 / 4, 1.0f / 720};
};

template <>
struct ExpConstants<double> {
  static constexpr double kLimit = 707.0;
  static constexpr double kTanhLimit = 20.0;
  static constexpr double kLn2High = 6.93145751953125e-1;
  static constexpr double kLn2Low = 1.42860682030941723212e-6;
  static constexpr int kTerms = 12;
  static constexpr double kQ[kTerms] = {1.0 / 2,       1.0 / 6,        1.0 / 24,        1.0 / 120,
                                        1.0 / 720,     1.0 / 5040,     1.0 / 40320,     1.0 / 362880,
                                        1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800};
};

// x = n ln 2 + r. Returns e^r - 1 and n, and in `rest` the last rounding error of e^r - 1.
template <typename T>
LSTM_EXT_INLINE Reg<T> expm1_reduced(Reg<T> x, Reg<T>& n, Reg<T>& rest) {
  using S = Simd<T>;
  using C = ExpConstants<Number<T>>;
  n = S::round(x * S::set1(static_cast<Number<T>>(1.44269504088896340736)));
  Reg<T> r = S::fma(n, S::set1(-C::kLn2High), x);
  r = S::fma(n, S::set1(-C::kLn2Low), r);
  Reg<T> p = S::set1(C::kQ[C::kTerms - 1]);
#pragma GCC unroll 12
  for (int i = C::kTerms - 2; i >= 0; --i) p = S::fma(p, r, S::set1(C::kQ[i]));
  const Reg<T> square = r * r;
  const Reg<T> result = S::fma(p, square, r);
  rest = S::fma(p, square, r - result);
  return result;
}
template <typename T>
LSTM_EXT_INLINE Reg<T> expm1_reduced(Reg<T> x, Reg<T>& n) {
  Reg<T> rest;
  return expm1_reduced<T>(x, n, rest);
}

// The exactness of sigmoid and tanh. kPrecise uses no table, and divisions: unlike approximate reciprocals, these do
// not depend on the processor's maker.
enum class Exactness { kUsual, kPrecise };

#if defined(LSTM_EXT_ISA_AVX512) || defined(LSTM_EXT_ISA_SOFTWARE)
template <typename T, Exactness kExactness>
constexpr bool kUsesTable = std::is_same_v<Number<T>, float> && kExactness == Exactness::kUsual;
#else
template <typename T, Exactness kExactness>
constexpr bool kUsesTable = false;
#endif

template <typename T, Exactness kExactness>
LSTM_EXT_INLINE Reg<T> inverse_of(Reg<T> v) {
  if constexpr (kExactness == Exactness::kUsual) {
    return Simd<T>::reciprocal(v);
  } else {
    return Simd<T>::set1(Number<T>(1)) / v;
  }
}

// e^-x = scale (1 + p). With a table, scale + rest is a power of the sixteenth root of 2; without one, scale is a power
// of 2.
template <typename T, Exactness kExactness>
struct ExpTerms {
  Reg<T> scale, p, rest;

  LSTM_EXT_INLINE Reg<T> exp() const { return Simd<T>::fma(p, scale, scale); }
  LSTM_EXT_INLINE Reg<T> exp_minus_1() const {
    const Reg<T> less = scale - Simd<T>::set1(Number<T>(1));
    if constexpr (kUsesTable<T, kExactness>) return less + Simd<T>::fma(p, scale, rest);
    return Simd<T>::fma(p, scale, less);
  }
};

// The terms of e^-(kTimes x). kNearOne: as exact as exp_minus_1 needs near zero; without it there is no `rest`.
template <typename T, int kTimes, bool kNearOne, Exactness kExactness>
LSTM_EXT_INLINE ExpTerms<T, kExactness> exp_of_minus(Reg<T> x) {
  using S = Simd<T>;
  ExpTerms<T, kExactness> terms{};
  const Reg<T> times = kTimes == 2 ? x + x : x;
  if constexpr (kUsesTable<T, kExactness>) {
    using N = Number<T>;
    constexpr N kSixteenth = 0.0433216988f;  // ln 2 / 16: float32 has it to 3e-9, so one product is exact enough
    constexpr N kHalf = kSixteenth / 2;
    // The integer n is in the last bits, because the spacing of numbers is 1 here.
    const Reg<T> shift = S::set1(N(0x1.8p23));
    const Reg<T> bits = S::fma(x, S::set1(N(-23.0831207 * kTimes)), shift);
    const Reg<T> minus_r = S::fma(bits - shift, S::set1(kSixteenth), times);
    Reg<T> q;
    if constexpr (kNearOne) {
      q = S::fma(minus_r, S::set1(N(1) / 24), S::set1(N(-1) / 6));
      q = S::fma(q, minus_r, S::set1(N(1) / 2));
      terms.rest = S::rest_of_sixteenth(bits);
    } else {  // r^4 -> 2 (sqrt 2 - 1) a^2 r^2, the multiple of r^2 with the least error
      q = S::fma(minus_r, S::set1(N(-1) / 6), S::set1(N(1) / 2 + N(0.828427) * kHalf * kHalf / 24));
    }
    terms.scale = S::power_of_sixteenth(bits);
    terms.p = S::fma(q, minus_r * minus_r, -minus_r);
  } else {
    Reg<T> n;
    terms.p = expm1_reduced<T>(-times, n);
    terms.scale = S::scale_by_power_of_two(S::set1(Number<T>(1)), n);
  }
  return terms;
}

// Both functions use 1 / denominator, which the caller computes, because several may share one division. It may be off
// by some units in the last place. The backward pass reads 1 - value, which for a value near 1 is a few of its last
// bits, so there the value is computed as 1 minus something small.

// sigmoid(x) = 1 / (1 + e), e = exp(-x).
template <typename T, Exactness kExactness = Exactness::kUsual>
struct SigmoidTerms {
  Reg<T> e, denominator;  // in [1, e^limit + 1]

  LSTM_EXT_INLINE explicit SigmoidTerms(Reg<T> x) {
    using S = Simd<T>;
    using C = ExpConstants<Number<T>>;
    e = exp_of_minus<T, 1, false, kExactness>(S::at_least(S::at_most(x, C::kLimit), -C::kLimit)).exp();
    denominator = S::set1(Number<T>(1)) + e;
  }
  LSTM_EXT_INLINE Reg<T> value(Reg<T> inverse) const {
    const Reg<T> one = Simd<T>::set1(Number<T>(1));
    return choose(e < one, Simd<T>::fma(-e, inverse, one), inverse);
  }
};

// tanh(x) = +-(1 - e) / (1 + e), e = exp(-2 |x|).
template <typename T, Exactness kExactness = Exactness::kUsual>
struct TanhTerms {
  Reg<T> e, em1, denominator;  // em1 = e - 1; the denominator is in [1, 2]

  LSTM_EXT_INLINE explicit TanhTerms(Reg<T> x) {
    using S = Simd<T>;
    using C = ExpConstants<Number<T>>;
    const auto terms = exp_of_minus<T, 2, true, kExactness>(S::at_most(S::abs(x), C::kTanhLimit));
    e = terms.exp();
    em1 = terms.exp_minus_1();
    denominator = em1 + S::set1(Number<T>(2));
  }
  LSTM_EXT_INLINE Reg<T> value(Reg<T> x, Reg<T> inverse) const {
    using S = Simd<T>;
    const Reg<T> large = S::fma(-(e + e), inverse, S::set1(Number<T>(1)));
    return S::copy_sign(choose(e < S::set1(Number<T>(0.25)), large, em1 * inverse), x);
  }
  // 1 - tanh(x)^2 from the value; computed as 4 e / (1 + e)^2 if that has more digits. From the limit on, e no longer
  // falls, and a large state would multiply what is left: there it is 0, as 1 - tanh(x)^2 rounds to.
  LSTM_EXT_INLINE Reg<T> slope(Reg<T> x, Reg<T> value, Reg<T> inverse) const {
    using S = Simd<T>;
    const Reg<T> one = S::set1(Number<T>(1)), twice = inverse + inverse;
    const Reg<T> found = choose(e < S::set1(Number<T>(0.25)), e * (twice * twice), S::fma(-value, value, one));
    return choose(S::set1(ExpConstants<Number<T>>::kTanhLimit) <= S::abs(x), S::set1(Number<T>(0)), found);
  }
};

template <typename T, Exactness kExactness = Exactness::kUsual>
LSTM_EXT_INLINE Reg<T> sigmoid(Reg<T> x) {
  const SigmoidTerms<T, kExactness> terms(x);
  return terms.value(inverse_of<T, kExactness>(terms.denominator));
}
template <typename T, Exactness kExactness = Exactness::kUsual>
LSTM_EXT_INLINE Reg<T> tanh(Reg<T> x) {
  const TanhTerms<T, kExactness> terms(x);
  return terms.value(x, inverse_of<T, kExactness>(terms.denominator));
}

// tanh with an error of little more than half a unit in the last place instead of two (of one, without FMA): numerator
// and denominator are sums of two registers each.
template <typename T>
LSTM_EXT_INLINE Reg<T> precise_tanh(Reg<T> x) {
  using S = Simd<T>;
  using C = ExpConstants<Number<T>>;
  const Reg<T> one = S::set1(Number<T>(1)), two = S::set1(Number<T>(2));
  const Reg<T> magnitude = S::at_most(S::abs(x), C::kTanhLimit);
  Reg<T> n, rest;
  const Reg<T> p = expm1_reduced<T>(magnitude * S::set1(Number<T>(-2)), n, rest);
  const Reg<T> scale = S::scale_by_power_of_two(one, n);
  const Reg<T> high = S::fma(p, scale, scale - one);
  const Reg<T> low = S::fma(rest, scale, S::fma(p, scale, (scale - one) - high));
  const Reg<T> denominator = high + two;
  const Reg<T> denominator_low = ((two - denominator) + high) + low;
  const Reg<T> reciprocal = one / denominator;
  const Reg<T> quotient = high * reciprocal;
  const Reg<T> left = S::fma(-quotient, denominator, high) + S::fma(-quotient, denominator_low, low);
  return S::copy_sign(S::fma(left, reciprocal, quotient), x);
}

}  // namespace
}  // namespace lstm_ext::cpu::LSTM_EXT_ISA
