"""One call of a layer, described once, for everything between the modules and the kernels.

csrc/torch/layer_call.h has the same names on the other side of the boundary, csrc/contract/options.def the same table
of options.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from torch import Tensor

# The results: output, h_n, c_n, cell states and gate values; the last two are None if not requested.
LayerResults = tuple[Any, ...]


def _batched(axis: int, *, rows: bool = False, gradient: bool = False) -> dict[str, Any]:
    """Metadata of a tensor with a batch axis. `rows`: packed data have their rows in place of (T, B)."""
    return {"axis": axis, "rows": rows, "gradient": gradient}


@dataclass(eq=False)  # not frozen: one is made for each call, and a frozen one takes four times as long
class LayerOptions:
    """The options of a layer beyond ``torch.nn.LSTM``, both directions; time first. Nothing set is the plain layer.

    D directions, T steps, B sequences, H hidden units, P the size of h; N rows if the input is packed. All tensors are
    on the device of the input. `lstm_ext.reference` has the equations.

    Attributes:
        resets: bool (T, B), or (N,): a flag at time t cuts the row between the times t - 1 and t, in both directions,
            and the state is replaced there. False past the end of a sequence.
        reset_h, reset_c: (D, B, P) and (D, B, H), the state that replaces it; None for zeros. In the order of ``h0``.
        lengths: int64 (B,), each in [0, T]: the number of steps that count. Never with packed input.
        recurrent_mask: (D, B, P): h_{t-1} is multiplied by it before the product with W_hh. float32 for a 16-bit
            input, otherwise of the input's dtype.
        keep_h, keep_c: the flags of zoneout in training, bool (D, T, B, P or H) or (D, N, P or H): True for elements
            that keep the previous state.
        zoneout_h, zoneout_c: without flags, the share of the previous state that is kept.
        norm: the parameters of layer normalisation: D sets of ``gain_ih (4H), gain_hh (4H), gain_c (H)[, bias_c (H)]``,
            ``bias_c`` if the layer has biases. Empty without layer normalisation.
        norm_cell: whether the normalised c_t is the one that the next step takes; only with ``norm``.
        peephole: D sets of ``w_ci, w_cf, w_co``, (H) each. Empty without peepholes.
        frozen: D tensors of bytes, on the CPU: the results of the extension's ``freeze_weights``. The kernels read
            them in place of the weights. Such a layer has no gradients. Empty for all others.
        cell_clip: the bound of |c_t|; 0 without one.
        coupled_gates: whether f = 1 - i.
        activations: the functions of i, f and o, of g, and of c_t in h_t, as `activations.activation_text` gives
            them; empty for sigmoid, tanh and tanh.
        preactivation_clip: the bound of what the functions of the gates take; 0 without one.
        return_cell_states, return_gates: whether these results are requested.
        gru: whether the cell is that of ``torch.nn.GRU``: weights have 3H rows, c0 and reset_c are None, and the
            result c_n says nothing.
        recompute: save no gates for the backward pass, which computes them again.
    """

    # The table of options: all that handles them without knowing them follows from these lines and their order.
    resets: Tensor | None = field(default=None, metadata=_batched(1, rows=True))
    reset_h: Tensor | None = field(default=None, metadata=_batched(1, gradient=True))
    reset_c: Tensor | None = field(default=None, metadata=_batched(1, gradient=True))
    lengths: Tensor | None = field(default=None, metadata=_batched(0))
    recurrent_mask: Tensor | None = field(default=None, metadata=_batched(1))
    keep_h: Tensor | None = field(default=None, metadata=_batched(2, rows=True))
    keep_c: Tensor | None = field(default=None, metadata=_batched(2, rows=True))
    # An int 0, because with dynamic=True dynamo treats a float of an object as a number that may change.
    zoneout_h: float = 0
    zoneout_c: float = 0
    norm: Sequence[Tensor] = field(default=(), metadata={"gradient": True})
    norm_cell: bool = False
    peephole: Sequence[Tensor] = field(default=(), metadata={"gradient": True})
    frozen: Sequence[Tensor] = field(default=(), metadata={"gradient": False})
    cell_clip: float = 0
    coupled_gates: bool = False
    activations: str = ""
    preactivation_clip: float = 0
    return_cell_states: bool = False
    return_gates: bool = False
    gru: bool = False
    recompute: bool = False
    # Not an option: the options in the extension's form, kept if they serve many calls. Converting takes microseconds.
    native = None

    def as_keywords(self) -> dict[str, Any]:
        """The options that are set, by name."""
        # A compiler treats the numbers of a module as inputs of its graph, so a share of 0 is left out.
        keywords: dict[str, Any] = {}
        for name in OPTION_NAMES:
            value = getattr(self, name)
            if isinstance(value, Tensor):
                keywords[name] = value
            elif isinstance(value, (tuple, list)):
                if value:
                    keywords[name] = list(value)
            elif value:
                keywords[name] = value
        return keywords

    def tensors(self) -> list[Tensor]:
        single = [getattr(self, name) for name in _SINGLE]
        return [v for v in single if v is not None] + [v for name in _LISTS for v in getattr(self, name)]


_TABLE = {option.name: option for option in fields(LayerOptions)}
OPTION_NAMES = tuple(_TABLE)
_SINGLE = [name for name, option in _TABLE.items() if "axis" in option.metadata]
_LISTS = [name for name, option in _TABLE.items() if option.default == ()]
_VALUES = [name for name, option in _TABLE.items() if not option.metadata]
NUMBERS = [name for name in _VALUES if type(_TABLE[name].default) is int]
# Those whose tensors have gradients, and single tensors that have none.
_DIFFERENTIABLE = [name for name in (*_SINGLE, *_LISTS) if _TABLE[name].metadata["gradient"]]
_CONSTANT = [name for name in _SINGLE if not _TABLE[name].metadata["gradient"]]

PLAIN = LayerOptions()


@dataclass(eq=False)
class LayerCall:
    """One layer, all time steps, both directions if ``bidirectional``.

    The attributes are the arguments of `lstm_ext.reference.lstm_layer`. ``batch_sizes`` says how many of the B
    sequences, sorted by falling length, have a step t. A sequence begins from its row of ``h0`` and ``c0``, in the
    reverse direction at its own last step.
    """

    input: Tensor
    h0: Tensor | None
    c0: Tensor | None
    weights: Sequence[Tensor]
    batch_sizes: Tensor | None
    bias: bool
    bidirectional: bool
    options: LayerOptions

    def signature(self) -> Signature:
        """The call without its tensors."""
        options = self.options
        counts = tuple([len(getattr(options, name)) for name in _DIFFERENTIABLE if name in _LISTS])
        values = tuple([getattr(options, name) for name in _VALUES])
        return Signature(self.bias, self.bidirectional, len(self.weights), counts, values)

    def tensors(self) -> list[Any]:
        """The tensors of the call in the order of `Signature`, without batch_sizes."""
        options = self.options
        tensors = [self.input, self.h0, self.c0, *self.weights]
        for name in _DIFFERENTIABLE:
            value = getattr(options, name)
            tensors += value if name in _LISTS else [value]
        return tensors + [getattr(options, name) for name in _CONSTANT]

    def map(self, function: Callable[[Tensor], Tensor]) -> LayerCall:
        """The same call with ``function`` applied to each tensor except batch_sizes."""
        tensors = [None if t is None else function(t) for t in self.tensors()]
        return self.signature().call(self.batch_sizes, tensors)


# A function that computes a layer.
LayerFunction = Callable[[LayerCall], LayerResults]


class Signature(NamedTuple):
    """A call without its tensors, and without weights that are frozen.

    The tensors lie in one sequence: input, h0, c0 and the weights, then the options' tensors, first those with
    gradients; each group in the order of `LayerOptions`, single tensors before lists.
    """

    bias: bool
    bidirectional: bool
    weight_count: int
    counts: tuple[int, ...]  # how many tensors each list with gradients has
    values: tuple[Any, ...]  # the options that are numbers and flags

    def value(self, name: str) -> Any:
        """An option that is a number or a flag."""
        return self.values[_VALUES.index(name)]

    @property
    def differentiable(self) -> int:
        """The number of tensors with gradients, which come first."""
        return 3 + self.weight_count + len(_DIFFERENTIABLE) - len(self.counts) + sum(self.counts)

    def call(self, batch_sizes: Tensor | None, tensors: Sequence[Any]) -> LayerCall:
        """The call of these tensors: the inverse of `LayerCall.tensors`."""
        after_weights = 3 + self.weight_count
        input, h0, c0, *weights = tensors[:after_weights]
        given = dict(zip(_VALUES, self.values, strict=True))
        rest, counts = iter(tensors[after_weights:]), iter(self.counts)
        for name in (*_DIFFERENTIABLE, *_CONSTANT):
            given[name] = [next(rest) for _ in range(next(counts))] if name in _LISTS else next(rest)
        return LayerCall(
            input, h0, c0, weights, batch_sizes, self.bias, self.bidirectional, LayerOptions(**given)
        )

    def batch_axes(self, packed: bool) -> tuple[int | None, ...]:
        """The batch axis of each tensor, or its axis of rows if packed; None for parameters of the layer."""
        axes: list[int | None] = [0 if packed else 1, 1, 1, *[None] * self.weight_count]
        counts = iter(self.counts)
        for name in (*_DIFFERENTIABLE, *_CONSTANT):
            option = _TABLE[name].metadata
            axes += (
                [None] * next(counts) if name in _LISTS else [option["axis"] - (packed and option["rows"])]
            )
        return tuple(axes)

    @staticmethod
    def result_axes(packed: bool, count: int) -> tuple[int, ...]:
        """The same for ``count`` results of the layer; those after the first three are by direction."""
        axis = 0 if packed else 1
        return (axis, 1, 1) + (axis + 1,) * (count - 3)
