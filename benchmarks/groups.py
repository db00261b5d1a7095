"""The groups of the suite: which cases each has, and what it measures of one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import bench_contract
import bench_library
import bench_options
import harness
import peers
import records
import sides
import starts
import torch
from harness import call_of, input_of
from machine import Machine
from records import Result
from shapes import BUSY, CELLS, MEMORY, ROLLOUTS, SHAPES, STREAMS, SWEEPS, TASKS, USERS, Shape

import lstm_ext

LEAST, MOST = 5, 60  # turns of a case
# For sides with threads of their own. Those of torch spin for some milliseconds after a call.
PAUSE = 0.005
PROCESS = "process"  # the one case of the imports
# One step of a frozen layer: this, and so many times the time in which its weights can be read.
STEP_MICROSECONDS, STEP_READS = 8.0, 1.25
EVERY = {**SHAPES, **TASKS, **USERS, **SWEEPS["T"], **SWEEPS["B"], **SWEEPS["H"]}


@dataclass(frozen=True)
class Case:
    group: str
    name: str
    shape: Shape | None
    dtype: str
    threads: int
    training: bool


@dataclass
class Settings:
    budget: float  # seconds of a case
    repeats: int  # of child processes
    machine: Machine = field(default_factory=Machine)


@dataclass(frozen=True)
class Group:
    about: str
    shapes: dict[str, Shape | None]
    measure: Callable[[Case, Settings], Result]
    quick: tuple[str, ...]
    kinds: tuple[bool, ...] = (False, True)  # of training
    without_gradients: tuple[str, ...] = ()  # shapes
    dtypes: tuple[str, ...] = ("float32",)
    threads_matter: bool = True

    def cases(self, name: str, threads: list[int], dtypes: list[str]) -> list[Case]:
        return [
            Case(name, shape_name, shape, dtype, number, training)
            for shape_name, shape in self.shapes.items()
            for dtype in self.dtypes
            for number in (threads if self.threads_matter else threads[:1])
            for training in self.kinds
            if dtype in dtypes and not (training and shape_name in self.without_gradients)
        ]


def timed(calls: sides.Sides, settings: Settings, alike: tuple[str, ...] = (), pause: float = 0.0) -> Result:
    """All sides in turn; and how far the results of those that are `alike` are from torch's."""
    differences = {
        name: harness.rounded(harness.largest_difference(calls["torch"], calls[name]))
        for name in alike
        if name in calls
    }
    found = harness.interleave(calls, settings.budget, LEAST, MOST, pause)
    return {
        "unit": "ms",
        "calls": found.calls,
        "sides": {name: records.side(samples, 1e3) for name, samples in found.seconds.items()},
        "differences": differences,
    }


def with_peers(
    case: Case,
    calls: sides.Sides,
    settings: Settings,
    names: tuple[str, ...] = peers.FLOAT_PEERS,
    state: bool = False,
) -> Result:
    theirs, _ = harness.make_layers(case.shape)
    made, refused = peers.calls(theirs, case.shape, case.threads, names, state)
    calls = calls | made
    alike = tuple([name for name in calls if name != "torch"])
    result = timed(calls, settings, alike, PAUSE if made and case.threads > 1 else 0.0)
    if refused:
        result["refused"] = refused
    if state:  # without one, the recurrent weights are not read
        result["bounds"] = bounds(case, calls, settings.machine)
    return result


def bounds(case: Case, calls: sides.Sides, machine: Machine) -> Result:
    """Of one step of each frozen side: what it may take by the bandwidth of a buffer as large as its weights.

    Such a buffer is read again and again; so is the layer here, since other sides would take its weights out of the
    caches.
    """
    shape, found = case.shape, {}
    seconds = harness.alone({name: calls[name] for name in sides.FROZEN})
    for name, weights in sides.FROZEN.items():
        numbers = 4 * shape.hidden_size * (shape.input_size + shape.hidden_size)
        size = numbers * (weights or torch.float32).itemsize
        speed = machine.bandwidth(size, case.threads)
        bound = STEP_MICROSECONDS + STEP_READS * size / speed / 1e3
        took = 1e6 * seconds[name]
        found[name] = {
            "weight_bytes": size,
            "gigabytes_per_second": harness.rounded(speed),
            "bound_us": harness.rounded(bound),
            "alone_us": harness.rounded(took),
            "met": took <= bound,
        }
    return found


def medians(result: Result) -> dict[str, float]:
    return {name: side["median"] for name, side in result["sides"].items()}


# ---- what the groups measure


