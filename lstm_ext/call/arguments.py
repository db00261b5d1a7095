"""The arguments of one call beyond those of ``torch.nn.LSTM``: checked, and turned into `StackOptions`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..layer import route
from ..layer.activations import Activation, activation_text
from ..layer.layer_call import LayerOptions
from ..layer.shapes import count_mask
from . import values
from .layout import CountingSteps, JaggedLayout, Layout, PackedLayout, PaddedRows
from .masks import dropped_weight, keep_flags, recurrent_mask

__all__ = [
    "CELL_OPTIONS",
    "CELL_PARAMETERS",
    "CallOptions",
    "CellParameters",
    "Settings",
    "Stack",
    "StackOptions",
    "any_requested",
    "clip",
    "flag",
    "forget_bias_value",
    "probability",
    "refuse_combinations",
    "stack_options",
    "zoneout_pair",
]


# ---- arguments of the constructor


def probability(name: str, value: Any) -> float:
    """Raises ValueError, like torch's layer for ``dropout``."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= value <= 1:
        raise ValueError(f"{name} should be a number in range [0, 1], got {value!r}")
    return float(value)


def zoneout_pair(value: Any) -> tuple[float, float]:
    """The probabilities for h and c. Raises: ValueError."""
    if isinstance(value, (tuple, list)):
        if len(value) != 2:
            raise ValueError(
                f"zoneout should be a number, for h, or a pair of numbers, for h and c, got {value!r}"
            )
        return probability("zoneout[0] (for h)", value[0]), probability("zoneout[1] (for c)", value[1])
    return probability("zoneout", value), 0.0


def clip(name: str, value: Any) -> float:
    """A bound, 0 for None. Raises: ValueError."""
    if value is None:
        return 0
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:
        raise ValueError(f"{name} should be a positive finite number or None, got {value!r}")
    return float(value)


def refuse_combinations(layer_norm: bool, peephole: bool, coupled_gates: bool) -> None:
    """Raises: ValueError, naming both options."""
    # The f rows would count in the statistics of the gates, and what o should see of c_t is not defined.
    if not layer_norm:
        return
    for name, given in (("peephole (peephole_weights)", peephole), ("coupled_gates", coupled_gates)):
        if given:
            raise ValueError(f"{name}: not available together with layer_norm (norm_weights)")


# The options that make the cell another one than the plain cell, for which each backend has fewer kernels.
CELL_OPTIONS = (
    *("peephole", "cell_clip", "coupled_gates"),
    *("gate_activation", "cell_activation", "preactivation_clip"),
)


class CellParameters(NamedTuple):
    """The parameters that an option adds to each layer and direction.

    Attributes:
        name: in errors.
        option: the argument of `lstm_ext.LSTM`.
        keyword: the argument of `functional.lstm`.
        prefix: what their names in a module begin with.
        sizes: their sizes in H by the rest of their names, in the order of `LayerOptions`; those of a bias only exist
            in layers with biases.
        initial: their initial values, 0 if not listed.
    """

    name: str
    option: str
    keyword: str
    prefix: str
    sizes: dict[str, int]
    initial: dict[str, float]

    def kinds(self, bias: bool) -> list[str]:
        return [kind for kind in self.sizes if bias or not kind.startswith("bias")]


# By the field of `LayerOptions`.
CELL_PARAMETERS = {
    "norm": CellParameters(
        "layer normalisation",
        "layer_norm",
        "norm_weights",
        "ln_",
        {"gain_ih": 4, "gain_hh": 4, "gain_c": 1, "bias_c": 1},
        {"gain_ih": 1.0, "gain_hh": 1.0, "gain_c": 1.0},
    ),
    "peephole": CellParameters(
        "peepholes",
        "peephole",
        "peephole_weights",
        "",
        {"weight_ci": 1, "weight_cf": 1, "weight_co": 1},
        {},
    ),
}


def flag(name: str, value: Any) -> bool:
    """Raises: TypeError."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} should be a bool, got {value!r}")
    return value


def forget_bias_value(value: Any, bias: bool) -> float:
    """Raises: ValueError."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value):
        raise ValueError(f"forget_bias should be a finite number or None, got {value!r}")
    if not bias:
        raise ValueError("forget_bias needs a layer with biases, got bias=False")
    return float(value)


# ---- arguments of a call


class Stack(Protocol):
    """The attributes of a stack of layers, which `lstm_ext.LSTM` has, and `functional.lstm` makes of its arguments."""

    bias: bool
    num_layers: int
    dropout: float
    training: bool
    bidirectional: bool
    recurrent_dropout: float
    weight_dropout: float
    zoneout: float | tuple[float, float]
    layer_norm: bool
    peephole: bool
    cell_clip: float | None
    coupled_gates: bool
    gate_activation: Activation
    cell_activation: Activation
    preactivation_clip: float | None
    recompute: bool
    # The frozen weights of each layer, as options that hold nothing else; or empty. With them, nothing is random.
    frozen: Sequence[LayerOptions]


