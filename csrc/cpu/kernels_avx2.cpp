// AVX2, FMA and F16C.
#include "cpu/kernels.h"

#if defined(__x86_64__)

#define LSTM_EXT_ISA_AVX2
#include "cpu/kernel_set.h"

namespace lstm_ext::cpu {
const Capability* capability_avx2() {
  static constexpr Capability capability{LSTM_EXT_ISA_NAME, avx2::kKernels<float>, avx2::kKernels<double>};
  return &capability;
}
}  // namespace lstm_ext::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else
namespace lstm_ext::cpu {
const Capability* capability_avx2() { return nullptr; }
}  // namespace lstm_ext::cpu
#endif
