// The interface of the CPU backend: one table of functions per instruction set. A call is made by plan.grid.workers()
// threads at once, each with its own index. The kernels synchronise among themselves through the barriers in the
// workspace, as planned.
#pragma once

#include <cstdint>

#include "contract/params.h"
#include "contract/visibility.h"
#include "cpu/plan.h"

namespace lstm_ext::cpu {

// Whether products of one row prefetch their panels. On AMD's processors with AVX-512 they do not: on Zen 4 and Zen 5
// the prefetches cost more than they gain.
extern LSTM_EXT_PUBLIC const bool fetches_panels;

// Whether the CPU has an instruction for sums of four products of bytes (VNNI): in registers of 512 bits, and of 256
// bits without AVX-512. LSTM_EXT_CPU_VNNI=0 turns it off. The sets that always have it do not ask.
extern const bool has_avx512_vnni, has_avx_vnni;

template <typename T>
struct Kernels {
  int64_t lanes;      // T values in a SIMD register
  int64_t tile_rows;  // batch rows of a register tile
  UnitLimits unit;    // from which sizes on products use the matrix unit
  // `workspace`: plan.workspace_bytes, aligned to 64, the first plan.barrier_bytes zeroed by the
  // caller; shared by all workers of the call.
  void (*forward)(const ForwardParams<T>&, const ForwardPlan&, char* workspace, int worker);
  void (*backward)(const BackwardParams<T>&, const BackwardPlan&, char* workspace, int worker);
  // Packs the weights into the plan's places, relative to `data`, where the factors of int8 are already.
  void (*freeze)(const LayerWeights<T>&, const LayerShape&, const FrozenPlan&, char* data);
  bool (*multiplies_bytes)();  // whether frozen int8 weights multiply bytes; their panels depend on it
};

struct Capability {
  const char* name;
  Kernels<float> f32;
  Kernels<double> f64;
  const Capability* next = nullptr;  // next in the list of added capabilities
};

// One per instruction set; null where the binary has none.
const Capability* capability_baseline();
const Capability* capability_avx2();
const Capability* capability_avx512();
// These have kernels of their own in float32 only.
const Kernels<float>* kernels_avx512_bf16();
const Kernels<float>* kernels_amx();

constexpr int kCapabilities = 5;

// The best one this CPU runs, or the one that LSTM_EXT_CPU_CAPABILITY or set_capability names.
LSTM_EXT_PUBLIC const Capability& capability();
// Throws std::invalid_argument with a sentence if this CPU or this binary cannot run `name`.
LSTM_EXT_PUBLIC void set_capability(const char* name);
// Lets set_capability name one more, which the caller keeps; for tests.
LSTM_EXT_PUBLIC void add_capability(Capability* added);
// Fills `names` (room for kCapabilities) with what this CPU can run, best first; returns how many.
LSTM_EXT_PUBLIC int available_capabilities(const char** names);

template <typename T>
LSTM_EXT_PUBLIC const Kernels<T>& kernels();  // the kernels of capability()

// A worker's wait at a barrier of its call.
struct Wait {
  double seconds, noted;  // so far, and when that was noted
};
// Ends the process, and says where, if the wait is longer than the limit.
LSTM_EXT_PUBLIC void note_wait(Wait& wait, uint32_t barrier, uint32_t arrived, uint32_t workers);
// LSTM_EXT_CPU_WAIT_LIMIT, or what was set: seconds, 0 for no limit. Throws std::invalid_argument with a sentence.
LSTM_EXT_PUBLIC double wait_limit();
// Also the open file that is told where, which is stderr before that. For tests.
LSTM_EXT_PUBLIC void set_wait_limit(double seconds, int file);

}  // namespace lstm_ext::cpu
