// Matrix products by cuBLAS, with torch's own handle and workspace.
#pragma once

#include "torch/gemm.h"

namespace lstm_ext {

// cuBLAS on the current device and stream, as torch has set it up.
void* cublas_handle();

// Runs in the order of the stream and waits for nothing. It is not at::mm, for three reasons: the setting for RNNs and
// not the one for matmul decides whether TF32 may be used, 16-bit operands get a float32 result, and a step's product
// costs the host a fraction.
void gemm_cublas(const Gemm& gemm, void* handle);

}  // namespace lstm_ext
