"""Layers as the registered operators take them: what a module of a case of the matrix calls its first operator with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from devices import moved
from graphs import Recorder
from matrix.cases import Case, Options, arguments_of, environment, make_module, tensors_of
from torch import Tensor
from torch.utils._pytree import tree_map_only

import lstm_ext
from lstm_ext import ops

T, B, I, H, P = 5, 3, 2, 4, 2

_case = partial(Case, lengths=(T,) * B, input_size=I, hidden_size=H, hx=True, training=False)
_packed = partial(_case, layout="handmade", lengths=(T, 3, 1))
_BOTH, _PROJECTED = {"bidirectional": True}, {"proj_size": P}
_RETURNED = {"return_cell_states": True, "return_gates": True}
_TO_A_STATE = {"resets": 0.3, "reset_state": True}
_LENGTHS = {"lengths": (4, 0, 5), "lengths_as": "int64", "unread": True}
CASES: dict[str, Case] = {
    "plain": _case(),
    "no states": _case(hx=False),
    "no bias": _case(bias=False),
    "both directions": _case(**_BOTH, hx=False),
    "projected": _case(**_PROJECTED),
    "both directions, projected": _case(**_BOTH, **_PROJECTED),
    "packed": _packed(**_BOTH, **_PROJECTED),
    "packed, no states": _packed(hx=False),
    "cell states": _case(options=Options(return_cell_states=True)),
    "resets": _case(options=Options(resets=0.3)),
    "reset state": _case(**_BOTH, **_PROJECTED, options=Options(**_TO_A_STATE, return_cell_states=True)),
    "lengths": _case(**_BOTH, hx=False, options=Options(**_LENGTHS, return_gates=True)),
    "lengths, resets": _case(bias=False, options=Options(**_LENGTHS, **_TO_A_STATE, **_RETURNED)),
    "resets, packed": _packed(**_BOTH, options=Options(**_TO_A_STATE, **_RETURNED)),
    "resets, packed, no states": _packed(hx=False, options=Options(resets=0.3)),
    "recurrent dropout": _case(**_BOTH, training=True, options=Options(**_LENGTHS, recurrent_dropout=0.5)),
    "zoneout": _case(**_BOTH, **_PROJECTED, training=True, options=Options(zoneout=(0.3, 0.3))),
    "zoneout, packed": _packed(
        training=True, options=Options(zoneout=(0.3, 0.3), recurrent_dropout=0.5, resets=0.3)
    ),
    "shares": _case(options=Options(**_LENGTHS, zoneout=(0.2, 0.3), return_gates=True)),
    "norm": _case(**_BOTH, options=Options(**_LENGTHS, **_RETURNED, layer_norm=True)),
    "norm, no bias": _case(**_PROJECTED, bias=False, options=Options(**_TO_A_STATE, layer_norm=True)),
    "peephole": _packed(**_BOTH, options=Options(**_TO_A_STATE, peephole=True, return_gates=True)),
    "clip, coupled": _case(
        **_PROJECTED, options=Options(**_LENGTHS, peephole=True, cell_clip=0.4, coupled_gates=True)
    ),
    "activations": _case(
        **_BOTH,
        options=Options(
            **_LENGTHS,
            gate_activation="hard_sigmoid",
            cell_activation=("softsign", ("elu", 0.6)),
            preactivation_clip=0.7,
            coupled_gates=True,
        ),
    ),
    "all": _case(
        **_BOTH,
        **_PROJECTED,
        training=True,
        options=Options(
            **_LENGTHS, **_TO_A_STATE, **_RETURNED, layer_norm=True, zoneout=(0.3, 0.3), recurrent_dropout=0.5
        ),
    ),
}


class Operands:
    """The arguments of one call of an operator."""

    def __init__(self, layer: Sequence[Any], options: dict[str, Any]) -> None:
        self.input, self.h0, self.c0, self.weights, self.batch_sizes, self.bias, self.bidirectional = layer
        self.options = options

    @property
    def layer(self) -> tuple:
        return (self.input, self.h0, self.c0, self.weights, self.batch_sizes, self.bias, self.bidirectional)

    @property
    def inputs(self) -> list[Tensor | None]:
        """What has a gradient, in the order of ``needs_grad``."""
        of_options = [self.options.get("reset_h"), self.options.get("reset_c")]
        more = [*self.options.get("norm", ()), *self.options.get("peephole", ())]
        return [self.input, self.h0, self.c0, *self.weights, *of_options, *more]

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

    def with_tensors(self, function: Callable[[Tensor], Tensor | None]) -> Operands:
        """The same with other tensors."""
        return Operands(*tree_map_only(Tensor, function, (self.layer, self.options)))


def make(name: str, requires_grad: bool = False, dtype: torch.dtype = torch.float32) -> Operands:
    case = dataclasses.replace(CASES[name], dtype=str(dtype).removeprefix("torch."))
    with torch.device("cpu"), environment(case), torch.no_grad(), Recorder() as recorder:
        tensors = tensors_of(case)
        _, input, hx, more = arguments_of(case, tensors, dtype)
        make_module(lstm_ext.LSTM, case, dtype, tensors.weights)(input, hx, **more)
    _, layer, options = recorder.calls[0]
    layer, options = tree_map_only(Tensor, Tensor.detach, (list(layer), dict(options)))
    sizes = layer[4]
    operands = Operands(*moved((layer, options), torch.get_default_device()))
    operands.batch_sizes = sizes
    for t in operands.leaves:
        t.requires_grad_(requires_grad)
    return operands
