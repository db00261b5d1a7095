// Every x86-64 CPU: SSE2.
#include <sched.h>

#include <cstdint>
#include <type_traits>
#include <utility>

#include "cpu/kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define LSTM_EXT_SET_BASELINE
#define LSTM_EXT_SET_NAME "baseline"
#define LSTM_EXT_SET_NAMESPACE baseline
#define LSTM_EXT_SET_FUNCTION capability_baseline

#include "cpu/kernel_set.h"

#else
namespace lstm_ext::cpu {
const Capability* capability_baseline() { return nullptr; }
}  // namespace lstm_ext::cpu
#endif
