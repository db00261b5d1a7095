// The arguments of the stepwise CUDA kernels, and how the host starts them: one launch does the pointwise part of one
// time step for all rows. Plain data, no torch. The host computes the matrix products around them.
//
// Notation as in contract/layer.h. Row b of a step is row b of the batch; a step of packed data has only the first rows
// of the batch. So dense, batch-first and packed data differ in pointers and strides only. Counts and strides are in
// elements. "Before" and "after" follow the direction of the layer.
#pragma once

#include <algorithm>
#include <cstdint>

#include "contract/params.h"

#if defined(__CUDACC__) || defined(LSTM_EXT_SIMT)
#include "cuda/platform.h"
#else  // the host, which starts kernels and contains none
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#endif

namespace lstm_ext::cuda {

// T: what is stored (float, double, __half, __nv_bfloat16). Accumulate: the type of sums and of the cell state.
// Gradient: the type of gradients that are operands of matrix products. float16 would lose them: a few steps back most
// of them are below its smallest number.
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

// One or two directions of a layer, whose steps have nothing to do with each other, in one launch.
template <typename Step>
struct StepSides {
  Step sides[2];
  int count;

  void add(const Step& step) { sides[count++] = step; }
};

// The rows of one step.
struct StepRows {
  int64_t count;
  int64_t previous_count;   // rows below it take part in the step before too; the others begin here
  int64_t next_count;       // rows below it take part in the step after too; the others end here
  ResetFlags resets;        // before this step
  ResetFlags resets_after;  // before the step after
  // Null, or dense data whose rows end early: row b takes part in the times below lengths[b] (B), and its results are 0
  // at the others. It begins at time 0, in the reverse direction at lengths[b] - 1.
  const int64_t* lengths;
  int64_t time;
  bool reverse;
  // Whether the pass has lengths, zoneout or a recurrent mask, or, backward, gradients of gate values or cell states or
  // the output `hidden`. Without it the kernels without kOptions run, which ignore all of these.
  bool options;
};

// The number of rows of the longer direction.
template <typename Step, typename RowsOf>
int64_t most_rows(const StepSides<Step>& args, RowsOf&& rows_of) {
  int64_t most = 0;
  for (int side = 0; side < args.count; ++side) most = std::max(most, rows_of(args.sides[side]).count);
  return most;
}

// c_{t-1}: from the step before, from the beginning, and in place of a state that is reset. Null means zeros.
template <typename T>
struct PreviousCell {
  const typename Types<T>::Accumulate* previous;  // (previous_count, H)
  const T* c0;                                    // (B, H)
  const T* reset_c;                               // (B, H)
};

// Where h_t goes, and what makes it from h'_t, the output of the equations without zoneout. n is H, or P with a
// projection.
template <typename T>
struct NewOutput {
  using Accumulate = typename Types<T>::Accumulate;
  T* h;  // (rows, n), rows h_stride apart
  int64_t h_stride;
  T* h_n;  // (B, n) contiguous: of rows that end here. Null if another kernel writes it
  // With zoneout (B, n): h_{t-1} in, h_t out; else null. h itself would not do: rounded to 16 bits at each step, small
  // contributions to it would vanish.
  Accumulate* running_h;
  Zoneout<Accumulate> zoneout;
  const T* h0;  // (B, n), as in PreviousCell
  const T* reset_h;
  // The left operand of the next step's product: h, or recurrent_mask (B, n) * h, in rows recurrent_stride apart. Null
  // if it is `h` itself.
  const Accumulate* recurrent_mask;
  T* recurrent_h;
  int64_t recurrent_stride;
};

// One step of the forward pass: gates, cell state, output.
template <typename T>
struct CellForward {
  using Accumulate = typename Types<T>::Accumulate;
  StepRows rows;
  int64_t hidden_size;
  const Accumulate* input_part;  // (rows, 4H): W x_t, rows input_stride apart
  int64_t input_stride;
  // U h_{t-1}, contiguous: from the step before (previous_count, 4H), of h0 (B, 4H), of reset_h (B, 4H). The latter two
  // may be null: zeros.
  const Accumulate* recurrent_part;
  const Accumulate* begin_part;
  const Accumulate* reset_part;
  const T* bias_ih;  // (4H) or null
  const T* bias_hh;
  PreviousCell<T> c_previous;
  Zoneout<Accumulate> zoneout;  // the zoneout of c
  cell::Options<Accumulate> options;
  Accumulate* c;  // (rows, H) contiguous: c_t. May be c_previous.previous
  T* c_n;         // (B, H) contiguous: of rows that end here
  // (rows, 4H) contiguous, as the nonlinearities see them; null in inference. Rows that take no part get those whose
  // gate values are 0.
  T* preactivations;
  NewOutput<T> output;  // with a projection only h: what is projected
};

// The same with layer normalisation. N is that of lstm_ext/reference.py.
template <typename T>
struct NormCellForward {
  using Accumulate = typename Types<T>::Accumulate;
  CellForward<T> cell;
  LayerNorm<Accumulate> norm;
  // N(W x_t) and N(U h_{t-1}), (rows, 4H), and what the centred products were multiplied by, (rows, 2). All contiguous;
  // null in inference.
  T* norm_input;
  T* norm_recurrent;
  Accumulate* norm_factors;
  Accumulate* workspace;  // (rows, 2, H)
};

// With a projection and options: makes h_t from the projected h'_t.
template <typename T>
struct OutputForward {
  StepRows rows;
  int64_t output_size;
  const typename Types<T>::Accumulate* projected;  // (rows, P) contiguous
  NewOutput<T> output;
};

// dL/dh_t as a sum, and what makes dL/dh'_t from it (see NewOutput).
template <typename T>
struct GradOutput {
  using Accumulate = typename Types<T>::Accumulate;
  const T* grad_output;  // (rows, n), rows grad_output_stride apart, or null
  int64_t grad_output_stride;
  const T* grad_h_n;  // (B, n) contiguous or null: for rows that end here
  // (next_count, n) contiguous: through the product with U in the step after. A sum of recurrent_parts of them, each
  // recurrent_part_stride behind the one before.
  const Accumulate* recurrent_part;
  int64_t recurrent_parts;
  int64_t recurrent_part_stride;
  const Accumulate* recurrent_mask;  // that of NewOutput; recurrent_part has yet to be multiplied by it
  Zoneout<Accumulate> zoneout;
  // With zoneout (B, n). In: dL/dh_t through zoneout in the step after, for rows that take part in it; out: the same of
  // h_{t-1} for all rows.
  Accumulate* grad_h;
  Accumulate* grad_reset_h;  // with zoneout: the same of the states that reset others, summed over steps; or null
};

// One step of the backward pass: from dL/dh_t and dL/dc_t to the gradients of the preactivations and to dL/dc_{t-1}. It
// computes the gate values from the preactivations: of a gate near 1 in 16 bits, 1 - gate has hardly a digit left, and
// the preactivation has all of them.
template <typename T>
struct CellBackward {
  using Accumulate = typename Types<T>::Accumulate;
  using Gradient = typename Types<T>::Gradient;
  StepRows rows;
  int64_t hidden_size;
  const T* preactivations;  // (rows, 4H) contiguous
  const Accumulate* cells;  // (rows, H) contiguous: c_t
  PreviousCell<T> c_previous;
  Zoneout<Accumulate> zoneout;  // the zoneout of c
  cell::Options<Accumulate> options;
  GradOutput<T> output;           // the gradient of h; unused with a projection
  const Accumulate* grad_hidden;  // with a projection (rows, H) contiguous: dL/d(o * tanh(c_t)); else null
  const T* grad_c_n;              // (B, H) contiguous or null: as grad_h_n
  // Incoming gradients of the gate values (rows, 4H) and of c_t (rows, H), where the caller got them. Contiguous or
  // null.
  const T* grad_gate_values;
  const Accumulate* grad_cells;
  Accumulate* grad_c;  // (B, H) contiguous. In: dL/dc_t for rows that go on; out: dL/dc_{t-1} for all rows
  // (rows, 4H) contiguous: of U h_{t-1}; without layer normalisation that of the preactivations and of W x_t as well.
  Gradient* grad_recurrent_part;
  // grad_recurrent_part of each row's first step, or zeros if the row is reset there (B, 4H). Null where not requested.
  Gradient* grad_begin_part;
  // Sums over the steps in which a row is reset: of grad_recurrent_part (B, 4H), and of dL/dc_{t-1} (B, H), which is
  // dL/dc of the state that replaced it. Null where not requested.
  Accumulate* grad_reset_part;
  Accumulate* grad_reset_c;
  T* hidden;  // (rows, H) contiguous: recomputes o * tanh(c_t); or null
  // The terms of the gradients of the cell's parameters (rows, kParameters * H) contiguous, or null.
  Accumulate* cell_terms;
};

// The same with layer normalisation; names as in NormCellForward.
template <typename T>
struct NormCellBackward {
  using Accumulate = typename Types<T>::Accumulate;
  CellBackward<T> cell;
  LayerNorm<Accumulate> norm;
  const T* norm_input;
  const T* norm_recurrent;
  const Accumulate* norm_factors;
  typename Types<T>::Gradient* grad_input_part;  // (rows, 4H) contiguous: of W x_t
  Accumulate* grad_preactivations;               // (rows, 4H) contiguous
  // The factors of the gradients of gain_c and bias_c (rows, H): dL/d(the argument of tanh in h_t), and N(c_t).
  Accumulate* grad_tanh_input;
  T* norm_cell;
};

// dL/dh'_t of a step with a projection, an operand of the product with W_hr.
template <typename T>
struct OutputGradient {
  StepRows rows;
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
    int64_t count;                        // rows
    int64_t previous_count;               // as in StepRows
    const T* previous;                    // (previous_count, P), rows previous_stride apart
    typename Types<T>::Gradient* result;  // (rows, P) contiguous
    ResetFlags resets;
    int64_t time;
  };
  int64_t output_size;
  int64_t previous_stride;
  const T* h0;                                          // (B, P) contiguous, for rows that begin; null means zeros
  const T* reset_h;                                     // the same, for rows that are reset
  const int64_t* lengths;                               // as in StepRows
  const typename Types<T>::Accumulate* recurrent_mask;  // as in NewOutput
  bool reverse;
  int count;
  Step steps[kSteps];
};

