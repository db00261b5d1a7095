// The four gates of some hidden units, in registers.
#pragma once

#include "cpu/isa.h"

#include "contract/cell.h"
#include "cpu/simd.h"

namespace lstm_ext::cpu::LSTM_EXT_ISA {
namespace {

using cell::Gate, cell::kI, cell::kF, cell::kG, cell::kO, cell::kGates;

template <typename T>
struct Gates {
  Reg<T> gate[kGates];

  LSTM_EXT_INLINE Reg<T>& operator[](int i) { return gate[i]; }
  LSTM_EXT_INLINE const Reg<T>& operator[](int i) const { return gate[i]; }
};

// Loads `lanes` units of a gate row; `at` points to the first of them in the first gate.
template <typename T>
LSTM_EXT_INLINE Gates<T> load_gates(const T* at, int64_t hidden_size, int lanes) {
  Gates<T> gates;
#pragma GCC unroll kGates
  for (int i = 0; i < kGates; ++i) gates[i] = load_lanes<T>(at + i * hidden_size, lanes);
  return gates;
}
template <typename T, typename Registers>
LSTM_EXT_INLINE void store_gates(T* at, const Registers& gates, int64_t hidden_size, int lanes) {
#pragma GCC unroll kGates
  for (int i = 0; i < kGates; ++i) store_lanes<T>(at + i * hidden_size, gates[i], lanes);
}

}  // namespace
}  // namespace lstm_ext::cpu::LSTM_EXT_ISA
