// The registered operators of a layer with extras. Their schemas (csrc/torch/operators_extras.cpp) begin with the same long list of
// arguments, so they are boxed kernels, which read that list in one place.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>

#include "torch/lstm_layer.h"

namespace lstm_ext::ops {

using at::Tensor;
using c10::OperatorHandle;
using torch::jit::Stack;

// What every operator begins with, in the order of the schemas.
struct LayerCall {
  Tensor input;
  OptionalTensor h0, c0;
  std::vector<Tensor> weights;
  OptionalTensor batch_sizes;
  bool has_bias, bidirectional;
  Extras extras;

  static constexpr size_t kArguments = 17;
  static LayerCall of(at::ArrayRef<c10::IValue> arguments);
  void push_to(Stack& stack) const;

  // What has a gradient, in the order in which the backward operator gives them: input, h0, c0, each weight, reset_h,
  // reset_c, each parameter of norm.
  std::vector<OptionalTensor> differentiable() const;
};

// After output, h_n, c_n, cell_states and gates, the forward operator returns what the backward operator needs.
constexpr size_t kResults = 5;
constexpr size_t kSaved = 5;  // gates, cells, hidden, normalised_products, norm_factors

inline at::ArrayRef<c10::IValue> arguments_on(const OperatorHandle& op, const Stack& stack) {
  return torch::jit::last(stack, op.schema().arguments().size());
}

// Kernels of the Autograd key: of the layer, and of its two ends, which have no gradient themselves.
void layer_with_extras_autograd(const OperatorHandle& op, Stack* stack);
void layer_with_extras_ends_autograd(const OperatorHandle& op, Stack* stack);

}  // namespace lstm_ext::ops
