// Plans a call: which path, how many workers, what each owns, and the places in the workspace. Pure functions of a call
// and of facts of the machine, so that tests can call them with any values.
#pragma once

#include <cstdint>

#include "contract/params.h"
#include "contract/visibility.h"

namespace lstm_ext::cpu {

constexpr int64_t kNever = int64_t{1} << 62;  // rows that no call has

// The least sizes at which a product pays on the tile engine, by the number of bf16 parts of its operands: see
// bf16_split.h.
struct EngineLimits {
  int64_t rows[4];      // rows of a step; all 0 without a tile engine
  int64_t far_rows[4];  // the same if the second-level cache does not hold the weight
  int64_t units[4];     // hidden units, if a weight (4H, n) is the right operand
  int64_t columns[4];   // columns of any other right operand
  // Its approximate speed relative to fused multiply-adds; it computes a multiple of row_multiple rows.
  double speed[4];
  int64_t row_multiple;
  bool tiles;  // AMX; else an instruction for pairs in vector registers, which takes one bf16 part

  bool any() const { return rows[1] > 0; }
};

// Found by trial on an AVX-512 machine of two cores, November 2026. Their unit is one fused multiply-add of one number,
// as for all work.
constexpr double kWorkPerThread = 6e5;   // with less work a thread costs more than it gains
constexpr double kWorkPerBarrier = 6e4;  // the cost of a barrier between two team members
// Each member beyond two adds this to the cost of a barrier: a cache line goes to the member, and to those that wait,
// in 80 ns from core to core. Nobody has measured more than two.
constexpr double kWorkPerFurtherMember = 7200;

struct Machine {
  int64_t lanes;  // numbers in a SIMD register
  int threads;    // threads the caller may use
  EngineLimits engine{};
  double worker_costs = 1;  // what workers cost, as a multiple of the constants; less in tests
};

// A product's use of the tile engine; see bf16_split.h. All 0 if it does not run there.
struct EngineProduct {
  int bf16_parts = 0;     // bf16 parts of its operands; 0: not on the tile engine
  int64_t all_split = 0;  // place of a flag for each 16 columns of the right operand
};

// A worker's scratch for products on the tile engine.
struct EngineScratch {
  int64_t left = 0, left_numbers = 0;  // place, and bfloat16 numbers
  int64_t right = 0, right_numbers = 0;
  int64_t sums = 0, sums_numbers = 0;  // place of two buffers, and float32 numbers in one
  bool in_tiles = false;               // EngineLimits::tiles
};

// Workers form a grid of batch_groups teams of hidden_groups members. Each team owns a slice of the batch for all time
// steps; each member owns a slice of the hidden units of the team's rows. Teams do not wait for each other inside the
// time loop, except once a chunk in the backward pass. Members wait for each other once a step, and once more each with
// a projection and with layer normalisation.
// A team's rows lie side by side. In packed data, whose first rows run longest, a team has every batch_groups-th row,
// so that all teams have equal work in every step.
struct WorkerGrid {
  int batch_groups = 1;
  int hidden_groups = 1;
  double work = 0;  // the call's work, in fused multiply-adds of one number
  int workers() const { return batch_groups * hidden_groups; }
};

// Places in the workspace are byte offsets; a place that a call does not need is 0. Barriers come first: that
// of all workers, then those of the teams.
struct ForwardPlan {
  WorkerGrid grid;
  bool pack = false;            // W and U as gate-interleaved panels or as bf16 parts; else they are read row-major
  bool pack_as_used = false;    // both block by block, because the call uses them once: see GateWeight
  bool input_in_steps = false;  // W x of a step is summed with its U h on the tile engine
  // Both directions of a bidirectional layer may run at the same time, each on the workers of its plan.
  bool directions_at_once = false;
  int64_t unit_groups = 1;    // groups of hidden units: a step multiplies W x and U h group by group
  int64_t team_rows = 0;      // batch rows of a team in a step, at most
  int64_t chunk_rows = 0;     // rows (steps x batch rows) of a team whose input part is computed at once
  int64_t zero_row_size = 0;  // numbers in a row of zeros
  int64_t input_panels = 0, recurrent_panels = 0, projection_panels = 0, bias = 0;
  EngineProduct input_engine, recurrent_engine;
  EngineScratch engine_scratch;
  int64_t preactivations = 0, hidden = 0;                           // in inference: rows of a chunk, and of a step
  int64_t row_lists = 0, state_lists = 0, zero_rows = 0;            // see ForwardState
  int64_t masked_h = 0, recurrent_parts = 0, normalised_cells = 0;  // see UnfusedForwardStep
  int64_t barrier_bytes = 0;
  int64_t workspace_bytes = 0;
};

// The layout of the frozen weights of one direction, in byte offsets.
struct FrozenPlan {
  int bf16_parts = 0;  // bf16 parts of the weights for the tile engine; 0: none
  WeightKind kind = WeightKind::kOwn;
  struct Gates {  // a place that is not needed is 0
    int64_t panels = 0, factors = 0, bf16 = 0, all_split = 0;
  };
  Gates input, recurrent;
  int64_t projection_panels = 0, bias = 0;
  int64_t bytes = 0;
};

struct BackwardPlan {
  WorkerGrid grid;
  bool pack = false;                // copy W and W_hr into column panels; else read them where they are
  bool pack_recurrent = false;      // the same for U
  bool directions_at_once = false;  // same as in ForwardPlan; not if they share the gradient of the input
  int64_t team_rows = 0;            // batch rows of a team in a step, at most
  // Rows (steps x batch) whose gradients are kept until the products over them are done; whole steps, at least one.
  // There are two buffers of this size, or one if it holds all rows.
  int64_t chunk_rows = 0;
  // Stride between rows of the gradients of preactivations, in numbers: 4H or a little more. With a stride that is a
  // power of two the rows would share a few cache sets and evict each other.
  int64_t gate_stride = 0;
  int64_t zero_row_size = 0;       // numbers in a row of zeros
  int64_t outer_product_size = 0;  // a worker's scratch, in numbers; also used for RightHandSide::block_panel
  int64_t input_panels = 0, recurrent_panels = 0, projection_panels = 0;
  int64_t partial_sums = 0, outer_products = 0, h_lists = 0, cut_lists = 0, zero_rows = 0;  // see BackwardState
  int64_t grad_preactivations = 0, grad_input_part = 0, grad_hidden = 0, masked_h = 0;      // see Chunk
  int64_t grad_h = 0, grad_previous_h = 0, reset_grad_preactivations = 0, reset_grad_previous_h = 0;
  int64_t norm_rows = 0, parameter_sums = 0;  // see UnfusedBackwardStep
  int64_t recomputed_gate_values = 0, recomputed_hidden = 0;
  int64_t recompute_input_panels = 0, recompute_recurrent_panels = 0, recompute_bias = 0, recompute_lists = 0;
  EngineProduct input_engine, recurrent_engine, projection_engine;  // products with W, U and W_hr as the right operand
  EngineProduct outer_engine;                                       // the sums of outer products
  EngineProduct recompute_input_engine, recompute_recurrent_engine;
  EngineScratch engine_scratch;
  int64_t barrier_bytes = 0;
  int64_t workspace_bytes = 0;
};

constexpr double kCacheBytes = 1.5e6;  // weights of this size stay in the second-level cache between steps
constexpr int64_t kEngineTileRows = 16, kEngineTileDepth = 32;  // tile of an operand of the tile engine
constexpr int64_t kGateTiles = 4;         // tiles of sums, side by side: one for each gate of 16 units
constexpr int64_t kMostEngineRows = 256;  // most rows of a left operand at once
constexpr int64_t kEngineInputRows = 96;  // rows of gradients that are multiplied with W at once
constexpr int64_t kSumBlock = 512;        // samples whose outer products are summed in registers
constexpr int64_t kTileColumns = 4;       // columns of a register tile, in registers
constexpr int64_t kNormRows = 4;          // rows that are normalised side by side, see layer_norm.h
constexpr int64_t kBarrierBytes = 64;     // one cache line

// The sums, times H, that a worker keeps of the gradients of a cell's parameters; see UnfusedBackwardStep.
template <typename T>
LSTM_EXT_CONTRACT_INLINE int64_t parameter_sums(const StepOptions<T>& options) {
  return options.normalised() ? 14 : options.cell.peepholes() ? cell::kParameters : 0;
}

// Whether a backward pass writes each number of the gradients of W and U once: with a single step, which is one chunk,
// and one block of add_outer_products and of add_outer_bf16. `bf16_parts` as in LayerParams.
LSTM_EXT_PUBLIC bool sums_gradients_once(const LayerShape& shape, int bf16_parts);
// The parameters that are set decide which places a call needs: a forward pass needs one for everything that it does
// not save, a backward pass for everything that is requested or recomputed.
template <typename T>
LSTM_EXT_PUBLIC ForwardPlan plan_forward(const ForwardParams<T>& params, const Machine& machine);
// `first` is the first free byte.
template <typename T>
LSTM_EXT_PUBLIC FrozenPlan plan_frozen(const LayerShape& shape, const Machine& machine, int bf16_parts, WeightKind kind,
                                       int64_t first);
template <typename T>
LSTM_EXT_PUBLIC BackwardPlan plan_backward(const BackwardParams<T>& params, const Machine& machine);

}  // namespace lstm_ext::cpu
