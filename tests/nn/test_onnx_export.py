"""Export to ONNX: a layer becomes the operator LSTM, and ONNX Runtime computes with it what the layer computes."""

from __future__ import annotations

import io
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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


def arrays(args: tuple) -> list[Any]:
    return [x.numpy() for x in tree_leaves(args) if x is not None]


def run(model: str | bytes | Path | onnx.ModelProto, args: tuple) -> list[Tensor]:
    if isinstance(model, onnx.ModelProto):
        model = model.SerializeToString()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options)
    names = [i.name for i in session.get_inputs()]
    inputs = dict(zip(names, arrays(args), strict=True))
    return [torch.from_numpy(x) for x in session.run(None, inputs)]


def evaluate(model: onnx.ModelProto, args: tuple) -> list[Tensor]:
    """By onnx's own evaluator, which also runs an LSTM of float64."""
    evaluator = ReferenceEvaluator(model)
    inputs = dict(zip(evaluator.input_names, arrays(args), strict=True))
    return [torch.from_numpy(x) for x in evaluator.run(None, inputs)]


def assert_same(model: Any, module: nn.Module, calls: Sequence[tuple], by: Any = run) -> None:
    for args in calls:
        with torch.no_grad():
            expected = tree_leaves(module(*args))
        results = by(model, args)
        assert [x.shape for x in results] == [x.shape for x in expected]
        torch.testing.assert_close(results, expected)


def count(model: onnx.ModelProto, operator: str = "LSTM") -> int:
    return sum(node.op_type == operator for node in model.graph.node)


FUNCTIONS = {"gate_activation": "hard_sigmoid", "cell_activation": ("softsign", ("elu", 0.5))}
OTHERS = {
    "gate_activation": ("scaled_tanh", 0.9, 0.8),
    "cell_activation": (("affine", 0.5, 0.1), ("leaky_relu", 0.3)),
}
# Arguments of the call, of the constructor, and the nodes of a layer and direction: one LSTM or GRU, or a Scan each.
CASES: dict[str, tuple[tuple[str, ...], dict[str, Any], str]] = {
    "plain": (("hx",), {}, "LSTM"),
    "no states": ((), {}, "LSTM"),
    "layers": (("hx",), {"num_layers": 3, "bidirectional": True, "batch_first": True}, "LSTM"),
    "no states, no bias": ((), {"num_layers": 2, "bias": False, "bidirectional": True}, "LSTM"),
    "lengths": (("hx", "lengths"), {}, "LSTM"),
    "lengths, layers": (
        ("hx", "lengths"),
        {"num_layers": 2, "bidirectional": True, "batch_first": True},
        "LSTM",
    ),
    "lengths, no bias": (("hx", "lengths"), {"coupled_gates": True, "bias": False}, "LSTM"),
    "attributes": (
        ("hx", "lengths"),
        {"peephole": True, "preactivation_clip": 1.0, "bidirectional": True},
        "LSTM",
    ),
    "activations": (("hx", "lengths"), {**FUNCTIONS, "bidirectional": True}, "LSTM"),
    "mask": (("hx", "mask"), {"bidirectional": True}, "LSTM"),
    "GRU": (("hx",), {}, "GRU"),
    "GRU, no states": ((), {"num_layers": 2, "bias": False, "bidirectional": True}, "GRU"),
    "GRU, lengths": (("hx", "lengths"), {"num_layers": 2, "bidirectional": True, "batch_first": True}, "GRU"),
    "GRU, mask": (("hx", "mask"), {"bidirectional": True}, "GRU"),
    "GRU, resets": (("hx", "resets", "reset_state"), {"bidirectional": True}, "GRU Scan"),
    "projection": (("hx",), {"proj_size": 2, "num_layers": 2, "bidirectional": True}, "Scan"),
    "resets": (("hx", "resets"), {"bidirectional": True}, "Scan"),
    "resets to states": (
        ("hx", "resets", "reset_state", "lengths", "return_cell_states", "return_gates"),
        {"num_layers": 2, "bidirectional": True, "batch_first": True},
        "Scan",
    ),
    "mask, resets, projection": (("hx", "mask", "resets"), {"proj_size": 3}, "Scan"),
    "norm": (("hx", "lengths"), {"layer_norm": True, "bidirectional": True, "zoneout": (0.1, 0.2)}, "Scan"),
    "norm, no bias": (("hx",), {"layer_norm": True, "bias": False, "cell_clip": 0.4}, "Scan"),
    "norm, cell": (("hx", "resets"), {"layer_norm": "cell", "zoneout": (0.1, 0.2)}, "Scan"),
    "cell": (("hx", "resets"), {"peephole": True, "cell_clip": 0.5, "coupled_gates": True, **OTHERS}, "Scan"),
}


