#include "torch/checks.h"

#include <ATen/ATen.h>

#include <string>

namespace lstm_ext {
namespace {

constexpr const char* kWeightNames[] = {"weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr"};

// Offsets of the steps from the number of sequences in each.
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
    // Also keeps the sum from overflowing.
    TORCH_CHECK_VALUE(offsets[t + 1] <= input.size(0), "lstm_ext: the sum of batch_sizes is more than the ",
                      input.size(0), " rows of the input");
  }
  TORCH_CHECK_VALUE(offsets[steps] == input.size(0), "lstm_ext: the sum of batch_sizes is ", offsets[steps],
                    ", expected the number of rows of the input, ", input.size(0));
  return offsets;
}

void check_extras(const at::Tensor& input, const LayerSizes& s, bool has_bias, const Extras& extras) {
  const at::ScalarType dtype = input.scalar_type();
  TORCH_CHECK(extras.resets || !(extras.reset_h || extras.reset_c), "lstm_ext: got a reset state, but no resets");
  if (extras.resets) {
    const std::vector<int64_t> sizes =
        s.packed() ? std::vector<int64_t>{input.size(0)} : std::vector<int64_t>{s.steps, s.batch};
    check_tensor("resets", *extras.resets, input, at::kBool, sizes);
  }
  const std::vector<int64_t> h_sizes{s.directions, s.batch, s.output_size};
  if (extras.reset_h) check_tensor("reset_h", *extras.reset_h, input, dtype, h_sizes);
  if (extras.reset_c) check_tensor("reset_c", *extras.reset_c, input, dtype, {s.directions, s.batch, s.hidden_size});
  if (extras.lengths) {
    TORCH_CHECK(!s.packed(), "lstm_ext: got lengths and batch_sizes, expected one of them");
    check_tensor("lengths", *extras.lengths, input, at::kLong, {s.batch});
  }
  if (extras.recurrent_mask) check_tensor("recurrent_mask", *extras.recurrent_mask, input, s.sum_type, h_sizes);
  if (extras.kept_h) check_tensor("kept_h", *extras.kept_h, input, at::kBool, s.saved_sizes(s.output_size));
  if (extras.kept_c) check_tensor("kept_c", *extras.kept_c, input, at::kBool, s.saved_sizes(s.hidden_size));
  for (const double share : {extras.zoneout_h, extras.zoneout_c}) {
    TORCH_CHECK_VALUE(share >= 0 && share <= 1, "lstm_ext: zoneout is ", share, ", expected a number in [0, 1]");
  }
  if (extras.norm.empty()) return;
  constexpr const char* kNames[] = {"gain_ih", "gain_hh", "gain_c", "bias_c"};
  const size_t per_direction = has_bias ? 4 : 3;
  TORCH_CHECK(extras.norm.size() == per_direction * s.directions, "lstm_ext: got ", extras.norm.size(),
              " parameters of layer normalisation, expected ", per_direction * s.directions);
  for (size_t i = 0; i < extras.norm.size(); ++i) {
    const size_t kind = i % per_direction;
    // Autocast leaves them in their own dtype.
    const at::ScalarType own = extras.norm[i].scalar_type() == s.sum_type ? s.sum_type : dtype;
    check_tensor(kNames[kind], extras.norm[i], input, own, {kind < 2 ? 4 * s.hidden_size : s.hidden_size});
  }
  TORCH_CHECK(!extras.recompute, "lstm_ext: the kernels do not compute gates with layer normalisation again");
}

}  // namespace

std::vector<int64_t> LayerSizes::sequence_sizes(int64_t features) const {
  if (packed()) return {step_offsets.back(), features};
  return {steps, batch, features};
}

std::vector<int64_t> LayerSizes::saved_sizes(int64_t features) const {
  if (packed()) return {directions, step_offsets.back(), features};
  return {directions, steps, batch, features};
}

