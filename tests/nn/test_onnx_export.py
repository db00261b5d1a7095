"""Export to ONNX: a layer becomes the operator LSTM, and ONNX Runtime computes with it what the layer computes."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import onnx
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn
from torch.export import Dim
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._pytree import tree_leaves

import lstm_ext
import lstm_ext.onnx
from lstm_ext.options import OPTIONS

pytestmark = [
    pytest.mark.tools,  # ONNX Runtime and the exporters, half a minute
    pytest.mark.filterwarnings("ignore"),  # of torch's exporter, about itself
]

I, H = 3, 4
batch, time = Dim("batch"), Dim("time")

# Constructor's arguments, whether there is an hx
CASES = {
    "plain": ({}, False),
    "hx": ({}, True),
    "batch_first": ({"batch_first": True}, True),
    "both_directions": ({"bidirectional": True}, True),
    "no_bias": ({"bias": False}, False),
    "layers": ({"num_layers": 3, "bidirectional": True, "batch_first": True}, True),
    "layers_without": ({"num_layers": 2, "bias": False, "bidirectional": True}, False),
}


def arguments(module: lstm_ext.LSTM, time: int, batch: int, has_hx: bool, dtype=torch.float32) -> tuple:
    x = torch.randn((batch, time, I) if module.batch_first else (time, batch, I), dtype=dtype)
    sets = module.num_layers * (2 if module.bidirectional else 1)
    return (x, tuple(torch.randn(sets, batch, H, dtype=dtype) for _ in "hc")) if has_hx else (x,)


def shapes(module: lstm_ext.LSTM, has_hx: bool) -> tuple:
    x = {0: batch, 1: time} if module.batch_first else {0: time, 1: batch}
    return (x, ({1: batch}, {1: batch})) if has_hx else (x,)


def run(model: str | Path | onnx.ModelProto, args: tuple) -> list[Tensor]:
    if isinstance(model, onnx.ModelProto):
        model = model.SerializeToString()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options)
    names = [i.name for i in session.get_inputs()]
    inputs = dict(zip(names, [x.numpy() for x in tree_leaves(args)], strict=True))
    return [torch.from_numpy(x) for x in session.run(None, inputs)]


def assert_same(model: str | Path | onnx.ModelProto, module: nn.Module, calls: Sequence[tuple]) -> None:
    for args in calls:
        with torch.no_grad():
            expected = tree_leaves(module(*args))
        results = run(model, args)
        assert [x.shape for x in results] == [x.shape for x in expected]
        torch.testing.assert_close(results, expected)


def count(model: onnx.ModelProto, operator: str = "LSTM") -> int:
    return sum(node.op_type == operator for node in model.graph.node)


@pytest.mark.parametrize("case", CASES)
def test_layer(case: str) -> None:
    options, has_hx = CASES[case]
    module = lstm_ext.LSTM(I, H, **options).eval()
    program = lstm_ext.onnx.export(
        module, arguments(module, 5, 2, has_hx), dynamic_shapes=shapes(module, has_hx)
    )
    model = program.model_proto
    onnx.checker.check_model(model, full_check=True)
    layers = [node for node in model.graph.node if node.op_type == "LSTM"]
    assert len(layers) == module.num_layers
    constants = {tensor.name for tensor in model.graph.initializer}
    for layer in layers:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in layer.attribute}
        assert attributes["hidden_size"] == H and attributes.get("layout", 0) == 0
        assert attributes["direction"] == (b"bidirectional" if module.bidirectional else b"forward")
        weights = layer.input[1 : 4 if module.bias else 3]
        assert all(name in constants for name in weights)
    assert_same(model, module, [arguments(module, *sizes, has_hx) for sizes in ((7, 3), (1, 1), (4, 2))])


class Model(nn.Module):
    def __init__(self, hidden: int = H) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, I)
        self.lstm = lstm_ext.LSTM(I, hidden, 2, dropout=0.5, batch_first=True)
        self.out = nn.Linear(hidden, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(self.embedding(x))[0])


def test_file_of_a_model_with_large_weights(tmp_path: Path) -> None:
    """Weights beyond what the exporter itself folds."""
    model = Model(hidden=200).eval()
    path = tmp_path / "model.onnx"
    dynamic = ({0: batch, 1: time},)
    x = torch.randint(7, (2, 5))
    program = lstm_ext.onnx.export(model, (x,), path, dynamic_shapes=dynamic)
    assert_same(path, model, [(torch.randint(7, (3, 9)),)])
    saved = onnx.load(path)
    assert count(saved) == 2
    sizes = {tuple(tensor.dims) for tensor in saved.graph.initializer}
    assert (1, 800, 200) in sizes and (800, 200) not in sizes  # in the order of ONNX, and not twice
    constants = {tensor.name for tensor in saved.graph.initializer}
    for node in saved.graph.node:
        if node.op_type == "LSTM":
            assert set(node.input[1:4]) <= constants
    assert program.model_proto.graph.node == saved.graph.node

    # Without our function, the weights are brought in order by nodes of the graph.
    plain = torch.onnx.export(
        model,
        (x,),
        dynamo=True,
        dynamic_shapes=dynamic,
        custom_translation_table=lstm_ext.onnx.translation_table(),
    )
    assert_same(plain.model_proto, model, [(torch.randint(7, (3, 9)),)])

    inside = tmp_path / "one_file.onnx"
    lstm_ext.onnx.export(model, (x,), inside, dynamic_shapes=dynamic, external_data=False)
    assert_same(inside, model, [(torch.randint(7, (3, 9)),)])
    assert {p.name for p in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data", "one_file.onnx"}


def test_weights_that_the_model_computes() -> None:
    module = lstm_ext.LSTM(I, H).eval()
    nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
    args = arguments(module, 5, 2, has_hx=False)
    program = lstm_ext.onnx.export(module, args, dynamic_shapes=shapes(module, has_hx=False))
    assert_same(program.model_proto, module, [arguments(module, 7, 3, has_hx=False)])

    class Generated(nn.Module):
        def forward(self, x: Tensor, w_ih: Tensor, w_hh: Tensor) -> Tensor:
            return lstm_ext.functional.lstm(x, None, [w_ih, w_hh], bias=False)[0]

    args = (torch.randn(5, 2, I), torch.randn(4 * H, I), torch.randn(4 * H, H))
    program = lstm_ext.onnx.export(Generated(), args)
    assert_same(program.model_proto, Generated(), [tuple(torch.randn_like(x) for x in args)])


@pytest.mark.parametrize("kind", ["step", "cell", "unbatched"])
def test_other_calls(kind: str) -> None:
    module = lstm_ext.LSTM(I, H, 2).eval()
    if kind == "cell":
        model, dynamic = lstm_ext.LSTMCell(I, H), ({0: batch}, ({0: batch}, {0: batch}))
        calls = [(torch.randn(n, I), (torch.randn(n, H), torch.randn(n, H))) for n in (2, 5)]
    elif kind == "step":

        class Step(nn.Module):
            def forward(self, x: Tensor, h: Tensor, c: Tensor):
                return module.step(x, (h, c))

        model, dynamic = Step(), ({0: batch}, {1: batch}, {1: batch})
        calls = [(torch.randn(n, I), torch.randn(2, n, H), torch.randn(2, n, H)) for n in (2, 5)]
    else:
        model, dynamic = module, ({0: time},)
        calls = [(torch.randn(n, I),) for n in (4, 7)]
    program = lstm_ext.onnx.export(model, calls[0], dynamic_shapes=dynamic)
    assert count(program.model_proto) == (1 if kind == "cell" else 2)
    assert_same(program.model_proto, model, calls)


def test_float64() -> None:
    """Which the standard allows and ONNX Runtime does not compute: onnx's own evaluator does."""
    module = lstm_ext.LSTM(I, H, 2, dtype=torch.float64).eval()
    args = arguments(module, 5, 2, True, torch.float64)
    with pytest.warns(UserWarning, match="ONNX Runtime refuses an LSTM of float64.*loops=True"):
        program = lstm_ext.onnx.export(module, args, dynamic_shapes=shapes(module, has_hx=True))
    with pytest.raises(Exception, match="LSTM operator does not support double yet"):
        run(program.model_proto, args)
    onnx.checker.check_model(program.model_proto, full_check=True)
    evaluator = ReferenceEvaluator(program.model_proto)
    args = arguments(module, 7, 3, True, torch.float64)
    results = evaluator.run(
        None, dict(zip(evaluator.input_names, [x.numpy() for x in tree_leaves(args)], strict=True))
    )
    expected = [x.detach().numpy() for x in tree_leaves(module(*args))]
    for x, y in zip(results, expected, strict=True):
        assert x.dtype == numpy.float64
        numpy.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("activation", ["tanh", "relu", "affine", "scaled_tanh"])
