"""What convert and revert refuse and skip; and layers from the per-gate matrices of lectures and notebooks."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from lstm_models import CONVERSIONS, SUBCLASSES, Doubling, DoublingGRU, Halving, WithCode, snapshot
from torch import nn
from torch.nn.utils import parametrizations

import lstm_ext

# --- what is refused


def parametrized_subclass() -> nn.Module:
    return parametrizations.weight_norm(Doubling(3, 4), "weight_hh_l0")


def replaced(module: Any, method: str = "forward") -> nn.Module:
    """As accelerate's hooks do."""
    old = getattr(module, method)
    setattr(module, method, lambda *args, **kwargs: old(*args, **kwargs))
    return module


UNCALLED = [
    "check_input",
    "check_forward_args",
    "check_hidden_size",
    "get_expected_hidden_size",
    "get_expected_cell_size",
    "permute_hidden",
    "_update_flat_weights",
]


def overriding(method: str) -> type[nn.LSTM]:
    """A subclass whose base has a method that our forward does not call."""
    return type("Mine", (type("Base", (nn.LSTM,), {method: getattr(nn.LSTM, method)}),), {})


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.LSTM(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)[0]


def with_jit(function: Any, *args: Any) -> Any:
    return function(Holder().eval(), *args)


def quantized(cls: Any) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(cls(3, 4)), {cls}, dtype=torch.qint8)


REFUSED = {
    "subclass": (lambda: Doubling(3, 4), "", r"Doubling\): a subclass of torch\.nn\.LSTM, .*lost; convert\(model, sub"),
    "subclass of a cell": (lambda: Halving(3, 4), "", r"Halving\): a subclass of torch\.nn\.LSTMCell,"),
    "parametrized subclass": (parametrized_subclass, "", r"ParametrizedDoubling\): a subclass of torch\.nn"),
    "forward": (lambda: replaced(nn.LSTM(3, 4)), "", r"nn\.LSTM\): forward is replaced on the inst"),
    "cell's forward": (lambda: replaced(nn.LSTMCell(3, 4)), "", r"LSTMCell\): forward is replaced"),
    "method": (
        lambda: replaced(nn.LSTM(3, 4), "check_forward_args"), "", r"LSTM\): check_forward_args is replaced"
    ),
    "scripted": (lambda: with_jit(torch.jit.script), ".inner", "compiled by torch.jit"),
    "traced": (lambda: with_jit(torch.jit.trace, torch.zeros(5, 2, 3)), ".inner", "compiled by torch.jit"),
    "frozen": (lambda: torch.jit.freeze(with_jit(torch.jit.script)), "", "compiled by torch.jit"),
    "quantized": (lambda: quantized(nn.LSTM), ".0", r"LSTM\): a quantized layer"),
    "quantized cell": (lambda: quantized(nn.LSTMCell), ".0", r"LSTMCell\): a quantized layer"),
    "GRU with code": (lambda: DoublingGRU(3, 4), "", r"DoublingGRU\): a subclass of torch\.nn\.GRU, .*lost; convert"),
    "scripted GRU": (lambda: torch.jit.script(nn.Sequential(nn.GRU(3, 4))), ".0", "compiled by torch.jit"),
    "quantized GRU": (lambda: quantized(nn.GRU), ".0", r"GRU\): a quantized layer"),
    "quantizable": (lambda: torch.ao.nn.quantizable.LSTM(3, 4), "", r"LSTM\): a quantized layer"),
    **{
        f"overrides {method}": (
            lambda method=method: overriding(method)(3, 4),
            "",
            rf"Mine\): a subclass of torch\.nn\.LSTM that overrides {method}, which our .*do that work in its forward",
        )
        for method in UNCALLED
    },
    # of revert
    "our GRU": (lambda: lstm_ext.GRU(3, 4, recompute=True), "", r"GRU\): it has what torch\.nn\.GRU does not have: "),
    "our subclass": (lambda: WithCode(3, 4), "", r"WithCode\): a subclass of lstm_ext\.LSTM,"),
    "our forward": (lambda: replaced(lstm_ext.LSTM(3, 4)), "", r"LSTM\): forward is replaced"),
    "our cell's forward": (lambda: replaced(lstm_ext.LSTMCell(3, 4)), "", r"LSTMCell\): forward is replaced"),
}  # fmt: skip
# What `convert(model, subclasses=True)` would skip in silence, and what it cannot keep.
REFUSED_STILL = {name: row for name, row in REFUSED.items() if name.startswith(("overrides", "parametrized"))}


