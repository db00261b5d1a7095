// Products of rows with a weight whose rows the sum runs over, for a range of its columns.
#pragma once

#include "cpu/isa.h"

#include "cpu/bf16_product.h"
#include "cpu/range.h"
#include "cpu/rows.h"
#include "cpu/simd.h"
#include "cpu/tile.h"

namespace lstm_ext::cpu::LSTM_EXT_ISA {
namespace {

// A (depth, columns) row-major matrix as the right-hand side of a product. It is read in place, or from panels
// [k][register][lane] of the blocks that for_each_column_block makes of a range of columns, or from bf16 parts of that
// range.
template <typename T>
struct RightHandSide {
  WeightRows<T> matrix;
  T* panels;         // or null
  int64_t row_step;  // row stride of the matrix
  int64_t depth;
  T* block_panel;          // a worker's own: kBlockK widened rows of a block of columns
  bool backwards = false;  // with bf16 parts: multiplies the columns from last to first; see GateProduct::Sweep
  Bf16Operand bf16{};
  TileScratch scratch{};

  bool widens() const { return !panels && !matrix.own; }
  template <int NV>
  LSTM_EXT_INLINE int64_t step() const {
    return matrix.own && !panels ? row_step : NV * Simd<T>::kLanes;
  }
  template <int NV>
  LSTM_EXT_INLINE const T* at(int64_t column, int64_t k) const {
    if (widens()) return block_panel;
    return panels ? panels + column * depth + k * NV * Simd<T>::kLanes : matrix.own + k * row_step + column;
  }
};

// Widens some columns of the rows of W, `registers` registers wide, to a panel of T.
template <typename T, typename W>
void widen_columns(const W* rows, int64_t row_step, int64_t depth, int registers, int last, T* panel) {
  constexpr int n = Simd<T>::kLanes;
  for (int64_t k = 0; k < depth; ++k, rows += row_step) {
    for (int v = 0; v < registers; ++v, panel += n) {
      Simd<T>::store(panel, load_lanes<T>(rows + v * n, v == registers - 1 ? last : n));
    }
  }
}

// Packs the panels of some columns; each of the `shares` callers packs its own.
template <typename T, typename W>
void pack_columns(const W* matrix, int64_t row_step, int64_t depth, Range columns, int64_t share_index, int64_t shares,
                  T* out) {
  int64_t index = 0;
  for_each_column_block<T>(columns.begin, columns.end, [&](int64_t column, auto width, int last) {
    if (index++ % shares != share_index) return;
    constexpr int NV = width();
    widen_columns(matrix + column, row_step, depth, NV, last, out + column * depth);
  });
}

#if defined(LSTM_EXT_TILE_ENGINE)
// The same for bf16 parts: packs column tiles.
template <typename W>
void pack_column_bf16(const W* matrix, int64_t row_step, int64_t depth, Range columns, int64_t share_index,
                      int64_t shares, const Bf16Operand& bf16) {
  const int64_t tiles = divide_up(columns.end - columns.begin, kEngineTileRows);
  const Range mine = share(tiles, shares, share_index);
  const int64_t column = columns.begin + mine.begin * kEngineTileRows;
  const int64_t count = smaller(columns.begin + mine.end * kEngineTileRows, columns.end) - column;
  const auto row = [&](int64_t k) LSTM_EXT_LAMBDA_INLINE { return matrix + k * row_step; };
  const auto place = [&](int64_t tile, int64_t k) LSTM_EXT_LAMBDA_INLINE {
    const ColumnTile to = bf16.column_tile(columns.begin, mine.begin + tile, tiles, depth);
    return to.data + k * to.k_step;
  };
  with_bf16_parts(bf16.parts, [&](auto p) {
    const bool all_split = split_row_pairs<p()>(row, column, count, depth, place);
    for (int64_t tile = mine.begin; tile < mine.end; ++tile)
      bf16.all_split[columns.begin / kEngineTileRows + tile] = all_split;
  });
}

// multiply_columns from bf16 parts. Returns how many rows it computed: those before the first that cannot be split, or
// none if the columns cannot be split.
template <typename A, typename Prefetch, typename Start, typename Finish>
int64_t multiply_columns_bf16(const A& a_row, int64_t rows, const RightHandSide<float>& b, Range columns,
                              const Prefetch& prefetch, const Start& start, const Finish& finish) {
  const Bf16Operand& bf16 = b.bf16;
  const int64_t tiles = divide_up(columns.end - columns.begin, kEngineTileRows);
  const int64_t k_tiles = divide_up(b.depth, kEngineTileDepth);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    if (!bf16.all_split[columns.begin / kEngineTileRows + tile]) return 0;
  }
  for (int64_t first = 0; first < rows; first += kMostEngineRows) {
    const int64_t height = smaller(kMostEngineRows, rows - first);
    const int64_t row_tiles = divide_up(height, kEngineTileRows);
    const int64_t k_most = b.scratch.left_numbers / (row_tiles * bf16.parts * kOperandSize);
    const int64_t k_blocks = divide_up(k_tiles, k_most);
    // A single row tile is multiplied with four column tiles at once. With more, narrow groups leave less epilogue work
    // after the last product.
    const TileGroups groups(tiles, row_tiles == 1);
    const int64_t most_width = groups.width(0);
    // The columns of a block, and those of the next one.
    struct Block {
      Range here, next;
    };
    const auto columns_of = [=](int64_t tile, int64_t width) LSTM_EXT_LAMBDA_INLINE {
      const int64_t begin = tile > 0 ? tile : 0, end = smaller(tile + width, tiles);
      const int64_t column = columns.begin + begin * kEngineTileRows;
      return Range{column, smaller(columns.begin + end * kEngineTileRows, columns.end)};
    };
    const auto prefetch_row = [=](Range some, int64_t row) LSTM_EXT_LAMBDA_INLINE {
      for (int64_t column = some.begin; column < some.end; column += kEngineTileRows) prefetch(first + row, column);
    };
    Epilogue epilogue(
        [=, backwards = b.backwards](int64_t tile, int width) {
          return Block{columns_of(tile, width), columns_of(backwards ? tile - most_width : tile + width, most_width)};
        },
        [=](const Block& block, int64_t row, auto count, const float* sums) LSTM_EXT_LAMBDA_INLINE {
          const Range here = block.here;
          for (const int64_t end = row + count(); row < end; ++row, sums += kEngineTileRows) {
            const float* part = sums;
            for (int64_t column = here.begin; column < here.end; column += kEngineTileRows, part += kSumsSize) {
              const int lanes = static_cast<int>(smaller(here.end - column, kEngineTileRows));
              Reg<float> before;
              start(first + row, column, lanes, before);
              finish(first + row, column, Simd<float>::load(part) + before, lanes);
            }
            const RowAhead ahead = row_ahead(row, height);
            prefetch_row(ahead.here ? here : block.next, ahead.row);
          }
        });
    const Range first_columns = columns_of(groups.begin(b.backwards ? groups.count - 1 : 0), most_width);
    for (int64_t row = 0; row < smaller(height, kRowsAhead); ++row) prefetch_row(first_columns, row);
    for (int64_t block = 0; block < k_blocks; ++block) {
      const Range k = share(k_tiles, k_blocks, block);
      const auto a_part = [&](int64_t row)
                              LSTM_EXT_LAMBDA_INLINE { return a_row(first + row) + k.begin * kEngineTileDepth; };
      const int64_t depth = smaller(b.depth, k.end * kEngineTileDepth) - k.begin * kEngineTileDepth;
      if (!split_rows(bf16.parts, height, a_part, depth, b.scratch.left)) return first;
      for (int64_t i = 0; i < groups.count; ++i) {
        const int64_t group = b.backwards ? groups.count - 1 - i : i;
        const int64_t tile = groups.begin(group);
        const int width = groups.width(group);
        RightTiles right = bf16.columns(columns.begin, tile, tiles, b.depth);
        right.data += k.begin * right.k_step;
        float* const sums = k_blocks > 1 ? b.scratch.all_sums + tile * row_tiles * kSumsSize : b.scratch.sums(i % 2);
        const TileOperands operands{b.scratch.left, right, k.end - k.begin};
        multiply_tiles(bf16.parts, b.scratch.in_tiles, &operands, 1, height, width, sums, block > 0,
                       epilogue.between(bf16.parts));
        if (block + 1 == k_blocks) {
          epilogue.rest();
          epilogue.begin(tile, width, sums, height);
        }
      }
      epilogue.rest();
    }
  }
  return rows;
}
#endif

// multiply_columns without the tile engine, for some rows.
template <typename T, typename A, typename Partial, typename Prefetch, typename Start, typename Finish>
LSTM_EXT_INLINE void multiply_columns_of_rows(const A& a_row, Range rows, const RightHandSide<T>& b, Range columns,
                                              const Partial& partial, const Prefetch& prefetch, const Start& start,
                                              const Finish& finish) {
  using S = Simd<T>;
  constexpr int kLanes = S::kLanes;
  // Finishes one row of a tile. A separate function, because each tile would otherwise have a copy of it.
  const auto finish_row = [&](int64_t row, int64_t column, const T* sums, int count,
                              int last) __attribute__((noinline)) {
    for (int v = 0; v < count; ++v) {
      finish(row, column + v * kLanes, S::load(sums + v * kLanes), v == count - 1 ? last : kLanes);
    }
  };
  const auto column_block = [&](int64_t column, auto width, int last) LSTM_EXT_LAMBDA_INLINE {
    constexpr int NV = width();
    const bool exact = b.panels || b.widens() || last == kLanes;
    for (int64_t k = 0; k == 0 || k < b.depth; k += kBlockK) {
      const int64_t depth = smaller(kBlockK, b.depth - k);
      if (b.widens()) {
        b.matrix.with([&](const auto* matrix) {
          widen_columns(matrix + k * b.row_step + column, b.row_step, depth, NV, last, b.block_panel);
        });
      }
      // If the matrix is packed, the tiles prefetch the panel after this one.
      const T* const here = b.template at<NV>(column, k);
      const int64_t numbers = smaller(kBlockK, b.depth) * NV * kLanes;
      const bool there = b.panels && (k + depth < b.depth || column + NV * kLanes < columns.end);
      NextPanel next_panel(here + depth * NV * kLanes, there ? numbers * static_cast<int64_t>(sizeof(T)) : 0, here);
      for_each_row_tile(rows.end - rows.begin, [&](int64_t first, auto height) {
        const int64_t row = rows.begin + first;
        constexpr int R = height();
        Tile<T, R, NV> tile;
        tile.zero();
        const T* a[R];
#pragma GCC unroll kTileRows
        for (int r = 0; r < R; ++r) a[r] = b.depth > 0 ? a_row(row + r) + k : nullptr;
        const bool done = k + depth >= b.depth;
        // The data that an epilogue reads was written long ago. The epilogue of each tile prefetches that of the next
        // tile, a little at a time. The first tile prefetches all of its own before its sum.
        if (done && first == 0 && column == columns.begin) {
          for (int r = 0; r < R; ++r)
            for (int v = 0; v < NV; ++v) prefetch(row + r, column + v * kLanes);
        }
        const T* panel = b.template at<NV>(column, k);
        const int64_t step = b.template step<NV>();
        if (exact) {
          constexpr bool kFetches = NextPanel::kUsed && R > 1 && NV > 1;
          accumulate_rows<T, R, NV, false, kFetches ? Fetch::kRead : Fetch::kNothing>(
              tile, a, panel, step, depth, 0, kFetches ? next_panel.take(depth) : nullptr);
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
        const bool last_tile = row + R == rows.end;
        const int64_t next_row = last_tile ? rows.begin : row + R;
        const int64_t next_column = last_tile ? smaller(column + NV * kLanes, columns.end - 1) : column;
        for (int r = 0; r < R; ++r) {
          if (!done) {
            for (int v = 0; v < NV; ++v) {
              store_lanes<T>(partial(row + r) + column + v * kLanes, tile.acc[r][v], v == NV - 1 ? last : kLanes);
            }
            continue;
          }
          alignas(64) T sums[NV * kLanes];
          for (int v = 0; v < NV; ++v) {
            prefetch(smaller(next_row + r, rows.end - 1), smaller(next_column + v * kLanes, columns.end - 1));
            S::store(sums + v * kLanes, tile.acc[r][v]);
          }
          finish_row(row + r, column, sums, NV, last);
        }
      });
    }
  };
  for_each_column_block<T>(columns.begin, columns.end, column_block);
}

// For `rows` rows and `columns`: computes a * b + start(row, column, lanes, start value) and passes it to finish(row,
// column, sums, lanes), one register of kLanes columns at a time. prefetch(row, column) prefetches the data that
// `finish` reads. Between blocks of k the sums are kept in partial(row)[columns].
template <typename T, typename A, typename Partial, typename Prefetch, typename Start, typename Finish>
LSTM_EXT_INLINE void multiply_columns(const A& a_row, int64_t rows, const RightHandSide<T>& b, Range columns,
                                      const Partial& partial, const Prefetch& prefetch, const Start& start,
                                      const Finish& finish) {
  int64_t done = 0;
  const RightHandSide<T>* in = &b;
  RightHandSide<T> plain{};
  if constexpr (kHasTileEngine<T>) {
    if (b.bf16.parts > 0) {
      if (b.depth > 0) done = multiply_columns_bf16(a_row, rows, b, columns, prefetch, start, finish);
      if (done == rows) return;
      plain = {b.matrix, nullptr, b.row_step, b.depth, b.block_panel};
      in = &plain;
    }
  }
  multiply_columns_of_rows(a_row, Range{done, rows}, *in, columns, partial, prefetch, start, finish);
}

// For products without prefetches, and for products that start from zero.
constexpr auto kNoPrefetch = [](int64_t, int64_t) LSTM_EXT_LAMBDA_INLINE {};
template <typename T>
constexpr auto kFromZero = [](int64_t, int64_t, int, Reg<T>& v) LSTM_EXT_LAMBDA_INLINE { v = Simd<T>::zero(); };

}  // namespace
}  // namespace lstm_ext::cpu::LSTM_EXT_ISA
