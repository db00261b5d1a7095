"""Options in the kernels, on the CPU: every instruction set, layout and way to share work, against the equations."""

from __future__ import annotations

import dataclasses
from typing import Any

import cases
import internals
import pytest
import torch
from cases import CASES, Case, check, check_quickly
from judge import relative_error
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import lstm_ext
from lstm_ext.layer import equations
from lstm_ext.native import loader

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

RESETS = {"resets": "to a state", "reset_share": 0.3}
KINDS: dict[str, dict[str, Any]] = {
    "resets": RESETS,
    "norm": {"norm": "own"},
    "recompute": {"recompute": True},
    "all": {"mask": True, "zoneout": "flags", "norm": "own", "returned": "both", **RESETS},
    "all but norm": {"mask": True, "zoneout": "flags", "returned": "both", **RESETS},
    "recompute, with all": {
        "mask": True, "zoneout": "flags of h", "returned": "cell states", "recompute": True, **RESETS,
    },
    "all of the cell": {
        "peephole": "own", "cell_clip": 0.4, "coupled_gates": True, "zoneout": "flags of c", "mask": True,
        "returned": "both", **RESETS,
    },
}  # fmt: skip
# Where a step is computed in another way, and what can go wrong there.
COMPOUND = ("all", "all but norm", "recompute, with all", "all of the cell")
SHAPES: dict[str, tuple[Case, tuple[str, ...]]] = {
    "one step": (Case(steps=1, batch=1, input_size=3, hidden_size=20), tuple(KINDS)),
    "packed panels": (Case(steps=40, batch=13, input_size=9, hidden_size=70, bidirectional=True), COMPOUND),
    "units shared": (Case(steps=60, input_size=9, hidden_size=200), COMPOUND),
    "rows read as they are": (
        Case(steps=30, batch=2, input_size=9, hidden_size=300, proj_size=50),
        ("norm", "recompute", "resets"),
    ),
    "chunks": (Case(steps=130, batch=4, input_size=3, hidden_size=33, bidirectional=True), COMPOUND),
}
ON_TWO_THREADS = ("packed panels", "units shared")
PAIRS = [
    pytest.param(shape, kind, marks=pytest.mark.alone if shape in ON_TWO_THREADS else ())
    for shape, (_, kinds) in SHAPES.items()
    for kind in kinds
]


def case_of(shape: str, kind: str) -> Case:
    # Of units that are normalised, some may lie so close together that any rounding becomes large. These do not.
    return dataclasses.replace(SHAPES[shape][0], weights_first=True, **KINDS[kind])


def in_registers(case: Case) -> Case:
    """With more units than a register has, which do not fill the last one, or a projection to several registers."""
    H, P = (24, 16) if case.proj_size else (19, 0)
    return dataclasses.replace(case, hidden_size=max(H, case.hidden_size), proj_size=P, weights_first=True)


def check_passes(case: Case, dtype: torch.dtype) -> None:
    """Values and gradients; and without gradients the same values, to the bit."""
    check_quickly(case, dtype)
    trained = cases.ours(case, dtype, 0)
    with torch.no_grad():
        values = internals.lstm_layer(*cases.layer(case, dtype, 0).arguments(dtype)[1])
    for name, value in zip(("output", "h_n", "c_n"), values, strict=False):
        assert torch.equal(value, trained[name]), name


@pytest.mark.parametrize("name", CASES)
def test_cases(name, capability):
    for dtype in DTYPES:
        check_passes(in_registers(CASES[name]), dtype)


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "kind"), PAIRS)
def test_shapes(shape, kind, capability):
    torch.set_num_threads(2 if shape in ON_TWO_THREADS else 1)
    for dtype in DTYPES:
        check_passes(case_of(shape, kind), dtype)


@pytest.mark.parametrize(
    "name", ["zoneout", "norm", "peephole", "all", "recompute, all", "peephole, clip, coupled, all"]
)
def test_worst_of_twenty(name, capability):
    check(in_registers(CASES[name]), torch.float32, draws=20)


def test_the_kernels_are_what_runs(monkeypatch):
    monkeypatch.setattr(equations, "lstm_layer", lambda *_: pytest.fail("the equations ran"))
    layer = lstm_ext.LSTM(3, 5, num_layers=2, bidirectional=True, dropout=0.2)
    x, resets = torch.randn(6, 2, 3), torch.rand(6, 2) < 0.4
    state = (torch.randn(4, 2, 5), torch.randn(4, 2, 5))
    packed = pack_padded_sequence(x, [6, 4])
    for context in (torch.enable_grad, torch.no_grad):
        with context():
            results = [
                layer(x, resets=resets, reset_state=state),
                layer(packed, resets=pack_padded_sequence(resets, [6, 4])),
                layer(x, return_cell_states=True, return_gates=True, lengths=[4, 6]),
            ]
        if context is torch.enable_grad:
            for output, *_ in results:
                output = output.data if isinstance(output, PackedSequence) else output
                output.sum().backward()
    extras = results[-1][2]
    assert extras.cell_states.shape == (4, 6, 2, 5) and extras.gates.shape == (4, 6, 2, 5, 4)


