// Products of float32 matrices on a matrix unit, whose operands are bfloat16.
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

// Rows as a right operand, `tiles` column tiles of it from `column` on: tile `i` of k tile `k` goes to place(i, k).
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

// What is done between some products of tiles: while the unit works, the processor does what else there is to do. It
// looks only so far ahead that work helps in small portions, evenly spread. There is a chance for one after each four
// products of two row tiles, after those of each right operand of one row tile, and with one plane after each product.
class Between {
 public:
  Between() = default;
  // run(with), so many times.
  Between(void (*run)(void*), void* with, int64_t times) : run_(run), with_(with), times_(times) {}

  // Fetches the tiles that are read next into the second-level cache as well.
  void fetch(const uint16_t* tiles, int64_t numbers) {
    at_ = reinterpret_cast<const char*>(tiles);
    end_ = reinterpret_cast<const char*>(tiles + numbers);
  }
  // How many chances there are, before the first.
  void share(int64_t chances) {
    chances_ = chances;
    if (chances > 0) at_once_ = divide_up(divide_up(end_ - at_, kLine), chances) * kLine;
  }

  LSTM_EXT_INLINE void operator()() {
    for (due_ += times_; due_ >= chances_; due_ -= chances_) run_(with_);
    const char* const stop = end_ - at_ > at_once_ ? at_ + at_once_ : end_;
    for (; at_ < stop; at_ += kLine) __builtin_prefetch(at_, 0, 2);
  }

 private:
  static constexpr int64_t kLine = 64;

  void (*run_)(void*) = nullptr;
  void* with_ = nullptr;
  int64_t times_ = 0, chances_ = 0, due_ = 0;
  const char *at_ = nullptr, *end_ = nullptr;
  int64_t at_once_ = 0;
};

// What is done with the sums of a block while the next one is multiplied: f(block, column tiles, row, height, sums of
// the row) for two rows at once, or one that is left; `height` is an integral_constant.
template <typename F>
class Epilogue {
 public:
  explicit Epilogue(F f) : f_(f) {}

  void begin(int64_t block, int columns, const float* sums, int64_t rows) {
    block_ = block;
    columns_ = columns;
    sums_ = sums;
    next_ = 0;
    rows_ = rows;
  }
  // Beside a product of one plane two rows at once, which take turns in waiting. Beside more planes there is time, and
  // what is smaller leaves the unit waiting less.
  Between between(int planes) {
    if (planes == 1) return {&run<2>, this, divide_up(rows_ - next_, 2)};
    return {&run<1>, this, rows_ - next_};
  }
  void rest() {
    while (next_ < rows_) run<2>(this);
  }

 private:
  template <int kHeight>
  __attribute__((noinline)) static void run(void* self) {
    auto& epilogue = *static_cast<Epilogue*>(self);
    if (epilogue.rows_ - epilogue.next_ >= kHeight) {
      epilogue.template rows<kHeight>();
    } else {
      epilogue.template rows<1>();
    }
  }
  template <int kHeight>
  LSTM_EXT_INLINE void rows() {
    const auto row = static_cast<uint64_t>(next_);
    next_ += kHeight;
    f_(block_, columns_, static_cast<int64_t>(row), std::integral_constant<int, kHeight>{},
       sums_ + row / kUnitTileRows * columns_ * kSumsSize + row % kUnitTileRows * kUnitTileRows);
  }

  F f_;
  int64_t block_ = 0, next_ = 0, rows_ = 0;
  int columns_ = 0;
  const float* sums_ = nullptr;
};

// Which planes meet, in order, which is part of the result: one side stays from each product to the next, so that few
// tiles are loaded.
template <int P>
struct PlanePairs;
template <>
struct PlanePairs<1> {
  static constexpr int kLeft[] = {0}, kRight[] = {0};
};
template <>
struct PlanePairs<2> {
  static constexpr int kLeft[] = {1, 0, 0}, kRight[] = {0, 0, 1};
};
template <>
struct PlanePairs<3> {
  static constexpr int kLeft[] = {0, 0, 1, 1, 2, 0}, kRight[] = {2, 1, 1, 0, 0, 0};
};

// The column tiles of a range as they are multiplied at once: two groups of a right operand, then one, the last of
// which may be narrower.
struct TileGroups {
  const int64_t tiles, whole;
  const int64_t count = whole + divide_up(tiles - whole * 2 * kGroupTiles, kGroupTiles);

