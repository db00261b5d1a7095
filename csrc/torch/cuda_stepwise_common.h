// What the two passes of the stepwise layer have in common: its arguments as kernels take them, direction by direction
// and step by step.
#pragma once

#include <ATen/ATen.h>

#include "torch/cuda_steps.h"
#include "torch/cuda_stepwise.h"
#include "torch/tensors.h"

namespace lstm_ext {

// The type that kernels know a dtype by.
template <typename Scalar>
struct Stored {
  using type = Scalar;
};
template <>
struct Stored<at::Half> {
  using type = __half;
};
template <>
struct Stored<at::BFloat16> {
  using type = __nv_bfloat16;
};

// Row `row` of a tensor whose rows are the first axis, or null.
template <typename T>
T* row_pointer(const at::Tensor& t, int64_t row = 0) {
  return t.defined() ? static_cast<T*>(t.mutable_data_ptr()) + row * t.stride(0) : nullptr;
}
template <typename T>
const T* const_row_pointer(const at::Tensor& t, int64_t row = 0) {
  return t.defined() ? static_cast<const T*>(t.const_data_ptr()) + row * t.stride(0) : nullptr;
}
// bool is a byte to kernels.
inline const uint8_t* flag_pointer(const at::Tensor& t, int64_t row = 0) {
  static_assert(sizeof(bool) == sizeof(uint8_t));
  return const_row_pointer<uint8_t>(t, row);
}

inline at::Tensor part_of(const at::Tensor& t, int64_t direction) { return t.defined() ? t.select(0, direction) : t; }

inline at::Tensor transposed(const at::Tensor& t) { return t.defined() ? t.t() : t; }

inline at::Tensor empty_if(bool there, at::IntArrayRef sizes, const at::TensorOptions& options) {
  return there ? at::empty(sizes, options) : at::Tensor();
}
inline at::Tensor zeros_if(bool there, at::IntArrayRef sizes, const at::TensorOptions& options) {
  return there ? at::zeros(sizes, options) : at::Tensor();
}

// The steps from time `begin` to time `finish` one below the other: (rows, n). A copy where memory has them otherwise.
inline at::Tensor rows_between(const at::Tensor& sequence, const Steps& steps, int64_t begin, int64_t finish) {
  if (sequence.dim() == 3) return sequence.narrow(0, begin, finish - begin).flatten(0, 1);
  return sequence.narrow(0, steps.offset(begin), steps.offset(finish) - steps.offset(begin));
}

inline at::Tensor with_contiguous_rows(const at::Tensor& tensor) {
  const at::Tensor t = materialized(tensor);
  return t.stride(-1) == 1 || t.size(-1) == 1 ? t : t.contiguous();
}

// The arguments of one direction. States (B, ...) contiguous or undefined, weights contiguous; undefined is what the
// layer has not.
struct Direction {
  at::Tensor input;
  at::Tensor h0, c0;
  at::Tensor weight_ih, weight_hh;
  at::Tensor bias_ih, bias_hh;
  at::Tensor weight_hr;
  at::Tensor reset_h, reset_c;                  // as h0 and c0
  at::Tensor mask;                              // (B, P): what h is multiplied by before its product with U
  at::Tensor kept_h, kept_c;                    // (all rows, P) and (all rows, H)
  at::Tensor gain_ih, gain_hh, gain_c, bias_c;  // of layer normalisation, in sum_type
  bool normalised() const { return gain_c.defined(); }
};

class Stepwise {
 public:
  Stepwise(const LayerArguments& layer, const LayerSizes& sizes, const StepwiseDevice& device, bool tf32)
      : s(sizes),
        device_(device),
        tf32_(tf32),
        dtype_(layer.input.scalar_type()),
        has_bias_(layer.has_bias),
        input_(with_contiguous_rows(layer.input)),
        h0_(contiguous_or_undefined(layer.h0, dtype_)),
        c0_(contiguous_or_undefined(layer.c0, dtype_)),
        weights_(contiguous_weights(layer.weights, dtype_)),
        resets_(contiguous_or_undefined(layer.extras.resets, at::kBool)),
        reset_h_(contiguous_or_undefined(layer.extras.reset_h, dtype_)),
        reset_c_(contiguous_or_undefined(layer.extras.reset_c, dtype_)),
        lengths_(contiguous_or_undefined(layer.extras.lengths, at::kLong)),
        mask_(contiguous_or_undefined(layer.extras.recurrent_mask, s.sum_type)),
        kept_h_(contiguous_or_undefined(layer.extras.kept_h, at::kBool)),
        kept_c_(contiguous_or_undefined(layer.extras.kept_c, at::kBool)),
        share_h_(layer.extras.zoneout_h),
        share_c_(layer.extras.zoneout_c),
        norm_(contiguous_weights(layer.extras.norm, s.sum_type)),
        recompute_(layer.extras.recompute) {}

