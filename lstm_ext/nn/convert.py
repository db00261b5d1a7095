"""Conversion of all the layers of a model between ``torch.nn`` and this package."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, TypeVar, overload

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..native import integrations
from ..options import OPTIONS
from .cell import LSTMCell
from .gru import GRU, GRUCell
from .lstm import LSTM
from .recurrent import RecurrentLayer
from .registered import COMPILED, looks_like, stand_in
from .torch_layers import (
    LAYERS,
    OURS,
    PATCHED,
    TorchGRU,
    TorchGRUCell,
    TorchLSTM,
    TorchLSTMCell,
    reaches_our_forward,
    with_our_forward,
)
from .unreached import (
    HIDDEN,
    foreign_layer,
    hidden_layers,
    is_or_was_layer,
    kind_of,
    modules_of,
    nothing_found,
    place_of,
)

_TO_OURS = {theirs: ours for theirs, (ours, _) in LAYERS.items()}
_TO_SUBCLASSES = {theirs: ours for theirs, (_, ours) in LAYERS.items()}
_TO_TORCH = {ours: theirs for theirs, ours in _TO_OURS.items()}
# Our class of each subclass that this package has of it.
_SAME = {cls: _TO_OURS[theirs] for theirs, (_, cls) in LAYERS.items()}
_SAME |= {PATCHED[theirs.__name__]: ours for theirs, ours in _TO_OURS.items()}

# Methods that torch's forward calls and ours does not call.
_NOT_CALLED = (
    "check_input",
    "check_forward_args",
    "check_hidden_size",
    "get_expected_hidden_size",
    "get_expected_cell_size",
    "permute_hidden",
    "_flat_weights",
    "_init_flat_weights",
    "_update_flat_weights",
    "_weights_have_changed",
)

# The attribute that torch.jit.script leaves in a layer: the names of the methods that it compiled.
_LEFT_BEHIND = {"__overloads__"}

_Model = TypeVar("_Model", bound=nn.Module)


@overload
def convert(
    model: nn.LSTM, *, skip: Iterable[str] = (), as_subclass: Literal[True] = True, subclasses: bool = False
) -> TorchLSTM: ...
@overload
def convert(
    model: nn.LSTMCell,
    *,
    skip: Iterable[str] = (),
    as_subclass: Literal[True] = True,
    subclasses: bool = False,
) -> TorchLSTMCell: ...
@overload
def convert(
    model: nn.GRU, *, skip: Iterable[str] = (), as_subclass: Literal[True] = True, subclasses: bool = False
) -> TorchGRU: ...
@overload
def convert(
    model: nn.GRUCell,
    *,
    skip: Iterable[str] = (),
    as_subclass: Literal[True] = True,
    subclasses: bool = False,
) -> TorchGRUCell: ...
@overload
def convert(
    model: nn.LSTM, *, skip: Iterable[str] = (), as_subclass: Literal[False], subclasses: bool = False
) -> LSTM: ...
@overload
def convert(
    model: nn.LSTMCell, *, skip: Iterable[str] = (), as_subclass: Literal[False], subclasses: bool = False
) -> LSTMCell: ...
@overload
def convert(
    model: nn.GRU, *, skip: Iterable[str] = (), as_subclass: Literal[False], subclasses: bool = False
) -> GRU: ...
@overload
def convert(
    model: nn.GRUCell, *, skip: Iterable[str] = (), as_subclass: Literal[False], subclasses: bool = False
) -> GRUCell: ...
@overload
def convert(
    model: _Model,
    *,
    skip: Iterable[str] = (),
    as_subclass: bool = True,
    subclasses: bool = False,
) -> _Model: ...
def convert(
    model: nn.Module,
    *,
    skip: Iterable[str] = (),
    as_subclass: bool = True,
    subclasses: bool = False,
) -> nn.Module:
    """Turn every LSTM, GRU and cell of ``torch.nn`` in ``model`` into one of this package, in place.

    The layers become :class:`lstm_ext.TorchLSTM`, ``TorchLSTMCell``, ``TorchGRU`` and ``TorchGRUCell``, which are
    instances of torch's classes to ``isinstance``. The modules stay the same objects; only their class changes (as in
    ``torch.nn.utils.parametrize``). So every reference to them stays valid. Everything that belongs to them is kept:
    the parameters, and an optimizer that holds them; the training flag, ``requires_grad``, device and dtype; hooks of
    every kind and their handles; attributes and buffers; names in the state_dict; modules used at several places;
    ``weight_norm``, pruning and parametrizations; ``torch.compile``, which compiles again at the next call. A layer
    that was converted before only changes to the kind that is asked for.

    A module of a class that :func:`lstm_ext.register` was told about, or of one of those that this package knows, is no
    layer to torch: another module takes its place, and where it is ``model`` itself, that one is returned.

    A model in which no such layer is found stays unchanged. A UserWarning says then which classes of modules it has and
    where layers hide. It names what comes near: layers in plain lists, dicts and attributes, other recurrent layers,
    classes that are called LSTM, and skipped subclasses that have code of their own.

    Args:
        model: any module; it may itself be a layer, and it may be compiled.
        skip: names of submodules, as ``model.named_modules()`` returns them; these stay unchanged, with everything
            that they contain.
        as_subclass: whether the layers become subclasses of torch's. False makes them :class:`lstm_ext.LSTM` and so
            on, which are no ``torch.nn.LSTM`` to ``isinstance``: initialisers and wrap policies for that class pass
            them over. ``torch.compile(fullgraph=True)`` takes these whatever a new torch changes in its
            compiler; the others it takes in all versions of torch that this package is made for.
        subclasses: whether subclasses of torch's classes that have code of their own are converted
            too. That code is kept, and its ``super().forward(...)`` calls this package's ``forward``. Subclasses that
            override nothing are always converted. Both kinds stay instances of their class and of torch's.

    Returns:
        ``model``; or the layer in its place, if it is itself a module of a registered class.

    Raises:
        TypeError: ``model`` is not a module; or it has layers that cannot be converted. The text gives the
            name, class and reason of each. The reasons are: a subclass of one of torch's classes with code of its own,
            without ``subclasses=True``; a subclass that overrides a method which this package's ``forward``
            does not call (``check_input``, ``permute_hidden`` and others); a ``forward`` (or a method that it calls)
            replaced on the instance; a layer compiled by TorchScript; a quantized layer; one that ``fully_shard`` has
            sharded. Nothing has been changed then. Change these modules first, or ``skip`` them.
        ValueError: ``skip`` has a name that the model does not have.
    """
    integrations.install()
    skip = skip if isinstance(skip, str) else list(skip)
    pairs = _TO_SUBCLASSES if as_subclass else _TO_OURS
    found, passed_over = _change_classes(model, pairs, "convert", skip, subclasses)
    stay = _skipped(model, skip, "convert") | _compiled(model)
    new = {
        module: layer
        for module in set(modules_of(model)) - stay
        if (layer := stand_in(module)[0]) is not None
    }
    for parent in modules_of(model) if new else ():
        for name, child in parent._modules.items():
            if child in new:
                parent._modules[name] = new[child]
    for layer in new.values():
        _change_classes(layer, pairs, "convert", (), subclasses)
    if model in new:
        return new[model]
    if not found and not new:
        text = nothing_found(model, passed_over)
        if text:
            warnings.warn(text, UserWarning, stacklevel=2)
    return model


@overload
def revert(model: LSTM, *, skip: Iterable[str] = ()) -> nn.LSTM: ...  # type: ignore[overload-overlap]
@overload
def revert(model: LSTMCell, *, skip: Iterable[str] = ()) -> nn.LSTMCell: ...  # type: ignore[overload-overlap]
@overload
def revert(model: GRU, *, skip: Iterable[str] = ()) -> nn.GRU: ...  # type: ignore[overload-overlap]
@overload
def revert(model: GRUCell, *, skip: Iterable[str] = ()) -> nn.GRUCell: ...  # type: ignore[overload-overlap]
@overload
def revert(model: _Model, *, skip: Iterable[str] = ()) -> _Model: ...
def revert(model: nn.Module, *, skip: Iterable[str] = ()) -> nn.Module:
    """Make every LSTM, GRU and cell of this package in ``model`` one of ``torch.nn``, in place.

    The inverse of :func:`convert`: it takes the same arguments, returns and raises the same, and keeps the same of each
    module. A layer with an option that torch's layer does not have (``zoneout``, ``layer_norm``, ...) raises a
    TypeError.
    """
    _change_classes(model, _TO_TORCH, "revert", skip)
    return model


class Entry(NamedTuple):
    """One layer of a model in the result of :func:`report`."""

    name: str
    kind: str
    ours: bool
    reason: str

    def __str__(self) -> str:
        verdict = "ours" if self.ours else "not ours"
        return (
            f"{self.name or 'the model itself'} ({self.kind}): {verdict}{self.reason and ': '}{self.reason}"
        )


_LOOKS = "its parameters have the shapes of {}: if it is one, lstm_ext.register tells convert about its class"


def report(model: nn.Module) -> list[Entry]:
    """Each LSTM, GRU and cell in ``model``: its name, its class, whether it is ours, and why not.

    ``print(*lstm_ext.report(model), sep="\\n")`` prints a line for each. A layer that :func:`convert` would convert has
    the reason "not converted". A subclass of ours that has a ``forward`` of its own is ours if its code calls
    ``super().forward``; where the code does not tell, ``reason`` says so. Layers in plain lists, dicts and attributes,
    which :func:`convert` does not see, come last. Modules whose class is registered
    (:func:`register`), and those whose own parameters have the shapes of an LSTM or a GRU, are listed too.

    Args:
        model: any module.

    Returns:
        a list of named tuples ``(name, kind, ours, reason)``, in the order of ``model.named_modules()``; ``reason`` is
        empty for ours, except where the code does not tell, for those that :func:`convert` does not see, and for layers
        that took the place of a module of a registered class, where it names the class and says whether the parameters
        are copies.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"report: expected model to be a torch.nn.Module, got {type(model).__name__}")
    entries, compiled = [], _compiled(model)
    for name, module in model.named_modules():
        kind = kind_of(module)
        if isinstance(module, OURS):
            reaches = reaches_our_forward(type(module))
            reason = {
                True: "",
                False: "its forward does not reach ours: it does not call super().forward",
                None: "it is not known whether its forward reaches ours: the code does not tell",
            }[reaches]
            reason = reason or vars(module).get("_stands_for", "")
            entries.append(Entry(name, kind, reaches is not False, reason))
        elif is_or_was_layer(module):
            refusal = _new_class(module, _TO_OURS, subclasses=False)[1]
            entries.append(Entry(name, kind, False, refusal or "not converted"))
        else:
            layer, refusal = stand_in(module)
            if refusal or layer is not None:
                reason = COMPILED if module in compiled else refusal or "not converted"
                entries.append(Entry(name, kind, False, reason))
            elif looks := looks_like(module):
                entries.append(Entry(name, kind, False, _LOOKS.format(looks)))
    entries += [
        Entry(path, kind_of(module), isinstance(module, OURS), f"{HIDDEN}: convert does not see it")
        for path, module in hidden_layers(model)
    ]
    return entries


