// How Python passes one call of a layer. csrc/python.cpp binds it, and so does the tests' module that runs the CUDA
// kernels under an emulator. lstm_ext/native/_C.pyi has the signatures.
#pragma once

#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "torch/layer_call.h"

namespace lstm_ext::python {

namespace py = pybind11;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
// Not a pointer: pybind takes half a microsecond to see that None is one.
using OptionalOptions = std::optional<LayerOptions>;

// Converts None to an undefined tensor and back.
inline Tensor or_undefined(OptionalTensor&& tensor) { return tensor ? std::move(*tensor) : Tensor(); }

// Calls a function without the GIL. The arguments of a call must live outside: C++ takes the GIL to release a tensor
// that Python owns.
template <typename Function>
auto without_gil(const Function& function) {
  const py::gil_scoped_release no_gil;
  return function();
}

template <typename Option>
constexpr const char* kind_of_option() {
  if constexpr (std::is_same_v<Option, Tensor>) return "a Tensor or None";
  if constexpr (std::is_same_v<Option, std::vector<Tensor>>) return "a sequence of Tensors";
  if constexpr (std::is_same_v<Option, std::string>) return "a string";
  return std::is_same_v<Option, bool> ? "a bool" : "a number";
}

// Reads options by name; options that are not given keep their defaults.
inline LayerOptions make_options(const py::kwargs& given) {
  LayerOptions options;
  // A list of its own, since in a Python without the GIL another thread may change the dict.
  for (const py::handle item : py::reinterpret_steal<py::list>(PyDict_Items(given.ptr()))) {
    const auto pair = py::reinterpret_borrow<py::tuple>(item);
    const auto key = py::cast<std::string>(pair[0]);
    const py::object value = pair[1];
    bool known = false;
    visit_options(options, [&](const char* name, auto& option) {
      using Option = std::decay_t<decltype(option)>;
      if (key != name) return;
      known = true;
      if (std::is_same_v<Option, Tensor> && value.is_none()) return;
      try {
        option = py::cast<Option>(value);
      } catch (const py::cast_error&) {
        throw py::type_error("LayerOptions: " + key + ": expected " + kind_of_option<Option>() + ", got " +
                             Py_TYPE(value.ptr())->tp_name);
      }
    });
    if (!known) throw py::type_error("LayerOptions: there is no option " + key);
  }
  if (options.return_gates) options.recompute = false;  // returned gates exist anyway
  return options;
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
  return without_gil([&] { return lstm_layer_backward(call, grads, output, saved_tensors, needs_grad); });
}

// Two modules of one process may both bind the class: each uses its own.
inline void bind_layer(py::module_& m) {
  py::class_<LayerOptions>(m, "LayerOptions", py::module_local()).def(py::init(&make_options));
  m.def("lstm_layer_forward", &forward, py::arg("input"), py::arg("h0"), py::arg("c0"), py::arg("weights"),
        py::arg("batch_sizes"), py::arg("has_bias"), py::arg("bidirectional"), py::arg("options"), py::arg("save"));
  m.def("lstm_layer_backward", &backward, py::arg("input"), py::arg("h0"), py::arg("c0"), py::arg("weights"),
        py::arg("batch_sizes"), py::arg("has_bias"), py::arg("bidirectional"), py::arg("options"),
        py::arg("grad_output"), py::arg("grad_h_n"), py::arg("grad_c_n"), py::arg("grad_cell_states"),
        py::arg("grad_gate_values"), py::arg("output"), py::arg("saved"), py::arg("needs_grad"));
}

}  // namespace lstm_ext::python
