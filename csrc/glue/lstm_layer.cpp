#include "glue/lstm_layer.h"

#include <ATen/ATen.h>
#include <ATen/record_function.h>

#include "glue/layer.h"

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

}  // namespace

void register_cuda_backend(const Backend& backend) { cuda_backend() = backend; }

std::tuple<at::Tensor, at::Tensor, at::Tensor, std::vector<at::Tensor>> lstm_layer_forward(
    const at::Tensor& input, const OptionalTensor& h0, const OptionalTensor& c0, const std::vector<at::Tensor>& weights,
    const OptionalTensor& batch_sizes, bool has_bias, bool bidirectional, const Resets& resets, bool save) {
  RECORD_FUNCTION("lstm_ext::lstm_layer_forward", std::vector<c10::IValue>{});
  const LayerSizes s = check_layer(input, h0, c0, weights, batch_sizes, has_bias, bidirectional, resets);
  return backend_for(input).forward({input, h0, c0, weights, has_bias, resets}, s, save);
}

std::vector<at::Tensor> lstm_layer_backward(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                                            const OptionalTensor& grad_c_n, const at::Tensor& input,
                                            const OptionalTensor& h0, const OptionalTensor& c0,
                                            const std::vector<at::Tensor>& weights, const OptionalTensor& batch_sizes,
                                            const at::Tensor& output, const std::vector<at::Tensor>& saved,
                                            bool has_bias, bool bidirectional, const Resets& resets,
                                            const std::vector<bool>& wanted, const OptionalTensor& grad_gates,
                                            const OptionalTensor& grad_cells) {
  RECORD_FUNCTION("lstm_ext::lstm_layer_backward", std::vector<c10::IValue>{});
  const LayerSizes s = check_layer(input, h0, c0, weights, batch_sizes, has_bias, bidirectional, resets);
  const at::ScalarType dtype = input.scalar_type();
  const size_t inputs = 3 + weights.size() + (resets.flags ? 2 : 0);
  TORCH_CHECK(wanted.size() == inputs, "lstm_ext: wanted has ", wanted.size(), " entries, expected ", inputs,
              " (input, h0, c0 and each weight", resets.flags ? ", reset_h, reset_c)" : ")");
  const size_t saved_count = s.projected ? 3 : 2;
  TORCH_CHECK(saved.size() == saved_count, "lstm_ext: saved has ", saved.size(), " tensors, expected ", saved_count);
  check_tensor("output", output, input, dtype, s.sequence_sizes(s.directions * s.output_size));
  check_tensor("saved gates", saved[0], input, s.gates_type, s.saved_sizes(4 * s.hidden_size));
  check_tensor("saved cells", saved[1], input, s.sum_type, s.saved_sizes(s.hidden_size));
  if (s.projected) check_tensor("saved hidden", saved[2], input, s.gates_type, s.saved_sizes(s.hidden_size));
  if (grad_output) check_tensor("grad_output", *grad_output, input, dtype, output.sizes());
  if (grad_h_n) check_tensor("grad_h_n", *grad_h_n, input, dtype, {s.directions, s.batch, s.output_size});
  if (grad_c_n) check_tensor("grad_c_n", *grad_c_n, input, dtype, {s.directions, s.batch, s.hidden_size});
  if (grad_gates) check_tensor("grad_gates", *grad_gates, input, s.gates_type, s.saved_sizes(4 * s.hidden_size));
  if (grad_cells) check_tensor("grad_cells", *grad_cells, input, s.sum_type, s.saved_sizes(s.hidden_size));
  return backend_for(input).backward({input, h0, c0, weights, has_bias, resets}, s,
                                     {grad_output, grad_h_n, grad_c_n, grad_gates, grad_cells, output, saved, wanted});
}

}  // namespace lstm_ext
