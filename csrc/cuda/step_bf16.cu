#include "cuda/step_launch.cuh"

LSTM_EXT_STEP(__nv_bfloat16)

namespace lstm_ext::cuda {

// All kernels are compiled for the same architectures.
bool step_kernels_wait() { return is_compiled_for_sm90(step_forward_kernel<__nv_bfloat16, false, kStepRowsFew>); }

}  // namespace lstm_ext::cuda
