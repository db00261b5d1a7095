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
  // torch sets the handle to TF32 where torch.backends.cuda.matmul allows it. Here compute_type decides for each
  // product.
  at::NoTF32Guard no_tf32;
  return at::cuda::getCurrentCUDABlasHandle();
}

void gemm_cublas(const Gemm& g, void* handle) {
  const double one = 1, zero = 0;
  const float onef = 1, zerof = 0;
  const bool is_double = g.a.type == at::kDouble;
  const void* alpha = is_double ? static_cast<const void*>(&one) : &onef;
  const void* beta = g.accumulate ? alpha : is_double ? static_cast<const void*>(&zero) : &zerof;
  TORCH_CUDABLAS_CHECK(cublasGemmEx_64(static_cast<cublasHandle_t>(handle), operation(g.a), operation(g.b), g.m, g.n,
                                       g.k, alpha, g.a.data, data_type(g.a.type), g.a.ld, g.b.data, data_type(g.b.type),
                                       g.b.ld, beta, g.c.data, data_type(g.c.type), g.c.ld, compute_type(g),
                                       CUBLAS_GEMM_DEFAULT));
}

}  // namespace lstm_ext
