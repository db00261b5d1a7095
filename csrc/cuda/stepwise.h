// The stepwise CUDA kernels: one launch does the pointwise part of one time step for all rows. What the host passes to
// them, and how it starts them. Plain old data, no torch. The matrix products around them are the host's.
//
// Notation as in lstm_params.h: B batch rows, H hidden units, P output features. Which data a step has is told row by
// row: row b of a step is row b of the batch, and a step of packed data has only the first `rows` of them. So dense,
// batch-first and packed data differ in pointers and strides only. Counts and strides are in elements.
#pragma once

#include <algorithm>
#include <cstdint>

#if defined(__CUDACC__) || defined(LSTM_EXT_SIMT)
#include "cuda/platform.h"
#else  // the host, which starts kernels and contains none
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#endif

namespace lstm_ext::cuda {

// T: what is stored (float, double, __half, __nv_bfloat16). Accumulate: what sums and the cell state are kept in.
// Gradient: gate gradients, which are operands of matrix products. float16 would lose them: a few steps back most of
// them are below its smallest number.
template <typename T>
struct Types {
  using Accumulate = float;
  using Gradient = T;
};
template <>
struct Types<double> {
  using Accumulate = double;
  using Gradient = double;
};
template <>
struct Types<__half> {
  using Accumulate = float;
  using Gradient = float;
};

// c_{t-1} of a row: rows below `continuing` took part in the step before (in the direction of time) and have it in
// `previous` (continuing, H); the others begin here, from c0 (B, H), or from zeros where c0 is null.
template <typename T>
struct PreviousCell {
  int64_t continuing;
  const typename Types<T>::Accumulate* previous;
  const T* c0;
};

// One step of the forward pass: gates, cell state, output.
template <typename T>
struct CellForward {
  using Accumulate = typename Types<T>::Accumulate;
  int64_t rows;
  int64_t hidden_size;
  const Accumulate* input_part;  // (rows, 4H): W x_t, rows input_stride apart
  int64_t input_stride;
  const Accumulate* recurrent_part;  // (recurrent_rows, 4H) contiguous: U h_{t-1}; zeros for the other rows
  int64_t recurrent_rows;
  const T* bias_ih;  // (4H) or null
  const T* bias_hh;
  PreviousCell<T> c_previous;
  Accumulate* c;  // (rows, H) contiguous: c_t. May be c_previous.previous
  T* h;           // (rows, H), rows h_stride apart: o * tanh(c_t)
  int64_t h_stride;
  T* pre_activations;  // (rows, 4H) contiguous: what i, f, g, o are the nonlinearities of; null in inference
  // Rows from going_on on have no further step: their states are final.
  int64_t going_on;
  T* h_n;  // (B, H) contiguous, or null: with a projection, the host's
  T* c_n;  // (B, H) contiguous
};

// One step of the backward pass: from dL/dh_t and dL/dc_t to the gate gradients and dL/dc_{t-1}. The gates are computed
// again: of a gate near 1 in 16 bits, 1 - gate has hardly a digit left, and of its pre-activation it has all.
template <typename T>
struct CellBackward {
  using Accumulate = typename Types<T>::Accumulate;
  using Gradient = typename Types<T>::Gradient;
  int64_t rows;
  int64_t hidden_size;
  const T* pre_activations;  // (rows, 4H) contiguous
  const Accumulate* cells;   // (rows, H) contiguous: c_t
  PreviousCell<T> c_previous;
  // dL/dh_t is the sum of these three. The first two may be null.
  const T* grad_output;  // (rows, H), rows grad_output_stride apart
  int64_t grad_output_stride;
  const T* grad_h_n;                 // (B, H) contiguous: for rows from going_on on, whose last step this is
  const Accumulate* recurrent_part;  // (recurrent_rows, H) contiguous: through h_t; zeros for the other rows
  int64_t recurrent_rows;
  int64_t going_on;
  const T* grad_c_n;     // (B, H) contiguous or null: as grad_h_n
  Accumulate* grad_c;    // (B, H) contiguous. In: dL/dc_t of the rows below going_on; out: dL/dc_{t-1} of all rows
  Gradient* grad_gates;  // (rows, 4H) contiguous: of the pre-activations
};

// dL/d(output) of a step with a projection: what CellBackward sums up, for P features instead of H.
template <typename T>
struct OutputGradient {
  int64_t rows;
  int64_t output_size;
  const T* grad_output;  // (rows, P), rows grad_output_stride apart, or null
  int64_t grad_output_stride;
  const T* grad_h_n;                                    // (B, P) contiguous or null
  const typename Types<T>::Accumulate* recurrent_part;  // (recurrent_rows, P) contiguous
  int64_t recurrent_rows;
  int64_t going_on;
  typename Types<T>::Gradient* result;  // (rows, P) contiguous
};

// h_{t-1} of every row of a few steps, one below the other: an operand of dL/dU where the rows of a step are not
// those of the step before.
template <typename T>
struct PreviousOutputs {
  static constexpr int kSteps = 64;  // as many as fit into a kernel's parameters
  struct Step {
    int64_t rows;
    int64_t continuing;                   // rows that have h_{t-1} in `previous`; the others have it in h0
    const T* previous;                    // (continuing, P), rows previous_stride apart
    typename Types<T>::Gradient* result;  // (rows, P) contiguous
  };
  int64_t output_size;
  int64_t previous_stride;
  const T* h0;  // (B, P) contiguous; null means zeros
  int steps;
  Step step[kSteps];
};

// sums[j] += the sum of column j. Always in the same order.
template <typename T>
struct ColumnSums {
  using Accumulate = typename Types<T>::Accumulate;
  int64_t rows;
  int64_t columns;
  const typename Types<T>::Gradient* values;  // (rows, columns) contiguous
  Accumulate* partial;                        // (column_sum_parts(rows), columns): workspace
  Accumulate* sums;                           // (columns)
};
constexpr int64_t kSumRows = 512;  // a part's, as long as there are no more parts than a grid may have
inline int64_t column_sum_parts(int64_t rows) { return std::min<int64_t>((rows + kSumRows - 1) / kSumRows, 65535); }

// Each starts one kernel (column_sums: two) on the stream, waits for nothing, and returns the launch's own error.
template <typename T>
cudaError_t cell_forward(const CellForward<T>& step, cudaStream_t stream);
template <typename T>
cudaError_t cell_backward(const CellBackward<T>& step, cudaStream_t stream);
template <typename T>
cudaError_t output_gradient(const OutputGradient<T>& step, cudaStream_t stream);
template <typename T>
cudaError_t previous_outputs(const PreviousOutputs<T>& steps, cudaStream_t stream);
template <typename T>
cudaError_t column_sums(const ColumnSums<T>& sums, cudaStream_t stream);

}  // namespace lstm_ext::cuda
