"""What a layer can do beyond ``torch.nn.LSTM``: how it travels from the module down to one layer's function.

:class:`StackExtras` is for all layers, as `arguments.run` makes it of what the user gave; `of_layer` cuts it into
one :class:`LayerExtras` a layer and draws the random masks. The meanings are in `reference`, with the equations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree

from ..native import loader
from .tracing import nothing_looks_on

__all__ = ["OPERANDS", "LSTMExtras", "LayerExtras", "StackExtras", "collected"]

# What `LayerExtras.operands` gives, as the registered operators and the kernels name it. kept_h and kept_c are the
# masks of zoneout, zoneout_h and zoneout_c the shares that are kept where there is no mask.
OPERANDS = (
    "resets",
    "reset_h",
    "reset_c",
    "lengths",
    "recurrent_mask",
    "kept_h",
    "kept_c",
    "zoneout_h",
    "zoneout_c",
    "norm",
)


class LSTMExtras(NamedTuple):
    """The third result of :class:`lstm_ext.LSTM`, where ``return_cell_states`` or ``return_gates`` asks for one.

    L layers, D = 2 if bidirectional else 1, H hidden units; a layer's directions lie side by side, as in ``h_n``, and
    the values of the reverse direction stand at the step of the input that they belong to, as in the output.

    Attributes:
        cell_states: c_t of every layer and step, (L * D, T, B, H), (L * D, B, T, H) with ``batch_first``, or
            (L * D, T, H) without a batch; for a ``PackedSequence`` (L * D, N, H), in the order of the rows of its
            ``data``. None if it was not asked for.
        gates: i, f, g, o of every layer and step, after the nonlinearity: as ``cell_states``, with a last axis of 4.
            None if not asked for.

    Both are differentiable, and 0 past the end of a sequence that ``lengths`` or ``mask`` ends.
    """

    cell_states: Tensor | None
    gates: Tensor | None


# torch.export.save writes down what a model returns.
_pytree._register_namedtuple(LSTMExtras, serialized_type_name="lstm_ext.LSTMExtras")


@dataclass(eq=False)  # not frozen: made in every call, which then takes four times as long
class LayerExtras:
    """The extras of one layer, both directions; time first.

    D directions, T steps, B sequences, H hidden units, P the size of h; N rows if the input is packed. All tensors are
    on the device of the input.

    Attributes:
        resets: bool (T, B), or (N,): the state is replaced before this step, in the reverse direction after it. False
            past the end of a sequence.
        reset_h, reset_c: (D, B, P) and (D, B, H), what it is replaced by; None for zeros. In the order of ``h0``.
        lengths: int64 (B,), each in [0, T]: how many steps of a sequence count. Never with packed input.
        recurrent_mask: (D, B, P): what h_{t-1} is multiplied by before the product with W_hh. float32 for a 16-bit
            input, else of the input's dtype.
        zoneout_h, zoneout_c: what is kept of the state before: in training a bool mask (D, T, B, P or H), or
            (D, N, P or H), in evaluation the share, a number.
        norm: the parameters of layer normalisation: D sets of ``gain_ih (4H), gain_hh (4H), gain_c (H)[, bias_c (H)]``,
            ``bias_c`` if the layer has biases. Empty without layer normalisation.
        return_cell_states, return_gates: whether they are wanted.
        recompute: keep less for the backward pass, which computes the gates again.
    """

    resets: Tensor | None = None
    reset_h: Tensor | None = None
    reset_c: Tensor | None = None
    lengths: Tensor | None = None
    recurrent_mask: Tensor | None = None
    zoneout_h: Tensor | float = 0.0
    zoneout_c: Tensor | float = 0.0
    norm: tuple[Tensor, ...] = ()
    return_cell_states: bool = False
    return_gates: bool = False
    recompute: bool = False

    def is_plain(self) -> bool:
        """Whether the layer is that of ``torch.nn.LSTM``."""
        return (
            self.resets is None
            and self.lengths is None
            and self.recurrent_mask is None
            and not isinstance(self.zoneout_h, Tensor)
            and not isinstance(self.zoneout_c, Tensor)
            and self.zoneout_h == self.zoneout_c == 0
            and len(self.norm) == 0
            and not self.return_cell_states
            and not self.return_gates
        )

    def operands(self) -> tuple[Any, ...]:
        """As the registered operators take them, after the arguments of the plain layer; `from_operands` reads them."""
        zoneout = (self.zoneout_h, self.zoneout_c)
        kept_h, kept_c = [z if isinstance(z, Tensor) else None for z in zoneout]
        # A literal 0 where there is no share: a compiler takes the numbers of a module for inputs of the graph.
        share_h, share_c = [0.0 if isinstance(z, Tensor) or z == 0 else z for z in zoneout]
        return (
            self.resets,
            self.reset_h,
            self.reset_c,
            self.lengths,
            self.recurrent_mask,
            kept_h,
            kept_c,
            share_h,
            share_c,
            list(self.norm),
        )

    @classmethod
    def from_operands(
        cls, operands: Sequence[Any], return_cell_states: bool, return_gates: bool
    ) -> LayerExtras:
        *tensors, kept_h, kept_c, share_h, share_c, norm = operands
        return cls(
            *tensors,
            share_h if kept_h is None else kept_h,
            share_c if kept_c is None else kept_c,
            tuple(norm),
            return_cell_states,
            return_gates,
        )

    def tensors(self) -> list[Tensor]:
        """All tensors, in an order that `with_tensors` knows."""
        values = (
            *(self.resets, self.reset_h, self.reset_c, self.lengths),
            *(self.recurrent_mask, self.zoneout_h, self.zoneout_c),
        )
        return [v for v in values if isinstance(v, Tensor)] + list(self.norm)

    def with_tensors(self, tensors: Sequence[Tensor]) -> LayerExtras:
        """A copy with other tensors in the place of its own."""
        left = iter(tensors)
        changes: dict[str, Any] = {
            field.name: next(left) for field in fields(self) if isinstance(getattr(self, field.name), Tensor)
        }
        return replace(self, **changes, norm=tuple(left))

    def map(self, function: Callable[[Tensor], Tensor]) -> LayerExtras:
        return self.with_tensors([function(t) for t in self.tensors()])


@dataclass(eq=False)
class StackExtras:
    """The extras of all L layers. What is not explained here is as in :class:`LayerExtras`.

    Attributes:
        reset_h, reset_c: (L * D, B, P) and (L * D, B, H).
        recurrent_dropout: the probability.
        zoneout: the probabilities for h and c.
        training: whether the two are random.
        norm: for each layer its `LayerExtras.norm`; empty without layer normalisation.
    """

    resets: Tensor | None = None
    reset_h: Tensor | None = None
    reset_c: Tensor | None = None
    lengths: Tensor | None = None
    recurrent_dropout: float = 0.0
    zoneout: tuple[float, float] = (0.0, 0.0)
    training: bool = False
    norm: tuple[tuple[Tensor, ...], ...] = ()
    return_cell_states: bool = False
    return_gates: bool = False
    recompute: bool = False

    def is_empty(self) -> bool:
        return (
            self.resets is None
            and self.lengths is None
            and not (self.training and self.recurrent_dropout)
            and self.zoneout == (0.0, 0.0)
            and len(self.norm) == 0
            and not self.return_cell_states
            and not self.return_gates
            and not self.recompute
        )

    def of_layer(
        self,
        k: int,
        input: Tensor,
        h0: Tensor | None,
        weights: Sequence[Tensor],
        batch_sizes: Tensor | None,
        directions: int,
    ) -> LayerExtras:
        """Those of layer k. Draws its masks: the recurrent one first, then those of zoneout for h and for c."""
        sets = slice(k * directions, (k + 1) * directions)
        state, hidden = weights[1].size(1), weights[1].size(0) // 4
        mask, zoneout_h, zoneout_c = None, *self.zoneout
        if self.training and self.recurrent_dropout:
            if batch_sizes is None:
                batch = input.size(1)
            else:
                batch = h0.size(1) if h0 is not None else batch_sizes.tolist()[0]
            # A mask in 16 bits would round 1 / (1 - p).
            dtype = torch.float32 if input.dtype in (torch.bfloat16, torch.float16) else input.dtype
            ones = input.new_ones((directions, batch, state), dtype=dtype)
            mask = F.dropout(ones, self.recurrent_dropout, True)
        if self.training:
            zoneout_h = _kept(input, directions, state, zoneout_h)
            zoneout_c = _kept(input, directions, hidden, zoneout_c)
        return LayerExtras(
            self.resets,
            None if self.reset_h is None else self.reset_h[sets],
            None if self.reset_c is None else self.reset_c[sets],
            self.lengths,
            mask,
            zoneout_h,
            zoneout_c,
            self.norm[k] if self.norm else (),
            self.return_cell_states,
            self.return_gates,
            self.recompute,
        )


def _kept(input: Tensor, directions: int, size: int, p: float) -> Any:
    """Which elements of a state zoneout keeps, for all steps: (D, T, B, size) or (D, N, size)."""
    if p == 0:
        return 0.0
    shape = (directions, *input.shape[:-1], size)
    # The extension does it in a fraction of the time, but none that looks on knows its function.
    if input.device.type != "cpu" or p < 2**-16 or not nothing_looks_on() or not loader.has_kernels():
        return torch.rand(shape, dtype=torch.float32, device=input.device) < p
    seed = torch.empty((), dtype=torch.int64, device="cpu").random_(-(2**63), None)
    return loader.extension().random_flags(shape, p, seed.item())


def collected(layers: Sequence[tuple[Tensor | None, Tensor | None]]) -> LSTMExtras:
    """One result of those of the layers: (cell states, gates)."""
    parts = [None if part[0] is None else torch.cat(part) for part in zip(*layers, strict=True)]
    return LSTMExtras(*parts)
