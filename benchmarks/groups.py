"""The groups of the suite: which cases each has, and what it measures of one."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import bench_library
import harness
import neighbours
import peers
import records
import shapes
import sides
import starts
import torch
from harness import call_of, input_of
from machine import Machine
from neighbours import IN_BURSTS, LASTING, Neighbour
from records import Result
from shapes import Shape

import lstm_ext
from lstm_ext.layer import route
from lstm_ext.native import loader

LEAST, MOST = 5, 60  # turns of a case
# For sides with threads of their own. Those of torch spin for some milliseconds after a call.
PAUSE = 0.005
PROCESS = "process"  # the one case of the imports
# One step of a frozen layer: this, and so many times the time in which its weights can be read.
STEP_MICROSECONDS, STEP_READS = 8.0, 1.25
EPISODES = 0.025  # share of the steps of `torchrl` that begin one
EVERY = {
    **shapes.SHAPES,
    **shapes.TASKS,
    **shapes.USERS,
    **shapes.SWEEPS["T"],
    **shapes.SWEEPS["B"],
    **shapes.SWEEPS["H"],
}


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
    pair: bool = False  # torch and our layer only
    machine: Machine = field(default_factory=Machine)


@dataclass(frozen=True)
class Group:
    about: str
    shapes: dict[str, Shape | None]
    measure: Callable[[Case, Settings], Result]
    quick: tuple[str, ...] = ()  # all shapes where there are none
    kinds: tuple[bool, ...] = (False, True)  # of training
    without_gradients: tuple[str, ...] = ()  # shapes
    dtypes: tuple[str, ...] = ("float32",)
    threads_matter: bool = True
    usual: bool = True  # else only where it is named

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
    most = harness.MAX_REPEATS if settings.pair else MOST
    found = harness.interleave(calls, settings.budget, LEAST, most, pause)
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
        numbers = shape.gates * shape.hidden_size * (shape.input_size + shape.hidden_size)
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
    x = input_of(case.shape)
    calls = {"torch": call_of(theirs, x, False), "ours": call_of(ours, x, False)}
    if settings.pair:
        return timed(calls, settings, ("ours",))
    return with_peers(case, calls | {"frozen": call_of(lstm_ext.freeze(ours), x, False)}, settings)


def frozen(case: Case, settings: Settings) -> Result:
    return with_peers(case, sides.frozen(case.shape), settings, tuple(peers.PEERS))


def frozen_alone(case: Case, settings: Settings) -> Result:
    """Each side finds its weights where its last call left them, since no other side has run in between."""
    samples = max(harness.MIN_REPEATS, round(3 * settings.budget))
    seconds = harness.alone(sides.frozen(case.shape), samples, rest=0.02)
    return {"unit": "ms", "sides": {name: records.side([value], 1e3) for name, value in seconds.items()}}


def training(case: Case, settings: Settings) -> Result:
    theirs, ours = harness.make_layers(case.shape)
    x = input_of(case.shape)
    calls = {"torch": call_of(theirs, x, True), "ours": call_of(ours, x.clone(), True)}
    return timed(calls, settings, ("ours",))


def step(case: Case, settings: Settings) -> Result:
    if case.name in shapes.CELLS:
        calls = sides.cell(case.shape, case.training, getattr(torch, case.dtype))
        return timed(calls, settings, ("ours",))
    calls = sides.step(case.shape)
    with torch.inference_mode():
        if settings.pair:
            calls = {name: calls[name] for name in ("torch", "ours", "step")}
            return timed(calls, settings, ("ours", "step"))
        return with_peers(case, calls, settings, state=True)


def gru(case: Case, settings: Settings) -> Result:
    if case.name in shapes.STREAMS or case.name in shapes.CELLS:
        return step(case, settings)
    return (training if case.training else inference)(case, settings)


def ragged(case: Case, settings: Settings) -> Result:
    calls, share = sides.packed(case.shape, case.training)
    _, ours = harness.make_layers(case.shape)
    with_lengths = sides.Called(ours, lengths=sides.lengths_of(case.shape))
    calls["lengths"] = call_of(with_lengths, input_of(case.shape), case.training)
    result = timed(calls, settings, ("ours",))
    middle = medians(result)
    cost = {name: harness.rounded(middle[name] / middle["padded"] / share) for name in ("ours", "lengths")}
    return result | {"share_of_rows": harness.rounded(share), "time_of_a_row_over_padded": cost}


def resets(case: Case, settings: Settings) -> Result:
    return timed(sides.rollout(case.shape, case.training), settings, ("ours", "resets"))


def with_cost(result: Result, base: str, others: dict[str, str] | None = None) -> Result:
    """How many times the time of `base`, or of the one among `others`, each side but these takes."""
    middle, others = medians(result), others or {}
    names = [name for name in middle if name not in ("torch", base)]
    cost = {name: harness.rounded(middle[name] / middle[others.get(name, base)]) for name in names}
    return result | {"cost": cost}


def extras(case: Case, settings: Settings) -> Result:
    """Each option beside the layer without one. None are compared with torch: most draw random masks."""
    result = timed(sides.with_options(case.shape, case.training), settings)
    return with_cost(result, "ours", {"layer_norm, recompute": "layer_norm"})


def vmap(case: Case, settings: Settings) -> Result:
    return with_cost(timed(sides.vmap(case.shape, case.training), settings), "one call")


def callers(case: Case, settings: Settings) -> Result:
    return with_cost(timed(sides.callers(case.shape, case.training), settings), "one caller")


def overhead(case: Case, settings: Settings) -> Result:
    with torch.inference_mode():
        return timed(sides.overhead(case.shape), settings)


def fallback(case: Case, settings: Settings) -> Result:
    if loader.status().backend != "torch":
        raise SystemExit(f"{case.group}: expected the environment to have LSTM_EXT_BACKEND=torch")
    return timed(
        sides.without_kernels(case.shape, case.training, case.group.removeprefix("fallback-")), settings
    )


def torchrl(case: Case, settings: Settings) -> Result:
    calls, episodes = sides.torchrl(case.shape, case.training, EPISODES)
    return timed(calls, settings, ("ours", "pad")) | {"resets": EPISODES, "episodes": episodes}


def dtypes(case: Case, settings: Settings) -> Result:
    calls, shape = sides.low_precision(case.shape, case.training, getattr(torch, case.dtype)), case.shape
    if route.torch_is_faster(getattr(torch, case.dtype), shape.steps, shape.batch, shape.hidden_size):
        # Where our layer may be torch's operator, its row of the table stands on what the kernels would take.
        ours = calls["ours"]

        def kernels() -> object:
            with mock.patch.object(route, "TORCH_IS_FASTER", ()):
                return ours()

        calls["kernels"] = kernels
    return timed(calls, settings, ("ours",))


def peaks(case: Case, settings: Settings, kinds: dict[str, tuple[str, dict[str, object]]]) -> Result:
    """The peak of a training step, beyond weights, input and the output's gradient."""

    def run(name: str) -> float:
        kind, options = kinds[name]
        return harness.peak_memory(kind, case.shape, case.threads, options)

    found = in_turn(list(kinds), run, settings.repeats)
    return {"unit": "bytes", "sides": {name: records.side(values) for name, values in found.items()}}


