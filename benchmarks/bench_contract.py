"""What the contract says of cost, on the CPU, where a call is more than one layer on dense float32 data.

    python benchmarks/bench_contract.py [--only GROUP ...] [--threads N ...] [--budget SECONDS]
                                        [--output results/NAME.json]

packed    a ragged batch against the padded one, per row: 1 says the cost follows the sum of the lengths; and
          torch.nn.LSTM's time for the same PackedSequence
vmap      torch.vmap over 8 inputs against one call on a batch 8 times as large
callers   two Python threads, each with one intra-op thread, against one
16-bit    torch.nn.LSTM's time in bfloat16 and float16, and lstm_ext's own in float32
cell      torch.nn.LSTMCell's time
frozen    torch.nn.LSTM's time and lstm_ext's own against that of a frozen layer, with weights as they are and rounded
rollout   a recurrent policy: torch.nn.LSTM's time in a loop over the steps, in which a state begins anew where an
          episode does; in training also against one call of lstm_ext with `resets`
busy      how much longer both layers take with one and with two programs that keep one of the cores busy

The process keeps freed memory for the measurement: see `harness.keep_freed_memory`. Nothing fails here: what a busy
machine measures is no verdict.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import harness
import torch
from shapes import CELLS, ROLLOUTS, SHARED, STREAMS, TASKS, Shape
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import lstm_ext

GROUPS = ["packed", "vmap", "callers", "16-bit", "cell", "frozen", "rollout", "busy"]
SAMPLES = 8  # of vmap
TARGETS = {"packed": 1.15, "vmap": 1.2, "callers": 1.3}  # at most


def call_of(layer: nn.Module, x: torch.Tensor | PackedSequence, training: bool) -> Callable[[], object]:
    if not training:

        def infer() -> object:
            with torch.inference_mode():
                return layer(x)[0]

        return infer

    data = (x.data if isinstance(x, PackedSequence) else x).detach().requires_grad_()
    argument = PackedSequence(data, *x[1:]) if isinstance(x, PackedSequence) else data
    grad = torch.randn(
        *data.shape[:-1], layer.hidden_size, generator=torch.Generator().manual_seed(2), dtype=torch.float32
    ).to(data.dtype)

    def train() -> object:
        data.grad = None
        layer.zero_grad(set_to_none=True)
        output = layer(argument)[0]
        (output.data if isinstance(output, PackedSequence) else output).backward(grad)
        return data.grad

    return train


def lengths_of(shape: Shape) -> torch.Tensor:
    """Spread evenly from a tenth of the steps to all of them, in no order."""
    lengths = torch.linspace(shape.steps / 10, shape.steps, shape.batch).round().long().clamp_min(1)
    return lengths[torch.randperm(shape.batch, generator=torch.Generator().manual_seed(3))]


def packed(shape: Shape, training: bool, budget: float) -> dict:
    theirs, ours = harness.make_layers(shape)
    x = torch.randn(shape.steps, shape.batch, shape.input_size, generator=torch.Generator().manual_seed(1))
    lengths = lengths_of(shape)
    ragged = pack_padded_sequence(x, lengths, enforce_sorted=False)
    share = lengths.sum().item() / (shape.steps * shape.batch)
    against_padded = harness.compare(call_of(ours, ragged, training), call_of(ours, x, training), budget / 2)
    against_torch = harness.compare(
        call_of(theirs, ragged, training), call_of(ours, ragged, training), budget / 2
    )
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
    x = torch.randn(shape.steps, shape.batch, shape.input_size, generator=torch.Generator().manual_seed(1))
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
    theirs, ours = harness.make_layers(shape)
    x = torch.randn(shape.steps, shape.batch, shape.input_size, generator=torch.Generator().manual_seed(1))
    plain = call_of(lstm_ext.from_torch(nn.LSTM(shape.input_size, shape.hidden_size)), x, training)
    result: dict = {}
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        a, b = (call_of(m.to(dtype), x.to(dtype), training) for m in (theirs, ours))
        result[f"{name}_over_torch"] = harness.compare(a, b, budget / 4).ratio
        result[f"{name}_over_float32"] = harness.compare(plain, b, budget / 4).ratio
    return result


def cell(shape: Shape, training: bool, budget: float) -> dict:
    """Forward, and with training backward, with the gradients of the weights."""
    torch.manual_seed(0)
    theirs = nn.LSTMCell(shape.input_size, shape.hidden_size)
    ours = lstm_ext.from_torch(copy.deepcopy(theirs))
    x = torch.randn(shape.batch, shape.input_size)
    state = torch.randn(shape.batch, shape.hidden_size), torch.randn(shape.batch, shape.hidden_size)
    grads = torch.randn(shape.batch, shape.hidden_size), torch.randn(shape.batch, shape.hidden_size)

    def call(module: nn.Module) -> Callable[[], object]:
        def infer() -> object:
            with torch.inference_mode():
                return module(x, state)

        def train() -> object:
            module.zero_grad(set_to_none=True)
            return torch.autograd.backward(module(x, state), grads)

        return train if training else infer

    comparison = harness.compare(call(theirs), call(ours), budget)
    return {"over_torch": comparison.ratio, "times": [harness.as_dict(comparison)]}


def frozen(shape: Shape, training: bool, budget: float) -> dict | None:
    if training:
        return None
    theirs, ours = harness.make_layers(shape)
    x = torch.randn(shape.steps, shape.batch, shape.input_size, generator=torch.Generator().manual_seed(1))
    result = {}
    for name, weights in (("as_they_are", None), ("bfloat16", torch.bfloat16), ("int8", torch.int8)):
        ready = call_of(lstm_ext.freeze(ours, weights), x, False)
        result[f"{name}_over_torch"] = harness.compare(call_of(theirs, x, False), ready, budget / 6).ratio
        result[f"{name}_over_ours"] = harness.compare(call_of(ours, x, False), ready, budget / 6).ratio
    return result


def rollout(shape: Shape, training: bool, budget: float) -> dict:
    """Without gradients, what a policy does while it acts; with them, what it learns from the same observations."""
    theirs, ours = harness.make_layers(shape)
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
            return run(layer).backward(grad)

        return learn if training else act

    swapped = harness.compare(timed(theirs, loop), timed(ours, loop), budget)
    result = {"over_torch": swapped.ratio, "times": [harness.as_dict(swapped)]}
    if training:
        at_once = harness.compare(timed(theirs, loop), timed(ours, one_call), budget)
        result["resets_over_torch"] = at_once.ratio
        result["times"].append(harness.as_dict(at_once))
    return result


@contextlib.contextmanager
def neighbours(count: int) -> Iterator[None]:
    """So many programs that compute without end, all on one core of those that this process may use."""
    core = max(os.sched_getaffinity(0))
    program = f"import os\nos.sched_setaffinity(0, {{{core}}})\nprint(flush=True)\nwhile True: pass"
    processes = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) for _ in range(count)
    ]
    try:
        for process in processes:
            process.stdout.readline()
        yield
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def alone(call: Callable[[], object], budget: float) -> harness.Timing:
    """Of one side for itself: threads that torch has used spin on for a while, and would hold up the other side."""
    for _ in range(3):
        call()
    samples: list[float] = []
    deadline = time.perf_counter() + budget
    while time.perf_counter() < deadline or len(samples) < harness.MIN_REPEATS:
        samples.append(harness.sample(call, 1))
    return harness.timing(samples)


def busy(shape: Shape, training: bool, budget: float) -> dict:
    sides = dict(zip(("torch", "ours"), harness.make_layers(shape), strict=True))
    x = torch.randn(shape.steps, shape.batch, shape.input_size, generator=torch.Generator().manual_seed(1))
    calls = {name: call_of(layer, x, training) for name, layer in sides.items()}
    times = []
    for count in (0, 1, 2):
        with neighbours(count):
            times.append({name: alone(call, budget / 3) for name, call in calls.items()})
    result: dict = {
        "times": [{name: dataclasses.asdict(t) for name, t in beside.items()} for beside in times]
    }
    for count in (1, 2):
        for name in calls:
            result[f"{name}_beside_{count}"] = times[count][name].median / times[0][name].median
        result[f"over_torch_beside_{count}"] = times[count]["torch"].median / times[count]["ours"].median
    return result


MEASURE = {
    "packed": packed, "vmap": vmap, "callers": callers, "16-bit": low_precision, "cell": cell, "frozen": frozen,
    "rollout": rollout, "busy": busy,
}  # fmt: skip
# Those of a group that has its own.
SHAPES = {
    "cell": CELLS,
    "frozen": {**STREAMS, **TASKS},
    "rollout": ROLLOUTS,
    "busy": {**SHARED, "tagger": TASKS["tagger"], "stream-H512": STREAMS["stream-H512"]},
}


def main() -> None:
    parser = harness.options_of(__doc__, {**TASKS, **CELLS, **STREAMS, **ROLLOUTS, **SHARED}, budget=4.0)
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=GROUPS, metavar="GROUP")
    options = parser.parse_args()

    facts = {**harness.facts(), "freed_memory_kept": harness.keep_freed_memory()}
    results = []
    for group in options.only:
        # What two callers cost says nothing on more intra-op threads than one.
        for threads in [1] if group == "callers" else options.threads:
            shapes = {k: v for k, v in SHAPES.get(group, TASKS).items() if k in options.shapes}
            for name in shapes:
                for training in (False, True):
                    torch.set_num_threads(threads)
                    figures = MEASURE[group](shapes[name], training, options.budget)
                    if figures is None:
                        continue
                    case = {
                        "group": group,
                        "shape": name,
                        "threads": threads,
                        "training": training,
                        **figures,
                    }
                    results.append(case)
                    shown = {k: f"{v:.2f}" for k, v in figures.items() if isinstance(v, float)}
                    print(
                        f"{group:<8} {name:<11} {threads} thr  {'training' if training else 'inference':<9}  "
                        + "  ".join(f"{k} {v}" for k, v in shown.items()),
                        flush=True,
                    )
    for group, target in TARGETS.items():
        costs = [r["cost"] for r in results if r["group"] == group]
        if costs:
            print(
                f"{group}: cost {harness.geometric_mean(costs):.2f} in the mean, at most {max(costs):.2f} "
                f"(target: at most {target})"
            )
    if options.output:
        options.output.write_text(json.dumps({"facts": facts, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
