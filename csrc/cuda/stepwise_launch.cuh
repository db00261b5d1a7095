// How the stepwise kernels are started. Each stepwise_*.cu makes these functions for one type.
#pragma once

#include <algorithm>

#include "cuda/cell.cuh"
#include "cuda/reduction.cuh"
#include "cuda/stepwise.h"

namespace lstm_ext::cuda {

constexpr int64_t kMaxGridY = 65535;

// Blocks as wide as the units need, in whole warps, and as high as their threads allow.
struct CellGrid {
  dim3 grid, block;
};
inline CellGrid cell_grid(int64_t rows, int64_t units, int64_t steps = 1) {
  const int64_t width = std::min<int64_t>((units + 31) / 32 * 32, 128);
  const int64_t height = std::min<int64_t>(kCellThreads / width, rows);
  const dim3 block(static_cast<unsigned>(width), static_cast<unsigned>(height));
  const dim3 grid(static_cast<unsigned>((units + width - 1) / width),
                  static_cast<unsigned>(std::min((rows + height - 1) / height, kMaxGridY)),
                  static_cast<unsigned>(steps));
  return {grid, block};
}

template <typename T>
cudaError_t cell_forward(const CellForward<T>& step, cudaStream_t stream) {
  const CellGrid g = cell_grid(step.rows, step.hidden_size);
  return launch(cell_forward_kernel<T>, g.grid, g.block, 0, stream, step);
}

template <typename T>
cudaError_t cell_backward(const CellBackward<T>& step, cudaStream_t stream) {
  const CellGrid g = cell_grid(step.rows, step.hidden_size);
  return launch(cell_backward_kernel<T>, g.grid, g.block, 0, stream, step);
}

template <typename T>
cudaError_t output_gradient(const OutputGradient<T>& step, cudaStream_t stream) {
  const CellGrid g = cell_grid(step.rows, step.output_size);
  return launch(output_gradient_kernel<T>, g.grid, g.block, 0, stream, step);
}

template <typename T>
cudaError_t previous_outputs(const PreviousOutputs<T>& steps, cudaStream_t stream) {
  int64_t rows = 1;
  for (int n = 0; n < steps.steps; ++n) rows = std::max(rows, steps.step[n].rows);
  const CellGrid g = cell_grid(rows, steps.output_size, steps.steps);
  return launch(previous_outputs_kernel<T>, g.grid, g.block, 0, stream, steps);
}

template <typename T>
cudaError_t column_sums(const ColumnSums<T>& s, cudaStream_t stream) {
  using A = typename Types<T>::Accumulate;
  using D = typename Types<T>::Gradient;
  const int64_t parts = column_sum_parts(s.rows);
  const dim3 block(kSumColumns, kSumHeight);
  const auto width = static_cast<unsigned>((s.columns + kSumColumns - 1) / kSumColumns);
  const int64_t rows_per_part = (s.rows + parts - 1) / parts;
  const cudaError_t error =
      launch(sum_of_rows_kernel<D, A>, dim3(width, static_cast<unsigned>(parts)), block, 0, stream,
             SumOfRows<D, A>{s.rows, s.columns, rows_per_part, s.values, s.partial, false});
  if (error != cudaSuccess) return error;
  return launch(sum_of_rows_kernel<A, A>, dim3(width), block, 0, stream,
                SumOfRows<A, A>{parts, s.columns, parts, s.partial, s.sums, true});
}

}  // namespace lstm_ext::cuda

#define LSTM_EXT_STEPWISE(T)                                                                      \
  namespace lstm_ext::cuda {                                                                      \
  template cudaError_t cell_forward<T>(const CellForward<T>& step, cudaStream_t stream);          \
  template cudaError_t cell_backward<T>(const CellBackward<T>& step, cudaStream_t stream);        \
  template cudaError_t output_gradient<T>(const OutputGradient<T>& step, cudaStream_t stream);    \
  template cudaError_t previous_outputs<T>(const PreviousOutputs<T>& steps, cudaStream_t stream); \
  template cudaError_t column_sums<T>(const ColumnSums<T>& sums, cudaStream_t stream);            \
  }
