// Argument checks of the ops. Each error names the argument, what was expected and what came.
#pragma once

#include "torch/lstm_layer.h"

namespace lstm_ext {

// Sizes of a layer, read off its arguments and checked against each other.
struct LayerSizes {
  int64_t steps, batch, input_size, hidden_size, output_size, directions;
  bool projected;
  int64_t weights_per_direction;
  // Of what is saved for the backward pass: the gates (on CUDA: before the nonlinearity), and what a projection
  // projects; cells have sum_type, float32 for the 16-bit dtypes.
  at::ScalarType sum_type;
  at::ScalarType gates_type;
  std::vector<int64_t> step_offsets;  // see LayerShape; empty for dense data

  bool packed() const { return !step_offsets.empty(); }
  // Sizes of a tensor with the time and batch axes of the input: [directions,] time, batch, features.
  std::vector<int64_t> sequence_sizes(int64_t features) const;
  std::vector<int64_t> saved_sizes(int64_t features) const;
  // Of the normalised products, which are saved as one: first those of the input, then those of h.
  std::vector<int64_t> saved_product_sizes() const;
};

LayerSizes check_layer(const at::Tensor& input, const OptionalTensor& h0, const OptionalTensor& c0,
                       const std::vector<at::Tensor>& weights, const OptionalTensor& batch_sizes, bool has_bias,
                       bool bidirectional, const Extras& extras = {});

// `tensor` is of the device of `input`, and of the given dtype and sizes.
void check_tensor(const char* name, const at::Tensor& tensor, const at::Tensor& input, at::ScalarType dtype,
                  at::IntArrayRef sizes);

}  // namespace lstm_ext
