// One layer on a GPU, step by step: for each time step a matrix product and one kernel that does all the rest
// (csrc/cuda/stepwise.h). For every size, dtype and GPU.
#pragma once

#include "cuda/stepwise.h"
#include "torch/gemm.h"
#include "torch/backend.h"

namespace lstm_ext {

// What the layer needs of the device that its tensors are on. The tests hand over another one, of which the products
// are loops and the kernels run under the emulator.
struct StepwiseDevice {
  cudaStream_t stream;
  void (*gemm)(const Gemm& gemm, void* context);
  void* context;
  bool tf32;            // float32 products may round their operands to TF32
  int64_t chunk_bytes;  // of what is computed for several steps at once and not kept
};

ForwardResult stepwise_forward(const LayerArguments& layer, const LayerSizes& sizes, bool save,
                               const StepwiseDevice& device);
std::vector<at::Tensor> stepwise_backward(const LayerArguments& layer, const LayerSizes& sizes,
                                          const BackwardArguments& arguments, const StepwiseDevice& device);

}  // namespace lstm_ext
