#include "torch/lstm_layer.h"

#include <ATen/ATen.h>
#include <ATen/record_function.h>

#include "torch/backend.h"

namespace lstm_ext {
namespace {

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

// What lstm_layer_forward saves, in this order.
void check_saved(const at::Tensor& input, const LayerSizes& s, const Extras& extras,
                 const std::vector<at::Tensor>& saved) {
  std::vector<std::tuple<const char*, at::ScalarType, std::vector<int64_t>>> expected;
  if (!extras.recompute) expected.emplace_back("saved gates", s.gates_type, s.saved_sizes(4 * s.hidden_size));
  expected.emplace_back("saved cells", s.sum_type, s.saved_sizes(s.hidden_size));
  if (s.projected && !extras.recompute) {
    expected.emplace_back("saved hidden", s.gates_type, s.saved_sizes(s.hidden_size));
  }
  if (!extras.norm.empty()) {
    expected.emplace_back("saved normalised products", s.gates_type, s.saved_product_sizes());
    expected.emplace_back("saved factors of layer normalisation", s.sum_type, s.saved_sizes(2));
  }
  TORCH_CHECK(saved.size() == expected.size(), "lstm_ext: saved has ", saved.size(), " tensors, expected ",
              expected.size());
  for (size_t i = 0; i < saved.size(); ++i) {
    const auto& [name, dtype, sizes] = expected[i];
    check_tensor(name, saved[i], input, dtype, sizes);
  }
}

}  // namespace

void register_cuda_backend(const Backend& backend) { cuda_backend() = backend; }

std::tuple<at::Tensor, at::Tensor, at::Tensor, std::vector<at::Tensor>> lstm_layer_forward(
    const at::Tensor& input, const OptionalTensor& h0, const OptionalTensor& c0, const std::vector<at::Tensor>& weights,
    const OptionalTensor& batch_sizes, bool has_bias, bool bidirectional, const Extras& extras, bool save) {
  RECORD_FUNCTION("lstm_ext::lstm_layer_forward", std::vector<c10::IValue>{});
  const LayerSizes s = check_layer(input, h0, c0, weights, batch_sizes, has_bias, bidirectional, extras);
  return backend_for(input).forward({input, h0, c0, weights, has_bias, extras}, s, save);
}

std::vector<at::Tensor> lstm_layer_backward(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                                            const OptionalTensor& grad_c_n, const at::Tensor& input,
                                            const OptionalTensor& h0, const OptionalTensor& c0,
                                            const std::vector<at::Tensor>& weights, const OptionalTensor& batch_sizes,
                                            const at::Tensor& output, const std::vector<at::Tensor>& saved,
                                            bool has_bias, bool bidirectional, const Extras& extras,
                                            const std::vector<bool>& wanted, const OptionalTensor& grad_gates,
                                            const OptionalTensor& grad_cells) {
  RECORD_FUNCTION("lstm_ext::lstm_layer_backward", std::vector<c10::IValue>{});
  const LayerSizes s = check_layer(input, h0, c0, weights, batch_sizes, has_bias, bidirectional, extras);
  const at::ScalarType dtype = input.scalar_type();
  const size_t inputs = 3 + weights.size(), more = 2 + extras.norm.size();
  TORCH_CHECK(wanted.size() == inputs || wanted.size() == inputs + more, "lstm_ext: wanted has ", wanted.size(),
              " entries, expected ", inputs, " (input, h0, c0 and each weight) or ", more,
              " more (reset_h, reset_c, norm)");
  check_tensor("output", output, input, dtype, s.sequence_sizes(s.directions * s.output_size));
  check_saved(input, s, extras, saved);
  if (grad_output) check_tensor("grad_output", *grad_output, input, dtype, output.sizes());
  if (grad_h_n) check_tensor("grad_h_n", *grad_h_n, input, dtype, {s.directions, s.batch, s.output_size});
  if (grad_c_n) check_tensor("grad_c_n", *grad_c_n, input, dtype, {s.directions, s.batch, s.hidden_size});
  if (grad_gates) check_tensor("grad_gates", *grad_gates, input, s.gates_type, s.saved_sizes(4 * s.hidden_size));
  if (grad_cells) check_tensor("grad_cells", *grad_cells, input, s.sum_type, s.saved_sizes(s.hidden_size));
  return backend_for(input).backward({input, h0, c0, weights, has_bias, extras}, s,
                                     {grad_output, grad_h_n, grad_c_n, grad_gates, grad_cells, output, saved, wanted});
}

}  // namespace lstm_ext
