// One call of a layer, described once for the operators, the Python functions and both backends.
//
// D directions, T time steps, B sequences, I input features, H hidden units, P output features (see contract/layer.h).
// Packed data has N = sum(batch_sizes) rows in place of (T, B). A tensor that is absent is undefined.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <array>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "contract/params.h"
#include "contract/visibility.h"

namespace lstm_ext {

// The options of a layer beyond torch.nn.LSTM; lstm_ext/reference.py has the equations. Nothing set is the plain layer.
struct LayerOptions {
  // Resets: the flags of the rows whose state is replaced before a step, bool (T, B), or (N) if packed. The reverse
  // direction is cut between the same two steps. The replacing states are (D, B, P) and (D, B, H); absent means zeros.
  at::Tensor resets, reset_h, reset_c;
  // (B), int64 on the input's device: the number of steps that count, for each row. Not with packed input.
  at::Tensor lengths;
  // (D, B, P) of LayerSizes::sum_type: h_{t-1} is multiplied by it before its product with weight_hh.
  at::Tensor recurrent_mask;
  // Zoneout: the flags of the elements that keep their previous state, bool (D, T, B, P) and (D, T, B, H), or with N in
  // place of T, B. Without flags, the share that is kept.
  at::Tensor keep_h, keep_c;
  double zoneout_h = 0, zoneout_c = 0;
  // Layer normalisation: for each direction gain_ih (4H), gain_hh (4H), gain_c (H)[, bias_c (H)] if has_bias.
  std::vector<at::Tensor> norm;
  // The parameters of the cell for each direction, those of peepholes: weight_ci, weight_cf, weight_co, (H) each.
  std::vector<at::Tensor> cell;
  // Frozen weights: the results of freeze_weights for each direction, which the forward pass reads in place of the
  // weights; see torch/frozen.h. Such a layer has no backward pass.
  std::vector<at::Tensor> frozen;
  double cell_clip = 0;        // the bound of |c_t|; 0 without one
  bool coupled_gates = false;  // f = 1 - i
  // The functions of i, f and o, of g, and of c_t in h_t: three names, each with its numbers in brackets, as in
  // "hard_sigmoid(0.2,0.5) tanh tanh". Empty for sigmoid, tanh and tanh.
  std::string activations;
  double preactivation_clip = 0;  // the bound of what the functions of the gates take; 0 without one
  bool return_cell_states = false, return_gates = false;
  // Save no gates: the backward pass recomputes them. Not with return_gates, not with layer normalisation, and on CUDA
  // with none of peepholes, activations and preactivation_clip.
  bool recompute = false;
};

// Visits each option with its name, in the order of the operators' schemas: visit(name, option), where option is a
// Tensor, a list of them, a double, a bool or a string. Leaves out recompute, which no operator has.
template <typename Options, typename Visit>
void visit_options(Options& options, const Visit& visit) {
  visit("resets", options.resets);
  visit("reset_h", options.reset_h);
  visit("reset_c", options.reset_c);
  visit("lengths", options.lengths);
  visit("recurrent_mask", options.recurrent_mask);
  visit("keep_h", options.keep_h);
  visit("keep_c", options.keep_c);
  visit("zoneout_h", options.zoneout_h);
  visit("zoneout_c", options.zoneout_c);
  visit("norm", options.norm);
  visit("peephole", options.cell);
  visit("frozen", options.frozen);
  visit("cell_clip", options.cell_clip);
  visit("coupled_gates", options.coupled_gates);
  visit("activations", options.activations);
  visit("preactivation_clip", options.preactivation_clip);
  visit("return_cell_states", options.return_cell_states);
  visit("return_gates", options.return_gates);
}

// The functions of LayerOptions::activations: of i, f and o, of g, and of c_t. Raises an error that names the option.
LSTM_EXT_PUBLIC std::array<cell::Activation<double>, 3> read_activations(const std::string& text);
// gate(z) and so on for a whole tensor.
at::Tensor activation_of(const cell::Activation<double>& activation, const at::Tensor& z);

// The options of the cell of a direction, for the kernels. `parameters` are LayerOptions::cell in the type T,
// contiguous; see cell::Options for `exact_gates`. A clip that T cannot hold is the next one that it can.
template <typename T>
cell::Options<T> cell_options(const LayerOptions& options, const std::vector<at::Tensor>& parameters, int64_t direction,
                              bool exact_gates) {
  using Limits = std::numeric_limits<T>;
  const auto bound = [](double clip) {
    return clip == 0 ? T(0) : static_cast<T>(std::clamp<double>(clip, Limits::min(), Limits::max()));
  };
  cell::Options<T> cell{};
  cell.clip = bound(options.cell_clip);
  cell.coupled = options.coupled_gates;
  cell.exact_gates = exact_gates;
  cell.preactivation_clip = bound(options.preactivation_clip);
  cell.other_activations = !options.activations.empty();
  if (cell.other_activations) {
    const auto functions = read_activations(options.activations);
    cell::Activation<T>* const of_cell[] = {&cell.gate_activation, &cell.candidate_activation, &cell.output_activation};
    for (int n = 0; n < 3; ++n) {
      *of_cell[n] = {functions[n].function, static_cast<T>(functions[n].alpha), static_cast<T>(functions[n].beta)};
    }
  }
  for (int n = 0; n < cell::kParameters && !parameters.empty(); ++n) {
    cell.parameters[n] = static_cast<const T*>(parameters[direction * cell::kParameters + n].const_data_ptr());
  }
  return cell;
}
inline bool has_cell_options(const LayerOptions& options) {
  return !options.cell.empty() || options.cell_clip != 0 || options.coupled_gates || !options.activations.empty() ||
         options.preactivation_clip != 0;
}

// Combines several functions into one overloaded visitor.
template <typename... Functions>
struct Overloaded : Functions... {
  using Functions::operator()...;
};
template <typename... Functions>
Overloaded(Functions...) -> Overloaded<Functions...>;

struct LayerCall {
  at::Tensor input;   // (T, B, I), any strides; packed (N, I)
  at::Tensor h0, c0;  // (D, B, P) and (D, B, H); absent means zeros
  // For each direction, in torch's order: weight_ih (4H, I), weight_hh (4H, P), [bias_ih (4H), bias_hh (4H)] if
  // has_bias, [weight_hr (P, H)] with a projection.
  std::vector<at::Tensor> weights;
  at::Tensor batch_sizes;  // (T), int64 on the CPU, as in a PackedSequence; absent for dense data
  bool has_bias = true, bidirectional = false;
  LayerOptions options;
};

// The tensors that a forward pass saves for the backward pass: of sum_type, or, as noted, of gates_type (see
// LayerSizes). LayerSizes::empty_saved has the sizes. Absent if the layer does not need them.
struct Saved {
  at::Tensor gates;   // (D, T, B, 4H), gates_type: gate values on the CPU, preactivations on CUDA; not with recompute
  at::Tensor cells;   // (D, T, B, H): c_t
  at::Tensor hidden;  // (D, T, B, H), gates_type: o * tanh(c_t), with a projection; not with recompute
  // With layer normalisation: the normalised products (2 D, T, B, 4H), gates_type, those of the input before those of
  // h; and the factors of the centred products, (D, T, B, 2).
  at::Tensor norm_products, norm_factors;

