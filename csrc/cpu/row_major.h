// Products that read a weight matrix where it lies, row by row: for a handful of batch rows, where packing the weights
// costs more than using them.
#pragma once

#include "cpu/isa.h"

#include "cpu/simd.h"

namespace lstm_ext::cpu::LSTM_EXT_ISA {
namespace {

// The rows of a tile: these at once read a weight once.
template <typename T>
constexpr int kDotRows = Simd<T>::kLanes >= 4 ? 4 : Simd<T>::kLanes;

// Lane j of sums[i] = weight[j] . x[i], for j < outputs (at most kLanes) and i < X. Other lanes are anything.
// `readable`: so many rows of the weight there are. One accumulator for each pair (j, i), lanes along k; every sum is
// formed in the same order whatever X is. Not inlined: it is long, and called from many places. The weight's numbers
// are T, or narrower ones.
template <typename T, int X, typename W>
__attribute__((noinline)) void dot_rows(const W* weight, int64_t count, int outputs, int64_t readable,
                                        const T* const* x, Reg<T>* sums) {
  using S = Simd<T>;
  constexpr int n = S::kLanes;
  constexpr int J = n / X;  // of the weight at once
  Reg<T> parts[X][X];
  for (int part = 0; part < X; ++part) {
    Reg<T> acc[n];
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) acc[i] = S::zero();
    const int rest = static_cast<int>(count % n);
    const auto multiply = [&](int64_t k, const auto& row, [[maybe_unused]] auto whole) LSTM_EXT_LAMBDA_INLINE {
      const auto load = [rest](const auto* p) LSTM_EXT_LAMBDA_INLINE {
        if constexpr (std::decay_t<decltype(whole)>::value) {
          return S::load(p);
        } else {
          return load_first<T>(p, rest);
        }
      };
      Reg<T> values[X];
#pragma GCC unroll 4
      for (int i = 0; i < X; ++i) values[i] = load(x[i] + k);
#pragma GCC unroll 16
      for (int j = 0; j < J; ++j) {
        Reg<T> w = load(row(j));
        if constexpr (X > 1) keep_in_register(w);
#pragma GCC unroll 4
        for (int i = 0; i < X; ++i) acc[i * J + j] = S::fma(w, values[i], acc[i * J + j]);
      }
    };
    constexpr std::true_type kWhole;
    constexpr std::false_type kPartial;
    const int64_t end = count - rest;
    if (part * J < outputs && (part + 1) * J <= readable) {
      // Each row by a multiple of the distance from one of two, which is part of an instruction: there are no registers
      // for as many addresses, and without them each would be fetched in each step.
      const int64_t step = count * static_cast<int64_t>(sizeof(W));
      const int64_t step3 = 3 * step, step5 = 5 * step, step7 = 7 * step;
      const char* low = reinterpret_cast<const char*>(weight + part * J * count);
      const char* high = J > 8 ? low + 8 * step : low;
      const auto row = [&](int j) LSTM_EXT_LAMBDA_INLINE {
        const char* const from = j < 8 ? low : high;
        const int64_t distance[] = {0, step, 2 * step, step3, 4 * step, step5, 2 * step3, step7};
        return reinterpret_cast<const W*>(from + distance[j % 8]);
      };
      for (int64_t k = 0; k < end; k += n) {
        asm("" : "+r"(low), "+r"(high));  // else the compiler makes an address of each row
        multiply(k, row, kWhole);
        low += n * sizeof(W);
        high += n * sizeof(W);
      }
      asm("" : "+r"(low), "+r"(high));
      if (rest > 0) multiply(end, row, kPartial);
    } else if (part * J < outputs) {
      // A missing row is the last one again.
      const W* rows[J];
      for (int j = 0; j < J; ++j) rows[j] = weight + (part * J + j < readable ? part * J + j : readable - 1) * count;
      for (int64_t k = 0; k < end; k += n) {
        multiply(k, [&](int j) LSTM_EXT_LAMBDA_INLINE { return rows[j] + k; }, kWhole);
      }
      if (rest > 0) multiply(end, [&](int j) LSTM_EXT_LAMBDA_INLINE { return rows[j] + end; }, kPartial);
    }
#pragma GCC unroll 4
    for (int i = 0; i < X; ++i) parts[i][part] = sum_each<T, J>(acc + i * J);
  }
#pragma GCC unroll 4
  for (int i = 0; i < X; ++i) sums[i] = sum_each<T, X, J>(parts[i]);
}

// Calls f(first_row, std::integral_constant<int, X>) for tiles of kDotRows rows, then two, then one.
template <typename T, int X = kDotRows<T>, typename F>
LSTM_EXT_INLINE void for_each_dot_tile(int64_t first, int64_t rows, F&& f) {
  for (; first + X <= rows; first += X) f(first, std::integral_constant<int, X>{});
  if constexpr (X > 1) for_each_dot_tile<T, X / 2>(first, rows, f);
}

}  // namespace
}  // namespace lstm_ext::cpu::LSTM_EXT_ISA
