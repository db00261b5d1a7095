// The state of a forward pass, which its loop and steps share.
#pragma once

#include "cpu/isa.h"

#include "cpu/gate_product.h"
#include "cpu/pass.h"
#include "cpu/range.h"
#include "cpu/rows.h"
#include "cpu/simd.h"
#include "cpu/tile.h"

namespace lstm_ext::cpu::LSTM_EXT_ISA {
namespace {

template <typename T>
struct ForwardState : Pass<T, ForwardParams<T>, ForwardPlan> {
  using Base = Pass<T, ForwardParams<T>, ForwardPlan>;
  using Base::columns, Base::gate_weight, Base::part, Base::rows, Base::rows_in, Base::zero_row;
  using Base::kLanes, Base::params, Base::plan, Base::shape, Base::steps;

  // The order of this member's units. With unit groups, every other call of a layer goes from the last unit to the
  // first.
  const bool forwards = plan.unit_groups == 1 || turns_to_forwards();
  GateProduct<T> input_product{shape.hidden_size, Base::blocks, Base::tile_scratch(), forwards};
  GateProduct<T> product{shape.hidden_size, Base::blocks, Base::tile_scratch(), forwards};
  const FrozenWeights<T>* const frozen = params.frozen;
  const GateWeight<T> input_weight = Base::without(
      frozen ? frozen_weight(frozen->input, plan.input.bf16_parts) : own_weight(Base::weight_ih(), plan.input),
      cell::kGruRecurrent);
  const GateWeight<T> recurrent_weight =
      Base::without(frozen ? frozen_weight(frozen->recurrent, plan.recurrent.bf16_parts)
                           : own_weight(Base::weight_hh(), plan.recurrent),
                    cell::kGruInput);
  const T* const projection_panels = frozen ? frozen->projection_panels : part(plan.projection_panels);
  const T* const bias = frozen ? frozen->bias : part(plan.bias);
  T* const chunk_preactivations = part(plan.preactivations, Base::team);
  // Rows of the input and of the preactivations in a chunk of packed data.
  const T** const input_rows = Base::template mine<const T*>(plan.input_lists);
  T** const preactivation_rows = Base::template mine<T*>(plan.preactivation_lists);
  // Pointers to h_{t-1} and to c_{t-1} (or null) of the team's rows in a step; see list_previous.
  const T** const h_rows = Base::template mine<const T*>(plan.h_lists);
  const T** const c_rows = Base::template mine<const T*>(plan.c_lists);

  ForwardState(const ForwardParams<T>& params, const ForwardPlan& plan, char* workspace, int worker)
      : Base(params, plan, Steps::Pass::kForward, workspace, worker) {}

  // The other direction than that of this thread's last call with this weight. If two weights share a bit, only time is
  // lost.
  bool turns_to_forwards() const {
    const void* weight = params.weights.weight_hh;
    if (params.frozen) weight = params.frozen->bias;
    if (!weight) weight = params.weights.narrow.weight_hh;
    const uint64_t bit = uint64_t{1} << (reinterpret_cast<uintptr_t>(weight) * 0x9E3779B97F4A7C15u >> 58);
    return (unit_directions ^= bit) & bit;
  }

  // A weight that this call packs: all of it, or block by block into one buffer of each worker.
  GateWeight<T> own_weight(const WeightRows<T>& rows, const PackedWeight& packed) const {
    GateWeight<T> weight = gate_weight(rows, packed);
    if (plan.pack_as_used) weight.one_place = Base::worker;
    return weight;
  }
  // A weight that was packed before the call. Nobody writes to it: Forward packs no frozen weight.
  static GateWeight<T> frozen_weight(const typename FrozenWeights<T>::Gates& weight, int bf16_parts) {
    Bf16Operand bf16{};
    if (bf16_parts > 0) bf16 = {const_cast<uint16_t*>(weight.bf16), const_cast<uint8_t*>(weight.all_split), bf16_parts};
    return {{}, const_cast<T*>(weight.panels), bf16, weight.narrow};
  }

  // The preactivations of step s, or with layer normalisation the normalised W x. They are in the saved array if there
  // is one, else in the buffer of the chunk, after the `done` rows of its earlier steps.
  RowGrid<T> preactivations(int64_t s, int64_t done) const {
    const int64_t gate_row = 4 * shape.hidden_size;
    const int64_t count = rows_in(s);
    if (T* const all = params.kept_input_part()) {
      return rows.grid(all + steps.rows_before(steps.time(s)) * gate_row, gate_row, {0, count});
    }
    return {chunk_preactivations + done * gate_row, count * gate_row, gate_row, count};
  }

  // c_t of these rows of the team at time t; hidden() gives their o * tanh(c_t) before the projection.
  RowGrid<T> cells(int64_t t, Range part) const {
    const int64_t H = shape.hidden_size;
    return rows.grid(params.cells ? params.cells + steps.rows_before(t) * H : params.c_n, H, part);
  }
  RowGrid<T> hidden(int64_t t, Range part) const {
    if (!shape.projected) return output(t, part);
    const int64_t H = shape.hidden_size;
    return rows.grid(params.hidden ? params.hidden + steps.rows_before(t) * H : Base::part(plan.hidden), H, part);
  }
  RowGrid<T> output(int64_t t, Range part) const {
    return rows.grid(rows_at(params.output, steps, t), params.output.stride_b, part);
  }

  // Fills h_rows and c_rows with the states of these rows of the team before a step.
  void list_previous(const PreviousStates<T>& previous, Range part) const {
    for (int64_t row = part.begin; row < part.end; ++row) {
      const int64_t b = rows.batch_row(row);
      const T* const h = previous.h_row(b);
      h_rows[row - part.begin] = h ? h : zero_row;
      c_rows[row - part.begin] = previous.c_row(b);
    }
  }

  // h_t = W_hr (o * tanh(c_t)), the members sharing the output columns.
  void project(int64_t t, int64_t count) const {
    const RowGrid<T> a_rows = hidden(t, {0, count});
    const RowGrid<T> out = output(t, {0, count});
    const Range mine = columns(shape.output_size);
    for (int64_t column = mine.begin; column < mine.end; column += kLanes) {
      const int lanes = static_cast<int>(smaller(mine.end - column, kLanes));
      const T* const panel = projection_panels + column * shape.hidden_size;
      for_each_row_tile(count, [&](int64_t row, auto height) LSTM_EXT_LAMBDA_INLINE {
        constexpr int R = height();
        const T* a[R];
        for (int r = 0; r < R; ++r) a[r] = a_rows(row + r);
        Tile<T, R, 1> tile;
        tile.zero();
        accumulate_rows(tile, a, panel, kLanes, shape.hidden_size);
        for (int r = 0; r < R; ++r) store_lanes<T>(out(row + r) + column, tile.acc[r][0], lanes);
      });
    }
  }
};

}  // namespace
}  // namespace lstm_ext::cpu::LSTM_EXT_ISA
