#include "cpu/plan.h"

#include <algorithm>
#include <cmath>

namespace lstm_ext::cpu {
namespace {

// Work is counted in fused multiply-adds of one number. The constants were found by trial on an AVX-512 machine of two
// cores. They affect speed only, never correctness.
constexpr double kWorkPerThread = 6e5;       // with less work a thread costs more than it gains
constexpr double kWorkPerBarrier = 6e4;      // the cost of a barrier between team members
constexpr int64_t kRowMajorRows = 32;        // a step of up to so many rows reads the weights unpacked
constexpr int64_t kChunkBytes = 256 * 1024;  // preactivations of a chunk stay in the L2 cache
constexpr int64_t kChunkRows = 48;           // ... but each load of the weights must serve enough rows
constexpr int64_t kUnitChunkRows = 128;      // ... and more on the matrix unit, which needs the weights faster
constexpr int64_t kCacheLine = 64;
constexpr double kUnitCellFeatures = 30;     // the cost of a cell beside the matrix unit, in input features
constexpr double kWholeCacheBytes = 2e6;     // weights of this size stay in the L2 cache if nothing else is there
constexpr double kLoadNumber = 2.0;          // the cost of loading a bfloat16 number of a weight from there
constexpr double kLoadFarNumber = 6.0;       // ... and from further away
constexpr double kRowsThatWait = 128;        // up to here rows wait for loads; with more, the next tiles arrive in time
constexpr int64_t kInputRowsOfOnePlane = 8;  // least rows of a step; see sums_input_in_steps
constexpr double kWeightBytesOfSum = 10;     // weight bytes read instead of a byte of W x; measured on a Xeon
constexpr double kGroupBytes = 512 * 1024;   // the weights of a group of units; see count_unit_groups
// So many products of tiles, 4 us, do not slow the processor's clock, if at least so many steps follow them.
constexpr int64_t kShortUnitProducts = 800;
constexpr int64_t kShortUnitSteps = 16;
constexpr int kDirections = 2;  // directions of a bidirectional layer
// The number of samples (time x batch) in a backward chunk is H within these bounds. Each chunk adds to the weight
// gradients in memory once, so larger weights gain from longer chunks. Its gradients should stay in cache, so smaller
// weights gain from shorter ones.
constexpr int64_t kLeastSamples = 256;
constexpr int64_t kMostSamples = 1024;

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows of all steps together.
int64_t count_samples(const LayerShape& shape) {
  return shape.step_offsets ? shape.step_offsets[shape.steps] : shape.steps * shape.batch;
}

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

// The work of one row of one time step: the products with `features` input features, with h, and of the projection. The
// cell costs about as much as 8 more features.
double row_work(const LayerShape& shape, int64_t features) {
  const int64_t products = 4 * shape.hidden_size * (features + shape.output_size + 8);
  return static_cast<double>(products + (shape.projected ? shape.hidden_size * shape.output_size : 0));
}

// The cost of a time step.
struct StepCost {
  double row_work;            // the work of one row
  int planes = 0;             // planes of the recurrent product, if it runs on the matrix unit
  double weight_numbers = 0;  // numbers of the weights that a step reads
  double row_multiple = 1;
  // Whether loads from outside the L2 cache add to the time, which they do beside the matrix unit. For a backward pass
  // this would not improve the choice: workers that share the units of a step read and split each other's gradients,
  // which takes about as long.
  bool adds = false;

