#include "glue/checks.h"

#include <ATen/ATen.h>

#include <string>

namespace lstm_ext {
namespace {

constexpr const char* kWeightNames[] = {"weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr"};

}  // namespace

void check_tensor(const char* name, const at::Tensor& tensor, const at::Tensor& input, at::IntArrayRef sizes) {
  TORCH_CHECK(tensor.device() == input.device(), "lstm_ext: ", name, " is on ", tensor.device(), ", the input on ",
              input.device(), "; all tensors of a layer must be on one device");
  TORCH_CHECK(tensor.scalar_type() == input.scalar_type(), "lstm_ext: ", name, " has dtype ", tensor.scalar_type(),
              ", expected that of the input, ", input.scalar_type());
  TORCH_CHECK(tensor.sizes() == sizes, "lstm_ext: ", name, " has shape ", tensor.sizes(), ", expected ", sizes);
}

LayerSizes check_layer(const at::Tensor& input, const OptionalTensor& h0, const OptionalTensor& c0,
                       const std::vector<at::Tensor>& weights, bool has_bias, bool bidirectional) {
  TORCH_CHECK(input.device().is_cpu(), "lstm_ext: input is on ", input.device(), ", expected the CPU");
  TORCH_CHECK(input.layout() == at::kStrided, "lstm_ext: input has layout ", input.layout(), ", expected strided");
  TORCH_CHECK(input.scalar_type() == at::kFloat || input.scalar_type() == at::kDouble, "lstm_ext: input has dtype ",
              input.scalar_type(), ", expected float32 or float64");
  TORCH_CHECK(input.dim() == 3, "lstm_ext: input has ", input.dim(),
              " dimensions, expected 3: (time, batch, features)");
  LayerSizes s{};
  s.steps = input.size(0);
  s.batch = input.size(1);
  s.input_size = input.size(2);
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
      case 0: check_tensor(label.c_str(), weights[i], input, {gates, s.input_size}); break;
      case 1: check_tensor(label.c_str(), weights[i], input, {gates, s.output_size}); break;
      case 4: check_tensor(label.c_str(), weights[i], input, {s.output_size, s.hidden_size}); break;
      default: check_tensor(label.c_str(), weights[i], input, {gates}); break;
    }
  }
  if (h0) check_tensor("h0", *h0, input, {s.directions, s.batch, s.output_size});
  if (c0) check_tensor("c0", *c0, input, {s.directions, s.batch, s.hidden_size});
  return s;
}

}  // namespace lstm_ext
