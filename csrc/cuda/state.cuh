// How the kernels of a step read and write the states of a row and their gradients. Zoneout, the recurrent mask, resets
// and the end of a row are applied here, so that every kernel does the same. Without kOptions a kernel has instructions
// for nothing but the plain layer and resets.
#pragma once

#include "contract/transition.h"
#include "cuda/cell_math.cuh"
#include "cuda/stepwise.h"

namespace lstm_ext::cuda {

// ---- rows

// Whether row b takes part in the step. The functions below it are about rows that do.
template <bool kOptions>
LSTM_DEVICE bool takes_part(const StepRows& rows, int64_t b) {
  if constexpr (kOptions) return !rows.lengths || rows.time < rows.lengths[b];
  return true;
}

// Whether row b takes part in the step before as well, or in the step after.
template <bool kOptions>
LSTM_DEVICE bool has_previous(const StepRows& rows, int64_t b) {
  if constexpr (kOptions) {
    if (rows.lengths && rows.reverse && rows.time + 1 >= rows.lengths[b]) return false;
  }
  return b < rows.previous_count;
}
template <bool kOptions>
LSTM_DEVICE bool has_next(const StepRows& rows, int64_t b) {
  if constexpr (kOptions) {
    if (rows.lengths && !rows.reverse && rows.time + 1 >= rows.lengths[b]) return false;
  }
  return b < rows.next_count;
}

// Whether the state of row b is replaced before the step.
template <bool kOptions>
LSTM_DEVICE bool is_reset(const StepRows& rows, int64_t b) {
  if constexpr (kOptions) {
    // In the reverse direction the flag is that of time + 1, where a row may have ended: then it means nothing.
    return rows.resets[b] && (!rows.reverse || has_previous<true>(rows, b));
  }
  return rows.resets[b];
}

// The answers for a row, asked once: the persistent kernels ask before they wait for an operand. In one register.
class RowState {
 public:
  template <bool kOptions, bool kBackward>
  LSTM_DEVICE static RowState of(const StepRows& rows, int64_t b) {
    RowState row;
    if (!cuda::takes_part<kOptions>(rows, b)) return row;
    row.bits_ = kTakesPart;
    if (cuda::has_previous<kOptions>(rows, b)) row.bits_ |= kHasPrevious;
    if (cuda::is_reset<kOptions>(rows, b)) row.bits_ |= kIsReset;
    if (!cuda::has_next<kOptions>(rows, b)) return row;
    row.bits_ |= kHasNext;
    if constexpr (kBackward) {
      if (rows.resets_after[b]) row.bits_ |= kIsResetAfter;
    }
    return row;
  }
  LSTM_DEVICE bool takes_part() const { return has(kTakesPart); }
  LSTM_DEVICE bool has_previous() const { return has(kHasPrevious); }
  LSTM_DEVICE bool has_next() const { return has(kHasNext); }
  LSTM_DEVICE bool is_reset() const { return has(kIsReset); }
  // Whether U h_{t-1} is the product of the step before; and, backward, whether dL/dh_t has a part from the step after.
  LSTM_DEVICE bool takes_product() const { return (bits_ & (kHasPrevious | kIsReset)) == kHasPrevious; }
  LSTM_DEVICE bool gets_gradient() const { return (bits_ & (kHasNext | kIsResetAfter)) == kHasNext; }
  LSTM_DEVICE transition::Source source() const { return transition::source_of(is_reset(), has_previous()); }

