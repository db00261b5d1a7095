// A matrix product as the CUDA layers ask for it, in the terms of BLAS: what has to be computed, apart from who does.
#pragma once

#include <ATen/core/Tensor.h>

namespace lstm_ext {

// Column-major: C (m, n) = op(A) (m, k) op(B) (k, n) [+ C], with element (row, column) at [row + column * ld].
struct Gemm {
  struct Matrix {
    void* data;
    at::ScalarType type;
    int64_t ld;
    bool transposed;
  };
  int64_t m, n, k;
  Matrix a, b, c;
  bool accumulate;  // add to C
  bool tf32;        // float32 operands may be rounded to TF32; sums are float32 all the same
};

// c = a b, or c += a b, of matrices (rows, columns) with one contiguous axis each; see gemm_operand. Operands of 16 bits
// may have a float32 result; sums are float32, or float64 for float64.
Gemm describe_gemm(const at::Tensor& c, const at::Tensor& a, const at::Tensor& b, bool accumulate, bool tf32);

// The matrix itself if describe_gemm takes it, else a contiguous copy.
at::Tensor gemm_operand(const at::Tensor& matrix);

}  // namespace lstm_ext
