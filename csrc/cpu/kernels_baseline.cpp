// Every x86-64 CPU: SSE2.
#include "cpu/kernels.h"

#if defined(__x86_64__)

#define LSTM_EXT_ISA_BASELINE
#include "cpu/kernel_set.h"

namespace lstm_ext::cpu {
const Capability* capability_baseline() {
  static constexpr Capability capability{LSTM_EXT_ISA_NAME, baseline::kKernels<float>, baseline::kKernels<double>};
  return &capability;
}
}  // namespace lstm_ext::cpu

#else
namespace lstm_ext::cpu {
const Capability* capability_baseline() { return nullptr; }
}  // namespace lstm_ext::cpu
#endif
