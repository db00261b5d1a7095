// Counts the wavefronts of shared memory: how often its 32 banks have to be asked for an access of a warp. A bank gives
// one word of four bytes at a time. A warp's access of 16 bytes is four of eight lanes each, one of 8 bytes two of 16.
//
// An access is that of the lanes that come to a place in the source for the same time: nvcc's PTX has one instruction
// there for all. What lanes do after they have gone apart is counted as if they had not.
#include <algorithm>
#include <array>
#include <cstdio>
#include <map>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "simt/machine.h"

namespace simt::wavefronts {
namespace {

struct Access {
  uint32_t mask = 0;
  std::array<uint32_t, 32> offsets{};
};
struct Site {
  std::map<unsigned, unsigned> times;  // how often each thread has come here
  std::map<std::pair<const Warp*, unsigned>, Access> accesses;
  uint64_t count = 0, wavefronts = 0, least = 0;
};
using Where = std::tuple<std::string, int, unsigned, bool>;  // place, its bytes, and whether they are stored

// Prints what was found when the program ends.
struct Sites {
  std::map<Where, Site> all;
  ~Sites() {
    for (const auto& [where, site] : all) {
      const auto& [file, line, bytes, stores] = where;
      std::printf("wavefronts: %s:%d %s %u: %llu accesses, %llu wavefronts, %llu at least\n", file.c_str(), line,
                  stores ? "store" : "load", bytes, static_cast<unsigned long long>(site.count),
                  static_cast<unsigned long long>(site.wavefronts), static_cast<unsigned long long>(site.least));
    }
  }
} sites;

void add(Site& site, const Access& access, unsigned bytes) {
  const unsigned at_once = bytes <= 4 ? 32 : 128 / bytes;
  ++site.count;
  for (unsigned first = 0; first < 32; first += at_once) {
    std::array<std::set<uint32_t>, 32> banks;
    for (unsigned lane = first; lane < first + at_once; ++lane) {
      if ((access.mask >> lane & 1) == 0) continue;
      const uint32_t begin = access.offsets[lane] / 4, end = (access.offsets[lane] + bytes + 3) / 4;
      for (uint32_t word = begin; word < end; ++word) banks[word % 32].insert(word);
    }
    size_t most = 0, words = 0;
    for (const auto& bank : banks) {
      most = std::max(most, bank.size());
      words += bank.size();
    }
    site.wavefronts += most;
    site.least += (words + 31) / 32;
  }
}

}  // namespace

void note(const void* place, unsigned bytes, bool stores, const char* file, int line) {
  if (!options().counts_wavefronts) return;
  const std::string path = file;
  Site& site = sites.all[{path.substr(path.find_last_of('/') + 1), line, bytes, stores}];
  Access& access = site.accesses[{current->warp, site.times[current->id]++}];
  access.mask |= 1u << current->lane;
  access.offsets[current->lane] = static_cast<uint32_t>(static_cast<const char*>(place) - current->block->shared);
}

void end_wave() {
  for (auto& [where, site] : sites.all) {
    for (const auto& [key, access] : site.accesses) add(site, access, std::get<2>(where));
    site.accesses.clear();
    site.times.clear();
  }
}

}  // namespace simt::wavefronts
