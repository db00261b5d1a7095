// The time steps of one direction of a layer, as the host's loop meets them.
#pragma once

#include <algorithm>

#include "torch/checks.h"

namespace lstm_ext {

// One step. Rows are those of the batch that take part in it; `offset` rows of the sequence lie before it in memory.
struct Step {
  int64_t time;
  int64_t offset;
  int64_t rows;
  int64_t continuing;  // rows that took part in the step before, in the direction of time
  int64_t going_on;    // rows that take part in the step after
};

class Steps {
 public:
  Steps(const LayerSizes& sizes, bool reverse) : sizes_(sizes), reverse_(reverse) {}

  int64_t count() const { return sizes_.steps; }
  bool reverse() const { return reverse_; }

  // Number n in the direction of time.
  Step operator[](int64_t n) const {
    const int64_t t = time(n);
    const int64_t rows = rows_at(t);
    const auto shared_with = [&](int64_t other) {
      return 0 <= other && other < count() ? std::min(rows, rows_at(time(other))) : 0;
    };
    return {t, offset(t), rows, shared_with(n - 1), shared_with(n + 1)};
  }

  // Rows of the sequence before time t.
  int64_t offset(int64_t t) const { return sizes_.packed() ? sizes_.step_offsets[t] : t * sizes_.batch; }

  // The end of a piece of the sequence that begins with step n: as many steps as have `rows` rows in all, at least one.
  int64_t piece_end(int64_t n, int64_t rows) const {
    int64_t end = n + 1;
    for (int64_t sum = rows_at(time(n)); end < count() && sum + rows_at(time(end)) <= rows; ++end) {
      sum += rows_at(time(end));
    }
    return end;
  }

 private:
  int64_t time(int64_t n) const { return reverse_ ? count() - 1 - n : n; }
  int64_t rows_at(int64_t t) const { return offset(t + 1) - offset(t); }

  const LayerSizes& sizes_;
  bool reverse_;
};

// The steps [first, end) in the direction of time, and where they lie in memory: from time `begin` to time `finish`.
struct Piece {
  int64_t first, end;
  int64_t begin, finish;

  Piece(const Steps& steps, int64_t first_step, int64_t end_step)
      : first(first_step),
        end(end_step),
        begin(steps.reverse() ? steps.count() - end_step : first_step),
        finish(steps.reverse() ? steps.count() - first_step : end_step) {}
};

}  // namespace lstm_ext
