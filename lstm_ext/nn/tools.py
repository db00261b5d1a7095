"""Support for tools that look a layer up by its exact class, in tables that have torch's layers and not ours.

Nothing here imports a tool. A layer adds itself to the tables of the loaded tools when somebody iterates over the
modules of its model, which all of these tools do before they look. Tools that cannot take our layers make a warning.
"""

from __future__ import annotations

import functools
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TypeVar

from torch import nn

from ..native.imports import constant_for_dynamo, when_imported

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


@constant_for_dynamo
def _introduce(ours: type[nn.Module], known: type[nn.Module]) -> None:
    """Add ``ours`` beside ``known`` to the tables of the loaded tools, unless it is there."""
    if not ours.__module__.startswith("lstm_ext."):
        return  # tools do not know users' subclasses of torch's layer either
    for module, name in _COUNTERS:
        table = getattr(sys.modules.get(module), name, None)
        if table is not None and known in table:
            table.setdefault(ours, _Seen(table[known], known))
    validators = getattr(sys.modules.get("opacus.validators"), "ModuleValidator", None)
    if validators is not None and known in validators.VALIDATORS:
        validators.VALIDATORS.setdefault(ours, _Seen(validators.VALIDATORS[known], known))
        validators.FIXERS.setdefault(ours, _Seen(validators.FIXERS[known], known, replaces=True))


class _Seen:
    """A tool's function for torch's layer, adapted to ours: it gets a layer of torch with the very same attributes."""

    def __init__(self, function: Callable[..., Any], known: type[nn.Module], replaces: bool = False) -> None:
        functools.update_wrapper(self, function)
        self._function, self._known, self._replaces = function, known, replaces

    def __call__(self, layer: Any, *args: Any, **kwargs: Any) -> Any:
        if self._replaces:
            layer._refuse_replacement()
        twin = self._known.__new__(self._known)
        twin.__dict__ = layer.__dict__
        return self._function(twin, *args, **kwargs)


def typed_like(function: _Typed) -> Callable[[Any], _Typed]:
    """For type checkers: a method with the type of ``function``.

    ``__call__`` gets the type of ``forward`` so. In ``torch.nn.Module`` it has none.
    """
    return lambda _: function


# The packages of frames between the user's line and our layer; torch's functions are wrapped as deprecated.
_IN_BETWEEN = ("torch", "modelopt", "typing_extensions", "warnings", "_py_warnings")

_warned: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _warn_about_quantization(layer: nn.Module) -> None:
    model, frame = layer, sys._getframe(2)
    while (outer := _outer(frame)) is not None:
        if frame.f_code.co_name == "propagate_qconfig_":
            model = frame.f_locals["module"]
        frame = outer
    _warn_once("torch.ao.quantization (quantize_dynamic and others)", model, frame)


def _outer(frame: FrameType) -> FrameType | None:
    """The frame that called this one of a tool; None for the user's."""
    return frame.f_back if frame.f_globals.get("__name__", "").split(".")[0] in _IN_BETWEEN else None


def _in_floating_point(tool: str, names: str = "") -> str:
    return (
        f"{tool} leaves the layers of lstm_ext in floating point{names and f' ({names})'}: "
        "call lstm_ext.revert(model) before it to have them quantized"
    )


def _warn_once(tool: str, model: nn.Module, frame: FrameType) -> None:
    """Warn once for the model that is being quantized, at the line that does so."""
    if model in _warned:
        return
    layers = [name for name, m in model.named_modules() if isinstance(m, KnownToTools)]
    if not layers:
        return
    _warned.add(model)
    while (outer := _outer(frame)) is not None:
        frame = outer
    names = ", ".join(filter(None, layers))
    # No registry: a model like an earlier one, from the same line, is another model and warns again.
    text = _in_floating_point(tool, names)
    warnings.warn_explicit(text, UserWarning, frame.f_code.co_filename, frame.f_lineno)


def _warn_before_modelopt(conversion: Any) -> None:
    """Its table takes classes with torch's own ``forward``, in which it replaces functions that ours does not call."""
    replace = getattr(conversion, "replace_quant_module", None)
    if replace is None:  # a modelopt that does its work elsewhere
        warnings.warn(_in_floating_point("modelopt"), UserWarning, stacklevel=2)
        return

    @functools.wraps(replace)
    def replace_quant_module(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        _warn_once("modelopt", model, sys._getframe(1))
        return replace(model, *args, **kwargs)

    conversion.replace_quant_module = replace_quant_module


when_imported("modelopt.torch.quantization.conversion", "modelopt", _warn_before_modelopt)
