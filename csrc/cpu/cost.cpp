#include "cpu/cost.h"

#include <algorithm>
#include <cmath>

namespace lstm_ext::cpu {
namespace {

// The work of one row of one time step: the products with `features` input features, with h, and of the projection. The
// cell costs about as much as 8 more features.
double row_work(const LayerShape& shape, int64_t features) {
  const int64_t products = 4 * shape.hidden_size * (features + shape.output_size + 8);
  return static_cast<double>(products + (shape.projected ? shape.hidden_size * shape.output_size : 0));
}

double thread_cost(const Machine& machine) { return machine.worker_costs * kWorkPerThread; }
double barrier_cost(const Machine& machine, int members) {
  return members > 1 ? machine.worker_costs * (kWorkPerBarrier + kWorkPerFurtherMember * (members - 2)) : 0;
}

bool enough_rows(const EngineLimits& least, int bf16_parts, int64_t rows, int64_t weight_numbers) {
  const bool far = 2.0 * bf16_parts * static_cast<double>(weight_numbers) > kWholeCacheBytes;
  return rows >= (far ? least.far_rows : least.rows)[bf16_parts];
}

}  // namespace

double StepCost::of(double rows, double batch, double share) const {
  if (bf16_parts == 0) {
    // A low tile is bound by loading the weights: two rows cost hardly more than one.
    const double computing = row_work * std::max(rows, std::min(2.0, batch)) * share;
    const double bytes = sizeof(float) * weight_numbers * share;  // as many as two bfloat16 numbers each
    return bytes > kCacheBytes ? std::max(computing, kLoadFarNumber * bytes / 2) : computing;
  }
  const double read = weight_numbers * bf16_parts * share;
  const bool far = 2 * read > kCacheBytes;
  const double loading = read * (far ? kLoadFarNumber : kLoadNumber);
  const double computing = row_work * std::ceil(rows / row_multiple) * row_multiple * share;
  return adds && far && rows <= kRowsThatWait ? computing + loading : std::max(computing, loading);
}

// The tile engine is that much faster than fused multiply-adds, so the cells weigh more.
StepCost step_cost(const LayerShape& shape, int64_t features, int bf16_parts, const EngineLimits& engine, bool adds) {
  const double gates = 4.0 * static_cast<double>(shape.hidden_size);
  const double products = gates * static_cast<double>(features + shape.output_size);
  // With several steps, one load of the input's weight serves many of them.
  const double read = shape.steps == 1 ? products : gates * static_cast<double>(shape.output_size);
  if (bf16_parts == 0) return {row_work(shape, features), 0, read};
  return {products / engine.speed[bf16_parts] + gates * kEngineCellFeatures, bf16_parts, read,
          static_cast<double>(engine.row_multiple), adds};
}

// On a tie, more teams win over more members, because teams do not wait for each other.
WorkerGrid choose_grid(const LayerShape& shape, const Machine& machine, const StepCost& cost, double other_work,
                       int64_t barriers, int64_t most_teams) {
  const int64_t batch = divide_up(count_samples(shape), shape.steps);  // average rows of a step
  const double all_rows = static_cast<double>(batch);
  const double total = cost.of(all_rows, all_rows, 1.0) * static_cast<double>(shape.steps) + other_work;
  const double most = std::min(total / thread_cost(machine), 1e6);
  const int threads = std::max(1, std::min(machine.threads, static_cast<int>(most)));
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
      const double meet = barrier_cost(machine, hidden_groups) * static_cast<double>(barriers);
      const int workers = batch_groups * hidden_groups;
      const double work = step * static_cast<double>(shape.steps) + other_work / workers;
      const double time = work + meet * static_cast<double>(shape.steps);
      if (time < best_time * 0.98) {
        best_time = time;
        best.batch_groups = batch_groups;
        best.hidden_groups = hidden_groups;
      }
    }
  }
  return best;
}

// They do if each has enough work for a thread, and both together need no more threads than there are: small layers
// with few rows.
bool directions_at_once(const Machine& machine, const WorkerGrid& grid) {
  const int workers = kDirections * grid.workers();
  return workers <= machine.threads && grid.work >= grid.workers() * thread_cost(machine);
}

int gate_bf16_parts(const Machine& machine, int bf16_parts, int64_t rows, int64_t depth, int64_t hidden_size) {
  const EngineLimits& least = machine.engine;
  const bool worth_it = enough_rows(least, bf16_parts, rows, 4 * hidden_size * depth) &&
                        hidden_size >= least.units[bf16_parts] && depth >= kEngineTileDepth;
  return least.any() && worth_it ? bf16_parts : 0;
}
int column_bf16_parts(const Machine& machine, int bf16_parts, int64_t rows, int64_t depth, int64_t columns) {
  const EngineLimits& least = machine.engine;
  const bool worth_it = enough_rows(least, bf16_parts, rows, depth * columns) && columns >= least.columns[bf16_parts] &&
                        depth >= kEngineTileDepth;
  return least.any() && worth_it ? bf16_parts : 0;
}

// 16-bit weights (`narrow`) need little work.
int64_t few_rows(int bf16_parts, bool narrow) { return !narrow ? kRowMajorRows : bf16_parts == 1 ? 7 : 15; }

// Large packed weights evict other data from the cache, so they pay only over several steps.
int64_t row_major_rows(const LayerShape& shape, const Machine& machine, int bf16_parts, bool narrow, bool options) {
  if (narrow && bf16_parts > 0) return few_rows(bf16_parts, narrow);
  if (bf16_parts > 0 || shape.steps == 1) return kRowMajorRows;
  const int64_t numbers = 4 * shape.hidden_size * (shape.input_size + shape.output_size);
  const auto first = [&](const auto& limits) {
    for (const RowMajorLimit& limit : limits) {
      if (numbers < limit.numbers) return limit.rows;
    }
    return machine.lanes >= 8 ? kRowMajorOfLarge : kRowMajorRows;
  };
  if (shape.two_directions) return first(kRowMajorOfTwo);
  const int64_t rows = first(kRowMajorOfOne);
  return options ? std::max(rows, kRowMajorRows) : rows;
}

}  // namespace lstm_ext::cpu
