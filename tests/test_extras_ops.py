"""The operators of a layer with extras: what torch demands of them, who calls them, and what a graph holds of them."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch
from graphs import Graphs, assert_layers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from torch.func import functional_call, grad, jacrev, stack_module_state, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

import lstm_ext
from lstm_ext import autograd, ops, reference
from lstm_ext._extras import OPERANDS, LayerExtras

T, B, I, H, P = 5, 3, 2, 4, 2
BATCH_SIZES = [3, 2, 2, 1, 1]
OP = "lstm_layer_with_extras"


class Case:
    """One layer and its extras, as the operators take them."""

    def __init__(
        self,
        *extras: str,
        bias: bool = True,
        bidirectional: bool = False,
        projected: bool = False,
        states: bool = True,
        packed: bool = False,
        dtype: torch.dtype = torch.float32,
        requires_grad: bool = False,
    ) -> None:
        directions, state = 2 if bidirectional else 1, P if projected else H
        wide = torch.float32 if dtype.itemsize == 2 else dtype

        def draw(*sizes: int) -> Tensor:
            return torch.randn(sizes, dtype=torch.float64).to(dtype).requires_grad_(requires_grad)

        rows = (sum(BATCH_SIZES),) if packed else (T, B)
        self.bias, self.bidirectional = bias, bidirectional
        self.batch_sizes = torch.tensor(BATCH_SIZES) if packed else None
        self.input = draw(*rows, I)
        self.h0, self.c0 = (draw(directions, B, state), draw(directions, B, H)) if states else (None, None)
        shapes = [(4 * H, I), (4 * H, state)] + [(4 * H,)] * (2 * bias) + [(P, H)] * projected
        self.weights = [draw(*shape) for _ in range(directions) for shape in shapes]
        flags = torch.rand(rows) < 0.3
        lengths = torch.tensor([4, 0, 5])
        if "lengths" in extras and not packed:
            flags &= torch.arange(T).unsqueeze(1) < lengths
        values = {
            "resets": flags,
            "reset_h": draw(directions, B, state),
            "reset_c": draw(directions, B, H),
            "lengths": lengths,
            "recurrent_mask": (torch.rand(directions, B, state) < 0.5).to(wide) * 2,
            "kept_h": torch.rand(directions, *rows, state) < 0.3,
            "kept_c": torch.rand(directions, *rows, H) < 0.3,
            "zoneout_h": 0.2,
            "zoneout_c": 0.3,
            "norm": [draw(size) for _ in range(directions) for size in [4 * H, 4 * H, H] + [H] * bias],
        }
        absent = {"zoneout_h": 0.0, "zoneout_c": 0.0, "norm": []}
        self.operands = [values[name] if name in extras else absent.get(name) for name in OPERANDS]
        self.asked = ("cells" in extras, "gates" in extras)

    @property
    def layer(self) -> tuple:
        """Of all three operators."""
        plain = (self.input, self.h0, self.c0, self.weights, self.batch_sizes, self.bias, self.bidirectional)
        return (*plain, *self.operands)

    @property
    def arguments(self) -> tuple:
        return (*self.layer, *self.asked)

    @property
    def differentiable(self) -> list[Tensor | None]:
        of = dict(zip(OPERANDS, self.operands, strict=True))
        return [self.input, self.h0, self.c0, *self.weights, of["reset_h"], of["reset_c"], *of["norm"]]

    def backward_arguments(self, wanted: Sequence[bool] | None = None) -> tuple:
        with torch.no_grad():
            results = ops.lstm_layer_with_extras_forward(*self.arguments)
        there = [t is not None for t in self.differentiable]
        grads = [torch.randn_like(t) if t.dim() > 1 else None for t in results[:5]]
        return (*self.layer, *grads, results[0], *results[5:], there if wanted is None else list(wanted))

    def through(self, function, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Values and gradients of a function like `reference.lstm_layer`, in another dtype if it is given."""

        def cast(t: Tensor | None) -> Tensor | None:
            return t.to(dtype) if dtype is not None and t is not None and t.is_floating_point() else t

        extras = LayerExtras.from_operands(self.operands, *self.asked)
        constants = extras.constants()
        leaves = [None if t is None else cast(t.detach()).requires_grad_() for t in self.differentiable]
        count = len(self.weights)
        reset_h, reset_c, *norm = leaves[3 + count :]
        extras = extras.without_tensors().with_constants([cast(t) for t in constants], reset_h, reset_c, norm)
        arguments = (
            *leaves[:3],
            leaves[3 : 3 + count],
            self.batch_sizes,
            self.bias,
            self.bidirectional,
            extras,
        )
        values = [y for y in function(*arguments) if y is not None]
        generator = torch.Generator().manual_seed(1)
        grads = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype) for y in values]
        wanted = [t for t in leaves if t is not None]
        return [
            *values,
            *torch.autograd.grad(values, wanted, grads, allow_unused=True, materialize_grads=True),
        ]


