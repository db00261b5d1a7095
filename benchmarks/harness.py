"""Measure two implementations against each other: times interleaved, peak memory in child processes.

Only ratios within one run mean anything. The clock of a machine drifts and its other programs come and go, so
the two sides alternate call by call, and what disturbs one disturbs the other.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import gc
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from shapes import Shape
from torch import nn

MIN_REPEATS = 5
MAX_REPEATS = 2000
# Short calls are timed many at once: a layer in use is called again and again, and finds its weights where its
# own last call left them, not where the other layer's did.
MIN_SAMPLE_SECONDS = 5e-3
MEBIBYTE = 2**20


@dataclass
class Timing:
    """One side of a comparison, in milliseconds per call."""

    median: float
    first_quartile: float
    third_quartile: float


@dataclass
class Comparison:
    torch: Timing
    ours: Timing
    ratio: float  # of the medians; above 1, lstm_ext is faster
    repeats: int
    calls_per_repeat: int


def timing(samples: list[float]) -> Timing:
    first, median, third = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(*(1e3 * value for value in (median, first, third)))


def sample(function: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def compare(theirs: Callable[[], object], ours: Callable[[], object], budget: float) -> Comparison:
    """Alternate `theirs` and `ours` for about `budget` seconds. Which goes first alternates as well."""
    for function in (theirs, ours, theirs, ours):
        function()
    slower = max(min(sample(f, 1) for _ in range(3)) for f in (theirs, ours))
    # Both sides get the same number of calls, so that each finds the caches as full of itself as the other
    # does.
    calls = max(1, math.ceil(MIN_SAMPLE_SECONDS / slower))
    repeats = max(MIN_REPEATS, min(MAX_REPEATS, int(budget / (2 * calls * slower))))
    samples: tuple[list[float], list[float]] = ([], [])
    sides = (theirs, ours)
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        deadline = time.perf_counter() + budget
        for repeat in range(repeats):
            if repeat >= MIN_REPEATS and time.perf_counter() > deadline:
                break
            for side in (0, 1) if repeat % 2 == 0 else (1, 0):
                samples[side].append(sample(sides[side], calls))
    finally:
        if enabled:
            gc.enable()
    a, b = timing(samples[0]), timing(samples[1])
    return Comparison(a, b, a.median / b.median, len(samples[0]), calls)


# ---- the two sides -------------------------------------------------------------------------------


def make_layers(shape: Shape) -> tuple[nn.Module, nn.Module]:
    """torch.nn.LSTM and lstm_ext.LSTM with the same weights, each with its own copy of them."""
    import lstm_ext

    torch.manual_seed(0)
    theirs = nn.LSTM(shape.input_size, shape.hidden_size)
    ours = lstm_ext.LSTM(shape.input_size, shape.hidden_size)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def inference_call(layer: nn.Module, shape: Shape) -> Callable[[], object]:
    x = torch.randn(shape.steps, shape.batch, shape.input_size, generator=torch.Generator().manual_seed(1))

    def call() -> torch.Tensor:
        with torch.inference_mode():
            return layer(x)[0]

    return call


def training_call(layer: nn.Module, shape: Shape) -> Callable[[], object]:
    """Forward and backward with every gradient, the input's included.

    The gradient of the output is random: with ones, as out.sum() gives, some of the work could be saved.
    """
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape.steps, shape.batch, shape.input_size, generator=generator, requires_grad=True)
    grad = torch.randn(shape.steps, shape.batch, shape.hidden_size, generator=generator)
    leaves = [x, *layer.parameters()]

    def call() -> torch.Tensor:
        for leaf in leaves:
            leaf.grad = None
        layer(x)[0].backward(grad)
        return x.grad

    return call


def step_call(layer: nn.Module, shape: Shape, method: str) -> Callable[[], object]:
    """One time step with carried state; method "call" is the module's call, "step" is lstm_ext.LSTM.step."""
    x = torch.randn(1, shape.batch, shape.input_size, generator=torch.Generator().manual_seed(1))
    hx = (torch.zeros(1, shape.batch, shape.hidden_size), torch.zeros(1, shape.batch, shape.hidden_size))

    def call() -> torch.Tensor:
        with torch.inference_mode():
            return layer(x, hx)[0]

    def step() -> torch.Tensor:
        with torch.inference_mode():
            return layer.step(x[0], hx)[0]

    return step if method == "step" else call


