"""Layers as the registered operators take them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from internals import LayerOptions, results_of
from torch import Tensor
from torch.utils._pytree import tree_map_only

from lstm_ext import ops

T, B, I, H, P = 5, 3, 2, 4, 2
BATCH_SIZES = [3, 2, 2, 1, 1]
RESETS = ("resets", "reset_h", "reset_c")


class Case:
    """One layer with the options of the given names."""

    def __init__(
        self,
        *options: str,
        bias: bool = True,
        bidirectional: bool = False,
        projected: bool = False,
        states: bool = True,
        packed: bool = False,
        dtype: torch.dtype = torch.float32,
        requires_grad: bool = False,
    ) -> None:
        directions, state = 2 if bidirectional else 1, P if projected else H
        wide = torch.float32 if dtype.itemsize == 2 else dtype

        def draw(*sizes: int) -> Tensor:
            return torch.randn(sizes, dtype=torch.float64).to(dtype).requires_grad_(requires_grad)

        rows = (sum(BATCH_SIZES),) if packed else (T, B)
        self.bias, self.bidirectional = bias, bidirectional
        self.batch_sizes = torch.tensor(BATCH_SIZES, device="cpu") if packed else None
        self.input = draw(*rows, I)
        self.h0, self.c0 = (draw(directions, B, state), draw(directions, B, H)) if states else (None, None)
        shapes = [(4 * H, I), (4 * H, state)] + [(4 * H,)] * (2 * bias) + [(P, H)] * projected
        self.weights = [draw(*shape) for _ in range(directions) for shape in shapes]
        flags = torch.rand(rows) < 0.3
        lengths = torch.tensor([4, 0, 5])
        if "lengths" in options:
            flags &= torch.arange(T).unsqueeze(1) < lengths
        values = {
            "resets": flags,
            "reset_h": draw(directions, B, state),
            "reset_c": draw(directions, B, H),
            "lengths": lengths,
            "recurrent_mask": (torch.rand(directions, B, state) < 0.5).to(wide) * 2,
            "keep_h": torch.rand(directions, *rows, state) < 0.3,
            "keep_c": torch.rand(directions, *rows, H) < 0.3,
            "zoneout_h": 0.2,
            "zoneout_c": 0.3,
            "norm": [draw(size) for _ in range(directions) for size in [4 * H, 4 * H, H] + [H] * bias],
            "peephole": [draw(H) for _ in range(3 * directions)],
            "cell_clip": 0.4,
            "coupled_gates": True,
            "activations": "hard_sigmoid(0.2,0.5) softsign elu(0.6)",
            "preactivation_clip": 0.7,
            "return_cell_states": True,
            "return_gates": True,
        }
        self.options: dict[str, Any] = {name: values[name] for name in options}

    @property
    def layer(self) -> tuple:
        return (self.input, self.h0, self.c0, self.weights, self.batch_sizes, self.bias, self.bidirectional)

    @property
    def inputs(self) -> list[Tensor | None]:
        """What has a gradient, in the order of ``needs_grad``."""
        get = self.options.get
        return [
            self.input,
            self.h0,
            self.c0,
            *self.weights,
            get("reset_h"),
            get("reset_c"),
            *get("norm", ()),
            *get("peephole", ()),
        ]

    @property
    def leaves(self) -> list[Tensor]:
        return [t for t in self.inputs if t is not None]

    def call(self, operator: Callable = ops.lstm_layer) -> Any:
        return operator(*self.layer, **self.options)

    def backward_keywords(self, needs_grad: Sequence[bool] | None = None) -> dict[str, Any]:
        """Those of lstm_layer_backward, after the arguments of the layer."""
        with torch.no_grad():
            results = self.call(ops.lstm_layer_forward)
        grads = [torch.randn_like(t) if t.dim() > 1 else None for t in results[:5]]
        names = ("grad_output", "grad_h_n", "grad_c_n", "grad_cell_states", "grad_gate_values", "output")
        saved = ("gates", "cells", "hidden", "norm_products", "norm_factors")
        given = [t is not None for t in self.inputs]
        return {
            **self.options,
            **dict(zip((*names, *saved), (*grads, results[0], *results[5:]), strict=True)),
            "needs_grad": given if needs_grad is None else list(needs_grad),
        }

    def with_tensors(self, function: Callable[[Tensor], Tensor | None]) -> Case:
        """A case with other tensors."""
        case = Case.__new__(Case)
        case.__dict__ = tree_map_only(Tensor, function, self.__dict__)
        return case

    def through(
        self,
        function: Callable,
        dtype: torch.dtype | None = None,
        results: Sequence[int] | None = None,
    ) -> list[Tensor]:
        """Values and gradients of a function of `lstm_ext.layer`, in another dtype if it is given.

        The gradients are those of all results or of ``results``.
        """

        def cast(t: Tensor) -> Tensor:
            return t.detach().to(dtype) if dtype is not None and t.is_floating_point() else t.detach()

        case = self.with_tensors(cast)
        for t in case.leaves:
            t.requires_grad_()
        values = [y for y in results_of(function, *case.layer, LayerOptions(**case.options)) if y is not None]
        generator = torch.Generator().manual_seed(1)
        grads = [
            torch.randn(y.shape, generator=generator, dtype=torch.float64, device="cpu").to(y) for y in values
        ]
        chosen = range(len(values)) if results is None else results
        gradients = torch.autograd.grad(
            [values[i] for i in chosen],
            case.leaves,
            [grads[i] for i in chosen],
            allow_unused=True,
            materialize_grads=True,
        )
        return [*values, *gradients]


CASES: dict[str, Callable[..., Case]] = {
    "plain": Case,
    "no states": lambda **o: Case(states=False, **o),
    "no bias": lambda **o: Case(bias=False, **o),
    "both directions": lambda **o: Case(bidirectional=True, states=False, **o),
    "projected": lambda **o: Case(projected=True, **o),
    "both directions, projected": lambda **o: Case(bidirectional=True, projected=True, **o),
    "packed": lambda **o: Case(bidirectional=True, projected=True, packed=True, **o),
    "packed, no states": lambda **o: Case(packed=True, states=False, **o),
    "cell states": lambda **o: Case("return_cell_states", **o),
    "resets": lambda **o: Case("resets", **o),
    "reset state": lambda **o: Case(*RESETS, "return_cell_states", bidirectional=True, projected=True, **o),
    "lengths": lambda **o: Case("lengths", "return_gates", bidirectional=True, states=False, **o),
    "lengths, resets": lambda **o: Case(
        "lengths", *RESETS, "return_cell_states", "return_gates", bias=False, **o
    ),
    "resets, packed": lambda **o: Case(
        *RESETS, "return_cell_states", "return_gates", bidirectional=True, packed=True, **o
    ),
    "resets, packed, no states": lambda **o: Case("resets", packed=True, states=False, **o),
    "recurrent dropout": lambda **o: Case("recurrent_mask", "lengths", bidirectional=True, **o),
    "zoneout": lambda **o: Case(
        "keep_h", "keep_c", "return_cell_states", bidirectional=True, projected=True, **o
    ),
    "zoneout, packed": lambda **o: Case("keep_h", "keep_c", "resets", "recurrent_mask", packed=True, **o),
    "shares": lambda **o: Case("zoneout_h", "zoneout_c", "lengths", "return_gates", **o),
    "norm": lambda **o: Case(
        "norm", "lengths", "return_cell_states", "return_gates", bidirectional=True, **o
    ),
    "peephole": lambda **o: Case("peephole", *RESETS, "return_gates", bidirectional=True, packed=True, **o),
    "clip, coupled": lambda **o: Case(
        "peephole",
        "cell_clip",
        "coupled_gates",
        "lengths",
        "keep_c",
        "return_cell_states",
        projected=True,
        **o,
    ),
    "activations": lambda **o: Case(
        "activations",
        "preactivation_clip",
        "coupled_gates",
        "lengths",
        "return_gates",
        bidirectional=True,
        **o,
    ),
    "norm, no bias": lambda **o: Case("norm", *RESETS, bias=False, projected=True, **o),
    "all": lambda **o: Case(
        *RESETS,
        *("lengths", "recurrent_mask", "keep_h", "keep_c", "norm", "return_cell_states", "return_gates"),
        bidirectional=True,
        projected=True,
        **o,
    ),
}


def make(name: str, **options: Any) -> Case:
    return CASES[name](**options)
