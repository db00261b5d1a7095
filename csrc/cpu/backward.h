// Backward pass of one direction of one layer.
//
// The time loop runs backwards over each batch slice, one chunk of steps after the other. Its steps compute the
// gradients of the preactivations; see backward_steps.h. The products over all steps of the chunk follow while these
// gradients are in cache: see chunk_gradients.h.
#pragma once

#include "cpu/isa.h"

#include "cpu/backward_state.h"
#include "cpu/backward_steps.h"
#include "cpu/chunk_gradients.h"
#include "cpu/column_product.h"
#include "cpu/range.h"
#include "cpu/recompute.h"
#include "cpu/rows.h"
#include "cpu/simd.h"

namespace lstm_ext::cpu::LSTM_EXT_ISA {
namespace {

template <typename T, typename Step>
class Backward {
 public:
  Backward(const BackwardParams<T>& params, const BackwardPlan& plan, char* workspace, int worker)
      : pass_(params, plan, workspace, worker), step_(pass_), recompute_(pass_), gradients_(pass_) {}

  void run() {
    prepare_weights();
    pass_.zero_reset_sums();
    step_.begin();
    const int64_t steps = pass_.steps.count();
    for (int64_t first = 0; first < steps; first += pass_.chunk.count) {
      pass_.begin_chunk(first);
      if (pass_.params.options.recurrent_mask) mask_previous_h();
      if (pass_.recomputes) recompute_.run_chunk();
      for (int64_t s = first; s < first + pass_.chunk.count; ++s) {
        initial_state_gradient(s);
        pass_.begin_step(s);
        const int64_t count = pass_.rows_in(s);
        step_.run(s, count, smaller(count, pass_.rows_in(s - 1)));
      }
      if (first + pass_.chunk.count == steps) {
        initial_state_gradient(steps);
        pass_.finish_reset_sums();
      }
      step_.finish_chunk();
      // With two buffers one barrier a chunk is enough: a worker that writes the next chunk but one has passed a
      // barrier that all others reached after reading this one.
      pass_.meet_all();
      gradients_.input();
      gradients_.weights();
    }
    step_.finish();
  }

 private:
  void prepare_weights() {
    const BackwardParams<T>& params = pass_.params;
    const BackwardPlan& plan = pass_.plan;
    const LayerShape& shape = pass_.shape;
    const int64_t teams = plan.grid.batch_groups;
    zero_rows(pass_.zero_row, plan.zero_rows.size, Range{0, 1});
    if (pass_.recomputes) recompute_.prepare_weights();
    if (!plan.pack) return;
    if (plan.pack_recurrent) {
      pack(pass_.recurrent_weight(), pass_.output_columns, pass_.team, teams);
    }
    if (shape.projected) {
      pack(pass_.projection_weight(), pass_.hidden_columns, pass_.team, teams);
    }
    if (params.grad_input.data) {
      for (int n = 0; n < pass_.input_pieces; ++n) {
        pack(pass_.input_weight(pass_.input_piece(n)), Range{0, shape.input_size}, pass_.worker, plan.grid.workers());
      }
    }
    if (teams > 1) pass_.meet_all();
  }

  // Packs the panels or bf16 parts of some columns; each of the `shares` callers packs its own.
  void pack(const RightHandSide<T>& to, Range columns, int64_t share_index, int64_t shares) {
    to.matrix.with([&](const auto* matrix) {
      if constexpr (kHasTileEngine<T>) {
        if (to.bf16.parts > 0) {
          pack_column_bf16(matrix, to.row_step, to.depth, columns, share_index, shares, to.bf16);
          return;
        }
      }
      pack_columns(matrix, to.row_step, to.depth, columns, share_index, shares, to.panels);
    });
  }

  // Computes the chunk's masked h_{t-1}; each member does some of its team's rows.
  void mask_previous_h() {
    const Chunk<T>& chunk = pass_.chunk;
    const int64_t P = pass_.shape.output_size;
    pass_.list_previous_h();
    for (int64_t s = chunk.first; s < chunk.first + chunk.count; ++s) {
      const Range mine = pass_.member_share(pass_.rows_in(s));
      for (int64_t row = mine.begin; row < mine.end; ++row) {
        const int64_t b = pass_.rows.batch_row(row);
        const int64_t n = pass_.row_in_chunk(s) + b;
        const T* const mask = pass_.params.options.recurrent_mask + b * P;
        for_each_register<T>(P, [&](int64_t k, int lanes) LSTM_EXT_LAMBDA_INLINE {
          store_lanes<T>(chunk.masked_h + n * P + k,
                         load_lanes<T>(pass_.h_rows[n] + k, lanes) * load_lanes<T>(mask + k, lanes), lanes);
        });
      }
    }
    pass_.meet_team();
  }

  // Handles the rows whose sequence had its first step in step s - 1.
  void initial_state_gradient(int64_t s) {
    const Range part{pass_.rows_in(s), pass_.rows_in(s - 1)};
    if (pass_.params.grad_h0 && part.begin < part.end) step_.initial_state_gradient(part, s - 1);
  }

  BackwardState<T> pass_;
  Step step_;
  Recompute<T> recompute_;
  ChunkGradients<T> gradients_;
};

// Not inlined into its one caller, since GCC would then inline less into it.
template <typename T>
__attribute__((noinline)) void backward(const BackwardParams<T>& params, const BackwardPlan& plan, char* workspace,
                                        int worker) {
  if (!params.options.any()) {
    Backward<T, FusedBackwardStep<T>>(params, plan, workspace, worker).run();
  } else if (!params.options.normalised()) {
    Backward<T, UnfusedBackwardStep<T, false>>(params, plan, workspace, worker).run();
  } else {
    Backward<T, UnfusedBackwardStep<T, true>>(params, plan, workspace, worker).run();
  }
}

}  // namespace
}  // namespace lstm_ext::cpu::LSTM_EXT_ISA
