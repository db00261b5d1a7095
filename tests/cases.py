"""The one table of cases: what a layer with arguments is, its tensors, and what computes it.

A `Case` is plain values. `layer` draws its tensors. `ours` runs it on the route that a layer takes here; `by_torch` on
torch's own layer, or on the equations where torch has no such layer; `expected` gives the reference in float64. What
does not depend on our kernels is computed once: the tests of a case for each instruction set follow each other.
`problems` holds ours against the others by the rule of judge.py.

At the end are the same for modules: values and all gradients of a module that has been made already.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import internals
import torch
from internals import LayerOptions
from judge import Worst, assert_as_accurate_as_torch, stacked
from matrix.cases import differing
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import lstm_ext
from lstm_ext import reference
from lstm_ext.layer import equations as layer_equations

LOW = (torch.float16, torch.bfloat16)
DRAWS = 20  # single tensors of a few numbers are a lottery


@dataclasses.dataclass(frozen=True)
class Case:
    """One layer, its arguments, and which gradients go in and come out."""

    steps: int = 5
    batch: int = 3
    input_size: int = 4
    input_scale: float = 1.0
    weights_first: bool = False  # drawn before the input
    # Normal ones of the standard deviation H^-1/2, instead of torch's uniform ones up to it.
    wide_weights: bool = False
    hidden_size: int = 6
    proj_size: int = 0
    bias: bool = True
    bidirectional: bool = False
    hx: bool = True
    batch_first: bool = False
    packed: tuple[int, ...] = ()  # the lengths of packed data, if there are any; instead of steps and batch
    chunk_bytes: int = 1 << 25  # of the emulated CUDA layer
    strides: str = "dense"  # of the input and of the gradient of the output
    frozen: tuple[int, ...] = ()  # places among input, h0, c0, weights
    incoming: tuple[bool, bool, bool] = (True, True, True)  # gradients of output, h_n, c_n
    resets: str = ""  # "to zeros" or "to a state"
    reset_share: float = 0.4
    lengths: tuple[
        int, ...
    ] = ()  # of the rows of dense input, instead of batch; what is past them is not finite
    mask: bool = False  # of recurrent dropout
    zoneout: str = ""  # "flags" or "shares"; of one state "flags of h", "share of h" and so on
    norm: str = ""  # the dtype of its parameters: "own", or "float32" for 16-bit input
    norm_cell: bool = False
    peephole: str = ""  # the same
    cell_clip: float = 0
    coupled_gates: bool = False
    activations: str = ""
    preactivation_clip: float = 0
    returned: str = ""  # "cell states", "gates" or "both", and their gradients
    recompute: bool = False

    def __repr__(self) -> str:
        return differing(self)

    def has_options(self) -> bool:
        """Whether anything beyond torch.nn.LSTM is requested."""
        return self.has_cell_options() or self._has(
            "resets", "lengths", "mask", "zoneout", "norm", "returned", "recompute"
        )

    def has_cell_options(self) -> bool:
        return self._has("peephole", "cell_clip", "coupled_gates", "activations", "preactivation_clip")

    def _has(self, *names: str) -> bool:
        return any([getattr(self, name) for name in names])

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def state_size(self) -> int:
        return self.proj_size or self.hidden_size

    @property
    def rows(self) -> int:
        return len(self.packed) or len(self.lengths) or self.batch


LENGTHS = (5, 0, 2, 4)
# Layer normalisation divides by what may be next to nothing if it is of a few numbers, such as the product of U with
# two or three features of a projection, some of them masked: then any arithmetic loses digits, float64 too.
OPTIONS = {
    "lengths": Case(lengths=LENGTHS),
    "lengths, no hx, both directions, in chunks": Case(
        lengths=LENGTHS, hx=False, bias=False, bidirectional=True, chunk_bytes=400
    ),
    "lengths, resets, projection": Case(
        lengths=LENGTHS, bidirectional=True, resets="to a state", proj_size=2
    ),
    "lengths, batch first": Case(lengths=LENGTHS, batch_first=True),
    "returned": Case(returned="both", bidirectional=True),
    "returned, packed, projection": Case(returned="both", packed=(5, 3, 1), proj_size=2),
    "mask": Case(mask=True, bidirectional=True),
    "mask, packed, projection": Case(mask=True, packed=(5, 3, 1), proj_size=2, bidirectional=True),
    "mask, resets": Case(mask=True, resets="to a state", bidirectional=True),
    "zoneout": Case(zoneout="flags", bidirectional=True),
    "zoneout, shares": Case(zoneout="shares"),
    "zoneout, packed, projection, resets": Case(
        zoneout="flags", packed=(5, 3, 1), proj_size=2, bidirectional=True, resets="to a state"
    ),
    "zoneout, shares, projection": Case(zoneout="shares", proj_size=2, resets="to zeros"),
    "norm": Case(norm="own", hidden_size=16),
    "norm, no bias, no hx": Case(
        norm="own", steps=3, bias=False, hx=False, hidden_size=40, bidirectional=True
    ),
    "norm, packed, projection": Case(
        norm="float32", packed=(5, 3, 1), hidden_size=16, proj_size=12, bidirectional=True
    ),
    "norm, more units than threads": Case(norm="own", steps=2, batch=2, hidden_size=300),
    "norm, in chunks": Case(norm="own", hidden_size=16, chunk_bytes=2000, resets="to a state"),
    "norm, clip": Case(norm="own", hidden_size=16, cell_clip=0.3, resets="to a state"),
    "norm, cell": Case(norm="own", norm_cell=True, hidden_size=16, chunk_bytes=2000, resets="to a state"),
    "norm, cell, clip, no bias, no hx": Case(
        norm="own",
        norm_cell=True,
        steps=3,
        hidden_size=40,
        cell_clip=1,
        bias=False,
        hx=False,
        bidirectional=True,
    ),
    "norm, cell, all": Case(
        norm="float32",
        norm_cell=True,
        packed=(5, 3, 1),
        bidirectional=True,
        hidden_size=16,
        proj_size=12,
        resets="to a state",
        mask=True,
        zoneout="flags",
        returned="both",
    ),
    "peephole": Case(peephole="own", bidirectional=True),
    "peephole, packed, projection": Case(
        peephole="float32", packed=(5, 3, 1), proj_size=2, resets="to a state", bidirectional=True
    ),
    "peephole, no hx, in chunks": Case(peephole="own", hx=False, bias=False, chunk_bytes=700, steps=9),
    "clip": Case(cell_clip=0.2, bidirectional=True, returned="both"),
    "clip, shares": Case(cell_clip=0.2, zoneout="shares", packed=(5, 3, 1)),
    "coupled": Case(coupled_gates=True, returned="both", bidirectional=True),
    "coupled, clip, recompute": Case(
        coupled_gates=True, cell_clip=0.3, recompute=True, proj_size=2, chunk_bytes=1000
    ),
    "activations": Case(
        activations="hard_sigmoid(0.2,0.5) softsign tanh", returned="both", bidirectional=True
    ),
    "activations, lengths, coupled": Case(
        activations="scaled_tanh(0.7,0.8) elu(0.4) affine(0.6,0.1)",
        coupled_gates=True,
        lengths=LENGTHS,
        returned="both",
    ),
    "activations, norm, zoneout": Case(
        activations="hard_sigmoid(0.1,0.5) softsign tanh",
        norm="own",
        hidden_size=16,
        zoneout="shares",
        preactivation_clip=3,
    ),
    "activations, projection, in chunks": Case(
        activations="hard_sigmoid(0.1,0.5) leaky_relu(0.8) elu(1)", proj_size=2, chunk_bytes=1000
    ),
    "activations, peephole, all clips": Case(
        activations="hard_sigmoid(0.25,0.5) relu tanh",
        peephole="own",
        cell_clip=0.4,
        preactivation_clip=0.5,
        packed=(5, 3, 1),
        resets="to a state",
    ),
    "preactivation clip": Case(preactivation_clip=0.3, bidirectional=True, returned="both"),
    "peephole, clip, coupled, all": Case(
        bidirectional=True,
        proj_size=3,
        lengths=LENGTHS,
        resets="to a state",
        mask=True,
        zoneout="flags",
        peephole="own",
        cell_clip=0.4,
        coupled_gates=True,
        returned="both",
    ),
    "mask, shares, lengths, resets, projection": Case(
        mask=True, zoneout="shares", lengths=LENGTHS, resets="to a state", proj_size=2
    ),
    "recompute": Case(recompute=True, bidirectional=True, chunk_bytes=1000),
    "recompute, all": Case(
        recompute=True,
        bidirectional=True,
        proj_size=3,
        lengths=LENGTHS,
        resets="to a state",
        mask=True,
        zoneout="shares",
    ),
    "all": Case(
        bidirectional=True,
        hidden_size=16,
        proj_size=12,
        lengths=LENGTHS,
        resets="to a state",
        mask=True,
        zoneout="flags",
        norm="own",
        returned="both",
    ),
    "all, packed, shares, in chunks": Case(
        bidirectional=True,
        packed=(6, 4, 4, 2),
        resets="to zeros",
        mask=True,
        zoneout="shares",
        hidden_size=16,
        norm="float32",
        returned="both",
        chunk_bytes=4000,
    ),
}

CASES = {
    "dense": Case(),
    "one step": Case(steps=1),
    "one row": Case(batch=1),
    "no features": Case(input_size=0, bidirectional=True),
    "one of everything": Case(steps=1, batch=1, input_size=1, hidden_size=1),
    "no bias, no hx": Case(bias=False, hx=False),
    "more units than a block": Case(steps=2, hidden_size=150),
    "more rows than a block": Case(steps=2, batch=20, hidden_size=33),
    "batch first": Case(batch_first=True),
    "batch first, in chunks": Case(batch_first=True, chunk_bytes=600),
    "in chunks": Case(steps=9, chunk_bytes=700),
    "in chunks, both directions": Case(steps=9, chunk_bytes=700, bidirectional=True),
    "both directions": Case(bidirectional=True),
    "projection": Case(proj_size=2),
    "projection, both directions, no hx": Case(proj_size=3, bidirectional=True, hx=False, bias=False),
    "packed": Case(packed=(5, 5, 3, 1)),
    "packed, no hx": Case(packed=(4, 2, 1), hx=False),
    "packed, both directions": Case(packed=(6, 4, 4, 2), bidirectional=True),
    "packed, both directions, projection, in chunks": Case(
        packed=(6, 4, 4, 2), bidirectional=True, proj_size=2, chunk_bytes=400
    ),
    "packed, more steps than a launch": Case(packed=(70, 66, 1), hidden_size=2, input_size=1),
    "expanded": Case(strides="expanded"),
    "columns apart": Case(strides="columns apart"),
    "frozen input and weights": Case(frozen=(0, 3, 6), bidirectional=True),
    "frozen biases and states": Case(frozen=(1, 2, 5), proj_size=2),
    "gradient of output only": Case(incoming=(True, False, False), bidirectional=True),
    "gradient of h_n only": Case(incoming=(False, True, False), packed=(4, 3, 1)),
    "gradient of c_n only": Case(incoming=(False, False, True), packed=(4, 3, 1), bidirectional=True),
    "resets": Case(resets="to a state"),
    "resets, no hx": Case(resets="to zeros", hx=False, bias=False),
    "resets, both directions, in chunks": Case(
        steps=9, chunk_bytes=700, bidirectional=True, resets="to a state"
    ),
    "resets, projection": Case(resets="to a state", proj_size=2, bidirectional=True),
    "resets, packed": Case(resets="to a state", packed=(6, 4, 4, 2), bidirectional=True),
    "resets, packed, projection": Case(resets="to zeros", packed=(5, 3, 1), proj_size=2),
    "gradient of h_n only, projection": Case(incoming=(False, True, False), proj_size=2, packed=(3, 1)),
    **OPTIONS,
}


def with_strides(x: Tensor, strides: str) -> Tensor:
    if strides == "expanded":  # all rows of a step are one in memory
        return x[:, :1].expand(x.shape)
    if strides == "columns apart":
        return torch.stack([x, x], dim=-1)[..., 0]
    return x


class Layer:
    """The arguments of a layer and the gradients of its results, in float64, with values that `dtype` holds."""

    def __init__(self, case: Case, dtype: torch.dtype, seed: int) -> None:
        self.case = case
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            x = torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu") * scale
            return x.to(dtype).double()

        def weight(*shape: int) -> Tensor:
            if case.wide_weights:
                return draw(*shape, scale=case.hidden_size**-0.5)
            x = torch.rand(*shape, generator=generator, dtype=torch.float64, device="cpu")
            return ((2 * x - 1) * case.hidden_size**-0.5).to(dtype).double()

        def chosen(*shape: int, share: float) -> Tensor:
            return torch.rand(*shape, generator=generator, device="cpu") < share

        D, H, P, B = case.directions, case.hidden_size, case.state_size, case.rows

        def draw_input() -> None:
            self.batch_sizes = None
            if case.packed:
                sizes = [sum(n > t for n in case.packed) for t in range(max(case.packed))]
                self.batch_sizes = torch.tensor(sizes, device="cpu")
                self.input = draw(sum(case.packed), case.input_size, scale=case.input_scale)
                grad_output = draw(sum(case.packed), D * P)
            else:
                first, second = (B, case.steps) if case.batch_first else (case.steps, B)
                self.input = draw(first, second, case.input_size, scale=case.input_scale)
                grad_output = draw(first, second, D * P)
                if case.batch_first:
                    self.input, grad_output = self.input.transpose(0, 1), grad_output.transpose(0, 1)
                self.input = with_strides(self.input, case.strides)
                grad_output = with_strides(grad_output, case.strides)
            self.grads = [grad_output]

        def draw_states() -> None:
            self.h0 = draw(D, B, P) if case.hx else None
            self.c0 = draw(D, B, H) if case.hx else None

        def draw_weights() -> None:
            self.weights: list[Tensor] = []
            for _ in range(D):
                self.weights += [weight(4 * H, case.input_size), weight(4 * H, P)]
                if case.bias:
                    self.weights += [weight(4 * H), weight(4 * H)]
                if case.proj_size:
                    self.weights.append(weight(P, H))

        parts = (draw_input, draw_states, draw_weights)
        for part in reversed(parts) if case.weights_first else parts:
            part()
        to_a_state = case.resets == "to a state"
        self.reset_h, self.reset_c = (draw(D, B, P), draw(D, B, H)) if to_a_state else (None, None)
        rows = self.input.shape[:-1]
        self.resets = chosen(*rows, share=case.reset_share) if case.resets else None
        grads = (*self.grads, draw(D, B, P), draw(D, B, H))
        self.grads = [g if given else None for g, given in zip(grads, case.incoming, strict=True)]

        self.lengths = None
        if case.lengths:
            self.lengths = torch.tensor(case.lengths, device="cpu")
            self.counts = torch.arange(case.steps, device="cpu").unsqueeze(1) < self.lengths
            for x, junk in ((self.input, float("inf")), (self.grads[0], float("nan"))):
                x.masked_fill_(~self.counts.unsqueeze(-1), junk)
        self.mask = chosen(D, B, P, share=0.7).double() / 0.7 if case.mask else None
        self.shares = (
            0.3 if case.zoneout in ("shares", "share of h") else 0.0,
            0.15 if case.zoneout in ("shares", "share of c") else 0.0,
        )
        self.keep_h = chosen(D, *rows, P, share=0.3) if case.zoneout in ("flags", "flags of h") else None
        self.keep_c = chosen(D, *rows, H, share=0.4) if case.zoneout in ("flags", "flags of c") else None
        self.norm: list[Tensor] = []
        for _ in range(D if case.norm else 0):
            self.norm += [(1 + draw(n, scale=0.2)).to(dtype).double() for n in (4 * H, 4 * H, H)]
            self.norm += [draw(H)] if case.bias else []
        self.peephole = [draw(H, scale=0.5) for _ in range(3 * D if case.peephole else 0)]
        if case.returned in ("cell states", "both"):
            self.grads.append(draw(D, *rows, H))
        if case.returned in ("gates", "both"):
            self.grads.append(draw(D, *rows, H, 4))
        self.needs_grad = [t is not None and n not in case.frozen for n, t in enumerate(self.tensors())]

    def tensors(self) -> list[Tensor | None]:
        return [self.input, self.h0, self.c0, *self.weights, *self.learned()]

    def learned(self) -> list[Tensor | None]:
        """What of the options may have gradients."""
        return [self.reset_h, self.reset_c, *self.norm, *self.peephole] if self.case.has_options() else []

    def names(self) -> list[str]:
        """The names of results and gradients."""
        case = self.case
        results = ["output", "h_n", "c_n"]
        results += ["cell states"] if case.returned in ("cell states", "both") else []
        results += ["gates"] if case.returned in ("gates", "both") else []
        inputs = ["input", "h0", "c0"]
        one = [
            "w_ih",
            "w_hh",
            *(["b_ih", "b_hh"] if case.bias else []),
            *(["w_hr"] if case.proj_size else []),
        ]
        inputs += [f"{name}{end}" for end in ("", "_reverse")[: case.directions] for name in one]
        if self.learned():
            inputs += ["reset_h", "reset_c", *(f"norm {n}" for n in range(len(self.norm)))]
            inputs += [f"peephole {n}" for n in range(len(self.peephole))]
        needed = [name for name, needed in zip(inputs, self.needs_grad, strict=True) if needed]
        return [*results, *(f"grad of {name}" for name in needed)]

    def options(self, dtype: torch.dtype, learned: Sequence[Tensor | None]) -> LayerOptions | None:
        """Those of the case; `learned` is what `learned()` gives, in any dtype."""
        if not self.case.has_options():
            return None
        # A mask of 16 bits would not hold 1 / 0.7.
        mask = self.mask if self.mask is None or dtype.itemsize == 8 else self.mask.float()
        return LayerOptions(
            resets=self.resets,
            reset_h=learned[0],
            reset_c=learned[1],
            lengths=self.lengths,
            recurrent_mask=mask,
            keep_h=self.keep_h,
            keep_c=self.keep_c,
            zoneout_h=self.shares[0],
            zoneout_c=self.shares[1],
            norm=tuple(learned[2 : 2 + len(self.norm)]),
            norm_cell=self.case.norm_cell,
            peephole=tuple(learned[2 + len(self.norm) :]),
            cell_clip=self.case.cell_clip,
            coupled_gates=self.case.coupled_gates,
            activations=self.case.activations,
            preactivation_clip=self.case.preactivation_clip,
            return_cell_states=self.case.returned in ("cell states", "both"),
            return_gates=self.case.returned in ("gates", "both"),
            recompute=self.case.recompute,
        )

    def without_flags_past_the_end(self, options: LayerOptions) -> LayerOptions:
        """As a layer is given them; the kernels do not mind such a flag."""
        if options.resets is None or self.lengths is None:
            return options
        return dataclasses.replace(options, resets=options.resets & self.counts.to(options.resets.device))

    def arguments(
        self, dtype: torch.dtype, device: str = "cpu"
    ) -> tuple[list[Tensor | None], tuple[Any, ...]]:
        """The leaves, and what `reference.lstm_layer` takes, made of them."""

        def stored(t: Tensor | None, needs_grad: bool, strides: str) -> Tensor | None:
            return t if t is None else self._stored(t, dtype, device, strides).requires_grad_(needs_grad)

        case = self.case
        strides = [case.strides, *["dense"] * (len(self.needs_grad) - 1)]
        leaves = list(map(stored, self.tensors(), self.needs_grad, strides))
        end = 3 + len(self.weights)
        options = self.options(dtype, leaves[end:])
        if options is not None:
            options = on_device(self.without_flags_past_the_end(options), device)
        layer = (*leaves[:3], leaves[3:end], self.batch_sizes, case.bias, case.bidirectional)
        return leaves, layer if options is None else (*layer, options)

    def results(
        self, function: Callable[..., Any], dtype: torch.dtype, device: str = "cpu"
    ) -> dict[str, Tensor]:
        """Results and gradients of a function that takes what `reference.lstm_layer` takes."""
        leaves, arguments = self.arguments(dtype, device)
        values = [y for y in function(*arguments) if y is not None]
        strides = [self.case.strides, *["dense"] * (len(self.grads) - 1)]
        grads = [
            g if g is None else self._stored(g, dtype, device, s)
            for g, s in zip(self.grads, strides, strict=True)
        ]
        outputs = [y for y, g in zip(values, grads, strict=True) if g is not None]
        inputs = [t for t, needed in zip(leaves, self.needs_grad, strict=True) if needed]
        gradients = torch.autograd.grad(
            outputs, inputs, [g for g in grads if g is not None], allow_unused=True, materialize_grads=True
        )
        return dict(zip(self.names(), [*(y.detach() for y in values), *gradients], strict=True))

    @staticmethod
    def _stored(t: Tensor, dtype: torch.dtype, device: str, strides: str) -> Tensor:
        t = t.detach().to(device, dtype, copy=True)  # keeps the strides of dense tensors
        return t if strides == "dense" else with_strides(t.contiguous(), strides)


def on_device(options: LayerOptions, device: str) -> LayerOptions:
    moved = {
        field.name: value.to(device)
        for field in dataclasses.fields(options)
        if isinstance(value := getattr(options, field.name), Tensor)
    }
    return dataclasses.replace(options, **moved)


def torch_layer(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    bias: bool,
    bidirectional: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """torch's own layer with the arguments of `reference.lstm_layer`."""
    directions = 2 if bidirectional else 1
    count, w_hh = len(weights) // directions, weights[1]
    batch = input.size(1) if batch_sizes is None else int(batch_sizes[0])
    if h0 is None:
        h0 = input.new_zeros(directions, batch, w_hh.size(1))
        c0 = input.new_zeros(directions, batch, w_hh.size(0) // 4)
    assert count == 2 + 2 * bias + (w_hh.size(1) < w_hh.size(0) // 4)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LSTM with projections is not supported with oneDNN")
        if batch_sizes is None:
            rest = (bias, 1, 0.0, True, bidirectional, False)
            return torch._VF.lstm(input, (h0, c0), tuple(weights), *rest)
        return torch._VF.lstm(input, batch_sizes, (h0, c0), tuple(weights), bias, 1, 0.0, True, bidirectional)


def torch_layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return nn.functional.layer_norm(x, x.shape[-1:], weight, bias)


layer = functools.lru_cache(maxsize=64)(Layer)


@functools.lru_cache(maxsize=256)
def theirs(
    case: Case, drawn: torch.dtype, seed: int, dtype: torch.dtype, equations: bool
) -> dict[str, Tensor]:
    """The tensors drawn for one dtype, computed in another one, without any kernel of ours."""
    function = reference.lstm_layer if equations or case.has_options() else torch_layer
    # It is torch's own normalisation that ours is held to.
    with torch.device("cpu"), mock.patch.object(layer_equations, "layer_norm", torch_layer_norm):
        return layer(case, drawn, seed).results(function, dtype)


def expected(case: Case, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """In float64, by torch's layer, or by the equations where torch has no such layer."""
    return theirs(case, dtype, seed, torch.float64, False)


def by_torch(case: Case, dtype: torch.dtype, seed: int, equations: bool = False) -> dict[str, Tensor]:
    """What torch's layer makes of it at its own dtype; or the equations, where there is none or they are requested."""
    return theirs(case, dtype, seed, dtype, equations)


def ours(case: Case, dtype: torch.dtype, seed: int, device: str = "cpu") -> dict[str, Tensor]:
    return layer(case, dtype, seed).results(internals.lstm_layer, dtype, device)


def problems(
    case: Case,
    dtype: torch.dtype,
    draws: int = DRAWS,
    ours: Callable[[Case, torch.dtype, int], dict[str, Tensor]] = ours,
    equations: bool = False,
    together: bool = False,
) -> list[str]:
    """Where the worst errors of all ``draws`` are larger than the rule of judge.py allows.

    With `equations` the rule compares with the equations in the same dtype instead of with torch's layer. In 16 bits
    they are more exact: they round once. With `together` it takes all draws as one: for tensors of one number, whose
    single errors may be anything.
    """
    worst, seen = Worst(), []
    for seed in range(draws):
        results = ours(case, dtype, seed)
        assert all(t.dtype == dtype for t in results.values())
        seen.append((results, by_torch(case, dtype, seed, equations), expected(case, dtype, seed)))
    if together:
        seen = [[stacked(side) for side in zip(*seen, strict=True)]]
    for sides in seen:
        worst.add(*sides)
    return [f"{case}: {problem}" for problem in worst.problems()]


def check(case: Case, dtype: torch.dtype, draws: int = DRAWS, **options: Any) -> None:
    found = problems(case, dtype, draws, **options)
    assert not found, "\n".join(found)


def check_quickly(case: Case, dtype: torch.dtype) -> None:
    """By one draw. If that is not exact enough, by as many as the rule takes."""
    if problems(case, dtype, draws=1):
        check(case, dtype)


# ---- modules


def tensors(result: tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Output, or its data where it is packed, h_n and c_n."""
    output, (h_n, c_n) = result
    return [output.data if isinstance(output, PackedSequence) else output, h_n, c_n]


def values_and_gradients(
    module: nn.Module,
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None = None,
    *,
    seed: int = 1,
    grad_of: tuple[str, ...] = ("output", "h_n", "c_n"),
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Outputs, and the gradients of everything, for random gradients of the outputs named in ``grad_of``.

    With ``dtype`` the computation runs on a copy of the module and the arguments converted to it. The
    gradients that go in are drawn in float32, so that they are the same numbers for each dtype.
    """
    if dtype is not None:
        module, input = copy.deepcopy(module).to(dtype), input.to(dtype)
        hx = None if hx is None else (hx[0].to(dtype), hx[1].to(dtype))
    leaves = {"input": input.detach().clone().requires_grad_()}
    if hx is not None:
        leaves |= {f"hx[{i}]": state.detach().clone().requires_grad_() for i, state in enumerate(hx)}
    state = None if hx is None else (leaves["hx[0]"], leaves["hx[1]"])
    output, (h_n, c_n) = module(leaves["input"], state)
    values = {"output": output, "h_n": h_n, "c_n": c_n}

    leaves |= {name: p for name, p in module.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(v.shape, generator=generator, device="cpu").to(v) for v in values.values()]
    chosen = [i for i, name in enumerate(values) if name in grad_of]
    gradients = torch.autograd.grad(
        [list(values.values())[i] for i in chosen],
        list(leaves.values()),
        [grads[i] for i in chosen],
        allow_unused=True,
        materialize_grads=True,
    )
    result = {name: value.detach() for name, value in values.items()}
    return result | {f"grad of {name}": g for name, g in zip(leaves, gradients, strict=True)}


def assert_module_as_accurate_as_torch(
    module: lstm_ext.LSTM,
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None = None,
    *,
    grad_of: tuple[str, ...] = ("output", "h_n", "c_n"),
) -> None:
    """Values and all gradients of a module, against torch's layer with the same weights."""
    theirs = lstm_ext.revert(copy.copy(module))
    if not theirs.training:
        # cuDNN has no backward pass in eval mode. Without dropout, training mode computes the same.
        theirs.dropout = 0.0
        theirs.train()
    assert_as_accurate_as_torch(
        values_and_gradients(module, input, hx, grad_of=grad_of),
        values_and_gradients(theirs, input, hx, grad_of=grad_of),
        values_and_gradients(theirs, input, hx, grad_of=grad_of, dtype=torch.float64),
    )