@pytest.mark.filterwarnings("ignore")  # deprecations of torch.jit and of torch.ao
@pytest.mark.parametrize(
    ("kind", "more"),
    [*[(kind, {}) for kind in REFUSED], *[(kind, {"subclasses": True}) for kind in REFUSED_STILL]],
)
def test_refusals_name_the_module_and_change_nothing(kind: str, more: dict[str, bool]) -> None:
    make, inner, reason = REFUSED[kind]
    name, source, target = (
        ("convert", nn, SUBCLASSES) if "our" not in kind.split() else ("revert", lstm_ext, nn)
    )
    function = getattr(lstm_ext, name)
    model = nn.Sequential(source.LSTM(3, 4), nn.ModuleDict({"odd": make()}), source.LSTM(3, 4))
    before, classes = snapshot(model), [type(m) for m in model.modules()]
    text = rf"{name}: nothing was changed.*skip=\[names\].*\n  '1\.odd{inner}' \(.*{reason}"
    with pytest.raises(TypeError, match=re.compile(text, re.DOTALL)):
        function(model, **more)
    assert snapshot(model) == before
    assert [type(m) for m in model.modules()] == classes

    for skip in (["1.odd"], ("1",), {"1", "1.odd"}):
        other = nn.Sequential(source.LSTM(3, 4), model[1], source.LSTM(3, 4))
        assert function(other, skip=skip) is other
        assert type(other[0]) is type(other[2]) is target.LSTM
        assert [type(m) for m in other.modules()][2:-1] == classes[2:-1]


@pytest.mark.parametrize("way", CONVERSIONS)
def test_what_is_not_its_business(way: str) -> None:
    """The other package's subclasses, scripted models without one of these layers, other recurrent layers."""
    function, source, target = CONVERSIONS[way]
    scripted = torch.jit.script(nn.RNN(3, 4))
    other = WithCode(3, 4) if function is not lstm_ext.revert else Doubling(3, 4)
    model = nn.Sequential(source.LSTM(3, 4), scripted, other)
    function(model)
    assert [type(m) for m in model] == [target.LSTM, type(scripted), type(other)]


def test_every_refusal_is_listed() -> None:
    model = nn.ModuleDict({"a": Doubling(3, 4), "b": nn.LSTM(3, 4), "c": nn.Sequential(Halving(3, 4))})
    with pytest.raises(TypeError) as info:
        lstm_ext.convert(model)
    lines = str(info.value).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["'a'", "'c.0'"]
    with pytest.raises(TypeError, match=r"\n  the model itself \(.*Doubling\)"):
        lstm_ext.convert(model["a"])


def test_skip_goes_by_the_module() -> None:
    """One that is used at two places stays one, whatever name it is given."""
    shared = nn.LSTM(3, 4)
    model = nn.ModuleDict({"a": shared, "b": nn.ModuleDict({"c": shared}), "d": nn.LSTM(3, 4)})
    lstm_ext.convert(model, skip=["b.c"])
    assert type(model["a"]) is nn.LSTM
    assert model["b"]["c"] is model["a"]
    assert type(model["d"]) is lstm_ext.TorchLSTM


