// The arguments of the fused CUDA kernels: one launch does a time step, its matrix product included. Plain data, no
// torch. They take what the stepwise kernels take (cuda/stepwise.h), and the operands of the product.
//
// Every row of an operand begins at a multiple of kStepAlignment bytes; its length is any.
#pragma once

#include "cuda/gpu_plan.h"
#include "cuda/stepwise.h"

namespace lstm_ext::cuda {

constexpr int64_t kStepAlignment = 16;

// The product: rows (row_count, depth) of a state or an input times a weight (4H, depth). Strides in elements.
template <typename T>
struct StepProduct {
  const T* weight;
  int64_t weight_stride;
  const T* rows;  // null means zeros
  int64_t row_stride;
  int64_t row_count;
  int64_t depth;
  // For the only step of a sequence: the rows whose state is replaced before it, and the replacing rows (row_count,
  // depth), or null: zeros.
  ResetFlags resets;
  const T* reset_rows;
  int64_t reset_stride;
};

// A step of the forward pass. cell.recurrent_part is not read.
template <typename T>
struct StepForward {
  CellForward<T> cell;
  // The second one has depth 0 where there is none.
  StepProduct<T> products[2];
  // True: the sum of the products is W x + U h of every row, for a sequence of one step; cell.input_part is not read.
  // False: it is U h_{t-1} of the rows that take part in the step before.
  bool whole;
};

// A step of the backward pass and, for the step before it, dL/dh through the product with U.
template <typename T>
struct StepBackward {
  using Gradient = typename Types<T>::Gradient;
  CellBackward<T> cell;
  const Gradient* weight;  // U (4H, H)
  int64_t weight_stride;
  int64_t row_count;  // rows that take part in the step before
  // (step_parts(H), row_count, H): GradOutput::recurrent_part of the step before. Not the one that this step reads.
  typename Types<T>::Accumulate* parts;
};

// Whether the code that this device runs waits for the kernel in front of it, as a dependent launch must: not what a
// driver makes of PTX for a compute capability below 9.0.
bool step_kernels_wait();

// Each starts one kernel on the stream, waits for nothing, and returns the launch's own error. For float (whose
// operands are rounded to TF32), __half and __nv_bfloat16; without projection and layer normalisation. `dependent`: it
// may start before the kernel in front of it has ended, and waits for that itself; from compute capability 9.0 on.
template <typename T>
cudaError_t step_forward(const StepSides<StepForward<T>>& args, bool dependent, cudaStream_t stream);
template <typename T>
cudaError_t step_backward(const StepSides<StepBackward<T>>& args, bool dependent, cudaStream_t stream);

}  // namespace lstm_ext::cuda
