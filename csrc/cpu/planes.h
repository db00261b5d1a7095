// Matrices of float32 as operands of a matrix unit, which are bfloat16.
//
// A number is the sum of up to three of those: x = x0 + x1 + x2, x0 = round(x), x1 = round(x - x0), x2 = round(x - x0 -
// x1). All the x0 of a matrix are a plane of it. With three planes a float32 is exact but for the last rounding, and
//   x y ~ x0 y2 + x2 y0 + x1 y1 + x1 y0 + x0 y1 + x0 y0;
// what is left out is below 2^-24 of the product. With two planes (16 bits of each number) x1 y0 + x0 y1 + x0 y0, with
// one x0 y0. Below about 2^-102 a number loses its lower planes, since a denormal counts as zero.
//
// An infinity has no lower planes, and infinity times a lower plane that is 0 would be NaN. So the functions that split
// say whether all numbers are within what splitting can do, and the caller multiplies without the unit if not.
//
// Matrices lie in tiles of the unit, one behind the other, so that a tile is 1 KB in a row and a product reads them in
// order: a left operand as [row tile][k tile][plane], a right operand as [column group][k tile][column tile][plane] in
// groups of kGroupTiles column tiles, of which the last one may be narrower.
#pragma once

#include "cpu/isa.h"

#include "cpu/matrix_unit.h"
#include "cpu/pack.h"
#include "cpu/range.h"
#include "cpu/simd.h"
#include "cpu/tile.h"

namespace lstm_ext::cpu::LSTM_EXT_ISA {
namespace {

constexpr int64_t kGroupTiles = 2;

// A right operand's column groups.
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
struct UnitPlanes {
  uint16_t* data;
  uint8_t* splits;  // for each 16 columns, or of a weight (4H, count) each 16 units: whether all could be split
  int count = 0;    // how many planes

  // Numbers of a column tile over so many k tiles.
  LSTM_EXT_INLINE int64_t tile_numbers(int64_t k_tiles) const { return k_tiles * count * kOperandSize; }
  // Whether so many column tiles are more than the second-level cache keeps.
  LSTM_EXT_INLINE bool far(int64_t column_tiles, int64_t k_tiles) const {
    return 2.0 * static_cast<double>(column_tiles * tile_numbers(k_tiles)) > kCacheBytes;
  }
  // Of a weight (4H, count): two groups, the four gates of 16 units.
  LSTM_EXT_INLINE RightTiles gates(int64_t index, int64_t k_tiles) const {
    const int64_t k_step = kGroupTiles * count * kOperandSize;
    return {data + index * 2 * k_tiles * k_step, k_step, k_tiles * k_step};
  }
  // Of a range of columns that begins at `first` and has `tiles` tiles: the groups from tile `tile` on, which begins
  // one.
  LSTM_EXT_INLINE RightTiles columns(int64_t first, int64_t tile, int64_t tiles, int64_t depth) const {
    const int64_t size = divide_up(depth, kUnitTileDepth) * count * kOperandSize;  // of a tile and all k
    return {data + (first / kUnitTileRows + tile) * size, smaller(kGroupTiles, tiles - tile) * count * kOperandSize,
            kGroupTiles * size};
  }
  LSTM_EXT_INLINE ColumnTile column_tile(int64_t first, int64_t tile, int64_t tiles, int64_t depth) const {
    const RightTiles group = columns(first, tile / kGroupTiles * kGroupTiles, tiles, depth);
    return {data + (group.data - data) + tile % kGroupTiles * count * kOperandSize, group.k_step};
  }
};

// Where a worker keeps operands and sums.
struct TileScratch {
  uint16_t* left = nullptr;
  int64_t left_numbers = 0;
  uint16_t* right = nullptr;
  int64_t right_numbers = 0;
  float* all_sums = nullptr;  // two buffers
  int64_t sums_numbers = 0;   // of one

