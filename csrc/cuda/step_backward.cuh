// A step of the backward pass in one launch. A block has kStepUnits hidden units of some rows of the batch: it computes
// the gradients of their gates, and multiplies them by the units' rows of U. That is one part of dL/dh of the step
// before, for all units; the kernel of that step adds the parts up, always in the same order.
#pragma once

#include "cuda/step_tiles.cuh"

namespace lstm_ext::cuda {

// T is the type of the gradients.
template <typename T, int kRows>
struct BackwardTile {
  static constexpr int kWarps = kStepThreads / 32;
  static constexpr int kRowTiles = kRows / 16;
  static constexpr int kColumns = 64;  // columns of U in a tile
  static constexpr int kWarpColumns = kColumns / kWarps;
  static constexpr int kRowBytes = kColumns * static_cast<int>(sizeof(T));
  // 16-bit tiles are read by ldmatrix, eight rows of 16 bytes at once; others number by number, from four rows.
  static constexpr int kPitch = kRowBytes + (sizeof(T) == 2 ? 16 : 32);
  using Copies = TileCopies<T, kStepGateRows, kRowBytes, kPitch>;
  static constexpr int kTileBytes = kStepGateRows * kPitch;
  static constexpr int kStages = sizeof(T) == 2 ? 4 : 3;
  static constexpr int kGradientPitch = kStepGateRows * static_cast<int>(sizeof(T)) + 16;
  static constexpr int kGradientBytes = kRows * kGradientPitch;
  static constexpr size_t kSharedBytes = static_cast<size_t>(kGradientBytes) + kStages * kTileBytes;
  // The parts of dL/dh are added up in so many sums, which have room where the ring's last stage comes to be.
  static constexpr int kSums = kRows > 16 ? 2 : 8;
  static_assert(kSums * kRows * kStepUnits * static_cast<int>(sizeof(float)) <= kTileBytes);
};

// dL/dh of the block's cells through the product with U in the step after: (rows, kSums, units), of which a cell adds
// up kSums. The parts of all cells are spread over all threads, and many are on their way at once.
template <int kSums, typename T>
LSTM_DEVICE void add_parts(float* sums, const CellBackward<T>& cell, int64_t first_row, int rows, int64_t first_unit) {
  const GradOutput<T>& output = cell.output;
  const int64_t H = cell.hidden_size, left = cell.rows.next_count - first_row;
  const int count = (left < 0 ? 0 : left < rows ? static_cast<int>(left) : rows) * (kSums * kStepUnits);
  const int64_t parts = (output.recurrent_parts + kSums - 1) / kSums;
  for (int i = threadIdx.x; i < count; i += kStepThreads) {
    const int64_t j = first_unit + i % kStepUnits, b = first_row + i / (kSums * kStepUnits);
    const int64_t first = i / kStepUnits % kSums * parts;
    const int64_t end = first + parts < output.recurrent_parts ? first + parts : output.recurrent_parts;
    if (j >= H) continue;
    const float* part = output.recurrent_part + first * output.recurrent_part_stride + b * H + j;
    float sum = 0;
#pragma unroll 8
    for (int64_t n = first; n < end; ++n, part += output.recurrent_part_stride) sum += *part;
    sums[i] = sum;
  }
}

// `a` of 16 rows of gradients, and `b` of 8 columns of U twice, at 32 bytes of k.
template <typename T, int kRows>
LSTM_DEVICE void load_gradients(uint32_t (&a)[4], const unsigned char* gradients, int row_tile, int step) {
  using Tile = BackwardTile<T, kRows>;
  const int lane = threadIdx.x % 32;
  if constexpr (sizeof(T) == 2) {
    ldmatrix_x4(a, gradients + (row_tile * 16 + lane % 16) * Tile::kGradientPitch + step * 32 + lane / 16 * 16);
  } else {
    const unsigned char* row = gradients + (row_tile * 16 + lane / 4) * Tile::kGradientPitch + step * 32 + lane % 4 * 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const auto* bits = reinterpret_cast<const float*>(row + i % 2 * 8 * Tile::kGradientPitch + i / 2 * 16);
      a[i] = to_tf32(*bits);
    }
  }
}
template <typename T, int kRows>
LSTM_DEVICE void load_weights(uint32_t (&b)[2][2], const unsigned char* tile, int column, int step) {
  using Tile = BackwardTile<T, kRows>;
  const int lane = threadIdx.x % 32;
  if constexpr (sizeof(T) == 2) {
    uint32_t both[4];
    ldmatrix_x4_trans(both, tile + (step * 16 + lane % 16) * Tile::kPitch + (column + lane / 16 * 8) * 2);
    b[0][0] = both[0];
    b[0][1] = both[1];
    b[1][0] = both[2];
    b[1][1] = both[3];
  } else {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const auto* bits = reinterpret_cast<const float*>(tile + (step * 8 + lane % 4 + i * 4) * Tile::kPitch);
        b[n][i] = to_tf32(bits[column + n * 8 + lane / 4]);
      }
    }
  }
}

