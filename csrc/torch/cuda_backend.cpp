// The CUDA layers on torch's current device and stream, with its handle of cuBLAS.
#include <ATen/Context.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#include "cuda/step.h"
#include "torch/cuda_stepwise.h"
#include "torch/cuda_stepwise_common.h"
#include "torch/gemm_cublas.h"
#include "torch/operators.h"

namespace lstm_ext {
namespace {

cuda::DeviceFacts facts_of(const cudaDeviceProp& device) {
  int shared = 0;
  cudaDeviceGetAttribute(&shared, cudaDevAttrMpsEnabled, at::cuda::current_device());
  cudaGetLastError();  // an attribute that a driver does not know is 0
  return {device.name,
          device.major * 10 + device.minor,
          device.multiProcessorCount,
          device.l2CacheSize,
          static_cast<int64_t>(device.sharedMemPerBlockOptin),
          shared != 0};
}

// The facts of each device, kept because a call has no time to query them again.
const cuda::DeviceFacts& current_facts(const cudaDeviceProp& properties) {
  static std::mutex one_at_a_time;
  static std::map<int, cuda::DeviceFacts> known;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  const int index = at::cuda::current_device();
  const auto found = known.find(index);
  return found != known.end() ? found->second : known.emplace(index, facts_of(properties)).first->second;
}

// The words that persistent kernels write to if a wait expires: one for each device, which the host reads without
// synchronising. They live as long as the process. With unified addressing, which every 64-bit system has, the devices
// use the same address.
volatile uint32_t* status_of(int device) {
  static constexpr int kDevices = 64;
  static uint32_t* const words = [] {
    // A graph may be captured at the same time.
    const c10::cuda::CUDAStreamCaptureModeGuard relaxed(cudaStreamCaptureModeRelaxed);
    void* memory = nullptr;
    C10_CUDA_CHECK(cudaHostAlloc(&memory, kDevices * sizeof(uint32_t), cudaHostAllocMapped | cudaHostAllocPortable));
    std::memset(memory, 0, kDevices * sizeof(uint32_t));
    return static_cast<uint32_t*>(memory);
  }();
  TORCH_CHECK(device < kDevices, "lstm_ext: expected at most ", kDevices, " devices, got cuda:", device);
  return words + device;
}

bool wait_expired(int device) {
  volatile uint32_t* const status = status_of(device);
  const bool expired = *status != 0;
  *status = 0;
  return expired;
}

StepwiseDevice current_device(const LayerCall& call, const LayerSizes& sizes, bool backward) {
  const at::ScalarType dtype = call.input.scalar_type();
  const cudaDeviceProp* properties = at::cuda::getCurrentDeviceProperties();
  TORCH_CHECK(properties->major >= 8, "lstm_ext: the CUDA kernels need compute capability 8.0 or later, and ",
              properties->name, " has ", properties->major, ".", properties->minor);
  const cuda::DeviceFacts& facts = current_facts(*properties);
  bool known = true;
  cuda::Request request = cuda::current_request(&known);
  TORCH_CHECK(known, "lstm_ext: LSTM_EXT_CUDA_KERNEL is '", std::getenv("LSTM_EXT_CUDA_KERNEL"),
              "': set it to auto, torch, stepwise, step or persistent, or unset it");
  // Follows the setting of cuDNN's RNNs, because this layer replaces one.
  const bool tf32 = cuda::has_request_of_thread() || at::globalContext().allowTF32CuDNN(at::Float32Op::RNN);
  const int index = at::cuda::current_device();
  const auto outcome = [&](cuda::Kernel kernel) {
    return cuda::is_validated(index, kernel, dtype == at::kFloat) ? cuda::Outcome::kRight : cuda::Outcome::kNotTried;
  };
  request.step = outcome(cuda::Kernel::kStep);
  request.persistent = outcome(cuda::Kernel::kPersistent);
  if (request.any && call.options.norm.empty() && !has_options<kCell>(call.options)) {
    request.measured = cuda::measured(index, facts_of(call, sizes, tf32, backward));
  }
  const std::optional<int64_t> limit = cuda::wait_limit();
  TORCH_CHECK(limit, "lstm_ext: LSTM_EXT_CUDA_WAIT_LIMIT is '", std::getenv("LSTM_EXT_CUDA_WAIT_LIMIT"),
              "': set it to a number of seconds, or unset it");
  TORCH_CHECK(cuda::free_multiprocessors(), "lstm_ext: LSTM_EXT_CUDA_FREE_MULTIPROCESSORS is '",
              std::getenv("LSTM_EXT_CUDA_FREE_MULTIPROCESSORS"), "': set it to a number of at least 0, or unset it");
  // A thread that requests a kernel checks this itself.
  TORCH_CHECK(cuda::has_request_of_thread() || !wait_expired(index), "lstm_ext: in an earlier call on cuda:", index,
              " a block of a kernel that does all steps at once waited ",
              "for another one longer than LSTM_EXT_CUDA_WAIT_LIMIT allows, and all results of that launch are NaN. ",
              "If the GPU was busy with other programs, set it to more seconds; LSTM_EXT_CUDA_KERNEL=step takes a ",
              "kernel that waits for nobody");
  return {at::cuda::getCurrentCUDAStream().stream(),
          &gemm_cublas,
          cublas_handle(),
          tf32,
          cuda::kChunkBytes,
          &facts,
          request,
          const_cast<uint32_t*>(status_of(index)),
          *limit};
}

cuda::DeviceFacts facts_of_device(int index) {
  const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(index));
  const cuda::DeviceFacts& known = current_facts(*at::cuda::getCurrentDeviceProperties());
  cuda::DeviceFacts facts = known;
  facts.most_blocks = cuda::most_blocks(&known);
  return facts;
}

LayerResults cuda_forward(const LayerCall& call, const LayerSizes& sizes, bool save) {
  const c10::cuda::CUDAGuard guard(call.input.device());
  return stepwise_forward(call, sizes, save, current_device(call, sizes, false));
}

LayerGradients cuda_backward(const LayerCall& call, const LayerSizes& sizes, const BackwardArguments& args) {
  const c10::cuda::CUDAGuard guard(call.input.device());
  return stepwise_backward(call, sizes, args, current_device(call, sizes, true));
}

// Registers the backend when the library is loaded.
const bool registered = [] {
  register_cuda_backend({&cuda_forward, &cuda_backward, /*saves_preactivations=*/true, &facts_of_device, &wait_expired,
                         LSTM_EXT_CUDA_BUILD});
  return true;
}();

TORCH_LIBRARY_IMPL(lstm_ext, CUDA, m) { ops::implement(m); }

}  // namespace
}  // namespace lstm_ext
