// Chooses the instruction set that runs: the best one of this CPU, or the one the user names.
#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "cpu/kernels.h"

namespace lstm_ext::cpu {
namespace {

constexpr const char* kVariable = "LSTM_EXT_CPU_CAPABILITY";

// The registers that CPUID fills, or zeros: __builtin_cpu_supports of GCC does not know all bits in all versions.
struct Cpuid {
  unsigned a = 0, b = 0, c = 0, d = 0;
};
Cpuid cpuid([[maybe_unused]] unsigned leaf, [[maybe_unused]] unsigned subleaf = 0) {
  Cpuid id;
#if defined(__x86_64__)
  __get_cpuid_count(leaf, subleaf, &id.a, &id.b, &id.c, &id.d);
#endif
  return id;
}
bool has_f16c() { return cpuid(1).c & 1u << 29; }
bool finds_avx512_vnni() { return cpuid(7).c & 1u << 11; }
bool finds_avx_vnni() { return cpuid(7, 1).a & 1u << 4; }
bool has_avx512_bf16() { return (cpuid(7, 1).a & 1u << 5) && finds_avx512_vnni(); }  // all of them have both

constexpr const char* kVnniVariable = "LSTM_EXT_CPU_VNNI";
std::string vnni_wish() {
  const char* const value = std::getenv(kVnniVariable);
  return value && *value ? value : "1";
}

bool is_amd() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

// Whether the CPU has AMX with bfloat16 and Linux lets this process use its tiles. A process has to ask Linux once,
// because the state of the tiles takes 8 KB a thread.
bool asks_for_tiles() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // codes of arch_prctl
  const unsigned d = cpuid(7).d;
  if (!(d & kAmxTile) || !(d & kAmxBf16)) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool cpu_runs(const char* name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (std::strcmp(name, "amx") == 0) {
    static const bool granted = asks_for_tiles();
    return granted && cpu_runs("avx512_bf16");
  }
  if (std::strcmp(name, "avx512_bf16") == 0) return has_avx512_bf16() && cpu_runs("avx512");
  if (std::strcmp(name, "avx512") == 0) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx2") &&
           __builtin_cpu_supports("fma");
  }
  if (std::strcmp(name, "avx2") == 0) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  }
#endif
  return std::strcmp(name, "baseline") == 0;
}

// Best first; null where the binary has none.
using Capabilities = std::array<const Capability*, kCapabilities>;
const Capabilities& all_capabilities() {
  static const Capabilities all = []() -> Capabilities {
    const Capability* const avx512 = capability_avx512();
    const auto over_avx512 = [&](const char* name, const Kernels<float>* kernels, Capability& capability) {
      if (!avx512 || !kernels) return static_cast<const Capability*>(nullptr);
      capability = {name, *kernels, avx512->f64};
      return static_cast<const Capability*>(&capability);
    };
    static Capability amx, avx512_bf16;
    const Capability* const with_tiles = over_avx512("amx", kernels_amx(), amx);
    const Capability* const with_pairs = over_avx512("avx512_bf16", kernels_avx512_bf16(), avx512_bf16);
    // Intel's processors multiply pairs of bfloat16 at half the rate of fused multiply-adds, AMD's at their rate.
    const bool pairs_pay = is_amd();
    return {with_tiles, pairs_pay ? with_pairs : avx512, pairs_pay ? avx512 : with_pairs, capability_avx2(),
            capability_baseline()};
  }();
  return all;
}

// The capabilities that tests added, the latest first.
std::atomic<const Capability*> added{nullptr};
bool was_added(const Capability* capability) {
  for (const Capability* c = added.load(std::memory_order_acquire); c; c = c->next) {
    if (c == capability) return true;
  }
  return false;
}

const Capability* find(const std::string& name) {
  for (const Capability* c = added.load(std::memory_order_acquire); c; c = c->next) {
    if (name == c->name) return c;
  }
  for (const Capability* c : all_capabilities()) {
    if (c && name == c->name) return c;
  }
  return nullptr;
}

int available_capabilities(const char** names) {
  int count = 0;
  for (const Capability* c : all_capabilities()) {
    if (c && cpu_runs(c->name)) names[count++] = c->name;
  }
  return count;
}

const Capability* require(const std::string& name, const std::string& source) {
  const Capability* c = find(name);
  if (!c) {
    throw std::invalid_argument(source + ": expected 'amx', 'avx512_bf16', 'avx512', 'avx2' or 'baseline', got '" +
                                name + "'");
  }
  if (!was_added(c) && !cpu_runs(c->name)) {
    throw std::invalid_argument(source + ": this CPU does not run '" + name + "'; the best it runs is '" + [] {
      const char* names[kCapabilities];
      return available_capabilities(names) > 0 ? std::string(names[0]) : std::string();
    }() + "'");
  }
  return c;
}

const Capability* initial() {
  if (const std::string wish = vnni_wish(); wish != "0" && wish != "1") {
    throw std::invalid_argument(std::string(kVnniVariable) + ": expected '0' or '1', got '" + wish + "'");
  }
  if (const char* name = std::getenv(kVariable); name && *name) return require(name, kVariable);
  const char* names[kCapabilities];
  if (available_capabilities(names) == 0) {
    throw std::runtime_error("lstm_ext was built for a CPU that is not x86-64: no kernels are there");
  }
  return find(names[0]);
}

std::atomic<const Capability*>& current() {
  static std::atomic<const Capability*> value{initial()};
  return value;
}

}  // namespace

const bool fetches_panels = !(is_amd() && cpu_runs("avx512"));
const bool has_avx512_vnni = vnni_wish() != "0" && finds_avx512_vnni();
const bool has_avx_vnni = vnni_wish() != "0" && finds_avx_vnni();

void add_capability(Capability* capability) {
  capability->next = added.load(std::memory_order_acquire);
  while (!added.compare_exchange_weak(capability->next, capability)) {
  }
}

extern "C" const Library* lstm_ext_cpu_library() {
  static constexpr Library library{
      LSTM_EXT_BUILD,
      [](const Capability** found) { return error_of([&] { *found = current().load(std::memory_order_relaxed); }); },
      [](const char* name) {
        return error_of([&] { current().store(require(name, "set_cpu_capability"), std::memory_order_relaxed); });
      },
      &available_capabilities,
      &read_wait_limit,
      &change_wait_limit,
  };
  return &library;
}

}  // namespace lstm_ext::cpu
