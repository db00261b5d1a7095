// The parameters of the CPU kernels: every pointer of one direction of one layer, in elements of T. Plain data, no
// torch.
#pragma once

#include "contract/layer.h"

namespace lstm_ext {

// A (T, B, n) array whose innermost axis is contiguous; strides in elements, never negative. For packed data (see
// LayerShape) an (N, n) array with the row stride stride_b; stride_t is not used.
template <typename T>
struct Sequence {
  T* data;
  int64_t stride_t;
  int64_t stride_b;
};

// The state that resets put in place of the previous one; null means zeros.
template <typename T>
struct ResetState {
  const T* h;  // (B, P) contiguous
  const T* c;  // (B, H) contiguous
};

// The parameters of layer normalisation; all null without it, otherwise only bias_c may be null.
template <typename T>
struct LayerNorm {
  const T* gain_ih;  // (4H), of W x
  const T* gain_hh;  // (4H), of U h
  const T* gain_c;   // (H), of c
  const T* bias_c;   // (H)
  bool carries;      // LayerOptions::norm_cell
};

namespace cell {

// The functions that a cell may have in place of sigmoid and tanh: those of ONNX's LSTM.
enum class Function : int32_t {
  kSigmoid,
  kTanh,
  kAffine,           // alpha z + beta
  kRelu,             // max(z, 0)
  kLeakyRelu,        // z, below 0 alpha z
  kThresholdedRelu,  // z, up to alpha 0
  kElu,              // z, below 0 alpha (e^z - 1)
  kScaledTanh,       // alpha tanh(beta z)
  kHardSigmoid,      // alpha z + beta, at least 0 and at most 1
  kSoftsign,         // z / (1 + |z|)
  kSoftplus,         // log(1 + e^z)
};

// Only kAffine may have a negative alpha. So the slope of each function follows from its value.
template <typename T>
struct Activation {
  Function function;
  T alpha, beta;
};

// The options of a cell, see contract/cell.h. Nothing set is the plain cell.
enum Parameter { kPeepholeI, kPeepholeF, kPeepholeO, kParameters };
template <typename T>
struct Options {
  const T* parameters[kParameters];  // (H) each; those of the peepholes are all null without them
#define BOUND(name) T name;
#include "contract/options.def"
#define CELL_FLAG(name) bool name;
#include "contract/options.def"
  // Whether the backward pass has the gate values of the forward pass to the last bit. Only then it can tell a c_t on
  // the edge of the clip that was clipped from one that was not. Otherwise neither of them passes a gradient on.
  bool exact_gates;
  // Whether an activation differs from the plain cell's: sigmoid for i, f and o, tanh for g and c_t. If none differs,
  // nothing reads the activations below.
  bool other_activations;
  Activation<T> gate_activation, candidate_activation, output_activation;  // for i, f and o; for g; for c_t in h_t

  LSTM_EXT_CONTRACT_INLINE bool peepholes() const { return parameters[kPeepholeI] != nullptr; }
  LSTM_EXT_CONTRACT_INLINE bool any() const {
#define BOUND(name) || name != 0
#define CELL_FLAG(name) || name
    return peepholes() || other_activations
#include "contract/options.def"
        ;
  }
};

}  // namespace cell

// The options that change the equations of a step. Nothing set is the plain layer.
template <typename T>
struct StepOptions {
  const T* recurrent_mask;  // (B, P) contiguous: h_{t-1} is multiplied by it before the product with U; or null
  Zoneout<T> zoneout_h;     // keep: (T, B, P) contiguous
  Zoneout<T> zoneout_c;     // keep: (T, B, H) contiguous
  LayerNorm<T> norm;
  cell::Options<T> cell;

