// Layer normalisation of rows.
#pragma once

#include "cpu/isa.h"

#include "cpu/range.h"
#include "cpu/simd.h"

namespace lstm_ext::cpu::LSTM_EXT_ISA {
namespace {

// Replaces rows of `count` numbers by (x - mean) / sqrt(variance + epsilon), with the biased variance. `factors`
// receives 1 / sqrt(variance + epsilon) of each row.
template <typename T, int kRows>
LSTM_EXT_INLINE void normalise(T* const* rows, int64_t count, T* factors) {
  using S = Simd<T>;
  constexpr int n = S::kLanes;
  const Reg<T> number = S::set1(static_cast<T>(count));
  Reg<T> mean[kRows], factor[kRows];
#pragma GCC unroll kNormRows
  for (int r = 0; r < kRows; ++r) mean[r] = S::zero();
  for_each_register<T>(count, [&](int64_t i, int lanes) LSTM_EXT_LAMBDA_INLINE {
#pragma GCC unroll kNormRows
    for (int r = 0; r < kRows; ++r) mean[r] = mean[r] + load_lanes<T>(rows[r] + i, lanes);
  });
#pragma GCC unroll kNormRows
  for (int r = 0; r < kRows; ++r) {
    mean[r] = sum_of_lanes<T>(mean[r]) / number;
    factor[r] = S::zero();
  }
  for_each_register<T>(count, [&](int64_t i, int lanes) LSTM_EXT_LAMBDA_INLINE {
#pragma GCC unroll kNormRows
    for (int r = 0; r < kRows; ++r) {
      Reg<T> d = load_lanes<T>(rows[r] + i, lanes) - mean[r];
      if (lanes < n) {
        alignas(64) T difference[n];
        S::store(difference, d);
        d = S::load_partial(difference, lanes);
      }
      factor[r] = S::fma(d, d, factor[r]);
    }
  });
#pragma GCC unroll kNormRows
  for (int r = 0; r < kRows; ++r) {
    const Reg<T> variance = sum_of_lanes<T>(factor[r]) / number;
    factor[r] = S::set1(T(1)) / S::square_root(variance + S::set1(static_cast<T>(kLayerNormEpsilon)));
    S::store_partial(factors + r, factor[r], 1);
  }
  for_each_register<T>(count, [&](int64_t i, int lanes) LSTM_EXT_LAMBDA_INLINE {
#pragma GCC unroll kNormRows
    for (int r = 0; r < kRows; ++r) {
      store_lanes<T>(rows[r] + i, (load_lanes<T>(rows[r] + i, lanes) - mean[r]) * factor[r], lanes);
    }
  });
}

// Normalises at most kNormRows rows side by side, because the sums and the root of each row wait for one another.
template <typename T>
LSTM_EXT_INLINE void normalise(T* const* rows, int64_t number_of_rows, int64_t count, T* factors) {
  if (number_of_rows == kNormRows) {
    normalise<T, kNormRows>(rows, count, factors);
  } else {
    for (int64_t r = 0; r < number_of_rows; ++r) normalise<T, 1>(rows + r, count, factors + r);
  }
}

// Calls f(group) for the groups of rows that are normalised side by side.
template <typename F>
LSTM_EXT_INLINE void for_each_norm_group(Range rows, F&& f) {
  for (int64_t first = rows.begin; first < rows.end; first += kNormRows) {
    f(Range{first, smaller(first + kNormRows, rows.end)});
  }
}

}  // namespace
}  // namespace lstm_ext::cpu::LSTM_EXT_ISA
