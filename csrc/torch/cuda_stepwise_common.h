// Shared by both passes of the stepwise layer: its arguments in the form that kernels take, direction by direction and
// step by step.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <vector>

#include "cuda/persistent.h"
#include "cuda/step.h"
#include "torch/cuda_steps.h"
#include "torch/cuda_stepwise.h"
#include "torch/tensors.h"

namespace lstm_ext {

// The kernels' type for a dtype.
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

inline at::Tensor part_of(const at::Tensor& t, int64_t direction) { return t.defined() ? t.select(0, direction) : t; }

inline at::Tensor transposed(const at::Tensor& t) { return t.defined() ? t.t() : t; }

inline at::Tensor empty_if(bool there, at::IntArrayRef sizes, const at::TensorOptions& options) {
  return there ? at::empty(sizes, options) : at::Tensor();
}
inline at::Tensor zeros_if(bool there, at::IntArrayRef sizes, const at::TensorOptions& options) {
  return there ? at::zeros(sizes, options) : at::Tensor();
}

// The steps from time `begin` to time `finish`, one below the other: (rows, n). Copies them if they are not contiguous.
inline at::Tensor rows_between(const at::Tensor& sequence, const Steps& steps, int64_t begin, int64_t finish) {
  if (sequence.dim() == 3) return sequence.narrow(0, begin, finish - begin).flatten(0, 1);
  return sequence.narrow(0, steps.rows_before(begin), steps.rows_before(finish) - steps.rows_before(begin));
}

// Whether a pass needs more than torch.nn.LSTM, so that the kernel of a step needs instructions of its own. All kernels
// are chosen by this one answer. Resets do not count, because every kernel reads their flags; layer normalisation has
// kernels of its own. `args` is null in the forward pass.
inline bool needs_options(const LayerOptions& options, const LayerSizes& sizes, const BackwardArguments* args) {
  return has_options<kStep | kCell>(options) ||
         (args &&
          (args->grads.cells.defined() || args->grads.gate_values.defined() || (options.recompute && sizes.projected)));
}

inline void check(cudaError_t error, const char* kernel) {
  if (error == cudaSuccess) return;
  // A fault is permanent for the process: every later launch reports it.
  const bool fault = error == cudaErrorIllegalAddress || error == cudaErrorMisalignedAddress ||
                     error == cudaErrorIllegalInstruction || error == cudaErrorLaunchFailure ||
                     error == cudaErrorLaunchTimeout || error == cudaErrorAssert;
  TORCH_CHECK(false, "lstm_ext: the kernel ", kernel,
              fault ? " was not the first to fail: " : " did not start: ", cudaGetErrorString(error),
              fault ? ". An earlier kernel did; CUDA_LAUNCH_BLOCKING=1 shows which" : "");
}

// Whether a type has fused kernels.
template <typename T>
constexpr bool kHasStep = !std::is_same_v<T, double>;

inline cuda::Number number_of(at::ScalarType type) {
  switch (type) {
    case at::kDouble: return cuda::Number::kFloat64;
    case at::kFloat: return cuda::Number::kFloat32;
    case at::kHalf: return cuda::Number::kFloat16;
    default: return cuda::Number::kBFloat16;
  }
}
inline cuda::LayerFacts facts_of(const LayerCall& call, const LayerSizes& sizes, bool tf32, bool backward) {
  return {sizes.steps,
          sizes.batch,
          sizes.input_size,
          sizes.hidden_size,
          static_cast<int>(sizes.directions),
          number_of(call.input.scalar_type()),
          tf32,
          sizes.projected,
          !call.options.norm.empty(),
          has_options<kCell>(call.options),
          backward,
          sizes.packed()};
}

// The matrix with rows that the fused kernels can read: `matrix` itself, or a copy.
inline bool has_aligned_rows(const at::Tensor& matrix) {
  const int64_t bytes = matrix.element_size(), address = reinterpret_cast<int64_t>(matrix.const_data_ptr());
  return matrix.stride(1) == 1 && matrix.stride(0) * bytes % cuda::kStepAlignment == 0 &&
         address % cuda::kStepAlignment == 0;
}
inline int64_t aligned_length(int64_t length, size_t size) {
  const int64_t numbers = cuda::kStepAlignment / static_cast<int64_t>(size);
  return (length + numbers - 1) / numbers * numbers;
}
inline at::Tensor with_aligned_rows(const at::Tensor& matrix) {
  if (has_aligned_rows(matrix)) return matrix;
  const int64_t rows = matrix.size(0), length = matrix.size(1);
  const at::Tensor copy = at::empty({rows, aligned_length(length, matrix.element_size())}, matrix.options());
  return copy.narrow(1, 0, length).copy_(matrix);
}

// The inputs of one direction, or their gradients. States (B, ...) and parameters are contiguous; absent ones are
// undefined.
struct DirectionInputs : DirectionParameters {
  at::Tensor h0, c0;
  at::Tensor reset_h, reset_c;  // same shapes as h0 and c0
};
// The arguments of one direction.
struct Direction : DirectionInputs {
  LayerShape shape;
  at::Tensor input;
  at::Tensor recurrent_mask;  // (B, P)
  at::Tensor keep_h, keep_c;  // (all rows, P) and (all rows, H)
  bool normalised() const { return gain_c.defined(); }
  Steps steps() const { return {shape, Steps::Pass::kForward}; }
};

class Stepwise {
 public:
  Stepwise(const LayerCall& call, const LayerSizes& sizes, const BackwardArguments* args, const StepwiseDevice& device,
           bool tf32)
      : sizes_(sizes),
        device_(device),
        tf32_(tf32),
        dtype_(call.input.scalar_type()),
        call_(readable(call, sizes)),
        has_options_(needs_options(call.options, sizes, args)),
        dependent_(device.facts->capability >= 90 && cuda::step_kernels_wait()) {
    cuda::Request request = device.request;
    request.most_blocks = cuda::most_blocks(device.facts);
    const cuda::Plan plan = cuda::plan(facts_of(call, sizes, device.tf32, args != nullptr), *device.facts, request);
    // Fused and stepwise passes save the same tensors, so a backward pass that cannot be fused runs stepwise.
    TORCH_CHECK(plan.problem.empty() || args, "lstm_ext: LSTM_EXT_CUDA_KERNEL=", cuda::name_of(device.request.kernel),
                " asks for a kernel that does a step at once, but ", plan.problem,
                ": set it to stepwise or auto, or unset it");
    if (plan.replaced && !args && sizes.steps > 1 && !cuda::has_request_of_thread()) {
      TORCH_WARN_ONCE("lstm_ext: LSTM_EXT_CUDA_KERNEL=persistent: another kernel computes a layer whose sizes it ",
                      "cannot have: ", plan.persistent.problem, "; lstm_ext.explain says more");
    }
    fused_ = plan.kernel == cuda::Kernel::kStep;
    if (plan.kernel == cuda::Kernel::kPersistent) persistent_ = plan.persistent;
    if (!plan.one_product) return;
    const at::ScalarType type = args ? gradient_type() : dtype_;
    both_weight_hh_ =
        at::stack({in_type(call_.weights[1], type), in_type(call_.weights[sizes.weights_per_direction + 1], type)});
  }

