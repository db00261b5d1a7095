#include "cuda/step_launch.cuh"

LSTM_EXT_STEP(__nv_bfloat16)

namespace lstm_ext::cuda {

// All kernels are compiled for the same architectures.
bool step_kernels_wait() {
  static const bool wait = is_compiled_for_sm90(step_forward_kernel<__nv_bfloat16, false, kStepRowsFew>);
  return wait;
}

}  // namespace lstm_ext::cuda