def test_onnx_runtime_runs_the_loop_of_float64(activation: str) -> None:
    module = lstm_ext.LSTM(I, H, bidirectional=True, cell_activation=activation, dtype=torch.float64).eval()
    args = arguments(module, 5, 2, True, torch.float64)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "lstm_ext")
        program = lstm_ext.onnx.export(module, args, dynamic_shapes=shapes(module, has_hx=True), loops=True)
    assert_same(program.model_proto, module, [arguments(module, 7, 3, True, torch.float64)])


def test_float16() -> None:
    """Computed in float32, as in the kernels."""
    module = lstm_ext.LSTM(I, H, bidirectional=True, dtype=torch.float16).eval()
    args = arguments(module, 5, 2, True, torch.float16)
    program = lstm_ext.onnx.export(module, args, dynamic_shapes=shapes(module, has_hx=True))
    assert_same(program.model_proto, module, [arguments(module, 7, 3, True, torch.float16)])


@pytest.mark.parametrize("opset", [18, 22])
def test_opsets(opset: int) -> None:
    module = lstm_ext.LSTM(I, H).eval()
    program = lstm_ext.onnx.export(
        module,
        arguments(module, 5, 2, False),
        dynamic_shapes=shapes(module, False),
        opset_version=opset,
    )
    model = program.model_proto
    onnx.checker.check_model(model, full_check=True)
    assert {o.domain: o.version for o in model.opset_import}[""] == opset
    assert_same(model, module, [arguments(module, 7, 3, False)])


