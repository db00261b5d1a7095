"""Extras in the kernels, on the CPU: every instruction set, layout and way to share work, against the equations."""

from __future__ import annotations

import internals
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import lstm_ext
from lstm_ext import reference
from lstm_ext.layer import equations
from lstm_ext.native import loader

EPS = {torch.float64: 2**-52, torch.float32: 2**-23}

# steps, batch, input, hidden, projection, bias, bidirectional, initial state, packed
SHAPES = {
    "small": (5, 3, 4, 6, 0, True, False, True, False),
    "one step of one row": (1, 1, 3, 4, 0, True, False, True, False),
    "one step": (1, 1, 3, 20, 0, True, False, True, False),
    "both directions": (5, 3, 4, 19, 0, True, True, True, False),
    "no bias, no hx": (9, 7, 5, 20, 0, False, True, False, False),
    "projection": (6, 4, 3, 19, 5, True, True, True, False),
    "packed": (7, 5, 3, 18, 0, True, True, True, True),
    "packed, projection": (7, 5, 3, 18, 4, True, True, False, True),
    "packed, wide projection": (7, 5, 9, 24, 16, True, True, True, True),
    "packed panels": (40, 13, 9, 70, 0, True, True, True, False),
    "units shared": (60, 3, 9, 200, 0, True, False, True, False),
    "rows read as they are": (30, 2, 9, 300, 50, True, False, True, False),
    "chunks": (130, 4, 3, 33, 0, True, True, True, False),
}


# What else than resets changes the steps.
KINDS: dict[str, frozenset[str]] = {
    "mask": frozenset({"mask"}),
    "zoneout": frozenset({"kept_h", "kept_c"}),
    "zoneout of h, mask": frozenset({"kept_h", "mask", "resets"}),
    "zoneout of c": frozenset({"kept_c", "resets"}),
    "zoneout in the mean": frozenset({"shares"}),
    "norm": frozenset({"norm"}),
    "all, in the mean": frozenset({"resets", "shares", "norm", "returned"}),
    "all": frozenset({"resets", "mask", "kept_h", "kept_c", "norm", "returned"}),
    "all but norm": frozenset({"resets", "mask", "kept_h", "kept_c", "returned"}),
    "rebuilt": frozenset({"recompute"}),
    "rebuilt, with all": frozenset({"resets", "mask", "kept_h", "kept_c", "cells", "recompute"}),
}


def zoneout_options(state: str, zoneout: Tensor | float) -> dict[str, Tensor | float]:
    """Flags in training, a share in evaluation."""
    return {f"keep_{state}" if isinstance(zoneout, Tensor) else f"zoneout_{state}": zoneout}


