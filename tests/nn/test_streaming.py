"""A sequence fed step by step gives the numbers of the whole sequence within rounding."""

from __future__ import annotations

import copy

import pytest
import torch
from judge import Worst, relative_error
from matrix.cases import CELLS
from matrix.routes import by_steps

import lstm_ext

DTYPES = [torch.float32, torch.float64]

OPTIONS = {
    "no bias": {"bias": False},
    "projection": {"proj_size": 3},
    "three layers": {"num_layers": 3},
    "all": {**CELLS["random, norm"], "num_layers": 2, "proj_size": 6},
}
OPTIONS |= {
    name: CELLS[name] for name in ("plain", "zoneout", "norm", "peephole, clip, coupled", "functions")
}


def make(options, input_size, hidden_size, dtype):
    layer = lstm_ext.LSTM(input_size, hidden_size, **options, dtype=dtype).eval()
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return layer


def states(layer, batch):
    L, P = layer.num_layers, layer.proj_size or layer.hidden_size
    dtype = layer.weight_ih_l0.dtype
    return torch.randn(L, batch, P, dtype=dtype), torch.randn(L, batch, layer.hidden_size, dtype=dtype)


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.devices("cpu")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_few_rows_within_rounding(name, dtype):
    """As exact as the sequence. With gradients or without the same bits, from states and from none."""
    before = torch.get_num_threads()
    torch.manual_seed(3)
    worst = Worst()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for steps, batch in [(32, 1), (16, 2), (10, 3), (2, 16), (5, 1), (1, 32)]:
                for input_size, hidden_size in [(3, 7), (40, 33), (1, 130), (160, 256)]:
                    layer = make(OPTIONS[name], input_size, hidden_size, dtype)
                    x = torch.randn(steps, batch, input_size, dtype=dtype)
                    hx = states(layer, batch) if batch != 2 else None
                    output, (h, c) = layer(x, hx)
                    with torch.no_grad():
                        without_gradients = layer(x, hx)[0]
                        stepped, (h_n, c_n) = by_steps(layer, x, hx)
                    assert output.requires_grad
                    assert torch.equal(without_gradients, output)
                    exact = copy.deepcopy(layer).double()
                    with torch.no_grad():
                        ref, (h_ref, c_ref) = exact(x.double(), hx and tuple(s.double() for s in hx))
                    worst.add(
                        {"output": stepped, "h_n": h_n, "c_n": c_n},
                        {"output": output.detach(), "h_n": h.detach(), "c_n": c.detach()},
                        {"output": ref, "h_n": h_ref, "c_n": c_ref},
                    )
    finally:
        torch.set_num_threads(before)
    # In float64 there is no better reference, and what is normalised makes more than 64 eps of a rounding.
    assert not worst.problems() or (dtype == torch.float64 and "layer_norm" in OPTIONS[name])


# H, directions, and the most rows of all steps whose weights are read as they lie.
FEW = [(40, 1, 8), (64, 1, 20), (100, 1, 32), (70, 2, 12), (130, 2, 20)]


@pytest.mark.devices("cpu")
@pytest.mark.parametrize(("hidden_size", "directions", "rows"), FEW)
@torch.no_grad()
def test_weights_are_packed_soon(hidden_size, directions, rows):
    """Packed weights give the bits that a longer call gives."""
    torch.manual_seed(3)
    layer = lstm_ext.LSTM(hidden_size, hidden_size, bidirectional=directions == 2)
    x = torch.randn(60, 1, hidden_size)
    expected = layer(x)[0][..., :hidden_size]
    for steps in (rows, rows + 1):
        output = layer(x[:steps])[0][..., :hidden_size]
        assert torch.equal(output, expected[:steps]) == (steps > rows)


@pytest.mark.devices("cpu")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cells_too(dtype):
    torch.manual_seed(3)
    layer = lstm_ext.LSTM(20, 70, dtype=dtype)
    cell = lstm_ext.LSTMCell(20, 70, dtype=dtype)
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in layer.state_dict().items()})
    x, hx = torch.randn(8, 4, 20, dtype=dtype), None
    output = layer(x)[0]
    for x_t, y in zip(x, output, strict=True):
        with torch.no_grad():
            inferred = cell(x_t, hx)
        hx = cell(x_t, hx)
        assert relative_error(hx[0], y) < 4 * torch.finfo(dtype).eps
        assert torch.equal(inferred[0], hx[0]) and torch.equal(inferred[1], hx[1])
