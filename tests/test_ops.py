"""The registered operators: what tracers see of them, and what a process without Python does with them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from graphs import Recorder
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn.utils.rnn import PackedSequence
from torch.utils.flop_counter import FlopCounterMode

import lstm_ext
from lstm_ext import ops, reference
from lstm_ext.native import config, loader

pytestmark = pytest.mark.devices("cpu", "cuda")

T, B, I, H, P = 5, 2, 3, 4, 2
BATCH_SIZES = [2, 2, 2, 1, 1]
# bias, bidirectional, projection, initial states, packed
CASES = {
    "plain": (True, False, False, True, False),
    "no_states": (True, False, False, False, False),
    "no_bias": (False, False, False, True, False),
    "both_directions": (True, True, False, False, False),
    "projected": (False, False, True, False, False),
    "all": (True, True, True, True, False),
    "packed": (True, True, True, True, True),
    "packed_no_states": (True, False, False, False, True),
}
every_case = pytest.mark.parametrize("case", CASES)


def arguments(case: str, requires_grad: bool = False, dtype: torch.dtype = torch.float32) -> tuple:
    """Those of lstm_layer, on plain contiguous tensors."""
    bias, bidirectional, projected, states, packed = CASES[case]
    directions, output_size = 2 if bidirectional else 1, P if projected else H

    def tensor(*sizes: int) -> Tensor:
        return torch.randn(sizes, dtype=dtype).requires_grad_(requires_grad)

    shapes = [(4 * H, I), (4 * H, output_size)]
    shapes += [(4 * H,), (4 * H,)] if bias else []
    shapes += [(P, H)] if projected else []
    weights = [tensor(*shape) for _ in range(directions) for shape in shapes]
    h0 = tensor(directions, B, output_size) if states else None
    c0 = tensor(directions, B, H) if states else None
    input = tensor(sum(BATCH_SIZES), I) if packed else tensor(T, B, I)
    batch_sizes = torch.tensor(BATCH_SIZES, device="cpu") if packed else None
    return input, h0, c0, weights, batch_sizes, bias, bidirectional


def tensors_of(args: tuple) -> list[Tensor]:
    input, h0, c0, weights, *_ = args
    return [t for t in (input, h0, c0, *weights) if t is not None]


def wanted_of(args: tuple) -> list[bool]:
    input, h0, c0, weights, *_ = args
    return [t is not None and t.requires_grad for t in (input, h0, c0, *weights)]


def backward_arguments(args: tuple, wanted: list[bool] | None = None) -> tuple:
    input, h0, c0, weights, batch_sizes, bias, bidirectional = args
    with torch.no_grad():
        results = ops.lstm_layer_forward(*args)
    if wanted is None:
        wanted = [t is not None for t in (input, h0, c0, *weights)]
    grads = [torch.randn_like(t) for t in results[:3]]
    output, saved = results[0], results[3:]
    return (*grads, input, h0, c0, weights, batch_sizes, output, *saved, bias, bidirectional, wanted)


# ---- what torch demands of an operator


@pytest.mark.parametrize("requires_grad", [False, True], ids=["", "gradients"])
@every_case
def test_layer_passes_opcheck(case: str, requires_grad: bool) -> None:
    torch.library.opcheck(ops.lstm_layer, arguments(case, requires_grad))


@every_case
def test_forward_and_backward_pass_opcheck(case: str) -> None:
    args = arguments(case)
    torch.library.opcheck(ops.lstm_layer_forward, args)
    torch.library.opcheck(ops.lstm_layer_backward, backward_arguments(args))


def test_opcheck_with_some_gradients() -> None:
    args = arguments("all")
    for t in (args[1], args[3][1]):
        t.requires_grad_()
    torch.library.opcheck(ops.lstm_layer, args)
    some = backward_arguments(args, wanted_of(args))
    detached = torch.utils._pytree.tree_map_only(Tensor, Tensor.detach, some)
    torch.library.opcheck(ops.lstm_layer_backward, (None, *detached[1:]))
    # Autograd is registered on all three; asked for a gradient, these two say that they have none.
    for op, op_args in ((ops.lstm_layer_forward, args), (ops.lstm_layer_backward, some)):
        utils = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(op, op_args, test_utils=utils)


# ---- fake kernels


def assert_same_layout(fake: list[Tensor], real: list[Tensor]) -> None:
    # What is saved has another dtype on CUDA, and a meta tensor does not know what it stands for.
    known = 3 if fake[0].is_meta and real[0].is_cuda and len(real) == 6 else len(real)
    assert [f.dtype for f in fake[:known]] == [r.dtype for r in real[:known]]
    for f, r in zip(fake, real, strict=True):
        assert f.dim() == r.dim()
        if all(isinstance(n, int) for n in f.shape):
            assert (f.shape, f.stride()) == (r.shape, r.stride())
        else:
            # Only the values of batch_sizes say how many rows a state has, if no state was given.
            assert f.is_contiguous() and r.is_contiguous()
            assert [n for i, n in enumerate(f.shape) if i != 1] == [
                n for i, n in enumerate(r.shape) if i != 1
            ]
            assert isinstance(f.shape[1], torch.SymInt) and r.shape[1] == BATCH_SIZES[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch_first", [False, True])
@every_case
def test_fake_results_look_like_real_ones(case: str, batch_first: bool, dtype: torch.dtype) -> None:
    args = arguments(case, dtype=dtype)
    if batch_first:
        # Of packed data: rows in the order of columns.
        args = (args[0].transpose(0, 1).contiguous().transpose(0, 1), *args[1:])
    backward_args = backward_arguments(args)
    for op, op_args in (
        (ops.lstm_layer, args),
        (ops.lstm_layer_forward, args),
        (ops.lstm_layer_backward, backward_args),
    ):
        real = op(*op_args)
        with FakeTensorMode(shape_env=ShapeEnv()) as mode:
            fake = op(
                *torch.utils._pytree.tree_map_only(
                    Tensor, lambda t: mode.from_tensor(t, static_shapes=True), op_args
                )
            )
        assert_same_layout(fake, real)
        on_meta = torch.utils._pytree.tree_map_only(
            Tensor, lambda t: t.to("meta") if t.is_floating_point() else t, op_args
        )
        assert_same_layout(op(*on_meta), real)


def test_fake_kernels_refuse_what_cannot_be() -> None:
    input, h0, c0, weights, *rest = torch.utils._pytree.tree_map_only(
        Tensor, lambda t: t.to("meta"), arguments("plain")
    )
    with pytest.raises(RuntimeError, match="got 3 weights, expected 4, or 5 with a projection"):
        ops.lstm_layer(input, h0, c0, weights[:3], *rest)
    with pytest.raises(RuntimeError, match="input has 2 dimensions, expected 3"):
        ops.lstm_layer(input[0], h0, c0, weights, *rest)
    results = ops.lstm_layer_forward(input, h0, c0, weights, *rest)
    backward = (*results[:3], input, h0, None, weights, None, results[0], *results[3:], True, False)
    with pytest.raises(RuntimeError, match="gradient of an initial state that was not given"):
        ops.lstm_layer_backward(*backward, [True] * 7)
    with pytest.raises(RuntimeError, match=r"wanted has 6 entries, expected 7"):
        ops.lstm_layer_backward(*backward, [True] * 6)


def test_kernel_refuses_a_wrong_wanted() -> None:
    input, h0, _, weights, *_ = args = arguments("plain")
    args = backward_arguments((input, h0, None, weights, None, True, False))
    with pytest.raises(RuntimeError, match="gradient of an initial state that was not given"):
        ops.lstm_layer_backward(*args[:-1], [True] * 7)
    with pytest.raises(RuntimeError, match="wanted has 6 entries, expected 7"):
        ops.lstm_layer_backward(*args[:-1], [True] * 6)


# ---- values and gradients


@pytest.mark.parametrize("through", [(0,), (1,), (2,), (0, 1, 2)], ids=str)
@every_case
def test_same_numbers_as_the_module(case: str, through: tuple[int, ...]) -> None:
    args = arguments(case, requires_grad=True)
    input, h0, c0, weights, batch_sizes, bias, bidirectional = args
    module = lstm_ext.LSTM(I, H, bias=bias, bidirectional=bidirectional, proj_size=P if CASES[case][2] else 0)
    names = [name for name, _ in module.named_parameters()]

    def through_module() -> list[Tensor]:
        hx = None if h0 is None else (h0, c0)
        parameters = dict(zip(names, weights, strict=True))
        x = input if batch_sizes is None else PackedSequence(input, batch_sizes)
        output, states = torch.func.functional_call(module, parameters, (x, hx))
        return [output if batch_sizes is None else output.data, *states]

    expected, actual = through_module(), ops.lstm_layer(*args)
    weightings = [torch.randn_like(t) for t in expected]
    grads = []
    for results in (expected, actual):
        loss = sum((results[i] * weightings[i]).sum() for i in through)
        grads.append(torch.autograd.grad(loss, tensors_of(args)))
    for e, a in zip((*expected, *grads[0]), (*actual, *grads[1]), strict=True):
        assert torch.equal(e, a)
    with torch.no_grad():
        for e, a in zip(expected, ops.lstm_layer(*args), strict=True):
            assert torch.equal(e, a)


@pytest.mark.parametrize("chosen", [(0,), (1, 4), (2, 3), (5, 6)], ids=str)
def test_only_wanted_gradients_are_computed(chosen: tuple[int, ...]) -> None:
    args = arguments("plain")
    for i in chosen:
        tensors_of(args)[i].requires_grad_()
    with Recorder() as recorder:
        output, _, c_n = ops.lstm_layer(*args)
        (output.sum() + c_n.sum()).backward()
    assert recorder.names == ["lstm_layer_forward", "lstm_layer_backward"]
    backward_args = recorder.calls[1][1]
    assert list(backward_args[-1]) == [i in chosen for i in range(7)]
    # No zeros are made for an output that nobody used.
    assert backward_args[1] is None and isinstance(backward_args[2], Tensor)
    assert [t.grad is not None for t in tensors_of(args)] == [i in chosen for i in range(7)]


def test_gradients_that_the_caller_does_not_ask_for() -> None:
    args = arguments("no_states", requires_grad=True)
    with Recorder() as recorder:
        output, *_ = ops.lstm_layer(*args)
        (grad,) = torch.autograd.grad(output.sum(), args[3][1])
    assert grad.shape == args[3][1].shape
    assert list(recorder.calls[1][1][-1]) == [False, False, False, False, True, False, False]


def test_nothing_is_saved_without_gradients() -> None:
    with Recorder() as recorder:
        assert not any(t.requires_grad for t in ops.lstm_layer(*arguments("plain")))
        with torch.no_grad():
            assert not any(t.requires_grad for t in ops.lstm_layer(*arguments("plain", requires_grad=True)))
        with torch.inference_mode():
            ops.lstm_layer(*arguments("plain"))
    assert recorder.names == ["lstm_layer"] * 3


def test_saved_tensors_pass_through_hooks() -> None:
    args = arguments("all", requires_grad=True)
    packed: list[Tensor] = []

    def pack(t: Tensor) -> int:
        packed.append(t.detach().clone())
        return len(packed) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda i: packed[i]):
        output, *_ = ops.lstm_layer(*args)
    grads = torch.autograd.grad(output.sum(), tensors_of(args))
    assert len(packed) == len(tensors_of(args)) + 4  # output, gates, cells, hidden
    expected = torch.autograd.grad(ops.lstm_layer(*args)[0].sum(), tensors_of(args))
    assert all(torch.equal(g, e) for g, e in zip(grads, expected, strict=True))


def test_modified_input_is_noticed() -> None:
    args = arguments("plain", requires_grad=True)
    output, *_ = ops.lstm_layer(*args)
    with torch.no_grad():
        args[0].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_second_derivatives_end_in_a_sentence() -> None:
    args = arguments("plain", requires_grad=True)
    output, *_ = ops.lstm_layer(*args)
    (grad,) = torch.autograd.grad(output.sum(), args[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"lstm_layer_backward has no gradient.*the module lstm_ext\.LSTM"):
        grad.sum().backward()

    output, *_ = ops.lstm_layer_forward(*args)
    with pytest.raises(RuntimeError, match=r"lstm_layer_forward has no gradient.*lstm_ext::lstm_layer once"):
        output.sum().backward()


def test_tangents_are_not_lost() -> None:
    input, *rest = arguments("plain")
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(input, torch.ones_like(input))
        with torch.no_grad(), pytest.raises(RuntimeError, match="jvp is not implemented"):
            ops.lstm_layer(dual, *rest)


# ---- floating-point operations


@every_case
def test_flops_are_those_of_the_products(case: str) -> None:
    args = arguments(case, requires_grad=True)
    input, h0, c0, weights, batch_sizes, bias, bidirectional = args
    counts = []
    for layer in (
        lambda: ops.lstm_layer(*args),
        lambda: reference.lstm_layer(input, h0, c0, weights, batch_sizes, bias, bidirectional),
    ):
        with FlopCounterMode(display=False) as forward:
            output, *_ = layer()
        with FlopCounterMode(display=False) as backward:
            output.sum().backward()
        counts.append((forward.get_total_flops(), backward.get_total_flops()))
    (ours, ours_backward), (theirs, theirs_backward) = counts
    if h0 is None:
        # Nothing is multiplied with an initial state of zeros, nor sent to it; the formulas are as for any step.
        directions, output_size = 2 if bidirectional else 1, P if CASES[case][2] else H
        first_step = directions * 2 * B * 4 * H * output_size
        assert ours - theirs in (0, first_step)
        assert ours_backward - theirs_backward in (0, first_step, 2 * first_step)
    else:
        assert (ours, ours_backward) == (theirs, theirs_backward)
    with FlopCounterMode(display=False) as inference, torch.no_grad():
        ops.lstm_layer(*args)
    assert inference.get_total_flops() == ours


def test_flops_of_wanted_gradients_only() -> None:
    args = backward_arguments(arguments("all"), [True, False, False] + [False, True, False, False, False] * 2)
    with FlopCounterMode(display=False) as counter:
        ops.lstm_layer_backward(*args)
    product = 2 * 2 * T * B  # both directions
    through_time = product * 4 * H * P + product * P * H
    assert counter.get_total_flops() == through_time + product * 4 * H * I + product * 4 * H * P


# ---- tracing and compiling


def step(input: Tensor, h0: Tensor | None, c0: Tensor | None, weights: list[Tensor], *flags) -> list[Tensor]:
    return [t.sin() for t in torch.ops.lstm_ext.lstm_layer(input.cos(), h0, c0, weights, *flags)]


@pytest.fixture
def no_cache():
    """torch knows a compiled graph on disk by its operators' names: one that an older build made would be found."""
    torch.compiler.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        yield


