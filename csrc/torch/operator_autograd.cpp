// The registered operators as autograd sees them. Everything here goes through the dispatcher, so it is traced by
// torch.compile, torch.export and make_fx, and serves every device that has the kernels underneath.

// GCC 12 takes Function::apply's std::vector<bool>::reserve, of a vector that is empty then, for an overflow.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Warray-bounds"
#pragma GCC diagnostic ignored "-Wstringop-overflow"
#endif

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>

#include "torch/operators.h"

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

// Whether autograd has anything to do with a tensor. A tangent counts: forward mode must end in an error, not be lost.
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

// Visits what the backward pass takes of a call.
template <typename Call, typename Visit>
void visit_call(Call& call, const Visit& visit) {
  visit("input", call.input);
  visit("h0", call.h0);
  visit("c0", call.c0);
  visit("weights", call.weights);
  visit("batch_sizes", call.batch_sizes);
  visit("has_bias", call.has_bias);
  visit("bidirectional", call.bidirectional);
  visit_options(call.options, visit);
}

class LSTMLayer : public torch::autograd::Function<LSTMLayer> {
 public:
  // The backward pass is made of calls through the dispatcher: compiled autograd may trace it.
  static constexpr bool is_traceable = true;

  // Takes the arguments off the stack and leaves the results there. Returns those that have a gradient: output, h_n,
  // c_n, and, where requested, cell_states and gate_values.
  static variable_list forward(AutogradContext* ctx, const at::TensorList& /*edges*/, const LayerCall& call,
                               Stack& stack) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    forward_op().callBoxed(stack);
    const at::ArrayRef<IValue> returned = torch::jit::last(stack, kResults + kSaved);
    const LayerOptions& options = call.options;
    variable_list saved;
    saved.reserve(kResults + kSaved + call.weights.size() + options.norm.size());
    // Flags, and how many tensors there are of each kind: a string, which compiled autograd takes for a constant.
    std::string counts;
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
                                [&](const char*, bool flag) { save_count(flag); }});
    saved.push_back(returned[0].toTensor());
    for (const IValue& value : returned.slice(kResults)) save_if(value.toTensor().dim() > 1, value.toTensor());
    ctx->save_for_backward(std::move(saved));
    ctx->set_materialize_grads(false);
    ctx->saved_data["counts"] = std::move(counts);

    variable_list results;
    for (size_t i = 0; i < kResults; ++i) {
      if (has_gradient(options, i)) results.push_back(returned[i].toTensor());
    }
    torch::jit::drop(stack, kSaved);
    return results;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    auto next = saved.begin();
    const std::string& counts = ctx->saved_data["counts"].toStringRef();
    auto next_count = counts.begin();
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
                                [&](const char*, bool& flag) { flag = take_count() != 0; }});
    const Tensor output = *next++;
    Saved saved_results;
    Saved::visit(saved_results, take_if_present);

    // Edges of the graph lead to the tensors that were there, and to no others.
    size_t edges = 0;
    bool any_needed = false;
    c10::List<bool> needs_grad;
    visit_inputs(call, [&](const Tensor& tensor) {
      const bool needed = tensor.defined() && ctx->needs_input_grad(edges++);
      needs_grad.push_back(needed);
      any_needed |= needed;
    });
    // One for every argument of forward: those after the edges have none.
    variable_list result(edges + 2);
    bool any_given = false;
    for (const Tensor& grad : grads) any_given |= grad.defined();
    if (!any_needed || !any_given) return result;

    Stack stack;
    push_call(call, stack);
    auto grad = grads.begin();
    for (size_t i = 0; i < kResults; ++i) {
      stack.push_back(has_gradient(options, i) ? tensor_or_none(*grad++) : IValue());
    }
    stack.emplace_back(output);
    Saved::visit(saved_results, [&](const Tensor& tensor) { stack.push_back(tensor_or_none(tensor)); });
    stack.emplace_back(needs_grad);
    backward_op().callBoxed(stack);
    const std::vector<Tensor> computed = stack.back().toTensorVector();
    size_t input = 0, edge = 0;
    visit_inputs(call, [&](const Tensor& tensor) {
      if (tensor.defined()) {
        if (needs_grad[input]) result[edge] = computed[input];
        ++edge;
      }
      ++input;
    });
    return result;
  }

  // Whether result number i has a gradient: what was not requested has no elements, and none.
  static bool has_gradient(const LayerOptions& options, size_t i) {
    return i < 3 || (i == 3 ? options.return_cell_states : options.return_gates);
  }
};

// The forward and backward operators, which are the two ends of LSTMLayer: differentiated, they say that they have no
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
  variable_list edges;
  edges.reserve(5 + call.weights.size() + call.options.norm.size());
  visit_inputs(call, [&](const Tensor& tensor) {
    if (tensor.defined()) edges.push_back(tensor);
  });
  variable_list results = LSTMLayer::apply(at::TensorList(edges), call, *stack);
  auto next = results.begin();
  for (size_t i = 0; i < kResults; ++i) {
    if (LSTMLayer::has_gradient(call.options, i)) torch::jit::peek(*stack, i, kResults) = std::move(*next++);
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
