// Sums over time and batch: of outer products, which are weight gradients, and of rows, which are bias gradients.
//
// Partial sums over a block of kSumBlock rows are formed in registers and then added to memory: better locality, and a
// smaller rounding error than one running sum over all rows.
#pragma once

#include "cpu/isa.h"

#include "cpu/range.h"
#include "cpu/rows.h"
#include "cpu/simd.h"
#include "cpu/tile.h"

namespace lstm_ext::cpu::LSTM_EXT_ISA {
namespace {

// The left factor is copied where its rows lie at least this far apart: a column of it would touch
// a page a row, and with sizes that are powers of two always the same few sets of the caches.
constexpr int64_t kFarBytes = 4096;

// sums[m, :] += sum over samples n of left[n * left_step + m] * right(n)[:], for m in `rows`.
// `scratch`: see BackwardPlan::outer_product_size.
template <typename T>
void add_outer_products(const T* left, int64_t left_step, int64_t samples, Range rows, const RowGrid<const T>& right,
                        int64_t columns, T* sums, T* scratch) {
  using S = Simd<T>;
  constexpr int kLanes = S::kLanes;
  const int64_t height = rows.end - rows.begin;
  const bool far = left_step * static_cast<int64_t>(sizeof(T)) >= kFarBytes;
  T* const panel = scratch;
  T* const copied = scratch + kSumBlock * kTileColumns * kLanes;
  for (int64_t n = 0; n < samples; n += kSumBlock) {
    const int64_t depth = smaller(kSumBlock, samples - n);
    const T* block = left + n * left_step + rows.begin;
    if (far) {
      for_each_row_tile(height, [&](int64_t first, auto tile_height) LSTM_EXT_LAMBDA_INLINE {
        constexpr int R = tile_height();
        T* out = copied + first * depth;
        for (int64_t k = 0; k < depth; ++k)
#pragma GCC unroll kTileRows
          for (int r = 0; r < R; ++r) out[k * R + r] = block[k * left_step + first + r];
      });
    }
    for_each_column_block<T>(0, columns, [&](int64_t column, auto width, int last) LSTM_EXT_LAMBDA_INLINE {
      constexpr int NV = width();
      for (int64_t k = 0; k < depth; ++k) {
        const T* row = right(n + k) + column;
#pragma GCC unroll kTileColumns
        for (int v = 0; v < NV; ++v) {
          S::store(panel + (k * NV + v) * kLanes, load_lanes<T>(row + v * kLanes, v == NV - 1 ? last : kLanes));
        }
      }
      for_each_row_tile(height, [&](int64_t first, auto tile_height) {
        constexpr int R = tile_height();
        T* out = sums + (rows.begin + first) * columns + column;
#pragma GCC unroll kTileRows
        for (int r = 0; r < R; ++r)
#pragma GCC unroll kTileColumns
          for (int v = 0; v < NV; ++v) __builtin_prefetch(out + r * columns + v * kLanes, 1);
        Tile<T, R, NV> tile;
        tile.zero();
        if (far) {
          accumulate_columns(tile, copied + first * depth, R, panel, NV * kLanes, depth);
        } else {
          accumulate_columns(tile, block + first, left_step, panel, NV * kLanes, depth);
        }
#pragma GCC unroll kTileRows
        for (int r = 0; r < R; ++r)
#pragma GCC unroll kTileColumns
          for (int v = 0; v < NV; ++v) {
            const int lanes = v == NV - 1 ? last : kLanes;
            T* at = out + r * columns + v * kLanes;
            store_lanes<T>(at, load_lanes<T>(at, lanes) + tile.acc[r][v], lanes);
          }
      });
    });
  }
}

// sums[m] += sum over the rows n of matrix[n][m], for m in `columns`.
template <typename T>
void add_columns(const T* matrix, int64_t row_step, int64_t rows, Range columns, T* sums) {
  using S = Simd<T>;
  constexpr int kLanes = S::kLanes;
  for (int64_t column = columns.begin; column < columns.end; column += kLanes) {
    const int lanes = static_cast<int>(smaller(columns.end - column, kLanes));
    Reg<T> total = load_lanes<T>(sums + column, lanes);
    for (int64_t n = 0; n < rows; n += kSumBlock) {
      const int64_t end = smaller(n + kSumBlock, rows);
      Reg<T> block = S::zero();
      for (int64_t i = n; i < end; ++i) block = block + load_lanes<T>(matrix + i * row_step + column, lanes);
      total = total + block;
    }
    store_lanes<T>(sums + column, total, lanes);
  }
}

}  // namespace
}  // namespace lstm_ext::cpu::LSTM_EXT_ISA