@pytest.mark.parametrize("way", CONVERSIONS)
def test_wrong_arguments(way: str) -> None:
    function, source, _ = CONVERSIONS[way]
    for wrong in (None, "model", nn.Module, [source.LSTM(3, 4)]):
        with pytest.raises(TypeError, match=f"expected model to be a .*Module, got {type(wrong).__name__}"):
            function(wrong)
    model = nn.Sequential(source.LSTM(3, 4))
    with pytest.raises(ValueError, match="skip: the model has no submodule named 'lstm'"):
        function(model, skip=["lstm"])
    with pytest.raises(TypeError, match="skip to be a sequence of names, got the string '0'"):
        function(model, skip="0")
    assert type(model[0]) is source.LSTM


# --- from_gates

FEATURES, HIDDEN = 20, 10


def of_gates(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """As a lecture's notebook makes them: one W, U and b for each gate."""
    shapes = {"W": (FEATURES, HIDDEN), "U": (HIDDEN, HIDDEN), "b": (1, HIDDEN)}
    return {
        f"{letter}_{gate}": torch.randn(shapes[letter], dtype=dtype) for gate in "ifgo" for letter in "WUb"
    }


@pytest.mark.devices("cpu", "cuda")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_from_gates(dtype: torch.dtype) -> None:
    p = of_gates(dtype)
    module = lstm_ext.from_gates(**p, batch_first=True)
    assert module.batch_first and not lstm_ext.from_gates(**p).batch_first
    assert type(module) is lstm_ext.LSTM
    W, U, b = (torch.cat([p[f"{letter}_{gate}"].T for gate in "ifgo"]) for letter in "WUb")
    b = b[:, 0]
    for weight, expected in zip(module.parameters(), (W, U, b, torch.zeros_like(b)), strict=True):
        assert type(weight) is nn.Parameter and weight.requires_grad and weight.is_contiguous()
        assert weight.dtype == dtype and torch.equal(weight, expected)
    p["b_i"].zero_()
    assert torch.equal(module.bias_ih_l0, b)
    flat = {name: value[0] if name.startswith("b") else value for name, value in p.items()}
    assert torch.equal(lstm_ext.from_gates(**flat).bias_ih_l0[HIDDEN:], b[HIDDEN:])


@pytest.mark.parametrize(
    ("name", "wrong", "error", "text"),
    [
        ("W_i", torch.zeros(20), ValueError, r"W_i: expected shape \(features, hidden\), got \(20,\)"),
        ("W_i", torch.zeros(0, 10), ValueError, r"W_i: expected shape \(features, hidden\), got \(0, 10\)"),
        ("W_f", torch.zeros(10, 20), ValueError, r"W_f: expected shape \(20, 10\), got \(10, 20\)"),
        ("U_g", torch.zeros(20, 10), ValueError, r"U_g: expected shape \(10, 10\), got \(20, 10\)"),
        ("b_o", torch.zeros(10, 1), ValueError, r"b_o: expected shape \(10,\) or \(1, 10\), got \(10, 1\)"),
        ("b_o", torch.zeros(10).double(), ValueError, r"b_o: expected dtype torch.float32 as W_i"),
        ("U_o", torch.zeros(10, 10, device="meta"), ValueError, r"U_o: expected device cpu as W_i, got meta"),
        ("b_i", [0.0] * 10, TypeError, r"b_i: expected a Tensor, got list"),
        ("W_i", torch.zeros(20, 10, dtype=torch.int64), TypeError, r"W_i: expected a floating-point dtype"),
    ],
)
def test_from_gates_errors(name: str, wrong: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        lstm_ext.from_gates(**(of_gates() | {name: wrong}))


def test_from_gates_takes_keywords_only() -> None:
    p = of_gates()
    with pytest.raises(TypeError, match="positional"):
        lstm_ext.from_gates(*p.values())
    del p["U_f"]
    with pytest.raises(TypeError, match="U_f"):
        lstm_ext.from_gates(**p)
