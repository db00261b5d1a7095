// Forward pass of one direction of one layer.
//
// The pass goes chunk by chunk. The input part W x_t + b of the chunk's time steps is computed at once and written to
// the buffer of preactivations (in training, that of the saved gate values). The recurrence over those steps follows;
// see forward_steps.h. On the tile engine the steps may compute the input part themselves
// (ForwardPlan::input_in_steps).
#pragma once

#include "cpu/isa.h"

#include "cpu/forward_state.h"
#include "cpu/forward_steps.h"
#include "cpu/gate_product.h"
#include "cpu/pack.h"
#include "cpu/range.h"
#include "cpu/rows.h"
#include "cpu/simd.h"

namespace lstm_ext::cpu::LSTM_EXT_ISA {
namespace {

// Packs panels of kLanes output columns of W_hr, every `stride`-th of them.
template <typename T>
void pack_projection(const LayerWeights<T>& weights, const LayerShape& shape, Range blocks, int64_t stride, T* panels) {
  constexpr int kLanes = Simd<T>::kLanes;
  const int64_t H = shape.hidden_size;
  for (int64_t block = blocks.begin; block < blocks.end; block += stride) {
    const int lanes = static_cast<int>(smaller(shape.output_size - block * kLanes, kLanes));
    pack_transposed<T>(weights.weight_hr + block * kLanes * H, lanes, H, panels + block * kLanes * H, kLanes);
  }
}

template <typename T, typename Step>
class Forward {
 public:
  Forward(const ForwardParams<T>& params, const ForwardPlan& plan, char* workspace, int worker)
      : pass_(params, plan, workspace, worker), step_(pass_) {}

  void run() {
    prepare_weights();
    const int64_t steps = pass_.steps.count();
    for (int64_t first = 0; first < steps;) {
      // A chunk has as many steps as the buffer has rows for.
      int64_t end = first;
      int64_t rows = 0;
      while (end < steps && rows + pass_.rows_in(end) <= pass_.plan.chunk_rows) rows += pass_.rows_in(end++);
      const bool in_steps = pass_.plan.input_in_steps || pass_.plan.unit_groups > 1;
      if (rows > 0 && !in_steps) input_part(first, end, rows);
      int64_t done = 0;
      for (int64_t s = first; s < end; ++s) {
        step_.run(s, pass_.preactivations(s, done));
        done += pass_.rows_in(s);
      }
      first = end;
    }
    final_state();
  }

 private:
  static constexpr int kLanes = Simd<T>::kLanes;

  // Packs the weights. Each member uses the panels of its own units only; the teams share the work.
  void prepare_weights() {
    const LayerWeights<T>& weights = pass_.params.weights;
    const ForwardPlan& plan = pass_.plan;
    const int64_t H = pass_.shape.hidden_size, P = pass_.shape.output_size, I = pass_.shape.input_size;
    const int teams = plan.grid.batch_groups;
    zero_rows(pass_.zero_row, plan.zero_rows.size, Range{0, 1});
    if (pass_.frozen) return;
    for (int64_t block = pass_.blocks.begin; block < pass_.blocks.end; ++block) {
      if (block % teams != pass_.team) continue;
      if (!plan.pack_as_used) {
        pack_gates(pass_.input_weight, H, I, block);
        pack_gates(pass_.recurrent_weight, H, P, block);
      }
      for (int gate = 0; gate < kGates; ++gate) {
        const int64_t at = gate * H + block * kLanes;
        sum_biases(weights, Range{at, at + pass_.product.lanes_in(block)}, pass_.part(plan.bias));
      }
    }
    if (pass_.shape.projected) {
      pack_projection(weights, pass_.shape, Range{pass_.worker, divide_up(P, kLanes)}, plan.grid.workers(),
                      pass_.part(plan.projection_panels));
    }
    if (teams > 1 || pass_.shape.projected) pass_.meet_all();
  }

