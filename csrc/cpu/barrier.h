// Barriers for workers that all run at the same time, for waits of microseconds.
//
// A waiting worker spins, and yields its processor after a while: if another program runs on the machine, the missing
// worker may need this very core.
//
// A few workers meet on one cache line. Each that arrives takes this line from those that wait, so many workers meet in
// a tree: a few at each of its leaves, and the last of them goes on to the node above before it lets the others go.
#pragma once

#include "cpu/isa.h"

namespace lstm_ext::cpu::LSTM_EXT_ISA {
namespace {

// The last of `workers` calls `then` and lets the others go. One that has waited long calls `note` now and then, with
// its wait and the number of the barrier.
template <typename Then, typename Note>
LSTM_EXT_INLINE void meet(uint32_t& arrived, uint32_t& generation, uint32_t workers, const Then& then,
                          const Note& note) {
  const uint32_t now = __atomic_load_n(&generation, __ATOMIC_RELAXED);
  if (__atomic_add_fetch(&arrived, 1, __ATOMIC_ACQ_REL) == workers) {
    then();
    __atomic_store_n(&arrived, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&generation, now + 1, __ATOMIC_RELEASE);
    return;
  }
  Wait wait{};
  for (uint32_t spins = 0; __atomic_load_n(&generation, __ATOMIC_ACQUIRE) == now; ++spins) {
    if (spins < 2000) {
#if defined(__aarch64__)
      asm volatile("isb" ::: "memory");  // waits for some ten cycles; yield is a nop on most processors
#else
      _mm_pause();
#endif
    } else {
      if (spins % 64 == 0) note(wait, now + 1);
      sched_yield();
    }
  }
}

struct alignas(64) Barrier {
  uint32_t arrived;
  uint32_t generation;

  void wait(uint32_t workers) {
    meet(
        arrived, generation, workers, [] {},
        [&](Wait& wait, uint32_t number) {
          note_wait(wait, number, __atomic_load_n(&arrived, __ATOMIC_RELAXED), workers);
        });
  }
};
static_assert(sizeof(Barrier) == kBarrierBytes);

// Nodes from the leaves to the root, level by level. Workers that wait at a node read one line, those that arrive write
// another.
class BarrierTree {
 public:
  BarrierTree(char* place, uint32_t workers) : nodes_(reinterpret_cast<Node*>(place)), workers_(workers) {}

  __attribute__((noinline)) void wait(uint32_t worker) { wait_at(nodes_, workers_, worker); }

 private:
  struct alignas(64) Node {
    uint32_t arrived;
    alignas(64) uint32_t generation;
  };
  static_assert(sizeof(Node) == kNodeBytes);

  static uint32_t parents(uint32_t children) { return (children + kTreeRadix - 1) / kTreeRadix; }

  // In a level with so many children, which are workers or the nodes below.
  void wait_at(Node* level, uint32_t children, uint32_t child) {
    const uint32_t parent = child / kTreeRadix, rest = children - parent * kTreeRadix, above = parents(children);
    Node& node = level[parent];
    meet(
        node.arrived, node.generation, rest < kTreeRadix ? rest : kTreeRadix,
        [&] {
          if (above > 1) wait_at(level + above, above, parent);
        },
        [&](Wait& wait, uint32_t number) { note_wait(wait, number, all_arrived(), workers_); });
  }

  uint32_t all_arrived() const {
    uint32_t sum = 0;
    for (uint32_t leaf = 0; leaf < parents(workers_); ++leaf) {
      sum += __atomic_load_n(&nodes_[leaf].arrived, __ATOMIC_RELAXED);
    }
    return sum;
  }

  Node* const nodes_;
  const uint32_t workers_;
};

// A worker's part in a barrier, of either form, at a place that was all zeros.
struct Meeting {
  char* place;
  bool tree;
  int workers, worker;

  void wait() const {
    if (workers == 1) return;
    if (tree) {
      BarrierTree(place, workers).wait(worker);
    } else {
      reinterpret_cast<Barrier*>(place)->wait(workers);
    }
  }
};

// For a measurement; see Kernels.
void meet_often(char* place, bool tree, int workers, int worker, int times) {
  const Meeting meeting{place, tree, workers, worker};
  for (int i = 0; i < times; ++i) meeting.wait();
}

}  // namespace
}  // namespace lstm_ext::cpu::LSTM_EXT_ISA
