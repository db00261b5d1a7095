// AVX-512 (F, BW, DQ, VL).
#include <sched.h>

#include <cstdint>
#include <type_traits>
#include <utility>

#include "cpu/kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define LSTM_EXT_SET_AVX512
#define LSTM_EXT_SET_NAME "avx512"
#define LSTM_EXT_SET_NAMESPACE avx512
#define LSTM_EXT_SET_FUNCTION capability_avx512

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif

#include "cpu/kernel_set.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else
namespace lstm_ext::cpu {
const Capability* capability_avx512() { return nullptr; }
}  // namespace lstm_ext::cpu
#endif
