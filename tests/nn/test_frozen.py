"""lstm_ext.freeze: layers whose weights are packed once."""

from __future__ import annotations

import copy
import os
import pickle
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from judge import Worst, relative_error
from matrix.routes import by_steps
from torch import Tensor, nn

import lstm_ext
from lstm_ext import reference
from lstm_ext.native import loader

_C = loader.extension()
KINDS = {"own": None, "bfloat16": torch.bfloat16, "int8": torch.int8}
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "both directions, two layers": {"bidirectional": True, "num_layers": 2},
    "projection": {"proj_size": 44},
    "other functions": {
        "gate_activation": "hard_sigmoid",
        "cell_activation": "softsign",
        "preactivation_clip": 0.8,
    },
    "other cells": {"peephole": True, "cell_clip": 0.3, "coupled_gates": True, "bidirectional": True},
    "norm, cell": {"layer_norm": "cell", "bidirectional": True},
    "options": {"layer_norm": True, "zoneout": (0.1, 0.2), "recurrent_dropout": 0.3, "proj_size": 40},
}
# Products of int8 weights are sums of bytes in most of them, so the fixture's choice is not enough.
SETS = ["amx", "avx512_bf16", "avx512", "avx2"]
every_set = pytest.mark.parametrize("capability", SETS, indirect=True)
# Steps and rows: from one row to what goes to a tile engine.
SHAPES = [(1, 1), (1, 3), (1, 5), (6, 2), (9, 4), (3, 40), (30, 1), (20, 33)]


def layer_of(config: str, dtype: torch.dtype = torch.float32, input_size: int = 37) -> lstm_ext.LSTM:
    torch.manual_seed(3)
    layer = lstm_ext.LSTM(input_size, 70, **CONFIGS[config], dtype=dtype).eval()
    for name, p in layer.named_parameters():
        if name.startswith("weight_c"):
            torch.nn.init.normal_(p, std=0.3)
    return layer


def rounded(weight: Tensor, kind: str) -> Tensor:
    """What a weight is rounded to, as the docstring of freeze says it."""
    if kind == "bfloat16":
        return weight.bfloat16().to(weight.dtype)
    if kind == "int8":
        factors = weight.abs().amax(1, keepdim=True) / 127
        return (weight / factors).round() * factors
    return weight


def with_rounded_weights(layer: lstm_ext.LSTM, kind: str) -> lstm_ext.LSTM:
    layer = copy.deepcopy(layer)
    with torch.no_grad():
        for name, p in layer.named_parameters():
            if name.startswith(("weight_ih", "weight_hh")):
                p.copy_(rounded(p, kind))
    return layer


@pytest.mark.parametrize(
    ("kind", "capability"),
    [(kind, name) for kind in KINDS for name in SETS if kind == "int8" or name != "avx512_bf16"],
    indirect=["capability"],
)
@pytest.mark.parametrize("config", CONFIGS)
@torch.no_grad()
def test_is_the_layer_with_these_weights(config: str, kind: str, capability: str) -> None:
    """As exact as the layer itself with the rounded weights, at every number of rows."""
    layer = layer_of(config)
    frozen = lstm_ext.freeze(layer, KINDS[kind])
    same = with_rounded_weights(layer, kind)
    exact = copy.deepcopy(same).double()
    worst = Worst()
    for steps, batch in SHAPES:
        x = torch.randn(steps, batch, 37)
        sets = (2 if layer.bidirectional else 1) * layer.num_layers
        hx = torch.randn(sets, batch, layer.proj_size or 70), torch.randn(sets, batch, 70)
        sides = frozen(x, hx), same(x, hx), exact(x.double(), tuple(s.double() for s in hx))
        worst.add(*[{"output": y, "h_n": h, "c_n": c} for y, (h, c) in sides])
    assert not worst.problems()


def of_all_sizes(x: Tensor) -> Tensor:
    """Numbers of 2^-40 to 2^40 side by side."""
    return x * torch.exp2(torch.randint(-40, 41, x.shape))


def some_large(x: Tensor) -> Tensor:
    return x * torch.where(torch.arange(x.shape[-1]) % 64 == 9, 100.0, 1.0)


