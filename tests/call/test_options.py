"""What a call returns beside the output, and its masks; tests/matrix has the numbers."""

from __future__ import annotations

import pytest
import torch

import lstm_ext
from lstm_ext.call import masks

T, B, I, H = 4, 4, 3, 5


@pytest.mark.parametrize("returned", ["return_cell_states", "return_gates"])
def test_one_of_the_two_results(returned):
    module = lstm_ext.LSTM(I, H, 2)
    x = torch.randn(T, B, I)
    output, states_, extras = module(x, **{returned: True})
    assert isinstance(extras, lstm_ext.LSTMExtras)
    plain, plain_states = module(x)
    torch.testing.assert_close((output, states_), (plain, plain_states))
    if returned == "return_cell_states":
        assert extras.gates is None
        assert extras.cell_states.shape == (2, T, B, H)
        torch.testing.assert_close(extras.cell_states[:, -1], plain_states[1])
    else:
        assert extras.cell_states is None
        assert extras.gates.shape == (2, T, B, H, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits_are_rounded_once(dtype):
    x, resets = torch.randn(T, B, I, dtype=dtype), torch.rand(T, B) < 0.3
    layer = lstm_ext.LSTM(I, H, layer_norm=True, zoneout=(0.2, 0.3), dtype=dtype).eval()
    layer(x, resets=resets)[0].sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    ours = layer(x, resets=resets, return_gates=True, return_cell_states=True)
    exact = layer.double()(x.double(), resets=resets, return_gates=True, return_cell_states=True)
    assert {t.dtype for t in (ours[0], *ours[1], *ours[2])} == {dtype}
    for a, b in zip((ours[0], *ours[1], *ours[2]), (exact[0], *exact[1], *exact[2]), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_masks_of_16_bit_layers_are_not_rounded(dtype):
    drawn = []
    for own in (dtype, torch.float32):
        torch.manual_seed(1)
        drawn.append(masks.recurrent_mask(torch.ones(3, 2, 4, dtype=own), None, None, 1, 50, 0.3))
    assert torch.equal(*drawn)
