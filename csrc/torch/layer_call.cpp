#include "torch/layer_call.h"

#include <ATen/ATen.h>
#include <ATen/record_function.h>

#include "contract/cell.h"
#include "torch/backend.h"
#include "torch/tensors.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <locale>
#include <sstream>

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
at::Tensor gate_values_result(const LayerOptions& options, const at::Tensor& gates, bool are_preactivations,
                              at::ScalarType dtype) {
  at::Tensor values = gates;
  const int64_t hidden_size = gates.size(-1) / 4;
  const auto part = [hidden_size](const at::Tensor& all, cell::Gate gate) {
    return all.narrow(-1, gate * hidden_size, hidden_size);
  };
  if (are_preactivations && options.activations.empty() &&
      options.preactivation_clip == 0) {  // past the end of a row they give the values 0
    values = gates.sigmoid();
    part(values, cell::kG).copy_(part(gates, cell::kG).tanh());
  } else if (are_preactivations) {
    const auto functions = read_activations(options.activations.empty() ? "sigmoid tanh tanh" : options.activations);
    const double bound = options.preactivation_clip;
    const bool narrow = gates.scalar_type() == at::kHalf || gates.scalar_type() == at::kBFloat16;
    const at::Tensor wide = narrow ? gates.to(at::kFloat) : gates;
    const at::Tensor seen = bound == 0 ? wide : wide.clamp(-bound, bound);
    values = activation_of(functions[0], seen);
    part(values, cell::kG).copy_(activation_of(functions[1], part(seen, cell::kG)));
    if (options.coupled_gates) part(values, cell::kF).copy_(1 - part(values, cell::kI));
    if (options.lengths.defined()) {
      const at::Tensor times = at::arange(gates.size(1), options.lengths.options()).unsqueeze(1);
      values.masked_fill_((times >= options.lengths).unsqueeze(-1), 0);
    }
  }
  const at::Tensor result = in_type(values.unflatten(-1, {4, hidden_size}).transpose(-1, -2), dtype);
  // Below autograd a view has a version of its own: a change of it would not count as one of the saved tensor.
  if (result.is_alias_of(gates)) {
    result.unsafeGetTensorImpl()->set_version_counter(gates.unsafeGetTensorImpl()->version_counter());
  }
  return result;
}

struct KnownFunction {
  const char* name;
  cell::Function function;
  int numbers;
};
constexpr KnownFunction kKnownFunctions[] = {
    {"sigmoid", cell::Function::kSigmoid, 0},
    {"tanh", cell::Function::kTanh, 0},
    {"affine", cell::Function::kAffine, 2},
    {"relu", cell::Function::kRelu, 0},
    {"leaky_relu", cell::Function::kLeakyRelu, 1},
    {"thresholded_relu", cell::Function::kThresholdedRelu, 1},
    {"elu", cell::Function::kElu, 1},
    {"scaled_tanh", cell::Function::kScaledTanh, 2},
    {"hard_sigmoid", cell::Function::kHardSigmoid, 2},
    {"softsign", cell::Function::kSoftsign, 0},
    {"softplus", cell::Function::kSoftplus, 0},
};
[[noreturn]] void refuse_activations(const std::string& text) {
  std::string known;
  for (const KnownFunction& function : kKnownFunctions) {
    known += std::string(known.empty() ? "" : ", ") + function.name +
             (function.numbers == 0   ? ""
              : function.numbers == 1 ? "(alpha)"
                                      : "(alpha,beta)");
  }
  TORCH_CHECK_VALUE(false, "lstm_ext: activations is '", text, "', expected three names with a space between them, of ",
                    known, "; alpha is at least 0, but in affine, and more in scaled_tanh");
  std::abort();  // never reached
}

// Converts the gradient of the gate values, (..., H, 4), to the kernels' layout, (..., 4H).
at::Tensor saved_gates_gradient(const at::Tensor& grad, at::ScalarType dtype) {
  return in_type(grad.transpose(-1, -2).flatten(-2), dtype);
}

}  // namespace

std::array<cell::Activation<double>, 3> read_activations(const std::string& text) {
  std::array<cell::Activation<double>, 3> functions{};
  const char* next = text.c_str();
  for (size_t n = 0; n < functions.size(); ++n) {
    if (n > 0 && *next++ != ' ') refuse_activations(text);
    const KnownFunction* known = nullptr;
    for (const KnownFunction& candidate : kKnownFunctions) {
      const size_t length = std::strlen(candidate.name);
      if (std::strncmp(next, candidate.name, length) == 0 && std::strchr(" (", next[length])) known = &candidate;
    }
    if (!known) refuse_activations(text);
    next += std::strlen(known->name);
    double numbers[2] = {};
    for (int k = 0; k < known->numbers; ++k) {
      if (*next++ != (k == 0 ? '(' : ',')) refuse_activations(text);
      // Not strtod: what that takes for a decimal point is a matter of the process's locale.
      const size_t length = std::strcspn(next, ",) ");
      std::istringstream number(std::string(next, length));
      number.imbue(std::locale::classic());
      if (!(number >> numbers[k]) || !number.eof() || !std::isfinite(numbers[k])) refuse_activations(text);
      next += length;
    }
    if (known->numbers > 0 && *next++ != ')') refuse_activations(text);
    if (known->function != cell::Function::kAffine && numbers[0] < 0) refuse_activations(text);
    if (known->function == cell::Function::kScaledTanh && numbers[0] == 0) refuse_activations(text);
    functions[n] = {known->function, numbers[0], numbers[1]};
  }
  if (*next != 0) refuse_activations(text);
  return functions;
}

at::Tensor activation_of(const cell::Activation<double>& activation, const at::Tensor& z) {
  const double alpha = activation.alpha, beta = activation.beta;
  switch (activation.function) {
    case cell::Function::kSigmoid: return z.sigmoid();
    case cell::Function::kTanh: return z.tanh();
    case cell::Function::kAffine: return z * alpha + beta;
    case cell::Function::kRelu: return z.relu();
    case cell::Function::kLeakyRelu: return at::leaky_relu(z, alpha);
    case cell::Function::kThresholdedRelu: return at::threshold(z, alpha, 0);
    case cell::Function::kElu: return at::elu(z, alpha);
    case cell::Function::kScaledTanh: return (z * beta).tanh() * alpha;
    case cell::Function::kHardSigmoid: return (z * alpha + beta).clamp(0, 1);
    case cell::Function::kSoftsign: return z / (z.abs() + 1);
    case cell::Function::kSoftplus: return at::softplus(z, 1, 40);
  }
  return z;
}

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
  if (gates)
    results.gate_values = gate_values_result(call.options, results.saved.gates, backend.saves_preactivations, dtype);
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
