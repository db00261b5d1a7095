// Matrices of float32 as operands of the tile engine, which takes bfloat16.
//
// A number is the sum of up to three bfloat16 numbers: x = x0 + x1 + x2, x0 = round(x), x1 = the first bits of x - x0,
// x2 = x - x0 - x1. All the x0 of a matrix are one part of it. With three parts (bf16x3) a float32 is exact, and
//   x y ~ x0 y2 + x2 y0 + x1 y1 + x1 y0 + x0 y1 + x0 y0;
// the terms left out are below 2^-23 of the product, of either sign. With two parts (bf16x2, 16 bits of each number) it
// is x1 y0 + x0 y1 + x0 y0, with one part x0 y0. Below about 2^-102 a number loses its lower parts, because a denormal
// counts as zero.
//
// An infinity has no lower parts, and infinity times a lower part that is 0 would be NaN. So the functions that split
// return whether splitting can represent all numbers; if not, the caller multiplies without the tile engine.
//
// Matrices are stored in tiles of the tile engine, one after the other, so that a tile is 1 KB of contiguous memory and
// a product reads them in order: a left operand as [row tile][k tile][part], a right operand as [column group][k
// tile][column tile][part] in groups of kGroupTiles column tiles, of which the last one may be narrower.
#pragma once

#include "cpu/isa.h"

#include "cpu/tile_engine.h"
#include "cpu/pack.h"
#include "cpu/range.h"
#include "cpu/simd.h"
#include "cpu/tile.h"

namespace lstm_ext::cpu::LSTM_EXT_ISA {
namespace {

constexpr int64_t kGroupTiles = 2;

// The column groups of a right operand.
struct RightTiles {
  const uint16_t* data;
  int64_t k_step;      // numbers from a k tile to the next
  int64_t group_step;  // from a group to the next
};

// A column tile of a right operand that is a range of columns from `first` on; `first` is a multiple of 16.
struct ColumnTile {
  uint16_t* data;
  int64_t k_step;
};

// A weight as a right operand.
struct Bf16Operand {
  uint16_t* data;
  uint8_t* all_split;  // for each 16 columns, or 16 units of a weight (4H, count): whether all could be split
  int parts = 0;       // 1, 2 or 3 bfloat16 numbers for each number; 0: none

  // The numbers of a column tile over `k_tiles` k tiles.
  LSTM_EXT_INLINE int64_t tile_numbers(int64_t k_tiles) const { return k_tiles * parts * kOperandSize; }
  // Whether so many column tiles exceed the second-level cache.
  LSTM_EXT_INLINE bool far(int64_t column_tiles, int64_t k_tiles) const {
    return 2.0 * static_cast<double>(column_tiles * tile_numbers(k_tiles)) > kCacheBytes;
  }
  // The right operand for a weight (4H, count): two groups, the four gates of 16 units.
  LSTM_EXT_INLINE RightTiles gates(int64_t index, int64_t k_tiles) const {
    const int64_t k_step = kGroupTiles * parts * kOperandSize;
    return {data + index * 2 * k_tiles * k_step, k_step, k_tiles * k_step};
  }
  // The right operand for a range of columns that begins at `first` and has `tiles` tiles: the groups from tile `tile`
  // on, which is the first of a group.
  LSTM_EXT_INLINE RightTiles columns(int64_t first, int64_t tile, int64_t tiles, int64_t depth) const {
    const int64_t size = divide_up(depth, kEngineTileDepth) * parts * kOperandSize;  // numbers of a tile over all k
    return {data + (first / kEngineTileRows + tile) * size, smaller(kGroupTiles, tiles - tile) * parts * kOperandSize,
            kGroupTiles * size};
  }
  LSTM_EXT_INLINE ColumnTile column_tile(int64_t first, int64_t tile, int64_t tiles, int64_t depth) const {
    const RightTiles group = columns(first, tile / kGroupTiles * kGroupTiles, tiles, depth);
    return {data + (group.data - data) + tile % kGroupTiles * parts * kOperandSize, group.k_step};
  }
};

// A worker's buffers for operands and sums.
struct TileScratch {
  uint16_t* left = nullptr;
  int64_t left_numbers = 0;
  uint16_t* right = nullptr;
  int64_t right_numbers = 0;
  float* all_sums = nullptr;  // two buffers
  int64_t sums_numbers = 0;   // numbers of one buffer
  bool in_tiles = false;      // EngineLimits::tiles

