"""Layers for inference, whose weights are made ready for the kernels once."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from ..layer.layer_call import LayerOptions
from ..native import loader
from .convert import from_torch
from .lstm import LSTM

__all__ = ["FrozenLSTM", "freeze", "unfreeze"]

_KINDS: dict[torch.dtype | None, str] = {None: "own", torch.bfloat16: "bfloat16", torch.int8: "int8"}
_OPTIONS = ("recurrent_dropout", "zoneout", "layer_norm", "forget_bias", "recompute")

_NO_TORCHSCRIPT = (
    "torch.jit and the older ONNX exporter do not know frozen layers: use torch.export or lstm_ext.unfreeze"
)

_Model = TypeVar("_Model", bound=nn.Module)


class FrozenLSTM(LSTM):
    """What :func:`freeze` makes of an :class:`lstm_ext.LSTM`: for inference, with packed weights beside its own.

    It has the interface of :class:`lstm_ext.LSTM`, and its state dict. The packed weights are made when it is frozen,
    loaded (``load_state_dict``, pickle) or moved to another dtype. They are buffers that no state dict holds.

    A layer does not notice when one of its weights is changed in place. It has no gradients and no training mode.
    """

    frozen_weights: torch.dtype | None = None

    @property
    def frozen(self) -> Sequence[LayerOptions]:  # type: ignore[override]
        if torch.compiler.is_compiling():  # which has to see the buffers
            buffers: Any = self._buffers
            return [LayerOptions(frozen=[buffers[name] for name in names]) for names in self._frozen_names]
        return self._frozen_options

    def _pack(self) -> None:
        kernels = loader.extension()
        if kernels is None:
            raise RuntimeError(
                f"freeze: needs the compiled kernels, which are not there: {loader.status().reason}"
            )
        kind = _KINDS[self.frozen_weights]
        directions = ["", "_reverse"] if self.bidirectional else [""]
        self._frozen_names = [
            [f"packed_l{k}{direction}" for direction in directions] for k in range(self.num_layers)
        ]
        all_packed = []
        for names in self._layer_names:
            weights = [getattr(self, name) for name in names]
            if kind == "int8":
                _refuse_what_int8_has_not(names, weights)
            all_packed.append(kernels.freeze_weights(weights, self.bias, self.bidirectional, kind))
        # From here on nothing fails: an error leaves what was there.
        frozen_options = []
        for buffers, packed in zip(self._frozen_names, all_packed, strict=True):
            for name, tensor in zip(buffers, packed, strict=True):
                self.register_buffer(name, tensor, persistent=False)
            options = LayerOptions(frozen=packed)
            options.native = kernels.LayerOptions(frozen=packed)
            frozen_options.append(options)
        self._frozen_options, self._frozen_from = frozen_options, super()._weights_by_layer()
        self.native_options = [options.native for options in frozen_options]

    def _weights_by_layer(self) -> list[list[Tensor]]:
        if torch.compiler.is_compiling():
            return super()._weights_by_layer()
        return self._frozen_from

    def train(self, mode: bool = True) -> FrozenLSTM:
        """Raises: RuntimeError for ``mode=True``."""
        if mode:
            raise RuntimeError(
                "FrozenLSTM: there is no training mode: lstm_ext.unfreeze gives a layer that can be trained"
            )
        super().train(False)
        return self

    def _traced(self, *_: Any) -> NoReturn:
        raise RuntimeError(_NO_TORCHSCRIPT)

    def __prepare_scriptable__(self) -> NoReturn:
        raise RuntimeError(_NO_TORCHSCRIPT)

    def extra_repr(self) -> str:
        kind = "" if self.frozen_weights is None else f", frozen_weights={self.frozen_weights}"
        return super().extra_repr() + kind

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if hasattr(self, "_frozen_names"):
            self._pack()

    def _apply(self, fn: Any, recurse: bool = True) -> FrozenLSTM:
        moved = fn(self.weight_ih_l0[:0])  # before anything is changed
        _check_place(moved.device, moved.dtype, self.frozen_weights)
        super()._apply(fn, recurse)
        self._pack()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._pack()

    def __getstate__(self) -> dict[str, Any]:
        # They belong to this processor.
        state = super().__getstate__()
        names = {name for layer in self._frozen_names for name in layer}
        state.pop("_frozen_options")
        state.pop("_frozen_from")
        state.pop("native_options")
        state["_buffers"] = {k: v for k, v in state["_buffers"].items() if k not in names}
        return state

    def __setstate__(self, d: dict[str, Any]) -> None:
        super().__setstate__(d)
        self._pack()


def _check_place(device: torch.device, dtype: torch.dtype, weights: torch.dtype | None) -> None:
    if device.type != "cpu":
        raise RuntimeError(f"freeze: a frozen layer is on the CPU, got parameters on {device}")
    if weights is not None and dtype == torch.float64:
        raise ValueError(f"freeze: weights: expected None for float64 parameters, got {weights}")


def _refuse_what_int8_has_not(names: Sequence[str], weights: Sequence[Tensor]) -> None:
    for name, weight in zip(names, weights, strict=True):
        if name.startswith(("weight_ih", "weight_hh")) and not torch.isfinite(weight).all():
            raise ValueError(f"freeze: {name} has an infinity or a NaN, which int8 cannot hold")


def freeze(module: _Model, weights: torch.dtype | None = None) -> Any:
    """A copy for inference on the CPU, whose LSTMs have their weights packed once, and not in each call.

    The copy does not see what happens to the original afterwards. None of its parameters requires gradients. Its
    results are those of the original in evaluation mode, within rounding. :class:`FrozenLSTM` says what it can do;
    :func:`unfreeze` gives a layer that can be trained.

    Args:
        module: an :class:`lstm_ext.LSTM`, a ``torch.nn.LSTM``, or a model that has such layers; on the CPU. In a model
            all other modules are copied as they are, ``LSTMCell`` too.
        weights: None keeps the numbers of ``weight_ih`` and ``weight_hh``. ``torch.bfloat16`` and ``torch.int8`` round
            them: to bfloat16, or to whole multiples of 1/127 of the largest number in their row. Everything else is
            computed as before. One streaming step spends most of its time on reading weights, and rounded weights are
            a half or a quarter of that memory; up to 20,000 of a direction stay float32, which is faster. The rounding
            moves results by about 2e-3 (bfloat16) and 4e-3 (int8) of their size, and further with layer normalisation.

    Returns:
        a :class:`FrozenLSTM`, or the model with such layers, in evaluation mode.

    Raises:
        TypeError: ``module`` is no module; or it is a layer that cannot be frozen: a subclass with code of its own, or
            one with parametrized weights.
        ValueError: there is no LSTM in ``module``; ``weights`` is another dtype; parameters are not of one dtype, are
            float64 where ``weights`` is given, or have an infinity or a NaN where it is ``torch.int8``.
        RuntimeError: parameters are not on the CPU, or the compiled kernels are not there.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"freeze: expected module to be a torch.nn.Module, got {type(module).__name__}")
    if weights not in _KINDS:
        raise ValueError(f"freeze: weights: expected None, torch.bfloat16 or torch.int8, got {weights!r}")
    frozen = _replaced(module, (LSTM, nn.LSTM), lambda layer: _freeze_layer(layer, weights), "freeze")
    frozen._trainable = [name for name, p in module.named_parameters() if p.requires_grad]
    return frozen.requires_grad_(False).eval()


