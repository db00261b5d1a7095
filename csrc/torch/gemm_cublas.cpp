#include "torch/gemm_cublas.h"

#include <ATen/Context.h>
#include <ATen/cuda/CUDAContext.h>
#include <ATen/cuda/Exceptions.h>

namespace lstm_ext {
namespace {

cudaDataType_t data_type(at::ScalarType type) {
  switch (type) {
    case at::kDouble: return CUDA_R_64F;
    case at::kFloat: return CUDA_R_32F;
    case at::kHalf: return CUDA_R_16F;
    case at::kBFloat16: return CUDA_R_16BF;
    default: TORCH_INTERNAL_ASSERT(false, "a product of ", type);
  }
}

cublasComputeType_t compute_type(const Gemm& gemm) {
  if (gemm.a.type == at::kDouble) return CUBLAS_COMPUTE_64F;
  return gemm.tf32 && gemm.a.type == at::kFloat ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F;
}

cublasOperation_t operation(const Gemm::Matrix& matrix) { return matrix.transposed ? CUBLAS_OP_T : CUBLAS_OP_N; }

}  // namespace

void* cublas_handle() {
  // torch sets the handle to TF32 if torch.backends.cuda.matmul allows it. Here compute_type decides for each product.
  at::NoTF32Guard no_tf32;
  return at::cuda::getCurrentCUDABlasHandle();
}

namespace {

// While it lives, products of this handle with 16-bit results keep their sums in float32, even if cuBLAS splits them
// into parts that are added up at the end.
class FullSums {
 public:
  FullSums(cublasHandle_t handle, bool needed) : handle_(needed ? handle : nullptr) {
    if (!handle_) return;
    TORCH_CUDABLAS_CHECK(cublasGetMathMode(handle_, &before_));
    set(CUBLAS_DEFAULT_MATH | CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION);
  }
  ~FullSums() {
    if (handle_) cublasSetMathMode(handle_, before_);
  }
  FullSums(const FullSums&) = delete;
  FullSums& operator=(const FullSums&) = delete;

 private:
  void set(int mode) { TORCH_CUDABLAS_CHECK(cublasSetMathMode(handle_, static_cast<cublasMath_t>(mode))); }

  cublasHandle_t const handle_;
  cublasMath_t before_ = CUBLAS_DEFAULT_MATH;
};

}  // namespace

void gemm_cublas(const Gemm& g, void* handle) {
  const FullSums full_sums(static_cast<cublasHandle_t>(handle), g.c.type == at::kHalf || g.c.type == at::kBFloat16);
  const double one = 1, zero = 0;
  const float onef = 1, zerof = 0;
  const bool is_double = g.a.type == at::kDouble;
  const void* alpha = is_double ? static_cast<const void*>(&one) : &onef;
  const void* beta = g.accumulate ? alpha : is_double ? static_cast<const void*>(&zero) : &zerof;
  if (g.batch == 1) {
    TORCH_CUDABLAS_CHECK(cublasGemmEx_64(static_cast<cublasHandle_t>(handle), operation(g.a), operation(g.b), g.m, g.n,
                                         g.k, alpha, g.a.data, data_type(g.a.type), g.a.ld, g.b.data,
                                         data_type(g.b.type), g.b.ld, beta, g.c.data, data_type(g.c.type), g.c.ld,
                                         compute_type(g), CUBLAS_GEMM_DEFAULT));
    return;
  }
  TORCH_CUDABLAS_CHECK(cublasGemmStridedBatchedEx_64(
      static_cast<cublasHandle_t>(handle), operation(g.a), operation(g.b), g.m, g.n, g.k, alpha, g.a.data,
      data_type(g.a.type), g.a.ld, g.a.apart, g.b.data, data_type(g.b.type), g.b.ld, g.b.apart, beta, g.c.data,
      data_type(g.c.type), g.c.ld, g.c.apart, g.batch, compute_type(g), CUBLAS_GEMM_DEFAULT));
}

}  // namespace lstm_ext
