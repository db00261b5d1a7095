// Where the data of a call lie in its workspace, once everything else is chosen.
#include <algorithm>

#include "cpu/cost.h"
#include "cpu/frozen.h"

namespace lstm_ext::cpu {
namespace {

// Hands out places in the workspace, whose barriers come first.
template <typename T>
struct Layout {
  Arena arena;

  explicit Layout(const WorkerGrid& grid) { arena.take<char>(kBarrierBytes * (1 + grid.batch_groups)); }
  // `parts` parts of `size` elements each.
  template <typename Element = T>
  Place reserve(int64_t parts, int64_t size) {
    const int64_t at = arena.used;
    arena.take<Element>(parts * size);
    return {at, size};
  }
};

// Makes room for the sums and for a left operand of so many rows, or as many of them as should be split at once.
void need_left(EngineScratch& scratch, int64_t rows, int64_t depth, int bf16_parts, int64_t column_tiles) {
  const int64_t tile = bf16_numbers(1, depth, bf16_parts);
  const int64_t most = std::max<int64_t>(1, kEngineLeftNumbers / tile);
  const int64_t tiles = std::min({divide_up(rows, kEngineTileRows), most, kMostEngineRows / kEngineTileRows});
  scratch.left.size = std::max(scratch.left.size, tiles * tile);
  scratch.sums.size = std::max(scratch.sums.size, 2 * tiles * column_tiles * kEngineTileRows * kEngineTileRows);
}

// The same for a sum that may be computed in pieces of k; the sums of all columns are kept in between.
void need_left_in_pieces(EngineScratch& scratch, int64_t rows, int64_t depth, int bf16_parts, int64_t column_tiles) {
  const int64_t row_tiles = std::min(divide_up(rows, kEngineTileRows), kMostEngineRows / kEngineTileRows);
  const int64_t k_tile = row_tiles * bf16_numbers(1, 1, bf16_parts);
  const int64_t k_tiles = divide_up(depth, kEngineTileDepth);
  const int64_t most = std::max<int64_t>(1, kEngineLeftNumbers / k_tile);
  scratch.left.size = std::max(scratch.left.size, std::min(k_tiles, most) * k_tile);
  const int64_t width = k_tiles > most ? divide_up(column_tiles, 2) : kGateTiles;  // width of one of two buffers
  scratch.sums.size =
      std::max(scratch.sums.size, 2 * row_tiles * std::max(width, kGateTiles) * kEngineTileRows * kEngineTileRows);
}

// Reserves panels of `numbers` numbers, or the bf16 parts of `columns` columns of this depth.
template <typename T>
void reserve_weight(Layout<T>& layout, bool pack, PackedWeight& weight, int64_t numbers, int64_t columns, int64_t flags,
                    int64_t depth) {
  if (weight.bf16_parts > 0) {
    weight.all_split = layout.template reserve<uint8_t>(1, flags).at;
    weight.at = layout.template reserve<uint16_t>(1, bf16_numbers(columns, depth, weight.bf16_parts)).at;
  } else if (pack) {
    weight.at = layout.reserve(1, numbers).at;
  }
}
// The same for `units` units of a weight (4H, depth) that is multiplied with `rows` rows at once.
template <typename T>
void reserve_gate_weight(Layout<T>& layout, bool pack, PackedWeight& weight, EngineScratch& scratch, int64_t units,
                         int64_t rows, int64_t depth) {
  if (weight.bf16_parts > 0) need_left(scratch, rows, depth, weight.bf16_parts, kGateTiles);
  reserve_weight(layout, pack, weight, 4 * units * depth, 4 * units, divide_up(units, kEngineTileRows), depth);
}
template <typename T>
void reserve_scratch(Layout<T>& layout, EngineScratch& scratch, int64_t workers) {
  scratch.left = layout.template reserve<uint16_t>(workers, scratch.left.size);
  scratch.right = layout.template reserve<uint16_t>(workers, scratch.right.size);
  scratch.sums = layout.template reserve<float>(workers, scratch.sums.size);
}

}  // namespace

template <typename T>
void lay_out(ForwardPlan& plan, const ForwardParams<T>& params, const Machine& machine) {
  const LayerShape& shape = params.shape;
  const StepOptions<T>& options = params.options;
  const int64_t H = shape.hidden_size, P = shape.output_size, I = shape.input_size, gates = 4 * H;
  const int64_t teams = plan.grid.batch_groups, workers = plan.grid.workers();
  Layout<T> layout(plan.grid);
  plan.barrier_bytes = layout.arena.used;
  EngineScratch& scratch = plan.engine_scratch;
  scratch.in_tiles = machine.engine.tiles;
  if (params.frozen) {
    if (const int p = plan.input.bf16_parts) need_left(scratch, plan.chunk_rows, I, p, kGateTiles);
    if (const int p = plan.recurrent.bf16_parts) need_left(scratch, plan.team_rows, P, p, kGateTiles);
  } else {
    // The units that have a place at once: all, or one block of each worker.
    const int64_t units = plan.pack_as_used ? workers * machine.lanes : round_up(H, machine.lanes);
    reserve_gate_weight(layout, plan.pack, plan.input, scratch, units, plan.chunk_rows, I);
    reserve_gate_weight(layout, plan.pack, plan.recurrent, scratch, units, plan.team_rows, P);
    plan.bias = layout.reserve(1, gates);
    if (shape.projected) plan.projection_panels = layout.reserve(1, round_up(P, machine.lanes) * H);
  }
  if (plan.input_in_steps) {
    const int64_t depth = round_up(I, kEngineTileDepth) + round_up(P, kEngineTileDepth);
    need_left(scratch, plan.team_rows, depth, plan.recurrent.bf16_parts, kGateTiles);
  }
  reserve_scratch(layout, scratch, workers);
  if (shape.projected && !params.hidden) plan.hidden = layout.reserve(1, shape.batch * H);
  if (!params.kept_input_part()) plan.preactivations = layout.reserve(teams, plan.chunk_rows * gates);
  if (shape.step_offsets) {
    plan.input_lists = layout.template reserve<T*>(workers, plan.chunk_rows);
    plan.preactivation_lists = layout.template reserve<T*>(workers, plan.chunk_rows);
  }
  if (shape.resets || options.any()) {
    plan.h_lists = layout.template reserve<T*>(workers, plan.team_rows);
    plan.c_lists = layout.template reserve<T*>(workers, plan.team_rows);
    plan.zero_rows = layout.reserve(workers, gates);
  }
  if (options.recurrent_mask) plan.masked_h = layout.reserve(workers, plan.team_rows * P);
  if (options.normalised()) {
    plan.normalised_cells = layout.reserve(workers, kNormRows * H);
    if (!params.norm_recurrent) plan.recurrent_parts = layout.reserve(teams, plan.team_rows * gates);
  }
  plan.workspace_bytes = layout.arena.used;
}

template <typename T>
void lay_out(BackwardPlan& plan, const BackwardParams<T>& params, const Machine& machine) {
  const LayerShape& shape = params.shape;
  const StepOptions<T>& options = params.options;
  const bool recomputes = !params.gate_values;
  const int64_t H = shape.hidden_size, P = shape.output_size, I = shape.input_size, gates = 4 * H;
  const int64_t samples = count_samples(shape), workers = plan.grid.workers();
  Layout<T> layout(plan.grid);
  plan.barrier_bytes = layout.arena.used;
  EngineScratch& scratch = plan.engine_scratch;
  scratch.in_tiles = machine.engine.tiles;
  // Each member packs its own slice of columns, which begins at a multiple of the lanes.
  const auto reserve_columns = [&](PackedWeight& weight, int64_t rows, int64_t depth, int64_t columns) {
    const int64_t tiles = divide_up(columns, kEngineTileRows);
    if (weight.bf16_parts > 0) need_left_in_pieces(scratch, rows, depth, weight.bf16_parts, tiles);
    reserve_weight(layout, plan.pack, weight, round_up(columns, machine.lanes) * depth, columns, tiles, depth);
  };
  if (plan.pack_recurrent) reserve_columns(plan.recurrent, shape.batch, gates, P);
  if (shape.projected) reserve_columns(plan.projection, shape.batch, P, H);
  if (params.grad_input.data) reserve_columns(plan.input, std::min(plan.chunk_rows, kEngineInputRows), gates, I);
  if (const int bf16_parts = plan.outer_bf16_parts) {
    const int64_t columns = std::max({I, P, shape.projected ? H : 0});
    const int64_t depth = std::min(kSumBlock, plan.chunk_rows);
    need_left(scratch, kEngineOuterRows, depth, bf16_parts, kGateTiles);
    const int64_t whole = bf16_numbers(columns, depth, bf16_parts);
    const int64_t one = bf16_numbers(columns, kEngineTileDepth, bf16_parts);
    const int64_t both = bf16_numbers(I, depth, bf16_parts) + bf16_numbers(P, depth, bf16_parts);  // see add_outer_bf16
    scratch.right.size = std::min(whole, std::max(one, kEngineRightNumbers / one * one));
    if (both <= kEngineRightNumbers) scratch.right.size = std::max(scratch.right.size, both);
  }
  plan.partial_sums = layout.reserve(1, shape.batch * H);
  // A worker sums the outer products for a share of a weight's rows.
  plan.outer_products = layout.reserve(workers, kSumBlock * (kTileColumns * machine.lanes + divide_up(gates, workers)));

  const int64_t buffers = plan.chunk_rows == samples ? 1 : 2;
  const int64_t element_size = sizeof(T);
  plan.gate_stride = gates * element_size % 1024 == 0 ? gates + kCacheLine / element_size : gates;
  plan.grad_preactivations = layout.reserve(buffers, plan.chunk_rows * plan.gate_stride);
  if (shape.projected) plan.grad_hidden = layout.reserve(buffers, plan.chunk_rows * P);
  if (shape.step_offsets || shape.resets || options.any() || recomputes || plan.outer_bf16_parts > 0) {
    plan.h_lists = layout.template reserve<T*>(workers, plan.chunk_rows);
    plan.zero_rows = layout.reserve(workers, plan.gate_stride);
  }
  if (shape.resets) {
    plan.cut_lists = layout.template reserve<T*>(workers, plan.team_rows);
    if (params.grad_reset_h) plan.reset_grad_preactivations = layout.reserve(1, shape.batch * plan.gate_stride);
  }
  if (options.any()) plan.grad_h = layout.reserve(1, shape.batch * H);
  if (options.zoneout_h.active()) {
    plan.grad_previous_h = layout.reserve(1, shape.batch * P);
    if (params.grad_reset_h) plan.reset_grad_previous_h = layout.reserve(1, shape.batch * P);
  }
  if (options.recurrent_mask) plan.masked_h = layout.reserve(buffers, plan.chunk_rows * P);
  if (options.normalised()) {
    plan.grad_input_part = layout.reserve(buffers, plan.chunk_rows * plan.gate_stride);
    plan.norm_rows = layout.reserve(workers, (kNormRows + 1) * H);
  }
  const int64_t sums = options.normalised() ? 14 : options.cell.peepholes() ? cell::kParameters : 0;
  plan.parameter_sums = layout.reserve(2 * workers, sums * H);
  if (recomputes) {
    plan.recomputed_gate_values = layout.reserve(1, plan.chunk_rows * gates);
    if (shape.projected) plan.recomputed_hidden = layout.reserve(buffers, plan.chunk_rows * H);
    const auto reserve_gates = [&](PackedWeight& weight, int64_t depth) {
      reserve_gate_weight(layout, plan.pack, weight, scratch, round_up(H, machine.lanes), plan.chunk_rows, depth);
    };
    reserve_gates(plan.recompute_input, I);
    reserve_gates(plan.recompute_recurrent, P);
    plan.recompute_bias = layout.reserve(workers, gates);
    for (Place* lists : {&plan.recompute_inputs, &plan.recompute_h, &plan.recompute_gates}) {
      *lists = layout.template reserve<T*>(workers, plan.chunk_rows);
    }
  }
  reserve_scratch(layout, scratch, workers);
  plan.workspace_bytes = layout.arena.used;
}

template <typename T>
FrozenPlan plan_frozen(const LayerShape& shape, const Machine& machine, int bf16_parts, WeightKind kind) {
  FrozenPlan plan;
  plan.kind = kind;
  // The bf16 parts that any number of rows would use.
  const int64_t rows = machine.engine.rows[bf16_parts];
  plan.bf16_parts = rows < kNever ? gate_bf16_parts(machine, bf16_parts, rows, kEngineTileDepth, shape.hidden_size) : 0;
  Arena arena;
  place_frozen<T>(arena, shape, plan, machine.lanes);
  plan.bytes = arena.used;
  return plan;
}

template void lay_out(ForwardPlan&, const ForwardParams<float>&, const Machine&);
template void lay_out(ForwardPlan&, const ForwardParams<double>&, const Machine&);
template void lay_out(BackwardPlan&, const BackwardParams<float>&, const Machine&);
template void lay_out(BackwardPlan&, const BackwardParams<double>&, const Machine&);
template FrozenPlan plan_frozen<float>(const LayerShape&, const Machine&, int, WeightKind);
template FrozenPlan plan_frozen<double>(const LayerShape&, const Machine&, int, WeightKind);

}  // namespace lstm_ext::cpu
