// Shared by the fused kernels: the tiles of an operand in shared memory, and the instructions that multiply them.
#pragma once

#include <type_traits>

#include "cuda/cell.cuh"
#include "cuda/step.h"

namespace lstm_ext::cuda {

constexpr int kStepGateRows = 4 * kStepUnits;

// Copies tiles of the rows of a matrix to shared memory: kRows rows of kRowBytes, tile after tile along them, with
// zeros beyond the end of a row. A thread copies one piece of every kRowsAtOnce-th row, so that a tile costs it an
// addition and a copy for each.
template <typename T, int kRows, int kRowBytes, int kPitch>
class TileCopies {
 public:
  static constexpr int kPieces = kRowBytes / kPieceBytes, kRowsAtOnce = kStepThreads / kPieces;
  static constexpr int kCopies = kRows / kRowsAtOnce, kNumbers = kRowBytes / static_cast<int>(sizeof(T));
  static_assert(kRows % kRowsAtOnce == 0 && kRowsAtOnce % 2 == 0);

  LSTM_DEVICE static int row() { return static_cast<int>(threadIdx.x) / kPieces; }
  LSTM_DEVICE static int piece() { return static_cast<int>(threadIdx.x) % kPieces; }

  // Begins with the first tile of a matrix of rows of `length` numbers. row_of gives a row of the tile; null: zeros.
  // `somewhere` is any address that may be read.
  template <typename RowOf>
  LSTM_DEVICE void begin(int64_t length, const T* somewhere, RowOf&& row_of) {
    column_ = piece() * kPieceNumbers;
    length_ = length;
    somewhere_ = somewhere;
    all_there_ = true;
#pragma unroll
    for (int c = 0; c < kCopies; ++c) {
      rows_[c] = row_of(row() + c * kRowsAtOnce);
      all_there_ = all_there_ && rows_[c];
    }
  }
  // Copies the next tile. The thread's first piece goes to `to`.
  LSTM_DEVICE void fetch(unsigned char* to LSTM_SITE_PARAMETERS) {
    if (all_there_ && column_ + kPieceNumbers <= length_) {
#pragma unroll
      for (int c = 0; c < kCopies; ++c) {
        cp_async16(to + c * (kRowsAtOnce * kPitch), rows_[c] + column_, kPieceBytes LSTM_SITE);
      }
    } else {
      const int64_t left = (length_ - column_) * static_cast<int64_t>(sizeof(T));
      const int bytes = static_cast<int>(left < 0 ? 0 : left < kPieceBytes ? left : kPieceBytes);
#pragma unroll
      for (int c = 0; c < kCopies; ++c) {
        const bool there = rows_[c] && bytes > 0;
        const T* from = there ? rows_[c] + column_ : somewhere_;
        cp_async16(to + c * (kRowsAtOnce * kPitch), from, there ? bytes : 0 LSTM_SITE);
      }
    }
    column_ += kNumbers;
  }

 private:
  static constexpr int kPieceNumbers = kPieceBytes / static_cast<int>(sizeof(T));
  static_assert(kPieceBytes == 16);
  const T* rows_[kCopies];
  const T* somewhere_;
  int64_t column_, length_;
  bool all_there_;
};

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
