// Runs the kernel of bank_patterns.cuh; SIMT_WAVEFRONTS=yes counts.
#include "simt/bank_patterns.cuh"
#include "simt/global_memory.h"

int main() {
  simt::DeviceBuffer<uint32_t> out(32, 0u, "out");
  lstm_ext::cuda::launch(banks::patterns<0>, dim3(1), dim3(32), 8192, nullptr, banks::Arguments{out.data()});
  return 0;
}
