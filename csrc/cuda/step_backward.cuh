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
  static constexpr int kPieces = kRowBytes / kPieceBytes;
  static constexpr int kTileBytes = kStepGateRows * kPitch;
  static constexpr int kStages = sizeof(T) == 2 ? 4 : 3;
  static constexpr int kGradientPitch = kStepGateRows * static_cast<int>(sizeof(T)) + 16;
  static constexpr int kGradientBytes = kRows * kGradientPitch;
  static constexpr size_t kSharedBytes = static_cast<size_t>(kGradientBytes) + kStages * kTileBytes;
};

template <typename T, int kRows>
LSTM_DEVICE void fetch_columns(unsigned char* tile, const T* weight, int64_t stride, int64_t H, int64_t first_unit,
                               int64_t first_column) {
  using Tile = BackwardTile<T, kRows>;
  for (int i = threadIdx.x; i < kStepGateRows * Tile::kPieces; i += kStepThreads) {
    const int row = i / Tile::kPieces, piece = i % Tile::kPieces;
    const int64_t unit = first_unit + row % kStepUnits;
    const T* from = unit < H ? weight + (row / kStepUnits * H + unit) * stride : nullptr;
    copy_piece(tile + row * Tile::kPitch + piece * kPieceBytes, from,
               first_column + piece * (kPieceBytes / static_cast<int>(sizeof(T))), H, weight);
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
  const auto fetch = [&](int64_t n) {
    if (n < tiles) {
      fetch_columns<D, kRows>(ring + n % Tile::kStages * Tile::kTileBytes, args.weight, args.weight_stride, H,
                              first_unit, n * Tile::kColumns);
    }
    cp_async_commit();
  };
  for (int n = 0; n < Tile::kStages - 1; ++n) fetch(n);
  grid_dependency_wait();
  launch_dependents();
  for (int cell = threadIdx.x; cell < kRows * kStepUnits; cell += kStepThreads) {
    const int row = cell / kStepUnits, unit = cell % kStepUnits;
    const int64_t b = first_row + row, j = first_unit + unit;
    CellGradients<float> grad = {};
    if (b < args.cell.rows.count && j < H) {
      const RowState at = backward_row<kOptions>(args.cell.rows, b);
      if (at.takes_part()) {
        grad = backward_cell<kOptions, FastMath>(args.cell, at, b, j,
                                                 [&] { return sum_of_parts(args.cell.output, b * H + j); });
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