 private:
  enum : uint32_t { kTakesPart = 1, kHasPrevious = 2, kHasNext = 4, kIsReset = 8, kIsResetAfter = 16 };
  LSTM_DEVICE bool has(uint32_t bit) const { return (bits_ & bit) != 0; }
  uint32_t bits_ = 0;
};
template <bool kOptions>
LSTM_DEVICE RowState forward_row(const StepRows& rows, int64_t b) {
  return RowState::of<kOptions, false>(rows, b);
}
template <bool kOptions>
LSTM_DEVICE RowState backward_row(const StepRows& rows, int64_t b) {
  return RowState::of<kOptions, true>(rows, b);
}

// The state of a row before the step, one of three (B, size): from the step before, from the beginning, or in place of
// a state that is reset. Null means zeros.
template <typename A, typename T>
LSTM_DEVICE A previous_state(RowState row, int64_t place, const A* previous, const T* initial, const T* reset) {
  const auto source = row.source();
  if (source == transition::Source::kStepBefore) return previous[place];
  const T* const start = source == transition::Source::kReset ? reset : initial;
  return start ? widen(start[place]) : 0;
}

template <typename T>
LSTM_DEVICE typename Types<T>::Accumulate previous_cell(RowState row, const PreviousCell<T>& c, int64_t place) {
  return previous_state(row, place, c.previous, c.c0, c.reset_c);
}

// ---- zoneout

// The zoneout of one element; see contract/transition.h.
template <typename A>
struct ZoneoutAt {
  const Zoneout<A>& zoneout;
  int64_t place;
  LSTM_HOST_DEVICE bool flagged() const { return zoneout.keep != nullptr; }
  LSTM_HOST_DEVICE A where_kept(A a, A b) const { return zoneout.keep[place] != 0 ? a : b; }
  LSTM_HOST_DEVICE A share() const { return zoneout.share; }
};
template <typename A>
LSTM_DEVICE A kept_state(const ZoneoutAt<A>& zoneout, A fresh, A previous) {
  return transition::kept_state<AccurateMath<A>>(zoneout, fresh, previous);
}
template <typename A>
LSTM_DEVICE transition::StateGradient<AccurateMath<A>> split_gradient(const ZoneoutAt<A>& zoneout, A grad) {
  return transition::split_gradient<AccurateMath<A>>(zoneout, grad);
}

// ---- outputs

// h_t of unit j of a row that takes part, and what the product of the next step reads.
template <typename T>
struct OutputValues {
  T h, operand;
};
// Makes them from h'_t.
template <bool kOptions, typename T>
LSTM_DEVICE OutputValues<T> output_values(const NewOutput<T>& output, RowState row, int64_t place,
                                          typename Types<T>::Accumulate h) {
  if constexpr (kOptions) {
    if (output.running_h) {
      const auto* running = output.running_h;
      const auto before = previous_state(row, place, running, output.h0, output.reset_h);
      h = kept_state<typename Types<T>::Accumulate>({output.zoneout, place}, h, before);
      output.running_h[place] = h;
    }
  }
  const T stored = narrow<T>(h);
  T operand = stored;
  if constexpr (kOptions) {
    if (output.recurrent_mask) operand = narrow<T>(output.recurrent_mask[place] * widen(stored));
  }
  return {stored, operand};
}
template <typename T>
LSTM_DEVICE void write_output(const NewOutput<T>& output, RowState row, int64_t b, int64_t j, int64_t size,
                              const OutputValues<T>& values) {
  if (output.recurrent_h) output.recurrent_h[b * output.recurrent_stride + j] = values.operand;
  output.h[b * output.h_stride + j] = values.h;
  if (output.h_n && !row.has_next()) output.h_n[b * size + j] = values.h;
}
template <bool kOptions, typename T>
LSTM_DEVICE void write_output(const NewOutput<T>& output, RowState row, int64_t b, int64_t j, int64_t size,
                              typename Types<T>::Accumulate h) {
  write_output(output, row, b, j, size, output_values<kOptions>(output, row, b * size + j, h));
}

// Rows that take no part are written as zeros: a product reads them, though nothing reads its result.
template <typename T>
LSTM_DEVICE void write_no_output(const NewOutput<T>& output, int64_t b, int64_t j) {
  output.h[b * output.h_stride + j] = narrow<T>(0);
  if (output.recurrent_h) output.recurrent_h[b * output.recurrent_stride + j] = narrow<T>(0);
}

// dL/dh_t of unit j of a row that takes part, as the caller gave it.
template <typename T>
LSTM_DEVICE typename Types<T>::Accumulate given_gradient(const GradOutput<T>& output, RowState row, int64_t b,
                                                         int64_t j, int64_t size) {
  typename Types<T>::Accumulate sum = 0;
  if (output.grad_output) sum = widen(output.grad_output[b * output.grad_output_stride + j]);
  if (output.grad_h_n && !row.has_next()) sum += widen(output.grad_h_n[b * size + j]);
  return sum;
}
// And through the product with U in the step after.
template <typename T>
LSTM_DEVICE typename Types<T>::Accumulate sum_of_parts(const GradOutput<T>& output, int64_t place) {
  auto sum = output.recurrent_part[place];
  for (int64_t part = 1; part < output.recurrent_parts; ++part) {
    sum += output.recurrent_part[part * output.recurrent_part_stride + place];
  }
  return sum;
}

// Returns dL/dh'_t of unit j of a row that takes part, from what the two functions above give. A kernel calls it once:
// it also leaves dL/dh_{t-1} through zoneout for the step before.
template <bool kOptions, typename T, typename Through>
LSTM_DEVICE typename Types<T>::Accumulate output_gradient(const GradOutput<T>& output, RowState row, int64_t place,
                                                          typename Types<T>::Accumulate given,
                                                          Through&& through_product) {
  using A = typename Types<T>::Accumulate;
  A sum = given;
  if (row.gets_gradient()) {
    A through = through_product();
    if constexpr (kOptions) {
      if (output.recurrent_mask) through *= output.recurrent_mask[place];
    }
    sum += through;
  }
  if constexpr (kOptions) {
    if (output.grad_h) {
      if (row.has_next()) sum += output.grad_h[place];  // 0 where the step after reset the row
      const auto split = split_gradient<A>({output.zoneout, place}, sum);
      output.grad_h[place] = row.is_reset() ? 0 : split.previous;
      if (row.is_reset() && output.grad_reset_h) output.grad_reset_h[place] += split.previous;
      sum = split.fresh;
    }
  }
  return sum;
}
template <bool kOptions, typename T>
LSTM_DEVICE typename Types<T>::Accumulate output_gradient_at(const GradOutput<T>& output, RowState row, int64_t b,
                                                             int64_t j, int64_t size) {
  return output_gradient<kOptions>(output, row, b * size + j, given_gradient(output, row, b, j, size),
                                   [&] { return sum_of_parts(output, b * size + j); });
}

}  // namespace lstm_ext::cuda
