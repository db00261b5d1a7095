// The stepwise CUDA layer as a Python module that needs no GPU: the project's own host code and kernels, on tensors of
// the CPU. The kernels run under the emulator; the matrix products, which are cuBLAS's on a GPU, are loops that follow
// BLAS's definition to the letter.
#include <torch/extension.h>

#include "cuda/stepwise_bf16.cu"
#include "cuda/stepwise_f16.cu"
#include "cuda/stepwise_f32.cu"
#include "cuda/stepwise_f64.cu"
#include "torch/cuda_stepwise.h"

// Of the CUDA runtime, which is not there. An emulated launch throws what went wrong.
extern "C" const char* cudaGetErrorString(cudaError_t) { return "no error of an emulated launch"; }

namespace py = pybind11;

namespace {

using lstm_ext::Gemm;
using lstm_ext::OptionalTensor;

double element(const Gemm::Matrix& m, int64_t place) {
  switch (m.type) {
    case at::kDouble: return static_cast<const double*>(m.data)[place];
    case at::kFloat: return static_cast<const float*>(m.data)[place];
    case at::kHalf: return static_cast<const at::Half*>(m.data)[place];
    default: return static_cast<const at::BFloat16*>(m.data)[place];
  }
}

void set_element(const Gemm::Matrix& m, int64_t place, double value) {
  switch (m.type) {
    case at::kDouble: static_cast<double*>(m.data)[place] = value; break;
    case at::kFloat: static_cast<float*>(m.data)[place] = static_cast<float>(value); break;
    case at::kHalf: static_cast<at::Half*>(m.data)[place] = static_cast<float>(value); break;
    default: static_cast<at::BFloat16*>(m.data)[place] = static_cast<float>(value); break;
  }
}

// Ten bits of mantissa, as the tensor cores read a float32 operand.
double rounded_to_tf32(double x) {
  auto bits = at::bit_cast<uint32_t>(static_cast<float>(x));
  bits = (bits + 0x1000u) & 0xffffe000u;
  return at::bit_cast<float>(bits);
}

// The types that cublasGemmEx takes together, and its rules for leading dimensions.
void check_call(const Gemm& g) {
  TORCH_CHECK(g.a.type == g.b.type, "operands of two types");
  const bool low = g.a.type == at::kHalf || g.a.type == at::kBFloat16;
  TORCH_CHECK(g.c.type == g.a.type || (low && g.c.type == at::kFloat), "a result of ", g.c.type, " from ", g.a.type);
  TORCH_CHECK(g.a.ld >= std::max<int64_t>(1, g.a.transposed ? g.k : g.m), "lda ", g.a.ld);
  TORCH_CHECK(g.b.ld >= std::max<int64_t>(1, g.b.transposed ? g.n : g.k), "ldb ", g.b.ld);
  TORCH_CHECK(g.c.ld >= std::max<int64_t>(1, g.m), "ldc ", g.c.ld);
  TORCH_CHECK(g.m > 0 && g.n > 0 && g.k > 0, "an empty product");
}

void gemm_by_definition(const Gemm& g, void*) {
  check_call(g);
  // op(A) row by row and op(B) column by column.
  const auto read = [&](const Gemm::Matrix& m, int64_t count, int64_t step_ld, int64_t step_one) {
    std::vector<double> values(count * g.k);
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t k = 0; k < g.k; ++k) {
        const double x = element(m, (i * step_ld + k * step_one) * m.ld + i * (1 - step_ld) + k * (1 - step_one));
        values[i * g.k + k] = g.tf32 && m.type == at::kFloat ? rounded_to_tf32(x) : x;
      }
    }
    return values;
  };
  const std::vector<double> a = read(g.a, g.m, g.a.transposed ? 1 : 0, g.a.transposed ? 0 : 1);
  const std::vector<double> b = read(g.b, g.n, g.b.transposed ? 0 : 1, g.b.transposed ? 1 : 0);
  for (int64_t column = 0; column < g.n; ++column) {
    for (int64_t row = 0; row < g.m; ++row) {
      const int64_t place = row + column * g.c.ld;
      double sum = g.accumulate ? element(g.c, place) : 0;
      for (int64_t k = 0; k < g.k; ++k) sum += a[row * g.k + k] * b[column * g.k + k];
      set_element(g.c, place, sum);
    }
  }
}

