"""The options of a layer beyond ``torch.nn.LSTM``, one row each.

What lists or asks for options follows from the rows: the arguments and attributes of `lstm_ext.LSTM`, its repr, state
and docstring, the keywords of `functional.lstm`, errors, what ``step()`` and the C library refuse, and `explain`.
csrc/contract/options.def has those that reach the kernels.
"""

from __future__ import annotations

import difflib
import inspect
import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, TypedDict

from torch import Tensor

from .layer.activations import Activation, activation_text

# ---- checks: each gives the value in the form that a layer keeps, or raises an error that names the argument


def _number(name: str, value: Any, good: Callable[[float], bool], expected: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not good(value):
        raise ValueError(f"{name} should be {expected}, got {value!r}")
    return float(value)


def _probability(name: str, value: Any) -> float:
    return _number(name, value, lambda p: 0 <= p <= 1, "a number in range [0, 1]")


def zoneout_pair(value: Any) -> tuple[float, float]:
    """The probabilities for h and c. Raises: ValueError."""
    if not isinstance(value, (tuple, list)):
        return _probability("zoneout", value), 0.0
    if len(value) != 2:
        raise ValueError(
            f"zoneout should be a number, for h, or a pair of numbers, for h and c, got {value!r}"
        )
    return _probability("zoneout[0] (for h)", value[0]), _probability("zoneout[1] (for c)", value[1])


def _zoneout(_: str, value: Any) -> Any:
    h, c = zoneout_pair(value)
    return (h, c) if c else h


def _clip(name: str, value: Any) -> float | None:
    return (
        None
        if value is None
        else _number(name, value, lambda bound: 0 < bound < math.inf, "a positive finite number or None")
    )


def _finite(name: str, value: Any) -> float | None:
    return None if value is None else _number(name, value, math.isfinite, "a finite number or None")


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} should be a bool, got {value!r}")
    return value


def _layer_norm(name: str, value: Any) -> bool | str:
    if not isinstance(value, bool) and not (isinstance(value, str) and value == "cell"):
        raise TypeError(f'{name} should be a bool or "cell", got {value!r}')
    return value


def _gate_activation(_: str, value: Any) -> Any:
    return value if activation_text(value, "tanh") else "sigmoid"


def _cell_activation(_: str, value: Any) -> Any:
    return value if activation_text("sigmoid", value) else "tanh"


# ---- the rows


class CellParameters(NamedTuple):
    """The parameters that an option adds to each layer and direction.

    Attributes:
        name: in errors.
        field: that of `LayerOptions`.
        keyword: the argument of `functional.lstm`.
        prefix: what their names in a module begin with.
        sizes: their sizes in H by the rest of their names, in the order of `LayerOptions`; those of a bias only exist
            in layers with biases.
        initial: their initial value, except for biases, which begin with 0.
    """

    name: str
    field: str
    keyword: str
    prefix: str
    sizes: dict[str, int]
    initial: float

    def kinds(self, bias: bool) -> list[str]:
        return [kind for kind in self.sizes if bias or not kind.startswith("bias")]


class Option(NamedTuple):
    """One option.

    Attributes:
        default: its value in a layer without it. An int 0, because with dynamic=True dynamo takes a float for a number
            that may change.
        check: gives the value in the form that the layer keeps; arguments are the name and the value.
        text: for docstrings.
        field: whether `LayerOptions` has its value, under the same name.
        gru: whether a GRU has it too.
        random: whether it draws random masks in training, which ``step()`` refuses.
        cell: whether it makes the cell another one than the plain cell, for which each backend has fewer kernels.
        call: whether it changes a call. One that does not changes the initial parameters only.
        saved: whether the weights file of the C library has it, or it has no meaning there. A layer with another option
            is not saved.
        onnx: what an export to ONNX makes of it: "node" if the operator ``LSTM`` has it, or "scan" if a loop over the
            steps has it; or it has no meaning there. A layer with another option is not exported.
        parameters: those that it adds to each layer and direction.
    """

    default: Any
    check: Callable[[str, Any], Any]
    text: str
    field: bool = False
    gru: bool = False
    random: bool = False
    cell: bool = False
    call: bool = True
    saved: bool = False
    onnx: str = ""
    parameters: CellParameters | None = None


