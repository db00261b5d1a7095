// Matrix products by cuBLAS, with torch's own handle and workspace.
#pragma once

#include "torch/gemm.h"

namespace lstm_ext {

// cuBLAS on the current device and stream, with torch's settings.
void* cublas_handle();

// Runs in stream order and waits for nothing. It replaces at::mm for three reasons: TF32 follows the setting for RNNs
// and not the one for matmul, 16-bit operands get a float32 result, and a step's product costs the host a fraction.
void gemm_cublas(const Gemm& gemm, void* handle);

}  // namespace lstm_ext
