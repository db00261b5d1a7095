"""Calls small layers for long, in six ways: `make soak`. Do results, memory and threads stay what they were?

    python tests/tools/soak.py                              # six modes, 50,000 calls each
    python tests/tools/soak.py frozen --calls 1000 --seed 2 # one mode, fewer calls, other sizes

Sizes and options are drawn by the seed. Every tenth result must have the bits of the first call of its case. After a
fifth of the calls of a mode, the process must not grow by more than 16 MiB, nor have more than 8 more threads: those
that OpenMP made for the last callers may not have ended yet. One line a mode; the exit code is 1 if one fails.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import lstm_ext

CASES = 40  # in each mode
ROUND = 200  # calls, after which the mode of several callers has new threads
CALLERS = 4
MOST_GROWTH = 16 << 20  # bytes
MOST_THREADS = 2 * CALLERS  # that are ending

Call = Callable[[], list[Tensor]]


@dataclass
class Case:
    call: Call
    expected: list[Tensor]


def tensors(result: Any) -> list[Tensor]:
    """The output, h and c."""
    output, (h_n, c_n) = result
    return [getattr(output, "data", output), h_n, c_n]


def layer_and_input(rng: random.Random, **options: Any) -> tuple[lstm_ext.LSTM, Tensor]:
    # One in ten is large enough for two workers, and for scratch memory that is kept.
    steps, batch, inputs, hidden = (
        rng.randint(1, most) for most in ((24, 12, 64, 160) if rng.random() < 0.1 else (12, 6, 24, 48))
    )
    drawn = {
        "num_layers": rng.choice([1, 1, 2]),
        "bidirectional": rng.random() < 0.3,
        "proj_size": rng.choice([0, 0, 0, hidden // 2]),
        "bias": rng.random() < 0.8,
        "dtype": rng.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16]),
    }
    layer = lstm_ext.LSTM(inputs, hidden, **{**drawn, **options})
    return layer, torch.randn(steps, batch, inputs, dtype=layer.weight_ih_l0.dtype)


def gradients(layer: lstm_ext.LSTM, x: Tensor, forward: Callable[[Tensor], Any]) -> list[Tensor]:
    results = tensors(forward(x))
    loss = sum(result.square().sum() for result in results)
    return [*(r.detach() for r in results), *torch.autograd.grad(loss, [x, *layer.parameters()])]


def inference(rng: random.Random) -> Call:
    layer, x = layer_and_input(rng)
    layer.eval().requires_grad_(False)
    return lambda: tensors(layer(x))


def training(rng: random.Random) -> Call:
    options: list[dict[str, Any]] = [
        {},
        {},
        {"zoneout": 0.2},
        {"recurrent_dropout": 0.3},
        {"layer_norm": True},
    ]
    layer, x = layer_and_input(rng, **rng.choice(options))
    x.requires_grad_()

    def call() -> list[Tensor]:
        torch.manual_seed(3)
        return gradients(layer, x, layer)

    return call


def streaming(rng: random.Random) -> Call:
    layer, x = layer_and_input(rng, bidirectional=False)
    layer.eval().requires_grad_(False)

    def call() -> list[Tensor]:
        state, outputs = None, []
        for step in x.split(1):
            output, state = layer(step, state)
            outputs.append(output)
        return [*outputs, *state]

    return call


def ragged(rng: random.Random) -> Call:
    layer, x = layer_and_input(rng)
    x.requires_grad_()
    lengths = torch.tensor([rng.randint(1, x.shape[0]) for _ in range(x.shape[1])])
    if rng.random() < 0.5:
        return lambda: gradients(layer, x, lambda x: layer(x, lengths=lengths))
    return lambda: gradients(
        layer, x, lambda x: layer(pack_padded_sequence(x, lengths, enforce_sorted=False))
    )


def frozen(rng: random.Random) -> Call:
    layer, x = layer_and_input(rng, dtype=torch.float32)
    ready = lstm_ext.freeze(layer.eval(), rng.choice([None, torch.bfloat16, torch.int8]))

    def call() -> list[Tensor]:
        with torch.no_grad():
            return tensors(ready(x))

    return call


def callers(rng: random.Random) -> Call:
    """Nothing whose bits depend on the number of threads or on the order of the calls."""
    return rng.choice([inference, streaming, ragged, frozen])(rng)


MODES: dict[str, Callable[[random.Random], Call]] = {
    "inference": inference,
    "training": training,
    "streaming": streaming,
    "ragged": ragged,
    "frozen": frozen,
    "callers": callers,  # several at once, whose threads come and go
}


def memory() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def some_calls(cases: Sequence[Case], count: int, seed: int) -> int:
    """How many of them gave other bits."""
    rng = random.Random(seed)
    wrong = 0
    for i in range(count):
        case = rng.choice(cases)
        found = case.call()
        if i % 10 == 0:
            wrong += not all(torch.equal(a, b) for a, b in zip(found, case.expected, strict=True))
    return wrong


def soak(mode: str, calls: int, seed: int) -> bool:
    """Whether all is well."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    cases = []
    for _ in range(CASES):
        call = MODES[mode](rng)
        cases.append(Case(call, call()))
    rounds = max(5, calls // ROUND)
    share = ROUND // CALLERS

    def as_caller(seed: int) -> int:
        torch.set_num_threads(1 + seed % 3)  # of this caller
        return some_calls(cases, share, seed)

    start, wrong, before, threads_before = time.monotonic(), 0, 0, 0
    for i in range(rounds):
        if i == rounds // 5:
            before, threads_before = memory(), threads()
        if mode == "callers":
            with ThreadPoolExecutor(CALLERS) as pool:
                wrong += sum(pool.map(as_caller, range(i * CALLERS, (i + 1) * CALLERS)))
        else:
            wrong += some_calls(cases, ROUND, i)
    seconds, after, threads_after = time.monotonic() - start, memory(), threads()
    well = wrong == 0 and after - before <= MOST_GROWTH and threads_after <= threads_before + MOST_THREADS
    print(
        f"{mode}: {'well' if well else 'FAILED'}: {rounds * ROUND:,} calls, {seconds:.0f} s, "
        f"{wrong} of {rounds * ROUND // 10:,} results differ, "
        f"{after / 2**20:.0f} MiB ({(after - before) / 2**20:+.1f}), {threads_after} threads ({threads_before} before)",
        flush=True,
    )
    return well


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("modes", nargs="*", metavar="MODE", help=", ".join(MODES))
    parser.add_argument("--calls", type=int, default=50_000, help="of each mode (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    if unknown := set(options.modes) - set(MODES):
        parser.error(f"no such mode: {' '.join(sorted(unknown))}")
    return 0 if all([soak(mode, options.calls, options.seed) for mode in options.modes or MODES]) else 1


if __name__ == "__main__":
    sys.exit(main())