@dataclass(eq=False)
class Settings:
    """A stack without a module."""

    bias: bool
    num_layers: int
    dropout: float
    training: bool
    bidirectional: bool
    recurrent_dropout: float
    weight_dropout: float
    zoneout: float | tuple[float, float]
    layer_norm: bool
    peephole: bool
    cell_clip: float | None
    coupled_gates: bool
    gate_activation: Activation
    cell_activation: Activation
    preactivation_clip: float | None
    recompute: bool
    frozen: Sequence[LayerOptions] = ()


class CallOptions(NamedTuple):
    """The options of one call as the user gave them; `lstm_ext.LSTM.forward` explains them."""

    lengths: Any = None
    resets: Any = None
    reset_state: Any = None
    mask: Any = None
    return_cell_states: Any = False
    return_gates: Any = False

    def given(self) -> dict[str, Any]:
        """Only what differs from the defaults."""
        defaults = self._field_defaults
        return {name: v for name, v in zip(self._fields, self, strict=True) if v is not defaults[name]}


def any_requested(stack: Stack, call_options: CallOptions | None) -> bool:
    """Whether a call of ``stack`` requests anything that ``torch.nn.LSTM`` does not have."""
    # Attributes and None, since a compiler makes guards for these, but none for a key that a dictionary lacks, nor for
    # the identity of an object of the same type.
    return (
        call_options is not None
        or stack.recurrent_dropout != 0
        or stack.weight_dropout != 0
        or stack.zoneout != 0
        or stack.layer_norm is not False
        or stack.peephole is not False
        or stack.cell_clip is not None
        or stack.coupled_gates is not False
        or stack.gate_activation != "sigmoid"
        or stack.cell_activation != "tanh"
        or stack.preactivation_clip is not None
        or (stack.recompute is not False and (torch.is_grad_enabled() or stack.recompute is not True))
    )


