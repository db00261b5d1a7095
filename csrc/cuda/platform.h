// The one header that every kernel includes: the language of CUDA and the parts of PTX that kernels use, under two
// compilers.
//
// nvcc gets inline PTX (cuda/ptx.h). A plain C++ compiler, with LSTM_EXT_SIMT defined and tests/ on the include path,
// gets calls into the emulator of tests/simt: so the same kernel sources run on a CPU. Both sides define the same
// names:
//
//   LSTM_KERNEL, LSTM_DEVICE, LSTM_HOST_DEVICE, LSTM_LAUNCH_BOUNDS(threads), LSTM_MAX_REGISTERS(registers),
//   LSTM_GRID_CONSTANT
//
//   LSTM_SHARED(T, name, count)          a static shared array, aligned to 16 bytes
//
//   LSTM_DYNAMIC_SHARED(T, name)         T* to the dynamic shared memory, aligned to 128 bytes
//
//   LSTM_SITE_PARAMETERS, LSTM_SITE      helpers pass them on, so that the emulator names the line of their caller
//
// and, in lstm_ext::cuda: launch, store_shared_16, cp_async..., ldmatrix..., mma..., dependent launches, relaxed
// accesses of 4 and 16 bytes, now, exp2_approximate, reciprocal_approximate.
#pragma once

#include <cstddef>
#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#if defined(LSTM_EXT_SIMT)
#include "simt/platform.h"
#else
#include "cuda/ptx.h"
#endif

namespace lstm_ext::cuda {

// A kernel takes one struct by value.
template <typename Args>
cudaError_t launch(void (*kernel)(Args), dim3 grid, dim3 block, size_t dynamic_shared, cudaStream_t stream,
                   const Args& args) {
  LaunchConfig config;
  config.grid = grid;
  config.block = block;
  config.dynamic_shared = dynamic_shared;
  config.stream = stream;
  return launch(kernel, config, args);
}

// Bounds a loop that polls. Reading the clock takes as long as a try or two: so a try that fails is only counted, and
// one in 256 looks around. A wait that succeeds at once reads no clock, and one that expires lasts so many tries
// longer.
class WaitLimit {
 public:
  // The longest wait, in nanoseconds; 0: no limit.
  LSTM_DEVICE explicit WaitLimit(int64_t limit) : limit_(limit) {}
  // After each try that failed: whether to look around.
  LSTM_DEVICE bool looks() { return ++tries_ % 256 == 0; }
  // Whether the limit, or so many of it, has passed since the first look at the clock.
  LSTM_DEVICE bool has_passed(int times = 1) {
    const int64_t time = now();
    if (start_ == 0) start_ = time;
    return limit_ != 0 && time - start_ > times * limit_;
  }
  LSTM_DEVICE bool is_over() { return looks() && has_passed(); }
  LSTM_DEVICE void start_again() { start_ = 0; }

 private:
  int64_t limit_;
  int64_t start_ = 0;
  uint32_t tries_ = 0;
};

}  // namespace lstm_ext::cuda
