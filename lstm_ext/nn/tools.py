"""Support for tools that look a layer up by its exact class, in tables that have torch's layers and not ours.

Nothing here imports a tool. A layer adds itself to the tables of the loaded tools when somebody iterates over the
modules of its model, which all of these tools do before they look.
"""

from __future__ import annotations

import functools
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from torch import nn

__all__ = ["KnownToTools", "typed_like"]

_Typed = TypeVar("_Typed")

# Tables of tools that count the operations of a layer after each forward pass, by class.
_COUNTERS = (
    ("thop.profile", "register_hooks"),
    ("ptflops.pytorch_ops", "MODULES_MAPPING"),
    ("deepspeed.profiling.flops_profiler.profiler", "MODULE_HOOK_MAPPING"),
    ("calflops.pytorch_ops", "MODULE_HOOK_MAPPING"),
)


class KnownToTools(nn.Module):
    """A layer that stands for one of torch's, and that tools treat like it."""

    def _stands_in_for(self) -> type[nn.Module]:
        """The class of torch's layer."""
        raise NotImplementedError

    def _refuse_replacement(self) -> None:
        """Raises TypeError for a layer that cannot become one of torch's. For tools that replace it."""

    def apply(self, fn: Callable[[nn.Module], None]) -> Any:
        """Same as in every module."""
        _introduce(type(self), self._stands_in_for())
        return super().apply(fn)

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """Same as in every module."""
        _introduce(type(self), self._stands_in_for())
        return super().named_modules(*args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        # torch.ao.quantization sets it in every module of a model before it begins. It then quantizes the modules whose
        # exact class it was given or knows, and there is no way to add one: it would skip our layers silently.
        if name == "qconfig":
            _warn_about_quantization(self)
        super().__setattr__(name, value)


def _introduce(ours: type[nn.Module], torchs: type[nn.Module]) -> None:
    """Add ``ours`` beside ``torchs`` to the tables of the loaded tools, unless it is there."""
    if not ours.__module__.startswith("lstm_ext."):
        return  # tools do not know users' subclasses of torch's layer either
    for module, name in _COUNTERS:
        table = getattr(sys.modules.get(module), name, None)
        if table is not None and torchs in table:
            table.setdefault(ours, _Seen(table[torchs], torchs))
    validators = getattr(sys.modules.get("opacus.validators"), "ModuleValidator", None)
    if validators is not None and torchs in validators.VALIDATORS:
        validators.VALIDATORS.setdefault(ours, _Seen(validators.VALIDATORS[torchs], torchs))
        validators.FIXERS.setdefault(ours, _Seen(validators.FIXERS[torchs], torchs, replaces=True))


# Called by dynamo, not traced.
_introduce._dynamo_marked_constant = True  # type: ignore[attr-defined]


class _Seen:
    """A tool's function for torch's layer, adapted to ours: it gets a layer of torch with the very same attributes."""

    def __init__(self, function: Callable[..., Any], torchs: type[nn.Module], replaces: bool = False) -> None:
        functools.update_wrapper(self, function)
        self._function, self._torchs, self._replaces = function, torchs, replaces

    def __call__(self, layer: Any, *args: Any, **kwargs: Any) -> Any:
        if self._replaces:
            layer._refuse_replacement()
        twin = self._torchs.__new__(self._torchs)
        twin.__dict__ = layer.__dict__
        return self._function(twin, *args, **kwargs)


def typed_like(function: _Typed) -> Callable[[Any], _Typed]:
    """For type checkers: a method with the type of ``function``.

    ``__call__`` gets the type of ``forward`` so. In ``torch.nn.Module`` it has none.
    """
    return lambda _: function


# The packages of frames between the user's line and our layer; torch's functions are wrapped as deprecated.
_IN_BETWEEN = ("torch", "typing_extensions", "warnings", "_py_warnings")

_warned: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _warn_about_quantization(layer: nn.Module) -> None:
    """Warn once for the model that is being quantized, at the line that does so."""
    model, frame = layer, sys._getframe(2)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in _IN_BETWEEN:
        if frame.f_code.co_name == "propagate_qconfig_":
            model = frame.f_locals["module"]
        frame = frame.f_back
    if model in _warned:
        return
    _warned.add(model)
    names = ", ".join([name for name, m in model.named_modules() if name and isinstance(m, KnownToTools)])
    # No registry: a model like an earlier one, from the same line, is another model and warns again.
    warnings.warn_explicit(
        "torch.ao.quantization (quantize_dynamic and others) leaves the layers of lstm_ext in floating point"
        f"{names and f' ({names})'}: call lstm_ext.revert(model) before it to have them quantized",
        UserWarning,
        frame.f_code.co_filename,
        frame.f_lineno,
    )
