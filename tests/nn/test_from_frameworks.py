"""lstm_ext.from_keras and its like: what the frameworks computed themselves, and what is refused by name.

frameworks/make.py made the cases with the frameworks; none of them is needed here.
"""

from __future__ import annotations

import base64
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

import lstm_ext

CASES = json.loads((Path(__file__).parent / "frameworks" / "frameworks.json").read_text())
I, H = 3, 4


def array(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def tensors(source: Any) -> Any:
    """Its lists of numbers as tensors."""
    if isinstance(source, dict):
        return {name: tensors(part) for name, part in source.items()}
    if isinstance(source, list):
        numbers = source
        while isinstance(numbers, list):
            numbers = numbers[0]
        try:
            return torch.tensor(source)
        except (TypeError, ValueError):
            return [tensors(part) for part in source]
    return source


class Layer:
    """A layer of Keras, as far as an importer sees it."""

    def __init__(self, weights: list[Tensor], **attributes: Any) -> None:
        self.weights = weights
        self.__dict__ |= attributes

    def get_weights(self) -> list[Tensor]:
        return self.weights


class LSTM(Layer):
    pass


class LSTMCell(Layer):
    pass


class RNN(Layer):
    pass


def imported(case: dict[str, Any]) -> lstm_ext.LSTM:
    function, source = getattr(lstm_ext, case["function"]), case["source"]
    if case["function"] == "from_onnx":
        onnx = pytest.importorskip("onnx")
        layers = function(onnx.load_from_string(base64.b64decode(source)))
        assert list(layers) == ["layer"]
        return layers["layer"]
    if case["function"] == "from_keras":
        layers = [[torch.tensor(a) for a in layer] for layer in source]
        if len(layers) > 1:
            halves = [LSTM([]), LSTM([])]
            layers = [
                Layer(w, forward_layer=halves[0], backward_layer=halves[1], merge_mode="concat")
                for w in layers
            ]
            return function(layers)
        if "functions" in case:
            # Keras 3 has a hard sigmoid of slope 1/6, and 0.2 below 0 in its leaky relu.
            special = {
                "hard_sigmoid": lambda x: (x / 6 + 0.5).clip(0, 1),
                "leaky_relu": lambda x: x.clip(min=0) + 0.2 * x.clip(max=0),
            }
            named = {name: special.get(f, f) for name, f in case["functions"].items()}
            for name, f in case["functions"].items():
                if f in special:
                    named[name].__name__ = f
            return function(LSTM(layers[0], **named))
        return function(layers[0])
    return function(tensors(source), **case.get("keywords", {}))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['function']}, {case['name']}")
def test_the_numbers_of_the_framework(case: dict[str, Any]) -> None:
    """Values, and gradients where the framework gave them."""
    layer = imported(case)
    x = torch.tensor(case["x"], requires_grad=True)
    if not layer.batch_first:
        output, (_, c_n) = layer(x.transpose(0, 1))
        output = output.transpose(0, 1)
    else:
        output, (_, c_n) = layer(x)
    expected = torch.tensor(case["output"])
    assert (output - expected).norm() <= 1e-6 * expected.norm()
    if "c" in case:
        c = torch.tensor(case["c"])
        assert (c_n.view_as(c) - c).norm() <= 1e-6 * c.norm()
    if case["gradient"] is not None:
        factors = torch.sin(torch.arange(output.numel())).view_as(output)
        (output * factors).sum().backward()
        gradient = torch.tensor(case["gradient"])
        assert (x.grad - gradient).norm() <= 2e-6 * gradient.norm()


def test_every_framework_has_cases() -> None:
    functions = [case["function"] for case in CASES]
    assert {f: functions.count(f) for f in functions} == {
        "from_keras": 10, "from_tensorflow": 4, "from_jax": 5, "from_mlx": 2, "from_onnx": 17,
    }  # fmt: skip


