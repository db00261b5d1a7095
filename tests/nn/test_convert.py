"""Layers from the per-gate matrices of lectures and notebooks."""

import pytest
import torch
from judge import relative_error
from torch import nn

import lstm_ext

pytestmark = [
    pytest.mark.devices("cpu", "cuda"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]

BATCH, STEPS, FEATURES, HIDDEN = 30, 10, 20, 10


def notebook_parameters(dtype=torch.float64):
    """As a lecture's notebook makes them: one W, U and b for each gate."""
    generator = torch.Generator().manual_seed(4)
    shapes = {"W": (FEATURES, HIDDEN), "U": (HIDDEN, HIDDEN), "b": (1, HIDDEN)}
    return {
        f"{letter}_{gate}": torch.randn(
            shapes[letter], generator=generator, dtype=torch.float64, device="cpu"
        )
        .to(torch.get_default_device(), dtype)
        .mul(0.3)
        for gate in "ifgo"
        for letter in "WUb"
    }


def test_from_gates_on_the_notebook_case():
    p = {name: value.requires_grad_() for name, value in notebook_parameters().items()}
    x = torch.randn(BATCH, STEPS, FEATURES, dtype=torch.float64, requires_grad=True)
    h = torch.zeros(BATCH, HIDDEN, dtype=torch.float64)
    c = torch.zeros(BATCH, HIDDEN, dtype=torch.float64)
    outputs = []
    for t in range(STEPS):
        i = torch.sigmoid(x[:, t] @ p["W_i"] + h @ p["U_i"] + p["b_i"])
        f = torch.sigmoid(x[:, t] @ p["W_f"] + h @ p["U_f"] + p["b_f"])
        g = torch.tanh(x[:, t] @ p["W_g"] + h @ p["U_g"] + p["b_g"])
        o = torch.sigmoid(x[:, t] @ p["W_o"] + h @ p["U_o"] + p["b_o"])
        c = f * c + i * g
        h = o * torch.tanh(c)
        outputs.append(h)
    expected = torch.stack(outputs, dim=1)

    module = lstm_ext.from_gates(**p, batch_first=True)
    output, (h_n, c_n) = module(x)
    limit = 64 * torch.finfo(torch.float64).eps
    assert output.shape == (BATCH, STEPS, HIDDEN)
    assert relative_error(output, expected) <= limit
    assert relative_error(h_n[0], h) <= limit
    assert relative_error(c_n[0], c) <= limit

    grad = torch.randn_like(expected)
    by_hand = dict(zip(["x", *p], torch.autograd.grad(expected, [x, *p.values()], grad), strict=True))
    ours = [x, module.weight_ih_l0, module.weight_hh_l0, module.bias_ih_l0, module.bias_hh_l0]
    d_x, d_W, d_U, d_b, d_b_hh = torch.autograd.grad(output, ours, grad)
    assert relative_error(d_x, by_hand["x"]) <= limit
    for k, gate in enumerate("ifgo"):
        rows = slice(k * HIDDEN, (k + 1) * HIDDEN)
        assert relative_error(d_W[rows].T, by_hand[f"W_{gate}"]) <= limit
        assert relative_error(d_U[rows].T, by_hand[f"U_{gate}"]) <= limit
        assert relative_error(d_b[rows], by_hand[f"b_{gate}"][0]) <= limit
    assert relative_error(d_b_hh, d_b) <= limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_from_gates_parameters(dtype):
    p = notebook_parameters(dtype)
    module = lstm_ext.from_gates(**p)
    assert not module.batch_first
    assert type(module) is lstm_ext.LSTM
    for weight, shape in zip(module.parameters(), [(40, 20), (40, 10), (40,), (40,)], strict=True):
        assert type(weight) is nn.Parameter
        assert weight.shape == shape
        assert weight.dtype == dtype
        assert weight.requires_grad
        assert weight.is_contiguous()
    assert not module.bias_hh_l0.any()
    assert torch.equal(module.weight_ih_l0[10:20], p["W_f"].T)

    before = module.bias_ih_l0.detach().clone()
    p["b_i"].zero_()
    assert torch.equal(module.bias_ih_l0, before)

    flat = {
        name: value[0] if name.startswith("b") else value
        for name, value in notebook_parameters(dtype).items()
    }
    assert torch.equal(lstm_ext.from_gates(**flat).bias_ih_l0, module.bias_ih_l0)


@pytest.mark.devices("cpu")
@pytest.mark.parametrize(
    ("name", "wrong", "error", "text"),
    [
        ("W_i", torch.zeros(20), ValueError, r"W_i: expected shape \(features, hidden\), got \(20,\)"),
        ("W_i", torch.zeros(0, 10), ValueError, r"W_i: expected shape \(features, hidden\), got \(0, 10\)"),
        ("W_f", torch.zeros(10, 20), ValueError, r"W_f: expected shape \(20, 10\), got \(10, 20\)"),
        ("U_g", torch.zeros(20, 10), ValueError, r"U_g: expected shape \(10, 10\), got \(20, 10\)"),
        ("b_o", torch.zeros(10, 1), ValueError, r"b_o: expected shape \(10,\) or \(1, 10\), got \(10, 1\)"),
        (
            "b_o",
            torch.zeros(10, dtype=torch.float64),
            ValueError,
            r"b_o: expected dtype torch.float32 as W_i",
        ),
        ("U_o", torch.zeros(10, 10, device="meta"), ValueError, r"U_o: expected device cpu as W_i, got meta"),
        ("b_i", [0.0] * 10, TypeError, r"b_i: expected a Tensor, got list"),
        ("W_i", torch.zeros(20, 10, dtype=torch.int64), TypeError, r"W_i: expected a floating-point dtype"),
    ],
)
def test_from_gates_errors(name, wrong, error, text):
    with pytest.raises(error, match=text):
        lstm_ext.from_gates(**(notebook_parameters(torch.float32) | {name: wrong}))


def test_from_gates_takes_keywords_only():
    with pytest.raises(TypeError, match="positional"):
        lstm_ext.from_gates(*notebook_parameters().values())
    p = notebook_parameters()
    del p["U_f"]
    with pytest.raises(TypeError, match="U_f"):
        lstm_ext.from_gates(**p)
