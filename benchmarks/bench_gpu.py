"""lstm_ext.LSTM against torch.nn.LSTM, which is cuDNN's, on a GPU; `make gpu-bench` runs it.

    python benchmarks/bench_gpu.py [--budget SECONDS] [--only GROUP ...] [--dtypes NAME ...]
                                   [--audit] [--output results/NAME.json]
    python benchmarks/bench_gpu.py --device cpu --tiny         # a trial of the script, without meaning

The record is as that of bench.py. Both sides take turns, and a sample begins and ends with an idle GPU, so the time
that launches take is in it; short calls are timed several at once. Per shape and dtype: inference; a training step,
forward and backward with every gradient, its forward half, and the peak of memory; inference replayed from a CUDA
graph. gpu_shapes.py says what is measured and in which order; when the budget is spent, the rest is left out and
counted, and so is what has no room in the memory that is free. The file is rewritten after every case.

``--audit``: what a plain call takes by itself, beside each of our kernels and torch.nn.LSTM. With an empty cache
(XDG_CACHE_HOME) it chooses as in a user's first process.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu_shapes
import harness
import records
import torch
from gpu_shapes import Case
from records import Result
from sides import lengths_of
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from lstm_ext.call import cuda_choice
from lstm_ext.layer import cuda_kernels
from lstm_ext.native import loader
from lstm_ext.native.config import CUDA_KERNELS, TRIED_CUDA_KERNELS

RESULTS = Path(__file__).resolve().parent / "results"
LEAST, MOST = 5, 60  # turns of a case
SECONDS, TINY_SECONDS = 0.4, 0.01  # of each kind of a case
# Of the largest value. A warning, no verdict: what is right is for the test suite to say.
AGREEMENT = {"float16": 0.02, "bfloat16": 0.1, "float32": 1e-3, "tf32": 0.02}


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """For cuDNN's RNNs and ours."""
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


# ---- the two sides


class Sides:
    """torch.nn.LSTM and lstm_ext.LSTM with the same weights and the same random input."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        layers = [layer.to(device, case.torch_dtype) for layer in harness.make_layers(case.shape)]
        self.layers = dict(zip(("torch", "ours"), layers, strict=True))
        self.x: Any = harness.input_of(case.shape).to(device, case.torch_dtype)
        if case.packed:
            self.x = pack_padded_sequence(self.x, lengths_of(case.shape), enforce_sorted=False)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def calls(self, training: bool) -> dict[str, Callable[[], object]]:
        """Of a training step also the forward half."""
        found = {}
        for name, layer in self.layers.items():
            layer.train(training)  # cuDNN keeps what backward needs in training, also without gradients
            found[name] = harness.call_of(layer, self.x, training)
            if training:
                found[f"{name} forward"] = self.forward(layer)
        return found

    def forward(self, layer: nn.Module) -> Callable[[], object]:
        data = self.x.data if self.case.packed else self.x
        leaf = data.detach().clone().requires_grad_()
        x = PackedSequence(leaf, *self.x[1:]) if self.case.packed else leaf
        return lambda: layer(x)[0]

    def replays(self) -> dict[str, Callable[[], object]]:
        """A call without gradients, captured in a CUDA graph."""
        found = {}
        for name, call in self.calls(training=False).items():
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    call()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                call()
            found[name] = graph.replay
        return found

    def peak_memory(self, call: Callable[[], object]) -> int | None:
        """Bytes that a training step needs beyond weights, input and the output's gradient."""
        if self.device.type != "cuda":
            return None
        for layer in self.layers.values():
            layer.zero_grad(set_to_none=True)
        self.wait()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        self.wait()
        return torch.cuda.max_memory_allocated() - before


