"""The arguments of a call beyond those of ``torch.nn.LSTM``: checked, and described for the layers by `Requested`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..layer import route
from ..layer.activations import activation_text
from ..layer.layer_call import LayerOptions
from ..layer.shapes import count_mask
from ..options import OPTIONS, zoneout_pair
from . import values
from .layout import CountingSteps, JaggedLayout, Layout, PackedLayout, PaddedRows
from .masks import dropped_weight, keep_flags, recurrent_mask


class Stack(Protocol):
    """The attributes of a stack of layers that a call reads: of an `lstm_ext.LSTM`, or of a `PlainStack`."""

    bias: bool
    num_layers: int
    dropout: float
    training: bool
    bidirectional: bool
    gru: bool  # the cells are those of a GRU, which has no c
    # The frozen weights of each layer, as options that hold nothing else; or empty. With them, nothing is random.
    _frozen: Sequence[LayerOptions]


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


def any_requested(options: dict[str, Any] | None, call_options: CallOptions | None) -> bool:
    """Whether a call of a layer with these options requests anything that ``torch.nn.LSTM`` does not have."""
    # None in place of an empty table, since a compiler makes a guard for None, but none for a key that is missing.
    if call_options is not None:
        return True
    # Without a backward pass there is nothing to recompute.
    return options is not None and (len(options) > 1 or "recompute" not in options or torch.is_grad_enabled())


@dataclass(eq=False)  # not frozen, like LayerOptions
class Requested:
    """The options and arguments of a call, for all L layers.

    Attributes:
        layer: the fields of `LayerOptions` that are the same in all layers and are no tensors; those that are set.
        recurrent_dropout, weight_dropout: the probabilities; 0 if nothing is random.
        zoneout: the probabilities for h and c.
        training: whether these are random.
        parameters: for each layer the parameters that its cells have, by the field of `LayerOptions`.
        resets, lengths: as in `LayerOptions`.
        reset_h, reset_c: (L * D, B, P) and (L * D, B, H), in the order of the user.
        rows: the rows that count, where their lengths are known on the host; then ``lengths`` is None. Or the steps
            that count, if these may lie anywhere and are not known on the host; with ``lengths``. ``resets`` and the
            states after them are those of these rows or steps.
    """

    layer: dict[str, Any]
    recurrent_dropout: float
    weight_dropout: float
    zoneout: tuple[float, float]
    training: bool
    parameters: dict[str, Sequence[Sequence[Tensor]]]
    resets: Tensor | None = None
    reset_h: Tensor | None = None
    reset_c: Tensor | None = None
    lengths: Tensor | None = None
    rows: PaddedRows | CountingSteps | None = None

    @property
    def returns_extras(self) -> bool:
        return "return_cell_states" in self.layer or "return_gates" in self.layer

    @property
    def only_padded(self) -> bool:
        """Whether the layers compute nothing but plain layers on the rows that count."""
        return (
            self.rows is not None
            and self.rows.batch_sizes is not None
            and not self.layer
            and not (self.recurrent_dropout or self.weight_dropout)
            and self.zoneout == (0.0, 0.0)
            and not self.parameters
            and self.resets is None
        )

    @property
    def only_gru(self) -> bool:
        """Whether the layers compute nothing but those of ``torch.nn.GRU``, on rows that count."""
        return (
            self.layer.keys() <= {"gru", "recompute"}
            and not (self.recurrent_dropout or self.weight_dropout)
            and self.resets is None
            and self.lengths is None
            and (self.rows is None or self.rows.batch_sizes is not None)
        )

    def pack(self, rows: PaddedRows) -> None:
        """Compute nothing but the rows that count."""
        self.rows = rows
        self.resets = None if self.resets is None else rows.packed(self.resets)
        self.reset_h, self.reset_c = rows.packed_state(self.reset_h), rows.packed_state(self.reset_c)

    def weights_of_layer(self, weights: Sequence[Tensor], directions: int) -> Sequence[Tensor]:
        """The weights of a layer, with a mask on each ``weight_hh``, which is drawn before its other masks."""
        if not self.weight_dropout:
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
            **self.layer,
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


def request(
    stack: Stack,
    options: dict[str, Any] | None,
    parameters: dict[str, Sequence[Sequence[Tensor]]],
    x: Tensor,
    layout: Layout,
    state_shapes: Sequence[tuple[int, ...]],
    call_options: CallOptions | None,
) -> Requested:
    """Check the arguments of a call, and describe what it requests.

    Args:
        options: those of the stack that change a call, checked; see `lstm_ext.options.requested`.
        parameters: see `Requested`.
        x: (T, B, I) or (N, I), checked.
        state_shapes: those of h0 and c0, with a batch axis.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    given = options or {}
    lengths, resets, reset_state, mask, *returned = call_options or CallOptions()
    layer = {name: given[name] for name, option in OPTIONS.items() if option.field and name in given}
    if "recompute" in layer and (stack._frozen or not torch.is_grad_enabled()):
        del layer["recompute"]
    if stack.gru:
        layer["gru"] = True
    if given.get("layer_norm") == "cell":
        layer["norm_cell"] = True
    if activations := activation_text(
        given.get("gate_activation", "sigmoid"), given.get("cell_activation", "tanh")
    ):
        layer["activations"] = activations
    for name, value in zip(("return_cell_states", "return_gates"), returned, strict=True):
        if not isinstance(value, bool):
            raise TypeError(f"{name} should be a bool, got {value!r}")
        if value:
            layer[name] = True
    training = stack.training and not stack._frozen
    asked = Requested(
        layer,
        given.get("recurrent_dropout", 0) if training else 0,
        given.get("weight_dropout", 0) if training else 0,
        zoneout_pair(given.get("zoneout", 0)),
        training,
        parameters,
    )
    if resets is not None:
        asked.resets = values.resets_of(resets, x, layout)
    if reset_state is not None:
        if resets is None:
            raise ValueError("reset_state: expected together with resets, got resets=None")
        asked.reset_h, asked.reset_c = values.reset_state_of(reset_state, x, state_shapes, layout)
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
        _end_rows(asked, values.lengths_of(lengths, x, layout), x)
    elif mask is not None:
        values.refuse_meta("mask", mask, x)
        _leave_out(asked, values.steps_of_mask(mask, x, layout), x)
    return asked


