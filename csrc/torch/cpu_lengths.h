// Padded input of which only the kernels know the lengths: the rows that count are packed, go through the layer as a
// PackedSequence does, and are put back in their places. Python does the same where it knows the numbers itself
// (lstm_ext/_lengths.py).
#pragma once

#include "torch/backend.h"

namespace lstm_ext {

// As cpu_backend's functions, for a layer with extras.lengths; numbers outside [0, T] are clamped. All results have
// the shapes of dense input, what is saved too; past the end of a sequence they are 0.
ForwardResult forward_with_lengths(const LayerArguments& layer, const LayerSizes& sizes, bool save);
std::vector<at::Tensor> backward_with_lengths(const LayerArguments& layer, const LayerSizes& sizes,
                                              const BackwardArguments& arguments);

}  // namespace lstm_ext
