"""Random broken options: an error that names the argument and what was expected, and a module that works afterwards.

PYTHONPATH=tests:tests/fuzz python -c "from fuzz_option_errors import *; check_refused(Refused(...))"
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import torch
from fuzz_errors import Call, describe, longer, of_rank, other_dtype, outcome, shorter
from matrix.cases import Case, arguments_of, environment, make_module, sizes_of, tensors_of
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import lstm_ext

EXPECTED = r"expect|should|needs|must|without|together|does not match|not at the same device|cannot"


@dataclasses.dataclass(frozen=True)
class Fault:
    """A change of a call, and what the error has to be and to name."""

    apply: Callable[[Call], Any]
    named: str
    types: tuple[type[Exception], ...] = (ValueError,)


def time_and_batch(call: Call) -> tuple[int, int]:
    if call.input.dim() == 2:
        return call.input.size(0), 1
    a, b = call.input.shape[:2]
    return (b, a) if call.module.batch_first else (a, b)


def steps_of(call: Call) -> tuple[int, ...]:
    """The input's shape without its features."""
    return tuple(call.input.shape[:-1])


def spoiled(x: Any, call: Call, value: Any) -> Any:
    """With another value in one place."""
    x.reshape(-1)[call.which % x.numel()] = value
    return x


# --- lengths and masks ---------------------------------------------------------------------------------------------


def good_lengths(call: Call) -> list[int]:
    T, B = time_and_batch(call)
    return [(call.which + b) % (T + 1) for b in range(B)]


def _lengths(change: Callable[[Call, list[int]], Any]) -> Callable[[Call], None]:
    def apply(call: Call) -> None:
        call.asked.pop("mask", None)
        call.asked["lengths"] = change(call, good_lengths(call))

    return apply


def _a_length(value: Callable[[Call, int], Any], as_tensor: bool) -> Callable[[Call], None]:
    def change(call: Call, n: list[Any]) -> Any:
        n[call.which % len(n)] = value(call, time_and_batch(call)[0])
        return torch.tensor(n) if as_tensor else n

    return _lengths(change)


def _mask(change: Callable[[Call, Tensor], Any]) -> Callable[[Call], None]:
    def apply(call: Call) -> None:
        call.asked.pop("lengths", None)
        call.asked["mask"] = change(call, torch.ones(steps_of(call), dtype=torch.bool))

    return apply


# --- resets --------------------------------------------------------------------------------------------------------


def flags(call: Call) -> Tensor:
    """resets as good ones, or the data of good ones."""
    data = call.input.data if isinstance(call.input, PackedSequence) else call.input
    generator = torch.Generator().manual_seed(call.which)
    return torch.rand(data.shape[:-1], generator=generator) < 0.5


def give_resets(call: Call, data: Any) -> None:
    call.asked["resets"] = call.input._replace(data=data) if isinstance(call.input, PackedSequence) else data


def _resets(change: Callable[[Call, Tensor], Any]) -> Callable[[Call], None]:
    return lambda call: give_resets(call, change(call, flags(call)))


def _packed_resets(change: Callable[[Call, PackedSequence], Any]) -> Callable[[Call], None]:
    def apply(call: Call) -> None:
        call.asked["resets"] = change(call, call.input._replace(data=flags(call)))

    return apply


def other_order(call: Call, resets: PackedSequence) -> PackedSequence:
    """Of the same sizes, but for the sequences in another order: one more at the front, where there is only one."""
    n = int(resets.batch_sizes[0])
    order = torch.arange(n) if resets.sorted_indices is None else resets.sorted_indices
    order = order.roll(1) if n > 1 else torch.tensor([0, 1])
    return resets._replace(sorted_indices=order, unsorted_indices=order.argsort())


def _state(change: Callable[[Call, Tensor], Any]) -> Callable[[Call], None]:
    """One of the two of ``reset_state``."""
    return _both(
        lambda call, pair: [change(call, s) if k == call.which % 2 else s for k, s in enumerate(pair)]
    )


