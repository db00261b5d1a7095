"""Classes that are an LSTM in other words: ``register``."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lstm_ext
from lstm_ext.nn import registered


class Theirs(nn.Module):
    """Matrices for row vectors, or in torch's form."""

    def __init__(self, features: int, hidden: int, turned: bool = False, odd: bool = False) -> None:
        super().__init__()
        self.turned, self.odd = turned, odd
        shapes = ((4 * hidden, features), (4 * hidden, hidden))
        self.W, self.U = [nn.Parameter(torch.randn(s[::-1] if turned else s) / 3) for s in shapes]

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        layer = to_layer(self)
        return torch.func.functional_call(lstm_ext.revert(layer), dict(layer.named_parameters()), x)


def to_layer(module: Theirs) -> lstm_ext.LSTM:
    if module.odd:
        raise ValueError("it is odd")
    W, U = [nn.Parameter(w.T.contiguous()) if module.turned else w for w in (module.W, module.U)]
    layer = lstm_ext.LSTM(W.size(1), U.size(1), bias=False, device="meta")
    layer.weight_ih_l0, layer.weight_hh_l0 = W, U
    return layer


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registered, "_registered", {})
    lstm_ext.register(Theirs, to_layer)


def model_of(*layers: nn.Module) -> nn.Module:
    return nn.ModuleDict(dict(zip("abcdef", layers, strict=False)))


def reasons(model: nn.Module) -> dict[str, tuple[bool, str]]:
    return {entry.name: (entry.ours, entry.reason) for entry in lstm_ext.report(model)}


def test_its_modules_are_replaced(known: None) -> None:
    """With the same Parameters, or with copies, which the report says; also where one stands twice."""
    first, second, odd = Theirs(3, 4).eval(), Theirs(3, 4, turned=True), Theirs(3, 4, odd=True)
    model = model_of(first, second, first, odd, nn.LSTM(3, 4))
    x = torch.randn(5, 2, 3)
    expected = [first(x)[0].detach(), second(x)[0].detach()]
    assert reasons(model) == {n: (False, "it is odd" if n == "d" else "not converted") for n in "abde"}
    assert lstm_ext.convert(model, skip=["b"]) is model and model["b"] is second and model["d"] is odd
    assert isinstance(model["a"], nn.LSTM) and model["a"] is model["c"] and not model["a"].training
    assert model["a"].weight_ih_l0 is first.W and model["a"].weight_hh_l0 is first.U
    lstm_ext.convert(model, as_subclass=False)
    name = f"in the place of {__name__}.Theirs"
    assert reasons(model) == {
        "a": (True, name),
        "b": (True, f"{name}, with copies of its parameters"),
        "d": (False, "it is odd"),
        "e": (True, ""),
    }
    assert type(model["b"]) is lstm_ext.LSTM
    torch.testing.assert_close([model["a"](x)[0].detach(), model["b"](x)[0].detach()], expected)


def test_the_model_itself(known: None) -> None:
    assert isinstance(lstm_ext.convert(Theirs(3, 4)), lstm_ext.LSTM)


def test_a_module_with_hooks_or_methods_of_its_own_stays(known: None) -> None:
    model = model_of(Theirs(3, 4), Theirs(3, 4), nn.LSTM(3, 4))
    model["a"].register_forward_hook(lambda *_: None)
    model["b"].forward = lambda x: x
    lstm_ext.convert(model)
    found = reasons(model)
    assert found["a"] == (False, "it has _forward_hooks, which another module would not have")
    assert found["b"] == (False, "it has forward, which another module would not have")


def test_a_compiled_module_stays(known: None) -> None:
    """The wrapper of torch.compile would go on calling it."""
    model = model_of(torch.compile(Theirs(3, 4), backend="eager"), Theirs(3, 4), nn.LSTM(3, 4))
    model["b"].compile(backend="eager")
    before = [model["a"]._orig_mod, model["b"]]
    lstm_ext.convert(model)
    assert [model["a"]._orig_mod, model["b"]] == before
    found = reasons(model)
    assert found["a._orig_mod"] == found["b"] == (False, "it is compiled: convert before torch.compile")


def test_nothing_is_changed_where_convert_raises(known: None) -> None:
    class WithCode(nn.LSTM):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[0]

    model = model_of(Theirs(3, 4), WithCode(3, 4))
    with pytest.raises(TypeError, match="WithCode"):
        lstm_ext.convert(model)
    assert type(model["a"]) is Theirs


class Cell(nn.Module):
    """Parameters of so many gates, and a third one beside them."""

    def __init__(self, gates: int, turned: bool) -> None:
        super().__init__()
        shapes = [(gates * 4, n)[:: -1 if turned else 1] for n in (6, 4)]
        self.W, self.U = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
        self.out = nn.Parameter(torch.zeros(4, 4))


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("gates", "name"), [(4, "an LSTM"), (3, "a GRU"), (2, None), (5, None)])
def test_the_report_names_what_looks_like_a_layer(gates: int, name: str | None, turned: bool) -> None:
    model = model_of(Cell(gates, turned), nn.Linear(4, 16), nn.GRU(3, 4), nn.MultiheadAttention(4, 2))
    found = [entry for entry in lstm_ext.report(model) if entry.reason != "not converted"]
    assert [entry.name for entry in found] == ["a"] * (name is not None)
    text = f"its parameters have the shapes of {name}: if it is one, lstm_ext.register"
    assert all(entry.reason.startswith(text) and not entry.ours for entry in found)


def test_what_cannot_be_registered() -> None:
    with pytest.raises(
        TypeError, match=r"register: cls: expected a class of torch.nn.Module, got <class 'int'>"
    ):
        lstm_ext.register(int, to_layer)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="register: to_layer: expected a function, got int"):
        lstm_ext.register(Theirs, 3)  # type: ignore[arg-type]


def test_a_function_that_returns_no_module(known: None) -> None:
    lstm_ext.register(Theirs, lambda module: 3)  # type: ignore[arg-type, return-value]
    with pytest.raises(TypeError, match="to_layer for Theirs: expected a module, got int"):
        lstm_ext.convert(Theirs(3, 4))
