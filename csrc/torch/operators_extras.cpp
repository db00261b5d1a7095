// The registered operators of a layer with extras, beside those of the plain layer in ops.cpp, which keep their
// schemas: graphs on disk know them by name. No Python in here either. Shapes and fake kernels: lstm_ext/ops.py.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "torch/extras_operators.h"
#include "torch/tensors.h"

namespace lstm_ext::ops {
namespace {

using c10::IValue;

// Which rows count (T, B, 1), of padded data.
Tensor count_mask(const Tensor& lengths, int64_t time) {
  return at::arange(time, lengths.options()).unsqueeze(1).lt(lengths).unsqueeze(2);
}

// On CUDA what is saved of the gates is their pre-activations: i, f, g and o of them.
std::vector<Tensor> activated(const Tensor& gates) {
  std::vector<Tensor> parts = gates.chunk(4, -1);
  for (size_t k = 0; k < 4; ++k) parts[k] = k == 2 ? parts[k].tanh() : parts[k].sigmoid();
  return parts;
}

// The gates as results, (..., H, 4), of those that were saved, (..., 4H).
Tensor gate_values(const LayerCall& call, const Tensor& saved) {
  Tensor values = saved;
  if (saved.is_cuda()) {
    values = at::cat(activated(in_type(saved, saved.scalar_type() == at::kDouble ? at::kDouble : at::kFloat)), -1);
    if (call.extras.lengths) values = values.where(count_mask(*call.extras.lengths, call.input.size(0)), 0);
  }
  values = values.unflatten(-1, {4, values.size(-1) / 4}).transpose(-1, -2);
  return in_type(values, call.input.scalar_type()).contiguous();
}

// The gradient of the gates as results, as the kernels take it: (..., 4H).
Tensor saved_gates_gradient(const Tensor& grad, const Tensor& saved) {
  return in_type(grad.transpose(-1, -2).flatten(-2), saved.scalar_type());
}

bool is_projected(const LayerCall& call) { return call.weights.size() % (call.has_bias ? 5 : 3) == 0; }

Tensor none(const LayerCall& call) { return at::empty({0}, call.input.options()); }

auto run(const LayerCall& call, bool save) {
  return lstm_ext::lstm_layer_forward(call.input, call.h0, call.c0, call.weights, call.batch_sizes, call.has_bias,
                                      call.bidirectional, call.extras, save);
}

void run_layer(const OperatorHandle& op, Stack* stack) {
  const at::ArrayRef<IValue> arguments = arguments_on(op, *stack);
  const LayerCall call = LayerCall::of(arguments);
  const bool cells = arguments[LayerCall::kArguments].toBool(), gates = arguments[LayerCall::kArguments + 1].toBool();
  torch::jit::drop(*stack, arguments.size());
  auto [output, h_n, c_n, saved] = run(call, cells || gates);
  torch::jit::push(*stack, output, h_n, c_n, cells ? in_type(saved[1], call.input.scalar_type()) : none(call),
                   gates ? gate_values(call, saved[0]) : none(call));
}

void run_layer_forward(const OperatorHandle& op, Stack* stack) {
  const at::ArrayRef<IValue> arguments = arguments_on(op, *stack);
  const LayerCall call = LayerCall::of(arguments);
  const bool cells = arguments[LayerCall::kArguments].toBool(), gates = arguments[LayerCall::kArguments + 1].toBool();
  torch::jit::drop(*stack, arguments.size());
  auto [output, h_n, c_n, saved] = run(call, true);
  // Results never share memory: what is saved is not what a loss may see.
  torch::jit::push(*stack, output, h_n, c_n,
                   cells ? saved[1].to(call.input.scalar_type(), /*non_blocking=*/false, /*copy=*/true) : none(call),
                   gates ? gate_values(call, saved[0]) : none(call));
  auto next = saved.begin();
  const auto push_if = [&](bool there, at::ScalarType absent) {
    stack->emplace_back(there ? *next++ : at::empty({0}, call.input.options().dtype(absent)));
  };
  const at::ScalarType gates_type = saved[0].scalar_type(), cells_type = saved[1].scalar_type();
  push_if(true, gates_type);
  push_if(true, cells_type);
  push_if(is_projected(call), gates_type);
  push_if(!call.extras.norm.empty(), gates_type);
  push_if(!call.extras.norm.empty(), cells_type);
}

void run_layer_backward(const OperatorHandle& op, Stack* stack) {
  const at::ArrayRef<IValue> arguments = arguments_on(op, *stack);
  const LayerCall call = LayerCall::of(arguments);
  const auto grad = [&](size_t i) {
    const OptionalTensor t = arguments[LayerCall::kArguments + i].toOptional<Tensor>();
    return t && t->defined() ? t : std::nullopt;
  };
  const size_t first = LayerCall::kArguments + kResults;
  const auto kept = [&](size_t i) { return arguments[first + i].toTensor(); };  // output, then what was saved
  const c10::List<bool> flags = arguments[first + 1 + kSaved].toBoolList();
  const std::vector<bool> wanted(flags.begin(), flags.end());
  const std::vector<OptionalTensor> inputs = call.differentiable();
  TORCH_CHECK(wanted.size() == inputs.size(), "lstm_ext: wanted has ", wanted.size(), " entries, expected ",
              inputs.size(), " (input, h0, c0, each weight, reset_h, reset_c and each parameter of norm)");
  for (size_t i = 0; i < wanted.size(); ++i) {
    TORCH_CHECK(inputs[i] || !wanted[i], "lstm_ext: wanted asks for the gradient of a state that was not given");
  }
  std::vector<Tensor> saved{kept(1), kept(2)};
  if (is_projected(call)) saved.push_back(kept(3));
  if (!call.extras.norm.empty()) saved.insert(saved.end(), {kept(4), kept(5)});
  OptionalTensor grad_cells = grad(3), grad_gates = grad(4);
  if (grad_cells) grad_cells = in_type(*grad_cells, saved[1].scalar_type());
  if (grad_gates) grad_gates = saved_gates_gradient(*grad_gates, saved[0]);
  std::vector<Tensor> grads = lstm_ext::lstm_layer_backward(
      grad(0), grad(1), grad(2), call.input, call.h0, call.c0, call.weights, call.batch_sizes, kept(0), saved,
      call.has_bias, call.bidirectional, call.extras, wanted, grad_gates, grad_cells);
  // An operator cannot return an undefined tensor.
  for (Tensor& g : grads) {
    if (!g.defined()) g = none(call);
  }
  torch::jit::drop(*stack, arguments.size());
  stack->emplace_back(std::move(grads));
}

// clang-format off
#define LSTM_EXT_ARGUMENTS \
  "Tensor input, Tensor? h0, Tensor? c0, Tensor[] weights, Tensor? batch_sizes, bool has_bias, bool bidirectional, " \
  "Tensor? resets, Tensor? reset_h, Tensor? reset_c, Tensor? lengths, Tensor? recurrent_mask, Tensor? kept_h, " \
  "Tensor? kept_c, float zoneout_h, float zoneout_c, Tensor[] norm, "
#define LSTM_EXT_RESULTS "Tensor output, Tensor h_n, Tensor c_n, Tensor cell_states, Tensor gate_values"
#define LSTM_EXT_SAVED \
  "Tensor gates, Tensor cells, Tensor hidden, Tensor normalised_products, Tensor norm_factors"
// clang-format on

}  // namespace

TORCH_LIBRARY_FRAGMENT(lstm_ext, m) {
  m.set_python_module("lstm_ext.layer.operators");
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def("lstm_layer_with_extras(" LSTM_EXT_ARGUMENTS "bool return_cell_states, bool return_gates) -> (" LSTM_EXT_RESULTS
        ")",
        tags);
  m.def("lstm_layer_with_extras_forward(" LSTM_EXT_ARGUMENTS
        "bool return_cell_states, bool return_gates) -> (" LSTM_EXT_RESULTS ", " LSTM_EXT_SAVED ")",
        tags);
  m.def("lstm_layer_with_extras_backward(" LSTM_EXT_ARGUMENTS
        "Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor? grad_cell_states, Tensor? grad_gate_values, "
        "Tensor output, " LSTM_EXT_SAVED ", bool[] wanted) -> Tensor[]",
        tags);
}

namespace {
void implement(torch::Library& m) {
  m.impl("lstm_layer_with_extras", torch::CppFunction::makeFromBoxedFunction<&run_layer>());
  m.impl("lstm_layer_with_extras_forward", torch::CppFunction::makeFromBoxedFunction<&run_layer_forward>());
  m.impl("lstm_layer_with_extras_backward", torch::CppFunction::makeFromBoxedFunction<&run_layer_backward>());
}
}  // namespace

TORCH_LIBRARY_IMPL(lstm_ext, CPU, m) { implement(m); }

#if defined(LSTM_EXT_WITH_CUDA)
TORCH_LIBRARY_IMPL(lstm_ext, CUDA, m) { implement(m); }
#endif

TORCH_LIBRARY_IMPL(lstm_ext, Autograd, m) {
  m.impl("lstm_layer_with_extras", torch::CppFunction::makeFromBoxedFunction<&layer_with_extras_autograd>());
  m.impl("lstm_layer_with_extras_forward",
         torch::CppFunction::makeFromBoxedFunction<&layer_with_extras_ends_autograd>());
  m.impl("lstm_layer_with_extras_backward",
         torch::CppFunction::makeFromBoxedFunction<&layer_with_extras_ends_autograd>());
}

}  // namespace lstm_ext::ops