# Sizes, shapes of inputs, what is done to their numbers, and the features whose weights are rounded to 0. The kernels
# take 512 numbers of a row at a time, and up to eight such pieces; others go a slower way.
INT8: dict[str, tuple[Any, ...]] = {
    **{
        f"rows of several pieces, {name}": ([(n, 20) for n in (1, 511, 513, 4100) * 8], [(3, 3)], change, 0)
        for name, change in {
            "usual": lambda x: x,
            "large": lambda x: 10 * x,
            "some large": some_large,
            "small": lambda x: 1e-3 * x,
            "of all sizes": of_all_sizes,
            "zeros": lambda x: 0 * x,
            "below the range": lambda x: 1e-35 * x,
            "above the range": lambda x: 1e30 * x,
        }.items()
    },
    # Their sums in float32 are more exact than sums of hundreds of numbers. Near saturation a few numbers decide: with
    # the seed of the test, three bytes of x would have 1.9 times the allowed error.
    "a few large numbers": ([(4, 128)] * 20, [(3, 3)], lambda x: 1000 * x, 0),
    # Rows of h that are wide enough for three bytes: their errors add up from step to step.
    "many steps": ([(30, 200)] * 10, [(40, 1), (40, 3)], lambda x: x, 0),
    # A time in seconds, say, whose small weight is rounded to 0: the other features keep their bits.
    "beside numbers of weight 0, one": ([(300, 20)], [(3, 3)], lambda x: 1.7e9 * x, 1),
    "beside numbers of weight 0, half": ([(300, 20)], [(3, 3)], lambda x: 100 * x, 150),
    "beside numbers of weight 0, most": ([(300, 20)], [(3, 3)], lambda x: 100 * x, 240),
}


@every_set
@pytest.mark.parametrize("numbers", INT8)
@torch.no_grad()
def test_int8(numbers: str, capability: str) -> None:
    """As exact as torch's layer whose weights have the rounded numbers."""
    torch.manual_seed(13)
    sizes, shapes, change, without_weight = INT8[numbers]
    worst = Worst()
    for input_size, hidden_size in sizes:
        layer = lstm_ext.LSTM(input_size, hidden_size)
        layer.weight_ih_l0[:, :without_weight] = 1e-12
        same = lstm_ext.revert(with_rounded_weights(layer, "int8"))
        for shape in shapes:
            x = torch.randn(*shape, input_size)
            end = without_weight or input_size
            x[..., :end] = change(x[..., :end])
            if without_weight == 1:
                x[1:, :, ::2] = 0
            sides = lstm_ext.freeze(layer, torch.int8)(x), same(x), copy.deepcopy(same).double()(x.double())
            worst.add(*[{"output": y, "h_n": h, "c_n": c} for y, (h, c) in sides])
    assert not worst.problems()


@torch.no_grad()
def test_a_failed_load_leaves_a_layer_that_runs() -> None:
    layer = layer_of("both directions, two layers")
    frozen = lstm_ext.freeze(layer, torch.int8)
    x = torch.randn(3, 2, 37)
    expected = frozen(x)[0]
    state = layer.state_dict()
    state["weight_hh_l1"] = torch.full_like(state["weight_hh_l1"], torch.nan)
    state["weight_ih_l0"] = 0 * state["weight_ih_l0"]
    with pytest.raises(ValueError, match="weight_hh_l1 has an infinity or a NaN"):
        frozen.load_state_dict(state)
    assert torch.equal(frozen(x)[0], expected)
    assert torch.equal(frozen.weight_ih_l0, layer.weight_ih_l0)


@pytest.mark.parametrize("features", [60, 80])
@torch.no_grad()
def test_few_weights_are_kept_in_float32(features: int) -> None:
    """Up to 20,000 in a direction."""
    layer = lstm_ext.LSTM(features, 43)
    few = 4 * 43 * (features + 43) <= 20_000
    sizes = [sum(b.numel() for b in lstm_ext.freeze(layer, k).buffers()) for k in (None, torch.int8)]
    assert few == (sizes[0] == sizes[1])
    assert few == (features == 60)
    x, same = torch.randn(4, 2, features), with_rounded_weights(layer, "int8")
    assert relative_error(lstm_ext.freeze(layer, torch.int8)(x)[0], same(x)[0].double()) < 1e-6


@every_set
@torch.no_grad()
def test_int8_with_infinities_and_nan(capability: str) -> None:
    layer = lstm_ext.LSTM(600, 20)
    same = with_rounded_weights(layer, "int8")
    x = torch.randn(4, 3, 600)
    x[1, 0, 7], x[1, 1, 550], x[2, 2, 3] = torch.inf, torch.nan, -torch.inf
    y, expected = lstm_ext.freeze(layer, torch.int8)(x)[0], same(x)[0]
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert y.isnan().any() and not y[0].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_other_dtypes(dtype: torch.dtype, capability: str) -> None:
    layer = layer_of("projection", dtype)
    frozen = lstm_ext.freeze(layer)
    for steps, batch in SHAPES:
        x = torch.randn(steps, batch, 37, dtype=dtype)
        y = frozen(x)[0]
        assert y.dtype == dtype
        bound = 64 if dtype == torch.float64 else 2
        assert relative_error(y, layer(x)[0].double()) <= bound * torch.finfo(dtype).eps


