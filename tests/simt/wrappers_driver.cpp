// Runs the kernels of wrappers.cuh and prints what each made: its name, then words, or what the emulator has to say.
// Everything that a kernel computes is exact, so that the lines are the same however it was compiled.
#include "simt/wrappers.cuh"

#include <cstdio>
#include <string>

#include "simt/global_memory.h"

namespace {

using wrappers::Arguments;
using wrappers::Format;

void run(const char* name, void (*kernel)(Arguments), unsigned blocks = 1) {
  simt::DeviceBuffer<uint32_t> out(64 * blocks, 0u, "out"), in(1024, "in");
  for (uint32_t i = 0; i < 1024; ++i) in[i] = i * 2654435761u + 12345u;
  lstm_ext::cuda::LaunchConfig config;
  config.grid = dim3(blocks);
  config.block = dim3(32);
  config.dynamic_shared = 8192;
  config.cooperative = true;
  std::printf("%s:", name);
  try {
    lstm_ext::cuda::launch(kernel, config, Arguments{out.data(), in.data()});
    for (uint32_t word : out) std::printf(" %x", word);
  } catch (const simt::Error& error) {
    const std::string message = error.what();
    std::printf(" %s", message.substr(0, message.find('\n')).c_str());
  }
  std::printf("\n");
}

}  // namespace

int main() {
  run("cp_async16", wrappers::copy);
  run("cp_async_wait", wrappers::copy_groups);
  run("ldmatrix_x4", wrappers::load_x4);
  run("ldmatrix_x4_trans", wrappers::load_x4_trans);
  run("mma_f16_16816", wrappers::multiply<Format::F16>);
  run("mma_bf16_16816", wrappers::multiply<Format::BF16>);
  run("mma_tf32_1688", wrappers::multiply<Format::TF32>);
  run("to_tf32", wrappers::round_to_tf32);
  run("words", wrappers::words);
  run("load_relaxed_16", wrappers::load_piece);
  run("store_relaxed_16", wrappers::store_piece);
  run("handover_of_a_piece", wrappers::handover_of_a_piece, 2);
  run("now", wrappers::piece_that_never_comes);
  run("handover", wrappers::handover, 2);
  run("wavefronts", wrappers::patterns);
}
