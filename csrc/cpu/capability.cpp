// Which instruction set runs: the best this CPU has, or the one the user names.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"

namespace lstm_ext::cpu {
namespace {

constexpr const char* kVariable = "LSTM_EXT_CPU_CAPABILITY";

bool cpu_runs(const char* name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (std::strcmp(name, "avx512") == 0) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx2") &&
           __builtin_cpu_supports("fma");
  }
  if (std::strcmp(name, "avx2") == 0) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return std::strcmp(name, "baseline") == 0;
}

const Capability* find(const std::string& name) {
  for (const Capability* c : {capability_avx512(), capability_avx2(), capability_baseline()}) {
    if (c && name == c->name) return c;
  }
  return nullptr;
}

const Capability* require(const std::string& name, const std::string& source) {
  const Capability* c = find(name);
  if (!c) {
    throw std::invalid_argument(source + ": expected 'avx512', 'avx2' or 'baseline', got '" + name + "'");
  }
  if (!cpu_runs(c->name)) {
    throw std::invalid_argument(source + ": this CPU does not run '" + name + "'; the best it runs is '" + [] {
      const char* names[3];
      return available_capabilities(names) > 0 ? std::string(names[0]) : std::string();
    }() + "'");
  }
  return c;
}

const Capability* initial() {
  if (const char* name = std::getenv(kVariable); name && *name) return require(name, kVariable);
  const char* names[3];
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

const Capability& capability() { return *current().load(std::memory_order_relaxed); }

void set_capability(const char* name) {
  current().store(require(name, "set_cpu_capability"), std::memory_order_relaxed);
}

template <>
LSTM_EXT_PUBLIC const Kernels<float>& kernels<float>() {
  return capability().f32;
}
template <>
LSTM_EXT_PUBLIC const Kernels<double>& kernels<double>() {
  return capability().f64;
}

int available_capabilities(const char** names) {
  int count = 0;
  for (const Capability* c : {capability_avx512(), capability_avx2(), capability_baseline()}) {
    if (c && cpu_runs(c->name)) names[count++] = c->name;
  }
  return count;
}

}  // namespace lstm_ext::cpu
