// The kernels of csrc/cpu over registers and a tile engine in plain C++, which run on any processor. Loaded, this
// library offers them to the extension as the instruction set "software", with the engine of AVX-512-BF16 as "software,
// in pairs", and AMX, where the processor has it, once more as "amx at small sizes". The first and the last run small
// products on the engine, so that tests need no large ones.
#define LSTM_EXT_ISA_SOFTWARE
#define LSTM_EXT_SOFTWARE_SIMD "tile_engine/simd.h"
#define LSTM_EXT_TILE_ENGINE "tile_engine/engine.h"
#include "cpu/kernel_set.h"

#include <cstring>
#include <string>

namespace {

using namespace lstm_ext::cpu;

Kernels<float> with_engine(const EngineLimits& engine) {
  Kernels<float> kernels = software::kKernels<float>;
  kernels.engine = engine;
  return kernels;
}

// float64 has no tile engine: the kernels of the processor's own set.
Capability software{"software", with_engine(software::kLimitsOfTiles), kernels<double>()};
Capability pairs{"software, in pairs", with_engine(software::kLimitsOfPairs), kernels<double>()};
Capability amx{"amx at small sizes", {}, {}};

bool add() {
  add_capability(&software);
  add_capability(&pairs);
  const char* names[kCapabilities];
  if (library().available_capabilities(names) > 0 && std::strcmp(names[0], "amx") == 0) {
    const std::string before = capability().name;
    set_capability("amx");
    amx.f32 = kernels<float>();
    amx.f64 = kernels<double>();
    amx.f32.engine = software.f32.engine;
    set_capability(before.c_str());
    add_capability(&amx);
  }
  return true;
}

[[maybe_unused]] const bool added = add();

}  // namespace
