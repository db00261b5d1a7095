// The gradients that are products over all steps of a chunk: those of the input, the weights and the biases.
#pragma once

#include "cpu/isa.h"

#include "cpu/backward_state.h"
#include "cpu/column_product.h"
#include "cpu/outer_products.h"
#include "cpu/range.h"
#include "cpu/rows.h"
#include "cpu/simd.h"
#include "cpu/tile.h"

namespace lstm_ext::cpu::LSTM_EXT_ISA {
namespace {

template <typename T>
class ChunkGradients {
 public:
  explicit ChunkGradients(BackwardState<T>& pass) : pass_(pass) {}

  // The chunk's dL/dx = dL/d(W x) W; workers share the rows.
  void input() {
    if (!pass_.params.grad_input.data) return;
    for (int n = 0; n < pass_.input_pieces; ++n) input(pass_.input_piece(n));
  }
  void input(const typename BackwardState<T>::Piece& piece) {
    const BackwardParams<T>& params = pass_.params;
    const RowGrid<T> out = rows_from(params.grad_input, pass_.steps, pass_.chunk.begin);
    const Range mine = workers_share(pass_.chunk.rows);
    // The rows that use a panel while it is in cache.
    const int64_t most = pass_.plan.input.bf16_parts > 0 ? kEngineInputRows : 16 * kTileRows;
    const RightHandSide<T> weight = pass_.input_weight(piece);
    const bool adds = params.accumulate_grad_input || piece.first > 0;
    for (int64_t begin = mine.begin; begin < mine.end; begin += most) {
      const int64_t rows = smaller(most, mine.end - begin);
      const T* const grads = pass_.chunk.grad_input_part + begin * stride_ + piece.gradient;
      multiply_columns(
          RowGrid<const T>{grads, rows * stride_, stride_, rows}, rows, weight, Range{0, pass_.shape.input_size},
          [&](int64_t row) LSTM_EXT_LAMBDA_INLINE { return out(begin + row); },
          [=](int64_t row, int64_t column) LSTM_EXT_LAMBDA_INLINE { __builtin_prefetch(out(begin + row) + column, 1); },
          [=](int64_t row, int64_t column, int lanes, Reg<T>& v)
              LSTM_EXT_LAMBDA_INLINE { v = adds ? load_lanes<T>(out(begin + row) + column, lanes) : Simd<T>::zero(); },
          [=](int64_t row, int64_t column, Reg<T> sums, int lanes)
              LSTM_EXT_LAMBDA_INLINE { store_lanes<T>(out(begin + row) + column, sums, lanes); });
    }
  }

  // Adds the chunk's part; workers share the rows of the gradients.
  void weights() {
    const BackwardParams<T>& params = pass_.params;
    const Chunk<T>& chunk = pass_.chunk;
    const int64_t H = pass_.shape.hidden_size, P = pass_.shape.output_size, I = pass_.shape.input_size;
    const Range mine = workers_share(pass_.weight_rows);
    const bool fresh = chunk.first == 0;
    const RowGrid<const T> input = rows_from(params.input, pass_.steps, chunk.begin);
    const bool both = params.grad_weight_ih && params.grad_weight_hh;
    const bool same = chunk.grad_input_part == chunk.grad_preactivations && pass_.input_pieces == 1;
    if (both && pass_.plan.outer_bf16_parts > 0 && same) {
      if constexpr (kHasTileEngine<T>) {  // splits the shared factor once
        const OuterSums sums[] = {{input, I, place(params.grad_weight_ih)},
                                  {previous_h(), P, place(params.grad_weight_hh)}};
        add_outer_bf16(pass_.plan.outer_bf16_parts, chunk.grad_preactivations, stride_, chunk.rows, mine, sums, 2,
                       pass_.tile_scratch(), pass_.outer_products, fresh);
      }
    } else {
      if (params.grad_weight_ih) {
        for (int n = 0; n < pass_.input_pieces; ++n) {
          const auto piece = pass_.input_piece(n);
          const Range rows{mine.begin > piece.first ? mine.begin : piece.first,
                           smaller(mine.end, piece.first + piece.count)};
          if (rows.begin >= rows.end) continue;
          add_products(chunk.grad_input_part + piece.gradient - piece.first, stride_, chunk.rows, rows, input, I,
                       place(params.grad_weight_ih), fresh);
        }
      }
      if (params.grad_weight_hh) recurrent_weight(mine, fresh);
    }
    // With layer normalisation, finish() of the unfused step computes this gradient.
    if (params.grad_bias && !params.options.normalised()) {
      const Range gates = workers_share(4 * H);
      if (fresh) zero_rows(params.grad_bias, 1, gates);
      add_columns<T>(chunk.grad_preactivations, stride_, chunk.rows, gates, params.grad_bias);
    }
    if (params.grad_weight_hr) {
      const Range projected = workers_share(P);
      const T* const hidden = chunk.hidden ? chunk.hidden : params.hidden + pass_.steps.rows_before(chunk.begin) * H;
      add_products(chunk.grad_hidden, P, chunk.rows, projected, {hidden, H, H, 1}, H, {params.grad_weight_hr}, fresh);
    }
  }