 protected:
  // The call with tensors that the kernels can read.
  static LayerCall readable(const LayerCall& call, const LayerSizes& sizes) {
    return lstm_ext::readable(
        call, sizes, [](const at::Tensor& t, bool) { return t.scalar_type(); },
        [](const at::Tensor& t, at::ScalarType type) { return materialized(t, type); });
  }

  // `call`: call_, or its gradients.
  DirectionInputs inputs_of(const LayerCall& call, int64_t d) const {
    DirectionInputs inputs;
    static_cast<DirectionParameters&>(inputs) = sizes_.parameters(call, d);
    inputs.h0 = part_of(call.h0, d);
    inputs.c0 = part_of(call.c0, d);
    inputs.reset_h = part_of(call.options.reset_h, d);
    inputs.reset_c = part_of(call.options.reset_c, d);
    return inputs;
  }
  Direction direction(int64_t d) const {
    Direction layer;
    static_cast<DirectionInputs&>(layer) = inputs_of(call_, d);
    layer.shape = sizes_.shape(d, options_.resets);
    layer.input = input_;
    layer.recurrent_mask = part_of(options_.recurrent_mask, d);
    layer.keep_h = rows_of_direction(options_.keep_h, d);
    layer.keep_c = rows_of_direction(options_.keep_c, d);
    return layer;
  }

  cuda::StepRows step_rows(const Direction& layer, int64_t n) const {
    const Steps steps = layer.steps();
    const Step step = step_at(steps, n);
    const bool last = n + 1 == steps.count();
    return {step.rows,
            step.previous_rows,
            step.next_rows,
            steps.resets_before(step.time),
            last ? ResetFlags{nullptr, 0} : steps.resets_before(steps.time(n + 1)),
            row_pointer<const int64_t>(options_.lengths),
            step.time,
            layer.shape.reverse,
            has_options_};
  }

