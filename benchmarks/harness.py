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
from dataclasses import dataclass
from pathlib import Path

import torch
from shapes import Shape
from torch import nn
from torch.nn.utils.rnn import PackedSequence

MIN_REPEATS = 5
MAX_REPEATS = 2000
# Short calls are timed many at once: a layer in use is called again and again, and finds its weights where its
# own last call left them, not where the other layer's did.
MIN_SAMPLE_SECONDS = 5e-3
MEBIBYTE = 2**20


def sample(function: Callable[[], object], calls: int, end: Callable[[], object] = lambda: None) -> float:
    """Seconds of a call; `end` waits for a device that computes on its own."""
    end()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    end()
    return (time.perf_counter() - start) / calls


def settle(pause: float) -> None:
    """Wait until the threads of this process rest: `pause` seconds, and again while they compute, 40 times at most."""
    for _ in range(40 if pause else 0):
        before = time.process_time()
        time.sleep(pause)
        if time.process_time() - before < pause / 5:
            return


@dataclass
class Interleaved:
    seconds: dict[str, list[float]]  # of a call, a number for each sample
    calls: int  # in a sample


def interleave(
    sides: dict[str, Callable[[], object]],
    budget: float,
    least: int = MIN_REPEATS,
    most: int = MAX_REPEATS,
    pause: float = 0.0,
    end: Callable[[], object] = lambda: None,
) -> Interleaved:
    """Take turns between the sides for about `budget` seconds; all of them in each turn, `least` to `most` turns.

    Who goes first rotates, and the direction changes after each rotation: no side always follows the same other one.

    With a `pause`, in seconds, each sample waits until the threads of the process rest for so long, and an untimed call
    goes before a sample of short calls. It is for sides that have threads of their own: those of the side before may
    spin for some milliseconds on the cores that these need, and our layer takes fewer threads after such a call.
    """
    for function in sides.values():
        settle(pause)
        function()
    once = {}
    for name, function in sides.items():
        settle(pause)
        once[name] = sample(function, 1, end)
    if sum(once.values()) < budget / 4:  # else a call takes so long that nothing but the samples matters
        for name, function in sides.items():
            once[name] = min(once[name], *(sample(function, 1, end) for _ in range(3)))
    slowest = max(once.values())
    # All sides get the same number of calls, so that each finds the caches as full of itself as the others do.
    calls = max(1, math.ceil(MIN_SAMPLE_SECONDS / slowest))
    names = list(sides)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        deadline = time.perf_counter() + budget
        for turn in range(most):
            if turn >= least and time.perf_counter() > deadline:
                break
            for name in order_of(names, turn):
                settle(pause)
                if pause and calls > 1:
                    sides[name]()
                seconds[name].append(sample(sides[name], calls, end))
    finally:
        if enabled:
            gc.enable()
    return Interleaved(seconds, calls)


def alone(sides: dict[str, Callable[[], object]], samples: int = 9, rest: float = 0.2) -> dict[str, float]:
    """Seconds of a call of each side that is made again and again, by itself: the median of some samples.

    Each side takes a sample in turn, after as many untimed calls, which bring back its data into the caches. `rest`
    seconds go by between two turns: a host that is slow for a second does not decide about all samples.
    """
    calls = {}
    for name, function in sides.items():
        once = min(sample(function, 1) for _ in range(4))
        calls[name] = max(1, math.ceil(MIN_SAMPLE_SECONDS / once))
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(samples):
        time.sleep(rest)
        for name, function in sides.items():
            sample(function, calls[name])
            seconds[name].append(sample(function, calls[name]))
    return {name: statistics.median(found) for name, found in seconds.items()}


def order_of(names: list[str], turn: int) -> list[str]:
    count = len(names)
    step = 1 if turn // count % 2 == 0 else -1
    return [names[(turn + step * place) % count] for place in range(count)]


# ---- the two sides -------------------------------------------------------------------------------


def layer_options(shape: Shape) -> dict[str, object]:
    """Keyword arguments of the layers."""
    return {"num_layers": shape.layers, "bidirectional": shape.directions == 2}


def make_layers(shape: Shape) -> tuple[nn.Module, nn.Module]:
    """torch.nn.LSTM and lstm_ext.LSTM, or GRU, with the same weights, each with its own copy of them."""
    import lstm_ext

    torch.manual_seed(0)
    name = "LSTM" if shape.gates == 4 else "GRU"
    theirs, ours = (
        getattr(package, name)(shape.input_size, shape.hidden_size, **layer_options(shape))
        for package in (nn, lstm_ext)
    )
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def input_of(shape: Shape) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape.steps, shape.batch, shape.input_size, generator=generator)


