// The tile engine: it multiplies tiles of bfloat16 and sums in float32.
//
// A processor has it in one of two forms. AMX has registers of tiles. Without them an instruction of AVX-512-BF16
// stands in, which multiplies pairs of bfloat16 in vector registers and reads the same operands. Which form runs is in
// the plan (EngineLimits::tiles). Both are in the kernels of AVX-512, which also run on processors that have neither;
// so their instructions are written in assembly.
//
// AMX has eight registers. Each holds a tile of 1 KB: 16 x 16 sums in float32, or an operand in bfloat16. A left
// operand is 16 rows of 32 numbers. A right operand is 32 x 16 numbers in pairs, 16 rows of [16 columns][2]. Denormal
// operands count as zeros, and denormal results become zeros. For each product it sums the even and the odd k in two
// chains of fused multiply-adds from zero, adds the two, and adds the result to the sum.
//
// The kernels use the tile engine through this interface only, so that tests can replace it by one in plain C++.
#pragma once

#include "cpu/isa.h"

#include "cpu/simd.h"

namespace lstm_ext::cpu::LSTM_EXT_ISA {
namespace {

constexpr int64_t kOperandSize = kEngineTileRows * kEngineTileDepth;  // bfloat16 numbers in a tile
constexpr int64_t kSumsSize = kEngineTileRows * kEngineTileRows;      // float32 numbers in a tile

#if defined(LSTM_EXT_ISA_AVX512)
#define LSTM_EXT_TILE_ENGINE

struct TileEngine {
  // 16 numbers rounded to bfloat16, to nearest, denormals to zero.
  using Half = __m256i;
  LSTM_EXT_INLINE static Half round(Reg<float> v) {
    Half half;
    asm("vcvtneps2bf16 %1, %0" : "=v"(half) : "v"(v));
    return half;
  }
  LSTM_EXT_INLINE static void store_half(uint16_t* to, Half v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), v);
  }
  // 16 words of 32 bits: a[i] in the low half, b[i] in the high half.
  using Words = __m512i;
  LSTM_EXT_INLINE static Words pairs(Half a, Half b) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(a), _mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16));
  }
  LSTM_EXT_INLINE static void store_words(uint16_t* to, Words v) { _mm512_storeu_si512(to, v); }

  // Registers of tiles. begin() is called once in a thread before all others, end() at the end. An engine without
  // registers keeps memory in their place until then.
  struct Registers {};
  static void begin(Registers&) {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } layout;
    asm volatile("ldtilecfg (%0)" ::"r"(&layout) : "memory");
  }
  static void end() { asm volatile("tilerelease" ::: "memory"); }

  template <int kTile>
  LSTM_EXT_INLINE static void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
  }
  template <int kTile>
  LSTM_EXT_INLINE static void load(const void* tile) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(tile), "r"(int64_t{64}), "i"(kTile) : "memory");
  }
  template <int kTile>
  LSTM_EXT_INLINE static void store(float* tile) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(tile), "r"(int64_t{64}), "i"(kTile) : "memory");
  }
  // Called every few products. The Xeon that was measured puts its vector units to sleep 0.6 us after their last
  // floating-point instruction, and the next store of a tile then waits 0.3 us until they are back.
  LSTM_EXT_INLINE static void keep_awake() {
    Reg<float> zero = Simd<float>::zero();
    asm volatile("vaddps %0, %0, %0" : "+v"(zero));
  }
  template <int kSum, int kLeft, int kRight>
  LSTM_EXT_INLINE static void multiply_add() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kLeft), "i"(kRight));
  }

  // Vector registers: sums of 16 columns += the pair of a row times the pairs of the columns.
  using Pairs = __m512i;
  LSTM_EXT_INLINE static Pairs load_pairs(const uint16_t* columns) { return _mm512_loadu_si512(columns); }
  LSTM_EXT_INLINE static Pairs broadcast_pair(const uint16_t* row) {
    int32_t pair;
    __builtin_memcpy(&pair, row, sizeof(pair));
    return _mm512_set1_epi32(pair);
  }
  LSTM_EXT_INLINE static Reg<float> multiply_add(Reg<float> sums, Pairs row, Pairs columns) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sums) : "v"(row), "v"(columns));
    return sums;
  }
};

#elif defined(LSTM_EXT_TILE_ENGINE)
#include LSTM_EXT_TILE_ENGINE
#endif

// Whether products of T can run on it.
template <typename T>
constexpr bool kHasTileEngine = false;
#if defined(LSTM_EXT_TILE_ENGINE)
template <>
constexpr bool kHasTileEngine<float> = true;
#endif

}  // namespace
}  // namespace lstm_ext::cpu::LSTM_EXT_ISA