lstm_ext::LayerSizes sizes_of(const at::Tensor& input, const OptionalTensor& h0, const OptionalTensor& c0,
                              const std::vector<at::Tensor>& weights, const OptionalTensor& batch_sizes, bool has_bias,
                              bool bidirectional, const lstm_ext::Extras& extras) {
  lstm_ext::LayerSizes sizes =
      lstm_ext::check_layer(input, h0, c0, weights, batch_sizes, has_bias, bidirectional, extras);
  sizes.gates_type = input.scalar_type();  // as on a GPU
  return sizes;
}

// As in csrc/python.cpp.
lstm_ext::Extras extras_of(const OptionalTensor& resets, const OptionalTensor& reset_h, const OptionalTensor& reset_c,
                           const OptionalTensor& lengths, const OptionalTensor& recurrent_mask,
                           const OptionalTensor& kept_h, const OptionalTensor& kept_c, double zoneout_h,
                           double zoneout_c, const std::vector<at::Tensor>& norm, bool recompute) {
  return {resets, reset_h, reset_c, lengths, recurrent_mask, kept_h, kept_c, zoneout_h, zoneout_c, norm, recompute};
}

lstm_ext::StepwiseDevice device(bool tf32, int64_t chunk_bytes) {
  return {nullptr, &gemm_by_definition, nullptr, tf32, chunk_bytes};
}

lstm_ext::ForwardResult forward(const at::Tensor& input, const OptionalTensor& h0, const OptionalTensor& c0,
                                const std::vector<at::Tensor>& weights, const OptionalTensor& batch_sizes,
                                bool has_bias, bool bidirectional, bool save, bool tf32, int64_t chunk_bytes,
                                const lstm_ext::Extras& extras) {
  const auto sizes = sizes_of(input, h0, c0, weights, batch_sizes, has_bias, bidirectional, extras);
  return lstm_ext::stepwise_forward({input, h0, c0, weights, has_bias, extras}, sizes, save, device(tf32, chunk_bytes));
}

std::vector<at::Tensor> backward(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                                 const OptionalTensor& grad_c_n, const at::Tensor& input, const OptionalTensor& h0,
                                 const OptionalTensor& c0, const std::vector<at::Tensor>& weights,
                                 const OptionalTensor& batch_sizes, const at::Tensor& output,
                                 const std::vector<at::Tensor>& saved, bool has_bias, bool bidirectional,
                                 const std::vector<bool>& wanted, bool tf32, int64_t chunk_bytes,
                                 const lstm_ext::Extras& extras, const OptionalTensor& grad_gates,
                                 const OptionalTensor& grad_cells) {
  const auto sizes = sizes_of(input, h0, c0, weights, batch_sizes, has_bias, bidirectional, extras);
  return lstm_ext::stepwise_backward({input, h0, c0, weights, has_bias, extras}, sizes,
                                     {grad_output, grad_h_n, grad_c_n, grad_gates, grad_cells, output, saved, wanted},
                                     device(tf32, chunk_bytes));
}

at::Tensor gemm(const at::Tensor& c, const at::Tensor& a, const at::Tensor& b, bool accumulate, bool tf32) {
  gemm_by_definition(lstm_ext::describe_gemm(c, lstm_ext::gemm_operand(a), lstm_ext::gemm_operand(b), accumulate, tf32),
                     nullptr);
  return c;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  // Of this module only: _C has its own.
  py::class_<lstm_ext::Extras>(m, "Extras", py::module_local())
      .def(py::init(&extras_of), py::arg("resets"), py::arg("reset_h"), py::arg("reset_c"), py::arg("lengths"),
           py::arg("recurrent_mask"), py::arg("kept_h"), py::arg("kept_c"), py::arg("zoneout_h"), py::arg("zoneout_c"),
           py::arg("norm"), py::arg("recompute"));
  m.def("forward", &forward, py::arg("input"), py::arg("h0"), py::arg("c0"), py::arg("weights"), py::arg("batch_sizes"),
        py::arg("has_bias"), py::arg("bidirectional"), py::arg("save"), py::arg("tf32"), py::arg("chunk_bytes"),
        py::arg("extras") = lstm_ext::Extras{});
  m.def("backward", &backward, py::arg("grad_output"), py::arg("grad_h_n"), py::arg("grad_c_n"), py::arg("input"),
        py::arg("h0"), py::arg("c0"), py::arg("weights"), py::arg("batch_sizes"), py::arg("output"), py::arg("saved"),
        py::arg("has_bias"), py::arg("bidirectional"), py::arg("wanted"), py::arg("tf32"), py::arg("chunk_bytes"),
        py::arg("extras") = lstm_ext::Extras{}, py::arg("grad_gates") = py::none(), py::arg("grad_cells") = py::none());
  m.def("gemm", &gemm);
}
