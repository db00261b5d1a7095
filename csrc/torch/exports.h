// What the operators' library (_ops) offers to the Python module (_C) directly, past the dispatcher: a call through
// it costs microseconds that a small layer would notice. All else in _ops is hidden.
#pragma once

#include <string>
#include <vector>

#include "cpu/plan.h"
#include "torch/lstm_layer.h"

#define LSTM_EXT_EXPORT __attribute__((visibility("default")))

namespace lstm_ext::exports {

// As lstm_ext::lstm_layer_forward and lstm_ext::lstm_layer_backward.
LSTM_EXT_EXPORT std::tuple<at::Tensor, at::Tensor, at::Tensor, std::vector<at::Tensor>> lstm_layer_forward(
    const at::Tensor& input, const OptionalTensor& h0, const OptionalTensor& c0, const std::vector<at::Tensor>& weights,
    const OptionalTensor& batch_sizes, bool has_bias, bool bidirectional, const Extras& extras, bool save);
LSTM_EXT_EXPORT std::vector<at::Tensor> lstm_layer_backward(
    const OptionalTensor& grad_output, const OptionalTensor& grad_h_n, const OptionalTensor& grad_c_n,
    const at::Tensor& input, const OptionalTensor& h0, const OptionalTensor& c0, const std::vector<at::Tensor>& weights,
    const OptionalTensor& batch_sizes, const at::Tensor& output, const std::vector<at::Tensor>& saved, bool has_bias,
    bool bidirectional, const Extras& extras, const std::vector<bool>& wanted, const OptionalTensor& grad_gates,
    const OptionalTensor& grad_cells);

// As lstm_ext::random_flags.
LSTM_EXT_EXPORT at::Tensor random_flags(at::IntArrayRef sizes, double probability, int64_t seed);

// The instruction set in use, those that this CPU runs, and the choice of another one.
LSTM_EXT_EXPORT std::string cpu_capability();
LSTM_EXT_EXPORT std::vector<std::string> cpu_capabilities();
LSTM_EXT_EXPORT void set_cpu_capability(const std::string& name);

// How a call would be cut up with the instruction set in use.
struct CpuPlan {
  cpu::Machine machine;
  int64_t tile_rows;
  cpu::ForwardPlan forward;
  cpu::BackwardPlan backward;
};
LSTM_EXT_EXPORT CpuPlan cpu_plan(const LayerShape& shape, int threads, bool save, bool float64);

}  // namespace lstm_ext::exports
