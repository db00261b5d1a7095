#include "torch/checks.h"

#include <ATen/ATen.h>

namespace lstm_ext {
namespace {

constexpr const char* kWeightNames[2][5] = {
    {"weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr"},
    {"weight_ih of the reverse direction", "weight_hh of the reverse direction", "bias_ih of the reverse direction",
     "bias_hh of the reverse direction", "weight_hr of the reverse direction"}};

// Computes the offsets of the steps from the number of sequences in each.
std::vector<int64_t> step_offsets(const at::Tensor& batch_sizes, const at::Tensor& input) {
  TORCH_CHECK(batch_sizes.device().is_cpu() && batch_sizes.scalar_type() == at::kLong && batch_sizes.dim() == 1,
              "lstm_ext: batch_sizes is ", batch_sizes.toString(), " of shape ", batch_sizes.sizes(), " on ",
              batch_sizes.device(), ", expected one dimension of int64 on the CPU");
  const at::Tensor sizes = batch_sizes.contiguous();
  const int64_t* size = sizes.const_data_ptr<int64_t>();
  const int64_t steps = sizes.numel();
  TORCH_CHECK_VALUE(steps >= 1, "lstm_ext: batch_sizes is empty, expected at least one time step");
  std::vector<int64_t> offsets(steps + 1, 0);
  for (int64_t t = 0; t < steps; ++t) {
    TORCH_CHECK_VALUE(size[t] >= 1, "lstm_ext: batch_sizes[", t, "] is ", size[t], ", expected at least 1");
    TORCH_CHECK_VALUE(t == 0 || size[t] <= size[t - 1], "lstm_ext: batch_sizes[", t, "] is ", size[t],
                      ", more than the ", size[t - 1], " before it; expected numbers that never rise");
    offsets[t + 1] = offsets[t] + size[t];
    // This also keeps the sum from overflowing.
    TORCH_CHECK_VALUE(offsets[t + 1] <= input.size(0), "lstm_ext: the sum of batch_sizes is more than the ",
                      input.size(0), " rows of the input");
  }
  TORCH_CHECK_VALUE(offsets[steps] == input.size(0), "lstm_ext: the sum of batch_sizes is ", offsets[steps],
                    ", expected the number of rows of the input, ", input.size(0));
  return offsets;
}

void check_options(const LayerCall& call, const LayerSizes& sizes) {
  const LayerOptions& options = call.options;
  const at::Tensor& input = call.input;
  const at::ScalarType dtype = input.scalar_type();
  const int64_t H = sizes.hidden_size, P = sizes.output_size;
  using Sizes = std::vector<int64_t>;
  const auto time_and_batch = [&] { return sizes.packed() ? Sizes{input.size(0)} : Sizes{sizes.steps, sizes.batch}; };
  const auto state = [&](int64_t features) { return Sizes{sizes.directions, sizes.batch, features}; };
  const auto batch = [&] { return Sizes{sizes.batch}; };
  TORCH_CHECK(options.resets.defined() || !(options.reset_h.defined() || options.reset_c.defined()),
              "lstm_ext: got a reset state, but no resets");
  TORCH_CHECK(!options.lengths.defined() || !sizes.packed(),
              "lstm_ext: got lengths and batch_sizes, expected one of them");
#define TENSOR(name, kind, dtype, sizes) \
  if (options.name.defined()) check_tensor(#name, options.name, input, dtype, sizes);
#define SHARE(name, kind)                                                                            \
  TORCH_CHECK_VALUE(options.name >= 0 && options.name <= 1, "lstm_ext: " #name " is ", options.name, \
                    ", expected a number in [0, 1]");
#define BOUND(name) \
  TORCH_CHECK_VALUE(options.name >= 0, "lstm_ext: " #name " is ", options.name, ", expected a number of at least 0");
#include "contract/options.def"
  TORCH_CHECK(!options.recompute || !options.return_gates, "lstm_ext: gates that are returned are not recomputed");
  if (!options.activations.empty()) read_activations(options.activations);
  const bool other_gates = options.preactivation_clip != 0 || !options.activations.empty();
  TORCH_CHECK(!other_gates || !options.recompute || input.is_cpu(),
              "lstm_ext: the CUDA kernels do not compute gates with other activations or a clip again");
  TORCH_CHECK(options.norm.empty() || (options.peephole.empty() && !options.coupled_gates),
              "lstm_ext: layer normalisation goes with neither peepholes nor coupled gates");
  TORCH_CHECK(!options.norm_cell || !options.norm.empty(),
              "lstm_ext: norm_cell: got no parameters of layer normalisation");
  const auto check_parameters = [&](const char* what, const std::vector<at::Tensor>& parameters, int64_t per_direction,
                                    const char* const* names, int64_t of_gates) {
    TORCH_CHECK(static_cast<int64_t>(parameters.size()) == per_direction * sizes.directions, "lstm_ext: got ",
                parameters.size(), " parameters of ", what, ", expected ", per_direction * sizes.directions);
    for (size_t i = 0; i < parameters.size(); ++i) {
      const int64_t kind = static_cast<int64_t>(i) % per_direction;
      // Autocast does not convert these parameters.
      const at::ScalarType own = parameters[i].scalar_type() == sizes.sum_type ? sizes.sum_type : dtype;
      check_tensor(names[kind], parameters[i], input, own,
                   {kind < of_gates ? 4 * sizes.hidden_size : sizes.hidden_size});
    }
  };
  if (!options.peephole.empty()) {
    constexpr const char* kNames[cell::kParameters] = {"weight_ci", "weight_cf", "weight_co"};
    check_parameters("peepholes", options.peephole, cell::kParameters, kNames, 0);
    TORCH_CHECK(!options.recompute || input.is_cpu(),
                "lstm_ext: the CUDA kernels do not compute gates with peepholes again");
  }
  if (options.gru) {
    TORCH_CHECK(input.is_cpu(), "lstm_ext: gru is computed on the CPU only, and the input is on ", input.device());
    TORCH_CHECK(!sizes.projected, "lstm_ext: gru: got a projection, which a GRU does not have");
    TORCH_CHECK(!call.c0.defined() && !options.reset_c.defined(), "lstm_ext: gru: got ",
                call.c0.defined() ? "c0" : "reset_c", ", and h is the only state of a GRU");
    LayerOptions others = options;
    others.gru = false;
    TORCH_CHECK(!has_options<kCell>(others) && options.norm.empty() && options.zoneout_h == 0 &&
                    options.zoneout_c == 0 && !options.keep_h.defined() && !options.keep_c.defined() &&
                    !options.return_cell_states && !options.return_gates,
                "lstm_ext: gru goes with resets, reset_h, lengths, recurrent_mask, frozen and recompute only");
  }
  if (options.norm.empty()) return;
  constexpr const char* kNames[] = {"gain_ih", "gain_hh", "gain_c", "bias_c"};
  check_parameters("layer normalisation", options.norm, norms_per_direction(call.has_bias), kNames, 2);
  TORCH_CHECK(!options.recompute, "lstm_ext: the kernels do not compute gates with layer normalisation again");
}

// Visits each tensor that a forward pass of the call saves: visit(the member of Saved, its name, dtype and sizes).
template <typename Visit>
void visit_saved(const LayerCall& call, const LayerSizes& sizes, const Visit& visit) {
  const int64_t hidden = sizes.hidden_size;
  const bool gates = !call.options.recompute;
  if (gates) visit(&Saved::gates, "saved gates", sizes.gates_type, sizes.saved_sizes(4 * hidden));
  visit(&Saved::cells, "saved cells", sizes.sum_type, sizes.saved_sizes(hidden));
  if (gates && sizes.projected) visit(&Saved::hidden, "saved hidden", sizes.gates_type, sizes.saved_sizes(hidden));
  if (call.options.norm.empty()) return;
  std::vector<int64_t> products = sizes.saved_sizes(4 * hidden);
  products[0] *= 2;
  visit(&Saved::norm_products, "saved normalised products", sizes.gates_type, products);
  visit(&Saved::norm_factors, "saved factors of layer normalisation", sizes.sum_type, sizes.saved_sizes(2));
}

}  // namespace

at::Tensor allocate_empty(at::IntArrayRef sizes, const at::TensorOptions& options) { return at::empty(sizes, options); }
at::Tensor allocate_zeros(at::IntArrayRef sizes, const at::TensorOptions& options) { return at::zeros(sizes, options); }

WeightCount count_weights(int64_t count, bool has_bias, bool bidirectional) {
  const int64_t directions = bidirectional ? 2 : 1, plain = has_bias ? 4 : 2;
  const bool projected = count == (plain + 1) * directions;
  TORCH_CHECK(projected || count == plain * directions, "lstm_ext: got ", count, " weights, expected ",
              plain * directions, ", or ", (plain + 1) * directions, " with a projection");
  return {plain + (projected ? 1 : 0), projected};
}

std::vector<int64_t> LayerSizes::sequence_sizes(int64_t features) const {
  if (packed()) return {step_offsets.back(), features};
  return {steps, batch, features};
}

std::vector<int64_t> LayerSizes::saved_sizes(int64_t features) const {
  if (packed()) return {directions, step_offsets.back(), features};
  return {directions, steps, batch, features};
}

LayerShape LayerSizes::shape(int64_t direction, const at::Tensor& resets) const {
  static_assert(sizeof(bool) == sizeof(uint8_t));
  return {steps,
          batch,
          input_size,
          hidden_size,
          output_size,
          projected,
          direction == 1,
          packed() ? step_offsets.data() : nullptr,
          resets.defined() ? static_cast<const uint8_t*>(resets.const_data_ptr()) : nullptr,
          directions > 1};
}

DirectionParameters LayerSizes::parameters(const LayerCall& call, int64_t direction) const {
  DirectionParameters own;
  const at::Tensor* const weight = call.weights.data() + direction * weights_per_direction;
  own.weight_ih = weight[0];
  own.weight_hh = weight[1];
  if (call.has_bias) {
    own.bias_ih = weight[2];
    own.bias_hh = weight[3];
  }
  if (projected) own.weight_hr = weight[weights_per_direction - 1];
  if (!call.options.norm.empty()) {
    const at::Tensor* const norm = call.options.norm.data() + direction * norms_per_direction(call.has_bias);
    own.gain_ih = norm[0];
    own.gain_hh = norm[1];
    own.gain_c = norm[2];
    if (call.has_bias) own.bias_c = norm[3];
  }
  for (int n = 0; n < cell::kParameters && !call.options.peephole.empty(); ++n) {
    own.cell[n] = call.options.peephole[direction * cell::kParameters + n];
  }
  return own;
}

Saved LayerSizes::empty_saved(const LayerCall& call, const at::TensorOptions& options, Allocate allocate) const {
  Saved saved;
  visit_saved(call, *this,
              [&](at::Tensor Saved::* tensor, const char*, at::ScalarType dtype, const std::vector<int64_t>& sizes) {
                saved.*tensor = allocate(sizes, options.dtype(dtype));
              });
  return saved;
}

void LayerSizes::check_saved(const LayerCall& call, const Saved& saved) const {
  size_t expected = 0, given = 0;
  visit_saved(
      call, *this,
      [&](at::Tensor Saved::* tensor, const char* name, at::ScalarType dtype, const std::vector<int64_t>& sizes) {
        ++expected;
        TORCH_CHECK((saved.*tensor).defined(), "lstm_ext: ", name, " is not given");
        check_tensor(name, saved.*tensor, call.input, dtype, sizes);
      });
  Saved::visit(saved, [&](const at::Tensor& tensor) { given += tensor.defined() ? 1 : 0; });
  TORCH_CHECK(given == expected, "lstm_ext: saved has ", given, " tensors, expected ", expected);
}

void check_tensor(const char* name, const at::Tensor& tensor, const at::Tensor& input, at::ScalarType dtype,
                  at::IntArrayRef sizes) {
  TORCH_CHECK(tensor.device() == input.device(), "lstm_ext: ", name, " is on ", tensor.device(), ", the input on ",
              input.device(), "; all tensors of a layer must be on one device");
  TORCH_CHECK(tensor.layout() == at::kStrided, "lstm_ext: ", name, " has layout ", tensor.layout(),
              ", expected strided");
  TORCH_CHECK(tensor.scalar_type() == dtype, "lstm_ext: ", name, " has dtype ", tensor.scalar_type(), ", expected ",
              dtype, dtype == input.scalar_type() ? ", that of the input" : "");
  TORCH_CHECK(tensor.sizes() == sizes, "lstm_ext: ", name, " has shape ", tensor.sizes(), ", expected ", sizes);
}

LayerSizes check_layer(const LayerCall& call) {
  const at::Tensor& input = call.input;
  const std::vector<at::Tensor>& weights = call.weights;
  TORCH_CHECK(input.device().is_cpu() || input.device().is_cuda(), "lstm_ext: input is on ", input.device(),
              ", expected the CPU or a CUDA device");
  TORCH_CHECK(input.layout() == at::kStrided, "lstm_ext: input has layout ", input.layout(), ", expected strided");
  const at::ScalarType dtype = input.scalar_type();
  const bool low_precision = dtype == at::kBFloat16 || dtype == at::kHalf;
  TORCH_CHECK(low_precision || dtype == at::kFloat || dtype == at::kDouble, "lstm_ext: input has dtype ", dtype,
              ", expected float32, float64, bfloat16 or float16");
  const bool packed = call.batch_sizes.defined();
  TORCH_CHECK(packed || input.dim() == 3, "lstm_ext: input has ", input.dim(),
              " dimensions, expected 3: (time, batch, features)");
  TORCH_CHECK(!packed || input.dim() == 2, "lstm_ext: input has ", input.dim(),
              " dimensions, expected 2 with batch_sizes: (rows, features)");
  LayerSizes sizes{};
  sizes.sum_type = low_precision ? at::kFloat : dtype;
  if (packed) {
    sizes.step_offsets = step_offsets(call.batch_sizes, input);
    sizes.steps = static_cast<int64_t>(sizes.step_offsets.size()) - 1;
    sizes.batch = sizes.step_offsets[1];
  } else {
    sizes.steps = input.size(0);
    sizes.batch = input.size(1);
  }
  sizes.input_size = input.size(-1);
  sizes.directions = call.bidirectional ? 2 : 1;
  TORCH_CHECK(sizes.steps >= 1, "lstm_ext: input has 0 time steps, expected at least 1");
  const auto count = static_cast<int64_t>(weights.size());
  const WeightCount weight_count = count_weights(count, call.has_bias, call.bidirectional);
  sizes.weights_per_direction = weight_count.per_direction;
  sizes.projected = weight_count.projected;
  const int64_t of_unit = gates_of(call.options);
  TORCH_CHECK(weights[0].dim() == 2 && weights[0].size(0) > 0 && weights[0].size(0) % of_unit == 0,
              "lstm_ext: weight_ih has shape ", weights[0].sizes(), ", expected (", of_unit,
              " * hidden_size, input_size)");
  sizes.hidden_size = weights[0].size(0) / of_unit;
  if (sizes.projected) {
    const at::Tensor& weight_hr = weights[sizes.weights_per_direction - 1];
    TORCH_CHECK(weight_hr.dim() == 2 && weight_hr.size(0) > 0, "lstm_ext: weight_hr has shape ", weight_hr.sizes(),
                ", expected (proj_size, hidden_size)");
    sizes.output_size = weight_hr.size(0);
    TORCH_CHECK(sizes.output_size < sizes.hidden_size, "lstm_ext: weight_hr has ", sizes.output_size,
                " rows, expected fewer than hidden_size, ", sizes.hidden_size);
  } else {
    sizes.output_size = sizes.hidden_size;
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t place = i % sizes.weights_per_direction;
    const int64_t kind = sizes.projected && place == sizes.weights_per_direction - 1 ? 4 : place;
    const char* const name = kWeightNames[i / sizes.weights_per_direction][kind];
    const int64_t gates = of_unit * sizes.hidden_size;
    switch (kind) {
      case 0: check_tensor(name, weights[i], input, dtype, {gates, sizes.input_size}); break;
      case 1: check_tensor(name, weights[i], input, dtype, {gates, sizes.output_size}); break;
      case 4: check_tensor(name, weights[i], input, dtype, {sizes.output_size, sizes.hidden_size}); break;
      default: check_tensor(name, weights[i], input, dtype, {gates}); break;
    }
  }
  if (call.h0.defined()) check_tensor("h0", call.h0, input, dtype, {sizes.directions, sizes.batch, sizes.output_size});
  if (call.c0.defined()) check_tensor("c0", call.c0, input, dtype, {sizes.directions, sizes.batch, sizes.hidden_size});
  check_options(call, sizes);
  return sizes;
}

}  // namespace lstm_ext