def call_of(layer: nn.Module, x: torch.Tensor | PackedSequence, training: bool) -> Callable[[], object]:
    """A call without gradients, or forward and backward with every gradient, the input's included.

    The gradient of the output is random: with ones, as out.sum() gives, some of the work could be saved.
    """
    if not training:

        def infer() -> object:
            with torch.inference_mode():
                return layer(x)[0]

        return infer

    data = (x.data if isinstance(x, PackedSequence) else x).detach().requires_grad_()
    argument = PackedSequence(data, *x[1:]) if isinstance(x, PackedSequence) else data
    units = layer.hidden_size * (2 if getattr(layer, "bidirectional", False) else 1)
    generator = torch.Generator().manual_seed(2)
    grad = torch.randn(*data.shape[:-1], units, generator=generator).to(data)

    def train() -> object:
        data.grad = None
        layer.zero_grad(set_to_none=True)
        output = layer(argument)[0]
        (output.data if isinstance(output, PackedSequence) else output).backward(grad)
        return data.grad

    return train


def inference_call(layer: nn.Module, shape: Shape) -> Callable[[], object]:
    return call_of(layer, input_of(shape), training=False)


def training_call(layer: nn.Module, shape: Shape) -> Callable[[], object]:
    return call_of(layer, input_of(shape), training=True)


def step_call(layer: nn.Module, shape: Shape, method: str) -> Callable[[], object]:
    """One time step with carried state; method "call" is the module's call, "step" is lstm_ext.LSTM.step.

    To be called in torch.inference_mode(): a stream enters it once, and entering takes a tenth of a step.
    """
    x = input_of(shape._replace(steps=1))
    x_t = x[0]
    state = torch.zeros(1, shape.batch, shape.hidden_size)
    hx = (state, state.clone()) if shape.gates == 4 else state

    def call() -> torch.Tensor:
        return layer(x, hx)[0]

    def step() -> torch.Tensor:
        return layer.step(x_t, hx)[0]

    return step if method == "step" else call


def tensor_of(result: object) -> torch.Tensor:
    """The output among what a side returns: a tensor or an array, a PackedSequence, or the first of several."""
    if isinstance(result, tuple):  # a PackedSequence too, whose data come first
        result = result[0]
    return torch.as_tensor(result).detach().clone()


def largest_difference(theirs: Callable[[], object], ours: Callable[[], object]) -> float:
    """Of the two results, relative to the largest value: a fast wrong answer must not look like a success."""
    a, b = (tensor_of(function()) for function in (theirs, ours))
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
    layer = make(shape.input_size, shape.hidden_size, **layer_options(shape), **options)
    call = training_call(layer, shape)
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
    trim_threshold, mmap_threshold = -1, -3  # M_... of malloc.h; the second takes 32 MiB at most everywhere
    return mallopt is not None and bool(mallopt(trim_threshold, 2**31 - 1) and mallopt(mmap_threshold, 2**25))


# ---- the command line -----------------------------------------------------------------------------


def positive(kind: type[int] | type[float]) -> Callable[[str], int | float]:
    """For argparse: an int or a float above 0."""

    def parse(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = kind(0)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"expected a {_KINDS[kind]} above 0, got {text!r}")
        return value

    return parse


_KINDS = {int: "whole number", float: "number"}


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """Its help shows the description line by line."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def write(path: Path | None, record: dict) -> None:
    """Never half of it: what reads the file may do so while the benchmark goes on."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + ".part")
        unfinished.write_text(json.dumps(record, indent=1) + "\n")
        unfinished.replace(path)


# ---- the facts of the machine --------------------------------------------------------------------


def load() -> float:
    """How many programs want a processor, on average over the last minute."""
    return os.getloadavg()[0]


# What holds torch and lstm_ext to an older instruction set than the processor has.
HELD_BY = ("ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "ATEN_CPU_CAPABILITY", "LSTM_EXT_CPU_CAPABILITY")
# What tells malloc to do as it does not by itself, or puts another one into its place.
ALLOCATOR = (
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_ARENA_MAX",
    "GLIBC_TUNABLES",
    "LD_PRELOAD",
)


def facts() -> dict[str, object]:
    import lstm_ext
    from lstm_ext.native import config, loader

    extension = loader.extension()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": config.processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_at_start": load(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "lstm_ext": lstm_ext.__version__,
        "lstm_ext_backend": loader.status().backend,
        "lstm_ext_cpu_capability": extension.cpu_capability() if extension else None,
        "git_commit": config.commit(Path(__file__).resolve().parents[1]),
    }


def geometric_mean(values: Iterable[float]) -> float:
    return math.exp(statistics.fmean(math.log(value) for value in values))


def rounded(value: float) -> float:
    """To four significant digits: no more is measured, and records stay small."""
    return float(f"{value:.4g}")


if __name__ == "__main__":
    kind, *sizes, threads, options = sys.argv[1:]
    memory_child(kind, Shape(*map(int, sizes)), int(threads), json.loads(options))