def memory(case: Case, settings: Settings) -> Result:
    recompute = {} if settings.pair else {"recompute": ("ours", {"recompute": True})}
    return peaks(case, settings, {"torch": ("torch", {}), "ours": ("ours", {}), **recompute})


def saved(case: Case, settings: Settings) -> Result:
    """Beside the peak, what is saved for the backward pass beyond input, output and weights."""
    names = ("recompute", "layer_norm", "layer_norm, recompute")
    kinds = {"ours": {}} | {name: sides.OPTIONS[name] for name in names}
    return peaks(case, settings, {name: ("ours", options) for name, options in kinds.items()}) | {
        "saved": {
            name: sides.saved_bytes(sides.layer_of(case.shape, **options), case.shape)
            for name, options in kinds.items()
        }
    }


def in_turn(names: list[str], run: Callable[[str], Any], repeats: int) -> dict[str, list[Any]]:
    """What `run` returns for each name, `repeats` times, in the order of `harness.interleave`."""
    found: dict[str, list[Any]] = {name: [] for name in names}
    for turn in range(repeats):
        for name in harness.order_of(names, turn):
            found[name].append(run(name))
    return found


def busy(
    case: Case,
    settings: Settings,
    kinds: list[Neighbour] = LASTING,
    share: float = 0.5,
    seconds: float = 0.1,
    middle: Callable[[list[float]], float] = statistics.median,
) -> Result:
    """Both sides in turn, beside no, one and two programs that keep one core busy."""
    budget = share * settings.budget
    found = neighbours.beside(case.shape, case.training, budget, kinds, min(seconds, settings.budget))
    measured = {
        name if kind == "0" else f"{name} beside {kind}": records.side(samples, 1e3)
        for kind, beside in found.items()
        for name, samples in beside.items()
    }
    times = {
        kind: {name: middle(samples) for name, samples in beside.items()} for kind, beside in found.items()
    }
    return {"unit": "ms", "sides": measured, "slowdowns": neighbours.slowdowns(times)}