  TileGroups(int64_t tiles, bool wide) : tiles(tiles), whole(wide ? tiles / (2 * kGroupTiles) : 0) {}
  LSTM_EXT_INLINE int64_t begin(int64_t i) const { return (i < whole ? 2 * i : whole + i) * kGroupTiles; }
  LSTM_EXT_INLINE int width(int64_t i) const {
    return i < whole ? 2 * kGroupTiles : static_cast<int>(smaller(kGroupTiles, tiles - begin(i)));
  }
};

#if defined(LSTM_EXT_TILE_REGISTERS)

// The sums of kRows x kColumns tiles, 2 x 2 at most or 1 x 4, in the registers from 0 on.
template <int P, int kRows, int kColumns>
class TileBlock {
 public:
  static void multiply(const uint16_t* left, int64_t left_row_step, const RightTiles& right, int64_t k_tiles,
                       float* sums, int64_t sums_row_step, bool add, Between& between) {
    each_sum([&](auto row, auto column) LSTM_EXT_LAMBDA_INLINE {
      constexpr int kTile = row() * kColumns + column();
      if (add) {
        MatrixUnit::load<kTile>(sums + row() * sums_row_step + column() * kSumsSize);
      } else {
        MatrixUnit::zero<kTile>();
      }
    });
    const uint16_t* a = left;
    const uint16_t* b = right.data;
    for (int64_t k = 0; k < k_tiles; ++k, a += P * kOperandSize, b += right.k_step) {
      MatrixUnit::keep_awake();
      step(a, left_row_step, b, right.group_step, between);
    }
    each_sum([&](auto row, auto column) LSTM_EXT_LAMBDA_INLINE {
      MatrixUnit::store<row() * kColumns + column()>(sums + row() * sums_row_step + column() * kSumsSize);
    });
  }

  // How often `between` is called.
  static constexpr int64_t chances(int64_t k_tiles) {
    return k_tiles * (kRows == 1 ? kColumns * P : P == 1 ? kRows * kColumns : kPairs);
  }

 private:
  static constexpr int kPairs = sizeof(PlanePairs<P>::kLeft) / sizeof(int);
  // Registers of operands, after those of sums. Of one row tile all planes have a place.
  static constexpr int kFirstLeft = 4, kLefts = kRows == 1 ? P : kRows;
  static constexpr int kFirstRight = kFirstLeft + kLefts, kRights = 8 - kFirstRight;

  template <typename F>
  LSTM_EXT_INLINE static void each_sum(F&& f) {
    each<kRows * kColumns>([&](auto i) LSTM_EXT_LAMBDA_INLINE {
      f(std::integral_constant<int, i() / kColumns>{}, std::integral_constant<int, i() % kColumns>{});
    });
  }
  template <int kCount, typename F>
  LSTM_EXT_INLINE static void each(F&& f) {
    each(std::make_integer_sequence<int, kCount>{}, f);
  }
  template <typename F, int... I>
  LSTM_EXT_INLINE static void each(std::integer_sequence<int, I...>, F&& f) {
    (f(std::integral_constant<int, I>{}), ...);
  }

  // The products of a k tile.
  LSTM_EXT_INLINE static void step(const uint16_t* a, int64_t a_row_step, const uint16_t* b, int64_t b_group_step,
                                   Between& between) {
    if constexpr (kRows == 1) {
      each<P>([&](auto plane)
                  LSTM_EXT_LAMBDA_INLINE { MatrixUnit::load<kFirstLeft + plane()>(a + plane() * kOperandSize); });
      each<kColumns>([&](auto column) LSTM_EXT_LAMBDA_INLINE { one_column<column()>(b, b_group_step, between); });
    } else {
      each<kPairs>([&](auto pair)
                       LSTM_EXT_LAMBDA_INLINE { one_pair<pair()>(a, a_row_step, b, b_group_step, between); });
    }
  }