class Layer:
    def __init__(
        self,
        shape: str,
        state: bool,
        dtype: torch.dtype,
        share: float = 0.3,
        kind: frozenset[str] = frozenset({"resets"}),
    ) -> None:
        T, B, I, H, P, self.bias, self.bidirectional, hx, packed = SHAPES[shape]
        D, S = 2 if self.bidirectional else 1, P or H

        def draw(*sizes: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*sizes) * scale).to(dtype)

        self.weights = []
        for _ in range(D):
            self.weights += [draw(4 * H, I, scale=H**-0.5), draw(4 * H, S, scale=H**-0.5)]
            self.weights += [draw(4 * H), draw(4 * H)] if self.bias else []
            self.weights += [draw(S, H, scale=H**-0.5)] if P else []
        self.batch_sizes = None
        rows: tuple[int, ...] = (T, B)
        if packed:
            lengths = torch.randint(1, T + 1, (B,))
            lengths[0] = T
            self.batch_sizes = (lengths > torch.arange(T).unsqueeze(1)).sum(1)
            rows = (int(lengths.sum()),)
        self.input = draw(*rows, I)
        self.resets = torch.rand(rows) < share if "resets" in kind else None
        self.h0, self.c0 = (draw(D, B, S), draw(D, B, H)) if hx else (None, None)
        self.reset_h, self.reset_c = (draw(D, B, S), draw(D, B, H)) if state else (None, None)
        if self.resets is None:
            self.reset_h = self.reset_c = None
        self.grads = [draw(*rows, D * S), draw(D, B, S), draw(D, B, H)]
        sum_dtype = dtype if dtype in EPS else torch.float32
        self.mask = None
        if "mask" in kind:
            self.mask = (torch.rand(D, B, S) < 0.7).to(sum_dtype) / 0.7
        self.kept_h: Tensor | float = torch.rand(D, *rows, S) < 0.3 if "kept_h" in kind else 0.0
        self.kept_c: Tensor | float = torch.rand(D, *rows, H) < 0.4 if "kept_c" in kind else 0.0
        if "shares" in kind:
            self.kept_h, self.kept_c = 0.2, 0.3
        self.norm: list[Tensor] = []
        for _ in range(D if "norm" in kind else 0):
            self.norm += [draw(4 * H) * 0.3 + 1, draw(4 * H) * 0.3 + 1, draw(H) * 0.3 + 1]
            self.norm += [draw(H)] if self.bias else []
        self.cells_wanted, self.gates_wanted = bool({"returned", "cells"} & kind), "returned" in kind
        if self.cells_wanted:
            self.grads.append(draw(D, *rows, H))
        if self.gates_wanted:
            self.grads.append(draw(D, *rows, H, 4))
        self.recompute = "recompute" in kind

    def results(self, function, dtype: torch.dtype) -> list[Tensor]:
        """Values and gradients."""
        tensors = [self.input, self.h0, self.c0, *self.weights, self.reset_h, self.reset_c, *self.norm]
        leaves = [t if t is None else t.clone().to(dtype).requires_grad_() for t in tensors]
        input, h0, c0, *others = leaves
        weights, (reset_h, reset_c, *norm) = others[: len(self.weights)], others[len(self.weights) :]
        extras = internals.LayerOptions(
            resets=self.resets,
            reset_h=reset_h,
            reset_c=reset_c,
            recurrent_mask=self.mask
            if self.mask is None
            else self.mask.to(dtype if dtype in EPS else torch.float32),
            **zoneout_options("h", self.kept_h),
            **zoneout_options("c", self.kept_c),
            norm=tuple(norm),
            return_cell_states=self.cells_wanted,
            return_gates=self.gates_wanted,
            recompute=self.recompute,
        )
        values = function(input, h0, c0, weights, self.batch_sizes, self.bias, self.bidirectional, extras)
        values = [v for v in values if v is not None]
        grads = torch.autograd.grad(
            values,
            [t for t in leaves if t is not None],
            [g.to(dtype) for g in self.grads],
            allow_unused=True,
            materialize_grads=True,
        )
        return [*values, *grads]