def bursts(case: Case, settings: Settings) -> Result:
    """A sample has so many seconds that it meets the bursts as often as they come."""
    return busy(case, settings, LASTING + IN_BURSTS, 0.25, 0.5, statistics.fmean)


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
SOME = (*SMALL, "B1-T100-H512", "over-T16", "over-B4", "over-H64", "both-B32-T40-H128")
DTYPES = {
    **shapes.TASKS,
    **{name: shapes.SHAPES[name] for name in ("B1-T1-H128", "B1-T64-H128", "B64-T50-H256")},
}
CALLED_FIRST = {name: {**shapes.SHAPES, **shapes.TASKS}[name] for name in ("B1-T1-H128", "tagger")}
BOUNDED = {name: shape for name, shape in shapes.STREAMS.items() if shape.hidden_size <= 512}
INFERENCE: Any = {"kinds": (False,)}
TRAINING: Any = {"kinds": (True,)}
ONE: Any = {"kinds": (False,), "threads_matter": False}
NAMED: Any = {"usual": False}
GROUPS: dict[str, Group] = {
    "inference": Group(
        "a call without gradients: torch, our layer as it is and frozen, ONNX Runtime, OpenVINO",
        EVERY, inference, SOME, **INFERENCE,
    ),
    "frozen": Group(
        "frozen layers with weights as they are, in bfloat16 and int8, and all peers",
        {**shapes.STREAMS, **shapes.TASKS}, frozen, ("stream-H16", "stream-H128", "stream-H1024", "tagger"),
        **INFERENCE,
    ),
    "training": Group(
        "forward and backward with every gradient: torch and our layer", EVERY, training, SOME, **TRAINING
    ),
    "step": Group(
        "one step with carried state (call, step(), frozen and its bound, peers), and LSTMCell",
        {**shapes.STREAMS, **shapes.CELLS}, step, ("stream-H16", "stream-H1024", "cell-B1-H64", "cell-B16-H256"),
        without_gradients=tuple(shapes.STREAMS),
    ),
    "ragged": Group(
        "sequences of 10 to 100 % of the steps: a PackedSequence, `lengths`, and padded data",
        shapes.TASKS, ragged, ("small",),
    ),
    "resets": Group(
        "a recurrent policy: a loop over the steps, and one call with `resets`",
        shapes.ROLLOUTS, resets, ("rollout-B8-H64",),
    ),
    "extras": Group("each option beside the layer without one", shapes.TASKS, extras, ("small",)),
    "dtypes": Group(
        "bfloat16, float16 and float64: torch, our layer, and ours in float32",
        DTYPES, dtypes, ("small", "tagger"), dtypes=("bfloat16", "float16", "float64"),
    ),
    "memory": Group(
        "peak of a training step, each in a process of its own: torch, our layer, and with `recompute`",
        {name: shapes.SHAPES[name] for name in shapes.MEMORY}, memory, ("B32-T100-H128", "B16-T128-H512"), **TRAINING,
    ),
    "busy": Group(
        "torch and our layer beside no, one and two programs that keep one core busy", shapes.BUSY, busy, ("batch",)
    ),
    "library": Group(
        "one step on one thread: the C library and a plain loop, called from C; torch, a frozen layer, ONNX Runtime",
        BOUNDED, library, ("stream-H16", "stream-H128"), **ONE,
    ),
    "first-call": Group(
        "the first call in a fresh process, and what goes before it",
        CALLED_FIRST, first_call, ("B1-T1-H128",), **INFERENCE,
    ),
    "import": Group("the import: of torch, and of the others after it", {PROCESS: None}, imports, (PROCESS,), **ONE),
    "frozen-alone": Group(
        "as `frozen`, each side for itself, and large layers",
        {**shapes.STREAMS, **shapes.TASKS, **shapes.FREEZE}, frozen_alone, **INFERENCE, **NAMED,
    ),
    "bursts": Group("as `busy`, beside programs that are busy in bursts too", shapes.BUSY, bursts, **NAMED),
    "cell-dtypes": Group(
        "LSTMCell in bfloat16 and float16", shapes.CELLS, step, dtypes=("bfloat16", "float16"), **NAMED
    ),
    "vmap": Group("torch.vmap over 8 inputs, and one call on a batch 8 times as large", shapes.TASKS, vmap, **NAMED),
    "callers": Group(
        "one and two Python threads that call one layer", shapes.TASKS, callers, threads_matter=False, **NAMED
    ),
    "saved": Group(
        "what `recompute` and `layer_norm` save for the backward pass, and the peak",
        shapes.TASKS, saved, **TRAINING, **NAMED,
    ),
    "gru": Group(
        "GRU and GRUCell: inference, training, one step, the cell",
        {name: shape._replace(gates=3) for name, shape in (EVERY | shapes.STREAMS | shapes.CELLS).items()},
        gru, without_gradients=tuple(shapes.STREAMS), **NAMED,
    ),
    "overhead": Group(
        "one step by the function of the kernel, LSTMCell, LSTM.step and torch.nn.LSTMCell",
        shapes.STEPS, overhead, **ONE, **NAMED,
    ),
    "torchrl": Group("TorchRL's LSTMModule, and that of examples/torchrl_lstm.py", shapes.POLICIES, torchrl, **NAMED),
    **{
        f"fallback-{way}": Group(f"without kernels, {way}: torch, our layer", shapes.FALLBACK, fallback, **NAMED)
        for way in sides.WAYS
    },
}  # fmt: skip
# `bench.py --pair` measures these cases, of torch and our layer only.
PAIR = {
    "inference": [*shapes.SHAPES],
    "training": [*shapes.SHAPES],
    "step": ["stream-H128"],
    "memory": shapes.MEMORY,
}
# `bench.py --usual-malloc`: the rows of the README.
USUAL_MALLOC = {
    "training": [*EVERY],
    "step": [*shapes.STREAMS],
    "ragged": [*shapes.TASKS],
    "resets": [*shapes.ROLLOUTS],
}