  LSTM_EXT_CONTRACT_INLINE bool normalised() const { return norm.gain_ih != nullptr; }
  LSTM_EXT_CONTRACT_INLINE bool any() const {
    return recurrent_mask || zoneout_h.active() || zoneout_c.active() || normalised() || cell.any();
  }
};

// The number type of a weight: T, or fewer bits. Each row of an int8 weight has a factor.
enum class WeightKind : int32_t { kOwn, kBFloat16, kInt8, kFloat16 };

// Weights are contiguous, in torch's layout. Null where the layer has none.
template <typename T>
struct LayerWeights {
  const T* weight_ih;  // (4H, I)
  const T* weight_hh;  // (4H, P)
  const T* bias_ih;    // (4H) or null
  const T* bias_hh;    // (4H) or null
  const T* weight_hr;  // (P, H) or null
  // In place of weight_ih and weight_hh, where these are in bfloat16 or float16.
  struct {
    const void* weight_ih = nullptr;
    const void* weight_hh = nullptr;
    WeightKind kind = WeightKind::kOwn;
  } narrow{};
};

template <typename T>
struct NarrowPanels {
  const void* data = nullptr;
  WeightKind kind = WeightKind::kOwn;
  const T* factors = nullptr;  // (4H)
};

// The weights of a direction in the layout that products read, prepared once for many calls.
template <typename T>
struct FrozenWeights {
  struct Gates {  // a weight (4H, n)
    const T* panels;
    NarrowPanels<T> narrow;  // in place of `panels`
    const uint16_t* bf16;    // null without a tile engine
    const uint8_t* all_split;
  };
  Gates input, recurrent;
  const T* projection_panels;
  const T* bias;  // (4H), the sum of both
  int bf16_parts;
  bool gru;  // while they are packed, from weights (3H, n); see cell::GruRow
};

// The parameters of a layer that both passes take.
template <typename T>
struct LayerParams {
  LayerShape shape;
  LayerWeights<T> weights;
  Sequence<const T> input;  // (T, B, I)
  const T* h0;              // (B, P) contiguous; null means zeros
  const T* c0;              // (B, H) contiguous; null means zeros
  ResetState<T> reset_state;
  StepOptions<T> options;
  // The precision of operands on a tile engine: each is the sum of this many bfloat16 numbers. 3 cover all 24 bits of a
  // float32, 2 cover 16, 1 covers 8; 0: no product runs on the engine. Products outside the tile engine use T.
  int bf16_parts;
  const FrozenWeights<T>* frozen;  // or null; a forward pass then reads these in place of the weights
};

template <typename T>
struct ForwardParams : LayerParams<T> {
  Sequence<T> output;  // (T, B, P); also read back as h_{t-1}
  T* h_n;              // (B, P) contiguous
  T* c_n;              // (B, H) contiguous; holds the running cell state in inference
  // Saved for the backward pass; all null in inference. Contiguous, no aliasing with the above.
  T* gate_values;  // (T, B, 4H)
  T* cells;        // (T, B, H) c_t
  T* hidden;       // (T, B, H) o * tanh(c) before the projection; null without one
  // With layer normalisation, else null: normalised W x and U h, before their gains, and 1 / their standard deviations.
  T* norm_input;      // (T, B, 4H)
  T* norm_recurrent;  // (T, B, 4H)
  T* norm_factors;    // (T, B, 2)

  // The input part of all steps. It shares the place of the gate values, which replace it. Null in inference.
  LSTM_EXT_CONTRACT_INLINE T* kept_input_part() const { return this->options.normalised() ? norm_input : gate_values; }
};

template <typename T>
struct BackwardParams : LayerParams<T> {
  Sequence<const T> output;
  // Same as in ForwardParams. If gate_values and hidden are null, they are recomputed, which reads the biases; layer
  // normalisation needs them saved.
  const T* gate_values;
  const T* cells;
  const T* hidden;
  const T* norm_input;
  const T* norm_recurrent;
  const T* norm_factors;
  Sequence<const T> grad_output;  // (T, B, P); data null means zeros
  // Incoming gradients of c_t and of the gate values when they are returned to the caller; null means zero.
  const T* grad_cells;        // (T, B, H) contiguous
  const T* grad_gate_values;  // (T, B, 4H) contiguous
  const T* grad_h_n;          // (B, P) contiguous or null
  const T* grad_c_n;          // (B, H) contiguous or null
  T* grad_c;                  // (B, H) running gradient of the cell state; ends as that of c0
  // Requested gradients; null where not requested.
  Sequence<T> grad_input;      // (T, B, I)
  bool accumulate_grad_input;  // add to what is there (second direction of a layer)
  T* grad_h0;                  // (B, P) contiguous
  T* grad_reset_h;             // (B, P) contiguous; written, not accumulated
  T* grad_reset_c;             // (B, H) contiguous; the same
  // (4H, I) and (4H, P), contiguous, like the weights; written, not accumulated. The numbers are of T, or of 16 bits in
  // a call that writes each of them once.
  void* grad_weight_ih;
  void* grad_weight_hh;
  WeightKind kind_of_weight_grads = WeightKind::kOwn;
  T* grad_bias;                     // (4H), the gradient of either bias
  T* grad_weight_hr;                // (P, H)
  T* grad_gain_ih;                  // (4H)
  T* grad_gain_hh;                  // (4H)
  T* grad_gain_c;                   // (H)
  T* grad_bias_c;                   // (H)
  T* grad_cell[cell::kParameters];  // (H) each
};

}  // namespace lstm_ext
