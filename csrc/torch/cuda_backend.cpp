// The CUDA layers on the device that torch has chosen: its current device and stream, its handle of cuBLAS.
#include <ATen/Context.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAGuard.h>

#include "torch/cuda_stepwise.h"
#include "torch/gemm_cublas.h"

namespace lstm_ext {
namespace {

// The layer takes long sequences in chunks whose intermediate results nearly fit into the second-level cache.
constexpr int64_t kChunkBytes = int64_t{32} << 20;

StepwiseDevice current_device() {
  const cudaDeviceProp* properties = at::cuda::getCurrentDeviceProperties();
  TORCH_CHECK(properties->major >= 8, "lstm_ext: the CUDA kernels need compute capability 8.0 or later, and ",
              properties->name, " has ", properties->major, ".", properties->minor);
  // The setting of cuDNN's RNNs: this layer stands in for one.
  const bool tf32 = at::globalContext().allowTF32CuDNN(at::Float32Op::RNN);
  return {at::cuda::getCurrentCUDAStream().stream(), &gemm_cublas, cublas_handle(), tf32, kChunkBytes};
}

LayerResults cuda_forward(const LayerCall& call, const LayerSizes& sizes, bool save) {
  const c10::cuda::CUDAGuard guard(call.input.device());
  return stepwise_forward(call, sizes, save, current_device());
}

LayerGradients cuda_backward(const LayerCall& call, const LayerSizes& sizes, const BackwardArguments& args) {
  const c10::cuda::CUDAGuard guard(call.input.device());
  return stepwise_backward(call, sizes, args, current_device());
}

// When the library is loaded.
const bool registered = [] {
  register_cuda_backend({&cuda_forward, &cuda_backward, /*saves_preactivations=*/true});
  return true;
}();

}  // namespace
}  // namespace lstm_ext
