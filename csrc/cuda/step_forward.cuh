// A step of the forward pass in one launch. A block has kStepUnits hidden units, all four gates of them, and some rows
// of the batch: it multiplies the rows of the state by the units' rows of U, and then updates their cells. Weights do
// not depend on the step before: their first tiles are on their way when the block begins to wait for it.
#pragma once

#include "cuda/step_tiles.cuh"

namespace lstm_ext::cuda {

template <typename T, int kRows>
struct ForwardTile {
  // Two warps share the gate rows, two the depth.
  static constexpr int kWarps = 2, kParts = 2;
  static constexpr int kGateTiles = kStepGateRows / 16 / kWarps;  // tiles of a warp
  static constexpr int kColumnTiles = kRows / 8;
  // A row of a tile in shared memory.
  static constexpr int kRowBytes = kRows > 16 ? 128 : 256;
  static constexpr int kDepth = kRowBytes / static_cast<int>(sizeof(T));
  static constexpr int kStageBytes = (kStepGateRows + kRows) * kRowBytes;
  // The place of byte `offset` of a row. Eight lanes read 64 bytes of two neighbouring rows at once: the halves of odd
  // rows change places, so that they are in different banks.
  LSTM_DEVICE static int place(int row, int offset) { return row * kRowBytes + (offset ^ (row % 2 * 64)); }
  static constexpr int kPartialPitch = kStepUnits + 1;  // in float4
  static constexpr size_t kSharedBytes = static_cast<size_t>(kStepStages) * kStageBytes;
  static_assert(sizeof(float4) * kParts * kRows * kPartialPitch <= kSharedBytes, "the ring also holds the sums");
};

// The row of a tile that holds gate rows: an instruction's 16 rows are two gates of 8 units, so that a thread gets all
// four gates of a unit from two instructions.
struct GateRow {
  int gate, unit;
};
LSTM_DEVICE GateRow gate_row(int row) { return {row / 16 % 2 * 2 + row % 16 / 8, row / 32 * 8 + row % 8}; }

// Copies the tiles of an operand of both products, one after the other: of the weights, or of the rows of the batch.
template <typename T, int kRows, bool kWeights>
class ForwardOperand {
 public:
  using Tile = ForwardTile<T, kRows>;
  using Copies = TileCopies<T, kWeights ? kStepGateRows : kRows, Tile::kRowBytes, Tile::kRowBytes>;

  LSTM_DEVICE ForwardOperand(const StepForward<T>& args, unsigned char* shared, int64_t first)
      : args_(args),
        shared_(shared + (kWeights ? 0 : kStepGateRows * Tile::kRowBytes) +
                Tile::place(Copies::row(), Copies::piece() * kPieceBytes)),
        first_(first) {
    begin(args.products[0]);
  }
  LSTM_DEVICE static int tiles_of(const StepProduct<T>& product) {
    return static_cast<int>((product.depth + Tile::kDepth - 1) / Tile::kDepth);
  }
  // Copies tile `n`: the one behind that of the last call.
  LSTM_DEVICE void fetch(int n) {
    if (n == tiles_of(args_.products[0])) begin(args_.products[1]);
    copies_.fetch(shared_ + n % kStepStages * Tile::kStageBytes);
  }

 private:
  LSTM_DEVICE void begin(const StepProduct<T>& product) {
    copies_.begin(product.depth, product.weight, [&](int row) { return row_of(product, row); });
  }
  LSTM_DEVICE const T* row_of(const StepProduct<T>& product, int row) const {
    if constexpr (kWeights) {
      const int64_t H = args_.cell.hidden_size;
      const GateRow at = gate_row(row);
      const int64_t unit = first_ + at.unit;
      return unit < H ? product.weight + (at.gate * H + unit) * product.weight_stride : nullptr;
    } else {
      const int64_t b = first_ + row;
      if (b >= product.row_count) return nullptr;
      if (product.resets[b]) return product.reset_rows ? product.reset_rows + b * product.reset_stride : nullptr;
      return product.rows ? product.rows + b * product.row_stride : nullptr;
    }
  }

  const StepForward<T>& args_;
  unsigned char* const shared_;
  const int64_t first_;
  Copies copies_;
};

// Adds the product of a warp's part of two tiles. A lane reads 16 bytes of a row at once; so the numbers of k that meet
// in an instruction are not neighbours, but they are the same ones for both operands.
template <typename T, int kRows>
LSTM_DEVICE void multiply_tiles(const unsigned char* weights, const unsigned char* rows, int warp_row, int warp_part,
                                float (&sums)[kRows / 8][ForwardTile<T, kRows>::kGateTiles][4]) {
  using Tile = ForwardTile<T, kRows>;
  constexpr int kSteps = Tile::kRowBytes / (4 * kPieceBytes) / Tile::kParts;
  const int lane = threadIdx.x % 32, group = lane / 4, member = lane % 4;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    // The rows of a lane are all odd or all even.
    const int offset = Tile::place(group, (warp_part * kSteps + step) * 4 * kPieceBytes + member * kPieceBytes);
    uint4 state[Tile::kColumnTiles];
#pragma unroll
    for (int n = 0; n < Tile::kColumnTiles; ++n) {
      state[n] = *reinterpret_cast<const uint4*>(rows + n * 8 * Tile::kRowBytes + offset);
    }
#pragma unroll
    for (int m = 0; m < Tile::kGateTiles; ++m) {
      const unsigned char* row = weights + (warp_row * Tile::kGateTiles + m) * 16 * Tile::kRowBytes + offset;
      const uint4 low = *reinterpret_cast<const uint4*>(row);
      const uint4 high = *reinterpret_cast<const uint4*>(row + 8 * Tile::kRowBytes);
      const uint32_t first[4] = {operand_register<T>(low.x), operand_register<T>(high.x), operand_register<T>(low.y),
                                 operand_register<T>(high.y)};
      const uint32_t second[4] = {operand_register<T>(low.z), operand_register<T>(high.z), operand_register<T>(low.w),
                                  operand_register<T>(high.w)};
#pragma unroll
      for (int n = 0; n < Tile::kColumnTiles; ++n) {
        const uint32_t first_state[2] = {operand_register<T>(state[n].x), operand_register<T>(state[n].y)};
        const uint32_t second_state[2] = {operand_register<T>(state[n].z), operand_register<T>(state[n].w)};
        multiply_tile<T>(sums[n][m], first, first_state);
        multiply_tile<T>(sums[n][m], second, second_state);
      }
    }
  }
}