# What the layer is, and with which extras. Where no kernel serves them, the operator does not.
ALL_RESETS = ("resets", "reset_h", "reset_c")
CASES = {
    "resets": lambda **o: Case("resets", **o),
    "reset state": lambda **o: Case(*ALL_RESETS, "cells", bidirectional=True, projected=True, **o),
    "lengths": lambda **o: Case("lengths", "gates", bidirectional=True, states=False, **o),
    "lengths, resets": lambda **o: Case("lengths", *ALL_RESETS, "cells", "gates", bias=False, **o),
    "packed": lambda **o: Case(*ALL_RESETS, "cells", "gates", bidirectional=True, packed=True, **o),
    "packed, no states": lambda **o: Case("resets", packed=True, states=False, **o),
    "recurrent dropout": lambda **o: Case("recurrent_mask", "lengths", bidirectional=True, **o),
    "zoneout": lambda **o: Case("kept_h", "kept_c", "cells", bidirectional=True, projected=True, **o),
    "zoneout, packed": lambda **o: Case("kept_h", "kept_c", "resets", "recurrent_mask", packed=True, **o),
    "shares": lambda **o: Case("zoneout_h", "zoneout_c", "lengths", "gates", **o),
    "norm": lambda **o: Case("norm", "lengths", "cells", "gates", bidirectional=True, **o),
    "norm, no bias": lambda **o: Case("norm", *ALL_RESETS, bias=False, projected=True, **o),
    "all": lambda **o: Case(*OPERANDS[:7], "norm", "cells", "gates", bidirectional=True, projected=True, **o),
}


def make(name: str, **options) -> Case:
    return CASES[name](**options)


def is_served(name: str) -> bool:
    case = make(name)
    return LayerExtras.from_operands(case.operands, *case.asked).have_kernels(torch.device("cpu"))


SERVED = [name for name in CASES if is_served(name)]
every_case = pytest.mark.parametrize("name", SERVED)


@pytest.fixture
def no_equations(monkeypatch):
    monkeypatch.setattr(reference, "_equations", lambda *_: pytest.fail("the equations ran"))