@pytest.fixture
def number_of_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def error(x: Tensor, expected: Tensor) -> float:
    return ((x.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def check(layer: Layer, dtype: torch.dtype) -> None:
    expected = layer.results(reference.lstm_layer, torch.float64)
    plain = layer.results(reference.lstm_layer, dtype)
    ours = layer.results(internals.lstm_layer, dtype)
    for x, y, e in zip(ours, plain, expected, strict=True):
        bound = 64 * EPS[dtype] if dtype == torch.float64 else 2 * error(y, e) + 4 * EPS[dtype]
        assert error(x, e) <= bound


@pytest.mark.parametrize(
    ("state", "threads"),
    [pytest.param(False, 1, id="to zeros"), pytest.param(True, 2, id="to a state", marks=pytest.mark.alone)],
)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels(shape, state, threads, capability, number_of_threads):
    number_of_threads(threads)
    for dtype in EPS:
        check(Layer(shape, state, dtype), dtype)


FEW_NUMBERS = (
    "small",
    "one step",
    "one step of one row",
    "packed",
    "projection",
    "packed, projection",
    "packed, wide projection",
)

# Small ones, and what of the larger ones a kind can do wrong; all pairs are in the long matrix below.
PAIRS = [
    *[
        (shape, kind)
        for kind in KINDS
        for shape in ("one step", "both directions", "packed, wide projection")
    ],
    *[("packed panels", kind) for kind in ("all", "all but norm", "rebuilt, with all")],
    *[("units shared", kind) for kind in ("all", "all but norm", "rebuilt, with all")],
    ("rows read as they are", "norm"),
    ("rows read as they are", "rebuilt"),
    ("chunks", "all"),
    ("chunks", "rebuilt, with all"),
]
MARKS = dict.fromkeys(("packed panels", "units shared"), pytest.mark.alone)  # of those on two threads


@pytest.mark.parametrize(
    ("shape", "kind"), [pytest.param(*pair, marks=MARKS.get(pair[0], ())) for pair in PAIRS]
)
def test_kernels_of_other_steps(shape, kind, capability, number_of_threads):
    number_of_threads(2 if shape in MARKS else 1)
    for dtype in EPS:
        # Of few numbers that are normalised, some lie so close together that any rounding becomes large, the equations'
        # own too: there float32 is judged by the worst of many draws, below.
        if dtype == torch.float64 or "norm" not in KINDS[kind] or shape not in FEW_NUMBERS:
            check(Layer(shape, True, dtype, kind=KINDS[kind]), dtype)


@pytest.mark.parametrize("kind", ["zoneout", "norm", "all", "all, in the mean", "rebuilt, with all"])
@pytest.mark.parametrize("shape", ["small", "both directions"])
def test_worst_of_twenty(shape, kind):
    ours, plain = [], []
    for seed in range(20):
        torch.manual_seed(seed)
        layer = Layer(shape, True, torch.float32, kind=KINDS[kind])
        expected = layer.results(reference.lstm_layer, torch.float64)
        for errors, function in ((ours, internals.lstm_layer), (plain, reference.lstm_layer)):
            results = layer.results(function, torch.float32)
            errors.append([error(x, e) for x, e in zip(results, expected, strict=True)])
    for x, y in zip(zip(*ours, strict=True), zip(*plain, strict=True), strict=True):
        assert max(x) <= 2 * max(y) + 4 * EPS[torch.float32]


@pytest.mark.full
@pytest.mark.parametrize("threads", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_of_other_steps_on_many_threads(shape, kind, threads, number_of_threads):
    number_of_threads(threads)
    for dtype in EPS:
        for state in (False, True):
            if dtype == torch.float64 or "norm" not in KINDS[kind] or shape not in FEW_NUMBERS:
                check(Layer(shape, state, dtype, kind=KINDS[kind]), dtype)


def test_the_kernels_are_what_runs(monkeypatch):
    monkeypatch.setattr(equations, "lstm_layer", lambda *_: pytest.fail("the equations ran"))
    layer = lstm_ext.LSTM(3, 5, num_layers=2, bidirectional=True, dropout=0.2)
    x, resets = torch.randn(6, 2, 3), torch.rand(6, 2) < 0.4
    state = (torch.randn(4, 2, 5), torch.randn(4, 2, 5))
    output, _ = layer(x, resets=resets, reset_state=state)
    output.sum().backward()
    with torch.no_grad():
        layer(x, resets=resets)
    packed = pack_padded_sequence(x, [6, 4])
    layer(packed, resets=pack_padded_sequence(resets, [6, 4]))[0].data.sum().backward()


@pytest.mark.parametrize("shape", ["both directions", "packed, projection"])
def test_where_nothing_is_reset_the_bits_are_those_of_the_plain_layer(shape):
    layer = Layer(shape, True, torch.float32, share=0.0)
    ours = layer.results(internals.lstm_layer, torch.float32)
    plain = layer.results(lambda *a: internals.lstm_layer(*a[:-1]), torch.float32)
    for n, (x, y) in enumerate(zip(ours[:-2], plain[:-2], strict=True)):
        # The outer products of weight_hh's gradient are summed up in other pieces.
        assert torch.equal(x, y) or (n >= 6 and error(x, y.double()) < 1e-6)
    assert not ours[-1].any() and not ours[-2].any()  # of a state that replaces nothing


def test_some_gradients_only():
    kernels = loader.extension()
    layer = Layer("projection", True, torch.float64)
    flags = (layer.bias, layer.bidirectional)
    reset = kernels.LayerOptions(resets=layer.resets, reset_h=layer.reset_h, reset_c=layer.reset_c)
    *values, saved = kernels.lstm_layer_forward(
        layer.input, layer.h0, layer.c0, layer.weights, None, *flags, reset, True
    )
    count = 3 + len(layer.weights) + 2

    def gradients(wanted: list[bool], grads: list[Tensor | None]) -> list[Tensor | None]:
        return kernels.lstm_layer_backward(
            layer.input,
            layer.h0,
            layer.c0,
            layer.weights,
            None,
            *flags,
            reset,
            *grads,
            None,
            None,
            values[0],
            saved,
            wanted,
        )

    full = gradients([True] * count, layer.grads)
    for n in range(count):
        wanted = [k == n for k in range(count)]
        result = gradients(wanted, layer.grads)
        assert [g is not None for g in result] == wanted
        assert torch.equal(result[n], full[n])


def test_second_derivatives():
    layer = lstm_ext.LSTM(2, 3, dtype=torch.float64)
    x = torch.randn(4, 2, 2, dtype=torch.float64, requires_grad=True)
    state = tuple(torch.randn(1, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    resets = torch.tensor([[0, 1], [1, 0], [0, 0], [0, 1]], dtype=torch.bool)

    def function(x, h, c):
        output, (h_n, c_n) = layer(x, resets=resets, reset_state=(h, c))
        return output, h_n, c_n

    assert torch.autograd.gradcheck(function, (x, *state))
    assert torch.autograd.gradgradcheck(function, (x, *state))


def test_batch_of_zero():
    layer = lstm_ext.LSTM(2, 3)
    x = torch.randn(4, 0, 2, requires_grad=True)
    output, _ = layer(x, resets=torch.zeros(4, 0, dtype=torch.bool))
    output.sum().backward()
    assert output.shape == (4, 0, 3) and not layer.weight_hh_l0.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype):
    layer = Layer("both directions", True, dtype)
    expected = layer.results(reference.lstm_layer, torch.float64)
    for x, e in zip(layer.results(internals.lstm_layer, dtype), expected, strict=True):
        assert x.dtype == dtype
        assert error(x, e) <= 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"resets": lambda r: r[1:]}, "resets has shape"),
        ({"resets": lambda r: r.int()}, "resets has dtype"),
        ({"reset_h": lambda h: h[:, 1:]}, "reset_h has shape"),
        ({"reset_c": lambda c: c.double()}, "reset_c has dtype"),
        ({"resets": lambda r: None}, "a reset state, but no resets"),
    ],
)
def test_kernels_check_their_arguments(change, said):
    layer = Layer("small", True, torch.float32)
    reset = {"resets": layer.resets, "reset_h": layer.reset_h, "reset_c": layer.reset_c}
    for name, function in change.items():
        reset[name] = function(reset[name])
    with pytest.raises(RuntimeError, match=said):
        loader.extension().lstm_layer_forward(
            layer.input,
            layer.h0,
            layer.c0,
            layer.weights,
            None,
            layer.bias,
            layer.bidirectional,
            loader.extension().LayerOptions(**reset),
            True,
        )


