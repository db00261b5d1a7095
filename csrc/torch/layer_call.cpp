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

// The cell in whole tensors, as far as gate values need it; contract/cell.h says what a Math is.
struct TensorMath {
  using Value = at::Tensor;
  using Gates = std::array<Value, cell::kGates>;
  static Value number(double x) { return at::scalar_tensor(x, at::kDouble); }
  static Value fma(const Value& a, const Value& b, const Value& c) { return a * b + c; }
  static Value sigmoid(const Value& z) { return z.sigmoid(); }
  static Value tanh(const Value& z) { return z.tanh(); }
  static Value expm1(const Value& z) { return z.expm1(); }
  static Value softplus(const Value& z) { return at::softplus(z, 1, 40); }
  static Value quotient(const Value& a, const Value& b) { return a / b; }
  static Value where_positive(const Value& v, const Value& a, const Value& b) { return at::where(v > 0, a, b); }
  static Value unless(const Value& v, const Value& bound, const Value& a) { return at::where(v == bound, 0, a); }
  static Value clamp(const Value& v, double bound) { return v.clamp(-bound, bound); }
  static Value activation(const cell::Activation<double>& f, const Value& z) {
    return cell::activation_value<TensorMath>(f, z);
  }
  static void input(const Value& z_i, const Value& z_g, Value& i, Value& g) {
    i = z_i.sigmoid();
    g = z_g.tanh();
  }
};

// The gate values, (..., H, 4), of saved preactivations, (..., 4H).
at::Tensor gate_values_of(const LayerOptions& options, const at::Tensor& preactivations) {
  const bool narrow = preactivations.scalar_type() == at::kHalf || preactivations.scalar_type() == at::kBFloat16;
  const auto parts = (narrow ? preactivations.to(at::kFloat) : preactivations).chunk(cell::kGates, -1);
  const cell::Options<double> given = cell_options<double>(options, 0, false);
  const auto no_parameters = [](const double*) { return at::Tensor(); };  // z has the peepholes' part
  const cell::CellAt<double, decltype(no_parameters)> cell{given, no_parameters};
  TensorMath::Gates z{parts[0], parts[1], parts[2], parts[3]};
  for (at::Tensor& gate : z) cell::clip_preactivation<TensorMath>(gate, cell);
  const TensorMath::Gates gates = cell::gate_values<TensorMath>(z, cell);
  const at::Tensor values = at::stack(gates, -1);
  if (options.lengths.defined()) {
    const at::Tensor times = at::arange(preactivations.size(1), options.lengths.options()).unsqueeze(1);
    values.masked_fill_((times >= options.lengths).unsqueeze(-1).unsqueeze(-1), 0);
  }
  return values;
}

// The gate values as a result, (..., H, 4), from the saved gates, (..., 4H).
at::Tensor gate_values_result(const LayerOptions& options, const at::Tensor& gates, bool are_preactivations,
                              at::ScalarType dtype) {
  if (are_preactivations) return in_type(gate_values_of(options, gates), dtype);
  const at::Tensor result = in_type(gates.unflatten(-1, {4, gates.size(-1) / 4}).transpose(-1, -2), dtype);
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

void register_cuda_backend(const Backend& backend) { cuda_backend() = backend; }

std::optional<cuda::DeviceFacts> cuda_facts(int device) {
  if (!cuda_backend().facts) return {};
  return cuda_backend().facts(device);
}

const char* cuda_build() { return cuda_backend().build; }

bool cuda_wait_expired(int device) { return cuda_backend().wait_expired && cuda_backend().wait_expired(device); }

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

std::vector<at::Tensor> lstm_layer_backward(const LayerCall& call, ResultGradients grads, const at::Tensor& output,
                                            Saved saved, const std::vector<bool>& needs_grad) {
  RECORD_FUNCTION("lstm_ext::lstm_layer_backward", std::vector<c10::IValue>{});
  LayerSizes sizes = check_layer(call);
  TORCH_CHECK(call.options.frozen.empty(), kNoGradients);
  const Backend& backend = choose_backend(call, sizes);
  const at::Tensor& input = call.input;
  const at::ScalarType dtype = input.scalar_type();
  const int64_t hidden_size = sizes.hidden_size;
  check_tensor("output", output, input, dtype, sizes.sequence_sizes(sizes.directions * sizes.output_size));
  sizes.check_saved(call, saved);
  Saved::visit(saved, [](at::Tensor& tensor) {
    if (tensor.defined()) tensor = tensor.contiguous();
  });
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
    grads.gate_values = in_type(grads.gate_values.transpose(-1, -2).flatten(-2), sizes.gates_type);
  }
  size_t inputs = 0;
  bool given = true;
  visit_inputs(call, [&](const at::Tensor& tensor) {
    given &= tensor.defined() || inputs >= needs_grad.size() || !needs_grad[inputs];
    ++inputs;
  });
  TORCH_CHECK(needs_grad.size() == inputs, "lstm_ext: needs_grad has ", needs_grad.size(), " entries, expected ",
              inputs, " (input, h0, c0, each weight, reset_h, reset_c and each parameter of norm and of the cell)");
  TORCH_CHECK(given, "lstm_ext: needs_grad asks for the gradient of a state that was not given");
  LayerGradients computed = backend.backward(call, sizes, {grads, output, saved, needs_grad});
  // Both biases are added to the same sum, so they have the same gradient; those of a GRU are not.
  for (int64_t d = 0; call.has_bias && !call.options.gru && d < sizes.directions; ++d) {
    at::Tensor* const biases = computed.weights.data() + d * sizes.weights_per_direction + 2;
    if (biases[0].defined() && biases[1].defined()) biases[1].copy_(biases[0]);
  }
  std::vector<at::Tensor> gradients;
  // Under autocast, parameters have types of their own.
  visit_inputs(call, computed, [&](const at::Tensor& tensor, const at::Tensor& grad) {
    gradients.push_back(grad.defined() ? in_type(grad, tensor.scalar_type()) : grad);
  });
  return gradients;
}

}  // namespace lstm_ext
