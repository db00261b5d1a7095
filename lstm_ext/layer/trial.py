"""Layers of random numbers on which kernels are tried: at their first use on a GPU, and by ``lstm_ext.selftest``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

Results = dict[str, Tensor]
TF32_EPS = 2.0**-10


@dataclass(frozen=True)
class Case:
    name: str
    steps: int = 9
    batch: int = 5
    input_size: int = 20
    hidden_size: int = 24
    proj_size: int = 0
    bidirectional: bool = False
    lengths: tuple[int, ...] | None = None  # lengths of packed data: falling, one for each sequence
    bias: bool = True
    states: bool = True  # whether h0 and c0 are given
    batch_first: bool = False  # layout in memory; the operators get a transposed view
    options: bool = False  # lengths, a recurrent mask and zoneout, at a first use only
    gru: bool = False


PACKED = (9, 9, 6, 4, 1)
WIDE = Case("wide", steps=4, hidden_size=520)  # more tiles than stages, in both passes
CASES = (
    Case("dense"),
    Case("one step", steps=1, batch=1),
    Case("larger", steps=20, batch=33, input_size=70, hidden_size=136),
    WIDE,
    Case("rows that begin anywhere", batch=18, hidden_size=67),
    Case("no biases, no initial states", bias=False, states=False),
    Case("batch-first strides", batch_first=True),
    Case("packed", lengths=PACKED),
    Case("bidirectional", bidirectional=True),
    Case("projection", proj_size=10),
    Case("packed, bidirectional, projection", lengths=PACKED, bidirectional=True, proj_size=10),
)
# There are no kernels of a GRU for CUDA.
GRU_CASES = (
    Case("GRU", batch=18, hidden_size=67, gru=True),
    Case("GRU, packed, bidirectional, no biases", lengths=PACKED, bidirectional=True, bias=False, gru=True),
)
# A first use tries these, and so does a selftest on a GPU: its kernels divide the work in each of these ways.
TRIED_CASES = (
    WIDE,
    Case(
        "many packed rows", batch=33, hidden_size=67, bidirectional=True, lengths=(4,) + 15 * (3,) + 17 * (2,)
    ),
    Case("options", steps=4, batch=18, hidden_size=40, options=True),
    Case("one step of three rows", steps=1, batch=3, hidden_size=40),
    Case("several launches", lengths=(300, 270, 260, 2, 1)),
    Case("several tiles of rows", steps=4, batch=70, hidden_size=520),
    Case("two tiles of rows at once", steps=4, batch=70, hidden_size=512),
    Case("weights that registers do not hold", steps=4, batch=4, hidden_size=1040),
    Case("blocks on every multiprocessor", steps=4, batch=512, hidden_size=64, bidirectional=True),
    Case("that wait for each other", steps=4, batch=40, hidden_size=1024),
)


class Problem:
    """One layer to compute: arguments by name, rounded to the dtype, and a gradient for each result.

    The leaves hold zeros until `fill`, which exposes a kernel that reads them too early.
    """

    def __init__(
        self, case: Case, dtype: torch.dtype, device: torch.device, in_float64: bool = False
    ) -> None:
        """``in_float64``: the rounded numbers, held in float64."""
        self.case = case
        # torch's random state stays as it is.
        generator, wide = torch.Generator().manual_seed(7), torch.promote_types(dtype, torch.float32)
        hidden, state = case.hidden_size, case.proj_size or case.hidden_size
        gates, states = (3, ["h0"]) if case.gru else (4, ["h0", "c0"])
        directions, held = 2 if case.bidirectional else 1, torch.float64 if in_float64 else dtype

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            numbers = torch.randn(shape, generator=generator, dtype=wide, device="cpu") * scale
            return numbers.to(device, dtype).to(held)

        self.batch_sizes, batch = None, case.batch
        rows: tuple[int, ...] = (batch, case.steps) if case.batch_first else (case.steps, batch)
        if case.lengths is not None:
            at_once = [sum(length > t for length in case.lengths) for t in range(case.lengths[0])]
            self.batch_sizes, rows = torch.tensor(at_once, device="cpu"), (sum(at_once),)
        self.numbers = {"input": draw(*rows, case.input_size)}
        if case.states:
            sizes = (directions, batch, state), (directions, batch, hidden)
            self.numbers |= {name: draw(*n) for name, n in zip(states, sizes, strict=False)}
        for suffix in ("", "_reverse")[:directions]:
            shapes = {"weight_ih": (gates * hidden, case.input_size), "weight_hh": (gates * hidden, state)}
            if case.bias:
                shapes |= {"bias_ih": (gates * hidden,), "bias_hh": (gates * hidden,)}  # type: ignore[dict-item]
            if case.proj_size:
                shapes["weight_hr"] = (state, hidden)
            self.numbers |= {name + suffix: draw(*n, scale=hidden**-0.5) for name, n in shapes.items()}
        of_results = ((*rows, directions * state), (directions, batch, state), (directions, batch, hidden))
        self.grads = [draw(*n) for n in of_results[: 1 + len(states)]]
        self.options: dict[str, Any] = {}
        if case.options:
            mask = torch.rand(directions, batch, state, generator=generator, device="cpu") < 0.7
            lengths = torch.arange(batch, device=device) % (case.steps + 1)
            # In the dtype of the cell's state.
            mask = mask.to(device, torch.promote_types(held, torch.float32)) / 0.7
            self.options = {"recurrent_mask": mask, "lengths": lengths, "zoneout_c": 0.1}
        self.leaves = {name: torch.zeros_like(t).requires_grad_() for name, t in self.numbers.items()}

    def fill(self) -> Problem:
        with torch.no_grad():
            for name, leaf in self.leaves.items():
                leaf.copy_(self.numbers[name])
        return self

    def call(self, tensors: dict[str, Tensor]) -> tuple[Any, ...]:
        """The arguments of a layer, without options; of the numbers, or of the leaves."""
        input, h0, c0, *weights = [
            tensors.get(name) for name in dict.fromkeys(["input", "h0", "c0", *tensors])
        ]
        if self.case.batch_first:
            input = input.transpose(0, 1)  # type: ignore[union-attr]
        return input, h0, c0, weights, self.batch_sizes, self.case.bias, self.case.bidirectional

    def values(self, layer: Callable[..., Any]) -> list[Tensor]:
        output, *states = layer(*self.call(self.leaves))
        return [output.transpose(0, 1) if self.case.batch_first else output, *states][: len(self.grads)]

    def compute(self, layer: Callable[..., Any]) -> Results:
        """The results and the gradients by autograd."""
        results = self.values(layer)
        gradients = torch.autograd.grad(results, list(self.leaves.values()), self.grads)
        return self.named([t.detach() for t in results], gradients)

    def named(self, results: Iterable[Tensor], gradients: Iterable[Tensor]) -> Results:
        found = dict(zip(("output", "h_n", "c_n"), results, strict=False))
        return found | {f"grad of {n}": g for n, g in zip(self.leaves, gradients, strict=True)}


class Verdict(NamedTuple):
    """It is about the result whose error is the largest share of what is allowed."""

    name: str
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed  # not NaN

    def __str__(self) -> str:
        return f"error {self.error:.1e}, allowed {self.allowed:.1e} ({self.name})"


def judge(
    found: Results,
    expected: Results,
    dtype: torch.dtype,
    eps: float | None = None,
    rounding: dict[str, float] | None = None,
) -> Verdict:
    """Errors are ``|found - expected| / |expected|``, in 2-norms.

    4 eps are allowed and twice the ``rounding``, by name: what the reference at the dtype errs by. In float64, where
    the reference is no more exact than the kernels, 64 eps are allowed.
    """
    eps = torch.finfo(dtype).eps if eps is None else eps
    verdicts = []
    for name, error in errors(found, expected).items():
        allowed = 64 * eps if dtype == torch.float64 else 4 * eps + 2 * (rounding or {}).get(name, 0.0)
        if found[name].dtype != dtype:
            name, error = f"{name} in {found[name].dtype}", math.inf
        verdicts.append(Verdict(name, error, allowed))
    return max(verdicts, key=lambda v: math.inf if math.isnan(v.error) else v.error / v.allowed)


def errors(found: Results, expected: Results) -> dict[str, float]:
    def error(ours: Tensor, wanted: Tensor) -> Tensor:
        if ours.shape != wanted.shape:
            return wanted.new_full((), math.inf, dtype=torch.float64)
        difference = torch.linalg.vector_norm(ours.detach().to(wanted.device).double() - wanted.double())
        return difference / torch.linalg.vector_norm(wanted.double()).clamp_min(1e-30)

    # One synchronisation with the device.
    numbers = torch.stack([error(found[name], expected[name]) for name in expected]).tolist()
    return dict(zip(expected, numbers, strict=True))
