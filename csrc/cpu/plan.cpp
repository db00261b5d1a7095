#include "cpu/plan.h"

#include <algorithm>

#include "cpu/cost.h"

namespace lstm_ext::cpu {
namespace {

// The number of barriers of a team in a step.
template <typename Params>
int64_t count_barriers(const Params& params) {
  return 1 + (params.shape.projected ? 1 : 0) + (params.options.normalised() ? 1 : 0);
}

// The least number of rows of a chunk that share one read of W.
int64_t least_chunk_rows(const ForwardPlan& plan, int64_t weight_numbers) {
  const int bf16_parts = plan.input.bf16_parts;
  if (bf16_parts == 0) return kChunkRows;
  const bool far = 2.0 * bf16_parts * static_cast<double>(weight_numbers) > kCacheBytes;
  return bf16_parts == 1 && far ? 2 * kEngineChunkRows : kEngineChunkRows;
}

// The number of steps in a chunk if only W x runs on the tile engine, small enough that the engine does not slow those
// steps; 0 if there would be too few.
int64_t short_chunk_steps(const ForwardPlan& plan, const LayerShape& shape) {
  const int bf16_parts = plan.input.bf16_parts;
  if (bf16_parts == 0 || plan.recurrent.bf16_parts > 0) return 0;
  const int64_t columns =
      divide_up(divide_up(shape.hidden_size, kEngineTileRows), plan.grid.hidden_groups) * kGateTiles;
  const int64_t products = bf16_parts * (bf16_parts + 1) / 2 * columns * divide_up(shape.input_size, kEngineTileDepth);
  const int64_t steps = kShortEngineProducts / products * kEngineTileRows / plan.team_rows;
  return steps >= kShortEngineSteps ? steps : 0;
}

// Computing W x of many steps at once reads W once, but writes the sums to memory and reads them again. W is read in
// each step instead if a step has enough rows and one of two holds: the bf16 parts of both weights stay in the cache,
// or those of W are no larger than the traffic that this saves.
bool sums_input_in_steps(const ForwardPlan& plan, const LayerShape& shape, bool unfused) {
  const int bf16_parts = plan.recurrent.bf16_parts;
  if (unfused || plan.pack_as_used || bf16_parts == 0 || plan.input.bf16_parts != bf16_parts) return false;
  const int64_t gates = 4 * shape.hidden_size;
  const double of_input = 2.0 * static_cast<double>(bf16_numbers(gates, shape.input_size, bf16_parts));
  const double both = of_input + 2.0 * static_cast<double>(bf16_numbers(gates, shape.output_size, bf16_parts));
  const double sums = static_cast<double>(sizeof(float)) * static_cast<double>(gates * shape.batch);
  return shape.batch >= (bf16_parts == 1 ? kInputRowsOfOnePart : kEngineTileRows) &&
         (both <= kWholeCacheBytes || of_input <= kWeightBytesOfSum * sums);
}

// A call of one step reads both weights once. If the cache does not hold both, the call takes the units in groups: both
// products of one group, then of the next. So the weights that a call used last belong to the units that the next call
// begins with; see GateProduct::Sweep.
template <typename T>
int64_t count_unit_groups(const ForwardPlan& plan, const ForwardParams<T>& params, const Machine& machine) {
  const LayerShape& shape = params.shape;
  if (shape.steps > 1 || shape.step_offsets || params.options.any() || plan.pack_as_used || plan.input.bf16_parts > 0 ||
      plan.recurrent.bf16_parts > 0) {
    return 1;
  }
  const WeightKind kind = params.frozen ? params.frozen->input.narrow.kind : params.weights.narrow.kind;
  const double number = kind == WeightKind::kOwn ? sizeof(T) : kind == WeightKind::kInt8 ? 1 : 2;
  const double bytes = number * 4.0 * static_cast<double>(shape.hidden_size * (shape.input_size + shape.output_size)) /
                       plan.grid.hidden_groups;
  if (bytes <= kCacheBytes) return 1;
  const int64_t blocks = divide_up(divide_up(shape.hidden_size, machine.lanes), plan.grid.hidden_groups);
  return std::clamp<int64_t>(static_cast<int64_t>(bytes / kGroupBytes), 1, blocks);
}

}  // namespace

template <typename T>
ForwardPlan plan_forward(const ForwardParams<T>& params, const Machine& machine) {
  const LayerShape& shape = params.shape;
  const StepOptions<T>& options = params.options;
  const int64_t H = shape.hidden_size, P = shape.output_size, I = shape.input_size;
  const int64_t gates = 4 * H;
  ForwardPlan plan;
  const int64_t samples = count_samples(shape);
  const FrozenWeights<T>* const frozen = params.frozen;
  const int bf16_parts = frozen ? frozen->bf16_parts : params.bf16_parts;
  const int recurrent_bf16_parts = gate_bf16_parts(machine, bf16_parts, shape.batch, P, H);
  const bool narrow = params.weights.narrow.kind != WeightKind::kOwn;
  plan.pack = frozen || samples > row_major_rows(shape, machine, recurrent_bf16_parts, narrow, options.any());
  // Decided by the size of the call, not by its share among threads: results do not depend on their number.
  if (plan.pack) plan.input.bf16_parts = gate_bf16_parts(machine, bf16_parts, samples, I, H);
  if (plan.pack) plan.recurrent.bf16_parts = recurrent_bf16_parts;
  plan.pack_as_used = !frozen && plan.pack && shape.steps == 1 && samples <= kMostEngineRows;
  plan.input_in_steps = sums_input_in_steps(plan, shape, options.any());
  plan.grid = choose_grid(shape, machine, step_cost(shape, I, plan.recurrent.bf16_parts, machine.engine, true), 0.0,
                          count_barriers(params), plan.pack_as_used ? 1 : shape.batch);
  plan.directions_at_once = directions_at_once(machine, plan.grid);
  plan.unit_groups = count_unit_groups(plan, params, machine);

  const int64_t row_bytes = gates * static_cast<int64_t>(sizeof(T));
  plan.team_rows = divide_up(shape.batch, plan.grid.batch_groups);
  int64_t chunk_steps = std::max(kChunkBytes / (plan.team_rows * row_bytes),
                                 divide_up(least_chunk_rows(plan, gates * I), plan.team_rows));
  if (const int64_t steps = short_chunk_steps(plan, shape)) chunk_steps = steps;
  if (plan.input_in_steps) chunk_steps = 1;  // room for rows that the tile engine cannot split
  plan.chunk_rows = plan.team_rows * std::clamp<int64_t>(chunk_steps, 1, shape.steps);
  lay_out(plan, params, machine);
  return plan;
}

bool sums_gradients_once(const LayerShape& shape, int bf16_parts) {
  const int64_t numbers = bf16_numbers(shape.input_size, shape.batch, bf16_parts) +
                          bf16_numbers(shape.output_size, shape.batch, bf16_parts);
  return shape.steps == 1 && shape.batch <= kSumBlock && numbers <= kEngineRightNumbers;
}

template <typename T>
BackwardPlan plan_backward(const BackwardParams<T>& params, const Machine& machine) {
  const LayerShape& shape = params.shape;
  const StepOptions<T>& options = params.options;
  const bool recomputes = !params.gate_values;
  const int64_t H = shape.hidden_size, P = shape.output_size, I = shape.input_size;
  const int64_t gates = 4 * H;
  const int64_t samples = count_samples(shape);
  double other_work = static_cast<double>(samples) * static_cast<double>(gates) * static_cast<double>(2 * I + P);
  BackwardPlan plan;
  const int row_parts = column_bf16_parts(machine, params.bf16_parts, shape.batch, gates, P);
  const bool narrow = params.weights.narrow.kind != WeightKind::kOwn;
  // Packing three bf16 parts pays for a few rows of several steps if the weights are large.
  const bool packs_soon = row_parts > 0 && (narrow || row_parts < 3 || (shape.steps > 1 && gates * (I + P) > 200'000));
  const int64_t few = packs_soon ? few_rows(row_parts, narrow) : std::max(kRowMajorRows, 4 * machine.lanes);
  // Unpacked weights of 16 bits are widened to float32 in each step.
  plan.pack = samples > few || (narrow && shape.steps > 1);
  // A single step uses U only for the gradients of the states before it.
  plan.pack_recurrent = plan.pack && (shape.steps > 1 || params.grad_h0 || params.grad_reset_h);
  if (plan.pack_recurrent)
    plan.recurrent.bf16_parts = column_bf16_parts(machine, params.bf16_parts, shape.batch, gates, P);
  if (plan.recurrent.bf16_parts > 0) other_work /= machine.engine.speed[plan.recurrent.bf16_parts];
  plan.grid = choose_grid(shape, machine, step_cost(shape, 0, plan.recurrent.bf16_parts, machine.engine, false),
                          other_work, count_barriers(params), shape.batch);
  plan.directions_at_once = !params.grad_input.data && directions_at_once(machine, plan.grid);
  plan.team_rows = divide_up(shape.batch, plan.grid.batch_groups);

  // The shared left factor of both weights is split once.
  const bool one_left = params.grad_weight_ih && params.grad_weight_hh && !options.normalised();
  const int64_t outer_columns = one_left ? I + P : std::min(I, P);
  if (plan.pack) plan.outer_bf16_parts = column_bf16_parts(machine, params.bf16_parts, samples, samples, outer_columns);
  // The tile engine adds to memory every kSumBlock samples in any case.
  const int64_t most_samples = plan.outer_bf16_parts > 0 ? kSumBlock : kMostSamples;
  plan.chunk_rows = divide_up(std::clamp(H, kLeastSamples, most_samples), shape.batch) * shape.batch;
  if (2 * plan.chunk_rows >= samples) plan.chunk_rows = samples;
  if (plan.pack) {
    const int64_t input_rows = std::min(plan.chunk_rows, kEngineInputRows);
    if (shape.projected) plan.projection.bf16_parts = column_bf16_parts(machine, params.bf16_parts, shape.batch, P, H);
    if (params.grad_input.data && !options.cell.gru)  // the two pieces of its W have no place for bf16 parts
      plan.input.bf16_parts = column_bf16_parts(machine, params.bf16_parts, input_rows, gates, I);
    if (recomputes) {
      plan.recompute_input.bf16_parts = gate_bf16_parts(machine, params.bf16_parts, samples, I, H);
      plan.recompute_recurrent.bf16_parts = gate_bf16_parts(machine, params.bf16_parts, samples, P, H);
    }
  }
  lay_out(plan, params, machine);
  return plan;
}

template ForwardPlan plan_forward(const ForwardParams<float>&, const Machine&);
template ForwardPlan plan_forward(const ForwardParams<double>&, const Machine&);
template BackwardPlan plan_backward(const BackwardParams<float>&, const Machine&);
template BackwardPlan plan_backward(const BackwardParams<double>&, const Machine&);

}  // namespace lstm_ext::cpu
