"""Layers with the weights of other frameworks: ``lstm_ext.from_keras`` and its like, and ``to_keras``.

No framework has to be installed. An importer takes arrays: anything that NumPy or torch takes for one. An object of a
framework is read by its attributes.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..layer.activations import Activation, activation_text, split_text
from .frozen import freeze
from .gru import GRU
from .lstm import LSTM, activations_of

Arrays = Mapping[str, Any]
PEEPHOLES = ("weight_ci", "weight_cf", "weight_co")


# ---- arrays in torch's form


@dataclass
class Direction:
    """A direction of a layer: weights (4H, features) with the gates i, f, g, o; of a GRU (3H, features), r, z, n."""

    weight_ih: Tensor
    weight_hh: Tensor
    bias: Tensor | None  # bias_ih
    weight_hr: Tensor | None = None
    peepholes: tuple[Tensor, Tensor, Tensor] | None = None  # i, f and o
    bias_hh: Tensor | None = None  # None for zeros
    gates: int = 4

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Input, hidden units, and those of the projection or 0."""
        projected = 0 if self.weight_hr is None else self.weight_hr.size(0)
        return self.weight_ih.size(1), self.weight_ih.size(0) // self.gates, projected


class Source:
    """Reads the arrays of a framework, and names the importer and the array in errors."""

    def __init__(self, function: str, order: str) -> None:
        self.function, self.order = function, order

    def array(self, value: Any, name: str, *shape: int | None) -> Tensor:
        """A copy. None in the shape stands for any size.

        Raises:
            TypeError: it is no array of floating-point numbers.
            ValueError: it has another shape.
        """
        if not isinstance(value, Tensor):
            try:
                value = self._tensor(value)
            except Exception as error:  # A framework may raise anything.
                kind = type(value).__name__
                raise TypeError(f"{self.function}: {name}: expected an array, got {kind}: {error}") from error
        if not value.is_floating_point():
            raise TypeError(f"{self.function}: {name}: expected a floating-point dtype, got {value.dtype}")
        got = tuple(value.shape)
        if len(got) != len(shape) or any(a not in (None, b) for a, b in zip(shape, got, strict=True)):
            expected = "(" + ", ".join("any" if n is None else str(n) for n in shape)
            expected += ",)" if len(shape) == 1 else ")"
            raise ValueError(f"{self.function}: {name}: expected shape {expected}, got {got}")
        return value.detach().clone()

    @staticmethod
    def _tensor(value: Any) -> Tensor:
        if callable(getattr(value, "numpy", None)):  # a variable of TensorFlow
            value = value.numpy()
        elif hasattr(value, "__array__") and not str(getattr(value, "dtype", "")).startswith("mlx"):
            value = value.__array__()  # MLX has no bfloat16 for NumPy, and torch reads its arrays itself
        if str(getattr(value, "dtype", "")) == "bfloat16":  # torch does not know the dtype of ml_dtypes
            return torch.tensor(value.view("uint16")).view(torch.bfloat16)
        return torch.tensor(value)

    def named(self, arrays: Any, what: str) -> Arrays:
        """These arrays, if they have names. Raises: TypeError."""
        if not isinstance(arrays, Mapping):
            raise TypeError(f"{self.function}: {what}: expected arrays by name, got {type(arrays).__name__}")
        return arrays

    def taken(self, arrays: Any, what: str, names: Sequence[str]) -> list[Any]:
        """The arrays of these names. Raises: TypeError, ValueError."""
        missing = [name for name in names if name not in self.named(arrays, what)]
        if missing:
            raise self.refuse(f"expected {', '.join(names)}, got none of {', '.join(missing)}")
        return [arrays[name] for name in names]

    def gates(self, x: Tensor) -> Tensor:
        """Blocks along the first axis, one a gate, in torch's order."""
        blocks = dict(zip(self.order, x.chunk(len(self.order)), strict=True))
        return torch.cat([blocks[gate] for gate in ("ifgo" if len(self.order) == 4 else "rzn")])

    def refuse(self, what: str) -> ValueError:
        return ValueError(f"{self.function}: {what}")

    def matrices(self, kernel: Any, recurrent: Any, bias: Any, names: Sequence[str]) -> Direction:
        """From (features, 4H), (H, 4H) and (4H) or None; of a GRU (features, 3H), (H, 3H) and (2, 3H) or None."""
        U, count = self.array(recurrent, names[1], None, None), len(self.order)
        if U.size(1) != count * U.size(0):
            raise self.refuse(f"{names[1]}: expected shape (H, {count} H), got {tuple(U.shape)}")
        W = self.array(kernel, names[0], None, U.size(1))
        if count == 4 or bias is None:
            b = None if bias is None else self.gates(self.array(bias, names[2], U.size(1)))
            return Direction(self.gates(W.T), self.gates(U.T), b, gates=count)
        b, b_hh = map(self.gates, self.array(bias, names[2], 2, U.size(1)))
        return Direction(self.gates(W.T), self.gates(U.T), b, bias_hh=b_hh, gates=3)

    def joint(self, kernel: Any, bias: Any, names: Sequence[str], projection: Any = None) -> Direction:
        """From one (features + P, 4H) of input and state, (4H) and (H, P) or None."""
        both = self.array(kernel, names[0], None, None)
        hidden = both.size(1) // 4
        P = None if projection is None else self.array(projection, names[2], hidden, None)
        features = both.size(0) - (hidden if P is None else P.size(1))
        if both.size(1) % 4 or features < 1:
            raise self.refuse(f"{names[0]}: expected shape (features + H, 4 H), got {tuple(both.shape)}")
        b = None if bias is None else self.gates(self.array(bias, names[1], 4 * hidden))
        W, U = both.T[:, :features], both.T[:, features:]
        return Direction(self.gates(W), self.gates(U), b, None if P is None else P.T)

    def with_forget_bias(self, direction: Direction, value: float) -> Direction:
        """The number that a framework adds to the forget gate's preactivation at run time."""
        hidden = direction.sizes[1]
        if direction.bias is None:
            direction.bias = direction.weight_ih.new_zeros(4 * hidden)
        direction.bias[hidden : 2 * hidden] += value
        return direction

    def layer(self, stack: Sequence[Sequence[Direction]], batch_first: bool, **options: Any) -> Any:
        """A layer with these parameters, an LSTM or a GRU, of one direction or two for each of the stack."""
        if not stack:
            raise self.refuse("expected at least one layer, got none")
        first = stack[0][0]
        features, hidden, projected = first.sizes
        for k, directions in enumerate(stack):
            size = features if k == 0 else len(stack[0]) * (projected or hidden)
            for direction in directions:
                if direction.sizes != (size, hidden, projected) or len(directions) != len(stack[0]):
                    raise self.refuse(
                        f"layer {k}: expected {size} features, {hidden} units and {len(stack[0])} directions, got "
                        f"{direction.sizes[0]}, {direction.sizes[1]} and {len(directions)}: make a layer of each"
                    )
        everywhere = [direction for directions in stack for direction in directions]
        bias = any(direction.bias is not None for direction in everywhere)
        peephole = any(direction.peepholes is not None for direction in everywhere)
        kind: Any = GRU
        if first.gates == 4:
            kind, options = LSTM, {**options, "proj_size": projected, "peephole": peephole}
        module = kind(
            features, hidden, len(stack), bias=bias, batch_first=batch_first, bidirectional=len(stack[0]) == 2,
            device="meta", **options,
        )  # fmt: skip
        zeros, rows = first.weight_ih.new_zeros, first.gates * hidden
        for k, directions in enumerate(stack):
            for direction, suffix in zip(directions, ("", "_reverse"), strict=False):
                values: dict[str, Tensor | None] = {
                    "weight_ih": direction.weight_ih,
                    "weight_hh": direction.weight_hh,
                    "weight_hr": direction.weight_hr,
                }
                if bias:
                    values["bias_ih"] = zeros(rows) if direction.bias is None else direction.bias
                    values["bias_hh"] = zeros(rows) if direction.bias_hh is None else direction.bias_hh
                if peephole:
                    values |= zip(PEEPHOLES, direction.peepholes or (zeros(hidden),) * 3, strict=True)
                for name, value in values.items():
                    if value is not None:
                        parameter = nn.Parameter(value.to(first.weight_ih.dtype).contiguous())
                        setattr(module, f"{name}_l{k}{suffix}", parameter)
        module._init_flat_weights()
        return module


