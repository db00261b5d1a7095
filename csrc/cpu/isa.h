// The instruction set that a translation unit is compiled for. A kernels_*.cpp defines one of LSTM_EXT_ISA_AVX512,
// LSTM_EXT_ISA_AVX2 and LSTM_EXT_ISA_NEON before it includes a header of the kernels; each of
// these includes this file first.
//
// The linker merges inline functions of several objects and may keep the copy that an older CPU cannot run. So
// everything that is compiled for a raised target lives in an anonymous namespace, inside LSTM_EXT_ISA, which gives
// disassembly and profiles a name, and calls nothing inline with external linkage that is compiled for that target.
// That is why all other headers that the kernels use are included here, before the target is raised: a header of the
// kernels includes headers of the kernels only. test_no_newer_instructions_outside_the_sets looks at the result.
#pragma once

#if defined(__aarch64__)
#include <arm_neon.h>
#else
#include <immintrin.h>
#endif
#include <sched.h>

#include <cstdint>
#include <type_traits>
#include <utility>

#include "contract/layer.h"
#include "contract/params.h"
#include "contract/steps.h"
#include "cpu/kernels.h"
#include "cpu/plan.h"

#define LSTM_EXT_INLINE inline __attribute__((always_inline))
#define LSTM_EXT_LAMBDA_INLINE __attribute__((always_inline))

// Clang wants the target taken back at the end.
#if defined(__clang__) && (defined(LSTM_EXT_ISA_AVX512) || defined(LSTM_EXT_ISA_AVX2))
#define LSTM_EXT_END_OF_TARGET _Pragma("clang attribute pop")
#else
#define LSTM_EXT_END_OF_TARGET
#endif

// LSTM_EXT_ISA: the namespace. From here on the translation unit is compiled for the target.
#if defined(LSTM_EXT_ISA_AVX512)  // F, BW, DQ, VL

#define LSTM_EXT_ISA avx512
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif

#elif defined(LSTM_EXT_ISA_AVX2)  // and FMA, F16C

#define LSTM_EXT_ISA avx2
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#elif defined(LSTM_EXT_ISA_NEON)  // which every AArch64 CPU has

#define LSTM_EXT_ISA neon

#elif defined(LSTM_EXT_ISA_SOFTWARE)  // plain C++; for tests with registers of 16 numbers and a tile engine

#define LSTM_EXT_ISA software

#else
#error "define LSTM_EXT_ISA_AVX512 or another, as the kernels_*.cpp do"
#endif
