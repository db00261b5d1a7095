// One multiply_add of a matrix unit, as a function for ctypes: the processor's with -DHARDWARE, else the one in plain
// C++.
#if defined(HARDWARE)
#define LSTM_EXT_ISA_AVX512
#else
#define LSTM_EXT_ISA_SOFTWARE
#define LSTM_EXT_SOFTWARE_SIMD "matrix_unit/simd.h"
#define LSTM_EXT_MATRIX_UNIT "matrix_unit/unit.h"
#endif
#include "cpu/plane_product.h"

using namespace lstm_ext::cpu;
using namespace lstm_ext::cpu::LSTM_EXT_ISA;

// sums (16, 16) += left (16, 32) * right (16 pairs, 16 columns, 2), `count` times.
extern "C" void multiply_add(float* sums, const uint16_t* left, const uint16_t* right, int64_t count) {
  MatrixUnit::Registers registers;
  MatrixUnit::begin(registers);
  for (int64_t i = 0; i < count; ++i) {
    float* const at = sums + i * kSumsSize;
    MatrixUnit::load<0>(at);
    MatrixUnit::load<4>(left + i * kOperandSize);
    MatrixUnit::load<6>(right + i * kOperandSize);
    MatrixUnit::multiply_add<0, 4, 6>();
    MatrixUnit::store<0>(at);
  }
  MatrixUnit::end();
}

// The same in vector registers.
extern "C" void multiply_add_pairs(float* sums, const uint16_t* left, const uint16_t* right, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const TileOperands at{left + i * kOperandSize, {right + i * kOperandSize, kOperandSize, 0}, 1};
    multiply_in_pairs(&at, 1, kUnitTileRows, 1, sums + i * kSumsSize, true);
  }
}

// halves[i] = numbers[i] rounded to bfloat16.
extern "C" void round_to_bfloat16(const float* numbers, uint16_t* halves, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) {
    const MatrixUnit::Half half = MatrixUnit::round(Simd<float>::load(numbers + i));
    MatrixUnit::store_half(halves + i, half);
  }
}