# ---- the frameworks


# Keras' functions that this layer has under another name.
KERAS = {"linear": "identity"}
KERAS |= {name: name for name in ("sigmoid", "tanh", "relu", "elu", "softplus", "softsign", "identity")}
# Their numbers differ between the versions of Keras, so they are asked.
KERAS_ASKED = ("hard_sigmoid", "leaky_relu")

# The functions that Keras has, with its numbers, those of Keras 3 first.
_IN_KERAS: dict[str, tuple[tuple[float, ...], ...]] = {
    **dict.fromkeys(("sigmoid", "tanh", "relu", "softplus", "softsign"), ((),)),
    "affine": ((1.0, 0.0),),
    "elu": ((1.0,),),
    "leaky_relu": ((0.2,), (0.3,)),
    "hard_sigmoid": ((1 / 6, 0.5), (0.2, 0.5)),
}


_KERAS, _KERAS_GRU = Source("from_keras", "ifgo"), Source("from_keras", "zrn")
_PLAIN_FUNCTIONS = {"gate_activation": "sigmoid", "cell_activation": "tanh"}
_RESET_BEFORE = "reset_after=False: this layer multiplies by the reset gate after the product only"
_KERAS_ARRAYS = ("kernel", "recurrent_kernel", "bias")


def _keras_directions(weights: Sequence[Any]) -> list[Direction]:
    if len(weights) not in (2, 3, 4, 6):
        raise _KERAS.refuse(f"expected 2, 3, 4 or 6 arrays, got {len(weights)}")
    each = 2 if len(weights) in (2, 4) else 3
    parts = [[*weights[k : k + each], None][:3] for k in range(0, len(weights), each)]
    rows, columns = (*getattr(weights[1], "shape", ()), 0, 0)[:2]
    read = _KERAS_GRU if rows and columns == 3 * rows else _KERAS
    if read is _KERAS_GRU and any(getattr(bias, "ndim", 2) == 1 for _, _, bias in parts):
        raise read.refuse(_RESET_BEFORE)
    return [read.matrices(kernel, recurrent, bias, _KERAS_ARRAYS) for kernel, recurrent, bias in parts]


