#include <ATen/ATen.h>

#include <algorithm>
#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu/kernels.h"
#include "torch/cpu_lengths.h"
#include "torch/backend.h"
#include "torch/parallel.h"
#include "torch/tensors.h"

namespace lstm_ext {
namespace {

// What the kernels want of a sequence: the innermost axis contiguous.
at::Tensor with_contiguous_rows(const at::Tensor& tensor, at::ScalarType type) {
  const at::Tensor t = in_type(materialized(tensor), type);
  const bool rows_contiguous = t.size(-1) == 1 || t.stride(-1) == 1;
  return rows_contiguous ? t : t.contiguous();
}

// Columns from `first` on of a (T, B, n) or, if packed, (N, n) tensor.
template <typename T>
Sequence<const T> const_columns_of(const at::Tensor& t, int64_t first) {
  return {t.const_data_ptr<T>() + first, t.dim() == 3 ? t.stride(0) : 0, t.stride(-2)};
}
template <typename T>
Sequence<T> columns_of(const at::Tensor& t, int64_t first) {
  return {t.mutable_data_ptr<T>() + first, t.dim() == 3 ? t.stride(0) : 0, t.stride(-2)};
}

// Rows of `direction` of a contiguous (D, ...) tensor, or null.
template <typename T>
T* part_or_null(const at::Tensor& t, int64_t direction) {
  return t.defined() ? t.mutable_data_ptr<T>() + direction * (t.numel() / t.size(0)) : nullptr;
}
template <typename T>
const T* const_part_or_null(const at::Tensor& t, int64_t direction) {
  return t.defined() ? t.const_data_ptr<T>() + direction * (t.numel() / t.size(0)) : nullptr;
}

template <typename T>
LayerWeights<T> weights_of(const std::vector<at::Tensor>& weights, const LayerSizes& s, bool has_bias,
                           int64_t direction) {
  const at::Tensor* w = weights.data() + direction * s.weights_per_direction;
  return {w[0].const_data_ptr<T>(), w[1].const_data_ptr<T>(), has_bias ? w[2].const_data_ptr<T>() : nullptr,
          has_bias ? w[3].const_data_ptr<T>() : nullptr,
          s.projected ? w[s.weights_per_direction - 1].const_data_ptr<T>() : nullptr};
}

LayerShape shape_of(const LayerSizes& s, int64_t direction, const at::Tensor& resets) {
  static_assert(sizeof(bool) == sizeof(uint8_t));
  return {s.steps,
          s.batch,
          s.input_size,
          s.hidden_size,
          s.output_size,
          s.projected,
          direction == 1,
          s.packed() ? s.step_offsets.data() : nullptr,
          resets.defined() ? static_cast<const uint8_t*>(resets.const_data_ptr()) : nullptr};
}

// The resets, as kernels want them.
struct ResetTensors {
  at::Tensor flags, h, c;
};
ResetTensors reset_tensors(const Extras& extras, at::ScalarType type) {
  return {contiguous_or_undefined(extras.resets, at::kBool), contiguous_or_undefined(extras.reset_h, type),
          contiguous_or_undefined(extras.reset_c, type)};
}

// The extras that change a step, as kernels want them: what is drawn at random, in its own type, and parameters.
struct StepTensors {
  at::Tensor recurrent_mask, kept_h, kept_c;
  std::vector<at::Tensor> norm;
  double zoneout_h, zoneout_c;
};
StepTensors step_tensors(const Extras& extras, at::ScalarType type) {
  return {contiguous_or_undefined(extras.recurrent_mask, type),
          contiguous_or_undefined(extras.kept_h, at::kBool),
          contiguous_or_undefined(extras.kept_c, at::kBool),
          contiguous_weights(extras.norm, type),
          extras.zoneout_h,
          extras.zoneout_c};
}

const uint8_t* flags_or_null(const at::Tensor& t, int64_t direction) {
  return reinterpret_cast<const uint8_t*>(const_part_or_null<bool>(t, direction));
}

template <typename T>
StepOptions<T> extras_of(const StepTensors& t, const LayerSizes& s, int64_t direction) {
  StepOptions<T> e{};
  e.recurrent_mask = const_part_or_null<T>(t.recurrent_mask, direction);
  e.zoneout_h = {flags_or_null(t.kept_h, direction), static_cast<T>(t.zoneout_h)};
  e.zoneout_c = {flags_or_null(t.kept_c, direction), static_cast<T>(t.zoneout_c)};
  if (!t.norm.empty()) {
    const size_t count = t.norm.size() / s.directions;
    const at::Tensor* own = t.norm.data() + direction * count;
    const auto data = [&](size_t i) { return own[i].const_data_ptr<T>(); };
    e.norm = {data(0), data(1), data(2), count == 4 ? data(3) : nullptr};
  }
  return e;
}

template <typename T>
cpu::Machine machine_for(const cpu::Kernels<T>& kernels, int threads) {
  return {kernels.lanes, threads};
}

// An uninitialised tensor that is written from end to end soon. Fresh memory of many megabytes costs
// a page fault per 4 KiB, which is several percent of a training step; huge pages avoid most of it.
at::Tensor empty_in_huge_pages(at::IntArrayRef sizes, const at::TensorOptions& options) {
  at::Tensor tensor = at::empty(sizes, options);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = uintptr_t{1} << 21;
  const auto address = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
  const uintptr_t begin = (address + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (address + tensor.nbytes()) / kHugePage * kHugePage;
  // Only whole huge pages inside the tensor, so that no memory is taken that would not be used. A
  // refusal costs nothing but the gain.
  if (begin < end) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  return tensor;
}

// Plans the call, lays out the workspace and runs the kernel on the planned workers; on one, if
// the system refuses threads.
template <typename MakePlan, typename Kernel>
void run_kernel(const MakePlan& make_plan, const Kernel& kernel, const at::TensorOptions& options) {
  for (int threads = available_threads();; threads = 1) {
    const auto plan = make_plan(threads);
    constexpr int64_t kAlignment = 64;
    const at::Tensor workspace = empty_in_huge_pages({plan.workspace_bytes + kAlignment}, options.dtype(at::kByte));
    auto address = reinterpret_cast<uintptr_t>(workspace.mutable_data_ptr<uint8_t>());
    char* base = reinterpret_cast<char*>((address + kAlignment - 1) / kAlignment * kAlignment);
    std::memset(base, 0, static_cast<size_t>(plan.barrier_bytes));
    if (run_at_once(plan.grid.workers(), [&](int worker) { kernel(plan, base, worker); })) return;
  }
}

ForwardResult cpu_forward(const LayerArguments& layer, const LayerSizes& s, bool save) {
  if (layer.extras.lengths) return forward_with_lengths(layer, s, save);
  const at::Tensor& input = layer.input;
  const at::ScalarType type = s.sum_type;
  const auto options = input.options().dtype(type);
  const at::Tensor output = empty_in_huge_pages(s.sequence_sizes(s.directions * s.output_size), options);
  const at::Tensor h_n = at::empty({s.directions, s.batch, s.output_size}, options);
  const at::Tensor c_n = at::empty({s.directions, s.batch, s.hidden_size}, options);
  std::vector<at::Tensor> saved;
  const auto save_as = [&](at::IntArrayRef sizes) {
    saved.push_back(empty_in_huge_pages(sizes, options));
    return saved.back();
  };
  const auto save_rows = [&](int64_t features) { return save_as(s.saved_sizes(features)); };
  at::Tensor gates, cells, hidden, norm_products, norm_factors;
  if (save) {
    const bool all = !layer.extras.recompute;
    if (all) gates = save_rows(4 * s.hidden_size);
    cells = save_rows(s.hidden_size);
    if (all && s.projected) hidden = save_rows(s.hidden_size);
    if (!layer.extras.norm.empty()) {
      norm_products = save_as(s.saved_product_sizes());
      norm_factors = save_rows(2);
    }
  }
  const auto results = [&] {
    const at::ScalarType dtype = input.scalar_type();
    return std::make_tuple(in_type(output, dtype), in_type(h_n, dtype), in_type(c_n, dtype), saved);
  };
  if (s.batch == 0) return results();

  const at::Tensor x = with_contiguous_rows(input, type);
  const at::Tensor h = contiguous_or_undefined(layer.h0, type);
  const at::Tensor c = contiguous_or_undefined(layer.c0, type);
  const std::vector<at::Tensor> w = contiguous_weights(layer.weights, type);
  const ResetTensors reset = reset_tensors(layer.extras, type);
  const StepTensors of_steps = step_tensors(layer.extras, type);
  AT_DISPATCH_FLOATING_TYPES(type, "lstm_layer_forward", [&] {
    const cpu::Kernels<scalar_t>& kernels = cpu::kernels<scalar_t>();
    for (int64_t d = 0; d < s.directions; ++d) {
      ForwardParams<scalar_t> p{};
      p.shape = shape_of(s, d, reset.flags);
      p.reset_state = {const_part_or_null<scalar_t>(reset.h, d), const_part_or_null<scalar_t>(reset.c, d)};
      p.weights = weights_of<scalar_t>(w, s, layer.has_bias, d);
      p.input = const_columns_of<scalar_t>(x, 0);
      p.h0 = const_part_or_null<scalar_t>(h, d);
      p.c0 = const_part_or_null<scalar_t>(c, d);
      p.output = columns_of<scalar_t>(output, d * s.output_size);
      p.h_n = part_or_null<scalar_t>(h_n, d);
      p.c_n = part_or_null<scalar_t>(c_n, d);
      p.options = extras_of<scalar_t>(of_steps, s, d);
      p.gate_values = part_or_null<scalar_t>(gates, d);
      p.cells = part_or_null<scalar_t>(cells, d);
      p.hidden = part_or_null<scalar_t>(hidden, d);
      p.norm_input = part_or_null<scalar_t>(norm_products, d);
      p.norm_recurrent = part_or_null<scalar_t>(norm_products, s.directions + d);
      p.norm_factors = part_or_null<scalar_t>(norm_factors, d);
      run_kernel([&](int threads) { return cpu::plan_forward(p, machine_for(kernels, threads)); },
                 [&](const cpu::ForwardPlan& plan, char* workspace, int worker) {
                   kernels.forward(p, plan, workspace, worker);
                 },
                 options);
    }
  });
  return results();
}

std::vector<at::Tensor> cpu_backward(const LayerArguments& layer, const LayerSizes& s, const BackwardArguments& g) {
  if (layer.extras.lengths) return backward_with_lengths(layer, s, g);
  const at::Tensor& input = layer.input;
  const std::vector<at::Tensor>& weights = layer.weights;
  const bool has_bias = layer.has_bias;
  const std::vector<bool>& wanted = g.wanted;
  const at::ScalarType dtype = input.scalar_type();
  const at::ScalarType type = s.sum_type;
  const auto options = input.options().dtype(type);
  const auto count = static_cast<int64_t>(weights.size());
  std::vector<at::Tensor> grads(wanted.size());
  if (wanted[0]) grads[0] = empty_in_huge_pages(s.sequence_sizes(s.input_size), options);
  if (wanted[1] && layer.h0) grads[1] = at::empty({s.directions, s.batch, s.output_size}, options);
  const at::Tensor grad_c = at::empty({s.directions, s.batch, s.hidden_size}, options);
  if (wanted[2] && layer.c0) grads[2] = grad_c;
  for (int64_t i = 0; i < count; ++i) {
    if (wanted[3 + i]) grads[3 + i] = empty_in_huge_pages(weights[i].sizes(), options);
  }
  const bool more = static_cast<int64_t>(wanted.size()) > 3 + count;  // gradients of the extras
  if (more) {
    if (wanted[3 + count] && layer.extras.reset_h) grads[3 + count] = at::empty(layer.extras.reset_h->sizes(), options);
    if (wanted[4 + count] && layer.extras.reset_c) grads[4 + count] = at::empty(layer.extras.reset_c->sizes(), options);
    for (size_t i = 0; i < layer.extras.norm.size(); ++i) {
      if (wanted[5 + count + i]) grads[5 + count + i] = at::empty(layer.extras.norm[i].sizes(), options);
    }
  }
  const auto results = [&] {
    for (size_t i = 0; i < grads.size(); ++i) {
      if (!grads[i].defined()) continue;
      const size_t of_norm = 5 + weights.size();  // whose parameters keep their own type under autocast
      grads[i] = in_type(grads[i], i < of_norm ? dtype : layer.extras.norm[i - of_norm].scalar_type());
    }
    return grads;
  };
  if (s.batch == 0) {
    for (const at::Tensor& g : grads) {
      if (g.defined()) g.zero_();
    }
    return results();
  }

  const at::Tensor x = with_contiguous_rows(input, type);
  const at::Tensor h = contiguous_or_undefined(layer.h0, type);
  const at::Tensor c = contiguous_or_undefined(layer.c0, type);
  const std::vector<at::Tensor> w = contiguous_weights(weights, type);
  const ResetTensors reset = reset_tensors(layer.extras, type);
  const StepTensors of_steps = step_tensors(layer.extras, type);
  const at::Tensor y = with_contiguous_rows(g.output, type);
  const at::Tensor dy = g.grad_output ? with_contiguous_rows(*g.grad_output, type) : at::Tensor();
  const at::Tensor dh = contiguous_or_undefined(g.grad_h_n, type);
  const at::Tensor dc = contiguous_or_undefined(g.grad_c_n, type);
  const bool rebuild = layer.extras.recompute;
  const at::Tensor gates = rebuild ? at::Tensor() : g.saved[0].contiguous();
  const at::Tensor cells = g.saved[rebuild ? 0 : 1].contiguous();
  const at::Tensor hidden = s.projected && !rebuild ? g.saved[2].contiguous() : at::Tensor();
  at::Tensor norm_products, norm_factors;
  if (!layer.extras.norm.empty()) {
    norm_products = g.saved[g.saved.size() - 2].contiguous();
    norm_factors = g.saved.back().contiguous();
  }
  const at::Tensor grad_gates = contiguous_or_undefined(g.grad_gates, type);
  const at::Tensor grad_cells = contiguous_or_undefined(g.grad_cells, type);

  AT_DISPATCH_FLOATING_TYPES(type, "lstm_layer_backward", [&] {
    const cpu::Kernels<scalar_t>& kernels = cpu::kernels<scalar_t>();
    for (int64_t d = 0; d < s.directions; ++d) {
      const int64_t first = 3 + d * s.weights_per_direction;
      BackwardParams<scalar_t> p{};
      p.shape = shape_of(s, d, reset.flags);
      p.reset_state = {const_part_or_null<scalar_t>(reset.h, d), const_part_or_null<scalar_t>(reset.c, d)};
      p.weights = weights_of<scalar_t>(w, s, has_bias, d);
      p.input = const_columns_of<scalar_t>(x, 0);
      p.h0 = const_part_or_null<scalar_t>(h, d);
      p.c0 = const_part_or_null<scalar_t>(c, d);
      p.output = const_columns_of<scalar_t>(y, d * s.output_size);
      p.gate_values = const_part_or_null<scalar_t>(gates, d);
      p.cells = const_part_or_null<scalar_t>(cells, d);
      p.hidden = const_part_or_null<scalar_t>(hidden, d);
      p.options = extras_of<scalar_t>(of_steps, s, d);
      p.norm_input = const_part_or_null<scalar_t>(norm_products, d);
      p.norm_recurrent = const_part_or_null<scalar_t>(norm_products, s.directions + d);
      p.norm_factors = const_part_or_null<scalar_t>(norm_factors, d);
      if (dy.defined()) p.grad_output = const_columns_of<scalar_t>(dy, d * s.output_size);
      p.grad_cells = const_part_or_null<scalar_t>(grad_cells, d);
      p.grad_gate_values = const_part_or_null<scalar_t>(grad_gates, d);
      p.grad_h_n = const_part_or_null<scalar_t>(dh, d);
      p.grad_c_n = const_part_or_null<scalar_t>(dc, d);
      p.grad_c = part_or_null<scalar_t>(grad_c, d);
      if (grads[0].defined()) p.grad_input = columns_of<scalar_t>(grads[0], 0);
      p.accumulate_grad_input = d > 0;
      p.grad_h0 = part_or_null<scalar_t>(grads[1], d);
      if (more) {
        p.grad_reset_h = part_or_null<scalar_t>(grads[3 + count], d);
        p.grad_reset_c = part_or_null<scalar_t>(grads[4 + count], d);
        const size_t sets = layer.extras.norm.size() / s.directions;
        const auto norm_grad = [&](size_t i) {
          const at::Tensor& grad = i < sets ? grads[5 + count + d * sets + i] : at::Tensor();
          return grad.defined() ? grad.mutable_data_ptr<scalar_t>() : nullptr;
        };
        p.grad_gain_ih = norm_grad(0);
        p.grad_gain_hh = norm_grad(1);
        p.grad_gain_c = norm_grad(2);
        p.grad_bias_c = norm_grad(3);
      }
      const auto weight_grad = [&](int64_t i) {
        return grads[first + i].defined() ? grads[first + i].mutable_data_ptr<scalar_t>() : nullptr;
      };
      p.grad_weight_ih = weight_grad(0);
      p.grad_weight_hh = weight_grad(1);
      if (has_bias) p.grad_bias = weight_grad(2) ? weight_grad(2) : weight_grad(3);
      if (s.projected) p.grad_weight_hr = weight_grad(s.weights_per_direction - 1);
      run_kernel([&](int threads) { return cpu::plan_backward(p, machine_for(kernels, threads)); },
                 [&](const cpu::BackwardPlan& plan, char* workspace, int worker) {
                   kernels.backward(p, plan, workspace, worker);
                 },
                 options);
      // Both biases are added to the same sum, so they have the same gradient.
      if (has_bias && weight_grad(2) && weight_grad(3)) grads[first + 3].copy_(grads[first + 2]);
    }
  });
  return results();
}

}  // namespace

const Backend& cpu_backend() {
  static const Backend backend{&cpu_forward, &cpu_backward};
  return backend;
}

}  // namespace lstm_ext