  float* sums(int64_t index) const { return all_sums + index * sums_numbers; }
  // How many rows there is room for, of so many numbers each, and of four column tiles of sums.
  int64_t rows_for(int64_t depth, int planes) const {
    const int64_t of_sums = sums_numbers / (2 * kGroupTiles * kSumsSize);
    if (depth == 0) return kUnitTileRows * of_sums;
    return kUnitTileRows * smaller(left_numbers / (divide_up(depth, kUnitTileDepth) * planes * kOperandSize), of_sums);
  }
};

#if defined(LSTM_EXT_MATRIX_UNIT)

// Calls f(std::integral_constant<int, planes>).
template <typename F>
LSTM_EXT_INLINE void with_planes(int planes, F&& f) {
  if (planes == 3) {
    f(std::integral_constant<int, 3>{});
  } else if (planes == 2) {
    f(std::integral_constant<int, 2>{});
  } else {
    f(std::integral_constant<int, 1>{});
  }
}

// Sees whether numbers are within what splitting can do.
class SplitCheck {
 public:
  template <int P>
  LSTM_EXT_INLINE void see(Reg<float> v) {
    if constexpr (P > 1) {
      // As integers: NaN lies above infinity.
      const Index size = reinterpret_cast<Index>(Simd<float>::abs(v));
      largest_ = size > largest_ ? size : largest_;
    }
  }
  bool passed() const {
    for (int i = 0; i < Simd<float>::kLanes; ++i) {
      if (largest_[i] >= kTooLarge) return false;
    }
    return true;
  }

 private:
  using Index = typename Simd<float>::Index;
  static constexpr int kTooLarge = 0x7F7F8000;  // from here on rounding to bfloat16 gives infinity

  Index largest_ = {};
};

// out[p] = plane p of 16 numbers.
template <int P>
LSTM_EXT_INLINE void split(Reg<float> v, MatrixUnit::Half (&out)[P]) {
#pragma GCC unroll 3
  for (int p = 0; p < P; ++p) {
    out[p] = MatrixUnit::round(v);
    if (p + 1 < P) v = v - MatrixUnit::widen(out[p]);
  }
}

// Numbers in the planes of a left operand of so many rows and k, or of as many column tiles of a right one.
LSTM_EXT_INLINE int64_t plane_numbers(int64_t rows, int64_t depth, int planes) {
  return divide_up(rows, kUnitTileRows) * divide_up(depth, kUnitTileDepth) * planes * kOperandSize;
}

// Rows as a left operand; those that fill the last tile are zeros. Returns whether all could be split.
template <int P, typename A>
bool split_rows_into(int64_t rows, const A& a_row, int64_t depth, uint16_t* out) {
  const int64_t k_tiles = divide_up(depth, kUnitTileDepth);
  SplitCheck check;
  for (int64_t row = 0; row < divide_up(rows, kUnitTileRows) * kUnitTileRows; ++row) {
    const float* const a = row < rows ? a_row(row) : nullptr;
    uint16_t* to = out + row / kUnitTileRows * k_tiles * P * kOperandSize + row % kUnitTileRows * kUnitTileDepth;
    for (int64_t k = 0; k < k_tiles; ++k, to += P * kOperandSize) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const int64_t left = depth - k * kUnitTileDepth - half * 16;
        Reg<float> v = Simd<float>::zero();
        if (a && left > 0)
          v = load_lanes<float>(a + k * kUnitTileDepth + half * 16, static_cast<int>(smaller(left, 16)));
        check.see<P>(v);
        MatrixUnit::Half planes[P];
        split<P>(v, planes);
#pragma GCC unroll 3
        for (int p = 0; p < P; ++p) MatrixUnit::store_half(to + p * kOperandSize + half * 16, planes[p]);
      }
    }
  }
  return check.passed();
}

template <typename A>
bool split_rows(int planes, int64_t rows, const A& a_row, int64_t depth, uint16_t* out) {
  bool splits = true;
  with_planes(planes, [&](auto p) { splits = split_rows_into<p()>(rows, a_row, depth, out); });
  return splits;
}

// A tile of words becomes its transpose.
LSTM_EXT_INLINE void transpose_tile(uint16_t* tile) {
  auto* const numbers = reinterpret_cast<float*>(tile);  // moved, never computed with
  Reg<float> rows[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) rows[i] = Simd<float>::load(numbers + i * 16);
  transpose<float>(rows);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) Simd<float>::store(numbers + i * 16, rows[i]);
}

