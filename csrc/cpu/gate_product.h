// Products of rows with a weight (4H, count) of the four gates, for a range of the hidden units.
#pragma once

#include "cpu/isa.h"

#include "cpu/int8_product.h"
#include "cpu/gate_weight.h"
#include "cpu/gates.h"
#include "cpu/bf16_product.h"
#include "cpu/range.h"
#include "cpu/row_major.h"
#include "cpu/rows.h"
#include "cpu/simd.h"
#include "cpu/tile.h"

namespace lstm_ext::cpu::LSTM_EXT_ISA {
namespace {

// sums[range] = b_ih + b_hh; an absent bias counts as zeros.
template <typename T>
void sum_biases(const LayerWeights<T>& weights, Range range, T* sums) {
  for (int64_t i = range.begin; i < range.end; ++i) {
    sums[i] = (weights.bias_ih ? weights.bias_ih[i] : T(0)) + (weights.bias_hh ? weights.bias_hh[i] : T(0));
  }
}

// A second product that is added to a product with bf16 parts while its sums are on the tile engine: other rows times
// another weight with as many bf16 parts.
template <typename T>
struct OtherProduct {
  RowGrid<const T> rows{};
  int64_t count = 0;
  const GateWeight<T>* weight = nullptr;  // null if there is none
};

// The sums of one row for two blocks of units. Both are computed together, and so are their cells if there are
// registers enough: one alone is a long chain of dependent instructions.
template <typename T>
struct BlockPair {
  Tile<T, 2, kGates> tile;
  int64_t second_unit;
  int second_lanes;
};

template <typename T>
class GateProduct {
 public:
  // `blocks` are blocks of kLanes units. `forwards`: the first product takes them from the first to the last.
  GateProduct(int64_t hidden_size, Range blocks, TileScratch scratch = {}, bool forwards = true)
      : hidden_size_(hidden_size), blocks_(blocks), scratch_(scratch), forwards_(!forwards) {}

  int lanes_in(int64_t block) const { return static_cast<int>(smaller(hidden_size_ - block * kLanes, kLanes)); }

  // pre = (bias, or the content of `pre`) + weight * a.
  template <typename A>
  void multiply(int64_t rows, const A& a_row, int64_t count, const GateWeight<T>& weight, const RowGrid<T>& pre,
                const T* bias) {
    if (weight.packed()) {
      multiply_packed(rows, a_row, count, weight, pre, bias, KeepSums{});
    } else {
      multiply_unpacked(rows, a_row, count, weight, pre, bias, KeepSums{});
    }
  }

  // Computes tile = weight * a + (bias, or the content of `pre`) for each block of units and calls finish(row, unit,
  // lanes, tile). If `finish` returns false, the tile is stored to `pre`. finish.prefetch(row, unit) prefetches the
  // data that it reads and writes; finish.saves_gates says whether it stores the gates. `other` needs a weight with
  // bf16 parts, and a bias.
  template <typename A, typename Pre, typename Finish>
  LSTM_EXT_INLINE void multiply_packed(int64_t rows, const A& a_row, int64_t count, const GateWeight<T>& weight,
                                       const Pre& pre, const T* bias, Finish&& finish,
                                       const OtherProduct<T>& other = {}) {
    if constexpr (kHasTileEngine<T>) {
      if (__builtin_expect(weight.bf16.parts > 0, 0)) {
        multiply_bf16(rows, a_row, count, weight, pre, bias, other, finish);
        return;
      }
    }
    multiply_panels(rows, a_row, count, weight, weight.panels, pre, bias, finish);
  }

