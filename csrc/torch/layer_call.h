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
#include <type_traits>
#include <vector>

#include "contract/params.h"
#include "contract/visibility.h"

namespace lstm_ext {

// The kinds of options, for code that does not know them one by one.
enum OptionKind : unsigned {
  kInput = 1,        // tensors that have a gradient
  kStep = 2,         // changes a step beyond its cell
  kCell = 4,         // makes the cell another one than the plain cell
  kWeights = 8,      // stands in for the weights
  kNoOperator = 16,  // unknown to the registered operators
  kOther = 32,
};

// The options of a layer: contract/options.def describes each.
struct LayerOptions {
#define OPTION(type, name, kind) type name{};
#include "contract/options.def"
};

// Visits each option of the kinds with its name, in the order of the operators' schemas: visit(name, option), where
// option is a Tensor, a list of them, a double, a bool or a string.
template <unsigned kKinds = ~0u, typename Options, typename Visit>
void visit_options(Options& options, const Visit& visit) {
#define OPTION(type, name, kind) \
  if constexpr (((kind) & kKinds) != 0) visit(#name, options.name);
#include "contract/options.def"
}

// Whether an option of these kinds is set. kCell: the cell is not the plain one.
template <unsigned kKinds>
bool has_options(const LayerOptions& options) {
  bool found = false;
  visit_options<kKinds>(options, [&](const char*, const auto& option) {
    using Option = std::decay_t<decltype(option)>;
    if constexpr (std::is_arithmetic_v<Option>) {
      found |= option != 0;
    } else if constexpr (std::is_same_v<Option, at::Tensor>) {
      found |= option.defined();
    } else {
      found |= !option.empty();
    }
  });
  return found;
}

// The functions of LayerOptions::activations: of i, f and o, of g, and of c_t. Raises an error that names the option.
LSTM_EXT_PUBLIC std::array<cell::Activation<double>, 3> read_activations(const std::string& text);

// The options of the cell of a direction, for the kernels. Those of `options` that are tensors are contiguous, in the
// type T; see cell::Options for `exact_gates`. A clip that T cannot hold is the next one that it can.
template <typename T>
cell::Options<T> cell_options(const LayerOptions& options, int64_t direction, bool exact_gates) {
  using Limits = std::numeric_limits<T>;
  const auto bound = [](double clip) {
    return clip == 0 ? T(0) : static_cast<T>(std::clamp<double>(clip, Limits::min(), Limits::max()));
  };
  cell::Options<T> cell{};
#define BOUND(name) cell.name = bound(options.name);
#define CELL_FLAG(name) cell.name = options.name;
#include "contract/options.def"
  cell.exact_gates = exact_gates;
  cell.other_activations = !options.activations.empty();
  if (cell.other_activations) {
    const auto functions = read_activations(options.activations);
    cell::Activation<T>* const of_cell[] = {&cell.gate_activation, &cell.candidate_activation, &cell.output_activation};
    for (int n = 0; n < 3; ++n) {
      *of_cell[n] = {functions[n].function, static_cast<T>(functions[n].alpha), static_cast<T>(functions[n].beta)};
    }
  }
  for (int n = 0; n < cell::kParameters && !options.peephole.empty(); ++n) {
    cell.parameters[n] = static_cast<const T*>(options.peephole[direction * cell::kParameters + n].const_data_ptr());
  }
  return cell;
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

// Visits each field of a call with its name, in the order of the operators' schemas, as visit_options.
template <unsigned kKinds = ~0u, typename Call, typename Visit>
void visit_call(Call& call, const Visit& visit) {
  visit("input", call.input);
  visit("h0", call.h0);
  visit("c0", call.c0);
  visit("weights", call.weights);
  visit("batch_sizes", call.batch_sizes);
  visit("has_bias", call.has_bias);
  visit("bidirectional", call.bidirectional);
  visit_options<kKinds>(call.options, visit);
}

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

// The gradients of a call are a call, too: each is in the place of its input, and undefined if it is not requested.
using LayerGradients = LayerCall;

// Visits the inputs that have a gradient, in the order of all lists of gradients: visit(input, its gradient).
template <typename Call, typename Gradients, typename Visit>
void visit_inputs(Call& call, Gradients& grads, const Visit& visit) {
  const auto each = [&](auto& input, auto& grad) {
    if constexpr (std::is_same_v<std::decay_t<decltype(input)>, at::Tensor>) {
      visit(input, grad);
    } else {
      for (size_t i = 0; i < input.size(); ++i) visit(input[i], grad[i]);
    }
  };
  each(call.input, grads.input);
  each(call.h0, grads.h0);
  each(call.c0, grads.c0);
  each(call.weights, grads.weights);
#define OPTION(type, name, kind) \
  if constexpr (((kind) & kInput) != 0) each(call.options.name, grads.options.name);
#include "contract/options.def"
}
// visit(input), or visit(gradient).
template <typename Call, typename Visit>
void visit_inputs(Call& call, const Visit& visit) {
  visit_inputs(call, call, [&](auto& input, auto&) { visit(input); });
}

// The requested gradients: make(input, its number) makes one.
template <typename Make>
LayerGradients make_gradients(const LayerCall& call, const std::vector<bool>& needs_grad, const Make& make) {
  LayerGradients grads;
  grads.has_bias = call.has_bias;
  grads.weights.resize(call.weights.size());
#define TENSORS(name, kind) grads.options.name.resize(call.options.name.size());
#include "contract/options.def"
  size_t number = 0;
  visit_inputs(call, grads, [&](const at::Tensor& input, at::Tensor& grad) {
    if (needs_grad[number]) grad = make(input, number);
    ++number;
  });
  return grads;
}

// Computes one layer, both directions, all time steps, on the device of the input. Both functions check their
// arguments.
// `needs_grad` says which inputs of visit_inputs need a gradient; the gradients are in the same order.
// float32 and float64 are computed in their own type. For bfloat16 and float16, everything between the arguments and
// the results is float32.
LSTM_EXT_PUBLIC LayerResults lstm_layer_forward(const LayerCall& call, bool save);
LSTM_EXT_PUBLIC std::vector<at::Tensor> lstm_layer_backward(const LayerCall& call, ResultGradients grads,
                                                            const at::Tensor& output, Saved saved,
                                                            const std::vector<bool>& needs_grad);

// The same with autograd, for plain tensors that no mode and no transform intercepts. In a step, the input and the
// states have no time axis, (B, I), (B, H) and (B, H), and so have h_n and c_n; there is no other result.
LSTM_EXT_PUBLIC LayerResults eager_layer(LayerCall call, bool step);

// Whether no compiler, tracer, transform or dispatch mode intercepts calls, as far as C++ knows: is_plain_eager of
// lstm_ext/layer/tracing.py. Autocast does not count.
LSTM_EXT_PUBLIC bool is_plain_context();

// Computes the gradients of a layer if they must be differentiable themselves, or are not plain tensors: as
// lstm_layer_backward.
using DifferentiableBackward =
    std::function<std::vector<at::Tensor>(const LayerCall& call, const ResultGradients& grads, const at::Tensor& output,
                                          const Saved& saved, const std::vector<bool>& needs_grad)>;
LSTM_EXT_PUBLIC void set_differentiable_backward(DifferentiableBackward function);

}  // namespace lstm_ext
