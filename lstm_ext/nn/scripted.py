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


class ScriptedLSTM(nn.RNNBase):
    """The compiled forms of ``forward``, for a tensor and for a ``PackedSequence``; errors are those of ``nn.LSTM``."""

    __jit_ignored_attributes__ = IgnoredAttributes("_layer_names", "_given", "_requested")
    # torch.jit.script compiles all others.
    __jit_unused_properties__ = [*nn.RNNBase.__jit_unused_properties__, *OPTIONS]  # noqa: RUF012

    # The methods of nn.LSTM that the compiled code calls, and that subclasses may call.
    if TYPE_CHECKING:  # torch.jit reads annotations
        get_expected_cell_size: Any
        check_forward_args: Any
        permute_hidden: Any
        _flat_weights: Any
    else:
        get_expected_cell_size = nn.LSTM.get_expected_cell_size
        check_forward_args = nn.LSTM.check_forward_args
        permute_hidden = nn.LSTM.permute_hidden

    @_ToCompile
    def forward__0(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        if input.dim() not in (2, 3):
            raise ValueError(f"LSTM: Expected input to be 2D or 3D, got {input.dim()}D instead")
        is_batched = input.dim() == 3
        batch_dim = 0 if self.batch_first else 1
        if not is_batched:
            input = input.unsqueeze(batch_dim)
        if hx is None:
            hx = self._scripted_zeros(input, input.size(batch_dim))
        elif is_batched:
            if hx[0].dim() != 3 or hx[1].dim() != 3:
                raise RuntimeError(
                    "For batched 3-D input, hx and cx should "
                    f"also be 3-D but got ({hx[0].dim()}-D, {hx[1].dim()}-D) tensors"
                )
        else:
            if hx[0].dim() != 2 or hx[1].dim() != 2:
                raise RuntimeError(
                    "For unbatched 2-D input, hx and cx should "
                    f"also be 2-D but got ({hx[0].dim()}-D, {hx[1].dim()}-D) tensors"
                )
            hx = (hx[0].unsqueeze(1), hx[1].unsqueeze(1))
        self.check_forward_args(input, hx, None)
        output, h, c = torch.lstm(
            input,
            hx,
            self._flat_weights,
            self.bias,
            self.num_layers,
            self.dropout,
            self.training,
            self.bidirectional,
            self.batch_first,
        )
        if not is_batched:
            return output.squeeze(batch_dim), (h.squeeze(1), c.squeeze(1))
        return output, (h, c)

    @_ToCompile
    def forward__1(
        self, input: PackedSequence, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[PackedSequence, tuple[Tensor, Tensor]]:
        data, batch_sizes, sorted_indices, unsorted_indices = input
        if hx is None:
            hx = self._scripted_zeros(data, int(batch_sizes[0]))
        else:
            hx = self.permute_hidden(hx, sorted_indices)
        output, h, c = torch.lstm(
            data,
            batch_sizes,
            hx,
            self._flat_weights,
            self.bias,
            self.num_layers,
            self.dropout,
            self.training,
            self.bidirectional,
        )
        packed = PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
        return packed, self.permute_hidden((h, c), unsorted_indices)

    def _scripted_zeros(self, x: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        sets = self.num_layers * (2 if self.bidirectional else 1)
        size = self.proj_size if self.proj_size > 0 else self.hidden_size
        h = torch.zeros(sets, batch, size, dtype=x.dtype, device=x.device)
        c = torch.zeros(sets, batch, self.hidden_size, dtype=x.dtype, device=x.device)
        return h, c


def prepare_to_compile(layer: ScriptedLSTM) -> None:
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
