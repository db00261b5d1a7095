// The tensors of a call in the form that kernels take, for both backends. These functions avoid the dispatcher if there
// is nothing to do.
#pragma once

#include <ATen/ATen.h>

#include <type_traits>
#include <utility>
#include <vector>

#include "torch/checks.h"

namespace lstm_ext {

inline at::Tensor in_type(const at::Tensor& t, at::ScalarType type) { return t.scalar_type() == type ? t : t.to(type); }

// Whether the numbers themselves are in memory. The exceptions are a pending negation (of the imaginary part of a
// conjugate), zeros without memory, and wrappers of a transform that is over, which the dispatcher removes.
inline bool is_materialized(const at::Tensor& t) { return t.has_storage() && !t.is_neg() && !t._is_zerotensor(); }
inline at::Tensor materialized(const at::Tensor& t) {
  if (!t.defined() || is_materialized(t)) return t;
  return t._is_zerotensor() ? at::zeros(t.sizes(), t.options()) : t.resolve_neg();
}
inline at::Tensor materialized(const at::Tensor& t, at::ScalarType type) { return in_type(materialized(t), type); }

inline at::Tensor contiguous_or_undefined(const at::Tensor& t, at::ScalarType type) {
  return t.defined() ? materialized(t, type).contiguous() : t;
}

// A sequence whose innermost axis is contiguous.
inline at::Tensor with_contiguous_rows(const at::Tensor& t) {
  return !t.defined() || t.stride(-1) == 1 || t.size(-1) == 1 ? t : t.contiguous();
}

// The call with tensors that kernels can read: convert(tensor, type) for each of them, contiguous but for the input,
// whose rows are. type_of(tensor, is_weight) is the type of a tensor; `is_weight`: it is W or U. Parameters of options
// are of sum_type.
template <typename TypeOf, typename Convert>
LayerCall readable(LayerCall call, const LayerSizes& sizes, const TypeOf& type_of, const Convert& convert) {
  const auto change = [&](at::Tensor& t, at::ScalarType type) { t = convert(t, type).contiguous(); };
  const auto change_defined = [&](at::Tensor& t) {
    if (t.defined()) change(t, type_of(t, false));
  };
  call.input = with_contiguous_rows(convert(call.input, type_of(call.input, false)));
  change_defined(call.h0);
  change_defined(call.c0);
  for (size_t i = 0; i < call.weights.size(); ++i) {
    const bool is_weight = static_cast<int64_t>(i) % sizes.weights_per_direction < 2;
    change(call.weights[i], type_of(call.weights[i], is_weight));
  }
  visit_options<~kWeights>(call.options, Overloaded{[&](const char*, at::Tensor& t) { change_defined(t); },
                                                    [&](const char*, std::vector<at::Tensor>& parameters) {
                                                      for (at::Tensor& t : parameters) change(t, sizes.sum_type);
                                                    },
                                                    [](const char*, const auto&) {}});
  return call;
}

// Row `row` of a tensor whose rows are the first axis, as the directions of a layer, or null.
template <typename T>
T* row_pointer(const at::Tensor& t, int64_t row = 0) {
  if (!t.defined()) return nullptr;
  if constexpr (std::is_const_v<T>) {
    return static_cast<T*>(t.const_data_ptr()) + row * t.stride(0);
  } else {
    return static_cast<T*>(t.mutable_data_ptr()) + row * t.stride(0);
  }
}
// The kernels read a bool as a byte.
inline const uint8_t* flag_pointer(const at::Tensor& t, int64_t row = 0) {
  static_assert(sizeof(bool) == sizeof(uint8_t));
  return row_pointer<const uint8_t>(t, row);
}

template <typename T>
LayerNorm<T> layer_norm(const DirectionParameters& own, const LayerOptions& options) {
  return {row_pointer<const T>(own.gain_ih), row_pointer<const T>(own.gain_hh), row_pointer<const T>(own.gain_c),
          row_pointer<const T>(own.bias_c), options.norm_cell};
}

}  // namespace lstm_ext
