// The modules' calls from Python: plain layers or a cell, with the user's arguments and without options. The arguments
// are read without pybind, which would take as long as a step of a small layer. lstm_ext/native/_C.pyi has the
// signatures.
#pragma once

#include <ATen/ATen.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/PyInterpreter.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "python_layer.h"
#include "torch/checks.h"
#include "torch/layer_call.h"

namespace lstm_ext::python {

// The tensor of an object whose type is exactly Tensor, else null.
inline const Tensor* plain_tensor(PyObject* object) {
  if (!THPVariable_CheckExact(object)) return nullptr;
  const Tensor& tensor = THPVariable_Unpack(object);
  constexpr c10::DispatchKeySet kWrappers(
      {c10::DispatchKey::Python, c10::DispatchKey::Functionalize, c10::DispatchKey::FuncTorchGradWrapper});
  return tensor.is_cpu() && !tensor.key_set().has_any(kWrappers) ? &tensor : nullptr;
}

// The layout of a module's data; Layout.code in lstm_ext/call/layout.py.
struct ModuleLayout {
  explicit ModuleLayout(int64_t code) : batch_first(code == 1), unbatched(code == 2 || code == 4), step(code >= 3) {}

  int64_t rank() const { return 3 - (unbatched ? 1 : 0) - (step ? 1 : 0); }
  // Converts to the layers' layout, time first with a batch; the next function converts back.
  Tensor time_first(Tensor t) const {
    if (batch_first) return t.transpose(0, 1);
    if (step) t = t.unsqueeze(0);
    return unbatched ? t.unsqueeze(1) : t;
  }
  Tensor as_given(Tensor t) const {
    if (batch_first) return t.transpose(0, 1);
    if (unbatched) t = t.squeeze(1);
    return step ? t.squeeze(0) : t;
  }
  Tensor batched_state(const Tensor& t) const { return unbatched && t.defined() ? t.unsqueeze(1) : t; }
  Tensor state_as_given(const Tensor& t) const { return unbatched ? t.squeeze(1) : t; }

  bool batch_first, unbatched, step;
};

// Whether a torch function mode is on, which sees what goes through the dispatcher; is_watched in
// lstm_ext/layer/tracing.py. The mode of torch.set_default_device looks at functions that make tensors only.
inline bool is_watched() {
  using Modes = at::impl::PythonTorchFunctionTLS;
  if (!at::impl::torch_function_mode_enabled()) return false;
  for (int64_t i = 0; i < Modes::stack_len(); ++i) {
    PyObject* mode = Modes::get_stack_at(i)->ptr(getPyInterpreter());
    if (std::strcmp(Py_TYPE(mode)->tp_name, "DeviceContext") != 0) return true;
  }
  return false;
}
inline bool is_plain_call() {
  return is_plain_context() && !at::autocast::is_autocast_enabled(at::kCPU) && !is_watched();
}
inline bool has_kernel(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf;
}
inline bool needs_gradient(const Tensor& t) { return t.defined() && t.requires_grad(); }
inline bool any_needs_gradient(const std::vector<Tensor>& tensors) {
  return std::any_of(tensors.begin(), tensors.end(), needs_gradient);
}
// Without gradients nobody sees the views that a call makes, so they skip autograd, which is most of their time.
struct ViewsUnlessTracked {
  explicit ViewsUnlessTracked(bool tracked) {
    if (!tracked || !at::GradMode::is_enabled()) below_autograd.emplace();
  }
  std::optional<at::AutoDispatchBelowADInplaceOrView> below_autograd;
};
inline py::object wrapped(const Tensor& t) { return py::reinterpret_steal<py::object>(THPVariable_Wrap(t)); }

// The items of a list or tuple, which lives as long as this does. In a Python without the GIL another thread may change
// a list meanwhile, so there they are those of a copy, which owns them.
class Items {
 public:
  explicit Items(PyObject* sequence) {
#ifdef Py_GIL_DISABLED
    if (PyList_CheckExact(sequence)) {
      copy_ = py::reinterpret_steal<py::object>(PyList_AsTuple(sequence));
      if (!copy_) throw py::error_already_set();
      sequence = copy_.ptr();
    }
#endif
    items_ = PySequence_Fast_ITEMS(sequence);
    size_ = static_cast<size_t>(PySequence_Fast_GET_SIZE(sequence));
  }

