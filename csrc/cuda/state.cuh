// The states of a row before and after a step, and the gradients of them: where they come from, and what zoneout, a
// mask, a reset and the end of a row make of them. For all kernels of a step. kExtras is whether anything of that but
// resets may be there: the plain layer's kernels have no instruction for it.
#pragma once

#include "cuda/numeric.cuh"
#include "cuda/stepwise.h"

namespace lstm_ext::cuda {

// ---- rows

template <bool kExtras>
LSTM_DEVICE bool takes_part(const RowsOfStep& s, int64_t b) {
  if constexpr (kExtras) return !s.lengths || s.time < s.lengths[b];
  return true;
}

// The following are of rows that take part.
template <bool kExtras>
LSTM_DEVICE bool continues(const RowsOfStep& s, int64_t b) {
  if constexpr (kExtras) {
    if (s.lengths && s.reverse && s.time + 1 >= s.lengths[b]) return false;
  }
  return b < s.continuing;
}
template <bool kExtras>
LSTM_DEVICE bool goes_on(const RowsOfStep& s, int64_t b) {
  if constexpr (kExtras) {
    if (s.lengths && !s.reverse && s.time + 1 >= s.lengths[b]) return false;
  }
  return b < s.going_on;
}

LSTM_DEVICE bool is_flagged(const ResetFlags& resets, int64_t b) { return b < resets.rows && resets.flags[b] != 0; }

// In reverse, the flag is that of the step before, which the row may not have.
template <bool kExtras>
LSTM_DEVICE bool is_reset(const RowsOfStep& s, int64_t b) {
  if constexpr (kExtras) return is_flagged(s.resets, b) && (!s.reverse || continues<true>(s, b));
  return is_flagged(s.resets, b);
}

// Of three states (rows, size), that which row b has before the step: null means zeros.
template <bool kExtras, typename A, typename T>
LSTM_DEVICE A previous_state(const RowsOfStep& s, int64_t b, int64_t place, const A* continuing, const T* beginning,
                             const T* reset) {
  if (is_reset<kExtras>(s, b)) return reset ? widen(reset[place]) : 0;
  if (continues<kExtras>(s, b)) return continuing[place];
  return beginning ? widen(beginning[place]) : 0;
}

template <bool kExtras, typename T>
LSTM_DEVICE typename Types<T>::Accumulate previous_cell(const RowsOfStep& s, const PreviousCell<T>& c, int64_t b,
                                                        int64_t place) {
  return previous_state<kExtras>(s, b, place, c.previous, c.c0, c.reset_c);
}

// ---- zoneout

template <typename A>
LSTM_HOST_DEVICE bool is_active(const Zoneout<A>& z) {
  return z.kept != nullptr || z.share != 0;
}

// A flag chooses, and does not multiply by 0 what may be infinite.
template <typename A>
LSTM_DEVICE A kept_part(const Zoneout<A>& z, int64_t place, A value) {
  return z.kept ? (z.kept[place] != 0 ? value : A(0)) : z.share * value;
}
template <typename A>
LSTM_DEVICE A new_part(const Zoneout<A>& z, int64_t place, A value) {
  return z.kept ? (z.kept[place] != 0 ? A(0) : value) : (1 - z.share) * value;
}
template <typename A>
LSTM_DEVICE A mixed(const Zoneout<A>& z, int64_t place, A before, A now) {
  return kept_part(z, place, before) + new_part(z, place, now);
}

// ---- outputs

template <typename T>
LSTM_HOST_DEVICE bool has_extras(const NewOutput<T>& s) {
  return is_active(s.zoneout) || s.mask != nullptr;
}

// h'_t of unit j of a row that takes part.
template <bool kExtras, typename T>
LSTM_DEVICE void write_output(const NewOutput<T>& s, const RowsOfStep& rows, int64_t b, int64_t j, int64_t size,
                              typename Types<T>::Accumulate h) {
  const int64_t place = b * size + j;
  if constexpr (kExtras) {
    if (s.h_carried) {
      const auto* carried = s.h_carried;
      h = mixed(s.zoneout, place, previous_state<true>(rows, b, place, carried, s.h0, s.reset_h), h);
      s.h_carried[place] = h;
    }
  }
  const T stored = narrow<T>(h);
  if constexpr (kExtras) {
    if (s.mask) s.masked[place] = narrow<T>(s.mask[place] * widen(stored));
  }
  s.h[b * s.h_stride + j] = stored;
  if (s.h_n && !goes_on<kExtras>(rows, b)) s.h_n[place] = stored;
}

// Of a row that takes no part. What a product makes of it is not read, but shall not be made of anything.
template <typename T>
LSTM_DEVICE void write_no_output(const NewOutput<T>& s, int64_t b, int64_t j, int64_t size) {
  s.h[b * s.h_stride + j] = narrow<T>(0);
  if (s.mask) s.masked[b * size + j] = narrow<T>(0);
}

template <typename T>
LSTM_HOST_DEVICE bool has_extras(const GradOutput<T>& s) {
  return is_active(s.zoneout) || s.mask != nullptr;
}

// dL/dh'_t of unit j of a row that takes part. To be called once: it carries on what zoneout keeps.
template <bool kExtras, typename T>
LSTM_DEVICE typename Types<T>::Accumulate output_gradient_of(const GradOutput<T>& s, const RowsOfStep& rows, int64_t b,
                                                             int64_t j, int64_t size) {
  using A = typename Types<T>::Accumulate;
  const int64_t place = b * size + j;
  A sum = 0;
  if (s.grad_output) sum += widen(s.grad_output[b * s.grad_output_stride + j]);
  const bool continued = goes_on<kExtras>(rows, b);
  if (continued && !is_flagged(rows.resets_after, b)) {
    A through_product = s.recurrent_part[place];
    if constexpr (kExtras) {
      if (s.mask) through_product *= s.mask[place];
    }
    sum += through_product;
  }
  if constexpr (kExtras) {
    if (s.grad_h && continued) sum += s.grad_h[place];  // 0 where the step after reset it
  }
  if (s.grad_h_n && !continued) sum += widen(s.grad_h_n[place]);
  if constexpr (kExtras) {
    if (s.grad_h) {
      const A before = kept_part(s.zoneout, place, sum);
      const bool reset = is_reset<true>(rows, b);
      s.grad_h[place] = reset ? 0 : before;
      if (reset && s.grad_reset_h) s.grad_reset_h[place] += before;
      sum = new_part(s.zoneout, place, sum);
    }
  }
  return sum;
}

}  // namespace lstm_ext::cuda
