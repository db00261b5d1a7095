"""Support for tools that look a layer up by its exact class, in tables that have torch's layers and not ours.

Nothing here imports a tool. A layer adds itself to the tables of the loaded tools when somebody iterates over the
modules of its model, which all of these tools do before they look. Tools that cannot take our layers make a warning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from torch import nn

from ..native import integrations

_Typed = TypeVar("_Typed")


class KnownToTools(nn.Module):
    """A layer that stands for one of torch's, and that tools treat like it."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        integrations.install()
        return super().__new__(cls)

    def _stands_in_for(self) -> type[nn.Module]:
        """The class of torch's layer."""
        raise NotImplementedError

    def _refuse_replacement(self) -> None:
        """Raises TypeError for a layer that cannot become one of torch's. For tools that replace it."""

    def apply(self, fn: Callable[[nn.Module], None]) -> Any:
        """Same as in every module."""
        integrations.introduce(type(self), self._stands_in_for())
        return super().apply(fn)

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """Same as in every module."""
        integrations.introduce(type(self), self._stands_in_for())
        return super().named_modules(*args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        # torch.ao.quantization sets it in every module of a model before it begins. It then quantizes the modules whose
        # exact class it was given or knows, and there is no way to add one: it would skip our layers silently.
        if name == "qconfig":
            integrations.warn_about_quantization(self)
        super().__setattr__(name, value)


def typed_like(function: _Typed) -> Callable[[Any], _Typed]:
    """For type checkers: a method with the type of ``function``.

    ``__call__`` gets the type of ``forward`` so. In ``torch.nn.Module`` it has none.
    """
    return lambda _: function
