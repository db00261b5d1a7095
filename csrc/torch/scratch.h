// Memory that a call returns before it ends, and memory of gradients, which autograd frees.
#pragma once

#include <ATen/ATen.h>

#include "contract/visibility.h"

namespace lstm_ext {

// An uninitialised CPU tensor for use within a call. Large ones are kept for the next call, up to kScratchBytes in a
// process: new memory costs a page fault for each 4 KiB, which is as much time as a small layer takes.
at::Tensor scratch_empty(at::IntArrayRef sizes, const at::TensorOptions& options);

// The same for gradients of weights. Autograd frees each one that it adds to another, and the C library returns such
// large memory to the system at once. These may live long, so no block is much larger than its request.
at::Tensor gradient_empty(at::IntArrayRef sizes, const at::TensorOptions& options);

constexpr size_t kScratchBytes = size_t{256} << 20;

// Frees the memory that is kept, and returns how many bytes that were. Memory of running calls is not among it.
LSTM_EXT_PUBLIC size_t release_scratch();

// Same as at::empty, without the dispatcher, which takes as long as the allocation of a small tensor. Not used if torch
// fills new memory with NaN, which happens behind the dispatcher.
at::Tensor empty_on_cpu(at::IntArrayRef sizes, const at::TensorOptions& options);

// Asks for huge pages; each saves 512 page faults. Only whole ones within the memory, so that no unused memory is
// taken. A refusal only loses the gain.
void advise_huge_pages(void* data, size_t bytes);

}  // namespace lstm_ext
