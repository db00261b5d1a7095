"""The registered operators in graphs, and the library that has them, in a process without Python too."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import forks
import pytest
import torch
from operator_cases import Operands, make
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.fx.experimental.proxy_tensor import make_fx

from lstm_ext import ops
from lstm_ext.native import config, loader

pytestmark = [pytest.mark.devices("cpu", "cuda"), pytest.mark.slow]


# ---- tracing and compiling


def step(layer: tuple, options: dict[str, Any]) -> list[Tensor]:
    """The results of the operator that were requested."""
    input, *others = layer
    requested = (
        True,
        True,
        True,
        options.get("return_cell_states", False),
        options.get("return_gates", False),
    )
    results = torch.ops.lstm_ext.lstm_layer(input.cos(), *others, **options)
    return [t.sin() for t, r in zip(results, requested, strict=True) if r]


def gradients(results: list[Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(sum(t.sum() for t in results), inputs)


@pytest.fixture
def no_cache():
    """torch knows a compiled graph on disk by its operators' names: one that an older build made would be found."""
    torch.compiler.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        yield


def for_inductor(case: Operands) -> tuple[Operands, dict[str, float]]:
    """Inductor's own sine and cosine differ in the last place. Layer normalisation makes of it any size in float32."""
    if "norm" not in case.options:
        return case, {"rtol": 1e-5, "atol": 1e-6}
    needed = [t.requires_grad for t in case.leaves]
    case = case.with_tensors(lambda t: t.detach().double() if t.is_floating_point() else t)
    for t, requires_grad in zip(case.leaves, needed, strict=True):
        t.requires_grad_(requires_grad)
    return case, {"rtol": 1e-9, "atol": 1e-10}


GRAPHS = ("both directions, projected", "packed", "packed, no states", "all", "shares")


@pytest.mark.tools  # ten seconds a graph
@pytest.mark.usefixtures("no_cache")
@pytest.mark.parametrize("name", GRAPHS)
def test_inductor(name: str, device: str) -> None:
    if device == "cuda":
        pytest.importorskip("triton")
    case, tolerance = for_inductor(make(name, requires_grad=True))
    compiled = torch.compile(step, fullgraph=True)
    results = [function(case.layer, case.options) for function in (step, compiled)]
    grads = [gradients(r, case.leaves) for r in results]
    torch.testing.assert_close((results[1], grads[1]), (results[0], grads[0]), **tolerance)
    with torch.no_grad():
        inference = compiled(case.layer, case.options)
        torch.testing.assert_close(inference, step(case.layer, case.options), **tolerance)


def nodes(graph: torch.fx.Graph) -> list[torch.fx.Node]:
    return [n for n in graph.nodes if getattr(n.target, "namespace", "") == "lstm_ext"]


def targets(graph: torch.fx.Graph) -> list[str]:
    return [n.target._opname for n in nodes(graph)]


@pytest.mark.parametrize("name", ["both directions, projected", "plain", "reset state"])
def test_make_fx_sees_both_passes(name: str) -> None:
    case = make(name, requires_grad=True)

    input, h0, c0, weights, *flags = case.layer
    tensors = {k: v for k, v in case.options.items() if isinstance(v, Tensor)}
    inputs = (input, h0, c0, *weights, *tensors.values())

    def both(*inputs):
        given = dict(zip(tensors, inputs[3 + len(weights) :], strict=True))
        layer = (*inputs[:3], list(inputs[3 : 3 + len(weights)]), *flags)
        output, _, c_n, *_ = ops.lstm_layer(*layer, **{**case.options, **given})
        return torch.autograd.grad(output.sum() + c_n.sum(), inputs[: 3 + len(weights)])

    traced = make_fx(both, tracing_mode="symbolic")(*inputs)
    assert targets(traced.graph) == ["lstm_layer_forward", "lstm_layer_backward"]
    # A graph shows what is set and nothing else.
    forward, backward = nodes(traced.graph)
    assert set(forward.kwargs) == set(case.options)
    absent = {k for k, v in backward.kwargs.items() if v is None}
    assert not absent & set(case.options)
    for a, e in zip(traced(*inputs), both(*inputs), strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("name", ["plain", "both directions, projected", "norm", "shares"])
def test_compiled_autograd_traces_the_backward_operator(name: str) -> None:
    case = make(name, requires_grad=True)
    graphs: list[torch.fx.GraphModule] = []

    def keep(module: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(module)
        return module

    backend = aot_autograd(fw_compiler=keep)
    expected = gradients(step(case.layer, case.options), case.leaves)
    for t in case.leaves:
        t.grad = None
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend=backend, fullgraph=True)):
        sum(t.sum() for t in step(case.layer, case.options)).backward()
    names = [str(n.target) for g in graphs for n in g.graph.nodes]
    assert any("lstm_layer_backward" in name for name in names)
    for t, e in zip(case.leaves, expected, strict=True):
        torch.testing.assert_close(t.grad, e, rtol=0, atol=0)


