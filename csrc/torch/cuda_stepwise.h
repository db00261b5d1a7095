// One layer on a GPU, in one of three ways. Stepwise: each time step is a matrix product and one kernel that does the
// rest (csrc/cuda/stepwise.h), for every size, dtype and GPU. Fused: a step is one kernel (csrc/cuda/step.h).
// Persistent: all steps of a chunk are one kernel (csrc/cuda/persistent.h).
#pragma once

#include "cuda/gpu_plan.h"
#include "cuda/stepwise.h"
#include "torch/backend.h"
#include "torch/gemm.h"

namespace lstm_ext {

// The device of the layer's tensors. The tests pass another one, whose products are loops and whose kernels run under
// the emulator.
struct StepwiseDevice {
  cudaStream_t stream;
  void (*gemm)(const Gemm& gemm, void* context);
  void* context;
  bool tf32;            // float32 products may round their operands to TF32
  int64_t chunk_bytes;  // limits the temporary results of several steps at once
  const cuda::DeviceFacts* facts;
  cuda::Request request;  // which of the three ways
  // For persistent kernels: the word that a launch sets to 1 if a wait expires, and the longest wait in nanoseconds; 0
  // means no limit.
  uint32_t* status = nullptr;
  int64_t wait_limit = 0;
};

LayerResults stepwise_forward(const LayerCall& call, const LayerSizes& sizes, bool save, const StepwiseDevice& device);
LayerGradients stepwise_backward(const LayerCall& call, const LayerSizes& sizes, const BackwardArguments& args,
                                 const StepwiseDevice& device);

}  // namespace lstm_ext