def _both(change: Callable[[Call, list[Tensor]], Any], with_resets: bool = True) -> Callable[[Call], None]:
    def apply(call: Call) -> None:
        if isinstance(call.input, PackedSequence):
            data, batch = call.input.data, (int(call.input.batch_sizes[0]),)
        else:
            data, batch = call.input, (time_and_batch(call)[1],) if call.input.dim() == 3 else ()
        m = call.module
        sets = m.num_layers * (2 if m.bidirectional else 1)
        sizes = (m.proj_size or m.hidden_size, m.hidden_size)
        call.asked.pop("resets", None)
        if with_resets:
            give_resets(call, flags(call))
        call.asked["reset_state"] = change(call, [data.new_zeros(sets, *batch, n) for n in sizes])

    return apply


def _asked(name: str, values: list[Any]) -> Callable[[Call], None]:
    return lambda call: call.asked.__setitem__(name, values[call.which % len(values)])


# --- attributes and parameters -------------------------------------------------------------------------------------


def _attribute(name: str, values: list[Any]) -> Callable[[Call], None]:
    return lambda call: setattr(call.module, name, values[call.which % len(values)])


def _norm(change: Callable[[Call, Tensor], Tensor | None]) -> Callable[[Call], None]:
    """For layers with layer normalisation."""
    return lambda call: call.weight(lambda w: change(call, w), ("ln_",))


BAD_RATES = [-0.1, 1.5, math.nan, math.inf, True, None, "0.5", [0.5], 1j]
BAD_PAIRS = [
    (0.1, -0.1),
    (2, 0),
    (0.1,),
    (0.1, 0.2, 0.3),
    (),
    ("a", 0),
    (0.1, None),
    (math.nan, 0),
    (True, 0.1),
]
NO_FLAGS = [1, 0, "yes", None, 1.0, [True]]
NO_ACTIVATIONS = [
    None,
    1,
    True,
    "sigmoids",
    "",
    (),
    ("relu", 1.0),
    ("elu", "1"),
    ("elu", -1.0),
    ("elu", math.nan),
]

ANYWHERE: dict[str, Fault] = {
    "resets: more steps or rows": Fault(_resets(lambda c, r: longer(r, c.which % r.dim(), c.amount)), "resets"),
    "resets: fewer steps or rows": Fault(_resets(lambda c, r: r[1:]), "resets"),
    "resets: rank": Fault(
        _resets(lambda c, r: of_rank(r, [0, *range(r.dim() + 2, 6)][(c.which + c.amount) % (5 - r.dim())])), "resets"
    ),
    "resets: last axis": Fault(_resets(lambda c, r: torch.stack([r] * (c.amount + 1), -1)), "resets"),
    "resets: integers": Fault(
        _resets(lambda c, r: r.to([torch.int64, torch.uint8, torch.int32][c.which % 3])), "resets"
    ),
    "resets: complex": Fault(_resets(lambda c, r: r.to(torch.complex64)), "resets"),
    "resets: values": Fault(
        _resets(
            lambda c, r: spoiled(
                r.float(), c, [0.5, 2.0, -1.0, math.nan, math.inf, 1e-30][(c.which + c.amount) % 6]
            )
        ),
        "resets",
    ),
    "resets: meta": Fault(_resets(lambda c, r: r.to("meta")), "resets"),
    "reset_state: no resets": Fault(_both(lambda c, pair: pair, with_resets=False), "reset_state"),
    "reset_state: no pair": Fault(
        _both(
            lambda c, p: [
                p[0], p[:1], [*p, p[0]], (p[0], None), 5, "state", {"h": p[0], "c": p[1]}, (), [[0.0], [0.0]]
            ][(c.which + c.amount) % 9]
        ),
        "reset_state",
        (TypeError,),
    ),
    "reset_state: more units": Fault(_state(lambda c, s: longer(s, -1, c.amount)), "reset_state"),
    "reset_state: fewer units": Fault(_state(lambda c, s: shorter(s, -1, c.amount)), "reset_state"),
    "reset_state: more sets": Fault(_state(lambda c, s: longer(s, 0, c.amount)), "reset_state"),
    "reset_state: fewer sets": Fault(_state(lambda c, s: shorter(s, 0, c.amount)), "reset_state"),
    "reset_state: rank": Fault(_state(lambda c, s: s[None] if c.amount > 1 else s[0]), "reset_state"),
    "reset_state: of the other rank": Fault(
        _both(lambda c, p: [s[:, 0] if s.dim() == 3 else s[:, None] for s in p]), "reset_state"
    ),
    "reset_state: dtype": Fault(_state(lambda c, s: other_dtype(s, c.amount)), "reset_state"),
    "reset_state: boolean": Fault(_state(lambda c, s: s > 0), "reset_state"),
    "reset_state: meta": Fault(_state(lambda c, s: s.to("meta")), "reset_state"),
    "return_cell_states": Fault(_asked("return_cell_states", NO_FLAGS), "return_cell_states", (TypeError,)),
    "return_gates": Fault(_asked("return_gates", NO_FLAGS), "return_gates", (TypeError,)),
    "attribute: recurrent_dropout": Fault(
        _attribute("recurrent_dropout", [-0.1, 1.5, True, "0.5"]), "recurrent_dropout"
    ),
    "attribute: zoneout": Fault(_attribute("zoneout", [-0.1, 1.5, True, "0.5", (0.1,), (0.1, 2)]), "zoneout"),
    "attribute: recompute": Fault(_attribute("recompute", [1, "yes"]), "recompute", (TypeError,)),
    "attribute: cell_clip": Fault(_attribute("cell_clip", [0, -1.0, math.inf, math.nan, True, "1"]), "cell_clip"),
    "attribute: preactivation_clip": Fault(
        _attribute("preactivation_clip", [0, -1.0, math.inf, math.nan, True, "1"]), "preactivation_clip"
    ),
    "attribute: gate_activation": Fault(_attribute("gate_activation", NO_ACTIVATIONS), "gate_activation"),
    "attribute: cell_activation": Fault(_attribute("cell_activation", NO_ACTIVATIONS), "cell_activation"),
    "attribute: coupled_gates": Fault(_attribute("coupled_gates", [1, "yes"]), "coupled_gates", (TypeError,)),
}  # fmt: skip

