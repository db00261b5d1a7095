// The tile engine of AArch64 (FEAT_BF16): bfmmla adds the product of 2 x 4 and 4 x 2 bfloat16 numbers to 2 x 2 sums.
// tile_engine.h includes this within its namespaces. A "register" of sums is memory here; one of an operand is the
// address of its tile.
#pragma once

#include "cpu/isa.h"

struct TileEngine {
  // 16 numbers rounded to bfloat16, to nearest.
  struct Half {
    uint16x8_t low, high;
  };
  LSTM_EXT_INLINE static Half round(const Reg<float>& v) {
    const auto two = [&](int n) LSTM_EXT_LAMBDA_INLINE {
      uint16x8_t numbers;
      asm(".arch_extension bf16\n\tbfcvtn %0.4h, %1.4s\n\tbfcvtn2 %0.8h, %2.4s"
          : "=&w"(numbers)
          : "w"(Simd<float>::part(v, n)), "w"(Simd<float>::part(v, n + 1)));
      return numbers;
    };
    return {two(0), two(2)};
  }
  LSTM_EXT_INLINE static void store_half(uint16_t* to, Half v) {
    vst1q_u16(to, v.low);
    vst1q_u16(to + 8, v.high);
  }
  // 16 words of 32 bits: a[i] in the low half, b[i] in the high half.
  struct Words {
    Half first, second;
  };
  LSTM_EXT_INLINE static Words pairs(Half a, Half b) {
    return {{vzip1q_u16(a.low, b.low), vzip2q_u16(a.low, b.low)},
            {vzip1q_u16(a.high, b.high), vzip2q_u16(a.high, b.high)}};
  }
  LSTM_EXT_INLINE static void store_words(uint16_t* to, Words v) {
    store_half(to, v.first);
    store_half(to + 16, v.second);
  }

  static constexpr int kSumTiles = 4;
  struct Registers {
    float32x4_t sums[kSumTiles][64];  // [pair of rows][pair of columns], 2 x 2 numbers each
    const uint16_t* operands[4];
  };
  static void begin(Registers& registers) { in_use() = &registers; }
  static void end() {}
  static void keep_awake() {}

  template <int kTile>
  static void zero() {
    for (float32x4_t& block : registers().sums[kTile]) block = vdupq_n_f32(0);
  }
  template <int kTile>
  static void load(const void* tile) {
    if constexpr (kTile >= kSumTiles) {
      registers().operands[kTile - kSumTiles] = static_cast<const uint16_t*>(tile);
    } else {
      const auto* const numbers = static_cast<const float*>(tile);
      for (int row = 0; row < 16; row += 2) {
        for (int column = 0; column < 16; column += 2) {
          registers().sums[kTile][4 * row + column / 2] =
              vcombine_f32(vld1_f32(numbers + 16 * row + column), vld1_f32(numbers + 16 * (row + 1) + column));
        }
      }
    }
  }
  template <int kTile>
  static void store(float* tile) {
    for (int row = 0; row < 16; row += 2) {
      for (int column = 0; column < 16; column += 2) {
        const float32x4_t block = registers().sums[kTile][4 * row + column / 2];
        vst1_f32(tile + 16 * row + column, vget_low_f32(block));
        vst1_f32(tile + 16 * (row + 1) + column, vget_high_f32(block));
      }
    }
  }
  template <int kSum, int kLeft, int kRight>
  static void multiply_add() {
    Registers& all = registers();
    const uint16_t* const left = all.operands[kLeft - kSumTiles];
    const uint16_t* const right = all.operands[kRight - kSumTiles];
    for (int row = 0; row < 16; row += 8) {
      for (int column = 0; column < 16; column += 8) {
        multiply_add(left + row * kEngineTileDepth, right + 2 * column, all.sums[kSum] + 4 * row + column / 2);
      }
    }
  }

 private:
  static Registers*& in_use() {
    static thread_local Registers* at = nullptr;
    return at;
  }
  static Registers& registers() { return *in_use(); }

  // Eight rows times eight columns: their sums fill half of the registers.
  __attribute__((noinline)) static void multiply_add(const uint16_t* left, const uint16_t* right, float32x4_t* sums) {
    float32x4_t acc[4][4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) acc[i][j] = sums[8 * i + j];
    // The next eight k: four of each row are side by side, and as pairs in two rows of the right operand.
    for (int64_t k = 0; k < kEngineTileDepth; k += 8, left += 8, right += 8 * kEngineTileRows) {
      uint64x2_t a[4][2];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const uint64x2_t one = words(left + 2 * i * kEngineTileDepth);
        const uint64x2_t next = words(left + (2 * i + 1) * kEngineTileDepth);
        a[i][0] = vzip1q_u64(one, next);
        a[i][1] = vzip2q_u64(one, next);
      }
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
#pragma GCC unroll 2
        for (int j = 0; j < 4; j += 2) {
          const uint16_t* const four = right + (4 * half * kEngineTileRows) + 4 * j;
          const uint32x4_t one = vreinterpretq_u32_u64(words(four));
          const uint32x4_t next = vreinterpretq_u32_u64(words(four + 2 * kEngineTileRows));
          const uint32x4_t b[2] = {vzip1q_u32(one, next), vzip2q_u32(one, next)};
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i)
#pragma GCC unroll 2
            for (int n = 0; n < 2; ++n) {
              asm(".arch_extension bf16\n\tbfmmla %0.4s, %1.8h, %2.8h"
                  : "+w"(acc[i][j + n])
                  : "w"(a[i][half]), "w"(b[n]));
            }
        }
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) sums[8 * i + j] = acc[i][j];
  }
  LSTM_EXT_INLINE static uint64x2_t words(const uint16_t* p) { return vreinterpretq_u64_u16(vld1q_u16(p)); }
};
