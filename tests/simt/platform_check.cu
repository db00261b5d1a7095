// Everything that cuda/platform.h and cuda/numeric.cuh offer, used once, and the toy kernels: for nvcc to compile.
#include "cuda/numeric.cuh"
#include "simt/toy_lstm.cuh"
#include "simt/toy_mailbox.cuh"

namespace {

using namespace lstm_ext::cuda;

struct Arguments {
  float* f32;
  double* f64;
  __half* f16;
  __nv_bfloat16* bf16;
  uint32_t* words;
};

LSTM_KERNEL LSTM_LAUNCH_BOUNDS(256) use_everything(Arguments a) {
  LSTM_DYNAMIC_SHARED(float, shared);

  cp_async16(shared, a.f32, 8);
  cp_async_commit();
  cp_async_wait<1>();
  cp_async_wait<0>();

  uint32_t fragment_a[4];
  uint32_t fragment_b[2];
  float d[4] = {0.f, 0.f, 0.f, 0.f};
  ldmatrix_x4(fragment_a, shared);
  for (int i = 0; i < 2; ++i) fragment_b[i] = a.words[i];
  mma_f16_16816(d, fragment_a, fragment_b);
  ldmatrix_x4_trans(fragment_a, shared);
  mma_bf16_16816(d, fragment_a, fragment_b);
  fragment_a[0] = to_tf32(d[0]);
  mma_tf32_1688(d, fragment_a, fragment_b);
  for (int i = 0; i < 4; ++i) a.f32[i] = d[i];

  a.words[0] = load_relaxed(a.words + 1);
  store_relaxed(a.words, 2);
  WaitLimit wait(100);
  if (wait.is_over()) return;
  store_relaxed_16(a.words, load_relaxed_16(a.words + 4));

  a.f16[0] = from_float<__half>(to_float(a.bf16[0]));
  a.bf16[1] = from_float<__nv_bfloat16>(to_float(a.f16[1]));
  a.f64[0] = narrow<double>(widen(a.f64[1])) + to_float(from_float<double>(a.f32[5]));
  a.bf16[3] = narrow<__nv_bfloat16>(widen(a.f16[3]));
}

}  // namespace

cudaError_t launch_everything(cudaStream_t stream) {
  LaunchConfig config;
  config.grid = dim3(8);
  config.block = dim3(32);
  const cudaError_t status = launch(use_everything, config, Arguments{});
  return status != cudaSuccess ? status : launch(use_everything, dim3(8), dim3(32), 1024, stream, Arguments{});
}

template LSTM_KERNEL toy::grid_f32<128, 16, 16>(toy::Arguments);
template LSTM_KERNEL toy::grid_bf16<128, 16, 16>(toy::Arguments);
template LSTM_KERNEL toy::mailbox<4, 16>(toy::MailboxArguments);
