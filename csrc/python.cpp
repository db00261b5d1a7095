// The Python entry point, and nothing else: the kernels are in _ops, which it is linked with. See lstm_ext/_C.pyi for
// the signatures.
#include <torch/extension.h>

#include "torch/exports.h"

#ifndef LSTM_EXT_VERSION
#define LSTM_EXT_VERSION "unknown"
#endif

namespace py = pybind11;
namespace exports = lstm_ext::exports;

namespace {

using at::Tensor;
using lstm_ext::OptionalTensor;

auto forward(const Tensor& input, const OptionalTensor& h0, const OptionalTensor& c0,
             const std::vector<Tensor>& weights, const OptionalTensor& batch_sizes, bool has_bias, bool bidirectional,
             bool save, const lstm_ext::Extras& extras) {
  return exports::lstm_layer_forward(input, h0, c0, weights, batch_sizes, has_bias, bidirectional, extras, save);
}

// A layer's forward pass on a sequence of one step; the axis of time is added and taken off here, where it costs less.
std::tuple<Tensor, Tensor> cell_forward(const Tensor& input, const OptionalTensor& h, const OptionalTensor& c,
                                        const std::vector<Tensor>& weights, bool has_bias) {
  const auto with_time = [](const Tensor& t) { return t.unsqueeze(0); };
  const auto if_given = [&](const OptionalTensor& t) { return t ? OptionalTensor(with_time(*t)) : std::nullopt; };
  const auto [output, h_n, c_n, saved] = exports::lstm_layer_forward(
      with_time(input), if_given(h), if_given(c), weights, std::nullopt, has_bias, false, lstm_ext::Extras{}, false);
  return {h_n.squeeze(0), c_n.squeeze(0)};
}

auto backward(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n, const OptionalTensor& grad_c_n,
              const Tensor& input, const OptionalTensor& h0, const OptionalTensor& c0,
              const std::vector<Tensor>& weights, const OptionalTensor& batch_sizes, const Tensor& output,
              const std::vector<Tensor>& saved, bool has_bias, bool bidirectional, const std::vector<bool>& wanted,
              const lstm_ext::Extras& extras, const OptionalTensor& grad_gates, const OptionalTensor& grad_cells) {
  return exports::lstm_layer_backward(grad_output, grad_h_n, grad_c_n, input, h0, c0, weights, batch_sizes, output,
                                      saved, has_bias, bidirectional, extras, wanted, grad_gates, grad_cells);
}

lstm_ext::Extras extras_of(const OptionalTensor& resets, const OptionalTensor& reset_h, const OptionalTensor& reset_c,
                           const OptionalTensor& lengths, const OptionalTensor& recurrent_mask,
                           const OptionalTensor& kept_h, const OptionalTensor& kept_c, double zoneout_h,
                           double zoneout_c, const std::vector<Tensor>& norm, bool recompute) {
  return {resets, reset_h, reset_c, lengths, recurrent_mask, kept_h, kept_c, zoneout_h, zoneout_c, norm, recompute};
}

Tensor random_flags(const std::vector<int64_t>& sizes, double probability, int64_t seed) {
  return exports::random_flags(sizes, probability, seed);
}

// How a call would be cut up with the instruction set in use; for tests and for the curious.
py::dict cpu_plan(int64_t steps, int64_t batch, int64_t input_size, int64_t hidden_size, int64_t proj_size, int threads,
                  bool save, bool float64, const std::optional<std::vector<int64_t>>& batch_sizes) {
  for (const int64_t size : {steps, batch, input_size, hidden_size, static_cast<int64_t>(threads)}) {
    TORCH_CHECK(size >= 1, "cpu_plan: expected sizes and threads of at least 1, got ", size);
  }
  TORCH_CHECK(proj_size >= 0 && proj_size < hidden_size, "cpu_plan: expected 0 <= proj_size < hidden_size, got ",
              proj_size);
  std::vector<int64_t> offsets;
  if (batch_sizes) {
    TORCH_CHECK(static_cast<int64_t>(batch_sizes->size()) == steps && batch_sizes->front() == batch,
                "cpu_plan: expected as many batch_sizes as steps, the first of them the batch");
    offsets.push_back(0);
    for (const int64_t rows : *batch_sizes) offsets.push_back(offsets.back() + rows);
  }
  const lstm_ext::LayerShape shape{steps,
                                   batch,
                                   input_size,
                                   hidden_size,
                                   proj_size > 0 ? proj_size : hidden_size,
                                   proj_size > 0,
                                   false,
                                   batch_sizes ? offsets.data() : nullptr,
                                   nullptr};
  const exports::CpuPlan plan = exports::cpu_plan(shape, threads, save, float64);
  py::dict result;
  result["lanes"] = plan.machine.lanes;
  result["tile_rows"] = plan.tile_rows;
  result["forward_batch_groups"] = plan.forward.grid.batch_groups;
  result["forward_hidden_groups"] = plan.forward.grid.hidden_groups;
  result["pack_input"] = plan.forward.pack_input;
  result["pack_recurrent"] = plan.forward.pack_recurrent;
  result["forward_chunk_rows"] = plan.forward.chunk_rows;
  result["forward_workspace_bytes"] = plan.forward.workspace_bytes;
  result["backward_batch_groups"] = plan.backward.grid.batch_groups;
  result["backward_hidden_groups"] = plan.backward.grid.hidden_groups;
  result["backward_pack"] = plan.backward.pack;
  result["backward_chunk_rows"] = plan.backward.chunk_rows;
  result["backward_workspace_bytes"] = plan.backward.workspace_bytes;
  return result;
}

py::dict build_info() {
  py::dict info;
  info["version"] = LSTM_EXT_VERSION;
  info["torch"] = TORCH_VERSION;
  info["compiler"] = __VERSION__;
#ifdef LSTM_EXT_CUDA_BUILD
  info["cuda"] = LSTM_EXT_CUDA_BUILD;
#else
  info["cuda"] = "";
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Compiled kernels of lstm_ext";
  py::class_<lstm_ext::Extras>(m, "Extras")
      .def(py::init(&extras_of), py::arg("resets") = py::none(), py::arg("reset_h") = py::none(),
           py::arg("reset_c") = py::none(), py::arg("lengths") = py::none(), py::arg("recurrent_mask") = py::none(),
           py::arg("kept_h") = py::none(), py::arg("kept_c") = py::none(), py::arg("zoneout_h") = 0.0,
           py::arg("zoneout_c") = 0.0, py::arg("norm") = std::vector<Tensor>{}, py::arg("recompute") = false);
  m.def("lstm_layer_forward", &forward, py::arg("input"), py::arg("h0"), py::arg("c0"), py::arg("weights"),
        py::arg("batch_sizes"), py::arg("has_bias"), py::arg("bidirectional"), py::arg("save"),
        py::arg("extras") = lstm_ext::Extras{}, py::call_guard<py::gil_scoped_release>());
  m.def("lstm_cell_forward", &cell_forward, py::arg("input"), py::arg("h"), py::arg("c"), py::arg("weights"),
        py::arg("has_bias"), py::call_guard<py::gil_scoped_release>());
  m.def("lstm_layer_backward", &backward, py::arg("grad_output"), py::arg("grad_h_n"), py::arg("grad_c_n"),
        py::arg("input"), py::arg("h0"), py::arg("c0"), py::arg("weights"), py::arg("batch_sizes"), py::arg("output"),
        py::arg("saved"), py::arg("has_bias"), py::arg("bidirectional"), py::arg("wanted"),
        py::arg("extras") = lstm_ext::Extras{}, py::arg("grad_gates") = py::none(), py::arg("grad_cells") = py::none(),
        py::call_guard<py::gil_scoped_release>());
  m.def("random_flags", &random_flags, py::arg("sizes"), py::arg("probability"), py::arg("seed"),
        py::call_guard<py::gil_scoped_release>());
  m.def("cpu_capability", &exports::cpu_capability);
  m.def("cpu_capabilities", &exports::cpu_capabilities);
  m.def("set_cpu_capability", &exports::set_cpu_capability, py::arg("name"));
  m.def("cpu_plan", &cpu_plan, py::kw_only(), py::arg("steps"), py::arg("batch"), py::arg("input_size"),
        py::arg("hidden_size"), py::arg("proj_size") = 0, py::arg("threads") = 1, py::arg("save") = false,
        py::arg("float64") = false, py::arg("batch_sizes") = py::none());
  m.def("build_info", &build_info);
  // Fail at import, not in the first call, if the environment names a set this CPU lacks.
  exports::cpu_capability();
}
