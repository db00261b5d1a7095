// One multiply_add of a tile engine, as a function for ctypes: the processor's with -DHARDWARE, else the one in plain
// C++.
#if defined(HARDWARE)
#define LSTM_EXT_ISA_AVX512
#else
#define LSTM_EXT_ISA_SOFTWARE
#define LSTM_EXT_SOFTWARE_SIMD "tile_engine/simd.h"
#define LSTM_EXT_TILE_ENGINE "tile_engine/engine.h"
#endif
#include "cpu/bf16_product.h"

using namespace lstm_ext::cpu;
using namespace lstm_ext::cpu::LSTM_EXT_ISA;

// sums (16, 16) += left (16, 32) * right (16 pairs, 16 columns, 2), `count` times.
extern "C" void multiply_add(float* sums, const uint16_t* left, const uint16_t* right, int64_t count) {
  TileEngine::Registers registers;
  TileEngine::begin(registers);
  for (int64_t i = 0; i < count; ++i) {
    float* const at = sums + i * kSumsSize;
    TileEngine::load<0>(at);
    TileEngine::load<4>(left + i * kOperandSize);
    TileEngine::load<6>(right + i * kOperandSize);
    TileEngine::multiply_add<0, 4, 6>();
    TileEngine::store<0>(at);
  }
  TileEngine::end();
}

// The same in vector registers.
extern "C" void multiply_add_pairs(float* sums, const uint16_t* left, const uint16_t* right, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const TileOperands at{left + i * kOperandSize, {right + i * kOperandSize, kOperandSize, 0}, 1};
    multiply_in_pairs(&at, 1, kEngineTileRows, 1, sums + i * kSumsSize, true);
  }
}

// halves[i] = numbers[i] rounded to bfloat16.
extern "C" void round_to_bfloat16(const float* numbers, uint16_t* halves, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) {
    const TileEngine::Half half = TileEngine::round(Simd<float>::load(numbers + i));
    TileEngine::store_half(halves + i, half);
  }
}
