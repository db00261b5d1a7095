// Sums over time and batch: of outer products, which are weight gradients, and of rows, which are bias gradients.
//
// Partial sums over a block of kSumBlock rows are formed in registers and then added to memory: better locality, and a
// smaller rounding error than one running sum over all rows.
#pragma once

#include "cpu/isa.h"

#include "cpu/plane_product.h"
#include "cpu/range.h"
#include "cpu/rows.h"
#include "cpu/simd.h"
#include "cpu/tile.h"

namespace lstm_ext::cpu::LSTM_EXT_ISA {
namespace {

// The left factor is copied where its rows lie at least this far apart: a column of it would touch
// a page a row, and with sizes that are powers of two always the same few sets of the caches.
constexpr int64_t kFarBytes = 4096;

// Up to so many samples are read again for each row of the sums, which are written in the order of memory.
constexpr int64_t kFewSamples = 8;

// What add_outer_products does with a few samples.
template <typename T, typename Right>
void add_few_outer_products(const T* left, int64_t left_step, int64_t samples, Range rows, const Right& right,
                            int64_t columns, T* sums, bool fresh) {
  using S = Simd<T>;
  const T* right_rows[kFewSamples];
  for (int64_t n = 0; n < samples; ++n) right_rows[n] = right(n);
  for (int64_t m = rows.begin; m < rows.end; ++m) {
    Reg<T> factors[kFewSamples];
    for (int64_t n = 0; n < samples; ++n) factors[n] = S::set1(left[n * left_step + m]);
    T* const out = sums + m * columns;
    for_each_register<T>(columns, [&](int64_t column, int lanes) LSTM_EXT_LAMBDA_INLINE {
      Reg<T> total = S::zero();
      for (int64_t n = 0; n < samples; ++n) {
        total = S::fma(factors[n], load_lanes<T>(right_rows[n] + column, lanes), total);
      }
      if (!fresh) total = load_lanes<T>(out + column, lanes) + total;
      store_lanes<T>(out + column, total, lanes);
    });
  }
}

// sums[m, :] += sum over samples n of left[n * left_step + m] * right(n)[:], for m in `rows`; where the sums are fresh,
// = instead of +=. `scratch`: see BackwardPlan::outer_product_size.
template <typename T, typename Right>
void add_outer_products(const T* left, int64_t left_step, int64_t samples, Range rows, const Right& right,
                        int64_t columns, T* sums, T* scratch, bool fresh) {
  if (samples <= kFewSamples) {
    add_few_outer_products<T>(left, left_step, samples, rows, right, columns, sums, fresh);
    return;
  }
  using S = Simd<T>;
  constexpr int kLanes = S::kLanes;
  const int64_t height = rows.end - rows.begin;
  const bool far = left_step * static_cast<int64_t>(sizeof(T)) >= kFarBytes;
  T* const panel = scratch;
  T* const copied = scratch + kSumBlock * kTileColumns * kLanes;
  for (int64_t n = 0; n < samples; n += kSumBlock) {
    const int64_t depth = smaller(kSumBlock, samples - n);
    const bool first_block = fresh && n == 0;
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
            const Reg<T> sum = tile.acc[r][v];
            store_lanes<T>(at, first_block ? sum : load_lanes<T>(at, lanes) + sum, lanes);
          }
      });
    });
  }
}

