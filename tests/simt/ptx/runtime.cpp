#include "simt/ptx/runtime.h"

namespace ptx {
namespace {

// Not a variable of this file's own: registrations in other files may come first.
std::vector<Kernel>& registered() {
  static std::vector<Kernel> all;
  return all;
}

// In a program with kernels from PTX no other ones run.
simt::TranslatedKernel find(const void* host, size_t argument_bytes) {
  for (const Kernel& kernel : registered()) {
    if (kernel.host != host) continue;
    if (kernel.parameter_bytes != argument_bytes) {
      throw simt::Error(std::string("ptx: arguments of another size than those of ") + kernel.name);
    }
    return kernel.body;
  }
  throw simt::Error("ptx: a kernel is launched that was not translated");
}

}  // namespace

Registration::Registration(const Kernel& kernel) {
  registered().push_back(kernel);
  simt::translated_kernel = find;
}

const std::vector<Kernel>& kernels() { return registered(); }

Shuffled shuffle(ShuffleMode mode, b32 a, b32 b, b32 c, b32 mask, const char* file, int line) {
  const int lane = static_cast<int>(laneid());
  const int segment = c >> 8 & 31, clamp = c & 31, amount = b & 31;
  const int first = lane & segment, bound = first | (clamp & ~segment);
  int source = lane;
  bool in_range = false;
  switch (mode) {
    // `bound` is the first lane here, and the last one in the others.
    case ShuffleMode::up: source = lane - amount, in_range = source >= bound; break;
    case ShuffleMode::down: source = lane + amount, in_range = source <= bound; break;
    case ShuffleMode::bfly: source = lane ^ amount, in_range = source <= bound; break;
    case ShuffleMode::idx: source = first | (amount & ~segment), in_range = source <= bound; break;
  }
  if (!in_range) source = lane;
  const uint64_t value = simt::shuffle(simt::Shuffle::Index, mask, a, static_cast<u32>(source), 32, file, line);
  return {static_cast<b32>(value), in_range};
}

}  // namespace ptx
