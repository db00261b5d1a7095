// Weights that are packed once, for many calls: the content of LayerOptions::frozen.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "contract/params.h"
#include "contract/visibility.h"
#include "torch/checks.h"

namespace lstm_ext {

// Returns for each direction a tensor of bytes, packed for the instruction set in use: a header, then the weights as
// place_frozen lays them out. `weights` are those of a LayerCall, of one dtype, on the CPU. `kind`: kOwn keeps their
// numbers; kBFloat16 rounds weight_ih and weight_hh to bfloat16, and kInt8 to 255 multiples of a factor for each row,
// its largest number / 127.
LSTM_EXT_PUBLIC std::vector<at::Tensor> freeze_weights(const std::vector<at::Tensor>& weights, bool has_bias,
                                                       bool bidirectional, WeightKind kind, bool gru);

// Checks that freeze_weights could have made the tensors for a layer of these sizes.
void check_frozen(const std::vector<at::Tensor>& frozen, const LayerSizes& sizes, const at::Tensor& input, bool gru);

// Whether they were packed for the instruction set in use. If not, `thawed` unpacks their weights.
bool is_ready(const std::vector<at::Tensor>& frozen);
std::vector<at::Tensor> thawed(const std::vector<at::Tensor>& frozen, const std::vector<at::Tensor>& weights);

// The frozen weights of one direction, for the kernels; T is the type they were packed for.
template <typename T>
FrozenWeights<T> frozen_weights(const at::Tensor& frozen);

}  // namespace lstm_ext