// A column tile of a right operand whose columns are rows in memory: column j is at columns + j * column_step, `count`
// of them. `to` is its first tile, tiles of the next k are `k_step` further.
template <int P>
bool split_column_tile(const float* columns, int64_t column_step, int count, int64_t depth, uint16_t* to,
                       int64_t k_step) {
  SplitCheck check;
  for (int64_t k = 0; k < depth; k += kUnitTileDepth, to += k_step) {
    for (int j = 0; j < kUnitTileRows; ++j) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const int64_t left = depth - k - half * 16;
        Reg<float> v = Simd<float>::zero();
        if (j < count && left > 0) {
          v = load_lanes<float>(columns + j * column_step + k + half * 16, static_cast<int>(smaller(left, 16)));
        }
        check.see<P>(v);
        MatrixUnit::Half planes[P];
        split<P>(v, planes);
#pragma GCC unroll 3
        for (int p = 0; p < P; ++p) MatrixUnit::store_half(to + p * kOperandSize + (j * 2 + half) * 16, planes[p]);
      }
    }
#pragma GCC unroll 3
    for (int p = 0; p < P; ++p) transpose_tile(to + p * kOperandSize);
  }
  return check.passed();
}

// Pairs of rows, 16 columns of each, as a tile of a right operand that has k along the rows in memory: words of row k
// below and of row k + 1 above.
template <int P, typename Numbers>
LSTM_EXT_INLINE void split_pairs(const Numbers& numbers, uint16_t* to, SplitCheck& check) {
  for (int64_t i = 0; i < kUnitTileDepth; i += 2) {
    MatrixUnit::Half even[P], odd[P];
    const Reg<float> a = numbers(i), b = numbers(i + 1);
    check.see<P>(a);
    check.see<P>(b);
    split<P>(a, even);
    split<P>(b, odd);
#pragma GCC unroll 3
    for (int p = 0; p < P; ++p) {
      MatrixUnit::store_words(to + p * kOperandSize + i * 16, MatrixUnit::pairs(even[p], odd[p]));
    }
  }
}

// Rows as a right operand, `columns` columns of them from `column` on: column tile i of k tile k goes to place(i, k).
// Returns whether all could be split.
template <int P, typename Row, typename Place>
bool split_row_pairs(const Row& row, int64_t column, int64_t columns, int64_t depth, const Place& place) {
  SplitCheck check;
  for (int64_t k = 0; k < depth; k += kUnitTileDepth) {  // all columns of some rows, in the order of memory
    for (int64_t i = 0; i < columns; i += kUnitTileRows) {
      const int lanes = static_cast<int>(smaller(columns - i, kUnitTileRows));
      const auto numbers = [&](int64_t n) LSTM_EXT_LAMBDA_INLINE {
        return k + n < depth ? load_lanes<float>(row(k + n) + column + i, lanes) : Simd<float>::zero();
      };
      split_pairs<P>(numbers, place(i / kUnitTileRows, k / kUnitTileDepth), check);
    }
  }
  return check.passed();
}

// Columns of rows as the rows of a left operand, `count` of them from `column` on. Returns whether all could be split.
template <int P, typename Row>
bool split_columns(const Row& row, int64_t column, int64_t count, int64_t depth, uint16_t* to) {
  const int64_t k_tiles = divide_up(depth, kUnitTileDepth);
  SplitCheck check;
  for (int64_t k = 0; k < k_tiles; ++k) {  // all columns of some rows: one translation of an address serves them all
    const int64_t rows = smaller(depth - k * kUnitTileDepth, kUnitTileDepth);
    for (int64_t tile = 0; tile < divide_up(count, kUnitTileRows); ++tile) {
      const int64_t at = column + tile * kUnitTileRows;
      const int lanes = static_cast<int>(smaller(column + count - at, kUnitTileRows));
      const auto numbers = [&](int64_t i) LSTM_EXT_LAMBDA_INLINE {
        return i < rows ? load_lanes<float>(row(k * kUnitTileDepth + i) + at, lanes) : Simd<float>::zero();
      };
      uint16_t* const out = to + (tile * k_tiles + k) * P * kOperandSize;
      if constexpr (P == 1) {  // pairs are fewer words to move
        split_pairs<1>(numbers, out, check);
        transpose_tile(out);
      } else {
        for (int half = 0; half < 2; ++half) {
          Reg<float> v[16];
#pragma GCC unroll 16
          for (int i = 0; i < 16; ++i) v[i] = numbers(half * 16 + i);
          transpose<float>(v);
#pragma GCC unroll 16
          for (int m = 0; m < 16; ++m) {
            check.see<P>(v[m]);
            MatrixUnit::Half planes[P];
            split<P>(v[m], planes);
#pragma GCC unroll 3
            for (int p = 0; p < P; ++p) MatrixUnit::store_half(out + p * kOperandSize + (m * 2 + half) * 16, planes[p]);
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