@pytest.mark.usefixtures("no_cache")
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("case", ["all", "packed", "packed_no_states"])
def test_compile(case: str, backend: str, device: str) -> None:
    if (backend, device) == ("inductor", "cuda"):
        pytest.importorskip("triton")
    args = arguments(case, requires_grad=True)
    compiled = torch.compile(step, backend=backend, fullgraph=True)
    results = [function(*args) for function in (step, compiled)]
    grads = [torch.autograd.grad(sum(t.sum() for t in r), tensors_of(args)) for r in results]
    # inductor's own sine and cosine differ in the last place.
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if backend == "inductor" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(results[1], results[0], **tolerance)
    torch.testing.assert_close(grads[1], grads[0], **tolerance)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*args), step(*args), **tolerance)


def test_compile_with_dynamic_sizes() -> None:
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=True)
    _, h0, c0, *rest = arguments("plain", requires_grad=True)
    for steps, batch in ((7, 5), (8, 6), (11, 10)):
        input = torch.randn(steps, batch, I, requires_grad=True)
        states = [t.detach()[:, :1].expand(-1, batch, -1).requires_grad_() for t in (h0, c0)]
        args = (input, *states, *rest)
        results = [function(*args) for function in (step, compiled)]
        grads = [torch.autograd.grad(sum(t.sum() for t in r), tensors_of(args)) for r in results]
        torch.testing.assert_close((results[1], grads[1]), (results[0], grads[0]), rtol=0, atol=0)
    assert counter.frame_count == 1


