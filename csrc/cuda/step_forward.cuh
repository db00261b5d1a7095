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
  // A row of a tile in shared memory. The 16 bytes between rows spread them over the banks.
  static constexpr int kRowBytes = kRows > 16 ? 128 : 256;
  static constexpr int kPitch = kRowBytes + 16;
  static constexpr int kDepth = kRowBytes / static_cast<int>(sizeof(T));
  static constexpr int kPieces = kRowBytes / kPieceBytes;
  static constexpr int kStageBytes = (kStepGateRows + kRows) * kPitch;
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

// The tiles of both products, one after the other.
template <typename T, int kRows>
class ForwardRing {
 public:
  using Tile = ForwardTile<T, kRows>;

  LSTM_DEVICE ForwardRing(const StepForward<T>& args, unsigned char* shared, int64_t first_unit, int64_t first_row)
      : args_(args), shared_(shared), first_unit_(first_unit), first_row_(first_row) {}

  LSTM_DEVICE int64_t count() const { return tiles_of(args_.products[0]) + tiles_of(args_.products[1]); }

  LSTM_DEVICE void fetch_weight(int64_t n) const {
    const StepProduct<T>& product = product_of(n);
    const int64_t H = args_.cell.hidden_size, k = depth_of(n);
    for (int i = threadIdx.x; i < kStepGateRows * Tile::kPieces; i += kStepThreads) {
      const int row = i / Tile::kPieces, piece = i % Tile::kPieces;
      const GateRow at = gate_row(row);
      const int64_t unit = first_unit_ + at.unit;
      const T* from = unit < H ? product.weight + (at.gate * H + unit) * product.weight_stride : nullptr;
      copy_piece(weights(n) + row * Tile::kPitch + piece * kPieceBytes, from,
                 k + piece * (kPieceBytes / static_cast<int>(sizeof(T))), product.depth, product.weight);
    }
  }

  LSTM_DEVICE void fetch_rows(int64_t n) const {
    const StepProduct<T>& product = product_of(n);
    const int64_t k = depth_of(n);
    for (int i = threadIdx.x; i < kRows * Tile::kPieces; i += kStepThreads) {
      const int row = i / Tile::kPieces, piece = i % Tile::kPieces;
      copy_piece(rows(n) + row * Tile::kPitch + piece * kPieceBytes, row_of(product, first_row_ + row),
                 k + piece * (kPieceBytes / static_cast<int>(sizeof(T))), product.depth, product.weight);
    }
  }

  LSTM_DEVICE unsigned char* weights(int64_t n) const { return shared_ + n % kStepStages * Tile::kStageBytes; }
  LSTM_DEVICE unsigned char* rows(int64_t n) const { return weights(n) + kStepGateRows * Tile::kPitch; }

 private:
  LSTM_DEVICE static int64_t tiles_of(const StepProduct<T>& product) {
    return (product.depth + Tile::kDepth - 1) / Tile::kDepth;
  }
  LSTM_DEVICE static const T* row_of(const StepProduct<T>& product, int64_t b) {
    if (b >= product.row_count) return nullptr;
    if (product.resets[b]) return product.reset_rows ? product.reset_rows + b * product.reset_stride : nullptr;
    return product.rows ? product.rows + b * product.row_stride : nullptr;
  }
  LSTM_DEVICE const StepProduct<T>& product_of(int64_t n) const {
    return n < tiles_of(args_.products[0]) ? args_.products[0] : args_.products[1];
  }
  LSTM_DEVICE int64_t depth_of(int64_t n) const {
    const int64_t first = tiles_of(args_.products[0]);
    return (n < first ? n : n - first) * Tile::kDepth;
  }