def test_the_formulas_of_haste() -> None:
    """Haste needs a GPU: its equations, written out."""
    x, sigmoid = array(5, 2, I), torch.sigmoid
    kernel, recurrent, bias = array(I, 4 * H), array(H, 4 * H), array(4 * H)
    arrays = {"kernel": kernel, "recurrent_kernel": recurrent, "bias": bias}
    layer = lstm_ext.from_haste(arrays, zoneout=0.25).eval()
    assert layer.zoneout == 0.25
    h, c = torch.zeros(2, H), torch.zeros(2, H)
    for t in range(5):
        z = dict(zip("igfo", (x[t] @ kernel + h @ recurrent + bias).chunk(4, -1), strict=True))
        c = sigmoid(z["f"]) * c + sigmoid(z["i"]) * z["g"].tanh()
        h = 0.75 * sigmoid(z["o"]) * c.tanh() + 0.25 * h
    assert torch.allclose(layer(x)[1][0][0], h, atol=1e-6)


def test_projection_and_both_directions_of_tensorflow() -> None:
    """Against our own layer, with the forget bias added by hand."""

    def cell(features: int) -> dict[str, Tensor]:
        return {"kernel": array(features + 2, 4 * H), "bias": array(4 * H), "projection/kernel": array(H, 2)}

    cells, back = [cell(I), cell(4)], [cell(I), cell(4)]
    layer = lstm_ext.from_tensorflow(cells, backward=back, batch_first=False)
    assert (layer.num_layers, layer.bidirectional, layer.proj_size) == (2, True, 2)
    one = lstm_ext.from_tensorflow(cells[0], batch_first=False)
    x = array(5, 2, I)
    first = lstm_ext.from_tensorflow(cells[0], backward=back[0], batch_first=False)
    assert torch.allclose(first(x)[0][..., :2], one(x)[0], atol=1e-6)
    i, g, f, o = cells[0]["kernel"].T.chunk(4)
    assert torch.equal(one.weight_ih_l0, torch.cat([i, f, g, o])[:, :I])
    assert torch.equal(one.bias_ih_l0[H : 2 * H], cells[0]["bias"].chunk(4)[2] + 1)
    assert torch.equal(one.weight_hr_l0, cells[0]["projection/kernel"].T)
    with pytest.raises(ValueError, match="backward: expected as many cells as there are forward, 2, got 1"):
        lstm_ext.from_tensorflow(cells, backward=back[:1])


