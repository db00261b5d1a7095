"""Layers for inference, whose weights are packed for the kernels once."""

from __future__ import annotations

import contextlib
import copy
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..layer.layer_call import LayerOptions
from ..native import integrations, loader
from . import native
from .cell import LSTMCell
from .convert import _LEFT_BEHIND, _overrides_nothing, _replaced_methods
from .gru import GRU, GRUCell
from .lstm import LSTM
from .recurrent import RecurrentLayer
from .torch_layers import TorchGRU, TorchLSTM, with_our_forward
from .unreached import kind_of, modules_of, place_of, where_it_looked

# Bound now, because patch() replaces them by our classes.
_TORCH_LSTM, _TORCH_GRU = nn.LSTM, nn.GRU
_CELLS = (nn.LSTMCell, LSTMCell, nn.GRUCell, GRUCell)

_KINDS: dict[torch.dtype | None, str] = {None: "own", torch.bfloat16: "bfloat16", torch.int8: "int8"}

_NO_TORCHSCRIPT = (
    "torch.jit and the older ONNX exporter do not know frozen layers: use torch.export or lstm_ext.unfreeze"
)

# An attribute of the modules of a frozen model: the names of their own parameters that required gradients. Parts of the
# model, its copies and its pickles have it too.
_REQUIRED = "_lstm_ext_required_grad"

# Attributes that are derived from the packed weights and belong to this processor.
_MADE_OF_PACKED = ("_frozen_options", "_native_options", "_frozen_stamp")

# The extension's function, bound by the first frozen layer: a look-up takes as long as the function.
_weights_stamp: Callable[[Sequence[Sequence[Tensor]]], int]

_Model = TypeVar("_Model", bound=nn.Module)