class Recorder(TorchDispatchMode):
    """The calls of this library's operators, below autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "lstm_ext":
            self.calls.append((func._opname, args))
        return func(*args, **(kwargs or {}))

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.calls]


# ---- what torch demands of an operator


@every_case
def test_opcheck(name):
    case = make(name)
    torch.library.opcheck(ops.lstm_layer_with_extras, case.arguments)
    torch.library.opcheck(ops.lstm_layer_with_extras, make(name, requires_grad=True).arguments)
    torch.library.opcheck(ops.lstm_layer_with_extras_forward, case.arguments)
    torch.library.opcheck(ops.lstm_layer_with_extras_backward, case.backward_arguments())


def test_the_ends_have_no_gradient():
    case = make("reset state", requires_grad=True)
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.lstm_layer_with_extras_forward, case.arguments, test_utils=utils)
    torch.library.opcheck(ops.lstm_layer_with_extras_backward, case.backward_arguments(), test_utils=utils)
    with pytest.raises(RuntimeError, match=f"{OP}_forward has no gradient of its own"):
        ops.lstm_layer_with_extras_forward(*case.arguments)[3].sum().backward()
    (first,) = torch.autograd.grad(
        ops.lstm_layer_with_extras(*case.arguments)[0].sum(), case.input, create_graph=True
    )
    with pytest.raises(RuntimeError, match=rf"{OP}_backward has no gradient.*the module lstm_ext\.LSTM"):
        first.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@every_case
def test_fake_results_look_like_real_ones(name, dtype):
    case = make(name, dtype=dtype)
    for op, arguments in (
        (ops.lstm_layer_with_extras, case.arguments),
        (ops.lstm_layer_with_extras_forward, case.arguments),
        (ops.lstm_layer_with_extras_backward, case.backward_arguments()),
    ):
        real = op(*arguments)
        with FakeTensorMode(shape_env=ShapeEnv()) as mode:
            fake = op(
                *tree_map_only(Tensor, lambda t, m=mode: m.from_tensor(t, static_shapes=True), arguments)
            )
        on_meta = op(
            *tree_map_only(Tensor, lambda t: t.to("meta") if t is not case.batch_sizes else t, arguments)
        )
        for result in (fake, on_meta):
            for f, r in zip(result, real, strict=True):
                assert f.dtype == r.dtype
                if all(isinstance(n, int) for n in f.shape):  # else only the batch sizes know the batch
                    assert (f.shape, f.stride()) == (r.shape, r.stride())
                else:
                    assert name == "packed, no states" and f.dim() == r.dim()


def test_wrong_arguments_are_refused():
    case = make("lengths, resets")
    arguments = case.backward_arguments()
    on_meta = tree_map_only(Tensor, lambda t: t.to("meta"), arguments)
    for a in (arguments, on_meta):
        with pytest.raises(RuntimeError, match="wanted has 3 entries, expected 7"):
            ops.lstm_layer_with_extras_backward(*a[:-1], [True] * 3)
    case = Case("resets", states=False)
    arguments = case.backward_arguments()
    for a in (arguments, tree_map_only(Tensor, lambda t: t.to("meta"), arguments)):
        with pytest.raises(RuntimeError, match="the gradient of a state that was not given"):
            ops.lstm_layer_with_extras_backward(*a[:-1], [True] * 9)
    case = Case("lengths", packed=True)
    with pytest.raises(RuntimeError, match="got lengths and batch_sizes, expected one of them"):
        ops.lstm_layer_with_extras(*case.arguments)
    with pytest.raises(RuntimeError, match="got lengths and batch_sizes, expected one of them"):
        ops.lstm_layer_with_extras(*tree_map_only(Tensor, lambda t: t.to("meta"), case.arguments))


# ---- values and gradients


def error(x: Tensor, expected: Tensor) -> float:
    return ((x.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


@every_case
def test_numbers(name):
    """Of the operator, and of the functions for transforms, at every route's own precision."""
    for dtype in (torch.float64, torch.float32):
        case = make(name, dtype=dtype)
        expected = case.through(reference.lstm_layer, torch.float64)
        plain = case.through(reference.lstm_layer)
        for function in (autograd._operator, autograd.transforms.lstm_layer):
            for x, y, e in zip(case.through(function), plain, expected, strict=True):
                eps = torch.finfo(dtype).eps
                assert error(x, e) <= (64 * eps if dtype == torch.float64 else 2 * error(y, e) + 4 * eps)


@pytest.mark.parametrize("wanted", [("input",), ("reset_h", "weight"), ("c0",)], ids=str)
def test_only_wanted_gradients_are_computed(wanted):
    case = make("reset state")
    there = case.differentiable
    count = len(case.weights)
    names = ["input", "h0", "c0", "weight"] + [""] * (count - 1) + ["reset_h", "reset_c"]
    for n, t in zip(names, there, strict=True):
        t.requires_grad_(n in wanted)
    with Recorder() as recorder:
        output, _, _, cells, gates = ops.lstm_layer_with_extras(*case.arguments)
        (output.sum() + cells.sum()).backward()
    assert recorder.names == [f"{OP}_forward", f"{OP}_backward"]
    arguments = recorder.calls[1][1]
    assert list(arguments[-1]) == [n in wanted for n in names]
    assert [g is None for g in arguments[17:22]] == [False, True, True, False, True]
    assert [t.grad is not None for t in there] == [n in wanted for n in names]
    assert cells.requires_grad and not gates.requires_grad and gates.numel() == 0


def test_nothing_is_saved_without_gradients():
    case = make("reset state", requires_grad=True)
    with Recorder() as recorder:
        with torch.no_grad():
            assert not any(t.requires_grad for t in ops.lstm_layer_with_extras(*case.arguments))
        with torch.inference_mode():
            ops.lstm_layer_with_extras(*make("reset state").arguments)
    assert recorder.names == [OP] * 2


