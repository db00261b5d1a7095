// The state of an mbarrier. The eight bytes in shared memory only hold a cookie, to see whether a kernel overwrites
// them.
#pragma once

#include <cstdint>

#include "simt/race.h"

namespace simt {

struct Mbarrier {
  uint32_t expected_arrivals = 0;
  uint32_t pending_arrivals = 0;
  int64_t pending_bytes = 0;
  uint64_t phase = 0;
  unsigned expect_tx_in_phase = 0;
  // For the rule that peers may use it only after fence.mbarrier_init and a cluster barrier.
  bool fenced = false;
  unsigned initialised_by = 0;
  uint64_t initialised_in_phase = 0;
  const char* file = "";
  int line = 0;
  race::VectorClock arriving;      // in the phase that runs
  race::VectorClock completed[2];  // by parity
};

}  // namespace simt
