// Padded input with lengths that only the kernels know. The rows that count are packed, go through the layer like a
// PackedSequence, and are written back to their places. If Python knows the lengths, it does the same itself
// (lstm_ext/call/packing.py).
#pragma once

#include "torch/backend.h"

namespace lstm_ext {

// Same as the functions of cpu_backend, for a call with options.lengths; lengths outside [0, T] are clamped. All
// results, saved tensors included, have the shapes of dense input; past the end of a sequence they are 0.
LayerResults forward_with_lengths(const LayerCall& call, const LayerSizes& sizes, bool save);
LayerGradients backward_with_lengths(const LayerCall& call, const LayerSizes& sizes,
                                     const BackwardArguments& arguments);

}  // namespace lstm_ext
