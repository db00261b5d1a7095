// The kernels of one instruction set. A kernels_*.cpp defines LSTM_EXT_SET_..., LSTM_EXT_SET_NAME,
// LSTM_EXT_SET_NAMESPACE and LSTM_EXT_SET_FUNCTION, includes every header below the kernels, raises the
// compiler's target and includes this file once.
//
// Everything lives in an anonymous namespace and calls nothing inline with external linkage that is
// compiled after the target is raised: the linker merges such functions across objects, and might
// keep the copy an older CPU cannot run. test_baseline_contains_no_newer_instructions looks. The
// namespace of the set around it gives disassembly and profiles a name.
#pragma once

#define LSTM_EXT_INLINE inline __attribute__((always_inline))
#define LSTM_EXT_LAMBDA_INLINE __attribute__((always_inline))

namespace lstm_ext::cpu {
namespace LSTM_EXT_SET_NAMESPACE {
namespace {

// The order is that of use.
#include "cpu/simd.h"
#include "cpu/vector_math.h"
#include "cpu/tile.h"
#include "cpu/pack.h"
#include "cpu/row_major.h"
#include "cpu/barrier.h"
#include "cpu/steps.h"
#include "cpu/gate_product.h"
#include "cpu/step_extras.h"
#include "cpu/forward.h"
#include "cpu/forward_extras.h"
#include "cpu/weight_gradient.h"
#include "cpu/backward_buffers.h"
#include "cpu/backward.h"
#include "cpu/backward_extras.h"
#include "cpu/rebuild.h"

template <typename T>
constexpr Kernels<T> kKernels{Simd<T>::kLanes, kTileRows, &forward<T>, &backward<T>};

constexpr Capability kCapability{LSTM_EXT_SET_NAME, kKernels<float>, kKernels<double>};

}  // namespace
}  // namespace LSTM_EXT_SET_NAMESPACE

const Capability* LSTM_EXT_SET_FUNCTION() { return &LSTM_EXT_SET_NAMESPACE::kCapability; }

}  // namespace lstm_ext::cpu
