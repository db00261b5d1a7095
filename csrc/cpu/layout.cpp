// Where the data of a call lie in its workspace, once everything else is chosen.
#include <algorithm>

#include "cpu/cost.h"

namespace lstm_ext::cpu {
namespace {

// Hands out places in the workspace.
template <typename T>
struct Layout {
  int64_t end = 0;
  int64_t reserve_bytes(int64_t bytes) {
    const int64_t at = end;
    end += round_up(bytes, kCacheLine);
    return at;
  }
  int64_t reserve(int64_t numbers) { return reserve_bytes(numbers * static_cast<int64_t>(sizeof(T))); }
  int64_t reserve_pointers(int64_t count) { return reserve_bytes(count * static_cast<int64_t>(sizeof(void*))); }
};

// Makes room for the sums and for a left operand of so many rows, or as many of them as should be split at once.
void need_left(EngineScratch& scratch, int64_t rows, int64_t depth, int bf16_parts, int64_t column_tiles) {
  const int64_t tile = bf16_numbers(1, depth, bf16_parts);
  const int64_t most = std::max<int64_t>(1, kEngineLeftNumbers / tile);
  const int64_t tiles = std::min({divide_up(rows, kEngineTileRows), most, kMostEngineRows / kEngineTileRows});
  scratch.left_numbers = std::max(scratch.left_numbers, tiles * tile);
  scratch.sums_numbers = std::max(scratch.sums_numbers, tiles * column_tiles * kEngineTileRows * kEngineTileRows);
}

// The same for a sum that may be computed in pieces of k; the sums of all columns are kept in between.
void need_left_in_pieces(EngineScratch& scratch, int64_t rows, int64_t depth, int bf16_parts, int64_t column_tiles) {
  const int64_t row_tiles = std::min(divide_up(rows, kEngineTileRows), kMostEngineRows / kEngineTileRows);
  const int64_t k_tile = row_tiles * bf16_numbers(1, 1, bf16_parts);
  const int64_t k_tiles = divide_up(depth, kEngineTileDepth);
  const int64_t most = std::max<int64_t>(1, kEngineLeftNumbers / k_tile);
  scratch.left_numbers = std::max(scratch.left_numbers, std::min(k_tiles, most) * k_tile);
  const int64_t width = k_tiles > most ? divide_up(column_tiles, 2) : kGateTiles;  // width of one of two buffers
  scratch.sums_numbers =
      std::max(scratch.sums_numbers, row_tiles * std::max(width, kGateTiles) * kEngineTileRows * kEngineTileRows);
}

// Reserves panels or bf16 parts of `units` units of a weight (4H, depth) that is multiplied with `rows` rows at once;
// returns 0 if it has none.
template <typename T>
int64_t reserve_gate_weight(Layout<T>& layout, bool pack, EngineProduct& engine, EngineScratch& scratch, int64_t units,
                            int64_t rows, int64_t depth) {
  if (engine.bf16_parts > 0) {
    engine.all_split = layout.reserve_bytes(divide_up(units, kEngineTileRows));
    need_left(scratch, rows, depth, engine.bf16_parts, kGateTiles);
    return layout.reserve_bytes(2 * bf16_numbers(4 * units, depth, engine.bf16_parts));
  }
  return pack ? layout.reserve(4 * units * depth) : 0;
}
template <typename T>
void reserve_scratch(Layout<T>& layout, EngineScratch& scratch, int64_t workers) {
  scratch.left = layout.reserve_bytes(workers * 2 * scratch.left_numbers);
  scratch.right = layout.reserve_bytes(workers * 2 * scratch.right_numbers);
  scratch.sums = layout.reserve_bytes(workers * 2 * static_cast<int64_t>(sizeof(float)) * scratch.sums_numbers);
}

// The scratch, in numbers, with which a worker sums the outer products for at most `rows` rows of a weight.
int64_t outer_product_scratch(int64_t lanes, int64_t rows) { return kSumBlock * (kTileColumns * lanes + rows); }

}  // namespace

template <typename T>
void lay_out(ForwardPlan& plan, const ForwardParams<T>& params, const Machine& machine) {
  const LayerShape& shape = params.shape;
  const StepOptions<T>& options = params.options;
  const FrozenWeights<T>* const frozen = params.frozen;
  const int64_t H = shape.hidden_size, P = shape.output_size, I = shape.input_size, gates = 4 * H;
  const int64_t teams = plan.grid.batch_groups, workers = plan.grid.workers();
  Layout<T> layout;
  layout.end = plan.barrier_bytes = kBarrierBytes * (1 + plan.grid.batch_groups);
  const int64_t padded = round_up(H, machine.lanes);
  EngineScratch& scratch = plan.engine_scratch;
  scratch.in_tiles = machine.engine.tiles;
  if (frozen) {
    if (const int p = plan.input_engine.bf16_parts) need_left(scratch, plan.chunk_rows, I, p, kGateTiles);
    if (const int p = plan.recurrent_engine.bf16_parts) need_left(scratch, plan.team_rows, P, p, kGateTiles);
  } else {
    // The units that have a place at once: all, or one block of each worker.
    const int64_t units = plan.pack_as_used ? workers * machine.lanes : padded;
    plan.input_panels = reserve_gate_weight(layout, plan.pack, plan.input_engine, scratch, units, plan.chunk_rows, I);
    plan.recurrent_panels =
        reserve_gate_weight(layout, plan.pack, plan.recurrent_engine, scratch, units, plan.team_rows, P);
    plan.bias = layout.reserve(gates);
    if (shape.projected) plan.projection_panels = layout.reserve(round_up(P, machine.lanes) * H);
  }
  if (plan.input_in_steps) {
    const int64_t depth = round_up(I, kEngineTileDepth) + round_up(P, kEngineTileDepth);
    need_left(scratch, plan.team_rows, depth, plan.recurrent_engine.bf16_parts, kGateTiles);
  }
  reserve_scratch(layout, scratch, workers);
  if (shape.projected && !params.hidden) plan.hidden = layout.reserve(shape.batch * H);
  if (!params.kept_input_part()) plan.preactivations = layout.reserve(teams * plan.chunk_rows * gates);
  // For each worker, lists of the rows of the input and of the preactivations in a chunk.
  if (shape.step_offsets) plan.row_lists = layout.reserve_pointers(workers * 2 * plan.chunk_rows);
  if (shape.resets || options.any()) {  // pointers to h_{t-1} and c_{t-1} in a step, and zeros
    plan.state_lists = layout.reserve_pointers(workers * 2 * plan.team_rows);
    plan.zero_row_size = gates;
    plan.zero_rows = layout.reserve(workers * plan.zero_row_size);
  }
  if (options.recurrent_mask) plan.masked_h = layout.reserve(workers * plan.team_rows * P);
  if (options.normalised()) {
    plan.normalised_cells = layout.reserve(workers * kNormRows * H);
    if (!params.norm_recurrent) plan.recurrent_parts = layout.reserve(teams * plan.team_rows * gates);
  }
  plan.workspace_bytes = layout.end;
}

template <typename T>
void lay_out(BackwardPlan& plan, const BackwardParams<T>& params, const Machine& machine) {
  const LayerShape& shape = params.shape;
  const StepOptions<T>& options = params.options;
  const bool recomputes = !params.gate_values;
  const int64_t H = shape.hidden_size, P = shape.output_size, I = shape.input_size, gates = 4 * H;
  const int64_t samples = count_samples(shape), workers = plan.grid.workers();
  Layout<T> layout;
  layout.end = plan.barrier_bytes = kBarrierBytes * (1 + plan.grid.batch_groups);
  // Each member packs its own slice of columns, which begins at a multiple of the lanes.
  EngineScratch& scratch = plan.engine_scratch;
  scratch.in_tiles = machine.engine.tiles;
  const auto reserve_weight = [&](EngineProduct& engine, int64_t rows, int64_t depth, int64_t columns) -> int64_t {
    if (engine.bf16_parts > 0) {
      engine.all_split = layout.reserve_bytes(divide_up(columns, kEngineTileRows));
      need_left_in_pieces(scratch, rows, depth, engine.bf16_parts, divide_up(columns, kEngineTileRows));
      return layout.reserve_bytes(2 * bf16_numbers(columns, depth, engine.bf16_parts));
    }
    return plan.pack ? layout.reserve(round_up(columns, machine.lanes) * depth) : 0;
  };
  if (plan.pack_recurrent) plan.recurrent_panels = reserve_weight(plan.recurrent_engine, shape.batch, gates, P);
  if (shape.projected) plan.projection_panels = reserve_weight(plan.projection_engine, shape.batch, P, H);
  if (params.grad_input.data) {
    plan.input_panels = reserve_weight(plan.input_engine, std::min(plan.chunk_rows, kEngineInputRows), gates, I);
  }
  if (plan.outer_engine.bf16_parts > 0) {
    const int bf16_parts = plan.outer_engine.bf16_parts;
    const int64_t columns = std::max({I, P, shape.projected ? H : 0});
    const int64_t depth = std::min(kSumBlock, plan.chunk_rows);
    need_left(scratch, kEngineOuterRows, depth, bf16_parts, kGateTiles);
    const int64_t whole = bf16_numbers(columns, depth, bf16_parts);
    const int64_t one = bf16_numbers(columns, kEngineTileDepth, bf16_parts);
    const int64_t both = bf16_numbers(I, depth, bf16_parts) + bf16_numbers(P, depth, bf16_parts);  // see add_outer_bf16
    scratch.right_numbers = std::min(whole, std::max(one, kEngineRightNumbers / one * one));
    if (both <= kEngineRightNumbers) scratch.right_numbers = std::max(scratch.right_numbers, both);
  }
  plan.partial_sums = layout.reserve(shape.batch * H);
  plan.outer_product_size = outer_product_scratch(machine.lanes, divide_up(gates, workers));
  plan.outer_products = layout.reserve(workers * plan.outer_product_size);

  const int64_t buffer_rows = (plan.chunk_rows == samples ? 1 : 2) * plan.chunk_rows;
  const int64_t element_size = sizeof(T);
  plan.gate_stride = gates * element_size % 1024 == 0 ? gates + kCacheLine / element_size : gates;
  plan.grad_preactivations = layout.reserve(buffer_rows * plan.gate_stride);
  if (shape.projected) plan.grad_hidden = layout.reserve(buffer_rows * P);
  if (shape.step_offsets || shape.resets || options.any() || recomputes || plan.outer_engine.bf16_parts > 0) {
    // For each worker, a list of h_{t-1} of the rows of a chunk, and zeros.
    plan.h_lists = layout.reserve_pointers(workers * plan.chunk_rows);
    plan.zero_row_size = plan.gate_stride;
    plan.zero_rows = layout.reserve(workers * plan.zero_row_size);
  }
  if (shape.resets) {  // and a list of the gradients of the preactivations of the team's rows in a step
    plan.cut_lists = layout.reserve_pointers(workers * plan.team_rows);
    if (params.grad_reset_h) plan.reset_grad_preactivations = layout.reserve(shape.batch * plan.gate_stride);
  }
  if (options.any()) plan.grad_h = layout.reserve(shape.batch * H);
  if (options.zoneout_h.active()) {
    plan.grad_previous_h = layout.reserve(shape.batch * P);
    if (params.grad_reset_h) plan.reset_grad_previous_h = layout.reserve(shape.batch * P);
  }
  if (options.recurrent_mask) plan.masked_h = layout.reserve(buffer_rows * P);
  if (options.normalised()) {
    plan.grad_input_part = layout.reserve(buffer_rows * plan.gate_stride);
    plan.norm_rows = layout.reserve(workers * (kNormRows + 1) * H);
  }
  plan.parameter_sums = layout.reserve(2 * workers * parameter_sums(options) * H);
  if (recomputes) {
    const int64_t padded = round_up(H, machine.lanes);
    plan.recomputed_gate_values = layout.reserve(plan.chunk_rows * gates);
    if (shape.projected) plan.recomputed_hidden = layout.reserve(buffer_rows * H);
    const auto reserve_gates = [&](EngineProduct& engine, int64_t depth) {
      return reserve_gate_weight(layout, plan.pack, engine, scratch, padded, plan.chunk_rows, depth);
    };
    plan.recompute_input_panels = reserve_gates(plan.recompute_input_engine, I);
    plan.recompute_recurrent_panels = reserve_gates(plan.recompute_recurrent_engine, P);
    plan.recompute_bias = layout.reserve(workers * gates);
    plan.recompute_lists = layout.reserve_pointers(workers * 3 * plan.chunk_rows);
  }
  reserve_scratch(layout, scratch, workers);
  plan.workspace_bytes = layout.end;
}

template <typename T>
FrozenPlan plan_frozen(const LayerShape& shape, const Machine& machine, int bf16_parts, WeightKind kind,
                       int64_t first) {
  const int64_t H = shape.hidden_size, P = shape.output_size, I = shape.input_size;
  const int64_t padded = round_up(H, machine.lanes);
  FrozenPlan plan;
  plan.kind = kind;
  // The bf16 parts that any number of rows would use.
  const int64_t rows = machine.engine.rows[bf16_parts];
  plan.bf16_parts = rows < kNever ? gate_bf16_parts(machine, bf16_parts, rows, kEngineTileDepth, H) : 0;
  Layout<T> layout{round_up(first, kCacheLine)};
  const auto reserve = [&](int64_t depth) {
    FrozenPlan::Gates gates;
    const int64_t numbers = 4 * padded * depth;
    switch (kind) {
      case WeightKind::kOwn: gates.panels = layout.reserve(numbers); break;
      case WeightKind::kBFloat16:
      case WeightKind::kFloat16: gates.panels = layout.reserve_bytes(2 * numbers); break;
      case WeightKind::kInt8:
        gates.panels = layout.reserve_bytes(4 * padded * round_up(depth, 4));  // see int8_place
        gates.factors = layout.reserve(4 * H);
        break;
    }
    if (plan.bf16_parts > 0) {
      gates.all_split = layout.reserve_bytes(divide_up(H, kEngineTileRows));
      gates.bf16 = layout.reserve_bytes(2 * bf16_numbers(4 * padded, depth, plan.bf16_parts));
    }
    return gates;
  };
  plan.input = reserve(I);
  plan.recurrent = reserve(P);
  plan.bias = layout.reserve(4 * H);
  if (shape.projected) plan.projection_panels = layout.reserve(round_up(P, machine.lanes) * H);
  plan.bytes = layout.end;
  return plan;
}

template void lay_out(ForwardPlan&, const ForwardParams<float>&, const Machine&);
template void lay_out(ForwardPlan&, const ForwardParams<double>&, const Machine&);
template void lay_out(BackwardPlan&, const BackwardParams<float>&, const Machine&);
template void lay_out(BackwardPlan&, const BackwardParams<double>&, const Machine&);
template FrozenPlan plan_frozen<float>(const LayerShape&, const Machine&, int, WeightKind, int64_t);
template FrozenPlan plan_frozen<double>(const LayerShape&, const Machine&, int, WeightKind, int64_t);

}  // namespace lstm_ext::cpu
