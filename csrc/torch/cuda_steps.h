// The steps of one direction for the host's loop, by contract/steps.h. Both passes number the steps in the direction of
// the layer; the backward pass counts down.
#pragma once

#include <algorithm>

#include "contract/steps.h"

namespace lstm_ext {

struct Step {
  int64_t time;
  int64_t offset;  // rows of the sequence before the step, in memory
  int64_t rows;
  int64_t previous_rows;  // rows that are in the previous step as well
  int64_t next_rows;      // rows that are in the next step as well
};

inline Step step_at(const Steps& steps, int64_t n) {
  const int64_t time = steps.time(n), rows = steps.rows_in(n);
  return {time, steps.rows_before(time), rows, std::min(rows, steps.rows_in(n - 1)),
          std::min(rows, steps.rows_in(n + 1))};
}

// The offset of the step before n: rows of the sequence before it, in memory; 0 for the first step.
inline int64_t previous_offset(const Steps& steps, int64_t n) {
  return n > 0 ? steps.rows_before(steps.time(n - 1)) : 0;
}

// The steps [first, end), a part of the sequence. In memory they lie from time `begin` to time `finish`.
struct Chunk {
  int64_t first, end;
  int64_t begin, finish;

  // Takes as many steps as have `limit` rows in all, but at least one and at most `most`.
  Chunk(const Steps& steps, int64_t first_step, int64_t limit, int64_t most) : first(first_step), end(first_step + 1) {
    const int64_t last = std::min(steps.count(), first + most);
    for (int64_t sum = steps.rows_in(first); end < last && sum + steps.rows_in(end) <= limit; ++end) {
      sum += steps.rows_in(end);
    }
    begin = std::min(steps.time(first), steps.time(end - 1));
    finish = std::max(steps.time(first), steps.time(end - 1)) + 1;
  }
};

}  // namespace lstm_ext
