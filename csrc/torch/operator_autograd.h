// The registered operators as autograd sees them: how each is called through the dispatcher, and the kernels of its
// Autograd key. Everything here goes through the dispatcher, so it is traced by torch.compile, torch.export and
// make_fx, and serves every device that has the two kernels underneath.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace lstm_ext::ops {

using at::Tensor;
using OptionalTensor = std::optional<at::Tensor>;

// output, h_n, c_n
using LayerResult = std::tuple<Tensor, Tensor, Tensor>;
// output, h_n, c_n, gates, cells, hidden; the last three are what the backward pass needs. Without a projection,
// hidden has no elements.
using LayerResultAndSaved = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

using LayerOp = LayerResult(const Tensor& input, const OptionalTensor& h0, const OptionalTensor& c0,
                            at::TensorList weights, const OptionalTensor& batch_sizes, bool has_bias,
                            bool bidirectional);
using LayerForwardOp = LayerResultAndSaved(const Tensor& input, const OptionalTensor& h0, const OptionalTensor& c0,
                                           at::TensorList weights, const OptionalTensor& batch_sizes, bool has_bias,
                                           bool bidirectional);
// The gradients of input, h0, c0 and each weight, in this order; without elements where `wanted` is false. Never a
// list of one, which inductor's C++ wrapper would take for a tensor.
using LayerBackwardOp = std::vector<Tensor>(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                                            const OptionalTensor& grad_c_n, const Tensor& input,
                                            const OptionalTensor& h0, const OptionalTensor& c0, at::TensorList weights,
                                            const OptionalTensor& batch_sizes, const Tensor& output,
                                            const Tensor& gates, const Tensor& cells, const Tensor& hidden,
                                            bool has_bias, bool bidirectional, c10::List<bool> wanted);

// Kernels of the Autograd key.
LayerOp lstm_layer_autograd;
LayerForwardOp lstm_layer_forward_autograd;
LayerBackwardOp lstm_layer_backward_autograd;

}  // namespace lstm_ext::ops
