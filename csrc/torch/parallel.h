// Workers that run at the same time, on the threads torch uses.
#pragma once

#include <cstdint>

#include "contract/visibility.h"

namespace lstm_ext {

// How many workers a call may have: torch's intra-op threads, or 1 inside a parallel region. Fewer, for a while, where
// workers had to share their cores with other programs and fewer are faster. Not if `always_all`: a call whose bits
// depend on their number.
int available_threads(bool always_all);

// How many workers a limited call may have, and for how many seconds of calls they are limited. For tests.
struct Limit {
  int workers;
  double seconds;
};
LSTM_EXT_PUBLIC Limit worker_limit();
LSTM_EXT_PUBLIC void set_fewer_when_crowded(bool wanted);

// Runs work(index) for index < workers on as many threads at once and returns true; or returns
// false, having run nothing, if the system gives fewer threads. The work may wait for its fellows,
// so running the indices one after the other is no substitute. `work_size`: of all workers, in the unit of WorkerGrid.
bool run_at_once(int workers, double work_size, void (*work)(void* context, int index), void* context);

template <typename F>
bool run_at_once(int workers, double work_size, F&& work) {
  return run_at_once(workers, work_size, [](void* context, int index) { (*static_cast<F*>(context))(index); }, &work);
}

}  // namespace lstm_ext
