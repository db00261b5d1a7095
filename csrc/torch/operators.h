// The registered operators, below autograd (operators.cpp) and for autograd (operator_autograd.cpp). They contain no
// Python: a C++ process with libtorch can load this library and run a model made by torch.export and AOTInductor.
//
// All schemas begin with the same long list of arguments, so the kernels are boxed and read that list in one place.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <torch/library.h>

#include "torch/layer_call.h"

namespace lstm_ext::ops {

using at::Tensor;
using c10::IValue;
using c10::OperatorHandle;
using torch::jit::Stack;

// A layer returns output, h_n, c_n, cell_states and gate_values. lstm_layer_forward returns these, and then Saved.
constexpr size_t kResults = 5;
constexpr size_t kSaved = 5;

inline at::ArrayRef<IValue> arguments_on(const OperatorHandle& op, const Stack& stack) {
  return torch::jit::last(stack, op.schema().arguments().size());
}

// An absent tensor is None in a schema and undefined here.
inline Tensor tensor_or_undefined(const IValue& value) { return value.isNone() ? Tensor() : value.toTensor(); }
inline IValue tensor_or_none(const Tensor& tensor) { return tensor.defined() ? IValue(tensor) : IValue(); }

// Every operator begins with the arguments of the layer and its options. read_call advances `next` past them.
LayerCall read_call(const IValue*& next);
void push_call(const LayerCall& call, Stack& stack);

// The kernels of a device's key. Those of CUDA are registered by cuda_backend.cpp, if it is part of the build.
LSTM_EXT_PUBLIC void implement(torch::Library& m);
// Kernels of the Autograd key: for the layer, and for its two ends, which have no gradient themselves.
void layer_autograd(const OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack);
void layer_ends_autograd(const OperatorHandle& op, c10::DispatchKeySet keys, Stack* stack);

}  // namespace lstm_ext::ops
