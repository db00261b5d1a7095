"""Calls small layers for long, in six ways: `make soak`. Do results, memory and threads stay what they were?

    python tests/tools/soak.py                              # six modes, 50,000 calls each
    python tests/tools/soak.py frozen --calls 1000 --seed 2 # one mode, fewer calls, other sizes

Cases of tests/matrix are drawn by the seed. Every tenth result must have the bits of the first call of its case. After
a fifth of the calls of a mode, the process must not grow by more than 16 MiB, nor have more than 8 more threads: those
that OpenMP made for the last callers may not have ended yet. One line a mode; the exit code is 1 if one fails.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import random
import resource
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import lstm_ext

sys.path.append(str(Path(__file__).resolve().parents[1]))

from matrix.cases import CASES, Case, arguments_of, make_module, tensors_of
from matrix.judge import named
from matrix.routes import ROUTES, called_with, draws, is_plain

CALLS = 40  # different ones of each mode
ROUND = 200  # calls, after which the mode of several callers has new threads
CALLERS = 4
MOST_GROWTH = 16 << 20  # bytes
MOST_THREADS = 2 * CALLERS  # that are ending


class Mode(NamedTuple):
    takes: Callable[[Case], bool]
    route: str = "eager"
    trains: bool = False
    freezes: bool = False


MODES = {
    "inference": Mode(lambda case: True),
    "training": Mode(lambda case: True, trains=True),
    "streaming": Mode(lambda case: True, "steps"),
    "ragged": Mode(lambda case: case.packed or "lengths" in called_with(case), trains=True),
    "frozen": Mode(lambda case: is_plain(case) and case.cell == "LSTM", freezes=True),
    # Several at once, whose threads come and go: nothing whose bits depend on the order of the calls.
    "callers": Mode(lambda case: not draws(case)),
}
CASES_OF = {
    name: [
        case
        for case in (dataclasses.replace(case, mode="no_grad") for case in CASES.values())
        if mode.takes(case) and ROUTES[mode.route].cases({"": case}, case.mode)
        if not (case.options and case.options.unread)
    ]
    for name, mode in MODES.items()
}


class Drawn(NamedTuple):
    call: Callable[[], list[Tensor]]
    expected: list[Tensor]


def drawn(rng: random.Random, name: str) -> Drawn:
    mode, case = MODES[name], rng.choice(CASES_OF[name])
    case = dataclasses.replace(case, dtype=rng.choice(["float32", "float32", "float64", "bfloat16"]))
    if mode.freezes:
        case = dataclasses.replace(case, dtype="float32", training=False)
    # One in ten is large enough for two workers, and for scratch memory that is kept.
    if rng.random() < 0.1:
        case = dataclasses.replace(case, input_size=64, hidden_size=160)
        if case.layout == "batched" and "lengths" not in called_with(case):
            case = dataclasses.replace(case, lengths=(24,) * 12)
    tensors = tensors_of(case)
    module = make_module(lstm_ext.LSTM, case, case.torch_dtype, tensors.weights)
    if mode.freezes:
        module = lstm_ext.freeze(module, rng.choice([None, torch.bfloat16, torch.int8]))
    way = ROUTES[mode.route].call

    def call() -> list[Tensor]:
        if draws(case):
            torch.manual_seed(3)
        with torch.set_grad_enabled(mode.trains):
            # Each time anew: the packing belongs to the graph.
            leaves, input, hx, more = arguments_of(case, tensors, case.torch_dtype)
            values = list(named(way(module, input, hx, **more)).values())
            if not mode.trains:
                return values
            loss = sum(value.square().sum() for value in values)
            wanted = [*leaves.values(), *module.parameters()]
            gradients = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
        return [*(value.detach() for value in values), *gradients]

    return Drawn(call, call())


def memory() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def some_calls(calls: Sequence[Drawn], count: int, seed: int) -> int:
    """How many of them gave other bits."""
    rng = random.Random(seed)
    wrong = 0
    for i in range(count):
        call, expected = rng.choice(calls)
        found = call()
        if i % 10 == 0:
            wrong += not all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    return wrong


def soak(mode: str, count: int, seed: int) -> bool:
    """Whether all is well."""
    rng = random.Random(seed)
    calls = [drawn(rng, mode) for _ in range(CALLS)]
    rounds = max(5, count // ROUND)
    share = ROUND // CALLERS

    def as_caller(seed: int) -> int:
        torch.set_num_threads(1 + seed % 3)  # of this caller
        return some_calls(calls, share, seed)

    start, wrong, before, threads_before = time.monotonic(), 0, 0, 0
    for i in range(rounds):
        if i == rounds // 5:
            before, threads_before = memory(), threads()
        if mode == "callers":
            with ThreadPoolExecutor(CALLERS) as pool:
                wrong += sum(pool.map(as_caller, range(i * CALLERS, (i + 1) * CALLERS)))
        else:
            wrong += some_calls(calls, ROUND, i)
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