  // preactivations = W x + b for the `count` rows of steps first ... end - 1 and the units of this member.
  void input_part(int64_t first, int64_t end, int64_t count) {
    const int64_t gate_row = 4 * pass_.shape.hidden_size;
    const Sequence<const T>& sequence = pass_.params.input;
    const TeamRows& team_rows = pass_.rows;
    RowGrid<const T> input;
    RowGrid<T> preactivations;
    if (!pass_.steps.packed()) {
      const int64_t direction = pass_.shape.reverse ? -1 : 1;
      input = team_rows.grid(rows_at(sequence, pass_.steps, pass_.steps.time(first)), sequence.stride_b,
                             {0, team_rows.most});
      input.outer_step = direction * sequence.stride_t;
      preactivations = pass_.preactivations(first, 0);
      preactivations.outer_step =
          (pass_.params.kept_input_part() ? direction * pass_.shape.batch : team_rows.most) * gate_row;
    } else {
      int64_t n = 0;
      for (int64_t s = first; s < end; ++s) {
        const RowGrid<const T> from = team_rows.grid(rows_at(sequence, pass_.steps, pass_.steps.time(s)),
                                                     sequence.stride_b, {0, pass_.rows_in(s)});
        const RowGrid<T> to = pass_.preactivations(s, n);
        for (int64_t row = 0; row < from.rows; ++row, ++n) {
          pass_.input_rows[n] = from(row);
          pass_.preactivation_rows[n] = to(row);
        }
      }
      input = listed_rows<const T>(pass_.input_rows);
      preactivations = listed_rows<T>(pass_.preactivation_rows);
    }
    pass_.input_product.multiply(count, input, pass_.shape.input_size, pass_.input_weight, preactivations,
                                 step_.input_bias());
    step_.finish_input_part(count, preactivations);
  }

  void final_state() {
    // The last step ended with a barrier of the team, so all columns are written.
    if (pass_.member != 0) return;
    const ForwardParams<T>& params = pass_.params;
    const int64_t H = pass_.shape.hidden_size;
    const int64_t P = pass_.shape.output_size;
    for (int64_t s = 0; s < pass_.steps.count(); ++s) {
      const int64_t t = pass_.steps.time(s);
      // The rows that end with this step. In the reverse direction every row runs to time 0.
      for (int64_t row = pass_.rows_in(s + 1); row < pass_.rows_in(s); ++row) {
        const int64_t b = pass_.rows.batch_row(row);
        copy<T>(rows_at(params.output, pass_.steps, t) + b * params.output.stride_b, P, params.h_n + b * P);
        if (params.cells) copy<T>(params.cells + (pass_.steps.rows_before(t) + b) * H, H, params.c_n + b * H);
      }
    }
  }

  ForwardState<T> pass_;
  Step step_;
};

// Packs weights into their places. The numbers are already those of the frozen type: for int8, an integer times the
// factor of its row, and these factors are already in place.
template <typename T>
void freeze(const LayerWeights<T>& weights, const LayerShape& shape, const FrozenWeights<T>& places) {
  constexpr int kLanes = Simd<T>::kLanes;
  const int64_t H = shape.hidden_size;
  const auto pack = [&](const T* rows, int64_t count, const typename FrozenWeights<T>::Gates& place, int skipped) {
    GateWeight<T> weight = ForwardState<T>::frozen_weight(place, places.bf16_parts);
    weight.rows = {rows};
    if (places.gru) weight.skipped = skipped;
    for (int64_t block = 0; block < divide_up(H, kLanes); ++block) {
      pack_gates(weight, H, count, block);
      if (!place.panels) pack_narrow_panel(weight, rows, H, count, block);
    }
  };
  pack(weights.weight_ih, shape.input_size, places.input, cell::kGruRecurrent);
  pack(weights.weight_hh, shape.output_size, places.recurrent, cell::kGruInput);
  sum_biases(weights, Range{0, 4 * H}, const_cast<T*>(places.bias));
  if (shape.projected) {
    pack_projection(weights, shape, Range{0, divide_up(shape.output_size, kLanes)}, 1,
                    const_cast<T*>(places.projection_panels));
  }
}

// Not inlined into its one caller, since GCC would then inline less into it.
template <typename T>
__attribute__((noinline)) void forward(const ForwardParams<T>& params, const ForwardPlan& plan, char* workspace,
                                       int worker) {
  if (!params.options.any()) {
    Forward<T, FusedForwardStep<T>>(params, plan, workspace, worker).run();
  } else if (!params.options.normalised()) {
    Forward<T, UnfusedForwardStep<T, false>>(params, plan, workspace, worker).run();
  } else {
    Forward<T, UnfusedForwardStep<T, true>>(params, plan, workspace, worker).run();
  }
}

}  // namespace
}  // namespace lstm_ext::cpu::LSTM_EXT_ISA
