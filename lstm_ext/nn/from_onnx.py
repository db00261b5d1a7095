"""Layers from the LSTM and GRU nodes of an ONNX model: ``lstm_ext.from_onnx``."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ..layer.activations import ACTIVATIONS, ONNX_NAMES, Activation
from .from_frameworks import Direction, Source
from .gru import GRU
from .lstm import LSTM

# ONNX names defaults that ONNX Runtime does not have: it takes 0.
_NO_DEFAULT = ("affine", "scaled_tanh", "thresholded_relu")


def from_onnx(source: Any) -> dict[str, LSTM | GRU]:
    """The standard LSTM and GRU nodes of an ONNX model as layers, by the nodes' names. It needs the package ``onnx``.

    A node without a name is called by its first output. Where several would have one name, the second is called
    ``name_2``, and so on. Initial states and ``sequence_lens`` are inputs of a node, and arguments of a call here:
    ``hx`` and ``lengths``. A node's output is (T, D, B, H), ours (T, B, D * H).

    Args:
        source: an ``onnx.ModelProto``, or the path of a file.

    Returns:
        one :class:`lstm_ext.LSTM` for each node, with new parameters; ``batch_first`` where a node has ``layout=1``,
        ``coupled_gates`` where it has ``input_forget=1``, ``peephole`` where it has ``P``, ``preactivation_clip``
        where it has ``clip``, and its activations. Both biases become ``bias_ih``. Of a GRU node it is a
        :class:`lstm_ext.GRU`. Only the main graph is read, not those within its nodes, and only the initializers of
        these nodes.

    Raises:
        ImportError: the package ``onnx`` is not installed.
        OSError: the file cannot be read.
        TypeError: it is neither a model nor a path, or weights are not of a floating-point dtype.
        ValueError: the file is no model; a node does not follow the standard; its weights are not initializers; or it
            has what this layer does not have, by its name: ``direction=reverse``, other activations in one direction
            than in the other; of a GRU ``linear_before_reset=0``, ``clip`` and other activations than sigmoid and tanh.
            The text names the node, and the input or attribute.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    readers = {"LSTM": Source("from_onnx", "iofg"), "GRU": Source("from_onnx", "zrn")}
    if isinstance(source, (str, os.PathLike)):
        try:
            source = onnx.load(os.fspath(source))
        except DecodeError as error:
            raise readers["LSTM"].refuse(
                f"expected a file with an ONNX model, got {os.fspath(source)!r}"
            ) from error
    if not isinstance(source, onnx.ModelProto):
        raise TypeError(f"from_onnx: expected an onnx.ModelProto or a path, got {type(source).__name__}")
    known = {t.name: t for t in source.graph.initializer}
    known |= {
        name: attribute.t
        for node in source.graph.node
        if node.op_type == "Constant"
        for name in node.output[:1]
        for attribute in node.attribute
        if attribute.name == "value"
    }
    nodes = [n for n in source.graph.node if n.op_type in readers and n.domain in ("", "ai.onnx")]
    names = [node.name or next(filter(None, node.output), node.op_type) for node in nodes]
    layers: dict[str, LSTM | GRU] = {}
    for node, name in zip(nodes, names, strict=True):
        if name in layers:
            numbered = (f"{name}_{k}" for k in itertools.count(2))
            name = next(n for n in numbered if n not in layers and n not in names)
        layers[name] = _onnx_layer(readers[node.op_type], name, node, known)
    return layers


