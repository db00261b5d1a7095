"""Waits for modules that other code imports: to import them here would take seconds, or turn the GIL on."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, TypeVar

_Function = TypeVar("_Function", bound=Callable[..., Any])
_lock = threading.RLock()


def constant_for_dynamo(function: _Function) -> _Function:
    """Dynamo calls the function where it would trace it, and takes the result for a constant.

    ``torch.compiler.assume_constant_result`` does the same, and imports dynamo, which would take most of the time of
    importing this package.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def when_imported(name: str, key: str, function: Callable[[ModuleType], None]) -> None:
    """Calls ``function`` with the module of this name, now or once it is imported.

    A later call with the same ``key`` takes the place of the earlier one, e.g. if this package is imported again.
    """
    finder = _Finder(name, key, function)
    # Otherwise an old finder and this one would call each other.
    sys.meta_path[:] = [f for f in sys.meta_path if getattr(f, "_lstm_ext_key", None) != key]
    sys.meta_path.insert(0, finder)
    if name in sys.modules:
        # This waits if another thread is importing it.
        finder.found(importlib.import_module(name))


class _Finder(MetaPathFinder):
    """Delegates to the other finders, and calls the function after the module has been imported."""

    def __init__(self, name: str, key: str, function: Callable[[ModuleType], None]) -> None:
        self._name, self._lstm_ext_key, self._function = name, key, function

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._name:
            return None
        # Those before this one have been asked already.
        finders = list(sys.meta_path)
        others = finders[finders.index(self) + 1 :] if self in finders else finders
        spec = next((s for f in others if (s := f.find_spec(fullname, path, target)) is not None), None)
        loader: Any = spec and spec.loader
        if loader is not None:
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                if module.__name__ == self._name:
                    loader.__dict__.pop("exec_module", None)
                    self.found(module)

            loader.exec_module = exec_module
        return spec

    def found(self, module: ModuleType) -> None:
        with _lock:
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                self._function(module)
