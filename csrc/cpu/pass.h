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
        all_workers(*at<Barrier>(0)),
        team_members(at<Barrier>(0)[1 + team]),
        zero_row(mine(plan.zero_rows)),
        engine_session(plan.engine_scratch.in_tiles && plan.engine_scratch.sums.is_needed()) {}

  // A part of a place in the workspace, and this worker's part.
  template <typename Element = T>
  Element* part(const Place& place, int64_t index = 0) const {
    return at<Element>(place.at) + index * place.size;
  }
  template <typename Element = T>
  Element* mine(const Place& place) const {
    return part<Element>(place, worker);
  }
  T* part_or_null(const Place& place, int64_t index = 0) const {
    return place.is_needed() ? part(place, index) : nullptr;
  }

  TileScratch tile_scratch() const {
    const EngineScratch& scratch = plan.engine_scratch;
    return {mine<uint16_t>(scratch.left),
            scratch.left.size,
            mine<uint16_t>(scratch.right),
            scratch.right.size,
            mine<float>(scratch.sums),
            scratch.sums.size / 2,
            scratch.in_tiles};
  }
  T* panels(const PackedWeight& weight) const { return plan.pack ? at<T>(weight.at) : nullptr; }
  // The bf16 parts of a weight for the tile engine.
  Bf16Operand bf16_operand(const PackedWeight& weight) const {
    return {at<uint16_t>(weight.at), at<uint8_t>(weight.all_split), weight.bf16_parts};
  }

  WeightRows<T> weight_ih() const { return {params.weights.weight_ih, params.weights.narrow.weight_ih, kind()}; }
  WeightRows<T> weight_hh() const { return {params.weights.weight_hh, params.weights.narrow.weight_hh, kind()}; }

  // A weight (4H, count), packed according to the plan.
  GateWeight<T> gate_weight(const WeightRows<T>& rows, const PackedWeight& weight) const {
    if (weight.bf16_parts > 0) return {rows, nullptr, bf16_operand(weight)};
    return {rows, panels(weight)};
  }

  bool gru() const { return params.options.cell.gru; }
  // The weight, without the gate that has no rows in it if this is a GRU.
  GateWeight<T> without(GateWeight<T> weight, cell::GruRow gate) const {
    if (gru()) weight.skipped = gate;
    return weight;
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
  Element* at(int64_t offset) const {
    return reinterpret_cast<Element*>(workspace + offset);
  }
};

}  // namespace
}  // namespace lstm_ext::cpu::LSTM_EXT_ISA