def largest_difference(theirs: Callable[[], object], ours: Callable[[], object]) -> float:
    """Of the two results, relative to the largest value: a fast wrong answer must not look like a success."""
    a, b = theirs(), ours()
    return ((a - b.reshape(a.shape)).abs().max() / a.abs().max()).item()


# ---- memory --------------------------------------------------------------------------------------


def memory_status(name: str) -> int:
    """A line of /proc/self/status (VmRSS: memory now, VmHWM: its peak) in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {name} in /proc/self/status")


def memory_child(kind: str, shape: Shape, threads: int, options: dict[str, object]) -> None:
    """Print by how many bytes training steps of one layer raise the peak memory of this process."""
    import lstm_ext

    torch.set_num_threads(threads)
    make = {"torch": nn.LSTM, "ours": lstm_ext.LSTM}[kind]
    # Loads what is loaded on first use, kernels and thread stacks included: not part of the layer's bill.
    training_call(make(8, 8, **options), Shape(2 * threads, 4, 8, 8))()
    torch.manual_seed(0)
    call = training_call(make(shape.input_size, shape.hidden_size, **options), shape)
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from the memory in use now
        before = memory_status("VmRSS")
    except OSError:  # a sandbox may forbid it; then the peak of the imports hides a little, for both alike
        before = memory_status("VmHWM")
    for _ in range(2):
        call()
    print(json.dumps(memory_status("VmHWM") - before))


def peak_memory(kind: str, shape: Shape, threads: int, options: dict[str, object] | None = None) -> int:
    """Bytes by which a training step of one layer (kind "torch" or "ours") raises a fresh process's peak.

    `options` are keyword arguments of the layer.

    Counted is everything beyond weights, input and the output's gradient: what is saved for the backward
    pass, workspaces, gradients.

    Why a process and not torch's profiler: oneDNN and lstm_ext also allocate workspaces that torch's
    allocator never sees. Why VmHWM and not getrusage: ru_maxrss of a new process starts at the size of its
    parent, and would hide everything below that. Why the malloc settings: large freed blocks go back to the
    system at once, so that the peak is of memory in use at the same time, not of what malloc kept for later.
    """
    command = [sys.executable, __file__, kind, *map(str, shape), str(threads), json.dumps(options or {})]
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "MALLOC_TOP_PAD_": "0",
    }
    child = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(child.stdout.splitlines()[-1])


def keep_freed_memory() -> bool:
    """From now on the process keeps what it frees, but for pieces above 32 MiB; returns whether glibc takes it so.

    Else malloc gives the memory of a training step back to the system when it ends and asks for it in the next, where
    every page of it is a fault. When it does is a matter of the largest piece ever freed, so that the same step takes
    twice as long, or not, with what happened to run before.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    trim_threshold, mmap_threshold = (
        -1,
        -3,
    )  # M_... of malloc.h; the second takes no more than 32 MiB everywhere
    return mallopt is not None and bool(mallopt(trim_threshold, 2**31 - 1) and mallopt(mmap_threshold, 2**25))


# ---- the command line -----------------------------------------------------------------------------


def options_of(description: str, shapes: dict[str, Shape], budget: float) -> argparse.ArgumentParser:
    """What the benchmarks of named shapes have in common; the budget is that of a case, in seconds."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=list(shapes), default=list(shapes), metavar="NAME")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], metavar="N")
    parser.add_argument("--budget", type=float, default=budget, help="seconds per case")
    parser.add_argument("--output", type=Path, help="where to write the figures as JSON")
    return parser


# ---- the facts of the machine --------------------------------------------------------------------


def cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def git_commit() -> str | None:
    """The commit that this checkout is at, with "+changes" if it differs from it."""
    root = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        run = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
        return run.stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def load() -> float:
    """How many programs want a processor, on average over the last minute."""
    return os.getloadavg()[0]


def facts() -> dict[str, object]:
    import lstm_ext
    from lstm_ext.native import loader

    extension = loader.extension()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_at_start": load(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "lstm_ext": lstm_ext.__version__,
        "lstm_ext_backend": loader.status().backend,
        "lstm_ext_cpu_capability": extension.cpu_capability() if extension else None,
        "git_commit": git_commit(),
    }


def geometric_mean(values: Iterable[float]) -> float:
    return math.exp(statistics.fmean(math.log(value) for value in values))


def as_dict(comparison: Comparison) -> dict[str, object]:
    return asdict(comparison)


if __name__ == "__main__":
    memory_child(sys.argv[1], Shape(*map(int, sys.argv[2:6])), int(sys.argv[6]), json.loads(sys.argv[7]))
