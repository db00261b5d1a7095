#include "torch/layer_call.h"

#include <ATen/ATen.h>
#include <ATen/record_function.h>

#include "torch/backend.h"
#include "torch/tensors.h"

namespace lstm_ext {
namespace {

constexpr const char* kNoGradients =
    "LSTM: a frozen layer has no gradients: call it under torch.no_grad(), or make it trainable with lstm_ext.unfreeze";

Backend& cuda_backend() {
  static Backend backend{};
  return backend;
}

const Backend& backend_for(const at::Tensor& input) {
  if (input.is_cpu()) return cpu_backend();
  TORCH_CHECK(cuda_backend().forward, "lstm_ext: input is on ", input.device(),
              ", but this build has no CUDA kernels; `python -m lstm_ext.info` says why");
  return cuda_backend();
}

// Returns the backend for the input, and sets the type of the gates that it saves.
const Backend& choose_backend(const LayerCall& call, LayerSizes& sizes) {
  const Backend& backend = backend_for(call.input);
  sizes.gates_type = backend.saves_preactivations ? call.input.scalar_type() : sizes.sum_type;
  return backend;
}

// The gate values as a result, (..., H, 4), from the saved gates, (..., 4H).
at::Tensor gate_values_result(const at::Tensor& gates, bool are_preactivations, at::ScalarType dtype) {
  at::Tensor values = gates;
  const int64_t hidden_size = gates.size(-1) / 4;
  if (are_preactivations) {  // past the end of a row they give the values 0
    values = gates.sigmoid();
    const int64_t first = 2 * hidden_size;
    values.narrow(-1, first, hidden_size).copy_(gates.narrow(-1, first, hidden_size).tanh());
  }
  return in_type(values.unflatten(-1, {4, hidden_size}).transpose(-1, -2), dtype);
}

// Converts the gradient of the gate values, (..., H, 4), to the kernels' layout, (..., 4H).
at::Tensor saved_gates_gradient(const at::Tensor& grad, at::ScalarType dtype) {
  return in_type(grad.transpose(-1, -2).flatten(-2), dtype);
}

}  // namespace

void register_cuda_backend(const Backend& backend) { cuda_backend() = backend; }

std::optional<cuda::DeviceFacts> cuda_facts(int device) {
  if (!cuda_backend().facts) return {};
  return cuda_backend().facts(device);
}

bool cuda_wait_expired(int device) { return cuda_backend().wait_expired && cuda_backend().wait_expired(device); }

NeedsGrad read_needs_grad(const LayerCall& call, const std::vector<bool>& flags) {
  size_t expected = 0;
  visit_inputs(call, [&](const at::Tensor&) { ++expected; });
  TORCH_CHECK(flags.size() == expected, "lstm_ext: needs_grad has ", flags.size(), " entries, expected ", expected,
              " (input, h0, c0, each weight, reset_h, reset_c and each parameter of norm and of the cell)");
  NeedsGrad needs_grad = NeedsGrad::of(call);
  size_t next = 0;
  visit_inputs(needs_grad, needs_grad, [&](auto&& flag) { flag = flags[next++]; });
  next = 0;
  visit_inputs(call, [&](const at::Tensor& tensor) {
    TORCH_CHECK(tensor.defined() || !flags[next],
                "lstm_ext: needs_grad asks for the gradient of a state that was not given");
    ++next;
  });
  return needs_grad;
}

std::vector<at::Tensor> list_gradients(LayerGradients gradients) {
  std::vector<at::Tensor> list;
  visit_inputs(gradients, gradients, [&](at::Tensor& grad) { list.push_back(std::move(grad)); });
  return list;
}

LayerResults lstm_layer_forward(const LayerCall& call, bool save) {
  RECORD_FUNCTION("lstm_ext::lstm_layer_forward", std::vector<c10::IValue>{});
  LayerSizes sizes = check_layer(call);
  TORCH_CHECK(!save || call.options.frozen.empty(), kNoGradients);
  TORCH_CHECK(call.options.frozen.empty() || call.input.is_cpu(),
              "lstm_ext: a frozen layer runs on the CPU, and the input is on ", call.input.device());
  const Backend& backend = choose_backend(call, sizes);
  const bool cell_states = call.options.return_cell_states, gates = call.options.return_gates;
  LayerResults results = backend.forward(call, sizes, save || cell_states || gates);
  const at::ScalarType dtype = call.input.scalar_type();
  if (cell_states) results.cell_states = in_type(results.saved.cells, dtype);
  if (gates) results.gate_values = gate_values_result(results.saved.gates, backend.saves_preactivations, dtype);
  if (!save && (cell_states || gates)) results.saved = {};
  return results;
}

LayerGradients lstm_layer_backward(const LayerCall& call, ResultGradients grads, const at::Tensor& output,
                                   const Saved& saved, const NeedsGrad& needs_grad) {
  RECORD_FUNCTION("lstm_ext::lstm_layer_backward", std::vector<c10::IValue>{});
  LayerSizes sizes = check_layer(call);
  TORCH_CHECK(call.options.frozen.empty(), kNoGradients);
  const Backend& backend = choose_backend(call, sizes);
  const at::Tensor& input = call.input;
  const at::ScalarType dtype = input.scalar_type();
  const int64_t hidden_size = sizes.hidden_size;
  check_tensor("output", output, input, dtype, sizes.sequence_sizes(sizes.directions * sizes.output_size));
  sizes.check_saved(call, saved);
  const auto check_grad = [&](const char* name, const at::Tensor& grad, at::IntArrayRef expected) {
    if (grad.defined()) check_tensor(name, grad, input, dtype, expected);
  };
  check_grad("grad_output", grads.output, output.sizes());
  check_grad("grad_h_n", grads.h_n, {sizes.directions, sizes.batch, sizes.output_size});
  check_grad("grad_c_n", grads.c_n, {sizes.directions, sizes.batch, hidden_size});
  if (grads.cells.defined()) {
    check_grad("grad_cell_states", grads.cells, sizes.saved_sizes(hidden_size));
    grads.cells = in_type(grads.cells, sizes.sum_type);
  }
  if (grads.gate_values.defined()) {
    std::vector<int64_t> expected = sizes.saved_sizes(hidden_size);
    expected.push_back(4);
    check_grad("grad_gate_values", grads.gate_values, expected);
    grads.gate_values = saved_gates_gradient(grads.gate_values, sizes.gates_type);
  }
  return backend.backward(call, sizes, {grads, output, saved, needs_grad});
}

}  // namespace lstm_ext
