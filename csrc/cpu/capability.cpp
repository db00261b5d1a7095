// Chooses the instruction set that runs: the best one of this CPU, or the one the user names.
#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__)
#include <sys/auxv.h>
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
[[maybe_unused]] bool has_f16c() { return cpuid(1).c & 1u << 29; }
bool finds_avx512_vnni() { return cpuid(7).c & 1u << 11; }
bool finds_avx_vnni() { return cpuid(7, 1).a & 1u << 4; }
bool finds_i8mm() {
#if defined(__aarch64__)
  return getauxval(AT_HWCAP2) & 1u << 13;  // Linux; older headers do not name the bit
#else
  return false;
#endif
}
[[maybe_unused]] bool has_avx512_bf16() {
  return (cpuid(7, 1).a & 1u << 5) && finds_avx512_vnni();
}  // all of them have both

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
[[maybe_unused]] bool asks_for_tiles() {
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
  return false;
#elif defined(__aarch64__)
  return std::strcmp(name, "neon") == 0;
#else
  return false;
#endif
}

// The sizes from which on AMX pays, measured on a Xeon against AVX-512. With three bf16 parts, splitting a number costs
// about as much as multiplying it by 64 others.
constexpr EngineLimits kTiles{
    {0, 1, 6, 8}, {0, 1, 12, 12}, {0, 32, 32, 64}, {0, 32, 32, 80}, {0, 8, 3.5, 2}, kEngineTileRows, true};
// AVX-512-BF16. It does twice the work of a fused multiply-add, so it pays for one bf16 part only.
constexpr EngineLimits kPairs{
    {0, 1, kNever, kNever}, {0, 1, kNever, kNever}, {0, 16, 0, 0}, {0, 16, 0, 0}, {0, 2, 1, 1}, 1, false};

// Best first; null where the binary has none. Those with a tile engine have the kernels of AVX-512, and in float32 the
// limits of the engine.
using Capabilities = std::array<const Capability*, kCapabilities>;
const Capabilities& all_capabilities() {
  static const Capabilities all = [] {
    Capabilities result{};
    static Capability found[kCapabilities];
    int count = 0;
    const auto add = [&](const char* name, auto* f32, auto* f64, const EngineLimits& engine = {}) {
      if (!f32 || !f64) return;
      Capability& capability = found[count];
      capability = {name, *f32(), *f64()};
      capability.f32.engine = engine;
      result[count++] = &capability;
    };
    // Intel's processors multiply pairs of bfloat16 at half the rate of fused multiply-adds, AMD's at their rate.
    const bool pairs_pay = is_amd();
    add("amx", kernels_avx512_f32, kernels_avx512_f64, kTiles);
    if (pairs_pay) add("avx512_bf16", kernels_avx512_f32, kernels_avx512_f64, kPairs);
    add("avx512", kernels_avx512_f32, kernels_avx512_f64);
    if (!pairs_pay) add("avx512_bf16", kernels_avx512_f32, kernels_avx512_f64, kPairs);
    add("avx2", kernels_avx2_f32, kernels_avx2_f64);
    add("neon", kernels_neon_f32, kernels_neon_f64);
    return result;
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
#if defined(__aarch64__)
    constexpr const char* kKnown[] = {"neon"};
    constexpr const char* kExpected = "'neon'";
#else
    constexpr const char* kKnown[] = {"amx", "avx512_bf16", "avx512", "avx2"};
    constexpr const char* kExpected = "'amx', 'avx512_bf16', 'avx512' or 'avx2'";
#endif
    for (const char* known : kKnown) {
      if (name != known) continue;
      throw std::invalid_argument(source + ": this build has no kernels for '" + name + "' (LSTM_EXT_CPU_SETS)");
    }
    throw std::invalid_argument(source + ": expected " + kExpected + ", got '" + name + "'");
  }
  if (!was_added(c) && !cpu_runs(c->name)) {
    const char* names[kCapabilities] = {""};
    available_capabilities(names);
    throw std::invalid_argument(source + ": this CPU does not run '" + name + "'; the best it runs is '" + names[0] +
                                "'");
  }
  return c;
}

const Capability* initial() {
  if (const std::string wish = vnni_wish(); wish != "0" && wish != "1") {
    throw std::invalid_argument(std::string(kVnniVariable) + ": expected '0' or '1', got '" + wish + "'");
  }
  const char* names[kCapabilities];
  if (available_capabilities(names) == 0) {
    throw std::runtime_error(
        "lstm_ext has no kernels for this CPU: on x86-64 they need AVX2, FMA and F16C, and a build may leave sets out "
        "(LSTM_EXT_CPU_SETS)");
  }
  if (const char* name = std::getenv(kVariable); name && *name) return require(name, kVariable);
  return find(names[0]);
}

std::atomic<const Capability*>& current() {
  static std::atomic<const Capability*> value{initial()};
  return value;
}

}  // namespace

__thread uint64_t unit_directions = 0;
const bool fetches_panels = !(is_amd() && cpu_runs("avx512"));
const bool has_avx512_vnni = vnni_wish() != "0" && finds_avx512_vnni();
const bool has_avx_vnni = vnni_wish() != "0" && finds_avx_vnni();
const bool has_i8mm = vnni_wish() != "0" && finds_i8mm();

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
