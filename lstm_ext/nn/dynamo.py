"""Lets ``torch.compile`` accept our layers that are ``torch.nn.LSTM`` to ``isinstance``.

Dynamo refuses every ``torch.nn.LSTM`` in one method, unless its setting ``allow_rnn`` is on. We wrap this method: the
setting is on while it handles one of our layers, and has the user's value while it handles one of torch's.

A layer without kernels is refused like torch's, unless the graph has to be whole: for small calls, a graph with torch's
operator is slower than the layer alone, and the equations of a layer with options would be unrolled, each T anew.

Importing dynamo takes seconds, so the method is wrapped when other code imports it.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch import nn

from ..native.imports import when_imported

_BUILDER = "torch._dynamo.variables.builder"
_PACKAGE = Path(__file__).parents[1]
_INNER = ("lstm_ext.call.", "lstm_ext.layer.", "lstm_ext.native.")
_Question = Callable[[nn.Module], bool]
# Bound now, because users may replace them by our classes.
_TORCH_LSTM = nn.LSTM
_REFUSED = (nn.RNN, nn.GRU, _TORCH_LSTM)
_UNFIT = (
    "lstm_ext: torch.compile breaks the graph at layers that are torch.nn.LSTM to isinstance, as at torch's own: the "
    "dynamo of torch {} is not one that lstm_ext knows how to ask. lstm_ext.convert(model, as_subclass=False) makes "
    "layers that compile whole"
)

# Some versions of torch share one value of the setting among all threads.
_lock = threading.RLock()


def let_dynamo_take(is_ours: _Question, breaks: _Question) -> None:
    """Let dynamo accept the modules for which ``is_ours`` is True, now or once it is imported.

    If the graph need not be whole, it breaks at those for which ``breaks`` is True.

    If this torch's dynamo has no such method or setting, a UserWarning says so when dynamo is imported.
    """
    when_imported(_BUILDER, "dynamo", lambda builder: _wrap(builder, is_ours, breaks))


def _wrap(builder: Any, is_ours: _Question, breaks: _Question) -> None:
    cls: Any = getattr(builder, "VariableBuilder", None)
    config: Any = getattr(builder, "config", None)
    method: Any = getattr(cls, "wrap_module", None)
    if not (
        inspect.isfunction(method)
        and list(inspect.signature(method).parameters) == ["self", "value"]
        and "allow_rnn" in inspect.unwrap(method).__code__.co_names
        and hasattr(config, "allow_rnn")
    ):
        warnings.warn(_UNFIT.format(torch.__version__), UserWarning, stacklevel=2)
        return
    _skip_inner_frames()
    users: list[bool] = []  # the user's value, during a call

    @functools.wraps(method)
    def wrap_module(self: Any, value: nn.Module) -> Any:
        refused, broken = isinstance(value, _REFUSED), breaks(value) and not _is_whole(self)
        if not refused and not broken:
            return method(self, value)
        with _lock:
            before = config.allow_rnn
            users.append(users[-1] if users else before)
            wanted = users[-1] or (is_ours(value) and not broken)
            try:
                if wanted != before:
                    config.allow_rnn = wanted
                if not refused and not wanted:
                    # Dynamo breaks the graph at torch's LSTM, with a message of its own. Our layer is to break it too.
                    value = _TORCH_LSTM(1, 1, device="meta")
                return method(self, value)
            finally:
                users.pop()
                if wanted != before:
                    config.allow_rnn = before

    cls.wrap_module = wrap_module


def _skip_inner_frames() -> None:
    """Lets dynamo trace the functions below the modules from a module's forward only, and not begin there.

    After a break it would otherwise begin in each function that is called, and make graphs of single operators.
    """
    skip = getattr(sys.modules.get("torch._dynamo.eval_frame"), "skip_code", None)
    if skip is None:
        return
    for name, module in list(sys.modules.items()):
        if not name.startswith(_INNER):
            continue
        found = list(vars(module).values())
        found += [v for cls in found if isinstance(cls, type) for v in vars(cls).values()]
        for function in found:
            code = getattr(inspect.unwrap(getattr(function, "__func__", function)), "__code__", None)
            if code is not None and Path(code.co_filename).is_relative_to(_PACKAGE):
                for part in _with_inner(code):
                    skip(part)


def _with_inner(code: CodeType) -> Iterator[CodeType]:
    """The code of a function, and of the functions within it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _with_inner(constant)


def _is_whole(builder: Any) -> bool:
    """Whether a break in the graph would be an error: ``fullgraph=True``, or an export."""
    translator = getattr(builder, "tx", None)
    output = getattr(translator, "output", None)
    whole = [getattr(t, "one_graph", True) for t in (translator, getattr(output, "root_tx", translator))]
    errors = getattr(translator, "error_on_graph_break", False)
    return any(whole) or bool(errors) or bool(getattr(output, "export", False))