#if defined(LSTM_EXT_MATRIX_UNIT)
// The same on the matrix unit, of so many planes. Blocks whose numbers cannot be split go the other way.
inline void add_outer_planes(int planes, const float* left, int64_t left_step, int64_t samples, Range rows,
                             const RowGrid<const float>& right, int64_t columns, float* sums, const TileScratch& tiles,
                             float* scratch, bool fresh) {
  const int64_t column_tiles = divide_up(columns, kUnitTileRows);
  const int64_t most_k_tiles = tiles.right_numbers / (column_tiles * planes * kOperandSize);
  const int64_t most_samples = smaller(kSumBlock, most_k_tiles * kUnitTileDepth);
  const UnitPlanes right_planes{tiles.right, nullptr, planes};
  for (int64_t n = 0; n < samples; n += most_samples) {
    const int64_t depth = smaller(most_samples, samples - n);
    const int64_t k_tiles = divide_up(depth, kUnitTileDepth);
    const int64_t left_tile = k_tiles * planes * kOperandSize;
    const int64_t most_rows = tiles.rows_for(depth, planes);
    const bool far = right_planes.far(column_tiles, k_tiles);
    const auto right_row = [&](int64_t k) LSTM_EXT_LAMBDA_INLINE { return right(n + k); };
    const auto left_row = [&](int64_t k) LSTM_EXT_LAMBDA_INLINE { return left + (n + k) * left_step; };
    const auto lanes_of = [](int64_t tile, int64_t size)
                              LSTM_EXT_LAMBDA_INLINE { return static_cast<int>(smaller(size - tile * 16, 16)); };
    const bool first_block = fresh && n == 0;
    const auto without_unit = [&](Range part) {
      add_outer_products<float>(left + n * left_step, left_step, depth, part, right_row, columns, sums, scratch,
                                first_block);
    };
    bool splits = true;
    for (int64_t tile = 0; tile < column_tiles; ++tile) {
      const ColumnTile to = right_planes.column_tile(0, tile, column_tiles, depth);
      with_planes(planes, [&](auto p) {
        splits &= split_row_pairs<p(), false>(right_row, tile * kUnitTileRows, lanes_of(tile, columns), depth, to.data,
                                              to.k_step);
      });
    }
    if (!splits) {
      without_unit(rows);
      continue;
    }
    for (int64_t first = rows.begin; first < rows.end; first += most_rows) {
      const int64_t height = smaller(most_rows, rows.end - first);
      const int64_t row_tiles = divide_up(height, kUnitTileRows);
      for (int64_t tile = 0; tile < row_tiles; ++tile) {
        with_planes(planes, [&](auto p) {
          splits &= split_row_pairs<p(), true>(left_row, first + tile * kUnitTileRows, lanes_of(tile, height), depth,
                                               tiles.left + tile * left_tile, p() * kOperandSize);
        });
      }
      if (!splits) {
        without_unit({first, first + height});
        splits = true;
        continue;
      }
      const auto prefetch_row = [&](int64_t tile, int64_t row) LSTM_EXT_LAMBDA_INLINE {
        const int64_t end = smaller(tile + 2 * kGroupTiles, column_tiles);
        for (; tile < end; ++tile) __builtin_prefetch(sums + (first + row) * columns + tile * kUnitTileRows, 1);
      };
      Epilogue epilogue([&](int64_t tile, int width, int64_t row, auto rows_at_once, const float* terms)
                            LSTM_EXT_LAMBDA_INLINE {
                              for (const int64_t end = row + rows_at_once(); row < end; ++row, terms += kUnitTileRows) {
                                float* const out = sums + (first + row) * columns;
                                for (int i = 0; i < width; ++i) {
                                  float* const to = out + (tile + i) * kUnitTileRows;
                                  const int lanes = lanes_of(tile + i, columns);
                                  const Reg<float> sum = Simd<float>::load(terms + i * kSumsSize);
                                  store_lanes<float>(to, first_block ? sum : load_lanes<float>(to, lanes) + sum, lanes);
                                }
                                prefetch_row(tile + width, row);
                              }
                            });
      for (int64_t row = 0; row < height; ++row) prefetch_row(0, row);
      const TileGroups groups(column_tiles);
      for (int64_t i = 0; i < groups.count; ++i) {
        const int64_t tile = groups.begin(i);
        const int width = groups.width(i);
        Between between = epilogue.between(planes);
        if (far && i + 1 < groups.count) {
          between.fetch(right_planes.columns(0, groups.begin(i + 1), column_tiles, depth).data,
                        groups.width(i + 1) * right_planes.tile_numbers(k_tiles));
        }
        multiply_tiles(planes, tiles.left, height, right_planes.columns(0, tile, column_tiles, depth), width, k_tiles,
                       tiles.sums(i % 2), false, between);
        epilogue.rest();
        epilogue.begin(tile, width, tiles.sums(i % 2), height);
      }
      epilogue.rest();
    }
  }
}
#endif

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