SIZES = ((5, 3), (7, 4), (1, 2), (9, 1))  # of steps and sequences; the first is that of the export


class Called(nn.Module):
    """A layer that is called with these arguments."""

    def __init__(
        self, names: Sequence[str], dtype: torch.dtype = torch.float32, gru: bool = False, **options: Any
    ) -> None:
        super().__init__()
        self.gru = gru
        self.has_hx, self.names = "hx" in names, [name for name in names if name != "hx"]
        self.lstm = (lstm_ext.GRU if gru else lstm_ext.LSTM)(I, H, **options, dtype=dtype)
        for p in self.lstm.parameters():
            nn.init.normal_(p, 0, 0.4)

    def forward(self, x: Tensor, hx: Any, given: tuple[Any, ...] = ()) -> Any:
        returned = {n: True for n in self.names if n.startswith("return")}
        given = dict(zip([n for n in self.names if n not in returned], given, strict=True))
        return self.lstm(x, hx, **given, **returned)

    def arguments(self, T: int, B: int) -> tuple:
        first, sets = self.lstm.batch_first, self.lstm.num_layers * (2 if self.lstm.bidirectional else 1)
        steps = (B, T) if first else (T, B)
        states = [tuple(self.random(sets, B, n) for n in (self.lstm.proj_size or H, H)) for _ in range(2)]
        if self.gru:
            states = [h for h, _ in states]
        everything = {
            "lengths": torch.tensor([T, 0, *range(1, T + 1), *[T] * B][:B] if B > 1 else [max(T - 1, 0)]),
            "mask": torch.rand(steps) < 0.6,
            "resets": torch.rand(steps) < 0.4,
            "reset_state": states[1],
        }
        given = tuple(everything[n] for n in self.names if n in everything)
        return (self.random(*steps, I), states[0] if self.has_hx else None, *([given] if given else []))

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape).to(self.lstm.weight_ih_l0.dtype)

    def shapes(self) -> tuple:
        steps = {0: batch, 1: time} if self.lstm.batch_first else {0: time, 1: batch}
        states = {1: batch} if self.gru else ({1: batch}, {1: batch})
        everything = {"lengths": {0: batch}, "mask": steps, "resets": steps, "reset_state": states}
        given = tuple(everything[n] for n in self.names if n in everything)
        return (steps, states if self.has_hx else None, *([given] if given else []))


def called_of(name: str, **options: Any) -> Called:
    names, others, kind = CASES[name]
    return Called(names, gru=kind.startswith("GRU"), **{**others, **options})


def exported(model: Called, **how: Any) -> onnx.ModelProto:
    """For any number of steps and sequences."""
    args = model.eval().arguments(*SIZES[0])
    return lstm_ext.onnx.export(model, args, dynamic_shapes=model.shapes(), **how).model_proto


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("loops", [False, True])
def test_layers_at_any_size(name: str, loops: bool) -> None:
    """In ONNX Runtime. One operator a layer where the standard has one that can it, else a loop."""
    _, _, kind = CASES[name]
    called = called_of(name)
    module, model = called.lstm, exported(called, loops=loops)
    onnx.checker.check_model(model, full_check=True)
    layers, directions = module.num_layers, 2 if module.bidirectional else 1
    kind = "Scan" if loops else kind.split()[-1]
    expected = {"LSTM": 0, "GRU": 0, "Scan": 0, kind: layers * (directions if kind == "Scan" else 1)}
    assert {operator: count(model, operator) for operator in expected} == expected
    constants = {tensor.name for tensor in model.graph.initializer}
    for node in [node for node in model.graph.node if node.op_type in ("LSTM", "GRU")]:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert attributes["hidden_size"] == H and attributes.get("layout", 0) == 0
        assert attributes.get("linear_before_reset", 0) == called.gru
        assert attributes["direction"] == (b"bidirectional" if module.bidirectional else b"forward")
        assert set(node.input[1 : 4 if module.bias else 3]) <= constants
    assert_same(model, called, [called.arguments(*size) for size in SIZES])


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
    called = Called(())
    nn.utils.parametrizations.weight_norm(called.lstm, "weight_hh_l0")
    assert_same(exported(called), called, [called.arguments(7, 3)])

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


