// The contract between the glue and the kernels: what every pointer holds, in elements of T.
// Plain old data, no torch, no backend. One struct describes one direction of one layer.
//
// Notation: T steps, B batch rows, I input features, H hidden units, P output features
// (P = proj_size with a projection, else P = H). Gates are ordered i, f, g, o as in torch;
// a "gate row" is 4H numbers, gate-major: [i(0..H) | f(0..H) | g(0..H) | o(0..H)].
#pragma once

#include <cstdint>

namespace lstm_ext {

// A (T, B, n) array whose innermost axis is contiguous; strides in elements, never negative. Of packed
// data (see LayerShape) an (N, n) array, whose rows lie stride_b apart; stride_t has no meaning there.
template <typename T>
struct Sequence {
  T* data;
  int64_t stride_t;
  int64_t stride_b;
};

struct LayerShape {
  int64_t steps;        // T >= 1
  int64_t batch;        // B >= 1
  int64_t input_size;   // I >= 1
  int64_t hidden_size;  // H >= 1
  int64_t output_size;  // P; < H with a projection, else == H
  bool projected;
  bool reverse;  // time runs from T-1 to 0
  // Null for dense data. Else the data is packed, as in torch's PackedSequence: the B sequences are
  // sorted by falling length, and only those still running have a row in a step. Row b of step t is
  // row step_offsets[t] + b of N = step_offsets[T] rows in all; there are T + 1 offsets. Wherever a
  // comment below says (T, B, n), read (N, n). A sequence begins from h0 and c0 at its first step in
  // the direction of time, and h_n and c_n are its states after its last one.
  const int64_t* step_offsets;
  // Null, or (T, B) contiguous: not 0 where the state of a row is replaced before the step, in the
  // direction of time. What replaces it is in the params.
  const uint8_t* resets;
};

// The state that replaces others; null means zeros.
template <typename T>
struct ResetState {
  const T* h;  // (B, P) contiguous
  const T* c;  // (B, H) contiguous
};

// Of the state before a step, what is kept: zoneout.
template <typename T>
struct Zoneout {
  // (T, B, P) and (T, B, H) contiguous: not 0 where it is kept. Null: the share below is.
  const uint8_t* kept_h;
  const uint8_t* kept_c;
  T share_h, share_c;

  bool of_h() const { return kept_h || share_h != 0; }
  bool of_c() const { return kept_c || share_c != 0; }
};

// Layer normalisation; all null without it, else bias_c only.
template <typename T>
struct LayerNorm {
  const T* gain_ih;  // (4H), of W x
  const T* gain_hh;  // (4H), of U h
  const T* gain_c;   // (H), of c
  const T* bias_c;   // (H)
};
// What is added to a variance before the root.
constexpr double kLayerNormEpsilon = 1e-5;

// What changes the equations of a step.
template <typename T>
struct StepExtras {
  const T* recurrent_mask;  // (B, P) contiguous: what h_{t-1} is multiplied by before the product with U; or null
  Zoneout<T> zoneout;
  LayerNorm<T> norm;

  bool any() const { return recurrent_mask || zoneout.of_h() || zoneout.of_c() || norm.gain_ih; }
};

// Weights are contiguous, in torch's layout. Null where the layer has none.
template <typename T>
struct LayerWeights {
  const T* weight_ih;  // (4H, I)
  const T* weight_hh;  // (4H, P)
  const T* bias_ih;    // (4H) or null
  const T* bias_hh;    // (4H) or null
  const T* weight_hr;  // (P, H) or null
};

template <typename T>
struct ForwardParams {
  LayerShape shape;
  LayerWeights<T> weights;
  Sequence<const T> input;  // (T, B, I)
  const T* h0;              // (B, P) contiguous; null means zeros
  const T* c0;              // (B, H) contiguous; null means zeros
  ResetState<T> reset_state;
  StepExtras<T> extras;
  Sequence<T> output;  // (T, B, P); also read back as h_{t-1}
  T* h_n;              // (B, P) contiguous
  T* c_n;              // (B, H) contiguous; holds the running cell state in inference
  // What backward needs; all null in inference. Contiguous, no aliasing with the above.
  T* gates;   // (T, B, 4H) i, f, g, o after the nonlinearity
  T* cells;   // (T, B, H) c_t
  T* hidden;  // (T, B, H) o * tanh(c) before the projection; null without one
  // With layer normalisation, else null: W x and U h, normalised, before their gains, and 1 / their standard
  // deviations.
  T* norm_input;      // (T, B, 4H)
  T* norm_recurrent;  // (T, B, 4H)
  T* norm_factors;    // (T, B, 2)
};

template <typename T>
struct BackwardParams {
  LayerShape shape;
  LayerWeights<T> weights;
  Sequence<const T> input;
  const T* h0;
  const T* c0;
  ResetState<T> reset_state;
  StepExtras<T> extras;
  Sequence<const T> output;
  // As in ForwardParams. gates and hidden may be null: they are computed again, for which the biases are read. Not with
  // layer normalisation.
  const T* gates;
  const T* cells;
  const T* hidden;
  const T* norm_input;
  const T* norm_recurrent;
  const T* norm_factors;
  Sequence<const T> grad_output;  // (T, B, P); data null means zeros
  // Of c_t and of the gates themselves, where a loss sees them; null means zeros.
  const T* grad_cells;  // (T, B, H) contiguous
  const T* grad_gates;  // (T, B, 4H) contiguous
  const T* grad_h_n;    // (B, P) contiguous or null
  const T* grad_c_n;    // (B, H) contiguous or null
  T* grad_c;            // (B, H) running gradient of the cell state; ends as that of c0
  // Wanted gradients; null where not wanted.
  Sequence<T> grad_input;      // (T, B, I)
  bool accumulate_grad_input;  // add to what is there (second direction of a layer)
  T* grad_h0;                  // (B, P) contiguous
  T* grad_reset_h;             // (B, P) contiguous; written, not accumulated
  T* grad_reset_c;             // (B, H) contiguous; the same
  T* grad_weight_ih;           // (4H, I) contiguous, like the weights; written, not accumulated
  T* grad_weight_hh;           // (4H, P)
  T* grad_bias;                // (4H), the gradient of either bias
  T* grad_weight_hr;           // (P, H)
  T* grad_gain_ih;             // (4H)
  T* grad_gain_hh;             // (4H)
  T* grad_gain_c;              // (H)
  T* grad_bias_c;              // (H)
};

}  // namespace lstm_ext
