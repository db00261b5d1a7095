"""Which way plain layers and cells of CUDA tensors take: torch's own operator, or the kernels, where they are faster.

The first eager call of a class of shapes measures both on the user's own card, on scratch tensors of few steps. The
choice is recorded for this device, driver and build, so that later processes do not measure. Where nothing can be
measured (a graph that is captured or compiled, distributed training, within a backward pass), the record decides, and
without one torch's operator computes. What a process did in its first eager call of a class, it does in all of them,
unless `tune` is called. Deterministic mode and LSTM_EXT_CUDA_KERNEL=torch ignore what was measured.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..layer import cuda_kernels, route
from ..layer.tracing import KERNEL_DTYPES, in_a_thread, is_exporting, is_plain_eager
from ..native import config, loader, selftest_record
from ..native.integrations import constant_for_dynamo
from .arguments import Stack
from .torch_operator import PlainStack
from .torch_operator import lstm as lstm_by_torch

# The steps of the scratch tensors, if a call has more. On an idle card few steps mostly time the host's launches, so
# that a longer call is extrapolated by what each further step takes.
STEPS = (16, 64)
WARM_UP = 0.02  # seconds before the first run that counts: clocks rise for a while
CLASS_LIMIT = 0.05  # seconds that count, for one class of shapes, all candidates together
PROCESS_LIMIT = 2.0  # seconds of measuring in one process; after that, torch's operator computes new classes
GAIN = 1.05  # how many times as fast the kernels must be
NOT_MEASURED = "the first eager call measures it and the kernels, and then the faster one computes"
_TORCH = "torch"
_KERNELS = ("stepwise", *config.TRIED_CUDA_KERNELS)
_FORM = {"ours": bool, "kernel": {*_KERNELS}, "us": {str: float | int}}  # in records


class ShapeClass(NamedTuple):
    """Calls that take the same way. Not the grad mode: a checkpoint's second forward pass has another one."""

    dtype: str
    tf32: bool  # products of float32 may be rounded to TF32
    hidden_size: int
    proj_size: int
    num_layers: int  # 0: an LSTMCell
    bidirectional: bool
    training: bool
    packed: bool
    batch: int  # rounded up to a power of two, as are the steps
    steps: int

    @property
    def key(self) -> str:
        """Its name in records."""
        words = [
            "tf32" if self.tf32 else self.dtype,
            f"H{self.hidden_size}",
            *([f"P{self.proj_size}"] if self.proj_size else []),
        ]
        words += [f"L{self.num_layers}", f"B{self.batch}", f"T{self.steps}"]
        names = ("bidirectional", "packed", "training")
        return " ".join([*words, *[name for name in names if getattr(self, name)]])

    @property
    def layer(self) -> dict[str, Any]:
        """One of its layers, as the planner's arguments."""
        return {
            "steps": self.steps,
            "batch": self.batch,
            "hidden_size": self.hidden_size,
            "directions": 2 if self.bidirectional else 1,
            "dtype": self.dtype,
            "tf32": self.tf32,
            "projected": self.proj_size > 0,
            "packed": self.packed,
        }


@dataclass(frozen=True)
class Choice:
    """The measurement: microseconds of a call of the class by each candidate, and the fastest of our kernels.

    In training a call is both passes, and one kernel computes both: no other pair was measured. A candidate that failed
    is not in ``us``.
    """

    ours: bool
    kernel: str
    us: dict[str, float]

    def __str__(self) -> str:
        times = ", ".join([f"{name} {us:.0f} us" for name, us in self.us.items()])
        return f"measured on this device: {times}"


Times = dict[str, float]  # microseconds of a call, in training of both passes, by candidate
_Measure = Callable[[], Times]
# None: torch's operator, and nothing was measured.
_fixed: dict[tuple[int | None, ShapeClass], Choice | None] = {}
# Whether torch's operator computes an eager call, by what the call has. Several entries have the same class.
_ways: dict[tuple[Any, ...], bool] = {}
WAYS_LIMIT = 10_000  # entries; then each is decided anew, from what its class has
_is_compiling = torch.compiler.is_compiling
_is_deterministic = torch._C._get_deterministic_algorithms
_fp32_precision = torch._C._get_fp32_precision_getter  # type: ignore[attr-defined]
_FLOAT32 = torch.float32
# The classes of shapes of the call that `tune` watches, each with its device and how to measure it.
_Seen = dict[tuple[int | None, ShapeClass], tuple[torch.device, _Measure]]
_seen: ContextVar[_Seen | None] = ContextVar("_seen", default=None)
_records: dict[int | None, dict[str, Choice]] = {}
_one_at_a_time = threading.Lock()
_spent = 0.0


