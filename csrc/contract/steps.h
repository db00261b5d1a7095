// The step table: the time of each step of a pass, its rows, and their place in memory. It serves dense and packed
// data, on both backends.
#pragma once

#include "contract/layer.h"

namespace lstm_ext {

// Step s of a pass is at time(s). A forward pass runs in the layer's direction, a backward pass against it.
class Steps {
 public:
  enum class Pass { kForward, kBackward };

  LSTM_EXT_CONTRACT_INLINE Steps(const LayerShape& shape, Pass pass)
      : shape_(shape), descending_(shape.reverse == (pass == Pass::kForward)) {}

  LSTM_EXT_CONTRACT_INLINE int64_t count() const { return shape_.steps; }
  LSTM_EXT_CONTRACT_INLINE bool packed() const { return shape_.step_offsets != nullptr; }
  // The time of step s. The map is its own inverse.
  LSTM_EXT_CONTRACT_INLINE int64_t time(int64_t s) const { return descending_ ? shape_.steps - 1 - s : s; }

  // Rows at time t, and rows of all times before t.
  LSTM_EXT_CONTRACT_INLINE int64_t rows_at(int64_t t) const {
    return packed() ? shape_.step_offsets[t + 1] - shape_.step_offsets[t] : shape_.batch;
  }
  LSTM_EXT_CONTRACT_INLINE int64_t rows_before(int64_t t) const {
    return packed() ? shape_.step_offsets[t] : t * shape_.batch;
  }
  // Rows in step s of the pass; none before the first step and after the last.
  LSTM_EXT_CONTRACT_INLINE int64_t rows_in(int64_t s) const {
    return s >= 0 && s < shape_.steps ? rows_at(time(s)) : 0;
  }

  // The rows whose state is replaced before the step at time t, in the layer's direction. A cut lies between two times,
  // so the reverse direction reads the flags of time t + 1. No row is cut before its own first step.
  LSTM_EXT_CONTRACT_INLINE ResetFlags resets_before(int64_t t) const {
    const int64_t cut = shape_.reverse ? t + 1 : t;
    if (!shape_.resets || cut >= shape_.steps) return {nullptr, 0};
    return {shape_.resets + rows_before(cut), rows_at(cut)};
  }

 private:
  const LayerShape& shape_;
  const bool descending_;
};

}  // namespace lstm_ext
