// The stepwise CUDA layer as a Python module that needs no GPU: the project's own bindings, checks, host code and
// kernels, on tensors of the CPU. The kernels run under the emulator. The matrix products, which are cuBLAS's on a GPU,
// are loops that follow BLAS's definition to the letter.
#include <torch/extension.h>

#include <c10/core/CPUAllocator.h>

#include <cstring>
#include <list>

#include "python_layer.h"
#include "simt/emulator.h"
#include "simt/global_memory.h"
#include "torch/cuda_stepwise.h"

// In place of the CUDA runtime's. An emulated launch throws what went wrong.
extern "C" const char* cudaGetErrorString(cudaError_t) { return "no error of an emulated launch"; }

namespace py = pybind11;
using namespace py::literals;

namespace {

using lstm_ext::Gemm;

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

int64_t products = 0;
void counted_gemm(const Gemm& g, void* context) {
  ++products;
  TORCH_CHECK(g.batch == 1 || (g.a.apart > 0 && g.b.apart > 0 && g.c.apart > 0), "a batch of products in one place");
  const auto matrix_at = [](Gemm::Matrix m, int64_t n) {
    m.data = static_cast<char*>(m.data) + n * m.apart * static_cast<int64_t>(c10::elementSize(m.type));
    return m;
  };
  for (int64_t n = 0; n < g.batch; ++n) {
    Gemm one = g;
    one.a = matrix_at(g.a, n);
    one.b = matrix_at(g.b, n);
    one.c = matrix_at(g.c, n);
    gemm_by_definition(one, context);
  }
}

// What torch's settings and the memory of a GPU decide.
struct Device {
  bool tf32 = false;
  int64_t chunk_bytes = int64_t{1} << 25;
  std::string kernel = "stepwise";
  int64_t wait_limit = 0;
} device;
uint32_t status = 0;

// `dependent`: of a capability that has dependent launches. 0 multiprocessors: as the card has.
lstm_ext::cuda::DeviceFacts facts_of(bool dependent, int multiprocessors) {
  lstm_ext::cuda::DeviceFacts facts = lstm_ext::cuda::known_devices().front();
  facts.capability = dependent ? 90 : 80;
  if (multiprocessors != 0) facts.multiprocessors = multiprocessors;
  return facts;
}
lstm_ext::cuda::DeviceFacts facts = facts_of(false, 0);

lstm_ext::StepwiseDevice emulated_device() {
  const auto request = lstm_ext::cuda::request_named(device.kernel);
  TORCH_CHECK(request, "no kernel ", device.kernel);
  return {nullptr, &counted_gemm, nullptr, device.tf32,      device.chunk_bytes,
          &facts,  *request,      &status, device.wait_limit};
}

// Dependent launches read weights, and nothing else, before they wait. A copy that the host makes of weights is not
// known here.
std::list<simt::ConstantMemory> constants_of(const lstm_ext::LayerCall& call) {
  std::list<simt::ConstantMemory> constants;
  for (const at::Tensor& weight : call.weights) constants.emplace_back(weight.const_data_ptr(), weight.nbytes());
  return constants;
}

lstm_ext::LayerResults emulated_forward(const lstm_ext::LayerCall& call, const lstm_ext::LayerSizes& sizes, bool save) {
  const auto constants = constants_of(call);
  return lstm_ext::stepwise_forward(call, sizes, save, emulated_device());
}

lstm_ext::LayerGradients emulated_backward(const lstm_ext::LayerCall& call, const lstm_ext::LayerSizes& sizes,
                                           const lstm_ext::BackwardArguments& args) {
  const auto constants = constants_of(call);
  return lstm_ext::stepwise_backward(call, sizes, args, emulated_device());
}

// The memory of a tensor, between fences, which the race detector knows.
class FencedAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    const auto free = [](void* memory) { delete static_cast<simt::FencedMemory*>(memory); };
    auto* const memory = new simt::FencedMemory(bytes, 1, "a tensor");
    return {memory->data(), memory, free, c10::Device(c10::DeviceType::CPU)};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};

void fence_tensors() {
  static FencedAllocator allocator;
  c10::SetCPUAllocator(&allocator, /*priority=*/255);
}

at::Tensor gemm(const at::Tensor& c, const at::Tensor& a, const at::Tensor& b, bool accumulate, bool tf32) {
  gemm_by_definition(lstm_ext::describe_gemm(c, lstm_ext::gemm_operand(a), lstm_ext::gemm_operand(b), accumulate, tf32),
                     nullptr);
  return c;
}

}  // namespace

// In place of the CPU kernels: the tensors are on the CPU.
const lstm_ext::Backend& lstm_ext::cpu_backend() {
  static const Backend backend{&emulated_forward, &emulated_backward, /*saves_preactivations=*/true};
  return backend;
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  lstm_ext::python::bind_layer(m);
  m.def(
      "set_device",
      [](bool tf32, int64_t chunk_bytes, const std::string& kernel, bool dependent, int64_t wait_limit,
         int multiprocessors) {
        device = {tf32, chunk_bytes, kernel, wait_limit};
        facts = facts_of(dependent, multiprocessors);
      },
      py::arg("tf32"), py::arg("chunk_bytes"), py::arg("kernel"), py::arg("dependent") = false,
      py::arg("wait_limit") = 0, py::arg("multiprocessors") = 0);
  // From now on, of all tensors of the process.
  m.def("fence_tensors", &fence_tensors);
  // The variables SIMT_... as they are now.
  m.def("read_environment", [] { simt::options() = simt::options_of_environment(); });
  // Forgets what has been refused.
  m.def("set_cooperative_blocks", [](unsigned blocks) {
    simt::options().cooperative_blocks = blocks;
    lstm_ext::cuda::note_refused(&facts, std::nullopt);
  });
  // Since the last call: launches of kernels, and products.
  m.def("launches", [] {
    const auto counted = std::make_pair(simt::statistics().launches, products);
    simt::statistics().launches = products = 0;
    return counted;
  });
  // Of the pieces that blocks hand on, number `lost` from now on is lost; 0: none.
  m.def("lose_piece", [](uint64_t lost) {
    simt::options().lost_piece = lost;
    simt::statistics().pieces = 0;
  });
  // Since then: pieces; and of the last launch, polls. Whether a wait has expired since the last call, and the clock.
  m.def("waits", [] {
    const simt::Statistics& did = simt::statistics();
    return py::dict("pieces"_a = did.pieces, "polls"_a = did.polls_of_launch,
                    "expired"_a = std::exchange(status, 0) != 0, "clock"_a = simt::clock());
  });
  m.def("refused", [] { return std::exchange(simt::statistics().refused, 0); });
  m.def("gemm", &gemm);
}
