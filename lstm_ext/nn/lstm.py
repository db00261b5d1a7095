"""``lstm_ext.LSTM``: the drop-in for ``torch.nn.LSTM``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..call.arguments import CallOptions
from ..call.layout import (
    LSTMExtras,
)
from ..layer.activations import activation_text
from ..options import (
    OPTIONS,
    LayerArguments,
    described,
    signature_of,
    unexpected_argument,
)
from .recurrent import RecurrentLayer
from .scripted import ScriptedLSTM, prepare_to_compile, refuse_scripting
from .tools import typed_like

# Bound now, because users may replace it by our class.
_torch_class = nn.LSTM
_torch_forward = nn.LSTM.forward
if TYPE_CHECKING:
    from typing_extensions import Unpack

_Sequences = TypeVar("_Sequences", Tensor, PackedSequence)
_States = tuple[Tensor, Tensor]


class LSTM(RecurrentLayer, ScriptedLSTM):
    """A stack of LSTM layers, with the interface, parameters and initial weights of :class:`torch.nn.LSTM`.

    :mod:`lstm_ext.reference` has the equations. T steps, B sequences, L layers, D = 2 if bidirectional else 1, H hidden
    units, P the projection's size, or H without one. Example::

        lstm = lstm_ext.LSTM(10, 20, num_layers=2)
        x = torch.randn(5, 3, 10)                      # T = 5, B = 3, I = 10
        output, (h, c) = lstm(x)                       # (5, 3, 20), and (2, 3, 20) each
        output, (h, c) = lstm(x, (h, c), lengths=[5, 2, 4])
        y, (h, c) = lstm.step(torch.randn(3, 10))      # one step: (3, 20)

    Args:
        input_size: the number of features of the input, I.
        hidden_size: the number of hidden units, H.
        num_layers: how many layers there are, L.
        bias: whether to add ``bias_ih`` and ``bias_hh``.
        batch_first: whether input and output are (B, T, features) instead of (T, B, features). States and unbatched
            input are the same in both cases.
        dropout: probability of zeroing an element between two layers, in training mode. On the CPU the masks
            are those that ``torch.nn.LSTM`` draws from the same seed.
        bidirectional: whether each layer also reads time backwards.
        proj_size: if positive, h is projected to this size (https://arxiv.org/abs/1402.1128).
        device, dtype: those of the parameters.
        {options}

    :mod:`lstm_ext.reference` has the equations of the options and of the arguments of :meth:`forward` after ``hx``,
    with sources. All options run on the kernels wherever the plain layer does, alone and together. But ``layer_norm``
    goes with neither ``peephole`` nor ``coupled_gates``, and ``forget_bias`` not with ``coupled_gates``.

    Parameters are named, shaped and ordered as in ``torch.nn.LSTM``: ``weight_ih_l{k} (4H, I or D * P)``,
    ``weight_hh_l{k} (4H, P)``, ``bias_ih_l{k} (4H)``, ``bias_hh_l{k} (4H)``, ``weight_hr_l{k} (P, H)``, and
    the same with ``_reverse``; the gates' rows are in the order i, f, g, o. Every call reads them by attribute,
    so ``torch.func.functional_call``, ``weight_norm`` and parametrizations work as on any other module. With
    ``layer_norm``, each layer and direction also has ``ln_gain_ih_l{k} (4H)``, ``ln_gain_hh_l{k} (4H)`` and
    ``ln_gain_c_l{k} (H)``, initially 1, and, if ``bias``, ``ln_bias_c_l{k} (H)``, initially 0. With ``peephole``, it
    has ``weight_ci_l{k}``, ``weight_cf_l{k}`` and ``weight_co_l{k}``, (H) each, initially 0.

    Raises:
        TypeError, ValueError: the same as ``torch.nn.LSTM``, with its texts; also for an invalid value of the other
            arguments, for options that exclude each other, and for ``forget_bias`` with ``bias=False``.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: Any = None,
        **options: Unpack[LayerArguments],
    ) -> None:
        for name in options.keys() - OPTIONS.keys():
            raise unexpected_argument("LSTM.__init__()", name, _SIGNATURE.parameters)
        sizes = (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size)
        self._construct(("LSTM", *sizes), options, device, dtype)

    @overload
    def forward(
        self,
        input: _Sequences,
        hx: _States | None = None,
        *,
        lengths: Tensor | Sequence[int] | int | None = None,
        resets: _Sequences | None = None,
        reset_state: _States | None = None,
        mask: Tensor | None = None,
        return_cell_states: Literal[False] = False,
        return_gates: Literal[False] = False,
    ) -> tuple[_Sequences, _States]: ...
    @overload
    def forward(
        self,
        input: _Sequences,
        hx: _States | None = None,
        *,
        lengths: Tensor | Sequence[int] | int | None = None,
        resets: _Sequences | None = None,
        reset_state: _States | None = None,
        mask: Tensor | None = None,
        return_cell_states: Literal[True],
        return_gates: bool = False,
    ) -> tuple[_Sequences, _States, LSTMExtras]: ...
    @overload
    def forward(
        self,
        input: _Sequences,
        hx: _States | None = None,
        *,
        lengths: Tensor | Sequence[int] | int | None = None,
        resets: _Sequences | None = None,
        reset_state: _States | None = None,
        mask: Tensor | None = None,
        return_cell_states: bool = False,
        return_gates: Literal[True],
    ) -> tuple[_Sequences, _States, LSTMExtras]: ...
    @overload
    def forward(
        self,
        input: _Sequences,
        hx: _States | None = None,
        *,
        lengths: Tensor | Sequence[int] | int | None = None,
        resets: _Sequences | None = None,
        reset_state: _States | None = None,
        mask: Tensor | None = None,
        return_cell_states: bool = False,
        return_gates: bool = False,
    ) -> tuple[_Sequences, _States] | tuple[_Sequences, _States, LSTMExtras]: ...
    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Tensor | Sequence[int] | int | None = None,
        resets: Tensor | PackedSequence | None = None,
        reset_state: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        return_cell_states: bool = False,
        return_gates: bool = False,
    ) -> Any:
        """Run the layers on whole sequences.

        Args:
            input: (T, B, I), or (B, T, I) with ``batch_first``, or (T, I) without a batch. T >= 1, B >= 0.
                It has the dtype and device of the parameters, except under autocast. Or a ``PackedSequence``, whose
                ``data`` is (N, I); nothing is computed for padding. Or a nested tensor of the jagged layout, (B, j, I)
                whatever ``batch_first`` says: nothing is padded, and a sequence may be empty. The lengths are read on
                the host.
            hx: ``(h_0, c_0)``, a tuple or list, of shapes (L * D, B, P) and (L * D, B, H), without the B for
                unbatched input; None for zeros. The order of the batch is that before packing.
            lengths: how many steps of each sequence count: a list of B integers or an integer tensor (B,), on any
                device, in any order, from 0 to T; for unbatched input a number. The output of the steps that do not
                count is 0. The final state is that of the last step that counts, or that of ``hx`` if none does.
                The reverse direction begins with the last step that counts. Numbers on the host are checked. Numbers
                on a GPU are not read by the host, nor are those that a compiler or ``vmap`` does not know. They are
                clamped to [0, T] instead.
            resets: (T, B) in the layout of the input, optionally with a last axis of 1; bool, or 0 and 1 in a
                floating-point dtype; on the device of the input. For a ``PackedSequence``, a ``PackedSequence`` of the
                same batch sizes and order; for a nested tensor one of the same lengths. Where true, the state is
                replaced before the step is computed, and no gradient crosses. Both directions are cut there, so the
                steps before never meet the steps after.
            reset_state: ``(h, c)`` in the shapes of ``hx``: the state that a reset puts in place. It gets gradients.
                None for zeros. Each direction has its own rows of it.
            mask: bool, (T, B) in the layout of the input, optionally with a last axis of 1, on any device. True in the
                steps that count. Another step keeps the state, in both directions, as in Keras. Its output is 0, where
                Keras repeats the output before it. So padding may be at the end, where the mask says the same as
                ``lengths``, at the beginning, and anywhere between. Resets in it count for the next step that does.
                Not together with ``lengths``.
            return_cell_states, return_gates: whether to return c_t, and i, f, g, o, of every layer and step.

        Returns:
            ``(output, (h_n, c_n))``: output is the last layer's h of every step, (T, B, D * P) in the layout of the
            input, or a ``PackedSequence`` of the same batch sizes and order, or a nested tensor of the same lengths;
            h_n and c_n are the states after the last step of each sequence, in the shapes of ``hx``. If
            ``return_cell_states`` or ``return_gates`` is True, there is a third element, :class:`lstm_ext.LSTMExtras`.

        Raises:
            ValueError: the rank of the input is wrong, or its dtype is not that of the parameters; batch sizes or
                indices of a ``PackedSequence`` make no sense; a nested tensor is not jagged, or is so in another axis
                than time; an argument after ``hx`` has a wrong shape, dtype, device
                or number, or two of them exclude each other.
            RuntimeError: another size, device or dtype, or the rank of packed data, is wrong; the sequence is empty;
                ``torch.jit`` traces the layer; a transform or compiler does not support the call.
            TypeError: ``input`` is neither a Tensor nor a PackedSequence, ``hx`` is not two Tensors, batch sizes are
                not integers, or an argument after ``hx`` has a wrong type.
        """
        call_options = None
        if (
            lengths is not None
            or resets is not None
            or reset_state is not None
            or mask is not None
            or return_cell_states is not False
            or return_gates is not False
        ):
            call_options = CallOptions(lengths, resets, reset_state, mask, return_cell_states, return_gates)
        return self._forward(input, hx, call_options)

    if TYPE_CHECKING:

        @typed_like(forward)
        def __call__(self) -> None: ...

    def step(
        self, x_t: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Compute one time step, for streaming.

        T calls of ``step``, each with the state of the call before, equal one call of ``forward`` on the T steps,
        within rounding.

        Args:
            x_t: (B, I), or (I,) without a batch; dtype and device as the input of :meth:`forward`.
            hx: ``(h, c)`` as in :meth:`forward`: (L, B, P) and (L, B, H), without the B for unbatched input;
                None for zeros.

        Returns:
            ``(y_t, (h, c))``: the last layer's h, (B, P) or (P,), and the states to pass to the next call.

        Raises:
            RuntimeError: the layer is bidirectional (its reverse direction needs the steps that follow), or it
                is in training mode with dropout, recurrent_dropout, weight_dropout or zoneout.
            TypeError, ValueError, RuntimeError: as :meth:`forward`.

        To begin a new sequence in some rows, replace their states in ``hx`` before the call, as ``resets`` does.

        FSDP2 (``fully_shard``) gathers parameters in hooks of ``forward``. To use ``step`` under it, call
        ``torch.distributed.fsdp.register_fsdp_forward_method(module, "step")`` once.
        """
        return self._step(x_t, hx)

    def _by_torch(self, input: Any, hx: Any) -> Any:
        return _torch_forward(self, input, hx)  # type: ignore[call-overload]

    def _stands_in_for(self) -> type[nn.Module]:
        return _torch_class

    def __prepare_scriptable__(self) -> LSTM:
        # torch.jit.script calls this hook before it compiles a module or a module inside one. The result stays in the
        # user's model, so it is the layer itself.
        refuse_scripting(self, LSTM, list(self._given))
        prepare_to_compile(self)
        return self


LSTM.__doc__ = described(LSTM.__doc__)
_SIGNATURE = LSTM.__init__.__signature__ = signature_of(LSTM.__init__, LayerArguments)  # type: ignore[attr-defined]


def activations_of(module: LSTM) -> str:
    """The functions of its cells, see `layer.activations`."""
    return activation_text(module.gate_activation, module.cell_activation)
