// Products of float32 matrices on the tile engine, from their parts: see bf16_split.h.
#pragma once

#include "cpu/isa.h"

#include "cpu/tile_engine.h"
#include "cpu/bf16_split.h"
#include "cpu/range.h"
#include "cpu/simd.h"
#include "cpu/tile.h"

namespace lstm_ext::cpu::LSTM_EXT_ISA {
namespace {

#if defined(LSTM_EXT_TILE_ENGINE)

// Other work that runs between products of tiles, while the tile engine computes. The processor looks ahead only a
// little, so the work helps in small portions, evenly spread. The chances for a portion are: after each four products
// of two row tiles, after those of each right operand of one row tile, and with one part after each product.
class Between {
 public:
  Between() = default;
  // Calls run(with) `times` times.
  Between(void (*run)(void*), void* with, int64_t times) : run_(run), with_(with), times_(times) {}

  // Also prefetches the tiles that are read next into the second-level cache.
  void fetch(const uint16_t* tiles, int64_t numbers) {
    at_ = reinterpret_cast<const char*>(tiles);
    end_ = reinterpret_cast<const char*>(tiles + numbers);
  }
  // Sets the number of chances, before the first one.
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

// Finishes the sums of a block while the next one is multiplied: calls f(begin(block, column tiles), row, height, sums
// of the row) for two rows at once, or four, or a last one; `height` is an integral_constant. The processor holds some
// hundred unfinished instructions, those of the tile engine included, so each instruction of `f` costs time. Therefore
// `begin` computes the values that the rows of a block share, and both functors hold their data by value.
template <typename Begin, typename F>
class Epilogue {
 public:
  Epilogue(Begin begin, F f) : begin_(begin), f_(f) {}

  void begin(int64_t block, int columns, const float* sums, int64_t rows) {
    block_ = begin_(block, columns);
    to_next_tile_ = (columns - 1) * kSumsSize;
    sums_ = sums;
    next_ = 0;
    rows_ = rows;
  }
  // Beside products of one part it takes two rows at once, which alternate while they wait. Beside products of more
  // parts there is time, and smaller portions make the tile engine wait less.
  Between between(int bf16_parts) {
    if (bf16_parts == 1) return {&run<2>, this, divide_up(rows_ - next_, 2)};
    return {&run<1>, this, rows_ - next_};
  }
  // Finishes the remaining rows: none has been done, or all.
  template <int kHeight = 2>
  void rest() {
    static_assert(kEngineTileRows % kHeight == 0);
    while (next_ < rows_) run<kHeight>(this);
  }

 private:
  template <int kHeight>
  __attribute__((noinline)) static void run(void* self) {
    auto& epilogue = *static_cast<Epilogue*>(self);
    if (epilogue.rows_ - epilogue.next_ >= kHeight) {
      epilogue.template rows<kHeight>();
    } else if constexpr (kHeight > 1) {
      run<kHeight / 2>(self);
    }
  }
  template <int kHeight>
  LSTM_EXT_INLINE void rows() {
    const int64_t row = next_;
    const float* const sums = sums_;
    next_ += kHeight;
    sums_ += kHeight * kEngineTileRows;
    if (next_ % kEngineTileRows == 0) sums_ += to_next_tile_;
    f_(block_, row, std::integral_constant<int, kHeight>{}, sums);
  }

  Begin begin_;
  F f_;
  std::invoke_result_t<Begin, int64_t, int> block_{};
  int64_t next_ = 0, rows_ = 0, to_next_tile_ = 0;
  const float* sums_ = nullptr;  // sums of the next row
};

// The epilogue of a row prefetches the data of a later row, of this block or of the next one. Prefetched a whole block
// ahead, the data would be evicted from the first-level cache again, because all operands pass through it.
constexpr int64_t kRowsAhead = 4;
struct RowAhead {
  int64_t row;
  bool here;  // whether the row is in this block
};
LSTM_EXT_INLINE RowAhead row_ahead(int64_t row, int64_t rows) {
  const int64_t ahead = row + smaller(kRowsAhead, rows);
  return ahead < rows ? RowAhead{ahead, true} : RowAhead{ahead - rows, false};
}

// The pairs of parts that are multiplied, in order; the order affects the result. One side stays the same from each
// product to the next, so that few tiles are loaded.
template <int P>
struct PartPairs;
template <>
struct PartPairs<1> {
  static constexpr int kLeft[] = {0}, kRight[] = {0};
};
template <>
struct PartPairs<2> {
  static constexpr int kLeft[] = {1, 0, 0}, kRight[] = {0, 0, 1};
};
template <>
struct PartPairs<3> {
  static constexpr int kLeft[] = {0, 0, 1, 1, 2, 0}, kRight[] = {2, 1, 1, 0, 0, 0};
};

// The column tiles of a range in the groups that are multiplied at once: two groups of a right operand, then one; the
// last group may be narrower.
struct TileGroups {
  const int64_t tiles, whole;
  const int64_t count = whole + divide_up(tiles - whole * 2 * kGroupTiles, kGroupTiles);

