#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/util/SmallVector.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <optional>

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
  const at::Tensor t = materialized(tensor);
  if (!t.defined() || t.scalar_type() == type) return t;
  return scratch_empty(t.sizes(), t.options().dtype(type)).copy_(t);
}
at::Tensor contiguous_converted(const at::Tensor& t, at::ScalarType type) {
  return t.defined() ? converted(t, type).contiguous() : t;
}

// The columns from `first` on of a (T, B, n) or, if packed, (N, n) tensor.
template <typename T>
Sequence<T> columns_of(const at::Tensor& t, int64_t first) {
  if (!t.defined()) return {nullptr, 0, 0};
  return {row_pointer<T>(t) + first, t.dim() == 3 ? t.stride(0) : 0, t.stride(-2)};
}

WeightKind kind_of(at::ScalarType dtype) {
  if (dtype == at::kBFloat16) return WeightKind::kBFloat16;
  return dtype == at::kHalf ? WeightKind::kFloat16 : WeightKind::kOwn;
}

// `call` as kernel_call returns it, here and below.
template <typename T>
LayerWeights<T> weights_of(const LayerCall& call, const LayerSizes& sizes, int64_t direction) {
  if (call.weights.empty()) return {};
  const at::Tensor* w = call.weights.data() + direction * sizes.weights_per_direction;
  const WeightKind kind = kind_of(w[0].scalar_type());
  const auto data = [&](bool there, int64_t i) { return there ? w[i].const_data_ptr<T>() : nullptr; };
  const bool own = kind == WeightKind::kOwn;
  LayerWeights<T> weights{data(own, 0), data(own, 1), data(call.has_bias, 2), data(call.has_bias, 3),
                          data(sizes.projected, sizes.weights_per_direction - 1)};
  if (!own) weights.narrow = {w[0].const_data_ptr(), w[1].const_data_ptr(), kind};
  return weights;
}

template <typename T>
StepOptions<T> step_options(const LayerCall& call, const LayerSizes& sizes, int64_t direction) {
  const LayerOptions& given = call.options;
  StepOptions<T> options{};
  options.recurrent_mask = row_pointer<const T>(given.recurrent_mask, direction);
  options.zoneout_h = {flag_pointer(given.keep_h, direction), static_cast<T>(given.zoneout_h)};
  options.zoneout_c = {flag_pointer(given.keep_c, direction), static_cast<T>(given.zoneout_c)};
  options.cell = cell_options<T>(given, direction, !given.recompute);
  if (!given.norm.empty()) options.norm = layer_norm<T>(sizes.parameters(call, direction), given);
  return options;
}

// A bias (3H) of a GRU with zeros for the gate that it does not have, see cell::GruRow.
at::Tensor with_gap(const at::Tensor& bias, cell::GruRow gap) {
  const int64_t bytes = bias.numel() / 3 * static_cast<int64_t>(bias.element_size());
  const at::Tensor all = scratch_empty({bias.numel() / 3 * cell::kGates}, bias.options());
  char* const to = static_cast<char*>(all.mutable_data_ptr());
  const char* const from = static_cast<const char*>(bias.const_data_ptr());
  std::memcpy(to, from, static_cast<size_t>(gap * bytes));
  std::memset(to + gap * bytes, 0, static_cast<size_t>(bytes));
  std::memcpy(to + (gap + 1) * bytes, from + gap * bytes, static_cast<size_t>((3 - gap) * bytes));
  return all;
}
// Turns the call of a GRU into that of a cell whose c is h.
void describe_gru(LayerCall& call, const LayerSizes& sizes) {
  call.c0 = call.h0;
  call.options.reset_c = call.options.reset_h;
  for (size_t i = 2; call.has_bias && i < call.weights.size(); i += sizes.weights_per_direction) {
    call.weights[i] = with_gap(call.weights[i], cell::kGruRecurrent);
    call.weights[i + 1] = with_gap(call.weights[i + 1], cell::kGruInput);
  }
}

// The call in the kernels' types. It has either frozen weights that the kernels can read, or weights, of which W and U
// may have 16 bits.
LayerCall kernel_call(LayerCall call, const LayerSizes& sizes) {
  const std::vector<at::Tensor> frozen = call.options.frozen;
  if (!frozen.empty() && is_ready(frozen)) {
    call.weights.clear();
  } else if (!frozen.empty()) {
    call.weights = thawed(frozen, call.weights);
    call.options.frozen.clear();
  }
  const auto type_of = [&](const at::Tensor& t, bool is_weight) {
    const bool keeps = t.scalar_type() == at::kBool || (is_weight && frozen.empty());
    return keeps ? t.scalar_type() : sizes.sum_type;
  };
  LayerCall read = readable(std::move(call), sizes, type_of, &converted);
  if (read.options.gru) describe_gru(read, sizes);
  return read;
}

