"""What is compared with what, as callables by name: bench_contract.py and bench.py time the same calls.

In each dictionary "torch" is torch's layer and "ours" is that of lstm_ext, with the same weights and the same data.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import harness
import torch
from harness import call_of, input_of, make_layers
from shapes import Shape
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import lstm_ext

Sides = dict[str, Callable[[], object]]
FROZEN = {"frozen": None, "frozen-bfloat16": torch.bfloat16, "frozen-int8": torch.int8}


def lengths_of(shape: Shape) -> torch.Tensor:
    """Spread evenly from a tenth of the steps to all of them, in no order."""
    lengths = torch.linspace(shape.steps / 10, shape.steps, shape.batch).round().long().clamp_min(1)
    return lengths[torch.randperm(shape.batch, generator=torch.Generator().manual_seed(3))]


def packed(shape: Shape, training: bool) -> tuple[Sides, float]:
    """A PackedSequence, and "padded", the same data without lengths; and the share of its rows that the former has."""
    theirs, ours = make_layers(shape)
    x, lengths = input_of(shape), lengths_of(shape)
    ragged = pack_padded_sequence(x, lengths, enforce_sorted=False)
    sides = {
        "torch": call_of(theirs, ragged, training),
        "ours": call_of(ours, ragged, training),
        "padded": call_of(ours, x, training),
    }
    return sides, lengths.sum().item() / (shape.steps * shape.batch)


def without_kernels(shape: Shape, training: bool) -> Iterator[tuple[str, Sides]]:
    """For a process with LSTM_EXT_BACKEND=torch: each way to call the layer, with torch's and with ours."""
    x, ragged = (
        input_of(shape),
        pack_padded_sequence(input_of(shape), lengths_of(shape), enforce_sorted=False),
    )

    def both(layers: tuple[nn.Module, nn.Module], data: torch.Tensor | PackedSequence) -> Sides:
        calls = [call_of(layer, data, training) for layer in layers]
        return dict(zip(("torch", "ours"), calls, strict=True))

    yield "eager", both(make_layers(shape), x)
    yield "packed", both(make_layers(shape), ragged)
    deep = make_layers(shape._replace(layers=3))
    for layer in deep:
        layer.dropout = 0.3
    yield "deep", both(deep, x)
    for name, whole in (("compiled", False), ("whole", True)):
        torch._dynamo.reset()  # it remembers what it did with the code of a layer
        theirs, ours = make_layers(shape)
        theirs.compile()
        ours.compile(fullgraph=whole)
        yield name, both((theirs, ours), x)


def low_precision(shape: Shape, training: bool, dtype: torch.dtype) -> Sides:
    """Both layers in a dtype, and "float32", our own layer in float32."""
    theirs, ours = make_layers(shape)
    plain, x = copy.deepcopy(ours), input_of(shape)
    return {
        "torch": call_of(theirs.to(dtype), x.to(dtype), training),
        "ours": call_of(ours.to(dtype), x.to(dtype), training),
        "float32": call_of(plain, x, training),
    }


def cell(shape: Shape, training: bool, dtype: torch.dtype = torch.float32) -> Sides:
    """Forward, and with training backward, with the gradients of the weights."""
    torch.manual_seed(0)
    theirs = nn.LSTMCell(shape.input_size, shape.hidden_size, dtype=dtype)
    ours = lstm_ext.convert(copy.deepcopy(theirs))
    x = torch.randn(shape.batch, shape.input_size).to(dtype)
    state, grads = (
        tuple(torch.randn(shape.batch, shape.hidden_size).to(dtype) for _ in range(2)) for _ in range(2)
    )

    def call(module: nn.Module) -> Callable[[], object]:
        def infer() -> object:
            with torch.inference_mode():
                return module(x, state)

        def train() -> object:
            module.zero_grad(set_to_none=True)
            torch.autograd.backward(module(x, state), grads)
            return module.weight_hh.grad

        return train if training else infer

    return {"torch": call(theirs), "ours": call(ours)}


def frozen(shape: Shape) -> Sides:
    """A call without gradients, of layers as they are and frozen."""
    theirs, ours = make_layers(shape)
    layers = {"torch": theirs, "ours": ours}
    layers |= {name: lstm_ext.freeze(ours, weights) for name, weights in FROZEN.items()}
    return {name: call_of(layer, input_of(shape), False) for name, layer in layers.items()}


def step(shape: Shape) -> Sides:
    """One step with carried state: a call, `step()`, and `step()` of frozen layers."""
    theirs, ours = make_layers(shape)
    sides = {
        "torch": harness.step_call(theirs, shape, "call"),
        "ours": harness.step_call(ours, shape, "call"),
    }
    # A layer for each side: one that two of them use would find its weights in the caches more often than the others.
    layers = {
        "step": copy.deepcopy(ours),
        **{name: lstm_ext.freeze(ours, weights) for name, weights in FROZEN.items()},
    }
    return sides | {name: harness.step_call(layer, shape, "step") for name, layer in layers.items()}


def rollout(shape: Shape, training: bool) -> Sides:
    """Without gradients, what a policy does while it acts; with them, what it learns from the same observations.

    A loop over the steps, in which a state begins anew where an episode does; and "resets", one call of lstm_ext.
    """
    theirs, ours = make_layers(shape)
    generator = torch.Generator().manual_seed(1)
    observations = torch.randn(shape.steps, shape.batch, shape.input_size, generator=generator)
    starts = torch.rand(shape.steps, shape.batch, generator=generator) < 1 / 50
    going_on = (~starts).float().unsqueeze(-1)
    grad = torch.randn(shape.steps, shape.batch, shape.hidden_size, generator=generator)

    def loop(layer: nn.Module) -> torch.Tensor:
        h = c = torch.zeros(1, shape.batch, shape.hidden_size)
        outputs = []
        for t in range(shape.steps):
            output, (h, c) = layer(observations[t : t + 1], (going_on[t] * h, going_on[t] * c))
            outputs.append(output)
        return torch.cat(outputs)

    def one_call(layer: nn.Module) -> torch.Tensor:
        return layer(observations, resets=starts)[0]

    def timed(layer: nn.Module, run: Callable[[nn.Module], torch.Tensor]) -> Callable[[], object]:
        def act() -> object:
            with torch.no_grad():
                return run(layer)

        def learn() -> object:
            layer.zero_grad(set_to_none=True)
            run(layer).backward(grad)
            return layer.weight_hh_l0.grad

        return learn if training else act

    return {"torch": timed(theirs, loop), "ours": timed(ours, loop), "resets": timed(ours, one_call)}
