// The emulator's side of csrc/cuda/platform.h, which includes it: the names of CUDA and of the kernels' PTX wrappers.
//
// Functions take the caller's file and line as default arguments, so that a message names the kernel's line.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <driver_types.h>
#include <vector_functions.h>
#include <vector_types.h>

#include "simt/emulator.h"

#define LSTM_KERNEL void
#define LSTM_DEVICE inline
#define LSTM_HOST_DEVICE inline
#define LSTM_LAUNCH_BOUNDS(threads)
#define LSTM_MAX_REGISTERS(registers)
#define LSTM_GRID_CONSTANT const
// The type of the lambda identifies the array: each lambda in the source has its own type, another one in each instance
// of a template.
#define LSTM_SHARED(T, name, count) T(&name)[count] = ::simt::shared_variable<T[count]>([] {}, #name)
#define LSTM_DYNAMIC_SHARED(T, name) T* name = reinterpret_cast<T*>(::simt::dynamic_shared())

#define LSTM_SITE_ONLY_PARAMETERS const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define LSTM_SITE_ONLY file, line
#define LSTM_SITE_PARAMETERS , LSTM_SITE_ONLY_PARAMETERS
#define LSTM_SITE , LSTM_SITE_ONLY

// The scheduler sets these to the indices of the thread that runs.
extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;

namespace simt {

template <typename T, typename Key>
T& shared_variable(Key, const char* name) {
  static const char key = 0;
  constexpr size_t kAlignment = alignof(T) > 16 ? alignof(T) : 16;
  return *static_cast<T*>(shared_array(&key, sizeof(T), kAlignment, name));
}

template <typename T>
T shuffle_value(Shuffle kind, uint32_t mask, T value, uint32_t argument, int width, const char* file, int line) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = shuffle(kind, mask, bits, argument, width, file, line);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// The emulator switches threads in before_atomic_write and never between a load and a store.
template <typename T, typename Change>
__attribute__((no_sanitize("thread"))) T atomic_change(T* address, Change change, const char* file, int line) {
  before_atomic_write(address, sizeof(T), file, line);
  const T before = *address;
  *address = change(before);
  return before;
}

}  // namespace simt

// ---- of a block and of a warp

inline void __syncthreads(LSTM_SITE_ONLY_PARAMETERS) { simt::syncthreads(LSTM_SITE_ONLY); }
inline void __syncwarp(unsigned mask = 0xffffffffu LSTM_SITE_PARAMETERS) { simt::syncwarp(mask LSTM_SITE); }
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32 LSTM_SITE_PARAMETERS) {
  return simt::shuffle_value(simt::Shuffle::Down, mask, value, delta, width LSTM_SITE);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32 LSTM_SITE_PARAMETERS) {
  return simt::shuffle_value(simt::Shuffle::Xor, mask, value, static_cast<uint32_t>(lanes), width LSTM_SITE);
}
inline int __any_sync(unsigned mask, int predicate LSTM_SITE_PARAMETERS) {
  return simt::ballot(mask, predicate != 0 LSTM_SITE) != 0;
}
inline int __all_sync(unsigned mask, int predicate LSTM_SITE_PARAMETERS) {
  return simt::ballot(mask, predicate == 0 LSTM_SITE) == 0;
}

// ---- memory

template <typename T>
T atomicAdd(T* address, std::common_type_t<T> value LSTM_SITE_PARAMETERS) {
  return simt::atomic_change(address, [=](T before) { return before + value; } LSTM_SITE);
}
template <typename T>
T atomicExch(T* address, std::common_type_t<T> value LSTM_SITE_PARAMETERS) {
  return simt::atomic_change(address, [=](T) { return value; } LSTM_SITE);
}
inline void __threadfence(LSTM_SITE_ONLY_PARAMETERS) { simt::thread_fence(LSTM_SITE_ONLY); }
inline void __threadfence_system(LSTM_SITE_ONLY_PARAMETERS) { simt::thread_fence(LSTM_SITE_ONLY); }

// ---- arithmetic that CUDA has and C++ lacks

inline float __int_as_float(int x) {
  float value;
  std::memcpy(&value, &x, sizeof value);
  return value;
}
inline float __uint_as_float(unsigned x) { return __int_as_float(static_cast<int>(x)); }

