// The stepwise CUDA kernels: one launch does the pointwise part of one time step for all rows. What the host passes to
// them, and how it starts them. Plain old data, no torch. The matrix products around them are the host's.
//
// Notation as in contract/params.h: B batch rows, H hidden units, P output features. Which data a step has is told row by
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

// Which rows of a step have their state replaced before it: those below `rows` whose flag is not 0. Null: none.
struct ResetFlags {
  const uint8_t* flags;
  int64_t rows;
};

// The rows of one step, and what is particular about some of them. The step before and the step after are meant in the
// direction of time.
struct RowsOfStep {
  int64_t rows;
  int64_t continuing;  // rows below it took part in the step before; the others begin here
  int64_t going_on;    // rows below it take part in the step after; for the others this is the last
  ResetFlags resets;
  ResetFlags resets_after;  // of the step after
  // Dense data whose rows end early: row b takes part in the times below lengths[b] (B), and its results are 0 in the
  // others. A row begins at time 0, or, in reverse, at lengths[b] - 1. Null: all rows take part in all steps.
  const int64_t* lengths;
  int64_t time;
  bool reverse;
};

// How much of a state is kept from the step before: all or nothing, by a flag for each element of the step (rows, n),
// or, if that is null, the same share of each.
template <typename Accumulate>
struct Zoneout {
  const uint8_t* kept;
  Accumulate share;
};

// c_{t-1} of a row that takes part in the step before; of one that begins; of one that is reset. Null means zeros.
template <typename T>
struct PreviousCell {
  const typename Types<T>::Accumulate* previous;  // (continuing, H)
  const T* c0;                                    // (B, H)
  const T* reset_c;                               // (B, H)
};

// What becomes of h'_t, the output by the equations without zoneout. n is H, or with a projection P.
template <typename T>
struct NewOutput {
  using Accumulate = typename Types<T>::Accumulate;
  T* h;  // (rows, n), rows h_stride apart
  int64_t h_stride;
  T* h_n;  // (B, n) contiguous: of rows whose last step this is. Null: somebody else's
  // With zoneout: h_{t-1} in, h_t out (B, n). Of its own, since rounded to 16 bits at each step, small contributions to
  // h would vanish. Null without.
  Accumulate* h_carried;
  Zoneout<Accumulate> zoneout;
  const T* h0;  // (B, n), as in PreviousCell
  const T* reset_h;
  // The operand of the next step's product with U, where that is not h: masked (B, n) = mask (B, n) * h. Or null.
  const Accumulate* mask;
  T* masked;
};

// One step of the forward pass: gates, cell state, output.
template <typename T>
struct CellForward {
  using Accumulate = typename Types<T>::Accumulate;
  RowsOfStep of;
  int64_t hidden_size;
  const Accumulate* input_part;  // (rows, 4H): W x_t, rows input_stride apart
  int64_t input_stride;
  // U h_{t-1}, contiguous: of rows that continue (continuing, 4H), that begin (B, 4H), that are reset (B, 4H). Of the
  // latter two, null means zeros.
  const Accumulate* recurrent_part;
  const Accumulate* begin_part;
  const Accumulate* reset_part;
  const T* bias_ih;  // (4H) or null
  const T* bias_hh;
  PreviousCell<T> c_previous;
  Zoneout<Accumulate> zoneout;  // of c
  Accumulate* c;                // (rows, H) contiguous: c_t. May be c_previous.previous
  T* c_n;                       // (B, H) contiguous: of rows whose last step this is
  // (rows, 4H) contiguous: what i, f, g, o are the nonlinearities of; null in inference. Of rows that take no part,
  // what these make 0 of.
  T* pre_activations;
  NewOutput<T> output;  // with a projection, of its operand: no more than h
};

// The same with layer normalisation. N is that of lstm_ext/reference.py.
template <typename T>
struct NormCellForward {
  using Accumulate = typename Types<T>::Accumulate;
  CellForward<T> cell;
  const Accumulate* gain_ih;  // (4H)
  const Accumulate* gain_hh;
  const Accumulate* gain_c;  // (H)
  const Accumulate* bias_c;  // (H) or null
  // N(W x_t) and N(U h_{t-1}), (rows, 4H), and what the centred products were multiplied by, (rows, 2). All contiguous;
  // null in inference.
  T* input_hat;
  T* recurrent_hat;
  Accumulate* factors;
  Accumulate* workspace;  // (rows, 2, H)
};

// With a projection and something to do after it: h_t of the projected h'_t.
template <typename T>
struct OutputForward {
  RowsOfStep of;
  int64_t output_size;
  const typename Types<T>::Accumulate* projected;  // (rows, P) contiguous
  NewOutput<T> output;
};

// dL/dh_t, a sum; and of it dL/dh'_t, as in NewOutput.
template <typename T>
struct GradOutput {
  using Accumulate = typename Types<T>::Accumulate;
  const T* grad_output;  // (rows, n), rows grad_output_stride apart, or null
  int64_t grad_output_stride;
  const T* grad_h_n;                 // (B, n) contiguous or null: for rows whose last step this is
  const Accumulate* recurrent_part;  // (going_on, n) contiguous: through the product with U in the step after
  const Accumulate* mask;            // that of NewOutput: recurrent_part is still to be multiplied by it
  Zoneout<Accumulate> zoneout;
  // With zoneout (B, n). In: what the step after kept of h_t, for rows that go on; out: the same of h_{t-1} of all
  // rows.
  Accumulate* grad_h;
  Accumulate* grad_reset_h;  // with zoneout: the same of what replaced states, a sum over steps; null where not wanted
};