UNPACKED: dict[str, Fault] = ANYWHERE | {
    "lengths: beyond T": Fault(_a_length(lambda c, T: T + c.amount, False), "lengths"),
    "lengths: beyond T, tensor": Fault(_a_length(lambda c, T: T + c.amount, True), "lengths"),
    "lengths: huge": Fault(_a_length(lambda c, T: 2 ** (61 + c.amount), False), "lengths"),
    "lengths: huge, tensor": Fault(_a_length(lambda c, T: 2**62, True), "lengths"),
    "lengths: negative": Fault(_a_length(lambda c, T: -c.amount, False), "lengths"),
    "lengths: negative, tensor": Fault(_a_length(lambda c, T: -c.amount, True), "lengths"),
    "lengths: no integers": Fault(
        _a_length(
            lambda c, T: [1.0, True, "1", None, torch.tensor(1), math.nan][(c.which + c.amount) % 6], False
        ),
        "lengths",
        (TypeError,),
    ),
    "lengths: too many": Fault(_lengths(lambda c, n: n + [1] * c.amount), "lengths"),
    "lengths: too few": Fault(_lengths(lambda c, n: n[:-1]), "lengths"),
    "lengths: too many, tensor": Fault(_lengths(lambda c, n: torch.tensor(n + [1] * c.amount)), "lengths"),
    "lengths: rank": Fault(_lengths(lambda c, n: torch.tensor(n)[:, None]), "lengths"),
    "lengths: dtype": Fault(
        _lengths(
            lambda c, n: torch.tensor(n).to(
                [torch.float32, torch.bool, torch.complex64, torch.float64][c.which % 4]
            )
        ),
        "lengths",
    ),
    "lengths: type": Fault(
        _lengths(lambda c, n: ["3", 3.0, {3}, {"lengths": n}, b"3", math.inf][(c.which + c.amount) % 6]),
        "lengths",
        (TypeError,),
    ),
    "lengths: meta": Fault(_lengths(lambda c, n: torch.tensor(n).to("meta")), "lengths"),
    "mask: more steps or rows": Fault(_mask(lambda c, m: longer(m, c.which % m.dim(), c.amount)), "mask"),
    "mask: fewer steps or rows": Fault(_mask(lambda c, m: m[1:]), "mask"),
    "mask: rank": Fault(
        _mask(lambda c, m: of_rank(m, [0, *range(m.dim() + 2, 6)][(c.which + c.amount) % (5 - m.dim())])), "mask"
    ),
    "mask: last axis": Fault(_mask(lambda c, m: torch.stack([m] * (c.amount + 1), -1)), "mask"),
    "mask: dtype": Fault(
        _mask(lambda c, m: m.to([torch.float32, torch.uint8, torch.int64, torch.complex64][c.which % 4])), "mask"
    ),
    "mask: type": Fault(
        _mask(lambda c, m: [m.tolist(), True, "mask", m.numpy()][c.which % 4]), "mask", (TypeError,)
    ),
    "mask: meta": Fault(_mask(lambda c, m: m.to("meta")), "mask"),
    "mask: and lengths": Fault(
        lambda c: c.asked.update(lengths=good_lengths(c), mask=torch.ones(steps_of(c), dtype=torch.bool)), "mask"
    ),
    "resets: type": Fault(
        _resets(lambda c, r: [r.tolist(), True, "resets", r.numpy(), 1.0][c.which % 5]), "resets", (TypeError,)
    ),
    "resets: packed": Fault(
        _resets(lambda c, r: PackedSequence(r.flatten(), torch.tensor([1] * r.numel()))), "resets", (TypeError,)
    ),
}  # fmt: skip