@pytest.mark.parametrize(("kind", "bound"), [("own", 1e-6), ("bfloat16", 4e-3), ("int8", 8e-3)])
@torch.no_grad()
def test_the_error_is_what_the_docstring_says(kind: str, bound: float) -> None:
    for config in ("plain", "projection", "both directions, two layers"):
        layer = layer_of(config)
        x = torch.randn(30, 3, 37)
        error = relative_error(
            lstm_ext.freeze(layer, KINDS[kind])(x)[0], copy.deepcopy(layer).double()(x.double())[0]
        )
        assert (kind == "own" or error > bound / 20) and error < bound


@torch.no_grad()
def test_step_equals_the_sequence() -> None:
    for kind in KINDS.values():
        frozen, x = lstm_ext.freeze(lstm_ext.LSTM(37, 70, 2), kind), torch.randn(8, 2, 37)
        assert relative_error(by_steps(frozen, x, None)[0], frozen(x)[0].double()) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_every_other_step_of_large_weights_has_the_same_bits(kind) -> None:
    """It takes the units from the last to the first, in groups."""
    H = {"int8": 450, "bfloat16": 330, "own": 250}[kind]
    frozen = lstm_ext.freeze(lstm_ext.LSTM(H, H), KINDS[kind])
    x, hx = torch.randn(2, 1, H), (torch.randn(1, 1, H), torch.randn(1, 1, H))
    first, second = (frozen.step(x[0], hx) for _ in range(2))
    sequence = frozen(x, hx)[0][0]
    assert torch.equal(first[0], sequence) and torch.equal(second[0], sequence)
    assert torch.equal(first[1][1], second[1][1])


@torch.no_grad()
def test_weights_the_engine_cannot_split() -> None:
    """Numbers near the largest of float32, and infinities, take the rows as they are."""
    layer = layer_of("plain")
    layer.weight_hh_l0[5, 3] = 3.4e38
    layer.weight_ih_l0[150, 3] = float("inf")
    x = torch.randn(4, 40, 37)
    y, expected = lstm_ext.freeze(layer)(x)[0], layer(x)[0]
    assert torch.equal(y.isnan(), expected.isnan())
    torch.testing.assert_close(y, expected, equal_nan=True)


@torch.no_grad()
def test_two_threads_change_no_bit() -> None:
    frozen, x, before = (
        lstm_ext.freeze(layer_of("projection")),
        torch.randn(50, 16, 37),
        torch.get_num_threads(),
    )
    try:
        torch.set_num_threads(1)
        one = frozen(x)[0]
        torch.set_num_threads(2)
        assert torch.equal(frozen(x)[0], one)
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def test_another_instruction_set_packs_in_each_call() -> None:
    sets = _C.cpu_capabilities()
    if len(sets) == 1:
        pytest.skip("this processor runs one instruction set only")
    before = _C.cpu_capability()
    x = torch.randn(5, 3, 37)
    for kind in KINDS.values():
        _C.set_cpu_capability(sets[0])
        frozen = lstm_ext.freeze(layer_of("projection"), kind)
        expected = frozen(x)[0]
        try:
            _C.set_cpu_capability(sets[-1])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert relative_error(frozen(x)[0], expected.double()) < 1e-6
        finally:
            _C.set_cpu_capability(before)


FREEZE = """
import sys, torch, lstm_ext
layer, inputs = torch.load(sys.argv[1], weights_only=False)
frozen = lstm_ext.freeze(layer, torch.int8)
with torch.no_grad():
    torch.save(([frozen(x)[0] for x in inputs], dict(frozen.named_buffers())), sys.argv[2])
"""


