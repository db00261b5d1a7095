// Runs every kernel of ptx_cases.py with one warp a block, and prints what each thread left: a line a kernel.
#include <cstdio>
#include <numeric>

#include "simt/global_memory.h"
#include "simt/ptx/runtime.h"

namespace {

struct Parameters {
  uint64_t* out;  // one a thread
  const unsigned char* in;
};

}  // namespace

int main() {
  for (const ptx::Kernel& kernel : ptx::kernels()) {
    simt::DeviceBuffer<uint64_t> out(32, uint64_t{0}, "out");
    simt::DeviceBuffer<unsigned char> in(256, "in");
    std::iota(in.begin(), in.end(), 0);
    const Parameters parameters{out.data(), in.data()};
    simt::LaunchConfig config;
    config.grid = 1;
    config.block = 32;
    config.dynamic_shared = 1024;
    std::printf("%s", kernel.name);
    try {
      simt::launch(config, [&] { kernel.body(reinterpret_cast<const char*>(&parameters)); });
      for (uint64_t value : out) std::printf(" %llx", static_cast<unsigned long long>(value));
    } catch (const simt::Error& error) {
      std::string message = error.what();
      std::printf(" ! %s", message.substr(0, message.find('\n')).c_str());
    }
    std::printf("\n");
  }
}
