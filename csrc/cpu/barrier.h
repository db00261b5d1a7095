// Barriers for workers that all run at the same time, for waits of microseconds.
//
// A waiting worker spins, and yields its processor after a while: if another program runs on the machine, the missing
// worker may need this very core.
#pragma once

#include "cpu/isa.h"

namespace lstm_ext::cpu::LSTM_EXT_ISA {
namespace {

// On one cache line, whose bytes are zeros at first.
struct alignas(64) Barrier {
  uint32_t arrived;
  uint32_t generation;

  void wait(uint32_t workers) {
    if (workers == 1) return;
    const uint32_t now = __atomic_load_n(&generation, __ATOMIC_RELAXED);
    if (__atomic_add_fetch(&arrived, 1, __ATOMIC_ACQ_REL) == workers) {
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
        if (spins % 64 == 0) note_wait(wait, now + 1, __atomic_load_n(&arrived, __ATOMIC_RELAXED), workers);
        sched_yield();
      }
    }
  }
};
static_assert(sizeof(Barrier) == kBarrierBytes);

}  // namespace
}  // namespace lstm_ext::cpu::LSTM_EXT_ISA