def keras_activation(found: Any, name: str) -> Activation:
    """This package's name of a function of Keras, or of its name. Raises: ValueError."""
    known = getattr(found, "__name__", found)
    if known in KERAS:
        return KERAS[known]
    if known in KERAS_ASKED and callable(found):
        below, above = (float(y) for y in found(_KERAS.array([-1.0, 1.0], name, 2).numpy()))
        asked = -below if known == "leaky_relu" else above - 0.5
        numbers = next((n for n in _IN_KERAS[known] if abs(n[0] - asked) < 1e-6), None)
        if numbers is None:
            raise _KERAS.refuse(f"{name}: {known} with the number {asked:.6g}, which no version of Keras has")
        return (known, *numbers)
    raise _KERAS.refuse(f"{name}: expected one of {', '.join([*KERAS, *KERAS_ASKED])}, got {known}")


def _keras_settings(layer: Any, back: bool = False) -> dict[str, Any]:
    if back and not getattr(layer, "go_backwards", True):
        raise _KERAS.refuse("backward_layer: expected one with go_backwards=True")
    if not back and getattr(layer, "go_backwards", False):
        raise _KERAS.refuse(
            "go_backwards=True: this layer has not that; get_weights() gives the arrays, and x.flip(1) the input"
        )
    return {
        "gate_activation": keras_activation(
            getattr(layer, "recurrent_activation", "sigmoid"), "recurrent_activation"
        ),
        "cell_activation": keras_activation(getattr(layer, "activation", "tanh"), "activation"),
        "time_major": bool(getattr(layer, "time_major", False)),
    }