template <typename T>
LayerParams<T> layer_params(const LayerCall& call, const LayerSizes& sizes, int64_t direction, int bf16_parts) {
  const LayerOptions& options = call.options;
  return {sizes.shape(direction, options.resets),
          weights_of<T>(call, sizes, direction),
          columns_of<const T>(call.input, 0),
          row_pointer<const T>(call.h0, direction),
          row_pointer<const T>(call.c0, direction),
          {row_pointer<const T>(options.reset_h, direction), row_pointer<const T>(options.reset_c, direction)},
          step_options<T>(call, sizes, direction),
          bf16_parts,
          nullptr};
}

// Points at what a forward pass saves for direction d.
template <typename Params>
void set_saved(Params& p, const Saved& saved, const LayerSizes& sizes, int64_t d) {
  const auto row = [](const at::Tensor& t, int64_t number) {
    return row_pointer<std::remove_pointer_t<decltype(p.cells)>>(t, number);
  };
  p.gate_values = row(saved.gates, d);
  p.cells = row(saved.cells, d);
  p.hidden = row(saved.hidden, d);
  p.norm_input = row(saved.norm_products, d);
  p.norm_recurrent = row(saved.norm_products, sizes.directions + d);
  p.norm_factors = row(saved.norm_factors, d);
}

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
                    const char* (*kernel)(const Params&, const Plan&, char* workspace, int worker),
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
    std::atomic<const char*> problem{nullptr};
    const bool ran = run_at_once(end.first_worker, work, [&](int worker) {
      size_t i = plans.size() - 1;
      while (worker < places[i].first_worker) --i;
      const char* const own = kernel(params[first + i], plans[i], base + places[i].at, worker - places[i].first_worker);
      if (own) problem = own;
    });
    TORCH_CHECK(!problem, "lstm_ext: ", problem.load());
    if (ran) {
      first += plans.size();
    } else {
      refused = true;
    }
  }
}

LayerResults cpu_forward(const LayerCall& call, const LayerSizes& sizes, bool save) {
  if (!call.options.frozen.empty()) check_frozen(call.options.frozen, sizes, call.input, call.options.gru);
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

  const LayerCall read = kernel_call(call, sizes);
  const int bf16_parts = bf16_parts_for(input.scalar_type());
  AT_DISPATCH_FLOATING_TYPES(type, "lstm_layer_forward", [&] {
    const cpu::Kernels<scalar_t>& kernels = cpu::kernels<scalar_t>();
    OfDirections<ForwardParams<scalar_t>> params(sizes.directions);
    OfDirections<FrozenWeights<scalar_t>> frozen(read.options.frozen.size());
    for (int64_t d = 0; d < sizes.directions; ++d) {
      ForwardParams<scalar_t>& p = params[d];
      static_cast<LayerParams<scalar_t>&>(p) = layer_params<scalar_t>(read, sizes, d, bf16_parts);
      if (!frozen.empty()) {
        frozen[d] = frozen_weights<scalar_t>(read.options.frozen[d]);
        p.frozen = &frozen[d];
      }
      p.output = columns_of<scalar_t>(output, d * sizes.output_size);
      p.h_n = row_pointer<scalar_t>(h_n, d);
      p.c_n = row_pointer<scalar_t>(c_n, d);
      set_saved(p, saved, sizes, d);
    }
    run_directions(params, kernels, kernels.plan_forward, kernels.forward, options, !call.options.norm.empty());
  });
  return results();
}

// Points at the gradients that direction d writes, if they are requested.
template <typename T>
void set_gradients(BackwardParams<T>& p, const LayerGradients& grads, const LayerSizes& sizes, int64_t d) {
  p.grad_input = columns_of<T>(grads.input, 0);
  p.accumulate_grad_input = d > 0;
  p.grad_h0 = row_pointer<T>(grads.h0, d);
  p.grad_reset_h = row_pointer<T>(grads.options.reset_h, d);
  p.grad_reset_c = row_pointer<T>(grads.options.reset_c, d);
  const DirectionParameters own = sizes.parameters(grads, d);
  p.grad_weight_ih = row_pointer<char>(own.weight_ih);
  p.grad_weight_hh = row_pointer<char>(own.weight_hh);
  p.grad_bias = row_pointer<T>(own.bias());
  p.grad_weight_hr = row_pointer<T>(own.weight_hr);
  p.grad_gain_ih = row_pointer<T>(own.gain_ih);
  p.grad_gain_hh = row_pointer<T>(own.gain_hh);
  p.grad_gain_c = row_pointer<T>(own.gain_c);
  p.grad_bias_c = row_pointer<T>(own.bias_c);
  for (int n = 0; n < cell::kParameters; ++n) p.grad_cell[n] = row_pointer<T>(own.cell[n]);
}