@pytest.mark.parametrize("capability", ["avx512", "avx2"], indirect=True)
@torch.no_grad()
def test_int8_without_vnni(capability: str, tmp_path: Path) -> None:
    """Then these sets widen the weights. Panels that were made so never run as bytes."""
    layer, inputs = layer_of("both directions, two layers"), [torch.randn(*rows, 37) for rows in SHAPES]
    torch.save((layer, inputs), tmp_path / "layer")
    subprocess.run(
        [sys.executable, "-c", FREEZE, tmp_path / "layer", tmp_path / "frozen"],
        env=os.environ | {"LSTM_EXT_CPU_CAPABILITY": capability, "LSTM_EXT_CPU_VNNI": "0"},
        check=True,
    )
    outputs, buffers = torch.load(tmp_path / "frozen")
    exact = with_rounded_weights(layer, "int8").double()
    frozen = lstm_ext.freeze(layer, torch.int8)
    for name, buffer in buffers.items():
        assert bytes(buffer[8:32]).rstrip(b"\0").decode() == capability
        frozen.get_buffer(name).copy_(buffer)
    for x, y in zip(inputs, outputs, strict=True):
        assert relative_error(y, exact(x.double())[0]) < 1e-6
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert relative_error(frozen(x)[0], y.double()) < 1e-6


def not_finite() -> nn.Module:
    layer = lstm_ext.LSTM(3, 4)
    with torch.no_grad():
        layer.weight_hh_l0[1, 2] = float("nan")
    return layer


def of_two_dtypes() -> nn.Module:
    layer = lstm_ext.LSTM(3, 4)
    layer.bias_ih_l0 = nn.Parameter(layer.bias_ih_l0.detach().double())
    return layer