def planned(case: Case, device: torch.device) -> list[str] | None:
    """Which kernels compute a layer of it, forward and backward: not always those that are asked for."""
    extension = loader.extension()
    if device.type != "cuda" or extension is None or not extension.build_info()["cuda"]:
        return None
    dtype = case.torch_dtype
    tried = {
        f"{kernel}_outcome": cuda_kernels.outcome(device, kernel, dtype) for kernel in TRIED_CUDA_KERNELS
    }
    sizes = {name: getattr(case, name) for name in ("steps", "batch", "input_size", "hidden_size", "packed")}
    plans = [
        extension.cuda_plan(
            device=extension.cuda_facts(device.index), **sizes, directions=case.shape.directions,
            dtype=str(dtype).removeprefix("torch."), tf32=case.dtype == "tf32", backward=backward,
            kernel=case.kernel, **tried,
        )
        for backward in (False, True)
    ]  # fmt: skip
    return [plan["problem"] or plan["kernel"] for plan in plans]


def measure(case: Case, device: torch.device, seconds: float) -> list[Result]:
    """A result for each kind: inference, a training step, and inference from a graph."""
    if case.graph and device.type != "cuda":
        return []
    kinds = ["graph"] if case.graph else ["inference", "training"]
    # Beside eager times, which launches may bound, those of a graph.
    if device.type == "cuda" and not case.graph and not case.packed:
        kinds.append("graph")
    results = []
    with tf32(case.dtype == "tf32"), cuda_kernels.forced(case.kernel):
        sides = Sides(case, device)
        for kind in kinds:
            calls = sides.replays() if kind == "graph" else sides.calls(kind == "training")
            compared = calls if kind != "graph" else sides.calls(training=False)
            difference = harness.largest_difference(compared["torch"], compared["ours"])
            found = harness.interleave(calls, seconds, LEAST, MOST, end=sides.wait)
            result = case.head(kind) | {
                "planned": planned(case, device),
                "calls": found.calls,
                "unit": "ms",
                "differences": {"ours": difference},
                "agree": difference < AGREEMENT[case.dtype],
                "sides": {name: records.side(samples, 1e3) for name, samples in found.seconds.items()},
            }
            if kind == "training":
                result["peak_bytes"] = {name: sides.peak_memory(calls[name]) for name in sides.layers}
            results.append(result)
    return results


def kernels_for(case: Case, device: torch.device) -> list[str]:
    """Those that compute such layers and have been right here; without a GPU all, for a trial."""

    def takes(kernel: str) -> bool:
        plans = planned(replace(case, kernel=kernel), device)
        return plans is None or (
            plans[0] == kernel and cuda_kernels.outcome(device, kernel, case.torch_dtype) is True
        )

    return [kernel for kernel in CUDA_KERNELS if takes(kernel)]


def forcing(kernel: str, call: Callable[[], object]) -> Callable[[], object]:
    def forced() -> object:
        with cuda_kernels.forced(kernel):
            return call()

    return forced


def audit(case: Case, device: torch.device, seconds: float) -> list[Result]:
    """For inference and for a training step: how much longer than the fastest way takes what `auto` chose."""
    results = []
    with tf32(case.dtype == "tf32"):
        sides = Sides(case, device)
        for kind in ("inference", "training"):
            calls = sides.calls(kind == "training")
            assert not cuda_kernels.is_forced(), "a kernel is requested, so `auto` has nothing to choose"
            before = set(cuda_choice.recorded(device))
            cuda_choice._spent = 0.0  # as if it were the first class of a process, whose time is limited
            calls["ours"]()
            new = [choice for key, choice in cuda_choice.recorded(device).items() if key not in before]
            chosen = [f"{c.kernel if c.ours else 'torch'}: {c}" for c in new]
            ways = {"auto": calls["ours"], "torch": calls["torch"]}
            ways |= {kernel: forcing(kernel, calls["ours"]) for kernel in kernels_for(case, device)}
            found = harness.interleave(ways, seconds, LEAST, MOST, end=sides.wait)
            result = case.head(kind) | {
                "chosen": chosen,
                "calls": found.calls,
                "unit": "ms",
                "sides": {name: records.side(samples, 1e3) for name, samples in found.seconds.items()},
            }
            results.append(result | compared({name: s["median"] for name, s in result["sides"].items()}))
    return results


def compared(medians: dict[str, float]) -> dict[str, Any]:
    others = {name: median for name, median in medians.items() if name != "auto"}
    fastest = min(others, key=lambda name: others[name])
    return {"fastest": fastest, "auto_to_fastest": medians["auto"] / others[fastest]}


# ---- the facts


