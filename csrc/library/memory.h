// The memory of models and streams: laid out once without memory, for its size, and once with it.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>
#include <cstdlib>

#include "cpu/frozen.h"
#include "library/weights_file.h"

namespace lstm_ext::library {

using cpu::Arena;
constexpr int64_t kAlignment = cpu::kCacheLine;
constexpr size_t kHugePage = size_t{1} << 21;

inline char* aligned(void* memory) {
  const auto address = reinterpret_cast<uintptr_t>(memory);
  return static_cast<char*>(memory) + (kAlignment - address % kAlignment) % kAlignment;
}

// Large memory in huge pages, as the frozen weights of the operators. Null without memory.
inline void* allocated(int64_t bytes) {
  const size_t unit = bytes >= static_cast<int64_t>(kHugePage) ? kHugePage : kAlignment;
  const size_t rounded = (static_cast<size_t>(bytes) + unit - 1) / unit * unit;
  void* const memory = std::aligned_alloc(unit, rounded);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (memory && unit == kHugePage) (void)madvise(memory, rounded, MADV_HUGEPAGE);
#endif
  return memory;
}

inline const char* no_memory(int64_t bytes) {
  return failure("out of memory: could not allocate %lld bytes", static_cast<long long>(bytes));
}

inline const char* little_memory(size_t needed, size_t given) {
  return failure("memory: expected %zu bytes, got %zu", needed, given);
}

// Calls f(a T), for float or double.
template <typename F>
auto with_type(bool float64, const F& f) {
  return float64 ? f(double{}) : f(float{});
}

}  // namespace lstm_ext::library
