// A layer for autograd, in two forms. The registered operators go through the dispatcher and are traced by
// torch.compile, torch.export and make_fx. For plain tensors the kernels are called directly. Both serve every device
// that has kernels.

// GCC 12 mistakes std::vector<bool>::reserve of an empty vector, in Function::apply, for an overflow.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Warray-bounds"
#pragma GCC diagnostic ignored "-Wstringop-overflow"
#endif

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/custom_function.h>

#include "torch/checks.h"
#include "torch/operators.h"

// Declared in ATen/functorch/DynamicLayer.h, which includes headers that torch does not install.
namespace at::functorch {
TORCH_API at::Tensor unwrapIfDead(const at::Tensor& tensor);
}

namespace lstm_ext::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

OperatorHandle find(const char* name) { return c10::Dispatcher::singleton().findSchemaOrThrow(name, ""); }
const OperatorHandle& forward_op() {
  static const OperatorHandle op = find("lstm_ext::lstm_layer_forward");
  return op;
}
const OperatorHandle& backward_op() {
  static const OperatorHandle op = find("lstm_ext::lstm_layer_backward");
  return op;
}

// Whether autograd tracks a tensor. A tangent counts: forward mode must raise an error, not be lost.
bool is_tracked(const Tensor& t) {
  if (!t.defined() || !t.unsafeGetTensorImpl()->autograd_meta()) return false;
  return (at::GradMode::is_enabled() && t.requires_grad()) || t._fw_grad(/*level=*/0).defined();
}
bool is_tracked(at::ArrayRef<IValue> values) {
  for (const IValue& value : values) {
    if (value.isTensor() ? is_tracked(value.toTensor()) : value.isTensorList() && is_tracked(value.toListRef())) {
      return true;
    }
  }
  return false;
}

variable_list tensors_in(at::ArrayRef<IValue> values) {
  variable_list tensors;
  for (const IValue& value : values) {
    if (value.isTensor() && value.toTensor().defined()) tensors.push_back(value.toTensor());
    if (value.isTensorList()) {
      for (const IValue& element : value.toListRef()) tensors.push_back(element.toTensor());
    }
  }
  return tensors;
}

// How a layer runs; stored as a digit in the saved string.
enum class Route : char { kOperators = '0', kKernels = '1', kStepOfKernels = '2' };

DifferentiableBackward& differentiable_backward() {
  static DifferentiableBackward function;
  return function;
}

Tensor with_time(const Tensor& t) { return t.defined() ? t.unsqueeze(0) : t; }
Tensor without_time(const Tensor& t) { return t.defined() ? t.squeeze(0) : t; }
// Turns a step into a sequence of one step.
LayerCall with_time(LayerCall call) {
  for (Tensor* t : {&call.input, &call.h0, &call.c0}) *t = with_time(*t);
  return call;
}

// Removes the time axis from the states after a step. Not as views, which autograd would track.
void drop_time(LayerResults& results) {
  for (Tensor* t : {&results.h_n, &results.c_n}) {
    t->unsafeGetTensorImpl()->set_sizes_contiguous(t->sizes().slice(1).vec());
  }
}

// Whether only the kernels handle a computation on these tensors, whose gradients are not requested.
bool is_plain(const Tensor& t) {
  // functorch's key is not in this set: without a transform in the context, its wrappers are of one that is over.
  constexpr c10::DispatchKeySet kOthers({c10::DispatchKey::Python, c10::DispatchKey::Functionalize});
  return !t.defined() || (!t.key_set().has_any(kOthers) && !is_tracked(t));
}

class LSTMLayer : public torch::autograd::Function<LSTMLayer> {
 public:
  // Compiled autograd may trace the backward pass: only plain tensors bypass the dispatcher.
  static constexpr bool is_traceable = true;

