// Products that read a weight matrix where it lies, row by row: for a handful of batch rows, where packing the weights
// costs more than using them.
#pragma once

#include "cpu/isa.h"

#include "cpu/simd.h"

namespace lstm_ext::cpu::LSTM_EXT_ISA {
namespace {

// A register of a weight's numbers, which may be kept in fewer bits than T: in bfloat16, or in int8.
template <typename T>
LSTM_EXT_INLINE Reg<T> load_weights(const T* p) {
  return Simd<T>::load(p);
}
template <typename T>
LSTM_EXT_INLINE Reg<float> load_weights(const uint16_t* p) {
  typedef uint16_t Narrow __attribute__((vector_size(2 * Simd<float>::kLanes)));
  typedef uint32_t Wide __attribute__((vector_size(4 * Simd<float>::kLanes)));
  Narrow bits;
  __builtin_memcpy(&bits, p, sizeof(bits));
  return reinterpret_cast<Reg<float>>(__builtin_convertvector(bits, Wide) << 16);
}
template <typename T>
LSTM_EXT_INLINE Reg<float> load_weights(const int8_t* p) {
  typedef int8_t Narrow __attribute__((vector_size(Simd<float>::kLanes)));
  Narrow numbers;
  __builtin_memcpy(&numbers, p, sizeof(numbers));
  return __builtin_convertvector(__builtin_convertvector(numbers, typename Simd<float>::Index), Reg<float>);
}
// The first n of them; the others are zeros.
template <typename T, typename W>
LSTM_EXT_INLINE Reg<T> load_weights(const W* p, int n) {
  if constexpr (std::is_same_v<T, W>) {
    return Simd<T>::load_partial(p, n);
  } else {
    W numbers[Simd<T>::kLanes] = {};
    for (int i = 0; i < n; ++i) numbers[i] = p[i];
    return load_weights<T>(numbers);
  }
}

// out(x)[j] = start[j] + factors[j] * (weight[j] . a(x)) for j < outputs (at most kLanes / X) and x < X, where
// start is `bias`, or what out(x) holds, and the factors may be null, which means 1. One accumulator per pair (j, x),
// lanes along k; every sum is formed in the same order whatever X is.
template <typename T, int X, typename W, typename A, typename Out>
LSTM_EXT_INLINE void dot_tile(const W* weight, int64_t count, int outputs, const A& a, const Out& out, const T* bias,
                              const T* factors) {
  using S = Simd<T>;
  constexpr int n = S::kLanes;
  constexpr int J = n / X;
  // A missing output repeats the last one's row, so that nothing past the matrix is read.
  const W* row[J];
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
      const Reg<T> w = load_weights<T>(row[j] + k);
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
      const Reg<T> w = load_weights<T>(row[j] + k, rest);
#pragma GCC unroll 4
      for (int i = 0; i < X; ++i) acc[i * J + j] = S::fma(w, values[i], acc[i * J + j]);
    }
  }
  Reg<T> sums = sum_each<T>(acc);
  if constexpr (X == 1) {
    if (factors) sums = sums * load_lanes<T>(factors, outputs);
    T* target = out(0);
    store_lanes<T>(target, load_lanes<T>(bias ? bias : target, outputs) + sums, outputs);
  } else {
    T lanes[n];
    S::store(lanes, sums);
    for (int i = 0; i < X; ++i) {
      T* target = out(i);
      for (int j = 0; j < J && j < outputs; ++j) {
        target[j] = (bias ? bias[j] : target[j]) + (factors ? factors[j] : T(1)) * lanes[i * J + j];
      }
    }
  }
}

}  // namespace
}  // namespace lstm_ext::cpu::LSTM_EXT_ISA