 private:
  void recurrent_weight(Range mine, bool fresh) {
    const BackwardParams<T>& params = pass_.params;
    const Chunk<T>& chunk = pass_.chunk;
    const int64_t P = pass_.shape.output_size;
    const SumsPlace<T> sums = place(params.grad_weight_hh);
    const bool by_rule = !chunk.masked_h && !pass_.steps.packed() && !pass_.shape.resets;
    if (!by_rule || pass_.plan.outer_bf16_parts > 0) {
      add_products(chunk.grad_preactivations, stride_, chunk.rows, mine, previous_h(), P, sums, fresh);
      return;
    }
    // h_{t-1} is the output of the previous step in the layer's direction; in its first step it is h0.
    const int64_t B = pass_.shape.batch;
    const bool reverse = pass_.shape.reverse;
    const bool has_first = chunk.first + chunk.count == pass_.shape.steps;
    const int64_t begin = has_first && !reverse ? 1 : 0;  // first time with a previous output
    const int64_t count = chunk.count - (has_first ? 1 : 0);
    if (count > 0) {
      const int64_t before = chunk.begin + begin + (reverse ? 1 : -1);
      add_products(chunk.grad_preactivations + begin * B * stride_, stride_, count * B, mine,
                   rows_from(params.output, pass_.steps, before), P, sums, fresh);
      fresh = false;
    }
    if (has_first && params.h0) {
      add_products(pass_.grad_preactivations(pass_.shape.steps - 1), stride_, B, mine, {params.h0, B * P, P, B}, P,
                   sums, fresh);
      fresh = false;
    }
    if (fresh) sums.zero(P, mine);
  }

  // h_{t-1} of every row of the chunk, times its mask.
  RowGrid<const T> previous_h() const {
    const Chunk<T>& chunk = pass_.chunk;
    const int64_t P = pass_.shape.output_size;
    if (chunk.masked_h) return {chunk.masked_h, chunk.rows * P, P, chunk.rows};
    pass_.list_previous_h();
    return listed_rows<const T>(pass_.h_rows);
  }

  SumsPlace<T> place(void* gradient) const { return {gradient, pass_.params.kind_of_weight_grads}; }
  Range workers_share(int64_t count) const { return share(count, pass_.plan.grid.workers(), pass_.worker); }
  // `fresh`: there are no sums yet.
  void add_products(const T* left, int64_t left_step, int64_t samples, Range rows, const RowGrid<const T>& right,
                    int64_t columns, const SumsPlace<T>& sums, bool fresh) const {
    if constexpr (kHasTileEngine<T>) {
      if (pass_.plan.outer_bf16_parts > 0) {
        const OuterSums all{right, columns, sums};
        add_outer_bf16(pass_.plan.outer_bf16_parts, left, left_step, samples, rows, &all, 1, pass_.tile_scratch(),
                       pass_.outer_products, fresh);
        return;
      }
    }
    add_outer_products<T>(left, left_step, samples, rows, right, columns, sums, pass_.outer_products, fresh);
  }

  BackwardState<T>& pass_;
  const int64_t stride_ = pass_.gate_stride;
};

}  // namespace
}  // namespace lstm_ext::cpu::LSTM_EXT_ISA