  // The cost for a worker with `rows` rows of a batch and a share of the units.
  double of(double rows, double batch, double share) const {
    if (planes == 0) {
      // A low tile is bound by loading the weights: two rows cost hardly more than one.
      const double computing = row_work * std::max(rows, std::min(2.0, batch)) * share;
      const double bytes = sizeof(float) * weight_numbers * share;  // as many as two bfloat16 numbers each
      return bytes > kCacheBytes ? std::max(computing, kLoadFarNumber * bytes / 2) : computing;
    }
    const double read = weight_numbers * planes * share;
    const bool far = 2 * read > kCacheBytes;
    const double loading = read * (far ? kLoadFarNumber : kLoadNumber);
    const double computing = row_work * std::ceil(rows / row_multiple) * row_multiple * share;
    return adds && far && rows <= kRowsThatWait ? computing + loading : std::max(computing, loading);
  }
};

// The cost of steps whose rows have `features` features beside h; `planes` as in StepCost. The matrix unit is that much
// faster than fused multiply-adds, so the cells weigh more.
StepCost step_cost(const LayerShape& shape, int64_t features, int planes, const UnitLimits& unit, bool adds) {
  const double gates = 4.0 * static_cast<double>(shape.hidden_size);
  const double products = gates * static_cast<double>(features + shape.output_size);
  // With several steps, one load of the input's weight serves many of them.
  const double read = shape.steps == 1 ? products : gates * static_cast<double>(shape.output_size);
  if (planes == 0) return {row_work(shape, features), 0, read};
  return {products / unit.speed[planes] + gates * kUnitCellFeatures, planes, read,
          static_cast<double>(unit.row_multiple), adds};
}

// The grid with the shortest estimated time. All workers share `other_work` evenly; `barriers` is how often the members
// of a team meet in a step. On a tie, more teams win over more members, because teams do not wait for each other.
WorkerGrid choose_grid(const LayerShape& shape, const Machine& machine, const StepCost& cost, double other_work,
                       int64_t barriers, int64_t most_teams) {
  const int64_t batch = divide_up(count_samples(shape), shape.steps);  // average rows of a step
  const double all_rows = static_cast<double>(batch);
  const double total = cost.of(all_rows, all_rows, 1.0) * static_cast<double>(shape.steps) + other_work;
  const int threads = std::max(1, std::min(machine.threads, static_cast<int>(std::min(total / kWorkPerThread, 1e6))));
  const int64_t blocks = divide_up(shape.hidden_size, machine.lanes);
  WorkerGrid best;
  best.work = total;
  double best_time = total;
  for (int batch_groups = static_cast<int>(std::min<int64_t>({threads, batch, most_teams})); batch_groups >= 1;
       --batch_groups) {
    for (int hidden_groups = 1; batch_groups * hidden_groups <= threads; ++hidden_groups) {
      if (hidden_groups > blocks) break;
      const double rows = static_cast<double>(divide_up(batch, batch_groups));
      const double share = static_cast<double>(divide_up(blocks, hidden_groups)) / static_cast<double>(blocks);
      const double step = cost.of(rows, all_rows, share);
      const double meet = hidden_groups > 1 ? kWorkPerBarrier * static_cast<double>(barriers) : 0.0;
      const double time =
          (step + meet) * static_cast<double>(shape.steps) + other_work / (batch_groups * hidden_groups);
      if (time < best_time * 0.98) {
        best_time = time;
        best.batch_groups = batch_groups;
        best.hidden_groups = hidden_groups;
      }
    }
  }
  return best;
}

// Whether both directions of a bidirectional layer run at the same time: if each has enough work for a thread, and both
// together need no more threads than there are. This holds for small layers with few rows.
bool directions_at_once(const Machine& machine, const WorkerGrid& grid) {
  return kDirections * grid.workers() <= machine.threads && grid.work >= kWorkPerThread;
}

// The number of barriers of a team in a step.
template <typename Params>
int64_t count_barriers(const Params& params) {
  return 1 + (params.shape.projected ? 1 : 0) + (params.options.normalised() ? 1 : 0);
}

// A worker's left operand is limited to this size, so that it stays in the L2 cache.
constexpr int64_t kUnitLeftNumbers = 512 * 1024;
constexpr int64_t kUnitRightNumbers = 3 * 512 * 1024;
constexpr int64_t kUnitOuterRows = 64;

bool enough_rows(const UnitLimits& least, int planes, int64_t rows, int64_t weight_numbers) {
  const bool far = 2.0 * planes * static_cast<double>(weight_numbers) > kWholeCacheBytes;
  return rows >= (far ? least.far_rows : least.rows)[planes];
}

// The planes with which a product of so many rows runs on the matrix unit, or 0. gate_planes: with a weight (4H,
// depth). column_planes: with any other matrix (depth, columns).
int gate_planes(const Machine& machine, int planes, int64_t rows, int64_t depth, int64_t hidden_size) {
  const UnitLimits& least = machine.unit;
  const bool worth_it = enough_rows(least, planes, rows, 4 * hidden_size * depth) &&
                        hidden_size >= least.units[planes] && depth >= kUnitTileDepth;
  return least.any() && worth_it ? planes : 0;
}
int column_planes(const Machine& machine, int planes, int64_t rows, int64_t depth, int64_t columns) {
  const UnitLimits& least = machine.unit;
  const bool worth_it =
      enough_rows(least, planes, rows, depth * columns) && columns >= least.columns[planes] && depth >= kUnitTileDepth;
  return least.any() && worth_it ? planes : 0;
}

// Up to this many rows of all steps together, weights are not packed for the matrix unit. 16-bit weights (`narrow`)
// need little work.
int64_t few_rows(int planes, bool narrow) { return !narrow ? kRowMajorRows : planes == 1 ? 7 : 15; }

// Up to this many rows of all steps together, packing the weights of a forward pass costs more than it saves; `planes`
// of the recurrent product. Large packed weights evict other data from the cache, so they pay only over several steps.
// Not measured with narrow registers.
int64_t row_major_rows(const LayerShape& shape, const Machine& machine, int planes, bool narrow) {
  if (narrow && planes > 0) return few_rows(planes, narrow);
  const int64_t numbers = 4 * shape.hidden_size * (shape.input_size + shape.output_size);
  if (planes > 0 || shape.steps == 1) return kRowMajorRows;
  if (shape.two_directions && numbers < 1'000'000) return numbers < 100'000 ? 12 : 20;
  if (numbers < 50'000) return numbers < 25'000 ? 8 : 20;
  return numbers > 200'000 && machine.lanes >= 8 ? 48 : kRowMajorRows;
}

// bfloat16 numbers in the planes of a (rows, depth) operand.
int64_t plane_numbers(int64_t rows, int64_t depth, int planes) {
  return round_up(rows, kUnitTileRows) * round_up(depth, kUnitTileDepth) * planes;
}

// The same for a sum that may be computed in pieces of k; the sums of all columns are kept in between.
void need_left_in_pieces(UnitScratch& scratch, int64_t rows, int64_t depth, int planes, int64_t column_tiles) {
  const int64_t row_tiles = std::min(divide_up(rows, kUnitTileRows), kMostUnitRows / kUnitTileRows);
  const int64_t k_tile = row_tiles * plane_numbers(1, 1, planes);
  const int64_t k_tiles = divide_up(depth, kUnitTileDepth);
  const int64_t most = std::max<int64_t>(1, kUnitLeftNumbers / k_tile);
  scratch.left_numbers = std::max(scratch.left_numbers, std::min(k_tiles, most) * k_tile);
  const int64_t width = k_tiles > most ? divide_up(column_tiles, 2) : kGateTiles;  // width of one of two buffers
  scratch.sums_numbers =
      std::max(scratch.sums_numbers, row_tiles * std::max(width, kGateTiles) * kUnitTileRows * kUnitTileRows);
}

// Makes room for the sums and for a left operand of so many rows, or as many of them as should be split at once.
void need_left(UnitScratch& scratch, int64_t rows, int64_t depth, int planes, int64_t column_tiles) {
  const int64_t tile = plane_numbers(1, depth, planes);
  const int64_t most = std::max<int64_t>(1, kUnitLeftNumbers / tile);
  const int64_t tiles = std::min({divide_up(rows, kUnitTileRows), most, kMostUnitRows / kUnitTileRows});
  scratch.left_numbers = std::max(scratch.left_numbers, tiles * tile);
  scratch.sums_numbers = std::max(scratch.sums_numbers, tiles * column_tiles * kUnitTileRows * kUnitTileRows);
}

// Reserves panels or planes of `units` units of a weight (4H, depth) that is multiplied with `rows` rows at once;
// returns 0 if it has none.
template <typename T>
int64_t reserve_gate_weight(Layout<T>& layout, bool pack, UnitProduct& unit, UnitScratch& scratch, int64_t units,
                            int64_t rows, int64_t depth) {
  if (unit.planes > 0) {
    unit.splits = layout.reserve_bytes(divide_up(units, kUnitTileRows));
    need_left(scratch, rows, depth, unit.planes, kGateTiles);
    return layout.reserve_bytes(2 * plane_numbers(4 * units, depth, unit.planes));
  }
  return pack ? layout.reserve(4 * units * depth) : 0;
}
template <typename T>
void reserve_scratch(Layout<T>& layout, UnitScratch& scratch, int64_t workers) {
  scratch.left = layout.reserve_bytes(workers * 2 * scratch.left_numbers);
  scratch.right = layout.reserve_bytes(workers * 2 * scratch.right_numbers);
  scratch.sums = layout.reserve_bytes(workers * 2 * static_cast<int64_t>(sizeof(float)) * scratch.sums_numbers);
}

// The scratch, in numbers, with which a worker sums the outer products for at most `rows` rows of a weight.
int64_t outer_product_scratch(int64_t lanes, int64_t rows) { return kSumBlock * (kTileColumns * lanes + rows); }

// The least number of rows of a chunk that share one read of W.
int64_t least_chunk_rows(const ForwardPlan& plan, int64_t weight_numbers) {
  const int planes = plan.input_unit.planes;
  if (planes == 0) return kChunkRows;
  const bool far = 2.0 * planes * static_cast<double>(weight_numbers) > kCacheBytes;
  return planes == 1 && far ? 2 * kUnitChunkRows : kUnitChunkRows;
}

// The number of steps in a chunk if only W x runs on the matrix unit, small enough that the unit does not slow those
// steps; 0 if there would be too few.
int64_t short_chunk_steps(const ForwardPlan& plan, const LayerShape& shape) {
  const int planes = plan.input_unit.planes;
  if (planes == 0 || plan.recurrent_unit.planes > 0) return 0;
  const int64_t columns = divide_up(divide_up(shape.hidden_size, kUnitTileRows), plan.grid.hidden_groups) * kGateTiles;
  const int64_t products = planes * (planes + 1) / 2 * columns * divide_up(shape.input_size, kUnitTileDepth);
  const int64_t steps = kShortUnitProducts / products * kUnitTileRows / plan.team_rows;
  return steps >= kShortUnitSteps ? steps : 0;
}

// Computing W x of many steps at once reads W once, but writes the sums to memory and reads them again. W is read in
// each step instead if a step has enough rows and one of two holds: the planes of both weights stay in the cache, or
// those of W are no larger than the traffic that this saves.
bool sums_input_in_steps(const ForwardPlan& plan, const LayerShape& shape, bool unfused) {
  const int planes = plan.recurrent_unit.planes;
  if (unfused || plan.pack_as_used || planes == 0 || plan.input_unit.planes != planes) return false;
  const int64_t gates = 4 * shape.hidden_size;
  const double of_input = 2.0 * static_cast<double>(plane_numbers(gates, shape.input_size, planes));
  const double both = of_input + 2.0 * static_cast<double>(plane_numbers(gates, shape.output_size, planes));
  const double sums = static_cast<double>(sizeof(float)) * static_cast<double>(gates * shape.batch);
  return shape.batch >= (planes == 1 ? kInputRowsOfOnePlane : kUnitTileRows) &&
         (both <= kWholeCacheBytes || of_input <= kWeightBytesOfSum * sums);
}

// A call of one step reads both weights once. If the cache does not hold both, the call takes the units in groups: both
// products of one group, then of the next. So the weights that a call used last belong to the units that the next call
// begins with; see GateProduct::Sweep.
template <typename T>
int64_t count_unit_groups(const ForwardPlan& plan, const ForwardParams<T>& params, const Machine& machine) {
  const LayerShape& shape = params.shape;
  if (shape.steps > 1 || shape.step_offsets || params.options.any() || plan.pack_as_used ||
      plan.input_unit.planes > 0 || plan.recurrent_unit.planes > 0) {
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
  const int planes = frozen ? frozen->planes : params.planes;
  const int recurrent_planes = gate_planes(machine, planes, shape.batch, P, H);
  const bool narrow = params.weights.narrow.kind != WeightKind::kOwn;
  plan.pack = frozen || samples > row_major_rows(shape, machine, recurrent_planes, narrow);
  // Decided by the size of the call, not by its share among threads: results do not depend on their number.
  if (plan.pack) plan.input_unit.planes = gate_planes(machine, planes, samples, I, H);
  if (plan.pack) plan.recurrent_unit.planes = recurrent_planes;
  plan.pack_as_used = !frozen && plan.pack && shape.steps == 1 && samples <= kMostUnitRows;
  plan.input_in_steps = sums_input_in_steps(plan, shape, options.any());
  plan.grid = choose_grid(shape, machine, step_cost(shape, I, plan.recurrent_unit.planes, machine.unit, true), 0.0,
                          count_barriers(params), plan.pack_as_used ? 1 : shape.batch);
  plan.directions_at_once = directions_at_once(machine, plan.grid);
  plan.unit_groups = count_unit_groups(plan, params, machine);
  const int64_t teams = plan.grid.batch_groups, workers = plan.grid.workers();

  const int64_t row_bytes = gates * static_cast<int64_t>(sizeof(T));
  plan.team_rows = divide_up(shape.batch, teams);
  int64_t chunk_steps = std::max(kChunkBytes / (plan.team_rows * row_bytes),
                                 divide_up(least_chunk_rows(plan, gates * I), plan.team_rows));
  if (const int64_t steps = short_chunk_steps(plan, shape)) chunk_steps = steps;
  if (plan.input_in_steps) chunk_steps = 1;  // room for rows that the matrix unit cannot split
  plan.chunk_rows = plan.team_rows * std::clamp<int64_t>(chunk_steps, 1, shape.steps);

  Layout<T> layout;
  layout.reserve_bytes(kBarrierBytes * (1 + teams));
  plan.barrier_bytes = layout.end;
  const int64_t padded = round_up(H, machine.lanes);
  UnitScratch& scratch = plan.unit_scratch;
  if (frozen) {
    if (const int p = plan.input_unit.planes) need_left(scratch, plan.chunk_rows, I, p, kGateTiles);
    if (const int p = plan.recurrent_unit.planes) need_left(scratch, plan.team_rows, P, p, kGateTiles);
  } else {
    // The units that have a place at once: all, or one block of each worker.
    const int64_t units = plan.pack_as_used ? workers * machine.lanes : padded;
    plan.input_panels = reserve_gate_weight(layout, plan.pack, plan.input_unit, scratch, units, plan.chunk_rows, I);
    plan.recurrent_panels =
        reserve_gate_weight(layout, plan.pack, plan.recurrent_unit, scratch, units, plan.team_rows, P);
    plan.bias = layout.reserve(gates);
    if (shape.projected) plan.projection_panels = layout.reserve(round_up(P, machine.lanes) * H);
  }
  if (plan.input_in_steps) {
    const int64_t depth = round_up(I, kUnitTileDepth) + round_up(P, kUnitTileDepth);
    need_left(scratch, plan.team_rows, depth, plan.recurrent_unit.planes, kGateTiles);
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
  return plan;
}

template <typename T>
FrozenPlan plan_frozen(const LayerShape& shape, const Machine& machine, int planes, WeightKind kind, int64_t first) {
  const int64_t H = shape.hidden_size, P = shape.output_size, I = shape.input_size;
  const int64_t padded = round_up(H, machine.lanes);
  FrozenPlan plan;
  plan.kind = kind;
  // The planes that any number of rows would use.
  const int64_t rows = machine.unit.rows[planes];
  plan.planes = rows < kNever ? gate_planes(machine, planes, rows, kUnitTileDepth, H) : 0;
  Layout<T> layout{round_up(first, kCacheLine)};
  const auto reserve = [&](int64_t depth) {
    FrozenPlan::Gates gates;
    const int64_t numbers = 4 * padded * depth;
    switch (kind) {
      case WeightKind::kOwn: gates.panels = layout.reserve(numbers); break;
      case WeightKind::kBFloat16:
      case WeightKind::kFloat16: gates.panels = layout.reserve_bytes(2 * numbers); break;
      case WeightKind::kInt8:
        gates.panels = layout.reserve_bytes(4 * padded * round_up(depth, 4));  // see byte_place
        gates.factors = layout.reserve(4 * H);
        break;
    }
    if (plan.planes > 0) {
      gates.splits = layout.reserve_bytes(divide_up(H, kUnitTileRows));
      gates.planes = layout.reserve_bytes(2 * plane_numbers(4 * padded, depth, plan.planes));
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

bool sums_gradients_once(const LayerShape& shape, int planes) {
  const int64_t numbers =
      plane_numbers(shape.input_size, shape.batch, planes) + plane_numbers(shape.output_size, shape.batch, planes);
  return shape.steps == 1 && shape.batch <= kSumBlock && numbers <= kUnitRightNumbers;
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
  const int row_planes = column_planes(machine, params.planes, shape.batch, gates, P);
  const bool narrow = params.weights.narrow.kind != WeightKind::kOwn;
  // Packing three planes pays for a few rows of several steps if the weights are large.
  const bool packs_soon =
      row_planes > 0 && (narrow || row_planes < 3 || (shape.steps > 1 && gates * (I + P) > 200'000));
  const int64_t few = packs_soon ? few_rows(row_planes, narrow) : std::max(kRowMajorRows, 4 * machine.lanes);
  // Unpacked weights of 16 bits are widened to float32 in each step.
  plan.pack = samples > few || (narrow && shape.steps > 1);
  // A single step uses U only for the gradients of the states before it.
  plan.pack_recurrent = plan.pack && (shape.steps > 1 || params.grad_h0 || params.grad_reset_h);
  if (plan.pack_recurrent) plan.recurrent_unit.planes = column_planes(machine, params.planes, shape.batch, gates, P);
  if (plan.recurrent_unit.planes > 0) other_work /= machine.unit.speed[plan.recurrent_unit.planes];
  plan.grid = choose_grid(shape, machine, step_cost(shape, 0, plan.recurrent_unit.planes, machine.unit, false),
                          other_work, count_barriers(params), shape.batch);
  plan.directions_at_once = !params.grad_input.data && directions_at_once(machine, plan.grid);
  const int64_t workers = plan.grid.workers();
  plan.team_rows = divide_up(shape.batch, plan.grid.batch_groups);

  Layout<T> layout;
  layout.reserve_bytes(kBarrierBytes * (1 + plan.grid.batch_groups));
  plan.barrier_bytes = layout.end;
  // The shared left factor of both weights is split once.
  const bool one_left = params.grad_weight_ih && params.grad_weight_hh && !options.normalised();
  const int64_t outer_columns = one_left ? I + P : std::min(I, P);
  if (plan.pack) plan.outer_unit.planes = column_planes(machine, params.planes, samples, samples, outer_columns);
  // The matrix unit adds to memory every kSumBlock samples in any case.
  const int64_t most_samples = plan.outer_unit.planes > 0 ? kSumBlock : kMostSamples;
  plan.chunk_rows = divide_up(std::clamp(H, kLeastSamples, most_samples), shape.batch) * shape.batch;
  if (2 * plan.chunk_rows >= samples) plan.chunk_rows = samples;
  // Each member packs its own slice of columns, which begins at a multiple of the lanes.
  UnitScratch& scratch = plan.unit_scratch;
  const auto reserve_weight = [&](UnitProduct& unit, int64_t rows, int64_t depth, int64_t columns) -> int64_t {
    if (plan.pack) unit.planes = column_planes(machine, params.planes, rows, depth, columns);
    if (unit.planes > 0) {
      unit.splits = layout.reserve_bytes(divide_up(columns, kUnitTileRows));
      need_left_in_pieces(scratch, rows, depth, unit.planes, divide_up(columns, kUnitTileRows));
      return layout.reserve_bytes(2 * plane_numbers(columns, depth, unit.planes));
    }
    return plan.pack ? layout.reserve(round_up(columns, machine.lanes) * depth) : 0;
  };
  if (plan.pack_recurrent) plan.recurrent_panels = reserve_weight(plan.recurrent_unit, shape.batch, gates, P);
  if (shape.projected) plan.projection_panels = reserve_weight(plan.projection_unit, shape.batch, P, H);
  if (params.grad_input.data) {
    plan.input_panels = reserve_weight(plan.input_unit, std::min(plan.chunk_rows, kUnitInputRows), gates, I);
  }
  if (plan.outer_unit.planes > 0) {
    const int planes = plan.outer_unit.planes;
    const int64_t columns = std::max({I, P, shape.projected ? H : 0});
    const int64_t depth = std::min(kSumBlock, plan.chunk_rows);
    need_left(scratch, kUnitOuterRows, depth, planes, kGateTiles);
    const int64_t whole = plane_numbers(columns, depth, planes);
    const int64_t one = plane_numbers(columns, kUnitTileDepth, planes);
    const int64_t both = plane_numbers(I, depth, planes) + plane_numbers(P, depth, planes);  // see add_outer_planes
    scratch.right_numbers = std::min(whole, std::max(one, kUnitRightNumbers / one * one));
    if (both <= kUnitRightNumbers) scratch.right_numbers = std::max(scratch.right_numbers, both);
  }
  plan.partial_sums = layout.reserve(shape.batch * H);
  plan.outer_product_size = outer_product_scratch(machine.lanes, divide_up(gates, workers));
  plan.outer_products = layout.reserve(workers * plan.outer_product_size);

  const int64_t buffer_rows = (plan.chunk_rows == samples ? 1 : 2) * plan.chunk_rows;
  const int64_t element_size = sizeof(T);
  plan.gate_stride = gates * element_size % 1024 == 0 ? gates + kCacheLine / element_size : gates;
  plan.grad_preactivations = layout.reserve(buffer_rows * plan.gate_stride);
  if (shape.projected) plan.grad_hidden = layout.reserve(buffer_rows * P);
  if (shape.step_offsets || shape.resets || options.any() || recomputes || plan.outer_unit.planes > 0) {
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
    plan.norm_sums = layout.reserve(2 * workers * kNormSums * H);
  }
  if (recomputes) {
    const int64_t padded = round_up(H, machine.lanes);
    plan.recomputed_gate_values = layout.reserve(plan.chunk_rows * gates);
    if (shape.projected) plan.recomputed_hidden = layout.reserve(buffer_rows * H);
    const auto reserve_gates = [&](UnitProduct& unit, int64_t depth) {
      if (plan.pack) unit.planes = gate_planes(machine, params.planes, samples, depth, H);
      return reserve_gate_weight(layout, plan.pack, unit, scratch, padded, plan.chunk_rows, depth);
    };
    plan.recompute_input_panels = reserve_gates(plan.recompute_input_unit, I);
    plan.recompute_recurrent_panels = reserve_gates(plan.recompute_recurrent_unit, P);
    plan.recompute_bias = layout.reserve(workers * gates);
    plan.recompute_lists = layout.reserve_pointers(workers * 3 * plan.chunk_rows);
  }
  reserve_scratch(layout, scratch, workers);
  plan.workspace_bytes = layout.end;
  return plan;
}

template ForwardPlan plan_forward(const ForwardParams<float>&, const Machine&);
template ForwardPlan plan_forward(const ForwardParams<double>&, const Machine&);
template FrozenPlan plan_frozen<float>(const LayerShape&, const Machine&, int, WeightKind, int64_t);
template FrozenPlan plan_frozen<double>(const LayerShape&, const Machine&, int, WeightKind, int64_t);
template BackwardPlan plan_backward(const BackwardParams<float>&, const Machine&);
template BackwardPlan plan_backward(const BackwardParams<double>&, const Machine&);

}  // namespace lstm_ext::cpu
