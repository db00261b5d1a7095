// Argument checks of a layer. Each error names the argument, the expected value and the given one.
#pragma once

#include "contract/cell.h"
#include "contract/layer.h"
#include "torch/layer_call.h"

namespace lstm_ext {

// Makes an uninitialised tensor, or one of zeros.
using Allocate = at::Tensor (*)(at::IntArrayRef sizes, const at::TensorOptions& options);
LSTM_EXT_PUBLIC at::Tensor allocate_empty(at::IntArrayRef sizes, const at::TensorOptions& options);
at::Tensor allocate_zeros(at::IntArrayRef sizes, const at::TensorOptions& options);

// The number of tensors of a direction: of weights, and of layer normalisation.
struct WeightCount {
  int64_t per_direction;
  bool projected;
};
WeightCount count_weights(int64_t count, bool has_bias, bool bidirectional);
// The gates that the rows of weights belong to.
inline int64_t gates_of(const LayerOptions& options) { return options.gru ? 3 : cell::kGates; }
inline int64_t norms_per_direction(bool has_bias) { return has_bias ? 4 : 3; }

// The parameters of one direction, or their gradients; undefined if the layer does not have them.
struct DirectionParameters {
  at::Tensor weight_ih, weight_hh, bias_ih, bias_hh, weight_hr;
  at::Tensor gain_ih, gain_hh, gain_c, bias_c;  // layer normalisation
  at::Tensor cell[cell::kParameters];

  // The gradient of both biases, of which one may not be requested.
  const at::Tensor& bias() const { return bias_ih.defined() ? bias_ih : bias_hh; }
};

// Sizes of a layer, read from its arguments and checked against each other.
struct LSTM_EXT_PUBLIC LayerSizes {
  int64_t steps, batch, input_size, hidden_size, output_size, directions;
  bool projected;
  int64_t weights_per_direction;
  // The types of saved tensors, see Saved. sum_type is float32 for the 16-bit dtypes, else the input's. gates_type
  // depends on the backend, which check_layer does not know: see Backend.
  at::ScalarType sum_type;
  at::ScalarType gates_type;
  std::vector<int64_t> step_offsets;  // see LayerShape; empty for dense data

  bool packed() const { return !step_offsets.empty(); }
  // Sizes of a tensor with the input's time and batch axes: time, batch, features; saved_sizes adds the directions in
  // front.
  std::vector<int64_t> sequence_sizes(int64_t features) const;
  std::vector<int64_t> saved_sizes(int64_t features) const;
  // The shape of one direction, for the kernels. It points to step_offsets and to `resets`, which is contiguous or
  // undefined.
  LayerShape shape(int64_t direction, const at::Tensor& resets) const;

  DirectionParameters parameters(const LayerCall& call, int64_t direction) const;

  // Allocates the tensors that a forward pass of the call saves, on the device of `options`.
  Saved empty_saved(const LayerCall& call, const at::TensorOptions& options, Allocate allocate = &allocate_empty) const;
  // Checks that `saved` is what empty_saved would allocate.
  void check_saved(const LayerCall& call, const Saved& saved) const;
};

LayerSizes check_layer(const LayerCall& call);

// Checks that `tensor` is on the device of `input`, and of the given dtype and sizes.
void check_tensor(const char* name, const at::Tensor& tensor, const at::Tensor& input, at::ScalarType dtype,
                  at::IntArrayRef sizes);

}  // namespace lstm_ext