class FrozenLayer(RecurrentLayer):
    """The base of :class:`FrozenLSTM` and :class:`FrozenGRU`."""

    frozen_weights: torch.dtype | None = None
    _unfrozen: type[nn.Module]  # the class that unfreeze restores

    def __init__(self, *_: Any, **__: Any) -> None:
        raise TypeError(f"{type(self).__name__}: lstm_ext.freeze makes such a layer, of another one")

    @property
    def _frozen(self) -> Sequence[LayerOptions]:  # type: ignore[override]
        if torch.compiler.is_compiling():  # the compiler needs the buffers themselves
            buffers: Any = self._buffers
            return [
                LayerOptions(frozen=[buffers[name] for name in names], gru=self.gru)
                for names in self._frozen_names
            ]
        return self._frozen_options

    def save_native(self, path: str | os.PathLike[str]) -> None:
        """Write a weights file for the C library, which computes this layer without Python and torch.

        The file holds the parameters as they are now, rounded as :func:`freeze` rounded them, and the options. It
        serves each instruction set and processor. A layer in 16 bits is the float32 calculation that it makes.
        ``batch_first`` and hooks are not in it: data of the C library are (T, B, features).

        Args:
            path: the file, which is replaced if it is there, as a whole: an error leaves the old one.

        Raises:
            ValueError: the layer has an option that the file has no place for; the text names it.
            RuntimeError: a weight is another tensor than the one that was packed.
            OSError: the file cannot be written.
        """
        native.save(self, path)

    _frozen_stamp: int | None  # it is None while the weights are changed

    def _pack(self) -> None:
        kernels = _kernels()
        kind = _KINDS[self.frozen_weights]
        self._frozen_names = _packed_names(self)
        all_packed = []
        for names in self._layer_names:
            weights = [getattr(self, name) for name in names]
            if kind == "int8":
                _refuse_what_int8_has_not(names, weights, "")
            all_packed.append(kernels.freeze_weights(weights, self.bias, self.bidirectional, kind, self.gru))
        # Nothing fails from here on, so an error above leaves the old state.
        for buffers, packed in zip(self._frozen_names, all_packed, strict=True):
            for name, tensor in zip(buffers, packed, strict=True):
                self.register_buffer(name, tensor, persistent=False)
        self._frozen_from, self._frozen_parameters = super()._weights_by_layer(), dict(self._parameters)
        self._use_packed()

    def _use_packed(self) -> None:
        global _weights_stamp
        kernels = _kernels()
        _weights_stamp = kernels.weights_stamp
        self._frozen_options = [
            LayerOptions(frozen=[self._buffers[name] for name in names], gru=self.gru)  # type: ignore[misc]
            for names in self._frozen_names
        ]
        for options in self._frozen_options:
            options.native = kernels.LayerOptions(frozen=options.frozen, gru=self.gru)
        self._native_options = [options.native for options in self._frozen_options]
        self._frozen_stamp = _weights_stamp(self._frozen_from)

    def _weights_by_layer(self) -> list[list[Tensor]]:
        if torch.compiler.is_compiling():
            weights = super()._weights_by_layer()
            # An export replaces the parameters by tensors of its own.
            if torch.compiler.is_dynamo_compiling():
                self._refuse_others(weights)
            return weights
        # This is the fastest comparison: dicts compare by identity first. For two different tensors, == gives a tensor
        # of several elements, which is neither true nor false.
        try:
            same = self._parameters == self._frozen_parameters
        except Exception:
            same = False
        stamp = self._frozen_stamp
        if not same:
            self._refuse_others(super()._weights_by_layer())
        elif (
            stamp is not None
            and _weights_stamp(self._frozen_from) != stamp
            and stamp is self._frozen_stamp  # no other thread has begun to change the weights
        ):
            raise RuntimeError(
                f"Frozen{self.mode}: a weight was changed in place after it was packed: load_state_dict packs new "
                "numbers, and lstm_ext.unfreeze gives a layer that reads its weights in each call"
            )
        return self._frozen_from

    def _refuse_others(self, weights: Sequence[Sequence[Tensor]]) -> None:
        for names, present, packed in zip(self._layer_names, weights, self._frozen_from, strict=True):
            for name, now, before in zip(names, present, packed, strict=True):
                if now is not before:
                    raise RuntimeError(
                        f"Frozen{self.mode}: {name} is another tensor than the one that was packed: load_state_dict "
                        "packs new numbers, and lstm_ext.unfreeze gives a layer that reads its weights in each call "
                        "(torch.func.functional_call and parametrizations need that)"
                    )

    def _refuse_random_step(self, name: str) -> None:  # type: ignore[override]
        """Nothing is random, even in training mode."""

    def _traced(self, *_: Any) -> NoReturn:
        raise RuntimeError(_NO_TORCHSCRIPT)

    def __prepare_scriptable__(self) -> NoReturn:
        raise RuntimeError(_NO_TORCHSCRIPT)

    def extra_repr(self) -> str:
        kind = "" if self.frozen_weights is None else f", frozen_weights={self.frozen_weights}"
        return super().extra_repr() + kind

    def reset_parameters(self) -> None:
        with self._being_changed():
            super().reset_parameters()
            self._pack()

    def _apply(self, fn: Any, recurse: bool = True) -> FrozenLayer:
        weight: Any = self.weight_ih_l0
        moved = fn(weight[:0])  # before anything is changed
        _check_place("", moved.device, moved.dtype, self.frozen_weights)
        with self._being_changed():
            super()._apply(fn, recurse)
            self._pack()
        return self

    @contextlib.contextmanager
    def _being_changed(self) -> Iterator[None]:
        """Other threads may call the layer meanwhile: they compute with the old numbers or with the new ones."""
        stamp, self._frozen_stamp = self._frozen_stamp, None
        try:
            yield
        except BaseException:
            self._frozen_stamp = stamp
            raise

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if self.frozen_weights == torch.int8:
            given = {n: state_dict.get(prefix + n) for names in self._layer_names for n in names}
            given = {n: weight for n, weight in given.items() if isinstance(weight, Tensor)}
            _refuse_what_int8_has_not(list(given), list(given.values()), prefix)
        with self._being_changed():
            super()._load_from_state_dict(state_dict, prefix, *args)
            self._pack()

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenLayer:
        # The packed bytes are copied, not made again: the copy computes the same as this layer.
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        left_out = (*_MADE_OF_PACKED, "_flat_weights", "_flat_weight_refs", "_compiled_call_impl")
        state = {name: value for name, value in self.__dict__.items() if name not in left_out}
        new.__dict__.update(copy.deepcopy(state, memo))
        new._init_flat_weights()
        new._use_packed()
        if _weights_stamp(self._frozen_from) != self._frozen_stamp:
            new._frozen_stamp = -1  # the weights of the copy do not fit either
        return new

    def __getstate__(self) -> dict[str, Any]:
        # Packed weights belong to this processor.
        state = super().__getstate__()
        for name in (*_MADE_OF_PACKED, "_frozen_from", "_frozen_parameters", "_unfrozen"):
            state.pop(name, None)
        names = {name for layer in self._frozen_names for name in layer}
        state["_buffers"] = {k: v for k, v in state["_buffers"].items() if k not in names}
        return state

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        named, converted = _by_name(self._unfrozen)
        return _restored, (named, converted), self.__getstate__()

    def __setstate__(self, d: dict[str, Any]) -> None:
        super().__setstate__(d)
        self._pack()