OPTIONS: dict[str, Option] = {
    "recurrent_dropout": Option(
        0,
        _probability,
        "probability of zeroing an element of h_{t-1} before its product with ``weight_hh``, in training mode. A "
        "sequence has one mask for all its steps; the other elements are scaled by 1 / (1 - p).",
        gru=True,
        random=True,
        saved=True,
        onnx="scan",
    ),
    "weight_dropout": Option(
        0,
        _probability,
        "probability of zeroing an element of ``weight_hh``, in training mode: one mask for a call, each layer and "
        "direction its own; the other elements are scaled by 1 / (1 - p).",
        gru=True,
        random=True,
        saved=True,
        onnx="node",
    ),
    "zoneout": Option(
        0,
        _zoneout,
        "probability of keeping an element of the previous state: a number for h, or a pair for h and c. In "
        "evaluation mode the states are mixed in that proportion.",
        random=True,
        saved=True,
        onnx="scan",
    ),
    "layer_norm": Option(
        False,
        _layer_norm,
        "whether to normalise the two products of the gates, over their 4H values, and c_t where h_t uses it; or "
        '``"cell"``, where the normalised c_t is also the one that the next step takes.',
        saved=True,
        onnx="scan",
        parameters=CellParameters(
            "layer normalisation",
            "norm",
            "norm_weights",
            "ln_",
            {"gain_ih": 4, "gain_hh": 4, "gain_c": 1, "bias_c": 1},
            1.0,
        ),
    ),
    "peephole": Option(
        False,
        _flag,
        "whether i and f also see c_{t-1}, and o sees c_t, each unit its own.",
        cell=True,
        saved=True,
        onnx="node",
        parameters=CellParameters(
            "peepholes",
            "peephole",
            "peephole_weights",
            "",
            {"weight_ci": 1, "weight_cf": 1, "weight_co": 1},
            0.0,
        ),
    ),
    "cell_clip": Option(
        None,
        _clip,
        "a bound of abs(c_t), applied before anything sees c_t; None for none.",
        field=True,
        cell=True,
        saved=True,
        onnx="scan",
    ),
    "coupled_gates": Option(
        False,
        _flag,
        "whether f = 1 - i. The rows of f stay in the weights and get zero gradients.",
        field=True,
        cell=True,
        saved=True,
        onnx="node",
    ),
    "gate_activation": Option(
        "sigmoid",
        _gate_activation,
        'the function of i, f and o: a name, or a tuple of a name and its numbers, as in ``("hard_sigmoid", 0.2, '
        "0.5)``. The names are those of ONNX's LSTM: ``sigmoid``, ``tanh``, ``affine`` (alpha z + beta; 1, 0), "
        "``relu``, ``leaky_relu`` (alpha; 0.01), ``thresholded_relu`` (alpha; 1), ``elu`` (alpha; 1), ``scaled_tanh`` "
        "(alpha tanh(beta z); 1, 1), ``hard_sigmoid`` (alpha z + beta in [0, 1]; 0.2, 0.5), ``softsign``, "
        "``softplus``; and ``identity``.",
        cell=True,
        saved=True,
        onnx="node",
    ),
    "cell_activation": Option(
        "tanh",
        _cell_activation,
        "the function of g and of c_t in h_t; or a pair of functions, first that of g.",
        cell=True,
        saved=True,
        onnx="node",
    ),
    "preactivation_clip": Option(
        None,
        _clip,
        "a bound of what the functions of the four gates take, peepholes included; None for none.",
        field=True,
        cell=True,
        saved=True,
        onnx="node",
    ),
    "forget_bias": Option(
        None,
        _finite,
        "initial value of the forget gate's bias: that slice of ``bias_ih`` is set to it, and that of ``bias_hh`` to "
        "0. None for an initial value like all others.",
        call=False,
        saved=True,
        onnx="node",
    ),
    "recompute": Option(
        False,
        _flag,
        "whether to save c_t but no gates for the backward pass, which recomputes the gates.",
        field=True,
        gru=True,
        saved=True,
        onnx="node",
    ),
}


# ---- the same for type checkers


class GRUArguments(TypedDict, total=False):
    """The keywords of `lstm_ext.GRU`, and those of `functional.gru` that are options of a layer."""

    recurrent_dropout: float
    weight_dropout: float
    recompute: bool


class _Arguments(GRUArguments, total=False):
    zoneout: float | tuple[float, float]
    cell_clip: float | None
    coupled_gates: bool
    gate_activation: Activation
    cell_activation: Activation
    preactivation_clip: float | None
    layer_norm: bool | Literal["cell"]


class LayerArguments(_Arguments, total=False):
    """The keywords of `lstm_ext.LSTM`."""

    peephole: bool
    forget_bias: float | None


class FunctionalOptions(_Arguments, total=False):
    """The keywords of `functional.lstm` that are options of a layer."""

    norm_weights: Sequence[Tensor] | None
    peephole_weights: Sequence[Tensor] | None


def signature_of(function: Any, keywords: type, before: str = "") -> inspect.Signature:
    """The signature of a function that takes ``**options``, with the keywords of a TypedDict in the order of the rows.

    ``before``: the keyword of the function in front of which they stand.
    """
    types = {
        name: kind
        for c in reversed(keywords.__mro__)
        for name, kind in getattr(c, "__annotations__", {}).items()
    }
    named = {
        name: o for n, o in OPTIONS.items() for name in ((o.parameters.keyword, n) if o.parameters else (n,))
    }
    added = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=option.default if name in OPTIONS else None,
            annotation=getattr(types[name], "__forward_arg__", types[name]),
        )
        for name, option in named.items()
        if name in types
    ]
    signature = inspect.signature(function)
    own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    place = next((i for i, p in enumerate(own) if p.name == before), len(own))
    return signature.replace(parameters=own[:place] + added + own[place:])


