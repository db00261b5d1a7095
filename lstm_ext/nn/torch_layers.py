"""Our layers as subclasses of torch's, and ``patch``, which replaces torch's layers by ours."""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Iterable
from types import CellType, CodeType, FunctionType, TracebackType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from ..native.integrations import let_dynamo_take
from .cell import LSTMCell
from .gru import GRU, GRUCell
from .lstm import LSTM
from .recurrent import RecurrentLayer, runs_without_kernels

if TYPE_CHECKING:
    from typing_extensions import Self


class TorchLSTM(LSTM, nn.LSTM):
    """:class:`lstm_ext.LSTM` that is a :class:`torch.nn.LSTM` to ``isinstance``; the same arguments, results and speed.

    :func:`lstm_ext.convert` makes it. Code that looks for ``torch.nn.LSTM`` finds it: initialisers, wrap policies,
    validators, exporters. Its ``__name__`` is ``LSTM``. Example::

        model = torch.nn.Sequential(torch.nn.LSTM(10, 20))
        lstm_ext.convert(model)
        assert isinstance(model[0], lstm_ext.TorchLSTM) and isinstance(model[0], torch.nn.LSTM)

    ``torch.compile`` takes it into the graph, with ``fullgraph=True`` too, where it breaks the graph at torch's own.
    Where it cannot, because a torch has another dynamo than those that this package knows, a UserWarning says so, and
    :class:`lstm_ext.LSTM` compiles without a break.
    """


class TorchLSTMCell(LSTMCell, nn.LSTMCell):
    """:class:`lstm_ext.LSTMCell` that is a :class:`torch.nn.LSTMCell` to ``isinstance``, and bears its ``__name__``.

    Example::

        cell = lstm_ext.convert(torch.nn.LSTMCell(10, 20))
        assert isinstance(cell, lstm_ext.TorchLSTMCell) and isinstance(cell, torch.nn.LSTMCell)
    """


class TorchGRU(GRU, nn.GRU):
    """:class:`lstm_ext.GRU` that is a :class:`torch.nn.GRU` to ``isinstance``; as :class:`TorchLSTM` is of the LSTM.

    Example::

        gru = lstm_ext.convert(torch.nn.GRU(10, 20))
        assert isinstance(gru, lstm_ext.TorchGRU) and isinstance(gru, torch.nn.GRU)
    """


class TorchGRUCell(GRUCell, nn.GRUCell):
    """:class:`lstm_ext.GRUCell` that is a :class:`torch.nn.GRUCell` to ``isinstance``, and bears its ``__name__``.

    Example::

        cell = lstm_ext.convert(torch.nn.GRUCell(10, 20))
        assert isinstance(cell, lstm_ext.TorchGRUCell) and isinstance(cell, torch.nn.GRUCell)
    """


# The layers of torch, bound when this package is imported; ours; and those that are both.
LAYERS: dict[type[nn.Module], tuple[type[nn.Module], type[nn.Module]]] = {
    nn.LSTM: (LSTM, TorchLSTM),
    nn.LSTMCell: (LSTMCell, TorchLSTMCell),
    nn.GRU: (GRU, TorchGRU),
    nn.GRUCell: (GRUCell, TorchGRUCell),
}
OURS = tuple(ours for ours, _ in LAYERS.values())


