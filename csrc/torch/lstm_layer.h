// One layer of an LSTM, both directions, all time steps, on at::Tensor.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace lstm_ext {

using OptionalTensor = std::optional<at::Tensor>;

// What a layer does beyond torch.nn.LSTM; the equations are in lstm_ext/reference.py. Absent means: does not.
struct Extras {
  // Where the state of a row is replaced before a step: bool (T, B), or (N) if packed, True where it is; in the reverse
  // direction the cut is between the same two steps. By what: (D, B, P) and (D, B, H), absent means zeros.
  OptionalTensor resets, reset_h, reset_c;
  // (B), int64 on the input's device: how many steps of a row count. Only of dense input.
  OptionalTensor lengths;
  // (D, B, P) of sum_type (see LayerSizes): what h_{t-1} is multiplied by before its product with weight_hh.
  OptionalTensor recurrent_mask;
  // Zoneout: where the state before is kept, bool (D, T, B, P) and (D, T, B, H), or with N in place of T, B. Without
  // it, the share that is kept.
  OptionalTensor kept_h, kept_c;
  double zoneout_h = 0, zoneout_c = 0;
  // Layer normalisation: a set per direction of gain_ih (4H), gain_hh (4H), gain_c (H)[, bias_c (H)] if has_bias.
  std::vector<at::Tensor> norm;
  // Of the gates, save nothing: the backward pass computes them again. Not with layer normalisation.
  bool recompute = false;
};

// input (T, B, I), any strides; h0 (D, B, P) and c0 (D, B, H), absent means zeros; weights of the
// layer in torch's order, a set per direction: weight_ih (4H, I), weight_hh (4H, P),
// [bias_ih (4H), bias_hh (4H)] if has_bias, [weight_hr (P, H)] with a projection.
// With batch_sizes (T), int64 on the CPU, the input is packed as in torch's PackedSequence: (N, I), the
// B = batch_sizes[0] sequences sorted by falling length, N the sum of batch_sizes.
// Returns output (T, B, D*P), or (N, D*P) if packed, h_n (D, B, P), c_n (D, B, H), and, if `save`, what
// backward needs: gates (D, T, B, 4H), cells (D, T, B, H), [hidden (D, T, B, H)] with a projection, with layer
// normalisation the normalised products, (2 D, T, B, 4H), those of the input before those of h, and what they were
// multiplied by, (D, T, B, 2); if packed, N in place of T, B. With extras.recompute only the cells.
// float32 and float64 are computed in themselves; of bfloat16 and float16 everything between the
// arguments and the results is float32, what is saved included.
std::tuple<at::Tensor, at::Tensor, at::Tensor, std::vector<at::Tensor>> lstm_layer_forward(
    const at::Tensor& input, const OptionalTensor& h0, const OptionalTensor& c0, const std::vector<at::Tensor>& weights,
    const OptionalTensor& batch_sizes, bool has_bias, bool bidirectional, const Extras& extras, bool save);

// Gradients in the order input, h0, c0, *weights, and, where `wanted` has entries for them, reset_h, reset_c, *norm;
// undefined where `wanted` is false. An absent gradient of an output means zeros; grad_gates and grad_cells are
// those of the values of the gates and of c_t, which a loss may see too; in the shapes of what is saved of them.
std::vector<at::Tensor> lstm_layer_backward(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                                            const OptionalTensor& grad_c_n, const at::Tensor& input,
                                            const OptionalTensor& h0, const OptionalTensor& c0,
                                            const std::vector<at::Tensor>& weights, const OptionalTensor& batch_sizes,
                                            const at::Tensor& output, const std::vector<at::Tensor>& saved,
                                            bool has_bias, bool bidirectional, const Extras& extras,
                                            const std::vector<bool>& wanted, const OptionalTensor& grad_gates = {},
                                            const OptionalTensor& grad_cells = {});

}  // namespace lstm_ext
