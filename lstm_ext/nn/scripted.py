"""The methods that ``torch.jit`` compiles in place of our layers' ``forward``: torch's layer, with the same parameters.

TorchScript cannot compile our Python, but a module may name other methods for it, in ``__overloads__``. Its hook
``__prepare_scriptable__`` cannot return a layer of torch: torch would leave that in the table of modules of the user's
own model. torch's ``forward`` itself cannot be named, because torch keeps the types of its arguments by class.

The methods have the names that those of torch's layer get when it is compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..native import integrations
from ..options import OPTIONS


class _ToCompile:
    """A method of the layers that are being compiled. Others lack it, or ``torch.jit.trace`` would compile it too."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = torch.jit.export(function)

    def __get__(self, layer: nn.Module | None, cls: type) -> Any:
        if layer is None:
            return self._function
        if "__overloads__" not in layer.__dict__:
            raise AttributeError(f"{cls.__name__} has {self._function.__name__} only in torch.jit.script")
        return MethodType(self._function, layer)


class IgnoredAttributes:
    """``__jit_ignored_attributes__``, which ``torch.jit`` reads first from a module that it compiles.

    ``torch.jit.script`` has called ``__prepare_scriptable__`` by then. A ``ScriptModule``, which compiles itself when
    it is made, has not.
    """

    def __init__(self, *names: str) -> None:
        self._names = list(names)

    def __get__(self, layer: Any, cls: type) -> list[str]:
        if layer is not None and integrations.is_compiled_by_jit():
            layer.__prepare_scriptable__()
        return self._names


class Scripted(nn.RNNBase):
    """A layer that has compiled forms of ``forward``, for a tensor and for a ``PackedSequence``."""

    __jit_ignored_attributes__ = IgnoredAttributes("_layer_names", "_given", "_requested")
    # torch.jit.script compiles all others.
    __jit_unused_properties__ = [*nn.RNNBase.__jit_unused_properties__, *OPTIONS]  # noqa: RUF012

    if TYPE_CHECKING:  # torch.jit reads annotations
        _flat_weights: Any
        permute_hidden: Any


