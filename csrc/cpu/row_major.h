// Products that read a weight matrix where it lies, row by row: for a handful of batch rows, where packing the weights
// costs more than using them.
#pragma once

#include "cpu/isa.h"

#include "cpu/simd.h"

namespace lstm_ext::cpu::LSTM_EXT_ISA {
namespace {

// out(x)[j] = start[j] + weight[j] . a(x) for j < outputs (at most kLanes / X) and x < X, where
// start is `bias`, or what out(x) holds. One accumulator per pair (j, x), lanes along k; every sum
// is formed in the same order whatever X is.
template <typename T, int X, typename A, typename Out>
LSTM_EXT_INLINE void dot_tile(const T* weight, int64_t count, int outputs, const A& a, const Out& out, const T* bias) {
  using S = Simd<T>;
  constexpr int n = S::kLanes;
  constexpr int J = n / X;
  // A missing output repeats the last one's row, so that nothing past the matrix is read.
  const T* row[J];
#pragma GCC unroll 16
  for (int j = 0; j < J; ++j) row[j] = weight + (j < outputs ? j : outputs - 1) * count;
  const T* x[X];
  for (int i = 0; i < X; ++i) x[i] = a(i);

  Reg<T> acc[n];
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) acc[i] = S::zero();
  int64_t k = 0;
  for (; k + n <= count; k += n) {
    Reg<T> values[X];
#pragma GCC unroll 4
    for (int i = 0; i < X; ++i) values[i] = S::load(x[i] + k);
#pragma GCC unroll 16
    for (int j = 0; j < J; ++j) {
      const Reg<T> w = S::load(row[j] + k);
#pragma GCC unroll 4
      for (int i = 0; i < X; ++i) acc[i * J + j] = S::fma(w, values[i], acc[i * J + j]);
    }
  }
  if (k < count) {
    const int rest = static_cast<int>(count - k);
    Reg<T> values[X];
#pragma GCC unroll 4
    for (int i = 0; i < X; ++i) values[i] = S::load_partial(x[i] + k, rest);
#pragma GCC unroll 16
    for (int j = 0; j < J; ++j) {
      const Reg<T> w = S::load_partial(row[j] + k, rest);
#pragma GCC unroll 4
      for (int i = 0; i < X; ++i) acc[i * J + j] = S::fma(w, values[i], acc[i * J + j]);
    }
  }
  const Reg<T> sums = sum_each<T>(acc);
  if constexpr (X == 1) {
    T* target = out(0);
    store_lanes<T>(target, load_lanes<T>(bias ? bias : target, outputs) + sums, outputs);
  } else {
    T lanes[n];
    S::store(lanes, sums);
    for (int i = 0; i < X; ++i) {
      T* target = out(i);
      for (int j = 0; j < J && j < outputs; ++j) target[j] = (bias ? bias[j] : target[j]) + lanes[i * J + j];
    }
  }
}

}  // namespace
}  // namespace lstm_ext::cpu::LSTM_EXT_ISA
