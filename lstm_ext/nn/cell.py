"""``lstm_ext.LSTMCell``: the drop-in for ``torch.nn.LSTMCell``."""

from __future__ import annotations

from collections.abc import Sequence
from types import FunctionType
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from ..call import cuda_choice
from ..call.autocast import autocast_dtype, result_dtypes, to_dtype
from ..call.values import described_pair, is_pair
from ..layer import route
from ..layer.tracing import any_autocast, is_jit_tracing, leaf_of_graph
from .scripted import IgnoredAttributes, refuse_scripting
from .tools import KnownToTools, typed_like

_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


# Bound now, because users may replace it by our class (torch.nn.LSTMCell = lstm_ext.LSTMCell).
_torch_class = nn.LSTMCell
_torch_forward = nn.LSTMCell.forward


class LSTMCell(KnownToTools, nn.RNNCellBase):
    """One step of one LSTM layer, with the interface, parameters and initial weights of :class:`torch.nn.LSTMCell`.

    The equations are those of :mod:`lstm_ext.reference`. H hidden units, I features. Example::

        cell = lstm_ext.LSTMCell(10, 20)
        x = torch.randn(6, 3, 10)                      # 6 steps, B = 3, I = 10
        h, c = cell(x[0])                              # (3, 20) each
        for x_t in x[1:]:
            h, c = cell(x_t, (h, c))

    Args:
        input_size: the number of features of the input, I.
        hidden_size: the number of hidden units, H.
        bias: whether to add ``bias_ih`` and ``bias_hh``.
        device, dtype: of the parameters.

    Parameters are named, shaped and ordered as in ``torch.nn.LSTMCell``: ``weight_ih (4H, I)``,
    ``weight_hh (4H, H)``, ``bias_ih (4H)``, ``bias_hh (4H)``; the gates' rows are in the order i, f, g, o. Every call
    reads them by attribute. For many steps, :class:`lstm_ext.LSTM` on the whole sequence is faster.

    Raises:
        TypeError, RuntimeError: the same as ``torch.nn.LSTMCell``, with its texts.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        # Called by name: in a subclass of torch's cell too, the next class would be torch.nn.LSTMCell.
        nn.RNNCellBase.__init__(self, input_size, hidden_size, bias, num_chunks=4, device=device, dtype=dtype)

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Compute one step.

        Args:
            input: (B, I), or (I,) without a batch. B >= 0, any strides. It has the dtype and device of the
                parameters, except under autocast. That computes in its own dtype, and the results have the dtypes of
                ``torch.nn.LSTMCell``.
            hx: ``(h, c)``, a tuple or list, both (B, H), or (H,) without a batch; None for zeros.

        Returns:
            ``(h, c)`` after the step, in the shapes of ``hx``.

        Raises:
            ValueError, RuntimeError, IndexError: a wrong rank, size, device or dtype, with the texts of
                ``torch.nn.LSTMCell``; tracing by ``torch.jit``.
            TypeError: ``input`` is not a Tensor, or ``hx`` not two Tensors.
        """
        # torch.jit.script compiles this branch only.
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return self._scripted_forward(input, hx)
        else:
            return self._forward(input, hx)

    if TYPE_CHECKING:

        @typed_like(forward)
        def __call__(self) -> None: ...

    # Under another name, because torch.jit.script compiles both as methods.
    _scripted_forward = FunctionType(
        _torch_forward.__code__, _torch_forward.__globals__, "_scripted_forward", _torch_forward.__defaults__
    )

    def _forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        if is_jit_tracing():
            return _torch_forward(self, input, hx)  # type: ignore[arg-type]
        if not isinstance(input, Tensor) or (hx is not None and not is_pair(hx)):
            if isinstance(input, torch.fx.Proxy):
                return leaf_of_graph(self, input, (input,) if hx is None else (input, hx), {})  # type: ignore[return-value]
            self._refuse(input, hx)
        weights: Any = self._weights()
        states = route.plain_cell(weights, input, hx)
        if states is not None:
            return states
        x = input
        h: Any
        c: Any
        h, c = hx if hx is not None else (None, None)
        dtypes, casts = None, False
        if any_autocast():
            # torch's own operator casts by itself.
            casts = route.torch_route(x, h, c, [[w for w in weights if w is not None]]) is not None
            autocast = None if casts else autocast_dtype(x)
            if autocast is not None:
                dtypes = result_dtypes(autocast, x, c, fused=False, projected=False)
                x, h, c, (weights,) = to_dtype(autocast, x, h, c, [weights])

        # The path without an error is short, because a single step takes microseconds.
        w_ih, w_hh = weights[:2]
        shape, dtype, device = x.shape, x.dtype, x.device
        rank, hidden = len(shape), w_hh.size(-1)
        good = (
            0 < rank <= 2
            and w_ih.shape == (4 * hidden, shape[-1])
            and (casts or w_ih.dtype == dtype)
            and w_ih.device == device
        )
        if good and h is not None:
            state_shape = (*shape[:-1], hidden)
            good = (
                h.shape == state_shape
                and c.shape == state_shape
                and (casts or h.dtype == c.dtype == dtype)
                and h.device == device
                and c.device == device
            )
        if not good:
            self._refuse(input, hx)

        if rank == 2:
            h, c = self._step(x, h, c, weights)
        else:
            if h is not None:
                h, c = h[None], c[None]
            h, c = self._step(x[None], h, c, weights)
            h, c = h[0], c[0]
        return (h, c) if dtypes is None else (h.to(dtypes[0]), c.to(dtypes[1]))

    def _step(
        self, x: Tensor, h: Tensor | None, c: Tensor | None, weights: Sequence[Any]
    ) -> tuple[Tensor, Tensor]:
        """Computes the step for x (B, I), h and c (B, H)."""
        b_ih, b_hh = weights[2:]
        if b_ih is None and b_hh is None:
            weights = weights[:2]
        elif b_ih is None or b_hh is None:  # the user has set one to None; torch's cell accepts that too
            b = b_hh if b_ih is None else b_ih
            weights = [*weights[:2], b, torch.zeros_like(b)]
        preferred = x.is_cuda and cuda_choice.cell_prefers_torch(x, weights, self.training)
        return route.lstm_cell(x, h, c, weights, preferred)

    def _weights(self) -> list[Tensor]:
        """The present weights; the same as ``getattr`` returns, but faster."""
        own = self.__dict__
        parameters = own["_parameters"]
        # Like getattr, an instance attribute comes before a parameter; a parametrized weight is in neither.
        return [
            parameters[name] if name in parameters and name not in own else getattr(self, name)
            for name in _WEIGHTS
        ]

    def _refuse(self, input: Any, hx: Any) -> NoReturn:
        """Raise the error for arguments that do not fit: torch's own, if it has a useful one."""
        if not isinstance(input, Tensor):
            raise TypeError(f"LSTMCell: expected input to be a Tensor, got {type(input).__name__}")
        if hx is None or (isinstance(hx, (tuple, list)) and all([isinstance(s, Tensor) for s in hx])):
            with torch.no_grad():
                _torch_forward(self, input, hx)  # type: ignore[arg-type]
        # torch raises no error for more than two states, for states that it can broadcast if there is no batch, and for
        # another dtype of c.
        if hx is not None:
            if not is_pair(hx):
                raise TypeError(
                    f"LSTMCell: expected hx to be a tuple of two Tensors (h, c), got {described_pair(hx)}"
                )
            expected = (*input.shape[:-1], self.weight_hh.size(-1))
            for i, state in enumerate(hx):
                if state.shape != expected:
                    raise RuntimeError(
                        f"LSTMCell: expected hx[{i}] of shape {expected}, got {tuple(state.shape)}"
                    )
                if state.dtype != input.dtype:
                    raise RuntimeError(
                        f"LSTMCell: hx[{i}] dtype ({state.dtype}) does not match input dtype ({input.dtype}). "
                        f"Convert it: hx[{i}].to({input.dtype})"
                    )
        raise RuntimeError(
            f"LSTMCell: input of shape {tuple(input.shape)}, {input.dtype}, on {input.device} does not fit "
            f"weight_ih of shape {tuple(self.weight_ih.shape)}, {self.weight_ih.dtype}, on {self.weight_ih.device}"
        )

    def _stands_in_for(self) -> type[nn.Module]:
        return _torch_class

    __jit_ignored_attributes__ = IgnoredAttributes()

    def __prepare_scriptable__(self) -> LSTMCell:
        # torch.jit.script calls this hook before it compiles a module or a module inside one.
        refuse_scripting(self, LSTMCell, [])
        return self
