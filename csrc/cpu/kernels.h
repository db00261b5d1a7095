// The interface of the CPU backend: one table of functions per instruction set, and one of the backend itself. A wheel
// has the backend in a library of its own, which serves each torch, so nothing but plain data, pointers and functions
// without exceptions is in the tables. A call is made by plan.grid.workers() threads at once, each with its own index.
// The kernels synchronise among themselves through the barriers in the workspace, as planned.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "contract/params.h"
#include "contract/visibility.h"
#include "cpu/plan.h"

namespace lstm_ext::cpu {

// Whether products of one row prefetch their panels. On AMD's processors with AVX-512 they do not: on Zen 4 and Zen 5
// the prefetches cost more than they gain.
extern LSTM_EXT_PUBLIC const bool fetches_panels;

// Whether the CPU has an instruction for sums of four products of bytes: VNNI in registers of 512 bits, and of 256 bits
// without AVX-512; on AArch64 FEAT_I8MM. LSTM_EXT_CPU_VNNI=0 turns it off.
extern const bool has_avx512_vnni, has_avx_vnni, has_i8mm;

// The directions of this thread's last calls with unit groups: a bit for some of the weights. All kernels share one
// word, because a library that is loaded late gets little memory for threads. C++ would look for an initialiser in each
// access to a thread_local that another source defines.
extern LSTM_EXT_PUBLIC __thread uint64_t unit_directions;

template <typename T>
struct Kernels {
  int64_t lanes;        // T values in a SIMD register
  int64_t tile_rows;    // batch rows of a register tile
  EngineLimits engine;  // from which sizes on products use the tile engine
  // See plan.h.
  ForwardPlan (*plan_forward)(const ForwardParams<T>&, const Machine&);
  BackwardPlan (*plan_backward)(const BackwardParams<T>&, const Machine&);
  FrozenPlan (*plan_frozen)(const LayerShape&, const Machine&, int bf16_parts, WeightKind);
  bool (*sums_gradients_once)(const LayerShape&, int bf16_parts);
  // `workspace`: plan.workspace_bytes, aligned to 64, the first plan.barrier_bytes zeroed by the
  // caller; shared by all workers of the call. They fail if a worker waits longer than LSTM_EXT_CPU_WAIT_LIMIT allows:
  // then each worker returns, and the results mean nothing.
  const char* (*forward)(const ForwardParams<T>&, const ForwardPlan&, char* workspace, int worker);
  const char* (*backward)(const BackwardParams<T>&, const BackwardPlan&, char* workspace, int worker);
  // Packs the weights into their places, where the factors of int8 are already.
  void (*freeze)(const LayerWeights<T>&, const LayerShape&, const FrozenWeights<T>& places);
  bool (*multiplies_int8)();  // whether frozen int8 weights multiply bytes; their panels depend on it
};

struct Capability {
  const char* name;
  Kernels<float> f32;
  Kernels<double> f64;
  const Capability* next = nullptr;  // next in the list of added capabilities
};

// The kernels of each instruction set. A build may leave sets out (LSTM_EXT_CPU_SETS); their functions are null.
#define LSTM_EXT_MAY_BE_MISSING __attribute__((weak))
LSTM_EXT_MAY_BE_MISSING const Kernels<float>* kernels_avx512_f32();
LSTM_EXT_MAY_BE_MISSING const Kernels<double>* kernels_avx512_f64();
LSTM_EXT_MAY_BE_MISSING const Kernels<float>* kernels_avx2_f32();
LSTM_EXT_MAY_BE_MISSING const Kernels<double>* kernels_avx2_f64();
LSTM_EXT_MAY_BE_MISSING const Kernels<float>* kernels_neon_f32();
LSTM_EXT_MAY_BE_MISSING const Kernels<double>* kernels_neon_f64();

constexpr int kCapabilities = 5;

// A digest of the sources and flags, which a wheel's files have in common. Other builds have one library.
#ifndef LSTM_EXT_BUILD
#define LSTM_EXT_BUILD ""
#endif

// The backend. Where a function can fail, it returns a sentence of kept(), or null.
struct Library {
  const char* build;  // LSTM_EXT_BUILD of its compilation
  // The best one this CPU runs, or the one that LSTM_EXT_CPU_CAPABILITY or set_capability names.
  const char* (*capability)(const Capability** found);
  // Fails if this CPU or this binary cannot run `name`.
  const char* (*set_capability)(const char* name);
  // Fills `names` (room for kCapabilities) with what this CPU can run, best first; returns how many.
  int (*available_capabilities)(const char** names);
  // LSTM_EXT_CPU_WAIT_LIMIT, or what was set: seconds, 0 for no limit.
  const char* (*wait_limit)(double* seconds);
  void (*set_wait_limit)(double seconds);
};
extern "C" LSTM_EXT_PUBLIC const Library* lstm_ext_cpu_library();

// The functions of the library, with exceptions: std::invalid_argument, and std::runtime_error for another build.
inline const Library& library() {
  static const Library& checked = [&]() -> const Library& {
    const Library* const found = lstm_ext_cpu_library();
    if (std::strcmp(found->build, LSTM_EXT_BUILD) != 0) {
      throw std::runtime_error("lstm_ext: its libraries are of different builds: install it anew");
    }
    return *found;
  }();
  return checked;
}
inline void check(const char* error) {
  if (error) throw std::invalid_argument(error);
}
inline const Capability& capability() {
  const Capability* found = nullptr;
  check(library().capability(&found));
  return *found;
}
inline void set_capability(const char* name) { check(library().set_capability(name)); }
inline double wait_limit() {
  double seconds = 0;
  check(library().wait_limit(&seconds));
  return seconds;
}
inline void set_wait_limit(double seconds) { library().set_wait_limit(seconds); }
template <typename T>
const Kernels<T>& kernels_of(const Capability& capability) {
  if constexpr (std::is_same_v<T, float>) {
    return capability.f32;
  } else {
    return capability.f64;
  }
}
template <typename T>
const Kernels<T>& kernels() {
  return kernels_of<T>(capability());
}

// Lets set_capability name one more, which the caller keeps; for tests.
LSTM_EXT_PUBLIC void add_capability(Capability* added);

// A worker's wait at a barrier of its call.
struct Wait {
  double seconds, noted;  // so far, and when that was noted
};
// Throws std::runtime_error, which says where, if the wait is longer than the limit.
LSTM_EXT_PUBLIC void note_wait(Wait& wait, uint32_t barrier, uint32_t arrived, uint32_t workers);
// For the library itself: Library::wait_limit and Library::set_wait_limit.
const char* read_wait_limit(double* seconds);
void change_wait_limit(double seconds);

// A copy of a message, of 511 bytes at most, which lives until 64 more are kept in the process. Nothing is allocated.
LSTM_EXT_PUBLIC const char* kept(const char* message);

// Calls a function, and returns the message of its exception, or null.
template <typename Function>
const char* error_of(const Function& function) {
  try {
    function();
    return nullptr;
  } catch (const std::exception& error) {
    return kept(error.what());
  }
}

}  // namespace lstm_ext::cpu