template <typename T, bool kOptions, int kRows>
LSTM_KERNEL LSTM_LAUNCH_BOUNDS(kStepThreads) step_backward_kernel(LSTM_GRID_CONSTANT StepSides<StepBackward<T>> both) {
  const StepBackward<T>& args = both.sides[blockIdx.z];
  using D = typename Types<T>::Gradient;
  using Tile = BackwardTile<D, kRows>;
  LSTM_DYNAMIC_SHARED(unsigned char, shared);
  unsigned char* gradients = shared;
  unsigned char* ring = shared + Tile::kGradientBytes;
  const int64_t H = args.cell.hidden_size;
  const int64_t first_unit = int64_t{blockIdx.x} * kStepUnits, first_row = int64_t{blockIdx.y} * kRows;
  const int64_t tiles = first_row < args.row_count ? (H + Tile::kColumns - 1) / Tile::kColumns : 0;
  typename Tile::Copies columns;
  columns.begin(H, args.weight, [&](int row) -> const D* {
    const int64_t unit = first_unit + row % kStepUnits;
    return unit < H ? args.weight + (row / kStepUnits * H + unit) * args.weight_stride : nullptr;
  });
  unsigned char* const own_piece = ring + columns.row() * Tile::kPitch + columns.piece() * kPieceBytes;
  const auto fetch = [&](int64_t n) {
    if (n < tiles) columns.fetch(own_piece + n % Tile::kStages * Tile::kTileBytes);
    cp_async_commit();
  };
  for (int n = 0; n < Tile::kStages - 1; ++n) fetch(n);
  grid_dependency_wait();
  launch_dependents();
  float* const parts = reinterpret_cast<float*>(ring + (Tile::kStages - 1) * Tile::kTileBytes);
  add_parts<Tile::kSums>(parts, args.cell, first_row, kRows, first_unit);
  __syncthreads();
  for (int cell = threadIdx.x; cell < kRows * kStepUnits; cell += kStepThreads) {
    const int row = cell / kStepUnits, unit = cell % kStepUnits;
    const int64_t b = first_row + row, j = first_unit + unit;
    CellGradients<float> grad = {};
    if (b < args.cell.rows.count && j < H) {
      const RowState at = backward_row<kOptions>(args.cell.rows, b);
      if (at.takes_part()) {
        grad = backward_cell<kOptions, FastMath>(args.cell, at, b, j, [&] {
          float sum = 0;
#pragma unroll
          for (int n = 0; n < Tile::kSums; ++n) sum += parts[(row * Tile::kSums + n) * kStepUnits + unit];
          return sum;
        });
      } else {
        write_no_gradients(args.cell, b, j);
      }
    }
    D* operand = reinterpret_cast<D*>(gradients + row * Tile::kGradientPitch);
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) {
      operand[gate * kStepUnits + unit] = narrow<D>(b < args.row_count ? grad.z[gate] : 0.f);
    }
  }
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  constexpr int kSteps = kStepGateRows * static_cast<int>(sizeof(D)) / 32;
  float* part = args.parts + int64_t{blockIdx.x} * args.row_count * H;
#pragma unroll 1
  for (int64_t n = 0; n < tiles; ++n) {
    cp_async_wait<Tile::kStages - 2>();
    __syncthreads();  // the gradients are there, and tile n
    fetch(n + Tile::kStages - 1);
    const unsigned char* tile = ring + n % Tile::kStages * Tile::kTileBytes;
    float sums[Tile::kRowTiles][2][4] = {};
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t columns[2][2];
      load_weights<D, kRows>(columns, tile, warp * Tile::kWarpColumns, step);
#pragma unroll
      for (int m = 0; m < Tile::kRowTiles; ++m) {
        uint32_t rows[4];
        load_gradients<D, kRows>(rows, gradients, m, step);
        multiply_tile<D>(sums[m][0], rows, columns[0]);
        multiply_tile<D>(sums[m][1], rows, columns[1]);
      }
    }
#pragma unroll
    for (int m = 0; m < Tile::kRowTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int64_t b = first_row + m * 16 + lane / 4 + i % 4 / 2 * 8;
        const int64_t column = n * Tile::kColumns + warp * Tile::kWarpColumns + i / 4 * 8 + lane % 4 * 2 + i % 2;
        if (b < args.row_count && column < H) part[b * H + column] = sums[m][i / 4][i % 4];
      }
    }
  }
  cp_async_wait<0>();
}

}  // namespace lstm_ext::cuda
