// Schemas and kernels of the registered operators. Their fake kernels are in lstm_ext/layer/operators.py.
#include "torch/operators.h"

#include <ATen/ATen.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <string>
#include <vector>

namespace lstm_ext::ops {
namespace {

// An operator cannot return an undefined tensor, so an absent result is a tensor without elements.
Tensor no_elements(const LayerCall& call, at::ScalarType dtype) {
  if (!call.input.is_cpu()) return at::empty({0}, call.input.options().dtype(dtype));
  // Same as at::empty, in a fraction of the time: every call of a plain layer makes two.
  constexpr c10::DispatchKeySet kKeys(c10::DispatchKey::CPU);
  return at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(c10::Storage::use_byte_size_t(), 0, c10::DataPtr(nullptr, at::kCPU), c10::GetCPUAllocator(),
                   /*resizable=*/true),
      kKeys, caffe2::TypeMeta::fromScalarType(dtype));
}

Tensor or_no_elements(Tensor tensor, const LayerCall& call, at::ScalarType dtype) {
  return tensor.defined() ? std::move(tensor) : no_elements(call, dtype);
}

// Results are contiguous. They share no memory with saved tensors, so that the caller may change them in place.
Tensor as_result(const Tensor& tensor, const LayerCall& call, const Tensor& saved) {
  if (!tensor.defined()) return no_elements(call, call.input.scalar_type());
  const bool shared = saved.defined() && tensor.is_alias_of(saved);
  return shared ? tensor.clone(at::MemoryFormat::Contiguous) : tensor.contiguous();
}

void run_layer(const OperatorHandle& op, Stack* stack) {
  const at::ArrayRef<IValue> arguments = arguments_on(op, *stack);
  const IValue* next = arguments.begin();
  const LayerCall call = read_call(next);
  LayerResults results = lstm_layer_forward(call, /*save=*/false);
  torch::jit::drop(*stack, arguments.size());
  torch::jit::push(*stack, std::move(results.output), std::move(results.h_n), std::move(results.c_n),
                   as_result(results.cell_states, call, {}), as_result(results.gate_values, call, {}));
}

void run_layer_forward(const OperatorHandle& op, Stack* stack) {
  const at::ArrayRef<IValue> arguments = arguments_on(op, *stack);
  const IValue* next = arguments.begin();
  const LayerCall call = read_call(next);
  LayerResults results = lstm_layer_forward(call, /*save=*/true);
  torch::jit::drop(*stack, arguments.size());
  Saved& saved = results.saved;
  torch::jit::push(*stack, std::move(results.output), std::move(results.h_n), std::move(results.c_n),
                   as_result(results.cell_states, call, saved.cells),
                   as_result(results.gate_values, call, saved.gates));
  const at::ScalarType gates_type = saved.gates.scalar_type(), sum_type = saved.cells.scalar_type();
  torch::jit::push(*stack, std::move(saved.gates), std::move(saved.cells),
                   or_no_elements(std::move(saved.hidden), call, gates_type),
                   or_no_elements(std::move(saved.norm_products), call, gates_type),
                   or_no_elements(std::move(saved.norm_factors), call, sum_type));
}

void run_layer_backward(const OperatorHandle& op, Stack* stack) {
  const at::ArrayRef<IValue> arguments = arguments_on(op, *stack);
  const IValue* next = arguments.begin();
  const LayerCall call = read_call(next);
  const auto take = [&] { return tensor_or_undefined(*next++); };
  ResultGradients grads;
  for (Tensor* grad : {&grads.output, &grads.h_n, &grads.c_n, &grads.cells, &grads.gate_values}) *grad = take();
  const Tensor output = take();
  Saved saved;
  Saved::visit(saved, [&](Tensor& tensor) {
    tensor = take();
    // A tensor that the forward operator did not save has no elements, and one axis.
    if (tensor.defined() && tensor.dim() == 1) tensor = Tensor();
  });
  const c10::List<bool> flags = next->toBoolList();
  std::vector<Tensor> gradients =
      lstm_layer_backward(call, std::move(grads), output, saved, std::vector<bool>(flags.begin(), flags.end()));
  for (Tensor& gradient : gradients) {
    if (!gradient.defined()) gradient = no_elements(call, call.input.scalar_type());
  }
  torch::jit::drop(*stack, arguments.size());
  stack->emplace_back(std::move(gradients));
}

constexpr unsigned kOfOperators = ~kNoOperator;

// The common first arguments of all schemas.
std::string call_arguments() {
  std::string text =
      "Tensor input, Tensor? h0, Tensor? c0, Tensor[] weights, Tensor? batch_sizes, bool has_bias, "
      "bool bidirectional, *";
  const auto add = [&](const char* type, const char* name, const char* value) {
    text += std::string(", ") + type + " " + name + "=" + value;
  };
  const LayerOptions nothing_set;
  visit_options<kOfOperators>(
      nothing_set, Overloaded{[&](const char* name, const Tensor&) { add("Tensor?", name, "None"); },
                              [&](const char* name, const std::vector<Tensor>&) { add("Tensor[]?", name, "None"); },
                              [&](const char* name, double) { add("float", name, "0."); },
                              [&](const char* name, bool) { add("bool", name, "False"); },
                              [&](const char* name, const std::string&) { add("str", name, "\"\""); }});
  return text;
}

}  // namespace