FLOAT64 = {"dtype": torch.float64}
# float16 is computed in float32, as in the kernels. The evaluator runs no loop backwards.
OF_OTHER_TYPES: dict[str, tuple[dict[str, Any], bool, Any]] = {
    "float16": ({"dtype": torch.float16, "bidirectional": True}, False, run),
    "float16, projection": ({"dtype": torch.float16, "bidirectional": True, "proj_size": 2}, False, run),
    "float64, projection": ({**FLOAT64, "proj_size": 2}, False, evaluate),
    **{
        f"float64, loop, {f}": ({**FLOAT64, "bidirectional": True, "cell_activation": f}, True, run)
        for f in ("tanh", "relu", "affine", "scaled_tanh")
    },
}


@pytest.mark.parametrize("name", OF_OTHER_TYPES)
def test_other_types(name: str) -> None:
    options, loops, by = OF_OTHER_TYPES[name]
    called = Called(("hx",), **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "lstm_ext")
        model = exported(called, loops=loops)
    assert_same(model, called, [called.arguments(7, 3)], by)


def test_an_operator_of_float64() -> None:
    """The standard allows it, and ONNX Runtime does not compute it."""
    called = Called(("hx",), num_layers=2, **FLOAT64)
    with pytest.warns(UserWarning, match="ONNX Runtime refuses an LSTM of float64.*loops=True"):
        model = exported(called)
    with pytest.raises(Exception, match="LSTM operator does not support double yet"):
        run(model, called.arguments(5, 2))
    onnx.checker.check_model(model, full_check=True)
    assert_same(model, called, [called.arguments(7, 3)], evaluate)


@pytest.mark.parametrize("opset", [18, 22])
def test_opsets(opset: int) -> None:
    called = Called(())
    model = exported(called, opset_version=opset)
    onnx.checker.check_model(model, full_check=True)
    assert {o.domain: o.version for o in model.opset_import}[""] == opset
    assert_same(model, called, [called.arguments(7, 3)])


def test_exported_program_names_and_own_translations() -> None:
    called = Called(()).eval()
    program = torch.export.export(called, called.arguments(5, 2), dynamic_shapes=called.shapes())
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
    assert_same(result.model_proto, called, [called.arguments(7, 3)])


# OpenVINO leaves sequence_lens, peepholes and input_forget of the operator out, so these are loops.
@pytest.mark.parametrize("name", [name for name in CASES if name != "mask"])
def test_openvino(name: str) -> None:
    openvino = pytest.importorskip("openvino")
    called, kind = called_of(name), CASES[name][2]
    core, model = openvino.Core(), exported(called, loops=kind != "Scan")
    compiled = core.compile_model(
        core.read_model(model.SerializeToString()), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )

    def by(_: Any, args: tuple) -> list[Tensor]:
        results = compiled(arrays(args))
        return [torch.from_numpy(results[k]) for k in range(len(results))]

    assert_same(model, called, [called.arguments(*size) for size in SIZES], by)


@pytest.mark.parametrize("name", [name for name, (_, _, kind) in CASES.items() if "Scan" not in kind])
def test_there_and_back(name: str) -> None:
    """The layers of a model that was exported, from its file."""
    called = called_of(name, batch_first=False)
    called.has_hx, called.names = True, ["lengths"]
    layers = list(lstm_ext.from_onnx(exported(called)).values())
    assert len(layers) == called.lstm.num_layers
    y = x = torch.randn(6, 3, I)
    for layer in layers:
        y = layer(y)[0]
    torch.testing.assert_close(y, called.lstm(x)[0])


@pytest.mark.parametrize("name", ["norm", "cell", "attributes"])
def test_exported_program_with_options(name: str) -> None:
    """Made outside of an export to ONNX, it holds the layer's own operator."""
    names, options, _ = CASES[name]
    model = Called(names, **options).eval()
    program = torch.export.export(model, model.arguments(*SIZES[0]), dynamic_shapes=model.shapes())
    assert_same(lstm_ext.onnx.export(program).model_proto, model, [model.arguments(*size) for size in SIZES])


def test_what_is_random_needs_a_number_of_steps() -> None:
    called = Called((), zoneout=0.5)
    args = called.arguments(5, 2)
    program = torch.export.export(called, args, dynamic_shapes=({1: batch}, None))
    assert count(lstm_ext.onnx.export(program).model_proto, "Scan") == 0
    program = torch.export.export(called, args, dynamic_shapes=called.shapes())
    with pytest.raises(lstm_ext.onnx.UnsupportedLayerError, match="a fixed number of steps"):
        lstm_ext.onnx.export(program)