def _new_class(
    module: Any, pairs: dict[type[nn.Module], type[nn.Module]], subclasses: bool
) -> tuple[type[nn.Module] | None, str | None]:
    """The new class of a module, or why it gets none; neither for a module that needs no change."""
    cls, to_ours = type(module), pairs is not _TO_TORCH
    if to_ours and isinstance(module, OURS):
        ours = next(ours for ours in OURS if isinstance(module, ours))
        target = pairs[_TO_TORCH[ours]]
        # Patched layers have torch's class, and keep it.
        stays = OURS if target is ours else tuple(_SAME)
        base = parametrize.type_before_parametrizations(module)
        return (_with_base(cls, ours, target) if base not in stays else None), None
    source = next((source for source in pairs if isinstance(module, source)), None)
    if source is None:
        return None, foreign_layer(module) if to_ours else None
    if any(base.__name__ == "FSDPModule" for base in cls.__mro__):
        return (
            None,
            f"FSDP (fully_shard) has sharded it; {'convert' if to_ours else 'revert'} before fully_shard",
        )
    new = _with_base(cls, source, pairs[source])
    if new is None and to_ours and cls.__module__ != parametrize.__name__:
        between = cls.__mro__[: cls.__mro__.index(source)]
        lost = [name for name in _NOT_CALLED if any(name in vars(c) for c in between)]
        if lost:
            return None, (
                f"a subclass of {_public(source)} that overrides {', '.join(lost)}, which our forward does not call; "
                "do that work in its forward, before and after super().forward"
            )
        new = with_our_forward(cls) if subclasses or _overrides_nothing(cls, source) else None
    if new is None:
        way_out = "; convert(model, subclasses=True) keeps its code over our layer" if to_ours else ""
        if cls.__module__ == parametrize.__name__:
            way_out = (
                f"; remove its parametrizations, {'convert' if to_ours else 'revert'}, and set them again"
            )
        return None, f"a subclass of {_public(source)}, whose own behaviour might be lost{way_out}"
    if isinstance(module, RecurrentLayer) and module._given:
        return None, f"it has what torch.nn.{module.mode} does not have: {', '.join(module._given)}"
    replaced = _replaced_methods(module, source)
    if replaced:
        return None, f"{', '.join(replaced)} is replaced on the instance"
    if taken := [
        name for name in OPTIONS if name in module.__dict__ and to_ours and isinstance(module, nn.RNNBase)
    ]:
        return None, f"its attribute {', '.join(taken)} is an option of our layer; rename it first"
    return new, None


