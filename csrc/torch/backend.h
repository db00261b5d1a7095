// One layer on one kind of device. lstm_layer_forward and lstm_layer_backward call it after they have checked the
// arguments.
#pragma once

#include <optional>

#include "cuda/gpu_plan.h"
#include "torch/checks.h"
#include "torch/layer_call.h"

namespace lstm_ext {

// The arguments of the backward pass besides the call.
struct BackwardArguments {
  const ResultGradients& grads;
  const at::Tensor& output;
  const Saved& saved;
  const std::vector<bool>& needs_grad;
};

using Forward = LayerResults (*)(const LayerCall& call, const LayerSizes& sizes, bool save);
// The gradients may be of sum_type.
using Backward = LayerGradients (*)(const LayerCall& call, const LayerSizes& sizes, const BackwardArguments& arguments);

struct Backend {
  Forward forward;
  Backward backward;
  // Whether Saved::gates are preactivations, in the dtype of the input; else they are gate values, of sum_type.
  bool saves_preactivations = false;
  // For a GPU: the facts that the planner of kernels needs.
  cuda::DeviceFacts (*facts)(int device) = nullptr;
  // Whether a wait of a persistent kernel has expired on the device since the last query, or a call has raised for it.
  bool (*wait_expired)(int device) = nullptr;
  const char* build = "";  // for a GPU: the version of CUDA and the architectures
};

const Backend& cpu_backend();
// The number of bf16 parts of a layer of this type; see LayerParams. A float32 layer follows torch's own switch,
// torch.backends.mkldnn.rnn.fp32_precision, which is "none" unless somebody asks.
int bf16_parts_for(at::ScalarType dtype);

// The CUDA backend registers itself if it is part of the build, or when its library is loaded, which a wheel has apart.
LSTM_EXT_PUBLIC void register_cuda_backend(const Backend& backend);
// Empty in a build without the CUDA backend.
LSTM_EXT_PUBLIC std::optional<cuda::DeviceFacts> cuda_facts(int device);
LSTM_EXT_PUBLIC bool cuda_wait_expired(int device);
LSTM_EXT_PUBLIC const char* cuda_build();

}  // namespace lstm_ext
