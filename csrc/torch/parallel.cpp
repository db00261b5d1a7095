#include "torch/parallel.h"

#include <ATen/Parallel.h>

#if !defined(_OPENMP)
#error "compile with -fopenmp: without it everything would run on one thread and say nothing"
#endif
#include <omp.h>

#include <ctime>

#include <algorithm>
#include <atomic>

namespace lstm_ext {
namespace {

constexpr double kShortest = 150e-6;  // seconds: of shorter calls, waking a thread may be most
// Of the time of a call, what a worker with a core of its own computes at least. Two on a core get half of it each.
constexpr double kLeastShare = 0.65;
// After a bad call so many are limited to fewer workers: one, since the system may have been busy for a moment, then
// kSecondCalls, and twice as many each time that a try with all workers is bad.
constexpr int kFirstCalls = 1, kSecondCalls = 8, kMostCalls = 64;
// The pause before the next try, for each limited call. The first bad call has none. A try may cost several turns of
// the system's scheduler, of milliseconds each.
constexpr double kPausePerCall = 0.004;
// Limited calls compute for at most this time. Otherwise long calls would stay limited for seconds after the other
// programs end.
constexpr double kMostTime = 0.25;
// After so long with all workers and no bad call, the count starts again at kFirstCalls. A few good calls may be luck:
// the scheduler gives turns of milliseconds.
constexpr double kForgotten = 0.2;

double seconds(clockid_t clock) {
  timespec now;
  clock_gettime(clock, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

// After a call in which workers shared their cores, the next one has fewer workers. Then one tries again with all, and
// if it fares no better, more calls are limited, and so on. All of a process: its threads share its cores.
class Crowding {
 public:
  int limited(int threads) {
    const double until = until_.load(std::memory_order_relaxed);
    if (threads == 1 || until == 0 || !wanted.load(std::memory_order_relaxed)) return threads;
    const bool more = time_.load(std::memory_order_relaxed) < kMostTime && calls_.load(std::memory_order_relaxed) > 0 &&
                      calls_.fetch_sub(1, std::memory_order_relaxed) > 0;
    const int fewer = std::min(threads, workers_.load(std::memory_order_relaxed));
    if (more) return fewer;
    const double now = seconds(CLOCK_MONOTONIC);
    if (now < until) return fewer;
    until_.store(0, std::memory_order_relaxed);
    lifted_.store(now, std::memory_order_relaxed);
    wakes_.store(true, std::memory_order_relaxed);
    return threads;
  }

  // Whether threads that slept wake up for this call, the first with all workers. What it takes says nothing.
  bool wakes() { return wakes_.load(std::memory_order_relaxed) && wakes_.exchange(false, std::memory_order_relaxed); }

  bool limits() const { return until_.load(std::memory_order_relaxed) != 0; }
  // A call took so long.
  void spend(double time) {
    if (limits()) time_.store(time_.load(std::memory_order_relaxed) + time, std::memory_order_relaxed);
  }

  void note(int workers, int crowded) {
    const int calls = next_.load(std::memory_order_relaxed);
    if (crowded == 0) {
      // A limited call says nothing about all workers.
      if (!limits() && calls > kFirstCalls &&
          seconds(CLOCK_MONOTONIC) - lifted_.load(std::memory_order_relaxed) > kForgotten) {
        next_.store(kFirstCalls, std::memory_order_relaxed);
      }
      return;
    }
    workers_.store(std::max(1, workers - crowded), std::memory_order_relaxed);
    next_.store(std::clamp(2 * calls, kSecondCalls, kMostCalls), std::memory_order_relaxed);
    calls_.store(calls, std::memory_order_relaxed);
    time_.store(0, std::memory_order_relaxed);
    const double now = seconds(CLOCK_MONOTONIC);
    until_.store(now + (calls > kFirstCalls ? calls * kPausePerCall : 0), std::memory_order_relaxed);
  }

  CrowdedCalls left() const {
    return {workers_.load(std::memory_order_relaxed), std::max(0, calls_.load(std::memory_order_relaxed))};
  }

  std::atomic<bool> wanted{true};

 private:
  std::atomic<bool> wakes_{false};
  std::atomic<int> workers_{1}, calls_{0}, next_{kFirstCalls};
  std::atomic<double> time_{0};  // of the calls since the last bad one
  // By the clock: since when nothing is limited; and when the next try may be, 0 while nothing is limited.
  std::atomic<double> lifted_{0}, until_{0};
};

Crowding& crowding() {
  static Crowding state;
  return state;
}

}  // namespace

int available_threads(bool always_all) {
  if (at::in_parallel_region() || omp_in_parallel()) return 1;
  return always_all ? at::get_num_threads() : crowding().limited(at::get_num_threads());
}

CrowdedCalls crowded_calls() { return crowding().left(); }
void set_fewer_when_crowded(bool wanted) { crowding().wanted.store(wanted, std::memory_order_relaxed); }

bool run_at_once(int workers, void (*work)(void* context, int index), void* context) {
  if (workers == 1) {
    if (!crowding().limits()) {
      work(context, 0);
      return true;
    }
    const double begin = seconds(CLOCK_MONOTONIC);
    work(context, 0);
    crowding().spend(seconds(CLOCK_MONOTONIC) - begin);
    return true;
  }
  bool complete = false;
  std::atomic<int> crowded{0};
  // Asking for a thread's time takes a few percent of a short call.
  static std::atomic<bool> last_was_long{false};
  const bool measures = !crowding().wakes() && last_was_long.load(std::memory_order_relaxed);
  const double begin = seconds(CLOCK_MONOTONIC);
#pragma omp parallel num_threads(workers)
  {
    // All threads see the same number, so all agree.
    if (omp_get_num_threads() == workers) {
      if (omp_get_thread_num() == 0) complete = true;
      const double before = measures ? seconds(CLOCK_THREAD_CPUTIME_ID) : 0;
      work(context, omp_get_thread_num());
      if (measures) {
        // From the beginning of all: a thread that was woken late held up the others.
        const double passed = seconds(CLOCK_MONOTONIC) - begin;
        if (passed > kShortest && seconds(CLOCK_THREAD_CPUTIME_ID) - before < kLeastShare * passed) ++crowded;
      }
    }
  }
  if (!complete) return false;
  const double time = seconds(CLOCK_MONOTONIC) - begin;
  last_was_long.store(time > kShortest, std::memory_order_relaxed);
  crowding().spend(time);
  if (measures) crowding().note(workers, crowded.load(std::memory_order_relaxed));
  return true;
}

}  // namespace lstm_ext
