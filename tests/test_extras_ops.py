"""The operators of a layer with extras: what torch demands of them, and that they compute what the kernels do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from graphs import Recorder
from lstm_ext.layer.options import OPERANDS, LayerExtras
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from lstm_ext import ops, reference
from lstm_ext.layer import route

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
        leaves = [None if t is None else cast(t.detach()).requires_grad_() for t in self.differentiable]
        count = len(self.weights)
        reset_h, reset_c, *norm = leaves[3 + count :]
        extras = replace(extras.map(cast), reset_h=reset_h, reset_c=reset_c, norm=tuple(norm))
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


every_case = pytest.mark.parametrize("name", CASES)


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
    """Of the operator, and of the functions for transforms: those of the equations, and bit by bit the kernels'."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        case = make(name, dtype=dtype)
        kernels = case.through(route.lstm_layer)
        for function in (route._operator, route.transforms.lstm_layer):
            for x, y in zip(case.through(function), kernels, strict=True):
                assert torch.equal(x, y)
        if dtype == torch.float64:
            for x, e in zip(kernels, case.through(reference.lstm_layer), strict=True):
                assert error(x, e) <= 64 * torch.finfo(dtype).eps


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


@pytest.mark.parametrize("name", ["reset state", "packed", "norm"])
def test_flops_are_those_of_the_plain_layer(name):
    case = make(name, requires_grad=True)
    counts = []
    plain = case.arguments[:7]
    for op, arguments in ((ops.lstm_layer, plain), (ops.lstm_layer_with_extras, case.arguments)):
        with FlopCounterMode(display=False) as counter:
            op(*arguments)[0].sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