  // The same from the rows, or from narrow panels. These do not call `finish` and return false: cells in each of these
  // products would gain little and take long to compile.
  template <typename A, typename Pre, typename Finish>
  LSTM_EXT_INLINE bool multiply_unpacked(int64_t rows, const A& a_row, int64_t count, const GateWeight<T>& weight,
                                         const Pre& pre, const T* bias, Finish&& finish) {
    if constexpr (std::is_same_v<T, float>) {
      const NarrowPanels<T>& narrow = weight.narrow;
      if (narrow.kind == WeightKind::kInt8) {
        if (multiplies_int8()) {
          multiply_int8_of(rows, a_row, count, weight, pre, bias);
          return false;
        }
        if constexpr (kMayWidenInt8) {
          multiply_panels(rows, a_row, count, weight, static_cast<const int8_t*>(narrow.data), pre, bias, KeepSums{});
        }
        return false;
      }
      if (narrow.kind == WeightKind::kBFloat16) {
        multiply_panels(rows, a_row, count, weight, static_cast<const uint16_t*>(narrow.data), pre, bias, KeepSums{});
        return false;
      }
    }
    multiply_rows(rows, a_row, count, weight, pre, bias, finish);
    return true;
  }

  // `panels` are those of the weight, of T or of narrower numbers.
  template <typename W, typename A, typename Pre, typename Finish>
  LSTM_EXT_INLINE void multiply_panels(int64_t rows, const A& a_row, int64_t count, const GateWeight<T>& weight,
                                       const W* panels, const Pre& pre, const T* bias, Finish&& finish) {
    const Sweep sweep = next_sweep();
    int64_t paired = 0;
    if (rows == 1 && !weight.packs_as_used()) {
      // These sums are bitwise the same as the ones below.
      const T* const a = count > 0 ? a_row(0) : nullptr;
      const T* const start = bias ? bias : pre(0);
      const auto sum_blocks = [&](const int64_t (&blocks)[2], Tile<T, 2, kGates>& sums) LSTM_EXT_LAMBDA_INLINE {
        sum_panels<Finish>(a, count, weight, panels, start, blocks, sums);
        if constexpr (kMaySkip<Finish>) keep_skipped(sums, start, weight.skipped, blocks);
      };
      paired = multiply_pairs(sweep, pre(0), sum_blocks, finish);
    }
    for (int64_t i = paired; i < sweep.count; ++i) {
      const int64_t block = sweep.block(i);
      if (weight.packs_as_used()) pack_gates(weight, hidden_size_, count, block);
      PanelPart<W> part{lanes_in(block), registers_of<W, Finish>(weight, lanes_in(block))};
      const W* const panel = panels + weight.place(block) * kGates * kLanes * count;
      for (; part.first || part.k < count; part.k += kBlockK, part.first = false) {
        part.depth = smaller(kBlockK, count - part.k);
        part.last = part.k + part.depth >= count;
        part.numbers = panel + part.k * part.registers * kLanes;
        const int64_t after = !part.last ? part.k + part.depth : 0;
        const bool there = !part.last || (i + 1 < sweep.count && !weight.packs_as_used());
        const int64_t next_block = part.last && there ? sweep.block(i + 1) : block;
        const W* const next = panels + (weight.place(next_block) * count + after) * kGates * kLanes;
        const int64_t next_steps = there ? smaller(kBlockK, count - after) : 0;
        NextPanel next_panel(next, next_steps * kGates * kLanes * static_cast<int64_t>(sizeof(W)), panel);
        const auto multiply_tile = [&](int64_t row, auto height) LSTM_EXT_LAMBDA_INLINE {
          constexpr int R = height();
          const T* a[R];
          T* out[R];
#pragma GCC unroll kTileRows
          for (int r = 0; r < R; ++r) {
            a[r] = count > 0 ? a_row(row + r) + part.k : nullptr;
            out[r] = pre(row + r) + block * kLanes;
          }
          Tile<T, R, kGates> tile;
          tile.zero();
          if (part.last) {
#pragma GCC unroll kTileRows
            for (int r = 0; r < R; ++r) finish.prefetch(row + r, block * kLanes);
          }
          accumulate_part<Finish>(tile, a, out, part, next_panel);
          const bool from_bias = bias && part.first;
#pragma GCC unroll kTileRows
          for (int r = 0; r < R; ++r) {
            const T* const start = from_bias ? bias + block * kLanes : out[r];
            add_to_start<W>(tile.acc[r], start, weight.narrow, block, part.lanes);
            if constexpr (kMaySkip<Finish>) keep_skipped(tile.acc[r], start, weight.skipped, part.lanes);
          }
          if (!part.last || !finish(row, block * kLanes, part.lanes, tile)) store_tile(tile, out, part.lanes);
        };
        for_each_row_tile(rows, multiply_tile,
                          !std::is_same_v<std::decay_t<Finish>, KeepSums> && count <= kLowTileDepth);
      }
    }
  }

#if defined(LSTM_EXT_TILE_ENGINE)
  // The same from bf16 parts, on the tile engine. Rows and units that cannot be split are multiplied without it. It
  // takes copies and is not inlined, so that the code without a tile engine can keep everything in registers.
  template <typename A, typename Pre, typename Finish>
  __attribute__((noinline)) void multiply_bf16(int64_t rows, A a_row, int64_t count, const GateWeight<T>& weight,
                                               Pre pre, const T* bias, OtherProduct<T> other, Finish finish) {
    const int64_t H = hidden_size_;
    const Bf16Operand& bf16 = weight.bf16;
    [[maybe_unused]] const int skipped = weight.skipped;
    const int64_t k_tiles = divide_up(count, kEngineTileDepth), other_tiles = divide_up(other.count, kEngineTileDepth);
    const int64_t most =
        smaller(scratch_.rows_for((k_tiles + other_tiles) * kEngineTileDepth, bf16.parts), kMostEngineRows);
    // With two row tiles or fewer the hardware prefetcher is as fast as any.
    const bool far = rows > 2 * kEngineTileRows && bf16.far((blocks_.end - blocks_.begin) * kGates, k_tiles);
    for (int64_t first = 0; first < rows; first += most) {
      const int64_t height = smaller(most, rows - first);
      const auto a_part = [&](int64_t row) LSTM_EXT_LAMBDA_INLINE { return a_row(first + row); };
      // `sums` null: the whole product is in `pre`. Else `sums` is added to the values from `start` on, or to those in
      // `pre`.
      const auto finish_rows = [=, this, finish = finish](auto height, int64_t unit, int lanes, const T* start,
                                                          int64_t row, const float* sums) LSTM_EXT_LAMBDA_INLINE {
        constexpr int R = height();
        T* out[R];
        Tile<T, R, kGates> tile;
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          out[r] = pre(first + row + r) + unit;
          const T* const before = start ? start : out[r];
#pragma GCC unroll kGates
          for (int gate = 0; gate < kGates; ++gate) {
            Reg<T>& sum = tile.acc[r][gate];
            sum = load_lanes<T>(before + gate * H, lanes);
            if (kMaySkip<Finish> && gate == skipped) continue;
            if (sums) sum = Simd<T>::load(sums + r * kEngineTileRows + gate * kSumsSize) + sum;
          }
          if (R <= 2) finish.prefetch(first + row + 2 + r, unit);
        }
        if (!finish(first + row, unit, lanes, tile) && sums) store_tile(tile, out, lanes);
      };
      constexpr std::integral_constant<int, 1> kOneRow;
      bool all_split = split_rows(bf16.parts, height, a_part, count, scratch_.left);
      const auto other_part = [&](int64_t row) LSTM_EXT_LAMBDA_INLINE { return other.rows(first + row); };
      uint16_t* const other_left = scratch_.left + bf16_numbers(height, count, bf16.parts);
      if (other.weight) all_split &= split_rows(bf16.parts, height, other_part, other.count, other_left);
      const Sweep sweep = next_sweep();
      const bool uses_pre = !other.weight || finish.saves_gates;
      struct Units {
        int64_t unit, next_unit;
        int lanes;
        const T* start;
      };
      Epilogue epilogue(
          [=](int64_t block, int) {
            const int64_t unit = block * kLanes;
            const int lanes = static_cast<int>(smaller(H - unit, kLanes));
            return Units{unit, unit + sweep.step * kLanes, lanes, bias ? bias + unit : nullptr};
          },
          [=](const Units& units, int64_t row, auto at_once, const float* sums) LSTM_EXT_LAMBDA_INLINE {
            constexpr int R = at_once();
            if (uses_pre) {
#pragma GCC unroll 4
              for (int r = 0; r < R; ++r) {
                const RowAhead ahead = row_ahead(row + r, height);
                const T* const next = pre(first + ahead.row) + (ahead.here ? units.unit : units.next_unit);
#pragma GCC unroll kGates
                for (int gate = 0; gate < kGates; ++gate) __builtin_prefetch(next + gate * H, 1);
              }
            }
            finish_rows(at_once, units.unit, units.lanes, units.start, row, sums);
          });
      // Cells that save their gates are faster for two rows than for four: by 2 to 4 % with B 64, H 256 in bfloat16.
      const auto rest = [&] { finish.saves_gates ? epilogue.rest() : epilogue.template rest<4>(); };
      for (int64_t i = 0; i < sweep.count; ++i) {
        const int64_t block = sweep.block(i), place = weight.place(block);
        if (weight.packs_as_used()) pack_gates(weight, H, count, block);
        if (all_split && bf16.all_split[place] && (!other.weight || other.weight->bf16.all_split[place])) {
          Between between = epilogue.between(bf16.parts);
          if (far && i + 1 < sweep.count && !weight.packs_as_used()) {
            between.fetch(bf16.gates(weight.place(sweep.block(i + 1)), k_tiles).data,
                          kGates * bf16.tile_numbers(k_tiles));
          }
          TileOperands operands[2];
          int pairs = 0;
          if (other.weight) operands[pairs++] = {other_left, other.weight->bf16.gates(place, other_tiles), other_tiles};
          operands[pairs++] = {scratch_.left, bf16.gates(place, k_tiles), k_tiles};
          multiply_tiles(bf16.parts, scratch_.in_tiles, operands, pairs, height, 2 * kGroupTiles,
                         scratch_.sums(block % 2), false, between);
          rest();
          epilogue.begin(block, kGates, scratch_.sums(block % 2), height);
          continue;
        }
        rest();
        const T* a_rows[kMostEngineRows];
        T* pre_rows[kMostEngineRows];
        for (int64_t row = 0; row < height; ++row) pre_rows[row] = pre(first + row);
        if (other.weight) {
          for (int64_t row = 0; row < height; ++row) a_rows[row] = other_part(row);
          multiply_block(block, height, a_rows, other.count, *other.weight, pre_rows, bias);
        }
        for (int64_t row = 0; row < height; ++row) a_rows[row] = a_part(row);
        multiply_block(block, height, a_rows, count, weight, pre_rows, other.weight ? nullptr : bias);
        for (int64_t row = 0; row < height; ++row) {
          finish_rows(kOneRow, block * kLanes, lanes_in(block), nullptr, row, nullptr);
        }
      }
      rest();
    }
  }
#endif

