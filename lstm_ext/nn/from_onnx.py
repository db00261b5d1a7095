"""Layers from the LSTM nodes of an ONNX model: ``lstm_ext.from_onnx``."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ..layer.activations import ACTIVATIONS, ONNX_NAMES, Activation
from .from_frameworks import Direction, Source
from .lstm import LSTM

__all__ = ["from_onnx"]

# ONNX names defaults that ONNX Runtime does not have: it takes 0.
_NO_DEFAULT = ("affine", "scaled_tanh", "thresholded_relu")


def from_onnx(source: Any) -> dict[str, LSTM]:
    """The LSTM nodes of an ONNX model as layers, by the names of the nodes. Reading needs the package ``onnx``.

    A node without a name is called by its first output. Initial states and ``sequence_lens`` are inputs of a node, and
    arguments of a call here: ``hx`` and ``lengths``. A node's output is (T, D, B, H), ours (T, B, D * H).

    Args:
        source: an ``onnx.ModelProto``, or the path of a file.

    Returns:
        one :class:`lstm_ext.LSTM` for each node, with new parameters; ``batch_first`` where a node has ``layout=1``,
        ``coupled_gates`` where it has ``input_forget=1``, ``peephole`` where it has ``P``, ``preactivation_clip``
        where it has ``clip``, and its activations. Both biases become ``bias_ih``. Only the main graph is read, not
        those within its nodes.

    Raises:
        ImportError: the package ``onnx`` is not installed.
        ValueError: a node whose weights are not initializers, or with what this layer does not have, by its name:
            ``direction=reverse``, other activations in one direction than in the other.
    """
    import onnx
    from onnx import helper, numpy_helper

    read = Source("from_onnx", "iofg")
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
    read: Source, node: str, inputs: list[str], attributes: dict[str, Any], known: Mapping[str, Any]
) -> LSTM:
    def refuse(what: str) -> ValueError:
        return read.refuse(f"node {node}: {what}")

    direction = attributes.pop("direction", b"forward").decode()
    if direction not in ("forward", "bidirectional"):
        raise refuse(
            f"direction: expected forward or bidirectional, got {direction}: make it forward, and flip input and output"
        )
    count = 2 if direction == "bidirectional" else 1
    activations = _activations(attributes, count, refuse)
    clip = attributes.pop("clip", None)
    hidden = attributes.pop("hidden_size", None)
    coupled, layout = attributes.pop("input_forget", 0), attributes.pop("layout", 0)
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
        directions.append(Direction(read.gates(W[d]), read.gates(R[d]), bias, None, peepholes))
    try:
        return read.layer(
            [directions], bool(layout), coupled_gates=bool(coupled), preactivation_clip=clip, **activations
        )
    except ValueError as error:
        raise refuse(str(error)) from error


def _activations(
    attributes: dict[str, Any], count: int, refuse: Callable[[str], ValueError]
) -> dict[str, Activation]:
    """The functions that a node's attributes name. Takes these from ``attributes``."""
    given = [a.decode() for a in attributes.pop("activations", [])]
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