# ---- the library itself


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True
    )


@pytest.mark.devices("cpu")
def test_module_of_the_operators_finds_the_extension() -> None:
    code = "import lstm_ext.ops as o, torch; print(o.lstm_layer is torch.ops.lstm_ext.lstm_layer.default)"
    there, missing = forks.run(code, {}, {"LSTM_EXT_BACKEND": "reference"})
    assert there.stdout.strip() == "True", there.stderr
    assert missing.returncode == 1
    assert "ImportError: lstm_ext.ops needs the compiled extension" in missing.stderr.splitlines()[-1]


@pytest.mark.devices("cpu")
def test_library_without_its_python_module() -> None:
    """A process that loads the operators only, e.g. to run an exported program, computes with them."""
    code = f"""if True:
        import torch
        torch.ops.load_library({loader.status().ops_path!r})
        weights = [torch.ones(4, 1), torch.ones(4, 1), torch.zeros(4), torch.zeros(4)]
        layer = torch.ops.lstm_ext.lstm_layer
        output, *_ = layer(torch.ones(1, 1, 1), None, None, weights, None, True, False)
        one = torch.ones(())
        expected = one.sigmoid() * (one.sigmoid() * one.tanh()).tanh()
        torch.testing.assert_close(output.reshape(()), expected)
        try:
            layer(torch.ones(1, 1, 1, device="meta"), None, None, weights, None, True, False)
        except NotImplementedError as error:
            print(error)
    """
    run = run_python(code)
    assert run.returncode == 0, run.stderr
    assert "lstm_ext.layer.operators" in run.stdout


def dynamic_symbols(path: str, *options: str) -> list[str]:
    run = subprocess.run(["nm", "-D", *options, path], capture_output=True, text=True, check=True)
    return [line.split()[-1] for line in run.stdout.splitlines()]


