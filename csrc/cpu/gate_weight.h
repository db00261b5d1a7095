// The weight (4H, count) of the four gates in the layouts that products read, and how it is packed.
#pragma once

#include "cpu/isa.h"

#include "cpu/int8_product.h"
#include "cpu/gates.h"
#include "cpu/pack.h"
#include "cpu/bf16_product.h"
#include "cpu/range.h"
#include "cpu/row_major.h"
#include "cpu/rows.h"
#include "cpu/simd.h"
#include "cpu/tile.h"

namespace lstm_ext::cpu::LSTM_EXT_ISA {
namespace {

// A weight (4H, count) that a product reads row by row, from gate-interleaved panels, or from its bf16 parts.
template <typename T>
struct GateWeight {
  WeightRows<T> rows;
  T* panels = nullptr;
  Bf16Operand bf16{};
  NarrowPanels<T> narrow{};
  // If not negative: the place of the only block whose panels or bf16 parts exist at a time. It serves a weight that a
  // call reads once: a product packs each block when it gets there, and reads it from cache.
  int64_t one_place = -1;
  // If not negative: the gate that has no rows in this weight, see cell::GruRow. Only products that store their sums
  // take such a weight.
  int skipped = -1;

  int64_t first_row(int gate, int64_t hidden_size) const {
    return (skipped >= 0 && gate > skipped ? gate - 1 : gate) * hidden_size;
  }
  bool packs_as_used() const { return one_place >= 0; }
  LSTM_EXT_INLINE int64_t place(int64_t block) const { return packs_as_used() ? one_place : block; }
  bool packed() const { return panels || bf16.parts > 0; }
  // Whether whole panels have no registers for the skipped gate. Those of narrow numbers have zeros there.
  bool leaves_out() const { return skipped >= 0; }

