// The table of the kernels of one instruction set; see isa.h.
#pragma once

#include "cpu/isa.h"

#include "cpu/backward.h"
#include "cpu/forward.h"
#include "cpu/matrix_unit.h"
#include "cpu/simd.h"
#include "cpu/tile.h"

namespace lstm_ext::cpu::LSTM_EXT_ISA {
namespace {

template <typename T>
constexpr Kernels<T> kKernels{Simd<T>::kLanes,   kTileRows,       kUnitLimits<T>,       &plan_forward<T>,
                              &plan_backward<T>, &plan_frozen<T>, &sums_gradients_once, &forward<T>,
                              &backward<T>,      &freeze<T>,      &multiplies_bytes};

}  // namespace
}  // namespace lstm_ext::cpu::LSTM_EXT_ISA
