// The registered operators. No Python in here: a C++ process that has libtorch can load this library and run a model
// that torch.export and AOTInductor made. Shapes and fake kernels: lstm_ext/ops.py.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "torch/operator_autograd.h"
#include "torch/lstm_layer.h"

namespace lstm_ext::ops {
namespace {

LayerResult run_layer(const Tensor& input, const OptionalTensor& h0, const OptionalTensor& c0, at::TensorList weights,
                      const OptionalTensor& batch_sizes, bool has_bias, bool bidirectional) {
  auto [output, h_n, c_n, saved] =
      lstm_ext::lstm_layer_forward(input, h0, c0, weights.vec(), batch_sizes, has_bias, bidirectional, {}, false);
  return {output, h_n, c_n};
}

LayerResultAndSaved run_layer_forward(const Tensor& input, const OptionalTensor& h0, const OptionalTensor& c0,
                                      at::TensorList weights, const OptionalTensor& batch_sizes, bool has_bias,
                                      bool bidirectional) {
  auto [output, h_n, c_n, saved] =
      lstm_ext::lstm_layer_forward(input, h0, c0, weights.vec(), batch_sizes, has_bias, bidirectional, {}, true);
  const Tensor hidden = saved.size() > 2 ? saved[2] : at::empty({0}, saved[0].options());
  return {output, h_n, c_n, saved[0], saved[1], hidden};
}

std::vector<Tensor> run_layer_backward(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                                       const OptionalTensor& grad_c_n, const Tensor& input, const OptionalTensor& h0,
                                       const OptionalTensor& c0, at::TensorList weights,
                                       const OptionalTensor& batch_sizes, const Tensor& output, const Tensor& gates,
                                       const Tensor& cells, const Tensor& hidden, bool has_bias, bool bidirectional,
                                       c10::List<bool> wanted) {
  const std::vector<bool> wanted_flags(wanted.begin(), wanted.end());
  TORCH_CHECK(wanted_flags.size() == 3 + weights.size(), "lstm_ext: wanted has ", wanted_flags.size(),
              " entries, expected ", 3 + weights.size(), " (input, h0, c0 and each weight)");
  TORCH_CHECK((h0 || !wanted_flags[1]) && (c0 || !wanted_flags[2]),
              "lstm_ext: wanted asks for the gradient of an initial state that was not given");
  const bool projected = weights.size() % (has_bias ? 5 : 3) == 0;
  std::vector<Tensor> saved{gates, cells};
  if (projected) saved.push_back(hidden);
  std::vector<Tensor> grads =
      lstm_ext::lstm_layer_backward(grad_output, grad_h_n, grad_c_n, input, h0, c0, weights.vec(), batch_sizes, output,
                                    saved, has_bias, bidirectional, {}, wanted_flags);
  // An operator cannot return an undefined tensor.
  for (Tensor& grad : grads) {
    if (!grad.defined()) grad = at::empty({0}, input.options());
  }
  return grads;
}

}  // namespace

// torch.compile keeps graphs on disk and knows them by the names in them: an operator whose results come to mean
// something else, the one that it is differentiated by included, has to get a new name.
TORCH_LIBRARY(lstm_ext, m) {
  // Whoever runs an operator on fake or meta tensors without the fake kernels is told to import this module.
  m.set_python_module("lstm_ext.layer.operators");
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def(
      "lstm_layer(Tensor input, Tensor? h0, Tensor? c0, Tensor[] weights, Tensor? batch_sizes, bool has_bias, "
      "bool bidirectional) -> (Tensor output, Tensor h_n, Tensor c_n)",
      tags);
  m.def(
      "lstm_layer_forward(Tensor input, Tensor? h0, Tensor? c0, Tensor[] weights, Tensor? batch_sizes, bool has_bias, "
      "bool bidirectional) -> (Tensor output, Tensor h_n, Tensor c_n, Tensor gates, Tensor cells, Tensor hidden)",
      tags);
  m.def(
      "lstm_layer_backward(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor input, Tensor? h0, "
      "Tensor? c0, Tensor[] weights, Tensor? batch_sizes, Tensor output, Tensor gates, Tensor cells, Tensor hidden, "
      "bool has_bias, bool bidirectional, bool[] wanted) -> Tensor[]",
      tags);
}

TORCH_LIBRARY_IMPL(lstm_ext, CPU, m) {
  m.impl("lstm_layer", &run_layer);
  m.impl("lstm_layer_forward", &run_layer_forward);
  m.impl("lstm_layer_backward", &run_layer_backward);
}

#if defined(LSTM_EXT_WITH_CUDA)
TORCH_LIBRARY_IMPL(lstm_ext, CUDA, m) {
  m.impl("lstm_layer", &run_layer);
  m.impl("lstm_layer_forward", &run_layer_forward);
  m.impl("lstm_layer_backward", &run_layer_backward);
}
#endif

TORCH_LIBRARY_IMPL(lstm_ext, Autograd, m) {
  m.impl("lstm_layer", &lstm_layer_autograd);
  m.impl("lstm_layer_forward", &lstm_layer_forward_autograd);
  m.impl("lstm_layer_backward", &lstm_layer_backward_autograd);
}

}  // namespace lstm_ext::ops
