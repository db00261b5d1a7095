"""Tools that look a layer up by its exact class, in tables that know torch's layers and not ours.

Nothing here imports a tool. The layers enter themselves into the tables of those that are loaded, whenever they are
converted and in ``train`` and ``eval``, which thop and ptflops call before they look.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from typing import Any

from torch import nn

__all__ = ["NotQuantized", "introduce"]

# What thop and ptflops call after each forward pass, by class.
_COUNTERS = (("thop.profile", "register_hooks"), ("ptflops.pytorch_ops", "MODULES_MAPPING"))


def introduce(ours: type[nn.Module], torchs: type[nn.Module], refuse: Callable[[Any], None]) -> None:
    """Enter ``ours`` beside ``torchs`` into the tables of the tools that are loaded, unless it is there.

    Args:
        ours: the exact class of a layer.
        torchs: the class of torch that it stands for.
        refuse: raises for a layer that cannot become one of torch's. For tools that replace it.
    """
    for module, name in _COUNTERS:
        table = getattr(sys.modules.get(module), name, None)
        if table is not None and torchs in table:
            table.setdefault(ours, _Seen(table[torchs], torchs))
    validators = getattr(sys.modules.get("opacus.validators"), "ModuleValidator", None)
    if validators is not None and torchs in validators.VALIDATORS:
        validators.VALIDATORS.setdefault(ours, _Seen(validators.VALIDATORS[torchs], torchs))
        validators.FIXERS.setdefault(ours, _Seen(validators.FIXERS[torchs], torchs, refuse))


# Called by dynamo, not traced.
introduce._dynamo_marked_constant = True  # type: ignore[attr-defined]


class _Seen:
    """A tool's function for torch's layer, for ours: it sees a layer of torch with the very same attributes."""

    def __init__(
        self,
        function: Callable[..., Any],
        torchs: type[nn.Module],
        refuse: Callable[[Any], None] = lambda layer: None,
    ) -> None:
        functools.update_wrapper(self, function)
        self._function, self._torchs, self._refuse = function, torchs, refuse

    def __call__(self, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self._refuse(layer)
        twin = self._torchs.__new__(self._torchs)
        twin.__dict__ = layer.__dict__
        return self._function(twin, *args, **kwargs)


class NotQuantized:
    """The attribute ``qconfig``, which ``torch.ao.quantization`` sets in every module of a model before it begins.

    It then quantizes the modules whose exact class it was given or knows, and can be told of no other: even its
    conversion of an LSTM asks for the exact class. So it would leave our layers as they are in silence.
    """

    def __get__(self, layer: nn.Module | None, cls: type) -> Any:
        if layer is None or "qconfig" not in layer.__dict__:
            raise AttributeError(f"{cls.__name__} has no attribute 'qconfig'")
        return layer.__dict__["qconfig"]

    def __set__(self, layer: nn.Module, value: Any) -> None:
        layer.__dict__["qconfig"] = value
        _warn_about_quantization()

    def __delete__(self, layer: nn.Module) -> None:
        del layer.__dict__["qconfig"]


@functools.cache
def _warn_about_quantization() -> None:
    warnings.warn(
        "torch.ao.quantization (quantize_dynamic and others) leaves the layers of lstm_ext in floating point: call "
        "lstm_ext.revert(model) before it to have them quantized",
        UserWarning,
        stacklevel=3,
    )