def _onnx_layer(read: Source, name: str, node: Any, known: Mapping[str, Any]) -> LSTM | GRU:
    """``node``: a NodeProto. ``known``: TensorProtos."""
    from onnx import numpy_helper

    def refuse(what: str) -> ValueError:
        return read.refuse(f"node {name}: {what}")

    attributes = _attributes(node, refuse)
    direction = attributes.pop("direction", b"forward").decode(errors="replace")
    if direction not in ("forward", "bidirectional"):
        raise refuse(
            f"direction: expected forward or bidirectional, got {direction}: make it forward, and flip input and output"
        )
    count = 2 if direction == "bidirectional" else 1
    gates = len(read.order)
    inputs = 6 if gates == 3 else 8
    if gates == 3:
        _refuse_of_gru(attributes, count, refuse)
    activations = _activations(attributes, count, refuse)
    clip = attributes.pop("clip", None)
    hidden = attributes.pop("hidden_size", None)
    flags = {flag: attributes.pop(flag, 0) for flag in ("input_forget", "layout")}
    for flag, value in flags.items():
        if value not in (0, 1):
            raise refuse(f"{flag}: expected 0 or 1, got {value}")
    if len(node.input) > inputs:
        raise refuse(f"expected at most {inputs} inputs, got {len(node.input)}")

    def array(place: int, kind: str, *shape: int | None) -> Tensor | None:
        given = node.input[place] if place < len(node.input) else ""
        if not given:
            return None
        if given not in known:
            raise refuse(f"{kind}: expected an initializer, got {given}, which is no initializer")
        try:
            value = numpy_helper.to_array(known[given])
        except Exception as error:  # NumPy, protobuf and the file system have their own.
            raise refuse(f"{kind}: expected an initializer that can be read, got {given}: {error}") from error
        return read.array(value, f"node {name}: {kind}", *shape)

    R = array(2, "R", count, None, None)
    if R is None:
        raise refuse("R: expected an input, got none")
    H = R.size(2) if hidden is None else hidden
    if H < 1:
        raise refuse(f"hidden_size: expected at least 1, got {H}")
    R = array(2, "R", count, gates * H, H)
    W, B = array(1, "W", count, gates * H, None), array(3, "B", count, 2 * gates * H)
    P = array(7, "P", count, 3 * H)
    if W is None or R is None:
        raise refuse("W: expected an input, got none")
    for kind, found in (("R", R), ("B", B), ("P", P)):
        if found is not None and found.dtype != W.dtype:
            raise refuse(f"{kind}: expected dtype {W.dtype} as W, got {found.dtype}")
    directions = []
    for d in range(count):
        b_ih, b_hh = (None, None) if B is None else map(read.gates, B[d].chunk(2))
        if gates == 3:
            directions.append(Direction(read.gates(W[d]), read.gates(R[d]), b_ih, bias_hh=b_hh, gates=3))
            continue
        bias = None if b_ih is None or b_hh is None else b_ih + b_hh
        i_o_f = None if P is None else P[d].chunk(3)
        peepholes = None if i_o_f is None else (i_o_f[0], i_o_f[2], i_o_f[1])
        directions.append(Direction(read.gates(W[d]), read.gates(R[d]), bias, None, peepholes))
    coupled, batch_first = map(bool, flags.values())
    if gates == 3:
        return read.layer([directions], batch_first)
    try:
        return read.layer(
            [directions], batch_first, coupled_gates=coupled, preactivation_clip=clip, **activations
        )
    except ValueError as error:
        raise refuse(str(error)) from error


def _attributes(node: Any, refuse: Callable[[str], ValueError]) -> dict[str, Any]:
    """The values of a node's attributes, each of which the standard knows, and of the type that it has there."""
    from onnx import AttributeProto, defs, helper

    standard: Any = defs.get_schema(node.op_type).attributes
    values: dict[str, Any] = {}
    for attribute in node.attribute:
        name = attribute.name
        if name not in standard or name in values:
            raise refuse(f"expected no {'second ' if name in values else ''}attribute {name}")
        expected, got = standard[name].type.name, AttributeProto.AttributeType.Name(attribute.type)
        if got != expected or attribute.ref_attr_name:
            got = "a reference" if attribute.ref_attr_name else got
            raise refuse(f"{name}: expected an attribute of type {expected}, got {got}")
        values[name] = helper.get_attribute_value(attribute)
    return values


def _refuse_of_gru(attributes: dict[str, Any], count: int, refuse: Callable[[str], ValueError]) -> None:
    """Raises an error for attributes of a GRU node that this layer does not have. Takes its own from them."""
    linear = attributes.pop("linear_before_reset", 0)
    if linear != 1:
        raise refuse(
            f"linear_before_reset: expected 1, got {linear}: the reset gate is after the product here, as in torch"
        )
    if attributes.get("clip") is not None:
        raise refuse("clip: expected none for a GRU")
    given = [a.decode(errors="replace") for a in attributes.pop("activations", [])]
    if [name.lower() for name in given] not in ([], ["sigmoid", "tanh"] * count):
        raise refuse(f"activations: expected Sigmoid and Tanh for a GRU, got {', '.join(given)}")
    for name in ("activation_alpha", "activation_beta"):  # these functions have no numbers
        attributes.pop(name, None)


def _activations(
    attributes: dict[str, Any], count: int, refuse: Callable[[str], ValueError]
) -> dict[str, Activation]:
    """The functions that a node's attributes name. Takes these from ``attributes``."""
    given = [a.decode(errors="replace") for a in attributes.pop("activations", [])]
    numbers = [list(attributes.pop(f"activation_{name}", ())) for name in ("alpha", "beta")]
    if not given:
        return {}
    if len(given) != 3 * count:
        raise refuse(f"activations: expected {3 * count}, got {', '.join(given)}")
    known = {name.lower(): ours for ours, name in ONNX_NAMES.items()}  # in any case, says ONNX
    functions: list[Activation] = []
    for name in given:
        ours = known.get(name.lower())
        if ours is None:
            raise refuse(f"activations: expected some of {', '.join(ONNX_NAMES.values())}, got {name}")
        # Each function takes the next of the numbers if it has one, as long as there are any.
        defaults = [float(text) for text in ACTIVATIONS[ours].defaults]
        if ours in _NO_DEFAULT and not all(numbers[: len(defaults)]):
            raise refuse(
                f"activations: {name} without its numbers, for which runtimes have different defaults"
            )
        functions.append(
            (ours, *(each.pop(0) if each else d for each, d in zip(numbers, defaults, strict=False)))
        )
    if functions[:3] != functions[-3:]:
        raise refuse(f"activations: expected the same in both directions, got {', '.join(given)}")
    return {"gate_activation": functions[0], "cell_activation": (functions[1], functions[2])}
