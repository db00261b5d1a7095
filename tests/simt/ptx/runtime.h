// What memory.py's instructions do, on the emulator; and the kernels that a program has from PTX.
#pragma once

#include <string>
#include <vector>

#include "simt/ptx/arithmetic.h"
#include "simt/emulator.h"

extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;

// Where in the source, for messages: the translator writes #line.
#define PTX_HERE __FILE__, __LINE__
// Accesses that the race detector hears of otherwise, as atomic ones.
#define PTX_UNCHECKED __attribute__((no_sanitize("thread")))

namespace ptx {

// ---- kernels

struct Kernel {
  const char* name;  // mangled
  void (*body)(const char* parameters);
  size_t parameter_bytes;
  const void* host;  // the kernel that g++ made of the same source; null where the program has none
};

// Makes the kernel known while the program starts.
struct Registration {
  explicit Registration(const Kernel& kernel);
};

const std::vector<Kernel>& kernels();

// nvcc and g++ mangle a kernel's name alike, so that the linker finds its counterpart.
#define PTX_KERNEL(function, mangled, bytes)                            \
  extern "C" __attribute__((weak)) void host_##function() asm(mangled); \
  static const Registration registration_##function(                    \
      {mangled, function, bytes, reinterpret_cast<const void*>(&host_##function)})

// ---- special registers

inline uint3 tid() { return threadIdx; }
inline uint3 ctaid() { return blockIdx; }
inline dim3 ntid() { return blockDim; }
inline dim3 nctaid() { return gridDim; }
inline u32 laneid() { return simt::lane_index(); }
inline u64 globaltimer() { return static_cast<u64>(simt::clock()); }

// ---- addresses

// Generic addresses are the host's. Those of shared memory in 32 bits are as simt::shared_address has them.
inline char* pointer(b64 base, int64_t offset) { return reinterpret_cast<char*>(base) + offset; }
inline char* in_shared(b32 address, const char* file, int line) {
  return static_cast<char*>(simt::shared_pointer(address, file, line));
}
inline b32 shared_variable(const char* name, size_t bytes, size_t alignment) {
  return simt::shared_address(simt::shared_array(name, bytes, alignment, name), name, 0);
}
inline b32 dynamic_shared() { return simt::shared_address(simt::dynamic_shared(), "dynamic shared memory", 0); }
inline b64 shared_to_generic(b64 address, const char* file, int line) {
  return reinterpret_cast<b64>(in_shared(static_cast<b32>(address), file, line));
}
inline b64 generic_to_shared(b64 address, const char* file, int line) {
  return simt::shared_address(reinterpret_cast<const void*>(address), file, line);
}

// ---- loads and stores

// A vector has to be aligned as a whole.
template <typename T, unsigned count>
T* aligned(char* place, const char* file, int line) {
  if (reinterpret_cast<uintptr_t>(place) % (count * sizeof(T)) != 0) {
    simt::fail("an access of " + std::to_string(count * sizeof(T)) + " bytes that is not aligned to them", file, line);
  }
  return reinterpret_cast<T*>(place);
}
inline void note_non_coherent(const void* place, size_t bytes, const char* file, int line) {
  simt::before_read_only_load(place, static_cast<unsigned>(bytes), file, line);
}
inline void note_shared(const void* place, size_t bytes, bool stores, const char* file, int line) {
  simt::wavefronts::note(place, static_cast<unsigned>(bytes), stores, file, line);
}

// Relaxed, as volatile ones are.
template <typename T>
T load_relaxed(char* place, const char* file, int line) {
  T value;
  simt::atomic_load(&value, place, sizeof value, sizeof value, file, line);
  return value;
}
template <typename T>
void store_relaxed(char* place, T value, const char* file, int line) {
  simt::relaxed_store(place, &value, sizeof value, sizeof value, file, line);
}
// So many accesses, in no order among themselves.
template <typename T, unsigned count>
void load_vector(char* place, T (&values)[count], const char* file, int line) {
  simt::atomic_load(values, place, sizeof values, sizeof(T), file, line);
}
template <typename T, unsigned count>
void store_vector(char* place, const T (&values)[count], const char* file, int line) {
  simt::relaxed_store(place, values, sizeof values, sizeof(T), file, line);
}

// ---- atomics

// Sets *place to operation(*place) and returns what was there.
template <typename T, typename Operation>
PTX_UNCHECKED T exchange(char* place, Operation operation, const char* file, int line) {
  T* p = aligned<T, 1>(place, file, line);
  simt::before_atomic_write(p, sizeof(T), file, line);
  const T old = *p;
  *p = operation(old);
  return old;
}
template <typename T>
T sum(T a, T b) {
  if constexpr (std::is_integral_v<T>) {
    return integer_add<T>(a, b);
  } else {
    return float_add<T, Rounding::rn>(a, b);
  }
}
#define PTX_ATOMIC(name, result)                                                              \
  template <typename T>                                                                       \
  T atomic_##name(char* place, T value, const char* file, int line) {                         \
    return exchange<T>(place, [value](T old) { return static_cast<T>(result); }, file, line); \
  }
PTX_ATOMIC(add, sum(old, value))
PTX_ATOMIC(exch, ((void)old, value))
#undef PTX_ATOMIC

inline void fence(const char* file, int line) { simt::thread_fence(file, line); }

// ---- cp.async

inline void cp_async16(char* shared, const char* global, u32 read, const char* file, int line) {
  note_shared(shared, 16, true, file, line);
  simt::cp_async16(shared, global, read, file, line);
}
inline void grid_dependency_wait(const char* file, int line) { simt::grid_dependency_wait(file, line); }
inline void cp_async_commit(const char* file, int line) { simt::cp_async_commit(file, line); }
inline void cp_async_wait(u32 groups_left, const char* file, int line) { simt::cp_async_wait(groups_left, file, line); }

// ---- barriers

inline void bar_sync(const char* file, int line) { simt::syncthreads(file, line); }
inline void bar_warp_sync(b32 mask, const char* file, int line) { simt::syncwarp(mask, file, line); }

// ---- warps

struct Shuffled {
  b32 value;
  bool in_range;
};
enum class ShuffleMode { up, down, bfly, idx };
// b and c as in PTX: c holds the bound in bits 0 to 4, and in bits 8 to 12 which bits of the lane name its segment.
Shuffled shuffle(ShuffleMode mode, b32 a, b32 b, b32 c, b32 mask, const char* file, int line);
inline Shuffled shfl_up(b32 a, b32 b, b32 c, b32 mask, const char* file, int line) {
  return shuffle(ShuffleMode::up, a, b, c, mask, file, line);
}
inline Shuffled shfl_down(b32 a, b32 b, b32 c, b32 mask, const char* file, int line) {
  return shuffle(ShuffleMode::down, a, b, c, mask, file, line);
}
inline Shuffled shfl_bfly(b32 a, b32 b, b32 c, b32 mask, const char* file, int line) {
  return shuffle(ShuffleMode::bfly, a, b, c, mask, file, line);
}
inline Shuffled shfl_idx(b32 a, b32 b, b32 c, b32 mask, const char* file, int line) {
  return shuffle(ShuffleMode::idx, a, b, c, mask, file, line);
}

inline bool vote_all(bool predicate, b32 mask, const char* file, int line) {
  return simt::ballot(mask, predicate, file, line) == mask;
}
inline bool vote_any(bool predicate, b32 mask, const char* file, int line) {
  return simt::ballot(mask, predicate, file, line) != 0;
}
// ---- tensor cores

inline void ldmatrix_x4(bool transposed, b32* registers, const char* row, const char* file, int line) {
  note_shared(row, 16, false, file, line);  // one of four matrices for eight lanes
  simt::ldmatrix_x4(transposed, registers, row, file, line);
}
template <typename T>
constexpr simt::Operand operand_of = std::is_same_v<T, f16>    ? simt::Operand::F16
                                     : std::is_same_v<T, bf16> ? simt::Operand::BF16
                                                               : simt::Operand::TF32;
// sums += a * b.
template <typename T>
void mma(f32* sums, const b32* a, const b32* b, const char* file, int line) {
  simt::mma(operand_of<T>, sums, a, b, sums, file, line);
}

}  // namespace ptx
