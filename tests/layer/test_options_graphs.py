"""Modules with options under compilers, exporters, transforms and dispatch modes: one operator a layer, any sizes."""

from __future__ import annotations

import io
import subprocess
import sys

import internals
import pytest
import torch
from graphs import Graphs, Recorder, assert_layers, operators
from torch import Tensor, nn
from torch.export import Dim
from torch.func import functional_call, grad, jacrev, stack_module_state, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

import lstm_ext
from lstm_ext.layer import equations

pytestmark = pytest.mark.tools  # takes long

T, B, I, H = 5, 3, 2, 4
BATCH_SIZES = [3, 2, 2, 1, 1]
OP = "lstm_layer"


@pytest.fixture
def no_equations(monkeypatch):
    monkeypatch.setattr(equations, "_equations", lambda *_: pytest.fail("the equations ran"))


# Arguments of the constructor and of the call.
MODULES = {
    "resets": ({}, ("resets", "reset_state")),
    "lengths": ({"bidirectional": True}, ("lengths",)),
    "mask, gates": ({"proj_size": 2}, ("mask", "return_gates")),
    "everything in a call": (
        {"bidirectional": True},
        ("resets", "lengths", "return_cell_states", "return_gates"),
    ),
    "recompute": ({"recompute": True}, ("resets", "lengths", "return_cell_states")),
    "recurrent dropout": ({"recurrent_dropout": 0.5}, ("resets",)),
    "zoneout": ({"zoneout": (0.2, 0.3), "bidirectional": True}, ("resets",)),
    "norm": ({"layer_norm": True, "bidirectional": True}, ("lengths", "return_gates")),
    "peephole, clip, coupled": (
        {"peephole": True, "cell_clip": 0.3, "coupled_gates": True, "proj_size": 2},
        ("lengths", "return_gates"),
    ),
    "peephole, recompute": ({"peephole": True, "recompute": True}, ("resets",)),
    "norm, recompute": ({"layer_norm": True, "recompute": True}, ("resets",)),
}
every_module = pytest.mark.parametrize("name", MODULES)


def module_of(name: str, layers: int = 2) -> lstm_ext.LSTM:
    return lstm_ext.LSTM(I, H, layers, **MODULES[name][0])


def call_of(name: str, module: lstm_ext.LSTM, time: int = T, batch: int = B) -> dict:
    sets = module.num_layers * (2 if module.bidirectional else 1)
    lengths = torch.randint(0, time + 1, (batch,))
    state = [
        torch.randn(sets, batch, size, dtype=module.weight_ih_l0.dtype) for size in (module.proj_size or H, H)
    ]
    values = {
        "resets": torch.rand(time, batch) < 0.3,
        "reset_state": tuple(state),
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
    first = 0
    for time, batch in ((5, 3), (9, 4), (6, 7)):
        x, call = torch.randn(time, batch, I, requires_grad=True), call_of(name, module, time, batch)
        close(trained(compiled, module, x, call), trained(module, module, x, call))
        first = first or len(graphs.all)  # dynamo begins anew where it finds that dropout is 0
    assert len(graphs.all) == first <= 2
    assert_layers(graphs.all[-1].graph, 2, OP)


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
@pytest.mark.full  # seconds each, of which dynamo takes most
@pytest.mark.parametrize("name", ["everything in a call", "norm"])
def test_transforms_inside_a_compiled_function(name):
    module, graphs = module_of(name).eval(), Graphs()
    call, xs = call_of(name, module), torch.randn(2, T, B, I)

    def gradients(xs, call):
        return vmap(grad(lambda x: total(module(x, **call))))(xs)

    compiled = torch.compile(gradients, backend=graphs, fullgraph=True)
    close(compiled(xs, call), gradients(xs, call))
    assert operators(graphs.all[0].graph)["flat_lstm_layer"] == 2


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_autograd():
    name = "everything in a call"
    module = module_of(name)
    x, call = torch.randn(T, B, I), call_of(name, module)
    expected = torch.autograd.grad(total(module(x, **call)), list(module.parameters()))
    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.compile(lambda x, call: total(module(x, **call)).backward(), backend="aot_eager")(x, call)
    close([p.grad for p in module.parameters()], expected)


@pytest.mark.full
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("name", ["everything in a call", "zoneout"])
def test_inductor(name):
    module = module_of(name)
    with torch._inductor.config.patch(force_disable_caches=True, fallback_random=True):
        compiled = torch.compile(module, fullgraph=True)
        x, call = torch.randn(T, B, I, requires_grad=True), call_of(name, module)
        close(trained(compiled, module, x, call), trained(module, module, x, call))


def packed_data(lengths: list[int]) -> tuple:
    x = pack_padded_sequence(torch.randn(max(lengths), len(lengths), I), lengths, enforce_sorted=False)
    return x, x._replace(data=torch.rand(sum(lengths)) < 0.3)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("options", [{"bidirectional": True}, {"recompute": True}], ids=str)
def test_packed_data_in_a_compiled_module(options):
    module, graphs = lstm_ext.LSTM(I, H, 2, **options), Graphs()
    compiled, first = torch.compile(module, backend=graphs, fullgraph=True, dynamic=True), 0
    for lengths in ([4, 2, 5], [3, 6, 1, 2], [7, 7, 3]):
        x, resets = packed_data(lengths)
        call = {"resets": resets, "return_cell_states": True}
        results = []
        for function in (compiled, module):
            y, states, extras = function(x, **call)
            grads = torch.autograd.grad(total((y.data, states, extras)), list(module.parameters()))
            results.append([y.data, *states, extras.cell_states, *grads])
        close(*results)
        first = first or len(graphs.all)
    assert len(graphs.all) == first <= 2
    assert_layers(graphs.all[-1].graph, 2, OP)


class Exported(nn.Module):
    """All options of a call as inputs of the graph."""

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


EXPORTED = [{}, {"layer_norm": True, "zoneout": (0.1, 0.2)}]


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
        "results = [t for t in torch.utils._pytree.tree_leaves(module(*args)) if t is not None]\n"
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
    module = module_of(name, layers=1).eval().double()  # of another batch, sums are rounded otherwise
    xs = torch.randn(3, 2, T, B, I, dtype=torch.float64)
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
        options = internals.LayerOptions(resets=resets, return_cell_states=True)
        return [
            y
            for y in internals.lstm_layer(x, None, None, weights, sizes, True, True, options)
            if y is not None
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


@pytest.mark.parametrize("name", [n for n in MODULES if "recompute" not in n])
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