class FrozenLSTM(FrozenLayer, LSTM):
    """The frozen form of an :class:`lstm_ext.LSTM`, from :func:`freeze`: for inference, with packed weights.

    Weights that are changed later are noticed and refused, with two exceptions: ``weight.data.copy_(...)`` and other
    writes through ``.data`` or another library, which torch counts nowhere, and programs of ``torch.compile`` and
    ``torch.export``. After such a change load the weights (``load_state_dict``) or freeze the model anew.

    Example::

        lstm = lstm_ext.LSTM(10, 20)
        frozen = lstm_ext.freeze(lstm)
        with torch.no_grad():
            y, (h, c) = frozen.step(torch.randn(1, 10))      # (1, 20), and (1, 1, 20) each
        lstm = lstm_ext.unfreeze(frozen)

    It has the interface of :class:`lstm_ext.LSTM`, and its state dict. The weights are packed when the layer is frozen,
    loaded (``load_state_dict``, pickle) or moved to another dtype. They are buffers that no state dict holds.

    A call raises a RuntimeError if a weight is another tensor than the packed one (after an assignment, a
    parametrization, ``torch.func.functional_call``), or has been changed in place since (an optimizer, ``copy_`` of a
    moving average, ``weight.data = ...``).

    It has no gradients: a call raises a RuntimeError if its input, a state or a parameter requires them, unless
    gradients are off. ``train()`` sets the flag ``training``, as on any module, and changes no result: nothing is
    dropped at random, and zoneout mixes the states. ``recompute`` has no meaning without gradients.
    """

    _unfrozen = LSTM


class FrozenGRU(FrozenLayer, GRU):
    """The frozen form of an :class:`lstm_ext.GRU`, from :func:`freeze`: what :class:`FrozenLSTM` is of an LSTM.

    Example::

        frozen = lstm_ext.freeze(lstm_ext.GRU(10, 20))
        with torch.no_grad():
            y, h = frozen.step(torch.randn(1, 10))           # (1, 20), and (1, 1, 20)
    """

    _unfrozen = GRU


class FrozenTorchLSTM(FrozenLSTM, TorchLSTM):
    """The frozen form of a :class:`torch.nn.LSTM` or a :class:`lstm_ext.TorchLSTM`, from :func:`freeze`.

    It is a :class:`FrozenLSTM`, and a ``torch.nn.LSTM`` to ``isinstance``. ``torch.compile`` treats it like
    :class:`lstm_ext.TorchLSTM`. Example::

        model = torch.nn.Sequential(torch.nn.LSTM(10, 20))
        frozen = lstm_ext.freeze(model, weights=torch.int8)
        assert isinstance(frozen[0], lstm_ext.FrozenTorchLSTM) and isinstance(frozen[0], torch.nn.LSTM)
    """

    _unfrozen = TorchLSTM


