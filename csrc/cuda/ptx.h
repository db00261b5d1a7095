// nvcc's side of platform.h: launches, and inline PTX.
//
// The route of tests/simt that executes nvcc's PTX checks every operand order here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <set>
#include <utility>

#include <cuda_runtime.h>

#define LSTM_KERNEL __global__ void
#define LSTM_DEVICE __device__ __forceinline__
#define LSTM_HOST_DEVICE __host__ __device__ __forceinline__
// Without a minimum block count ptxas picks an occupancy target and spills to meet it.
#define LSTM_LAUNCH_BOUNDS(threads) __launch_bounds__(threads, 1)
// The most registers of a thread, in the place of launch bounds: the two do not go together.
#define LSTM_MAX_REGISTERS(registers) __maxnreg__(registers)
// A parameter that stays where it is, so that an index into it costs no copy.
#define LSTM_GRID_CONSTANT const __grid_constant__
#define LSTM_SHARED(T, name, count) __shared__ __align__(16) T name[count]
#define LSTM_DYNAMIC_SHARED(T, name)                                              \
  extern __shared__ __align__(128) unsigned char lstm_ext_dynamic_shared_bytes[]; \
  T* name = reinterpret_cast<T*>(lstm_ext_dynamic_shared_bytes)

#define LSTM_SITE_PARAMETERS
#define LSTM_SITE
#define LSTM_SITE_ONLY_PARAMETERS
#define LSTM_SITE_ONLY

namespace lstm_ext::cuda {

struct LaunchConfig {
  dim3 grid;
  dim3 block;
  size_t dynamic_shared = 0;
  cudaStream_t stream = nullptr;
  bool cooperative = false;  // all blocks at once, or an error
  // May begin before the kernel in front of it in the stream has ended; see grid_dependency_wait. From sm_90 on.
  bool dependent = false;
};

// Lets a kernel have as much dynamic shared memory as the device has for it, once for each device and kernel. A limit
// of the size of one launch could be lowered by another thread's before that launch comes.
inline cudaError_t allow_shared(const void* kernel) {
  static std::mutex one_at_a_time;
  static std::set<std::pair<int, const void*>> done;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  int device = 0, most = 0;
  cudaFuncAttributes attributes = {};
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess || done.count({device, kernel}) > 0) return status;
  status = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (status == cudaSuccess) status = cudaFuncGetAttributes(&attributes, kernel);
  if (status == cudaSuccess) {
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  most - static_cast<int>(attributes.sharedSizeBytes));
  }
  if (status == cudaSuccess) done.insert({device, kernel});
  return status;
}

// Returns the error, which the caller reports, and clears it: the next cudaGetLastError does not see it.
template <typename Args>
cudaError_t launch(void (*kernel)(Args), const LaunchConfig& config, const Args& args) {
  constexpr size_t kSharedWithoutAsking = 48 * 1024;
  cudaError_t status = cudaSuccess;
  if (config.dynamic_shared > kSharedWithoutAsking) {
    status = allow_shared(reinterpret_cast<const void*>(kernel));
  }
  if (status == cudaSuccess) {
    cudaLaunchAttribute attributes[2];
    cudaLaunchConfig_t description = {};
    description.gridDim = config.grid;
    description.blockDim = config.block;
    description.dynamicSmemBytes = config.dynamic_shared;
    description.stream = config.stream;
    description.attrs = attributes;
    if (config.cooperative) {
      cudaLaunchAttribute& cooperative = attributes[description.numAttrs++];
      cooperative.id = cudaLaunchAttributeCooperative;
      cooperative.val.cooperative = 1;
    }
    if (config.dependent) {
      cudaLaunchAttribute& dependent = attributes[description.numAttrs++];
      dependent.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      dependent.val.programmaticStreamSerializationAllowed = 1;
    }
    status = cudaLaunchKernelEx(&description, kernel, args);
  }
  if (status != cudaSuccess) cudaGetLastError();
  return status;
}

