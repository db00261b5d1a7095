// The costs of workers on this machine, for plans: measured once, at the first call that would use more than two, or
// taken from the user's record, which Python keeps.
//
// Barriers and threads are timed as calls use them. A plan's costs (cpu::WorkerCosts) are those that were found by
// trial with two workers, and for more of them what was measured beyond two. So two workers are planned as by the
// constants on each machine: what these hold besides the bare barrier, e.g. that one worker comes late, no measurement
// would show.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "contract/visibility.h"
#include "cpu/plan.h"

namespace lstm_ext {

// Seconds, by the number of workers: 2, 4, 8 and so on, and the last for `threads` itself, up to 256.
struct WorkerTimes {
  int threads;
  double thread[cpu::kCostPoints];   // to start and to end work on so many threads
  double barrier[cpu::kCostPoints];  // one barrier on one cache line
  double tree[cpu::kCostPoints];     // one barrier that is a tree
  bool recorded = false;             // came from the record
};

// How many of the places are for that number of threads.
LSTM_EXT_PUBLIC int measured_places(int threads);

// LSTM_EXT_CPU_MEASURE; 0 is false. Throws std::invalid_argument.
LSTM_EXT_PUBLIC bool measures_workers();

// The costs to which such times lead, within bounds whatever the times are. Throws std::invalid_argument if one is not
// a positive number.
LSTM_EXT_PUBLIC cpu::WorkerCosts costs_from(const WorkerTimes& times);

// The costs for a process with so many threads: the constants where nothing was measured. `fixed`: the constants in any
// case, but for the form of barriers, for a call whose bits depend on the number of its workers.
LSTM_EXT_PUBLIC cpu::WorkerCosts worker_costs(int threads, bool fixed = false);

// Measures if that is due, allowed and possible here; returns whether there are new costs. Throws as
// measures_workers.
bool measure_workers_if_due();

// The median of times, if it may count: not of those that other programs disturbed. For tests too.
LSTM_EXT_PUBLIC std::optional<double> steady_median(std::vector<double> samples);

// Measures now, or returns nothing if the threads were disturbed or are not given. For tests and benchmarks too.
LSTM_EXT_PUBLIC std::optional<WorkerTimes> measure_workers(int threads);

// The times for some number of threads from now on, and all those that are known. Throws as costs_from.
LSTM_EXT_PUBLIC void set_worker_times(const WorkerTimes& times);
LSTM_EXT_PUBLIC std::vector<WorkerTimes> known_worker_times();

// For tests. How often measure_workers_if_due has measured; so many cores in place of those that there are, 0 for
// these, with nothing measured yet.
LSTM_EXT_PUBLIC int worker_measurements();
LSTM_EXT_PUBLIC void pretend_cores(int cores);

// Costs that replace all others, or null to end that. For tests.
LSTM_EXT_PUBLIC void set_worker_costs(const cpu::WorkerCosts* costs);

}  // namespace lstm_ext