  float* sums(int64_t index) const { return all_sums + index * sums_numbers; }
  // The number of rows with `depth` numbers, and four column tiles of sums, that the buffers have room for.
  int64_t rows_for(int64_t depth, int bf16_parts) const {
    const int64_t of_sums = sums_numbers / (2 * kGroupTiles * kSumsSize);
    if (depth == 0) return kEngineTileRows * of_sums;
    return kEngineTileRows *
           smaller(left_numbers / (divide_up(depth, kEngineTileDepth) * bf16_parts * kOperandSize), of_sums);
  }
};

#if defined(LSTM_EXT_TILE_ENGINE)

// Calls f(std::integral_constant<int, parts>).
template <typename F>
LSTM_EXT_INLINE void with_bf16_parts(int bf16_parts, F&& f) {
  if (bf16_parts == 3) {
    f(std::integral_constant<int, 3>{});
  } else if (bf16_parts == 2) {
    f(std::integral_constant<int, 2>{});
  } else {
    f(std::integral_constant<int, 1>{});
  }
}

// Checks whether splitting can represent the numbers: if not, the remainder of one is not finite.
class SplitCheck {
 public:
  LSTM_EXT_INLINE SplitCheck() {}  // the compiler's own would be compiled for another target
  LSTM_EXT_INLINE void see(Reg<float> left, Reg<float> other) { sum_ = sum_ + (left + other); }
  bool passed() const {
    const Reg<float> difference = sum_ - sum_;
    for (int i = 0; i < Simd<float>::kLanes; ++i) {
      if (difference[i] != 0) return false;
    }
    return true;
  }

