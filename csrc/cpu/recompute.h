// Recomputes the gate values of a chunk of the backward pass if the forward pass saved c_t only: two products over all
// rows of the chunk, because all x_t and h_{t-1} are known.
//
// A member recomputes its own units of its team's rows, the only ones that it reads.
#pragma once

#include "cpu/isa.h"

#include "cpu/backward_state.h"
#include "cpu/cell.h"
#include "cpu/gate_product.h"
#include "cpu/gates.h"
#include "cpu/pass.h"
#include "cpu/range.h"
#include "cpu/rows.h"
#include "cpu/simd.h"

namespace lstm_ext::cpu::LSTM_EXT_ISA {
namespace {

template <typename T>
class Recompute {
 public:
  explicit Recompute(BackwardState<T>& pass) : pass_(pass) {}

  void prepare_weights() {
    const LayerWeights<T>& weights = pass_.params.weights;
    const int64_t H = pass_.shape.hidden_size, P = pass_.shape.output_size, I = pass_.shape.input_size;
    sum_biases(weights, Range{0, 4 * H}, bias_);
    for (int64_t block = pass_.blocks.begin; block < pass_.blocks.end; ++block) {
      if (block % pass_.plan.grid.batch_groups != pass_.team) continue;
      pack_gates(input_weight_, H, I, block);
      pack_gates(recurrent_weight_, H, P, block);
    }
  }

  void run_chunk() {
    const Chunk<T>& chunk = pass_.chunk;
    const BackwardParams<T>& params = pass_.params;
    const int64_t P = pass_.shape.output_size;
    if (!chunk.masked_h) pass_.list_previous_h();
    int64_t count = 0;
    for (int64_t t = chunk.begin; t < chunk.begin + chunk.count; ++t) {
      const int64_t s = pass_.steps.time(t);
      const int64_t first_row = pass_.row_in_chunk(s);
      const T* const input = rows_at(params.input, pass_.steps, t);
      for (int64_t row = 0; row < pass_.rows_in(s); ++row, ++count) {
        const int64_t b = pass_.rows.batch_row(row);
        input_rows_[count] = input + b * params.input.stride_b;
        h_rows_[count] = chunk.masked_h ? chunk.masked_h + (first_row + b) * P : pass_.h_rows[first_row + b];
        gate_rows_[count] = pass_.recomputed_gate_values(first_row + b);
      }
    }
    const RowGrid<T> gates = listed_rows<T>(gate_rows_);
    product_.multiply(count, listed_rows<const T>(input_rows_), pass_.shape.input_size, input_weight_, gates, bias_);
    product_.multiply(count, listed_rows<const T>(h_rows_), P, recurrent_weight_, gates, nullptr);
    for (int64_t s = chunk.first; s < chunk.first + chunk.count; ++s) cells(s);
  }

 private:
  // Turns preactivations into gate values, in place, and computes o * tanh(c_t) before a projection.
  void cells(int64_t s) {
    const int64_t H = pass_.shape.hidden_size;
    const int64_t first_row = pass_.row_in_chunk(s);
    const PreviousStates<T> previous = pass_.states_before(pass_.steps.time(s));
    for (int64_t row = 0; row < pass_.rows_in(s); ++row) {
      const int64_t b = pass_.rows.batch_row(row);
      T* const gate_row = pass_.recomputed_gate_values(first_row + b);
      const T* const c_previous = previous.c_row(b);
      for (int64_t block = pass_.blocks.begin; block < pass_.blocks.end; ++block) {
        const int64_t unit = block * Simd<T>::kLanes;
        const int lanes = product_.lanes_in(block);
        const PreviousCells<T> before{{c_previous ? c_previous + unit : nullptr}, lanes};
        const auto cell = cell::forward<OwnDivisions<T>>(load_gates<T>(gate_row + unit, H, lanes), before,
                                                         CellAt<T>{pass_.params.options.cell, {unit, lanes}});
        store_gates<T>(gate_row + unit, cell.gates, H, lanes);
        if (pass_.shape.projected) store_lanes<T>(pass_.chunk.hidden + (first_row + b) * H + unit, cell.h, lanes);
      }
    }
  }

  BackwardState<T>& pass_;
  const BackwardPlan& plan_ = pass_.plan;
  GateProduct<T> product_{pass_.shape.hidden_size, pass_.blocks, pass_.tile_scratch()};
  const GateWeight<T> input_weight_ =
      pass_.without(pass_.gate_weight(pass_.weight_ih(), plan_.recompute_input), cell::kGruRecurrent);
  const GateWeight<T> recurrent_weight_ =
      pass_.without(pass_.gate_weight(pass_.weight_hh(), plan_.recompute_recurrent), cell::kGruInput);
  T* const bias_ = pass_.mine(plan_.recompute_bias);
  // Pointers to the team's rows of a chunk.
  const T** const input_rows_ = pass_.template mine<const T*>(plan_.recompute_inputs);
  const T** const h_rows_ = pass_.template mine<const T*>(plan_.recompute_h);
  T** const gate_rows_ = pass_.template mine<T*>(plan_.recompute_gates);
};

}  // namespace
}  // namespace lstm_ext::cpu::LSTM_EXT_ISA