class FrozenTorchGRU(FrozenGRU, TorchGRU):
    """The frozen form of a :class:`torch.nn.GRU` or a :class:`lstm_ext.TorchGRU`, from :func:`freeze`.

    It is a :class:`FrozenGRU`, and a ``torch.nn.GRU`` to ``isinstance``. Example::

        frozen = lstm_ext.freeze(torch.nn.GRU(10, 20))
        assert isinstance(frozen, lstm_ext.FrozenTorchGRU) and isinstance(frozen, torch.nn.GRU)
    """

    _unfrozen = TorchGRU


# The frozen forms of each layer of torch: of ours, and of those that are torch's to isinstance.
_FORMS: dict[type[nn.Module], tuple[type[FrozenLayer], type[FrozenLayer]]] = {
    _TORCH_LSTM: (FrozenLSTM, FrozenTorchLSTM),
    _TORCH_GRU: (FrozenGRU, FrozenTorchGRU),
}
_FROZEN_FROM = (LSTM, GRU, *_FORMS)


def _kernels() -> Any:
    kernels = loader.extension()
    if kernels is None:
        reason = str(loader.status().reason).rstrip(".")
        raise RuntimeError(
            f"freeze: needs the compiled kernels, which are not there: {reason}. Where they are, "
            "save the state dict of a frozen layer: layers that are not frozen load it anywhere"
        )
    return kernels


def _packed_names(layer: Any) -> list[list[str]]:
    """The names of the buffers of packed weights, one list per layer."""
    suffixes = ["", "_reverse"] if layer.bidirectional else [""]
    return [[f"packed_l{k}{suffix}" for suffix in suffixes] for k in range(layer.num_layers)]


# Classes


def _by_name(cls: type[nn.Module]) -> tuple[type[nn.Module], bool]:
    """A class that pickle finds by its name, and whether `with_our_forward` derived ``cls`` from it."""
    return vars(cls).get("_derived_from", cls), "_derived_from" in vars(cls)


def _plain_class(layer: nn.Module) -> type[nn.Module]:
    """The class of a layer before freeze and parametrize changed it."""
    if isinstance(layer, FrozenLayer):
        return layer._unfrozen
    return type(layer).__bases__[0] if type(layer).__module__ == parametrize.__name__ else type(layer)


def _own_source(cls: type[nn.Module]) -> type[nn.Module]:
    """The class of torch or of this package that a class is, or is derived from."""
    return next(c for c in cls.__mro__ if c in _FORMS or c.__module__.startswith("lstm_ext."))


_frozen_classes: dict[type[nn.Module], type[FrozenLayer]] = {}


def _frozen_class(cls: type[nn.Module]) -> type[FrozenLayer]:
    """The class of frozen layers that are also instances of ``cls``."""
    base = next(
        forms[issubclass(cls, theirs)]
        for theirs, forms in _FORMS.items()
        if issubclass(cls, (theirs, forms[0]._unfrozen))
    )
    if _own_source(cls) is cls:
        return base
    if cls not in _frozen_classes:
        ours = cls if issubclass(cls, RecurrentLayer) else with_our_forward(cls)
        namespace = {"__module__": cls.__module__, "__doc__": cls.__doc__}
        _frozen_classes.setdefault(cls, type(f"Frozen{cls.__name__}", (base, ours), namespace))
    return _frozen_classes[cls]


def _restored(named: type[nn.Module], converted: bool) -> FrozenLayer:
    cls = with_our_forward(named) if converted else named
    frozen = _frozen_class(cls)
    layer = frozen.__new__(frozen)
    layer.__dict__["_unfrozen"] = cls
    return layer


# Models