def inference(case: Case, settings: Settings) -> Result:
    theirs, ours = harness.make_layers(case.shape)
    layers = {"torch": theirs, "ours": ours, "frozen": lstm_ext.freeze(ours)}
    x = input_of(case.shape)
    return with_peers(case, {name: call_of(layer, x, False) for name, layer in layers.items()}, settings)


def frozen(case: Case, settings: Settings) -> Result:
    return with_peers(case, sides.frozen(case.shape), settings, tuple(peers.PEERS))


def training(case: Case, settings: Settings) -> Result:
    theirs, ours = harness.make_layers(case.shape)
    x = input_of(case.shape)
    calls = {"torch": call_of(theirs, x, True), "ours": call_of(ours, x.clone(), True)}
    return timed(calls, settings, ("ours",))


def step(case: Case, settings: Settings) -> Result:
    if case.name in CELLS:
        return timed(sides.cell(case.shape, case.training), settings, ("ours",))
    calls = sides.step(case.shape)
    with torch.inference_mode():
        return with_peers(case, calls, settings, state=True)


def ragged(case: Case, settings: Settings) -> Result:
    calls, share = sides.packed(case.shape, case.training)
    _, ours = harness.make_layers(case.shape)
    with_lengths = bench_options.Called(ours, lengths=sides.lengths_of(case.shape))
    calls["lengths"] = call_of(with_lengths, input_of(case.shape), case.training)
    result = timed(calls, settings, ("ours",))
    middle = medians(result)
    cost = {name: harness.rounded(middle[name] / middle["padded"] / share) for name in ("ours", "lengths")}
    return result | {"share_of_rows": harness.rounded(share), "time_of_a_row_over_padded": cost}


def resets(case: Case, settings: Settings) -> Result:
    return timed(sides.rollout(case.shape, case.training), settings, ("ours", "resets"))


def extras(case: Case, settings: Settings) -> Result:
    """Each option beside the layer without one. None are compared with torch: most draw random masks."""
    theirs, ours = harness.make_layers(case.shape)
    layers = {"torch": theirs, "ours": ours}
    for name in (*bench_options.OPTIONS, *bench_options.CALLS):
        if case.training or "recompute" not in name:  # without gradients there is nothing to compute again
            layers[name], _ = bench_options.with_and_without(name, case.shape)
    x = input_of(case.shape)
    calls = {name: call_of(layer.train(), x.clone(), case.training) for name, layer in layers.items()}
    result = timed(calls, settings)
    middle = medians(result)
    cost = {
        name: harness.rounded(value / middle["layer_norm" if name == "layer_norm, recompute" else "ours"])
        for name, value in middle.items()
        if name not in ("torch", "ours")
    }
    return result | {"cost": cost}


def dtypes(case: Case, settings: Settings) -> Result:
    calls = sides.low_precision(case.shape, case.training, getattr(torch, case.dtype))
    return timed(calls, settings, ("ours",))


def memory(case: Case, settings: Settings) -> Result:
    """The peak of a training step, beyond weights, input and the output's gradient."""
    kinds: dict[str, tuple[str, dict[str, object]]] = {
        "torch": ("torch", {}),
        "ours": ("ours", {}),
        "recompute": ("ours", {"recompute": True}),
    }

    def run(name: str) -> float:
        kind, options = kinds[name]
        return harness.peak_memory(kind, case.shape, case.threads, options)

    found = in_turn(list(kinds), run, settings.repeats)
    return {"unit": "bytes", "sides": {name: records.side(values) for name, values in found.items()}}


def in_turn(names: list[str], run: Callable[[str], Any], repeats: int) -> dict[str, list[Any]]:
    """What `run` returns for each name, `repeats` times, in the order of `harness.interleave`."""
    found: dict[str, list[Any]] = {name: [] for name in names}
    for turn in range(repeats):
        for name in harness.order_of(names, turn):
            found[name].append(run(name))
    return found


def busy(case: Case, settings: Settings) -> Result:
    """Both sides in turn, beside no, one and two programs that keep one core busy."""
    found = bench_contract.beside_neighbours(
        case.shape, case.training, settings.budget / 2, bench_contract.LASTING, seconds=0.1
    )
    measured = {
        name if kind == "0" else f"{name} beside {kind}": records.side(samples, 1e3)
        for kind, beside in found.items()
        for name, samples in beside.items()
    }
    middle = {
        kind: {name: records.side(samples)["median"] for name, samples in beside.items()}
        for kind, beside in found.items()
    }
    slower = {name: harness.rounded(value) for name, value in bench_contract.slowdowns(middle).items()}
    return {"unit": "ms", "sides": measured, "slowdowns": slower}