// The gradients of a GRU as those of the cell that stands for it.
struct GruGradients {
  at::Tensor reset_c, bias;  // (D, B, H), (D, 4H)

  GruGradients(const LayerGradients& grads, const LayerSizes& sizes, const at::TensorOptions& options) {
    if (grads.options.reset_h.defined()) reset_c = empty_on_cpu(grads.options.reset_h.sizes(), options);
    bias = empty_on_cpu({sizes.directions, cell::kGates * sizes.hidden_size}, options);
  }
  template <typename T>
  void point(BackwardParams<T>& p, int64_t d) const {
    p.grad_reset_c = row_pointer<T>(reset_c, d);
    if (p.grad_bias) p.grad_bias = row_pointer<T>(bias, d);
  }
  void add_to(const LayerGradients& grads, const LayerSizes& sizes, const at::Tensor& c0) const {
    if (grads.h0.defined()) grads.h0.add_(c0);
    if (reset_c.defined()) grads.options.reset_h.add_(reset_c);
    const int64_t H = sizes.hidden_size;
    for (int64_t d = 0; grads.has_bias && d < sizes.directions; ++d) {
      const DirectionParameters own = sizes.parameters(grads, d);
      const at::Tensor all = bias.select(0, d);
      if (own.bias_hh.defined()) own.bias_hh.copy_(all.narrow(0, 0, 3 * H));
      if (!own.bias_ih.defined()) continue;
      own.bias_ih.narrow(0, 0, 2 * H).copy_(all.narrow(0, 0, 2 * H));
      own.bias_ih.narrow(0, 2 * H, H).copy_(all.narrow(0, 3 * H, H));
    }
  }
};

LayerGradients cpu_backward(const LayerCall& call, const LayerSizes& sizes, const BackwardArguments& arguments) {
  if (call.options.lengths.defined()) return backward_with_lengths(call, sizes, arguments);
  const at::ScalarType dtype = call.input.scalar_type(), type = sizes.sum_type;
  const auto options = call.input.options().dtype(type);
  const int bf16_parts = bf16_parts_for(dtype);
  // No copy is made if the kernels round the gradients of W and U themselves.
  const bool narrow = type != dtype && cpu::kernels<float>().sums_gradients_once(sizes.shape(0, {}), bf16_parts);
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

  const LayerCall read = kernel_call(call, sizes);
  std::optional<GruGradients> of_gru;
  if (call.options.gru) of_gru.emplace(grads, sizes, options);
  const at::Tensor y = with_contiguous_rows(converted(arguments.output, type));
  const ResultGradients& given = arguments.grads;
  const at::Tensor dy = with_contiguous_rows(converted(given.output, type));
  const at::Tensor dh = contiguous_converted(given.h_n, type);
  const at::Tensor dc = contiguous_converted(given.c_n, type);
  const at::Tensor grad_gates = contiguous_converted(given.gate_values, type);
  const at::Tensor grad_cells = contiguous_converted(given.cells, type);

  AT_DISPATCH_FLOATING_TYPES(type, "lstm_layer_backward", [&] {
    const cpu::Kernels<scalar_t>& kernels = cpu::kernels<scalar_t>();
    OfDirections<BackwardParams<scalar_t>> params(sizes.directions);
    for (int64_t d = 0; d < sizes.directions; ++d) {
      BackwardParams<scalar_t>& p = params[d];
      static_cast<LayerParams<scalar_t>&>(p) = layer_params<scalar_t>(read, sizes, d, bf16_parts);
      p.output = columns_of<const scalar_t>(y, d * sizes.output_size);
      set_saved(p, arguments.saved, sizes, d);
      p.grad_output = columns_of<const scalar_t>(dy, d * sizes.output_size);
      p.grad_cells = row_pointer<const scalar_t>(grad_cells, d);
      p.grad_gate_values = row_pointer<const scalar_t>(grad_gates, d);
      p.grad_h_n = row_pointer<const scalar_t>(dh, d);
      p.grad_c_n = row_pointer<const scalar_t>(dc, d);
      p.grad_c = row_pointer<scalar_t>(grad_c, d);
      set_gradients(p, grads, sizes, d);
      if (of_gru) of_gru->point(p, d);
      if (narrow) p.kind_of_weight_grads = kind_of(dtype);
    }
    // The gradients of a cell's parameters are sums over the workers.
    run_directions(params, kernels, kernels.plan_backward, kernels.backward, options,
                   !call.options.norm.empty() || !call.options.peephole.empty());
  });
  if (of_gru) of_gru->add_to(grads, sizes, grad_c);
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
    case at::Float32Precision::IEEE: return 0;
    default: return 3;
  }
}

const Backend& cpu_backend() {
  static const Backend backend{&cpu_forward, &cpu_backward};
  return backend;
}

}  // namespace lstm_ext
