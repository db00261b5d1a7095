// Whether autograd has anything to do in a call of an operator.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/core/ivalue.h>

#include <optional>

namespace lstm_ext::ops {

// A tangent counts: forward mode must end in an error, not be lost.
inline bool is_tracked(const at::Tensor& t) {
  return t.defined() && ((at::GradMode::is_enabled() && t.requires_grad()) || t._fw_grad(/*level=*/0).defined());
}
inline bool is_tracked(const std::optional<at::Tensor>& t) { return t && is_tracked(*t); }
inline bool is_tracked(at::TensorList list) {
  for (const at::Tensor& t : list) {
    if (is_tracked(t)) return true;
  }
  return false;
}
template <typename... T>
bool any_tracked(const T&... tensors) {
  return (is_tracked(tensors) || ...);
}

constexpr const char* kNoGradient =
    " has no gradient of its own. Differentiate lstm_ext::lstm_layer once; for second derivatives, call the module "
    "lstm_ext.LSTM outside of torch.compile and torch.export, which differentiates its backward pass as well.";

}  // namespace lstm_ext::ops