  // Returns the results that have a gradient: output, h_n, c_n, and, if requested, cell_states and gate_values; for a
  // step h_n and c_n. All of them are in `results`; the operators' results are pushed on the stack.
  static variable_list forward(AutogradContext* ctx, const at::TensorList& /*edges*/, const LayerCall& call,
                               Route route, LayerResults& results, Stack* stack) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    if (route == Route::kOperators) {
      forward_op().callBoxed(*stack);
      auto next = torch::jit::last(*stack, kResults + kSaved).begin();
      const auto take = [&](Tensor& tensor) { tensor = (next++)->toTensor(); };
      for (Tensor* t : {&results.output, &results.h_n, &results.c_n, &results.cell_states, &results.gate_values})
        take(*t);
      Saved::visit(results.saved, take);
      torch::jit::drop(*stack, kSaved);
    } else {
      results = lstm_layer_forward(route == Route::kStepOfKernels ? with_time(call) : call, /*save=*/true);
    }
    const LayerOptions& options = call.options;
    variable_list saved;
    saved.reserve(kResults + kSaved + call.weights.size() + options.norm.size());
    // The route, flags, and the number of tensors of each kind: a string, which compiled autograd treats as a constant.
    std::string counts(1, static_cast<char>(route));
    const auto save_count = [&](size_t count) { counts.push_back(static_cast<char>('0' + count)); };
    const auto save_if = [&](bool present, const Tensor& tensor) {
      save_count(present);
      if (present) saved.push_back(tensor);
    };
    visit_call(call, Overloaded{[&](const char*, const Tensor& tensor) { save_if(tensor.defined(), tensor); },
                                [&](const char*, const std::vector<Tensor>& tensors) {
                                  save_count(tensors.size());
                                  saved.insert(saved.end(), tensors.begin(), tensors.end());
                                },
                                [&](const char* name, double number) {
                                  if (number != 0) ctx->saved_data[name] = number;
                                },
                                [&](const char* name, const std::string& text) {
                                  if (!text.empty()) ctx->saved_data[name] = text;
                                },
                                [&](const char*, bool flag) { save_count(flag); }});
    saved.push_back(results.output);
    // In place of a tensor that it does not save, an operator has one without elements.
    Saved::visit(results.saved, [&](const Tensor& t) { save_if(t.defined() && t.dim() > 1, t); });
    ctx->save_for_backward(std::move(saved));
    ctx->set_materialize_grads(false);
    ctx->saved_data["counts"] = std::move(counts);

    if (route == Route::kStepOfKernels) {
      drop_time(results);
      return {results.h_n, results.c_n};
    }
    variable_list differentiable{results.output, results.h_n, results.c_n};
    if (options.return_cell_states) differentiable.push_back(results.cell_states);
    if (options.return_gates) differentiable.push_back(results.gate_values);
    return differentiable;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    auto next = saved.begin();
    const std::string& counts = ctx->saved_data["counts"].toStringRef();
    auto next_count = counts.begin();
    const auto route = static_cast<Route>(*next_count++);
    const auto take_count = [&] { return *next_count++ - '0'; };
    const auto take_if_present = [&](Tensor& tensor) {
      if (take_count()) tensor = *next++;
    };
    LayerCall call;
    const LayerOptions& options = call.options;
    visit_call(call, Overloaded{[&](const char*, Tensor& tensor) { take_if_present(tensor); },
                                [&](const char*, std::vector<Tensor>& tensors) {
                                  const auto first = next;
                                  next += take_count();
                                  tensors.assign(first, next);
                                },
                                [&](const char* name, double& number) {
                                  const auto entry = ctx->saved_data.find(name);
                                  if (entry != ctx->saved_data.end()) number = entry->second.toDouble();
                                },
                                [&](const char* name, std::string& text) {
                                  const auto entry = ctx->saved_data.find(name);
                                  if (entry != ctx->saved_data.end()) text = entry->second.toStringRef();
                                },
                                [&](const char*, bool& flag) { flag = take_count() != 0; }});
    const Tensor output = *next++;
    Saved saved_results;
    Saved::visit(saved_results, take_if_present);

    // Edges of the graph lead to the tensors that were given, and to no others.
    size_t edges = 0;
    bool any_needed = false;
    std::vector<bool> needs_grad;
    visit_inputs(call, [&](const Tensor& tensor) {
      const bool needed = tensor.defined() && ctx->needs_input_grad(edges++);
      needs_grad.push_back(needed);
      any_needed |= needed;
    });
    // One gradient for every argument of forward; the arguments after the edges have none.
    variable_list result(edges + 4);
    bool any_given = false;
    for (const Tensor& grad : grads) any_given |= grad.defined();
    if (!any_needed || !any_given) return result;

