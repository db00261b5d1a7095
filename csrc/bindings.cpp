// The Python entry point; see lstm_ext/_C.pyi for the signatures.
#include <torch/extension.h>

#include "cpu/kernels.h"
#include "glue/lstm_layer.h"

#ifndef LSTM_EXT_VERSION
#define LSTM_EXT_VERSION "unknown"
#endif

namespace py = pybind11;

namespace {

std::vector<std::string> cpu_capabilities() {
  const char* names[3];
  return {names, names + lstm_ext::cpu::available_capabilities(names)};
}

py::dict build_info() {
  py::dict info;
  info["version"] = LSTM_EXT_VERSION;
  info["torch"] = TORCH_VERSION;
  info["compiler"] = __VERSION__;
  return info;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Compiled kernels of lstm_ext";
  m.def("lstm_layer_forward", &lstm_ext::lstm_layer_forward, py::arg("input"), py::arg("h0"), py::arg("c0"),
        py::arg("weights"), py::arg("has_bias"), py::arg("bidirectional"), py::arg("save"),
        py::call_guard<py::gil_scoped_release>());
  m.def("lstm_layer_backward", &lstm_ext::lstm_layer_backward, py::arg("grad_output"), py::arg("grad_h_n"),
        py::arg("grad_c_n"), py::arg("input"), py::arg("h0"), py::arg("c0"), py::arg("weights"), py::arg("output"),
        py::arg("saved"), py::arg("has_bias"), py::arg("bidirectional"), py::arg("wanted"),
        py::call_guard<py::gil_scoped_release>());
  m.def("cpu_capability", [] { return std::string(lstm_ext::cpu::capability().name); });
  m.def("cpu_capabilities", &cpu_capabilities);
  m.def("set_cpu_capability", [](const std::string& name) { lstm_ext::cpu::set_capability(name.c_str()); },
        py::arg("name"));
  m.def("build_info", &build_info);
  // Fail at import, not in the first call, if the environment names a set this CPU lacks.
  lstm_ext::cpu::capability();
}
