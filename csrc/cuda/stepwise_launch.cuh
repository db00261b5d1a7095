// Starts the stepwise kernels. Each stepwise_*.cu instantiates these functions for one type.
#pragma once

#include <algorithm>

#include "cuda/cell.cuh"
#include "cuda/layer_norm.cuh"
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

template <typename Step>
int64_t most_rows(const StepSides<Step>& args) {
  return most_rows(args, [](const Step& step) -> const StepRows& { return step.rows; });
}

template <typename T>
cudaError_t cell_forward(const StepSides<CellForward<T>>& args, cudaStream_t stream) {
  const CellGrid g = cell_grid(most_rows(args), args.sides[0].hidden_size, args.count);
  const bool options = args.sides[0].rows.options;
  const auto kernel = args.sides[0].options.any() ? cell_forward_kernel<T, true, true>
                      : options                   ? cell_forward_kernel<T, true>
                                                  : cell_forward_kernel<T, false>;
  return launch(kernel, g.grid, g.block, 0, stream, args);
}

template <typename T>
cudaError_t cell_backward(const StepSides<CellBackward<T>>& args, cudaStream_t stream) {
  const CellGrid g = cell_grid(most_rows(args), args.sides[0].hidden_size, args.count);
  const bool options = args.sides[0].rows.options;
  const auto kernel = args.sides[0].options.any() ? cell_backward_kernel<T, true, true>
                      : options                   ? cell_backward_kernel<T, true>
                                                  : cell_backward_kernel<T, false>;
  return launch(kernel, g.grid, g.block, 0, stream, args);
}

// A block for each row, in whole warps.
template <typename Step>
CellGrid norm_grid(const StepSides<Step>& args) {
  const int64_t rows = most_rows(args, [](const Step& step) -> const StepRows& { return step.cell.rows; });
  const int64_t width = std::min<int64_t>((args.sides[0].cell.hidden_size + 31) / 32 * 32, kNormThreads);
  return {dim3(static_cast<unsigned>(rows), 1, static_cast<unsigned>(args.count)), dim3(static_cast<unsigned>(width))};
}

template <typename T>
cudaError_t norm_cell_forward(const StepSides<NormCellForward<T>>& args, cudaStream_t stream) {
  const CellGrid g = norm_grid(args);
  const bool cell = args.sides[0].cell.options.any();
  const auto kernel = cell ? norm_cell_forward_kernel<T, true> : norm_cell_forward_kernel<T, false>;
  return launch(kernel, g.grid, g.block, 0, stream, args);
}

template <typename T>
cudaError_t norm_cell_backward(const StepSides<NormCellBackward<T>>& args, cudaStream_t stream) {
  const CellGrid g = norm_grid(args);
  const bool cell = args.sides[0].cell.options.any();
  const auto kernel = cell ? norm_cell_backward_kernel<T, true> : norm_cell_backward_kernel<T, false>;
  return launch(kernel, g.grid, g.block, 0, stream, args);
}

template <typename T>
cudaError_t output_forward(const StepSides<OutputForward<T>>& args, cudaStream_t stream) {
  const CellGrid g = cell_grid(most_rows(args), args.sides[0].output_size, args.count);
  return launch(output_forward_kernel<T>, g.grid, g.block, 0, stream, args);
}

template <typename T>
cudaError_t output_gradient(const StepSides<OutputGradient<T>>& args, cudaStream_t stream) {
  const CellGrid g = cell_grid(most_rows(args), args.sides[0].output_size, args.count);
  const auto kernel = args.sides[0].rows.options ? output_gradient_kernel<T, true> : output_gradient_kernel<T, false>;
  return launch(kernel, g.grid, g.block, 0, stream, args);
}

template <typename T>
cudaError_t previous_outputs(const PreviousOutputs<T>& args, cudaStream_t stream) {
  int64_t rows = 1;
  for (int n = 0; n < args.count; ++n) rows = std::max(rows, args.steps[n].count);
  const CellGrid g = cell_grid(rows, args.output_size, args.count);
  return launch(previous_outputs_kernel<T>, g.grid, g.block, 0, stream, args);
}

// In two launches: parts of the rows, then the parts.
template <typename Value, typename A, typename Factor>
cudaError_t sums_of_rows(int64_t rows, int64_t columns, const Value* values, const Factor* factors, A* partial, A* sums,
                         cudaStream_t stream) {
  const int64_t parts = column_sum_parts(rows);
  const dim3 block(kSumColumns, kSumHeight);
  const auto width = static_cast<unsigned>((columns + kSumColumns - 1) / kSumColumns);
  const int64_t rows_per_part = (rows + parts - 1) / parts;
  const cudaError_t error =
      launch(sum_of_rows_kernel<Value, A, Factor>, dim3(width, static_cast<unsigned>(parts)), block, 0, stream,
             SumOfRows<Value, A, Factor>{rows, columns, rows_per_part, values, partial, false, factors});
  if (error != cudaSuccess) return error;
  return launch(sum_of_rows_kernel<A, A, void>, dim3(width), block, 0, stream,
                SumOfRows<A, A>{parts, columns, parts, partial, sums, true});
}

template <typename T>
cudaError_t column_sums(const ColumnSums<T>& args, cudaStream_t stream) {
  return sums_of_rows<typename Types<T>::Gradient, typename Types<T>::Accumulate, void>(
      args.rows, args.columns, args.values, nullptr, args.partial, args.sums, stream);
}

template <typename T>
cudaError_t product_sums(const ProductSums<T>& args, cudaStream_t stream) {
  return sums_of_rows(args.rows, args.columns, args.values, args.factors, args.partial, args.sums, stream);
}

}  // namespace lstm_ext::cuda

#define LSTM_EXT_STEPWISE(T)                                                                                   \
  namespace lstm_ext::cuda {                                                                                   \
  template cudaError_t cell_forward<T>(const StepSides<CellForward<T>>& args, cudaStream_t stream);            \
  template cudaError_t cell_backward<T>(const StepSides<CellBackward<T>>& args, cudaStream_t stream);          \
  template cudaError_t norm_cell_forward<T>(const StepSides<NormCellForward<T>>& args, cudaStream_t stream);   \
  template cudaError_t norm_cell_backward<T>(const StepSides<NormCellBackward<T>>& args, cudaStream_t stream); \
  template cudaError_t output_forward<T>(const StepSides<OutputForward<T>>& args, cudaStream_t stream);        \
  template cudaError_t output_gradient<T>(const StepSides<OutputGradient<T>>& args, cudaStream_t stream);      \
  template cudaError_t previous_outputs<T>(const PreviousOutputs<T>& args, cudaStream_t stream);               \
  template cudaError_t column_sums<T>(const ColumnSums<T>& args, cudaStream_t stream);                         \
  template cudaError_t product_sums<T>(const ProductSums<T>& args, cudaStream_t stream);                       \
  }