def test_exported_program_names_and_own_translations() -> None:
    module = lstm_ext.LSTM(I, H).eval()
    args = arguments(module, 5, 2, has_hx=False)
    program = torch.export.export(module, args, dynamic_shapes=shapes(module, has_hx=False))
    calls = []

    def own(input, h0, c0, weights, batch_sizes, has_bias, bidirectional):
        calls.append(has_bias)
        translate = lstm_ext.onnx.translation_table()[torch.ops.lstm_ext.lstm_layer.default]
        return translate(input, h0, c0, weights, batch_sizes, has_bias, bidirectional)

    result = lstm_ext.onnx.export(
        program,
        custom_translation_table={torch.ops.lstm_ext.lstm_layer.default: own},
        input_names=["x"],
        output_names=["y", "h", "c"],
    )
    assert calls == [True]
    assert [i.name for i in result.model_proto.graph.input] == ["x"]
    assert [o.name for o in result.model_proto.graph.output] == ["y", "h", "c"]
    assert_same(result.model_proto, module, [arguments(module, 7, 3, has_hx=False)])


FUNCTIONS = {"gate_activation": "hard_sigmoid", "cell_activation": ("softsign", ("elu", 0.5))}
OTHERS = {
    "gate_activation": ("scaled_tanh", 0.9, 0.8),
    "cell_activation": (("affine", 0.5, 0.1), ("leaky_relu", 0.3)),
}
# Arguments of the call, of the constructor, and the nodes of a layer and direction: one LSTM, or a Scan each.
WITH_OPTIONS: dict[str, tuple[tuple[str, ...], dict[str, Any], str]] = {
    "lengths": (("lengths",), {}, "LSTM"),
    "lengths, layers": (("lengths",), {"num_layers": 2, "bidirectional": True, "batch_first": True}, "LSTM"),
    "lengths, no bias": (("lengths",), {"coupled_gates": True, "bias": False}, "LSTM"),
    "attributes": (
        ("lengths",),
        {"peephole": True, "preactivation_clip": 1.0, "bidirectional": True},
        "LSTM",
    ),
    "activations": (("lengths",), {**FUNCTIONS, "bidirectional": True}, "LSTM"),
    "mask": (("mask",), {"bidirectional": True}, "LSTM"),
    "projection": ((), {"proj_size": 2, "num_layers": 2, "bidirectional": True}, "Scan"),
    "resets": (("resets",), {"bidirectional": True}, "Scan"),
    "resets to states": (
        ("resets", "reset_state", "lengths", "return_cell_states", "return_gates"),
        {"num_layers": 2, "bidirectional": True, "batch_first": True},
        "Scan",
    ),
    "mask, resets, projection": (("mask", "resets"), {"proj_size": 3}, "Scan"),
    "norm": (("lengths",), {"layer_norm": True, "bidirectional": True, "zoneout": (0.1, 0.2)}, "Scan"),
    "norm, no bias": ((), {"layer_norm": True, "bias": False, "cell_clip": 0.4}, "Scan"),
    "cell": (("resets",), {"peephole": True, "cell_clip": 0.5, "coupled_gates": True, **OTHERS}, "Scan"),
}