class _StandsForTorch(type):
    """The metaclass of classes that replace torch's: instances of torch's class, or of ours, are theirs too."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return super().__instancecheck__(instance) or isinstance(instance, cls._also())

    def __subclasscheck__(cls, subclass: type) -> bool:
        return super().__subclasscheck__(subclass) or issubclass(subclass, cls._also())

    def _also(cls) -> tuple[type, ...]:
        # Not for subclasses that users derive: only their own instances count.
        return vars(cls).get("_stands_for", ())


class PatchedLSTM(TorchLSTM, metaclass=_StandsForTorch):
    """The class that replaces ``torch.nn.LSTM`` while a patch holds."""

    _stands_for = (nn.LSTM, LSTM)

    @functools.wraps(LSTM.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _count()


class PatchedLSTMCell(TorchLSTMCell, metaclass=_StandsForTorch):
    """The class that replaces ``torch.nn.LSTMCell`` while a patch holds."""

    _stands_for = (nn.LSTMCell, LSTMCell)

    @functools.wraps(LSTMCell.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _count()


class PatchedGRU(TorchGRU, metaclass=_StandsForTorch):
    """The class that replaces ``torch.nn.GRU`` while a patch holds."""

    _stands_for = (nn.GRU, GRU)

    @functools.wraps(GRU.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _count()


class PatchedGRUCell(TorchGRUCell, metaclass=_StandsForTorch):
    """The class that replaces ``torch.nn.GRUCell`` while a patch holds."""

    _stands_for = (nn.GRUCell, GRUCell)

    @functools.wraps(GRUCell.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _count()


def _count() -> None:
    with lock:
        for active in patch._active:
            active.made += 1


# Those that replace torch's classes, by the names of these.
PATCHED = {"LSTM": PatchedLSTM, "LSTMCell": PatchedLSTMCell, "GRU": PatchedGRU, "GRUCell": PatchedGRUCell}
# Tools and summaries of models show torch's name. pickle uses __qualname__, which stays.
for _theirs, (_, _ours) in LAYERS.items():
    _ours.__name__ = PATCHED[_theirs.__name__].__name__ = _theirs.__name__


_PLACES = (torch.nn, torch.nn.modules, torch.nn.modules.rnn)

lock = threading.RLock()


class Replacement:
    """Attributes of other packages that others stand for while an instance is active, in the whole process."""

    # Those of the subclass.
    _active: ClassVar[list[Any]]
    _before: ClassVar[dict[tuple[Any, str], tuple[Any, Any]]]  # what was there, and what took its place

    def __init_subclass__(cls) -> None:
        cls._active, cls._before = [], {}

    def _replaced(self) -> Iterable[tuple[Any, str, Any]]:
        """Where, by which name, and by what."""
        raise NotImplementedError

    def start(self) -> Self:
        """Let it hold until :meth:`stop`, and return it; a second time changes nothing."""
        with lock:
            if self in self._active:
                return self
            if not self._active:
                found = {(place, name): (getattr(place, name), new) for place, name, new in self._replaced()}
                for (place, name), (_, new) in found.items():
                    setattr(place, name, new)
                self._before.update(found)
            self._active.append(self)
        return self

    def stop(self) -> None:
        """End it; a second time does nothing."""
        with lock:
            if self not in self._active:
                return
            if len(self._active) == 1:
                for (place, name), (_, new) in self._before.items():
                    now = getattr(place, name)
                    if now is not new:
                        raise RuntimeError(
                            f"{type(self).__name__}: {place.__name__}.{name} has become {now.__module__}."
                            f"{now.__qualname__} since; undo that first"
                        )
                for (place, name), (old, _) in self._before.items():
                    setattr(place, name, old)
                self._before.clear()
            self._active.remove(self)

    def __enter__(self) -> Self:
        return self.start()


class patch(Replacement):
    """Put this package's LSTM, GRU and their cells in the place of those of ``torch.nn``.

    For layers that a library builds out of reach::

        with lstm_ext.patch():
            model = library.build()         # builds torch.nn.LSTM by that name

        handle = lstm_ext.patch().start()   # until handle.stop()

    A patch holds for the whole process and all its threads. It reaches code that looks the name up in ``torch.nn``. A
    module that has done ``from torch.nn import LSTM`` before keeps torch's class, and one that does so while the patch
    holds keeps ours for good. The layers stay ours when the patch is stopped; :func:`lstm_ext.revert` makes them
    torch's. While a patch holds, ``isinstance(layer, torch.nn.LSTM)`` is True for torch's layers and for all of ours.

    Patches may be nested, and stopped in any order. torch's classes come back when all are stopped.

    The layers are :class:`lstm_ext.TorchLSTM`, :class:`lstm_ext.TorchGRU` and so on.

    Attributes:
        made: how many layers and cells were constructed while this patch held, in any thread. 0 says that the library
            took torch's class before, or builds later: convert its model. A ``with`` block gives a UserWarning then.

    Raises:
        RuntimeError: on stopping, other code has put another class in that place in the meantime. Then nothing is
            changed.
    """

    made: int

    def __init__(self) -> None:
        self.made = 0

    def _replaced(self) -> Iterable[tuple[Any, str, Any]]:
        return [(place, name, cls) for place in _PLACES for name, cls in PATCHED.items()]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        if error is None and not self.made:
            warnings.warn(
                "patch: no LSTM, GRU or cell of torch.nn was constructed in this block: the code has taken torch's "
                "class before, or builds its layers later. lstm_ext.convert(model) converts a model that is there, and "
                "lstm_ext.report(model) says which layers are ours",
                UserWarning,
                stacklevel=2,
            )


_derived: dict[type[nn.Module], type[nn.Module]] = {}


def with_our_forward(cls: type[nn.Module]) -> type[nn.Module]:
    """A subclass of ``cls``, itself derived from torch's layer, in which ``super().forward`` finds ours.

    Instances are pickled by the name of ``cls``.
    """
    with lock:
        if cls not in _derived:
            base = next(ours for theirs, (_, ours) in LAYERS.items() if issubclass(cls, theirs))
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


def reaches_our_forward(cls: type[nn.Module]) -> bool | None:
    """Whether the ``forward`` of a class derived from ours calls ours; None if its code does not tell."""
    for base in cls.__mro__:
        if base in OURS:
            return True
        if "forward" in vars(base):
            calls = _calls_super_forward(vars(base)["forward"], cls)
            if not calls:
                return calls
    return False


def _calls_super_forward(forward: Any, cls: type) -> bool | None:
    """Looks at the names in the code of ``forward`` and of the functions that it calls."""
    own = [base for base in cls.__mro__ if not any([issubclass(ours, base) for ours in OURS])]
    verdict: bool | None = False
    seen, left = set(), [forward]
    while left:
        function = left.pop()
        function = getattr(function, "fget", getattr(function, "__func__", function))
        if function in seen:
            continue
        seen.add(function)
        if not isinstance(function, FunctionType) or function.__module__ != forward.__module__:
            verdict = None
            continue
        names = _names_in(function.__code__)
        if {"super", "forward"} <= names:
            return True
        if names & {"super", "forward", "getattr", "eval", "exec", "__mro__"}:
            verdict = None
        found = [vars(base)[name] for name in names for base in own if name in vars(base)]
        found += [function.__globals__.get(name) for name in names]
        found += [cell.cell_contents for cell in function.__closure__ or () if cell != CellType()]
        kinds = FunctionType, property, staticmethod, classmethod
        left += [f for f in found if isinstance(f, kinds) and not _is_of_torch(f)]
    return verdict


def _is_of_torch(function: Any) -> bool:
    return str(getattr(function, "__module__", "")).startswith("torch.")


def _names_in(code: CodeType) -> set[str]:
    inner = [_names_in(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*inner)


def _compiles_whole(module: nn.Module) -> bool:
    return isinstance(module, RecurrentLayer) and reaches_our_forward(type(module)) is True


def _runs_without_kernels(module: nn.Module) -> bool:
    return isinstance(module, RecurrentLayer) and runs_without_kernels(module)


let_dynamo_take(_compiles_whole, _runs_without_kernels)