PACKED: dict[str, Fault] = ANYWHERE | {
    "lengths": Fault(
        lambda c: c.asked.update(lengths=[torch.tensor([1]), [1], 1, "1"][c.which % 4]), "lengths"
    ),
    "mask": Fault(lambda c: c.asked.update(mask=[flags(c), True][c.which % 2]), "mask"),
    "resets: type": Fault(
        _packed_resets(
            lambda c, r: [r.data, r.data.tolist(), True, tuple(r.data)][c.which % 4]
        ),
        "resets",
        (TypeError,),
    ),
    "resets: batch_sizes": Fault(
        _packed_resets(
            lambda c, r: r._replace(
                batch_sizes=[
                    torch.cat([r.batch_sizes, r.batch_sizes[-1:]]),
                    r.batch_sizes[:-1],
                    r.batch_sizes + 1,
                    r.batch_sizes[None],
                ][c.which % 4]
            )
        ),
        "resets",
    ),
    "resets: order": Fault(_packed_resets(other_order), "resets"),
}  # fmt: skip

_NAMES, _TYPES = "ln_|norm|gain_|bias_c", (ValueError, RuntimeError)
NORM: dict[str, Fault] = {
    "ln: longer": Fault(_norm(lambda c, w: longer(w, 0, c.amount)), _NAMES, _TYPES),
    "ln: shorter": Fault(_norm(lambda c, w: w[:-1]), _NAMES, _TYPES),
    "ln: of one number": Fault(_norm(lambda c, w: w[:0] if w.numel() == 1 else w[:1]), _NAMES, _TYPES),
    "ln: rank": Fault(_norm(lambda c, w: w[None]), _NAMES, _TYPES),
    "ln: dtype": Fault(_norm(lambda c, w: other_dtype(w, c.amount)), _NAMES, _TYPES),
    "ln: meta": Fault(_norm(lambda c, w: w.to("meta")), _NAMES, _TYPES),
    "ln: none": Fault(_norm(lambda c, w: None), _NAMES, (TypeError,)),
}