@pytest.mark.devices("cpu")
def test_library_needs_no_python() -> None:
    path = loader.status().ops_path
    header = subprocess.run(["readelf", "-d", path], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", header)
    assert "libtorch_cpu.so" in needed
    assert not [name for name in needed if "python" in name]
    undefined = dynamic_symbols(path, "--undefined-only")
    assert not [name for name in undefined if name.startswith(("Py", "_Py"))]
    # It lends its name space to nobody: what it exports, but for weak C++ templates, is ours.
    exported = dynamic_symbols(path, "--defined-only", "--no-weak")
    ours = [name for name in exported if "8lstm_ext" in name]
    assert len(ours) == 53


# at::lstm is the known result.
CPP = r"""
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <dlfcn.h>
#include <fstream>
#include <iostream>

using at::Tensor;

#define REQUIRE(condition) \
  if (!(condition)) { std::cerr << #condition << " is false\n"; return 1; }

int main(int, char** argv) {
  if (dlopen(argv[1], RTLD_NOW) == nullptr) { std::cerr << dlerror() << "\n"; return 1; }
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("lstm_ext::lstm_layer", "");
  // The options have defaults.
  const auto layer = [&](auto... arguments) {
    torch::jit::Stack stack;
    torch::jit::push(stack, arguments...);
    const auto& schema = op.schema().arguments();
    while (stack.size() < schema.size()) stack.push_back(*schema[stack.size()].default_value());
    op.callBoxed(stack);
    return std::make_tuple(stack[0].toTensor(), stack[1].toTensor(), stack[2].toTensor());
  };

  const auto random = [](at::IntArrayRef sizes) { return at::randn(sizes, at::kDouble).requires_grad_(); };
  const Tensor input = random({5, 2, 3}), h0 = random({2, 2, 4}), c0 = random({2, 2, 4});
  std::vector<Tensor> inputs{input, h0, c0}, weights;
  for (int direction = 0; direction < 2; ++direction) {
    for (at::IntArrayRef sizes : {at::IntArrayRef{16, 3}, {16, 4}, {16}, {16}}) weights.push_back(random(sizes));
  }
  inputs.insert(inputs.end(), weights.begin(), weights.end());
  const auto gradients = [&](const std::tuple<Tensor, Tensor, Tensor>& results) {
    const auto& [output, h_n, c_n] = results;
    for (Tensor& t : inputs) t.mutable_grad() = Tensor();
    (output.sin().sum() + h_n.sum() + c_n.cos().sum()).backward();
    std::vector<Tensor> grads;
    for (Tensor& t : inputs) grads.push_back(t.grad());
    return grads;
  };

  const auto ours = layer(input, h0, c0, weights, std::nullopt, true, true);
  const auto theirs = at::lstm(input, {h0, c0}, weights, true, 1, 0.0, true, true, false);
  REQUIRE(at::allclose(std::get<0>(ours), std::get<0>(theirs)));
  REQUIRE(at::allclose(std::get<1>(ours), std::get<1>(theirs)));
  REQUIRE(at::allclose(std::get<2>(ours), std::get<2>(theirs)));
  const auto our_gradients = gradients(ours), their_gradients = gradients(theirs);
  for (size_t i = 0; i < inputs.size(); ++i) REQUIRE(at::allclose(our_gradients[i], their_gradients[i]));

  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    REQUIRE(line.find("libpython") == std::string::npos && line.find("torch_python") == std::string::npos);
  }
  std::cout << "computed without Python\n";
}
"""


def run_cpp(code: str, directory: Path, *arguments: Any) -> subprocess.CompletedProcess[str]:
    from torch.utils.cpp_extension import include_paths, library_paths

    command, _ = config.find_compiler()
    source, program = directory / "program.cpp", directory / "program"
    source.write_text(code)
    libraries = [flag for path in library_paths() for flag in (f"-L{path}", f"-Wl,-rpath,{path}")]
    build = [command, "-std=c++20", "-O0", *(f"-isystem{path}" for path in include_paths()), str(source)]
    # torch, which brings torch_cuda where there is one
    build += [*libraries, "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10", "-ldl", "-o", str(program)]
    subprocess.run(build, check=True)
    return subprocess.run([str(program), *map(str, arguments)], capture_output=True, text=True)


@pytest.mark.tools
@pytest.mark.devices("cpu")
def test_cpp_program_calls_the_operators(tmp_path: Path) -> None:
    run = run_cpp(CPP, tmp_path, loader.status().ops_path)
    assert (run.returncode, run.stdout) == (0, "computed without Python\n"), run.stderr


@pytest.mark.devices("cpu")
@pytest.mark.full
@pytest.mark.usefixtures("no_cache")
@pytest.mark.parametrize("requested", ["one", "all"])
@pytest.mark.parametrize("name", ["both directions, projected", "all"])
def test_compile_with_a_cpp_wrapper(name: str, requested: str) -> None:
    case = make(name, requires_grad=requested == "all")
    case.input.requires_grad_()
    case, tolerance = for_inductor(case)
    inputs = [t for t in case.leaves if t.requires_grad]
    with torch._inductor.config.patch(cpp_wrapper=True):
        results = [f(case.layer, case.options) for f in (step, torch.compile(step, fullgraph=True))]
        grads = [gradients(r, inputs) for r in results]
    torch.testing.assert_close((results[1], grads[1]), (results[0], grads[0]), **tolerance)


def test_the_import_loads_what_was_built() -> None:
    """So the first call need not wait for it."""
    program = "import sys, lstm_ext; print('lstm_ext.native._C' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout == "True\n", run.stderr
