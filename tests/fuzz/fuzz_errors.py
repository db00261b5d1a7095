"""Random broken arguments: the same type of exception as the installed torch, and a module that works afterwards.

PYTHONPATH=tests:tests/fuzz python -c "from fuzz_errors import *; check_broken(Broken(...))"
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from matrix.cases import Case, arguments_of, environment, make_module, tensors_of
from matrix.judge import named
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import lstm_ext


@dataclasses.dataclass
class Call:
    """A module and its arguments, to be broken in place."""

    module: Any
    input: Any
    hx: Any
    amount: int  # 1 to 3
    which: int  # of h0 and c0, or of the weights
    asked: dict[str, Any] = dataclasses.field(default_factory=dict)  # the options

    @property
    def data(self) -> Tensor:
        return self.input.data if isinstance(self.input, PackedSequence) else self.input

    @data.setter
    def data(self, value: Any) -> None:
        if isinstance(self.input, PackedSequence):
            self.pack(data=value)
        else:
            self.input = value

    def pack(self, **changes: Any) -> None:
        self.input = PackedSequence(**{**self.input._asdict(), **changes})

    @property
    def state(self) -> Tensor:
        return self.hx[self.which % 2]

    @state.setter
    def state(self, value: Any) -> None:
        self.hx = (value, self.hx[1]) if self.which % 2 == 0 else (self.hx[0], value)

    def weight(
        self, change: Callable[[Tensor], Tensor | None], kinds: tuple[str, ...] = ("weight", "bias")
    ) -> None:
        every = [name for name, _ in self.module.named_parameters()]
        names = [name for name in every if name.startswith(kinds)] or every
        name = names[self.which % len(names)]
        value = change(getattr(self.module, name).detach())
        setattr(self.module, name, None if value is None else nn.Parameter(value, requires_grad=False))


def longer(x: Tensor, axis: int, by: int) -> Tensor:
    return torch.cat(
        [x, x.new_zeros([by if a == axis % x.dim() else n for a, n in enumerate(x.shape)])], axis
    )


def shorter(x: Tensor, axis: int, by: int) -> Tensor:
    return x.narrow(axis, 0, max(0, x.size(axis) - by))


def of_rank(x: Tensor, rank: int) -> Tensor:
    while x.dim() > rank:
        x = x[0]
    return x[(None,) * (rank - x.dim())]


def other_dtype(x: Tensor, amount: int) -> Tensor:
    floats = [d for d in (torch.float16, torch.float32, torch.float64) if d != x.dtype]
    return x.to([*floats, torch.int64][amount % 3])


def time_axis(call: Call) -> int:
    return 1 if call.module.batch_first and call.input.dim() == 3 else 0


@dataclasses.dataclass(frozen=True)
class Fault:
    apply: Callable[[Call], None]
    # Types that are as good as torch's, also where torch accepts the arguments and computes something from them.
    or_else: tuple[type[Exception], ...] = ()
    needs_hx: bool = False
    # Where torch checks nothing and may write where it should not, it must be one of or_else.
    ask_torch: bool = True
    may_pass: bool = False  # any result will do, too


def _set(attribute: str, value: Callable[[Call], Any]) -> Callable[[Call], None]:
    return lambda call: setattr(call, attribute, value(call))


WRONG_WEIGHT = (RuntimeError, ValueError)
# For a tensor and for the data of a PackedSequence.
SHARED_FAULTS: dict[str, Fault] = {
    "more features": Fault(_set("data", lambda c: longer(c.data, -1, c.amount))),
    "fewer features": Fault(_set("data", lambda c: shorter(c.data, -1, c.amount))),
    "dtype": Fault(_set("data", lambda c: other_dtype(c.data, c.amount + c.which))),
    "complex": Fault(_set("data", lambda c: c.data.to(torch.complex64))),
    "boolean": Fault(_set("data", lambda c: c.data > 0)),
    "meta": Fault(_set("data", lambda c: c.data.to("meta"))),
    "sparse": Fault(_set("data", lambda c: c.data.to_sparse())),
    "hx: more units": Fault(_set("state", lambda c: longer(c.state, -1, c.amount)), needs_hx=True),
    "hx: fewer units": Fault(_set("state", lambda c: shorter(c.state, -1, c.amount)), needs_hx=True),
    "hx: more sets": Fault(_set("state", lambda c: longer(c.state, 0, c.amount)), needs_hx=True),
    "hx: fewer sets": Fault(_set("state", lambda c: shorter(c.state, 0, c.amount)), needs_hx=True),
    "hx: rank of one": Fault(_set("state", lambda c: of_rank(c.state, c.amount + 1)), needs_hx=True),
    "hx: rank of both": Fault(
        _set("hx", lambda c: tuple(of_rank(s, c.amount + 1) for s in c.hx)), needs_hx=True
    ),
    "hx: swapped": Fault(_set("hx", lambda c: c.hx[::-1]), needs_hx=True),
    "hx: axes swapped": Fault(_set("hx", lambda c: tuple(s.transpose(0, 1) for s in c.hx)), needs_hx=True),
    "hx: dtype": Fault(
        _set("state", lambda c: other_dtype(c.state, c.amount)), or_else=(RuntimeError,), needs_hx=True
    ),
    "hx: meta": Fault(_set("state", lambda c: c.state.to("meta")), needs_hx=True),
    "hx: sparse": Fault(_set("state", lambda c: c.state.to_sparse()), (RuntimeError,), needs_hx=True),
    "hx: no pair": Fault(
        _set(
            "hx",
            lambda c: [
                c.hx[0], (c.hx[0],), [*c.hx, c.hx[0]], (c.hx[0], None), 5, "hx", {"h": c.hx[0], "c": c.hx[1]}, ()
            ][(c.amount + 3 * c.which) % 8],
        ),
        or_else=(TypeError,),
        needs_hx=True,
    ),
    # Torch 2.13 corrupts memory, or computes with a part of the weight.
    "weight: row missing": Fault(lambda c: c.weight(lambda w: w[:-1]), WRONG_WEIGHT, ask_torch=False),
    "weight: row too many": Fault(lambda c: c.weight(lambda w: longer(w, 0, c.amount)), WRONG_WEIGHT, ask_torch=False),
    "weight: column missing": Fault(lambda c: c.weight(lambda w: w[..., :-1]), WRONG_WEIGHT, ask_torch=False),
    "weight: column too many": Fault(
        lambda c: c.weight(lambda w: longer(w, -1, c.amount)), WRONG_WEIGHT, ask_torch=False
    ),
    "weight: rank": Fault(lambda c: c.weight(lambda w: w[None]), WRONG_WEIGHT, ask_torch=False),
    "weight: dtype": Fault(lambda c: c.weight(lambda w: other_dtype(w, c.amount)), WRONG_WEIGHT),
    "weight: meta": Fault(lambda c: c.weight(lambda w: w.to("meta"))),
    "weight: sparse": Fault(lambda c: c.weight(lambda w: w.to_sparse()), WRONG_WEIGHT, ask_torch=False),
    # Torch stumbles over its dtype (AttributeError), or says TypeError.
    "weight: none": Fault(lambda c: c.weight(lambda w: None, ("weight",)), (TypeError,)),
    "bias: none": Fault(lambda c: c.weight(lambda w: None, ("bias",)), (TypeError,)),  # a weight, without a bias
}  # fmt: skip

TENSOR_FAULTS: dict[str, Fault] = SHARED_FAULTS | {
    "rank": Fault(_set("input", lambda c: of_rank(c.input, [0, 1, 4, 5][(c.amount + c.which) % 4]))),
    "batch axis lost": Fault(
        _set("input", lambda c: c.input[0] if c.input.dim() == 3 else c.input[None])
    ),
    "no steps": Fault(_set("input", lambda c: c.input.narrow(time_axis(c), 0, 0))),
    "no steps, no features": Fault(
        _set("input", lambda c: c.input.narrow(time_axis(c), 0, 0)[..., :0])
    ),
    "no tensor": Fault(
        _set(
            "input",
            lambda c: [None, c.input.tolist(), c.input.detach().float().numpy(), "input", 5, (c.input,), [c.input]][
                (c.amount + 3 * c.which) % 7
            ],
        ),
        or_else=(TypeError,),
    ),
    "hx: more rows": Fault(_set("state", lambda c: longer(c.state, 1, c.amount)), needs_hx=True),
    "hx: fewer rows": Fault(_set("state", lambda c: shorter(c.state, 1, c.amount)), needs_hx=True),
}  # fmt: skip


# No documented fault, or no kind of number that matters; but nothing may break.
_MAY_PASS = (
    "batch_sizes: dtype",
    "indices: dtype",
    "indices: negative",
    "indices: too many",
    "indices: too few",
)


def _sizes(change: Callable[[Call, Tensor], Any]) -> Callable[[Call], None]:
    return lambda call: call.pack(batch_sizes=change(call, call.input.batch_sizes.clone()))


def _indices(change: Callable[[Call, Tensor], Tensor]) -> Callable[[Call], None]:
    def apply(call: Call) -> None:
        n = int(call.input.batch_sizes[0])
        indices = call.input.sorted_indices if call.input.sorted_indices is not None else torch.arange(n)
        changed = change(call, indices.clone())
        # Given both, PackedSequence inverts nothing and so sees nothing of the fault.
        call.pack(sorted_indices=changed, unsorted_indices=changed)

    return apply


def _at(call: Call, x: Tensor, value: Callable[[Tensor], Any]) -> Tensor:
    x[call.which % len(x)] = value(x[call.which % len(x)])
    return x


REFUSED = (ValueError, RuntimeError, TypeError, IndexError)
# Torch checks next to nothing here: it dies with a wrong number of features or of states, and with batch_sizes that do
# not belong to the data it reads what fits, which nobody notices.
PACKED_FAULTS: dict[str, Fault] = {
    name: dataclasses.replace(fault, or_else=(*REFUSED, *fault.or_else), ask_torch=False)
    for name, fault in SHARED_FAULTS.items()
} | {
    name: Fault(apply, REFUSED, needs_hx=name.startswith("hx"), ask_torch=False, may_pass=name in _MAY_PASS)
    for name, apply in {
        "data: rank": _set("data", lambda c: of_rank(c.data, [0, 1, 3, 4][(c.amount + c.which) % 4])),
        "data: rows missing": _set("data", lambda c: shorter(c.data, 0, c.amount)),
        "data: rows too many": _set("data", lambda c: longer(c.data, 0, c.amount)),
        "batch_sizes: larger": _sizes(lambda c, n: _at(c, n, lambda k: k + c.amount)),
        "batch_sizes: smaller": _sizes(lambda c, n: _at(c, n, lambda k: k - c.amount)),
        "batch_sizes: moved": _sizes(
            lambda c, n: _at(c, torch.cat([n, n[:1] * 0 + 1]), lambda k: k - 1)
        ),
        "batch_sizes: zero": _sizes(lambda c, n: _at(c, n, lambda k: 0)),
        "batch_sizes: negative": _sizes(lambda c, n: _at(c, n, lambda k: -k)),
        "batch_sizes: huge": _sizes(lambda c, n: _at(c, n, lambda k: 2**62)),
        "batch_sizes: turned round": _sizes(lambda c, n: n.flip(0)),
        "batch_sizes: longer": _sizes(lambda c, n: torch.cat([n, n[-1:]])),
        "batch_sizes: shorter": _sizes(lambda c, n: n[:-1]),
        "batch_sizes: empty": _sizes(lambda c, n: n[:0]),
        "batch_sizes: rank": _sizes(lambda c, n: n[None] if c.which % 2 else n[0]),
        "batch_sizes: dtype": _sizes(lambda c, n: n.to([torch.int32, torch.float32, torch.bool][c.amount - 1])),
        "indices: out of range": _indices(lambda c, n: _at(c, n, lambda k: k + len(n) + c.amount)),
        "indices: negative": _indices(lambda c, n: _at(c, n, lambda k: -1 - k)),
        "indices: too few": _indices(lambda c, n: n[:-1]),
        "indices: too many": _indices(lambda c, n: torch.cat([n, n])),
        "indices: dtype": _indices(lambda c, n: n.double()),
        # torch drops the rows
        "hx: more rows": _set("state", lambda c: longer(c.state, 1, c.amount)),
        "hx: fewer rows": _set("state", lambda c: shorter(c.state, 1, c.amount)),
    }.items()
}  # fmt: skip


def is_valid(call: Call) -> bool:
    """Whether a call with a PackedSequence is none that has to be refused: a fault may leave it as it was."""
    m, (data, sizes, sorted_indices, unsorted_indices) = call.module, call.input
    w = m.weight_ih_l0
    sets = m.num_layers * (2 if m.bidirectional else 1)
    if not (
        data.dim() == 2 and data.size(1) == m.input_size and (data.dtype, data.device) == (w.dtype, w.device)
    ):
        return False
    n = sizes.tolist()
    if sizes.dtype != torch.int64 or sizes.dim() != 1 or not n or n != sorted(n, reverse=True) or n[-1] < 1:
        return False
    if sum(n) != data.size(0) or data.layout != torch.strided:
        return False
    for indices in (sorted_indices, unsorted_indices):
        if indices is not None and (
            indices.dtype != torch.int64 or sorted(indices.tolist()) != list(range(n[0]))
        ):
            return False
    if call.hx is None:
        return True
    if not isinstance(call.hx, (tuple, list)) or len(call.hx) != 2:
        return False
    for state, size in zip(call.hx, (m.proj_size or m.hidden_size, m.hidden_size), strict=True):
        if (
            not isinstance(state, Tensor)
            or state.shape != (sets, n[0], size)
            or state.layout != torch.strided
        ):
            return False
        if (state.dtype, state.device) != (data.dtype, data.device):
            return False
    return True


@dataclasses.dataclass(frozen=True)
class Broken:
    """A case, and what is wrong with its arguments: a name out of TENSOR_FAULTS or PACKED_FAULTS."""

    case: Case
    fault: str
    amount: int = 1
    which: int = 0

    @property
    def how(self) -> Fault:
        return (PACKED_FAULTS if self.case.packed else TENSOR_FAULTS)[self.fault]


def outcome(call: Call, grad: bool) -> Exception | dict[str, Tensor]:
    with torch.set_grad_enabled(grad):
        try:
            values = named(call.module(call.input, call.hx, **call.asked))
            if any(v.requires_grad for v in values.values()):
                sum(v.real.double().sum() for v in values.values()).backward()
        except Exception as error:  # of any kind: that is the question
            return error
    return {name: v.detach() for name, v in values.items()}


def check_broken(broken: Broken, kind: type[nn.Module] = lstm_ext.LSTM) -> str:
    """Says which exception it was, or "accepted"."""
    case, how = broken.case, broken.how
    with environment(case):
        tensors = tensors_of(case)
        grad = case.mode == "grad"

        def call_of(module: nn.Module) -> Call:
            _, input, hx, asked = arguments_of(case, tensors, case.torch_dtype)
            if not isinstance(module, lstm_ext.LSTM):
                asked = {}
            return Call(module, input, hx, broken.amount, broken.which, asked)

        def attempt(layer: type[nn.Module]) -> Exception | dict[str, Tensor]:
            module = make_module(layer, case, case.torch_dtype, tensors.weights)
            call = call_of(module)
            with torch.no_grad():
                how.apply(call)
            return outcome(call, grad)

        module = make_module(kind, case, case.torch_dtype, tensors.weights)
        parameters = dict(module.named_parameters())
        before = outcome(call_of(module), grad)
        call = call_of(module)
        with torch.no_grad():
            how.apply(call)
        valid = not how.ask_torch and not broken.fault.startswith(("weight", "bias")) and is_valid(call)
        ours = outcome(call, grad)
        for name, p in parameters.items():
            setattr(module, name, p)
        afterwards = outcome(call_of(module), grad)
        theirs = attempt(nn.LSTM) if how.ask_torch or valid else None

    assert isinstance(before, dict) and isinstance(afterwards, dict), (before, afterwards)
    for name, value in before.items():
        assert torch.equal(afterwards[name], value), f"check_broken({broken}): afterwards {name} is another"
    if isinstance(ours, how.or_else) and not valid:
        return type(ours).__name__
    if theirs is None:
        assert how.may_pass and isinstance(ours, dict), f"check_broken({broken}):\n{describe(ours)}"
        return "passed"
    if isinstance(theirs, Exception):
        assert type(ours) is type(theirs), (
            f"check_broken({broken}):\n{describe(ours)}\nexpected torch's\n{describe(theirs)}"
        )
        return type(ours).__name__
    assert not isinstance(ours, Exception), (
        f"check_broken({broken}):\n{describe(ours)}\nand torch computes {describe(theirs)}"
    )
    for name in theirs:
        value = ours[name]
        assert value.device == theirs[name].device
        if value.device.type != "meta":
            torch.testing.assert_close(
                value, theirs[name], msg=lambda m, n=name: f"check_broken({broken}): {n}: {m}"
            )
    return "accepted"


def describe(result: Exception | dict[str, Tensor]) -> str:
    if isinstance(result, Exception):
        return f"{type(result).__name__}: {result}"
    return str({name: (tuple(v.shape), v.dtype) for name, v in result.items()})
