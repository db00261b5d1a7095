"""What the contract says of cost, on the CPU, where a call is more than one layer on dense float32 data.

    python benchmarks/bench_contract.py [--only GROUP ...] [--threads N ...] [--budget SECONDS]
                                        [--output results/NAME.json]

packed    a ragged batch against the padded one, per row: 1 says the cost follows the sum of the lengths; and
          torch.nn.LSTM's time for the same PackedSequence
vmap      torch.vmap over 8 inputs against one call on a batch 8 times as large
callers   two Python threads, each with one intra-op thread, against one
16-bit    torch.nn.LSTM's time in bfloat16 and float16, and lstm_ext's own in float32
cell      torch.nn.LSTMCell's time, in float32 and in 16 bits
frozen    torch.nn.LSTM's time and lstm_ext's own against that of a frozen layer, with weights as they are and rounded
rollout   a recurrent policy: torch.nn.LSTM's time in a loop over the steps, in which a state begins anew where an
          episode does; in training also against one call of lstm_ext with `resets`
busy      how much longer both layers take beside one and two programs that keep one of the cores busy, without end or
          in bursts, and the share of its rate that ours keeps over the share that torch keeps
fallback  torch.nn.LSTM's time over that of lstm_ext where it has no kernels and takes torch's own operator: in a
          process with LSTM_EXT_BACKEND=torch; eager, by torch.compile (whole: ours with fullgraph=True, which
          torch's layer does not have), packed, and three layers with dropout

The process keeps freed memory for the measurement: see `harness.keep_freed_memory`. Nothing fails here: what a busy
machine measures is no verdict.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import harness
import sides
import torch
from harness import call_of, input_of
from shapes import BUSY, CELLS, FALLBACK, FREEZE, ROLLOUTS, STREAMS, TASKS, Shape
from torch import nn

from lstm_ext.native import loader

SAMPLES = 8  # of vmap
TARGETS = {"packed": 1.15, "vmap": 1.2, "callers": 1.3}  # at most


def packed(shape: Shape, training: bool, budget: float) -> dict:
    calls, share = sides.packed(shape, training)
    against_padded = harness.compare(calls["ours"], calls["padded"], budget / 2)
    against_torch = harness.compare(calls["torch"], calls["ours"], budget / 2)
    return {
        "cost": against_padded.ratio / share,
        "share_of_rows": share,
        "over_torch": against_torch.ratio,
        "times": [harness.as_dict(against_padded), harness.as_dict(against_torch)],
    }


def vmap(shape: Shape, training: bool, budget: float) -> dict:
    _, ours = harness.make_layers(shape)
    xs = torch.randn(
        SAMPLES, shape.steps, shape.batch, shape.input_size, generator=torch.Generator().manual_seed(1)
    )
    large = xs.transpose(0, 1).reshape(shape.steps, SAMPLES * shape.batch, shape.input_size)

    class Mapped(nn.Module):
        hidden_size = shape.hidden_size

        def __init__(self) -> None:
            super().__init__()
            self.layer = ours

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            return (torch.vmap(lambda one: self.layer(one)[0])(x),)

    comparison = harness.compare(call_of(Mapped(), xs, training), call_of(ours, large, training), budget)
    return {"cost": comparison.ratio, "times": [harness.as_dict(comparison)]}


def callers(shape: Shape, training: bool, budget: float) -> dict:
    """One intra-op thread each, whatever --threads says; weights are read by both, gradients are each one's own."""
    torch.set_num_threads(1)
    _, ours = harness.make_layers(shape)
    x = input_of(shape)
    grad = torch.randn(shape.steps, shape.batch, shape.hidden_size)

    def call() -> None:
        if training:
            torch.autograd.grad(ours(x)[0], list(ours.parameters()), grad)
        else:
            with torch.inference_mode():
                ours(x)

    def timed(threads: int) -> float:
        start = time.perf_counter()
        workers = [threading.Thread(target=lambda: [call() for _ in range(repeats)]) for _ in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return time.perf_counter() - start

    repeats = 1
    timed(2)
    repeats = max(1, round(0.1 / timed(1)))
    samples: tuple[list[float], list[float]] = ([], [])
    deadline = time.perf_counter() + budget
    while time.perf_counter() < deadline or len(samples[0]) < harness.MIN_REPEATS:
        for threads in (1, 2):
            samples[threads - 1].append(timed(threads))
    one, two = (statistics.median(s) for s in samples)
    return {"cost": two / one, "seconds": [one, two], "repeats": len(samples[0])}


def low_precision(shape: Shape, training: bool, budget: float) -> dict:
    result: dict = {}
    for name in ("bfloat16", "float16"):
        calls = sides.low_precision(shape, training, getattr(torch, name))
        for over in ("torch", "float32"):
            result[f"{name}_over_{over}"] = harness.compare(calls[over], calls["ours"], budget / 4).ratio
    return result


def cell(shape: Shape, training: bool, budget: float) -> dict:
    calls = sides.cell(shape, training)
    comparison = harness.compare(calls["torch"], calls["ours"], budget / 2)
    result = {"over_torch": comparison.ratio, "times": [harness.as_dict(comparison)]}
    for name in ("bfloat16", "float16"):
        calls = sides.cell(shape, training, getattr(torch, name))
        result[f"{name}_over_torch"] = harness.compare(calls["torch"], calls["ours"], budget / 4).ratio
    return result


def frozen(shape: Shape, training: bool, budget: float) -> dict | None:
    """Each side finds its weights where its last call left them, since no other side has run in between."""
    if training:
        return None
    calls = sides.frozen(shape)
    seconds = harness.alone(calls, max(harness.MIN_REPEATS, round(3 * budget)), rest=0.02)
    result: dict = {}
    for name, side in (("as_they_are", "frozen"), ("bfloat16", "frozen-bfloat16"), ("int8", "frozen-int8")):
        for over in ("torch", "ours"):
            result[f"{name}_over_{over}"] = seconds[over] / seconds[side]
    return {**result, "seconds": seconds}


def rollout(shape: Shape, training: bool, budget: float) -> dict:
    calls = sides.rollout(shape, training)
    swapped = harness.compare(calls["torch"], calls["ours"], budget)
    result = {"over_torch": swapped.ratio, "times": [harness.as_dict(swapped)]}
    if training:
        at_once = harness.compare(calls["torch"], calls["resets"], budget)
        result["resets_over_torch"] = at_once.ratio
        result["times"].append(harness.as_dict(at_once))
    return result


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
# A sample has so many seconds, so that it meets the bursts as often as they come.
SAMPLE_SECONDS = 0.5

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


def beside_neighbours(
    shape: Shape, training: bool, budget: float, kinds: list[Neighbour], seconds: float = SAMPLE_SECONDS
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
    for kind, beside in times.items():
        longer = {name: beside[name] / times["0"][name] for name in beside}
        if kind != "0":
            result |= {f"{name}_beside_{kind}": value for name, value in longer.items()}
            result[f"kept_beside_{kind}"] = longer["torch"] / longer["ours"]
        result[f"over_torch_beside_{kind}"] = beside["torch"] / beside["ours"]
    return result


def busy(shape: Shape, training: bool, budget: float) -> dict:
    found = beside_neighbours(shape, training, budget / 4, LASTING + IN_BURSTS)
    means = {
        kind: {name: statistics.fmean(samples) for name, samples in beside.items()}
        for kind, beside in found.items()
    }
    return {"times": found, **slowdowns(means)}


def fallback(shape: Shape, training: bool, budget: float) -> dict:
    result: dict = {"times": []}
    for name, calls in sides.without_kernels(shape, training):
        comparison = harness.compare(calls["torch"], calls["ours"], budget / 5)
        result[f"{name}_over_torch"] = comparison.ratio
        result["times"].append(harness.as_dict(comparison))
    return result


def in_a_process_without_kernels(options: argparse.Namespace) -> list[dict]:
    """The results of the group `fallback`."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "results.json"
        command = [sys.executable, __file__, "--only", "fallback", "--budget", str(options.budget)]
        command += ["--shapes", *options.shapes, "--output", str(output)]
        command += ["--threads", *map(str, options.threads)]
        subprocess.run(command, check=True, env=os.environ | {"LSTM_EXT_BACKEND": "torch"})
        return json.loads(output.read_text())["results"]


MEASURE = {
    "packed": packed, "vmap": vmap, "callers": callers, "16-bit": low_precision, "cell": cell, "frozen": frozen,
    "rollout": rollout, "busy": busy, "fallback": fallback,
}  # fmt: skip
# Those of a group that has its own.
SHAPES = {
    "cell": CELLS,
    "frozen": {**STREAMS, **TASKS, **FREEZE},
    "rollout": ROLLOUTS,
    "fallback": FALLBACK,
    "busy": BUSY,
}


def cases_of(group: str, options: argparse.Namespace) -> Iterator[tuple[str, Shape, int, bool]]:
    # What two callers cost says nothing on more intra-op threads than one.
    for threads in [1] if group == "callers" else options.threads:
        for name, shape in SHAPES.get(group, TASKS).items():
            if name in options.shapes:
                yield from ((name, shape, threads, training) for training in (False, True))


def main() -> None:
    shapes = {name: shape for own in (TASKS, *SHAPES.values()) for name, shape in own.items()}
    parser = harness.options_of(__doc__, shapes, budget=4.0)
    parser.add_argument("--only", nargs="+", choices=MEASURE, default=list(MEASURE), metavar="GROUP")
    options = parser.parse_args()

    facts = {**harness.facts(), "freed_memory_kept": harness.keep_freed_memory()}
    results = []
    for group in options.only:
        if group == "fallback" and loader.status().backend != "torch":
            results += in_a_process_without_kernels(options)
            continue
        for name, shape, threads, training in cases_of(group, options):
            torch.set_num_threads(threads)
            figures = MEASURE[group](shape, training, options.budget)
            if figures is not None:
                case = {"group": group, "shape": name, "threads": threads, "training": training}
                results.append(case | figures)
                harness.show(case, figures)
    for group, target in TARGETS.items():
        costs = [r["cost"] for r in results if r["group"] == group]
        if costs:
            mean = harness.geometric_mean(costs)
            print(
                f"{group}: cost {mean:.2f} in the mean, at most {max(costs):.2f} (target: at most {target})"
            )
    harness.write(options.output, {"facts": facts, "results": results})


if __name__ == "__main__":
    main()