  // The same from bytes, without calling `finish`.
  template <typename A, typename Pre>
  void multiply_int8_of(int64_t rows, const A& a_row, int64_t count, const GateWeight<T>& weight, const Pre& pre,
                        const T* bias) {
    const auto* const panels = static_cast<const uint8_t*>(weight.narrow.data);
    Int8Row pieces[kPiecesAtOnce];
    for (int64_t row = 0; row < rows; ++row) {
      const T* const a = a_row(row);
      T* const out = pre(row);
      for (int64_t first = 0; first == 0 || first < count; first += kPiecesAtOnce * kBlockK) {
        const int64_t end = smaller(first + kPiecesAtOnce * kBlockK, count);
        for (int64_t k = first; k < end; k += kBlockK) {
          split_row(a + k, smaller(kBlockK, end - k), pieces[(k - first) / kBlockK]);
        }
        const Sweep sweep = next_sweep();
        for (int64_t i = 0; i < sweep.count; ++i) {
          const int64_t block = sweep.block(i);
          const int lanes = lanes_in(block);
          Tile<T, 1, kGates> tile;
          tile.zero();
          for (int64_t k = first; k < end; k += kBlockK) {
            const Int8Row& piece = pieces[(k - first) / kBlockK];
            const uint8_t* const panel = panels + block * int8_panel_size(count) + k * kPanelStep;
            Reg<T> sums[kGates];
            multiply_int8(panel, piece, a + k, smaller(kBlockK, end - k), sums);
#pragma GCC unroll kGates
            for (int gate = 0; gate < kGates; ++gate) tile.acc[0][gate] = tile.acc[0][gate] + sums[gate];
          }
          T* const to = out + block * kLanes;
          const T* const start = bias && first == 0 ? bias + block * kLanes : to;
          add_to_start<int8_t>(tile.acc[0], start, weight.narrow, block, lanes);
          keep_skipped(tile.acc[0], start, weight.skipped, lanes);
          store_tile(tile, {to}, lanes);
        }
      }
    }
  }

