// Starts the fused kernels. Each step_*.cu instantiates these functions for one type.
#pragma once

#include "cuda/step_backward.cuh"
#include "cuda/step_forward.cuh"

namespace lstm_ext::cuda {

inline LaunchConfig step_config(int64_t units, int64_t rows, int rows_of_block, size_t shared, bool dependent,
                                cudaStream_t stream) {
  LaunchConfig config;
  config.grid =
      dim3(static_cast<unsigned>(step_parts(units)), static_cast<unsigned>((rows + rows_of_block - 1) / rows_of_block));
  config.block = dim3(kStepThreads);
  config.dynamic_shared = shared;
  config.stream = stream;
  config.dependent = dependent;
  return config;
}

template <typename T>
cudaError_t step_forward(const StepForward<T>& args, bool dependent, cudaStream_t stream) {
  const auto start = [&](auto kernel, int rows, size_t shared) {
    return launch(kernel, step_config(args.cell.hidden_size, args.cell.rows.count, rows, shared, dependent, stream),
                  args);
  };
  const bool options = args.cell.rows.options;
  if (step_rows(args.cell.rows.count) == kStepRowsFew) {
    return start(options ? step_forward_kernel<T, true, kStepRowsFew> : step_forward_kernel<T, false, kStepRowsFew>,
                 kStepRowsFew, ForwardTile<T, kStepRowsFew>::kSharedBytes);
  }
  return start(options ? step_forward_kernel<T, true, kStepRowsMany> : step_forward_kernel<T, false, kStepRowsMany>,
               kStepRowsMany, ForwardTile<T, kStepRowsMany>::kSharedBytes);
}

template <typename T>
cudaError_t step_backward(const StepBackward<T>& args, bool dependent, cudaStream_t stream) {
  using D = typename Types<T>::Gradient;
  const auto start = [&](auto kernel, int rows, size_t shared) {
    return launch(kernel, step_config(args.cell.hidden_size, args.cell.rows.count, rows, shared, dependent, stream),
                  args);
  };
  const bool options = args.cell.rows.options;
  if (step_rows(args.cell.rows.count) == kStepRowsFew) {
    return start(options ? step_backward_kernel<T, true, kStepRowsFew> : step_backward_kernel<T, false, kStepRowsFew>,
                 kStepRowsFew, BackwardTile<D, kStepRowsFew>::kSharedBytes);
  }
  return start(options ? step_backward_kernel<T, true, kStepRowsMany> : step_backward_kernel<T, false, kStepRowsMany>,
               kStepRowsMany, BackwardTile<D, kStepRowsMany>::kSharedBytes);
}

}  // namespace lstm_ext::cuda

#define LSTM_EXT_STEP(T)                                                                                   \
  namespace lstm_ext::cuda {                                                                               \
  template cudaError_t step_forward<T>(const StepForward<T>& args, bool dependent, cudaStream_t stream);   \
  template cudaError_t step_backward<T>(const StepBackward<T>& args, bool dependent, cudaStream_t stream); \
  }
