"""What the groups of the suite compare with what, as callables by name.

In each dictionary "torch" is torch's layer and "ours" is that of lstm_ext, with the same weights and the same data.
"""

from __future__ import annotations

import copy
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import harness
import torch
from harness import call_of, input_of, make_layers
from shapes import Shape
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import lstm_ext
from lstm_ext.native import loader

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


WAYS = ("eager", "packed", "deep", "compiled", "whole")  # to call a layer that has no kernels


def without_kernels(shape: Shape, training: bool, way: str) -> Sides:
    """For a process with LSTM_EXT_BACKEND=torch. "whole" is one graph, which torch's own layer does not have."""
    theirs, ours = make_layers(shape._replace(layers=3) if way == "deep" else shape)
    x: torch.Tensor | PackedSequence = input_of(shape)
    if way == "packed":
        x = pack_padded_sequence(x, lengths_of(shape), enforce_sorted=False)
    elif way == "deep":
        theirs.dropout = ours.dropout = 0.3
    elif way in ("compiled", "whole"):
        torch._dynamo.reset()  # it remembers what it did with the code of a layer
        theirs.compile()
        ours.compile(fullgraph=way == "whole")
    return {"torch": call_of(theirs, x, training), "ours": call_of(ours, x, training)}


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
    lstm = shape.gates == 4
    theirs = (nn.LSTMCell if lstm else nn.GRUCell)(shape.input_size, shape.hidden_size, dtype=dtype)
    ours = lstm_ext.convert(copy.deepcopy(theirs))
    x = torch.randn(shape.batch, shape.input_size).to(dtype)
    states, grads = (
        tuple(torch.randn(shape.batch, shape.hidden_size).to(dtype) for _ in range(2 if lstm else 1))
        for _ in range(2)
    )
    state = states if lstm else states[0]

    def call(module: nn.Module) -> Callable[[], object]:
        def infer() -> object:
            with torch.inference_mode():
                return module(x, state)

        def train() -> object:
            module.zero_grad(set_to_none=True)
            results = module(x, state)
            torch.autograd.backward(results if lstm else [results], grads)
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


# ---- what torch's layer does not have


OPTIONS: dict[str, dict] = {
    "recurrent_dropout=0.25": {"recurrent_dropout": 0.25},
    "zoneout=0.1": {"zoneout": 0.1},
    "zoneout=(0.1, 0.1)": {"zoneout": (0.1, 0.1)},
    "layer_norm": {"layer_norm": True},
    "recompute": {"recompute": True},
    "layer_norm, recompute": {"layer_norm": True, "recompute": True},
}
ARGUMENTS: dict[str, Callable[[Shape], dict]] = {
    "resets": lambda shape: {"resets": torch.rand(shape.steps, shape.batch) < 0.03},
    "return_cell_states": lambda shape: {"return_cell_states": True},
}


class Called(nn.Module):
    """A layer that is always called with the same keyword arguments."""

    def __init__(self, layer: nn.Module, **arguments: object) -> None:
        super().__init__()
        self.layer = layer
        self.hidden_size = layer.hidden_size
        self.arguments = arguments

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.layer(x, **self.arguments)


def layer_of(shape: Shape, **options: object) -> nn.Module:
    torch.manual_seed(0)
    return lstm_ext.LSTM(shape.input_size, shape.hidden_size, **options)


def with_options(shape: Shape, training: bool) -> Sides:
    """Both layers, and ours with each option or argument; the time includes drawing random masks."""
    theirs, ours = make_layers(shape)
    layers = {"torch": theirs, "ours": ours}
    for name, options in OPTIONS.items():
        if training or "recompute" not in name:  # without gradients there is nothing to compute again
            layers[name] = layer_of(shape, **options)
    for name, arguments in ARGUMENTS.items():
        layers[name] = Called(layer_of(shape), **arguments(shape))
    return {name: call_of(layer.train(), input_of(shape), training) for name, layer in layers.items()}


def saved_bytes(layer: nn.Module, shape: Shape) -> int:
    """Of storages that a graph keeps, each once, without those of input, output and weights."""
    x = torch.randn(shape.steps, shape.batch, shape.input_size, requires_grad=True)
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        output = layer(x)[0]
    for known in (x, output, *layer.parameters()):
        kept.pop(known.untyped_storage().data_ptr(), None)
    return sum(kept.values())