@pytest.mark.parametrize("shape", ["both directions", "packed"])
def test_where_nothing_is_reset_the_bits_are_those_of_the_plain_layer(shape):
    case = dataclasses.replace(in_registers(CASES[shape]), resets="to a state", reset_share=0.0)
    layer = cases.layer(case, torch.float32, 0)
    ours = layer.results(internals.lstm_layer, torch.float32)
    plain = layer.results(lambda *a: internals.lstm_layer(*a[:-1]), torch.float32)
    for name, value in ours.items():
        if "reset" in name:  # a state that replaces nothing
            assert not value.any()
        else:
            # The outer products of weight_hh's gradient are summed up in other pieces.
            assert torch.equal(value, plain[name]) or (
                "w_hh" in name and relative_error(value, plain[name]) < 1e-6
            )


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
    layer = cases.layer(CASES["resets"], torch.float32, 0)
    _, (*arguments, options) = layer.arguments(torch.float32)
    reset = {"resets": options.resets, "reset_h": options.reset_h, "reset_c": options.reset_c}
    for name, function in change.items():
        reset[name] = function(reset[name])
    with pytest.raises(RuntimeError, match=said):
        loader.extension().lstm_layer_forward(*arguments, loader.extension().LayerOptions(**reset), True)


# Functions of a cell as torch and ONNX define them. Their edges are all among EDGES.
FUNCTIONS = {
    ("sigmoid",): torch.sigmoid,
    ("tanh",): torch.tanh,
    ("affine", -0.5, 0.25): lambda z: -0.5 * z + 0.25,
    ("relu",): F.relu,
    ("leaky_relu", 0.5): lambda z: F.leaky_relu(z, 0.5),
    ("thresholded_relu", 0.5): lambda z: F.threshold(z, 0.5, 0.0),
    ("thresholded_relu", 0.0): F.relu,
    ("elu", 0.5): lambda z: F.elu(z, 0.5),
    ("scaled_tanh", 0.8, 1.5): lambda z: 0.8 * torch.tanh(1.5 * z),
    ("hard_sigmoid", 0.25, 0.5): lambda z: F.hardtanh(0.25 * z + 0.5, 0.0, 1.0),
    ("softsign",): F.softsign,
    ("softplus",): lambda z: F.softplus(z, threshold=40),
}
EDGES = [0.0, 0.5, 1.0, 2.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("function", FUNCTIONS, ids=str)
def test_functions_and_their_slopes_at_edges(function, dtype, capability):
    """On an edge, beside it and far from all, in every place of a cell, on the kernels and in the equations."""
    defined, eps = FUNCTIONS[function], torch.finfo(dtype).eps
    edges = torch.tensor(EDGES, dtype=dtype)
    beside = [edges.nextafter(torch.full_like(edges, limit)) for limit in (9.0, -9.0)]
    others = torch.tensor([1e-4, 0.1, 0.7, 3.0, 12.0, 30.0, 200.0, 1e5], dtype=dtype)
    some = torch.cat([edges, *beside, others])
    some = torch.cat([some, -some]).view(1, -1, 1)

    def compare(at, ours, expected):
        def of_finite(t):
            return torch.autograd.grad(t.sum(), at, retain_graph=True)[0][at.isfinite()]

        pairs = [(t, of_finite(t)) for t in (ours, expected)]
        torch.testing.assert_close(*pairs, rtol=8 * eps, atol=4 * eps, equal_nan=True)

    w, u = torch.zeros(2, 4, 1, dtype=dtype)
    opened = torch.tensor([0, 1, 0, 1], dtype=dtype)  # the gates with which h_1 is the function of c_0
    for lstm in (lstm_ext.functional.lstm, lstm_ext.reference.lstm):
        c0 = torch.cat(
            [some, torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=dtype).view(1, -1, 1)], 1
        )
        c0, zeros = c0.requires_grad_(), torch.zeros_like(c0)
        options = {"gate_activation": "identity", "cell_activation": ("identity", function)}
        output, _ = lstm(zeros, (zeros, c0), [w, u, opened, opened * 0], **options)
        compare(c0, output, defined(c0))
        for bound in (None, *EDGES[1:]):
            # What is closely below the bound may have its value, and then has its slope.
            away = (some.abs() >= (bound or 0)) | (some.abs() < 0.9 * (bound or 0))
            z = some[away].view(1, -1, 1).requires_grad_()
            options = {"gate_activation": function, "cell_activation": function, "preactivation_clip": bound}
            gates = lstm(z, None, [w + 1, u], False, return_gates=True, **options)[2].gates[0]
            for gate in gates.unbind(-1):
                compare(z, gate, defined(z if bound is None else F.hardtanh(z, -bound, bound)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_recomputing_clips_the_same_cells(dtype: torch.dtype) -> None:
    """Gates that are computed again are not the same to the last bit, so the saved c_t says what was clipped."""
    layer = lstm_ext.LSTM(32, 64, cell_clip=0.5, recompute=True, dtype=dtype)
    x, h0, c0 = torch.randn(6, 512, 32), torch.randn(1, 512, 64), torch.randn(1, 512, 64)
    gradients = []
    for recompute in (True, False):
        layer.recompute = recompute
        start = c0.to(dtype).requires_grad_()
        _, (_, c_n) = layer(x.to(dtype), (h0.to(dtype), start))
        gradients.append(torch.autograd.grad(c_n.float().sum(), start)[0].float())
    ours, expected = gradients
    # Measured: 0.008 of a gradient in bfloat16, 0.001 in float16. Another clip makes all of it.
    torch.testing.assert_close(ours, expected, rtol=0.02, atol=1e-3)
