// The Python entry point. The kernels are in _ops, with which it is linked. lstm_ext/native/_C.pyi has the signatures.
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include <cmath>
#include <map>
#include <optional>
#include <tuple>

#include "cpu/kernels.h"
#include "cuda/gpu_plan.h"
#include "python_layer.h"
#include "python_module.h"
#include "torch/backend.h"
#include "torch/frozen.h"
#include "torch/parallel.h"
#include "torch/scratch.h"

#ifndef LSTM_EXT_VERSION
#define LSTM_EXT_VERSION "unknown"
#endif

namespace py = pybind11;
namespace cpu = lstm_ext::cpu;

namespace {

using at::Tensor;
using lstm_ext::LayerCall;
using lstm_ext::LayerResults;
using lstm_ext::python::make_call;
using lstm_ext::python::OptionalOptions;
using lstm_ext::python::OptionalTensor;
using lstm_ext::python::without_gil;

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> layer(Tensor input, OptionalTensor h0, OptionalTensor c0,
                                                         std::vector<Tensor> weights, OptionalTensor batch_sizes,
                                                         bool has_bias, bool bidirectional, OptionalOptions options) {
  LayerCall call = make_call(std::move(input), std::move(h0), std::move(c0), std::move(weights), std::move(batch_sizes),
                             has_bias, bidirectional, std::move(options));
  LayerResults results = without_gil([&] { return lstm_ext::eager_layer(call, /*step=*/false); });
  return {std::move(results.output), std::move(results.h_n), std::move(results.c_n), std::move(results.cell_states),
          std::move(results.gate_values)};
}

// Adds and removes the time axis in C++, where it costs less.
std::tuple<Tensor, Tensor> cell(Tensor input, OptionalTensor h, OptionalTensor c, std::vector<Tensor> weights,
                                bool has_bias) {
  const LayerCall call = make_call(std::move(input), std::move(h), std::move(c), std::move(weights), {}, has_bias,
                                   /*bidirectional=*/false, {});
  LayerResults results = without_gil([&] { return lstm_ext::eager_layer(call, /*step=*/true); });
  return {std::move(results.h_n), std::move(results.c_n)};
}

// Calls the differentiable backward pass, which is written in Python on top of the operators; see
// DifferentiableBackward.
std::vector<Tensor> differentiable_backward(const LayerCall& call, const lstm_ext::ResultGradients& grads,
                                            const Tensor& output, const lstm_ext::Saved& saved,
                                            const std::vector<bool>& needs_grad) {
  const py::gil_scoped_acquire gil;
  const auto or_none = [](const Tensor& t) -> py::object { return t.defined() ? py::cast(t) : py::none(); };
  py::dict options;
  const auto add = [&](const char* name, const auto& option) {
    if constexpr (std::is_same_v<std::decay_t<decltype(option)>, Tensor>) {
      if (option.defined()) options[name] = option;
    } else {
      options[name] = option;
    }
  };
  lstm_ext::visit_options(call.options, add);
  py::list given, kept;
  for (const Tensor* t : {&grads.output, &grads.h_n, &grads.c_n, &grads.cells, &grads.gate_values}) {
    given.append(or_none(*t));
  }
  lstm_ext::Saved::visit(saved, [&](const Tensor& t) { kept.append(or_none(t)); });
  const py::object result =
      py::module_::import("lstm_ext.layer.transforms")
          .attr("differentiable_backward")(call.input, or_none(call.h0), or_none(call.c0), call.weights,
                                           or_none(call.batch_sizes), call.has_bias, call.bidirectional, options, given,
                                           output, kept, needs_grad);
  std::vector<Tensor> gradients;
  for (const py::handle gradient : result) {
    gradients.push_back(gradient.is_none() ? Tensor() : py::cast<Tensor>(gradient));
  }
  return gradients;
}

std::vector<Tensor> freeze_weights(const std::vector<Tensor>& weights, bool has_bias, bool bidirectional,
                                   const std::string& kind, bool gru) {
  using lstm_ext::WeightKind;
  const bool known = kind == "own" || kind == "bfloat16" || kind == "int8";
  TORCH_CHECK_VALUE(known, "freeze_weights: kind: expected 'own', 'bfloat16' or 'int8', got '", kind, "'");
  const WeightKind chosen = kind == "own"    ? WeightKind::kOwn
                            : kind == "int8" ? WeightKind::kInt8
                                             : WeightKind::kBFloat16;
  return without_gil([&] { return lstm_ext::freeze_weights(weights, has_bias, bidirectional, chosen, gru); });
}

std::vector<std::string> cpu_capabilities() {
  const char* names[cpu::kCapabilities];
  return {names, names + cpu::library().available_capabilities(names)};
}

// The plan of a call of this shape that saves everything, or nothing, and that requests the gradients of the input and
// the weights.
template <typename T>
py::dict plan_of(const lstm_ext::LayerShape& shape, int threads, bool save, int bf16_parts) {
  const cpu::Kernels<T>& kernels = cpu::kernels<T>();
  const cpu::Machine machine{kernels.lanes, threads, kernels.engine, lstm_ext::worker_costs()};
  T present{};
  lstm_ext::ForwardParams<T> forward_params{};
  forward_params.shape = shape;
  forward_params.bf16_parts = bf16_parts;
  forward_params.gate_values = forward_params.cells = forward_params.hidden = save ? &present : nullptr;
  lstm_ext::BackwardParams<T> backward_params{};
  backward_params.shape = shape;
  backward_params.bf16_parts = bf16_parts;
  backward_params.gate_values = backward_params.cells = backward_params.hidden = &present;
  backward_params.grad_weight_ih = backward_params.grad_weight_hh = backward_params.grad_input.data = &present;
  const cpu::ForwardPlan forward = kernels.plan_forward(forward_params, machine);
  const cpu::BackwardPlan backward = kernels.plan_backward(backward_params, machine);
  py::dict result;
  result["lanes"] = machine.lanes;
  result["tile_rows"] = kernels.tile_rows;
  result["forward_batch_groups"] = forward.grid.batch_groups;
  result["forward_hidden_groups"] = forward.grid.hidden_groups;
  result["pack"] = forward.pack;
  result["pack_as_used"] = forward.pack_as_used;
  result["input_in_steps"] = forward.input_in_steps;
  result["unit_groups"] = forward.unit_groups;
  result["input_bf16_parts"] = forward.input.bf16_parts;
  result["recurrent_bf16_parts"] = forward.recurrent.bf16_parts;
  result["forward_chunk_rows"] = forward.chunk_rows;
  result["directions_at_once"] = forward.directions_at_once;
  result["backward_batch_groups"] = backward.grid.batch_groups;
  result["backward_hidden_groups"] = backward.grid.hidden_groups;
  result["backward_pack"] = backward.pack;
  result["backward_recurrent_bf16_parts"] = backward.recurrent.bf16_parts;
  result["backward_input_bf16_parts"] = backward.input.bf16_parts;
  result["outer_bf16_parts"] = backward.outer_bf16_parts;
  result["backward_chunk_rows"] = backward.chunk_rows;
  backward_params.grad_input.data = nullptr;  // the directions would add to it one after the other
  result["backward_directions_at_once"] = kernels.plan_backward(backward_params, machine).directions_at_once;
  return result;
}

// The plan of a call with the instruction set in use; for tests and for inspection.
py::dict cpu_plan(int64_t steps, int64_t batch, int64_t input_size, int64_t hidden_size, int64_t proj_size, int threads,
                  bool save, bool float64, const std::optional<std::vector<int64_t>>& batch_sizes, int bf16_parts) {
  for (const int64_t size : {steps, batch, input_size, hidden_size, static_cast<int64_t>(threads)}) {
    TORCH_CHECK(size >= 1, "cpu_plan: expected sizes and threads of at least 1, got ", size);
  }
  TORCH_CHECK(proj_size >= 0 && proj_size < hidden_size, "cpu_plan: expected 0 <= proj_size < hidden_size, got ",
              proj_size);
  TORCH_CHECK(bf16_parts >= 1 && bf16_parts <= 3, "cpu_plan: expected bf16_parts of 1, 2 or 3, got ", bf16_parts);
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
  return float64 ? plan_of<double>(shape, threads, save, bf16_parts) : plan_of<float>(shape, threads, save, bf16_parts);
}

py::dict as_dict(const lstm_ext::cuda::DeviceFacts& device) {
  py::dict result;
  result["name"] = device.name;
  result["capability"] = device.capability;
  result["multiprocessors"] = device.multiprocessors;
  result["l2_bytes"] = device.l2_bytes;
  result["shared_of_block"] = device.shared_of_block;
  result["shared"] = device.shared;
  result["most_blocks"] = device.most_blocks;
  return result;
}

py::list cuda_devices() {
  py::list result;
  for (const lstm_ext::cuda::DeviceFacts& device : lstm_ext::cuda::known_devices()) result.append(as_dict(device));
  return result;
}

py::dict cuda_facts(int device) {
  const std::optional<lstm_ext::cuda::DeviceFacts> facts = lstm_ext::cuda_facts(device);
  TORCH_CHECK(facts, "cuda_facts: this build has no CUDA kernels");
  return as_dict(*facts);
}

lstm_ext::cuda::Number number_named(const std::string& dtype, const char* who) {
  using lstm_ext::cuda::Number;
  static const std::map<std::string, Number> numbers = {{"float64", Number::kFloat64},
                                                        {"float32", Number::kFloat32},
                                                        {"float16", Number::kFloat16},
                                                        {"bfloat16", Number::kBFloat16}};
  TORCH_CHECK(numbers.count(dtype) == 1, who, ": dtype: expected float64, float32, float16 or bfloat16, got ", dtype);
  return numbers.at(dtype);
}

lstm_ext::cuda::Kernel kernel_named(const std::string& name, const char* who) {
  const auto named = lstm_ext::cuda::request_named(name);
  TORCH_CHECK_VALUE(named && !named->any, who, ": expected stepwise, step or persistent, got ", name);
  return named->kernel;
}

std::string set_cuda_measured(int device, int64_t steps, int64_t batch, int64_t hidden_size, int directions,
                              const std::string& dtype, bool tf32, bool projected, bool backward, bool packed,
                              const std::string& kernel) {
  lstm_ext::cuda::LayerFacts layer{
      steps, batch,     1,     hidden_size, directions, number_named(dtype, "set_cuda_measured"),
      tf32,  projected, false, false,       backward,   packed};
  using Kernel = lstm_ext::cuda::Kernel;
  const auto found = kernel.empty() ? std::nullopt : std::optional<Kernel>(kernel_named(kernel, "set_cuda_measured"));
  const std::optional<Kernel> before = lstm_ext::cuda::measured(device, layer);
  lstm_ext::cuda::set_measured(device, layer, found);
  return before ? lstm_ext::cuda::name_of(*before) : "";
}

py::dict cuda_plan(const py::dict& device, int64_t steps, int64_t batch, int64_t input_size, int64_t hidden_size,
                   int directions, const std::string& dtype, bool tf32, bool projected, bool normalised,
                   bool cell_options, bool backward, bool packed, bool options, const std::string& kernel,
                   const std::optional<bool>& step_outcome, const std::optional<bool>& persistent_outcome,
                   const std::string& measured) {
  using namespace lstm_ext::cuda;
  const auto integer = [&](const char* name) { return py::cast<int64_t>(device[name]); };
  const DeviceFacts facts{py::cast<std::string>(device["name"]),
                          static_cast<int>(integer("capability")),
                          static_cast<int>(integer("multiprocessors")),
                          integer("l2_bytes"),
                          integer("shared_of_block"),
                          py::cast<bool>(device["shared"])};
  for (const int64_t size : {steps, batch, input_size, hidden_size, static_cast<int64_t>(directions)}) {
    TORCH_CHECK(size >= 1, "cuda_plan: expected sizes and directions of at least 1, got ", size);
  }
  const Number number = number_named(dtype, "cuda_plan");
  const std::optional<Request> named = request_named(kernel);
  TORCH_CHECK(named, "cuda_plan: kernel: expected auto, torch, stepwise, step or persistent, got ", kernel);
  Request request = *named;
  const auto said = [](const std::optional<bool>& outcome) {
    return !outcome ? Outcome::kNotTried : *outcome ? Outcome::kRight : Outcome::kWrong;
  };
  std::tie(request.step, request.persistent) = std::make_pair(said(step_outcome), said(persistent_outcome));
  if (!measured.empty()) request.measured = kernel_named(measured, "cuda_plan");
  const bool known = device.contains("most_blocks") && integer("most_blocks") >= 0;
  request.most_blocks = known ? integer("most_blocks") : most_blocks(&facts);
  request.reasons = true;
  const Plan found = plan({steps, batch, input_size, hidden_size, directions, number, tf32, projected, normalised,
                           cell_options, backward, packed, options},
                          facts, request);
  py::dict result;
  result["kernel"] = name_of(found.kernel);
  result["problem"] = found.problem;
  result["reasons"] = found.reasons;
  result["launches"] = found.launches;
  result["products"] = found.products;
  result["rows_of_block"] = found.rows_of_block;
  result["blocks"] = found.blocks;
  result["threads"] = found.threads;
  result["shared_bytes"] = found.shared_bytes;
  result["parts_bytes"] = found.parts_bytes;
  result["step_problem"] = found.step_problem;
  py::dict persistent;
  persistent["problem"] = found.persistent.problem;
  persistent["groups"] = found.persistent.groups;
  persistent["rows"] = found.persistent.row_tiles * lstm_ext::cuda::kPersistentRows;
  persistent["extra"] = found.persistent.extra;
  persistent["blocks"] = found.persistent.blocks;
  persistent["shared_bytes"] = found.persistent.shared_bytes;
  result["persistent"] = persistent;
  return result;
}

void request(const std::string& name, void (*set)(const lstm_ext::cuda::Request*)) {
  const auto named = lstm_ext::cuda::request_named(name);
  TORCH_CHECK_VALUE(name.empty() || (named && !named->any),
                    "name: expected stepwise, step, persistent or nothing, got ", name);
  set(named ? &*named : nullptr);
}

py::dict build_info() {
  py::dict info;
  info["version"] = LSTM_EXT_VERSION;
  info["torch"] = TORCH_VERSION;
  info["compiler"] = __VERSION__;
  info["cuda"] = lstm_ext::cuda_build();
  return info;
}

}  // namespace

