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

// A place in the workspace: the byte offset of its first part, and the elements of a part. There is a part for each
// worker, team or buffer that needs one of its own; without parts, both are 0.
struct Place {
  int64_t at = 0, size = 0;
  bool is_needed() const { return size > 0; }
};

// A weight as a right operand. Byte offsets in the workspace, or 0.
struct PackedWeight {
  int bf16_parts = 0;     // bf16 parts of the operands on the tile engine, see bf16_split.h; 0: not there
  int64_t at = 0;         // panels, or bf16 parts; 0 if the weight is read where it is
  int64_t all_split = 0;  // a flag for each 16 columns
};

// A worker's scratch for products on the tile engine.
struct EngineScratch {
  Place left, right;      // bfloat16 numbers
  Place sums;             // float32 numbers: two buffers in turn
  bool in_tiles = false;  // EngineLimits::tiles
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

// Barriers come first in the workspace: that of all workers, then those of the teams.
struct ForwardPlan {
  WorkerGrid grid;
  bool pack = false;            // W and U as gate-interleaved panels or as bf16 parts; else they are read row-major
  bool pack_as_used = false;    // both block by block, because the call uses them once: see GateWeight
  bool input_in_steps = false;  // W x of a step is summed with its U h on the tile engine
  // Both directions of a bidirectional layer may run at the same time, each on the workers of its plan.
  bool directions_at_once = false;
  int64_t unit_groups = 1;  // groups of hidden units: a step multiplies W x and U h group by group
  int64_t team_rows = 0;    // batch rows of a team in a step, at most
  int64_t chunk_rows = 0;   // rows (steps x batch rows) of a team whose input part is computed at once
  PackedWeight input, recurrent;
  EngineScratch engine_scratch;
  Place projection_panels, bias;
  Place preactivations, hidden;  // in inference: rows of a chunk of each team, and of a step
  Place input_lists, preactivation_lists, h_lists, c_lists, zero_rows;  // see ForwardState
  Place masked_h, recurrent_parts, normalised_cells;                    // see UnfusedForwardStep
  int64_t barrier_bytes = 0;
  int64_t workspace_bytes = 0;
};

// The kind of the frozen weights of one direction, and their size; place_frozen lays them out.
struct FrozenPlan {
  int bf16_parts = 0;  // bf16 parts of the weights for the tile engine; 0: none
  WeightKind kind = WeightKind::kOwn;
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
  PackedWeight input, recurrent, projection;  // W, U and W_hr
  PackedWeight recompute_input, recompute_recurrent;
  int outer_bf16_parts = 0;  // as PackedWeight::bf16_parts, of the sums of outer products
  EngineScratch engine_scratch;
  Place outer_products;                               // also used for RightHandSide::block_panel
  Place partial_sums, h_lists, cut_lists, zero_rows;  // see BackwardState
  Place grad_preactivations, grad_input_part, grad_hidden, masked_h, recomputed_hidden;  // see Chunk
  Place grad_h, grad_previous_h, reset_grad_preactivations, reset_grad_previous_h;
  Place norm_rows, parameter_sums;  // see UnfusedBackwardStep
  Place recomputed_gate_values, recompute_bias, recompute_inputs, recompute_h, recompute_gates;  // see Recompute
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

// Whether a backward pass writes each number of the gradients of W and U once: with a single step, which is one chunk,
// and one block of add_outer_products and of add_outer_bf16. `bf16_parts` as in LayerParams.
LSTM_EXT_PUBLIC bool sums_gradients_once(const LayerShape& shape, int bf16_parts);
// The parameters that are set decide which places a call needs: a forward pass needs one for everything that it does
// not save, a backward pass for everything that is requested or recomputed.
template <typename T>
LSTM_EXT_PUBLIC ForwardPlan plan_forward(const ForwardParams<T>& params, const Machine& machine);
template <typename T>
LSTM_EXT_PUBLIC FrozenPlan plan_frozen(const LayerShape& shape, const Machine& machine, int bf16_parts,
                                       WeightKind kind);
template <typename T>
LSTM_EXT_PUBLIC BackwardPlan plan_backward(const BackwardParams<T>& params, const Machine& machine);

}  // namespace lstm_ext::cpu
