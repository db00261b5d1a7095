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

// Without a matrix unit, whose limits are the processor's: see capability.cpp.
template <typename T>
constexpr Kernels<T> kKernels{Simd<T>::kLanes,   kTileRows,       UnitLimits{},         &plan_forward<T>,
                              &plan_backward<T>, &plan_frozen<T>, &sums_gradients_once, &forward<T>,
                              &backward<T>,      &freeze<T>,      &multiplies_bytes};

}  // namespace
}  // namespace lstm_ext::cpu::LSTM_EXT_ISA

// Ends a kernels_*.cpp: defines one of the functions that kernels.h declares.
#define LSTM_EXT_DEFINE_KERNELS(function, T)                          \
  namespace lstm_ext::cpu {                                           \
  const Kernels<T>* function() { return &LSTM_EXT_ISA::kKernels<T>; } \
  }                                                                   \
  LSTM_EXT_END_OF_TARGET
