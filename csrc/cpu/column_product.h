// Products of rows with a weight whose rows are what the sum runs over, for a range of its columns.
#pragma once

#include "cpu/isa.h"

#include "cpu/range.h"
#include "cpu/rows.h"
#include "cpu/simd.h"
#include "cpu/tile.h"

namespace lstm_ext::cpu::LSTM_EXT_ISA {
namespace {

// A (depth, columns) row-major matrix as the right-hand side of a product: in place, or as panels of the blocks that
// for_each_column_block makes of one range of columns, [k][register][lane].
template <typename T>
struct RightHandSide {
  const T* data;
  int64_t row_step;  // of the row-major matrix
  int64_t depth;
  bool packed;

  template <int NV>
  LSTM_EXT_INLINE int64_t step() const {
    return packed ? NV * Simd<T>::kLanes : row_step;
  }
  template <int NV>
  LSTM_EXT_INLINE const T* at(int64_t column, int64_t k) const {
    return packed ? data + column * depth + k * NV * Simd<T>::kLanes : data + k * row_step + column;
  }
};

// Makes the panels of some columns; of `shares` callers, each makes its own.
template <typename T>
void pack_columns(const T* matrix, int64_t row_step, int64_t depth, Range columns, int64_t share_index, int64_t shares,
                  T* out) {
  using S = Simd<T>;
  int64_t index = 0;
  for_each_column_block<T>(columns.begin, columns.end, [&](int64_t column, auto width, int last) {
    if (index++ % shares != share_index) return;
    constexpr int NV = width();
    T* target = out + column * depth;
    for (int64_t k = 0; k < depth; ++k, target += NV * S::kLanes) {
      const T* source = matrix + k * row_step + column;
#pragma GCC unroll kTileColumns
      for (int v = 0; v < NV; ++v) {
        S::store(target + v * S::kLanes, load_lanes<T>(source + v * S::kLanes, v == NV - 1 ? last : S::kLanes));
      }
    }
  });
}

// For `rows` rows and `columns`: a * b + start(row, column, lanes, start value), kLanes columns at a time to
// finish(row, column, sums, lanes). prefetch(row, column) asks for what `finish` will read. Between blocks of k the
// sums wait in partial(row)[columns].
template <typename T, typename A, typename Partial, typename Prefetch, typename Start, typename Finish>
LSTM_EXT_INLINE void multiply_columns(const A& a_row, int64_t rows, const RightHandSide<T>& b, Range columns,
                                      const Partial& partial, const Prefetch& prefetch, const Start& start,
                                      const Finish& finish) {
  using S = Simd<T>;
  constexpr int kLanes = S::kLanes;
  const auto column_block = [&](int64_t column, auto width, int last) LSTM_EXT_LAMBDA_INLINE {
    constexpr int NV = width();
    const bool exact = b.packed || last == kLanes;
    for (int64_t k = 0; k == 0 || k < b.depth; k += kBlockK) {
      const int64_t depth = smaller(kBlockK, b.depth - k);
      for_each_row_tile(rows, [&](int64_t row, auto height) {
        constexpr int R = height();
        Tile<T, R, NV> tile;
        tile.zero();
        const T* a[R];
#pragma GCC unroll kTileRows
        for (int r = 0; r < R; ++r) a[r] = b.depth > 0 ? a_row(row + r) + k : nullptr;
        const bool done = k + depth >= b.depth;
        // What the epilogue reads was written long ago; it arrives while the tile is summed.
        if (done) {
          for (int r = 0; r < R; ++r)
            for (int v = 0; v < NV; ++v) prefetch(row + r, column + v * kLanes);
        }
        const T* panel = b.template at<NV>(column, k);
        const int64_t step = b.template step<NV>();
        if (exact) {
          accumulate_rows(tile, a, panel, step, depth);
        } else {
          accumulate_rows<T, R, NV, true>(tile, a, panel, step, depth, last);
        }
#pragma GCC unroll kTileRows
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll kTileColumns
          for (int v = 0; v < NV; ++v) {
            const int lanes = v == NV - 1 ? last : kLanes;
            const int64_t at = column + v * kLanes;
            Reg<T> before;
            if (k == 0) {
              start(row + r, at, lanes, before);
            } else {
              before = load_lanes<T>(partial(row + r) + at, lanes);
            }
            tile.acc[r][v] = tile.acc[r][v] + before;
          }
        }
        for (int r = 0; r < R; ++r) {
          for (int v = 0; v < NV; ++v) {
            const int lanes = v == NV - 1 ? last : kLanes;
            const int64_t at = column + v * kLanes;
            if (done) {
              alignas(64) T sums[kLanes];
              S::store(sums, tile.acc[r][v]);
              finish(row + r, at, sums, lanes);
            } else {
              store_lanes<T>(partial(row + r) + at, tile.acc[r][v], lanes);
            }
          }
        }
      });
    }
  };
  for_each_column_block<T>(columns.begin, columns.end, column_block);
}

// For products that prefetch nothing, and that start from zero.
constexpr auto kNoPrefetch = [](int64_t, int64_t) LSTM_EXT_LAMBDA_INLINE {};
template <typename T>
constexpr auto kFromZero = [](int64_t, int64_t, int, Reg<T>& v) LSTM_EXT_LAMBDA_INLINE { v = Simd<T>::zero(); };

}  // namespace
}  // namespace lstm_ext::cpu::LSTM_EXT_ISA
