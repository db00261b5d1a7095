// mma and ldmatrix. Fragments as in the PTX manual: lane = 4 * group + member.
//   A (16 x K): register r holds rows group + 8 * (r & 1), columns from member * P + (K / 2) * (r >> 1)
//   B (K x 8):  register r holds column group, rows from member * P + (K / 2) * r
//   C, D (16 x 8): element i is row group + 8 * (i >> 1), column 2 * member + (i & 1)
// where a register packs P elements: two of 16 bits, or one tf32.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "simt/warp.h"

namespace simt {
namespace {

float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

float of_bf16(uint16_t bits) { return float_of_bits(uint32_t{bits} << 16); }

float of_f16(uint16_t bits) {
  const int exponent = bits >> 10 & 31;
  const int mantissa = bits & 1023;
  float magnitude;
  if (exponent == 31) {
    magnitude = mantissa != 0 ? NAN : INFINITY;
  } else {
    magnitude = exponent != 0 ? std::ldexp(1024.f + static_cast<float>(mantissa), exponent - 25)
                              : std::ldexp(static_cast<float>(mantissa), -24);
  }
  return (bits & 0x8000) != 0 ? -magnitude : magnitude;
}

// The hardware reads the upper 19 bits.
float of_tf32(uint32_t bits) { return float_of_bits(bits & 0xffffe000u); }

template <Operand type>
constexpr int kDepth = type == Operand::TF32 ? 8 : 16;

template <Operand type>
float element(const uint32_t* registers, int index) {
  if constexpr (type == Operand::TF32) {
    return of_tf32(registers[index]);
  } else {
    const uint16_t bits = static_cast<uint16_t>(registers[index / 2] >> (16 * (index & 1)));
    return type == Operand::BF16 ? of_bf16(bits) : of_f16(bits);
  }
}

float exact_sum(const float* a, const float* b, int depth, float c) {
  double sum = c;
  for (int k = 0; k < depth; ++k) sum += double{a[k]} * b[k];
  return static_cast<float>(sum);
}

// What is known of the hardware: terms are shifted to the largest exponent, bits that fall off are lost, and so are
// those that do not fit the result.
float truncated_sum(const float* a, const float* b, int depth, float c) {
  double terms[17];
  for (int k = 0; k < depth; ++k) terms[k] = double{a[k]} * b[k];
  terms[depth] = c;
  int largest = -2000;
  for (int k = 0; k <= depth; ++k) {
    if (!std::isfinite(terms[k])) return exact_sum(a, b, depth, c);
    if (terms[k] == 0) continue;
    int exponent;
    std::frexp(terms[k], &exponent);
    largest = std::max(largest, exponent);
  }
  if (largest == -2000) return 0.f;
  const double unit = std::ldexp(1.0, largest - options().mma_bits);
  double sum = 0;
  for (int k = 0; k <= depth; ++k) sum += std::trunc(terms[k] / unit) * unit;
  const float nearest = static_cast<float>(sum);
  return std::fabs(double{nearest}) > std::fabs(sum) ? std::nextafter(nearest, 0.f) : nearest;
}

template <Operand type>
void multiply(Collective::Slot* slots) {
  constexpr int K = kDepth<type>;
  constexpr int P = type == Operand::TF32 ? 1 : 2;
  float a[16][K];
  float b[8][K];
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane >> 2;
    const int member = lane & 3;
    const auto* a_registers = static_cast<const uint32_t*>(slots[lane].inputs[0]);
    const auto* b_registers = static_cast<const uint32_t*>(slots[lane].inputs[1]);
    for (int p = 0; p < P; ++p) {
      for (int r = 0; r < 4; ++r) {
        a[group + 8 * (r & 1)][member * P + p + K / 2 * (r >> 1)] = element<type>(a_registers, r * P + p);
      }
      for (int r = 0; r < 2; ++r) b[group][member * P + p + K / 2 * r] = element<type>(b_registers, r * P + p);
    }
  }
  const auto sum = options().mma == MmaSum::Exact ? exact_sum : truncated_sum;
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane >> 2;
    const int member = lane & 3;
    const auto* c = static_cast<const float*>(slots[lane].inputs[2]);
    float d[4];
    for (int i = 0; i < 4; ++i) d[i] = sum(a[group + 8 * (i >> 1)], b[2 * member + (i & 1)], K, c[i]);
    std::memcpy(slots[lane].output, d, sizeof d);  // d may be c
  }
}

}  // namespace

uint32_t to_tf32(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7f800000u) != 0x7f800000u) bits += 0x1000u;
  return bits & 0xffffe000u;
}

void mma(Operand type, float* d, const uint32_t* a, const uint32_t* b, const float* c, const char* file, int line) {
  Collective::Slot own;
  own.inputs[0] = a;
  own.inputs[1] = b;
  own.inputs[2] = c;
  own.output = d;
  switch (type) {
    case Operand::F16: collective("mma f16", kFullWarp, false, own, multiply<Operand::F16>, file, line); break;
    case Operand::BF16: collective("mma bf16", kFullWarp, false, own, multiply<Operand::BF16>, file, line); break;
    case Operand::TF32: collective("mma tf32", kFullWarp, false, own, multiply<Operand::TF32>, file, line); break;
  }
}

void ldmatrix_x4(bool transposed, uint32_t* registers, const void* row, const char* file, int line) {
  Collective::Slot own;
  own.inputs[0] = row;
  const Collective::Slot* slots = collective("ldmatrix", kFullWarp, false, own, nullptr, file, line);
  const int lane = static_cast<int>(current->lane);
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t halves[2];
    for (int j = 0; j < 2; ++j) {
      const int r = transposed ? 2 * (lane & 3) + j : lane >> 2;
      const int column = transposed ? lane >> 2 : 2 * (lane & 3) + j;
      const char* start = static_cast<const char*>(slots[matrix * 8 + r].inputs[0]);
      if (reinterpret_cast<uintptr_t>(start) % 16 != 0) fail("ldmatrix: a row is not 16-byte aligned", file, line);
      if (block_of(start) == nullptr) fail("ldmatrix: a row is not in shared memory", file, line);
      race::access(*current, start + 2 * column, 2, /*writes=*/false, file, line);
      std::memcpy(&halves[j], start + 2 * column, sizeof halves[j]);
    }
    registers[matrix] = halves[0] | uint32_t{halves[1]} << 16;
  }
}

}  // namespace simt
