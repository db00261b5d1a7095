"""Layers with the weights of other frameworks: ``lstm_ext.from_keras`` and its like.

No framework has to be installed. An importer takes arrays: anything that NumPy or torch takes for one. An object of a
framework is read by its attributes, and only :func:`from_onnx` imports its package, to read a model.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .lstm import LSTM

__all__ = ["from_haste", "from_jax", "from_keras", "from_mlx", "from_onnx", "from_tensorflow"]

PEEPHOLES = ("weight_ci", "weight_cf", "weight_co")


# ---- arrays in torch's form


@dataclass
class _Direction:
    """A direction of a layer: weights (4H, features) with the gates i, f, g, o."""

    weight_ih: Tensor
    weight_hh: Tensor
    bias: Tensor | None
    weight_hr: Tensor | None = None
    peepholes: tuple[Tensor, Tensor, Tensor] | None = None  # i, f and o

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Input, hidden units, and those of the projection or 0."""
        projected = 0 if self.weight_hr is None else self.weight_hr.size(0)
        return self.weight_ih.size(1), self.weight_ih.size(0) // 4, projected


class _Source:
    """Reads the arrays of a framework, and names the importer and the array in errors."""

    def __init__(self, function: str, order: str) -> None:
        self.function, self.order = function, order

    def array(self, value: Any, name: str, *shape: int | None) -> Tensor:
        """A copy. None in the shape stands for any size.

        Raises:
            TypeError: it is no array of floating-point numbers.
            ValueError: it has another shape.
        """
        given = value
        if not isinstance(value, Tensor):
            if callable(getattr(value, "numpy", None)):  # a variable of TensorFlow
                value = value.numpy()
            elif hasattr(value, "__array__"):
                value = value.__array__()
            try:
                value = torch.tensor(value)
            except (TypeError, ValueError, RuntimeError) as error:
                kind = type(given).__name__
                raise TypeError(f"{self.function}: {name}: expected an array, got {kind}") from error
        if not value.is_floating_point():
            raise TypeError(f"{self.function}: {name}: expected a floating-point dtype, got {value.dtype}")
        got = tuple(value.shape)
        if len(got) != len(shape) or any(a not in (None, b) for a, b in zip(shape, got, strict=True)):
            expected = "(" + ", ".join("any" if n is None else str(n) for n in shape)
            expected += ",)" if len(shape) == 1 else ")"
            raise ValueError(f"{self.function}: {name}: expected shape {expected}, got {got}")
        return value.detach().clone()

    def gates(self, x: Tensor) -> Tensor:
        """Blocks along the first axis, one a gate, in torch's order."""
        blocks = dict(zip(self.order, x.chunk(4), strict=True))
        return torch.cat([blocks[gate] for gate in "ifgo"])

    def refuse(self, what: str) -> ValueError:
        return ValueError(f"{self.function}: {what}")

    def matrices(self, kernel: Any, recurrent: Any, bias: Any, names: Sequence[str]) -> _Direction:
        """From (features, 4H), (H, 4H) and (4H) or None."""
        U = self.array(recurrent, names[1], None, None)
        if U.size(1) != 4 * U.size(0):
            raise self.refuse(f"{names[1]}: expected shape (H, 4 H), got {tuple(U.shape)}")
        W = self.array(kernel, names[0], None, U.size(1))
        b = None if bias is None else self.gates(self.array(bias, names[2], U.size(1)))
        return _Direction(self.gates(W.T), self.gates(U.T), b)

    def joint(self, kernel: Any, bias: Any, names: Sequence[str], projection: Any = None) -> _Direction:
        """From one (features + P, 4H) of input and state, (4H) and (H, P) or None."""
        both = self.array(kernel, names[0], None, None)
        hidden = both.size(1) // 4
        P = None if projection is None else self.array(projection, names[2], hidden, None)
        features = both.size(0) - (hidden if P is None else P.size(1))
        if both.size(1) % 4 or features < 1:
            raise self.refuse(f"{names[0]}: expected shape (features + H, 4 H), got {tuple(both.shape)}")
        b = None if bias is None else self.gates(self.array(bias, names[1], 4 * hidden))
        W, U = both.T[:, :features], both.T[:, features:]
        return _Direction(self.gates(W), self.gates(U), b, None if P is None else P.T)

    def with_forget_bias(self, direction: _Direction, value: float) -> _Direction:
        """The number that a framework adds to the forget gate's preactivation at run time."""
        hidden = direction.sizes[1]
        if direction.bias is None:
            direction.bias = direction.weight_ih.new_zeros(4 * hidden)
        direction.bias[hidden : 2 * hidden] += value
        return direction

    def layer(self, stack: Sequence[Sequence[_Direction]], batch_first: bool, **options: Any) -> LSTM:
        """A layer with these parameters, of one direction or two for each of the stack."""
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
        module = LSTM(
            features, hidden, len(stack), bias=bias, batch_first=batch_first, bidirectional=len(stack[0]) == 2,
            proj_size=projected, device="meta", peephole=peephole, **options,
        )  # fmt: skip
        zeros = first.weight_ih.new_zeros
        for k, directions in enumerate(stack):
            for direction, suffix in zip(directions, ("", "_reverse"), strict=False):
                values: dict[str, Tensor | None] = {
                    "weight_ih": direction.weight_ih,
                    "weight_hh": direction.weight_hh,
                    "weight_hr": direction.weight_hr,
                }
                if bias:
                    values["bias_ih"] = zeros(4 * hidden) if direction.bias is None else direction.bias
                    values["bias_hh"] = zeros(4 * hidden)
                if peephole:
                    values |= zip(PEEPHOLES, direction.peepholes or (zeros(hidden),) * 3, strict=True)
                for name, value in values.items():
                    if value is not None:
                        parameter = nn.Parameter(value.to(first.weight_ih.dtype).contiguous())
                        setattr(module, f"{name}_l{k}{suffix}", parameter)
        module._init_flat_weights()
        return module


