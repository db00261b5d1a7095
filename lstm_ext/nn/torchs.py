"""Our layers as subclasses of torch's, and ``patch``, which puts them in torch's place."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any

import torch
from torch import nn

from .cell import LSTMCell
from .lstm import LSTM

__all__ = ["TorchLSTM", "TorchLSTMCell", "patch", "with_our_forward"]

# As they are when this package is imported.
_LSTM, _CELL = nn.LSTM, nn.LSTMCell


class TorchLSTM(LSTM, _LSTM):
    """:class:`lstm_ext.LSTM` that is a ``torch.nn.LSTM`` to ``isinstance``; the same arguments, results and speed.

    For code that looks for ``torch.nn.LSTM``: initialisers, validators, exporters. The price: ``torch.compile``
    breaks the graph at such a layer, as it does at torch's own, and ``fullgraph=True`` refuses it unless
    ``torch._dynamo.config.allow_rnn`` is set. :class:`lstm_ext.LSTM` compiles without a break.
    """


class TorchLSTMCell(LSTMCell, _CELL):
    """:class:`lstm_ext.LSTMCell` that is a ``torch.nn.LSTMCell`` to ``isinstance``."""


class _InTorchsPlace(type):
    """Of a class that stands where torch's stood: what torch's class made, or ours, is an instance of it too."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return super().__instancecheck__(instance) or isinstance(instance, cls._also())

    def __subclasscheck__(cls, subclass: type) -> bool:
        return super().__subclasscheck__(subclass) or issubclass(subclass, cls._also())

    def _also(cls) -> tuple[type, ...]:
        # Not of the subclasses that users derive: nothing else is an instance of these.
        return vars(cls).get("_stands_for", ())


class PatchedLSTM(TorchLSTM, metaclass=_InTorchsPlace):
    """What ``torch.nn.LSTM`` is while it is patched."""

    _stands_for = (_LSTM, LSTM)

    def _get_name(self) -> str:
        return "LSTM"


class PatchedLSTMCell(TorchLSTMCell, metaclass=_InTorchsPlace):
    """What ``torch.nn.LSTMCell`` is while it is patched."""

    _stands_for = (_CELL, LSTMCell)

    def _get_name(self) -> str:
        return "LSTMCell"


_PLACES = (torch.nn, torch.nn.modules, torch.nn.modules.rnn)
_CLASSES = {"LSTM": PatchedLSTM, "LSTMCell": PatchedLSTMCell}

_lock = threading.RLock()
_active: list[patch] = []
_before: dict[tuple[Any, str], type] = {}


class patch:
    """Put this package's LSTM and LSTMCell in the place of ``torch.nn.LSTM`` and ``torch.nn.LSTMCell``.

    For layers that a library builds out of reach::

        with lstm_ext.patch():
            model = library.build()         # builds torch.nn.LSTM by that name

        handle = lstm_ext.patch()           # until handle.undo()

    A patch holds for the whole process and all its threads. It reaches code that looks the name up in ``torch.nn``. A
    module that has done ``from torch.nn import LSTM`` before keeps torch's class. The layers stay ours when the patch
    is undone; :func:`lstm_ext.revert` makes them torch's. While a patch holds, ``isinstance(layer, torch.nn.LSTM)`` is
    True for torch's layers and for all of ours.

    Patches may be nested, and undone in any order. torch's classes come back when all are undone.

    The layers are :class:`lstm_ext.TorchLSTM`, whose docstring says what that means for ``torch.compile``.

    Raises:
        RuntimeError: on undoing, other code has put another class in that place in the meantime. Then nothing is
            changed.
    """

    def __init__(self) -> None:
        with _lock:
            if not _active:
                for place in _PLACES:
                    for name, cls in _CLASSES.items():
                        _before[place, name] = getattr(place, name)
                        setattr(place, name, cls)
            _active.append(self)

    def undo(self) -> None:
        """Undo this patch; a second time does nothing."""
        with _lock:
            if self not in _active:
                return
            if len(_active) == 1:
                for place, name in _before:
                    now = getattr(place, name)
                    if now is not _CLASSES[name]:
                        raise RuntimeError(
                            f"patch: {place.__name__}.{name} has become {now.__module__}.{now.__qualname__} since; "
                            "undo that first"
                        )
                for (place, name), cls in _before.items():
                    setattr(place, name, cls)
                _before.clear()
            _active.remove(self)

    def __enter__(self) -> patch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


_derived: dict[type[nn.Module], type[nn.Module]] = {}


def with_our_forward(cls: type[nn.Module]) -> type[nn.Module]:
    """A subclass of ``cls``, which is one of torch's layer, in which ``super().forward`` finds ours.

    Instances are pickled by the name of ``cls``.
    """
    with _lock:
        if cls not in _derived:
            base = TorchLSTM if issubclass(cls, _LSTM) else TorchLSTMCell
            namespace = {
                "__module__": cls.__module__,
                "__qualname__": cls.__qualname__,
                "__doc__": cls.__doc__,
            }
            derived = type(
                cls.__name__, (cls, base), {**namespace, "__reduce_ex__": _reduce, "_derived_from": cls}
            )
            _derived[cls] = derived
        return _derived[cls]


def _reduce(self: Any, protocol: int) -> tuple[Any, ...]:
    state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
    return _restore, (self._derived_from,), state


def _restore(cls: type[nn.Module]) -> nn.Module:
    derived = with_our_forward(cls)
    return derived.__new__(derived)