def _public(cls: type[nn.Module]) -> str:
    return f"{'lstm_ext' if cls in OURS else 'torch.nn'}.{cls.__name__}"


def _overrides_nothing(cls: type[nn.Module], source: type[nn.Module]) -> bool:
    """Whether the classes between the two add nothing but names and texts."""
    between = cls.__mro__[: cls.__mro__.index(source)]
    known = {"__module__", "__qualname__", "__doc__", "__annotations__", "__dict__", "__weakref__"}
    known |= {"__firstlineno__", "__static_attributes__", "__parameters__", "__orig_bases__"}
    return all(issubclass(c, source) and vars(c).keys() <= known for c in between)


def _change_classes(
    model: nn.Module,
    pairs: dict[type[nn.Module], type[nn.Module]],
    function: str,
    skip: Iterable[str],
    subclasses: bool = False,
) -> tuple[bool, list[str]]:
    """Whether the model has a layer that could be changed, and, with reasons, those that are skipped and could not."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: expected model to be a torch.nn.Module, got {type(model).__name__}")
    skipped = _skipped(model, skip, function)
    changes: list[tuple[nn.Module, type[nn.Module]]] = []
    refused, passed_over = [], []
    found = False
    for name, module in model.named_modules():
        if not is_or_was_layer(module):
            continue
        cls, reason = _new_class(module, pairs, subclasses)
        place = place_of(name)
        if module in skipped and reason is not None:
            passed_over.append(f"{place} ({kind_of(module)}) is skipped: {reason}")
            continue
        found = True
        if module in skipped:
            continue
        if cls is not None:
            changes.append((module, cls))
        if reason is not None:
            refused.append(f"  {place} ({kind_of(module)}): {reason}")
    if refused:
        raise TypeError(
            f"{function}: nothing was changed, because the following cannot be converted "
            "(skip=[names] leaves them as they are):\n" + "\n".join(refused)
        )

    for module, cls in changes:
        for key in _LEFT_BEHIND:
            module.__dict__.pop(key, None)
        if issubclass(cls, RecurrentLayer):
            module.__dict__["_layer_names"] = cls._group_names(module)  # type: ignore[arg-type]
        else:
            module.__dict__.pop("_layer_names", None)
        module.__class__ = cls
        if isinstance(module, nn.RNNBase):
            # This is done after construction too. It computes parametrized weights, which needs no graph.
            with torch.no_grad():
                module._init_flat_weights()
    return found, passed_over


def _compiled(model: nn.Module) -> set[nn.Module]:
    """The modules that torch.compile has wrapped. The wrapper goes on calling them if another takes their place."""
    return {
        module.get_submodule("_orig_mod")
        for module in modules_of(model)
        if type(module).__name__ == "OptimizedModule"
    }


def _skipped(model: nn.Module, skip: Iterable[str], function: str) -> set[nn.Module]:
    if isinstance(skip, str):
        raise TypeError(f"{function}: expected skip to be a sequence of names, got the string {skip!r}")
    known = dict(model.named_modules(remove_duplicate=False))
    skipped: set[nn.Module] = set()
    for name in skip:
        if name not in known:
            raise ValueError(f"{function}: skip: the model has no submodule named {name!r}")
        skipped.update(modules_of(known[name]))
    return skipped


def _with_base(
    cls: type[nn.Module], source: type[nn.Module], target: type[nn.Module]
) -> type[nn.Module] | None:
    """``cls`` with ``target`` in place of ``source``; None for subclasses, except those that parametrize made.

    parametrize gives a module a class of its own, which holds one property for each parametrized tensor.
    """
    if cls is source or _SAME.get(cls) is source:
        return target
    if "_derived_from" in vars(cls) and target in _TO_OURS:
        return vars(cls)["_derived_from"]
    if cls.__module__ == parametrize.__name__:
        base = _with_base(cls.__bases__[0], source, target)
        return base and type(cls.__name__, (base,), dict(vars(cls)))
    return None


def _replaced_methods(module: nn.Module, source: type[nn.Module]) -> list[str]:
    """Methods of these layers, not of modules in general, that an attribute of the instance hides."""
    own = source.__mro__[: source.__mro__.index(nn.Module)]
    methods = {key for cls in own for key, value in vars(cls).items() if callable(value)}
    # Users replace this method to disable it. It computes nothing.
    methods.discard("flatten_parameters")
    return [key for key in list(module.__dict__) if key in methods]  # another thread may convert it too
