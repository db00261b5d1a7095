// Shared by the fused kernels: the tiles of an operand in shared memory, and the instructions that multiply them.
#pragma once

#include <type_traits>

#include "cuda/cell.cuh"
#include "cuda/step.h"

namespace lstm_ext::cuda {

constexpr int kStepGateRows = 4 * kStepUnits;
// Copies the numbers [k, k + 16 bytes) of a row of `length` numbers; what lies beyond them is 0, and so is a row that
// is null. `somewhere` is any address that may be read.
template <typename T>
LSTM_DEVICE void copy_piece(void* to, const T* row, int64_t k, int64_t length,
                            const T* somewhere LSTM_SITE_PARAMETERS) {
  constexpr int64_t kNumbers = kPieceBytes / sizeof(T);
  const int64_t left = row ? length - k : 0;
  const int numbers = static_cast<int>(left < 0 ? 0 : left < kNumbers ? left : kNumbers);
  static_assert(kPieceBytes == 16);
  cp_async16(to, numbers > 0 ? row + k : somewhere, numbers * static_cast<int>(sizeof(T)) LSTM_SITE);
}

// d += a * b for 32 bytes of k: two registers of `a` a row, one register of `b` a column.
template <typename T>
LSTM_DEVICE void multiply_tile(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] LSTM_SITE_PARAMETERS) {
  if constexpr (std::is_same_v<T, float>) {
    mma_tf32_1688(d, a, b LSTM_SITE);
  } else if constexpr (std::is_same_v<T, __half>) {
    mma_f16_16816(d, a, b LSTM_SITE);
  } else {
    mma_bf16_16816(d, a, b LSTM_SITE);
  }
}

// A register of an operand as the instruction takes it.
template <typename T>
LSTM_DEVICE uint32_t operand_register(uint32_t bits) {
  if constexpr (std::is_same_v<T, float>) {
    return to_tf32(__uint_as_float(bits));
  } else {
    return bits;
  }
}

}  // namespace lstm_ext::cuda
