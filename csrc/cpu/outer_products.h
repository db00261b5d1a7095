// Sums over time and batch: of outer products, for weight gradients, and of rows, for bias gradients.
//
// Partial sums over a block of kSumBlock rows are formed in registers and then added to memory: better locality, and a
// smaller rounding error than one running sum over all rows.
#pragma once

#include "cpu/isa.h"

#include "cpu/bf16_product.h"
#include "cpu/range.h"
#include "cpu/rows.h"
#include "cpu/simd.h"
#include "cpu/tile.h"

namespace lstm_ext::cpu::LSTM_EXT_ISA {
namespace {

// The left factor is copied if its row stride is at least this large. A tile reads a few numbers of each row, and all
// rows are read again for each panel. With large weights they come from the third-level cache, which is faster in
// memory order. The limits were found by trial.
constexpr int64_t kFarBytes = kVectorRegisters == 32 ? 9216 : 4096;

// The destination of sums of T. Sums of 16 bits are rounded and written once, never accumulated: see
// sums_gradients_once.
template <typename T>
struct SumsPlace {
  void* data;
  WeightKind kind = WeightKind::kOwn;

  T* own() const { return static_cast<T*>(data); }
  // f(a pointer to the numbers).
  template <typename F>
  LSTM_EXT_INLINE void with(F&& f) const {
    if constexpr (std::is_same_v<T, float>) {
      if (kind == WeightKind::kBFloat16) return f(static_cast<BFloat16*>(data));
      if (kind == WeightKind::kFloat16) return f(static_cast<Float16*>(data));
    }
    f(own());
  }
  LSTM_EXT_INLINE void prefetch(int64_t at) const {
    const int64_t size = kind == WeightKind::kOwn ? sizeof(T) : sizeof(uint16_t);
    __builtin_prefetch(static_cast<const char*>(data) + at * size, 1);
  }
  void zero(int64_t columns, Range rows) const {
    if (kind == WeightKind::kOwn) return zero_rows(own(), columns, rows);
    zero_rows(static_cast<uint16_t*>(data), columns, rows);
  }
};

template <typename T>
LSTM_EXT_INLINE void add_sum(T* at, Reg<T> sum, int lanes, bool fresh) {
  store_lanes<T>(at, fresh ? sum : load_lanes<T>(at, lanes) + sum, lanes);
}
LSTM_EXT_INLINE void add_sum(BFloat16* at, Reg<float> sum, int lanes, bool) { store_rounded(at, sum, lanes); }
LSTM_EXT_INLINE void add_sum(Float16* at, Reg<float> sum, int lanes, bool) { store_rounded(at, sum, lanes); }

// Up to this many samples are read again for each row of the sums, which are written in memory order.
constexpr int64_t kFewSamples = 8;

// add_outer_products for a few samples.
template <typename T, typename Right>
void add_few_outer_products(const T* left, int64_t left_step, int64_t samples, Range rows, const Right& right,
                            int64_t columns, const SumsPlace<T>& sums, bool fresh) {
  using S = Simd<T>;
  const T* right_rows[kFewSamples];
  for (int64_t n = 0; n < samples; ++n) right_rows[n] = right(n);
  sums.with([&](auto* out) LSTM_EXT_LAMBDA_INLINE {
    for (int64_t m = rows.begin; m < rows.end; ++m) {
      Reg<T> factors[kFewSamples];
      for (int64_t n = 0; n < samples; ++n) factors[n] = S::set1(left[n * left_step + m]);
      for_each_register<T>(columns, [&](int64_t column, int lanes) LSTM_EXT_LAMBDA_INLINE {
        Reg<T> total = S::zero();
        for (int64_t n = 0; n < samples; ++n) {
          total = S::fma(factors[n], load_lanes<T>(right_rows[n] + column, lanes), total);
        }
        add_sum(out + m * columns + column, total, lanes, fresh);
      });
    }
  });
}

// With up to kBandSamples samples, kBandRows long rows of the sums are written at a time, in all columns, so that their
// pages stay in the translation buffer.
constexpr int64_t kBandSamples = 64, kBandRows = 48, kLongRowBytes = 2048;

// sums[m, :] += sum over samples n of left[n * left_step + m] * right(n)[:], for m in `rows`; = instead of += if
// `fresh`. For `scratch` see BackwardPlan::outer_products.
template <typename T, typename Right>
void add_outer_products(const T* left, int64_t left_step, int64_t samples, Range rows, const Right& right,
                        int64_t columns, const SumsPlace<T>& sums, T* scratch, bool fresh) {
  if (samples <= kFewSamples) {
    add_few_outer_products<T>(left, left_step, samples, rows, right, columns, sums, fresh);
    return;
  }
  using S = Simd<T>;
  constexpr int kLanes = S::kLanes;
  const int64_t height = rows.end - rows.begin;
  const bool long_rows = columns * static_cast<int64_t>(sizeof(T)) >= kLongRowBytes;
  if (samples <= kBandSamples && long_rows && height > kBandRows) {
    for (int64_t m = rows.begin; m < rows.end; m += kBandRows) {
      const Range band{m, smaller(m + kBandRows, rows.end)};
      add_outer_products<T>(left, left_step, samples, band, right, columns, sums, scratch, fresh);
    }
    return;
  }
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
        const int64_t out = (rows.begin + first) * columns + column;
#pragma GCC unroll kTileRows
        for (int r = 0; r < R; ++r)
#pragma GCC unroll kTileColumns
          for (int v = 0; v < NV; ++v) sums.prefetch(out + r * columns + v * kLanes);
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
            sums.with([&](auto* to) LSTM_EXT_LAMBDA_INLINE {
              add_sum(to + out + r * columns + v * kLanes, tile.acc[r][v], lanes, first_block);
            });
          }
      });
    });
  }
}