def way(draws_masks: bool, measured: Callable[[], Choice | bool | None]) -> tuple[bool, str | Choice | bool]:
    """Whether our kernels compute a plain call on a device where they may run, else torch's operator; and why.

    Args:
        draws_masks: the call has dropout between its layers.
        measured: gives what was measured, or whether ours were faster; None if nothing was.
    """
    if cuda_kernels.is_forced():
        return True, "one of our kernels is requested"
    if draws_masks:
        return False, "it draws the masks of the dropout between layers"
    setting = _setting()
    if setting is not None:
        return False, setting
    found = measured()
    if found is None:
        return False, NOT_MEASURED
    return found if isinstance(found, bool) else found.ours, found


@constant_for_dynamo
def _setting() -> str | None:
    """Why torch's operator computes whatever was measured, or None. An export has our operator, which C++ can load.

    A change of the mode makes dynamo compile anew.
    """
    if is_exporting():
        return None
    if config.requested_cuda_kernel() == "torch":
        return "LSTM_EXT_CUDA_KERNEL=torch"
    return "in deterministic mode no measurement decides" if _is_deterministic() else None


def prefers_torch(
    stack: Stack,
    weights: Sequence[Sequence[Tensor]],
    x: Tensor,
    batch_sizes: Tensor | None,
    autocast: torch.dtype | None,
) -> bool:
    """Whether torch's operator computes a plain stack of CUDA tensors although there are kernels.

    Arguments are those of `run_stack`. After the first call of its kind, an eager call is one look-up.
    """
    if stack._frozen:
        return False
    w, dtype, key = weights[0][1], x.dtype if autocast is None else autocast, None
    if not (_is_compiling() or cuda_kernels.deciding_anew):
        key = (
            x.get_device(),
            dtype,
            x.shape if batch_sizes is None else (batch_sizes.size(0), int(batch_sizes[0])),
            w.shape,
            len(weights),
            stack.bidirectional,
            stack.training,
            stack.dropout,
            dtype is _FLOAT32 and _fp32_precision("cuda", "rnn"),
            _is_deterministic(),
        )
        known = _ways.get(key)
        if known is not None:
            return known

    def batch_and_steps() -> tuple[int, int]:
        if batch_sizes is None:
            return x.size(1), x.size(0)
        return int(batch_sizes[0]), batch_sizes.size(0)

    hidden, state = w.size(0) // 4, w.size(1)
    proj_size = state if state != hidden else 0
    mode = (len(weights), stack.bidirectional, stack.training, batch_sizes is not None)
    draws_masks = bool(stack.dropout) and stack.training and len(weights) > 1
    return _decided(key, x, (dtype, hidden, proj_size, *mode), batch_and_steps, draws_masks)


def cell_prefers_torch(x: Tensor, weights: Sequence[Tensor | None], training: bool) -> bool:
    """The same for an LSTMCell with the input x (B, I)."""
    w: Any = weights[1]
    dtype, key = x.dtype, None
    if not (_is_compiling() or cuda_kernels.deciding_anew):
        tf32 = dtype is _FLOAT32 and _fp32_precision("cuda", "rnn")
        key = (x.get_device(), dtype, x.shape, w.shape, training, tf32, _is_deterministic())
        known = _ways.get(key)
        if known is not None:
            return known
    return _decided(key, x, (dtype, w.size(1), 0, 0, False, training, False), lambda: (x.size(0), 1), False)


def _decided(
    key: tuple[Any, ...] | None,
    x: Tensor,
    layer: tuple[Any, ...],
    batch_and_steps: Callable[[], tuple[int, int]],
    draws_masks: bool,
) -> bool:
    """Whether torch's operator computes; the next call that has the same key finds it.

    Args:
        key: None for a call that decides nothing for others.
        layer: the first arguments of `class_of`.
    """
    # For fake tensors without a GPU there is no choice.
    if x.dtype not in KERNEL_DTYPES or loader.wants_equations() or not _is_here():
        return False

    def measured() -> Choice | bool | None:
        device, features = x.device, x.size(-1)
        if torch.compiler.is_compiling():
            return is_exporting() or _ours_in_graph(device.index, layer[0], *layer[3:])
        batch, steps = batch_and_steps()
        shape = class_of(*layer, batch=batch, steps=steps)

        def measure() -> Times:
            return times_of(shape, device, features, batch, steps)

        seen = _seen.get()
        if seen is not None:
            seen.setdefault((device.index, shape), (device, measure))
            return None
        return choice_of(shape, device, measure)

    if not route.has_operators(x.device):
        if key is not None and cuda_kernels.problem(x.device.index) is None:
            # The kernels have not been tried yet, so torch's operator computes this call, and the later ones too.
            batch, steps = batch_and_steps()
            _fixed.setdefault((x.device.index, class_of(*layer, batch=batch, steps=steps)), None)
        return False
    preferred = not way(draws_masks, measured)[0]
    if key is not None and not cuda_kernels.deciding_anew:  # that may have begun meanwhile
        if len(_ways) >= WAYS_LIMIT:
            _ways.clear()
        _ways[key] = preferred
    return preferred


