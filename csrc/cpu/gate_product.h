// Products of rows with a weight (4H, count) of the four gates, for a range of the hidden units.
#pragma once

#include "cpu/isa.h"

#include "cpu/gates.h"
#include "cpu/pack.h"
#include "cpu/range.h"
#include "cpu/row_major.h"
#include "cpu/rows.h"
#include "cpu/simd.h"
#include "cpu/tile.h"

namespace lstm_ext::cpu::LSTM_EXT_ISA {
namespace {

// Gate-interleaved panel of kLanes hidden units of a (4H, count) weight: for each k the four gates
// of the units side by side, [k][gate][lane].
template <typename T>
void pack_gate_panel(const T* weight, int64_t hidden_size, int64_t count, int64_t block, T* out) {
  constexpr int n = Simd<T>::kLanes;
  const int64_t unit = block * n;
  const int units = static_cast<int>(smaller(hidden_size - unit, n));
  for (int gate = 0; gate < kGates; ++gate) {
    pack_transposed<T>(weight + (gate * hidden_size + unit) * count, units, count, out + gate * n, kGates * n);
  }
}

// sums[range] = b_ih + b_hh; a bias that is absent is zeros.
template <typename T>
void sum_biases(const LayerWeights<T>& weights, Range range, T* sums) {
  for (int64_t i = range.begin; i < range.end; ++i) {
    sums[i] = (weights.bias_ih ? weights.bias_ih[i] : T(0)) + (weights.bias_hh ? weights.bias_hh[i] : T(0));
  }
}

template <typename T>
class GateProduct {
 public:
  // `blocks`: of kLanes units.
  GateProduct(int64_t hidden_size, Range blocks) : hidden_size_(hidden_size), blocks_(blocks) {}

  int lanes_in(int64_t block) const { return static_cast<int>(smaller(hidden_size_ - block * kLanes, kLanes)); }

  // pre = (bias, or what is in `pre`) + weight * a, from the panels of the weight or, if these are null, row by row.
  template <typename A>
  void multiply(int64_t rows, const A& a_row, int64_t count, const T* weight, const T* panels, const RowGrid<T>& pre,
                const T* bias) {
    if (panels) {
      multiply_panels(rows, a_row, count, panels, pre, bias,
                      [](int64_t, int64_t, int, auto&) LSTM_EXT_LAMBDA_INLINE { return false; });
    } else {
      dot_gates(weight, count, rows, a_row, bias, pre);
    }
  }

  // tile = a * panel + (bias, or what is in `pre`) for each block of units; then finish(row, unit, lanes, tile), which
  // says whether it consumed the tile. If not, the tile goes to `pre`.
  template <typename A, typename Finish>
  LSTM_EXT_INLINE void multiply_panels(int64_t rows, const A& a_row, int64_t count, const T* panels,
                                       const RowGrid<T>& pre, const T* bias, Finish&& finish) {
    const int64_t H = hidden_size_;
    for (int64_t block = blocks_.begin; block < blocks_.end; ++block) {
      const int lanes = lanes_in(block);
      const T* panel = panels + block * kGates * kLanes * count;
      for (int64_t k = 0; k == 0 || k < count; k += kBlockK) {
        const int64_t depth = smaller(kBlockK, count - k);
        const bool last = k + depth >= count;
        for_each_row_tile(rows, [&](int64_t row, auto height) LSTM_EXT_LAMBDA_INLINE {
          constexpr int R = height();
          const T* a[R];
          T* out[R];
#pragma GCC unroll kTileRows
          for (int r = 0; r < R; ++r) {
            a[r] = count > 0 ? a_row(row + r) + k : nullptr;
            out[r] = pre(row + r) + block * kLanes;
          }
          // The sum starts from zero and meets the rest at its end: adding many small products to a
          // large number would round each of them at the large one's precision.
          Tile<T, R, kGates> tile;
          tile.zero();
#pragma GCC unroll kTileRows
          for (int r = 0; r < R; ++r)
#pragma GCC unroll kGates
            for (int gate = 0; gate < kGates; ++gate) __builtin_prefetch(out[r] + gate * H, 1);
          accumulate_rows(tile, a, panel + k * kGates * kLanes, kGates * kLanes, depth);
          const bool from_bias = bias && k == 0;
#pragma GCC unroll kTileRows
          for (int r = 0; r < R; ++r) {
            const T* start = from_bias ? bias + block * kLanes : out[r];
#pragma GCC unroll kGates
            for (int gate = 0; gate < kGates; ++gate) {
              tile.acc[r][gate] = tile.acc[r][gate] + load_lanes<T>(start + gate * H, lanes);
            }
          }
          if (last && finish(row, block * kLanes, lanes, tile)) return;
#pragma GCC unroll kTileRows
          for (int r = 0; r < R; ++r)
#pragma GCC unroll kGates
            for (int gate = 0; gate < kGates; ++gate) store_lanes<T>(out[r] + gate * H, tile.acc[r][gate], lanes);
        });
      }
    }
  }

  // The row-major path: pre = (bias, or what is in `pre`) + weight * a, for these units.
  template <typename A>
  void dot_gates(const T* weight, int64_t count, int64_t rows, const A& a_row, const T* bias, const RowGrid<T>& pre) {
    const int64_t H = hidden_size_;
    const int64_t begin = blocks_.begin * kLanes;
    const int64_t end = smaller(blocks_.end * kLanes, H);
    if (begin == 0 && end == H) {  // all units: the four gates are one range
      dot_range(weight, count, 0, 4 * H, rows, a_row, bias, pre);
    } else {
      for (int gate = 0; gate < kGates; ++gate) {
        dot_range(weight, count, gate * H + begin, gate * H + end, rows, a_row, bias, pre);
      }
    }
  }

  template <typename A>
  void dot_range(const T* weight, int64_t count, int64_t begin, int64_t end, int64_t rows, const A& a_row,
                 const T* bias, const RowGrid<T>& pre) {
    constexpr int kMany = kLanes >= 4 ? 4 : kLanes;
    for (int64_t m = begin; m < end;) {
      int64_t row = 0;
      const int64_t many_end = smaller(m + kLanes, end);
      for (; row + kMany <= rows; row += kMany) {
        for (int64_t j = m; j < many_end; j += kLanes / kMany) {
          dot_tile<T, kMany>(
              weight + j * count, count, static_cast<int>(smaller(many_end - j, kLanes / kMany)),
              [&](int x) LSTM_EXT_LAMBDA_INLINE { return a_row(row + x); },
              [&](int x) LSTM_EXT_LAMBDA_INLINE { return pre(row + x) + j; }, bias ? bias + j : nullptr);
        }
      }
      for (; row < rows; ++row) {
        dot_tile<T, 1>(
            weight + m * count, count, static_cast<int>(many_end - m),
            [&](int) LSTM_EXT_LAMBDA_INLINE { return a_row(row); },
            [&](int) LSTM_EXT_LAMBDA_INLINE { return pre(row) + m; }, bias ? bias + m : nullptr);
      }
      m = many_end;
    }
  }

 private:
  static constexpr int kLanes = Simd<T>::kLanes;

  const int64_t hidden_size_;
  const Range blocks_;
};

}  // namespace
}  // namespace lstm_ext::cpu::LSTM_EXT_ISA