// The functions own what they read of lists and dicts, and lock or hold in atomics what calls share, so they need no
// GIL.
PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "Compiled kernels of lstm_ext";
  lstm_ext::python::bind_layer(m);
  m.def("lstm_layer", &layer, py::arg("input"), py::arg("h0"), py::arg("c0"), py::arg("weights"),
        py::arg("batch_sizes"), py::arg("has_bias"), py::arg("bidirectional"), py::arg("options"));
  m.def("lstm_cell", &cell, py::arg("input"), py::arg("h"), py::arg("c"), py::arg("weights"), py::arg("has_bias"));
  lstm_ext::python::bind_module_calls(m);
  lstm_ext::set_differentiable_backward(&differentiable_backward);
  m.def("freeze_weights", &freeze_weights, py::arg("weights"), py::arg("has_bias"), py::arg("bidirectional"),
        py::arg("kind"), py::arg("gru") = false);
  m.def("cpu_capability", [] { return cpu::capability().name; });
  m.def("cpu_capabilities", &cpu_capabilities);
  m.def("set_cpu_capability", &cpu::set_capability, py::arg("name"));
  m.def("cpu_plan", &cpu_plan, py::kw_only(), py::arg("steps"), py::arg("batch"), py::arg("input_size"),
        py::arg("hidden_size"), py::arg("proj_size") = 0, py::arg("threads") = 1, py::arg("save") = false,
        py::arg("float64") = false, py::arg("batch_sizes") = py::none(), py::arg("bf16_parts") = 3);
  m.def("set_worker_costs", &lstm_ext::set_worker_costs, py::arg("multiple"));
  m.def("set_cpu_wait_limit", &cpu::set_wait_limit, py::arg("seconds"));
  m.def("set_fewer_when_crowded", &lstm_ext::set_fewer_when_crowded, py::arg("wanted"));
  m.def("cuda_devices", &cuda_devices);
  m.def("cuda_plan", &cuda_plan, py::kw_only(), py::arg("device"), py::arg("steps"), py::arg("batch"),
        py::arg("input_size"), py::arg("hidden_size"), py::arg("directions") = 1, py::arg("dtype") = "float32",
        py::arg("tf32") = true, py::arg("projected") = false, py::arg("normalised") = false,
        py::arg("cell_options") = false, py::arg("backward") = false, py::arg("packed") = false,
        py::arg("options") = false, py::arg("kernel") = "auto", py::arg("step_outcome") = py::none(),
        py::arg("persistent_outcome") = py::none(), py::arg("measured") = "");
  m.def("cuda_facts", &cuda_facts, py::arg("device"));
  m.def("set_cuda_measured", &set_cuda_measured, py::kw_only(), py::arg("device"), py::arg("steps"), py::arg("batch"),
        py::arg("hidden_size"), py::arg("directions"), py::arg("dtype"), py::arg("tf32"), py::arg("projected"),
        py::arg("backward"), py::arg("packed"), py::arg("kernel"));
  m.def(
      "set_cuda_kernel", [](const std::string& name) { request(name, &lstm_ext::cuda::set_request); }, py::arg("name"));
  m.def(
      "set_cuda_kernel_of_thread",
      [](const std::string& name) { request(name, &lstm_ext::cuda::set_request_of_thread); }, py::arg("name"));
  m.def(
      "set_cuda_validated",
      [](int device, const std::string& name, bool tf32, bool validated) {
        TORCH_CHECK_VALUE(name == "step" || name == "persistent", "kernel: expected step or persistent, got ", name);
        lstm_ext::cuda::set_validated(device, lstm_ext::cuda::request_named(name)->kernel, tf32, validated);
      },
      py::arg("device"), py::arg("kernel"), py::arg("tf32"), py::arg("validated"));
  m.def(
      "set_cuda_wait_limit_of_thread",
      [](const std::optional<double>& seconds) {
        TORCH_CHECK_VALUE(!seconds || (*seconds >= 0 && *seconds < 1e9),
                          "seconds: expected a number of at least 0, got ", *seconds);
        lstm_ext::cuda::set_wait_limit_of_thread(seconds ? &*seconds : nullptr);
      },
      py::arg("seconds"));
  m.def(
      "cuda_wait_expired",
      [](const std::optional<int>& device) { return lstm_ext::cuda_wait_expired(device.value_or(0)); },
      py::arg("device"));
  m.def("release_memory", &lstm_ext::release_scratch, py::call_guard<py::gil_scoped_release>());
  m.def("worker_limit", [] {
    const lstm_ext::Limit limit = lstm_ext::worker_limit();
    return std::make_pair(limit.workers, limit.seconds);
  });
  m.def("build_info", &build_info);
  // Fail at import, not in the first call, if the environment has a bad value.
  cpu::capability();
  cpu::wait_limit();
}
