"""Runs one row of faults.py on one entry of the library: the expected error, and a module that works afterwards."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import re
import warnings
from typing import Any, NamedTuple

import torch
from devices import moved
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import lstm_ext
from lstm_ext import functional, reference

from .broken import Call, DoesNotApply, Error, jagged, numbers_of, numbers_of_got
from .cases import Case, Options, arguments_of, environment, make_module, sizes_of, tensors_of
from .faults import FAULTS
from .routes import function_arguments

SIZES = list(inspect.signature(lstm_ext.LSTM).parameters)[:8]
CELL_SIZES = ("input_size", "hidden_size", "bias")


@dataclasses.dataclass(frozen=True)
class Faulty:
    """A row, an entry, and the case whose arguments are broken; ``which`` of the variants of the fault."""

    fault: str
    entry: str
    case: Case
    which: int = 0


def fitted(case: Case, entry: str, fault: str) -> Case:
    """The case as the entry takes it, with what the fault needs."""
    needs = FAULTS[fault].needs
    more: dict[str, Any] = {"hx": needs == "hx" or (case.hx and entry != "equations")}
    if entry == "step":
        more |= {"bidirectional": needs == "bidirectional", "training": False, "batch_first": False}
    if entry == "cell":
        more |= {"bidirectional": False, "proj_size": 0, "num_layers": 1, "batch_first": False}
    options = case.options
    if (
        options and getattr(FAULTS[fault], entry).torchs
    ):  # what torch's layer has not; its results are the same
        names = ("return_cell_states", "return_gates", "recompute")
        options = Options(**{name: getattr(options, name) for name in names})
    if entry in ("step", "cell", "nested", "equations"):
        options = None
    elif needs == "layer_norm":
        changes = {"layer_norm": True, "peephole": False, "coupled_gates": False}
        options = dataclasses.replace(options or Options(), **changes)
    return dataclasses.replace(case, **more, options=options)


numbers = functools.lru_cache(16)(tensors_of)  # nothing changes them


def good_call(case: Case, entry: str, which: int, ours: bool, device: str) -> Call:
    if entry.endswith("constructor"):
        cell = entry == "cell_constructor"
        arguments = dict(zip(SIZES, sizes_of(case), strict=True))
        given = {n: v for n, v in arguments.items() if n in CELL_SIZES} if cell else arguments
        return Call(entry, None, arguments=given, which=which)
    tensors = numbers(case)
    if entry == "cell":
        torch.manual_seed(case.seed)
        kind = lstm_ext.LSTMCell if ours else nn.LSTMCell
        module: Any = kind(case.input_size, case.hidden_size, case.bias, dtype=case.torch_dtype)
    else:
        own = case.options.parameters(case.bias) * case.num_layers * case.directions if case.options else 0
        weights = tensors.weights[: len(tensors.weights) - (0 if ours else own)]
        module = make_module(lstm_ext.LSTM if ours else nn.LSTM, case, case.torch_dtype, weights)
    _, input, hx, more = arguments_of(case, tensors, case.torch_dtype)
    if entry in ("step", "cell"):
        input = input[0].detach()
        hx = hx and tuple([s[0].detach() for s in hx]) if entry == "cell" else hx
    if entry == "nested":
        ends = torch.tensor([0, *case.lengths]).cumsum(0)
        input = jagged(input.data.detach(), ends)
    if entry in ("function", "equations"):
        more |= function_arguments(module)
    if isinstance(
        input, PackedSequence
    ):  # a leaf: its packing belongs to no graph, so that it can be used twice
        rows = input.data.detach().requires_grad_(input.data.requires_grad)
        input = PackedSequence(moved(rows, device), input.batch_sizes, *moved(tuple(input[2:]), device))
    else:
        input = moved(input, device)
    return Call(
        entry,
        module.to(device),
        input,
        moved(hx, device),
        moved(more, device),
        which,
        1 + (entry == "function"),
    )


class Outcome(NamedTuple):
    error: Exception | None
    values: list[Any]
    warned: list[str]

    def __repr__(self) -> str:
        return repr(self.error or [tuple(v.shape) if isinstance(v, Tensor) else v for v in self.values])


def tensors_in(result: Any) -> list[Any]:
    if isinstance(result, Tensor):
        return [result.values() if result.is_nested else result]
    if isinstance(result, PackedSequence):
        return [result.data]
    if isinstance(result, nn.Module):
        return [repr(result)]
    return [x for part in result or () for x in tensors_in(part)]


def result_of(call: Call, ours: bool) -> Any:
    c = call
    if c.entry == "constructor":
        return (lstm_ext.LSTM if ours else nn.LSTM)(**c.arguments)
    if c.entry == "cell_constructor":
        return (lstm_ext.LSTMCell if ours else nn.LSTMCell)(**c.arguments)
    if c.entry == "step":
        return c.module.step(c.input, c.hx)
    if c.entry == "function":
        return (functional.lstm, reference.lstm)[c.which % 2](c.input, c.hx, **c.arguments)
    if c.entry == "equations":
        return reference.lstm(c.input, c.hx, **c.arguments)
    return c.module(c.input, c.hx, **(c.arguments if ours else {}))


def outcome(call: Call, case: Case, ours: bool = True, broken: Any = None) -> Outcome:
    """Of the call and, in training, of a backward pass."""
    torch.manual_seed(case.seed)
    with warnings.catch_warnings(record=True) as caught, torch.set_grad_enabled(case.mode == "grad"):
        warnings.simplefilter("always")
        try:
            if broken is not None:
                broken()
            values = tensors_in(result_of(call, ours))
            ends = [v for v in values if isinstance(v, Tensor) and v.requires_grad]
            if ends and not ends[0].is_meta:
                torch.autograd.backward(ends, [torch.ones_like(v) for v in ends])
        except DoesNotApply:
            raise
        except Exception as error:  # of any kind: that is the question
            return Outcome(error, [], [str(w.message) for w in caught])
    values = [v.detach() if isinstance(v, Tensor) else v for v in values]
    return Outcome(None, values, [str(w.message) for w in caught])


def check_fault(faulty: Faulty, device: str = "cpu", seen: list[int] | None = None) -> str:
    """Says which error it was, "accepted", or "does not apply". Adds to ``seen`` how many variants the fault has."""
    fault = FAULTS[faulty.fault]
    expected: Error = getattr(fault, faulty.entry)
    case = fitted(faulty.case, faulty.entry, faulty.fault)
    with environment(case):
        try:
            ours, numbers = broken_outcome(faulty, case, True, device, seen)
        except DoesNotApply:
            return "does not apply"
        said = f"check_fault({faulty}):\n{ours}\n"
        if expected.torchs:
            theirs, _ = broken_outcome(faulty, case, False, device)
            if theirs.error is not None:
                assert type(ours.error) is type(theirs.error), f"{said}expected torch's\n{theirs}"
                assert str(ours.error) == str(theirs.error), f"{said}expected torch's text\n{theirs}"
            elif not expected.types:
                assert ours.error is None, f"{said}and torch computes {theirs}"
                for a, b in zip(ours.values, theirs.values, strict=False):  # ours may give gates, too
                    same(a, b, said)
            if faulty.entry.endswith("constructor"):
                assert ours.warned == theirs.warned, f"{said}{ours.warned}\nexpected torch's\n{theirs.warned}"
            if theirs.error is not None or not expected.types:
                return "accepted" if ours.error is None else type(ours.error).__name__
    assert isinstance(ours.error, expected.types), f"{said}expected one of {expected.types}"
    patterns = [".*".join(map(re.escape, t.format(**numbers).split("..."))) for t in expected.texts or ("",)]
    assert any([re.search(p, str(ours.error), re.DOTALL) for p in patterns]), f"{said}expected {patterns}"
    return type(ours.error).__name__


def broken_outcome(
    faulty: Faulty, case: Case, ours: bool, device: str, seen: list[int] | None = None
) -> tuple[Outcome, dict[str, Any]]:
    """What a broken call comes to. Before and after, the good call gives the same."""
    on_cpu = torch.device("cpu") if device != "cpu" else contextlib.nullcontext()
    with on_cpu:
        call = good_call(case, faulty.entry, faulty.which, ours, device)
    good, module = dataclasses.replace(call, arguments=dict(call.arguments)), call.module
    before = outcome(good, case, ours) if ours else None
    if before is not None and not (faulty.entry == "step" and case.bidirectional):
        assert before.error is None, f"{faulty}: a good call: {before}"
    kept = None if module is None else (dict(vars(module)), dict(module._parameters))
    found = numbers_of(call)

    def apply() -> None:
        with torch.no_grad(), on_cpu:
            call.say(FAULTS[faulty.fault].break_(call))

    result = outcome(call, case, ours, apply)
    found.update(numbers_of_got(call))
    if seen is not None:
        seen.append(call.variants)
    if kept is not None and before is not None:
        vars(module).clear()
        vars(module).update(kept[0])
        module._parameters = kept[1]
        afterwards = outcome(good, case, ours)
        assert afterwards.error is None or before.error is not None, f"{faulty}: afterwards {afterwards}"
        for a, b in zip(before.values, afterwards.values, strict=True):
            assert a == b if isinstance(a, str) else torch.equal(a, b), f"{faulty}: afterwards {afterwards}"
    return result, found


def same(a: Any, b: Any, said: str) -> None:
    if not isinstance(a, Tensor):
        assert a == b, said
        return
    assert a.device == b.device, said
    if a.device.type != "meta":
        torch.testing.assert_close(a, b, msg=lambda m: f"{said}{m}")