  // Visits each tensor.
  template <typename Self, typename Visit>
  static void visit(Self& saved, const Visit& visit) {
    visit(saved.gates);
    visit(saved.cells);
    visit(saved.hidden);
    visit(saved.norm_products);
    visit(saved.norm_factors);
  }
};

// The results of a layer, in the dtype of the input; `saved` only on request.
struct LayerResults {
  at::Tensor output;    // (T, B, D P), packed (N, D P)
  at::Tensor h_n, c_n;  // (D, B, P) and (D, B, H)
  Saved saved;
  // With return_cell_states (D, T, B, H), with return_gates (D, T, B, H, 4). The backends leave them undefined:
  // lstm_layer_forward computes them from `saved`, and they may share its memory.
  at::Tensor cell_states{}, gate_values{};
};

// The gradients of the results of a forward pass; absent means zeros.
struct ResultGradients {
  at::Tensor output, h_n, c_n;
  // lstm_layer_backward takes these two in the shapes of the results: (D, T, B, H) and (D, T, B, H, 4), of the input's
  // dtype. It passes them to the backends in the shapes of the saved tensors: `cells` like Saved::cells, `gate_values`
  // (D, T, B, 4H), like Saved::gates.
  at::Tensor cells, gate_values;
};

// Visits the inputs that have a gradient, in the order of all lists of gradients.
template <typename Call, typename Options, typename Visit>
void visit_inputs(Call& call, Options& options, const Visit& visit) {
  visit(call.input);
  visit(call.h0);
  visit(call.c0);
  for (auto&& weight : call.weights) visit(weight);
  visit(options.reset_h);
  visit(options.reset_c);
  for (auto&& parameter : options.norm) visit(parameter);
  for (auto&& parameter : options.cell) visit(parameter);
}
template <typename Visit>
void visit_inputs(const LayerCall& call, const Visit& visit) {
  visit_inputs(call, call.options, visit);
}

// One value for each tensor of a call that has a gradient.
template <typename Value, typename Values>
struct PerInput {
  Value input{}, h0{}, c0{};
  Values weights;
  Value reset_h{}, reset_c{};
  Values norm, cell;

