// The Python entry point, and nothing else: the kernels are in _ops, which it is linked with. See
// lstm_ext/native/_C.pyi for the signatures.
#include <torch/extension.h>

#include "cpu/kernels.h"
#include "torch/layer_call.h"
#include "torch/random_flags.h"

#ifndef LSTM_EXT_VERSION
#define LSTM_EXT_VERSION "unknown"
#endif

namespace py = pybind11;
namespace cpu = lstm_ext::cpu;

namespace {

using at::Tensor;
using lstm_ext::LayerCall;
using lstm_ext::LayerOptions;
using lstm_ext::LayerResults;
using lstm_ext::ResultGradients;
using lstm_ext::Saved;
using OptionalTensor = std::optional<Tensor>;
// Not a pointer: pybind takes half a microsecond to see that None is one.
using OptionalOptions = std::optional<LayerOptions>;

// None is an undefined tensor, in both directions.
Tensor or_undefined(OptionalTensor&& tensor) { return tensor ? std::move(*tensor) : Tensor(); }

// Calls a function without the GIL. The arguments of a call are outside of it: a tensor that Python owns takes the GIL
// when C++ lets go of it.
template <typename Function>
auto without_gil(const Function& function) {
  const py::gil_scoped_release no_gil;
  return function();
}

LayerOptions make_options(OptionalTensor resets, OptionalTensor reset_h, OptionalTensor reset_c, OptionalTensor lengths,
                          OptionalTensor recurrent_mask, OptionalTensor keep_h, OptionalTensor keep_c, double zoneout_h,
                          double zoneout_c, std::vector<Tensor> norm, bool return_cell_states, bool return_gates,
                          bool recompute) {
  return {or_undefined(std::move(resets)), or_undefined(std::move(reset_h)), or_undefined(std::move(reset_c)),
          or_undefined(std::move(lengths)), or_undefined(std::move(recurrent_mask)), or_undefined(std::move(keep_h)),
          or_undefined(std::move(keep_c)), zoneout_h, zoneout_c, std::move(norm), return_cell_states, return_gates,
          // Gates that are returned are there anyway.
          recompute && !return_gates};
}

LayerCall make_call(Tensor&& input, OptionalTensor&& h0, OptionalTensor&& c0, std::vector<Tensor>&& weights,
                    OptionalTensor&& batch_sizes, bool has_bias, bool bidirectional, OptionalOptions&& options) {
  LayerCall call;
  call.input = std::move(input);
  if (h0) call.h0 = std::move(*h0);
  if (c0) call.c0 = std::move(*c0);
  call.weights = std::move(weights);
  if (batch_sizes) call.batch_sizes = std::move(*batch_sizes);
  call.has_bias = has_bias;
  call.bidirectional = bidirectional;
  if (options) call.options = std::move(*options);
  return call;
}

using SavedTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, std::optional<SavedTensors>> forward(
    Tensor input, OptionalTensor h0, OptionalTensor c0, std::vector<Tensor> weights, OptionalTensor batch_sizes,
    bool has_bias, bool bidirectional, OptionalOptions options, bool save) {
  const LayerCall call = make_call(std::move(input), std::move(h0), std::move(c0), std::move(weights),
                                   std::move(batch_sizes), has_bias, bidirectional, std::move(options));
  LayerResults results = without_gil([&] { return lstm_ext::lstm_layer_forward(call, save); });
  std::optional<SavedTensors> saved;
  if (save) {
    Saved& s = results.saved;
    saved.emplace(std::move(s.gates), std::move(s.cells), std::move(s.hidden), std::move(s.norm_products),
                  std::move(s.norm_factors));
  }
  return {std::move(results.output),      std::move(results.h_n),         std::move(results.c_n),
          std::move(results.cell_states), std::move(results.gate_values), std::move(saved)};
}

// A layer's forward pass on a sequence of one step. The axis of time is added and taken off here, where it costs less.
std::tuple<Tensor, Tensor> cell_forward(const Tensor& input, const OptionalTensor& h, const OptionalTensor& c,
                                        std::vector<Tensor> weights, bool has_bias) {
  LayerCall call;
  call.weights = std::move(weights);
  call.has_bias = has_bias;
  return without_gil([&]() -> std::tuple<Tensor, Tensor> {
    call.input = input.unsqueeze(0);
    if (h) call.h0 = h->unsqueeze(0);
    if (c) call.c0 = c->unsqueeze(0);
    const LayerResults results = lstm_ext::lstm_layer_forward(call, /*save=*/false);
    return {results.h_n.squeeze(0), results.c_n.squeeze(0)};
  });
}

using OptionalTensors = std::tuple<OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor>;

std::vector<Tensor> backward(Tensor input, OptionalTensor h0, OptionalTensor c0, std::vector<Tensor> weights,
                             OptionalTensor batch_sizes, bool has_bias, bool bidirectional, OptionalOptions options,
                             OptionalTensor grad_output, OptionalTensor grad_h_n, OptionalTensor grad_c_n,
                             OptionalTensor grad_cell_states, OptionalTensor grad_gate_values, const Tensor& output,
                             OptionalTensors saved, const std::vector<bool>& needs_grad) {
  const LayerCall call = make_call(std::move(input), std::move(h0), std::move(c0), std::move(weights),
                                   std::move(batch_sizes), has_bias, bidirectional, std::move(options));
  const ResultGradients grads{or_undefined(std::move(grad_output)), or_undefined(std::move(grad_h_n)),
                              or_undefined(std::move(grad_c_n)), or_undefined(std::move(grad_cell_states)),
                              or_undefined(std::move(grad_gate_values))};
  const Saved saved_tensors =
      std::apply([](auto&... tensors) { return Saved{or_undefined(std::move(tensors))...}; }, saved);
  return without_gil([&] {
    return lstm_ext::list_gradients(
        lstm_ext::lstm_layer_backward(call, grads, output, saved_tensors, lstm_ext::read_needs_grad(call, needs_grad)));
  });
}

std::vector<std::string> cpu_capabilities() {
  const char* names[3];
  return {names, names + cpu::available_capabilities(names)};
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
  const cpu::Capability& capability = cpu::capability();
  const cpu::Machine machine{float64 ? capability.f64.lanes : capability.f32.lanes,
                             static_cast<int64_t>(float64 ? sizeof(double) : sizeof(float)), threads};
  const cpu::ForwardPlan forward = cpu::plan_forward(shape, machine, save);
  const cpu::BackwardPlan backward = cpu::plan_backward(shape, machine, /*want_grad_input=*/true);
  py::dict result;
  result["lanes"] = machine.lanes;
  result["tile_rows"] = float64 ? capability.f64.tile_rows : capability.f32.tile_rows;
  result["forward_batch_groups"] = forward.grid.batch_groups;
  result["forward_hidden_groups"] = forward.grid.hidden_groups;
  result["pack_input"] = forward.pack_input;
  result["pack_recurrent"] = forward.pack_recurrent;
  result["forward_chunk_rows"] = forward.chunk_rows;
  result["forward_workspace_bytes"] = forward.workspace_bytes;
  result["backward_batch_groups"] = backward.grid.batch_groups;
  result["backward_hidden_groups"] = backward.grid.hidden_groups;
  result["backward_pack"] = backward.pack;
  result["backward_chunk_rows"] = backward.chunk_rows;
  result["backward_workspace_bytes"] = backward.workspace_bytes;
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
  py::class_<LayerOptions>(m, "LayerOptions")
      .def(py::init(&make_options), py::kw_only(), py::arg("resets") = py::none(), py::arg("reset_h") = py::none(),
           py::arg("reset_c") = py::none(), py::arg("lengths") = py::none(), py::arg("recurrent_mask") = py::none(),
           py::arg("keep_h") = py::none(), py::arg("keep_c") = py::none(), py::arg("zoneout_h") = 0.0,
           py::arg("zoneout_c") = 0.0, py::arg("norm") = py::tuple(), py::arg("return_cell_states") = false,
           py::arg("return_gates") = false, py::arg("recompute") = false);
  m.def("lstm_layer_forward", &forward, py::arg("input"), py::arg("h0"), py::arg("c0"), py::arg("weights"),
        py::arg("batch_sizes"), py::arg("has_bias"), py::arg("bidirectional"), py::arg("options"), py::arg("save"));
  m.def("lstm_cell_forward", &cell_forward, py::arg("input"), py::arg("h"), py::arg("c"), py::arg("weights"),
        py::arg("has_bias"));
  m.def("lstm_layer_backward", &backward, py::arg("input"), py::arg("h0"), py::arg("c0"), py::arg("weights"),
        py::arg("batch_sizes"), py::arg("has_bias"), py::arg("bidirectional"), py::arg("options"),
        py::arg("grad_output"), py::arg("grad_h_n"), py::arg("grad_c_n"), py::arg("grad_cell_states"),
        py::arg("grad_gate_values"), py::arg("output"), py::arg("saved"), py::arg("needs_grad"));
  m.def(
      "random_flags",
      [](const std::vector<int64_t>& sizes, double probability, int64_t seed) {
        return lstm_ext::random_flags(sizes, probability, seed);
      },
      py::arg("sizes"), py::arg("probability"), py::arg("seed"), py::call_guard<py::gil_scoped_release>());
  m.def("cpu_capability", [] { return cpu::capability().name; });
  m.def("cpu_capabilities", &cpu_capabilities);
  m.def("set_cpu_capability", &cpu::set_capability, py::arg("name"));
  m.def("cpu_plan", &cpu_plan, py::kw_only(), py::arg("steps"), py::arg("batch"), py::arg("input_size"),
        py::arg("hidden_size"), py::arg("proj_size") = 0, py::arg("threads") = 1, py::arg("save") = false,
        py::arg("float64") = false, py::arg("batch_sizes") = py::none());
  m.def("build_info", &build_info);
  // Fail at import, not in the first call, if the environment names a set this CPU lacks.
  cpu::capability();
}
