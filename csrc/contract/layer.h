// The shape of a layer and its names, for the kernels of both backends. Plain data: no torch, no backend.
//
// Notation: T time steps, B batch rows, I input features, H hidden units, P output features (P = proj_size with a
// projection, else P = H). The gates are in torch's order i, f, g, o. A gate row is 4H numbers, one gate after the
// other: [i(0..H) | f(0..H) | g(0..H) | o(0..H)].
//
// Names, the same on both backends: preactivations are W x_t + b + U h_{t-1}; gate values are i, f, g, o after the
// nonlinearities; `grad_preactivations` and `grad_gate_values` are dL/d of each. "Before" and "after" a step follow the
// direction of the layer: in the reverse direction the step before time t is at time t + 1.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define LSTM_EXT_CONTRACT_INLINE __host__ __device__ inline __attribute__((always_inline))
#else
// Always inlined: the CPU kernels compile these for several instruction sets, and the linker would keep one copy.
#define LSTM_EXT_CONTRACT_INLINE inline __attribute__((always_inline))
#endif

namespace lstm_ext {

// One direction of one layer.
struct LayerShape {
  int64_t steps;        // T >= 1
  int64_t batch;        // B >= 1
  int64_t input_size;   // I >= 1
  int64_t hidden_size;  // H >= 1
  int64_t output_size;  // P; < H with a projection, else == H
  bool projected;
  bool reverse;  // time runs from T - 1 to 0
  // Null for dense data. Otherwise the data is packed, as in torch's PackedSequence: the B sequences are sorted by
  // falling length, and a step has a row for each sequence that is still running. Row b of step t is row
  // step_offsets[t] + b of N = step_offsets[T] rows; there are T + 1 offsets. Where a comment says (T, B, n), read
  // (N, n). A sequence begins from h0 and c0 at its first step in the layer's direction, and h_n and c_n are its
  // states after its last one.
  const int64_t* step_offsets;
  // Null, or (T, B) contiguous, as the caller gave them: a flag that is not 0 cuts the row between the times t - 1 and
  // t. `Steps` says which flags belong to a step in either direction.
  const uint8_t* resets;
  bool two_directions = false;  // the layer is bidirectional, so nobody calls it step by step
};

// The rows whose state is replaced before a step: row b if b < rows and flags[b] is not 0.
struct ResetFlags {
  const uint8_t* flags;  // null if rows is 0
  int64_t rows;

  LSTM_EXT_CONTRACT_INLINE bool any() const { return rows > 0; }
  LSTM_EXT_CONTRACT_INLINE bool operator[](int64_t b) const { return b < rows && flags[b] != 0; }
};

// Zoneout: which part of the previous state is kept. With `keep`, element by element: the previous value is kept where
// the flag is not 0. Without it, every element keeps the same share.
template <typename Accumulate>
struct Zoneout {
  const uint8_t* keep;
  Accumulate share;

  LSTM_EXT_CONTRACT_INLINE bool active() const { return keep != nullptr || share != 0; }
};

// Layer normalisation divides by sqrt(variance + this).
constexpr double kLayerNormEpsilon = 1e-5;

}  // namespace lstm_ext