@dataclass(eq=False)  # not frozen, like LayerOptions
class StackOptions:
    """The options of all L layers. :class:`lstm_ext.layer.layer_call.LayerOptions` explains those not listed here.

    Attributes:
        recurrent_dropout, weight_dropout: the probabilities.
        zoneout: the probabilities for h and c.
        training: whether these are random.
        parameters: for each layer the parameters that its cells have, by the field of `LayerOptions`.
        reset_h, reset_c: (L * D, B, P) and (L * D, B, H), in the order of the user.
        padded: the rows that count, where their lengths are known on the host; then ``lengths`` is None.
        counting: the steps that count, if these may lie anywhere and are not known on the host; with ``lengths``, and
            with ``resets`` of the steps in front.
    """

    recurrent_dropout: float
    weight_dropout: float
    zoneout: tuple[float, float]
    training: bool
    parameters: dict[str, Sequence[Sequence[Tensor]]]
    cell_clip: float
    coupled_gates: bool
    activations: str
    preactivation_clip: float
    recompute: bool
    return_cell_states: bool
    return_gates: bool
    resets: Tensor | None = None
    reset_h: Tensor | None = None
    reset_c: Tensor | None = None
    lengths: Tensor | None = None
    padded: PaddedRows | None = None
    counting: CountingSteps | None = None

    @property
    def only_padded(self) -> bool:
        """Whether the layers compute nothing but plain layers on the rows that count."""
        return (
            self.padded is not None
            and not (self.training and (self.recurrent_dropout or self.weight_dropout))
            and self.zoneout == (0.0, 0.0)
            and not self.parameters
            and not (self.cell_clip or self.coupled_gates)
            and not (self.activations or self.preactivation_clip)
            and not (self.recompute or self.return_cell_states or self.return_gates)
            and self.resets is None
        )

    def weights_of_layer(self, weights: Sequence[Tensor], directions: int) -> Sequence[Tensor]:
        """The weights of a layer, with a mask on each ``weight_hh``, which is drawn before its other masks."""
        if not (self.training and self.weight_dropout):
            return weights
        dropped = list(weights)
        for place in range(1, len(weights), len(weights) // directions):
            dropped[place] = dropped_weight(weights[place], self.weight_dropout)
        return dropped

    def of_layer(
        self,
        k: int,
        input: Tensor,
        h0: Tensor | None,
        weights: Sequence[Tensor],
        batch_sizes: Tensor | None,
        directions: int,
    ) -> LayerOptions:
        """The options of layer k. Draws its masks: first the recurrent one, then the flags for h and for c."""
        sets = slice(k * directions, (k + 1) * directions)
        state, hidden = weights[1].size(1), weights[1].size(0) // 4
        zoneout_h, zoneout_c = self.zoneout
        layer = LayerOptions(
            resets=self.resets,
            reset_h=None if self.reset_h is None else self.reset_h[sets],
            reset_c=None if self.reset_c is None else self.reset_c[sets],
            lengths=self.lengths,
            cell_clip=self.cell_clip,
            coupled_gates=self.coupled_gates,
            activations=self.activations,
            preactivation_clip=self.preactivation_clip,
            return_cell_states=self.return_cell_states,
            return_gates=self.return_gates,
            recompute=self.recompute,
        )
        for name, layers in self.parameters.items():
            setattr(layer, name, layers[k])
        if not self.training:
            layer.zoneout_h, layer.zoneout_c = zoneout_h, zoneout_c
            return layer
        if self.recurrent_dropout:
            layer.recurrent_mask = recurrent_mask(
                input, h0, batch_sizes, directions, state, self.recurrent_dropout
            )
        if zoneout_h:
            layer.keep_h = keep_flags(input, directions, state, zoneout_h)
        if zoneout_c:
            layer.keep_c = keep_flags(input, directions, hidden, zoneout_c)
        return layer


def stack_options(
    stack: Stack,
    parameters: dict[str, Sequence[Sequence[Tensor]]],
    x: Tensor,
    layout: Layout,
    state_shapes: Sequence[tuple[int, ...]],
    call_options: CallOptions | None,
) -> StackOptions:
    """Check the options of a stack and those of a call.

    Args:
        stack: attributes that may have been changed since the module was made.
        parameters: see `StackOptions`.
        x: (T, B, I) or (N, I), checked.
        state_shapes: those of h0 and c0, with a batch axis.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    lengths, resets, reset_state, mask, return_cell_states, return_gates = call_options or CallOptions()
    options = StackOptions(
        recurrent_dropout=probability("recurrent_dropout", stack.recurrent_dropout),
        weight_dropout=probability("weight_dropout", stack.weight_dropout),
        zoneout=zoneout_pair(stack.zoneout),
        training=stack.training and not stack.frozen,
        parameters=parameters,
        cell_clip=clip("cell_clip", stack.cell_clip),
        coupled_gates=flag("coupled_gates", stack.coupled_gates),
        activations=activation_text(stack.gate_activation, stack.cell_activation),
        preactivation_clip=clip("preactivation_clip", stack.preactivation_clip),
        # Without a backward pass there is nothing to recompute.
        recompute=flag("recompute", stack.recompute) and torch.is_grad_enabled() and not stack.frozen,
        return_cell_states=flag("return_cell_states", return_cell_states),
        return_gates=flag("return_gates", return_gates),
    )
    refuse_combinations("norm" in parameters, "peephole" in parameters, options.coupled_gates)
    if resets is not None:
        options.resets = values.resets_of(resets, x, layout)
    if reset_state is not None:
        if resets is None:
            raise ValueError("reset_state: expected together with resets, got resets=None")
        options.reset_h, options.reset_c = values.reset_state_of(reset_state, x, state_shapes, layout)
    if mask is not None and lengths is not None:
        raise ValueError("mask: expected without lengths, got both")
    if isinstance(layout, (PackedLayout, JaggedLayout)):
        for name, value in (("lengths", lengths), ("mask", mask)):
            if value is not None:
                kind = "PackedSequence" if isinstance(layout, PackedLayout) else "nested tensor"
                raise ValueError(
                    f"{name}: expected None for a {kind}, which has its own lengths, got {values.kind_of(value)}"
                )
    elif lengths is not None:
        values.refuse_meta("lengths", lengths, x)
        _end_rows(options, values.lengths_of(lengths, x, layout), x)
    elif mask is not None:
        values.refuse_meta("mask", mask, x)
        _leave_out(options, values.steps_of_mask(mask, x, layout), x)
    return options


def _end_rows(options: StackOptions, lengths: Tensor, x: Tensor) -> None:
    """Ends rows at their lengths: skips padding if the host knows the numbers, else the layers get the lengths."""
    time = x.size(0)
    if x.device.type == "cpu" and lengths.device.type == "cuda":
        lengths = lengths.cpu()
    if values.is_readable(lengths) and (x.device.type == "cpu" or not route.has_operators(x.device)):
        numbers = lengths.tolist()
        if min(numbers, default=time) == time:
            return
        if max(numbers) > 0:
            options.padded = PaddedRows(lengths, time, x.device)
            return
    options.lengths = lengths.to(x.device, non_blocking=True)
    if options.resets is not None:
        options.resets = options.resets & count_mask(options.lengths, time)


def _leave_out(options: StackOptions, steps: Tensor, x: Tensor) -> None:
    """Leaves out the steps (T, B) that do not count: they keep the state, and their output is 0."""
    if x.device.type == "cpu" and steps.device.type == "cuda":
        steps = steps.cpu()
    readable = values.is_readable(steps)
    if readable and bool((steps[1:] <= steps[:-1]).all()):  # the mask says lengths
        _end_rows(options, steps.sum(0), x)
        return
    counting = CountingSteps(steps.to(x.device, non_blocking=True))
    resets = None if options.resets is None else counting.resets_in_front(options.resets)
    if readable and (x.device.type == "cpu" or not route.has_operators(x.device)):
        options.padded = PaddedRows(steps.sum(0), x.size(0), x.device, counting.times)
        options.resets = None if resets is None else counting.restored(resets, 0)
        return
    options.counting, options.resets, options.lengths = counting, resets, counting.lengths
