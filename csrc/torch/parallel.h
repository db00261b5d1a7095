// Workers that run at the same time, on the threads torch uses.
#pragma once

#include <cstdint>
#include <ctime>

#include "contract/visibility.h"

namespace lstm_ext {

double seconds(clockid_t clock);

// The number of workers that a call may use: torch's intra-op threads, or 1 inside a parallel region. It is lower for a
// while if workers had to share their cores with other programs and fewer are faster. `always_all` turns that off, for
// a call whose bits depend on their number.
int available_threads(bool always_all);

// The workers of a limited call, and for how many seconds of calls the limit lasts. For tests.
struct Limit {
  int workers;
  double seconds;
};
LSTM_EXT_PUBLIC Limit worker_limit();
LSTM_EXT_PUBLIC void set_fewer_when_crowded(bool wanted);

// cpu::Machine::worker_costs of all calls. For tests, in which workers that cost nothing give small layers many of
// them.
LSTM_EXT_PUBLIC double worker_costs();
LSTM_EXT_PUBLIC void set_worker_costs(double multiple);

// Runs work(index) for index < workers on as many threads at once and returns true. Returns false, having run nothing,
// if the system gives fewer threads. The work may wait for the other workers, so the indices cannot run one after the
// other.
bool on_threads(int workers, void (*work)(void* context, int index), void* context);

template <typename F>
bool on_threads(int workers, const F& work) {
  const auto call = [](void* context, int index) { (*static_cast<const F*>(context))(index); };
  return on_threads(workers, call, const_cast<F*>(&work));
}

// The same for a call, whose time counts. `work_size` is the work of all workers, in the unit of WorkerGrid.
bool run_at_once(int workers, double work_size, void (*work)(void* context, int index), void* context);

template <typename F>
bool run_at_once(int workers, double work_size, F&& work) {
  return run_at_once(workers, work_size, [](void* context, int index) { (*static_cast<F*>(context))(index); }, &work);
}

}  // namespace lstm_ext
