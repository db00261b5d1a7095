#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/util/SmallVector.h>

#include <algorithm>
#include <cstring>

#include "cpu/kernels.h"
#include "torch/cpu_lengths.h"
#include "torch/backend.h"
#include "torch/frozen.h"
#include "torch/parallel.h"
#include "torch/scratch.h"
#include "torch/tensors.h"

namespace lstm_ext {
namespace {

// Converts a tensor to the type of the kernels, for use within the call.
at::Tensor converted(const at::Tensor& tensor, at::ScalarType type) {
  const at::Tensor t = is_materialized(tensor) ? tensor : materialized(tensor);
  if (t.scalar_type() == type) return t;
  return scratch_empty(t.sizes(), t.options().dtype(type)).copy_(t);
}
at::Tensor contiguous_converted(const at::Tensor& t, at::ScalarType type) {
  return t.defined() ? converted(t, type).contiguous() : t;
}
// `keep_narrow`: W and U keep their own type.
std::vector<at::Tensor> converted_weights(const std::vector<at::Tensor>& weights, at::ScalarType type,
                                          int64_t per_direction = 0, bool keep_narrow = false) {
  std::vector<at::Tensor> result;
  result.reserve(weights.size());
  for (size_t i = 0; i < weights.size(); ++i) {
    const bool keep = keep_narrow && static_cast<int64_t>(i) % per_direction < 2;
    result.push_back(contiguous_converted(weights[i], keep ? weights[i].scalar_type() : type));
  }
  return result;
}

// A sequence with a contiguous innermost axis, as the kernels require.
at::Tensor with_contiguous_rows(const at::Tensor& tensor, at::ScalarType type) {
  const at::Tensor t = converted(tensor, type);
  const bool rows_contiguous = t.size(-1) == 1 || t.stride(-1) == 1;
  return rows_contiguous ? t : t.contiguous();
}

// The columns from `first` on of a (T, B, n) or, if packed, (N, n) tensor.
template <typename T>
Sequence<const T> const_columns_of(const at::Tensor& t, int64_t first) {
  return {t.const_data_ptr<T>() + first, t.dim() == 3 ? t.stride(0) : 0, t.stride(-2)};
}
template <typename T>
Sequence<T> columns_of(const at::Tensor& t, int64_t first) {
  return {t.mutable_data_ptr<T>() + first, t.dim() == 3 ? t.stride(0) : 0, t.stride(-2)};
}

// The part of `direction` of a contiguous (D, ...) tensor, or null.
template <typename T>
T* part_or_null(const at::Tensor& t, int64_t direction) {
  return t.defined() ? t.mutable_data_ptr<T>() + direction * (t.numel() / t.size(0)) : nullptr;
}
template <typename T>
const T* const_part_or_null(const at::Tensor& t, int64_t direction) {
  return t.defined() ? t.const_data_ptr<T>() + direction * (t.numel() / t.size(0)) : nullptr;
}

WeightKind kind_of(at::ScalarType dtype) {
  if (dtype == at::kBFloat16) return WeightKind::kBFloat16;
  return dtype == at::kHalf ? WeightKind::kFloat16 : WeightKind::kOwn;
}

template <typename T>
LayerWeights<T> weights_of(const std::vector<at::Tensor>& weights, const LayerSizes& sizes, bool has_bias,
                           int64_t direction) {
  const at::Tensor* w = weights.data() + direction * sizes.weights_per_direction;
  LayerWeights<T> result{nullptr,
                         nullptr,
                         has_bias ? w[2].const_data_ptr<T>() : nullptr,
                         has_bias ? w[3].const_data_ptr<T>() : nullptr,
                         sizes.projected ? w[sizes.weights_per_direction - 1].const_data_ptr<T>() : nullptr,
                         {}};
  const WeightKind kind = kind_of(w[0].scalar_type());
  if (kind == WeightKind::kOwn) {
    result.weight_ih = w[0].const_data_ptr<T>();
    result.weight_hh = w[1].const_data_ptr<T>();
  } else {
    result.narrow = {w[0].const_data_ptr(), w[1].const_data_ptr(), kind};
  }
  return result;
}

const uint8_t* flags_or_null(const at::Tensor& t, int64_t direction) {
  return reinterpret_cast<const uint8_t*>(const_part_or_null<bool>(t, direction));
}

// `given`: those of LayerTensors.
template <typename T>
StepOptions<T> step_options(const LayerOptions& given, const LayerSizes& sizes, int64_t direction) {
  StepOptions<T> options{};
  options.recurrent_mask = const_part_or_null<T>(given.recurrent_mask, direction);
  options.zoneout_h = {flags_or_null(given.keep_h, direction), static_cast<T>(given.zoneout_h)};
  options.zoneout_c = {flags_or_null(given.keep_c, direction), static_cast<T>(given.zoneout_c)};
  options.cell = cell_options<T>(given, direction, !given.recompute);
  if (!given.norm.empty()) {
    const size_t count = given.norm.size() / sizes.directions;
    const at::Tensor* norm = given.norm.data() + direction * count;
    const auto data = [&](size_t i) { return norm[i].const_data_ptr<T>(); };
    options.norm = {data(0), data(1), data(2), count == 4 ? data(3) : nullptr};
  }
  return options;
}

// Frozen weights, if the kernels can read them, or none. The next function returns the weights that they read
// otherwise.
std::vector<at::Tensor> ready_weights(const LayerCall& call) {
  const std::vector<at::Tensor>& frozen = call.options.frozen;
  return !frozen.empty() && is_ready(frozen) ? frozen : std::vector<at::Tensor>();
}
std::vector<at::Tensor> weights_to_read(const LayerCall& call) {
  const std::vector<at::Tensor>& frozen = call.options.frozen;
  return frozen.empty() ? call.weights : thawed(frozen, call.weights);
}

// The tensors of a call in the kernels' type and with contiguous rows. `keep_narrow`: except W and U.
struct LayerTensors {
  LayerTensors(const LayerCall& call, const LayerSizes& sizes, bool keep_narrow)
      : input(with_contiguous_rows(call.input, sizes.sum_type)),
        h0(contiguous_converted(call.h0, sizes.sum_type)),
        c0(contiguous_converted(call.c0, sizes.sum_type)),
        frozen(ready_weights(call)),
        options(call.options),
        bf16_parts(bf16_parts_for(call.input.scalar_type())) {
    visit_options<~kWeights>(options, Overloaded{[&](const char*, at::Tensor& t) {
                                                   const bool flags = t.defined() && t.scalar_type() == at::kBool;
                                                   t = contiguous_converted(t, flags ? at::kBool : sizes.sum_type);
                                                 },
                                                 [&](const char*, std::vector<at::Tensor>& parameters) {
                                                   parameters = converted_weights(parameters, sizes.sum_type);
                                                 },
                                                 [](const char*, const auto&) {}});
    if (!frozen.empty()) return;
    weights = converted_weights(weights_to_read(call), sizes.sum_type, sizes.weights_per_direction, keep_narrow);
  }