 protected:
  Direction direction(int64_t d) const {
    const at::Tensor* w = weights_.data() + d * s.weights_per_direction;
    Direction l;
    l.input = input_;
    l.h0 = part_of(h0_, d);
    l.c0 = part_of(c0_, d);
    l.weight_ih = w[0];
    l.weight_hh = w[1];
    if (has_bias_) {
      l.bias_ih = w[2];
      l.bias_hh = w[3];
    }
    if (s.projected) l.weight_hr = w[s.weights_per_direction - 1];
    l.reset_h = part_of(reset_h_, d);
    l.reset_c = part_of(reset_c_, d);
    l.mask = part_of(mask_, d);
    if (kept_h_.defined()) l.kept_h = kept_h_.select(0, d).view({total_rows(), -1});
    if (kept_c_.defined()) l.kept_c = kept_c_.select(0, d).view({total_rows(), -1});
    if (!norm_.empty()) {
      const at::Tensor* n = norm_.data() + d * norms_per_direction();
      l.gain_ih = n[0];
      l.gain_hh = n[1];
      l.gain_c = n[2];
      if (has_bias_) l.bias_c = n[3];
    }
    return l;
  }
  int64_t norms_per_direction() const { return has_bias_ ? 4 : 3; }

  // Of step n in the direction of time. In the reverse direction a cut lies before the step that is after it in time.
  cuda::ResetFlags resets_of(const Steps& steps, int64_t n) const {
    const int64_t cut = steps.reverse() ? n - 1 : n;
    if (!resets_.defined() || cut < 0 || cut >= steps.count()) return {nullptr, 0};
    const Step step = steps[cut];
    return {static_cast<const uint8_t*>(resets_.const_data_ptr()) + step.offset, step.rows};
  }

  cuda::RowsOfStep rows_of(const Steps& steps, int64_t n, const Step& step) const {
    return {step.rows,           step.continuing,         step.going_on,
            resets_of(steps, n), resets_of(steps, n + 1), const_row_pointer<int64_t>(lengths_),
            step.time,           steps.reverse()};
  }

  bool keeps_h() const { return kept_h_.defined() || share_h_ != 0; }
  template <typename A>
  cuda::Zoneout<A> zoneout_h(const Direction& l, const Step& step) const {
    return {flag_pointer(l.kept_h, step.offset), static_cast<A>(share_h_)};
  }
  template <typename A>
  cuda::Zoneout<A> zoneout_c(const Direction& l, const Step& step) const {
    return {flag_pointer(l.kept_c, step.offset), static_cast<A>(share_c_)};
  }

  // h (B, P) as its product with U sees it.
  at::Tensor masked(const at::Tensor& h, const at::Tensor& mask) const {
    return h.defined() && mask.defined() ? h.to(s.sum_type).mul(mask).to(dtype_) : h;
  }

  // All rows of the sequence, one below the other.
  int64_t total_rows() const { return s.packed() ? s.step_offsets.back() : s.steps * s.batch; }
  at::Tensor saved_rows(const at::Tensor& saved, int64_t d) const {
    return saved.defined() ? saved.select(0, d).view({total_rows(), -1}) : saved;
  }
  // How many rows a piece of the sequence may have, of which `bytes` are kept for each.
  int64_t piece_rows(int64_t bytes) const { return std::max<int64_t>(device_.chunk_bytes / bytes, 1); }

  at::TensorOptions options(at::ScalarType type) const { return input_.options().dtype(type); }

  // c = a b, or c += a b.
  void product(const at::Tensor& c, const at::Tensor& a, const at::Tensor& b, bool accumulate = false) const {
    // A cell may have no input features; what cuBLAS does then it does not say.
    if (a.size(1) == 0 && !accumulate) c.zero_();
    if (a.size(1) == 0 || c.numel() == 0) return;
    // Kept until the product is on its way; the allocator keeps the memory until it is done.
    const at::Tensor left = gemm_operand(a), right = gemm_operand(b);
    product(describe_gemm(c, left, right, accumulate, tf32_));
  }
  RowsGemm rows_gemm(const at::Tensor& c, const at::Tensor& a, const at::Tensor& b) const { return {c, a, b, tf32_}; }
  std::optional<RowsGemm> rows_gemm_if(bool there, const at::Tensor& c, const at::Tensor& a,
                                       const at::Tensor& b) const {
    return there ? std::optional<RowsGemm>(rows_gemm(c, a, b)) : std::nullopt;
  }

  void product(const Gemm& gemm) const { device_.gemm(gemm, device_.context); }

  void check(cudaError_t error, const char* kernel) const {
    TORCH_CHECK(error == cudaSuccess, "lstm_ext: the kernel ", kernel, " did not start: ", cudaGetErrorString(error));
  }

  const LayerSizes& s;
  const StepwiseDevice& device_;
  const bool tf32_;
  const at::ScalarType dtype_;
  const bool has_bias_;
  const at::Tensor input_, h0_, c0_;
  const std::vector<at::Tensor> weights_;
  // Undefined or empty where there are none.
  const at::Tensor resets_, reset_h_, reset_c_, lengths_, mask_, kept_h_, kept_c_;
  const double share_h_, share_c_;  // of zoneout without masks
  const std::vector<at::Tensor> norm_;
  const bool recompute_;
};

}  // namespace lstm_ext