class Called(nn.Module):
    """A layer that is called with these arguments."""

    def __init__(self, names: Sequence[str], **options: Any) -> None:
        super().__init__()
        self.names = names
        self.lstm = lstm_ext.LSTM(I, H, **options)
        for p in self.lstm.parameters():
            nn.init.normal_(p, 0, 0.4)

    def forward(self, x: Tensor, hx: Any, given: tuple[Any, ...] = ()) -> Any:
        returned = {n: True for n in self.names if n.startswith("return")}
        given = dict(zip([n for n in self.names if n not in returned], given, strict=True))
        return self.lstm(x, hx, **given, **returned)

    def arguments(self, T: int, B: int) -> tuple:
        first, sets = self.lstm.batch_first, self.lstm.num_layers * (2 if self.lstm.bidirectional else 1)
        steps = (B, T) if first else (T, B)
        states = [tuple(torch.randn(sets, B, n) for n in (self.lstm.proj_size or H, H)) for _ in range(2)]
        everything = {
            "lengths": torch.tensor([T, 0, *range(1, T + 1), *[T] * B][:B] if B > 1 else [max(T - 1, 0)]),
            "mask": torch.rand(steps) < 0.6,
            "resets": torch.rand(steps) < 0.4,
            "reset_state": states[1],
        }
        given = tuple(everything[n] for n in self.names if n in everything)
        return (torch.randn(*steps, I), states[0], *([given] if given else []))

    def shapes(self) -> tuple:
        steps = {0: batch, 1: time} if self.lstm.batch_first else {0: time, 1: batch}
        states = ({1: batch}, {1: batch})
        everything = {"lengths": {0: batch}, "mask": steps, "resets": steps, "reset_state": states}
        given = tuple(everything[n] for n in self.names if n in everything)
        return (steps, states, *([given] if given else []))


SIZES = ((5, 3), (7, 4), (1, 2), (9, 1))  # of steps and sequences; the first is that of the export


