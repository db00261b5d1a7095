// The Maths with which the CPU kernels compute the cell of contract/cell.h, on registers of one row or of several, and
// the accessors of what it loads late.
#pragma once

#include "cpu/isa.h"

#include "contract/cell.h"
#include "contract/transition.h"
#include "cpu/gates.h"
#include "cpu/simd.h"
#include "cpu/vector_math.h"

namespace lstm_ext::cpu::LSTM_EXT_ISA {
namespace {

// c_{t-1} of a row, `lanes` numbers, or null for zeros; or of kCount rows, which have all of them or none. It is loaded
// late, so that it does not occupy a register from the beginning.
template <typename T, int kCount = 1>
struct PreviousCells {
  const T* at[kCount];
  int lanes;
  LSTM_EXT_INLINE bool there() const { return at[0] != nullptr; }
  LSTM_EXT_INLINE Reg<Several<T, kCount>> load() const {
    return several<T, kCount>([&](int n) LSTM_EXT_LAMBDA_INLINE { return load_lanes<T>(at[n], lanes); });
  }
};

// dL/d(gate values) that the caller gave, for some units of a row, or null.
template <typename T>
struct GivenGradients {
  const T* at;
  int64_t hidden_size;
  int lanes;
  LSTM_EXT_INLINE bool there() const { return at != nullptr; }
  LSTM_EXT_INLINE Reg<T> load(int gate) const { return load_lanes<T>(at + gate * hidden_size, lanes); }
};

// The zoneout of `lanes` units of a row: `at` is their index in an array of the state of all steps, which has the same
// shape as the array of flags.
template <typename T>
struct ZoneoutAt {
  const Zoneout<T>& zoneout;
  int64_t at;
  int lanes;
  LSTM_EXT_INLINE bool flagged() const { return zoneout.keep != nullptr; }
  LSTM_EXT_INLINE Reg<T> where_kept(Reg<T> a, Reg<T> b) const { return where<T>(zoneout.keep + at, lanes, a, b); }
  LSTM_EXT_INLINE T share() const { return zoneout.share; }
};

// The options of the cell of `lanes` units.
template <typename T>
struct LoadUnits {
  int64_t unit;
  int lanes;
  LSTM_EXT_INLINE Reg<T> operator()(const T* parameter) const { return load_lanes<T>(parameter + unit, lanes); }
};
template <typename T>
using CellAt = cell::CellAt<T, LoadUnits<T>, true>;

// The library's functions by name: its inline ones may be merged with those of another instruction set.
LSTM_EXT_INLINE float exact_expm1(float x) { return __builtin_expm1f(x); }
LSTM_EXT_INLINE double exact_expm1(double x) { return __builtin_expm1(x); }
LSTM_EXT_INLINE float exact_softplus(float x) {
  return (x < 0 ? 0 : x) + __builtin_log1pf(__builtin_expf(-__builtin_fabsf(x)));
}
LSTM_EXT_INLINE double exact_softplus(double x) {
  return (x < 0 ? 0 : x) + __builtin_log1p(__builtin_exp(-__builtin_fabs(x)));
}

// Called, not inlined: they are long, a cell has several of them, and most cells none. In a section of their own they
// do not move the plain kernels, of which some are 4 % slower at other addresses.
#define LSTM_EXT_CALLED __attribute__((noinline, section(".text.activations")))
template <typename Math, typename Activation>
LSTM_EXT_CALLED typename Math::Value called_activation(const Activation& f, typename Math::Value z) {
  return cell::activation_value<Math>(f, z);
}
template <typename Math, typename Activation>
LSTM_EXT_CALLED typename Math::Value called_slope(const Activation& f, typename Math::Value value) {
  return cell::activation_slope<Math>(f, value);
}

// The part that all Maths of the CPU share.
template <typename T, Exactness kExactness>
struct CellMath {
  using Value = Reg<T>;
  using Gates = cpu::LSTM_EXT_ISA::Gates<T>;
  LSTM_EXT_INLINE static Value number(Number<T> x) { return Simd<T>::set1(x); }
  LSTM_EXT_INLINE static Value fma(Value a, Value b, Value c) { return Simd<T>::fma(a, b, c); }
  LSTM_EXT_INLINE static Value sigmoid(Value z) { return cpu::LSTM_EXT_ISA::sigmoid<T, kExactness>(z); }
  LSTM_EXT_INLINE static Value tanh(Value z) {
    return kExactness == Exactness::kPrecise ? precise_tanh<T>(z) : cpu::LSTM_EXT_ISA::tanh<T, kExactness>(z);
  }
  LSTM_EXT_INLINE static Value hidden(Value o, Value c) { return o * cpu::LSTM_EXT_ISA::tanh<T, kExactness>(c); }

  LSTM_EXT_INLINE static Value clamp(Value v, Number<T> bound) {
    return Simd<T>::at_least(Simd<T>::at_most(v, bound), -bound);
  }
  LSTM_EXT_INLINE static Value below(Value v, Number<T> bound, Value a) {
    return choose(Simd<T>::abs(v) < number(bound), a, number(0));
  }
  LSTM_EXT_INLINE static Value within(Value v, Number<T> bound, Value a) {
    return choose(Simd<T>::abs(v) <= number(bound), a, number(0));
  }
  LSTM_EXT_INLINE static Value unless(Value v, Value bound, Value a) { return choose(v == bound, number(0), a); }

