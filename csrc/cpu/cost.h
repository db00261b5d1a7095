// The parts of a plan: cost.cpp estimates a time step and chooses the workers, plan.cpp chooses everything else, and
// layout.cpp gives each thing its place in the workspace. The constants of all three are here. They affect speed only,
// never correctness. Work is counted in fused multiply-adds of one number.
#pragma once

#include <cstdint>

#include "cpu/plan.h"

namespace lstm_ext::cpu {

// Found by trial on an AVX-512 machine of two cores, November 2026.
constexpr int64_t kChunkBytes = 256 * 1024;  // preactivations of a chunk stay in the L2 cache
constexpr int64_t kChunkRows = 48;           // ... but each load of the weights must serve enough rows
// The number of samples (time x batch) in a backward chunk is H within these bounds. Each chunk adds to the weight
// gradients in memory once, so larger weights gain from longer chunks. Its gradients should stay in cache, so smaller
// weights gain from shorter ones.
constexpr int64_t kLeastSamples = 256;
constexpr int64_t kMostSamples = 1024;

// Up to so many rows of all steps together the weights are read unpacked. A single step, and products beside the tile
// engine: kRowMajorRows. Several steps: by the numbers of both weights. Two directions were measured on an EPYC (Zen
// 5), one direction without options on a Xeon (Emerald Rapids) with AVX-512 and with AVX2, kRowMajorOfLarge on a Xeon.
// A layer with options keeps kRowMajorRows: layer normalisation makes more of a rounding, and sums of rows round less.
constexpr int64_t kRowMajorRows = 32;
struct RowMajorLimit {
  int64_t numbers;  // the limit is for weights with fewer numbers
  int64_t rows;
};
constexpr RowMajorLimit kRowMajorOfOne[] = {{25'000, 8}, {50'000, 20}, {200'000, kRowMajorRows}};
constexpr RowMajorLimit kRowMajorOfTwo[] = {{100'000, 12}, {1'000'000, 20}};
constexpr int64_t kRowMajorOfLarge = 48;  // not with the narrow registers of NEON, where it was not measured

// Steps of large weights, on a Xeon.
constexpr double kGroupBytes = 512 * 1024;  // the weights of a group of units; see count_unit_groups

// The tile engine, on a Xeon with AMX.
constexpr int64_t kEngineChunkRows = 128;   // as kChunkRows: the engine needs the weights faster
constexpr double kEngineCellFeatures = 30;  // the cost of a cell beside it, in input features
constexpr double kWholeCacheBytes = 2e6;    // weights of this size stay in the L2 cache if nothing else is there
constexpr double kLoadNumber = 2.0;         // the cost of loading a bfloat16 number of a weight from there
constexpr double kLoadFarNumber = 6.0;      // ... and from further away
constexpr double kRowsThatWait = 128;       // up to here rows wait for loads; with more, the next tiles arrive in time
constexpr int64_t kInputRowsOfOnePart = 8;  // least rows of a step; see sums_input_in_steps
constexpr double kWeightBytesOfSum = 10;    // weight bytes read instead of a byte of W x
// So many products of tiles, 4 us, do not slow the processor's clock, if at least so many steps follow them.
constexpr int64_t kShortEngineProducts = 800;
constexpr int64_t kShortEngineSteps = 16;
// A worker's operands are limited to these sizes, so that they stay in the L2 cache.
constexpr int64_t kEngineLeftNumbers = 512 * 1024;
constexpr int64_t kEngineRightNumbers = 3 * 512 * 1024;
constexpr int64_t kEngineOuterRows = 64;

constexpr int kDirections = 2;  // directions of a bidirectional layer
constexpr int64_t kCacheLine = 64;

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows of all steps together.
inline int64_t count_samples(const LayerShape& shape) {
  return shape.step_offsets ? shape.step_offsets[shape.steps] : shape.steps * shape.batch;
}

// bfloat16 numbers in the bf16 parts of a (rows, depth) operand.
inline int64_t bf16_numbers(int64_t rows, int64_t depth, int bf16_parts) {
  return round_up(rows, kEngineTileRows) * round_up(depth, kEngineTileDepth) * bf16_parts;
}

// The cost of a time step.
struct StepCost {
  double row_work;            // the work of one row
  int bf16_parts = 0;         // bf16 parts of the recurrent product, if it runs on the tile engine
  double weight_numbers = 0;  // numbers of the weights that a step reads
  double row_multiple = 1;
  // Whether loads from outside the L2 cache add to the time, which they do beside the tile engine. For a backward pass
  // this would not improve the choice: workers that share the units of a step read and split each other's gradients,
  // which takes about as long.
  bool adds = false;

  // The cost for a worker with `rows` rows of a batch and a share of the units.
  double of(double rows, double batch, double share) const;
};

// The cost of steps whose rows have `features` features beside h; `bf16_parts` as in StepCost.
StepCost step_cost(const LayerShape& shape, int64_t features, int bf16_parts, const EngineLimits& engine, bool adds);

// The grid with the shortest estimated time. All workers share `other_work` evenly; `barriers` is how often the members
// of a team meet in a step.
WorkerGrid choose_grid(const LayerShape& shape, const Machine& machine, const StepCost& cost, double other_work,
                       int64_t barriers, int64_t most_teams);

// Whether both directions of a bidirectional layer run at the same time.
bool directions_at_once(const Machine& machine, const WorkerGrid& grid);

// The bf16 parts with which a product of so many rows runs on the tile engine, or 0. gate_bf16_parts: with a weight
// (4H, depth). column_bf16_parts: with any other matrix (depth, columns).
int gate_bf16_parts(const Machine& machine, int bf16_parts, int64_t rows, int64_t depth, int64_t hidden_size);
int column_bf16_parts(const Machine& machine, int bf16_parts, int64_t rows, int64_t depth, int64_t columns);

// Up to this many rows of all steps together, weights are not packed for the tile engine.
int64_t few_rows(int bf16_parts, bool narrow);

// Up to this many rows of all steps together, packing the weights of a forward pass costs more than it saves;
// `bf16_parts` of the recurrent product. `options`: whether the layer has any.
int64_t row_major_rows(const LayerShape& shape, const Machine& machine, int bf16_parts, bool narrow, bool options);

template <typename T>
void lay_out(ForwardPlan& plan, const ForwardParams<T>& params, const Machine& machine);
template <typename T>
void lay_out(BackwardPlan& plan, const BackwardParams<T>& params, const Machine& machine);

}  // namespace lstm_ext::cpu
