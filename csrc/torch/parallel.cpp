#include "torch/parallel.h"

#include <ATen/Parallel.h>
#include <c10/util/SmallVector.h>

#if !defined(_OPENMP)
#error "compile with -fopenmp: without it everything would run on one thread and say nothing"
#endif
#include <omp.h>

#include <ctime>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <mutex>

namespace lstm_ext {
namespace {

constexpr double kShortest = 150e-6;  // seconds; measuring a thread's time takes a few percent of a shorter call
constexpr double kTurn = 1e-3;        // seconds; between the time to wake a thread and another program's turn on a core
// Fewer workers are tried if the last calls, of about kMemory seconds together, lost kLost seconds. Beside a program
// that keeps one core busy the loss is half of their time, and beside two such programs more.
constexpr double kLost = 0.02, kMemory = 0.05;
// A limit lasts for kFirst times the time that was lost, and for twice as long each time that a limit is needed again,
// up to kLongest times. The system may have been busy for a moment only.
constexpr double kFirst = 0.25, kLongest = 8;
// A limit lasts for so many seconds or calls at most: a process that was stopped for an hour lost all of it.
constexpr double kMostTime = 0.5, kMostCalls = 8;

double seconds(clockid_t clock) {
  timespec now;
  clock_gettime(clock, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

// Workers that wait for each other are as slow as the one that shares its core with another program. Calls then use
// fewer workers, for about as long as was lost, if that is faster; then they try all workers again. The threads of a
// process share its cores, so all its calls share this object.
class Crowding {
 public:
  int limited(int threads) const {
    if (threads == 1 || !limits() || !wanted.load(std::memory_order_relaxed)) return threads;
    return std::min(threads, workers_.load(std::memory_order_relaxed));
  }
  bool limits() const { return left_.load(std::memory_order_relaxed) > 0; }

  // Records a limited call: its time and its work. If another thread holds the lock, or held it when the process was
  // forked, only the time is counted. Two threads at once may lose some of it.
  void note_limited(double time, double work) {
    left_.store(left_.load(std::memory_order_relaxed) - time, std::memory_order_relaxed);
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock) return;
    if (time > kShortest) {
      limited_.time += time;
      limited_.work += work;
    }
    // Threads that wait for work spin for a while, so the gain of a limit does not show at once.
    if (limited_.time < kMemory || limited_.time * crowded_.work < crowded_.time * limited_.work) return;
    left_.store(0, std::memory_order_relaxed);
    next_ = kFirst;
  }

  // Records a call with all workers: also the time that the worst of them had no core, and the number of cores they had
  // together.
  void note(int workers, double time, double work, double lost, double cores) {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock || limits()) return;  // the call began before the limit
    const double kept = std::exp(-time / kMemory);
    all_.time = kept * all_.time + time;
    all_.work = kept * all_.work + work;
    cores_ = kept * cores_ + time * cores;
    lost_ *= kept;
    if (lost < kTurn) {
      if ((undisturbed_ += time) > kMemory / 2) next_ = kFirst;
      return;
    }
    lost_ += lost;
    undisturbed_ = 0;
    if (lost_ < kLost) return;
    const int fewer = std::clamp(static_cast<int>(cores_ / all_.time + 0.1), 1, workers - 1);
    // Fewer workers, each with a core of its own, need longer for the work in the same proportion.
    const double limited_call = (time - lost) * workers / fewer;
    const double limit = std::min(next_ * lost_, std::max(kMostTime, kMostCalls * limited_call));
    next_ = std::min(2 * next_, kLongest);
    // A limit of less than one call is dropped, because it costs more than it saves.
    if (limit < limited_call) return;
    crowded_ = all_;
    all_ = limited_ = {};
    lost_ = cores_ = 0;
    workers_.store(fewer, std::memory_order_relaxed);
    left_.store(limit, std::memory_order_relaxed);
  }

  int workers() const { return workers_.load(std::memory_order_relaxed); }
  double left() const { return std::max(0.0, left_.load(std::memory_order_relaxed)); }

  std::atomic<bool> wanted{true};

 private:
  struct Calls {
    double time = 0, work = 0;
  };
  std::atomic<int> workers_{1};
  std::atomic<double> left_{0};  // seconds of limited calls
  std::mutex mutex_;
  Calls all_;                    // the last calls with all workers; earlier ones fade
  double lost_ = 0, cores_ = 0;  // lost time and cores of these calls
  Calls crowded_, limited_;      // calls before the limit, and since it began
  double next_ = kFirst;
  double undisturbed_ = 0;  // seconds of calls since one lost a turn
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

Limit worker_limit() { return {crowding().workers(), crowding().left()}; }
void set_fewer_when_crowded(bool wanted) { crowding().wanted.store(wanted, std::memory_order_relaxed); }

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
  bool complete = false;
  // Measuring a thread's time takes a few percent of a short call.
  static std::atomic<bool> last_was_long{false};
  const bool measures = !limited && last_was_long.load(std::memory_order_relaxed);
  struct Had {
    double time = 0, lost = 0;
  };
  c10::SmallVector<Had, 16> had(measures ? workers : 0);
  const double begin = seconds(CLOCK_MONOTONIC);
#pragma omp parallel num_threads(workers)
  {
    // All threads see the same number, so all agree.
    if (omp_get_num_threads() == workers) {
      const int worker = omp_get_thread_num();
      if (worker == 0) complete = true;
      const double before = measures ? seconds(CLOCK_THREAD_CPUTIME_ID) : 0;
      work(context, worker);
      if (measures) {
        // Measured from the common begin: a thread that was woken late delayed the others.
        const double time = seconds(CLOCK_MONOTONIC) - begin;
        had[worker] = {time, time - (seconds(CLOCK_THREAD_CPUTIME_ID) - before)};
      }
    }
  }
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
