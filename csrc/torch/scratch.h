// Memory that a call needs and gives back before it returns, and that of gradients, which others give back.
#pragma once

#include <ATen/ATen.h>

namespace lstm_ext {

// An uninitialised CPU tensor for use within a call. Large ones are kept for the next call, up to kScratchBytes in a
// process: new memory costs a page fault for each 4 KiB, which is as much time as a small layer takes.
at::Tensor scratch_empty(at::IntArrayRef sizes, const at::TensorOptions& options);

// The same for gradients of weights, of which autograd frees each one that it adds to another. The C library gives so
// much memory back to the system at once. These may live long, so none is much larger than what it is for.
at::Tensor gradient_empty(at::IntArrayRef sizes, const at::TensorOptions& options);

constexpr size_t kScratchBytes = size_t{256} << 20;

// As at::empty, past the dispatcher, which takes as long as the allocation of a small tensor. Not where torch fills new
// memory with NaN, which it does behind the dispatcher.
at::Tensor empty_on_cpu(at::IntArrayRef sizes, const at::TensorOptions& options);

// Asks for huge pages, of which one saves 512 page faults. Only whole ones within the memory, so that none is taken
// that would not be used; a refusal costs nothing but the gain.
void advise_huge_pages(void* data, size_t bytes);

}  // namespace lstm_ext
