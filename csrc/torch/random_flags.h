// Random masks of flags on the CPU.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "contract/visibility.h"

namespace lstm_ext {

// Flags of the given sizes, each true with the given probability in [0, 1]. The same seed gives the same flags for any
// number of threads.
//
// torch's generators are too slow for this: they make their numbers one by one, and zoneout needs one for each element
// of the state and step, which took a tenth or more of a small layer's training step. Here a seed is drawn from torch's
// generator, and SplitMix64 (Steele, Lea and Flood, 2014, https://doi.org/10.1145/2714064.2660195) makes all numbers
// from it, which the compiler vectorises. Its k-th number, from k = 0 on, is
//
//     z = seed + (k + 1) * 0x9e3779b97f4a7c15
//     z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9
//     z = (z ^ (z >> 27)) * 0x94d049bb133111eb
//     z ^ (z >> 31)
//
// The first number gives u in [0, 1), by its upper 53 bits, and below = floor(u + probability * 2^16), at most 2^16.
// Each later number gives 16 bits to each of four elements, the lowest bits to the first; a flag is whether its bits <
// below. `below` is one of the two neighbours of probability * 2^16, so that each flag has the requested probability.
LSTM_EXT_PUBLIC at::Tensor random_flags(at::IntArrayRef sizes, double probability, int64_t seed);

}  // namespace lstm_ext