 private:
  Reg<float> sum_ = Simd<float>::zero();
};

// A word of an operand holds two numbers. A product needs no particular order of k, only the same one in both operands:
// pair i of a k tile is its numbers 2 i and 2 i + 1 with one part, and i and i + 16 with more.
template <int P>
constexpr int64_t first_of_pair(int64_t i) {
  return P == 1 ? 2 * i : i;
}
constexpr int64_t kTilePairs = kEngineTileDepth / 2;
template <int P>
constexpr int64_t kPairDistance = P == 1 ? 1 : kTilePairs;

// The words of 16 pairs, a[i] in the low half and b[i] in the high half; part p is written to to + p * kOperandSize.
template <int P>
LSTM_EXT_INLINE void split_pairs(Reg<float> a, Reg<float> b, uint16_t* to, SplitCheck& check) {
  if constexpr (P == 1) {
    TileEngine::store_words(to, TileEngine::pairs(TileEngine::round(a), TileEngine::round(b)));
  } else {
    typedef uint32_t Bits __attribute__((vector_size(sizeof(Reg<float>))));
    constexpr uint32_t kUpper = 0xFFFF0000;
#pragma GCC unroll 3
    for (int p = 0; p < P; ++p) {
      if (p == P - 1) check.see(a, b);
      // A rounded part leaves a remainder of either sign, so that the terms left out of products cancel. One rounding
      // is enough for that, but the last part of two leaves a remainder as well.
      constexpr uint32_t kHalf = 0x8000;
      const uint32_t half = P == 2 || p == 0 ? kHalf : 0;
      const Bits bits_a = reinterpret_cast<Bits>(a) + half, bits_b = reinterpret_cast<Bits>(b) + half;
      Simd<float>::store(reinterpret_cast<float*>(to + p * kOperandSize),
                         reinterpret_cast<Reg<float>>((bits_a >> 16) | (bits_b & kUpper)));
      a = a - reinterpret_cast<Reg<float>>(bits_a & kUpper);
      b = b - reinterpret_cast<Reg<float>>(bits_b & kUpper);
    }
  }
}

// Splits 32 numbers side by side, or the `count` that there are, to a row of a tile.
template <int P, typename W>
LSTM_EXT_INLINE void split_row(const W* numbers, int64_t count, uint16_t* to, SplitCheck& check) {
  const auto part = [&](int64_t begin) LSTM_EXT_LAMBDA_INLINE {
    return count > begin ? load_lanes<float>(numbers + begin, static_cast<int>(smaller(count - begin, 16)))
                         : Simd<float>::zero();
  };
  const Reg<float> a = part(0), b = part(16);
  if constexpr (P == 1) {
    TileEngine::store_half(to, TileEngine::round(a));
    TileEngine::store_half(to + 16, TileEngine::round(b));
  } else {
    split_pairs<P>(a, b, to, check);
  }
}

// The numbers in the parts of a left operand of so many rows and k, or of as many column tiles of a right one.
LSTM_EXT_INLINE int64_t bf16_numbers(int64_t rows, int64_t depth, int bf16_parts) {
  return divide_up(rows, kEngineTileRows) * divide_up(depth, kEngineTileDepth) * bf16_parts * kOperandSize;
}

// Splits rows to a left operand; the rows that fill up the last tile are zeros. Returns whether all could be split.
template <int P, typename A>
bool split_rows_into(int64_t rows, const A& a_row, int64_t depth, uint16_t* out) {
  const int64_t k_tiles = divide_up(depth, kEngineTileDepth);
  SplitCheck check;
  for (int64_t row = 0; row < divide_up(rows, kEngineTileRows) * kEngineTileRows; ++row) {
    const float* const a = row < rows ? a_row(row) : nullptr;
    uint16_t* to = out + row / kEngineTileRows * k_tiles * P * kOperandSize + row % kEngineTileRows * kEngineTileDepth;
    for (int64_t k = 0; k < k_tiles; ++k, to += P * kOperandSize) {
      split_row<P>(a + k * kEngineTileDepth, a ? depth - k * kEngineTileDepth : 0, to, check);
    }
  }
  return check.passed();
}

template <typename A>
bool split_rows(int bf16_parts, int64_t rows, const A& a_row, int64_t depth, uint16_t* out) {
  bool all_split = true;
  with_bf16_parts(bf16_parts, [&](auto p) { all_split = split_rows_into<p()>(rows, a_row, depth, out); });
  return all_split;
}

// Transposes a tile of words in place.
LSTM_EXT_INLINE void transpose_tile(uint16_t* tile) {
  auto* const numbers = reinterpret_cast<float*>(tile);  // moved, never computed with
  Reg<float> rows[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) rows[i] = Simd<float>::load(numbers + i * 16);
  transpose<float>(rows);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) Simd<float>::store(numbers + i * 16, rows[i]);
}

// Splits a column tile of a right operand whose columns are rows in memory: `count` columns, column j at columns + j *
// column_step. `to` is the first tile; the tiles of the next k follow with stride `k_step`. The next call takes the
// rows after these.
template <int P, typename W>
bool split_column_tile(const W* columns, int64_t column_step, int count, int64_t depth, uint16_t* to, int64_t k_step) {
  constexpr int64_t kAhead = 2 * kEngineTileDepth;
  SplitCheck check;
  for (int64_t k = 0; k < depth; k += kEngineTileDepth, to += k_step) {
    // Prefetches the data that is read soon: further on in these rows, or the beginning of the next ones.
    const W* const soon =
        columns + (k + kAhead < depth ? k + kAhead : kEngineTileRows * column_step + k + kAhead - depth);
    for (int j = 0; j < kEngineTileRows; ++j) {
      __builtin_prefetch(soon + j * column_step);
      __builtin_prefetch(soon + j * column_step + 16);
      split_row<P>(columns + j * column_step + k, j < count ? depth - k : 0, to + j * kEngineTileDepth, check);
    }
#pragma GCC unroll 3
    for (int p = 0; p < P; ++p) transpose_tile(to + p * kOperandSize);
  }
  return check.passed();
}

// Splits 32 rows, 16 columns of each, to a tile of a right operand; k runs along the rows in memory.
template <int P, typename Numbers>
LSTM_EXT_INLINE void split_tile(const Numbers& numbers, uint16_t* to, SplitCheck& check) {
  for (int64_t i = 0; i < kTilePairs; ++i) {
    const int64_t k = first_of_pair<P>(i);
    split_pairs<P>(numbers(k), numbers(k + kPairDistance<P>), to + i * kEngineTileDepth, check);
  }
}

// Splits rows to a right operand, `columns` columns of them from `column` on: column tile i of k tile k is written to
// place(i, k). Returns whether all could be split.
template <int P, typename Row, typename Place>
bool split_row_pairs(const Row& row, int64_t column, int64_t columns, int64_t depth, const Place& place) {
  SplitCheck check;
  for (int64_t k = 0; k < depth; k += kEngineTileDepth) {  // all columns of some rows, in the order of memory
    for (int64_t i = 0; i < columns; i += kEngineTileRows) {
      const int lanes = static_cast<int>(smaller(columns - i, kEngineTileRows));
      const auto numbers = [&](int64_t n) LSTM_EXT_LAMBDA_INLINE {
        const int64_t next = k + n + kEngineTileDepth;
        if (next < depth) __builtin_prefetch(row(next) + column + i);
        return k + n < depth ? load_lanes<float>(row(k + n) + column + i, lanes) : Simd<float>::zero();
      };
      split_tile<P>(numbers, place(i / kEngineTileRows, k / kEngineTileDepth), check);
    }
  }
  return check.passed();
}

// Splits columns of rows to the rows of a left operand, `count` of them from `column` on. Returns whether all could be
// split.
template <int P, typename Row>
bool split_columns(const Row& row, int64_t column, int64_t count, int64_t depth, uint16_t* to) {
  const int64_t k_tiles = divide_up(depth, kEngineTileDepth);
  SplitCheck check;
  for (int64_t k = 0; k < k_tiles; ++k) {  // all columns of some rows: one translation of an address serves them all
    const int64_t rows = smaller(depth - k * kEngineTileDepth, kEngineTileDepth);
    for (int64_t tile = 0; tile < divide_up(count, kEngineTileRows); ++tile) {
      const int64_t at = column + tile * kEngineTileRows;
      const int lanes = static_cast<int>(smaller(column + count - at, kEngineTileRows));
      const auto numbers = [&](int64_t i) LSTM_EXT_LAMBDA_INLINE {
        const int64_t next = (k + 1) * kEngineTileDepth + i;
        if (next < depth) __builtin_prefetch(row(next) + at);
        return i < rows ? load_lanes<float>(row(k * kEngineTileDepth + i) + at, lanes) : Simd<float>::zero();
      };
      uint16_t* const out = to + (tile * k_tiles + k) * P * kOperandSize;
      if constexpr (P == 1) {  // moving pairs moves fewer words
        split_tile<1>(numbers, out, check);
        transpose_tile(out);
      } else {
        alignas(64) float below[kTilePairs * 16];
        for (int64_t k_half = 0; k_half < 2; ++k_half) {
          Reg<float> v[16];
#pragma GCC unroll 16
          for (int i = 0; i < 16; ++i) v[i] = numbers(k_half * kTilePairs + i);
          transpose<float>(v);
#pragma GCC unroll 16
          for (int m = 0; m < 16; ++m) {
            if (k_half == 0) {
              Simd<float>::store(below + m * 16, v[m]);
            } else {
              split_pairs<P>(Simd<float>::load(below + m * 16), v[m], out + m * kEngineTileDepth, check);
            }
          }
        }
      }
    }
  }
  return check.passed();
}

#endif

}  // namespace
}  // namespace lstm_ext::cpu::LSTM_EXT_ISA