void implement(torch::Library& m) {
  m.impl("lstm_layer", torch::CppFunction::makeFromBoxedFunction<&run_layer>());
  m.impl("lstm_layer_forward", torch::CppFunction::makeFromBoxedFunction<&run_layer_forward>());
  m.impl("lstm_layer_backward", torch::CppFunction::makeFromBoxedFunction<&run_layer_backward>());
}

LayerCall read_call(const IValue*& next) {
  LayerCall call;
  visit_call<kOfOperators>(call, Overloaded{[&](const char*, Tensor& t) { t = tensor_or_undefined(*next++); },
                                            [&](const char*, std::vector<Tensor>& tensors) {
                                              if (const IValue& value = *next++; !value.isNone())
                                                tensors = value.toTensorVector();
                                            },
                                            [&](const char*, double& number) { number = (next++)->toDouble(); },
                                            [&](const char*, bool& flag) { flag = (next++)->toBool(); },
                                            [&](const char*, std::string& text) { text = (next++)->toStringRef(); }});
  return call;
}

void push_call(const LayerCall& call, Stack& stack) {
  visit_call<kOfOperators>(call, Overloaded{[&](const char*, const Tensor& t) { stack.push_back(tensor_or_none(t)); },
                                            [&](const char*, const std::vector<Tensor>& tensors) {
                                              stack.push_back(tensors.empty() ? IValue() : IValue(tensors));
                                            },
                                            [&](const char*, const auto& value) { stack.emplace_back(value); }});
}

// torch.compile caches graphs on disk and identifies operators by name. An operator whose results change their meaning
// has to get a new name, and so has an operator whose derivative does.
TORCH_LIBRARY(lstm_ext, m) {
  // If an operator runs on fake or meta tensors without the fake kernels, the error names this module to import.
  m.set_python_module("lstm_ext.layer.operators");
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  const auto define = [&](const char* name, const std::string& more_arguments, const std::string& results) {
    m.def((name + ("(" + call_arguments()) + more_arguments + ") -> " + results).c_str(), tags);
  };
  const std::string results = "Tensor output, Tensor h_n, Tensor c_n, Tensor cell_states, Tensor gate_values";
  define("lstm_layer", "", "(" + results + ")");
  define("lstm_layer_forward", "",
         "(" + results + ", Tensor gates, Tensor cells, Tensor hidden, Tensor norm_products, Tensor norm_factors)");
  // The result is never a list of one, which inductor's C++ wrapper would take for a tensor.
  define("lstm_layer_backward",
         ", Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor? grad_cell_states, "
         "Tensor? grad_gate_values, Tensor output, Tensor gates, Tensor cells, Tensor? hidden, Tensor? norm_products, "
         "Tensor? norm_factors, bool[] needs_grad",
         "Tensor[]");
}

TORCH_LIBRARY_IMPL(lstm_ext, CPU, m) { implement(m); }

TORCH_LIBRARY_IMPL(lstm_ext, Autograd, m) {
  m.impl("lstm_layer", torch::CppFunction::makeFromBoxedFunction<&layer_autograd>());
  m.impl("lstm_layer_forward", torch::CppFunction::makeFromBoxedFunction<&layer_ends_autograd>());
  m.impl("lstm_layer_backward", torch::CppFunction::makeFromBoxedFunction<&layer_ends_autograd>());
}

}  // namespace lstm_ext::ops
