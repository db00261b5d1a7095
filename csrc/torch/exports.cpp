#include "torch/exports.h"

#include "cpu/kernels.h"
#include "torch/random_flags.h"

namespace lstm_ext::exports {
namespace {

template <typename T>
CpuPlan plan_of(const LayerShape& shape, int threads, bool save) {
  const cpu::Machine machine{cpu::kernels<T>().lanes, threads};
  T present{};
  ForwardParams<T> forward{};
  forward.shape = shape;
  forward.gate_values = forward.cells = forward.hidden = save ? &present : nullptr;
  BackwardParams<T> backward{};
  backward.shape = shape;
  backward.gate_values = backward.cells = backward.hidden = backward.grad_input.data = &present;
  return {machine, cpu::kernels<T>().tile_rows, cpu::plan_forward(forward, machine),
          cpu::plan_backward(backward, machine)};
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, std::vector<at::Tensor>> lstm_layer_forward(
    const at::Tensor& input, const OptionalTensor& h0, const OptionalTensor& c0, const std::vector<at::Tensor>& weights,
    const OptionalTensor& batch_sizes, bool has_bias, bool bidirectional, const Extras& extras, bool save) {
  return lstm_ext::lstm_layer_forward(input, h0, c0, weights, batch_sizes, has_bias, bidirectional, extras, save);
}

std::vector<at::Tensor> lstm_layer_backward(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                                            const OptionalTensor& grad_c_n, const at::Tensor& input,
                                            const OptionalTensor& h0, const OptionalTensor& c0,
                                            const std::vector<at::Tensor>& weights, const OptionalTensor& batch_sizes,
                                            const at::Tensor& output, const std::vector<at::Tensor>& saved,
                                            bool has_bias, bool bidirectional, const Extras& extras,
                                            const std::vector<bool>& wanted, const OptionalTensor& grad_gates,
                                            const OptionalTensor& grad_cells) {
  return lstm_ext::lstm_layer_backward(grad_output, grad_h_n, grad_c_n, input, h0, c0, weights, batch_sizes, output,
                                       saved, has_bias, bidirectional, extras, wanted, grad_gates, grad_cells);
}

at::Tensor random_flags(at::IntArrayRef sizes, double probability, int64_t seed) {
  return lstm_ext::random_flags(sizes, probability, seed);
}

std::string cpu_capability() { return cpu::capability().name; }

std::vector<std::string> cpu_capabilities() {
  const char* names[3];
  return {names, names + cpu::available_capabilities(names)};
}

void set_cpu_capability(const std::string& name) { cpu::set_capability(name.c_str()); }

CpuPlan cpu_plan(const LayerShape& shape, int threads, bool save, bool float64) {
  return float64 ? plan_of<double>(shape, threads, save) : plan_of<float>(shape, threads, save);
}

}  // namespace lstm_ext::exports