def _keras_layers(layer: Any) -> tuple[list[Any], dict[str, Any]]:
    """The layer, or the two of a ``Bidirectional``, and their settings. ValueError for what ours does not have."""
    inner = [layer]
    if hasattr(layer, "forward_layer"):
        if layer.merge_mode != "concat":
            raise _KERAS.refuse(f"merge_mode: expected concat, got {layer.merge_mode}")
        inner = [layer.forward_layer, layer.backward_layer]
    for one in inner:
        kind, cell = type(one).__name__, type(getattr(one, "cell", None)).__name__
        if kind == "RNN":
            raise _KERAS.refuse(
                f"expected layers of the class LSTM or GRU, got RNN of {cell}: from_keras takes the get_weights() "
                "of one LSTMCell, with its activations as gate_activation and cell_activation"
            )
        if kind not in ("LSTM", "GRU") or kind != type(inner[0]).__name__:
            raise _KERAS.refuse(f"expected layers of the class LSTM or GRU, got {kind}")
        if kind == "GRU" and not one.reset_after:
            raise _KERAS.refuse(_RESET_BEFORE)
    found = _keras_settings(inner[0])
    if len(inner) == 2 and _keras_settings(inner[1], back=True) != found:
        raise _KERAS.refuse("a Bidirectional whose layers differ in their activations")
    return inner, found


def from_keras(
    source: Any,
    *,
    gate_activation: Activation | None = None,
    cell_activation: Activation | None = None,
    batch_first: bool | None = None,
) -> LSTM | GRU:
    """A layer with the weights of ``keras.layers.LSTM`` or ``GRU``, of Keras 2 or 3 on any backend, or ``tf.keras``.

    Keras returns the last output unless ``return_sequences`` is set: here that is h_n.

    Args:
        source: a built ``LSTM`` or ``GRU``, a ``Bidirectional`` of one, or a sequence of such layers, which becomes a
            stack; or the list of arrays that ``get_weights()`` gives: kernel (I, 4H), recurrent_kernel (H, 4H) and,
            unless ``use_bias=False``, bias (4H), gates in the order i, f, c, o, and the same again for the way back;
            of a GRU kernel (I, 3H), recurrent_kernel (H, 3H) and bias (2, 3H), gates in the order z, r, h.
        gate_activation, cell_activation: ``recurrent_activation`` and ``activation`` of Keras, as in
            :class:`lstm_ext.LSTM`. Arrays alone do not tell them: None stands for sigmoid and tanh there, and for the
            layer's own where a layer is given.
        batch_first: as in :class:`lstm_ext.LSTM`; None for the layer's own (``time_major`` of Keras 2), or Keras'.

    Returns:
        a layer with new parameters and the activations of Keras' layer: a :class:`lstm_ext.GRU` where the arrays are
        those of one. The bias of an LSTM becomes ``bias_ih``; ``bias_hh`` is zero. Dropout is left out, with a warning.

    Raises:
        TypeError: an array that is none; a path.
        ValueError: a shape that does not fit; an activation that is not the layer's; or what this layer does not have,
            by its name in Keras: an activation that ONNX's LSTM does not have, ``go_backwards``, a ``merge_mode`` other
            than concat, a layer of another class; of a GRU ``reset_after=False`` and other activations.
    """
    if isinstance(source, (str, os.PathLike)):
        raise TypeError(
            f"from_keras: expected layers or a list of arrays, got the path {os.fspath(source)}: "
            "keras.models.load_model reads it"
        )
    if hasattr(source, "get_weights"):
        source = [source]
    if not isinstance(source, Sequence):
        raise TypeError(f"from_keras: expected layers or a list of arrays, got {type(source).__name__}")
    found: dict[str, Any] = {}
    dropped: dict[str, None] = {}  # in the order found
    if source and all(hasattr(layer, "get_weights") for layer in source):
        stack = []
        for layer in source:
            inner, settings = _keras_layers(layer)
            found = found or settings
            if settings != found:
                differ = [name for name, value in settings.items() if value != found[name]]
                raise _KERAS.refuse(f"layers that differ in {', '.join(differ)}: make a layer of each")
            rates = [
                (name, getattr(one, name, 0)) for one in inner for name in ("dropout", "recurrent_dropout")
            ]
            dropped |= dict.fromkeys([f"{name}={rate}" for name, rate in rates if rate])
            stack.append(_keras_directions(layer.get_weights()))
    else:
        stack = [_keras_directions(source)]
    time_major = found.pop("time_major", False)
    given = {"gate_activation": gate_activation, "cell_activation": cell_activation}
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items() if found else ():
        if activation_text(*(found | {name: value}).values()) != activation_text(*found.values()):
            raise _KERAS.refuse(f"{name}: expected None or that of the layer, {found[name]!r}, got {value!r}")
    options = found | given
    if stack and stack[0] and stack[0][0].gates == 3:
        if activation_text(*(options.get(n, d) for n, d in _PLAIN_FUNCTIONS.items())):
            raise _KERAS.refuse(
                "a GRU with other activations than sigmoid and tanh, which this layer does not have"
            )
        options = {}
    made = _KERAS.layer(stack, not time_major if batch_first is None else batch_first, **options)
    if dropped:
        warnings.warn(
            f"from_keras: {', '.join(dropped)}: left out, so the new layer has Keras' values in inference only",
            stacklevel=2,
        )
    return made


