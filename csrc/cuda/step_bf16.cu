#include "cuda/step_launch.cuh"

LSTM_EXT_STEP(__nv_bfloat16)

namespace lstm_ext::cuda {

// All kernels are compiled for the same architectures.
bool step_kernels_wait() { return is_compiled_for_sm90(step_forward_kernel<__nv_bfloat16, false, kStepRowsFew>); }

StepOccupancy step_occupancy() {
  using T = __nv_bfloat16;
  StepOccupancy result;
  result.few = blocks_at_once(step_forward_kernel<T, false, kStepRowsFew>, kStepThreads,
                              ForwardTile<T, kStepRowsFew>::kSharedBytes);
  result.many = blocks_at_once(step_forward_kernel<T, false, kStepRowsMany>, kStepThreads,
                               ForwardTile<T, kStepRowsMany>::kSharedBytes);
  return result;
}

}  // namespace lstm_ext::cuda