def class_of(dtype: torch.dtype, *layer: Any, batch: int, steps: int) -> ShapeClass:
    """The class of a call of at most so many sequences and steps; ``layer``: the fields from its size to ``packed``."""
    tf32 = dtype == torch.float32 and torch.backends.cudnn.rnn.fp32_precision == "tf32"  # type: ignore[attr-defined]
    return ShapeClass(str(dtype).removeprefix("torch."), tf32, *layer, _bucket(batch), _bucket(steps))


def choice_of(
    shape: ShapeClass, device: torch.device, measure: _Measure, on_request: bool = False
) -> Choice | None:
    """The choice for a class of shapes: of this process, by the record, or measured now. None: torch's operator."""
    global _spent
    place = (device.index, shape)
    if place in _fixed and not on_request:
        return _fixed[place]
    choice = None if on_request else recorded(device).get(shape.key)
    if choice is None and not on_request and not _may_measure():
        return _fixed.setdefault(place, None)
    if choice is None:
        with _one_at_a_time:
            if place in _fixed and not on_request:
                return _fixed[place]
            begin = time.monotonic()
            if on_request or _spent < PROCESS_LIMIT:
                choice = _best(_measured(measure, device))
            _spent += time.monotonic() - begin
            if choice is not None:
                recorded(device)[shape.key] = choice
                with contextlib.suppress(OSError, RuntimeError):  # the next process measures again
                    selftest_record.add_measured(device, shape.key, asdict(choice))
    return _fix(shape, device, choice, on_request)


def _fix(shape: ShapeClass, device: torch.device, choice: Choice | None, anew: bool) -> Choice | None:
    """The choice for all later calls, unless one has been made and none is wanted ``anew``."""
    place = (device.index, shape)
    if anew:
        _fixed[place] = choice
    choice = _fixed.setdefault(place, choice)
    if choice is not None and choice.ours:
        _tell_kernels(shape, device, choice.kernel, choice.kernel)
    return choice


def recorded(device: torch.device) -> dict[str, Choice]:
    """The choices in the record of this device, driver and build, by the key of their class.

    A process reads the record once and then adds its own: reading takes longer than a layer.
    """
    if device.index not in _records:
        entry = selftest_record.find(device) or {}
        found: dict[str, Choice] = {}
        for key, fields in (entry.get("measured") or {}).items():
            if fields.keys() == _FORM.keys() and config.fits(fields, _FORM):
                found[key] = Choice(**fields)
        _records.setdefault(device.index, found)  # complete, and the first one, to which threads add
    return _records[device.index]


def _may_measure() -> bool:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return is_plain_eager() and not distributed and cuda_kernels.may_try()


@constant_for_dynamo
def _ours_in_graph(
    index: int | None, dtype: torch.dtype, num_layers: int, bidirectional: bool, training: bool, packed: bool
) -> bool:
    """For a compiled graph, whose sizes may be unknown: whether the kernels were faster in all sizes of this process
    and of the record."""
    wanted = class_of(dtype, 0, 0, num_layers, bidirectional, training, packed, batch=0, steps=0).key
    found = {**recorded(torch.device("cuda", index))}
    fixed = _fixed.copy()  # other threads add to it
    found |= {shape.key: c for (device, shape), c in fixed.items() if device == index and c is not None}
    ours = [choice.ours for key, choice in found.items() if _without_sizes(key) == _without_sizes(wanted)]
    return bool(ours) and all(ours)


def _without_sizes(key: str) -> list[str]:
    return [word for word in key.split() if word[0] not in "HPBT"]


@constant_for_dynamo
def _is_here() -> bool:
    return cuda_kernels.has_gpu()


