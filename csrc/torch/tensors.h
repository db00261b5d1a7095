// Arguments in the form that kernels take. These functions avoid the dispatcher if there is nothing to do.
#pragma once

#include <ATen/ATen.h>

#include <vector>

namespace lstm_ext {

inline at::Tensor in_type(const at::Tensor& t, at::ScalarType type) { return t.scalar_type() == type ? t : t.to(type); }

// Whether the numbers themselves are in memory. The exceptions are a pending negation (of the imaginary part of a
// conjugate), zeros without memory, and wrappers of a transform that is over, which the dispatcher removes.
inline bool is_materialized(const at::Tensor& t) { return t.has_storage() && !t.is_neg() && !t._is_zerotensor(); }
inline at::Tensor materialized(const at::Tensor& t) {
  if (t._is_zerotensor()) return at::zeros(t.sizes(), t.options());
  return t.resolve_neg();
}
inline at::Tensor materialized(const at::Tensor& t, at::ScalarType type) {
  return is_materialized(t) ? in_type(t, type) : in_type(materialized(t), type);
}

inline at::Tensor contiguous_or_undefined(const at::Tensor& t, at::ScalarType type) {
  if (!t.defined()) return {};
  if (t.scalar_type() == type && t.is_contiguous() && is_materialized(t)) return t;
  return materialized(t, type).contiguous();
}

inline std::vector<at::Tensor> contiguous_weights(const std::vector<at::Tensor>& weights, at::ScalarType type) {
  std::vector<at::Tensor> result;
  result.reserve(weights.size());
  for (const at::Tensor& w : weights) result.push_back(contiguous_or_undefined(w, type));
  return result;
}

}  // namespace lstm_ext