// A right factor of a product on the tile engine, and its sums.
struct OuterSums {
  RowGrid<const float> right;
  int64_t columns;
  SumsPlace<float> sums;

  int64_t column_tiles() const { return divide_up(columns, kEngineTileRows); }
};

#if defined(LSTM_EXT_TILE_ENGINE)
// Adds column tiles of terms to a row of sums.
template <typename W>
LSTM_EXT_INLINE void add_sums(W* to, const float* terms, int64_t columns, bool fresh) {
  for (; columns > 0; columns -= kEngineTileRows, to += kEngineTileRows, terms += kSumsSize) {
    const int lanes = static_cast<int>(smaller(columns, kEngineTileRows));
    add_sum(to, Simd<float>::load(terms), lanes, fresh);
  }
}
// The same for sums of 16 bits. Not inlined, so that the code beside the tile engine stays short in other calls.
__attribute__((noinline)) inline void round_sums(const SumsPlace<float>& sums, int64_t at, const float* terms,
                                                 int64_t columns) {
  sums.with([&](auto* to) LSTM_EXT_LAMBDA_INLINE { add_sums(to + at, terms, columns, true); });
}

// A block of sums: all rows and some columns.
struct SumsBlock {
  SumsPlace<float> sums;
  int64_t at, row_step;  // index of the first number, and row stride
  int64_t columns;

  LSTM_EXT_INLINE void add(int64_t row, const float* terms, bool fresh) const {
    const int64_t to = at + row * row_step;
    if (sums.kind == WeightKind::kOwn) {
      add_sums(sums.own() + to, terms, columns, fresh);
    } else {
      round_sums(sums, to, terms, columns);
    }
  }
  LSTM_EXT_INLINE void prefetch(int64_t row) const {
    const int64_t from = at + row * row_step;
    for (int64_t column = 0; column < columns; column += kEngineTileRows) sums.prefetch(from + column);
  }
};

