// The SIMT emulator: runs CUDA C++ kernels, compiled by a plain C++ compiler, on one CPU thread. README.md explains it.
//
// Every CUDA thread of a launch is a fiber with a stack of its own; all blocks are alive at once, so that kernels may
// wait for each other's blocks. A fiber runs until it reaches something that synchronises; the schedule of options.h
// says which one goes on. This is the interface of drivers (and of code generated from PTX); kernels see platform.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>

#include <vector_types.h>

#include "simt/options.h"

namespace simt {

// What a kernel did wrong. The message names block, thread, file and line.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

struct LaunchConfig {
  dim3 grid;
  dim3 block;
  size_t dynamic_shared = 0;
  bool cooperative = false;  // all blocks alive at once, whatever options().resident_blocks says
  // May begin before the launch in front of it has ended: until grid_dependency_wait, a thread may read ConstantMemory,
  // and no other global memory, and write none.
  bool dependent = false;
};

// Runs `body` once for every thread. Throws Error.
void launch(const LaunchConfig& config, std::function<void()> body);

// What runs in place of a kernel, where a program holds kernels translated from PTX (ptx/README.md); else null.
using TranslatedKernel = void (*)(const char* args);
extern TranslatedKernel (*translated_kernel)(const void* kernel, size_t argument_bytes);

// Of the thread that runs, for code generated from PTX.
unsigned lane_index();

// A clock that every thread reads the same: it advances as threads are scheduled, and in leaps once all threads that
// can run only poll and have read it twice. A wait bounded by it ends in a deadlock, and not before.
int64_t clock();

// Ends the launch with an Error.
[[noreturn]] void fail(const std::string& message, const char* file, int line);

// ---- of a block

void syncthreads(const char* file, int line);

// ---- dependent launches (global_memory.cpp)

void grid_dependency_wait(const char* file, int line);

// ---- of a warp

enum class Shuffle { Index, Down, Xor };

void syncwarp(uint32_t mask, const char* file, int line);
// The value of the lane named; the own one where the lane lies outside the segment of `width` lanes.
uint64_t shuffle(Shuffle kind, uint32_t mask, uint64_t value, uint32_t argument, int width, const char* file, int line);
uint32_t ballot(uint32_t mask, bool predicate, const char* file, int line);

// ---- tensor cores (tensor_core.cpp)

enum class Operand { F16, BF16, TF32 };

// d = a * b + c; m16n8k16 for F16 and BF16, m16n8k8 for TF32; fragments as the PTX manual lays them out.
void mma(Operand type, float* d, const uint32_t* a, const uint32_t* b, const float* c, const char* file, int line);
// Four matrices: lane 8 m + r gives the address of row r of matrix m.
void ldmatrix_x4(bool transposed, uint32_t* registers, const void* row, const char* file, int line);
// Rounded as cvt.rna.tf32.f32 does: to nearest, ties away from zero.
uint32_t to_tf32(float value);

// ---- cp.async (async_copy.cpp)

// Copies 16 bytes; those after the first `source_bytes` are zeros.
void cp_async16(void* shared, const void* global, unsigned source_bytes, const char* file, int line);
void cp_async_commit(const char* file, int line);
void cp_async_wait(unsigned groups_left, const char* file, int line);

// ---- shared memory (shared_memory.cpp)

// The array that `key` stands for, in the block of the thread that runs.
void* shared_array(const void* key, size_t bytes, size_t alignment, const char* name);
void* dynamic_shared();
// 32-bit shared addresses, as PTX has them: within the block of the thread that runs.
uint32_t shared_address(const void* pointer, const char* file, int line);
void* shared_pointer(uint32_t address, const char* file, int line);

namespace wavefronts {
// An access of the thread that runs to shared memory, where options() says that wavefronts are counted
// (wavefronts.cpp).
void note(const void* place, unsigned bytes, bool stores, const char* file, int line);
void end_wave();
}  // namespace wavefronts

// ---- global memory (global_memory.cpp)

// Loads and relaxed stores that other threads may be waiting for. `part` is the size of the elements of a vector, which
// are accesses of their own; else that of the whole. A load lets other threads run first: it is taken for one turn of a
// polling loop. What it finds, and when a store is seen: weak_memory.h.
void atomic_load(void* value, const void* address, unsigned bytes, unsigned part, const char* file, int line);
void relaxed_store(void* address, const void* value, unsigned bytes, unsigned part, const char* file, int line);
// To be called before an atomic write that reads what it changes. All see it at once. Does not touch the memory.
void before_atomic_write(const void* address, unsigned bytes, const char* file, int line);
// __ldg, ld.global.nc: for the race detector, which has to know that data came by way of the read-only cache.
void before_read_only_load(const void* address, unsigned bytes, const char* file, int line);
void thread_fence(const char* file, int line);

}  // namespace simt
