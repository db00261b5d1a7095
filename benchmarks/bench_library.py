"""One step of the C library beside other ways to a step in a program without Python: the group `library` of bench.py.

Each side takes many steps in a row, each of which is timed alone: in real time the slowest of many counts.
The sides of C run in C; those of Python in a loop in Python, whose calls take part of their time. ONNX Runtime has its
inputs and outputs bound: its wheel has no header of its C interface.
"""

from __future__ import annotations

import ctypes
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import harness
import peers
import records
import torch
from harness import Shape
from records import Result
from torch import Tensor, nn

import lstm_ext
from lstm_ext import native_library
from lstm_ext.native import config

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "bench_library"
SOURCE = Path(__file__).with_name("library_loops.c")
BLOCK_SECONDS = 0.02  # of steps in a row
# Takes so many steps in a row and returns the seconds of each.
Steps = Callable[[int], list[float]]


def built() -> ctypes.CDLL:
    """The loops in C and the library that they are linked with, built where the sources have changed."""
    flags = ["-std=c11", "-O3", "-march=native", "-ffast-math", "-fPIC", "-shared"]
    what = [*config.C_LIBRARY_FLAGS, *flags, *(os.environ.get(name, "") for name in ("CXX", "CXXFLAGS"))]
    texts = [path.read_text() for path in (SOURCE, Path(native_library.__file__))]
    prefix = BUILD / config.digest(ROOT / "csrc", config.processor(), *what, *texts)
    library = prefix / "loops.so"
    if not library.exists():
        print("building the C library: a minute")
        with mock.patch.dict(os.environ, LSTM_EXT_CPU_SETS="native"):
            native_library.build(prefix)
        flags.append(f"-I{prefix}/include")
        links = [f"-L{prefix}/lib", "-llstm_ext", f"-Wl,-rpath,{prefix}/lib", "-lm"]
        unfinished = library.with_suffix(f".{os.getpid()}")
        subprocess.run(["cc", *flags, str(SOURCE), "-o", str(unfinished), *links], check=True)
        unfinished.replace(library)
    return ctypes.CDLL(str(library))


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


class LibrarySteps:
    """A stream of the library, of a layer with so rounded weights."""

    def __init__(
        self, loops: ctypes.CDLL, layer: nn.Module, shape: Shape, weights: torch.dtype | None
    ) -> None:
        self.steps = loops.library_steps
        self.steps.restype = ctypes.c_char_p
        self.x = harness.input_of(shape)[0].contiguous()
        self.y = torch.empty(shape.batch, shape.hidden_size)
        self.model, self.stream = ctypes.c_void_p(), ctypes.c_void_p()
        setup = (ctypes.c_int64 * 3)(shape.batch, 1, 1)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "weights"
            lstm_ext.freeze(layer, weights).save_native(path)
            for function, *arguments in (
                (loops.lstm_ext_model_load, os.fsencode(path), ctypes.byref(self.model)),
                (loops.lstm_ext_stream_create, self.model, setup, ctypes.byref(self.stream)),
            ):
                function.restype = ctypes.c_char_p
                raise_error(function(*arguments))

    def __call__(self, count: int) -> list[float]:
        seconds = (ctypes.c_double * count)()
        raise_error(self.steps(self.stream, pointer(self.x), pointer(self.y), ctypes.c_long(count), seconds))
        return list(seconds)


def raise_error(error: bytes | None) -> None:
    if error is not None:
        raise RuntimeError(error.decode())


class PlainSteps:
    """The loop of library_loops.c."""

    def __init__(self, loops: ctypes.CDLL, layer: nn.LSTM, shape: Shape) -> None:
        self.steps, size = loops.plain_steps, shape.hidden_size
        bias = (layer.bias_ih_l0 + layer.bias_hh_l0).detach()
        self.weights = layer.weight_ih_l0.detach(), layer.weight_hh_l0.detach(), bias
        self.x = harness.input_of(shape)[0].contiguous()
        self.h, self.c, self.gates = torch.zeros(size), torch.zeros(size), torch.empty(4 * size)
        self.sizes = ctypes.c_long(shape.input_size), ctypes.c_long(size)

    def __call__(self, count: int) -> list[float]:
        seconds = (ctypes.c_double * count)()
        data = [pointer(t) for t in (*self.weights, self.x, self.h, self.c, self.gates)]
        self.steps(*self.sizes, *data, ctypes.c_long(count), seconds)
        return list(seconds)


def in_python(call: Callable[[], object]) -> Steps:
    def steps(count: int) -> list[float]:
        seconds = []
        for _ in range(count):
            begin = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - begin)
        return seconds

    return steps


def onnxruntime_steps(layer: nn.LSTM, shape: Shape) -> Steps:
    """With everything bound once; each step reads the states that the one before has written."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        peers.onnx_model(layer, shape, True), options, providers=["CPUExecutionProvider"]
    )
    value = onnxruntime.OrtValue.ortvalue_from_numpy
    inputs = {name: value(array) for name, array in peers._inputs(shape, True).items()}
    binding = session.io_binding()
    for name, bound in inputs.items():
        binding.bind_ortvalue_input(name, bound)
    binding.bind_ortvalue_output("y", value(torch.empty(1, shape.batch, shape.hidden_size).numpy()))
    binding.bind_ortvalue_output("h1", inputs["h0"])
    binding.bind_ortvalue_output("c1", inputs["c0"])
    return in_python(lambda: session.run_with_iobinding(binding))


def sides(shape: Shape) -> dict[str, Steps]:
    loops = built()
    theirs, ours = harness.make_layers(shape)
    found: dict[str, Steps] = {
        "torch": in_python(harness.step_call(theirs, shape, "call")),
        "frozen": in_python(harness.step_call(lstm_ext.freeze(ours), shape, "step")),
        "library": LibrarySteps(loops, ours, shape, None),
        "library-bfloat16": LibrarySteps(loops, ours, shape, torch.bfloat16),
        "library-int8": LibrarySteps(loops, ours, shape, torch.int8),
        "c-loop": PlainSteps(loops, theirs, shape),
    }
    if peers.PEERS["onnxruntime"].missing() is None:
        found["onnxruntime"] = onnxruntime_steps(theirs, shape)
    return found


def measure(shape: Shape, budget: float) -> Result:
    """Blocks of steps, the sides in turn, for so many seconds: microseconds of a step, and their 99.9th percentile."""
    with torch.inference_mode():
        calls = sides(shape)
        lengths = {
            name: max(10, int(BLOCK_SECONDS / statistics.median(steps(20)))) for name, steps in calls.items()
        }
        found: dict[str, list[float]] = {name: [] for name in calls}
        turns = max(2, int(budget / (BLOCK_SECONDS * len(calls))))
        for turn in range(turns):
            for name in harness.order_of(list(calls), turn):
                # The first step of a block finds the caches as another side has left them.
                found[name] += calls[name](lengths[name] + 1)[1:]
    result: Result = {"unit": "us", "sides": {}, "high": {}, "count": {}}
    for name, seconds in found.items():
        ordered = sorted(seconds)
        side = records.side(seconds, 1e6)
        # Tens of thousands of samples: their distribution in a hundred.
        side["samples"] = [harness.rounded(1e6 * ordered[len(ordered) * i // 100]) for i in range(100)]
        result["sides"][name] = side
        result["high"][name] = harness.rounded(1e6 * ordered[len(ordered) * 999 // 1000])
        result["count"][name] = len(ordered)
    return result