  size_t size() const { return size_; }
  PyObject* operator[](size_t i) const { return items_[i]; }
  PyObject* const* begin() const { return items_; }
  PyObject* const* end() const { return items_ + size_; }

 private:
#ifdef Py_GIL_DISABLED
  py::object copy_;
#endif
  PyObject* const* items_;
  size_t size_;
};

// Reads a tuple or list of two tensors, or the only state of a GRU: read(i, tensor) returns whether a tensor fits.
template <typename Read>
inline bool read_states(PyObject* hx, bool gru, const Read& read) {
  if (gru) {
    const Tensor* const state = plain_tensor(hx);
    return state && read(0, *state);
  }
  if (!(PyTuple_CheckExact(hx) || PyList_CheckExact(hx))) return false;
  const Items states(hx);
  if (states.size() != 2) return false;
  for (int i = 0; i < 2; ++i) {
    const Tensor* const state = plain_tensor(states[i]);
    if (!state || !read(i, *state)) return false;
  }
  return true;
}

struct ModuleCall {
  ModuleLayout layout{0};
  Tensor input, h0, c0;           // the user's tensors; the states are those of all layers
  std::vector<LayerCall> layers;  // without input and states

  bool is_gru() const { return layers[0].options.gru; }
};

// Reads the arguments of lstm_module. Returns false if the call does not fit this path, or if an argument is wrong.
inline bool read_module_call(PyObject* const* args, ModuleCall& call) {
  if (!is_plain_call()) return false;
  PyObject *const hx = args[1], *const weights = args[2], *const options = args[3];
  int64_t numbers[4];
  for (int i = 0; i < 4; ++i) {
    int overflow = 0;
    if (!PyLong_CheckExact(args[4 + i])) return false;
    numbers[i] = PyLong_AsLongLongAndOverflow(args[4 + i], &overflow);
    if (overflow != 0) return false;
  }
  if (!PyBool_Check(args[8]) || !PyBool_Check(args[9])) return false;
  const auto [layout, input_size, hidden_size, proj_size] = numbers;
  call.layout = ModuleLayout(layout);
  const bool has_bias = args[8] == Py_True, bidirectional = args[9] == Py_True;

  const Tensor* const input = plain_tensor(args[0]);
  const int64_t rank = call.layout.rank();
  if (!input || input->dim() != rank || input->size(-1) != input_size) return false;
  const at::ScalarType dtype = input->scalar_type();
  if (!has_kernel(dtype)) return false;
  if (!call.layout.step && input->size(call.layout.batch_first ? 1 : 0) == 0) return false;
  call.input = *input;

  if (!PyList_CheckExact(weights) || (options != Py_None && !PyList_CheckExact(options))) return false;
  const Items by_layer(weights);
  const size_t count = by_layer.size();
  if (count == 0) return false;
  std::optional<Items> options_by_layer;
  if (options != Py_None && options_by_layer.emplace(options).size() != count) return false;
  call.layers.resize(count);
  for (size_t k = 0; k < count; ++k) {
    LayerCall& layer = call.layers[k];
    layer.has_bias = has_bias;
    layer.bidirectional = bidirectional;
    if (!PyList_CheckExact(by_layer[k])) return false;
    const Items of_layer(by_layer[k]);
    layer.weights.reserve(of_layer.size());
    for (PyObject* const item : of_layer) {
      const Tensor* const weight = plain_tensor(item);
      if (!weight || weight->scalar_type() != dtype) return false;
      layer.weights.push_back(*weight);
    }
    if (options_by_layer) layer.options = py::cast<const LayerOptions&>(py::handle((*options_by_layer)[k]));
  }

  if (hx == Py_None) return true;
  const int64_t sets = static_cast<int64_t>(count) * (bidirectional ? 2 : 1);
  const bool unbatched = call.layout.unbatched;
  const int64_t batch = unbatched ? 1 : input->size(call.layout.batch_first ? 0 : rank - 2);
  const int64_t features[] = {proj_size > 0 ? proj_size : hidden_size, hidden_size};
  return read_states(hx, call.is_gru(), [&](int i, const Tensor& state) {
    (i == 0 ? call.h0 : call.c0) = state;
    return state.scalar_type() == dtype && state.dim() == (unbatched ? 2 : 3) && state.size(0) == sets &&
           state.size(-1) == features[i] && (unbatched || state.size(1) == batch);
  });
}

// Returns output, h_n and c_n, in the user's layout; c_n is no result of a GRU.
inline std::tuple<Tensor, Tensor, Tensor> run_module_call(ModuleCall& call) {
  bool tracked = needs_gradient(call.input) || needs_gradient(call.h0) || needs_gradient(call.c0);
  for (const LayerCall& layer : call.layers) tracked = tracked || any_needs_gradient(layer.weights);
  const ViewsUnlessTracked views(tracked);
  const ModuleLayout& layout = call.layout;
  const size_t count = call.layers.size();
  const Tensor h0 = layout.batched_state(call.h0), c0 = layout.batched_state(call.c0);
  Tensor data = layout.time_first(call.input), h_n, c_n;
  std::vector<Tensor> all_h, all_c;
  for (size_t k = 0; k < count; ++k) {
    LayerCall layer = call.layers[k];
    const auto of_layer = [&](const Tensor& states) {
      const int64_t directions = layer.bidirectional ? 2 : 1;
      return count == 1 || !states.defined() ? states
                                             : states.narrow(0, static_cast<int64_t>(k) * directions, directions);
    };
    layer.input = std::move(data);
    layer.h0 = of_layer(h0);
    layer.c0 = of_layer(c0);
    LayerResults results = eager_layer(std::move(layer), /*step=*/false);
    data = std::move(results.output);
    h_n = std::move(results.h_n);
    c_n = std::move(results.c_n);
    if (count > 1) {
      all_h.push_back(h_n);
      all_c.push_back(c_n);
    }
  }
  if (count > 1) {
    h_n = at::cat(all_h);
    c_n = at::cat(all_c);
  }
  return {layout.as_given(std::move(data)), layout.state_as_given(h_n), layout.state_as_given(c_n)};
}

// (input, hx, weights, options, layout, input_size, hidden_size, proj_size, has_bias, bidirectional)
inline PyObject* lstm_module(PyObject* /*self*/, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count == 10, "lstm_module: expected 10 arguments, got ", count);
  ModuleCall call;
  if (!read_module_call(args, call)) Py_RETURN_NONE;
  const std::tuple<Tensor, Tensor, Tensor> results = without_gil([&] { return run_module_call(call); });
  const py::object output = wrapped(std::get<0>(results));
  const py::object h_n = wrapped(std::get<1>(results));
  if (call.is_gru()) return py::make_tuple(output, h_n).release().ptr();
  const py::object c_n = wrapped(std::get<2>(results));
  return py::make_tuple(output, py::make_tuple(h_n, c_n)).release().ptr();
  END_HANDLE_TH_ERRORS
}

