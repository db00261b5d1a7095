"""Lets ``torch.compile`` take our layers that are ``torch.nn.LSTM`` to ``isinstance``.

Dynamo refuses every ``torch.nn.LSTM`` in one method, unless its setting ``allow_rnn`` is on. The method is wrapped:
the setting is on while it looks at one of our layers, and as the user left it while it looks at one of torch's.

Importing dynamo takes seconds, so the method is wrapped when somebody else imports it.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import nn

__all__ = ["let_dynamo_take"]

_BUILDER = "torch._dynamo.variables.builder"
# Now: users put our classes in their places.
_REFUSED = (nn.RNN, nn.GRU, nn.LSTM)
_UNFIT = (
    "lstm_ext: torch.compile breaks the graph at layers that are torch.nn.LSTM to isinstance, as at torch's own: the "
    "dynamo of torch {} is not one that lstm_ext knows how to ask. lstm_ext.convert(model, fullgraph=True) makes "
    "layers that compile whole"
)

# Some versions of torch have one value of the setting for all threads.
_lock = threading.RLock()


def let_dynamo_take(is_ours: Callable[[nn.Module], bool]) -> None:
    """Let dynamo take the modules for which ``is_ours`` is True, now or once it is imported.

    Where this torch's dynamo has no such method or setting, a UserWarning says so when dynamo is imported.
    """
    finder = _Finder(is_ours)
    sys.meta_path.insert(0, finder)
    if _BUILDER in sys.modules:
        # Waits where another thread is importing it.
        finder.found(importlib.import_module(_BUILDER))


class _Finder(MetaPathFinder):
    """Finds what the other finders find, and calls :meth:`found` after dynamo's module has been imported."""

    def __init__(self, is_ours: Callable[[nn.Module], bool]) -> None:
        self._is_ours = is_ours

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _BUILDER:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        spec = next((s for f in others if (s := f.find_spec(fullname, path, target)) is not None), None)
        loader: Any = spec and spec.loader
        if loader is not None:
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                if module.__name__ == _BUILDER:
                    del loader.exec_module
                    self.found(module)

            loader.exec_module = exec_module
        return spec

    def found(self, builder: ModuleType) -> None:
        with _lock:
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                _wrap(builder, self._is_ours)


def _wrap(builder: Any, is_ours: Callable[[nn.Module], bool]) -> None:
    cls, config = getattr(builder, "VariableBuilder", None), getattr(builder, "config", None)
    method: Any = getattr(cls, "wrap_module", None)
    if not (
        inspect.isfunction(method)
        and list(inspect.signature(method).parameters) == ["self", "value"]
        and "allow_rnn" in inspect.unwrap(method).__code__.co_names
        and hasattr(config, "allow_rnn")
    ):
        warnings.warn(_UNFIT.format(torch.__version__), UserWarning, stacklevel=2)
        return
    users: list[bool] = []  # the user's value, while a call is under way

    @functools.wraps(method)
    def wrap_module(self: Any, value: nn.Module) -> Any:
        if not isinstance(value, _REFUSED):
            return method(self, value)
        with _lock:
            before = config.allow_rnn
            users.append(users[-1] if users else before)
            wanted = users[-1] or is_ours(value)
            try:
                if wanted != before:
                    config.allow_rnn = wanted
                return method(self, value)
            finally:
                users.pop()
                if wanted != before:
                    config.allow_rnn = before

    cls.wrap_module = wrap_module