  // Each plane of a column tile is loaded once, since all planes of the row tile are there.
  template <int kColumn>
  LSTM_EXT_INLINE static void one_column(const uint16_t* b, int64_t b_group_step, Between& between) {
    each<kPairs>([&](auto pair) LSTM_EXT_LAMBDA_INLINE {
      using Pairs = PlanePairs<P>;
      constexpr int kPlane = Pairs::kRight[pair()], kRight = kFirstRight + (kColumn * P + kPlane) % kRights;
      if constexpr (pair() == 0 || kPlane != Pairs::kRight[pair() > 0 ? pair() - 1 : 0]) {
        constexpr int kTile = kColumn % kGroupTiles * P + kPlane;
        MatrixUnit::load<kRight>(b + kColumn / kGroupTiles * b_group_step + kTile * kOperandSize);
      }
      MatrixUnit::multiply_add<kColumn, kFirstLeft + Pairs::kLeft[pair()], kRight>();
      if constexpr (pair() == kPairs - 1 || kPlane != Pairs::kRight[pair() + 1 < kPairs ? pair() + 1 : 0]) between();
    });
  }

  template <int kPair>
  LSTM_EXT_INLINE static void one_pair(const uint16_t* a, int64_t a_row_step, const uint16_t* b, int64_t b_group_step,
                                       Between& between) {
    using Pairs = PlanePairs<P>;
    constexpr int kLeft = Pairs::kLeft[kPair], kRightPlane = Pairs::kRight[kPair];
    constexpr bool kNewLeft = kPair == 0 || kLeft != Pairs::kLeft[kPair > 0 ? kPair - 1 : 0];
    constexpr bool kNewRight = kPair == 0 || kRightPlane != Pairs::kRight[kPair > 0 ? kPair - 1 : 0];
    if constexpr (kNewLeft) {
      each<kRows>([&](auto row) LSTM_EXT_LAMBDA_INLINE {
        MatrixUnit::load<kFirstLeft + row()>(a + row() * a_row_step + kLeft * kOperandSize);
      });
    }
    each<kColumns>([&](auto column) LSTM_EXT_LAMBDA_INLINE {
      constexpr int kRight = kFirstRight + column();
      if constexpr (kNewRight) {
        MatrixUnit::load<kRight>(b + (column() * P + kRightPlane) * kOperandSize);
      }
      each<kRows>([&](auto row) LSTM_EXT_LAMBDA_INLINE {
        MatrixUnit::multiply_add<row() * kColumns + column(), kFirstLeft + row(), kRight>();
        constexpr bool kLast = row() == kRows - 1 && column() == kColumns - 1;
        if constexpr (kLast || P == 1) between();
      });
    });
  }
};

// sums[row tile][column tile] = (or +=) left * right, for all rows of a left operand and `columns` tiles: those of one
// column group, or four, of two.
template <int P>
void multiply_tiles(const uint16_t* left, int64_t rows, const RightTiles& right, int columns, int64_t k_tiles,
                    float* sums, bool add, Between between) {
  const int64_t left_row_step = k_tiles * P * kOperandSize;
  const int64_t sums_row_step = columns * kSumsSize;
  const auto each_block = [&](auto&& block) LSTM_EXT_LAMBDA_INLINE {
    constexpr std::integral_constant<int, 1> kOne;
    constexpr std::integral_constant<int, 2> kTwo;
    const int64_t row_tiles = divide_up(rows, kUnitTileRows);
    const int64_t pairs_end = row_tiles / 2 * 2;
    for (int column = 0; column < columns; column += kGroupTiles) {
      for (int64_t row = 0; row < pairs_end; row += 2) {
        if (columns - column > 1) {
          block(row, kTwo, column, kTwo);
        } else {
          block(row, kTwo, column, kOne);
        }
      }
    }
    if (pairs_end == row_tiles) return;
    if (columns == 2 * kGroupTiles) {
      block(pairs_end, kOne, 0, std::integral_constant<int, 4>{});
    } else if (columns == kGroupTiles) {
      block(pairs_end, kOne, 0, kTwo);
    } else {
      block(pairs_end, kOne, 0, kOne);
    }
  };
  int64_t chances = 0;
  each_block([&](int64_t, auto height, int, auto width)
                 LSTM_EXT_LAMBDA_INLINE { chances += TileBlock<P, height(), width()>::chances(k_tiles); });
  between.share(chances);
  each_block([&](int64_t row, auto height, int column, auto width) LSTM_EXT_LAMBDA_INLINE {
    RightTiles part = right;
    part.data += column / kGroupTiles * right.group_step;
    TileBlock<P, height(), width()>::multiply(left + row * left_row_step, left_row_step, part, k_tiles,
                                              sums + row * sums_row_step + column * kSumsSize, sums_row_step, add,
                                              between);
  });
}

#else