  // multiply_panels for weights that are read row by row.
  template <typename A, typename Pre, typename Finish>
  LSTM_EXT_INLINE void multiply_rows(int64_t rows, const A& a_row, int64_t count, const GateWeight<T>& weight,
                                     const Pre& pre, const T* bias, Finish&& finish) {
    const int64_t H = hidden_size_;
    const Sweep sweep = next_sweep();
    int64_t paired = 0;
    if (kVectorRegisters == 32 && rows == 1) {  // the cells of two blocks need the registers
      const T* const a[] = {a_row(0)};
      T* const out = pre(0);
      const auto sum_blocks = [&](const int64_t (&blocks)[2], Tile<T, 2, kGates>& sums) LSTM_EXT_LAMBDA_INLINE {
#pragma GCC unroll 2
        for (int n = 0; n < 2; ++n) {
          const T* const start = (bias ? bias : out) + blocks[n] * kLanes;
          dot_gates<1, kMaySkip<Finish>>(weight, count, blocks[n], a, &sums.acc[n]);
          for (int gate = 0; gate < kGates; ++gate) {
            sums.acc[n][gate] = sums.acc[n][gate] + load_lanes<T>(start + gate * H, lanes_in(blocks[n]));
          }
        }
      };
      paired = multiply_pairs(sweep, out, sum_blocks, finish);
    }
    for (int64_t i = paired; i < sweep.count; ++i) {
      const int64_t block = sweep.block(i), unit = block * kLanes;
      const int lanes = lanes_in(block);
      for_each_dot_tile<T>(0, rows, [&](int64_t row, auto height) LSTM_EXT_LAMBDA_INLINE {
        constexpr int R = height();
        const T* a[R];
        T* out[R];
        for (int r = 0; r < R; ++r) {
          a[r] = a_row(row + r);
          out[r] = pre(row + r) + unit;
        }
        Tile<T, R, kGates> tile;
        dot_gates<R, kMaySkip<Finish>>(weight, count, block, a, tile.acc);
        for (int r = 0; r < R; ++r) {
          const T* const start = bias ? bias + unit : out[r];
          for (int gate = 0; gate < kGates; ++gate) {
            tile.acc[r][gate] = tile.acc[r][gate] + load_lanes<T>(start + gate * H, lanes);
          }
        }
        if (!finish(row, unit, lanes, tile)) store_tile(tile, out, lanes);
      });
    }
  }