class ScriptedGRU(Scripted):
    """Errors are those of ``nn.GRU``."""

    @_ToCompile
    def forward__0(self, input: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        rank = input.dim()
        if rank < 2 or rank > 3:
            raise ValueError(f"GRU: Expected input to be 2D or 3D, got {rank}D instead")
        axis = 0 if self.batch_first else 1
        x = input if rank == 3 else input.unsqueeze(axis)
        h = self._scripted_zeros(x, x.size(axis)) if hx is None else self._scripted_batch(hx, rank)
        self.check_forward_args(x, h, None)
        y, h_n = torch.gru(
            x,
            h,
            self._flat_weights,
            self.bias,
            self.num_layers,
            self.dropout,
            self.training,
            self.bidirectional,
            self.batch_first,
        )
        return (y, h_n) if rank == 3 else (y.squeeze(axis), h_n.squeeze(1))

    @_ToCompile
    def forward__1(self, input: PackedSequence, hx: Tensor | None = None) -> tuple[PackedSequence, Tensor]:
        rows, sizes, order, back = input
        h = self._scripted_zeros(rows, int(sizes[0])) if hx is None else self.permute_hidden(hx, order)
        y, h_n = torch.gru(
            rows,
            sizes,
            h,
            self._flat_weights,
            self.bias,
            self.num_layers,
            self.dropout,
            self.training,
            self.bidirectional,
        )
        return PackedSequence(y, sizes, order, back), self.permute_hidden(h_n, back)

    def _scripted_batch(self, h: Tensor, rank: int) -> Tensor:
        if h.dim() != rank:
            kind = "batched" if rank == 3 else "unbatched"
            raise RuntimeError(
                f"For {kind} {rank}-D input, hx should also be {rank}-D but got {h.dim()}-D tensor"
            )
        return h if rank == 3 else h.unsqueeze(1)

    def _scripted_zeros(self, x: Tensor, batch: int) -> Tensor:
        sets = self.num_layers * (2 if self.bidirectional else 1)
        return torch.zeros(sets, batch, self.hidden_size, dtype=x.dtype, device=x.device)


class ScriptedLSTM(Scripted):
    """Errors are those of ``nn.LSTM``."""

    # The methods of nn.LSTM that the compiled code calls, and that subclasses may call.
    if TYPE_CHECKING:  # torch.jit reads annotations
        get_expected_cell_size: Any
        check_forward_args: Any
    else:
        get_expected_cell_size = nn.LSTM.get_expected_cell_size
        check_forward_args = nn.LSTM.check_forward_args
        permute_hidden = nn.LSTM.permute_hidden

    @_ToCompile
    def forward__0(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        rank = input.dim()
        if rank < 2 or rank > 3:
            raise ValueError(f"LSTM: Expected input to be 2D or 3D, got {rank}D instead")
        # torch's operator knows batches only: a sequence alone is a batch of one.
        axis = 0 if self.batch_first else 1
        x = input if rank == 3 else input.unsqueeze(axis)
        states = self._scripted_zeros(x, x.size(axis)) if hx is None else self._scripted_batch(hx, rank)
        self.check_forward_args(x, states, None)
        y, h, c = torch.lstm(
            x,
            states,
            self._flat_weights,
            self.bias,
            self.num_layers,
            self.dropout,
            self.training,
            self.bidirectional,
            self.batch_first,
        )
        return (y, (h, c)) if rank == 3 else (y.squeeze(axis), (h.squeeze(1), c.squeeze(1)))

    @_ToCompile
    def forward__1(
        self, input: PackedSequence, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[PackedSequence, tuple[Tensor, Tensor]]:
        rows, sizes, order, back = input
        alive = int(sizes[0])  # the rows of the first step: all sequences
        states = self._scripted_zeros(rows, alive) if hx is None else self.permute_hidden(hx, order)
        y, h, c = torch.lstm(
            rows,
            sizes,
            states,
            self._flat_weights,
            self.bias,
            self.num_layers,
            self.dropout,
            self.training,
            self.bidirectional,
        )
        return PackedSequence(y, sizes, order, back), self.permute_hidden((h, c), back)

    def _scripted_batch(self, hx: tuple[Tensor, Tensor], rank: int) -> tuple[Tensor, Tensor]:
        """The states as those of a batch; they have as many axes as the input."""
        h, c = hx
        if h.dim() != rank or c.dim() != rank:
            kind = "batched" if rank == 3 else "unbatched"
            raise RuntimeError(
                f"For {kind} {rank}-D input, hx and cx should "
                f"also be {rank}-D but got ({h.dim()}-D, {c.dim()}-D) tensors"
            )
        return (h, c) if rank == 3 else (h.unsqueeze(1), c.unsqueeze(1))

    def _scripted_zeros(self, x: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        sets = self.num_layers * (2 if self.bidirectional else 1)
        size = self.proj_size if self.proj_size > 0 else self.hidden_size
        h = torch.zeros(sets, batch, size, dtype=x.dtype, device=x.device)
        c = torch.zeros(sets, batch, self.hidden_size, dtype=x.dtype, device=x.device)
        return h, c


def prepare_to_compile(layer: Scripted) -> None:
    """Name the methods that ``torch.jit.script`` compiles. It sets this attribute in torch's layers too."""
    layer.__dict__["__overloads__"] = {"forward": ["forward__0", "forward__1"]}
    layer._init_flat_weights()


def refuse_scripting(layer: nn.Module, kind: type[nn.Module], options: list[str]) -> None:
    """Raises RuntimeError if a compiled layer of torch would not compute the same as ``layer``, a ``kind``."""
    name = f"lstm_ext.{kind.__name__}"
    if options:
        raise RuntimeError(
            f"{name}: torch.jit.script takes the layer as torch's, which has no {', '.join(options)}: use "
            "torch.export, or lstm_ext.onnx for ONNX"
        )
    forward: Any = type(layer).forward
    if forward is not kind.forward or "forward" in layer.__dict__:
        raise RuntimeError(
            f"{name}: torch.jit.script takes the layer as torch's, and {type(layer).__qualname__} has a forward of its "
            "own: use torch.export or torch.jit.trace, or call lstm_ext.revert(model) first"
        )