// Whether the code of a kernel was compiled for sm_90 or later, and not made of PTX for an earlier one. Devices of a
// process may run different codes.
template <typename Args>
bool is_compiled_for_sm90(void (*kernel)(Args)) {
  static std::mutex one_at_a_time;
  static std::map<std::pair<int, const void*>, bool> known;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  const auto* function = reinterpret_cast<const void*>(kernel);
  cudaFuncAttributes attributes = {};
  int device = 0;
  if (cudaGetDevice(&device) == cudaSuccess) {
    const auto found = known.find({device, function});
    if (found != known.end()) return found->second;
    if (cudaFuncGetAttributes(&attributes, function) == cudaSuccess) {
      return known[{device, function}] = attributes.ptxVersion >= 90;
    }
  }
  cudaGetLastError();
  return false;
}

// An address within shared memory, as instructions want it.
LSTM_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// By one instruction, whatever the compiler would make of it.
LSTM_DEVICE void store_shared_16(void* address, float4 value) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};"
               :
               : "r"(shared_address(address)), "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w)
               : "memory");
}

// ---- copies from global to shared memory

// Copies 16 bytes, to which both addresses are aligned, past the first-level cache: reads `source_bytes` of them and
// fills up with zeros.
LSTM_DEVICE void cp_async16(void* shared, const void* global, int source_bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(shared_address(shared)), "l"(global), "r"(source_bytes)
               : "memory");
}
LSTM_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" : : : "memory"); }
template <int groups_left>
LSTM_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" : : "n"(groups_left) : "memory");
}

// ---- tensor cores

LSTM_DEVICE void ldmatrix_x4(uint32_t (&d)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(shared_address(row))
               : "memory");
}
LSTM_DEVICE void ldmatrix_x4_trans(uint32_t (&d)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(shared_address(row))
               : "memory");
}

// d += a * b
LSTM_DEVICE void mma_f16_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
LSTM_DEVICE void mma_bf16_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
LSTM_DEVICE void mma_tf32_1688(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
LSTM_DEVICE uint32_t to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

// ---- fast functions: within two units in the last place, and one; numbers below the normal ones are 0

LSTM_DEVICE float exp2_approximate(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
LSTM_DEVICE float reciprocal_approximate(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// ---- global memory that other blocks wait for

LSTM_DEVICE uint32_t load_relaxed(const uint32_t* address) {
  uint32_t value;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}
LSTM_DEVICE void store_relaxed(uint32_t* address, uint32_t value) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" : : "l"(address), "r"(value) : "memory");
}
// For memory of the host.
LSTM_DEVICE void store_relaxed_system(uint32_t* address, uint32_t value) {
  asm volatile("st.relaxed.sys.u32 [%0], %1;" : : "l"(address), "r"(value) : "memory");
}

// Sixteen aligned bytes by one instruction. PTX takes a vector for so many accesses of its parts, in no order: it
// promises that a word is whole, and not that the four belong together.
LSTM_DEVICE uint4 load_relaxed_16(const void* address) {
  uint4 value;
  asm volatile("ld.relaxed.gpu.global.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(address)
               : "memory");
  return value;
}
LSTM_DEVICE void store_relaxed_16(void* address, uint4 value) {
  asm volatile("st.relaxed.gpu.global.v4.b32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(address), "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w)
               : "memory");
}

// Nanoseconds, of one clock for all multiprocessors, which goes on in steps: of a microsecond on some cards.
LSTM_DEVICE int64_t now() {
  int64_t nanoseconds;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(nanoseconds));
  return nanoseconds;
}

// ---- dependent launches. Before sm_90 a kernel begins when the one in front of it has ended.

// Waits until the kernels in front of this one have ended and what they wrote can be read. Before it, a kernel reads
// nothing that they write, and writes nothing.
LSTM_DEVICE void grid_dependency_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" : : : "memory");
#endif
}
// From here on the kernel behind this one may begin, once all blocks have come here.
LSTM_DEVICE void launch_dependents() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" : : : "memory");
#endif
}

}  // namespace lstm_ext::cuda
