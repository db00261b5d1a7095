// __syncthreads and its rules, and the rules for leaving a kernel.
#include <cstring>

#include "simt/machine.h"
#include "simt/weak_memory.h"

namespace simt {

void syncthreads(const char* file, int line) {
  note_position("__syncthreads", file, line);
  Thread& thread = *current;
  Block& block = *thread.block;
  BlockBarrier& barrier = block.barrier;
  if (block.live != block.size) fail("__syncthreads after a thread of the block has left", file, line);
  if (barrier.waiting.empty()) {
    barrier.file = file;
    barrier.line = line;
  } else if (barrier.line != line || std::strcmp(barrier.file, file) != 0) {
    fail("divergent __syncthreads: others of the block wait at " + place(barrier.file, barrier.line), file, line);
  }
  barrier.waiting.push_back(&thread);
  if (barrier.waiting.size() == block.size) {
    note_progress();
    race::meet(barrier.waiting.data(), barrier.waiting.size());
    weak::meet(barrier.waiting.data(), barrier.waiting.size());
    for (Thread* other : barrier.waiting) {
      if (other != &thread) make_ready(other);
    }
    barrier.waiting.clear();
    maybe_switch(file, line);
    return;
  }
  wait_here("__syncthreads", file, line);
}

void check_thread_exit(Thread& thread) {
  Block& block = *thread.block;
  const char* file = thread.file;
  const int line = thread.line;
  if (!thread.open_group.empty()) fail("the thread leaves with a cp.async that it has not committed", file, line);
  for (const auto& group : thread.groups) {
    if (!group.empty()) fail("the thread leaves with a cp.async that it has not waited for", file, line);
  }
  if (!block.barrier.waiting.empty()) {
    fail("the thread leaves while others of its block wait in __syncthreads at " +
             place(block.barrier.file, block.barrier.line),
         file, line);
  }
  for (const auto& collective : thread.warp->collectives) {
    if (collective->arrived != 0 && (collective->mask >> thread.lane & 1) != 0) {
      fail(std::string("the thread leaves while other lanes wait for it in ") + collective->operation + " at line " +
               std::to_string(collective->line),
           file, line);
    }
  }

  note_progress();
  thread.warp->live &= ~(1u << thread.lane);
  --machine.live;
  --block.live;
}

}  // namespace simt
