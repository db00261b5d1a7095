// Argument checks of the ops. Each error names the argument, what was expected and what came.
#pragma once

#include "glue/lstm_layer.h"

namespace lstm_ext {

// Sizes of a layer, read off its arguments and checked against each other.
struct LayerSizes {
  int64_t steps, batch, input_size, hidden_size, output_size, directions;
  bool projected;
  int64_t weights_per_direction;
};

LayerSizes check_layer(const at::Tensor& input, const OptionalTensor& h0, const OptionalTensor& c0,
                       const std::vector<at::Tensor>& weights, bool has_bias, bool bidirectional);

// `tensor`, if there, is of the dtype and device of `input` and has the given sizes.
void check_tensor(const char* name, const at::Tensor& tensor, const at::Tensor& input, at::IntArrayRef sizes);

}  // namespace lstm_ext