def frozen_layer(weights: torch.dtype | None = None) -> lstm_ext.FrozenLSTM:
    return lstm_ext.freeze(lstm_ext.LSTM(3, 4), weights)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: lstm_ext.freeze("model"), TypeError, "expected module to be a torch.nn.Module, got str"),
        (lambda: lstm_ext.unfreeze(3), TypeError, "expected module to be a torch.nn.Module, got int"),
        (lambda: lstm_ext.freeze(nn.Linear(2, 2)), ValueError, r"one, got Linear\. It looked at 1 module: 1 Linear\."),
        (
            lambda: lstm_ext.freeze(nn.ModuleDict({"a": nn.LSTMCell(2, 2), "b": lstm_ext.LSTMCell(2, 2)})),
            ValueError,
            r"one, got ModuleDict\. 'a' \(torch\S+LSTMCell\), 'b' \(lstm_ext\S+LSTMCell\): a cell has no frozen",
        ),
        (lambda: lstm_ext.unfreeze(lstm_ext.LSTM(2, 2)), ValueError, "expected a frozen layer"),
        (
            lambda: lstm_ext.freeze(lstm_ext.LSTM(2, 2), torch.float16),
            ValueError,
            "weights: expected None, torch.bfloat16 or torch.int8, got torch.float16",
        ),
        (
            lambda: lstm_ext.freeze(lstm_ext.LSTM(2, 2, dtype=torch.float64), torch.int8),
            ValueError,
            "expected None for float64 parameters, got torch.int8",
        ),
        (
            lambda: lstm_ext.freeze(nn.Sequential(not_finite()), torch.int8),
            ValueError,
            "'0': weight_hh_l0 has an infinity or a NaN",
        ),
        (lambda: lstm_ext.freeze(of_two_dtypes()), ValueError, "the model itself: expected parameters of one dtype"),
        (lambda: lstm_ext.freeze(lstm_ext.LSTM(2, 2, device="meta")), RuntimeError, "got parameters on meta"),
        (lambda: lstm_ext.FrozenLSTM(3, 4), TypeError, "FrozenLSTM: lstm_ext.freeze makes such a layer"),
        (lambda: frozen_layer().to("meta"), RuntimeError, "on the CPU, got parameters on meta"),
        (lambda: frozen_layer(torch.int8).double(), ValueError, "expected None for float64 parameters"),
        (lambda: frozen_layer()(torch.randn(2, 1, 3, requires_grad=True)), RuntimeError, "no gradients"),
        (
            lambda: frozen_layer().load_state_dict(lstm_ext.LSTM(3, 5).state_dict()),
            RuntimeError,
            "size mismatch for weight_ih_l0",
        ),
        (lambda: torch.func.vmap(frozen_layer())(torch.randn(2, 2, 1, 3)), RuntimeError, "unfreeze"),
        (lambda: torch.jit.trace(frozen_layer(), torch.randn(2, 1, 3)), RuntimeError, "unfreeze"),
    ],
)  # fmt: skip
def test_errors(call: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()


def test_cells_of_a_model_are_named() -> None:
    """And what the warning says freezes what they compute."""
    model = nn.ModuleList([nn.LSTM(2, 2), nn.LSTMCell(3, 4)])
    with pytest.warns(
        UserWarning, match=r"freeze: not frozen: '1' \(torch.*LSTMCell\): a cell has"
    ) as record:
        frozen = lstm_ext.freeze(model)
    assert record[0].filename == __file__ and type(frozen[1]) is nn.LSTMCell
    layer, cell = lstm_ext.LSTM(3, 4), model[1]
    exec(re.sub(r".*(load_state_dict)", r"layer.\1", str(record[0].message)), {"layer": layer, "cell": cell})
    x = torch.randn(2, 3)
    with torch.no_grad():
        h, _ = cell(x)
        torch.testing.assert_close(lstm_ext.freeze(layer).step(x)[0], h)


def test_bytes_that_are_not_frozen_weights() -> None:
    layer = lstm_ext.LSTM(3, 4)
    x, weights = torch.randn(2, 1, 3), list(layer.parameters())

    def call(*frozen: Tensor) -> None:
        torch.ops.lstm_ext.lstm_layer(x, None, None, weights, None, True, False, frozen=list(frozen))

    def bytes_of(layer: lstm_ext.LSTM) -> Tensor:
        return lstm_ext.freeze(layer)._frozen[0].frozen[0]

    good = bytes_of(layer)
    with torch.no_grad():
        call(good)
        for tensors, text in (
            ((good, good), "expected one for each direction, 1"),
            ((good[:-1],), "not what freeze_weights gives"),
            ((torch.zeros(5000, dtype=torch.uint8),), "not what freeze_weights gives"),
            ((good.float(),), "not what freeze_weights gives"),
            ((good.view(torch.int8),), "not what freeze_weights gives"),
            (
                (bytes_of(lstm_ext.LSTM(4, 4)),),
                "4 features and 4 units, expected 3 and 4",
            ),
            ((bytes_of(lstm_ext.LSTM(3, 4, dtype=torch.float64)),), "another dtype than the input"),
        ):
            with pytest.raises(RuntimeError, match=text):
                call(*tensors)


@pytest.mark.parametrize("other", [0, 1, 3])
def test_weights_of_two_dtypes_are_not_frozen(other: int) -> None:
    weights = [p.detach() for p in lstm_ext.LSTM(3, 4).parameters()]
    weights[other] = weights[other].double()
    with pytest.raises(RuntimeError, match="of one dtype" if other else "of one dtype|float64"):
        _C.freeze_weights(weights, True, False, "own")


@every_set
@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_weights_of_zeros_and_ones(capability: str, kind: str) -> None:
    """Each row of zeros has no largest number to divide by, and each row of ones divides to a whole number."""
    layer = lstm_ext.LSTM(37, 50)
    with torch.no_grad():
        for p in (layer.weight_ih_l0, layer.weight_hh_l0):
            p[::3] = 0
            p[1::3] = torch.randint(-1, 2, p[1::3].shape).to(p)
        layer.weight_ih_l0[1::6] *= 127  # a factor of 1
    x = torch.randn(6, 3, 37)
    weights = [
        rounded(p, kind).nan_to_num().double() if p.dim() == 2 else p.double() for p in layer.parameters()
    ]
    expected = reference.lstm_layer(x.double(), None, None, weights, None, True, False)[0]
    assert relative_error(lstm_ext.freeze(layer, KINDS[kind])(x)[0], expected) < 1e-5


CHANGES = {
    "copy_": lambda layer: layer.weight_hh_l1.copy_(torch.zeros(64, 16)),
    "mul_": lambda layer: layer.bias_ih_l0.mul_(2),
    "data": lambda layer: setattr(layer.weight_ih_l0, "data", torch.zeros(64, 8)),
}
CALLS = {
    "call": lambda layer, x: layer(x),
    "step": lambda layer, x: layer.step(x[0]),
    "lengths": lambda layer, x: layer(x, lengths=[3, 2]),
    "deepcopy": lambda layer, x: copy.deepcopy(layer)(x),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_in_place_is_refused(change: str) -> None:
    """And load_state_dict packs the new numbers; what is packed anew fits again."""
    layer, x = lstm_ext.LSTM(8, 16, 2), torch.randn(3, 2, 8)
    frozen = lstm_ext.freeze(layer)
    with torch.no_grad():
        expected = frozen(x)[0]
        for again in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen)), frozen.share_memory()):
            torch.testing.assert_close(again(x)[0], expected)
        CHANGES[change](frozen)
        for call in CALLS.values():
            with pytest.raises(RuntimeError, match="a weight was changed in place after it was packed"):
                call(frozen, x)
        frozen.load_state_dict(layer.state_dict())
        torch.testing.assert_close(frozen(x)[0], expected)
