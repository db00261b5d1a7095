// Transposed copies of a weight: its columns become rows, the order in which tiles read it.
#pragma once

#include "cpu/isa.h"

#include "cpu/range.h"
#include "cpu/simd.h"

namespace lstm_ext::cpu::LSTM_EXT_ISA {
namespace {

// Transposes v in place, as a matrix of kLanes x kLanes numbers.
template <typename T, int Group = 1>
LSTM_EXT_INLINE void transpose(Reg<T>* v) {
  constexpr int n = Simd<T>::kLanes;
  if constexpr (Group < n) {
    using Lanes = std::make_integer_sequence<int, n>;
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) {
      if ((i & Group) == 0) {
        const Reg<T> a = v[i];
        const Reg<T> b = v[i + Group];
        v[i] = pick_groups<T, Group, 0>(a, b, Lanes{});
        v[i + Group] = pick_groups<T, Group, Group>(a, b, Lanes{});
      }
    }
    transpose<T, 2 * Group>(v);
  }
}

// out[k * out_step + lane] = source[lane * count + k] for k < count and lane < `width`; lanes from `lanes` on are zero.
template <typename T, typename W>
void pack_transposed(const W* source, int lanes, int64_t count, T* out, int64_t out_step, int width = Simd<T>::kLanes) {
  using S = Simd<T>;
  constexpr int n = S::kLanes;
  for (int64_t k = 0; k < count; k += n) {
    const int depth = static_cast<int>(smaller(count - k, n));
    Reg<T> rows[n];
    if (lanes == n && depth == n) {
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i) rows[i] = S::load(source + i * count + k);
      transpose<T>(rows);
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i) S::store(out + (k + i) * out_step, rows[i]);
    } else {
      for (int i = 0; i < n; ++i) rows[i] = i < lanes ? load_lanes<T>(source + i * count + k, depth) : S::zero();
      transpose<T>(rows);
      for (int i = 0; i < depth; ++i) store_lanes<T>(out + (k + i) * out_step, rows[i], width);
    }
  }
}

}  // namespace
}  // namespace lstm_ext::cpu::LSTM_EXT_ISA
