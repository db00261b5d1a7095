"""Layers for tests of the CUDA kernels, emulated and on a GPU: their arguments, and what float64 makes of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from internals import LayerOptions
from torch import Tensor

from lstm_ext import reference

EPS = {torch.float64: 2**-52, torch.float32: 2**-23, torch.float16: 2**-10, torch.bfloat16: 2**-7}
LOW = (torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class Case:
    steps: int = 5
    batch: int = 3
    input_size: int = 4
    hidden_size: int = 6
    proj_size: int = 0
    bias: bool = True
    bidirectional: bool = False
    hx: bool = True
    batch_first: bool = False
    lengths: tuple[int, ...] = ()  # packed, if there are any
    chunk_bytes: int = 1 << 25
    strides: str = "dense"  # of the input and of the gradient of the output
    unwanted: tuple[int, ...] = ()  # places among input, h0, c0, weights
    given: tuple[bool, bool, bool] = (True, True, True)  # gradients of output, h_n, c_n
    resets: str = ""  # "to zeros" or "to a state"
    ends: tuple[int, ...] = ()  # of the rows of dense input; what is past them is not finite
    mask: bool = False
    zoneout: str = ""  # "masks" or "shares"
    norm: str = ""  # the dtype of its parameters: "own", or "float32" for 16-bit input
    returned: bool = False  # cell states and gates, and their gradients
    recompute: bool = False

    def has_extras(self) -> bool:
        return bool(
            self.resets
            or self.ends
            or self.mask
            or self.zoneout
            or self.norm
            or self.returned
            or self.recompute
        )


ENDS = (5, 0, 2, 4)
# Layer normalisation divides by what may be next to nothing if it is of a few numbers, such as the product of U with
# two or three features of a projection, some of them masked: then any arithmetic loses digits, float64 too.
EXTRAS = {
    "lengths": Case(ends=ENDS),
    "lengths, no hx, both directions, in pieces": Case(
        ends=ENDS, hx=False, bias=False, bidirectional=True, chunk_bytes=400
    ),
    "lengths, resets, projection": Case(ends=ENDS, bidirectional=True, resets="to a state", proj_size=2),
    "lengths, batch first": Case(ends=ENDS, batch_first=True),
    "returned": Case(returned=True, bidirectional=True),
    "returned, packed, projection": Case(returned=True, lengths=(5, 3, 1), proj_size=2),
    "mask": Case(mask=True, bidirectional=True),
    "mask, packed, projection": Case(mask=True, lengths=(5, 3, 1), proj_size=2, bidirectional=True),
    "mask, resets": Case(mask=True, resets="to a state", bidirectional=True),
    "zoneout": Case(zoneout="masks", bidirectional=True),
    "zoneout, shares": Case(zoneout="shares"),
    "zoneout, packed, projection, resets": Case(
        zoneout="masks", lengths=(5, 3, 1), proj_size=2, bidirectional=True, resets="to a state"
    ),
    "zoneout, shares, projection": Case(zoneout="shares", proj_size=2, resets="to zeros"),
    "norm": Case(norm="own", hidden_size=16),
    "norm, no bias, no hx": Case(
        norm="own", steps=3, bias=False, hx=False, hidden_size=40, bidirectional=True
    ),
    "norm, packed, projection": Case(
        norm="float32", lengths=(5, 3, 1), hidden_size=16, proj_size=12, bidirectional=True
    ),
    "norm, more units than threads": Case(norm="own", steps=2, batch=2, hidden_size=300),
    "norm, in pieces": Case(norm="own", hidden_size=16, chunk_bytes=2000, resets="to a state"),
    "recompute": Case(recompute=True, bidirectional=True, chunk_bytes=1000),
    "recompute, all": Case(
        recompute=True,
        bidirectional=True,
        proj_size=3,
        ends=ENDS,
        resets="to a state",
        mask=True,
        zoneout="shares",
    ),
    "all": Case(
        bidirectional=True,
        hidden_size=16,
        proj_size=12,
        ends=ENDS,
        resets="to a state",
        mask=True,
        zoneout="masks",
        norm="own",
        returned=True,
    ),
    "all, packed, shares, in pieces": Case(
        bidirectional=True,
        lengths=(6, 4, 4, 2),
        resets="to zeros",
        mask=True,
        zoneout="shares",
        hidden_size=16,
        norm="float32",
        returned=True,
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
    "batch first, in pieces": Case(batch_first=True, chunk_bytes=600),
    "in pieces": Case(steps=9, chunk_bytes=700),
    "in pieces, both directions": Case(steps=9, chunk_bytes=700, bidirectional=True),
    "both directions": Case(bidirectional=True),
    "projection": Case(proj_size=2),
    "projection, both directions, no hx": Case(proj_size=3, bidirectional=True, hx=False, bias=False),
    "packed": Case(lengths=(5, 5, 3, 1)),
    "packed, no hx": Case(lengths=(4, 2, 1), hx=False),
    "packed, both directions": Case(lengths=(6, 4, 4, 2), bidirectional=True),
    "packed, both directions, projection, in pieces": Case(
        lengths=(6, 4, 4, 2), bidirectional=True, proj_size=2, chunk_bytes=400
    ),
    "packed, more steps than a launch": Case(lengths=(70, 66, 1), hidden_size=2, input_size=1),
    "expanded": Case(strides="expanded"),
    "columns apart": Case(strides="columns apart"),
    "frozen input and weights": Case(unwanted=(0, 3, 6), bidirectional=True),
    "frozen biases and states": Case(unwanted=(1, 2, 5), proj_size=2),
    "gradient of output only": Case(given=(True, False, False), bidirectional=True),
    "gradient of h_n only": Case(given=(False, True, False), lengths=(4, 3, 1)),
    "gradient of c_n only": Case(given=(False, False, True), lengths=(4, 3, 1), bidirectional=True),
    "resets": Case(resets="to a state"),
    "resets, no hx": Case(resets="to zeros", hx=False, bias=False),
    "resets, both directions, in pieces": Case(
        steps=9, chunk_bytes=700, bidirectional=True, resets="to a state"
    ),
    "resets, projection": Case(resets="to a state", proj_size=2, bidirectional=True),
    "resets, packed": Case(resets="to a state", lengths=(6, 4, 4, 2), bidirectional=True),
    "resets, packed, projection": Case(resets="to zeros", lengths=(5, 3, 1), proj_size=2),
    "gradient of h_n only, projection": Case(given=(False, True, False), proj_size=2, lengths=(3, 1)),
    **EXTRAS,
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
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            x = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
            return x.to(dtype).double()

        D = 2 if case.bidirectional else 1
        H, P = case.hidden_size, case.proj_size or case.hidden_size
        B = len(case.lengths) or len(case.ends) or case.batch
        scale = H**-0.5
        self.batch_sizes = None
        if case.lengths:
            steps = range(max(case.lengths))
            self.batch_sizes = torch.tensor([sum(n > t for n in case.lengths) for t in steps])
            self.input = draw(sum(case.lengths), case.input_size)
            grad_output = draw(sum(case.lengths), D * P)
        else:
            first, second = (B, case.steps) if case.batch_first else (case.steps, B)
            self.input = draw(first, second, case.input_size)
            grad_output = draw(first, second, D * P)
            if case.batch_first:
                self.input, grad_output = self.input.transpose(0, 1), grad_output.transpose(0, 1)
            self.input = with_strides(self.input, case.strides)
            grad_output = with_strides(grad_output, case.strides)
        self.h0 = draw(D, B, P) if case.hx else None
        self.c0 = draw(D, B, H) if case.hx else None
        self.weights = []
        for _ in range(D):
            self.weights += [draw(4 * H, case.input_size, scale=scale), draw(4 * H, P, scale=scale)]
            if case.bias:
                self.weights += [draw(4 * H, scale=scale), draw(4 * H, scale=scale)]
            if case.proj_size:
                self.weights.append(draw(P, H, scale=scale))
        self.resets = None
        self.reset_h, self.reset_c = (
            (draw(D, B, P), draw(D, B, H)) if case.resets == "to a state" else (None, None)
        )
        if case.resets:
            self.resets = torch.rand(self.input.shape[:-1], generator=generator) < 0.4
        grads = (grad_output, draw(D, B, P), draw(D, B, H))
        self.grads = [g if given else None for g, given in zip(grads, case.given, strict=True)]

        rows = self.input.shape[:-1]
        self.lengths = torch.tensor(case.ends) if case.ends else None
        if case.ends:
            self.counts = torch.arange(case.steps).unsqueeze(1) < self.lengths
            for x, junk in ((self.input, float("inf")), (self.grads[0], float("nan"))):
                x.masked_fill_(~self.counts.unsqueeze(-1), junk)
        self.mask = None
        if case.mask:
            self.mask = (torch.rand(D, B, P, generator=generator) < 0.7).double() / 0.7
        self.zoneout = (0.0, 0.0)
        if case.zoneout == "shares":
            self.zoneout = (0.3, 0.15)
        elif case.zoneout == "masks":
            self.zoneout = tuple(torch.rand(D, *rows, n, generator=generator) < 0.3 for n in (P, H))
        self.norm = []
        for _ in range(D if case.norm else 0):
            self.norm += [1 + draw(n, scale=0.2).to(dtype).double() for n in (4 * H, 4 * H, H)]
            self.norm += [draw(H)] if case.bias else []
        self.norm = [t.to(dtype).double() for t in self.norm]
        if case.returned:
            self.grads.append(draw(D, *rows, H))
            if not case.recompute:
                self.grads.append(draw(D, *rows, H, 4))
        self.has_extras = case.has_extras()
        self.wanted = [t is not None and n not in case.unwanted for n, t in enumerate(self.tensors())]

    def extras(self, case: Case, dtype: torch.dtype, learned: Sequence[Tensor | None]) -> LayerOptions | None:
        """Those of the case; `learned` are reset_h, reset_c and the parameters of layer normalisation."""
        if not case.has_extras():
            return None
        mask = self.mask if self.mask is None or dtype.itemsize == 8 else self.mask.float()
        keep = self.zoneout if case.zoneout == "masks" else (None, None)
        shares = self.zoneout if case.zoneout == "shares" else (0.0, 0.0)
        return LayerOptions(
            resets=self.resets,
            reset_h=learned[0],
            reset_c=learned[1],
            lengths=self.lengths,
            recurrent_mask=mask,
            keep_h=keep[0],
            keep_c=keep[1],
            zoneout_h=shares[0],
            zoneout_c=shares[1],
            norm=tuple(learned[2:]),
            return_cell_states=case.returned,
            return_gates=case.returned,
            recompute=case.recompute,
        )

    def without_flags_past_the_end(self, extras: LayerOptions) -> LayerOptions:
        """As a layer is given them; the kernels do not mind such a flag."""
        return dataclasses.replace(extras, resets=extras.resets & self.counts.to(extras.resets.device))

    def tensors(self) -> list[Tensor | None]:
        return [self.input, self.h0, self.c0, *self.weights, *self.learned()]

    def learned(self) -> list[Tensor | None]:
        return [self.reset_h, self.reset_c, *self.norm] if self.has_extras else []

    def expected(self, case: Case, dtype: torch.dtype) -> list[Tensor]:
        """Results and wanted gradients of the equations, computed in ``dtype``."""
        leaves = [
            t if t is None else t.detach().to(dtype).requires_grad_(w)
            for t, w in zip(self.tensors(), self.wanted, strict=True)
        ]
        end = 3 + len(self.weights)
        extras = self.extras(case, dtype, leaves[end:])
        if extras is not None and self.lengths is not None and self.resets is not None:
            extras = self.without_flags_past_the_end(extras)
        results = reference.lstm_layer(
            *leaves[:3], leaves[3:end], self.batch_sizes, case.bias, case.bidirectional, extras
        )
        results = [y for y in results if y is not None]
        outputs = [y for y, g in zip(results, self.grads, strict=True) if g is not None]
        grads = [g.to(dtype) for g in self.grads if g is not None]
        inputs = [t for t, w in zip(leaves, self.wanted, strict=True) if w]
        return [
            *results,
            *torch.autograd.grad(outputs, inputs, grads, allow_unused=True, materialize_grads=True),
        ]


def error(result: Tensor, expected: Tensor) -> float:
    value = ((result.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()
    return value if value < float("inf") else float("inf")  # max() would overlook NaN