def test_results_may_be_changed_in_place():
    """They share no memory with what is saved."""
    case = make("lengths, resets", requires_grad=True)
    grads = []
    for change in (False, True):
        results = ops.lstm_layer_with_extras(*case.arguments)
        loss = sum(t.sum() for t in results)
        if change:
            for t in results[1:]:
                t.detach().zero_()
        grads.append(torch.autograd.grad(loss, case.weights))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_tangents_are_not_lost():
    case = make("resets")
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(case.input, torch.ones_like(case.input))
        with torch.no_grad(), pytest.raises(RuntimeError, match="jvp is not implemented"):
            ops.lstm_layer_with_extras(dual, *case.arguments[1:])


@pytest.mark.parametrize("name", [n for n in ("reset state", "packed", "norm") if n in SERVED])
def test_flops_are_those_of_the_plain_layer(name):
    case = make(name, requires_grad=True)
    counts = []
    plain = case.arguments[:7]
    for op, arguments in ((ops.lstm_layer, plain), (ops.lstm_layer_with_extras, case.arguments)):
        with FlopCounterMode(display=False) as counter:
            op(*arguments)[0].sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


# ---- modules: what a graph holds


# Arguments of the constructor and of the call; those that random masks come from are in training mode.
MODULES = {
    "resets": ({}, ("resets", "reset_state")),
    "lengths": ({"bidirectional": True}, ("lengths",)),
    "mask, gates": ({"proj_size": 2}, ("mask", "return_gates")),
    "everything in a call": (
        {"bidirectional": True},
        ("resets", "lengths", "return_cell_states", "return_gates"),
    ),
    "recompute": ({"recompute": True}, ("resets", "lengths", "return_cell_states")),
    "recurrent dropout": ({"recurrent_dropout": 0.5}, ("lengths",)),
    "zoneout": ({"zoneout": (0.2, 0.3), "bidirectional": True}, ("resets",)),
    "norm": ({"layer_norm": True, "bidirectional": True}, ("lengths", "return_gates")),
    "norm, recompute": ({"layer_norm": True, "recompute": True}, ("resets",)),
}
NEEDED = {"recurrent_dropout": "recurrent dropout", "zoneout": "zoneout", "layer_norm": "norm"}
SERVED_MODULES = [
    name for name, (options, _) in MODULES.items() if all(NEEDED[o] in SERVED for o in options if o in NEEDED)
]
every_module = pytest.mark.parametrize("name", SERVED_MODULES)


def module_of(name: str, layers: int = 2) -> lstm_ext.LSTM:
    return lstm_ext.LSTM(I, H, layers, **MODULES[name][0])


def call_of(name: str, module: lstm_ext.LSTM, time: int = T, batch: int = B) -> dict:
    sets = module.num_layers * (2 if module.bidirectional else 1)
    lengths = torch.randint(0, time + 1, (batch,))
    values = {
        "resets": torch.rand(time, batch) < 0.3,
        "reset_state": (torch.randn(sets, batch, module.proj_size or H), torch.randn(sets, batch, H)),
        "lengths": lengths,
        "mask": torch.arange(time).unsqueeze(1) < lengths,
        "return_cell_states": True,
        "return_gates": True,
    }
    return {argument: values[argument] for argument in MODULES[name][1]}


def values_of(results) -> list[Tensor]:
    return [t for t in tree_leaves(results) if t is not None]


def close(a, b) -> None:
    torch.testing.assert_close(values_of(a), values_of(b), rtol=1e-4, atol=1e-5)


def total(results) -> Tensor:
    return sum(t.sin().sum() for t in values_of(results))


def trained(function, module, x, call) -> list[Tensor]:
    torch.manual_seed(1)
    results = function(x, **call)
    return [*values_of(results), *torch.autograd.grad(total(results), [x, *module.parameters()])]


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
@every_module
def test_compile_holds_one_operator_a_layer_and_follows_the_sizes(name):
    module, graphs = module_of(name), Graphs()
    compiled = torch.compile(module, backend=graphs, fullgraph=True, dynamic=True)
    for time, batch in ((5, 3), (9, 4), (6, 7)):
        x, call = torch.randn(time, batch, I, requires_grad=True), call_of(name, module, time, batch)
        close(trained(compiled, module, x, call), trained(module, module, x, call))
    assert len(graphs.all) == 1
    assert_layers(graphs.all[0].graph, 2, OP)


