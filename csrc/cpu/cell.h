// The equations of an LSTM cell, forward and backward, on registers:
//
//   i, f, o = sigmoid(preactivations)   g = tanh(preactivation)   c_t = f c_{t-1} + i g   h_t = o tanh(c_t)
#pragma once

#include "cpu/isa.h"

#include "cpu/gates.h"
#include "cpu/simd.h"
#include "cpu/vector_math.h"

namespace lstm_ext::cpu::LSTM_EXT_ISA {
namespace {

// How the nonlinearities of a cell are computed.
enum class Nonlinearities {
  // i and g share a division, and so do o and tanh(c): a division costs as much as an exponential. f has its own, since
  // its rounding error is multiplied into c at every step. Only what meets in c_t or in h_t anyway shares, so that a
  // NaN
  // spreads no further than in the equations. For the fused step, which has nothing to wait for but these divisions.
  kSharedDivisions,
  // Each gate has its own division, and so has tanh(c).
  kOwnDivisions,
  // As kOwnDivisions, with g as exact as its type allows, and the others with Exactness::kPrecise. Layer normalisation
  // makes small differences of c_t large.
  kPrecise,
};

template <typename T>
struct Cell {
  Gates<T> gates;  // values
  Reg<T> c, h;     // c_t and o tanh(c_t)
};

// c_{t-1} of a row, `lanes` numbers, or null for zeros; or of kCount rows, of which all are there or none. It is read
// late: a register would be occupied from the beginning.
template <typename T, int kCount = 1>
struct PreviousCells {
  const T* at[kCount];
  int lanes;
  bool there() const { return at[0] != nullptr; }
  LSTM_EXT_INLINE Reg<Several<T, kCount>> load() const {
    return several<T, kCount>([&](int n) LSTM_EXT_LAMBDA_INLINE { return load_lanes<T>(at[n], lanes); });
  }
};

template <typename T, typename Previous = PreviousCells<T>>
LSTM_EXT_INLINE Reg<T> cell_state(const Gates<T>& gates, const Previous& previous) {
  const Reg<T> c = gates[kI] * gates[kG];
  return previous.there() ? Simd<T>::fma(gates[kF], previous.load(), c) : c;
}
template <typename T, Exactness kExactness = Exactness::kUsual>
LSTM_EXT_INLINE Reg<T> hidden_state(Reg<T> o, Reg<T> c) {
  return o * tanh<T, kExactness>(c);
}

constexpr auto kNoStore = [](const auto&) LSTM_EXT_LAMBDA_INLINE {};

// A cell from its preactivations and c_{t-1}. store(c_t) runs as soon as c_t is known: of rows that are no whole
// registers, the load of the next one waits for it.
template <Nonlinearities kNonlinearities, typename T, typename Previous = PreviousCells<T>,
          typename Store = decltype(kNoStore)>
LSTM_EXT_INLINE Cell<T> cell_forward(const Gates<T>& preactivations, const Previous& previous,
                                     const Store& store = kNoStore) {
  Cell<T> cell;
  Gates<T>& gates = cell.gates;
  if constexpr (kNonlinearities == Nonlinearities::kSharedDivisions) {
    gates[kF] = sigmoid<T>(preactivations[kF]);
    const SigmoidTerms<T> i(preactivations[kI]);
    const TanhTerms<T> g(preactivations[kG]);
    const Reg<T> inverse = Simd<T>::reciprocal(i.denominator * g.denominator);
    gates[kI] = i.value(g.denominator * inverse);
    gates[kG] = g.value(preactivations[kG], i.denominator * inverse);
    cell.c = cell_state<T>(gates, previous);
    store(cell.c);
    const SigmoidTerms<T> o(preactivations[kO]);
    const TanhTerms<T> c(cell.c);
    const Reg<T> o_inverse = Simd<T>::reciprocal(o.denominator * c.denominator);
    gates[kO] = o.value(c.denominator * o_inverse);
    cell.h = Simd<T>::copy_sign(c.em1 * o_inverse, cell.c);
  } else {
    constexpr bool kPrecise = kNonlinearities == Nonlinearities::kPrecise;
    constexpr Exactness kExactness = kPrecise ? Exactness::kPrecise : Exactness::kUsual;
    gates[kI] = sigmoid<T, kExactness>(preactivations[kI]);
    gates[kF] = sigmoid<T, kExactness>(preactivations[kF]);
    gates[kO] = sigmoid<T, kExactness>(preactivations[kO]);
    gates[kG] = kPrecise ? precise_tanh<T>(preactivations[kG]) : tanh<T>(preactivations[kG]);
    cell.c = cell_state<T>(gates, previous);
    store(cell.c);
    cell.h = hidden_state<T, kExactness>(gates[kO], cell.c);
  }
  return cell;
}

// Through h_t = o tanh(c_t): returns dL/do, and adds to dL/dc_t.
template <typename T, Exactness kExactness = Exactness::kUsual>
LSTM_EXT_INLINE Reg<T> hidden_state_backward(Reg<T> grad_h, Reg<T> o, Reg<T> c, Reg<T>& grad_c) {
  const TanhTerms<T, kExactness> terms(c);
  const Reg<T> inverse = inverse_of<T, kExactness>(terms.denominator);
  const Reg<T> tanh_c = terms.value(c, inverse);
  grad_c = Simd<T>::fma(grad_h * o, terms.slope(tanh_c, inverse), grad_c);
  return grad_h * tanh_c;
}

// Through c_t = f c_{t-1} + i g: the gradients of the gate values. That of c_{t-1} is grad_c f.
template <typename T>
LSTM_EXT_INLINE Gates<T> cell_state_backward(const Gates<T>& gates, Reg<T> c_previous, Reg<T> grad_c, Reg<T> grad_o) {
  return {{grad_c * gates[kG], grad_c * c_previous, grad_c * gates[kI], grad_o}};
}

// Through the nonlinearities: the gradients of the preactivations.
template <typename T>
LSTM_EXT_INLINE Gates<T> gates_backward(const Gates<T>& gates, const Gates<T>& grads) {
  const Reg<T> one = Simd<T>::set1(T(1));
  const auto sigmoid_slope = [&](Reg<T> value) LSTM_EXT_LAMBDA_INLINE { return value * (one - value); };
  return {{grads[kI] * sigmoid_slope(gates[kI]), grads[kF] * sigmoid_slope(gates[kF]),
           grads[kG] * (one - gates[kG] * gates[kG]), grads[kO] * sigmoid_slope(gates[kO])}};
}

}  // namespace
}  // namespace lstm_ext::cpu::LSTM_EXT_ISA
