// The registered operators of a layer with extras, as autograd sees them; what differentiable.cpp is to those of the
// plain layer. Everything here goes through the dispatcher.

// GCC 12 takes Function::apply's std::vector<bool>::reserve, of a vector that is empty then, for an overflow.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Warray-bounds"
#pragma GCC diagnostic ignored "-Wstringop-overflow"
#endif

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>

#include "torch/autograd_tracking.h"
#include "torch/extras_operators.h"

namespace lstm_ext::ops {
namespace {

using c10::IValue;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

OperatorHandle find(const char* name) { return c10::Dispatcher::singleton().findSchemaOrThrow(name, ""); }
const OperatorHandle& forward_op() {
  static const OperatorHandle op = find("lstm_ext::lstm_layer_with_extras_forward");
  return op;
}
const OperatorHandle& backward_op() {
  static const OperatorHandle op = find("lstm_ext::lstm_layer_with_extras_backward");
  return op;
}

// Saved tensors may be absent: they are saved as undefined ones.
Tensor or_undefined(const OptionalTensor& t) { return t ? *t : Tensor(); }
OptionalTensor given(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

std::vector<Tensor> tensors_in(at::ArrayRef<IValue> values) {
  std::vector<Tensor> tensors;
  for (const IValue& value : values) {
    if (value.isTensor() && value.toTensor().defined()) tensors.push_back(value.toTensor());
    if (value.isTensorList()) {
      for (const Tensor& t : value.toTensorVector()) tensors.push_back(t);
    }
  }
  return tensors;
}

variable_list present(const std::vector<OptionalTensor>& tensors) {
  variable_list result;
  for (const OptionalTensor& t : tensors) {
    if (t) result.push_back(*t);
  }
  return result;
}

class LSTMLayerWithExtras : public torch::autograd::Function<LSTMLayerWithExtras> {
 public:
  // The backward pass is made of calls through the dispatcher: compiled autograd may trace it.
  static constexpr bool is_traceable = true;

  // Results: output, h_n, c_n, and of cell states and gates what is wanted. `all` gets those of the forward operator.
  static variable_list forward(AutogradContext* ctx, const at::TensorList& /*edges*/, const LayerCall& call,
                               bool return_cell_states, bool return_gates, variable_list& all) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    Stack stack;
    call.push_to(stack);
    torch::jit::push(stack, return_cell_states, return_gates);
    forward_op().callBoxed(stack);
    for (const IValue& value : stack) all.push_back(value.toTensor());

    const Extras& e = call.extras;
    variable_list saved{call.input};
    for (const OptionalTensor& t : {call.h0, call.c0, call.batch_sizes, e.resets, e.reset_h, e.reset_c, e.lengths,
                                    e.recurrent_mask, e.kept_h, e.kept_c}) {
      saved.push_back(or_undefined(t));
    }
    saved.push_back(all[0]);
    saved.insert(saved.end(), all.begin() + kResults, all.end());
    saved.insert(saved.end(), call.weights.begin(), call.weights.end());
    saved.insert(saved.end(), e.norm.begin(), e.norm.end());
    ctx->save_for_backward(std::move(saved));
    ctx->set_materialize_grads(false);
    ctx->saved_data["has_bias"] = call.has_bias;
    ctx->saved_data["bidirectional"] = call.bidirectional;
    ctx->saved_data["zoneout_h"] = e.zoneout_h;
    ctx->saved_data["zoneout_c"] = e.zoneout_c;
    ctx->saved_data["norm_count"] = static_cast<int64_t>(e.norm.size());
    ctx->saved_data["return_cell_states"] = return_cell_states;
    ctx->saved_data["return_gates"] = return_gates;
    variable_list results(all.begin(), all.begin() + 3);
    if (return_cell_states) results.push_back(all[3]);
    if (return_gates) results.push_back(all[4]);
    return results;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto flag = [&](const char* name) { return ctx->saved_data[name].toBool(); };
    const variable_list saved = ctx->get_saved_variables();
    size_t next = 0;
    const auto take = [&] { return given(saved[next++]); };
    LayerCall call{};
    call.input = *take();
    call.has_bias = flag("has_bias");
    call.bidirectional = flag("bidirectional");
    Extras& e = call.extras;
    for (OptionalTensor* t : {&call.h0, &call.c0, &call.batch_sizes, &e.resets, &e.reset_h, &e.reset_c, &e.lengths,
                              &e.recurrent_mask, &e.kept_h, &e.kept_c}) {
      *t = take();
    }
    e.zoneout_h = ctx->saved_data["zoneout_h"].toDouble();
    e.zoneout_c = ctx->saved_data["zoneout_c"].toDouble();
    const auto kept = saved.begin() + static_cast<int64_t>(next);  // output and what the forward operator saved
    const auto weights = kept + 1 + kSaved, norm = saved.end() - ctx->saved_data["norm_count"].toInt();
    call.weights.assign(weights, norm);
    e.norm.assign(norm, saved.end());

    // Edges of the graph lead to the tensors that were there, and to no others.
    size_t edges = 0;
    bool any_wanted = false;
    c10::List<bool> wanted;
    for (const OptionalTensor& t : call.differentiable()) {
      const bool want = t && ctx->needs_input_grad(edges++);
      wanted.push_back(want);
      any_wanted |= want;
    }
    // One for every argument of forward: those after the edges have none.
    variable_list result(edges + 4);
    bool any_given = false;
    for (const Tensor& grad : grads) any_given |= grad.defined();
    if (!any_wanted || !any_given) return result;

    Stack stack;
    call.push_to(stack);
    size_t place = 0;
    const auto push_grad_if = [&](bool there) {
      const OptionalTensor grad = there ? given(grads[place++]) : std::nullopt;
      stack.emplace_back(grad);
    };
    for (int i = 0; i < 3; ++i) push_grad_if(true);
    push_grad_if(flag("return_cell_states"));
    push_grad_if(flag("return_gates"));
    stack.insert(stack.end(), kept, weights);
    stack.emplace_back(wanted);
    backward_op().callBoxed(stack);
    const std::vector<Tensor> computed = stack.back().toTensorVector();
    const std::vector<OptionalTensor> inputs = call.differentiable();
    for (size_t i = 0, edge = 0; i < computed.size(); ++i) {
      if (!inputs[i]) continue;
      if (wanted[i]) result[edge] = computed[i];
      ++edge;
    }
    return result;
  }
};

// The forward and backward operators: asked for a gradient, they say that they have none.
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
    TORCH_CHECK(false, ctx->saved_data["name"].toStringRef(), kNoGradient);
  }
};

}  // namespace