# ---- the frameworks


def from_keras(source: Any, *, batch_first: bool = True) -> LSTM:
    """A layer with the weights of ``keras.layers.LSTM``, of Keras 2 or 3 on any backend, or ``tf.keras``.

    Keras returns the last output unless ``return_sequences`` is set: here that is h_n.

    Args:
        source: a built ``LSTM``, a ``Bidirectional`` of one, or a sequence of such layers, which becomes a stack; or
            the list of arrays that ``get_weights()`` gives: kernel (I, 4H), recurrent_kernel (H, 4H) and, unless
            ``use_bias=False``, bias (4H), gates in the order i, f, c, o, and the same again for the way back.
        batch_first: whether input and output are (B, T, features), as in Keras.

    Returns:
        a layer with new parameters. The bias becomes ``bias_ih``; ``bias_hh`` is zero.

    Raises:
        TypeError: an array that is none.
        ValueError: a shape that does not fit; or what this layer does not have, by its name in Keras: another
            activation than tanh and sigmoid, ``go_backwards``, dropout, a ``merge_mode`` other than concat.
    """
    read = _Source("from_keras", "ifgo")
    names = ("kernel", "recurrent_kernel", "bias")

    def directions(weights: Sequence[Any]) -> list[_Direction]:
        if len(weights) not in (2, 3, 4, 6):
            raise read.refuse(f"expected 2, 3, 4 or 6 arrays, got {len(weights)}")
        each = 2 if len(weights) in (2, 4) else 3
        parts = [[*weights[k : k + each], None][:3] for k in range(0, len(weights), each)]
        return [read.matrices(*part, names) for part in parts]

    def check(layer: Any) -> None:
        for name, expected in (("activation", "tanh"), ("recurrent_activation", "sigmoid")):
            found = getattr(layer, name, expected)
            found = getattr(found, "__name__", found)
            if found != expected:
                raise read.refuse(f"{name}: expected {expected}, got {found}")
        for name in ("go_backwards", "time_major", "dropout", "recurrent_dropout"):
            if getattr(layer, name, False):
                raise read.refuse(
                    f"{name}={getattr(layer, name)}: this layer has not that; get_weights() gives the arrays alone"
                )

    def of_layer(layer: Any) -> list[_Direction]:
        inner = [layer]
        if hasattr(layer, "forward_layer"):
            if layer.merge_mode != "concat":
                raise read.refuse(f"merge_mode: expected concat, got {layer.merge_mode}")
            inner = [layer.forward_layer, layer.backward_layer]
        for one in inner:
            if type(one).__name__ != "LSTM":
                raise read.refuse(f"expected layers of the class LSTM, got {type(one).__name__}")
        check(inner[0])
        return directions(layer.get_weights())

    if hasattr(source, "get_weights"):
        source = [source]
    if isinstance(source, Sequence) and source and all(hasattr(layer, "get_weights") for layer in source):
        return read.layer([of_layer(layer) for layer in source], batch_first)
    if not isinstance(source, Sequence):
        raise TypeError(f"from_keras: expected layers or a list of arrays, got {type(source).__name__}")
    return read.layer([directions(source)], batch_first)


