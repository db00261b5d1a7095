// The part of a worker that the forward and the backward pass share: the steps, the worker's place in the grid, its
// rows and units, its buffers, and the states before a step.
#pragma once

#include "cpu/isa.h"

#include "contract/transition.h"
#include "cpu/barrier.h"
#include "cpu/gate_product.h"
#include "cpu/bf16_product.h"
#include "cpu/range.h"
#include "cpu/rows.h"
#include "cpu/simd.h"

namespace lstm_ext::cpu::LSTM_EXT_ISA {
namespace {

// h_{t-1} and c_{t-1} of the batch rows of one step. A row continues, or begins from h0 and c0, or is reset.
template <typename T>
struct PreviousStates {
  using Source = transition::Source;
  const T* h;  // row 0 of those that continue
  const T* c;
  int64_t h_step, hidden_size, output_size;
  int64_t continued;  // rows that had a step before; the others begin
  const T* h0;
  const T* c0;
  ResetState<T> reset_state;
  ResetFlags resets;

  // Null means zeros.
  LSTM_EXT_INLINE const T* h_row(int64_t b) const {
    const Source source = transition::source_of(resets[b], b < continued);
    if (source == Source::kStepBefore) return h + b * h_step;
    const T* const start = source == Source::kReset ? reset_state.h : h0;
    return start ? start + b * output_size : nullptr;
  }
  LSTM_EXT_INLINE const T* c_row(int64_t b) const {
    const Source source = transition::source_of(resets[b], b < continued);
    if (source == Source::kStepBefore) return c + b * hidden_size;
    const T* const start = source == Source::kReset ? reset_state.c : c0;
    return start ? start + b * hidden_size : nullptr;
  }
};

template <typename T, typename Params, typename Plan>
struct Pass {
  static constexpr int kLanes = Simd<T>::kLanes;

  const Params& params;
  const Plan& plan;
  char* const workspace;
  const LayerShape& shape;
  const Steps steps;
  const int64_t worker, team, member;
  const TeamRows rows;
  const Range blocks;  // this member's blocks of kLanes hidden units
  Barrier& all_workers;
  Barrier& team_members;
  T* const zero_row;  // zeros in place of a row of h; reserved only if needed
  const EngineSession engine_session;

  Pass(const Params& params, const Plan& plan, Steps::Pass direction, char* workspace, int worker)
      : params(params),
        plan(plan),
        workspace(workspace),
        shape(params.shape),
        steps(params.shape, direction),
        worker(worker),
        team(worker / plan.grid.hidden_groups),
        member(worker % plan.grid.hidden_groups),
        rows(shape, plan.grid.batch_groups, team),
        blocks(share(divide_up(shape.hidden_size, kLanes), plan.grid.hidden_groups, member)),
        all_workers(*place<Barrier>(0)),
        team_members(place<Barrier>(0)[1 + team]),
        zero_row(worker_buffer(plan.zero_rows, plan.zero_row_size)),
        engine_session(plan.engine_scratch.in_tiles && plan.engine_scratch.sums_numbers > 0) {}

  // Places in the workspace, at an offset of the plan. Those of the workers, or of the teams, follow one another; each
  // has `size` numbers or rows.
  T* buffer(int64_t offset, int64_t index = 0) const { return place<T>(offset) + index; }
  T* worker_buffer(int64_t offset, int64_t size) const { return buffer(offset) + worker * size; }
  T* team_buffer(int64_t offset, int64_t size) const { return buffer(offset) + team * size; }
  const T** row_list(int64_t offset, int64_t size) const { return place<const T*>(offset) + worker * size; }
  T** writable_row_list(int64_t offset, int64_t size) const { return place<T*>(offset) + worker * size; }

  TileScratch tile_scratch() const {
    const EngineScratch& scratch = plan.engine_scratch;
    return {place<uint16_t>(scratch.left) + worker * scratch.left_numbers,
            scratch.left_numbers,
            place<uint16_t>(scratch.right) + worker * scratch.right_numbers,
            scratch.right_numbers,
            place<float>(scratch.sums) + worker * 2 * scratch.sums_numbers,
            scratch.sums_numbers,
            scratch.in_tiles};
  }
  // The bf16 parts of a weight for the tile engine, at an offset of the plan.
  Bf16Operand bf16_operand(const EngineProduct& engine, int64_t offset) const {
    return {place<uint16_t>(offset), place<uint8_t>(engine.all_split), engine.bf16_parts};
  }

  WeightRows<T> weight_ih() const { return {params.weights.weight_ih, params.weights.narrow.weight_ih, kind()}; }
  WeightRows<T> weight_hh() const { return {params.weights.weight_hh, params.weights.narrow.weight_hh, kind()}; }

  // A weight (4H, count), packed according to the plan.
  GateWeight<T> gate_weight(const WeightRows<T>& rows, bool packed, const EngineProduct& engine, int64_t offset) const {
    if (engine.bf16_parts > 0) return {rows, nullptr, bf16_operand(engine, offset)};
    return {rows, packed ? buffer(offset) : nullptr};
  }

  // Rows of the team in step s of this pass.
  int64_t rows_in(int64_t s) const { return rows.count(steps.rows_in(s)); }
  void meet_team() const { team_members.wait(plan.grid.hidden_groups); }
  void meet_all() const { all_workers.wait(plan.grid.workers()); }
  // This member's share of some columns, in whole registers.
  Range columns(int64_t size) const {
    const Range mine = share(divide_up(size, kLanes), plan.grid.hidden_groups, member);
    return {mine.begin * kLanes, smaller(mine.end * kLanes, size)};
  }
  // This member's share of `count` rows.
  Range member_share(int64_t count) const { return share(count, plan.grid.hidden_groups, member); }

  // The states before the step at time t. `running_c` is (B, H), for a pass that does not save c_t of all steps.
  PreviousStates<T> states_before(int64_t t, const T* running_c = nullptr) const {
    const int64_t H = shape.hidden_size;
    const int64_t before = shape.reverse ? t + 1 : t - 1;
    PreviousStates<T> previous{};
    if (before >= 0 && before < shape.steps) {
      previous.continued = smaller(steps.rows_at(t), steps.rows_at(before));
      previous.h = rows_at(params.output, steps, before);
      previous.c = params.cells ? params.cells + steps.rows_before(before) * H : running_c;
    }
    previous.h_step = params.output.stride_b;
    previous.hidden_size = H;
    previous.output_size = shape.output_size;
    previous.h0 = params.h0;
    previous.c0 = params.c0;
    previous.reset_state = params.reset_state;
    previous.resets = steps.resets_before(t);
    return previous;
  }

 private:
  WeightKind kind() const { return params.weights.narrow.kind; }
  template <typename Element>
  Element* place(int64_t offset) const {
    return reinterpret_cast<Element*>(workspace + offset);
  }
};

}  // namespace
}  // namespace lstm_ext::cpu::LSTM_EXT_ISA
