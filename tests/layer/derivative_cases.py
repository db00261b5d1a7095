"""The cases of the tests of derivatives: every way to call a layer, on the kernels and on the reference equations."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves, tree_map

import lstm_ext
from lstm_ext import functional
from lstm_ext.layer import equations, route

F64 = torch.float64
OPERATORS = ("lstm_layer", "lstm_layer_forward", "lstm_layer_backward")
BATCH_SIZES = torch.tensor([3, 2, 1])

CONFIGS = {
    "plain": {},
    "no bias": {"bias": False},
    "two layers": {"num_layers": 2},
    "both directions": {"bidirectional": True},
    "projection": {"proj_size": 1},
    "all": {"num_layers": 2, "bidirectional": True, "proj_size": 1, "bias": False},
}


class Dense(nn.Module):
    """``forward(x, h, c) -> (output, h_n, c_n)``"""

    x_shape: tuple[int, ...] = (3, 2, 2)
    batch: tuple[int, ...] = (2,)

    def __init__(self, hidden_size: int = 3, dtype: torch.dtype = F64, **config: Any) -> None:
        super().__init__()
        self.lstm = lstm_ext.LSTM(2, hidden_size, **config, dtype=dtype)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        output, states = self.lstm(x, (h, c))
        return output, *states

    def arguments(self) -> tuple[Tensor, Tensor, Tensor]:
        m = self.lstm
        sets = m.num_layers * (2 if m.bidirectional else 1)
        shapes = (
            self.x_shape,
            (sets, *self.batch, m.proj_size or m.hidden_size),
            (sets, *self.batch, m.hidden_size),
        )
        return tuple([torch.randn(s, dtype=m.weight_ih_l0.dtype) for s in shapes])


class Packed(Dense):
    x_shape, batch = (6, 2), (3,)
    indices = torch.tensor([2, 0, 1]), torch.tensor([1, 2, 0])

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        output, states = self.lstm(
            PackedSequence(x, BATCH_SIZES, *[i.to(x.device) for i in self.indices]), (h, c)
        )
        return output.data, *states


class Unbatched(Dense):
    x_shape, batch = (3, 2), ()


class BatchFirst(Dense):
    x_shape = (2, 3, 2)


class OneStep(Dense):
    x_shape = (1, 2, 2)


class WithoutStates(Dense):
    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        output, (h_n, c_n) = self.lstm(x)
        return output, h_n * c.sin(), c_n * h.sin()


class Steps(Dense):
    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        outputs = []
        for x_t in x:
            output, (h, c) = self.lstm.step(x_t, (h, c))
            outputs.append(output)
        return torch.stack(outputs), h, c


class Functional(Dense):
    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        m = self.lstm
        weights = list(m.parameters())
        output, states = functional.lstm(
            x, (h, c), weights, m.bias, m.num_layers, bidirectional=m.bidirectional
        )
        return output, *states


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = lstm_ext.LSTMCell(2, 3, dtype=F64)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h1, c1 = self.cell(x, (h, c))
        h2, c2 = self.cell(x.sin(), (h1, c1))
        return h1, h2, c2

    def arguments(self) -> tuple[Tensor, Tensor, Tensor]:
        return tuple([torch.randn(2, n, dtype=F64) for n in (2, 3, 3)])


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": Dense,
    "no bias": lambda: Dense(bias=False),
    "projection": lambda: Dense(proj_size=2),
    "two layers, both directions": lambda: Dense(num_layers=2, bidirectional=True, proj_size=1),
    "batch first": lambda: BatchFirst(batch_first=True, bidirectional=True, bias=False),
    "unbatched": Unbatched,
    "no states": lambda: WithoutStates(bidirectional=True),
    "one step": lambda: OneStep(bidirectional=True),
    "packed": Packed,
    "packed, two layers, both directions": lambda: Packed(num_layers=2, bidirectional=True, proj_size=2),
    "packed, no bias": lambda: Packed(bias=False, bidirectional=True),
    "step()": lambda: Steps(num_layers=2),
    "functional": lambda: Functional(bidirectional=True),
    "cell": Cell,
}
every_model = pytest.mark.parametrize("model", MODELS)
# For what is slow and more about the transforms than about the layer.
some_models = pytest.mark.parametrize(
    "model",
    ["plain", "two layers, both directions", "no states", "packed, two layers, both directions", "cell"],
)


class Case(NamedTuple):
    p: dict[str, Tensor]
    x: Tensor
    h: Tensor
    c: Tensor
    call: Callable[..., tuple[Tensor, Tensor, Tensor]]  # of (p, x, h, c)
    loss: Callable[..., Tensor]  # of (p, x, h, c)

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self[:4]

    def of(self, i: int) -> Callable[[Any], Tensor]:
        """The loss as a function of its argument i only."""
        return lambda a: self.loss(*self[:i], a, *self[i + 1 : 4])


def make_case(model: str | nn.Module) -> Case:
    module = MODELS[model]() if isinstance(model, str) else model
    p = {name: t.detach().clone() for name, t in module.named_parameters()}

    def call(p, x, h, c):
        return functional_call(module, p, (x, h, c))

    def loss(p, x, h, c):
        output, h_n, c_n = call(p, x, h, c)
        return output.sin().sum() + h_n.cos().sum() + c_n.square().sum()

    return Case(p, *module.arguments(), call, loss)


def several(tree: Any, n: int = 2) -> Any:
    """n variations of each tensor, stacked."""
    return tree_map(lambda t: torch.stack([t, *[torch.randn_like(t) for _ in range(n - 1)]]), tree)


def several_of(tree: Any) -> Any:
    """As `several`, for use where random numbers would be drawn inside of vmap."""
    return tree_map(lambda t: torch.stack([t, 0.5 * t.flip(-1)]), tree)


# ---- on the kernels and on the reference


@contextlib.contextmanager
def operator_calls() -> Iterator[list[str]]:
    """The operators that are called within, by name."""
    calls: list[str] = []

    def recorded(name: str) -> Callable[..., Any]:
        operator = getattr(torch.ops.lstm_ext, name)

        def record(*args, **options):
            calls.append(name)
            return operator(*args, **options)

        return record

    with pytest.MonkeyPatch.context() as patch:
        for name in OPERATORS:
            patch.setattr(torch.ops.lstm_ext, name, recorded(name))
        yield calls


@contextlib.contextmanager
def on_reference() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(route, "lstm_layer", equations.lstm_layer)
        patch.setattr(route, "plain_layers", lambda *_: None)
        patch.setattr(route, "plain_cell", lambda *_: None)
        patch.setattr(route, "is_direct", lambda _: False)  # for cells
        yield


def assert_close(result: Any, expected: Any) -> None:
    """Each tensor to 11 digits of its largest element."""
    leaves, expected_leaves = tree_leaves(result), tree_leaves(expected)
    assert [t.shape for t in leaves] == [t.shape for t in expected_leaves]
    for t, e in zip(leaves, expected_leaves, strict=True):
        largest = e.abs().max().item() if e.numel() else 0.0
        torch.testing.assert_close(t, e, rtol=0, atol=1e-11 * largest + 1e-14)


def assert_as_on_reference(compute: Callable[[], Any]) -> None:
    with operator_calls() as calls:
        result = compute()
    assert calls, "no operator was called"
    with on_reference(), operator_calls() as calls:
        expected = compute()
    assert not calls
    assert any(t.abs().max() > 1e-6 for t in tree_leaves(expected))
    assert_close(result, expected)