// The same for a cell: (B, I) and (B, H), or without the B; weight_ih, weight_hh, and both biases or twice None.
inline bool read_cell_call(PyObject* const* args, LayerCall& call) {
  if (!is_plain_call()) return false;
  PyObject *const hx = args[1], *const weights = args[2];
  call.options.gru = args[3] == Py_True;
  const Tensor* const input = plain_tensor(args[0]);
  if (!input || (input->dim() != 1 && input->dim() != 2) || !has_kernel(input->scalar_type())) return false;
  call.input = *input;
  if (!PyList_CheckExact(weights)) return false;
  const Items given(weights);
  if (given.size() != 4) return false;
  call.has_bias = given[2] != Py_None || given[3] != Py_None;
  call.weights.reserve(4);
  for (int i = 0; i < (call.has_bias ? 4 : 2); ++i) {
    const Tensor* const weight = plain_tensor(given[i]);
    if (!weight || weight->scalar_type() != input->scalar_type()) return false;
    call.weights.push_back(*weight);
  }
  if (call.weights[1].dim() != 2) return false;
  const int64_t hidden_size = call.weights[1].size(1);
  if (hidden_size == 0 ||
      call.weights[0].sizes() != at::IntArrayRef{gates_of(call.options) * hidden_size, input->size(-1)})
    return false;
  return hx == Py_None || read_states(hx, call.options.gru, [&](int i, const Tensor& state) {
           const bool fits = state.scalar_type() == input->scalar_type() && state.dim() == input->dim() &&
                             state.size(0) == (input->dim() == 2 ? input->size(0) : hidden_size) &&
                             state.size(-1) == hidden_size;
           (i == 0 ? call.h0 : call.c0) = state;
           return fits;
         });
}