  struct KeepSums {
    static constexpr bool saves_gates = false;
    template <typename Sums>
    LSTM_EXT_INLINE bool operator()(int64_t, int64_t, int, const Sums&) const {
      return false;
    }
    LSTM_EXT_INLINE void prefetch(int64_t, int64_t) const {}
  };

 private:
  static constexpr int kLanes = Simd<T>::kLanes;
  template <typename Finish>
  static constexpr bool kMaySkip = std::is_same_v<std::decay_t<Finish>, KeepSums>;
  // Up to this depth the cells take so much of the time that their code matters more than the loads of weights.
  static constexpr int64_t kLowTileDepth = 192;

  // The registers in a panel of this many units, and accumulate_rows for a panel with fewer than kGates of them.
  template <typename W, typename Finish>
  static int registers_of(const GateWeight<T>& weight, int lanes) {
    if constexpr (!std::is_same_v<W, T>) return kGates;
    const int registers = gate_registers<T>(lanes);
    if constexpr (kMaySkip<Finish>) return registers == kGates && weight.leaves_out() ? kGates - 1 : registers;
    return registers;
  }
  template <typename Finish, int R, typename W>
  LSTM_EXT_INLINE static void accumulate_few(Tile<T, R, kGates>& tile, const T* const (&a)[R], const W* panel,
                                             int registers, int64_t count) {
    if constexpr (std::is_same_v<W, T> && kMaySkip<Finish>) {
      if (registers == kGates - 1) {
        Tile<T, R, kGates - 1> sums;
        sums.zero();
        accumulate_rows<T, R, kGates - 1>(sums, a, panel, (kGates - 1) * kLanes, count);
#pragma GCC unroll kTileRows
        for (int r = 0; r < R; ++r) {  // the sum of the gate that is left out, one of the last two, is not used
          for (int gate = 0; gate < kGates; ++gate) tile.acc[r][gate] = sums.acc[r][gate < 3 ? gate : 2];
        }
        return;
      }
    }
    if constexpr (std::is_same_v<W, T> && kLanes >= kGates) {
      if (registers == 1) {
        accumulate_compact<T, R, 1>(tile, a, panel, count);
      } else {
        accumulate_compact<T, R, 2>(tile, a, panel, count);
      }
    } else if constexpr (std::is_same_v<W, T>) {
      accumulate_compact<T, R, 2>(tile, a, panel, count);
    }
  }

