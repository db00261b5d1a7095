// AVX-512 with BF16, in float32; float64 has no use for it, and takes the kernels of AVX-512.
#include "cpu/kernels.h"

#if defined(__x86_64__)

#define LSTM_EXT_ISA_AVX512_BF16
#include "cpu/kernel_set.h"

namespace lstm_ext::cpu {
const Kernels<float>* kernels_avx512_bf16() { return &avx512_bf16::kKernels<float>; }
}  // namespace lstm_ext::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else
namespace lstm_ext::cpu {
const Kernels<float>* kernels_avx512_bf16() { return nullptr; }
}  // namespace lstm_ext::cpu
#endif
