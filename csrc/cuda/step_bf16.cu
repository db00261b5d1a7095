#include "cuda/step_launch.cuh"

LSTM_EXT_STEP(__nv_bfloat16)

namespace lstm_ext::cuda {

// All kernels are compiled for the same architectures.
bool step_kernels_wait() {
  static const bool wait = is_compiled_for_sm90(step_forward_kernel<__nv_bfloat16, false, kStepRowsFew>);
  return wait;
}

StepOccupancy step_occupancy(bool has_clusters) {
  using T = __nv_bfloat16;
  constexpr unsigned kBlocks = 8;
  constexpr size_t kFewBytes = ForwardTile<T, kStepRowsFew>::kSharedBytes;
  StepOccupancy result;
  result.few = blocks_at_once(step_forward_kernel<T, false, kStepRowsFew>, kStepThreads, kFewBytes);
  result.many = blocks_at_once(step_forward_kernel<T, false, kStepRowsMany>, kStepThreads,
                               ForwardTile<T, kStepRowsMany>::kSharedBytes);
  if (has_clusters) {
    result.clusters = clusters_at_once(step_forward_kernel<T, false, kStepRowsFew>, kStepThreads, kFewBytes, kBlocks);
  }
  return result;
}

}  // namespace lstm_ext::cuda
