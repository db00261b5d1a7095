// One layer on one kind of device: what lstm_layer_forward and lstm_layer_backward call once the arguments are checked.
#pragma once

#include <optional>

#include "cuda/gpu_plan.h"
#include "torch/checks.h"
#include "torch/layer_call.h"

namespace lstm_ext {

// What the backward pass takes beside the call.
struct BackwardArguments {
  const ResultGradients& grads;
  const at::Tensor& output;
  const Saved& saved;
  const NeedsGrad& needs_grad;
};

using Forward = LayerResults (*)(const LayerCall& call, const LayerSizes& sizes, bool save);
using Backward = LayerGradients (*)(const LayerCall& call, const LayerSizes& sizes, const BackwardArguments& arguments);

struct Backend {
  Forward forward;
  Backward backward;
  // Whether Saved::gates are preactivations, in the dtype of the input; else they are gate values, of sum_type.
  bool saves_preactivations = false;
  // Of a GPU: what the planner of kernels has to know of it.
  cuda::DeviceFacts (*facts)(int device) = nullptr;
  // Whether a wait of a persistent kernel has expired there since somebody asked, or a call has raised for it.
  bool (*wait_expired)(int device) = nullptr;
};

const Backend& cpu_backend();
// How exact the operands of its products must be for a layer of this type; see LayerParams. A float32 layer follows
// torch's own switch, torch.backends.mkldnn.rnn.fp32_precision.
int planes_for(at::ScalarType dtype);

// The CUDA backend registers itself where it is part of the build.
void register_cuda_backend(const Backend& backend);
// Nothing where it is not.
LSTM_EXT_PUBLIC std::optional<cuda::DeviceFacts> cuda_facts(int device);
LSTM_EXT_PUBLIC bool cuda_wait_expired(int device);

}  // namespace lstm_ext
