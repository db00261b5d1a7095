// The CUDA layers on the device that torch has chosen: its current device and stream, its handle of cuBLAS.
#include <ATen/Context.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAGuard.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <mutex>
#include <string_view>

#include "torch/cuda_stepwise.h"
#include "torch/gemm_cublas.h"

namespace lstm_ext {
namespace {

// The kernel that this thread or LSTM_EXT_CUDA_KERNEL asks for; lstm_ext/native/config.py has refused the names that
// there are not.
cuda::Request request_of_environment() {
  const char* name = std::getenv("LSTM_EXT_CUDA_KERNEL");
  const std::string_view chosen = name ? name : "";
  cuda::Request request;
  request.any = chosen.empty() || chosen == "auto";
  if (chosen == "step") request.kernel = cuda::Kernel::kStep;
  if (const cuda::Kernel* kernel = cuda::request_of_thread()) {
    request.any = false;
    request.kernel = *kernel;
  }
  request.step_validated = cuda::is_step_validated(at::cuda::current_device());
  return request;
}

cuda::DeviceFacts facts_of(const cudaDeviceProp& device) {
  int clock_khz = 0;
  int memory_khz = 0;
  int index = at::cuda::current_device();
  cudaDeviceGetAttribute(&clock_khz, cudaDevAttrClockRate, index);
  cudaDeviceGetAttribute(&memory_khz, cudaDevAttrMemoryClockRate, index);
  return {device.name,
          device.major * 10 + device.minor,
          device.multiProcessorCount,
          device.l2CacheSize,
          static_cast<int64_t>(device.sharedMemPerBlockOptin),
          static_cast<int64_t>(device.sharedMemPerMultiprocessor),
          clock_khz / 1e6,
          2.0 * memory_khz * device.memoryBusWidth / 8 / 1e6};
}

// One a device; a call has no time to ask again.
const cuda::DeviceFacts& current_facts(const cudaDeviceProp& properties) {
  static std::mutex one_at_a_time;
  static std::map<int, cuda::DeviceFacts> known;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  const int index = at::cuda::current_device();
  const auto found = known.find(index);
  return found != known.end() ? found->second : known.emplace(index, facts_of(properties)).first->second;
}

// The layer takes long sequences in chunks whose intermediate results nearly fit into the second-level cache.
// Half of a small one: the weights want room too.
constexpr int64_t kChunkBytes = int64_t{32} << 20;

StepwiseDevice current_device() {
  const cudaDeviceProp* properties = at::cuda::getCurrentDeviceProperties();
  TORCH_CHECK(properties->major >= 8, "lstm_ext: the CUDA kernels need compute capability 8.0 or later, and ",
              properties->name, " has ", properties->major, ".", properties->minor);
  // The setting of cuDNN's RNNs: this layer stands in for one.
  const bool tf32 = at::globalContext().allowTF32CuDNN(at::Float32Op::RNN);
  const cuda::DeviceFacts& facts = current_facts(*properties);
  const int64_t chunk_bytes = std::max(std::min(kChunkBytes, facts.l2_bytes / 2), int64_t{1} << 20);
  return {at::cuda::getCurrentCUDAStream().stream(),
          &gemm_cublas,
          cublas_handle(),
          tf32,
          chunk_bytes,
          &facts,
          request_of_environment()};
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