@pytest.mark.usefixtures("fresh_dynamo")
def test_sizes_marked_by_torch_itself_compile_twice():
    module, graphs = module_of("resets"), Graphs()
    compiled = torch.compile(module, backend=graphs, fullgraph=True)
    for time in (5, 8, 11):
        close(
            compiled(x := torch.randn(time, B, I), **(c := call_of("resets", module, time))), module(x, **c)
        )
    assert len(graphs.all) == 2


@pytest.mark.usefixtures("fresh_dynamo", "no_equations")
def test_training_calls_the_ends_and_inference_the_operator():
    module, seen = module_of("everything in a call"), []

    def keep(graph_module, inputs):
        seen.append(graph_module.graph)
        return graph_module.forward

    backend = torch._dynamo.backends.common.aot_autograd(
        fw_compiler=keep, bw_compiler=keep, inference_compiler=keep
    )
    compiled = torch.compile(module, backend=backend, fullgraph=True)
    x, call = torch.randn(T, B, I), call_of("everything in a call", module)
    total(compiled(x, **call)).backward()
    with torch.no_grad():
        compiled(x, **call)
    for graph, end in zip(seen, ("_forward", "_backward", ""), strict=True):
        assert_layers(graph, 2, OP + end)


@pytest.mark.usefixtures("fresh_dynamo")
def test_inductor():
    module = module_of("everything in a call")
    with torch._inductor.config.patch(force_disable_caches=True):
        compiled = torch.compile(module, fullgraph=True)
        x, call = torch.randn(T, B, I, requires_grad=True), call_of("everything in a call", module)
        close(trained(compiled, module, x, call), trained(module, module, x, call))


def packed_data(lengths: list[int]) -> tuple:
    x = pack_padded_sequence(torch.randn(max(lengths), len(lengths), I), lengths, enforce_sorted=False)
    return x, x._replace(data=torch.rand(sum(lengths)) < 0.3)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("options", [{"bidirectional": True}, {"recompute": True}], ids=str)
def test_packed_data_in_a_compiled_module(options):
    module, graphs = lstm_ext.LSTM(I, H, 2, **options), Graphs()
    compiled = torch.compile(module, backend=graphs, fullgraph=True, dynamic=True)
    for lengths in ([4, 2, 5], [3, 6, 1, 2], [7, 7, 3]):
        x, resets = packed_data(lengths)
        call = {"resets": resets, "return_cell_states": True}
        results = []
        for function in (compiled, module):
            y, states, extras = function(x, **call)
            grads = torch.autograd.grad(total((y.data, states, extras)), list(module.parameters()))
            results.append([y.data, *states, extras.cell_states, *grads])
        close(*results)
    assert len(graphs.all) == 1
    assert_layers(graphs.all[0].graph, 2, OP)


