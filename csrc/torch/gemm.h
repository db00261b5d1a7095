// Describes a matrix product of the CUDA layers in the terms of BLAS, independent of the library that computes it.
#pragma once

#include <ATen/core/Tensor.h>

#include "contract/visibility.h"

namespace lstm_ext {

// Column-major: C (m, n) = op(A) (m, k) op(B) (k, n) [+ C], with element (row, column) at [row + column * ld].
struct Gemm {
  struct Matrix {
    void* data;
    at::ScalarType type;
    int64_t ld;
    bool transposed;
    int64_t apart = 0;
  };
  int64_t m, n, k;
  Matrix a, b, c;
  bool accumulate;  // add to C
  bool tf32;        // float32 operands may be rounded to TF32; sums stay float32
  // The number of products of the same sizes; their matrices are `apart` elements from each other.
  int64_t batch = 1;
};

// c = a b, or c += a b, of matrices (rows, columns) with one contiguous axis each; see gemm_operand. Operands of 16
// bits may have a float32 result; sums are float32, or float64 for float64.
LSTM_EXT_PUBLIC Gemm describe_gemm(const at::Tensor& c, const at::Tensor& a, const at::Tensor& b, bool accumulate,
                                   bool tf32);

// The same product for other rows in every time step: c[c_row : c_row + rows] = a[a_row : a_row + rows] b. It is
// described once, because a step takes only a few microseconds. `a` and `c` have contiguous rows.
class LSTM_EXT_PUBLIC RowsGemm {
 public:
  RowsGemm(const at::Tensor& c, const at::Tensor& a, const at::Tensor& b, bool tf32);
  Gemm operator()(int64_t c_row, int64_t a_row, int64_t rows) const;

 private:
  Gemm gemm_;
  int64_t a_bytes_, c_bytes_;  // bytes of a row
};

// Two products of the same sizes as one. Each matrix of the second follows that of the first in memory.
LSTM_EXT_PUBLIC Gemm both_products(const Gemm& first, const Gemm& second);

// The matrix itself if describe_gemm takes it, else a contiguous copy.
LSTM_EXT_PUBLIC at::Tensor gemm_operand(const at::Tensor& matrix);

}  // namespace lstm_ext
