// Arguments as kernels want them.
#pragma once

#include <ATen/ATen.h>

#include <vector>

namespace lstm_ext {

// The functions here make no trip through the dispatcher where there is nothing to do.

inline at::Tensor in_type(const at::Tensor& t, at::ScalarType type) { return t.scalar_type() == type ? t : t.to(type); }

// The numbers themselves in memory: no pending negation (of the imaginary part of a conjugate), and none of the zeros
// that have no memory.
inline bool is_materialized(const at::Tensor& t) { return !t.is_neg() && !t._is_zerotensor(); }
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