  const StepForward<T>& args_;
  unsigned char* const shared_;
  const int64_t first_unit_, first_row_;
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
    const int offset = (warp_part * kSteps + step) * 4 * kPieceBytes + member * kPieceBytes;
    uint4 state[Tile::kColumnTiles];
#pragma unroll
    for (int n = 0; n < Tile::kColumnTiles; ++n) {
      state[n] = *reinterpret_cast<const uint4*>(rows + (n * 8 + group) * Tile::kPitch + offset);
    }
#pragma unroll
    for (int m = 0; m < Tile::kGateTiles; ++m) {
      const unsigned char* row = weights + ((warp_row * Tile::kGateTiles + m) * 16 + group) * Tile::kPitch + offset;
      const uint4 low = *reinterpret_cast<const uint4*>(row);
      const uint4 high = *reinterpret_cast<const uint4*>(row + 8 * Tile::kPitch);
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

// The cell of unit j of row b, from its sums.
template <bool kOptions, typename T>
LSTM_DEVICE void finish_forward(const StepForward<T>& args, int64_t b, int64_t j, const float (&product)[4]) {
  const CellForward<T>& cell = args.cell;
  const int64_t H = cell.hidden_size;
  const RowState row = forward_row<kOptions>(cell.rows, b);
  if (!row.takes_part()) {
    write_no_cell(cell, b, j);
    return;
  }
  float z[4];
  for (int gate = 0; gate < 4; ++gate) z[gate] = bias_at(cell, gate, j);
  const float before = previous_cell(row, cell.c_previous, b * H + j);
  if (!args.whole) {
    for (int gate = 0; gate < 4; ++gate) z[gate] += cell.input_part[b * cell.input_stride + gate * H + j];
  }
  if (args.whole || row.takes_product()) {
    for (int gate = 0; gate < 4; ++gate) z[gate] += product[gate];
  } else if (const float* recurrent = recurrent_row(cell, row, b)) {
    for (int gate = 0; gate < 4; ++gate) z[gate] += recurrent[gate * H + j];
  }
  write_cell(cell, row, b, j, new_cell<kOptions, FastMath>(cell, row, b * H + j, z, before));
}

template <typename T, bool kOptions, int kRows>
LSTM_KERNEL LSTM_LAUNCH_BOUNDS(kStepThreads) step_forward_kernel(LSTM_GRID_CONSTANT StepSides<StepForward<T>> both) {
  const StepForward<T>& args = both.sides[blockIdx.z];
  using Tile = ForwardTile<T, kRows>;
  LSTM_DYNAMIC_SHARED(unsigned char, shared);
  const int64_t first_unit = int64_t{blockIdx.x} * kStepUnits, first_row = int64_t{blockIdx.y} * kRows;
  const ForwardRing<T, kRows> ring(args, shared, first_unit, first_row);
  const int64_t tiles = ring.count();
  for (int64_t n = 0; n < kStepStages - 1; ++n) {
    if (n < tiles) ring.fetch_weight(n);
  }
  grid_dependency_wait();
  launch_dependents();
  for (int64_t n = 0; n < kStepStages - 1; ++n) {
    if (n < tiles) ring.fetch_rows(n);
    cp_async_commit();
  }
  const int warp = threadIdx.x / 32, warp_row = warp % Tile::kWarps, warp_part = warp / Tile::kWarps;
  float sums[Tile::kColumnTiles][Tile::kGateTiles][4] = {};
#pragma unroll 1
  for (int64_t n = 0; n < tiles; ++n) {
    cp_async_wait<kStepStages - 2>();
    __syncthreads();  // tile n has come, and nobody reads the tile before it any more
    if (n + kStepStages - 1 < tiles) {
      ring.fetch_weight(n + kStepStages - 1);
      ring.fetch_rows(n + kStepStages - 1);
    }
    cp_async_commit();
    multiply_tiles<T, kRows>(ring.weights(n), ring.rows(n), warp_row, warp_part, sums);
  }
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
  for (int cell = threadIdx.x; cell < kRows * kStepUnits; cell += kStepThreads) {
    const int row = cell / kStepUnits, unit = cell % kStepUnits;
    const int64_t b = first_row + row, j = first_unit + unit;
    if (b >= args.cell.rows.count || j >= args.cell.hidden_size) continue;
    float product[4] = {};
#pragma unroll
    for (int part = 0; part < Tile::kParts; ++part) {
      const float4 sum = partial[(part * kRows + row) * Tile::kPartialPitch + unit];
      product[0] += sum.x;
      product[1] += sum.y;
      product[2] += sum.z;
      product[3] += sum.w;
    }
    finish_forward<kOptions>(args, b, j, product);
  }
}

}  // namespace lstm_ext::cuda
