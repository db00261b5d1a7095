"""Resets: what is before a cut never meets what is after, and the flags mean what the libraries mean by theirs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import lstm_ext

T, B, I, H = 9, 2, 3, 5
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def layer(**options) -> lstm_ext.LSTM:
    return lstm_ext.LSTM(I, H, dtype=torch.float64, **options)


def inputs() -> tuple[Tensor, tuple[Tensor, Tensor]]:
    hx = torch.randn(2, 1, B, H, dtype=torch.float64)
    return torch.randn(T, B, I, dtype=torch.float64, requires_grad=True), (hx[0], hx[1])


@pytest.mark.parametrize("bidirectional", [False, True])
def test_no_gradient_crosses(bidirectional):
    module = layer(num_layers=2, bidirectional=bidirectional)
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    sets = 4 if bidirectional else 2
    hx = tuple(torch.randn(sets, B, H, dtype=torch.float64).requires_grad_() for _ in range(2))
    reset_state = tuple(torch.randn(sets, B, H, dtype=torch.float64).requires_grad_() for _ in range(2))
    resets = torch.zeros(T, B)
    resets[4, 0] = 1
    output, _ = module(x, hx, resets=resets, reset_state=reset_state)

    after = torch.autograd.grad(output[4:, 0].square().sum(), [x, *hx, *reset_state], retain_graph=True)
    assert not after[0][:4, 0].any()
    assert not after[0][:, 1].any()
    for g in after[1:3]:  # of hx: the reverse direction ends there, the forward direction began before
        assert not g[::2, 0].any() if bidirectional else not g.any()
    for g in after[3:]:
        assert g[::2, 0].any()
        assert not g[:, 1].any()
    before = torch.autograd.grad(output[:4, 0].square().sum(), [x, *reset_state], allow_unused=True)
    assert not before[0][4:].any()
    if bidirectional:
        assert all(g[1::2, 0].any() for g in before[1:])


# What the libraries do step by step, and the argument that says the same. Their flags are of two senses.


def before_the_step(module, x, state, flags):
    """TorchRL is_init, sb3-contrib episode_starts, CleanRL done, Dreamer is_first: a new episode begins with step t."""
    outputs = []
    for t in range(T):
        state = tuple((1.0 - flags[t].double()).view(1, -1, 1) * s for s in state)
        y, state = module(x[t : t + 1], state)
        outputs.append(y)
    return torch.cat(outputs), state


def after_the_step(module, x, state, dones):
    """sample-factory and rsl_rl dones: the episode ended with step t."""
    outputs = []
    for t in range(T):
        y, state = module(x[t : t + 1], state)
        outputs.append(y)
        state = tuple((1.0 - dones[t].double()).view(1, -1, 1) * s for s in state)
    return torch.cat(outputs), state


def test_flags_of_beginnings():
    x, hx = inputs()
    module = layer()
    episode_starts = (torch.rand(T, B) < 0.4).float()
    torch.testing.assert_close(
        module(x, hx, resets=episode_starts), before_the_step(module, x, hx, episode_starts), **CLOSE
    )
    batch_first = layer(batch_first=True)
    batch_first.load_state_dict(module.state_dict())
    is_init = episode_starts.bool().T.unsqueeze(-1)  # TorchRL: (batch, time, 1)
    output, states = batch_first(x.transpose(0, 1), hx, resets=is_init)
    torch.testing.assert_close(
        (output.transpose(0, 1), states), before_the_step(module, x, hx, episode_starts), **CLOSE
    )


def test_flags_of_ends_are_shifted_by_one_step():
    x, hx = inputs()
    module = layer()
    dones = torch.rand(T, B) < 0.4
    dones[-1, 0] = True
    resets = torch.zeros_like(dones)
    resets[1:] = dones[:-1]
    output, states = module(x, hx, resets=resets)
    states = tuple(torch.where(dones[-1, :, None], 0.0, s) for s in states)
    torch.testing.assert_close((output, states), after_the_step(module, x, hx, dones), **CLOSE)
