#include "torch/parallel.h"

#include <ATen/Parallel.h>

#if !defined(_OPENMP)
#error "compile with -fopenmp: without it everything would run on one thread and say nothing"
#endif
#include <omp.h>
#include <pthread.h>
#include <sys/stat.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "torch/crowding.h"

namespace lstm_ext {

double seconds(clockid_t clock) {
  timespec now;
  clock_gettime(clock, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

namespace {

Crowding& crowding() {
  static Crowding state;
  return state;
}

std::atomic<double> costs{1};

// A child of fork() has one thread. If the thread that forked had a team before, OpenMP would wait for ever for that
// team in the child. So the child computes on one thread if the process had a team, or got threads since the library
// was loaded, which may be a team of torch's operators.
std::atomic<bool> had_team{false}, lost_team{false};
nlink_t tasks() {
  struct stat folder;  // it has a folder for each thread
  return stat("/proc/self/task", &folder) == 0 ? folder.st_nlink : 0;
}
const nlink_t tasks_at_first = tasks();
void before_fork() {
  if (tasks() > tasks_at_first) had_team.store(true, std::memory_order_relaxed);
}
void in_child() { lost_team.store(had_team.load(std::memory_order_relaxed), std::memory_order_relaxed); }
[[maybe_unused]] const int registered = pthread_atfork(&before_fork, nullptr, &in_child);

}  // namespace

int available_threads(bool always_all) {
  if (at::in_parallel_region() || omp_in_parallel() || lost_team.load(std::memory_order_relaxed)) return 1;
  return always_all ? at::get_num_threads() : crowding().limited(at::get_num_threads());
}

Limit worker_limit() { return {crowding().workers(), crowding().left()}; }
void set_fewer_when_crowded(bool wanted) { crowding().wanted.store(wanted, std::memory_order_relaxed); }

double worker_costs() { return costs.load(std::memory_order_relaxed); }
void set_worker_costs(double multiple) { costs.store(multiple, std::memory_order_relaxed); }

bool on_threads(int workers, void (*work)(void* context, int index), void* context) {
  bool complete = false;
  if (!had_team.load(std::memory_order_relaxed)) had_team.store(true, std::memory_order_relaxed);
#pragma omp parallel num_threads(workers)
  {
    // All threads see the same number, so all agree.
    if (omp_get_num_threads() == workers) {
      const int worker = omp_get_thread_num();
      if (worker == 0) complete = true;
      work(context, worker);
    }
  }
  return complete;
}

bool run_at_once(int workers, double work_size, void (*work)(void* context, int index), void* context) {
  const bool limited = crowding().limits();
  if (workers == 1) {
    if (!limited) {
      work(context, 0);
      return true;
    }
    const double begin = seconds(CLOCK_MONOTONIC);
    work(context, 0);
    crowding().note_limited(seconds(CLOCK_MONOTONIC) - begin, work_size);
    return true;
  }
  // Measuring a thread's time takes a few percent of a short call.
  static std::atomic<bool> last_was_long{false};
  const bool measures = !limited && last_was_long.load(std::memory_order_relaxed);
  struct Had {
    double time = 0, lost = 0;
  };
  std::vector<Had> had(measures ? workers : 0);
  const double begin = seconds(CLOCK_MONOTONIC);
  const bool complete = on_threads(workers, [&](int worker) {
    const double before = measures ? seconds(CLOCK_THREAD_CPUTIME_ID) : 0;
    work(context, worker);
    if (measures) {
      // Measured from the common begin: a thread that was woken late delayed the others.
      const double time = seconds(CLOCK_MONOTONIC) - begin;
      had[worker] = {time, time - (seconds(CLOCK_THREAD_CPUTIME_ID) - before)};
    }
  });
  if (!complete) return false;
  const double time = seconds(CLOCK_MONOTONIC) - begin;
  last_was_long.store(time > kShortest, std::memory_order_relaxed);
  if (limited) {
    // Leaves out a call that always uses all its workers.
    if (workers <= crowding().workers()) crowding().note_limited(time, work_size);
  } else if (measures && time > kShortest) {
    double lost = 0, cores = 0;
    for (const Had& one : had) {
      lost = std::max(lost, one.lost);
      cores += 1 - one.lost / one.time;
    }
    crowding().note(workers, time, work_size, lost, cores);
  }
  return true;
}

}  // namespace lstm_ext