def targets(graph: torch.fx.Graph) -> list[str]:
    return [n.target._opname for n in graph.nodes if getattr(n.target, "namespace", "") == "lstm_ext"]


def test_make_fx_sees_both_passes() -> None:
    def gradients(*args):
        output, _, c_n = ops.lstm_layer(*args)
        return torch.autograd.grad(output.sum() + c_n.sum(), tensors_of(args))

    args = arguments("all", requires_grad=True)
    traced = make_fx(gradients, tracing_mode="symbolic")(*args)
    assert targets(traced.graph) == ["lstm_layer_forward", "lstm_layer_backward"]
    for a, e in zip(traced(*args), gradients(*args), strict=True):
        assert torch.equal(a, e)


class Layer(torch.nn.Module):
    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList(weights)

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.lstm_ext.lstm_layer(input, None, None, list(self.weights), None, True, False)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool) -> None:
    input, _, _, weights, *_ = arguments("no_states")
    module = Layer(weights)
    dynamic = {0: torch.export.Dim("time"), 1: torch.export.Dim("batch")}
    program = torch.export.export(module, (input,), dynamic_shapes={"input": dynamic}, strict=strict)
    assert targets(program.graph) == ["lstm_layer"]
    longer = torch.randn(T + 2, B + 1, I)
    for a, e in zip(program.module()(longer), module(longer), strict=True):
        assert torch.equal(a, e)
    assert targets(program.run_decompositions().graph) == ["lstm_layer"]