    ResultGradients given;
    auto grad = grads.begin();
    Tensor* const of_results[] = {&given.output, &given.h_n, &given.c_n, &given.cells, &given.gate_values};
    for (size_t i = 0; i < kResults; ++i) {
      if (has_gradient(options, route, i)) *of_results[i] = *grad++;
    }
    std::vector<Tensor> computed =
        route == Route::kOperators
            ? by_operator(call, of_results, output, saved_results, needs_grad)
            : directly(call, route == Route::kStepOfKernels, std::move(given), output, saved_results, needs_grad);
    size_t input = 0, edge = 0;
    visit_inputs(call, [&](const Tensor& tensor) {
      if (tensor.defined()) {
        if (needs_grad[input]) result[edge] = std::move(computed[input]);
        ++edge;
      }
      ++input;
    });
    return result;
  }

  // Whether result number i has a gradient. A result that was not requested has no elements, and no gradient.
  static bool has_gradient(const LayerOptions& options, Route route, size_t i) {
    if (i == 0) return route != Route::kStepOfKernels;
    return i < 3 || (i == 3 ? options.return_cell_states : options.return_gates);
  }

 private:
  static std::vector<Tensor> by_operator(const LayerCall& call, Tensor* const* grads, const Tensor& output,
                                         const Saved& saved, const std::vector<bool>& needs_grad) {
    Stack stack;
    push_call(call, stack);
    for (size_t i = 0; i < kResults; ++i) stack.push_back(tensor_or_none(*grads[i]));
    stack.emplace_back(output);
    Saved::visit(saved, [&](const Tensor& tensor) { stack.push_back(tensor_or_none(tensor)); });
    c10::List<bool> flags;
    for (const bool needed : needs_grad) flags.push_back(needed);
    stack.emplace_back(std::move(flags));
    backward_op().callBoxed(stack);
    return stack.back().toTensorVector();
  }

  static std::vector<Tensor> directly(const LayerCall& given_call, bool step, ResultGradients grads,
                                      const Tensor& output, const Saved& saved, const std::vector<bool>& needs_grad) {
    bool plain = !at::GradMode::is_enabled() && is_plain_context();
    const auto see = [&](const Tensor& t) { plain = plain && is_plain(t); };
    const LayerCall call = step ? with_time(given_call) : given_call;
    if (step) {
      for (Tensor* t : {&grads.h_n, &grads.c_n}) *t = with_time(*t);
    }
    for (const Tensor* t : {&grads.output, &grads.h_n, &grads.c_n, &grads.cells, &grads.gate_values}) see(*t);
    visit_call(call, Overloaded{[&](const char*, const Tensor& t) { see(t); },
                                [&](const char*, const std::vector<Tensor>& tensors) {
                                  for (const Tensor& t : tensors) see(t);
                                },
                                [](const char*, const auto&) {}});
    std::vector<Tensor> computed = plain ? lstm_layer_backward(call, grads, output, saved, needs_grad)
                                         : differentiable_backward()(call, grads, output, saved, needs_grad);
    if (step) {
      for (int i = 0; i < 3; ++i) computed[i] = without_time(computed[i]);
    }
    // c of the only step does not depend on the projection, so torch gives the projection no gradient.
    const bool only_c = !grads.output.defined() && !grads.h_n.defined();
    if (only_c && !call.batch_sizes.defined() && call.input.size(0) == 1) {
      const auto count = static_cast<int64_t>(call.weights.size());
      const WeightCount weights = count_weights(count, call.has_bias, call.bidirectional);
      for (int64_t i = weights.per_direction - 1; weights.projected && i < count; i += weights.per_direction) {
        computed[3 + i] = Tensor();
      }
    }
    return computed;
  }
};

variable_list edges_of(const LayerCall& call) {
  variable_list edges;
  edges.reserve(5 + call.weights.size() + call.options.norm.size() + call.options.peephole.size());
  visit_inputs(call, [&](const Tensor& tensor) {
    if (tensor.defined()) edges.push_back(tensor);
  });
  return edges;
}