def to_keras(layer: LSTM | nn.LSTM) -> list[list[Tensor]]:
    """The arrays that ``set_weights`` of ``keras.layers.LSTM``, or of a ``Bidirectional`` of one, takes.

    Args:
        layer: an :class:`lstm_ext.LSTM` or a ``torch.nn.LSTM``. The Keras layer needs the same ``use_bias`` and
            activations, ``return_sequences=True`` and, where this layer is not ``batch_first``, its input transposed.

    Returns:
        one list of new tensors for each layer of the stack: kernel (I, 4H), recurrent_kernel (H, 4H) and, if ``bias``,
        bias (4H), the sum of both, with the gates i, f, c, o; and the same again for the way back.

    Raises:
        TypeError: it is no such layer.
        ValueError: the layer has what Keras' does not have: a projection or an option, by its name.
    """
    if not isinstance(layer, nn.RNNBase) or layer.mode != "LSTM":
        raise TypeError(f"to_keras: expected an LSTM, got {type(layer).__name__}")
    ours = {"gate_activation", "cell_activation", "forget_bias", "recompute"}
    unknown = [name for name in layer._given if name not in ours] if isinstance(layer, LSTM) else []
    if isinstance(layer, LSTM):
        gate, candidate, output = split_text(activations_of(layer))
        unknown += ["two cell_activations"] if candidate != output else []
        unknown += [
            name
            for name, numbers in (gate, candidate)
            if name not in _IN_KERAS or numbers not in _IN_KERAS[name]
        ]
    if layer.proj_size or unknown:
        raise ValueError(f"to_keras: the LSTM of Keras has no {', '.join(unknown or ['proj_size'])}")
    stack = []
    for k in range(layer.num_layers):
        arrays: list[Tensor] = []
        for suffix in ("", "_reverse")[: 1 + layer.bidirectional]:
            W, U, *biases = [
                getattr(layer, f"{name}_l{k}{suffix}").detach()
                for name in ("weight_ih", "weight_hh", *("bias_ih", "bias_hh")[: 2 * layer.bias])
            ]
            arrays += [W.T.contiguous(), U.T.contiguous(), *([biases[0] + biases[1]] if biases else [])]
        stack.append(arrays)
    return stack


