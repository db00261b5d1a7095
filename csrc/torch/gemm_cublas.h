// Matrix products by cuBLAS, with torch's own handle and workspace.
#pragma once

#include "torch/gemm.h"

namespace lstm_ext {

// cuBLAS on the current device and stream, as torch has set it up.
void* cublas_handle();

// In the order of the stream; waits for nothing. Not at::mm, for three reasons: whether TF32 may be used is asked of
// the setting for RNNs and not of the one for matmul, 16-bit operands get a float32 result, and a step's product costs
// the host a fraction.
void gemm_cublas(const Gemm& gemm, void* handle);

}  // namespace lstm_ext