  LSTM_EXT_INLINE static Value activation(const cell::Activation<Number<T>>& f, Value z) {
    return called_activation<CellMath>(f, z);
  }
  LSTM_EXT_INLINE static Value slope_of(const cell::Activation<Number<T>>& f, Value value) {
    return called_slope<CellMath>(f, value);
  }
  LSTM_EXT_INLINE static Value where_positive(Value v, Value a, Value b) { return choose(number(0) < v, a, b); }
  LSTM_EXT_INLINE static Value quotient(Value a, Value b) { return a / b; }
  LSTM_EXT_INLINE static Value expm1(Value z) {
    return by_lane(z, [](Number<T> x) LSTM_EXT_LAMBDA_INLINE { return exact_expm1(x); });
  }
  LSTM_EXT_INLINE static Value softplus(Value z) {
    return by_lane(z, [](Number<T> x) LSTM_EXT_LAMBDA_INLINE { return exact_softplus(x); });
  }

  template <typename Function>
  LSTM_EXT_INLINE static Value by_lane(Value v, const Function& function) {
    Number<T> lanes[Simd<T>::kLanes];
    store_lanes<T>(lanes, v, Simd<T>::kLanes);
    for (Number<T>& lane : lanes) lane = function(lane);
    return load_lanes<T>(lanes, Simd<T>::kLanes);
  }

  struct Squashed {
    TanhTerms<T, kExactness> terms;
    Value c, inverse;
    LSTM_EXT_INLINE Value value() const { return terms.value(c, inverse); }
    LSTM_EXT_INLINE Value slope(Value value) const { return terms.slope(c, value, inverse); }
  };
  LSTM_EXT_INLINE static Squashed squash(Value c) {
    const TanhTerms<T, kExactness> terms(c);
    return {terms, c, inverse_of<T, kExactness>(terms.denominator)};
  }
};

// The Math of the fused step, whose only waits are these divisions. i and g share a division, and so do o and tanh(c):
// a division costs as much as an exponential. f has its own, because its rounding error is multiplied into c at every
// step. Only values that meet in c_t or h_t anyway share one, so a NaN spreads no further than in the equations.
template <typename T>
struct SharedDivisions : CellMath<T, Exactness::kUsual> {
  using Value = Reg<T>;
  static constexpr bool kOutputGateFirst = false;
  LSTM_EXT_INLINE static void input(Value z_i, Value z_g, Value& i, Value& g) {
    const SigmoidTerms<T> i_terms(z_i);
    const TanhTerms<T> g_terms(z_g);
    const Value inverse = Simd<T>::reciprocal(i_terms.denominator * g_terms.denominator);
    i = i_terms.value(g_terms.denominator * inverse);
    g = g_terms.value(z_g, i_terms.denominator * inverse);
  }
  LSTM_EXT_INLINE static void output(Value z_o, Value c, Value& o, Value& h) {
    const SigmoidTerms<T> o_terms(z_o);
    const TanhTerms<T> c_terms(c);
    const Value inverse = Simd<T>::reciprocal(o_terms.denominator * c_terms.denominator);
    o = o_terms.value(c_terms.denominator * inverse);
    h = Simd<T>::copy_sign(c_terms.em1 * inverse, c);
  }
};

// Each gate has its own division, and so has tanh(c). With Exactness::kPrecise, g is as exact as its type allows,
// because layer normalisation amplifies small differences of c_t.
template <typename T, Exactness kExactness = Exactness::kUsual>
struct OwnDivisions : CellMath<T, kExactness> {
  using Base = CellMath<T, kExactness>;
  using Value = Reg<T>;
  static constexpr bool kOutputGateFirst = true;
  LSTM_EXT_INLINE static void input(Value z_i, Value z_g, Value& i, Value& g) {
    i = Base::sigmoid(z_i);
    g = Base::tanh(z_g);
  }
  LSTM_EXT_INLINE static void output(Value z_o, Value c, Value& o, Value& h) {
    o = Base::sigmoid(z_o);
    h = Base::hidden(o, c);
  }
};
template <typename T>
using PreciseDivisions = OwnDivisions<T, Exactness::kPrecise>;

template <typename T>
LSTM_EXT_INLINE Reg<T> kept_state(const ZoneoutAt<T>& zoneout, Reg<T> fresh, Reg<T> previous) {
  return transition::kept_state<OwnDivisions<T>>(zoneout, fresh, previous);
}
template <typename T>
LSTM_EXT_INLINE transition::StateGradient<OwnDivisions<T>> split_gradient(const ZoneoutAt<T>& zoneout, Reg<T> grad) {
  return transition::split_gradient<OwnDivisions<T>>(zoneout, grad);
}

// Recomputes c_t from gate values.
template <typename T>
LSTM_EXT_INLINE Reg<T> cell_state(const Gates<T>& gates, const PreviousCells<T>& previous, const CellAt<T>& cell) {
  return cell::state<OwnDivisions<T>>(gates, previous, cell);
}

}  // namespace
}  // namespace lstm_ext::cpu::LSTM_EXT_ISA