LayerCall LayerCall::of(at::ArrayRef<IValue> arguments) {
  size_t next = 0;
  const auto take = [&]() -> const IValue& { return arguments[next++]; };
  const auto take_tensor = [&] {
    const OptionalTensor t = take().toOptional<Tensor>();
    return t && t->defined() ? t : std::nullopt;
  };
  LayerCall call{};
  call.input = take().toTensor();
  call.h0 = take_tensor();
  call.c0 = take_tensor();
  call.weights = take().toTensorVector();
  call.batch_sizes = take_tensor();
  call.has_bias = take().toBool();
  call.bidirectional = take().toBool();
  Extras& e = call.extras;
  for (OptionalTensor* t : {&e.resets, &e.reset_h, &e.reset_c, &e.lengths, &e.recurrent_mask, &e.kept_h, &e.kept_c}) {
    *t = take_tensor();
  }
  e.zoneout_h = take().toDouble();
  e.zoneout_c = take().toDouble();
  // AOTInductor hands over None for a list without an element.
  if (const IValue& norm = take(); !norm.isNone()) e.norm = norm.toTensorVector();
  return call;
}

void LayerCall::push_to(Stack& stack) const {
  const Extras& e = extras;
  torch::jit::push(stack, input, h0, c0, weights, batch_sizes, has_bias, bidirectional, e.resets, e.reset_h, e.reset_c,
                   e.lengths, e.recurrent_mask, e.kept_h, e.kept_c, e.zoneout_h, e.zoneout_c, e.norm);
}

std::vector<OptionalTensor> LayerCall::differentiable() const {
  std::vector<OptionalTensor> result{input, h0, c0};
  result.insert(result.end(), weights.begin(), weights.end());
  result.push_back(extras.reset_h);
  result.push_back(extras.reset_c);
  result.insert(result.end(), extras.norm.begin(), extras.norm.end());
  return result;
}

void layer_with_extras_autograd(const OperatorHandle& op, Stack* stack) {
  const at::ArrayRef<IValue> arguments = arguments_on(op, *stack);
  if (!is_tracked(tensors_in(arguments))) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    op.callBoxed(stack);
    return;
  }
  const LayerCall call = LayerCall::of(arguments);
  const bool cells = arguments[LayerCall::kArguments].toBool(), gates = arguments[LayerCall::kArguments + 1].toBool();
  torch::jit::drop(*stack, arguments.size());
  variable_list all;
  const variable_list edges = present(call.differentiable());
  const variable_list results = LSTMLayerWithExtras::apply(at::TensorList(edges), call, bool(cells), bool(gates), all);
  // What was not wanted has no elements and no gradient.
  size_t next = 0;
  for (size_t i = 0; i < kResults; ++i) {
    const bool wanted = i < 3 || (i == 3 ? cells : gates);
    stack->emplace_back(wanted ? results[next++] : all[i]);
  }
}

void layer_with_extras_ends_autograd(const OperatorHandle& op, Stack* stack) {
  const std::vector<Tensor> edges = tensors_in(arguments_on(op, *stack));
  if (!is_tracked(edges)) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    op.callBoxed(stack);
    return;
  }
  const bool list = op.schema().returns().size() == 1;
  variable_list results = WithoutGradient::apply(at::TensorList(edges), op, *stack);
  torch::jit::drop(*stack, op.schema().returns().size());
  if (list) {
    stack->emplace_back(results);
  } else {
    for (Tensor& t : results) stack->emplace_back(std::move(t));
  }
}

}  // namespace lstm_ext::ops