def nvidia_smi(device: torch.device) -> dict[str, str] | None:
    """Of the card that torch has by this number: nvidia-smi counts those that CUDA_VISIBLE_DEVICES hides, too."""
    if shutil.which("nvidia-smi") is None:
        return None
    fields = [
        "driver_version",
        "clocks.sm",
        "clocks.max.sm",
        "power.limit",
        "temperature.gpu",
        "utilization.gpu",
        "compute_mode",
    ]
    card = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    try:
        run = subprocess.run(
            ["nvidia-smi", "-i", card, f"--query-gpu={','.join(fields)}", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=30, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(fields, (value.strip() for value in run.stdout.strip().split(",")), strict=False))


def free_bytes(device: torch.device) -> float:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else float("inf")


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
            "free_bytes": free_bytes(device),
            "nvidia_smi": nvidia_smi(device),
        }
    return result


# ---- as a program


def line_of(result: Result) -> str:
    name = f"{result['group']:<10} {result['case']:<42} {result['dtype']:<9} {result['kind']:<9}"
    if "error" in result:
        return f"{name}  {result['error']}"
    if "auto_to_fastest" in result:
        times = ", ".join(f"{side} {times['median']:.3f}" for side, times in result["sides"].items())
        return f"{name}  {times} ms; {'; '.join(result['chosen']) or 'nothing was measured'}"
    theirs, ours = (1e3 * result["sides"][s]["median"] / result["steps"] for s in ("torch", "ours"))
    doubt = (
        ""
        if result["agree"]
        else f"  the two differ by {result['differences']['ours']:.1e} of the largest value"
    )
    return f"{name}  {theirs:9.2f} -> {ours:9.2f} µs a step {records.ratio(result, 'ours'):6.2f}x{doubt}"


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = harness.parser_of(__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a trial: tiny shapes, few repeats")
    parser.add_argument(
        "--audit", action="store_true", help="what `auto` takes, beside each kernel and torch's layer"
    )
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
    settings = {"budget": options.budget, "tiny": options.tiny}
    record: Result = {"suite": records.SUITE, "format": records.FORMAT, "facts": facts(device), "settings": settings,
                      "left_out": [], "too_large": [], "results": []}  # fmt: skip
    if device.type == "cuda" and not str(record["facts"]["lstm_ext_cuda"] or ""):
        print("warning: the extension has no CUDA kernels; these are figures of torch's own operator")
    for name, value in record["facts"].items():
        print(f"{name}: {value}", flush=True)
    cases = gpu_shapes.TINY if options.tiny else gpu_shapes.CASES
    if options.audit:
        cases = gpu_shapes.TINY_AUDIT if options.tiny else gpu_shapes.AUDIT
    cases = [c for c in cases if not options.only or c.group in options.only]
    cases = [c for c in cases if not options.dtypes or c.dtype in options.dtypes]
    for i, case in enumerate(cases):
        if time.monotonic() - start > options.budget:
            record["left_out"] = [f"{c.group} {c.name} {c.dtype}" for c in cases[i:]]
            print(f"the budget is spent; left out: {len(cases) - i} of {len(cases)} cases")
            break
        name = f"{case.group} {case.name} {case.dtype}"
        if case.bytes_needed > free_bytes(device):
            record["too_large"].append(name)
            continue
        try:
            run = audit if options.audit else measure
            found = run(case, device, TINY_SECONDS if options.tiny else SECONDS)
        except torch.OutOfMemoryError:
            record["too_large"].append(name)
            found = []
        except Exception as error:  # one case, of which the file then says why it is missing
            said = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"[:500]
            found = [case.head("inference") | {"sides": {}, "error": said}]
        if device.type == "cuda":
            torch.cuda.empty_cache()
        record["results"] += found
        for result in found:
            print(line_of(result), flush=True)
        harness.write(options.output, record)
    if record["too_large"]:
        print(f"too large for the memory that is free: {', '.join(record['too_large'])}")
    record["seconds"] = round(time.monotonic() - start, 1)
    harness.write(options.output, record)
    print(f"written to {options.output}")
    return 1 if any("error" in result for result in record["results"]) else 0


if __name__ == "__main__":
    sys.exit(main())
