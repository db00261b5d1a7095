"""lstm_ext.LSTM against torch.nn.LSTM, which is cuDNN's, on a GPU; `make gpu-bench` runs it.

    python benchmarks/bench_gpu.py [--budget SECONDS] [--only GROUP ...] [--dtypes NAME ...]
                                   [--output results/NAME.json]
    python benchmarks/bench_gpu.py --device cpu --tiny         # a trial of the script, without meaning

Times are CUDA events, medians with quartiles, both sides alternating. The GPU is idle when a sample starts, so the
time that launches take is in it; short calls are timed several at once. Per shape and dtype: inference; a training
step, forward and backward with every gradient, and its two halves; inference replayed from a CUDA graph; µs a time
step; the share that the floor has of the time; the peak of memory. The floor is what no implementation can beat on this
card: the time of the products at the rate that torch.mm reaches here, or of reading arguments and writing results at
the bandwidth of a large copy, whichever is longer. gpu_shapes.py says what is measured and in which order; when the
budget is spent, the rest is left out and counted. The file is rewritten after every case.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gpu_shapes
import harness
import records
import torch
from gpu_shapes import Case
from shapes import Shape
from sides import lengths_of
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from lstm_ext.layer import cuda_kernels
from lstm_ext.native import loader
from lstm_ext.native.config import TRIED_CUDA_KERNELS

RESULTS = Path(__file__).resolve().parent / "results"
MIN_REPEATS, MAX_REPEATS = 5, 60
SECONDS_PER_TIMING = 1.0
MIN_SAMPLE_MS = 2.0
TORCH_DTYPE = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "tf32": torch.float32,
}
# Of the largest value. A warning, no verdict: what is right is for the test suite to say.
AGREEMENT = {"float16": 0.02, "bfloat16": 0.1, "float32": 1e-3, "tf32": 0.02}


# ---- clocks


class Clock:
    """Marks on the device's own line of time, or the host's where there is no device."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"

    def mark(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def idle(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def milliseconds(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) if self.on_gpu else 1e3 * (end - start)


def nothing() -> None:
    pass


# Is given a function to call between forward and backward.
Call = Callable[[Callable[[], None]], None]


def sample(clock: Clock, call: Call, calls: int) -> float:
    """Milliseconds of a call."""
    clock.idle()
    start = clock.mark()
    for _ in range(calls):
        call(nothing)
    end = clock.mark()
    clock.idle()
    return clock.milliseconds(start, end) / calls


def halves(clock: Clock, call: Call, repeats: int = 5) -> tuple[float, float]:
    """Milliseconds of forward and of backward, medians. Apart from the totals: a mark takes time of its own."""
    found: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        clock.idle()
        marks = [clock.mark()]
        call(lambda marks=marks: marks.append(clock.mark()))
        marks.append(clock.mark())
        clock.idle()
        for i, part in enumerate(found):
            part.append(clock.milliseconds(marks[i], marks[i + 1]))
    return statistics.median(found[0]), statistics.median(found[1])


def compare(clock: Clock, theirs: Call, ours: Call, budget: float) -> tuple[list[float], list[float], int]:
    """Samples of each side in about `budget` seconds, and how many calls a sample has."""
    for call in (theirs, ours, theirs, ours):
        sample(clock, call, 1)
    once = [min(sample(clock, call, 1) for _ in range(3)) for call in (theirs, ours)]
    calls = max(1, min(100, round(min(MIN_SAMPLE_MS, 20 * budget) / max(min(once), 1e-3))))
    repeats = max(MIN_REPEATS, min(MAX_REPEATS, int(1e3 * budget / (calls * sum(once)))))
    samples: tuple[list[float], list[float]] = ([], [])
    sides = (theirs, ours)
    gc.collect()
    gc.disable()
    try:
        deadline = time.perf_counter() + 2 * budget
        for repeat in range(repeats):
            if repeat >= MIN_REPEATS and time.perf_counter() > deadline:
                break
            for side in (0, 1) if repeat % 2 == 0 else (1, 0):
                samples[side].append(sample(clock, sides[side], calls))
    finally:
        gc.enable()
    return *samples, calls


# ---- what the card can do


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """For cuDNN's RNNs, ours, and torch.mm."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = torch._C._get_cudnn_allow_tf32(), torch._C._get_cublas_allow_tf32()
        torch._C._set_cudnn_allow_tf32(allowed)
        torch._C._set_cublas_allow_tf32(allowed)
        try:
            yield
        finally:
            torch._C._set_cudnn_allow_tf32(before[0])
            torch._C._set_cublas_allow_tf32(before[1])


def median_ms(clock: Clock, function: Callable[[], object], repeats: int) -> float:
    def call(_: object) -> None:
        function()

    for _ in range(3):
        sample(clock, call, 1)
    return statistics.median(sample(clock, call, 1) for _ in range(repeats))


def measure_ceilings(clock: Clock, device: torch.device, tiny: bool) -> dict[str, Any]:
    """Products of each dtype in FLOP/s, copies in bytes/s (read and written), as torch.mm and copy_ reach them."""
    n, size, repeats = (64, 2**16, 3) if tiny else (8192, 2**30, 10)
    flops = {}
    for name, dtype in TORCH_DTYPE.items():
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        with tf32(name == "tf32"):
            ms = median_ms(clock, lambda a=a, b=b, out=out: torch.mm(a, b, out=out), repeats)
        flops[name] = 2 * n**3 / (ms / 1e3)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = median_ms(clock, lambda: target.copy_(source), repeats) / 1e3
    return {"flops": flops, "bytes_per_second": 2 * size / seconds, "mm_size": n, "copy_bytes": size}


def floor_ms(case: Case, kind: str, rows: int, ceilings: dict[str, Any]) -> float:
    """`rows` are those of all time steps together."""
    width, h = torch.empty((), dtype=TORCH_DTYPE[case.dtype]).element_size(), case.hidden_size
    products = weights = sequences = 0
    directions = 2 if case.bidirectional else 1
    for layer in range(case.layers):
        features = case.input_size if layer == 0 else directions * h
        products += 2 * rows * directions * 4 * h * (features + h)
        weights += directions * 4 * h * (features + h + 2)
    sequences = rows * (case.input_size + directions * h)
    if kind == "training":
        # Two more products for each; and the output's gradient is read, those of input and weights are written.
        products, weights, sequences = 3 * products, 2 * weights, 2 * sequences
    moved = width * (weights + sequences)
    return 1e3 * max(products / ceilings["flops"][case.dtype], moved / ceilings["bytes_per_second"])


# ---- the two sides


class Sides:
    """torch.nn.LSTM and lstm_ext.LSTM with the same weights and the same random input."""

    def __init__(self, case: Case, device: torch.device, clock: Clock) -> None:
        import lstm_ext

        self.case, self.clock, self.device = case, clock, device
        dtype = TORCH_DTYPE[case.dtype]
        torch.manual_seed(0)
        arguments = (case.input_size, case.hidden_size, case.layers)
        both = {"bidirectional": case.bidirectional, "device": device, "dtype": dtype}
        theirs = nn.LSTM(*arguments, **both)
        ours = lstm_ext.LSTM(*arguments, **both)
        ours.load_state_dict(theirs.state_dict())
        self.layers = {"torch": theirs, "ours": ours}
        x = torch.randn(case.steps, case.batch, case.input_size, device=device).to(dtype)
        self.packed = None
        if case.packed:
            lengths = lengths_of(Shape(case.batch, case.steps, case.input_size, case.hidden_size))
            self.packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
            x = self.packed.data
        self.x = x
        self.rows = x.size(0) if case.packed else case.steps * case.batch
        self.directions = 2 if case.bidirectional else 1
        features = self.directions * case.hidden_size
        self.grad = torch.randn(*x.shape[:-1], features, device=device).to(dtype)

    def run(self, layer: nn.Module, x: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> Tensor:
        if self.packed is not None:
            return layer(PackedSequence(x, *self.packed[1:]), hx)[0].data
        return layer(x, hx)[0]

    def inference(self, side: str) -> Call:
        layer = self.layers[side].eval()  # cuDNN keeps what backward needs otherwise, also under no_grad

        def call(_: object) -> None:
            with torch.no_grad():
                self.run(layer, self.x)

        return call

    def training(self, side: str) -> Call:
        layer, x = self.layers[side].train(), self.x.detach().clone().requires_grad_()
        leaves = [x, *layer.parameters()]

        def call(between: Callable[[], None]) -> None:
            for leaf in leaves:
                leaf.grad = None
            output = self.run(layer, x)
            between()
            output.backward(self.grad)

        return call

    def replay(self, side: str) -> Call:
        """One call with carried state, captured in a CUDA graph."""
        layer, case = self.layers[side].eval(), self.case
        sizes = (self.directions * case.layers, case.batch, case.hidden_size)
        states = tuple(torch.zeros(sizes, device=self.device).to(self.x.dtype) for _ in range(2))
        with torch.no_grad():
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    self.run(layer, self.x, states)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.run(layer, self.x, states)

        def call(_: object) -> None:
            graph.replay()

        return call

    def difference(self) -> float:
        """Of outputs and of gradients, the larger, relative to the largest value; on memory full of NaN."""
        found = []
        values = {}
        for side, layer in self.layers.items():
            poison(self.device)
            x = self.x.detach().clone().requires_grad_()
            output = self.run(layer, x)
            grads = torch.autograd.grad(output, [x, *layer.parameters()], self.grad)
            values[side] = [output.detach(), *grads]
        for a, b in zip(values["torch"], values["ours"], strict=True):
            difference = (
                (a.double() - b.double()).abs().max() / a.double().abs().max().clamp_min(1e-30)
            ).item()
            found.append(difference if difference == difference else float("inf"))
        return max(found)

    def peak_memory(self, side: str) -> int | None:
        """Bytes that a training step needs beyond weights, input and the output's gradient."""
        if self.device.type != "cuda":
            return None
        self.training(side)(nothing)
        for p in self.layers[side].parameters():
            p.grad = None
        call = self.training(side)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call(nothing)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def poison(device: torch.device) -> None:
    """What is freed here is handed out again: a result that nobody writes is NaN."""
    size = 2**28 if device.type == "cuda" else 2**12
    for n in (size, 2**18, 2**18):
        torch.full((n,), float("nan"), device=device)


def planned(case: Case, device: torch.device) -> list[str] | None:
    """Which kernels compute a layer of it, forward and backward: not always those that are asked for."""
    extension = loader.extension()
    if device.type != "cuda" or extension is None or not extension.build_info()["cuda"]:
        return None
    dtype = TORCH_DTYPE[case.dtype]
    tried = {
        f"{kernel}_outcome": cuda_kernels.outcome(device, kernel, dtype) for kernel in TRIED_CUDA_KERNELS
    }
    sizes = {name: getattr(case, name) for name in ("steps", "batch", "input_size", "hidden_size", "packed")}
    plans = [
        extension.cuda_plan(
            device=extension.cuda_facts(device.index), **sizes, directions=2 if case.bidirectional else 1,
            dtype=str(dtype).removeprefix("torch."), tf32=case.dtype == "tf32", backward=backward,
            kernel=case.kernel, **tried,
        )
        for backward in (False, True)
    ]  # fmt: skip
    return [plan["problem"] or plan["kernel"] for plan in plans]


def measure(
    case: Case, device: torch.device, ceilings: dict[str, Any], seconds: float
) -> list[dict[str, Any]]:
    clock = Clock(device)
    row = {**asdict(case), "shape": case.shape}
    if case.graph and device.type != "cuda":
        return [{**row, "kind": "inference", "not_run": f"no graphs on {device.type}"}]
    results = []
    with tf32(case.dtype == "tf32"), cuda_kernels.forced(case.kernel):
        sides = Sides(case, device, clock)
        difference = sides.difference()
        row["planned"] = planned(case, device)
        kinds = ["inference"] if case.graph else ["inference", "training"]
        # Beside eager times, which launches may bound, those of a graph.
        if device.type == "cuda" and not case.graph and not case.packed:
            kinds.append("replay")
        for kind in kinds:
            make = sides.replay if case.graph else getattr(sides, kind)
            *samples, calls = compare(clock, make("torch"), make("ours"), seconds)
            result = {
                **row,
                "kind": kind,
                "rows": sides.rows,
                "largest_difference": difference,
                "agree": difference < AGREEMENT[case.dtype],
                "repeats": len(samples[0]),
                "calls_per_repeat": calls,
                "floor_ms": floor_ms(case, kind, sides.rows, ceilings),
            }
            for side, of_side in zip(("torch", "ours"), samples, strict=True):
                timing = records.side(of_side)
                timing["us_per_step"] = 1e3 * timing["median"] / case.steps
                timing["share_of_floor"] = result["floor_ms"] / timing["median"]
                if kind == "training":
                    timing["forward"], timing["backward"] = halves(clock, make(side))
                    timing["peak_bytes"] = sides.peak_memory(side)
                result[side] = timing
            result["ratio"] = result["torch"]["median"] / result["ours"]["median"]
            results.append(result)
    return results


# ---- the facts


def nvidia_smi() -> dict[str, str] | None:
    if shutil.which("nvidia-smi") is None:
        return None
    fields = [
        "driver_version",
        "clocks.sm",
        "clocks.max.sm",
        "power.limit",
        "temperature.gpu",
        "utilization.gpu",
    ]
    try:
        run = subprocess.run(
            ["nvidia-smi", "-i", "0", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=30, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(fields, (value.strip() for value in run.stdout.strip().split(",")), strict=False))


def facts(device: torch.device) -> dict[str, Any]:
    result: dict[str, Any] = harness.facts()
    result |= {
        "device": device.type,
        "torch_cuda": torch.version.cuda,
        "lstm_ext_cuda": getattr(loader.status(), "cuda", None),
        "git_commit": result["git_commit"] or os.environ.get("LSTM_EXT_COMMIT"),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        result |= {
            "card": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "cudnn": torch.backends.cudnn.version(),
            "cuda_of_driver": torch._C._cuda_getDriverVersion(),
            "nvidia_smi": nvidia_smi(),
        }
    return result


# ---- as a program


def line(result: dict[str, Any]) -> str:
    name = f"{result['group']:<10} {result['shape']:<26} {result['dtype']:<9} {result['kind']:<9}"
    name += " graph" if result["graph"] else "      "
    name += f" {result['kernel']:<10}"
    if "ratio" not in result:
        return f"{name}  {result.get('not_run') or result.get('error')}"
    theirs, ours = (
        f"{result[s]['us_per_step']:9.2f} µs a step, {100 * result[s]['share_of_floor']:5.1f} %"
        for s in ("torch", "ours")
    )
    warning = (
        ""
        if result["agree"]
        else f"  the two differ by {result['largest_difference']:.1e} of the largest value"
    )
    return f"{name}  {theirs}  {ours}  {result['ratio']:6.2f}x{warning}"


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = harness.parser_of(__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a trial: tiny shapes, few repeats")
    parser.add_argument("--budget", type=float, default=300.0, help="seconds for everything (300)")
    parser.add_argument(
        "--only", nargs="+", metavar="GROUP", choices=sorted({c.group for c in gpu_shapes.CASES})
    )
    parser.add_argument("--dtypes", nargs="+", metavar="NAME", choices=gpu_shapes.DTYPES)
    parser.add_argument("--output", type=Path, default=RESULTS / "local_gpu.json")
    parser.add_argument(
        "--facts", action="store_true", help="print the facts of the machine as JSON, and no more"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    start = time.monotonic()
    options = parse_options(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("error: there is no GPU that this torch can use", file=sys.stderr)
        return 1
    device = torch.device("cuda", 0) if options.device == "cuda" else torch.device("cpu")
    if options.facts:
        print(json.dumps(facts(device)))
        return 0
    record: dict[str, Any] = {"format": 1, "facts": facts(device), "complete": False}
    if device.type == "cuda" and not str(record["facts"]["lstm_ext_cuda"] or ""):
        print("warning: the extension has no CUDA kernels; these are figures of torch's own operator")
    for name, value in record["facts"].items():
        print(f"{name}: {value}")
    clock = Clock(device)
    ceilings = record["ceilings"] = measure_ceilings(clock, device, options.tiny)
    print(f"products: {', '.join(f'{k} {v / 1e12:.1f} TFLOP/s' for k, v in ceilings['flops'].items())}")
    print(f"copies: {ceilings['bytes_per_second'] / 1e9:.0f} GB/s\n", flush=True)

    cases = gpu_shapes.TINY if options.tiny else gpu_shapes.CASES
    cases = [c for c in cases if not options.only or c.group in options.only]
    cases = [c for c in cases if not options.dtypes or c.dtype in options.dtypes]
    results: list[dict[str, Any]] = []
    record |= {
        "results": results,
        "left_out": [],
        "settings": {"budget": options.budget, "tiny": options.tiny},
    }
    seconds = 0.01 if options.tiny else SECONDS_PER_TIMING
    for i, case in enumerate(cases):
        if time.monotonic() - start > options.budget:
            record["left_out"] = [c.key for c in cases[i:]]
            print(f"the budget is spent; left out: {len(cases) - i} of {len(cases)} cases")
            break
        try:
            found = measure(case, device, ceilings, seconds)
        except Exception as error:  # one case, of which the file then says why it is missing
            found = [{**asdict(case), "shape": case.shape, "kind": "inference",
                      "error": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"[:500]}]  # fmt: skip
        if device.type == "cuda":
            torch.cuda.empty_cache()
        results.extend(found)
        for result in found:
            print(line(result), flush=True)
        harness.write(options.output, record)
    record["complete"] = not record["left_out"]
    record["seconds"] = round(time.monotonic() - start, 1)
    harness.write(options.output, record)
    print(f"written to {options.output}")
    return 1 if any("error" in result for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
