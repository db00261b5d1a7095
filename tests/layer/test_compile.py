"""torch.compile: a layer is one operator in one graph, and computes what it computes without a compiler."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from cases import values_and_gradients
from graphs import Graphs, assert_layers, operators
from judge import torch_dtypes
from matrix.cases import case_of, tensors_of
from matrix.judge import by_itself, run
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import lstm_ext
from lstm_ext.layer import cuda_kernels, transforms
from lstm_ext.native import loader

pytestmark = pytest.mark.devices("cpu", "cuda")

OLD_TORCH = torch.__version__.startswith(("2.11.", "2.12."))

T, B, I, H = 5, 3, 2, 4

# Forms, cells and calls of the matrix.
NAMES = [
    ("dense", "plain", ""),
    ("batch first, two layers", "plain", ""),
    ("unbatched", "plain", ""),
    ("two directions", "plain", "resets"),
    ("all", "plain", ""),
    ("one step", "peephole, clip, coupled", "resets to a state"),
    ("two directions", "zoneout", "resets"),
    ("batch first, two layers", "functions", "mask"),
    ("dense", "recompute", "lengths"),
    ("all", "norm", "all"),
    ("packed", "plain", ""),
    ("packed, sorted", "peephole", "returned"),
    ("packed", "recompute", "resets"),
]
DTYPES = ("float32", "bfloat16", "float64", "float16")
RESULTS = ("output", "h_n", "c_n")
# In each dtype in turn, and with gradients of all results or of one.
CASES = {
    ", ".join(filter(None, names)): case_of(
        *names, dtype=DTYPES[n % 4], grad_of=RESULTS[n % 4 - 1 :][:1] if n % 4 else RESULTS
    )
    for n, names in enumerate(NAMES)
}


@pytest.fixture(autouse=True)
def _nothing_compiled_yet() -> None:
    torch._dynamo.reset()


def states(module: lstm_ext.LSTM, batch: tuple[int, ...]):
    sets = module.num_layers * (2 if module.bidirectional else 1)
    sizes = (module.proj_size or module.hidden_size, module.hidden_size)
    return tuple(torch.randn(sets, *batch, size) for size in sizes)


def assert_equal(result, expected) -> None:
    """Bit by bit: what the compiler calls are the same kernels."""
    result, expected = tree_leaves(result), tree_leaves(expected)
    assert len(result) == len(expected) > 0
    for x, y in zip(result, expected, strict=True):
        if isinstance(x, Tensor):
            assert x.dtype == y.dtype and torch.equal(x, y)
        else:
            assert x == y


def compiled(function, graphs: Graphs, **options):
    return torch.compile(function, backend=graphs, fullgraph=True, **options)


def in_place(module: nn.Module, graphs: Graphs, **options) -> nn.Module:
    """A compiled copy whose parameters keep their names."""
    module = copy.deepcopy(module)
    module.compile(backend=graphs, fullgraph=True, **options)
    return module


# ---- values and gradients


@pytest.mark.devices("cpu")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case: str, backend: str) -> None:
    described, graphs = CASES[case], Graphs(backend)

    def call(module: nn.Module, *args, **more):
        return compiled(by_itself, graphs)(module, *args, **more)

    results, expected = [
        run(lstm_ext.LSTM, described, tensors_of(described), described.torch_dtype, c)
        for c in (call, by_itself)
    ]
    recompute = described.options is not None and described.options.recompute
    same = (
        torch.testing.assert_close if recompute else assert_equal
    )  # what is computed again is added otherwise
    same(results.values, expected.values)
    graphs.assert_layers(described.num_layers)


class Model(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, I)
        self.lstm = lstm_ext.LSTM(I, H, num_layers=2, **options)
        self.out = nn.Linear(H, 7)

    def forward(self, x: Tensor, hx: tuple[Tensor, Tensor] | None = None):
        y, hx = self.lstm(self.embedding(x), hx)
        return self.out(y), hx


def training_step(module: nn.Module, *args) -> list[Tensor]:
    """Values and gradients of the parameters, from all outputs."""
    module.zero_grad()
    values = [value for value in tree_leaves(module(*args)) if value is not None]
    sum((k + 1) * value.sin().sum() for k, value in enumerate(values)).backward()
    return [*(v.detach() for v in values), *(p.grad for p in module.parameters())]


@pytest.mark.devices("cpu")  # CUDA needs Triton; tests/cuda/cuda_checks.py compiles where it is
@pytest.mark.tools
def test_inductor() -> None:
    model = Model()
    graphs = Graphs("inductor")
    ours = in_place(model, graphs)
    # Of graphs that an earlier run left on disk, we would not know what made them.
    with torch._inductor.config.patch(force_disable_caches=True):
        for time, batch in ((5, 3), (7, 4), (6, 5)):
            x = torch.randint(7, (time, batch))
            torch.testing.assert_close(training_step(ours, x), training_step(model, x))
    graphs.assert_layers(2, graphs=2)  # for the first sizes, and for all others


def test_training_keeps_what_backward_needs_and_inference_nothing() -> None:
    model = Model()
    x = torch.randint(7, (T, B))
    seen: dict[str, list] = {"forward": [], "backward": [], "inference": []}

    def keep(name: str):
        def compiler(module, inputs):
            seen[name].append(module.graph)
            return module.forward

        return compiler

    backend = torch._dynamo.backends.common.aot_autograd(
        fw_compiler=keep("forward"), bw_compiler=keep("backward"), inference_compiler=keep("inference")
    )
    model.compile(backend=backend, fullgraph=True)
    training_step(model, x)
    with torch.no_grad():
        model(x)
    for name, operator in (
        ("forward", "lstm_layer_forward"),
        ("backward", "lstm_layer_backward"),
        ("inference", "lstm_layer"),
    ):
        assert len(seen[name]) == 1
        assert_layers(seen[name][0], 2, operator)


# ---- sizes that change


def assert_follows(module: nn.Module, calls: list[tuple], most: int, left: int = 0, **options) -> None:
    """Compiles no more than so many graphs, besides as many that dynamo leaves when it learns of a number."""
    graphs = Graphs()
    ours = in_place(module, graphs, **options)
    for args in calls:
        assert_equal(training_step(ours, *args), training_step(module, *args))
    del graphs.all[:left]
    graphs.assert_layers(module.num_layers, graphs=len(graphs.all))
    assert len(graphs.all) <= most


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [[(5, 3), (7, 3), (9, 3), (4, 3)], [(5, 3), (5, 4), (5, 6)], [(5, 3), (7, 4), (9, 6)]],
    ids=["time", "batch", "both"],
)
def test_second_size_is_the_last_to_compile(sizes: list[tuple[int, int]]) -> None:
    assert_follows(lstm_ext.LSTM(I, H, 2), [(torch.randn(*s, I),) for s in sizes], most=2)


class WithOptions(nn.Module):
    def __init__(self, options: dict) -> None:
        super().__init__()
        self.lstm = lstm_ext.LSTM(I, H, **options).eval()
        self.num_layers = 1

    def forward(self, x: Tensor, hx: tuple[Tensor, Tensor], call: dict):
        return self.lstm(x, hx, **call)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"bidirectional": True}, ()),
        ({"bidirectional": True}, ("resets", "lengths", "return_gates")),
        ({"layer_norm": True, "zoneout": (0.2, 0.3)}, ("lengths",)),
        (
            {"peephole": True, "cell_clip": 0.3, "coupled_gates": True, "proj_size": 2},
            ("resets", "reset_state"),
        ),
    ],
    ids=str,
)
def test_dynamic_compiles_once(options: dict, names: tuple[str, ...]) -> None:
    module, calls = WithOptions(options), []
    for batch, time in ((3, 5), (4, 7), (6, 9)):
        given = {
            "resets": torch.rand(time, batch) < 0.3,
            "reset_state": states(module.lstm, (batch,)),
            "lengths": torch.randint(0, time + 1, (batch,)),
            "return_gates": True,
        }
        call = {name: given[name] for name in names}
        calls.append((torch.randn(time, batch, I), states(module.lstm, (batch,)), call))
    left = int("zoneout" in options or "cell_clip" in options)
    assert_follows(module, calls, most=1, left=left, dynamic=True)


@pytest.mark.slow
def test_one_step_one_row_no_row() -> None:
    sizes = [(5, 3), (7, 4), (1, 3), (7, 1), (1, 1), (5, 0), (9, 6)]
    # torch compiles anew for a size of 0 or 1, and once more for each pair of them.
    assert_follows(lstm_ext.LSTM(I, H, 2), [(torch.randn(*s, I),) for s in sizes], most=6)


# ---- ways to call


@pytest.mark.slow
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(context) -> None:
    if context is torch.inference_mode and OLD_TORCH:
        pytest.skip("torch 2.11 and 2.12 cannot compile nn.Linear in inference mode")
    model = Model()
    x = torch.randint(7, (T, B))
    graphs = Graphs()
    ours = compiled(model, graphs)
    with context():
        result = ours(x)
        assert_equal(result, model(x))
        assert not result[0].requires_grad
    assert ours(x)[0].requires_grad

    def inside(x: Tensor):
        with context():
            return model(x)

    assert_equal(compiled(inside, graphs)(x), inside(x))
    graphs.assert_layers(2, graphs=3)


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
def test_dropout(p: float) -> None:
    module = lstm_ext.LSTM(I, H, 2, dropout=p)
    graphs = Graphs()
    ours = in_place(module, graphs)
    x = torch.randn(T, B, I)
    torch.manual_seed(1)
    result = training_step(ours, x)
    torch.manual_seed(1)  # aot_eager draws as the uncompiled layer does
    assert_equal(result, training_step(module, x))
    assert torch.equal(training_step(ours, x)[0], result[0]) == (p != 0.5)
    assert_equal(ours.eval()(x), module.eval()(x))
    assert ["dropout" in operators(g.graph) for g in graphs.all] == ([True, False] if p > 0 else [False])


def test_masks_are_drawn_anew() -> None:
    """With sizes that change, too: dynamo may take the rates for numbers that change from call to call."""
    module = lstm_ext.LSTM(I, H, recurrent_dropout=0.5, zoneout=(0.3, 0.3))
    ours = in_place(module, Graphs(), dynamic=True)
    for batch in (2, 3, 5):
        x = torch.randn(T, batch, I)
        torch.manual_seed(1)
        result = training_step(ours, x)
        torch.manual_seed(1)
        assert_equal(result, training_step(module, x))
        assert not torch.equal(training_step(ours, x)[0], result[0])


@pytest.mark.slow
def test_step_cell_and_functional() -> None:
    module = lstm_ext.LSTM(I, H, 2)
    cell = lstm_ext.LSTMCell(I, H)
    x, hx = torch.randn(T, B, I), states(module, (B,))
    weights = [p.detach() for p in module.parameters()]

    def functional(x, hx):
        return lstm_ext.functional.lstm(x, hx, weights, num_layers=2)

    for function, args, layers in (
        (lambda x, hx: module(hx=list(hx), input=x), (x, hx), 2),
        (module.step, (x[0],), 2),
        (module.step, (x[0], hx), 2),
        (module.step, (x[0, 0],), 2),
        (cell, (x[0],), 1),
        (cell, (x[0], (hx[0][0], hx[1][0])), 1),
        (cell, (x[0, 0],), 1),
        (functional, (x, None), 2),
        (functional, (x, hx), 2),
        *((functional, (packed([5, 4, 2], s), state), 2) for s in (False, True) for state in (None, hx)),
    ):
        torch._dynamo.reset()
        graphs = Graphs("eager")
        assert_equal(compiled(function, graphs)(*args), function(*args))
        graphs.assert_layers(layers)


@pytest.mark.slow
def test_numbers_that_a_compiler_takes_for_changing_ones() -> None:
    """A list of lengths from the second call on, and with dynamic=True each int of a closure."""
    module, x = lstm_ext.LSTM(I, H, 3), torch.randn(T, 3, I)
    weights, num_layers, dropout = [p.detach() for p in module.parameters()], 3, 0.0

    def with_lengths(x, lengths):
        return module(x, lengths=lengths)

    def functional(x):
        return lstm_ext.functional.lstm(x, None, weights, num_layers=num_layers, dropout=dropout)

    for dynamic in (None, True):
        function = compiled(with_lengths, Graphs("eager"), dynamic=dynamic)
        for lengths in ([1, 2, T], [2, 2, T], [T, 0, 1], [T, T, T]):
            assert_equal(function(x, lengths), with_lengths(x, torch.tensor(lengths)))
        assert_equal(compiled(functional, Graphs("eager"), dynamic=dynamic)(x), functional(x))


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_autocast(where: str, device: str) -> None:
    module = lstm_ext.LSTM(I, H, 2, proj_size=2)
    graphs = Graphs()
    ours = copy.deepcopy(module)

    def forward(x: Tensor):
        with torch.autocast(device, dtype=torch.bfloat16):
            return ours(x)

    function = compiled(forward, graphs) if where == "inside" else forward
    if where == "outside":
        ours.compile(backend=graphs, fullgraph=True)
    x = torch.randn(T, B, I)
    result = function(x)
    with torch.autocast(device, dtype=torch.bfloat16):
        expected = module(x)
    assert [t.dtype for t in tree_leaves(result)] == torch_dtypes(module, torch.bfloat16, x)
    assert_equal(result, expected)
    for values in (result, expected):
        sum(v.float().sin().sum() for v in tree_leaves(values)).backward()
    assert_equal([p.grad for p in ours.parameters()], [p.grad for p in module.parameters()])
    graphs.assert_layers(2)


def test_computed_weights() -> None:
    module = lstm_ext.LSTM(I, H)
    nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
    x = torch.randn(T, B, I)
    graphs = Graphs()
    assert_equal(training_step(in_place(module, graphs), x), training_step(module, x))
    graphs.assert_layers(1)

    plain = lstm_ext.LSTM(I, H)
    others = {name: torch.randn_like(p) for name, p in plain.named_parameters()}

    def call(x: Tensor, parameters: dict[str, Tensor]):
        return torch.func.functional_call(plain, parameters, (x,))

    graphs = Graphs()
    assert_equal(compiled(call, graphs)(x, others), call(x, others))
    graphs.assert_layers(1)


def test_wrong_arguments() -> None:
    module = torch.compile(lstm_ext.LSTM(I, H), backend="eager", dynamic=True)
    module(torch.randn(T, B, I))
    with pytest.raises(
        RuntimeError, match=r"input.size\(-1\) must be equal to input_size. Expected 2, got 3"
    ):
        module(torch.randn(T, B, 3))
    with pytest.raises(RuntimeError, match="Expected sequence length to be larger than 0 in RNN"):
        module(torch.randn(0, B, I))
    with pytest.raises(RuntimeError, match=r"Expected hidden\[1\] size \(1, 3, 4\), got \[1, 4, 4\]"):
        module(torch.randn(T, B, I), (torch.randn(1, B, H), torch.randn(1, B + 1, H)))


# ---- packed data


def packed(lengths: list[int], enforce_sorted: bool) -> PackedSequence:
    x = torch.randn(max(lengths), len(lengths), I)
    return pack_padded_sequence(x, lengths, enforce_sorted=enforce_sorted)


@pytest.mark.slow
@pytest.mark.parametrize("has_hx", [False, True])
@pytest.mark.parametrize("enforce_sorted", [False, True])
def test_packed(enforce_sorted: bool, has_hx: bool) -> None:
    module = lstm_ext.LSTM(I, H, 2, bidirectional=True)
    lengths = [[5, 4, 2], [7, 4, 2, 1], [9, 3, 2, 2, 2]]
    graphs = Graphs()
    ours = in_place(module, graphs)
    for values in lengths:
        data = packed(values if enforce_sorted else values[::-1], enforce_sorted)
        args = (data, states(module, (len(values),))) if has_hx else (data,)
        for m in (ours, module):
            m.zero_grad()
        result, expected = ours(*args), module(*args)
        assert isinstance(result[0], PackedSequence)
        assert_equal(result, expected)
        for values in (result, expected):
            (values[0].data.sin().sum() + values[1][0].sin().sum() + values[1][1].cos().sum()).backward()
        assert_equal([p.grad for p in ours.parameters()], [p.grad for p in module.parameters()])
    graphs.assert_layers(2, graphs=2)


def test_packed_states_of_another_batch() -> None:
    """The compiler cannot know how many sequences there are: the kernel looks."""
    module = lstm_ext.LSTM(I, H)
    ours = compiled(module, Graphs("eager"))
    for enforce_sorted in (False, True):
        data = packed([5, 4, 2], enforce_sorted)
        with pytest.raises(RuntimeError, match=r"\[?1, 4, 4\]?"):
            ours(data, states(module, (4,)))


@pytest.mark.skipif(OLD_TORCH, reason="torch 2.11 and 2.12 cannot compile pad_packed_sequence")
def test_packing_inside_a_compiled_function() -> None:
    """torch does not trace its own packing; the layer in between is compiled all the same."""
    module = lstm_ext.LSTM(I, H, 2)

    def forward(x: Tensor, lengths: Tensor):
        data = pack_padded_sequence(x, lengths, enforce_sorted=False)
        output, hx = module(data)
        return pad_packed_sequence(output)[0], hx

    x, lengths = torch.randn(T, B, I), torch.tensor([3, 5, 2], device="cpu")
    graphs = Graphs()
    assert_equal(torch.compile(forward, backend=graphs)(x, lengths), forward(x, lengths))
    assert sum(operators(g.graph)["lstm_ext.lstm_layer"] for g in graphs.all) == 2


# ---- transforms, checkpoints, compiled autograd


def transformed(module: lstm_ext.LSTM) -> dict:
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def loss(x: Tensor) -> Tensor:
        return module(x)[0].sin().sum()

    def loss_of_parameters(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(module, parameters, (x,))[0].sin().sum()

    return {
        "vmap": lambda x: torch.vmap(lambda x: module(x))(x),
        "grad": lambda x: torch.func.grad(loss)(x[0]),
        "grad_of_parameters": lambda x: torch.func.grad(loss_of_parameters)(parameters, x[0]),
        "grads_of_samples": lambda x: torch.vmap(
            torch.func.grad(loss_of_parameters), in_dims=(None, 0), randomness="error"
        )(parameters, x),
        "jacrev": lambda x: torch.func.jacrev(lambda x: module(x)[0].sum(0))(x[0]),
    }


@pytest.mark.slow
@pytest.mark.parametrize("transform", ["vmap", "grad", "grad_of_parameters", "grads_of_samples", "jacrev"])
def test_transforms_inside_a_compiled_function(transform: str) -> None:
    function = transformed(lstm_ext.LSTM(I, H, 2))[transform]
    graphs = Graphs()
    x = torch.randn(3, T, B, I)
    assert_equal(compiled(function, graphs)(x), function(x))
    names = operators(graphs.all[0].graph)
    assert names[transforms.flat_lstm_layer.__name__] == 2
    assert not [name for name in names if "sigmoid" in name or "tanh" in name]


def test_sizes_change_under_transforms() -> None:
    # Outer second derivatives, of the weights, would fix the number of steps.
    module = lstm_ext.LSTM(I, H).requires_grad_(False)

    def gradients(x: Tensor) -> Tensor:
        return torch.vmap(torch.func.grad(lambda x: module(x)[0].sin().sum()))(x)

    graphs = Graphs()
    ours = compiled(gradients, graphs)
    for time in (5, 7, 9):
        x = torch.randn(2, time, B, I)
        assert_equal(ours(x), gradients(x))
    assert len(graphs.all) == 2


def test_backward_through_a_compiled_transform() -> None:
    module = lstm_ext.LSTM(I, H)

    def learned(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        """A step of gradient descent, and the loss after it."""

        def loss(parameters: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(module, parameters, (x,))[0].sin().sum()

        grads = torch.func.grad(loss)(parameters)
        return loss({name: p - 0.1 * grads[name] for name, p in parameters.items()})

    parameters = dict(module.named_parameters())
    x = torch.randn(T, B, I)
    ours, expected = (
        torch.autograd.grad(f(parameters, x), list(parameters.values()))
        for f in (compiled(learned, Graphs()), learned)
    )
    torch.testing.assert_close(ours, expected)


@pytest.mark.slow
def test_forward_mode_inside_a_compiled_function() -> None:
    """Takes the equations of the reference, as it does without a compiler."""
    module = lstm_ext.LSTM(I, H)
    x = torch.randn(2, B, I)

    def jvp(x: Tensor):
        return torch.func.jvp(lambda x: module(x)[0], (x,), (x,))

    def hessian(x: Tensor):
        return torch.func.hessian(lambda x: module(x)[0].sum())(x)

    torch.set_default_device(None)  # dynamo cannot look through its mode here
    for function in (jvp, hessian):
        torch._dynamo.reset()
        torch.testing.assert_close(compiled(function, Graphs())(x), function(x))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_inside_a_compiled_function(use_reentrant: bool) -> None:
    module = lstm_ext.LSTM(I, H, 2)
    graphs = Graphs()
    x = torch.randn(T, B, I, requires_grad=True)

    def forward(x: Tensor) -> Tensor:
        return checkpoint(lambda x: module(x)[0], x, use_reentrant=use_reentrant)

    leaves = [x, *module.parameters()]
    found = []
    for function in (compiled(forward, graphs), forward):
        for leaf in leaves:
            leaf.grad = None
        y = function(x)
        y.sin().sum().backward()  # torch.autograd.grad does not work with use_reentrant
        found.append([y, *[leaf.grad for leaf in leaves]])
    assert_equal(*found)
    graphs.assert_layers(2)


def test_compiled_autograd() -> None:
    module = lstm_ext.LSTM(I, H, 2)
    ours = copy.deepcopy(module)
    with torch._dynamo.config.patch(compiled_autograd=True):
        step = torch.compile(lambda x: ours(x)[0].sin().sum().backward(), backend="aot_eager")
        for time in (5, 7):
            x = torch.randn(time, B, I)
            step(x)
            module(x)[0].sin().sum().backward()
    assert_equal([p.grad for p in ours.parameters()], [p.grad for p in module.parameters()])


# ---- fake and meta tensors


@pytest.mark.parametrize("kind", ["fake", "meta"])
@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 2, "bidirectional": True, "proj_size": 3, "bias": False}], ids=str
)
def test_shapes_without_values(options: dict, kind: str) -> None:
    module, input = lstm_ext.LSTM(I, H, batch_first=True, **options), torch.randn(B, T, I)
    hx = states(module, (B,)) if options else None
    expected = values_and_gradients(module, input, hx)
    with FakeTensorMode() if kind == "fake" else torch.device("meta"):
        module = lstm_ext.LSTM(I, H, batch_first=True, **options)
        hx = hx and tuple(torch.empty(x.shape) for x in hx)
        result = values_and_gradients(module, torch.empty(input.shape), hx)
    assert result.keys() == expected.keys()
    for name, x in result.items():
        like = expected[name]
        assert (x.shape, x.stride(), x.dtype) == (like.shape, like.stride(), like.dtype), name
        assert (type(x), x.is_meta) == ((FakeTensor, False) if kind == "fake" else (Tensor, True))


# ---- a process of its own


@pytest.mark.devices("cpu")
def test_first_call_of_a_process_is_the_compiled_one() -> None:
    program = """
import torch, lstm_ext
assert "torch._dynamo" not in __import__("sys").modules, "importing lstm_ext takes seconds"
calls = []
def backend(module, inputs):
    calls.append([n for n in module.graph.nodes if "lstm_layer" in str(n.target) and n.op == "call_function"])
    return module
layer = lstm_ext.LSTM(3, 4)
y, _ = torch.compile(layer, backend=backend, fullgraph=True)(torch.randn(5, 2, 3))
y.sum().backward()
assert [len(c) for c in calls] == [1]
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_without_the_extension_the_equations_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    module = lstm_ext.LSTM(I, H)
    x = torch.randn(T, B, I)
    expected = training_step(module, x)
    monkeypatch.setattr(loader, "_result", loader._Result(None, loader.Status("reference")))
    monkeypatch.setattr(cuda_kernels, "_problems", {})  # what was found before
    graphs = Graphs()
    torch.testing.assert_close(training_step(in_place(module, graphs), x), expected)
    [graph] = graphs.all
    assert "sigmoid" in operators(graph.graph)
