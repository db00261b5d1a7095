"""LSTM and GRU without a module: tensors in, tensors out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .call import run
from .call.layout import LSTMExtras
from .layer import route
from .native import integrations
from .options import FunctionalOptions, GRUArguments, signature_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["gru", "lstm"]


def __dir__() -> list[str]:
    return __all__


_Sequences = TypeVar("_Sequences", Tensor, PackedSequence)
_States = tuple[Tensor, Tensor]


class _Options(FunctionalOptions, total=False):
    """The keywords that have no say in the type of the results."""

    lengths: Tensor | Sequence[int] | None
    resets: Tensor | PackedSequence | None
    reset_state: _States | None
    mask: Tensor | None


@overload
def lstm(
    input: _Sequences,
    hx: _States | None,
    weights: Sequence[Tensor],
    bias: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    *,
    return_cell_states: Literal[False] = False,
    return_gates: Literal[False] = False,
    **options: Unpack[_Options],
) -> tuple[_Sequences, _States]: ...
@overload
def lstm(
    input: _Sequences,
    hx: _States | None,
    weights: Sequence[Tensor],
    bias: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    *,
    return_cell_states: Literal[True],
    return_gates: bool = False,
    **options: Unpack[_Options],
) -> tuple[_Sequences, _States, LSTMExtras]: ...
@overload
def lstm(
    input: _Sequences,
    hx: _States | None,
    weights: Sequence[Tensor],
    bias: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    *,
    return_cell_states: bool = False,
    return_gates: Literal[True],
    **options: Unpack[_Options],
) -> tuple[_Sequences, _States, LSTMExtras]: ...
@overload
def lstm(
    input: _Sequences,
    hx: _States | None,
    weights: Sequence[Tensor],
    bias: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    *,
    return_cell_states: bool = False,
    return_gates: bool = False,
    **options: Unpack[_Options],
) -> tuple[_Sequences, _States] | tuple[_Sequences, _States, LSTMExtras]: ...
def lstm(
    input: Tensor | PackedSequence,
    hx: tuple[Tensor, Tensor] | None,
    weights: Sequence[Tensor],
    bias: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    resets: Tensor | PackedSequence | None = None,
    reset_state: tuple[Tensor, Tensor] | None = None,
    mask: Tensor | None = None,
    return_cell_states: bool = False,
    return_gates: bool = False,
    **options: Any,
) -> Any:
    """Compute a stack of LSTM layers on a batch of sequences, with the equations of :mod:`lstm_ext.reference`.

    T steps, B sequences, I features, L layers, D = 2 if bidirectional else 1, H hidden units, P the projection's size,
    or H without one; N rows of a PackedSequence.

    Args:
        input: (T, B, I), or (B, T, I) with ``batch_first``; T >= 1, B >= 0, any strides; or a
            PackedSequence, whose ``data`` is (N, I).
        hx: the initial states ``(h0, c0)`` of shapes (L * D, B, P) and (L * D, B, H), whatever
            ``batch_first`` says; None for zeros.
        weights: a flat sequence in the order of ``torch.nn.LSTM.parameters()``: for each layer, and in it for
            each direction, ``w_ih (4H, I or D * P), w_hh (4H, P)``, then ``b_ih (4H), b_hh (4H)`` if
            ``bias``, then ``w_hr (P, H)`` with a projection. The number of tensors says whether there is one.
        bias: whether ``weights`` holds biases.
        num_layers: how many layers there are, L.
        dropout: probability of zeroing an element between two layers; only if ``training``.
        training: whether dropout, recurrent_dropout, weight_dropout and random zoneout are active.
        bidirectional: whether each layer has a second set of weights that reads time backwards.
        batch_first: the layout of ``input`` and ``output``.
        lengths, resets, reset_state, mask, return_cell_states, return_gates: as in :meth:`lstm_ext.LSTM.forward`.
        norm_weights: the parameters of layer normalisation, a flat sequence: for each layer, and in it for each
            direction, ``gain_ih (4H), gain_hh (4H), gain_c (H)``, then ``bias_c (H)`` if ``bias``. None for layers
            without it.
        layer_norm: with ``norm_weights``, whether it is the ``"cell"`` of :class:`lstm_ext.LSTM`.
        peephole_weights: the weights of peepholes, a flat sequence: for each layer, and in it for each direction,
            ``weight_ci``, ``weight_cf``, ``weight_co``, (H) each. None for layers without them.
        options: the others are those of :class:`lstm_ext.LSTM`; masks are random only if ``training``.

    Returns:
        ``(output, (h_n, c_n))``: output (T, B, D * P), or (B, T, D * P) with ``batch_first``; h_n (L * D, B,
        P); c_n (L * D, B, H). The dtype is that of ``input``, or autocast's if autocast is on. If
        ``return_cell_states`` or ``return_gates`` is True, there is a third element, :class:`lstm_ext.LSTMExtras`.

    Raises:
        TypeError: ``input``, ``hx`` or ``weights`` is not made of tensors, or another argument has a wrong type.
        ValueError: a shape, number of weights, dtype, device or value is wrong; the text names the argument.
        RuntimeError: the sequence is empty (T == 0), with torch's text.
    """
    integrations.install()
    return run.lstm(
        route.lstm_layer,
        input,
        hx,
        weights,
        bias,
        num_layers,
        dropout,
        training,
        bidirectional,
        batch_first,
        lengths=lengths,
        resets=resets,
        reset_state=reset_state,
        mask=mask,
        return_cell_states=return_cell_states,
        return_gates=return_gates,
        **options,
    )


lstm.__signature__ = signature_of(lstm, FunctionalOptions, "return_cell_states")  # type: ignore[attr-defined]


def gru(
    input: _Sequences,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    bias: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    resets: _Sequences | None = None,
    reset_state: Tensor | None = None,
    mask: Tensor | None = None,
    **options: Unpack[GRUArguments],
) -> tuple[_Sequences, Tensor]:
    """Compute a stack of GRU layers on a batch of sequences, as :func:`lstm` does of LSTM layers.

    Args:
        input: as in :func:`lstm`.
        hx: the initial state h0, (L * D, B, H), whatever ``batch_first`` says; None for zeros.
        weights: a flat sequence in the order of ``torch.nn.GRU.parameters()``: for each layer, and in it for each
            direction, ``w_ih (3H, I or D * H), w_hh (3H, H)``, then ``b_ih (3H), b_hh (3H)`` if ``bias``.
        bias, num_layers, dropout, training, bidirectional, batch_first: as in :func:`lstm`.
        lengths, resets, mask: as in :meth:`lstm_ext.LSTM.forward`.
        reset_state: the state that a reset puts in place, in the shape of ``hx``; None for zeros.
        options: those of :class:`lstm_ext.GRU`; masks are random only if ``training``.

    Returns:
        ``(output, h_n)``: output (T, B, D * H), or (B, T, D * H) with ``batch_first``; h_n (L * D, B, H). The dtype is
        that of ``input``, or autocast's if autocast is on.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`lstm`; also a ValueError for an option that a GRU does not have.
    """
    integrations.install()
    return run.lstm(
        route.lstm_layer,
        input,
        hx,
        weights,
        bias,
        num_layers,
        dropout,
        training,
        bidirectional,
        batch_first,
        gru=True,
        lengths=lengths,
        resets=resets,
        reset_state=reset_state,
        mask=mask,
        **options,
    )


gru.__signature__ = signature_of(gru, GRUArguments)  # type: ignore[attr-defined]