# ---- the library itself


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True
    )


@pytest.mark.devices("cpu")
def test_module_of_the_operators_finds_the_extension() -> None:
    code = "import lstm_ext.ops as o, torch; print(o.lstm_layer is torch.ops.lstm_ext.lstm_layer.default)"
    run = run_python(code)
    assert run.stdout.strip() == "True", run.stderr
    run = run_python("import lstm_ext.ops", LSTM_EXT_BACKEND="reference")
    assert run.returncode == 1
    assert "ImportError: lstm_ext.ops needs the compiled extension" in run.stderr.splitlines()[-1]


@pytest.mark.devices("cpu")
def test_library_without_its_python_module() -> None:
    """A process that loads the operators only, e.g. to run an exported program, computes with them."""
    code = f"""if True:
        import torch
        torch.ops.load_library({loader.status().ops_path!r})
        weights = [torch.ones(4, 1), torch.ones(4, 1), torch.zeros(4), torch.zeros(4)]
        layer = torch.ops.lstm_ext.lstm_layer
        output, _, _ = layer(torch.ones(1, 1, 1), None, None, weights, None, True, False)
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
    ours = [name for name in exported if "8lstm_ext7exports" in name]
    assert len(ours) == 7


# at::lstm is the known result.
CPP = r"""
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <dlfcn.h>
#include <fstream>
#include <iostream>

