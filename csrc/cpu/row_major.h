// Products that read a weight matrix in place, row by row: for a handful of batch rows, for which packing the weights
// costs more than using them.
#pragma once

#include "cpu/isa.h"

#include "cpu/simd.h"

namespace lstm_ext::cpu::LSTM_EXT_ISA {
namespace {

// The rows of a tile, which share one read of the weight.
template <typename T>
constexpr int kDotRows = Simd<T>::kLanes >= 4 ? 4 : Simd<T>::kLanes;

// The number of groups of lanes in a sum over rows; the rows of a group are adjacent in the weight.
template <typename T>
constexpr int kRowGroups = Simd<T>::kLanes == 16 ? 4 : 1;

// The rows of a weight that make the first `count` lanes of a sum. With four groups: the distance in rows from the
// first half to the second, and from one group of a half to the next.
struct LaneRows {
  int count;
  int64_t readable;  // the number of rows that may be read
  int64_t to_half, to_group;
};

// Lane j of sums[i] = (row of lane j) . x[i], for i < X. Lanes without a row are undefined. There is one accumulator
// for each pair (j, i), with lanes along k; every sum is computed in the same order for all X and j. Not inlined: it is
// long, and called from many places. The weight's numbers are T, or narrower ones.
template <typename T, int X, typename W>
__attribute__((noinline)) void dot_rows(const W* weight, int64_t count, const LaneRows& rows, const T* const* x,
                                        Reg<T>* sums) {
  using S = Simd<T>;
  constexpr int n = S::kLanes;
  constexpr int J = n / X;  // rows of the weight at once
  constexpr int kGroup = n / kRowGroups<T>;
  const auto row_of = [&](int lane) LSTM_EXT_LAMBDA_INLINE -> int64_t {
    if constexpr (kRowGroups<T> == 1) return lane;
    return lane % kGroup + (lane & kGroup ? rows.to_group : 0) + (lane & n / 2 ? rows.to_half : 0);
  };
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
    if (part * J < rows.count && row_of(part * J + J - 1) < rows.readable) {
      // Addresses each row by its distance from the first of its group. There are not enough registers for all
      // addresses, so they would be reloaded in each step; and a single address would begin a chain of additions
      // through all rows.
      constexpr int kGroups = J < kGroup ? 1 : J / kGroup;
      const int64_t step = count * static_cast<int64_t>(sizeof(W));
      const int64_t step3 = 3 * step, step5 = 5 * step, step7 = 7 * step;
      const char* from[kGroups];
#pragma GCC unroll 4
      for (int g = 0; g < kGroups; ++g) {
        from[g] = reinterpret_cast<const char*>(weight + row_of(part * J + g * kGroup) * count);
      }
      const auto row = [&](int j) LSTM_EXT_LAMBDA_INLINE {
        const int64_t distance[] = {0, step, 2 * step, step3, 4 * step, step5, 2 * step3, step7};
        return reinterpret_cast<const W*>(from[j / kGroup] + distance[j % kGroup]);
      };
      // Otherwise the compiler computes an address for each row.
      const auto hide = [&]() LSTM_EXT_LAMBDA_INLINE {
#pragma GCC unroll 4
        for (int g = 0; g < kGroups; ++g) asm("" : "+r"(from[g]));
      };
      for (int64_t k = 0; k < end; k += n) {
        hide();
        multiply(k, row, kWhole);
#pragma GCC unroll 4
        for (int g = 0; g < kGroups; ++g) from[g] += n * sizeof(W);
      }
      hide();
      if (rest > 0) multiply(end, row, kPartial);
    } else if (part * J < rows.count) {
      // The last row stands in for a missing one.
      const W* at[J];
      for (int j = 0; j < J; ++j) at[j] = weight + smaller(row_of(part * J + j), rows.readable - 1) * count;
      for (int64_t k = 0; k < end; k += n) {
        multiply(k, [&](int j) LSTM_EXT_LAMBDA_INLINE { return at[j] + k; }, kWhole);
      }
      if (rest > 0) multiply(end, [&](int j) LSTM_EXT_LAMBDA_INLINE { return at[j] + end; }, kPartial);
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