def from_tensorflow(
    cells: Arrays | Sequence[Arrays],
    *,
    backward: Arrays | Sequence[Arrays] | None = None,
    forget_bias: float = 1.0,
    cell_clip: float | None = None,
    activation: Activation = "tanh",
    batch_first: bool = True,
) -> LSTM:
    """A layer with the variables of TensorFlow's ``LSTMCell``, ``BasicLSTMCell``, ``LSTMBlockCell`` or ``BlockLSTM``.

    ``keras.layers.LSTM`` is another layer: see :func:`from_keras`.

    Args:
        cells: the variables of a cell by the last part of their names, or of a stack of cells: ``kernel``
            (I + P, 4H), gates in the order i, c, f, o; ``bias`` (4H); with peepholes ``w_i_diag``, ``w_f_diag`` and
            ``w_o_diag`` (H); with a projection ``projection/kernel`` (H, P).
        backward: those of the other direction of ``bidirectional_dynamic_rnn``.
        forget_bias: the number that the cell adds at run time; 1 unless it was made with another one.
        cell_clip: the cell's ``cell_clip``. While a clip is active, TensorFlow's gradient passes straight through it,
            and ours is that of ``torch.clamp``.
        activation: the cell's ``activation``, as ``cell_activation`` of :class:`lstm_ext.LSTM`.
        batch_first: as in :class:`lstm_ext.LSTM`.

    Returns:
        a layer with new parameters.

    Raises:
        TypeError, ValueError: a variable that is missing, unknown or of another shape; the text names it.
    """
    read = Source("from_tensorflow", "igfo")
    diagonals = ("w_i_diag", "w_f_diag", "w_o_diag")
    known = {"kernel", "bias", *diagonals, "projection/kernel"}

    def direction(cell: Arrays) -> Direction:
        named = {}
        for full, value in cell.items():
            ends = f"/{str(full).split(':')[0]}"
            name = max([k for k in known if ends.endswith(f"/{k}")], key=len, default=None)
            if name is None:
                raise read.refuse(f"{full}: expected variables named {', '.join(sorted(known))}")
            if name in named:
                raise read.refuse(f"{full}: expected the variables of one cell, got a second {name}")
            named[name] = value
        if "kernel" not in named:
            raise read.refuse(f"expected a variable named kernel, got {', '.join(map(str, cell)) or 'none'}")
        found = read.joint(
            named["kernel"],
            named.get("bias"),
            ("kernel", "bias", "projection/kernel"),
            named.get("projection/kernel"),
        )
        if any(name in named for name in diagonals):
            missing = [name for name in diagonals if name not in named]
            if missing:
                raise read.refuse(f"expected all peepholes, got none of {', '.join(missing)}")
            units = found.sizes[1]
            i, f, o = (read.array(named[name], name, units) for name in diagonals)
            found.peepholes = i, f, o
        return read.with_forget_bias(found, forget_bias)

    def stacked(given: Any, what: str) -> list[Arrays]:
        return [read.named(cell, what) for cell in (given if isinstance(given, Sequence) else [given])]

    there = stacked(cells, "cells")
    back = None if backward is None else stacked(backward, "backward")
    if back is not None and len(back) != len(there):
        raise read.refuse(
            f"backward: expected as many cells as there are forward, {len(there)}, got {len(back)}"
        )
    stack = [[direction(cell)] for cell in there]
    for k, cell in enumerate(back or ()):
        stack[k].append(direction(cell))
    return read.layer(stack, batch_first, cell_clip=cell_clip, cell_activation=activation)