@overload
def freeze(module: nn.LSTM, weights: torch.dtype | None = None) -> FrozenTorchLSTM: ...
@overload
def freeze(module: LSTM, weights: torch.dtype | None = None) -> FrozenLSTM: ...
@overload
def freeze(module: nn.GRU, weights: torch.dtype | None = None) -> FrozenTorchGRU: ...
@overload
def freeze(module: GRU, weights: torch.dtype | None = None) -> FrozenGRU: ...
@overload
def freeze(module: _Model, weights: torch.dtype | None = None) -> _Model: ...
def freeze(module: nn.Module, weights: torch.dtype | None = None) -> nn.Module:
    """A copy for inference on the CPU, whose layers have their weights packed once, and not in each call.

    The copy is that of ``copy.deepcopy``, with other classes of its layers. So it does not see what happens to the
    original afterwards; hooks, attributes and buffers come along; tied weights stay tied; handles of the original's
    hooks do not reach those of the copy; and layers are not compiled any more (``Module.compile``). None of its
    parameters requires gradients. Its results are those of the original in evaluation mode, within rounding.
    It refuses weights that are changed later, but notices neither writes through ``weight.data`` nor changes under a
    compiled or exported program. :class:`FrozenLSTM` says what it can do; :func:`unfreeze` gives a layer that can be
    trained.

    Args:
        module: an LSTM or GRU, of this package or of ``torch.nn``, or a model that has such layers; on the CPU. In a
            model all other modules are copied as they are. A cell is one of them; a warning names it and says which
            layer can be frozen in its place.
        weights: None keeps the numbers of ``weight_ih`` and ``weight_hh``. ``torch.bfloat16`` and ``torch.int8`` round
            them: to bfloat16, or to whole multiples of 1/127 of the largest number in their row. Everything else is
            computed as before. One streaming step spends most of its time on reading weights, and rounded weights are
            a half or a quarter of that memory; up to 20,000 of a direction stay float32, which is faster. The rounding
            moves results by about 2e-3 (bfloat16) and 4e-3 (int8) of their size, and further with layer normalisation.

    Returns:
        a :class:`FrozenLSTM` or :class:`FrozenGRU`, or the model with such layers, in evaluation mode. Of a layer that
        is torch's to ``isinstance`` it is a :class:`FrozenTorchLSTM` or :class:`FrozenTorchGRU`. Of a subclass that has
        no code of its own it is an instance of that subclass, too.

    Raises:
        TypeError: ``module`` is no module; or it has layers that cannot be frozen. The text gives the name, class and
            reason of each. The reasons are: a subclass with code of its own; a ``forward`` (or a method that it calls)
            replaced on the instance; weights that are parametrized, normed or pruned; an attribute that would be hidden
            by one of frozen layers.
        ValueError: there is no LSTM or GRU in ``module``; ``weights`` is another dtype; parameters are not of one
            dtype, are float64 where ``weights`` is given, or have an infinity or a NaN where it is ``torch.int8``.
        RuntimeError: parameters are not on the CPU, or the compiled kernels are not there.
    """
    integrations.install()
    _check_module(module, "freeze")
    if weights not in _KINDS:
        raise ValueError(f"freeze: weights: expected None, torch.bfloat16 or torch.int8, got {weights!r}")
    layers = _layers(module, _FROZEN_FROM, "freeze")
    _kernels()
    for name, layer in layers.items():
        _check_numbers(f"{place_of(name)}: ", layer, weights)
    frozen = _changed(module, layers, lambda layer: _freeze(layer, weights), "freeze")
    for part, parameters in _parameters_by_module(frozen):
        names = [name for name, p in parameters if p.requires_grad]
        if names:
            part.__dict__[_REQUIRED] = sorted({*names, *part.__dict__.get(_REQUIRED, ())})
    if cells := _about_cells(module):
        warnings.warn(f"freeze: not frozen: {cells}", stacklevel=2)
    return frozen.requires_grad_(False).eval()


