// Padded input whose lengths only the kernels know: the rows that count are packed, go through the layer as a
// PackedSequence does, and are put back in their places. Python does the same where it knows the lengths itself
// (lstm_ext/call/packing.py).
#pragma once

#include "torch/backend.h"

namespace lstm_ext {

// As the functions of cpu_backend, for a call with options.lengths; lengths outside [0, T] are clamped. All results,
// saved tensors included, have the shapes of dense input; past the end of a sequence they are 0.
LayerResults forward_with_lengths(const LayerCall& call, const LayerSizes& sizes, bool save);
LayerGradients backward_with_lengths(const LayerCall& call, const LayerSizes& sizes,
                                     const BackwardArguments& arguments);

}  // namespace lstm_ext