# ---- cell states and gates as results


def returning(
    layer: Layer, function, dtype: torch.dtype, asked: tuple[bool, bool], reset: bool
) -> list[Tensor]:
    """Values, and gradients through all of them."""
    states = [layer.reset_h, layer.reset_c] if reset else [None, None]
    leaves = [
        t if t is None else t.to(dtype).requires_grad_()
        for t in (layer.input, layer.h0, layer.c0, *layer.weights, *states)
    ]
    input, h0, c0, *weights, reset_h, reset_c = leaves
    extras = internals.LayerOptions(
        resets=layer.resets if reset else None,
        reset_h=reset_h,
        reset_c=reset_c,
        return_cell_states=asked[0],
        return_gates=asked[1],
    )
    results = function(input, h0, c0, weights, layer.batch_sizes, layer.bias, layer.bidirectional, extras)
    values = [y for y in results if y is not None]
    generator = torch.Generator().manual_seed(5)
    grads = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(dtype) for y in values]
    wanted = [t for t in leaves if t is not None]
    return [*values, *torch.autograd.grad(values, wanted, grads, allow_unused=True, materialize_grads=True)]


@pytest.mark.parametrize(
    ("asked", "reset"),
    [((True, False), False), ((False, True), True), ((True, True), True), ((True, True), False)],
)
@pytest.mark.parametrize("shape", ["both directions", "projection", "packed, projection"])
def test_cell_states_and_gates(shape, asked, reset, capability):
    for dtype in EPS:
        layer = Layer(shape, True, dtype)
        expected = returning(layer, reference.lstm_layer, torch.float64, asked, reset)
        plain = returning(layer, reference.lstm_layer, dtype, asked, reset)
        ours = returning(layer, internals.lstm_layer, dtype, asked, reset)
        for x, y, e in zip(ours, plain, expected, strict=True):
            assert x.shape == e.shape
            bound = 64 * EPS[dtype] if dtype == torch.float64 else 2 * error(y, e) + 4 * EPS[dtype]
            assert error(x, e) <= bound


def test_cell_states_and_gates_come_from_the_kernels(monkeypatch):
    monkeypatch.setattr(equations, "lstm_layer", lambda *_: pytest.fail("the equations ran"))
    layer = lstm_ext.LSTM(3, 5, num_layers=2, bidirectional=True)
    x = torch.randn(6, 2, 3)
    for context in (torch.enable_grad, torch.no_grad):
        with context():
            _, _, extras = layer(x, return_cell_states=True, return_gates=True, lengths=[4, 6])
    assert extras.cell_states.shape == (4, 6, 2, 5) and extras.gates.shape == (4, 6, 2, 5, 4)


def test_second_derivatives_through_cell_states_and_gates():
    layer = lstm_ext.LSTM(2, 3, dtype=torch.float64)
    x = torch.randn(4, 2, 2, dtype=torch.float64, requires_grad=True)

    def function(x):
        *_, extras = layer(x, return_cell_states=True, return_gates=True)
        return extras.cell_states, extras.gates

    assert torch.autograd.gradcheck(function, (x,))
    assert torch.autograd.gradgradcheck(function, (x,))
