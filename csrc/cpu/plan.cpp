#include "cpu/plan.h"

#include <algorithm>

namespace lstm_ext::cpu {
namespace {

// Work is counted in fused multiply-adds of one number. The constants were chosen by trial on an AVX-512 machine of two
// cores; they only steer, nothing depends on them for correctness.
constexpr double kWorkPerThread = 6e5;       // below this a thread costs more than it brings
constexpr double kWorkPerBarrier = 6e4;      // what a barrier between team members costs
constexpr int64_t kRowMajorRows = 32;        // up to here packing costs more than it saves
constexpr int64_t kRowMajorBatch = 2;        // a tile this low loads as much as the row-major path
constexpr int64_t kChunkBytes = 256 * 1024;  // preactivations of a chunk stay in the L2 cache
constexpr int64_t kChunkRows = 48;           // ... but the weights must be used often enough
constexpr int64_t kCacheLine = 64;
// Samples (time x batch) of a backward chunk: H within these bounds. Each chunk adds to the weight gradients in memory
// once, so larger weights are better off with longer chunks. Its gradients should stay in cache, so smaller ones are
// better off with shorter ones.
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

// The work of one row of one time step: the products with so many input features, with h and of the projection, and
// about as much for the cell as for 8 more features.
double row_work(const LayerShape& shape, int64_t features) {
  const int64_t products = 4 * shape.hidden_size * (features + shape.output_size + 8);
  return static_cast<double>(products + (shape.projected ? shape.hidden_size * shape.output_size : 0));
}

// The grid with the shortest estimated time. `row_work` is what one time step costs for one row, `other_work` what all
// workers share evenly, `barriers` how often members of a team meet in a step. Many teams come before many members:
// what is as fast on paper should not have to wait.
WorkerGrid choose_grid(const LayerShape& shape, const Machine& machine, double row_work, double other_work,
                       int64_t barriers) {
  const int64_t batch = divide_up(count_samples(shape), shape.steps);  // of a step, on average
  const double total = row_work * static_cast<double>(batch * shape.steps) + other_work;
  const int threads = std::max(1, std::min(machine.threads, static_cast<int>(std::min(total / kWorkPerThread, 1e6))));
  const int64_t blocks = divide_up(shape.hidden_size, machine.lanes);
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

// How often the members of a team meet in a step.
template <typename Params>
int64_t count_barriers(const Params& params) {
  return 1 + (params.shape.projected ? 1 : 0) + (params.options.normalised() ? 1 : 0);
}

// Numbers of scratch with which a worker adds up the outer products for at most so many rows of a weight.
int64_t outer_product_scratch(int64_t lanes, int64_t rows) { return kSumBlock * (kTileColumns * lanes + rows); }

}  // namespace

template <typename T>
ForwardPlan plan_forward(const ForwardParams<T>& params, const Machine& machine) {
  const LayerShape& shape = params.shape;
  const StepOptions<T>& options = params.options;
  const int64_t H = shape.hidden_size, P = shape.output_size, I = shape.input_size;
  const int64_t gates = 4 * H;
  ForwardPlan plan;
  plan.grid = choose_grid(shape, machine, row_work(shape, I), 0.0, count_barriers(params));
  const int64_t teams = plan.grid.batch_groups, workers = plan.grid.workers();
  const int64_t samples = count_samples(shape);
  plan.pack_input = samples > kRowMajorRows;
  plan.pack_recurrent = plan.pack_input && shape.batch > kRowMajorBatch;

  const int64_t row_bytes = gates * static_cast<int64_t>(sizeof(T));
  plan.team_rows = divide_up(shape.batch, teams);
  const int64_t chunk_steps =
      std::max(kChunkBytes / (plan.team_rows * row_bytes), divide_up(kChunkRows, plan.team_rows));
  plan.chunk_rows = plan.team_rows * std::clamp<int64_t>(chunk_steps, 1, shape.steps);

  Layout<T> layout;
  layout.reserve_bytes(kBarrierBytes * (1 + teams));
  plan.barrier_bytes = layout.end;
  const int64_t padded = round_up(H, machine.lanes);
  if (plan.pack_input) plan.input_panels = layout.reserve(4 * padded * I);
  if (plan.pack_recurrent) plan.recurrent_panels = layout.reserve(4 * padded * P);
  plan.bias = layout.reserve(gates);
  if (shape.projected) {
    plan.projection_panels = layout.reserve(round_up(P, machine.lanes) * H);
    if (!params.hidden) plan.hidden = layout.reserve(shape.batch * H);
  }
  if (!params.kept_input_part()) plan.preactivations = layout.reserve(teams * plan.chunk_rows * gates);
  // For each worker, lists of the rows of the input and of the preactivations in a chunk.
  if (shape.step_offsets) plan.row_lists = layout.reserve_pointers(workers * 2 * plan.chunk_rows);
  if (shape.resets || options.any()) {  // and of h_{t-1} and c_{t-1} in a step, and zeros
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
BackwardPlan plan_backward(const BackwardParams<T>& params, const Machine& machine) {
  const LayerShape& shape = params.shape;
  const StepOptions<T>& options = params.options;
  const bool recomputes = !params.gate_values;
  const int64_t H = shape.hidden_size, P = shape.output_size, I = shape.input_size;
  const int64_t gates = 4 * H;
  const int64_t samples = count_samples(shape);
  const double other_work = static_cast<double>(samples) * static_cast<double>(gates) * static_cast<double>(2 * I + P);
  BackwardPlan plan;
  plan.grid = choose_grid(shape, machine, row_work(shape, 0), other_work, count_barriers(params));
  const int64_t workers = plan.grid.workers();
  plan.pack = samples > kRowMajorRows;
  plan.team_rows = divide_up(shape.batch, plan.grid.batch_groups);

  Layout<T> layout;
  layout.reserve_bytes(kBarrierBytes * (1 + plan.grid.batch_groups));
  plan.barrier_bytes = layout.end;
  // Each member packs its own slice of columns, which begins at a multiple of the lanes.
  if (plan.pack) {
    plan.recurrent_panels = layout.reserve(round_up(P, machine.lanes) * gates);
    if (shape.projected) plan.projection_panels = layout.reserve(round_up(H, machine.lanes) * P);
    if (params.grad_input.data) plan.input_panels = layout.reserve(round_up(I, machine.lanes) * gates);
  }
  plan.partial_sums = layout.reserve(shape.batch * H);
  plan.outer_product_size = outer_product_scratch(machine.lanes, divide_up(gates, workers));
  plan.outer_products = layout.reserve(workers * plan.outer_product_size);

  plan.chunk_rows = divide_up(std::clamp(H, kLeastSamples, kMostSamples), shape.batch) * shape.batch;
  if (2 * plan.chunk_rows >= samples) plan.chunk_rows = samples;
  const int64_t buffer_rows = (plan.chunk_rows == samples ? 1 : 2) * plan.chunk_rows;
  const int64_t element_size = sizeof(T);
  plan.gate_stride = gates * element_size % 1024 == 0 ? gates + kCacheLine / element_size : gates;
  plan.grad_preactivations = layout.reserve(buffer_rows * plan.gate_stride);
  if (shape.projected) plan.grad_hidden = layout.reserve(buffer_rows * P);
  if (shape.step_offsets || shape.resets || options.any() || recomputes) {
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
    if (plan.pack) {
      plan.recompute_input_panels = layout.reserve(4 * padded * I);
      plan.recompute_recurrent_panels = layout.reserve(4 * padded * P);
    }
    plan.recompute_bias = layout.reserve(workers * gates);
    plan.recompute_lists = layout.reserve_pointers(workers * 3 * plan.chunk_rows);
  }
  plan.workspace_bytes = layout.end;
  return plan;
}

template ForwardPlan plan_forward(const ForwardParams<float>&, const Machine&);
template ForwardPlan plan_forward(const ForwardParams<double>&, const Machine&);
template BackwardPlan plan_backward(const BackwardParams<float>&, const Machine&);
template BackwardPlan plan_backward(const BackwardParams<double>&, const Machine&);

}  // namespace lstm_ext::cpu
