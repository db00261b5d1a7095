#include "cpu/plan.h"

#include <algorithm>

namespace lstm_ext::cpu {
namespace {

// Work is counted in fused multiply-adds of one number. The constants were chosen by trial on an
// AVX-512 machine of two cores; they only steer, nothing depends on them for correctness.
constexpr double kWorkPerThread = 6e5;       // below this a thread costs more than it brings
constexpr double kWorkPerBarrier = 6e4;      // what a barrier between team members costs
constexpr int64_t kRowMajorRows = 32;        // up to here packing costs more than it saves
constexpr int64_t kRowMajorBatch = 2;        // a tile this low loads as much as the row-major path
constexpr int64_t kChunkBytes = 256 * 1024;  // pre-activations of a chunk stay in the L2 cache
constexpr int64_t kChunkRows = 48;           // ... but the weights must be used often enough
constexpr int64_t kCacheLine = 64;
constexpr int64_t kPointerBytes = sizeof(void*);
// Samples (time x batch) of a backward chunk, H within these bounds. Each chunk adds to the weight
// gradients in memory once, so larger weights want longer chunks; its gate gradients should stay in
// cache, so smaller ones want shorter.
constexpr int64_t kLeastSamples = 256;
constexpr int64_t kMostSamples = 1024;

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows of all steps together.
int64_t samples_of(const LayerShape& s) { return s.step_offsets ? s.step_offsets[s.steps] : s.steps * s.batch; }

struct Layout {
  int64_t end = 0;
  int64_t reserve(int64_t bytes) {
    const int64_t at = end;
    end += round_up(bytes, 64);
    return at;
  }
};

// One row of one time step: the products with so many input features, with h and of the projection,
// and about as much for the cell update as for 8 more features.
double row_work(const LayerShape& s, int64_t features) {
  const int64_t products = 4 * s.hidden_size * (features + s.output_size + 8);
  return static_cast<double>(products + (s.projected ? s.hidden_size * s.output_size : 0));
}

// The grid with the shortest estimated time. `row_work` is what one time step costs for one row,
// `other_work` what all workers share evenly, `barriers` how often members of a team meet in a step.
// Many teams come before many members: what is as fast on paper should not have to wait.
WorkerGrid choose_grid(const LayerShape& s, const Machine& m, double row_work, double other_work, int64_t barriers) {
  const int64_t batch = divide_up(samples_of(s), s.steps);  // of a step, on average
  const double total = row_work * static_cast<double>(batch * s.steps) + other_work;
  const int threads = std::max(1, std::min(m.threads, static_cast<int>(std::min(total / kWorkPerThread, 1e6))));
  const int64_t blocks = divide_up(s.hidden_size, m.lanes);
  WorkerGrid best;
  double best_time = total;
  for (int batch_groups = static_cast<int>(std::min<int64_t>(threads, batch)); batch_groups >= 1; --batch_groups) {
    for (int hidden_groups = 1; batch_groups * hidden_groups <= threads; ++hidden_groups) {
      if (hidden_groups > blocks) break;
      const double rows = static_cast<double>(divide_up(batch, batch_groups));
      const double share = static_cast<double>(divide_up(blocks, hidden_groups)) / static_cast<double>(blocks);
      // A low tile is bound by loading the weights: two rows cost hardly more than one.
      const double step = row_work * std::max(rows, std::min<double>(2.0, batch)) * share;
      const double meet = hidden_groups > 1 ? kWorkPerBarrier * static_cast<double>(barriers) : 0.0;
      const double time = (step + meet) * static_cast<double>(s.steps) + other_work / (batch_groups * hidden_groups);
      if (time < best_time * 0.98) {
        best_time = time;
        best.batch_groups = batch_groups;
        best.hidden_groups = hidden_groups;
      }
    }
  }
  return best;
}

// How often the members of a team meet in a step.
int64_t barriers(const LayerShape& s, const PlannedExtras& extras) {
  return 1 + (s.projected ? 1 : 0) + (extras.norm ? 1 : 0);
}

}  // namespace

ForwardPlan plan_forward(const LayerShape& s, const Machine& m, bool save, const PlannedExtras& extras) {
  ForwardPlan plan;
  const int64_t gates = 4 * s.hidden_size;
  plan.grid = choose_grid(s, m, row_work(s, s.input_size), 0.0, barriers(s, extras));
  const int64_t samples = samples_of(s);
  plan.pack_input = samples > kRowMajorRows;
  plan.pack_recurrent = plan.pack_input && s.batch > kRowMajorBatch;

  const int64_t row_bytes = gates * m.element_size;
  const int64_t team_rows = divide_up(s.batch, plan.grid.batch_groups);  // in a step, at most
  const int64_t chunk_steps = std::max(kChunkBytes / (team_rows * row_bytes), divide_up(kChunkRows, team_rows));
  plan.chunk_rows = team_rows * std::clamp<int64_t>(chunk_steps, 1, s.steps);

  const int64_t padded = round_up(s.hidden_size, m.lanes);
  Layout layout;
  layout.reserve(kBarrierBytes * (1 + plan.grid.batch_groups));
  plan.barrier_bytes = layout.end;
  if (plan.pack_input) plan.input_panels = layout.reserve(4 * padded * s.input_size * m.element_size);
  if (plan.pack_recurrent) plan.recurrent_panels = layout.reserve(4 * padded * s.output_size * m.element_size);
  plan.bias = layout.reserve(gates * m.element_size);
  if (s.projected) {
    plan.projection_panels = layout.reserve(round_up(s.output_size, m.lanes) * s.hidden_size * m.element_size);
    if (!save) plan.hidden = layout.reserve(s.batch * s.hidden_size * m.element_size);
  }
  if (!save) {
    plan.pre_activations = layout.reserve(plan.grid.batch_groups * plan.chunk_rows * row_bytes);
  }
  if (s.step_offsets) {  // per worker, a list of rows of the input and one of pre-activations
    plan.row_lists = layout.reserve(plan.grid.workers() * 2 * plan.chunk_rows * kPointerBytes);
  }
  const int64_t workers = plan.grid.workers();
  if (s.resets || extras.change_steps()) {  // per worker, lists of h_{t-1} and c_{t-1} of the team's rows, and zeros
    plan.state_lists = layout.reserve(workers * 2 * team_rows * kPointerBytes);
    plan.zero_rows = layout.reserve(workers * row_bytes);
  }
  if (extras.recurrent_mask) plan.masked_h = layout.reserve(workers * team_rows * s.output_size * m.element_size);
  if (extras.norm) {
    plan.visible_cells = layout.reserve(workers * kNormRows * s.hidden_size * m.element_size);
    if (!save) plan.recurrent_parts = layout.reserve(plan.grid.batch_groups * team_rows * row_bytes);
  }
  plan.workspace_bytes = layout.end;
  return plan;
}

BackwardPlan plan_backward(const LayerShape& s, const Machine& m, bool want_grad_input, bool want_grad_reset_h,
                           const PlannedExtras& extras) {
  BackwardPlan plan;
  const int64_t gates = 4 * s.hidden_size;
  const double other_work = static_cast<double>(samples_of(s)) * static_cast<double>(gates) *
                            static_cast<double>(2 * s.input_size + s.output_size);
  plan.grid = choose_grid(s, m, row_work(s, 0), other_work, barriers(s, extras));
  const int64_t samples = samples_of(s);
  plan.pack = samples > kRowMajorRows;

  Layout layout;
  layout.reserve(kBarrierBytes * (1 + plan.grid.batch_groups));
  plan.barrier_bytes = layout.end;
  // Each member packs its own slice of columns, which begins at a multiple of the lanes.
  if (plan.pack) {
    plan.recurrent_panels = layout.reserve(round_up(s.output_size, m.lanes) * gates * m.element_size);
    if (s.projected) {
      plan.projection_panels = layout.reserve(round_up(s.hidden_size, m.lanes) * s.output_size * m.element_size);
    }
    if (want_grad_input) {
      plan.input_panels = layout.reserve(round_up(s.input_size, m.lanes) * gates * m.element_size);
    }
  }
  plan.partial_sums = layout.reserve(s.batch * s.hidden_size * m.element_size);
  plan.outer_products = layout.reserve(
      plan.grid.workers() * outer_product_scratch(m.lanes, divide_up(gates, plan.grid.workers())) * m.element_size);
  const int64_t wanted_rows = std::clamp(s.hidden_size, kLeastSamples, kMostSamples);
  plan.chunk_rows = divide_up(wanted_rows, s.batch) * s.batch;
  if (2 * plan.chunk_rows >= samples) plan.chunk_rows = samples;
  const int64_t kept_rows = (plan.chunk_rows == samples ? 1 : 2) * plan.chunk_rows;
  plan.gate_row = gates * m.element_size % 1024 == 0 ? gates + kCacheLine / m.element_size : gates;
  plan.grad_gates = layout.reserve(kept_rows * plan.gate_row * m.element_size);
  if (s.projected) plan.grad_hidden = layout.reserve(kept_rows * s.output_size * m.element_size);
  if (s.step_offsets || s.resets || extras.change_steps() || extras.rebuild) {
    // Per worker, a list of the rows of h_{t-1}, and a row of zeros.
    plan.row_lists = layout.reserve(plan.grid.workers() * plan.chunk_rows * kPointerBytes);
    plan.zero_rows = layout.reserve(plan.grid.workers() * plan.gate_row * m.element_size);
  }
  if (s.resets) {  // per worker, a list of the gate gradients of the team's rows in a step
    plan.state_lists = layout.reserve(plan.grid.workers() * divide_up(s.batch, plan.grid.batch_groups) * kPointerBytes);
    if (want_grad_reset_h) plan.reset_gates = layout.reserve(s.batch * plan.gate_row * m.element_size);
  }
  const int64_t workers = plan.grid.workers();
  if (extras.change_steps()) plan.grad_h = layout.reserve(s.batch * s.hidden_size * m.element_size);
  if (extras.zoneout_h) {
    plan.kept_h = layout.reserve(s.batch * s.output_size * m.element_size);
    if (want_grad_reset_h) plan.reset_kept_h = layout.reserve(s.batch * s.output_size * m.element_size);
  }
  if (extras.recurrent_mask) plan.masked_h = layout.reserve(kept_rows * s.output_size * m.element_size);
  if (extras.norm) {
    plan.grad_input_part = layout.reserve(kept_rows * plan.gate_row * m.element_size);
    plan.norm_rows = layout.reserve(workers * (kNormRows + 1) * s.hidden_size * m.element_size);
    plan.norm_sums = layout.reserve(2 * workers * kNormSums * s.hidden_size * m.element_size);
  }
  if (extras.rebuild) {
    const int64_t padded = round_up(s.hidden_size, m.lanes);
    plan.rebuilt_gates = layout.reserve(plan.chunk_rows * gates * m.element_size);
    if (s.projected) plan.rebuilt_hidden = layout.reserve(kept_rows * s.hidden_size * m.element_size);
    if (plan.pack) {
      plan.rebuilt_input_panels = layout.reserve(4 * padded * s.input_size * m.element_size);
      plan.rebuilt_recurrent_panels = layout.reserve(4 * padded * s.output_size * m.element_size);
    }
    plan.rebuilt_bias = layout.reserve(workers * gates * m.element_size);
    plan.rebuilt_lists = layout.reserve(workers * 3 * plan.chunk_rows * kPointerBytes);
  }
  plan.workspace_bytes = layout.end;
  return plan;
}

}  // namespace lstm_ext::cpu
