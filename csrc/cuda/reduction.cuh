// Sums of columns, in an order that depends on the shape only: the gradient of a bias has the same bits in every run.
#pragma once

#include <type_traits>

#include "cuda/numeric.cuh"
#include "cuda/stepwise.h"

namespace lstm_ext::cuda {

// A block sums a part of the rows of kSumColumns columns: each thread every kSumHeight-th row, then a tree over the
// threads of a column. A second launch adds the parts up.
constexpr int kSumColumns = 32;
constexpr int kSumHeight = 8;

// `values` may be `partial` of a first launch. Factor is the type of the factors, or void without any.
template <typename Value, typename A, typename Factor = void>
struct SumOfRows {
  int64_t rows;
  int64_t columns;
  int64_t rows_per_part;
  const Value* values;              // (rows, columns)
  A* result;                        // (parts, columns)
  bool accumulate;                  // add to what is there
  const Factor* factors = nullptr;  // (rows, columns), or null for ones
};

template <typename Value, typename A, typename Factor = void>
LSTM_KERNEL LSTM_LAUNCH_BOUNDS(kSumColumns* kSumHeight) sum_of_rows_kernel(SumOfRows<Value, A, Factor> args) {
  LSTM_SHARED(A, sums, kSumColumns * kSumHeight);
  const int64_t column = int64_t{blockIdx.x} * kSumColumns + threadIdx.x;
  const int64_t first = int64_t{blockIdx.y} * args.rows_per_part;
  const int64_t end = first + args.rows_per_part < args.rows ? first + args.rows_per_part : args.rows;
  A sum = 0;
  if (column < args.columns) {
    for (int64_t row = first + threadIdx.y; row < end; row += kSumHeight) {
      A value = widen(args.values[row * args.columns + column]);
      if constexpr (!std::is_void_v<Factor>) {
        if (args.factors) value *= widen(args.factors[row * args.columns + column]);
      }
      sum += value;
    }
  }
  const int place = threadIdx.y * kSumColumns + threadIdx.x;
  sums[place] = sum;
  for (int half = kSumHeight / 2; half > 0; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.y) < half) sums[place] += sums[place + half * kSumColumns];
  }
  if (threadIdx.y == 0 && column < args.columns) {
    A* result = args.result + blockIdx.y * args.columns + column;
    *result = args.accumulate ? *result + sums[place] : sums[place];
  }
}

}  // namespace lstm_ext::cuda