  TileGroups(int64_t tiles, bool wide) : tiles(tiles), whole(wide ? tiles / (2 * kGroupTiles) : 0) {}
  LSTM_EXT_INLINE int64_t begin(int64_t i) const { return (i < whole ? 2 * i : whole + i) * kGroupTiles; }
  LSTM_EXT_INLINE int width(int64_t i) const {
    return i < whole ? 2 * kGroupTiles : static_cast<int>(smaller(kGroupTiles, tiles - begin(i)));
  }
};

// A left operand with all its rows, and a right one of one or two groups of columns.
struct TileOperands {
  const uint16_t* left;
  RightTiles right;
  int64_t k_tiles;
};

// The sums of kRows x kColumns tiles, 2 x 2 at most or 1 x 4, in registers 0 and up.
template <int P, int kRows, int kColumns>
class TileBlock {
 public:
  // Computes the products of `count` pairs of operands, from these tiles on.
  static void multiply(const TileOperands* operands, int count, int64_t first_row, int64_t first_group, float* sums,
                       int64_t sums_row_step, bool add, Between& between) {
    each_sum([&](auto row, auto column) LSTM_EXT_LAMBDA_INLINE {
      constexpr int kTile = row() * kColumns + column();
      if (add) {
        TileEngine::load<kTile>(sums + row() * sums_row_step + column() * kSumsSize);
      } else {
        TileEngine::zero<kTile>();
      }
    });
    for (int i = 0; i < count; ++i) {
      const int64_t k_tiles = operands[i].k_tiles, left_row_step = k_tiles * P * kOperandSize;
      const RightTiles right = operands[i].right;
      const uint16_t* a = operands[i].left + first_row * left_row_step;
      const uint16_t* b = right.data + first_group * right.group_step;
      for (int64_t k = 0; k < k_tiles; ++k, a += P * kOperandSize, b += right.k_step) {
        TileEngine::keep_awake();
        step(a, left_row_step, b, right.group_step, between);
      }
    }
    each_sum([&](auto row, auto column) LSTM_EXT_LAMBDA_INLINE {
      TileEngine::store<row() * kColumns + column()>(sums + row() * sums_row_step + column() * kSumsSize);
    });
  }

  // The number of calls of `between`.
  static constexpr int64_t chances(int64_t k_tiles) {
    return k_tiles * (kRows == 1 ? kColumns * P : P == 1 ? kRows * kColumns : kPairs);
  }

 private:
  static constexpr int kPairs = sizeof(PartPairs<P>::kLeft) / sizeof(int);
  // The registers of operands follow those of sums. A single row tile keeps all its parts in registers.
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
  LSTM_EXT_INLINE static void step(const uint16_t* a, [[maybe_unused]] int64_t a_row_step, const uint16_t* b,
                                   [[maybe_unused]] int64_t b_group_step, Between& between) {
    if constexpr (kRows == 1) {
      each<P>([&](auto part)
                  LSTM_EXT_LAMBDA_INLINE { TileEngine::load<kFirstLeft + part()>(a + part() * kOperandSize); });
      each<kColumns>([&](auto column) LSTM_EXT_LAMBDA_INLINE { one_column<column()>(b, b_group_step, between); });
    } else {
      each<kPairs>([&](auto pair) LSTM_EXT_LAMBDA_INLINE { one_pair<pair()>(a, a_row_step, b, between); });
    }
  }