namespace lstm_ext::cuda {

struct LaunchConfig {
  dim3 grid;
  dim3 block;
  size_t dynamic_shared = 0;
  cudaStream_t stream = nullptr;
  bool cooperative = false;
  bool dependent = false;
};

// Runs the kernel to its end. What it does wrong becomes a simt::Error.
template <typename Args>
cudaError_t launch(void (*kernel)(Args), const LaunchConfig& config, const Args& args) {
  simt::LaunchConfig emulated;
  emulated.grid = config.grid;
  emulated.block = config.block;
  emulated.dynamic_shared = config.dynamic_shared;
  emulated.cooperative = config.cooperative;
  emulated.dependent = config.dependent;
  const unsigned most = simt::options().cooperative_blocks;
  if (config.cooperative && most != 0 && config.grid.x * config.grid.y * config.grid.z > most) {
    ++simt::statistics().refused;
    return cudaErrorCooperativeLaunchTooLarge;
  }
  if (simt::translated_kernel != nullptr) {
    const auto translated = simt::translated_kernel(reinterpret_cast<const void*>(kernel), sizeof args);
    simt::launch(emulated, [translated, args] { translated(reinterpret_cast<const char*>(&args)); });
    return cudaSuccess;
  }
  simt::launch(emulated, [kernel, args] { kernel(args); });
  return cudaSuccess;
}

template <typename Args>
bool is_compiled_for_sm90(void (*)(Args)) {
  return true;
}

inline void store_shared_16(void* address, float4 value) { *static_cast<float4*>(address) = value; }

inline void cp_async16(void* shared, const void* global, int source_bytes LSTM_SITE_PARAMETERS) {
  simt::cp_async16(shared, global, static_cast<unsigned>(source_bytes) LSTM_SITE);
}
inline void cp_async_commit(LSTM_SITE_ONLY_PARAMETERS) { simt::cp_async_commit(LSTM_SITE_ONLY); }
template <int groups_left>
void cp_async_wait(LSTM_SITE_ONLY_PARAMETERS) {
  simt::cp_async_wait(groups_left LSTM_SITE);
}

inline void ldmatrix_x4(uint32_t (&d)[4], const void* row LSTM_SITE_PARAMETERS) {
  simt::ldmatrix_x4(false, d, row LSTM_SITE);
}
inline void ldmatrix_x4_trans(uint32_t (&d)[4], const void* row LSTM_SITE_PARAMETERS) {
  simt::ldmatrix_x4(true, d, row LSTM_SITE);
}
inline void mma_f16_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] LSTM_SITE_PARAMETERS) {
  simt::mma(simt::Operand::F16, d, a, b, d LSTM_SITE);
}
inline void mma_bf16_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] LSTM_SITE_PARAMETERS) {
  simt::mma(simt::Operand::BF16, d, a, b, d LSTM_SITE);
}
inline void mma_tf32_1688(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] LSTM_SITE_PARAMETERS) {
  simt::mma(simt::Operand::TF32, d, a, b, d LSTM_SITE);
}
using simt::to_tf32;

inline uint32_t load_relaxed(const uint32_t* address LSTM_SITE_PARAMETERS) {
  uint32_t value;
  simt::atomic_load(&value, address, sizeof value, sizeof value LSTM_SITE);
  return value;
}
inline void store_relaxed(uint32_t* address, uint32_t value LSTM_SITE_PARAMETERS) {
  simt::relaxed_store(address, &value, sizeof value, sizeof value LSTM_SITE);
}
inline void store_relaxed_system(uint32_t* address, uint32_t value LSTM_SITE_PARAMETERS) {
  store_relaxed(address, value LSTM_SITE);
}

inline uint4 load_relaxed_16(const void* address LSTM_SITE_PARAMETERS) {
  uint4 value;
  simt::atomic_load(&value, address, sizeof value, sizeof value.x LSTM_SITE);
  return value;
}
inline void store_relaxed_16(void* address, uint4 value LSTM_SITE_PARAMETERS) {
  simt::relaxed_store(address, &value, sizeof value, sizeof value.x LSTM_SITE);
}

inline int64_t now() { return simt::clock(); }

// Exact; tests/simt/fast_functions.cpp has their errors.
inline float exp2_approximate(float x) { return std::exp2(x); }
inline float reciprocal_approximate(float x) { return 1.f / x; }

inline void grid_dependency_wait(LSTM_SITE_ONLY_PARAMETERS) { simt::grid_dependency_wait(LSTM_SITE_ONLY); }
inline void launch_dependents() {}

}  // namespace lstm_ext::cuda
