#include "torch/worker_costs.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <climits>
#include <cmath>
#include <cstdlib>
#include <mutex>
#include <stdexcept>

#include "cpu/kernels.h"
#include "torch/parallel.h"

namespace lstm_ext {
namespace {

using cpu::kCostPoints;
using cpu::WorkerCosts;

constexpr const char* kVariable = "LSTM_EXT_CPU_MEASURE";
// In the unit of the constants, which were found where 1 us of arithmetic was this much.
constexpr double kWorkPerSecond = 6e10;
// No cost is more than so many times its constant: a barrier 20 us, a thread 200 us.
constexpr double kMostGrowth = 20;
// The constants include the time of a barrier of two workers, and of their start, but at most these seconds. If two
// workers take longer, the excess counts in the costs of more workers too.
constexpr double kBareBarrier = 0.3e-6, kBareThread = 3e-6;
// A tree is taken for so many workers or more, where it takes at most this part of the time of one line.
constexpr int kLeastTree = 8;
constexpr double kTreePays = 0.9;
// Each time is the median of so many. It counts if it is at most kSteady times the shortest: else other programs had
// the cores.
constexpr int kSamples = 9;
constexpr double kSteady = 3;
constexpr int kWaits = 16;                // barriers of a sample
constexpr double kMostSeconds = 20e-3;    // seconds for all of it; 64 threads need about 4 ms
constexpr int kTries = 3;                 // in a process
constexpr int kCallsBetweenTries = 1000;  // that may have several workers

double now() { return seconds(CLOCK_MONOTONIC); }

// The times and costs for some number of threads. Entries stay for the life of the process, since calls read them
// unlocked.
struct Known {
  WorkerTimes times;
  WorkerCosts costs;
  const Known* next;
};
std::atomic<const Known*> known{nullptr};
std::atomic<const WorkerCosts*> forced{nullptr};
std::atomic<int> tries{0}, calls{0};
std::atomic<int> pretended_cores{0};  // 0: those that there are

const Known* find(int threads) {
  const Known* entry = known.load(std::memory_order_acquire);
  while (entry && entry->times.threads != threads) entry = entry->next;
  return entry;
}

// Times of one number of workers; false if they do not count.
bool measure_at(int workers, double deadline, double& thread, double& barrier, double& tree) {
  std::vector<double> samples[3];
  for (auto& list : samples) list.resize(kSamples);
  for (double& sample : samples[0]) {
    const double begin = now();
    if (!on_threads(workers, [](int) {})) return false;
    sample = now() - begin;
    if (begin > deadline) return false;
  }
  // There are three barriers: both forms, and one at which all begin.
  const auto form_bytes = static_cast<size_t>(std::max(cpu::kBarrierBytes, cpu::barrier_bytes(true, workers)));
  struct alignas(64) Line {
    char bytes[64];
  };
  std::vector<Line> places(3 * form_bytes / sizeof(Line), Line{});
  const auto place = [&](size_t i) { return places.data()->bytes + i * form_bytes; };
  const auto meet_often = cpu::kernels<float>().meet_often;
  std::atomic<bool> late{false};
  const bool complete = on_threads(workers, [&](int worker) {
    for (int i = 0; i < kSamples; ++i) {
      for (const bool is_tree : {false, true}) {
        if (worker == 0 && now() > deadline) late.store(true, std::memory_order_relaxed);
        meet_often(place(2), /*tree=*/false, workers, worker, 1);
        if (late.load(std::memory_order_relaxed)) return;  // all have passed the same barrier since it was set
        const double begin = now();
        meet_often(place(is_tree), is_tree, workers, worker, kWaits);
        if (worker == 0) samples[1 + is_tree][i] = (now() - begin) / kWaits;
      }
    }
  });
  if (!complete || late) return false;
  double* const results[] = {&thread, &barrier, &tree};
  for (int i = 0; i < 3; ++i) {
    const std::optional<double> found = steady_median(samples[i]);
    if (!found) return false;
    *results[i] = *found;
  }
  return true;
}

// The number of workers of a place in WorkerTimes.
int workers_at(int place, int threads) { return std::min(2 << place, threads); }

int cores() {
  if (const int pretended = pretended_cores.load(std::memory_order_relaxed)) return pretended;
  cpu_set_t set;
  return sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : INT_MAX;
}

const pid_t loaded_by = getpid();

// Whether nothing here forbids a measurement.
bool may_measure(int threads) {
  return getpid() == loaded_by && threads <= cores() && !at::in_parallel_region() &&
         !at::globalContext().deterministicAlgorithms() && worker_limit().seconds == 0;
}

}  // namespace

std::optional<double> steady_median(std::vector<double> samples) {
  std::sort(samples.begin(), samples.end());
  const double median = samples[samples.size() / 2];
  if (!(samples[0] > 0) || median > kSteady * samples[0]) return {};
  return median;
}

int measured_places(int threads) {
  int places = 1;
  while (places < kCostPoints && workers_at(places - 1, threads) < threads) ++places;
  return places;
}

bool measures_workers() {
  static const bool wanted = [] {
    const char* const text = std::getenv(kVariable);
    const std::string wish = text && *text ? text : "1";
    if (wish != "0" && wish != "1") {
      throw std::invalid_argument(std::string(kVariable) + ": expected '0' or '1', got '" + wish + "'");
    }
    return wish == "1";
  }();
  return wanted;
}

WorkerCosts costs_from(const WorkerTimes& times) {
  if (times.threads < 2) {
    throw std::invalid_argument("times of workers: expected at least 2 threads, got " + std::to_string(times.threads));
  }
  const int places = measured_places(times.threads);
  for (const auto& list : {times.thread, times.barrier, times.tree}) {
    for (int i = 0; i < places; ++i) {
      if (std::isfinite(list[i]) && list[i] > 0) continue;
      throw std::invalid_argument("times of workers: expected positive numbers, got " + std::to_string(list[i]));
    }
  }
  WorkerCosts costs;
  for (int i = places - 1; i >= 0; --i) {
    const int workers = workers_at(i, times.threads);
    if (workers < kLeastTree || times.tree[i] > kTreePays * times.barrier[i]) break;
    costs.tree_from = workers;
  }
  // `stretch`: from the place before to this one, over that to the number of workers that was measured.
  const auto cost = [](double constant, double time, double of_two, double before, double stretch) {
    const double found = constant + kWorkPerSecond * (time - of_two);
    return std::clamp(before + stretch * (found - before), before, kMostGrowth * constant);
  };
  const double of_two[] = {std::min(times.thread[0], kBareThread), std::min(times.barrier[0], kBareBarrier)};
  for (int i = 1; i < kCostPoints; ++i) {
    const int from = std::min(i, places - 1);
    const int workers = workers_at(from, times.threads), last = 1 << i;  // last: the workers of the place before
    const double barrier = (workers >= costs.tree_from ? times.tree : times.barrier)[from];
    const double stretch = workers > last ? static_cast<double>(last) / (workers - last) : 1;
    costs.thread[i] = cost(cpu::kWorkPerThread, times.thread[from], of_two[0], costs.thread[i - 1], stretch);
    costs.barrier[i] = cost(cpu::kWorkPerBarrier, barrier, of_two[1], costs.barrier[i - 1], stretch);
  }
  return costs;
}

WorkerCosts worker_costs(int threads, bool fixed) {
  if (const WorkerCosts* const costs = forced.load(std::memory_order_acquire)) return *costs;
  WorkerCosts costs;
  if (threads > 2) {
    if (const Known* const entry = find(threads)) {
      if (!fixed) return entry->costs;
      costs.tree_from = entry->costs.tree_from;
    }
  }
  return costs;
}

std::optional<WorkerTimes> measure_workers(int threads) {
  const double deadline = now() + kMostSeconds;
  WorkerTimes times{threads, {}, {}, {}};
  for (int i = 0; i < measured_places(threads); ++i) {
    if (!measure_at(workers_at(i, threads), deadline, times.thread[i], times.barrier[i], times.tree[i])) return {};
  }
  return times;
}

bool measure_workers_if_due() {
  const int threads = at::get_num_threads();
  if (threads <= 2 || tries.load(std::memory_order_relaxed) >= kTries || !measures_workers() ||
      forced.load(std::memory_order_relaxed) || find(threads)) {
    return false;
  }
  if (calls.fetch_add(1, std::memory_order_relaxed) % kCallsBetweenTries != 0 || !may_measure(threads)) return false;
  static std::mutex one_at_a_time;
  const std::unique_lock<std::mutex> lock(one_at_a_time, std::try_to_lock);
  if (!lock || find(threads)) return false;
  ++tries;
  try {
    const std::optional<WorkerTimes> times = measure_workers(threads);
    if (times) set_worker_times(*times);
    return times.has_value();
  } catch (const std::exception&) {  // too little memory, which is no reason for a layer's call to fail
    return false;
  }
}

void set_worker_times(const WorkerTimes& times) {
  Known* const entry = new Known{times, costs_from(times), known.load(std::memory_order_acquire)};
  while (!known.compare_exchange_weak(entry->next, entry)) {
  }
}

std::vector<WorkerTimes> known_worker_times() {
  std::vector<WorkerTimes> all;
  for (const Known* entry = known.load(std::memory_order_acquire); entry; entry = entry->next) {
    const auto is_newer = [&](const WorkerTimes& times) { return times.threads == entry->times.threads; };
    if (std::none_of(all.begin(), all.end(), is_newer)) all.push_back(entry->times);
  }
  return all;
}

int worker_measurements() { return tries.load(std::memory_order_relaxed); }
void pretend_cores(int cores) {
  pretended_cores.store(cores, std::memory_order_relaxed);
  tries = calls = 0;
  known.store(nullptr, std::memory_order_release);
}

void set_worker_costs(const WorkerCosts* costs) {
  forced.store(costs ? new WorkerCosts(*costs) : nullptr, std::memory_order_release);
}

}  // namespace lstm_ext