# What the constructor refuses: the values of the argument, and the error's type.
CONSTRUCTOR: dict[str, tuple[list[dict[str, Any]], type[Exception]]] = {
    "constructor: recurrent_dropout": ([{"recurrent_dropout": v} for v in BAD_RATES], ValueError),
    "constructor: zoneout": ([{"zoneout": v} for v in [v for v in BAD_RATES if v != [0.5]] + BAD_PAIRS], ValueError),
    "constructor: layer_norm": ([{"layer_norm": v} for v in NO_FLAGS], TypeError),
    "constructor: recompute": ([{"recompute": v} for v in NO_FLAGS], TypeError),
    "constructor: peephole": ([{"peephole": v} for v in NO_FLAGS], TypeError),
    "constructor: coupled_gates": ([{"coupled_gates": v} for v in NO_FLAGS], TypeError),
    "constructor: cell_clip": ([{"cell_clip": v} for v in [0, -0.5, math.inf, math.nan, True, "1", [1.0]]], ValueError),
    "constructor: preactivation_clip": ([{"preactivation_clip": v} for v in [0, -0.5, math.nan, "1"]], ValueError),
    "constructor: gate_activation": ([{"gate_activation": v} for v in NO_ACTIVATIONS], ValueError),
    "constructor: cell_activation": ([{"cell_activation": v} for v in NO_ACTIVATIONS], ValueError),
    "constructor: exclude each other": (
        [{"layer_norm": True, "peephole": True}, {"layer_norm": True, "coupled_gates": True}]
        + [{"coupled_gates": True, "forget_bias": 1.0}],
        ValueError,
    ),
    "constructor: forget_bias": (
        [{"forget_bias": v} for v in ["1", math.inf, math.nan, True, [1.0], 1j]]
        + [{"forget_bias": 1.0, "bias": False}],
        ValueError,
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Refused:
    """A case, and what is wrong with its options: a name out of ``faults_of`` its layout."""

    case: Case
    fault: str
    amount: int = 1
    which: int = 0


def faults_of(packed: bool) -> list[str]:
    return [*(PACKED if packed else UNPACKED), *NORM, *CONSTRUCTOR]


def constructed(case: Case, changes: dict[str, Any]) -> Exception | nn.Module:
    names = (
        "input_size",
        "hidden_size",
        "num_layers",
        "bias",
        "batch_first",
        "dropout",
        "bidirectional",
        "proj_size",
    )
    arguments = dict(zip(names, sizes_of(case), strict=True)) | changes
    try:
        return lstm_ext.LSTM(**arguments)
    except Exception as error:  # of any kind: that is the question
        return error


def check_refused(refused: Refused, kind: type[nn.Module] = lstm_ext.LSTM) -> str:
    """Says which exception it was."""
    case = refused.case
    if refused.fault in CONSTRUCTOR:
        variants, type_ = CONSTRUCTOR[refused.fault]
        changes = variants[refused.which % len(variants)]
        assert isinstance(constructed(case, {}), nn.Module)
        error = constructed(case, changes)
        judge(refused, error, next(iter(changes)), (type_,))
        return type(error).__name__

    fault = (NORM | (PACKED if case.packed else UNPACKED))[refused.fault]
    with environment(case):
        tensors = tensors_of(case)
        grad = case.mode == "grad"
        module = make_module(kind, case, case.torch_dtype, tensors.weights)
        parameters = dict(module.named_parameters())

        def good_call() -> Call:
            _, input, hx, asked = arguments_of(case, tensors, case.torch_dtype)
            return Call(module, input, hx, refused.amount, refused.which, asked)

        def good_outcome() -> Exception | dict[str, Tensor]:
            torch.manual_seed(case.seed)
            return outcome(good_call(), grad)

        before = good_outcome()
        call = good_call()
        try:
            with torch.no_grad():
                fault.apply(call)
        except (TypeError, ValueError) as at_once:
            assert refused.fault.startswith("attribute: ")
            error: Any = at_once
        else:
            assert not refused.fault.startswith("attribute: ")
            error = outcome(call, grad)
        for name, p in parameters.items():
            setattr(module, name, p)
        afterwards = good_outcome()
    assert isinstance(before, dict) and isinstance(afterwards, dict), (
        f"check_refused({refused}): a good call\n{before}\n{afterwards}"
    )
    for name, value in before.items():
        assert torch.equal(afterwards[name], value), f"check_refused({refused}): afterwards {name} is another"
    judge(refused, error, fault.named, fault.types)
    return type(error).__name__


def judge(refused: Refused, error: Any, named: str, types: tuple[type[Exception], ...]) -> None:
    said = describe(error) if isinstance(error, (Exception, dict)) else repr(error)
    assert type(error) in types, f"check_refused({refused}):\n{said}\nexpected one of {types}"
    text = str(error)
    assert re.search(named, text), f"check_refused({refused}):\n{said}\ndoes not name {named}"
    assert re.search(EXPECTED, text), f"check_refused({refused}):\n{said}\ndoes not say what was expected"