// add_outer_products on the tile engine with `bf16_parts` bf16 parts, for `count` right factors, at most
// kMostOuterSums. Blocks whose numbers cannot be split are multiplied without it.
constexpr int kMostOuterSums = 2;
inline void add_outer_bf16(int bf16_parts, const float* left, int64_t left_step, int64_t samples, Range rows,
                           const OuterSums* parts, int count, const TileScratch& tiles, float* scratch, bool fresh) {
  int64_t all_tiles = 0;
  for (int i = 0; i < count; ++i) all_tiles += parts[i].column_tiles();
  const int64_t most_k_tiles = tiles.right_numbers / (all_tiles * bf16_parts * kOperandSize);
  const int64_t most_samples = smaller(kSumBlock, most_k_tiles * kEngineTileDepth);
  if (count > 1 && most_samples < smaller(kSumBlock, samples)) {  // shorter blocks would cost more than they save
    for (int i = 0; i < count; ++i) {
      add_outer_bf16(bf16_parts, left, left_step, samples, rows, parts + i, 1, tiles, scratch, fresh);
    }
    return;
  }
  for (int64_t n = 0; n < samples; n += most_samples) {
    const int64_t depth = smaller(most_samples, samples - n);
    const int64_t k_tiles = divide_up(depth, kEngineTileDepth);
    const int64_t most_rows = tiles.rows_for(depth, bf16_parts);
    const auto left_row = [&](int64_t k) LSTM_EXT_LAMBDA_INLINE { return left + (n + k) * left_step; };
    const bool first_block = fresh && n == 0;
    const auto without_engine = [&](Range some) {
      for (int i = 0; i < count; ++i) {
        const auto right_row = [&](int64_t k) LSTM_EXT_LAMBDA_INLINE { return parts[i].right(n + k); };
        add_outer_products<float>(left + n * left_step, left_step, depth, some, right_row, parts[i].columns,
                                  parts[i].sums, scratch, first_block);
      }
    };
    Bf16Operand right_bf16[kMostOuterSums];
    uint16_t* place = tiles.right;
    bool all_split = true;
    for (int i = 0; i < count; ++i) {
      const OuterSums& part = parts[i];
      right_bf16[i] = {place, nullptr, bf16_parts};
      const auto right_row = [&](int64_t k) LSTM_EXT_LAMBDA_INLINE { return part.right(n + k); };
      with_bf16_parts(bf16_parts, [&](auto p) {
        all_split &= split_row_pairs<p()>(
            right_row, 0, part.columns, depth, [&](int64_t tile, int64_t k) LSTM_EXT_LAMBDA_INLINE {
              const ColumnTile to = right_bf16[i].column_tile(0, tile, part.column_tiles(), depth);
              return to.data + k * to.k_step;
            });
      });
      place += part.column_tiles() * right_bf16[i].tile_numbers(k_tiles);
    }
    if (!all_split) {
      without_engine(rows);
      continue;
    }
    // The groups of all parts, one after the other.
    struct Group {
      int part, width;
      int64_t tile;
    };
    const TileGroups of_first(parts[0].column_tiles(), true), of_second(all_tiles - parts[0].column_tiles(), true);
    const int64_t groups = of_first.count + of_second.count;
    const auto group_at = [&](int64_t i) LSTM_EXT_LAMBDA_INLINE {
      const int part = i < of_first.count ? 0 : 1;
      const TileGroups& of = part == 0 ? of_first : of_second;
      if (part == 1) i -= of_first.count;
      return Group{part, of.width(i), of.begin(i)};
    };
    for (int64_t first = rows.begin; first < rows.end; first += most_rows) {
      const int64_t height = smaller(most_rows, rows.end - first);
      with_bf16_parts(bf16_parts,
                      [&](auto p) { all_split = split_columns<p()>(left_row, first, height, depth, tiles.left); });
      if (!all_split) {
        without_engine({first, first + height});
        continue;
      }
      const auto place_of = [=](int64_t i) LSTM_EXT_LAMBDA_INLINE {
        if (i == groups) i = 0;  // after the last group, any sums will do
        const Group group = group_at(i);
        const OuterSums& part = parts[group.part];
        const int64_t column = group.tile * kEngineTileRows;
        return SumsBlock{part.sums, first * part.columns + column, part.columns,
                         smaller(part.columns - column, group.width * kEngineTileRows)};
      };
      struct Blocks {
        SumsBlock here, next;
      };
      Epilogue epilogue(
          [=](int64_t i, int) { return Blocks{place_of(i), place_of(i + 1)}; },
          [=](const Blocks& blocks, int64_t row, auto rows_at_once, const float* terms) LSTM_EXT_LAMBDA_INLINE {
            for (const int64_t end = row + rows_at_once(); row < end; ++row, terms += kEngineTileRows) {
              blocks.here.add(row, terms, first_block);
              const RowAhead ahead = row_ahead(row, height);
              (ahead.here ? blocks.here : blocks.next).prefetch(ahead.row);
            }
          });
      for (int64_t row = 0; row < smaller(height, kRowsAhead); ++row) place_of(0).prefetch(row);
      for (int64_t i = 0; i < groups; ++i) {
        const Group group = group_at(i);
        const RightTiles right = right_bf16[group.part].columns(0, group.tile, parts[group.part].column_tiles(), depth);
        const TileOperands operands{tiles.left, right, k_tiles};
        multiply_tiles(bf16_parts, tiles.in_tiles, &operands, 1, height, group.width, tiles.sums(i % 2), false,
                       epilogue.between(bf16_parts));
        epilogue.rest();
        epilogue.begin(i, group.width, tiles.sums(i % 2), height);
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