Arrays = Mapping[str, Any]


def from_tensorflow(
    cells: Arrays | Sequence[Arrays],
    *,
    backward: Arrays | Sequence[Arrays] | None = None,
    forget_bias: float = 1.0,
    cell_clip: float | None = None,
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
        batch_first: whether input and output are (B, T, features).

    Returns:
        a layer with new parameters.

    Raises:
        TypeError, ValueError: a variable that is missing, unknown or of another shape; the text names it.
    """
    read = _Source("from_tensorflow", "igfo")
    known = {"kernel", "bias", "w_i_diag", "w_f_diag", "w_o_diag", "projection/kernel"}
    diagonals = ("w_i_diag", "w_f_diag", "w_o_diag")

    def direction(cell: Arrays) -> _Direction:
        named = {}
        for full, value in cell.items():
            name = next(
                (
                    k
                    for k in sorted(known, key=len, reverse=True)
                    if f"/{full.split(':')[0]}".endswith(f"/{k}")
                ),
                None,
            )
            if name is None:
                raise read.refuse(f"{full}: expected variables named {', '.join(sorted(known))}")
            named[name] = value
        if "kernel" not in named:
            raise read.refuse(f"expected a variable named kernel, got {', '.join(cell) or 'none'}")
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

    there, back = ([x] if isinstance(x, Mapping) else x for x in (cells, backward))
    if back is not None and len(back) != len(there):
        raise read.refuse(
            f"backward: expected as many cells as there are forward, {len(there)}, got {len(back)}"
        )
    stack = [[direction(cell)] for cell in there]
    for k, cell in enumerate(back or ()):
        stack[k].append(direction(cell))
    return read.layer(stack, batch_first, cell_clip=cell_clip)


def from_jax(params: Any, *, batch_first: bool = True) -> LSTM:
    """A layer with the parameters of an LSTM cell of Flax, Haiku or Equinox; which of them, their names say.

    Args:
        params: those of one cell, or a sequence, which becomes a stack. Flax (``LSTMCell``, ``OptimizedLSTMCell``): a
            tree with ``ii``, ``if``, ``ig``, ``io`` and ``hi``, ``hf``, ``hg``, ``ho``. Haiku (``LSTM``): a tree with
            ``w`` (I + H, 4H), gates i, g, f, o, and ``b``; it adds 1 to the forget gate at run time. Equinox
            (``LSTMCell``): the cell, or ``weight_ih`` (4H, I), ``weight_hh`` (4H, H) and ``bias`` by name. The tree
            may lie within others, as ``init`` gives it.
        batch_first: whether input and output are (B, T, features).

    Returns:
        a layer with new parameters.

    Raises:
        TypeError, ValueError: parameters of no such cell, or of several; an array of another shape.
    """
    cells = params if isinstance(params, (list, tuple)) else [params]
    read = _Source("from_jax", "ifgo")
    return read.layer([[_jax_cell(cell)] for cell in cells], batch_first)


FLAX = ("ii", "if", "ig", "io", "hi", "hf", "hg", "ho")


def _jax_cell(params: Any) -> _Direction:
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

    read = _Source("from_jax", "ifgo")
    if not isinstance(params, Mapping) and hasattr(params, "weight_ih"):  # a cell of Equinox
        params = {name: getattr(params, name) for name in ("weight_ih", "weight_hh", "bias")}
    cells = list(found_in(params))
    if len(cells) != 1:
        raise read.refuse(
            f"expected the parameters of one LSTM cell of Flax, Haiku or Equinox, found {len(cells)} in it"
        )
    cell = cells[0]
    if "w" in cell:
        haiku = _Source("from_jax", "igfo")
        return haiku.with_forget_bias(haiku.joint(cell["w"], cell["b"], ("w", "b")), 1.0)
    if "weight_ih" in cell:
        W, U = (read.array(cell[name], name, None, None) for name in ("weight_ih", "weight_hh"))
        return read.matrices(W.T, U.T, cell.get("bias"), ("weight_ih", "weight_hh", "bias"))

    def joined(side: str) -> Tensor:
        kernels = [read.array(cell[f"{side}{g}"]["kernel"], f"{side}{g}/kernel", None, None) for g in "ifgo"]
        if len({k.shape for k in kernels}) != 1:
            raise read.refuse(f"expected {side}i, {side}f, {side}g and {side}o of one shape")
        return torch.cat(kernels, 1)

    U = joined("h")
    biases = [cell[f"h{g}"].get("bias") for g in "ifgo"]
    b = None
    if all(bias is not None for bias in biases):
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
        batch_first: whether input and output are (B, T, features).

    Returns:
        a layer with new parameters. Haste's forget bias is the initial value of a bias, and so in the array.

    Raises:
        TypeError, ValueError: an array that is missing or of another shape; the text names it.
    """
    read = _Source("from_haste", "igfo")
    names = ("kernel", "recurrent_kernel", "bias")
    missing = [name for name in names if name not in arrays]
    if missing:
        raise read.refuse(f"expected {', '.join(names)}, got none of {', '.join(missing)}")
    stack = [[read.matrices(*(arrays[name] for name in names), names)]]
    return read.layer(stack, batch_first, zoneout=zoneout)


def from_mlx(source: Any, *, batch_first: bool = True) -> LSTM:
    """A layer with the parameters of ``mlx.nn.LSTM``.

    Args:
        source: the layer, its ``parameters()``, or a sequence of either, which becomes a stack: ``Wx`` (4H, I), ``Wh``
            (4H, H), gates in the order i, f, g, o, and ``bias`` (4H), if it has one.
        batch_first: whether input and output are (B, T, features), as in MLX.

    Returns:
        a layer with new parameters.

    Raises:
        TypeError, ValueError: an array that is missing or of another shape; the text names it.
    """
    read = _Source("from_mlx", "ifgo")

    def direction(one: Any) -> _Direction:
        arrays = one if isinstance(one, Mapping) else one.parameters()
        missing = [name for name in ("Wx", "Wh") if name not in arrays]
        if missing:
            raise read.refuse(f"expected Wx and Wh, got none of {', '.join(missing)}")
        W, U = (read.array(arrays[name], name, None, None) for name in ("Wx", "Wh"))
        return read.matrices(W.T, U.T, arrays.get("bias"), ("Wx", "Wh", "bias"))

    layers = source if isinstance(source, (list, tuple)) else [source]
    return read.layer([[direction(one)] for one in layers], batch_first)


def from_onnx(source: Any) -> dict[str, LSTM]:
    """The LSTM nodes of an ONNX model as layers, by the names of the nodes. Reading needs the package ``onnx``.

    A node without a name is called by its first output. Initial states and ``sequence_lens`` are inputs of a node, and
    arguments of a call here: ``hx`` and ``lengths``. A node's output is (T, D, B, H), ours (T, B, D * H).

    Args:
        source: an ``onnx.ModelProto``, or the path of a file.

    Returns:
        one :class:`lstm_ext.LSTM` for each node, with new parameters; ``batch_first`` where a node has ``layout=1``,
        ``coupled_gates`` where it has ``input_forget=1``, ``peephole`` where it has ``P``. Both biases become
        ``bias_ih``. Only the main graph is read, not those within its nodes.

    Raises:
        ImportError: the package ``onnx`` is not installed.
        ValueError: a node whose weights are not initializers, or with what this layer does not have, by its name:
            ``clip``, activations other than Sigmoid, Tanh, Tanh, ``direction=reverse``.
    """
    import onnx
    from onnx import helper, numpy_helper

    read = _Source("from_onnx", "iofg")
    if isinstance(source, (str, os.PathLike)):
        source = onnx.load(os.fspath(source))
    known = {t.name: numpy_helper.to_array(t) for t in source.graph.initializer}
    known |= {
        node.output[0]: numpy_helper.to_array(node.attribute[0].t)
        for node in source.graph.node
        if node.op_type == "Constant" and node.attribute[0].name == "value"
    }
    layers: dict[str, LSTM] = {}
    for node in source.graph.node:
        if node.op_type != "LSTM":
            continue
        name = node.name or next(filter(None, node.output))
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        layers[name] = _onnx_layer(read, name, list(node.input), attributes, known)
    return layers


def _onnx_layer(
    read: _Source, node: str, inputs: list[str], attributes: dict[str, Any], known: Mapping[str, Any]
) -> LSTM:
    def refuse(what: str) -> ValueError:
        return read.refuse(f"node {node}: {what}")

    direction = attributes.pop("direction", b"forward").decode()
    if direction not in ("forward", "bidirectional"):
        raise refuse(f"direction: expected forward or bidirectional, got {direction}")
    count = 2 if direction == "bidirectional" else 1
    activations = [a.decode() for a in attributes.pop("activations", [])]
    if activations and [a.lower() for a in activations] != ["sigmoid", "tanh", "tanh"] * count:
        raise refuse(f"activations: expected Sigmoid, Tanh, Tanh, got {', '.join(activations)}")
    hidden = attributes.pop("hidden_size", None)
    coupled, layout = attributes.pop("input_forget", 0), attributes.pop("layout", 0)
    for name in ("activation_alpha", "activation_beta"):  # these activations have none
        attributes.pop(name, None)
    if attributes:
        raise refuse(f"expected no attribute {', '.join(sorted(attributes))}")

    def array(place: int, name: str, *shape: int | None) -> Tensor | None:
        given = inputs[place] if place < len(inputs) else ""
        if not given:
            return None
        if given not in known:
            raise refuse(f"{name}: expected an initializer, got the result {given} of another node")
        return read.array(known[given], f"node {node}: {name}", *shape)

    R = array(2, "R", count, None, None)
    if R is None:
        raise refuse("R: expected an input, got none")
    H = R.size(2) if hidden is None else hidden
    R = array(2, "R", count, 4 * H, H)
    W, B = array(1, "W", count, 4 * H, None), array(3, "B", count, 8 * H)
    P = array(7, "P", count, 3 * H)
    if W is None or R is None:
        raise refuse("W: expected an input, got none")
    directions = []
    for d in range(count):
        bias = None if B is None else read.gates(B[d, : 4 * H]) + read.gates(B[d, 4 * H :])
        i_o_f = None if P is None else P[d].chunk(3)
        peepholes = None if i_o_f is None else (i_o_f[0], i_o_f[2], i_o_f[1])
        directions.append(_Direction(read.gates(W[d]), read.gates(R[d]), bias, None, peepholes))
    return read.layer([directions], bool(layout), coupled_gates=bool(coupled))