  // A part of the k loop for a block of units, whose panel stays in the second-level cache.
  template <typename W>
  struct PanelPart {
    int lanes, registers;
    const W* numbers = nullptr;
    int64_t k = 0, depth = 0;
    bool first = true, last = false;
  };

  // tile += rows * part. The tile starts from zero and is added to the rest at its end: adding many small products to a
  // large number would round each of them to the precision of the large one. Prefetches the lines of the sums in `out`:
  // if the rows have one stride, each of the first steps prefetches one line. Other tiles prefetch all at once, which
  // delays the panel.
  template <typename Finish, typename W, int R>
  LSTM_EXT_INLINE void accumulate_part(Tile<T, R, kGates>& tile, const T* (&a)[R], T* const (&out)[R],
                                       const PanelPart<W>& part, NextPanel& next_panel) const {
    const int64_t H = hidden_size_;
    constexpr bool kFetches = NextPanel::kUsed && R > 1;
    int64_t done = 0;
    if constexpr (kFetches) {
      if (part.registers == kGates && part.depth >= kGates * R && out[R - 1] - out[0] == (R - 1) * kGates * H) {
        done = kGates * R;
        accumulate_rows<T, R, kGates, false, Fetch::kWrite>(tile, a, part.numbers, kGates * kLanes, done, 0,
                                                            reinterpret_cast<const char*>(out[0]),
                                                            H * static_cast<int64_t>(sizeof(T)));
#pragma GCC unroll kTileRows
        for (int r = 0; r < R; ++r) a[r] += done;
      }
    }
    if (done == 0) {
#pragma GCC unroll kTileRows
      for (int r = 0; r < R; ++r)
#pragma GCC unroll kGates
        for (int gate = 0; gate < kGates; ++gate) __builtin_prefetch(out[r] + gate * H, 1);
    }
    if (part.registers == kGates) {
      const int64_t left = part.depth - done;
      accumulate_rows<T, R, kGates, false, kFetches ? Fetch::kRead : Fetch::kNothing>(
          tile, a, part.numbers + done * kGates * kLanes, kGates * kLanes, left, 0,
          kFetches ? next_panel.take(left) : nullptr);
    } else {
      accumulate_few<Finish>(tile, a, part.numbers, part.registers, part.depth);
    }
  }