using at::Tensor;
using Optional = std::optional<Tensor>;
using Layer = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Optional&, const Optional&, at::TensorList,
                                                 const Optional&, bool, bool);

#define REQUIRE(condition) \
  if (!(condition)) { std::cerr << #condition << " is false\n"; return 1; }

int main(int, char** argv) {
  if (dlopen(argv[1], RTLD_NOW) == nullptr) { std::cerr << dlerror() << "\n"; return 1; }
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("lstm_ext::lstm_layer", "").typed<Layer>();

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

  const auto ours = op.call(input, h0, c0, weights, std::nullopt, true, true);
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


def run_cpp(code: str, directory: Path, *arguments: str | None) -> subprocess.CompletedProcess[str]:
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


@pytest.mark.devices("cpu")
def test_cpp_program_calls_the_operators(tmp_path: Path) -> None:
    run = run_cpp(CPP, tmp_path, loader.status().ops_path)
    assert (run.returncode, run.stdout) == (0, "computed without Python\n"), run.stderr


CPP_PACKAGE = r"""
#include <ATen/ATen.h>
#include <dlfcn.h>
#include <iostream>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

int main(int, char** argv) {
  if (dlopen(argv[1], RTLD_NOW) == nullptr) { std::cerr << dlerror() << "\n"; return 1; }
  torch::inductor::AOTIModelPackageLoader loader(argv[2]);
  const at::Tensor input = at::linspace(-1, 1, 7 * 2 * 3).reshape({7, 2, 3});
  for (const at::Tensor& t : loader.run({input})) std::cout << t.sum().item<double>() << "\n";
}
"""


@pytest.mark.devices("cpu")
@pytest.mark.full
@pytest.mark.usefixtures("no_cache")
def test_cpp_program_runs_a_compiled_package(tmp_path: Path) -> None:
    input, _, _, weights, *_ = arguments("no_states")
    module = Layer(weights).requires_grad_(False)
    program = torch.export.export(module, (input,), dynamic_shapes={"input": {0: torch.export.Dim("time")}})
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    run = run_cpp(CPP_PACKAGE, tmp_path, loader.status().ops_path, package)
    assert run.returncode == 0, run.stderr
    expected = module(torch.linspace(-1, 1, 7 * 2 * 3).reshape(7, 2, 3))
    sums = torch.tensor([float(line) for line in run.stdout.split()])
    torch.testing.assert_close(sums, torch.stack([t.sum() for t in expected]), rtol=1e-4, atol=1e-4)


@pytest.mark.devices("cpu")
@pytest.mark.full
@pytest.mark.usefixtures("no_cache")
@pytest.mark.parametrize("wanted", ["one", "all"])
def test_compile_with_a_cpp_wrapper(wanted: str) -> None:
    args = arguments("all", requires_grad=wanted == "all")
    args[0].requires_grad_()
    inputs = [t for t in tensors_of(args) if t.requires_grad]
    with torch._inductor.config.patch(cpp_wrapper=True):
        results = [function(*args) for function in (step, torch.compile(step, fullgraph=True))]
        grads = [torch.autograd.grad(sum(t.sum() for t in r), inputs) for r in results]
    torch.testing.assert_close((results[1], grads[1]), (results[0], grads[0]), rtol=1e-5, atol=1e-6)