  // Loads each part of a column tile once; all parts of the row tile are in registers.
  template <int kColumn>
  LSTM_EXT_INLINE static void one_column(const uint16_t* b, int64_t b_group_step, Between& between) {
    each<kPairs>([&](auto pair) LSTM_EXT_LAMBDA_INLINE {
      using Pairs = PartPairs<P>;
      constexpr int kPart = Pairs::kRight[pair()], kRight = kFirstRight + (kColumn * P + kPart) % kRights;
      if constexpr (pair() == 0 || kPart != Pairs::kRight[pair() > 0 ? pair() - 1 : 0]) {
        constexpr int kTile = kColumn % kGroupTiles * P + kPart;
        TileEngine::load<kRight>(b + kColumn / kGroupTiles * b_group_step + kTile * kOperandSize);
      }
      TileEngine::multiply_add<kColumn, kFirstLeft + Pairs::kLeft[pair()], kRight>();
      if constexpr (pair() == kPairs - 1 || kPart != Pairs::kRight[pair() + 1 < kPairs ? pair() + 1 : 0]) between();
    });
  }

  template <int kPair>
  LSTM_EXT_INLINE static void one_pair(const uint16_t* a, int64_t a_row_step, const uint16_t* b, Between& between) {
    using Pairs = PartPairs<P>;
    constexpr int kLeft = Pairs::kLeft[kPair], kRightPart = Pairs::kRight[kPair];
    constexpr bool kNewLeft = kPair == 0 || kLeft != Pairs::kLeft[kPair > 0 ? kPair - 1 : 0];
    constexpr bool kNewRight = kPair == 0 || kRightPart != Pairs::kRight[kPair > 0 ? kPair - 1 : 0];
    if constexpr (kNewLeft) {
      each<kRows>([&](auto row) LSTM_EXT_LAMBDA_INLINE {
        TileEngine::load<kFirstLeft + row()>(a + row() * a_row_step + kLeft * kOperandSize);
      });
    }
    each<kColumns>([&](auto column) LSTM_EXT_LAMBDA_INLINE {
      constexpr int kRight = kFirstRight + column();
      if constexpr (kNewRight) {
        TileEngine::load<kRight>(b + (column() * P + kRightPart) * kOperandSize);
      }
      each<kRows>([&](auto row) LSTM_EXT_LAMBDA_INLINE {
        TileEngine::multiply_add<row() * kColumns + column(), kFirstLeft + row(), kRight>();
        constexpr bool kLast = row() == kRows - 1 && column() == kColumns - 1;
        if constexpr (kLast || P == 1) between();
      });
    });
  }
};

// multiply_tiles in registers of tiles.
template <int P>
void multiply_in_tiles(const TileOperands* operands, int count, int64_t rows, int columns, float* sums, bool add,
                       Between between) {
  const int64_t sums_row_step = columns * kSumsSize;
  const auto each_block = [&](auto&& block) LSTM_EXT_LAMBDA_INLINE {
    constexpr std::integral_constant<int, 1> kOne;
    constexpr std::integral_constant<int, 2> kTwo;
    const int64_t row_tiles = divide_up(rows, kEngineTileRows);
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
  int64_t chances = 0, k_tiles = 0;
  for (int i = 0; i < count; ++i) k_tiles += operands[i].k_tiles;
  each_block([&](int64_t, auto height, int, auto width)
                 LSTM_EXT_LAMBDA_INLINE { chances += TileBlock<P, height(), width()>::chances(k_tiles); });
  between.share(chances);
  each_block([&](int64_t row, auto height, int column, auto width) LSTM_EXT_LAMBDA_INLINE {
    TileBlock<P, height(), width()>::multiply(operands, count, row, column / kGroupTiles,
                                              sums + row * sums_row_step + column * kSumsSize, sums_row_step, add,
                                              between);
  });
}

// The sums of kRows rows of a row tile and kColumns column tiles, in vector registers. Three products of parts would
// take longer than one of float32, so operands have one part.
template <int kRows, int kColumns>
void multiply_rows(const uint16_t* left, const RightTiles& right, int64_t k_tiles, float* sums, bool add) {
  const auto at = [&](int r, int c) LSTM_EXT_LAMBDA_INLINE { return sums + c * kSumsSize + r * kEngineTileRows; };
  Reg<float> acc[kRows][kColumns];
#pragma GCC unroll kTileRows
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll kTileColumns
    for (int c = 0; c < kColumns; ++c) acc[r][c] = add ? Simd<float>::load(at(r, c)) : Simd<float>::zero();
  for (int64_t k = 0; k < k_tiles; ++k) {
    const uint16_t* const a = left + k * kOperandSize;
    const uint16_t* const b = right.data + k * right.k_step;
    for (int64_t i = 0; i < kEngineTileDepth; i += 2) {
      TileEngine::Pairs columns[kColumns];
#pragma GCC unroll kTileColumns
      for (int c = 0; c < kColumns; ++c) {
        const int64_t tile = c / kGroupTiles * right.group_step + c % kGroupTiles * kOperandSize;
        columns[c] = TileEngine::load_pairs(b + tile + i * kEngineTileRows);
      }
#pragma GCC unroll kTileRows
      for (int r = 0; r < kRows; ++r) {
        const TileEngine::Pairs row = TileEngine::broadcast_pair(a + r * kEngineTileDepth + i);
#pragma GCC unroll kTileColumns
        for (int c = 0; c < kColumns; ++c) acc[r][c] = TileEngine::multiply_add(acc[r][c], row, columns[c]);
      }
    }
  }
#pragma GCC unroll kTileRows
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll kTileColumns
    for (int c = 0; c < kColumns; ++c) Simd<float>::store(at(r, c), acc[r][c]);
}

// multiply_tiles in vector registers. There is no `between` work, because the processor itself is busy.
inline void multiply_in_pairs(const TileOperands* operands, int count, int64_t rows, int columns, float* sums,
                              bool add) {
  for (int i = 0; i < count; ++i, add = true) {
    const auto [left, right, k_tiles] = operands[i];
    for (int64_t first = 0; first < rows; first += kEngineTileRows) {
      const uint16_t* const tile = left + first / kEngineTileRows * k_tiles * kOperandSize;
      float* const out = sums + first / kEngineTileRows * columns * kSumsSize;
      for_each_row_tile(smaller(kEngineTileRows, rows - first), [&](int64_t row, auto height) LSTM_EXT_LAMBDA_INLINE {
        const uint16_t* const a = tile + row * kEngineTileDepth;
        float* const at = out + row * kEngineTileRows;
        if (columns == 2 * kGroupTiles) {
          multiply_rows<height(), 4>(a, right, k_tiles, at, add);
        } else if (columns == kGroupTiles) {
          multiply_rows<height(), 2>(a, right, k_tiles, at, add);
        } else {
          multiply_rows<height(), 1>(a, right, k_tiles, at, add);
        }
      });
    }
  }
}

// sums[row tile][column tile] = (or +=) the products left * right of `count` pairs of operands, for all rows and
// `columns` tiles: those of one column group, or four tiles, those of two groups. `in_tiles`: see EngineLimits::tiles.
inline void multiply_tiles(int bf16_parts, bool in_tiles, const TileOperands* operands, int count, int64_t rows,
                           int columns, float* sums, bool add, const Between& between) {
  if (!in_tiles) {
    multiply_in_pairs(operands, count, rows, columns, sums, add);
    return;
  }
  with_bf16_parts(bf16_parts,
                  [&](auto p) { multiply_in_tiles<p()>(operands, count, rows, columns, sums, add, between); });
}

#endif

// While it lives, this thread may use registers of tiles, if `used`.
class EngineSession {
 public:
  explicit EngineSession(bool used) : used_(used) {
#if defined(LSTM_EXT_TILE_ENGINE)
    if (used_) TileEngine::begin(registers_);
#endif
  }
  ~EngineSession() {
#if defined(LSTM_EXT_TILE_ENGINE)
    if (used_) TileEngine::end();
#endif
  }
  EngineSession(const EngineSession&) = delete;
  EngineSession& operator=(const EngineSession&) = delete;

 private:
  const bool used_;
#if defined(LSTM_EXT_TILE_ENGINE)
  mutable TileEngine::Registers registers_;
#endif
};

}  // namespace
}  // namespace lstm_ext::cpu::LSTM_EXT_ISA