  // The sums of one row for two blocks of units: sums = start + weight * a.
  template <typename Finish, typename W>
  LSTM_EXT_INLINE void sum_panels(const T* a, int64_t count, const GateWeight<T>& weight, const W* panels,
                                  const T* start, const int64_t (&blocks)[2], Tile<T, 2, kGates>& sums) const {
    const int registers[] = {registers_of<W, Finish>(weight, lanes_in(blocks[0])),
                             registers_of<W, Finish>(weight, lanes_in(blocks[1]))};
    for (int64_t k = 0; k == 0 || k < count; k += kBlockK) {
      const int64_t depth = smaller(kBlockK, count - k);
      const W* parts[2];
      for (int n = 0; n < 2; ++n) {
        parts[n] = panels + (weight.place(blocks[n]) * kGates * count + k * registers[n]) * kLanes;
      }
      Tile<T, 2, kGates> tile;
      tile.zero();
      if (joins_panels<T, W>(depth) && registers[0] == kGates && registers[1] == kGates) {
        accumulate_panels(tile, a + k, parts, depth);
      } else {
#pragma GCC unroll 1
        for (int n = 0; n < 2; ++n) {
          Tile<T, 1, kGates> one;
          one.zero();
          if (registers[n] == kGates) {
            accumulate_rows<T, 1, kGates>(one, {a + k}, parts[n], kGates * kLanes, depth);
          } else {
            accumulate_few<Finish>(one, {a + k}, parts[n], registers[n], depth);
          }
          for (int gate = 0; gate < kGates; ++gate) tile.acc[n][gate] = one.acc[0][gate];
        }
      }
#pragma GCC unroll 2
      for (int n = 0; n < 2; ++n) {
        const int lanes = lanes_in(blocks[n]);
        if (k == 0) {
#pragma GCC unroll kGates
          for (int gate = 0; gate < kGates; ++gate)
            sums.acc[n][gate] = load_lanes<T>(start + gate * hidden_size_ + blocks[n] * kLanes, lanes);
        }
#pragma GCC unroll kGates
        for (int gate = 0; gate < kGates; ++gate)
          sums.acc[n][gate] = plus<W>(sums.acc[n][gate], tile.acc[n][gate], weight.narrow, gate, blocks[n], lanes);
      }
    }
  }

#if defined(LSTM_EXT_TILE_ENGINE)
  // pre = (bias, or the content of `pre`) + weight * a for one block of units, without the tile engine.
  void multiply_block(int64_t block, int64_t rows, const T* const* a_rows, int64_t count, const GateWeight<T>& weight,
                      T* const* pre_rows, const T* bias) const {
    const RowGrid<const T> a_row = listed_rows<const T>(a_rows);
    const RowGrid<T> pre = listed_rows<T>(pre_rows);
    GateProduct one(hidden_size_, {block, block + 1});
    if (weight.panels) {  // a frozen weight has panels and bf16 parts
      one.multiply_panels(rows, a_row, count, weight, weight.panels, pre, bias, KeepSums{});
    } else {
      one.multiply_unpacked(rows, a_row, count, weight, pre, bias, KeepSums{});
    }
  }
#endif

  // sums[r][gate] = the dot products of the gate's rows for the block's units with a[r].
  template <int R, bool kMaySkip>
  LSTM_EXT_INLINE void dot_gates(const GateWeight<T>& weight, int64_t count, int64_t block, const T* const (&a)[R],
                                 Reg<T> (*sums)[kGates]) const {
    const int64_t H = hidden_size_;
    const int lanes = lanes_in(block);
    const bool skips = kMaySkip && weight.skipped >= 0;
    const int registers = kRowGroups<T> == kGates && !skips ? gate_registers<T>(lanes) : kGates;
    const int shared = kGates / registers;  // gates in a register
    LaneRows rows{lanes, 0, kLanes / 2, kLanes / kGates};
    if (shared > 1) {  // half of the register belongs to other gates
      rows.count = kLanes;
      rows.to_half = shared / 2 * H;
    }
    if (shared == kGates) rows.to_group = H;
    Reg<T> parts[kGates][R];
#pragma GCC unroll 1
    for (int i = 0; i < registers; ++i) {
      if (skips && i == weight.skipped) {
        for (int r = 0; r < R; ++r) parts[i][r] = Simd<T>::zero();
        continue;
      }
      const int64_t first = (skips ? weight.first_row(i, H) : i * shared * H) + block * kLanes;
      rows.readable = (skips ? kGates - 1 : kGates) * H - first;
      weight.template dot<R>(first, count, rows, a, parts[i]);
    }
    for (int r = 0; r < R; ++r) {
      if (shared == 1) {
        for (int gate = 0; gate < kGates; ++gate) sums[r][gate] = parts[gate][r];
      } else if constexpr (kRowGroups<T> == kGates) {
        if (shared == 2) {
          separate_gates<T, 2>({parts[0][r], parts[1][r]}, sums[r]);
        } else {
          separate_gates<T, 1>({parts[0][r]}, sums[r]);
        }
      }
    }
  }

