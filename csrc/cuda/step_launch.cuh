// Starts the fused kernels. Each step_*.cu instantiates these functions for one type.
#pragma once

#include "cuda/step_backward.cuh"
#include "cuda/step_forward.cuh"

namespace lstm_ext::cuda {

// `instance` starts the kernel for so many rows of a block.
template <typename Step, typename Instance>
cudaError_t start_step(const StepSides<Step>& args, bool dependent, cudaStream_t stream, Instance&& instance) {
  const auto& first = args.sides[0].cell;
  const int64_t rows = most_rows(args, [](const Step& step) -> const StepRows& { return step.cell.rows; });
  const int rows_of_block = step_rows(rows);
  LaunchConfig config;
  config.grid =
      dim3(static_cast<unsigned>(step_parts(first.hidden_size)),
           static_cast<unsigned>((rows + rows_of_block - 1) / rows_of_block), static_cast<unsigned>(args.count));
  config.block = dim3(kStepThreads);
  config.stream = stream;
  config.dependent = dependent;
  return instance(config, rows_of_block == kStepRowsFew, first.rows.options);
}

template <typename T>
cudaError_t step_forward(const StepSides<StepForward<T>>& args, bool dependent, cudaStream_t stream) {
  return start_step(args, dependent, stream, [&](LaunchConfig& config, bool few, bool options) {
    config.dynamic_shared =
        few ? ForwardTile<T, kStepRowsFew>::kSharedBytes : ForwardTile<T, kStepRowsMany>::kSharedBytes;
    if (few) {
      return launch(options ? step_forward_kernel<T, true, kStepRowsFew> : step_forward_kernel<T, false, kStepRowsFew>,
                    config, args);
    }
    return launch(options ? step_forward_kernel<T, true, kStepRowsMany> : step_forward_kernel<T, false, kStepRowsMany>,
                  config, args);
  });
}

template <typename T>
cudaError_t step_backward(const StepSides<StepBackward<T>>& args, bool dependent, cudaStream_t stream) {
  using D = typename Types<T>::Gradient;
  return start_step(args, dependent, stream, [&](LaunchConfig& config, bool few, bool options) {
    config.dynamic_shared =
        few ? BackwardTile<D, kStepRowsFew>::kSharedBytes : BackwardTile<D, kStepRowsMany>::kSharedBytes;
    if (few) {
      return launch(
          options ? step_backward_kernel<T, true, kStepRowsFew> : step_backward_kernel<T, false, kStepRowsFew>, config,
          args);
    }
    return launch(
        options ? step_backward_kernel<T, true, kStepRowsMany> : step_backward_kernel<T, false, kStepRowsMany>, config,
        args);
  });
}

}  // namespace lstm_ext::cuda

#define LSTM_EXT_STEP(T)                                                                                              \
  namespace lstm_ext::cuda {                                                                                          \
  template cudaError_t step_forward<T>(const StepSides<StepForward<T>>& args, bool dependent, cudaStream_t stream);   \
  template cudaError_t step_backward<T>(const StepSides<StepBackward<T>>& args, bool dependent, cudaStream_t stream); \
  }