class Exported(nn.Module):
    """All extras of a call as inputs of the graph."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.lstm = lstm_ext.LSTM(I, H, 2, bidirectional=True, **options)

    def forward(self, x: Tensor, lengths: Tensor, resets: Tensor, h: Tensor, c: Tensor):
        return self.lstm(x, lengths=lengths, resets=resets, reset_state=(h, c), return_gates=True)

    @staticmethod
    def arguments(time: int, batch: int) -> tuple[Tensor, ...]:
        lengths, resets = torch.randint(0, time + 1, (batch,)), torch.rand(time, batch) < 0.3
        return (
            torch.randn(time, batch, I),
            lengths,
            resets,
            torch.randn(4, batch, H),
            torch.randn(4, batch, H),
        )


def exported(model: nn.Module, strict: bool = False) -> torch.export.ExportedProgram:
    time, batch = Dim("time"), Dim("batch")
    shapes = ({0: time, 1: batch}, {0: batch}, {0: time, 1: batch}, {1: batch}, {1: batch})
    return torch.export.export(model, model.arguments(T, B), dynamic_shapes=shapes, strict=strict)


EXPORTED = [{}] + [{"layer_norm": True, "zoneout": (0.1, 0.2)}] * ({"norm", "shares"} <= set(SERVED))


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("options", EXPORTED, ids=str)
def test_export_with_sizes_that_change(options, strict):
    model = Exported(**options).eval()
    program = exported(model, strict)
    for p in (program, program.run_decompositions()):
        assert_layers(p.graph, 2, OP)
        for sizes in ((4, 9), (1, 1), (30, 2)):
            args = model.arguments(*sizes)
            close(p.module()(*args), model(*args))


@pytest.mark.usefixtures("fresh_dynamo")
def test_packed_data_in_an_exported_program():
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = lstm_ext.LSTM(I, H, bidirectional=True)

        def forward(self, x, resets):
            y, (h_n, c_n) = self.lstm(x, resets=resets)
            return y.data, h_n, c_n

    model = Packed()
    program = torch.export.export(model, packed_data([4, 2, 5]), strict=False)
    assert_layers(program.graph, 1, OP)
    data = packed_data([4, 2, 5])
    close(program.module()(*data), model(*data))


def test_a_saved_program_runs_where_only_the_operators_are_known():
    model, file = Exported().eval(), io.BytesIO()
    torch.export.save(exported(model), file)
    args = model.arguments(7, 2)
    torch.save((args, values_of(model(*args))), both := io.BytesIO())
    program = (
        "import io, sys, torch, lstm_ext.ops\n"
        "data = sys.stdin.buffer.read()\n"
        f"module = torch.export.load(io.BytesIO(data[:{len(file.getvalue())}])).module()\n"
        f"args, expected = torch.load(io.BytesIO(data[{len(file.getvalue())}:]))\n"
        "results = torch.utils._pytree.tree_leaves(module(*args))\n"
        "torch.testing.assert_close(results, expected)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], input=file.getvalue() + both.getvalue(), capture_output=True
    )
    assert run.returncode == 0, run.stderr.decode()


def test_ahead_of_time(tmp_path):
    """AOTInductor calls the operator from C++; lists without a tensor and numbers are among its arguments."""
    model = Exported().eval()
    path = torch._inductor.aoti_compile_and_package(exported(model), package_path=str(tmp_path / "model.pt2"))
    loaded = torch._inductor.aoti_load_package(path)
    for sizes in ((5, 3), (8, 2)):
        args = model.arguments(*sizes)
        close(loaded(*args), model(*args))


# ---- transforms and dispatch modes


def calls_of(function) -> list[str]:
    with Recorder() as recorder:
        function()
    return recorder.names


@pytest.mark.usefixtures("no_equations")
def test_modes_and_make_fx_see_the_operator():
    module = module_of("everything in a call")
    x, call = torch.randn(T, B, I), call_of("everything in a call", module)
    assert (
        calls_of(lambda: total(module(x, **call)).backward())
        == [f"{OP}_forward"] * 2 + [f"{OP}_backward"] * 2
    )
    with torch.no_grad():
        assert calls_of(lambda: module(x, **call)) == [OP] * 2
        for mode in ("real", "fake", "symbolic"):
            traced = make_fx(lambda x: module(x, **call), tracing_mode=mode, _allow_non_fake_inputs=True)(x)
            assert_layers(traced.graph, 2, OP)
            close(traced(x), module(x, **call))


@pytest.mark.usefixtures("no_equations")
@every_module
def test_one_call_for_all_samples(name):
    """Samples that share their weights are computed as one batch, forwards and backwards."""
    module = module_of(name, layers=1).eval()
    xs = torch.randn(3, 2, T, B, I)
    call = call_of(name, module)
    each = [[module(x, **call) for x in row] for row in xs]
    twice = vmap(vmap(lambda x: values_of(module(x, **call))))
    ours = values_of(twice(xs))
    for k, t in enumerate(ours):
        close(t, torch.stack([torch.stack([values_of(e)[k] for e in row]) for row in each]))
    if not module.recompute:
        assert calls_of(lambda: twice(xs)) == [f"{OP}_forward"]
        of_input = vmap(vmap(grad(lambda x: total(module(x, **call)))))
        assert calls_of(lambda: of_input(xs)) == [f"{OP}_forward", f"{OP}_backward"]
    xs.requires_grad_()
    (ours,) = torch.autograd.grad(total(twice(xs)), xs)
    (expected,) = torch.autograd.grad(sum(total(module(x, **call)) for x in xs.flatten(0, 1)), xs)
    close(ours, expected)


@pytest.mark.usefixtures("no_equations")
def test_vmap_over_everything_a_call_takes():
    name = "everything in a call"
    module = module_of(name, layers=1)
    calls = [call_of(name, module) for _ in range(3)]
    hx, xs = torch.randn(3, 2, 2, B, H), torch.randn(3, T, B, I)
    resets, lengths = (torch.stack([c[argument] for c in calls]) for argument in ("resets", "lengths"))

    def call(x, resets, lengths, h, c):
        call = {"lengths": lengths, "resets": resets, "reset_state": (h, c), "return_cell_states": True}
        return values_of(module(x, **call))

    def gradients(*args):
        return grad(lambda *a: total(call(*a)), (0, 3, 4))(*args)

    arguments = (xs, resets, lengths, hx[:, 0], hx[:, 1])
    for dims in (
        (0, 0, 0, 0, 0),
        (None, 0, None, 0, None),
        (0, None, 0, None, None),
        (None, None, 0, None, 0),
    ):
        own = [a if d == 0 else a[0] for a, d in zip(arguments, dims, strict=True)]
        for function in (call, gradients):
            ours = values_of(vmap(function, dims)(*own))
            for n in range(3):
                sample = [a[n] if d == 0 else a for a, d in zip(own, dims, strict=True)]
                close([t[n] for t in ours], function(*sample))


@pytest.mark.usefixtures("no_equations")
def test_vmap_over_packed_data():
    module = lstm_ext.LSTM(I, H, bidirectional=True)
    weights = list(module.parameters())
    sizes = torch.tensor(BATCH_SIZES)
    xs, flags = torch.randn(3, sum(BATCH_SIZES), I), torch.rand(3, sum(BATCH_SIZES)) < 0.3

    def layer(x, resets):
        extras = LayerExtras(resets, return_cell_states=True)
        return [
            y for y in autograd.lstm_layer(x, None, None, weights, sizes, True, True, extras) if y is not None
        ]

    ours = vmap(layer)(xs, flags)
    for n in range(3):
        close([t[n] for t in ours], layer(xs[n], flags[n]))


@every_module
def test_per_sample_gradients_and_ensembles(name):
    module = module_of(name, layers=1).eval()
    xs, call = torch.randn(3, T, B, I), call_of(name, module)

    def loss(parameters, x):
        return total(functional_call(module, parameters, (x,), call))

    parameters = {n: p.detach() for n, p in module.named_parameters()}
    ours = vmap(grad(loss), (None, 0))(parameters, xs)
    several = [module_of(name, layers=1).eval() for _ in range(3)]
    stacked = stack_module_state(several)[0]
    of_models = vmap(lambda p, x: values_of(functional_call(module, p, (x,), call)))(stacked, xs)
    for n, x in enumerate(xs):
        close(tree_map(lambda t, n=n: t[n], ours), grad(loss)(parameters, x))
        close(tree_map(lambda t, n=n: t[n], of_models), several[n](x, **call))


@pytest.mark.parametrize("name", [n for n in SERVED_MODULES if "recompute" not in n])
def test_second_derivatives_follow_a_backward_pass_on_the_kernels(name):
    module = module_of(name, layers=1).eval().double()
    x, call = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True), call_of(name, module)
    call = tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, call)

    def loss(x):
        return total(module(x, **call))

    first = torch.autograd.grad(loss(x), x, create_graph=True)[0]
    second = torch.autograd.grad(first.square().sum(), [x, *module.parameters()])
    assert torch.equal(first, torch.autograd.grad(loss(x), x)[0])  # bit by bit
    with torch.no_grad():
        direction = torch.randn_like(x)
        step = 1e-6
        slopes = [grad(loss)(x + s * direction).square().sum() for s in (step, -step)]
    torch.testing.assert_close(
        (slopes[0] - slopes[1]) / (2 * step), (second[0] * direction).sum(), rtol=1e-6, atol=1e-7
    )
    columns = jacrev(grad(loss))(x.detach()).flatten(0, 2)
    torch.testing.assert_close((2 * first.flatten()) @ columns.flatten(1), second[0].flatten())


@pytest.mark.usefixtures("no_equations")
def test_no_samples():
    module = module_of("everything in a call", layers=1)
    call = call_of("everything in a call", module)

    def function(x, resets):
        return module(x, **call | {"resets": resets})

    one = vmap(function)(torch.randn(1, T, B, I), torch.rand(1, T, B) < 0.5)
    none = vmap(function)(torch.randn(0, T, B, I), torch.zeros(0, T, B, dtype=torch.bool))
    assert [t.shape for t in values_of(none)] == [(0, *t.shape[1:]) for t in values_of(one)]
