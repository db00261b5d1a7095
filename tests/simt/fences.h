// The pattern of memory that nobody has written: a NaN as float, double, half and bfloat16, and easy to tell from
// others.
#pragma once

#include <cstddef>
#include <cstdint>

namespace simt {

constexpr unsigned char kPattern[2] = {0xf5, 0xff};

// The pattern's phase follows from the address, so that neighbouring stretches agree.
inline unsigned char pattern_at(const char* address) { return kPattern[reinterpret_cast<uintptr_t>(address) & 1]; }

inline void fill_with_pattern(char* from, size_t bytes) {
  for (char* at = from; at != from + bytes; ++at) *at = static_cast<char>(pattern_at(at));
}

// The first byte that differs from the pattern, or null.
inline const char* first_change(const char* from, const char* to) {
  for (const char* at = from; at != to; ++at) {
    if (static_cast<unsigned char>(*at) != pattern_at(at)) return at;
  }
  return nullptr;
}

}  // namespace simt