template <typename T, bool kOptions, int kRows>
LSTM_KERNEL LSTM_LAUNCH_BOUNDS(kStepThreads) step_forward_kernel(LSTM_GRID_CONSTANT StepSides<StepForward<T>> both) {
  const StepForward<T>& args = both.sides[blockIdx.z];
  using Tile = ForwardTile<T, kRows>;
  LSTM_DYNAMIC_SHARED(unsigned char, shared);
  const int64_t first_unit = int64_t{blockIdx.x} * kStepUnits, first_row = int64_t{blockIdx.y} * kRows;
  using Weights = ForwardOperand<T, kRows, true>;
  Weights weights(args, shared, first_unit);
  const int tiles = Weights::tiles_of(args.products[0]) + Weights::tiles_of(args.products[1]);
  for (int n = 0; n < kStepStages - 1; ++n) {
    if (n < tiles) weights.fetch(n);
  }
  grid_dependency_wait();
  launch_dependents();
  ForwardOperand<T, kRows, false> rows(args, shared, first_row);
  for (int n = 0; n < kStepStages - 1; ++n) {
    if (n < tiles) rows.fetch(n);
    cp_async_commit();
  }
  // The rest that the cells need comes while the product is computed; many cells would take registers that another
  // block could have, and come behind it.
  constexpr int kCells = kRows * kStepUnits / kStepThreads;
  const int cell_unit = threadIdx.x % kStepUnits, cell_row = threadIdx.x / kStepUnits;
  const int64_t j = first_unit + cell_unit;
  const auto row_of_cell = [&](int i) { return cell_row + i * (kStepThreads / kStepUnits); };
  BegunCell cells[kCells];
  const auto begin_cells = [&] {
#pragma unroll
    for (int i = 0; i < kCells; ++i) {
      const int64_t b = first_row + row_of_cell(i);
      const auto bias = [&](int gate) { return bias_at(args.cell, gate, j); };
      cells[i] = begin_cell<kOptions>(args.cell, b, j, args.whole);
      complete_cell(args.cell, cells[i], b, j, bias, args.whole);
    }
  };
  constexpr bool kBeginsEarly = kCells <= 2;
  if constexpr (kBeginsEarly) begin_cells();
  const int warp = threadIdx.x / 32, warp_row = warp % Tile::kWarps, warp_part = warp / Tile::kWarps;
  float sums[Tile::kColumnTiles][Tile::kGateTiles][4] = {};
#pragma unroll 1
  for (int n = 0; n < tiles; ++n) {
    cp_async_wait<kStepStages - 2>();
    __syncthreads();  // tile n has come, and nobody reads the tile before it any more
    if (n + kStepStages - 1 < tiles) {
      weights.fetch(n + kStepStages - 1);
      rows.fetch(n + kStepStages - 1);
    }
    cp_async_commit();
    const unsigned char* stage = shared + n % kStepStages * Tile::kStageBytes;
    multiply_tiles<T, kRows>(stage, stage + kStepGateRows * Tile::kRowBytes, warp_row, warp_part, sums);
  }
  if constexpr (!kBeginsEarly) begin_cells();
  cp_async_wait<0>();
  __syncthreads();
  // (parts, rows, units) of the four gates of a cell.
  float4* partial = reinterpret_cast<float4*>(shared);
  const int lane = threadIdx.x % 32, group = lane / 4, member = lane % 4;
#pragma unroll
  for (int n = 0; n < Tile::kColumnTiles; ++n) {
#pragma unroll
    for (int m = 0; m < Tile::kGateTiles; m += 2) {
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        const int row = n * 8 + member * 2 + column, unit = (warp_row * Tile::kGateTiles + m) / 2 * 8 + group;
        partial[(warp_part * kRows + row) * Tile::kPartialPitch + unit] =
            make_float4(sums[n][m][column], sums[n][m][2 + column], sums[n][m + 1][column], sums[n][m + 1][2 + column]);
      }
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCells; ++i) {
    float product[4] = {};
#pragma unroll
    for (int part = 0; part < Tile::kParts; ++part) {
      const float4 sum = partial[(part * kRows + row_of_cell(i)) * Tile::kPartialPitch + cell_unit];
      product[0] += sum.x;
      product[1] += sum.y;
      product[2] += sum.z;
      product[3] += sum.w;
    }
    const int64_t b = first_row + row_of_cell(i);
    if (cells[i].row.takes_part()) {
      const int64_t place = b * args.cell.hidden_size + j;
      const auto cell = new_cell<kOptions, FastMath>(args.cell, cells[i], place, product, args.whole);
      write_cell(args.cell, cells[i].row, b, j, cell);
    } else if (b < args.cell.rows.count && j < args.cell.hidden_size) {
      write_no_cell(args.cell, b, j);
    }
  }
}

}  // namespace lstm_ext::cuda