// sums[j] += the sum of column j, always in the same order.
template <typename T>
struct ColumnSums {
  using Accumulate = typename Types<T>::Accumulate;
  int64_t rows;
  int64_t columns;
  const typename Types<T>::Gradient* values;  // (rows, columns) contiguous
  Accumulate* partial;                        // (column_sum_parts(rows), columns): workspace
  Accumulate* sums;                           // (columns)
};
// The same for the products of two matrices, element by element.
template <typename T>
struct ProductSums {
  using Accumulate = typename Types<T>::Accumulate;
  int64_t rows;
  int64_t columns;
  const Accumulate* values;  // (rows, columns) contiguous
  const T* factors;          // (rows, columns) contiguous; null means ones
  Accumulate* partial;       // as above
  Accumulate* sums;
};
constexpr int64_t kSumRows = 512;  // rows of a part, unless a grid cannot have that many parts
inline int64_t column_sum_parts(int64_t rows) { return std::min<int64_t>((rows + kSumRows - 1) / kSumRows, 65535); }

// Each starts one kernel (the sums: two) on the stream, waits for nothing, and returns the launch's own error.
template <typename T>
cudaError_t cell_forward(const StepSides<CellForward<T>>& args, cudaStream_t stream);
template <typename T>
cudaError_t cell_backward(const StepSides<CellBackward<T>>& args, cudaStream_t stream);
template <typename T>
cudaError_t norm_cell_forward(const StepSides<NormCellForward<T>>& args, cudaStream_t stream);
template <typename T>
cudaError_t norm_cell_backward(const StepSides<NormCellBackward<T>>& args, cudaStream_t stream);
template <typename T>
cudaError_t output_forward(const StepSides<OutputForward<T>>& args, cudaStream_t stream);
template <typename T>
cudaError_t output_gradient(const StepSides<OutputGradient<T>>& args, cudaStream_t stream);
template <typename T>
cudaError_t previous_outputs(const PreviousOutputs<T>& args, cudaStream_t stream);
template <typename T>
cudaError_t column_sums(const ColumnSums<T>& args, cudaStream_t stream);
template <typename T>
cudaError_t product_sums(const ProductSums<T>& args, cudaStream_t stream);

}  // namespace lstm_ext::cuda
