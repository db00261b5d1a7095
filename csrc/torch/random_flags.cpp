#include "torch/random_flags.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstring>

namespace lstm_ext {
namespace {

uint64_t split_mix(uint64_t seed, uint64_t k) {
  uint64_t z = seed + (k + 1) * 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

constexpr int64_t kElements = 4;  // elements of a word
constexpr int64_t kWords = 64;    // words of a chunk, which stays in the first-level cache
constexpr int64_t kGrain = 256;   // least chunks of a thread

// The first `count` flags of a chunk; only the last chunk has fewer than all.
void fill_chunk(bool* flags, int64_t count, uint64_t seed, int64_t first_word, uint16_t last) {
  uint64_t words[kWords];
  uint16_t bits[kWords * kElements];
  static_assert(sizeof(words) == sizeof(bits));
  for (int64_t k = 0; k < kWords; ++k) words[k] = split_mix(seed, static_cast<uint64_t>(first_word + k));
  std::memcpy(bits, words, sizeof(bits));
  if (count == kWords * kElements) {
    for (int64_t i = 0; i < kWords * kElements; ++i) flags[i] = bits[i] <= last;
  } else {
    for (int64_t i = 0; i < count; ++i) flags[i] = bits[i] <= last;
  }
}

}  // namespace

at::Tensor random_flags(at::IntArrayRef sizes, double probability, int64_t seed) {
  TORCH_CHECK(probability >= 0 && probability <= 1, "lstm_ext: expected a probability in [0, 1], got ", probability);
  const at::Tensor result = at::empty(sizes, at::kBool);
  const auto start = static_cast<uint64_t>(seed);
  const double u = static_cast<double>(split_mix(start, 0) >> 11) * 0x1p-53;
  const auto below = std::min<int64_t>(static_cast<int64_t>(std::floor(u + probability * 0x1p16)), 1 << 16);
  if (below == 0) return result.zero_();
  const int64_t count = result.numel(), chunk = kWords * kElements;
  bool* const flags = result.mutable_data_ptr<bool>();
  at::parallel_for(0, (count + chunk - 1) / chunk, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      fill_chunk(flags + i * chunk, std::min(chunk, count - i * chunk), start, 1 + i * kWords,
                 static_cast<uint16_t>(below - 1));
    }
  });
  return result;
}

}  // namespace lstm_ext
