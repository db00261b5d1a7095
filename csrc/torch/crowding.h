// The number of workers of a call beside other programs. It reads no clock: it is told how long calls took.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <mutex>

namespace lstm_ext {

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

}  // namespace lstm_ext
