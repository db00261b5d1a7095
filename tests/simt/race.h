// The race detector: happens-before, by vector clocks. It works where the driver was compiled with -fsanitize=thread
// (and linked without libtsan): g++ then announces every access to memory, see race_hooks.cpp.
//
// Ordered are accesses on both sides of __syncthreads, of __syncwarp, of a __threadfence in front of a relaxed write
// and one behind the load that reads it, and of a cp.async and a wait for it. Shuffles and mma order nothing. What it
// reports depends little on the schedule: two accesses need not come close in time. But which write a load reads is a
// matter of schedule, so random schedules add to what it finds.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace simt {

struct Thread;

namespace race {

extern bool enabled;

void begin(unsigned threads);
// What was found, a line each; empty where all is well.
std::string findings();

// Accesses to this memory are checked from now on. Two accesses within `granularity` bytes count as the same place.
void watch(const void* memory, size_t bytes, size_t granularity, const std::string& name);
void forget(const void* memory);

// ---- order

void meet(Thread* const* threads, size_t count);
void fence(Thread& thread);

// ---- accesses

void access(Thread& thread, const void* address, size_t bytes, bool writes, const char* file, int line);
void atomic_access(Thread& thread, const void* address, size_t bytes, bool writes, const char* file, int line);
void read_only_access(Thread& thread, const void* address, size_t bytes, const char* file, int line);
// A write by an asynchronous operation: nobody may touch the place until somebody waited for it, its own thread
// neither.
void asynchronous_write(Thread& thread, const void* address, size_t bytes, const char* file, int line);
// From now on it counts as a write of the thread.
void asynchronous_write_done(const Thread& thread, const void* address, size_t bytes);

}  // namespace race
}  // namespace simt