def _bucket(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()


def _best(times: Times) -> Choice | None:
    """The kernel if it is GAIN times as fast as torch's operator. None if that could not be measured."""
    kernels = [name for name in times if name != _TORCH]
    if _TORCH not in times or not kernels:
        return None
    kernel = min(kernels, key=lambda name: times[name])
    return Choice(times[kernel] * GAIN <= times[_TORCH], kernel, times)


def _tell_kernels(shape: ShapeClass, device: torch.device, forward: str, backward: str) -> list[str]:
    """The planner takes these kernels for the layers of such calls, and for those of no others; "": it chooses.

    Returns what it took before.
    """
    tell, index = loader.extension().set_cuda_measured, device.index or 0  # type: ignore[union-attr]
    passes = ((False, forward), (True, backward))
    return [tell(device=index, **shape.layer, backward=back, kernel=kernel) for back, kernel in passes]


# ---- measuring


def _measured(measure: _Measure, device: torch.device) -> Times:
    try:
        return in_a_thread(device, measure)
    except Exception:  # above all too little memory, which is no reason for a layer's call to fail
        return {}


def times_of(shape: ShapeClass, device: torch.device, input_size: int, batch: int, steps: int) -> Times:
    """The times of torch's operator and of the kernels that have been right on this device, for a call of the class."""
    few, many = STEPS
    if steps <= many:
        return _timed(shape, device, input_size, batch, steps, CLASS_LIMIT)
    short, long = (_timed(shape, device, input_size, batch, n, CLASS_LIMIT / 2) for n in STEPS)
    per_step = {name: max(long[name] - short[name], 0.0) / (many - few) for name in long if name in short}
    return {name: long[name] + (shape.steps - many) * slope for name, slope in per_step.items()}


def _timed(
    shape: ShapeClass, device: torch.device, input_size: int, batch: int, steps: int, limit: float
) -> Times:
    """Medians of several runs, so that one that is slow by chance decides nothing. A candidate that fails is left out.

    The candidates take turns: what slows the card down for a while slows down all of them.
    """
    scratch = _Scratch(shape, device, input_size, batch, steps)
    sizes = shape._replace(steps=_bucket(steps))  # those of the scratch tensors
    names = [_TORCH, *_candidates(shape, device, input_size, batch, steps)]
    seconds: dict[str, list[float]] = {}
    before, warm, turns, begin = _tell_kernels(sizes, device, "", ""), False, 0, time.monotonic()
    try:
        while turns < 50:
            for name in names.copy():
                kernel = "" if name == _TORCH else name
                _tell_kernels(sizes, device, kernel, kernel)
                try:
                    forward = scratch.ours if kernel else scratch.by_torch
                    found = _seconds(functools.partial(scratch.call, forward), device)
                    seconds.setdefault(name, []).append(found)
                except torch.OutOfMemoryError:
                    raise
                except RuntimeError:
                    names.remove(name)
            elapsed = time.monotonic() - begin
            if not warm:
                warm = elapsed >= WARM_UP
                begin += elapsed * warm
                seconds.clear()
                continue
            turns += 1
            if (turns >= 3 and elapsed > limit) or elapsed > 4 * limit:
                break
    finally:
        _tell_kernels(sizes, device, *before)
    return {name: 1e6 * statistics.median(seconds[name]) for name in names}


def _candidates(
    shape: ShapeClass, device: torch.device, input_size: int, batch: int, steps: int
) -> list[str]:
    """The kernels that have been right on this device and run such layers."""
    extension = loader.extension()
    layer = {**shape.layer, "steps": steps, "batch": batch, "input_size": input_size}
    found = []
    for kernel in _KERNELS:
        if cuda_kernels.outcome(device, kernel, getattr(torch, shape.dtype)):
            facts = extension.cuda_facts(device.index or 0)  # type: ignore[union-attr]
            plan = extension.cuda_plan(device=facts, **layer, kernel=kernel)  # type: ignore[union-attr]
            if plan["kernel"] == kernel and not plan["problem"]:
                found.append(kernel)
    return found


class _Scratch:
    """Tensors of a class, and both ways to compute them. Random numbers come from a generator of its own."""

    def __init__(
        self, shape: ShapeClass, device: torch.device, input_size: int, batch: int, steps: int
    ) -> None:
        self.training = shape.training
        dtype = getattr(torch, shape.dtype)
        generator = torch.Generator(device).manual_seed(1)
        layers = max(shape.num_layers, 1)
        self.is_cell = shape.num_layers == 0
        module = nn.LSTM(
            input_size, shape.hidden_size, layers, bidirectional=shape.bidirectional,
            proj_size=shape.proj_size, device="meta", dtype=dtype,
        ).to_empty(device=device)  # fmt: skip
        for p in module.parameters():
            p.data.normal_(0, shape.hidden_size**-0.5, generator=generator)
        module.flatten_parameters()
        sizes = None
        if shape.packed:
            sizes = torch.tensor([batch - batch * t // (2 * steps) for t in range(steps)], device="cpu")
        rows = (steps, batch) if sizes is None else (int(sizes.sum()),)
        self.sizes = sizes
        self.input = torch.empty(*rows, input_size, device=device, dtype=dtype).normal_(generator=generator)
        self.input.requires_grad_(self.training)
        sets = layers * (2 if shape.bidirectional else 1)
        self.h0 = torch.zeros(sets, batch, shape.proj_size or shape.hidden_size, device=device, dtype=dtype)
        self.c0 = torch.zeros(sets, batch, shape.hidden_size, device=device, dtype=dtype)
        self.flat = [w for layer in module.all_weights for w in layer]
        self.grad: Tensor | None = None
        self.stack = PlainStack(True, layers, 0.0, shape.training, shape.bidirectional)

    def by_torch(self) -> Tensor:
        """The way that a call takes, with its step of autograd for second derivatives."""
        if self.is_cell:
            return route.lstm_cell(self.input[0], self.h0[0], self.c0[0], self.flat, preferred=True)[0]
        n = len(self.flat) // self.stack.num_layers
        layers = [self.flat[k : k + n] for k in range(0, len(self.flat), n)]
        results = lstm_by_torch(self.stack, layers, self.input, self.h0, self.c0, self.sizes, None, True)
        return results[0]  # type: ignore[index]

    def ours(self) -> Tensor:
        if self.is_cell:
            return route.lstm_cell(self.input[0], self.h0[0], self.c0[0], self.flat)[0]
        tensors = [self.input, self.h0, self.c0, *self.flat]
        return self.stack.by_layers(route.lstm_layer, self.sizes, tensors, None)[0]

    def call(self, forward: Callable[[], Tensor]) -> None:
        with torch.set_grad_enabled(self.training):
            output = forward()
        if self.training:
            self.grad = torch.ones_like(output) if self.grad is None else self.grad
            torch.autograd.grad(output, [self.input, *self.flat], self.grad)


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Gives the seconds that a run takes on the device."""
    if device.type != "cuda":
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3


# ---- on request


def tune(module: nn.Module, *inputs: Any, **keywords: Any) -> dict[str, Choice]:
    """Measure now which way the plain LSTM layers of a model take on a CUDA device, and record it.

    The choices of eager calls come by themselves. This function is for programs that never measure: compiled models,
    and distributed training, where it gives all processes the choices of rank 0. Call it once, before
    ``torch.compile`` and before the first step, with an input of the sizes and in the mode (`train()` or `eval()`)
    that will be used. It runs the model once, without gradients.

    Args:
        module: a model with `lstm_ext.LSTM` layers, on a CUDA device.
        inputs, keywords: arguments of the model.

    Returns:
        What was chosen, by class of shapes. Empty if nothing could be measured, as on the CPU; a UserWarning says why.

    Raises:
        RuntimeError: the kernel was requested by LSTM_EXT_CUDA_KERNEL, so that there is nothing to choose.
    """
    if config.requested_cuda_kernel() != "auto":
        raise RuntimeError(
            f"tune: LSTM_EXT_CUDA_KERNEL={config.requested_cuda_kernel()} has decided: unset it"
        )
    seen: _Seen = {}
    token = _seen.set(seen)
    try:
        with torch.no_grad(), cuda_kernels.decide_anew():
            module(*inputs, **keywords)
    finally:
        _seen.reset(token)
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    leads = not distributed or torch.distributed.get_rank() == 0
    choices: dict[str, Choice] = {}
    if leads:
        for (_, shape), (device, measure) in seen.items():
            choice = choice_of(shape, device, measure, on_request=True)
            if choice is not None:
                choices[shape.key] = choice
    if distributed:
        shared = [choices]
        torch.distributed.broadcast_object_list(shared, src=0)
        choices = shared[0]
        for (_, shape), (device, _) in seen.items():
            _fix(shape, device, choices.get(shape.key), anew=True)
    _ways.clear()
    if not choices:
        warnings.warn(f"tune: nothing was measured: {_why_not(bool(seen))}", UserWarning, stacklevel=2)
    return choices


def _why_not(seen: bool) -> str:
    if seen:
        return "no candidate could be timed; too little memory is the usual reason, and torch's operator computes"
    if not cuda_kernels.has_gpu():
        return "torch finds no GPU, and elsewhere there is nothing to choose"
    return cuda_kernels.problem(None) or (
        "no layer of lstm_ext without options ran on a CUDA device: convert the model and move it there. Frozen layers "
        "and those with options take the kernels in any case, those with active dropout between layers torch's operator"
    )