# A frozen layer of torch is one of ours too, and its class becomes torch's again.
@overload
def unfreeze(module: FrozenTorchLSTM) -> nn.LSTM: ...  # type: ignore[overload-overlap]
@overload
def unfreeze(module: FrozenLSTM) -> LSTM: ...  # type: ignore[overload-overlap]
@overload
def unfreeze(module: FrozenTorchGRU) -> nn.GRU: ...  # type: ignore[overload-overlap]
@overload
def unfreeze(module: FrozenGRU) -> GRU: ...
@overload
def unfreeze(module: _Model) -> _Model: ...
def unfreeze(module: nn.Module) -> nn.Module:
    """A copy of a frozen module whose layers can be trained: of the classes they had, with the original weights.

    It is a copy as :func:`freeze` makes it.

    Args:
        module: what :func:`freeze` returned, a part of it, or a model that has such parts.

    Returns:
        a layer of the class that was frozen, such as :class:`lstm_ext.LSTM` or ``torch.nn.LSTM``, or the model with
        such layers, in evaluation mode. The parameters require gradients where those that were frozen did, and where
        they do now.

    Raises:
        TypeError: ``module`` is no module; or a frozen layer in it has been given weights or methods that
            :func:`freeze` does not take. The text gives the name, class and reason of each.
        ValueError: there is no frozen layer in it.
    """
    _check_module(module, "unfreeze")
    thawed = _changed(module, _layers(module, (FrozenLayer,), "unfreeze"), _unfreeze, "unfreeze")
    for part, parameters in _parameters_by_module(thawed):
        names = part.__dict__.pop(_REQUIRED, ())
        for name, parameter in parameters:
            if name in names:
                parameter.requires_grad_(True)
    return thawed.eval()


def _check_module(module: Any, function: str) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"{function}: expected module to be a torch.nn.Module, got {type(module).__name__}")


def _parameters_by_module(model: nn.Module) -> Iterator[tuple[nn.Module, list[tuple[str, nn.Parameter]]]]:
    for part in modules_of(model):
        yield part, list(part.named_parameters(recurse=False, remove_duplicate=False))


def _layers(module: nn.Module, classes: tuple[type, ...], function: str) -> dict[str, Any]:
    """The layers of some classes by name. Raises for layers that `freeze` and `unfreeze` do not accept."""
    layers: dict[str, Any] = {name: m for name, m in module.named_modules() if isinstance(m, classes)}
    if not layers:
        kind = "a frozen layer" if function == "unfreeze" else "an LSTM or GRU"
        looked = "" if function == "unfreeze" else f". {_about_cells(module) or where_it_looked(module, [])}"
        raise ValueError(
            f"{function}: expected {kind}, or a model that has one, got {type(module).__name__}{looked}"
        )
    refused = [
        f"  {place_of(name)} ({kind_of(layer)}): {'; '.join(reasons)}"
        for name, layer in layers.items()
        if (reasons := _reasons_against(layer))
    ]
    if refused:
        raise TypeError(
            f"{function}: no copy was made, because of layers that it cannot take:\n" + "\n".join(refused)
        )
    return layers


def _about_cells(module: nn.Module) -> str:
    """The cells of a model, and what can be frozen in their place; empty where it has none."""
    cells = [
        f"{place_of(name)} ({kind_of(m)})" for name, m in module.named_modules() if isinstance(m, _CELLS)
    ]
    if not cells:
        return ""
    return (
        f"{', '.join(cells)}: a cell has no frozen form. Replace it by an lstm_ext.LSTM or GRU of one layer, whose "
        "step() computes the same: load_state_dict({f'{name}_l0': p for name, p in cell.state_dict().items()})"
    )


def _reasons_against(layer: Any) -> list[str]:
    """The reasons why a layer can be neither frozen nor thawed."""
    cls, _ = _by_name(_plain_class(layer))
    base = next(c for c in _FROZEN_FROM if isinstance(layer, c))
    reasons = []
    if not _overrides_nothing(cls, _own_source(cls)):
        reasons.append("a subclass with code of its own, which a frozen layer would not run")
    replaced = _replaced_methods(layer, base)
    if replaced:
        reasons.append(f"{', '.join(replaced)} is replaced on the instance; delete it there first")
    if not isinstance(layer, FrozenLayer):
        taken = {*dir(_frozen_class(base))} - {*dir(base)} | {
            n for names in _packed_names(layer) for n in names
        }
        for name in (*layer.__dict__, *layer._parameters, *layer._buffers, *layer._modules):
            if name in taken:
                reasons.append(f"its attribute {name} has another meaning in a frozen layer; rename it first")
    parametrized = getattr(layer, "parametrizations", ())
    for name in dict.fromkeys([*_weight_names(layer), *parametrized]):
        if not isinstance(layer._parameters.get(name), nn.Parameter):
            reasons.append(f"{name} is {_what_it_is(layer, name, parametrized)}")
    return reasons


