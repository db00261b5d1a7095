// Addresses of rows: in a grid, in a step of a sequence, and in a team.
#pragma once

#include "cpu/isa.h"

#include "cpu/range.h"
#include "cpu/simd.h"

namespace lstm_ext::cpu::LSTM_EXT_ISA {
namespace {

// Rows numbered outer * rows + inner, e.g. time step * batch + batch row. Strides may be negative. Rows without such a
// pattern are listed one by one.
template <typename T>
struct RowGrid {
  T* data;  // row 0
  int64_t outer_step, inner_step, rows;
  T* const* list = nullptr;

  LSTM_EXT_INLINE T* operator()(int64_t n) const {
    if (list) return list[n];
    // Avoids the division if the rows have one stride.
    if (outer_step == rows * inner_step) return data + n * inner_step;
    if (rows == 1) return data + n * outer_step;
    return data + n / rows * outer_step + n % rows * inner_step;
  }
};

// Rows with one stride.
template <typename T>
struct EvenRows {
  T* data;
  int64_t step;
  LSTM_EXT_INLINE T* operator()(int64_t n) const { return data + n * step; }
};

template <typename T>
LSTM_EXT_INLINE RowGrid<T> listed_rows(T* const* list) {
  return {nullptr, 0, 0, 0, list};
}

template <typename T>
void copy(const T* from, int64_t count, T* to) {
  for_each_register<T>(count, [&](int64_t i, int lanes) LSTM_EXT_LAMBDA_INLINE {
    store_lanes<T>(to + i, load_lanes<T>(from + i, lanes), lanes);
  });
}

template <typename T>
void zero_rows(T* matrix, int64_t columns, Range rows) {
  for (int64_t i = rows.begin * columns; i < rows.end * columns; ++i) matrix[i] = T(0);
}

// Row 0 of a sequence at time t.
template <typename T>
LSTM_EXT_INLINE T* rows_at(const Sequence<T>& x, const Steps& steps, int64_t t) {
  return x.data + (steps.packed() ? steps.rows_before(t) * x.stride_b : t * x.stride_t);
}
// All rows of a sequence from time t on, in the order of time.
template <typename T>
LSTM_EXT_INLINE RowGrid<T> rows_from(const Sequence<T>& x, const Steps& steps, int64_t t) {
  if (steps.packed()) return {rows_at(x, steps, t), x.stride_b, x.stride_b, 1};
  return {rows_at(x, steps, t), x.stride_t, x.stride_b, steps.rows_at(t)};
}

// Calls f(rows, whether they begin) for the rows that continue, then for those that begin. There is one call site,
// because the loops inside are long.
template <typename F>
LSTM_EXT_INLINE void for_each_part(int64_t continued, int64_t count, F&& f) {
  for (int begins = 0; begins < 2; ++begins) {
    const Range part = begins ? Range{continued, count} : Range{0, continued};
    if (part.begin < part.end) f(part, begins != 0);
  }
}

// The batch rows of one team (see WorkerGrid).
struct TeamRows {
  int64_t first, stride, most;

  TeamRows(const LayerShape& shape, int64_t teams, int64_t team) {
    const Range rows = share(shape.batch, teams, team);
    const bool packed = shape.step_offsets != nullptr;
    first = packed ? team : rows.begin;
    stride = packed ? teams : 1;
    most = packed ? divide_up(shape.batch - team, teams) : rows.end - rows.begin;
  }
  // How many of them are among the first `rows` rows of the batch.
  LSTM_EXT_INLINE int64_t count(int64_t rows) const {
    if (stride == 1 && rows >= first + most) return most;
    return rows > first ? divide_up(rows - first, stride) : 0;
  }
  LSTM_EXT_INLINE int64_t batch_row(int64_t row) const { return first + row * stride; }
  // Whether the state of one of these rows of the team is replaced.
  LSTM_EXT_INLINE bool any(const ResetFlags& resets, Range part) const {
    if (!resets.any()) return false;
    uint8_t found = 0;
    const int64_t end = smaller(part.end, count(resets.rows));
    for (int64_t row = part.begin; row < end; ++row) found |= resets.flags[batch_row(row)];
    return found != 0;
  }
  // These rows of the team, in an array with the row stride `row_step`.
  template <typename T>
  LSTM_EXT_INLINE RowGrid<T> grid(T* data, int64_t row_step, Range part) const {
    const int64_t step = stride * row_step, rows = part.end - part.begin;
    return {data ? data + batch_row(part.begin) * row_step : nullptr, rows * step, step, rows};
  }
};

// A weight in torch's layout, of numbers of T or of 16 bits.
template <typename T>
struct WeightRows {
  const T* own = nullptr;
  const void* narrow = nullptr;  // in place of `own`
  WeightKind kind = WeightKind::kOwn;

  // The same from a later number on.
  WeightRows from(int64_t numbers) const {
    if (own) return {own + numbers, nullptr, kind};
    return {nullptr, static_cast<const char*>(narrow) + numbers * static_cast<int64_t>(sizeof(uint16_t)), kind};
  }

  // Calls f(a pointer to the numbers).
  template <typename F>
  LSTM_EXT_INLINE void with(F&& f) const {
    if constexpr (std::is_same_v<T, float>) {
      if (kind == WeightKind::kBFloat16) return f(static_cast<const BFloat16*>(narrow));
      if (kind == WeightKind::kFloat16) return f(static_cast<const Float16*>(narrow));
    }
    f(own);
  }
};

}  // namespace
}  // namespace lstm_ext::cpu::LSTM_EXT_ISA
