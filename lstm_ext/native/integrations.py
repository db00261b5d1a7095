"""Every hook of this package into torch and other packages, but for `patch` and `patch_keras`, which a user starts.

Importing lstm_ext installs none: the first layer of this package that is made, converted, frozen or loaded calls
`install`. LSTM_EXT_INTEGRATIONS=0 installs none at all. Each hook says what it was tried with.

Nothing here imports a tool, which would take seconds, or turn the GIL on: a hook waits for other code to import it.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import CodeType, FrameType, ModuleType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from . import config

_Function = TypeVar("_Function", bound=Callable[..., Any])
_PACKAGE = Path(__file__).parents[1]
_installing, _lock = threading.RLock(), threading.RLock()


def constant_for_dynamo(function: _Function) -> _Function:
    """Dynamo calls the function where it would trace it, and takes the result for a constant.

    ``torch.compiler.assume_constant_result`` does the same, and imports dynamo, which would take most of the time of
    importing this package.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


class Hook(NamedTuple):
    """A function that gets a module as soon as it is imported."""

    module: str
    function: Callable[[Any], None]
    tried: str  # with these versions


_hooks: dict[str, Hook] = {}
_asked = _active = False


def add(key: str, module: str, function: Callable[[Any], None], tried: str) -> None:
    """A hook for `install`. A later one with the same key takes the place of the earlier one."""
    _hooks[key] = Hook(module, function, tried)
    if _active:
        _when_imported(key, _hooks[key])


@constant_for_dynamo
def install() -> None:
    """Let each hook wait for its module, once in a process."""
    global _asked, _active
    if _asked:
        return
    # A hook may wait for another thread's import, whose end waits for `_lock`: so that one is not held here.
    with _installing:
        if not (_asked or _active) and config.chosen("LSTM_EXT_INTEGRATIONS", "1") == "1":
            _active = True
            for key, hook in list(_hooks.items()):
                _when_imported(key, hook)
        _asked = True


def _when_imported(key: str, hook: Hook) -> None:
    finder = _Finder(hook.module, key, hook.function)
    # Otherwise an old finder, of this package imported again, and this one would call each other.
    sys.meta_path[:] = [f for f in sys.meta_path if getattr(f, "_lstm_ext_key", None) != key]
    sys.meta_path.insert(0, finder)
    if hook.module in sys.modules:
        # This waits if another thread is importing it.
        finder.found(importlib.import_module(hook.module))


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


# ---- torch.compile: layers that are torch.nn.LSTM to isinstance
#
# Dynamo refuses every torch.nn.LSTM in one method, unless its setting allow_rnn is on. The hook wraps this method: the
# setting is on while the method handles one of our layers, and has the user's value while it handles one of torch's.
#
# A layer without kernels is refused like torch's, unless the graph has to be whole: for small calls, a graph with
# torch's operator is slower than the layer alone, and the equations of a layer with options would be unrolled, each T
# anew.

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


def let_dynamo_take(is_ours: _Question, breaks: _Question) -> None:
    """Let dynamo accept the modules for which ``is_ours`` is True.

    If the graph need not be whole, it breaks at those for which ``breaks`` is True.

    If this torch's dynamo has no such method or setting, a UserWarning says so when dynamo is imported.
    """
    add(
        "dynamo",
        "torch._dynamo.variables.builder",
        lambda builder: _wrap(builder, is_ours, breaks),
        "torch 2.11 to 2.15",
    )


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
        if broken:
            _skip_inner_frames()
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

    After a break it would otherwise begin in each function that is called, and make graphs of single operators. It
    forgets this of a function when it is reset.
    """
    skip = getattr(sys.modules.get("torch._dynamo.eval_frame"), "skip_code", None)
    for code in _inner_codes() if skip else ():
        skip(code)


@functools.cache
def _inner_codes() -> tuple[CodeType, ...]:
    codes: list[CodeType] = []
    for name, module in list(sys.modules.items()):
        if not name.startswith(_INNER):
            continue
        found = list(vars(module).values())
        found += [v for cls in found if isinstance(cls, type) for v in vars(cls).values()]
        for function in found:
            code = getattr(inspect.unwrap(getattr(function, "__func__", function)), "__code__", None)
            if code is not None and Path(code.co_filename).is_relative_to(_PACKAGE):
                codes += _with_inner(code)
    return tuple(codes)


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


# ---- tools that look a layer up by its exact class, in tables that have torch's layers and not ours
#
# A layer adds itself to the tables of the loaded tools when somebody iterates over the modules of its model, which all
# of these tools do before they look. tests/compat tries the newest releases of thop, ptflops, deepspeed, calflops and
# opacus.

# Tables of tools that count the operations of a layer after each forward pass, by class.
_COUNTERS = (
    ("thop.profile", "register_hooks"),
    ("ptflops.pytorch_ops", "MODULES_MAPPING"),
    ("deepspeed.profiling.flops_profiler.profiler", "MODULE_HOOK_MAPPING"),
    ("calflops.pytorch_ops", "MODULE_HOOK_MAPPING"),
)


def introduce(ours: type[nn.Module], known: type[nn.Module]) -> None:
    """Add ``ours`` beside ``known`` to the tables of the loaded tools, unless it is there."""
    if not _active or not ours.__module__.startswith("lstm_ext."):
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


# ---- quantization, which leaves our layers as they are
#
# torch.ao.quantization sets an attribute in every module before it begins, and modelopt calls one function with the
# model. Which model and which line of the user it is, the frames in between say. Tried with torch 2.11 to 2.15.

# The packages of frames between the user's line and our layer; torch's functions are wrapped as deprecated.
_IN_BETWEEN = ("torch", "modelopt", "typing_extensions", "warnings", "_py_warnings")

_warned: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def warn_about_quantization(layer: nn.Module) -> None:
    if not _active:
        return
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
    layers = [name for name, m in model.named_modules() if hasattr(m, "_stands_in_for")]
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


add(
    "modelopt",
    "modelopt.torch.quantization.conversion",
    _warn_before_modelopt,
    "no release: a package with its names",
)


# ---- what torch tells nobody but its own frames. Tried with torch 2.11 to 2.15.


def is_compiled_by_jit() -> bool:
    """Whether ``torch.jit``, which calls this, compiles the module. Before a trace it reads the same attribute."""
    frame = sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__") == "torch.jit._recursive":
        if frame.f_code.co_name == "create_script_module":
            return not frame.f_locals["is_tracing"]
        frame = frame.f_back  # type: ignore[assignment]
    return False


@constant_for_dynamo
def onnx_has_our_operator() -> bool:
    """Whether the running export to ONNX was given a translation of our operator.

    torch has no query for the translations of an export, so this looks for the call of ``torch.onnx.export``. This
    keeps no state that could be left behind, and finds a table that callers of torch's function pass themselves.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "export" and frame.f_globals.get("__name__") == "torch.onnx":
            table = frame.f_locals.get("custom_translation_table") or {}
            return any([str(operator).startswith("lstm_ext.lstm_layer") for operator in table])
        frame = frame.f_back
    return False
