"""Programs that keep one of the cores busy beside a layer, and how much longer its calls take then."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import harness
from harness import call_of, input_of
from shapes import Shape


class Neighbour(NamedTuple):
    """Programs on one of the cores, each busy for `burst` seconds and then idle, so that `share` of its time is busy.

    With `share` 1 they compute without end.
    """

    count: int
    share: float = 1.0
    burst: float = 0.0

    @property
    def name(self) -> str:
        bursts = "" if self.share == 1 else f"_{self.share:.0%}_in_{1e3 * self.burst:.0f}ms".replace("%", "")
        return f"{self.count}{bursts}"


LASTING = [Neighbour(1), Neighbour(2)]
IN_BURSTS = [
    Neighbour(count, share, burst)
    for count in (1, 2)
    for share in (0.2, 0.5)
    for burst in (0.005, 0.02, 0.05)
]

_BUSY = """
import os, sys, time
core, share, burst, phase = int(sys.argv[1]), *map(float, sys.argv[2:])
os.sched_setaffinity(0, {core})
print(flush=True)
time.sleep(phase)
while True:
    end = time.perf_counter() + burst
    while share == 1 or time.perf_counter() < end:
        pass
    time.sleep(burst * (1 / share - 1))
"""


@contextlib.contextmanager
def running(neighbour: Neighbour | None) -> Iterator[None]:
    """The programs run, all on the last core of those that this process may use."""
    count, share, burst = neighbour or (0, 1.0, 0.0)
    core = max(os.sched_getaffinity(0))
    # The second begins where the first has done a third of its period.
    arguments = [[core, share, burst, burst / share * place / 3] for place in range(count)]
    processes = [
        subprocess.Popen([sys.executable, "-c", _BUSY, *map(str, given)], stdout=subprocess.PIPE)
        for given in arguments
    ]
    try:
        for process in processes:
            process.stdout.readline()
        yield
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def block(call: Callable[[], object], seconds: float) -> float:
    """Seconds of a call, on average over the calls of so many seconds: a median would not see bursts."""
    harness.settle(0.005)  # threads of the other side spin on for a while
    call()
    begin, calls = time.perf_counter(), 0
    while (passed := time.perf_counter() - begin) < seconds or not calls:
        call()
        calls += 1
    return passed / calls


def beside(
    shape: Shape, training: bool, budget: float, kinds: list[Neighbour], seconds: float
) -> dict[str, dict[str, list[float]]]:
    """By the name of the neighbour, and "0" for none, samples of the seconds of a call of both sides, in turn.

    `budget`: seconds of a side beside each neighbour; `seconds`: of a sample.
    """
    layers = dict(zip(("torch", "ours"), harness.make_layers(shape), strict=True))
    calls = {name: call_of(layer, input_of(shape), training) for name, layer in layers.items()}
    for call in calls.values():
        block(call, 0.1)
    found = {}
    for kind in [None, *kinds]:
        samples: dict[str, list[float]] = {name: [] for name in calls}
        with running(kind):
            for turn in range(max(2, round(budget / seconds))):
                for name in harness.order_of(list(calls), turn):
                    samples[name].append(block(calls[name], seconds))
        found[kind.name if kind else "0"] = samples
    return found


def slowdowns(times: dict[str, dict[str, float]]) -> dict[str, float]:
    """How many times as long a call takes beside each neighbour, ours over torch's there, and the share that is kept.

    `kept_beside`: of its idle rate ours keeps so many times the share that torch keeps of its own.
    """
    result = {}
    for kind, here in times.items():
        longer = {name: here[name] / times["0"][name] for name in here}
        if kind != "0":
            result |= {f"{name}_beside_{kind}": value for name, value in longer.items()}
            result[f"kept_beside_{kind}"] = longer["torch"] / longer["ours"]
        result[f"over_torch_beside_{kind}"] = here["torch"] / here["ours"]
    return {name: harness.rounded(value) for name, value in result.items()}