@pytest.mark.parametrize("name", WITH_OPTIONS)
@pytest.mark.parametrize("loops", [False, True])
def test_options_at_any_size(name: str, loops: bool) -> None:
    """In ONNX Runtime. One operator a layer where the standard has one that can it, else a loop."""
    names, options, kind = WITH_OPTIONS[name]
    model = Called(names, **options).eval()
    exported = lstm_ext.onnx.export(
        model, model.arguments(*SIZES[0]), dynamic_shapes=model.shapes(), loops=loops
    ).model_proto
    onnx.checker.check_model(exported, full_check=True)
    layers, directions = model.lstm.num_layers, 2 if model.lstm.bidirectional else 1
    kind = "Scan" if loops else kind
    expected = {"LSTM": layers, "Scan": 0} if kind == "LSTM" else {"LSTM": 0, "Scan": layers * directions}
    assert {operator: count(exported, operator) for operator in expected} == expected
    assert_same(exported, model, [model.arguments(*size) for size in SIZES])


# OpenVINO leaves sequence_lens, peepholes and input_forget of the operator out, so these are loops.
@pytest.mark.parametrize("name", [name for name, (_, _, kind) in WITH_OPTIONS.items() if name != "mask"])
def test_options_in_openvino(name: str) -> None:
    openvino = pytest.importorskip("openvino")
    names, options, kind = WITH_OPTIONS[name]
    model = Called(names, **options).eval()
    exported = lstm_ext.onnx.export(
        model, model.arguments(*SIZES[0]), dynamic_shapes=model.shapes(), loops=kind == "LSTM"
    ).model_proto
    core = openvino.Core()
    compiled = core.compile_model(
        core.read_model(exported.SerializeToString()), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    for size in SIZES:
        args = model.arguments(*size)
        results = compiled([x.numpy() for x in tree_leaves(args)])
        with torch.no_grad():
            expected = tree_leaves(model(*args))
        torch.testing.assert_close([torch.from_numpy(results[k]) for k in range(len(expected))], expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_loops_of_other_types(dtype: torch.dtype) -> None:
    """float16 is computed in float32; float64 by onnx's own evaluator."""
    both = dtype == torch.float16  # the evaluator runs no loop backwards
    module = lstm_ext.LSTM(I, H, proj_size=2, bidirectional=both, dtype=dtype).eval()
    x = torch.randn(5, 2, I, dtype=dtype)
    model = lstm_ext.onnx.export(module, (x,), dynamic_shapes=({0: time, 1: batch},)).model_proto
    other = torch.randn(7, 3, I, dtype=dtype)
    if dtype == torch.float16:
        assert_same(model, module, [(other,)])
        return
    results = ReferenceEvaluator(model).run(None, {model.graph.input[0].name: other.numpy()})
    torch.testing.assert_close([torch.from_numpy(r) for r in results], tree_leaves(module(other)))


@pytest.mark.parametrize("name", [name for name, (_, _, kind) in WITH_OPTIONS.items() if kind == "LSTM"])
def test_there_and_back(name: str) -> None:
    """The layers of a model that was exported, from its file."""
    options = {"batch_first": False, **WITH_OPTIONS[name][1]} | {"batch_first": False}
    module = Called((), **options).lstm.eval()
    x = torch.randn(6, 3, I)
    args = (x, torch.tensor([6, 0, 2]), *[torch.randn_like(s) for s in module(x)[1]])
    changing = ({0: time, 1: batch}, {0: batch}, {1: batch}, {1: batch})
    model = lstm_ext.onnx.export(Lengths(module), args, dynamic_shapes=changing).model_proto
    layers = list(lstm_ext.from_onnx(model).values())
    assert len(layers) == module.num_layers
    y = x
    for layer in layers:
        y = layer(y)[0]
    torch.testing.assert_close(y, module(x)[0])
    assert_same(model, Lengths(module), [args])


class Lengths(nn.Module):
    def __init__(self, layer: lstm_ext.LSTM) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, lengths: Tensor, h: Tensor, c: Tensor) -> Any:
        return self.layer(x, (h, c), lengths=lengths)


@pytest.mark.parametrize("name", ["norm", "cell", "attributes"])
def test_exported_program_with_options(name: str) -> None:
    """Made outside of an export to ONNX, it holds the layer's own operator."""
    names, options, _ = WITH_OPTIONS[name]
    model = Called(names, **options).eval()
    program = torch.export.export(model, model.arguments(*SIZES[0]), dynamic_shapes=model.shapes())
    exported = lstm_ext.onnx.export(program).model_proto
    assert_same(exported, model, [model.arguments(*size) for size in SIZES])


def test_what_is_random_needs_a_number_of_steps() -> None:
    module = lstm_ext.LSTM(I, H, zoneout=0.5)
    args = arguments(module, 5, 2, has_hx=False)
    program = torch.export.export(module, args, dynamic_shapes=({1: batch},))
    assert count(lstm_ext.onnx.export(program).model_proto, "Scan") == 0
    program = torch.export.export(module, args, dynamic_shapes=shapes(module, has_hx=False))
    with pytest.raises(lstm_ext.onnx.UnsupportedLayerError, match="a fixed number of steps"):
        lstm_ext.onnx.export(program)


@pytest.mark.parametrize("option", ["weight_dropout", "recurrent_dropout"])
def test_a_mask_is_no_constant(option: str) -> None:
    module = lstm_ext.LSTM(I, H, **{option: 0.5})
    with pytest.raises(
        lstm_ext.onnx.UnsupportedLayerError, match=rf"{option} in training mode .* call eval\(\)"
    ):
        lstm_ext.onnx.export(module, arguments(module, 5, 2, has_hx=False))


class Packed(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.lstm = lstm_ext.LSTM(I, H, **options)

    def forward(self, data: Tensor, *rest: Tensor) -> Tensor:
        return self.lstm(PackedSequence(data, *rest))[0].data


def test_what_onnx_cannot_express() -> None:
    packed = pack_padded_sequence(torch.randn(5, 2, I), torch.tensor([3, 5]), enforce_sorted=False)
    for model, args, said in (
        (Packed(), tuple(packed), "a PackedSequence cannot be exported"),
        (Packed(layer_norm=True), tuple(packed), "a PackedSequence cannot be exported"),
    ):
        with pytest.raises(lstm_ext.onnx.UnsupportedLayerError, match=said):
            lstm_ext.onnx.export(model.eval(), args)
    # Other errors are torch's own.
    with pytest.raises(torch.onnx.OnnxExporterError):
        lstm_ext.onnx.export(lstm_ext.LSTM(I, H).eval(), (torch.randn(5, 2, I + 1),))


def test_an_option_that_onnx_does_not_have_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As every new row of the table is until someone says what becomes of it."""
    monkeypatch.setitem(OPTIONS, "cell_clip", OPTIONS["cell_clip"]._replace(onnx=""))
    with pytest.raises(lstm_ext.onnx.UnsupportedLayerError, match="cell_clip cannot be exported to ONNX"):
        lstm_ext.onnx.export(lstm_ext.LSTM(I, H, cell_clip=0.5).eval(), (torch.randn(5, 2, I),))


def test_needs_its_packages_only_when_called(monkeypatch: pytest.MonkeyPatch) -> None:
    program = (
        "import sys, torch, lstm_ext.onnx\n"
        "assert not {'onnx', 'onnxscript'} & sys.modules.keys()\n"
        "import onnx\n"
        "assert onnx is not lstm_ext.onnx and hasattr(onnx, 'ModelProto')\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=r"lstm_ext\.onnx needs onnx and onnxscript: pip install onnx onnxscript"
    ):
        lstm_ext.onnx.export(lstm_ext.LSTM(I, H), (torch.randn(5, 2, I),))