def unfreeze(module: _Model) -> Any:
    """A copy of a frozen module whose layers can be trained: :class:`lstm_ext.LSTM` with the original weights.

    Args:
        module: what :func:`freeze` returned.

    Returns:
        an :class:`lstm_ext.LSTM`, or the model with such layers, in evaluation mode. The parameters require gradients
        where those of the module that was frozen did; of a part of that module, all do.

    Raises:
        TypeError: ``module`` is no module.
        ValueError: there is no frozen layer in it.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"unfreeze: expected module to be a torch.nn.Module, got {type(module).__name__}")
    thawed = _replaced(module, (FrozenLSTM,), _unfreeze_layer, "unfreeze")
    trainable = getattr(module, "_trainable", None)
    for name, parameter in thawed.named_parameters():
        parameter.requires_grad_(trainable is None or name in trainable)
    thawed.__dict__.pop("_trainable", None)
    return thawed


def _replaced(module: nn.Module, classes: tuple[type, ...], replace: Any, function: str) -> nn.Module:
    """A copy with new layers in place of those of some classes."""
    layers = [m for m in module.modules() if isinstance(m, classes)]
    if not layers:
        kind = "a frozen LSTM" if function == "unfreeze" else "an LSTM"
        raise ValueError(f"{function}: expected {kind}, or a model that has one, got {type(module).__name__}")
    # deepcopy takes these for copies that it has made already.
    return copy.deepcopy(module, {id(layer): replace(layer) for layer in layers})


def _freeze_layer(layer: Any, weights: torch.dtype | None) -> FrozenLSTM:
    if isinstance(layer, FrozenLSTM):
        layer = _unfreeze_layer(layer)
    if not isinstance(layer, LSTM):
        layer = from_torch(layer)
    elif type(layer).forward is not LSTM.forward or "parametrizations" in layer._modules:
        raise TypeError(
            f"freeze: cannot freeze this {type(layer).__name__}: it has code or weights of its own"
        )
    dtypes = sorted({str(p.dtype) for p in layer.parameters()})
    if len(dtypes) != 1:
        raise ValueError(f"freeze: expected parameters of one dtype, got {', '.join(dtypes)}")
    _check_place(layer.weight_ih_l0.device, layer.weight_ih_l0.dtype, weights)
    frozen = _with_parameters(FrozenLSTM, layer)
    frozen.frozen_weights = weights
    frozen.requires_grad_(False)
    frozen._pack()
    return frozen.eval()


def _unfreeze_layer(layer: FrozenLSTM) -> LSTM:
    return _with_parameters(LSTM, layer).eval()


def _with_parameters(cls: type[LSTM], layer: LSTM) -> Any:
    """A ``cls`` with copies of the layer's parameters."""
    new = cls(
        layer.input_size,
        layer.hidden_size,
        layer.num_layers,
        layer.bias,
        layer.batch_first,
        layer.dropout,
        layer.bidirectional,
        layer.proj_size,
        device="meta",
        **{name: getattr(layer, name) for name in _OPTIONS},
    )
    for name, parameter in layer.named_parameters():
        setattr(new, name, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
    new._init_flat_weights()
    return new