@pytest.mark.parametrize(
    "case", [c for c in CASES if c["function"] == "from_keras"], ids=lambda case: case["name"]
)
def test_to_keras_gives_the_arrays_back(case: dict[str, Any]) -> None:
    found = lstm_ext.to_keras(imported(case))
    expected = [[torch.tensor(a) for a in layer] for layer in case["source"]]
    assert [[a.shape for a in layer] for layer in found] == [[a.shape for a in layer] for layer in expected]
    pairs = [pair for layers in zip(found, expected, strict=True) for pair in zip(*layers, strict=True)]
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.qint8, 2e-2), (torch.float16, 2e-3)])
def test_a_quantized_layer_of_torch(dtype: torch.dtype, tolerance: float) -> None:
    """Its numbers, but for the rounding of activations that only torch's layer does."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.LSTM(5, 64, 2, bidirectional=True, batch_first=True)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.ao.quantization.quantize_dynamic(model, {torch.nn.LSTM}, dtype=dtype)[0]
    x = torch.randn(3, 9, 5)
    expected = quantized(x)[0]
    for weights in (torch.int8, None):
        layer = lstm_ext.from_torch_ao(quantized, weights)
        assert isinstance(layer, lstm_ext.FrozenLSTM) and layer.batch_first
        assert (layer(x)[0] - expected).norm() <= tolerance * expected.norm()
    exact = {name: w.dequantize() for name, w in quantized.get_weight().items()}
    assert torch.equal(lstm_ext.unfreeze(layer).weight_hh_l1_reverse, exact["weight_hh_l1_reverse"])


def test_arrays_are_copied() -> None:
    weights = [array(I, 4 * H), array(H, 4 * H), array(4 * H)]
    layer = lstm_ext.from_keras(weights)
    before = layer.weight_hh_l0.clone()
    weights[1].zero_()
    assert torch.equal(layer.weight_hh_l0, before)
    assert all(isinstance(p, torch.nn.Parameter) and p.requires_grad for p in layer.parameters())
    numbers = [w.tolist() for w in weights]
    assert lstm_ext.from_keras(numbers).weight_ih_l0.dtype == torch.float32
    doubles = lstm_ext.from_keras([w.double() for w in weights])
    assert {p.dtype for p in doubles.parameters()} == {torch.float64}


W, U, b = array(I, 4 * H), array(H, 4 * H), array(4 * H)
KERAS = [W, U, b]
TF = {"kernel": array(I + H, 4 * H), "bias": b}
FLAX = {f"{s}{g}": {"kernel": array(I if s == "i" else H, H)} for s in "ih" for g in "ifgo"}


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: lstm_ext.from_keras([W, U[:, :-1], b]), ValueError,
         "from_keras: recurrent_kernel: expected shape (H, 4 H), got (4, 15)"),
        (lambda: lstm_ext.from_keras([W[:, :-1], U, b]), ValueError,
         "from_keras: kernel: expected shape (any, 16), got (3, 15)"),
        (lambda: lstm_ext.from_keras([W, U, b[:-1]]), ValueError, "from_keras: bias: expected shape (16,), got (15,)"),
        (lambda: lstm_ext.from_keras([W]), ValueError, "from_keras: expected 2, 3, 4 or 6 arrays, got 1"),
        (lambda: lstm_ext.from_keras(5), TypeError, "from_keras: expected layers or a list of arrays, got int"),
        (lambda: lstm_ext.from_keras(["a", U, b]), TypeError, "from_keras: kernel: expected an array, got str"),
        (lambda: lstm_ext.from_keras([W.int(), U, b]), TypeError,
         "from_keras: kernel: expected a floating-point dtype, got torch.int32"),
        (lambda: lstm_ext.from_keras(Layer(KERAS)), ValueError, "expected layers of the class LSTM or GRU, got Layer"),
        (lambda: lstm_ext.from_keras(LSTM(KERAS, activation="gelu")), ValueError,
         "activation: expected one of linear, sigmoid, tanh, relu, elu, softplus, softsign, identity, "
         "hard_sigmoid, leaky_relu, got gelu"),
        (lambda: lstm_ext.from_keras([LSTM(KERAS), LSTM([U, U, b], activation="relu")]), ValueError,
         "layers that differ in cell_activation: make a layer of each"),
        (lambda: lstm_ext.from_keras(
            Layer(2 * KERAS, forward_layer=LSTM([]), backward_layer=LSTM([], activation="relu"), merge_mode="concat")),
         ValueError,
         "a Bidirectional whose layers differ in their activations"),
        (lambda: lstm_ext.from_keras(
            Layer(2 * KERAS, forward_layer=LSTM([]), backward_layer=LSTM([], go_backwards=False), merge_mode="concat")),
         ValueError,
         "backward_layer: expected one with go_backwards=True"),
        (lambda: lstm_ext.to_keras(lstm_ext.LSTM(3, 4, gate_activation=("affine", 2.0, 1.0))), ValueError,
         "the LSTM of Keras has no affine"),
        (lambda: lstm_ext.to_keras(torch.nn.GRU(3, 4)), TypeError, "to_keras: expected an LSTM, got GRU"),
        (lambda: lstm_ext.to_keras(lstm_ext.LSTM(3, 4, peephole=True, coupled_gates=True)), ValueError,
         "to_keras: the LSTM of Keras has no peephole, coupled_gates"),
        (lambda: lstm_ext.to_keras(torch.nn.LSTM(3, 4, proj_size=2)), ValueError, "has no proj_size"),
        (lambda: lstm_ext.to_keras(lstm_ext.LSTM(3, 4, cell_activation=("tanh", "relu"))), ValueError,
         "has no two cell_activations"),
        (lambda: lstm_ext.from_torch_ao(torch.nn.LSTM(3, 4)), TypeError,
         "from_torch_ao: expected a torch.ao.nn.quantized.dynamic.LSTM, got LSTM"),
        (lambda: lstm_ext.from_keras(LSTM(KERAS, go_backwards=True)), ValueError,
         "go_backwards=True: this layer has not that"),
        (lambda: lstm_ext.from_keras(RNN(KERAS, cell=LSTMCell([]))), ValueError,
         "expected layers of the class LSTM or GRU, got RNN of LSTMCell: from_keras takes the get_weights() of one"),
        *[
            (
                lambda path=path: lstm_ext.from_keras(path),
                TypeError,
                "from_keras: expected layers or a list of arrays, got the path abc: keras.models.load_model reads it",
            )
            for path in ("abc", Path("abc"))
        ],
        (lambda: lstm_ext.from_keras(LSTM(KERAS), gate_activation="hard_sigmoid"), ValueError,
         "from_keras: gate_activation: expected None or that of the layer, 'sigmoid', got 'hard_sigmoid'"),
        (lambda: lstm_ext.from_keras(
            Layer(2 * KERAS, forward_layer=LSTM([]), backward_layer=LSTM([]), merge_mode="sum")), ValueError,
         "merge_mode: expected concat, got sum"),
        (lambda: lstm_ext.from_keras([LSTM(KERAS), LSTM(KERAS)]), ValueError,
         "layer 1: expected 4 features, 4 units and 1 directions, got 3, 4 and 1"),
        (lambda: lstm_ext.from_tensorflow({"bias": b}), ValueError, "expected a variable named kernel, got bias"),
        (lambda: lstm_ext.from_tensorflow({"cell_0/kernel": W, "cell_1/kernel": W}), ValueError,
         "cell_1/kernel: expected the variables of one cell, got a second kernel"),
        (lambda: lstm_ext.from_tensorflow(TF | {"gamma": b}), ValueError,
         "gamma: expected variables named bias, kernel,"),
        (lambda: lstm_ext.from_tensorflow(TF | {"w_i_diag": array(H)}), ValueError,
         "expected all peepholes, got none of w_f_diag, w_o_diag"),
        (lambda: lstm_ext.from_tensorflow({"kernel": array(H, 4 * H)}), ValueError,
         "kernel: expected shape (features + H, 4 H), got (4, 16)"),
        (lambda: lstm_ext.from_jax({"Dense_0": {"kernel": W}}), ValueError,
         "one LSTM cell of Flax, Haiku or Equinox, found 0 in it"),
        (lambda: lstm_ext.from_jax({"a": FLAX, "b": FLAX}), ValueError, "found 2 in it"),
        (lambda: lstm_ext.from_jax(FLAX | {"hg": {"kernel": array(H, H + 1)}}), ValueError,
         "expected hi, hf, hg and ho of one shape"),
        (lambda: lstm_ext.from_jax(FLAX | {"hg": {"scale": W}}), ValueError,
         "from_jax: hg: expected a kernel, got scale"),
        (lambda: lstm_ext.from_jax(FLAX | {"hi": FLAX["hi"] | {"bias": array(H)}}), TypeError,
         "from_jax: hf/bias: expected an array, got NoneType"),
        (lambda: lstm_ext.from_haste({"kernel": W}), ValueError,
         "from_haste: expected kernel, recurrent_kernel, bias, got none of recurrent_kernel, bias"),
        (lambda: lstm_ext.from_mlx({"Wx": W}), ValueError, "from_mlx: expected Wx, Wh, got none of Wh"),
        (lambda: lstm_ext.from_jax([]), ValueError, "from_jax: expected at least one layer, got none"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert text in str(caught.value)


IMPORTERS = [name for name in lstm_ext.__all__ if name.startswith("from_") and name != "from_gates"]
NO_SOURCES = (
    5, None, b"abc", "", "abc", Path("abc"), [5], [None], [{}], {1: 2}, {"Wx": 5, "Wh": []}, object(),
)  # fmt: skip


@pytest.mark.parametrize("name", IMPORTERS)
def test_what_is_no_source_is_named(name: str) -> None:
    for source in NO_SOURCES:
        of_files = (OSError,) if name == "from_onnx" and isinstance(source, (str, Path)) else ()
        with pytest.raises((TypeError, ValueError, *of_files)) as caught:
            getattr(lstm_ext, name)(source)
        assert str(caught.value).startswith(f"{name}: ") or isinstance(caught.value, of_files), source


def test_keras_activations_of_arrays() -> None:
    """They are in none of the arrays; those of a layer may be said again."""
    functions = {"gate_activation": "hard_sigmoid", "cell_activation": "relu"}
    layer = lstm_ext.from_keras(KERAS, **functions)
    expected = lstm_ext.LSTM(I, H, batch_first=True, **functions)
    expected.load_state_dict(layer.state_dict())
    x = array(2, 5, I)
    assert torch.equal(layer(x)[0], expected(x)[0])
    assert not torch.equal(layer(x)[0], lstm_ext.from_keras(KERAS)(x)[0])
    lstm_ext.from_keras(LSTM(KERAS, activation="linear"), cell_activation=("affine", 1.0, 0.0))


def test_dropout_of_keras_is_left_out_with_a_warning() -> None:
    text = r"^from_keras: dropout=0.5, recurrent_dropout=0.25: left out, so the new layer has"
    with pytest.warns(UserWarning, match=text) as caught:
        layer = lstm_ext.from_keras(LSTM(KERAS, dropout=0.5, recurrent_dropout=0.25))
    assert [warning.filename for warning in caught] == [__file__]
    assert not layer.dropout and torch.equal(layer.weight_hh_l0, lstm_ext.from_keras(KERAS).weight_hh_l0)


ARRAYS: dict[str, Any] = {
    "from_haste": {"kernel": W, "recurrent_kernel": U, "bias": b},
    "from_jax": FLAX,
    "from_keras": KERAS,
    "from_mlx": {"Wx": W.T, "Wh": U.T, "bias": b},
    "from_onnx": {"W": W.T[None], "R": U.T[None]},
    "from_tensorflow": TF,
}


@pytest.mark.parametrize("name", [name for name in IMPORTERS if not name.startswith("from_torch")])
def test_bfloat16_of_ml_dtypes(name: str) -> None:
    """The dtype of JAX, TensorFlow and the package onnx, which installs it."""
    import ml_dtypes

    def layer(arrays: Any) -> lstm_ext.LSTM:
        if name == "from_onnx":
            return lstm_ext.from_onnx(node(**arrays))["Y"]
        return getattr(lstm_ext, name)(arrays)

    rounded = tree_map(lambda w: w.bfloat16().float(), ARRAYS[name])
    found = layer(tree_map(lambda w: w.numpy().astype(ml_dtypes.bfloat16), rounded))
    assert {p.dtype for p in found.parameters()} == {torch.bfloat16}
    pairs = zip(found.parameters(), layer(rounded).bfloat16().parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)


def node(**changes: Any) -> Any:
    """A model with one LSTM node that has no name."""
    onnx = pytest.importorskip("onnx")
    from numpy import asarray
    from onnx import TensorProto, helper, numpy_helper

    attributes = {"hidden_size": H} | changes.pop("attributes", {})
    arrays = {"W": array(1, 4 * H, I), "R": array(1, 4 * H, H)} | changes
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("x", "Y")]
    inits = [numpy_helper.from_array(asarray(a), name) for name, a in arrays.items() if a is not None]
    made = helper.make_node("LSTM", ["x", "W", "R"], ["Y"], **attributes)
    return helper.make_model(helper.make_graph([made], "g", values[:1], values[1:], inits)) if onnx else None


def of_node(change: Any) -> Any:
    """Changes the layer of a model."""
    return lambda model: change(model.graph.node[0])


def of_weight(**changes: Any) -> Any:
    """Changes the initializer W."""
    return lambda model: [setattr(model.graph.initializer[0], name, value) for name, value in changes.items()]


def with_attribute(name: str, value: Any) -> Any:
    def add(node: Any) -> None:
        from onnx import helper

        node.attribute.append(helper.make_attribute(name, value))

    return of_node(add)


UNREADABLE = "node Y: W: expected an initializer that can be read, got W: "


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"attributes": {"bogus": 3.0}}, "node Y: expected no attribute bogus"),
        ({"attributes": {"direction": "reverse"}},
         "node Y: direction: expected forward or bidirectional, got reverse"),
        ({"attributes": {"activations": ["Sigmoid", "Gelu", "Tanh"]}},
         "node Y: activations: expected some of Sigmoid, Tanh, Affine, Relu, LeakyRelu, ThresholdedRelu, "
         "Elu, ScaledTanh, HardSigmoid, Softsign, Softplus, got Gelu"),
        ({"attributes": {"activations": ["Sigmoid", "Affine", "Tanh"], "activation_alpha": [1.0]}},
         "node Y: activations: Affine without its numbers, for which runtimes have different defaults"),
        ({"attributes": {"activations": ["Sigmoid", "Tanh"]}}, "node Y: activations: expected 3, got Sigmoid, Tanh"),
        ({"attributes": {"activations": ["LeakyRelu", "Tanh", "Tanh"], "activation_alpha": [-0.1]}},
         "node Y: gate_activation: expected the first number of leaky_relu to be at least 0"),
        ({"attributes": {"clip": -1.0}}, "node Y: preactivation_clip should be a positive finite number"),
        ({"W": None}, "node Y: W: expected an initializer, got W, which is no initializer"),
        ({"R": array(1, 4 * H, H + 1)}, "node Y: R: expected shape (1, 16, 4), got (1, 16, 5)"),
        ({"R": array(1, 4 * H, H).double()}, "node Y: R: expected dtype torch.float32 as W, got torch.float64"),
        ({"attributes": {"clip": 1}}, "node Y: clip: expected an attribute of type FLOAT, got INT"),
        ({"attributes": {"hidden_size": -1}}, "node Y: hidden_size: expected at least 1, got -1"),
        ({"attributes": {"layout": 2}}, "node Y: layout: expected 0 or 1, got 2"),
        (with_attribute("hidden_size", H), "expected no second attribute hidden_size"),
        (of_node(lambda node: setattr(node.attribute[0], "ref_attr_name", "other")),
         "node Y: hidden_size: expected an attribute of type INT, got a reference"),
        (of_node(lambda node: node.attribute[0].ClearField("type")),
         "node Y: hidden_size: expected an attribute of type INT, got UNDEFINED"),
        (of_node(lambda node: node.input.extend(["P"] * 6)), "expected at most 8 inputs, got 9"),
        (of_node(lambda node: node.input.pop()), "R: expected an input, got none"),
        (of_node(lambda node: node.input.__setitem__(1, "")), "W: expected an input, got none"),
        (of_node(lambda node: node.input.__setitem__(1, "x")), "got x, which is no initializer"),
        (with_attribute("direction", b"\xff"), "direction: expected forward or bidirectional, got \ufffd"),
        (with_attribute("activations", [b"\xff"] * 3), "activations: expected some of Sigmoid, "),
        (of_weight(name="renamed"), "got W, which is no initializer"),
        (of_weight(raw_data=b"?"), UNREADABLE),
        (of_weight(data_type=29), "node Y: W: "),
        (of_weight(data_location=1), UNREADABLE),
        (lambda model: model.graph.initializer[0].dims.__setitem__(0, 3), UNREADABLE),
    ],
)  # fmt: skip
def test_onnx_nodes_that_cannot_be_read(changes: Any, text: str) -> None:
    """Changed while they are made, or afterwards."""
    model = node(**(changes if isinstance(changes, dict) else {}))
    if not isinstance(changes, dict):
        changes(model)
    with pytest.raises((TypeError, ValueError)) as caught:
        lstm_ext.from_onnx(model)
    assert text in str(caught.value)


def test_an_onnx_node_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(node(attributes={"layout": 1}).SerializeToString())
    (name, layer), *others = lstm_ext.from_onnx(path).items()
    assert name == "Y" and not others and layer.batch_first and not layer.bias


def test_no_onnx_node_is_lost() -> None:
    """Names may be missing, the same, or those that would be made for others."""
    model = node()
    first = model.graph.node[0]
    for name, output in (("a", "1"), ("a", "2"), ("a_2", "3"), ("", "a"), ("", ""), ("", "")):
        model.graph.node.add().CopyFrom(first)
        model.graph.node[-1].name, model.graph.node[-1].output[0] = name, output
    assert list(lstm_ext.from_onnx(model)) == ["Y", "a", "a_3", "a_2", "a_4", "LSTM", "LSTM_2"]


def test_only_what_is_of_an_lstm_is_read() -> None:
    model = node()
    model.graph.initializer.add(name="other", dims=[5], data_type=1, raw_data=b"?")
    model.graph.node.add(op_type="Constant", output=["constant"]).attribute.add(name="value", type=4)
    model.graph.node.add(op_type="Constant")
    model.graph.node.add(op_type="LSTM", domain="another")
    assert list(lstm_ext.from_onnx(model)) == ["Y"]


def test_a_file_of_no_onnx_model(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    (tmp_path / "a.onnx").write_bytes(b"no model")
    with pytest.raises(ValueError, match=r"from_onnx: expected a file with an ONNX model, got '.*a\.onnx'"):
        lstm_ext.from_onnx(tmp_path / "a.onnx")
