"""``lstm_ext.GRU`` and ``lstm_ext.GRUCell``: the drop-ins for ``torch.nn.GRU`` and ``torch.nn.GRUCell``."""

from __future__ import annotations

from collections.abc import Sequence
from types import FunctionType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..call.arguments import CallOptions
from ..call.autocast import autocast_dtype, result_dtypes, to_dtype
from ..layer import equations, route
from ..layer.layer_call import LayerCall, LayerOptions
from ..layer.tracing import any_autocast, is_jit_tracing, leaf_of_graph
from ..options import OPTIONS, GRUArguments, described, signature_of, unexpected_argument
from .recurrent import RecurrentLayer
from .scripted import IgnoredAttributes, ScriptedGRU, prepare_to_compile, refuse_scripting
from .tools import KnownToTools, typed_like

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Bound now, because users may replace them by our classes.
_TORCH, _TORCH_CELL = nn.GRU, nn.GRUCell
_torch_forward, _torch_cell_forward = nn.GRU.forward, nn.GRUCell.forward
_Sequences = TypeVar("_Sequences", Tensor, PackedSequence)


class GRU(RecurrentLayer, ScriptedGRU):
    """A stack of GRU layers, with the interface, parameters and initial weights of :class:`torch.nn.GRU`.

    T steps, B sequences, L layers, D = 2 if bidirectional else 1, H hidden units. Example::

        gru = lstm_ext.GRU(10, 20, num_layers=2)
        x = torch.randn(5, 3, 10)                      # T = 5, B = 3, I = 10
        output, h = gru(x)                             # (5, 3, 20), and (2, 3, 20)
        output, h = gru(x, h, lengths=[5, 2, 4])
        y, h = gru.step(torch.randn(3, 10))            # one step: (3, 20)

    Args:
        input_size: the number of features of the input, I.
        hidden_size: the number of hidden units, H.
        num_layers: how many layers there are, L.
        bias: whether to add ``bias_ih`` and ``bias_hh``.
        batch_first: whether input and output are (B, T, features) instead of (T, B, features).
        dropout: probability of zeroing an element between two layers, in training mode.
        bidirectional: whether each layer also reads time backwards.
        device, dtype: those of the parameters.
        {options}

    Parameters are named, shaped and ordered as in ``torch.nn.GRU``: ``weight_ih_l{k} (3H, I or D * H)``,
    ``weight_hh_l{k} (3H, H)``, ``bias_ih_l{k} (3H)``, ``bias_hh_l{k} (3H)``, and the same with ``_reverse``; the gates'
    rows are in the order r, z, n. The kernels are those of the CPU. Elsewhere torch's own operator computes, and what
    it does not have is computed in plain PyTorch.

    Raises:
        TypeError, ValueError: the same as ``torch.nn.GRU``, with its texts; also for an invalid value of an option, and
            for an option that a GRU does not have.
    """

    gru = True

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
        **options: Unpack[GRUArguments],
    ) -> None:
        if "proj_size" in options:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        for name in options.keys() - OPTIONS.keys():
            raise unexpected_argument("GRU.__init__()", name, _SIGNATURE.parameters)
        sizes = (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional)
        self._construct(("GRU", *sizes), options, device, dtype)

    def forward(
        self,
        input: _Sequences,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | Sequence[int] | int | None = None,
        resets: _Sequences | None = None,
        reset_state: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[_Sequences, Tensor]:
        """Run the layers on whole sequences.

        Args:
            input: (T, B, I), or (B, T, I) with ``batch_first``, or (T, I) without a batch; a ``PackedSequence``; or a
                nested tensor of the jagged layout, (B, j, I).
            hx: (L * D, B, H), without the B for unbatched input; None for zeros.
            lengths, resets, mask: as in :meth:`lstm_ext.LSTM.forward`.
            reset_state: the state that a reset puts in place, in the shape of ``hx``; None for zeros.

        Returns:
            ``(output, h_n)``: the last layer's h of every step, (T, B, D * H) in the layout of the input, and the
            states after the last step of each sequence, in the shape of ``hx``.

        Raises:
            TypeError, ValueError, RuntimeError: as :meth:`lstm_ext.LSTM.forward`.
        """
        call_options = None
        if lengths is not None or resets is not None or reset_state is not None or mask is not None:
            call_options = CallOptions(lengths, resets, reset_state, mask)
        return self._forward(input, hx, call_options)

    if TYPE_CHECKING:

        @typed_like(forward)
        def __call__(self) -> None: ...

    def step(self, x_t: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Compute one time step, for streaming: as :meth:`lstm_ext.LSTM.step`, with h as the only state.

        Args:
            x_t: (B, I), or (I,) without a batch.
            hx: (L, B, H), without the B for unbatched input; None for zeros.

        Returns:
            ``(y_t, h)``: the last layer's h, (B, H) or (H,), and the states to pass to the next call.

        Raises:
            TypeError, ValueError, RuntimeError: as :meth:`lstm_ext.LSTM.step`.
        """
        return self._step(x_t, hx)

    def _by_torch(self, input: Any, hx: Any) -> Any:
        return _torch_forward(self, input, hx)  # type: ignore[call-overload]

    def _stands_in_for(self) -> type[nn.Module]:
        return _TORCH

    def __prepare_scriptable__(self) -> GRU:
        refuse_scripting(self, GRU, list(self._given))
        prepare_to_compile(self)
        return self


GRU.__doc__ = described(GRU.__doc__, gru=True)
_SIGNATURE = GRU.__init__.__signature__ = signature_of(GRU.__init__, GRUArguments)  # type: ignore[attr-defined]


class GRUCell(KnownToTools, nn.RNNCellBase):
    """One step of one GRU layer, with the interface, parameters and initial weights of :class:`torch.nn.GRUCell`.

    H hidden units, I features. Example::

        cell = lstm_ext.GRUCell(10, 20)
        h = cell(torch.randn(3, 10))                   # (3, 20)

    Args:
        input_size: the number of features of the input, I.
        hidden_size: the number of hidden units, H.
        bias: whether to add ``bias_ih`` and ``bias_hh``.
        device, dtype: of the parameters.

    Parameters are those of ``torch.nn.GRUCell``: ``weight_ih (3H, I)``, ``weight_hh (3H, H)``, ``bias_ih (3H)``,
    ``bias_hh (3H)``; the gates' rows are in the order r, z, n.
    """

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        nn.RNNCellBase.__init__(self, input_size, hidden_size, bias, num_chunks=3, device=device, dtype=dtype)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Compute one step.

        Args:
            input: (B, I), or (I,) without a batch. It has the dtype and device of the parameters, except under
                autocast.
            hx: (B, H), or (H,) without a batch; None for zeros.

        Returns:
            h after the step, in the shape of ``hx``.

        Raises:
            TypeError, ValueError, RuntimeError: as ``torch.nn.GRUCell``, with its texts.
        """
        # torch.jit.script compiles this branch only.
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return self._scripted_forward(input, hx)
        else:
            return self._forward(input, hx)

    # Under another name, because torch.jit.script compiles both as methods.
    _scripted_forward = FunctionType(
        _torch_cell_forward.__code__,
        _torch_cell_forward.__globals__,
        "_scripted_forward",
        _torch_cell_forward.__defaults__,
    )

    if TYPE_CHECKING:

        @typed_like(forward)
        def __call__(self) -> None: ...

    def _forward(self, input: Tensor, hx: Tensor | None) -> Tensor:
        if is_jit_tracing():
            return _torch_cell_forward(self, input, hx)  # type: ignore[arg-type]
        if isinstance(input, torch.fx.Proxy):
            return leaf_of_graph(self, input, (input,) if hx is None else (input, hx), {})  # type: ignore[return-value]
        if not isinstance(input, Tensor) or not (hx is None or isinstance(hx, Tensor)):
            got = type(hx if isinstance(input, Tensor) else input).__name__
            raise TypeError(f"GRUCell: expected input and hx to be Tensors, got {got}")
        weights: Any = [getattr(self, name) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        h = route.plain_cell(weights, input, hx, True)
        if h is not None:
            return h
        given = [w for w in weights if w is not None]
        if not route.has_gru(input.device) or len(given) == 3 or not self._fits(input, hx, weights):
            return _torch_cell_forward(self, input, hx)  # type: ignore[arg-type]
        x, dtype = input, None
        autocast = autocast_dtype(x) if any_autocast() else None
        if autocast is not None:
            dtype = result_dtypes(autocast, x, hx, fused=False, projected=False)[0]
            x, hx, _, (given,) = to_dtype(autocast, x, hx, None, [given])  # type: ignore[assignment]
        batched = x.dim() == 2
        call = LayerCall(
            x[None] if batched else x[None, None],
            None if hx is None else hx[None] if batched else hx[None, None],
            None,
            given,
            None,
            len(given) == 4,
            False,
            LayerOptions(gru=True),
        )
        h_n = (route.lstm_layer if weights[1].size(-1) else equations.lstm_layer)(call)[1]
        h_n = h_n[0] if batched else h_n[0, 0]
        return h_n if dtype is None else h_n.to(dtype)

    def _fits(self, x: Tensor, hx: Tensor | None, weights: Sequence[Any]) -> bool:
        """Whether the sizes and dtypes fit. torch's own cell raises the errors for those that do not."""
        hidden = weights[1].size(-1)
        casts = any_autocast()
        return (
            0 < x.dim() <= 2
            and weights[0].shape == (3 * hidden, x.size(-1))
            and (casts or weights[0].dtype == x.dtype)
            and (
                hx is None
                or (
                    hx.shape == (*x.shape[:-1], hidden)
                    and (casts or hx.dtype == x.dtype)
                    and hx.device == x.device
                )
            )
        )

    def _stands_in_for(self) -> type[nn.Module]:
        return _TORCH_CELL

    __jit_ignored_attributes__ = IgnoredAttributes()

    def __prepare_scriptable__(self) -> GRUCell:
        refuse_scripting(self, GRUCell, [])
        return self
