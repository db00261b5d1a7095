// One layer on one kind of device, as lstm_layer.h calls it once the arguments are checked.
#pragma once

#include "torch/checks.h"
#include "torch/layer_call.h"

namespace lstm_ext {

// Results in the dtype of the input; saved tensors in the types and sizes of LayerSizes::empty_saved, undefined where
// absent.
struct LayerResults {
  at::Tensor output, h_n, c_n;
  Saved saved;
};

struct BackwardArguments {
  const ResultGradients& grads;
  const at::Tensor& output;
  const Saved& saved;
  const NeedsGrad& needs_grad;
};

using Forward = LayerResults (*)(const LayerCall& call, const LayerSizes& sizes, bool save);
using Backward = LayerGradients (*)(const LayerCall& call, const LayerSizes& sizes, const BackwardArguments& args);

struct Backend {
  Forward forward;
  Backward backward;
};

const Backend& cpu_backend();

// The CUDA backend registers itself if it is part of the build.
void register_cuda_backend(const Backend& backend);

}  // namespace lstm_ext