  // Every other product takes the blocks from the last to the first: if a cache cannot hold all of the weight, it still
  // has the part that the previous product used last. No sum depends on the order.
  struct Sweep {
    int64_t first, step, count;
    int64_t block(int64_t i) const { return first + i * step; }
  };
  Sweep next_sweep() {
    forwards_ = !forwards_;
    const int64_t count = blocks_.end - blocks_.begin;
    return forwards_ ? Sweep{blocks_.begin, 1, count} : Sweep{blocks_.end - 1, -1, count};
  }

  // Takes the blocks of one row in pairs, as far as there are pairs: sum_blocks(blocks, tile) computes the sums of
  // both, and `finish` takes a BlockPair. Returns the number of blocks done.
  template <typename SumBlocks, typename Finish>
  LSTM_EXT_INLINE int64_t multiply_pairs(const Sweep& sweep, T* out, const SumBlocks& sum_blocks, Finish&& finish) {
    int64_t i = 0;
    for (; i + 1 < sweep.count; i += 2) {
      const int64_t blocks[] = {sweep.block(i), sweep.block(i + 1)};
      BlockPair<T> pair;
      pair.tile.zero();
      sum_blocks(blocks, pair.tile);
      pair.second_unit = blocks[1] * kLanes;
      pair.second_lanes = lanes_in(blocks[1]);
      if (finish(0, blocks[0] * kLanes, lanes_in(blocks[0]), pair)) continue;
#pragma GCC unroll 2
      for (int n = 0; n < 2; ++n)
        store_gates<T>(out + blocks[n] * kLanes, pair.tile.acc[n], hidden_size_, lanes_in(blocks[n]));
    }
    return i;
  }

  // before + sum, for sums over weights W: sums over integers are multiplied by the factors of their units. Written
  // out, because the compiler would otherwise round once in some places and twice in others.
  template <typename W>
  LSTM_EXT_INLINE Reg<T> plus(Reg<T> before, Reg<T> sum, const NarrowPanels<T>& weight, int gate, int64_t block,
                              int lanes) const {
    if constexpr (std::is_same_v<W, int8_t>) {
      return Simd<T>::fma(sum, load_lanes<T>(weight.factors + gate * hidden_size_ + block * kLanes, lanes), before);
    }
    return sum + before;
  }
  // sums[gate] = start[gate] + sums[gate] for a block of units.
  template <typename W>
  LSTM_EXT_INLINE void add_to_start(Reg<T> (&sums)[kGates], const T* start, const NarrowPanels<T>& weight,
                                    int64_t block, int lanes) const {
#pragma GCC unroll kGates
    for (int gate = 0; gate < kGates; ++gate) {
      sums[gate] = plus<W>(load_lanes<T>(start + gate * hidden_size_, lanes), sums[gate], weight, gate, block, lanes);
    }
  }

  // The sums of a gate without rows stay those of the start: zeros times an infinite number would be NaN.
  LSTM_EXT_INLINE void keep_skipped(Reg<T> (&sums)[kGates], const T* start, int skipped, int lanes) const {
#pragma GCC unroll kGates
    for (int gate = 0; gate < kGates; ++gate) {
      if (gate == skipped) sums[gate] = load_lanes<T>(start + gate * hidden_size_, lanes);
    }
  }
  LSTM_EXT_INLINE void keep_skipped(Tile<T, 2, kGates>& sums, const T* start, int skipped,
                                    const int64_t (&blocks)[2]) const {
    for (int n = 0; n < 2; ++n) keep_skipped(sums.acc[n], start + blocks[n] * kLanes, skipped, lanes_in(blocks[n]));
  }

  template <int R>
  LSTM_EXT_INLINE void store_tile(const Tile<T, R, kGates>& tile, T* const (&out)[R], int lanes) const {
#pragma GCC unroll kTileRows
    for (int r = 0; r < R; ++r) store_gates<T>(out[r], tile.acc[r], hidden_size_, lanes);
  }

  const int64_t hidden_size_;
  const Range blocks_;
  const TileScratch scratch_;
  bool forwards_;
};

}  // namespace
}  // namespace lstm_ext::cpu::LSTM_EXT_ISA