  // The dtype of cuda::Types<T>::Gradient.
  at::ScalarType gradient_type() const { return dtype_ == at::kHalf ? at::kFloat : dtype_; }

  // Whether one product computes a step of both directions.
  bool one_product() const { return both_weight_hh_.defined(); }

  void products(const cuda::StepSides<Gemm>& of_step) const {
    if (one_product() && of_step.count == 2) {
      product(both_products(of_step.sides[0], of_step.sides[1]));
      return;
    }
    for (int side = 0; side < of_step.count; ++side) product(of_step.sides[side]);
  }

  // Preactivations of 16 bits are saved rounded.
  template <typename A>
  cell::Options<A> cell_options(int64_t d) const {
    return lstm_ext::cell_options<A>(options_, d, !options_.recompute && dtype_ == sizes_.sum_type);
  }
  bool has_zoneout_h() const { return options_.keep_h.defined() || options_.zoneout_h != 0; }
  template <typename A>
  Zoneout<A> zoneout_h(const Direction& layer, const Step& step) const {
    return {flag_pointer(layer.keep_h, step.offset), static_cast<A>(options_.zoneout_h)};
  }
  template <typename A>
  Zoneout<A> zoneout_c(const Direction& layer, const Step& step) const {
    return {flag_pointer(layer.keep_c, step.offset), static_cast<A>(options_.zoneout_c)};
  }

  // The number of rows of the sequence, over all steps.
  int64_t total_rows() const { return sizes_.packed() ? sizes_.step_offsets.back() : sizes_.steps * sizes_.batch; }
  // The part (all rows, n) of a contiguous (D, T, B, n) or (D, N, n), or undefined.
  at::Tensor rows_of_direction(const at::Tensor& t, int64_t d) const {
    return t.defined() ? t.select(0, d).view({total_rows(), -1}) : t;
  }
  // A part of the sequence for both directions together: the same step numbers of both.
  std::vector<Chunk> chunk_at(const std::vector<Steps>& directions, int64_t first, int64_t limit) const {
    const bool has_table = persistent_ && sizes_.packed();
    int64_t most = has_table ? cuda::kPersistentPackedSteps : sizes_.steps;
    for (const Steps& steps : directions) most = std::min(most, Chunk(steps, first, limit, most).end - first);
    std::vector<Chunk> chunks;
    for (const Steps& steps : directions) chunks.emplace_back(steps, first, INT64_MAX, most);
    return chunks;
  }
  // The number of rows in a chunk of `chunk_bytes` if each row needs `bytes`.
  int64_t chunk_rows(int64_t chunk_bytes, int64_t bytes) const {
    const int64_t most = persistent_ ? cuda::kPersistentChunkTimes * device_.chunk_bytes : 0;
    return cuda::rows_of_chunk(chunk_bytes, bytes, sizes_.batch, most);
  }

  at::TensorOptions options(at::ScalarType type) const { return input_.options().dtype(type); }

  // c = a b, or c += a b.
  void product(const at::Tensor& c, const at::Tensor& a, const at::Tensor& b, bool accumulate = false) const {
    // A cell may have no input features, and cuBLAS does not define that case.
    if (a.size(1) == 0 && !accumulate) c.zero_();
    if (a.size(1) == 0 || c.numel() == 0) return;
    // These live until the product is launched; the allocator keeps their memory until it has run.
    const at::Tensor left = gemm_operand(a), right = gemm_operand(b);
    product(describe_gemm(c, left, right, accumulate, tf32_));
  }
  RowsGemm rows_gemm(const at::Tensor& c, const at::Tensor& a, const at::Tensor& b) const { return {c, a, b, tf32_}; }
  std::optional<RowsGemm> rows_gemm_if(bool there, const at::Tensor& c, const at::Tensor& a,
                                       const at::Tensor& b) const {
    return there ? std::optional<RowsGemm>(rows_gemm(c, a, b)) : std::nullopt;
  }

  void product(const Gemm& gemm) const { device_.gemm(gemm, device_.context); }

  const LayerSizes& sizes_;
  const StepwiseDevice& device_;
  const bool tf32_;
  const at::ScalarType dtype_;
  const LayerCall call_;
  const at::Tensor& input_ = call_.input;
  const LayerOptions& options_ = call_.options;
  const bool has_options_;
  const bool dependent_;  // kernels may begin before the previous ones have ended
  bool fused_;            // a step is one kernel
  // Set if all steps of a chunk are one kernel: how the kernel is divided.
  std::optional<cuda::Plan::Persistent> persistent_;
  at::Tensor both_weight_hh_;  // U of both directions, one after the other, if one product reads both
};

}  // namespace lstm_ext
