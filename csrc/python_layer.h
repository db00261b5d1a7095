// How Python passes one call of a layer: what csrc/python.cpp binds, and the module of the tests that runs the CUDA
// kernels under an emulator. lstm_ext/native/_C.pyi has the signatures.
#pragma once

#include <torch/extension.h>

#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "torch/layer_call.h"

namespace lstm_ext::python {

namespace py = pybind11;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
// Not a pointer: pybind takes half a microsecond to see that None is one.
using OptionalOptions = std::optional<LayerOptions>;

// None is an undefined tensor, in both directions.
inline Tensor or_undefined(OptionalTensor&& tensor) { return tensor ? std::move(*tensor) : Tensor(); }

// Calls a function without the GIL. The arguments of a call are outside of it: a tensor that Python owns takes the GIL
// when C++ lets go of it.
template <typename Function>
auto without_gil(const Function& function) {
  const py::gil_scoped_release no_gil;
  return function();
}

inline LayerOptions make_options(OptionalTensor resets, OptionalTensor reset_h, OptionalTensor reset_c,
                                 OptionalTensor lengths, OptionalTensor recurrent_mask, OptionalTensor keep_h,
                                 OptionalTensor keep_c, double zoneout_h, double zoneout_c, std::vector<Tensor> norm,
                                 bool return_cell_states, bool return_gates, bool recompute) {
  return {or_undefined(std::move(resets)), or_undefined(std::move(reset_h)), or_undefined(std::move(reset_c)),
          or_undefined(std::move(lengths)), or_undefined(std::move(recurrent_mask)), or_undefined(std::move(keep_h)),
          or_undefined(std::move(keep_c)), zoneout_h, zoneout_c, std::move(norm), return_cell_states, return_gates,
          // Gates that are returned are there anyway.
          recompute && !return_gates};
}

inline LayerCall make_call(Tensor&& input, OptionalTensor&& h0, OptionalTensor&& c0, std::vector<Tensor>&& weights,
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

inline std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, std::optional<SavedTensors>> forward(
    Tensor input, OptionalTensor h0, OptionalTensor c0, std::vector<Tensor> weights, OptionalTensor batch_sizes,
    bool has_bias, bool bidirectional, OptionalOptions options, bool save) {
  const LayerCall call = make_call(std::move(input), std::move(h0), std::move(c0), std::move(weights),
                                   std::move(batch_sizes), has_bias, bidirectional, std::move(options));
  LayerResults results = without_gil([&] { return lstm_layer_forward(call, save); });
  std::optional<SavedTensors> saved;
  if (save) {
    Saved& s = results.saved;
    saved.emplace(std::move(s.gates), std::move(s.cells), std::move(s.hidden), std::move(s.norm_products),
                  std::move(s.norm_factors));
  }
  return {std::move(results.output),      std::move(results.h_n),         std::move(results.c_n),
          std::move(results.cell_states), std::move(results.gate_values), std::move(saved)};
}

using OptionalTensors = std::tuple<OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor>;

inline std::vector<Tensor> backward(Tensor input, OptionalTensor h0, OptionalTensor c0, std::vector<Tensor> weights,
                                    OptionalTensor batch_sizes, bool has_bias, bool bidirectional,
                                    OptionalOptions options, OptionalTensor grad_output, OptionalTensor grad_h_n,
                                    OptionalTensor grad_c_n, OptionalTensor grad_cell_states,
                                    OptionalTensor grad_gate_values, const Tensor& output, OptionalTensors saved,
                                    const std::vector<bool>& needs_grad) {
  const LayerCall call = make_call(std::move(input), std::move(h0), std::move(c0), std::move(weights),
                                   std::move(batch_sizes), has_bias, bidirectional, std::move(options));
  const ResultGradients grads{or_undefined(std::move(grad_output)), or_undefined(std::move(grad_h_n)),
                              or_undefined(std::move(grad_c_n)), or_undefined(std::move(grad_cell_states)),
                              or_undefined(std::move(grad_gate_values))};
  const Saved saved_tensors =
      std::apply([](auto&... tensors) { return Saved{or_undefined(std::move(tensors))...}; }, saved);
  return without_gil([&] {
    return list_gradients(lstm_layer_backward(call, grads, output, saved_tensors, read_needs_grad(call, needs_grad)));
  });
}

// Two modules of one process may both bind the class: each knows its own.
inline void bind_layer(py::module_& m) {
  py::class_<LayerOptions>(m, "LayerOptions", py::module_local())
      .def(py::init(&make_options), py::kw_only(), py::arg("resets") = py::none(), py::arg("reset_h") = py::none(),
           py::arg("reset_c") = py::none(), py::arg("lengths") = py::none(), py::arg("recurrent_mask") = py::none(),
           py::arg("keep_h") = py::none(), py::arg("keep_c") = py::none(), py::arg("zoneout_h") = 0.0,
           py::arg("zoneout_c") = 0.0, py::arg("norm") = py::tuple(), py::arg("return_cell_states") = false,
           py::arg("return_gates") = false, py::arg("recompute") = false);
  m.def("lstm_layer_forward", &forward, py::arg("input"), py::arg("h0"), py::arg("c0"), py::arg("weights"),
        py::arg("batch_sizes"), py::arg("has_bias"), py::arg("bidirectional"), py::arg("options"), py::arg("save"));
  m.def("lstm_layer_backward", &backward, py::arg("input"), py::arg("h0"), py::arg("c0"), py::arg("weights"),
        py::arg("batch_sizes"), py::arg("has_bias"), py::arg("bidirectional"), py::arg("options"),
        py::arg("grad_output"), py::arg("grad_h_n"), py::arg("grad_c_n"), py::arg("grad_cell_states"),
        py::arg("grad_gate_values"), py::arg("output"), py::arg("saved"), py::arg("needs_grad"));
}

}  // namespace lstm_ext::python