// One step of the backward pass: from dL/dh_t and dL/dc_t to the gate gradients and dL/dc_{t-1}. The gates are computed
// again: of a gate near 1 in 16 bits, 1 - gate has hardly a digit left, and of its pre-activation it has all.
template <typename T>
struct CellBackward {
  using Accumulate = typename Types<T>::Accumulate;
  using Gradient = typename Types<T>::Gradient;
  RowsOfStep of;
  int64_t hidden_size;
  const T* pre_activations;  // (rows, 4H) contiguous
  const Accumulate* cells;   // (rows, H) contiguous: c_t
  PreviousCell<T> c_previous;
  Zoneout<Accumulate> zoneout;    // of c
  GradOutput<T> output;           // of h
  const Accumulate* grad_hidden;  // (rows, H) contiguous: instead of it with a projection, dL/d(o * tanh(c_t)). Or null
  const T* grad_c_n;              // (B, H) contiguous or null: as grad_h_n
  // Of the values of i, f, g, o (rows, 4H) and of c_t (rows, H), where a loss sees them. Contiguous or null.
  const T* grad_gate_values;
  const Accumulate* grad_cells;
  Accumulate* grad_c;    // (B, H) contiguous. In: dL/dc_t of the rows that go on; out: dL/dc_{t-1} of all rows
  Gradient* grad_gates;  // (rows, 4H) contiguous: of the pre-activations; with layer normalisation of U h_{t-1}
  // grad_gates of each row's first step, or zeros if it is reset there (B, 4H). Null where not wanted.
  Gradient* begin_gates;
  // Sums over the steps in which a row is replaced: of its gate gradients (B, 4H) and of dL/dc_{t-1} (B, H), which
  // are dL/dc of what replaced it. Null where not wanted.
  Accumulate* reset_gates;
  Accumulate* grad_reset_c;
  T* hidden;  // (rows, H) contiguous: o * tanh(c_t) once more, or null
};

// The same with layer normalisation; what is not said is as in NormCellForward.
template <typename T>
struct NormCellBackward {
  using Accumulate = typename Types<T>::Accumulate;
  CellBackward<T> cell;
  const Accumulate* gain_ih;
  const Accumulate* gain_hh;
  const Accumulate* gain_c;
  const Accumulate* bias_c;
  const T* input_hat;
  const T* recurrent_hat;
  const Accumulate* factors;
  typename Types<T>::Gradient* grad_input_part;  // (rows, 4H) contiguous: of W x_t
  Accumulate* grad_pre_activations;              // (rows, 4H) contiguous
  // The factors of the gradients of gain_c and bias_c (rows, H): dL/d(what tanh sees of c_t), and N(c_t).
  Accumulate* grad_visible;
  T* cell_hat;
};

// dL/dh'_t of a step with a projection, an operand of the product with W_hr.
template <typename T>
struct OutputGradient {
  RowsOfStep of;
  int64_t output_size;
  GradOutput<T> output;
  typename Types<T>::Gradient* result;  // (rows, P) contiguous
};

// h_{t-1} of every row of a few steps, one below the other, as the product with U saw it: an operand of dL/dU where
// that is not the output of the step before.
template <typename T>
struct PreviousOutputs {
  static constexpr int kSteps = 64;  // as many as fit into a kernel's parameters
  struct Step {
    int64_t rows;
    int64_t continuing;                   // rows that have h_{t-1} in `previous`; the others have it in h0
    const T* previous;                    // (continuing, P), rows previous_stride apart
    typename Types<T>::Gradient* result;  // (rows, P) contiguous
    ResetFlags resets;
    int64_t time;
  };
  int64_t output_size;
  int64_t previous_stride;
  const T* h0;                                // (B, P) contiguous; null means zeros
  const T* reset_h;                           // the same, of rows that are replaced
  const int64_t* lengths;                     // as in RowsOfStep
  const typename Types<T>::Accumulate* mask;  // as in NewOutput
  bool reverse;
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
// The same of the products of two matrices; without factors, of the values.
template <typename T>
struct ProductSums {
  using Accumulate = typename Types<T>::Accumulate;
  int64_t rows;
  int64_t columns;
  const Accumulate* values;  // (rows, columns) contiguous
  const T* factors;          // the same, or null
  Accumulate* partial;       // as above
  Accumulate* sums;
};
constexpr int64_t kSumRows = 512;  // a part's, as long as there are no more parts than a grid may have
inline int64_t column_sum_parts(int64_t rows) { return std::min<int64_t>((rows + kSumRows - 1) / kSumRows, 65535); }

// Each starts one kernel (the sums: two) on the stream, waits for nothing, and returns the launch's own error.
template <typename T>
cudaError_t cell_forward(const CellForward<T>& step, cudaStream_t stream);
template <typename T>
cudaError_t cell_backward(const CellBackward<T>& step, cudaStream_t stream);
template <typename T>
cudaError_t norm_cell_forward(const NormCellForward<T>& step, cudaStream_t stream);
template <typename T>
cudaError_t norm_cell_backward(const NormCellBackward<T>& step, cudaStream_t stream);
template <typename T>
cudaError_t output_forward(const OutputForward<T>& step, cudaStream_t stream);
template <typename T>
cudaError_t output_gradient(const OutputGradient<T>& step, cudaStream_t stream);
template <typename T>
cudaError_t previous_outputs(const PreviousOutputs<T>& steps, cudaStream_t stream);
template <typename T>
cudaError_t column_sums(const ColumnSums<T>& sums, cudaStream_t stream);
template <typename T>
cudaError_t product_sums(const ProductSums<T>& sums, cudaStream_t stream);

}  // namespace lstm_ext::cuda