def from_jax(
    params: Any,
    *,
    gate_activation: Activation = "sigmoid",
    cell_activation: Activation = "tanh",
    batch_first: bool = True,
) -> LSTM:
    """A layer with the parameters of an LSTM cell of Flax, Haiku or Equinox; which of them, their names say.

    Args:
        params: those of one cell, or a sequence, which becomes a stack. Flax (``LSTMCell``, ``OptimizedLSTMCell``): a
            tree with ``ii``, ``if``, ``ig``, ``io`` and ``hi``, ``hf``, ``hg``, ``ho``. Haiku (``LSTM``): a tree with
            ``w`` (I + H, 4H), gates i, g, f, o, and ``b``; it adds 1 to the forget gate at run time. Equinox
            (``LSTMCell``): the cell, or ``weight_ih`` (4H, I), ``weight_hh`` (4H, H) and ``bias`` by name. The tree
            may lie within others, as ``init`` gives it.
        gate_activation, cell_activation: ``gate_fn`` and ``activation_fn`` of Flax, as in :class:`lstm_ext.LSTM`.
        batch_first: as in :class:`lstm_ext.LSTM`.

    Returns:
        a layer with new parameters.

    Raises:
        TypeError, ValueError: parameters of no such cell, or of several; an array of another shape.
    """
    cells = params if isinstance(params, (list, tuple)) else [params]
    read = Source("from_jax", "ifgo")
    options = {"gate_activation": gate_activation, "cell_activation": cell_activation}
    return read.layer([[_jax_cell(cell)] for cell in cells], batch_first, **options)


FLAX = ("ii", "if", "ig", "io", "hi", "hf", "hg", "ho")


def _jax_cell(params: Any) -> Direction:
    def is_cell(tree: Arrays) -> bool:
        return set(FLAX) <= set(tree) or {"w", "b"} <= set(tree) or {"weight_ih", "weight_hh"} <= set(tree)

    def found_in(tree: Any) -> Iterator[Arrays]:
        if not isinstance(tree, Mapping):
            return
        if is_cell(tree):
            yield tree
            return
        for part in tree.values():
            yield from found_in(part)

    read = Source("from_jax", "ifgo")
    if not isinstance(params, Mapping) and hasattr(params, "weight_ih"):  # a cell of Equinox
        params = {name: getattr(params, name) for name in ("weight_ih", "weight_hh", "bias")}
    cells = list(found_in(params))
    if len(cells) != 1:
        raise read.refuse(
            f"expected the parameters of one LSTM cell of Flax, Haiku or Equinox, found {len(cells)} in it"
        )
    cell = cells[0]
    if "w" in cell:
        haiku = Source("from_jax", "igfo")
        return haiku.with_forget_bias(haiku.joint(cell["w"], cell["b"], ("w", "b")), 1.0)
    if "weight_ih" in cell:
        W, U = (read.array(cell[name], name, None, None) for name in ("weight_ih", "weight_hh"))
        return read.matrices(W.T, U.T, cell.get("bias"), ("weight_ih", "weight_hh", "bias"))

    for name in FLAX:
        if "kernel" not in read.named(cell[name], name):
            raise read.refuse(f"{name}: expected a kernel, got {', '.join(map(str, cell[name])) or 'none'}")

    def joined(side: str) -> Tensor:
        kernels = [read.array(cell[f"{side}{g}"]["kernel"], f"{side}{g}/kernel", None, None) for g in "ifgo"]
        if len({k.shape for k in kernels}) != 1:
            raise read.refuse(f"expected {side}i, {side}f, {side}g and {side}o of one shape")
        return torch.cat(kernels, 1)

    U = joined("h")
    biases = [cell[f"h{g}"].get("bias") for g in "ifgo"]
    b = None
    if any(bias is not None for bias in biases):
        b = torch.cat(
            [read.array(bias, f"h{g}/bias", U.size(0)) for g, bias in zip("ifgo", biases, strict=True)]
        )
    return read.matrices(joined("i"), U, b, ("ii ... io", "hi ... ho", "bias"))