def _what_it_is(layer: nn.Module, name: str, parametrized: Any) -> str:
    if name in parametrized:
        return "parametrized; call torch.nn.utils.parametrize.remove_parametrizations on it first"
    if f"{name}_mask" in layer._buffers:
        return "pruned; call torch.nn.utils.prune.remove on it first"
    if f"{name}_g" in layer._parameters:
        return "normed; call torch.nn.utils.remove_weight_norm on it first"
    return "not a plain parameter (spectral_norm or dropped weights?); undo that first"


def _weight_names(layer: Any) -> list[str]:
    others = [name for name, _, _ in layer._cell_parameters()] if isinstance(layer, RecurrentLayer) else []
    return [name for names in layer._all_weights for name in names] + others


def _check_numbers(place: str, layer: Any, weights: torch.dtype | None) -> None:
    parameters = {name: layer._parameters[name] for name in _weight_names(layer)}
    dtypes = sorted({str(p.dtype) for p in parameters.values()})
    if len(dtypes) != 1:
        raise ValueError(f"freeze: {place}expected parameters of one dtype, got {', '.join(dtypes)}")
    for p in parameters.values():
        _check_place(place, p.device, p.dtype, weights)
    if weights == torch.int8:
        _refuse_what_int8_has_not(list(parameters), list(parameters.values()), place)


def _check_place(place: str, device: torch.device, dtype: torch.dtype, weights: torch.dtype | None) -> None:
    if device.type != "cpu":
        raise RuntimeError(f"freeze: {place}a frozen layer is on the CPU, got parameters on {device}")
    if weights is not None and dtype == torch.float64:
        raise ValueError(f"freeze: {place}weights: expected None for float64 parameters, got {weights}")


def _refuse_what_int8_has_not(names: Sequence[str], weights: Sequence[Tensor], place: str) -> None:
    for name, weight in zip(names, weights, strict=True):
        if name.startswith(("weight_ih", "weight_hh")) and not torch.isfinite(weight).all():
            raise ValueError(f"freeze: {place}{name} has an infinity or a NaN, which int8 cannot hold")


def _changed(
    module: nn.Module, layers: dict[str, Any], change: Callable[[Any], None], function: str
) -> nn.Module:
    """A copy of a model in which some layers are changed."""
    # deepcopy takes objects in this table for copied. Packed weights are made again, or none are needed.
    memo: dict[int, Any] = {
        id(packed): packed
        for layer in layers.values()
        if isinstance(layer, FrozenLayer)
        for options in layer._frozen_options
        for packed in options.frozen
    }
    copied = copy.deepcopy(module, memo)
    for name, layer in layers.items():
        if id(layer) not in memo:  # the user's __deepcopy__ leaves it out or shares it
            raise TypeError(
                f"{function}: copy.deepcopy does not copy {place_of(name)} with the model: {function} it alone"
            )
    for layer in layers.values():
        change(memo[id(layer)])
    return copied


def _freeze(layer: Any, weights: torch.dtype | None) -> None:
    cls = _plain_class(layer)
    for name in ("_compiled_call_impl", *_LEFT_BEHIND):  # the first calls the original
        layer.__dict__.pop(name, None)
    layer.__class__ = _frozen_class(cls)
    layer.__dict__["_unfrozen"], layer.frozen_weights = cls, weights
    layer._layer_names = layer._group_names()
    layer._pack()


def _unfreeze(layer: Any) -> None:
    cls = layer._unfrozen
    for name in [name for names in layer._frozen_names for name in names]:
        del layer._buffers[name]
        layer._non_persistent_buffers_set.discard(name)
    own = ("_unfrozen", "frozen_weights", "_frozen_names", "_frozen_from", "_frozen_parameters")
    for name in (*own, *_MADE_OF_PACKED, *(() if issubclass(cls, RecurrentLayer) else ("_layer_names",))):
        layer.__dict__.pop(name, None)
    layer.__class__ = cls
