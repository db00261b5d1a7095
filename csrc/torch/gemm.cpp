#include "torch/gemm.h"

#include <ATen/ATen.h>

#include <algorithm>

namespace lstm_ext {
namespace {

// Whether a matrix is row-major in memory. The stride of an axis of size 1 is meaningless.
bool has_contiguous_rows(const at::Tensor& t) {
  return (t.size(1) == 1 || t.stride(1) == 1) && (t.size(0) == 1 || t.stride(0) >= t.size(1));
}

// In BLAS, a row-major matrix is the transposed one.
Gemm::Matrix matrix_of(const at::Tensor& t, void* data) {
  const bool row_major = has_contiguous_rows(t);
  const at::Tensor m = row_major ? t : t.t();
  TORCH_INTERNAL_ASSERT(has_contiguous_rows(m), "a matrix of strides ", t.strides());
  const int64_t ld = m.size(0) == 1 ? m.size(1) : m.stride(0);
  return {data, t.scalar_type(), std::max<int64_t>(ld, 1), !row_major};
}

}  // namespace

at::Tensor gemm_operand(const at::Tensor& matrix) {
  return has_contiguous_rows(matrix) || has_contiguous_rows(matrix.t()) ? matrix : matrix.contiguous();
}

Gemm describe_gemm(const at::Tensor& c, const at::Tensor& a, const at::Tensor& b, bool accumulate, bool tf32) {
  TORCH_INTERNAL_ASSERT(a.dim() == 2 && b.dim() == 2 && c.dim() == 2 && a.size(1) == b.size(0) &&
                            c.size(0) == a.size(0) && c.size(1) == b.size(1) && a.scalar_type() == b.scalar_type(),
                        "a product of ", a.sizes(), " ", a.scalar_type(), " and ", b.sizes(), " ", b.scalar_type(),
                        " into ", c.sizes());
  // Row-major c = a b is column-major c' = b' a'.
  const auto read = [](const at::Tensor& t) { return matrix_of(t, const_cast<void*>(t.const_data_ptr())); };
  Gemm gemm{c.size(1), c.size(0), a.size(1), read(b), read(a), matrix_of(c, c.mutable_data_ptr()), accumulate, tf32};
  TORCH_INTERNAL_ASSERT(!gemm.c.transposed, "the result of a product has strides ", c.strides());
  return gemm;
}

RowsGemm::RowsGemm(const at::Tensor& c, const at::Tensor& a, const at::Tensor& b, bool tf32)
    : gemm_(describe_gemm(c.narrow(0, 0, 1), a.narrow(0, 0, 1), b, false, tf32)) {
  TORCH_INTERNAL_ASSERT(has_contiguous_rows(a) && has_contiguous_rows(c), "rows of strides ", a.strides(), " and ",
                        c.strides());
  // describe_gemm saw one row: it cannot know the row stride, nor that the row belongs to a larger matrix.
  const auto apart = [](const at::Tensor& t) { return std::max(t.stride(0), t.size(1)); };
  gemm_.b.ld = apart(a);
  gemm_.b.transposed = false;
  gemm_.c.ld = apart(c);
  a_bytes_ = gemm_.b.ld * a.element_size();
  c_bytes_ = gemm_.c.ld * c.element_size();
}

Gemm RowsGemm::operator()(int64_t c_row, int64_t a_row, int64_t rows) const {
  Gemm gemm = gemm_;
  gemm.n = rows;
  gemm.b.data = static_cast<char*>(gemm.b.data) + a_row * a_bytes_;
  gemm.c.data = static_cast<char*>(gemm.c.data) + c_row * c_bytes_;
  return gemm;
}

Gemm both_products(const Gemm& first, const Gemm& second) {
  TORCH_INTERNAL_ASSERT(first.m == second.m && first.n == second.n && first.k == second.k, "products of ", first.m, "x",
                        first.k, "x", first.n, " and ", second.m, "x", second.k, "x", second.n);
  Gemm both = first;
  both.batch = 2;
  const auto set_apart = [](Gemm::Matrix& matrix, const Gemm::Matrix& next) {
    const auto bytes = static_cast<const char*>(next.data) - static_cast<const char*>(matrix.data);
    TORCH_INTERNAL_ASSERT(bytes > 0 && matrix.ld == next.ld, "matrices ", bytes, " bytes apart");
    matrix.apart = bytes / static_cast<int64_t>(c10::elementSize(matrix.type));
  };
  set_apart(both.a, second.a);
  set_apart(both.b, second.b);
  set_apart(both.c, second.c);
  return both;
}

}  // namespace lstm_ext
