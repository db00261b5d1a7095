// The table of the kernels of one instruction set; see isa.h.
#pragma once

#include "cpu/isa.h"

#if !defined(LSTM_EXT_INFERENCE_ONLY)
#include "cpu/backward.h"
#endif
#include "cpu/forward.h"
#include "cpu/tile_engine.h"
#include "cpu/simd.h"
#include "cpu/tile.h"

namespace lstm_ext::cpu::LSTM_EXT_ISA {
namespace {

// A worker's part of a pass. Only a wait at a barrier can fail.
template <auto kPass, typename Params, typename Plan>
const char* part_of(const Params& params, const Plan& plan, char* workspace, int worker) {
  return error_of([&] { kPass(params, plan, workspace, worker); });
}

#if defined(LSTM_EXT_INFERENCE_ONLY)  // for the C library: a third of the code
template <typename T>
constexpr decltype(Kernels<T>::backward) kBackward = nullptr;
#else
template <typename T>
constexpr decltype(Kernels<T>::backward) kBackward = &part_of<&backward<T>, BackwardParams<T>, BackwardPlan>;
#endif

// Without a tile engine, whose limits are the processor's: see capability.cpp.
template <typename T>
constexpr Kernels<T> kKernels{
    Simd<T>::kLanes,   kTileRows,       EngineLimits{},       &plan_forward<T>,
    &plan_backward<T>, &plan_frozen<T>, &sums_gradients_once, &part_of<&forward<T>, ForwardParams<T>, ForwardPlan>,
    kBackward<T>,      &freeze<T>,      &multiplies_int8};

}  // namespace
}  // namespace lstm_ext::cpu::LSTM_EXT_ISA

// Ends a kernels_*.cpp: defines one of the functions that kernels.h declares.
#define LSTM_EXT_DEFINE_KERNELS(function, T)                          \
  namespace lstm_ext::cpu {                                           \
  const Kernels<T>* function() { return &LSTM_EXT_ISA::kKernels<T>; } \
  }                                                                   \
  LSTM_EXT_END_OF_TARGET
