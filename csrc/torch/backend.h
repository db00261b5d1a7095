// One layer on one kind of device: what the functions of lstm_layer.h call once the arguments are checked.
#pragma once

#include "torch/checks.h"
#include "torch/lstm_layer.h"

namespace lstm_ext {

// The arguments of a layer; see lstm_layer_forward.
struct LayerArguments {
  const at::Tensor& input;
  const OptionalTensor& h0;
  const OptionalTensor& c0;
  const std::vector<at::Tensor>& weights;
  bool has_bias;
  const Extras& extras;
};

// What a forward pass kept, and the gradients of its results. An absent gradient means zeros.
struct BackwardArguments {
  const OptionalTensor& grad_output;
  const OptionalTensor& grad_h_n;
  const OptionalTensor& grad_c_n;
  const OptionalTensor&
      grad_gates;  // of the values of the gates, (D, T, B, 4H), and of the saved cells: both may be results
  const OptionalTensor& grad_cells;
  const at::Tensor& output;
  const std::vector<at::Tensor>& saved;
  const std::vector<bool>& wanted;
};

// Results in the dtype of the input, the saved tensors in those of LayerSizes.
using ForwardResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, std::vector<at::Tensor>>;
using Forward = ForwardResult (*)(const LayerArguments& layer, const LayerSizes& sizes, bool save);
using Backward = std::vector<at::Tensor> (*)(const LayerArguments& layer, const LayerSizes& sizes,
                                             const BackwardArguments& arguments);

struct Backend {
  Forward forward;
  Backward backward;
};

const Backend& cpu_backend();

// That of CUDA registers itself where it is part of the build.
void register_cuda_backend(const Backend& backend);

}  // namespace lstm_ext
