// The mechanism under every operation that lanes of a warp do together.
#pragma once

#include "simt/machine.h"

namespace simt {

// Waits until all lanes of `mask` have come with their slots. The last one calls `finish`. The slots stay readable
// until the calling thread enters the next collective operation with this mask.
Collective::Slot* collective(const char* operation, uint32_t mask, bool orders_memory, const Collective::Slot& own,
                             void (*finish)(Collective::Slot*), const char* file, int line);

constexpr uint32_t kFullWarp = 0xffffffffu;

}  // namespace simt