// The forward and backward operators, the two ends of LSTMLayer. Differentiating them raises an error that they have no
// gradient.
class WithoutGradient : public torch::autograd::Function<WithoutGradient> {
 public:
  static variable_list forward(AutogradContext* ctx, const at::TensorList& /*edges*/, const OperatorHandle& op,
                               Stack& stack) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    ctx->saved_data["name"] = op.operator_name().name;
    op.callBoxed(stack);
    return tensors_in(torch::jit::last(stack, op.schema().returns().size()));
  }
  static variable_list backward(AutogradContext* ctx, const variable_list&) {
    TORCH_CHECK(false, ctx->saved_data["name"].toStringRef(),
                " has no gradient of its own. Differentiate lstm_ext::lstm_layer once; for second derivatives, call "
                "the module lstm_ext.LSTM outside of torch.compile and torch.export, which differentiates its backward "
                "pass as well.");
  }
};

void run_below_autograd(const OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  op.redispatchBoxed(keys & c10::after_ADInplaceOrView_keyset, stack);
}

}  // namespace

void layer_autograd(const OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
  const at::ArrayRef<IValue> arguments = arguments_on(op, *stack);
  if (!is_tracked(arguments)) {
    run_below_autograd(op, keys, stack);
    return;
  }
  const IValue* next_argument = arguments.begin();
  const LayerCall call = read_call(next_argument);
  LayerResults all;
  variable_list results = LSTMLayer::apply(at::TensorList(edges_of(call)), call, Route::kOperators, all, stack);
  auto next = results.begin();
  for (size_t i = 0; i < kResults; ++i) {
    if (LSTMLayer::has_gradient(call.options, Route::kOperators, i)) {
      torch::jit::peek(*stack, i, kResults) = std::move(*next++);
    }
  }
}

void layer_ends_autograd(const OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack) {
  const at::ArrayRef<IValue> arguments = arguments_on(op, *stack);
  if (!is_tracked(arguments)) {
    run_below_autograd(op, keys, stack);
    return;
  }
  const variable_list edges = tensors_in(arguments);
  variable_list results = WithoutGradient::apply(at::TensorList(edges), op, *stack);
  const size_t returns = op.schema().returns().size();
  torch::jit::drop(*stack, returns);
  if (returns == 1) {
    stack->emplace_back(std::move(results));
  } else {
    for (Tensor& tensor : results) stack->emplace_back(std::move(tensor));
  }
}

}  // namespace lstm_ext::ops

namespace lstm_ext {

bool is_plain_context() {
  using Key = c10::DispatchKey;
  constexpr c10::DispatchKeySet kOthers({Key::Python, Key::PreDispatch, Key::Functionalize, Key::VmapMode, Key::Tracer,
                                         Key::FuncTorchDynamicLayerFrontMode});
  return !c10::impl::TorchDispatchModeTLS::any_modes_set() &&
         !c10::impl::tls_local_dispatch_key_set().included_.has_any(kOthers);
}

LayerResults eager_layer(LayerCall call, bool step) {
  using ops::LSTMLayer, ops::Route;
  // Unwraps the wrappers of a transform that is over; the edges of the graph are those of the inner tensors.
  const auto unwrap = [](at::Tensor& t) {
    if (t.defined() && t.key_set().has(c10::DispatchKey::FuncTorchGradWrapper)) t = at::functorch::unwrapIfDead(t);
  };
  visit_call(call, Overloaded{[&](const char*, at::Tensor& t) { unwrap(t); },
                              [&](const char*, std::vector<at::Tensor>& tensors) {
                                for (at::Tensor& t : tensors) unwrap(t);
                              },
                              [](const char*, const auto&) {}});
  bool tracked = false;
  if (at::GradMode::is_enabled()) {
    visit_inputs(call, [&](const at::Tensor& t) { tracked = tracked || (t.defined() && t.requires_grad()); });
  }
  LayerResults results;
  if (!tracked) {
    results = lstm_layer_forward(step ? ops::with_time(call) : call, /*save=*/false);
    if (step) ops::drop_time(results);
    return results;
  }
  const torch::autograd::variable_list edges = ops::edges_of(call);
  const Route route = step ? Route::kStepOfKernels : Route::kKernels;
  LSTMLayer::apply(at::TensorList(edges), call, route, results, static_cast<torch::jit::Stack*>(nullptr));
  results.saved = {};
  return results;
}

void set_differentiable_backward(DifferentiableBackward function) {
  ops::differentiable_backward() = std::move(function);
}

}  // namespace lstm_ext