def described(docstring: str | None, gru: bool = False) -> str | None:
    """A docstring whose line ``{options}`` becomes the descriptions of the rows."""
    if docstring is None:  # python -OO
        return None
    rows = [
        textwrap.fill(f"{name}: {option.text}", 116, subsequent_indent="    ", break_on_hyphens=False)
        for name, option in OPTIONS.items()
        if option.gru or not gru
    ]
    return docstring.replace("{options}", textwrap.indent("\n".join(rows), 8 * " ").lstrip())


def unexpected_argument(function: str, name: str, known: Iterable[str]) -> TypeError:
    """The error for an unknown keyword, which names the nearest known one."""
    near = difflib.get_close_matches(name, known, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return TypeError(f"{function} got an unexpected keyword argument {name!r}{hint}")


# ---- the options of one layer


def _refuse_combinations(given: Mapping[str, Any], bias: bool) -> None:
    """Raises: ValueError, naming the options."""
    # The f rows would count in the statistics of the gates, and what o should see of c_t is not defined.
    for name, text in (("peephole", "peephole (peephole_weights)"), ("coupled_gates", "coupled_gates")):
        if given.get("layer_norm") and given.get(name):
            raise ValueError(f"{text}: not available together with layer_norm (norm_weights)")
    if given.get("forget_bias") is not None:
        if given.get("coupled_gates"):
            raise ValueError("forget_bias: has no effect together with coupled_gates=True")
        if not bias:
            raise ValueError("forget_bias needs a layer with biases, got bias=False")


def checked(
    values: Mapping[str, Any], given: Mapping[str, Any], bias: bool, gru: bool = False
) -> dict[str, Any]:
    """``given`` changed by ``values``: what differs from the defaults, in the order of the rows.

    Raises:
        TypeError, ValueError: a value is wrong, or two exclude each other; the text names the argument.
    """
    all_ = {**given, **{name: OPTIONS[name].check(name, value) for name, value in values.items()}}
    all_ = {
        name: all_[name]
        for name, option in OPTIONS.items()
        if all_.get(name, option.default) != option.default
    }
    for name in all_ if gru else ():
        if not OPTIONS[name].gru:
            has = ", ".join([name for name, option in OPTIONS.items() if option.gru])
            raise ValueError(f"{name}: not an option of a GRU, which has {has}")
    _refuse_combinations(all_, bias)
    return all_


def requested(given: Mapping[str, Any]) -> dict[str, Any] | None:
    """Those that change a call; None if there are none, since a compiler makes a guard for None."""
    return {name: value for name, value in given.items() if OPTIONS[name].call} or None


def _property(name: str, option: Option) -> property:
    def get(self: HasOptions) -> Any:
        return self._given.get(name, option.default)

    def set_(self: HasOptions, value: Any) -> None:
        self._set_options({name: value})

    def delete(self: HasOptions) -> None:
        self._set_options({name: option.default})

    return property(get, set_, delete, option.text)


class HasOptions:
    """A layer whose options are attributes; a wrong value raises as it does in the constructor."""

    bias: bool
    gru: bool = False  # the cells are those of a GRU
    # Attributes of the class, so that a layer without options has the same instance attributes as torch's.
    _given: Mapping[str, Any] = MappingProxyType({})  # what differs from the defaults
    _requested: dict[str, Any] | None = None  # `requested` of that

    for _name, _option in OPTIONS.items():
        locals()[_name] = _property(_name, _option)
    del _name, _option

    def __init_subclass__(cls, **given: Any) -> None:
        """A subclass may set an option for all its layers."""
        super().__init_subclass__(**given)
        own = {name: cls.__dict__[name] for name in OPTIONS if name in cls.__dict__}
        for name, value in own.items():
            if hasattr(value, "__get__"):
                raise TypeError(
                    f"{cls.__name__}.{name}: expected a value of the option, got {type(value).__name__}"
                )
        if own:
            cls._given = checked(own, cls._given, True, cls.gru)
            cls._requested = requested(cls._given)
            for name in own:  # it would hide the property
                delattr(cls, name)

    def _set_options(self, values: Mapping[str, Any]) -> None:
        given = checked(values, self._given, self.bias, self.gru)
        for name in given.keys() - self._given.keys():
            self._refuse_late(name)
        for name, value in (("_given", given), ("_requested", requested(given))):
            self.__dict__.pop(name, None)
            if value != getattr(self, name):  # that of the class
                self.__dict__[name] = value

    def _refuse_late(self, name: str) -> None:
        """Raises an error if the layer lacks the parameters of an option."""
