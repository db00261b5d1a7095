// Arguments as kernels want them.
#pragma once

#include <ATen/ATen.h>

#include <vector>

namespace lstm_ext {

// The numbers themselves in memory: no pending negation (of the imaginary part of a conjugate), and none of the zeros
// that have no memory. Without a trip through the dispatcher where there is nothing to do, here and below.
inline at::Tensor materialized(const at::Tensor& t) {
  if (t._is_zerotensor()) return at::zeros(t.sizes(), t.options());
  return t.is_neg() ? t.resolve_neg() : t;
}

inline at::Tensor in_type(const at::Tensor& t, at::ScalarType type) { return t.scalar_type() == type ? t : t.to(type); }

inline at::Tensor contiguous_or_undefined(const at::Tensor& t, at::ScalarType type) {
  return t.defined() ? in_type(materialized(t), type).contiguous() : at::Tensor();
}

inline std::vector<at::Tensor> contiguous_weights(const std::vector<at::Tensor>& weights, at::ScalarType type) {
  std::vector<at::Tensor> result;
  result.reserve(weights.size());
  for (const at::Tensor& w : weights) result.push_back(in_type(materialized(w), type).contiguous());
  return result;
}

}  // namespace lstm_ext