std::vector<int64_t> LayerSizes::saved_product_sizes() const {
  std::vector<int64_t> sizes = saved_sizes(4 * hidden_size);
  sizes[0] *= 2;
  return sizes;
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

LayerSizes check_layer(const at::Tensor& input, const OptionalTensor& h0, const OptionalTensor& c0,
                       const std::vector<at::Tensor>& weights, const OptionalTensor& batch_sizes, bool has_bias,
                       bool bidirectional, const Extras& extras) {
  TORCH_CHECK(input.device().is_cpu() || input.device().is_cuda(), "lstm_ext: input is on ", input.device(),
              ", expected the CPU or a CUDA device");
  TORCH_CHECK(input.layout() == at::kStrided, "lstm_ext: input has layout ", input.layout(), ", expected strided");
  const at::ScalarType dtype = input.scalar_type();
  const bool low_precision = dtype == at::kBFloat16 || dtype == at::kHalf;
  TORCH_CHECK(low_precision || dtype == at::kFloat || dtype == at::kDouble, "lstm_ext: input has dtype ", dtype,
              ", expected float32, float64, bfloat16 or float16");
  const bool packed = batch_sizes && batch_sizes->defined();
  TORCH_CHECK(packed || input.dim() == 3, "lstm_ext: input has ", input.dim(),
              " dimensions, expected 3: (time, batch, features)");
  TORCH_CHECK(!packed || input.dim() == 2, "lstm_ext: input has ", input.dim(),
              " dimensions, expected 2 with batch_sizes: (rows, features)");
  LayerSizes s{};
  s.sum_type = low_precision ? at::kFloat : dtype;
  s.gates_type = input.device().is_cpu() ? s.sum_type : dtype;
  if (packed) {
    s.step_offsets = step_offsets(*batch_sizes, input);
    s.steps = static_cast<int64_t>(s.step_offsets.size()) - 1;
    s.batch = s.step_offsets[1];
  } else {
    s.steps = input.size(0);
    s.batch = input.size(1);
  }
  s.input_size = input.size(-1);
  s.directions = bidirectional ? 2 : 1;
  TORCH_CHECK(s.steps >= 1, "lstm_ext: input has 0 time steps, expected at least 1");
  const int64_t plain = has_bias ? 4 : 2;
  const auto count = static_cast<int64_t>(weights.size());
  s.projected = count == (plain + 1) * s.directions;
  TORCH_CHECK(s.projected || count == plain * s.directions, "lstm_ext: got ", count, " weights, expected ",
              plain * s.directions, ", or ", (plain + 1) * s.directions, " with a projection");
  s.weights_per_direction = plain + (s.projected ? 1 : 0);
  TORCH_CHECK(weights[0].dim() == 2 && weights[0].size(0) > 0 && weights[0].size(0) % 4 == 0,
              "lstm_ext: weight_ih has shape ", weights[0].sizes(), ", expected (4 * hidden_size, input_size)");
  s.hidden_size = weights[0].size(0) / 4;
  if (s.projected) {
    const at::Tensor& weight_hr = weights[s.weights_per_direction - 1];
    TORCH_CHECK(weight_hr.dim() == 2 && weight_hr.size(0) > 0, "lstm_ext: weight_hr has shape ", weight_hr.sizes(),
                ", expected (proj_size, hidden_size)");
    s.output_size = weight_hr.size(0);
    TORCH_CHECK(s.output_size < s.hidden_size, "lstm_ext: weight_hr has ", s.output_size,
                " rows, expected fewer than hidden_size, ", s.hidden_size);
  } else {
    s.output_size = s.hidden_size;
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t place = i % s.weights_per_direction;
    const int64_t name = s.projected && place == s.weights_per_direction - 1 ? 4 : place;
    const std::string label =
        std::string(kWeightNames[name]) + (i >= s.weights_per_direction ? " of the reverse direction" : "");
    const int64_t gates = 4 * s.hidden_size;
    switch (name) {
      case 0: check_tensor(label.c_str(), weights[i], input, dtype, {gates, s.input_size}); break;
      case 1: check_tensor(label.c_str(), weights[i], input, dtype, {gates, s.output_size}); break;
      case 4: check_tensor(label.c_str(), weights[i], input, dtype, {s.output_size, s.hidden_size}); break;
      default: check_tensor(label.c_str(), weights[i], input, dtype, {gates}); break;
    }
  }
  if (h0) check_tensor("h0", *h0, input, dtype, {s.directions, s.batch, s.output_size});
  if (c0) check_tensor("c0", *c0, input, dtype, {s.directions, s.batch, s.hidden_size});
  check_extras(input, s, has_bias, extras);
  return s;
}

}  // namespace lstm_ext