def from_haste(arrays: Arrays, *, zoneout: float = 0.0, batch_first: bool = False) -> LSTM:
    """A layer with the parameters of Haste's ``LSTM``, of its torch or TensorFlow package.

    Args:
        arrays: ``kernel`` (I, 4H), ``recurrent_kernel`` (H, 4H), gates in the order i, g, f, o, and ``bias`` (4H), as
            the state dict of ``haste_pytorch.LSTM`` has them.
        zoneout: the layer's zoneout, of h.
        batch_first: as in :class:`lstm_ext.LSTM`.

    Returns:
        a layer with new parameters. Haste's forget bias is the initial value of a bias, and so in the array.

    Raises:
        TypeError, ValueError: an array that is missing or of another shape; the text names it.
    """
    read = Source("from_haste", "igfo")
    names = ("kernel", "recurrent_kernel", "bias")
    kernel, recurrent, bias = read.taken(arrays, "arrays", names)
    stack = [[read.matrices(kernel, recurrent, bias, names)]]
    return read.layer(stack, batch_first, zoneout=zoneout)


def from_mlx(source: Any, *, batch_first: bool = True) -> LSTM:
    """A layer with the parameters of ``mlx.nn.LSTM``.

    Args:
        source: the layer, its ``parameters()``, or a sequence of either, which becomes a stack: ``Wx`` (4H, I), ``Wh``
            (4H, H), gates in the order i, f, g, o, and ``bias`` (4H), if it has one.
        batch_first: as in :class:`lstm_ext.LSTM`.

    Returns:
        a layer with new parameters.

    Raises:
        TypeError, ValueError: an array that is missing or of another shape; the text names it.
    """
    read = Source("from_mlx", "ifgo")

    def direction(one: Any) -> Direction:
        arrays = one.parameters() if hasattr(one, "parameters") else one
        found = read.taken(arrays, "source", ("Wx", "Wh"))
        W, U = (read.array(x, name, None, None) for x, name in zip(found, ("Wx", "Wh"), strict=True))
        return read.matrices(W.T, U.T, arrays.get("bias"), ("Wx", "Wh", "bias"))

    layers = source if isinstance(source, (list, tuple)) else [source]
    return read.layer([[direction(one)] for one in layers], batch_first)


def from_torch_ao(module: nn.Module, weights: torch.dtype | None = torch.int8) -> LSTM:
    """A frozen layer with the weights of torch's dynamically quantized LSTM.

    torch's layer multiplies whole numbers, and also rounds each step's input and state to 8 bits. Here the weights are
    rounded, and everything else is computed in float32, so results are nearer to those before quantization.

    Args:
        module: a ``torch.ao.nn.quantized.dynamic.LSTM``, of qint8 or float16.
        weights: as in :func:`lstm_ext.freeze`: torch.int8 rounds the numbers once more, by a factor for each row where
            torch has one for the matrix; None keeps them.

    Returns:
        a :class:`lstm_ext.FrozenLSTM`. :func:`lstm_ext.unfreeze` gives a layer that can be trained.

    Raises:
        TypeError: it is no such module.
        RuntimeError: the compiled kernels are not there.
    """
    values = getattr(module, "_all_weight_values", None)
    if values is None or getattr(module, "mode", None) != "LSTM" or not hasattr(module, "get_weight"):
        raise TypeError(
            f"from_torch_ao: expected a torch.ao.nn.quantized.dynamic.LSTM, got {type(module).__name__}"
        )
    found: Any = module
    arrays = {
        name: w.dequantize() if w.is_quantized else w.float()
        for name, w in {**found.get_weight(), **found.get_bias()}.items()
    }
    layer = LSTM(
        found.input_size, found.hidden_size, found.num_layers, bias=found.bias, batch_first=found.batch_first,
        dropout=found.dropout, bidirectional=found.bidirectional,
    )  # fmt: skip
    layer.load_state_dict({name: arrays[name] for name in layer.state_dict()})
    return freeze(layer, weights)