  template <typename T>
  LayerParams<T> params(const LayerSizes& sizes, bool has_bias, int64_t direction) const {
    return {sizes.shape(direction, options.resets),
            frozen.empty() ? weights_of<T>(weights, sizes, has_bias, direction) : LayerWeights<T>{},
            const_columns_of<T>(input, 0),
            const_part_or_null<T>(h0, direction),
            const_part_or_null<T>(c0, direction),
            {const_part_or_null<T>(options.reset_h, direction), const_part_or_null<T>(options.reset_c, direction)},
            step_options<T>(options, sizes, direction),
            bf16_parts,
            nullptr};
  }

  at::Tensor input, h0, c0;
  std::vector<at::Tensor> frozen;   // for each direction, or empty
  std::vector<at::Tensor> weights;  // empty if they are frozen
  LayerOptions options;
  const int bf16_parts;
};

// An uninitialised tensor that is soon written completely. Fresh memory of many megabytes costs a page fault per 4 KiB,
// which is several percent of a training step; huge pages avoid most of it.
at::Tensor empty_in_huge_pages(at::IntArrayRef sizes, const at::TensorOptions& options) {
  at::Tensor tensor = empty_on_cpu(sizes, options);
  advise_huge_pages(tensor.mutable_data_ptr(), tensor.nbytes());
  return tensor;
}

// One value for each direction of a layer.
template <typename T>
using OfDirections = c10::SmallVector<T, 2>;

// Plans the call of each direction, lays out the workspace and runs the kernel on the planned workers, or on one if the
// system refuses threads. One direction follows the other, or they run at the same time if all plans allow it.
template <typename T, typename Params, typename Plan>
void run_directions(const OfDirections<Params>& params, const cpu::Kernels<T>& kernels,
                    Plan (*make_plan)(const Params&, const cpu::Machine&),
                    void (*kernel)(const Params&, const Plan&, char* workspace, int worker),
                    const at::TensorOptions& options, bool sums_over_workers) {
  constexpr int64_t kAlignment = 64;
  bool refused = false;
  for (size_t first = 0; first < params.size();) {
    const int threads = refused ? 1 : available_threads(/*always_all=*/sums_over_workers);
    const cpu::Machine machine{kernels.lanes, threads, kernels.engine, worker_costs()};
    OfDirections<Plan> plans{make_plan(params[first], machine)};
    while (plans.back().directions_at_once && first + plans.size() < params.size()) {
      plans.push_back(make_plan(params[first + plans.size()], machine));
    }
    if (!plans.back().directions_at_once) plans.resize(1);
    struct Place {
      int64_t at;
      int first_worker;
    };
    OfDirections<Place> places;
    Place end{0, 0};
    double work = 0;
    for (const Plan& plan : plans) {
      work += plan.grid.work;
      places.push_back(end);
      end.at += (plan.workspace_bytes + kAlignment - 1) / kAlignment * kAlignment;
      end.first_worker += plan.grid.workers();
    }
    const at::Tensor workspace = scratch_empty({end.at + kAlignment}, options.dtype(at::kByte));
    auto address = reinterpret_cast<uintptr_t>(workspace.mutable_data_ptr<uint8_t>());
    char* base = reinterpret_cast<char*>((address + kAlignment - 1) / kAlignment * kAlignment);
    for (size_t i = 0; i < plans.size(); ++i) {
      std::memset(base + places[i].at, 0, static_cast<size_t>(plans[i].barrier_bytes));
    }
    const bool ran = run_at_once(end.first_worker, work, [&](int worker) {
      size_t i = plans.size() - 1;
      while (worker < places[i].first_worker) --i;
      kernel(params[first + i], plans[i], base + places[i].at, worker - places[i].first_worker);
    });
    if (ran) {
      first += plans.size();
    } else {
      refused = true;
    }
  }
}

LayerResults cpu_forward(const LayerCall& call, const LayerSizes& sizes, bool save) {
  if (!call.options.frozen.empty()) check_frozen(call.options.frozen, sizes, call.input);
  if (call.options.lengths.defined()) return forward_with_lengths(call, sizes, save);
  const at::Tensor& input = call.input;
  const at::ScalarType type = sizes.sum_type;
  const auto options = input.options().dtype(type);
  const auto empty_result = type == input.scalar_type() ? &empty_in_huge_pages : &scratch_empty;
  const at::Tensor output = empty_result(sizes.sequence_sizes(sizes.directions * sizes.output_size), options);
  const at::Tensor h_n = empty_on_cpu({sizes.directions, sizes.batch, sizes.output_size}, options);
  const at::Tensor c_n = empty_on_cpu({sizes.directions, sizes.batch, sizes.hidden_size}, options);
  Saved saved = save ? sizes.empty_saved(call, options, &scratch_empty) : Saved{};
  const auto results = [&]() -> LayerResults {
    const at::ScalarType dtype = input.scalar_type();
    return {in_type(output, dtype), in_type(h_n, dtype), in_type(c_n, dtype), std::move(saved)};
  };
  if (sizes.batch == 0) return results();

  const LayerTensors tensors(call, sizes, call.options.frozen.empty());
  AT_DISPATCH_FLOATING_TYPES(type, "lstm_layer_forward", [&] {
    const cpu::Kernels<scalar_t>& kernels = cpu::kernels<scalar_t>();
    OfDirections<ForwardParams<scalar_t>> params(sizes.directions);
    OfDirections<FrozenWeights<scalar_t>> frozen(tensors.frozen.size());
    for (int64_t d = 0; d < sizes.directions; ++d) {
      ForwardParams<scalar_t>& p = params[d];
      static_cast<LayerParams<scalar_t>&>(p) = tensors.params<scalar_t>(sizes, call.has_bias, d);
      if (!tensors.frozen.empty()) {
        frozen[d] = frozen_weights<scalar_t>(tensors.frozen[d]);
        p.frozen = &frozen[d];
      }
      p.output = columns_of<scalar_t>(output, d * sizes.output_size);
      p.h_n = part_or_null<scalar_t>(h_n, d);
      p.c_n = part_or_null<scalar_t>(c_n, d);
      p.gate_values = part_or_null<scalar_t>(saved.gates, d);
      p.cells = part_or_null<scalar_t>(saved.cells, d);
      p.hidden = part_or_null<scalar_t>(saved.hidden, d);
      p.norm_input = part_or_null<scalar_t>(saved.norm_products, d);
      p.norm_recurrent = part_or_null<scalar_t>(saved.norm_products, sizes.directions + d);
      p.norm_factors = part_or_null<scalar_t>(saved.norm_factors, d);
    }
    run_directions(params, kernels, kernels.plan_forward, kernels.forward, options, !call.options.norm.empty());
  });
  return results();
}

// Points at the gradients that direction d writes, if they are requested.
template <typename T>
void set_gradients(BackwardParams<T>& p, const LayerGradients& grads, const LayerSizes& sizes, int64_t d) {
  if (grads.input.defined()) p.grad_input = columns_of<T>(grads.input, 0);
  p.accumulate_grad_input = d > 0;
  p.grad_h0 = part_or_null<T>(grads.h0, d);
  p.grad_reset_h = part_or_null<T>(grads.options.reset_h, d);
  p.grad_reset_c = part_or_null<T>(grads.options.reset_c, d);
  const auto numbers_or_null = [](const at::Tensor& grad) {
    return grad.defined() ? grad.mutable_data_ptr() : nullptr;
  };
  const auto data_or_null = [](const at::Tensor& grad) {
    return grad.defined() ? grad.mutable_data_ptr<T>() : nullptr;
  };
  const DirectionParameters own = sizes.parameters(grads, d);
  p.grad_weight_ih = numbers_or_null(own.weight_ih);
  p.grad_weight_hh = numbers_or_null(own.weight_hh);
  p.grad_bias = data_or_null(own.bias());
  p.grad_weight_hr = data_or_null(own.weight_hr);
  p.grad_gain_ih = data_or_null(own.gain_ih);
  p.grad_gain_hh = data_or_null(own.gain_hh);
  p.grad_gain_c = data_or_null(own.gain_c);
  p.grad_bias_c = data_or_null(own.bias_c);
  for (int n = 0; n < cell::kParameters; ++n) p.grad_cell[n] = data_or_null(own.cell[n]);
}

LayerGradients cpu_backward(const LayerCall& call, const LayerSizes& sizes, const BackwardArguments& arguments) {
  if (call.options.lengths.defined()) return backward_with_lengths(call, sizes, arguments);
  const at::ScalarType dtype = call.input.scalar_type(), type = sizes.sum_type;
  const auto options = call.input.options().dtype(type);
  // No copy is made if the kernels round the gradients of W and U themselves.
  const bool narrow =
      type != dtype && cpu::kernels<float>().sums_gradients_once(sizes.shape(0, {}), bf16_parts_for(dtype));
  const auto empty_result = type == dtype ? &empty_in_huge_pages : &scratch_empty;
  const LayerGradients grads = make_gradients(call, arguments.needs_grad, [&](const at::Tensor& input, size_t number) {
    const size_t weight = number - 3;  // wraps around, and so is too large, for input, h0 and c0
    if (number == 0) return empty_result(input.sizes(), options);
    if (weight >= call.weights.size()) return empty_on_cpu(input.sizes(), options);
    const bool matrix = static_cast<int64_t>(weight) % sizes.weights_per_direction < 2;
    return gradient_empty(input.sizes(), options.dtype(narrow && matrix ? dtype : type));
  });
  const at::Tensor grad_c =
      grads.c0.defined() ? grads.c0 : empty_on_cpu({sizes.directions, sizes.batch, sizes.hidden_size}, options);
  if (sizes.batch == 0) {
    visit_inputs(grads, [](const at::Tensor& grad) {
      if (grad.defined()) grad.zero_();
    });
    return grads;
  }

  const LayerTensors tensors(call, sizes, true);
  const at::Tensor y = with_contiguous_rows(arguments.output, type);
  const ResultGradients& given = arguments.grads;
  const at::Tensor dy = given.output.defined() ? with_contiguous_rows(given.output, type) : at::Tensor();
  const at::Tensor dh = contiguous_converted(given.h_n, type);
  const at::Tensor dc = contiguous_converted(given.c_n, type);
  const at::Tensor grad_gates = contiguous_converted(given.gate_values, type);
  const at::Tensor grad_cells = contiguous_converted(given.cells, type);
  const Saved& saved = arguments.saved;

  AT_DISPATCH_FLOATING_TYPES(type, "lstm_layer_backward", [&] {
    const cpu::Kernels<scalar_t>& kernels = cpu::kernels<scalar_t>();
    OfDirections<BackwardParams<scalar_t>> params(sizes.directions);
    for (int64_t d = 0; d < sizes.directions; ++d) {
      BackwardParams<scalar_t>& p = params[d];
      static_cast<LayerParams<scalar_t>&>(p) = tensors.params<scalar_t>(sizes, call.has_bias, d);
      p.output = const_columns_of<scalar_t>(y, d * sizes.output_size);
      p.gate_values = const_part_or_null<scalar_t>(saved.gates, d);
      p.cells = const_part_or_null<scalar_t>(saved.cells, d);
      p.hidden = const_part_or_null<scalar_t>(saved.hidden, d);
      p.norm_input = const_part_or_null<scalar_t>(saved.norm_products, d);
      p.norm_recurrent = const_part_or_null<scalar_t>(saved.norm_products, sizes.directions + d);
      p.norm_factors = const_part_or_null<scalar_t>(saved.norm_factors, d);
      if (dy.defined()) p.grad_output = const_columns_of<scalar_t>(dy, d * sizes.output_size);
      p.grad_cells = const_part_or_null<scalar_t>(grad_cells, d);
      p.grad_gate_values = const_part_or_null<scalar_t>(grad_gates, d);
      p.grad_h_n = const_part_or_null<scalar_t>(dh, d);
      p.grad_c_n = const_part_or_null<scalar_t>(dc, d);
      p.grad_c = part_or_null<scalar_t>(grad_c, d);
      set_gradients(p, grads, sizes, d);
      if (narrow) p.kind_of_weight_grads = kind_of(dtype);
    }
    // The gradients of a cell's parameters are sums over the workers.
    run_directions(params, kernels, kernels.plan_backward, kernels.backward, options,
                   !call.options.norm.empty() || !call.options.peephole.empty());
  });
  return grads;
}

}  // namespace

int bf16_parts_for(at::ScalarType dtype) {
  switch (dtype) {
    case at::kBFloat16: return 1;
    case at::kHalf: return 2;
    default: break;
  }
  switch (at::globalContext().float32Precision(at::Float32Backend::MKLDNN, at::Float32Op::RNN)) {
    case at::Float32Precision::BF16: return 1;
    case at::Float32Precision::TF32: return 2;
    default: return 3;
  }
}

const Backend& cpu_backend() {
  static const Backend backend{&cpu_forward, &cpu_backward};
  return backend;
}

}  // namespace lstm_ext