def overhead(shape: Shape) -> Sides:
    """One step by the function of the kernel alone, and by what calls it. To be called in torch.inference_mode()."""
    torch.manual_seed(0)
    theirs = nn.LSTMCell(shape.input_size, shape.hidden_size)
    cell, layer = lstm_ext.convert(copy.deepcopy(theirs)), layer_of(shape)
    x = torch.randn(shape.batch, shape.input_size)
    h, c = (torch.randn(shape.batch, shape.hidden_size) for _ in range(2))
    hx = (h[None], c[None])
    arguments = (x[None], *hx, list(cell.parameters()), None, True, False, None, False)
    kernel = loader.extension().lstm_layer_forward
    return {
        "LSTMCell": lambda: cell(x, (h, c)),
        "LSTM.step": lambda: layer.step(x, hx),
        "torch.nn.LSTMCell": lambda: theirs(x, (h, c)),
        "kernel": lambda: kernel(*arguments),
    }


def vmap(shape: Shape, training: bool) -> Sides:
    """torch.vmap over 8 inputs, and one call on a batch 8 times as large."""
    _, ours = make_layers(shape)
    generator = torch.Generator().manual_seed(1)
    xs = torch.randn(8, shape.steps, shape.batch, shape.input_size, generator=generator)
    large = xs.transpose(0, 1).reshape(shape.steps, 8 * shape.batch, shape.input_size)

    class Mapped(nn.Module):
        hidden_size = shape.hidden_size

        def __init__(self) -> None:
            super().__init__()
            self.layer = ours

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            return (torch.vmap(lambda one: self.layer(one)[0])(x),)

    return {"one call": call_of(ours, large, training), "vmap": call_of(Mapped(), xs, training)}


def callers(shape: Shape, training: bool) -> Sides:
    """One and two Python threads that call one layer at once, a tenth of a second each, with one intra-op thread.

    The weights are read by both; gradients are each one's own.
    """
    torch.set_num_threads(1)
    _, ours = make_layers(shape)
    x, grad = input_of(shape), torch.randn(shape.steps, shape.batch, shape.hidden_size)

    def call() -> None:
        if training:
            torch.autograd.grad(ours(x)[0], list(ours.parameters()), grad)
        else:
            with torch.inference_mode():
                ours(x)

    def run(threads: int, repeats: int) -> None:
        workers = [threading.Thread(target=lambda: [call() for _ in range(repeats)]) for _ in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    run(2, 1)
    begin = time.perf_counter()
    run(1, 1)
    repeats = max(1, round(0.1 / (time.perf_counter() - begin)))
    return {"one caller": lambda: run(1, repeats), "two callers": lambda: run(2, repeats)}


def torchrl(shape: Shape, training: bool, resets: float) -> tuple[Sides, int]:
    """TorchRL's LSTMModule on rows in which this share of the steps begins an episode; and how many begin.

    "torch" and "pad" are LSTMModule with torch.nn.LSTM and with lstm_ext.LSTM, which cut the rows at each reset; "ours"
    is the module of examples/torchrl_lstm.py. A call is in recurrent mode, with training of its backward pass too.
    """
    from torchrl.modules import LSTMModule, set_recurrent_mode

    sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
    from torchrl_lstm import KEYS, ResetLSTMModule, make_data

    torch.manual_seed(1)
    given = make_data(shape.batch, shape.steps, shape.input_size, shape.hidden_size, resets)
    theirs, ours = make_layers(shape)
    theirs.batch_first = ours.batch_first = True
    grad = torch.randn(*given.shape, shape.hidden_size, generator=torch.Generator().manual_seed(2))

    def call_of(module: LSTMModule) -> Callable[[], torch.Tensor]:
        x = given["x"].clone().requires_grad_(training)
        data = given.copy().set("x", x)

        def infer() -> torch.Tensor:
            with torch.inference_mode(), set_recurrent_mode(True):
                return module(data.copy())["y"]

        def train() -> torch.Tensor:
            x.grad = None
            module.zero_grad(set_to_none=True)
            with set_recurrent_mode(True):
                module(data.copy())["y"].backward(grad)
            return x.grad

        return train if training else infer

    modules = {
        "torch": LSTMModule(lstm=theirs, **KEYS),
        "ours": ResetLSTMModule(lstm=ours, **KEYS),
        "pad": LSTMModule(lstm=ours, **KEYS),
    }
    return {name: call_of(module) for name, module in modules.items()}, given["is_init"].sum().item()
