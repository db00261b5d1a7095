// Workers that run at the same time, on the threads torch uses.
#pragma once

#include <cstdint>

namespace lstm_ext {

// How many workers a call may have: torch's intra-op threads, or 1 inside a parallel region.
int available_threads();

// Runs work(index) for index < workers on as many threads at once and returns true; or returns
// false, having run nothing, if the system gives fewer threads. The work may wait for its fellows,
// so running the indices one after the other is no substitute.
bool run_at_once(int workers, void (*work)(void* context, int index), void* context);

template <typename F>
bool run_at_once(int workers, F&& work) {
  return run_at_once(workers, [](void* context, int index) { (*static_cast<F*>(context))(index); }, &work);
}

}  // namespace lstm_ext
