// What the emulator's own drivers check with.
#pragma once

#include <cstdio>
#include <functional>
#include <string>

#include "cuda/platform.h"
#include "simt/emulator.h"
#include "simt/global_memory.h"
#include "simt/race.h"

namespace checks {

inline int failures = 0;

inline void expect(bool holds, const std::string& what) {
  if (holds) return;
  ++failures;
  std::printf("FAILED %s\n", what.c_str());
}

// A lambda of one argument as a kernel.
template <typename Args>
void run(void (*kernel)(Args), const lstm_ext::cuda::LaunchConfig& config, const Args& args) {
  lstm_ext::cuda::launch(kernel, config, args);
}

inline lstm_ext::cuda::LaunchConfig shape(unsigned grid, unsigned block, size_t dynamic = 0) {
  lstm_ext::cuda::LaunchConfig config;
  config.grid = dim3(grid);
  config.block = dim3(block);
  config.dynamic_shared = dynamic;
  return config;
}

}  // namespace checks
