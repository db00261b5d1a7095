"""TorchRL: an LSTMModule that runs rows with episodes inside in one call, with `is_init` as `resets`.

torchrl's own LSTMModule takes an lstm_ext.LSTM as it is: LSTMModule(lstm=lstm_ext.LSTM(I, H, batch_first=True), ...).
In recurrent mode its backend "pad" cuts each row where an episode begins, pads the segments and runs them as one larger
batch. A layer that has `resets` needs none of that, and the class below leaves it out. As a program, this file
compares the two. It needs torchrl.
"""

from __future__ import annotations

import copy
import statistics
import time

import torch
import torchrl.modules
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import dispatch
from torch.nn import functional as F

import lstm_ext


class ResetLSTMModule(torchrl.modules.LSTMModule):
    """torchrl's LSTMModule around an ``lstm_ext.LSTM``, with its arguments, keys, primer and single steps.

    In recurrent mode, for a tensordict of shape (*batch, T), with L layers, D = 2 if bidirectional else 1:

        in_keys   value (*batch, T, I); states (*batch, T, L * D, P) and (*batch, T, L * D, H), of which only those of
                  the first step are used; no states mean zeros; is_init (*batch, T, 1), bool
        out_keys  value (*batch, T, D * P); states in the shapes above, those after the last step at the last step

    It differs from torchrl's module in two ways. An episode always begins from zeros, which torchrl's primer stores
    there; torchrl reads whatever is stored. And the states in the result are 0 at every step except the last; torchrl
    also has those at the end of an episode inside a row, from which nothing goes on. For a bidirectional layer only the
    value equals torchrl's: here the states of its reverse direction are those of whole rows.
    """

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        if not self.recurrent_mode:
            return super().forward(tensordict)  # one step: it replaces the states where is_init
        rows = tensordict.select(*self.in_keys, strict=False).reshape(-1, tensordict.shape[-1])
        x, *states = [rows.get(key, None) for key in self.in_keys[:3]]
        hx = None if all(s is None for s in states) else [s[:, 0].transpose(0, 1) for s in states]
        y, states = self.lstm(x, hx, resets=rows["is_init"])
        # A tensordict has states at every step: (L * D, B, H) to (B, T, L * D, H), 0 but at the last step.
        states = [F.pad(s.transpose(0, 1).unsqueeze(1), (0, 0, 0, 0, x.size(1) - 1, 0)) for s in states]
        for key, value in zip(self.out_keys, (y, *states), strict=True):
            tensordict.set(key, value.reshape(*tensordict.shape, *value.shape[2:]))
        return tensordict


def make_data(batch: int, steps: int, input_size: int, hidden_size: int, resets: float = 0.025) -> TensorDict:
    """A rollout of random numbers, (batch, steps): as collected, with zeros where an episode begins."""
    is_init = torch.rand(batch, steps, 1) < resets
    states = torch.where(is_init[..., None], 0.0, torch.randn(2, batch, steps, 1, hidden_size))
    content = {"x": torch.randn(batch, steps, input_size), "h": states[0], "c": states[1], "is_init": is_init}
    return TensorDict(content, [batch, steps])


KEYS = {"in_keys": ["x", "h", "c"], "out_keys": ["y", ("next", "h"), ("next", "c")]}


def main() -> None:
    torch.manual_seed(0)
    batch, steps, input_size, hidden_size = 64, 128, 64, 128
    data = make_data(batch, steps, input_size, hidden_size)
    theirs = torch.nn.LSTM(input_size, hidden_size, batch_first=True)
    ours = lstm_ext.convert(copy.copy(theirs))  # the same parameters
    sides = {
        "torchrl's LSTMModule, torch.nn.LSTM": torchrl.modules.LSTMModule(lstm=theirs, **KEYS),
        "torchrl's LSTMModule, lstm_ext.LSTM": torchrl.modules.LSTMModule(lstm=ours, **KEYS),
        "ResetLSTMModule, lstm_ext.LSTM": ResetLSTMModule(lstm=ours, **KEYS),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    outputs = {}
    for _ in range(5):
        for name, module in sides.items():  # in turns: what disturbs one disturbs the others
            start = time.perf_counter()
            with torchrl.modules.set_recurrent_mode(True):
                outputs[name] = module(data.copy())["y"]
            outputs[name].square().mean().backward()
            seconds[name].append(time.perf_counter() - start)
    first, *_ = outputs.values()
    print(f"{batch} rows of {steps} steps, {data['is_init'].sum()} episodes begin; forward and backward:")
    for name in sides:
        difference = (outputs[name] - first).abs().max().item()
        print(f"  {name:<36} {1e3 * statistics.median(seconds[name]):7.1f} ms   difference {difference:.0e}")


if __name__ == "__main__":
    main()
