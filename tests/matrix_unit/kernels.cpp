// The kernels of csrc/cpu over registers and a matrix unit in plain C++, which run on any processor. Loaded, this
// library offers them to the extension as the instruction set "software".
#define LSTM_EXT_ISA_SOFTWARE
#define LSTM_EXT_SOFTWARE_SIMD "matrix_unit/simd.h"
#define LSTM_EXT_MATRIX_UNIT "matrix_unit/unit.h"
#include "cpu/kernel_set.h"

namespace {

using lstm_ext::cpu::Capability;

const Capability& software() {
  // float64 has no matrix unit: the kernels of the processor's own set.
  static const Capability capability{LSTM_EXT_ISA_NAME, lstm_ext::cpu::software::kKernels<float>,
                                     lstm_ext::cpu::kernels<double>()};
  return capability;
}

[[maybe_unused]] const bool added = (lstm_ext::cpu::add_capability(&software()), true);

}  // namespace
