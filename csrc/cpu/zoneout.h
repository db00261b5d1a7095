// Zoneout: which part of the previous state a step keeps. `at` is the index of the `lanes` numbers in an array of the
// state of all steps, which has the same shape as the array of flags.
#pragma once

#include "cpu/isa.h"

#include "cpu/simd.h"

namespace lstm_ext::cpu::LSTM_EXT_ISA {
namespace {

// The new state, from the cell's result and the previous state.
template <typename T>
LSTM_EXT_INLINE Reg<T> apply_zoneout(const Zoneout<T>& zoneout, int64_t at, Reg<T> fresh, Reg<T> previous, int lanes) {
  using S = Simd<T>;
  if (zoneout.keep) return where<T>(zoneout.keep + at, lanes, previous, fresh);
  // Interpolates from the nearer end, like torch.lerp.
  if (zoneout.share < T(0.5)) return S::fma(S::set1(zoneout.share), previous - fresh, fresh);
  return S::fma(S::set1(T(1) - zoneout.share), fresh - previous, previous);
}

// Splits dL/d(state): returns the part of the previous state, and leaves the part of the cell's result in `grad`.
template <typename T>
LSTM_EXT_INLINE Reg<T> split_gradient(const Zoneout<T>& zoneout, int64_t at, Reg<T>& grad, int lanes) {
  if (!zoneout.keep) {
    const Reg<T> previous = grad * Simd<T>::set1(zoneout.share);
    grad = grad - previous;
    return previous;
  }
  const Reg<T> zero = Simd<T>::zero();
  const Reg<T> previous = where<T>(zoneout.keep + at, lanes, grad, zero);
  grad = where<T>(zoneout.keep + at, lanes, zero, grad);
  return previous;
}

}  // namespace
}  // namespace lstm_ext::cpu::LSTM_EXT_ISA