def _kinds_of_start() -> list[str]:
    there = [name for name in peers.FLOAT_PEERS if peers.PEERS[name].missing() is None]
    return ["torch", "ours", "frozen", *there]


def first_call(case: Case, settings: Settings) -> Result:
    found = in_turn(
        _kinds_of_start(), lambda kind: starts.start(kind, case.threads, case.shape), settings.repeats
    )
    result: Result = {"unit": "ms"}
    for part, place in (("first", "sides"), ("make", "make"), ("second", "second_call")):
        result[place] = {name: records.side([t[part] for t in times], 1e3) for name, times in found.items()}
    return result


def imports(case: Case, settings: Settings) -> Result:
    names = [name for name in _kinds_of_start() if name != "frozen"]
    found = in_turn(names, lambda kind: starts.start(kind, case.threads)["import"], settings.repeats)
    # Not "torch": what comes after it is no rival of it.
    titles = {name: "torch alone" if name == "torch" else f"{name} after torch" for name in names}
    return {
        "unit": "ms",
        "sides": {titles[name]: records.side(times, 1e3) for name, times in found.items()},
    }


def library(case: Case, settings: Settings) -> Result:
    torch.set_num_threads(1)
    return bench_library.measure(case.shape, settings.budget)


SMALL = ("B1-T1-H128", "B1-T64-H128", "B10-T30-H10", "B32-T100-H64", "B32-T100-H128", "B64-T50-H256")
GROUPS: dict[str, Group] = {
    "inference": Group(
        "a call without gradients: torch, our layer as it is and frozen, ONNX Runtime, OpenVINO",
        EVERY,
        inference,
        (*SMALL, "B1-T100-H512", "over-T16", "over-B4", "over-H64", "both-B32-T40-H128"),
        kinds=(False,),
    ),
    "frozen": Group(
        "frozen layers with weights as they are, in bfloat16 and int8, and all peers",
        {**STREAMS, **TASKS},
        frozen,
        ("stream-H16", "stream-H128", "stream-H1024", "tagger"),
        kinds=(False,),
    ),
    "training": Group(
        "forward and backward with every gradient: torch and our layer",
        EVERY,
        training,
        (*SMALL, "B1-T100-H512", "over-T16", "over-B4", "over-H64", "both-B32-T40-H128"),
        kinds=(True,),
    ),
    "step": Group(
        "one step with carried state (call, step(), frozen and its bound, peers), and LSTMCell",
        {**STREAMS, **CELLS},
        step,
        ("stream-H16", "stream-H1024", "cell-B1-H64", "cell-B16-H256"),
        without_gradients=tuple(STREAMS),
    ),
    "ragged": Group(
        "sequences of 10 to 100 % of the steps: a PackedSequence, `lengths`, and padded data", TASKS, ragged, ("small",)
    ),
    "resets": Group(
        "a recurrent policy: a loop over the steps, and one call with `resets`", ROLLOUTS, resets, ("rollout-B8-H64",)
    ),
    "extras": Group(
        "each option beside the layer without one", TASKS, extras, ("small",)
    ),
    "dtypes": Group(
        "bfloat16, float16 and float64: torch, our layer, and ours in float32",
        {**TASKS, **{name: SHAPES[name] for name in ("B1-T1-H128", "B1-T64-H128", "B64-T50-H256")}},
        dtypes,
        ("small", "tagger"),
        dtypes=("bfloat16", "float16", "float64"),
    ),
    "memory": Group(
        "peak of a training step, each in a process of its own: torch, our layer, and with `recompute`",
        {name: SHAPES[name] for name in MEMORY},
        memory,
        ("B32-T100-H128", "B16-T128-H512"),
        kinds=(True,),
    ),
    "busy": Group(
        "torch and our layer beside no, one and two programs that keep one core busy",
        BUSY,
        busy,
        ("batch",),
    ),
    "library": Group(
        "one step on one thread: the C library and a plain loop, called from C; torch, a frozen layer, ONNX Runtime",
        {name: shape for name, shape in STREAMS.items() if shape.hidden_size <= 512},
        library,
        ("stream-H16", "stream-H128"),
        kinds=(False,),
        threads_matter=False,
    ),
    "first-call": Group(
        "the first call in a fresh process, and what goes before it",
        {name: {**SHAPES, **TASKS}[name] for name in ("B1-T1-H128", "tagger")},
        first_call,
        ("B1-T1-H128",),
        kinds=(False,),
    ),
    "import": Group(
        "the import: of torch, and of the others after it",
        {PROCESS: None},
        imports,
        (PROCESS,),
        kinds=(False,),
        threads_matter=False,
    ),
}  # fmt: skip