def _end_rows(asked: Requested, lengths: Tensor, x: Tensor) -> None:
    """Ends rows at their lengths: skips padding if the host knows the numbers, else the layers get the lengths."""
    time = x.size(0)
    if x.device.type == "cpu" and lengths.device.type == "cuda":
        lengths = lengths.cpu()
    if values.is_readable(lengths) and (x.device.type == "cpu" or not route.has_operators(x.device)):
        numbers = lengths.tolist()
        if min(numbers, default=time) == time:
            return
        if max(numbers) > 0:
            asked.pack(PaddedRows(lengths, time, x.device))
            return
    asked.lengths = lengths.to(x.device, non_blocking=True)
    if asked.resets is not None:
        asked.resets = asked.resets & count_mask(asked.lengths, time)


def _leave_out(asked: Requested, steps: Tensor, x: Tensor) -> None:
    """Leaves out the steps (T, B) that do not count: they keep the state, and their output is 0."""
    if x.device.type == "cpu" and steps.device.type == "cuda":
        steps = steps.cpu()
    readable = values.is_readable(steps)
    if readable and bool((steps[1:] <= steps[:-1]).all()):  # the mask says lengths
        _end_rows(asked, steps.sum(0), x)
        return
    counting = CountingSteps(steps.to(x.device, non_blocking=True))
    if asked.resets is not None:
        asked.resets = counting.resets_in_front(asked.resets)
    if readable and (x.device.type == "cpu" or not route.has_operators(x.device)):
        asked.resets = None if asked.resets is None else counting.padded(asked.resets, 0)
        asked.pack(PaddedRows(steps.sum(0), x.size(0), x.device, counting.times))
        return
    asked.rows, asked.lengths = counting, counting.lengths
