// Where in the program an access is: a return address that a hook of g++ saw, or a file and line that a primitive was
// given, in one word.
#pragma once

#include <cstdint>
#include <string>

namespace simt::race {

using Site = uint64_t;

constexpr Site kAtomic = Site{1} << 62;
constexpr Site kFileAndLine = Site{1} << 63;

inline Site as_atomic(Site site) { return site | kAtomic; }
inline bool is_atomic(Site site) { return (site & kAtomic) != 0; }
Site site_of(const char* file, int line);
std::string describe(Site site);

void check_access(unsigned thread, const void* address, size_t bytes, bool writes, Site site, bool asynchronous);

}  // namespace simt::race