  // dot_rows for the weight's rows from `first` on.
  template <int X>
  LSTM_EXT_INLINE void dot(int64_t first, int64_t count, const LaneRows& lanes, const T* const* x, Reg<T>* sums) const {
    rows.with([&](const auto* numbers)
                  LSTM_EXT_LAMBDA_INLINE { dot_rows<T, X>(numbers + first * count, count, lanes, x, sums); });
  }
};

// The number of registers that the gates of so many units fill in a panel, or in sums over rows. The last units of a
// layer may fill a half or a quarter of a register; then two gates, or all, share one.
template <typename T>
LSTM_EXT_INLINE int gate_registers(int units) {
  constexpr int n = Simd<T>::kLanes;
  return 4 * units <= n ? 1 : 2 * units <= n ? 2 : kGates;
}

// Repeats kWidth lanes of v, from kFrom on, over the whole register.
template <typename T, int kFrom, int kWidth, int... kLane>
LSTM_EXT_INLINE Reg<T> repeat_lanes(Reg<T> v, std::integer_sequence<int, kLane...>) {
#ifdef LSTM_EXT_SHUFFLES
  return __builtin_shufflevector(v, v, (kFrom + kLane % kWidth)...);
#else
  return Reg<T>{v[kFrom + kLane % kWidth]...};
#endif
}
// Gives each gate a register of its own, from N registers that the gates share.
template <typename T, int N>
LSTM_EXT_INLINE void separate_gates(const Reg<T> (&shared)[N], Reg<T> (&gates)[kGates]) {
  constexpr int n = Simd<T>::kLanes, kWidth = N * n / kGates;
  using Lanes = std::make_integer_sequence<int, n>;
  gates[0] = shared[0];
  gates[1] = repeat_lanes<T, kWidth, kWidth>(shared[0], Lanes{});
  gates[2] = repeat_lanes<T, 2 * kWidth % n, kWidth>(shared[N - 1], Lanes{});
  gates[3] = repeat_lanes<T, 3 * kWidth % n, kWidth>(shared[N - 1], Lanes{});
}
// accumulate_rows for a panel of N registers, which gates share.
template <typename T, int R, int N>
LSTM_EXT_INLINE void accumulate_compact(Tile<T, R, kGates>& tile, const T* const (&a)[R], const T* panel,
                                        int64_t count) {
  Tile<T, R, N> sums;
  sums.zero();
  accumulate_rows<T, R, N>(sums, a, panel, N * Simd<T>::kLanes, count);
#pragma GCC unroll kTileRows
  for (int r = 0; r < R; ++r) separate_gates<T, N>(sums.acc[r], tile.acc[r]);
}

// Packs a gate-interleaved panel of kLanes hidden units of a (4H, count) weight: for each k the four gates of the units
// side by side, [k][gate][lane]. If the units fill fewer registers, a gate has fewer lanes. A gate without rows is left
// out if each gate fills a register; else, and below, it gets zeros.
template <typename T, typename W>
void pack_gate_panel(const GateWeight<T>& of, const W* weight, int64_t hidden_size, int64_t count, int64_t block,
                     T* out) {
  constexpr int n = Simd<T>::kLanes;
  const int64_t unit = block * n;
  const int units = static_cast<int>(smaller(hidden_size - unit, n));
  const int width = gate_registers<T>(units) * n / kGates;
  const bool leaves_out = width == n && of.leaves_out();
  const int64_t step = (leaves_out ? kGates - 1 : kGates) * width;
  for (int gate = 0; gate < kGates; ++gate) {
    if (leaves_out && gate == of.skipped) continue;
    pack_transposed<T>(weight + (of.first_row(gate, hidden_size) + unit) * count, gate == of.skipped ? 0 : units, count,
                       out, step, width);
    out += width;
  }
}

// Packs a panel of narrower numbers, from which the weight's were widened: bfloat16, in the order of half_of, or
// integers times a factor, in the order of int8_place if bytes are multiplied.
template <typename T>
void pack_narrow_panel(const GateWeight<T>& of, const T* weight, int64_t hidden_size, int64_t count, int64_t block) {
  constexpr int n = Simd<T>::kLanes;
  const NarrowPanels<T>& narrow = of.narrow;
  const WeightKind kind = narrow.kind;
  void* const panels = const_cast<void*>(narrow.data);
  const bool as_bytes = kind == WeightKind::kInt8 && multiplies_int8();
  if (as_bytes) {
    uint8_t* const bytes = static_cast<uint8_t*>(panels) + block * int8_panel_size(count);
    for (int64_t i = 0; i < int8_panel_size(count); ++i) bytes[i] = 128;
  }
  int64_t at = block * kGates * n * count;
  for (int64_t k = 0; k < count; ++k) {
    for (int gate = 0; gate < kGates; ++gate) {
      for (int lane = 0; lane < n; ++lane, ++at) {
        const int64_t unit = block * n + lane, row = of.first_row(gate, hidden_size) + unit;
        const bool is_there = unit < hidden_size && gate != of.skipped;
        const float number = is_there ? static_cast<float>(weight[row * count + k]) : 0.0f;
        if (kind == WeightKind::kBFloat16) {
          uint32_t bits;
          __builtin_memcpy(&bits, &number, sizeof(bits));
          const int64_t place = at - gate % 2 * n + lane + gate % 2;  // the order of half_of
          static_cast<uint16_t*>(panels)[place] = static_cast<uint16_t>(bits >> 16);
        } else {
          const float integer =
              number == 0 ? 0.0f : number / static_cast<float>(narrow.factors[gate * hidden_size + unit]);
          const int rounded = static_cast<int>(integer + (integer < 0 ? -0.5f : 0.5f));
          if (as_bytes) {
            uint8_t* const bytes = static_cast<uint8_t*>(panels) + block * int8_panel_size(count);
            bytes[int8_place(k, gate, lane)] = static_cast<uint8_t>(rounded + 128);
          } else {
            static_cast<int8_t*>(panels)[at] = static_cast<int8_t>(rounded);
          }
        }
      }
    }
  }
}

#if defined(LSTM_EXT_TILE_ENGINE)
// Packs the bf16 parts of the same units. Returns whether all numbers could be split.
template <typename T, typename W>
bool pack_gate_bf16(const GateWeight<T>& of, const W* weight, int64_t hidden_size, int64_t count, int64_t block,
                    uint16_t* out) {
  const int bf16_parts = of.bf16.parts;
  const int64_t unit = block * kEngineTileRows;
  const int units = static_cast<int>(smaller(hidden_size - unit, kEngineTileRows));
  const int64_t k_step = kGroupTiles * bf16_parts * kOperandSize;
  bool all_split = true;
  for (int gate = 0; gate < kGates; ++gate) {
    const W* const rows = weight + (of.first_row(gate, hidden_size) + unit) * count;
    const int there = gate == of.skipped ? 0 : units;
    uint16_t* const to = out + gate / kGroupTiles * divide_up(count, kEngineTileDepth) * k_step +
                         gate % kGroupTiles * bf16_parts * kOperandSize;
    with_bf16_parts(bf16_parts,
                    [&](auto p) { all_split &= split_column_tile<p()>(rows, count, there, count, to, k_step); });
  }
  return all_split;
}
#endif

// Packs kLanes units of a weight into the block's place, as panels or bf16 parts, if the weight has any.
template <typename T>
void pack_gates(const GateWeight<T>& weight, int64_t hidden_size, int64_t count, int64_t block) {
  const int64_t place = weight.place(block);
  if (weight.panels) {
    T* const panel = weight.panels + place * kGates * Simd<T>::kLanes * count;
    weight.rows.with([&](const auto* rows) { pack_gate_panel(weight, rows, hidden_size, count, block, panel); });
  }
  if constexpr (kHasTileEngine<T>) {
    const Bf16Operand& bf16 = weight.bf16;
    if (bf16.parts == 0) return;
    const int64_t size = kGates * divide_up(count, kEngineTileDepth) * bf16.parts * kOperandSize;
    weight.rows.with([&](const auto* rows) {
      bf16.all_split[place] = pack_gate_bf16(weight, rows, hidden_size, count, block, bf16.data + place * size);
    });
  }
}

}  // namespace
}  // namespace lstm_ext::cpu::LSTM_EXT_ISA