// (input, hx, weights, gru): h and c, or h of a GRU
inline PyObject* lstm_cell_module(PyObject* /*self*/, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count == 4, "lstm_cell_module: expected 4 arguments, got ", count);
  LayerCall call;
  if (!read_cell_call(args, call)) Py_RETURN_NONE;
  const std::pair<Tensor, Tensor> states = without_gil([&] {
    const ViewsUnlessTracked views(needs_gradient(call.input) || needs_gradient(call.h0) || needs_gradient(call.c0) ||
                                   any_needs_gradient(call.weights));
    LayerCall batched = call;
    const bool unbatched = call.input.dim() == 1;
    for (Tensor* t : {&batched.input, &batched.h0, &batched.c0}) {
      if (unbatched && t->defined()) *t = t->unsqueeze(0);
    }
    const LayerResults results = eager_layer(std::move(batched), /*step=*/true);
    return unbatched ? std::make_pair(results.h_n.squeeze(0), results.c_n.squeeze(0))
                     : std::make_pair(results.h_n, results.c_n);
  });
  if (call.options.gru) return wrapped(states.first).release().ptr();
  return py::make_tuple(wrapped(states.first), wrapped(states.second)).release().ptr();
  END_HANDLE_TH_ERRORS
}

// A number that changes with each change in place that torch counts, and with each other memory: of a list for each
// layer of its weights.
inline PyObject* weights_stamp(PyObject* /*self*/, PyObject* weights) {
  HANDLE_TH_ERRORS
  if (!PyList_CheckExact(weights)) throw py::type_error("weights_stamp: expected a list of lists of Tensors");
  uint64_t stamp = 0;
  for (PyObject* const layer : Items(weights)) {
    if (!PyList_CheckExact(layer)) throw py::type_error("weights_stamp: expected a list of lists of Tensors");
    for (PyObject* const item : Items(layer)) {
      if (!THPVariable_CheckExact(item) && !THPVariable_Check(item))
        throw py::type_error("weights_stamp: expected a list of lists of Tensors");
      const Tensor& weight = THPVariable_Unpack(item);
      // Tensors of the inference mode have no counter, and those of transforms no memory.
      const uint64_t version = weight.is_inference() ? 0 : weight._version();
      const uint64_t place = weight.has_storage() ? reinterpret_cast<uintptr_t>(weight.const_data_ptr()) : 0;
      stamp = stamp * 1000003 + version + (place << 8);
    }
  }
  return PyLong_FromUnsignedLongLong(stamp);
  END_HANDLE_TH_ERRORS
}

inline void bind_module_calls(py::module_& m) {
  const auto bind = [&](PyMethodDef& method) {
    m.add_object(method.ml_name, py::reinterpret_steal<py::object>(PyCFunction_NewEx(&method, nullptr, nullptr)));
  };
  const auto as_method = [](auto* function) {
    return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
  };
  static PyMethodDef layers = {"lstm_module", as_method(&lstm_module), METH_FASTCALL, nullptr};
  static PyMethodDef cell = {"lstm_cell_module", as_method(&lstm_cell_module), METH_FASTCALL, nullptr};
  static PyMethodDef stamp = {"weights_stamp", &weights_stamp, METH_O, nullptr};
  bind(layers);
  bind(cell);
  bind(stamp);
}

}  // namespace lstm_ext::python