// The sums of kRows rows of a row tile and kColumns column tiles, in vector registers.
template <int P, int kRows, int kColumns>
void multiply_rows(const uint16_t* left, const RightTiles& right, int64_t k_tiles, float* sums, bool add) {
  constexpr int kPairs = sizeof(PlanePairs<P>::kLeft) / sizeof(int);
  const auto at = [&](int r, int c) LSTM_EXT_LAMBDA_INLINE { return sums + c * kSumsSize + r * kUnitTileRows; };
  Reg<float> acc[kRows][kColumns];
#pragma GCC unroll kTileRows
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll kTileColumns
    for (int c = 0; c < kColumns; ++c) acc[r][c] = add ? Simd<float>::load(at(r, c)) : Simd<float>::zero();
  for (int64_t k = 0; k < k_tiles; ++k) {
    for (int pair = 0; pair < kPairs; ++pair) {
      const uint16_t* const a = left + (k * P + PlanePairs<P>::kLeft[pair]) * kOperandSize;
      const uint16_t* const b = right.data + k * right.k_step + PlanePairs<P>::kRight[pair] * kOperandSize;
      for (int64_t i = 0; i < kUnitTileDepth; i += 2) {
        MatrixUnit::Pairs columns[kColumns];
#pragma GCC unroll kTileColumns
        for (int c = 0; c < kColumns; ++c) {
          const int64_t tile = c / kGroupTiles * right.group_step + c % kGroupTiles * P * kOperandSize;
          columns[c] = MatrixUnit::load_pairs(b + tile + i * kUnitTileRows);
        }
#pragma GCC unroll kTileRows
        for (int r = 0; r < kRows; ++r) {
          const MatrixUnit::Pairs row = MatrixUnit::broadcast_pair(a + r * kUnitTileDepth + i);
#pragma GCC unroll kTileColumns
          for (int c = 0; c < kColumns; ++c) acc[r][c] = MatrixUnit::multiply_add(acc[r][c], row, columns[c]);
        }
      }
    }
  }
#pragma GCC unroll kTileRows
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll kTileColumns
    for (int c = 0; c < kColumns; ++c) Simd<float>::store(at(r, c), acc[r][c]);
}

// As above. There is nothing to be done meanwhile: the processor itself does the work.
template <int P>
void multiply_tiles(const uint16_t* left, int64_t rows, const RightTiles& right, int columns, int64_t k_tiles,
                    float* sums, bool add, const Between&) {
  for (int64_t first = 0; first < rows; first += kUnitTileRows) {
    const uint16_t* const tile = left + first / kUnitTileRows * k_tiles * P * kOperandSize;
    float* const out = sums + first / kUnitTileRows * columns * kSumsSize;
    for_each_row_tile(smaller(kUnitTileRows, rows - first), [&](int64_t row, auto height) LSTM_EXT_LAMBDA_INLINE {
      const uint16_t* const a = tile + row * kUnitTileDepth;
      float* const at = out + row * kUnitTileRows;
      if (columns == 2 * kGroupTiles) {
        multiply_rows<P, height(), 4>(a, right, k_tiles, at, add);
      } else if (columns == kGroupTiles) {
        multiply_rows<P, height(), 2>(a, right, k_tiles, at, add);
      } else {
        multiply_rows<P, height(), 1>(a, right, k_tiles, at, add);
      }
    });
  }
}

#endif

inline void multiply_tiles(int planes, const uint16_t* left, int64_t rows, const RightTiles& right, int columns,
                           int64_t k_tiles, float* sums, bool add, const Between& between) {
  with_planes(planes, [&](auto p) { multiply_tiles<p()>(left, rows, right, columns, k_tiles, sums, add, between); });
}

#endif

// While it lives, this thread may use the unit, if `used`.
class UnitSession {
 public:
  explicit UnitSession(bool used) : used_(used) {
#if defined(LSTM_EXT_MATRIX_UNIT)
    if (used_) MatrixUnit::begin();
#endif
  }
  ~UnitSession() {
#if defined(LSTM_EXT_MATRIX_UNIT)
    if (used_) MatrixUnit::end();
#endif
  }
  UnitSession(const UnitSession&) = delete;
  UnitSession& operator=(const UnitSession&) = delete;

 private:
  const bool used_;
};

}  // namespace
}  // namespace lstm_ext::cpu::LSTM_EXT_ISA