class Packed(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.lstm = lstm_ext.LSTM(I, H, **options)

    def forward(self, data: Tensor, *rest: Tensor) -> Tensor:
        return self.lstm(PackedSequence(data, *rest))[0].data


X = torch.zeros(5, 2, I)
PACKED = tuple(pack_padded_sequence(X, torch.tensor([3, 5]), enforce_sorted=False))
UNSUPPORTED = lstm_ext.onnx.UnsupportedLayerError


@pytest.mark.parametrize(
    ("model", "args", "error", "text"),
    [
        (
            lstm_ext.LSTM(I, H, weight_dropout=0.5),
            (X,),
            UNSUPPORTED,
            r"weight_dropout in training .*eval\(\)",
        ),
        (
            lstm_ext.LSTM(I, H, recurrent_dropout=0.5),
            (X,),
            UNSUPPORTED,
            r"recurrent_dropout in training .*eval\(\)",
        ),
        (Packed().eval(), PACKED, UNSUPPORTED, "a PackedSequence cannot be exported"),
        (Packed(layer_norm=True).eval(), PACKED, UNSUPPORTED, "a PackedSequence cannot be exported"),
        (lstm_ext.LSTM(I + 1, H).eval(), (X,), torch.onnx.OnnxExporterError, ""),  # torch's own
    ],
    ids=["weight_dropout", "recurrent_dropout", "packed", "packed, layer_norm", "features"],
)
def test_what_onnx_cannot_express(model: nn.Module, args: tuple, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        lstm_ext.onnx.export(model, args)


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


# --- torch.onnx.export, without lstm_ext.onnx


def by_torch_alone(model: nn.Module, args: tuple, **how: Any) -> onnx.ModelProto:
    if (
        torch.__version__.startswith("2.11.")
        and sum(m.num_layers for m in model.modules() if hasattr(m, "num_layers")) > 1
    ):
        pytest.skip("torch 2.11 cannot export two of its operators to ONNX")
    return torch.onnx.export(model.eval(), args, dynamo=True, verbose=False, **how).model_proto


@pytest.mark.parametrize(
    "name", ["plain", "no states", "layers", "no states, no bias", "projection", "norm, no bias"]
)
def test_torch_alone(name: str) -> None:
    """What torch has no layer for is in basic operators. The number of steps is that of the export."""
    called = Called(*CASES[name][:1], **CASES[name][1])
    steps = {0: batch} if called.lstm.batch_first else {1: batch}
    states = ({1: batch}, {1: batch}) if called.has_hx else None
    model = by_torch_alone(called, called.arguments(5, 2), dynamic_shapes=(steps, states))
    assert_same(model, called, [called.arguments(5, 3)])


@pytest.mark.parametrize("kind", [lstm_ext.LSTMCell, lstm_ext.TorchLSTM])
def test_torch_alone_on_other_classes(kind: Any) -> None:
    layer, x = kind(I, H), torch.randn(2, I)
    assert_same(by_torch_alone(layer, (x,)), layer, [(x,)])


def test_torch_alone_refuses_a_time_that_changes() -> None:
    with pytest.raises(torch.onnx.OnnxExporterError, match=r"fixed number of steps.*lstm_ext\.onnx\.export"):
        by_torch_alone(lstm_ext.LSTM(I, H), (X,), dynamic_shapes=({0: time},))


def test_torch_with_our_table() -> None:
    """One of several translations, in a table of the caller's own; then none, which is another export."""
    layer, table = lstm_ext.LSTM(I, H), {**lstm_ext.onnx.translation_table()}
    model = by_torch_alone(layer, (X,), dynamic_shapes=({0: time},), custom_translation_table=table)
    assert count(model) == 1
    assert_same(model, layer, [(torch.randn(7, 2, I),)])
    assert_same(by_torch_alone(layer, (X,)), layer, [(torch.randn(5, 2, I),)])


@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 3, "dropout": 0.5}, {"batch_first": True, "bias": False}]
)
def test_the_older_exporter(options: dict[str, Any]) -> None:
    model, file = lstm_ext.convert(nn.Sequential(nn.LSTM(I, H, **options))).eval(), io.BytesIO()
    torch.onnx.export(model, (X,), file, dynamo=False)
    assert_same(file.getvalue(), model, [(torch.randn(5, 2, I),)])
    assert type(model[0]) is lstm_ext.TorchLSTM