  // The same with lists as long as those of a call.
  static PerInput of(const LayerCall& call) {
    PerInput values;
    values.weights.resize(call.weights.size());
    values.norm.resize(call.options.norm.size());
    values.cell.resize(call.options.cell.size());
    return values;
  }
};
// The requested gradients as flags, and as tensors: undefined if not requested.
using NeedsGrad = PerInput<bool, std::vector<bool>>;
using LayerGradients = PerInput<at::Tensor, std::vector<at::Tensor>>;

// Reads a list of flags in the order of visit_inputs.
LSTM_EXT_PUBLIC NeedsGrad read_needs_grad(const LayerCall& call, const std::vector<bool>& flags);
// The gradients as a list in the order of visit_inputs.
LSTM_EXT_PUBLIC std::vector<at::Tensor> list_gradients(LayerGradients gradients);

// Computes one layer, both directions, all time steps, on the device of the input. Both functions check their
// arguments.
// float32 and float64 are computed in their own type. For bfloat16 and float16, everything between the arguments and
// the results is float32.
LSTM_EXT_PUBLIC LayerResults lstm_layer_forward(const LayerCall& call, bool save);
LSTM_EXT_PUBLIC LayerGradients lstm_layer_backward(const LayerCall& call, ResultGradients grads,
                                                   const at::Tensor& output, const Saved& saved,
                                                   const NeedsGrad& needs_grad);

// The same with autograd, for plain tensors that no mode and no transform intercepts. In a step, the input and the
// states have no time axis, (B, I), (B, H) and (B, H), and so have h_n and c_n; there is no other result.
LSTM_EXT_PUBLIC LayerResults eager_layer(LayerCall call, bool step);

// Whether no compiler, tracer, transform or dispatch mode intercepts calls, as far as C++ knows: is_plain_eager of
// lstm_ext/layer/tracing.py. Autocast does not count.
LSTM_EXT_PUBLIC bool is_plain_context();

// Computes the gradients of a layer if they must be differentiable themselves, or are not plain tensors: list_gradients
// of lstm_layer_backward.
using DifferentiableBackward =
    std::function<std::vector<at::Tensor>(const LayerCall& call, const ResultGradients& grads, const at::Tensor& output,
                                          const Saved& saved, const std::vector<bool>& needs_grad)>;
LSTM_EXT_PUBLIC void set_differentiable_backward(DifferentiableBackward function);

}  // namespace lstm_ext
