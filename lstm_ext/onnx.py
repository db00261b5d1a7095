"""``lstm_ext.onnx``: export to ONNX, in which a layer becomes the standard operator ``LSTM``.

Its functions need the packages onnx and onnxscript (``pip install 'lstm_ext[onnx]'``); importing this module does not.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .layer import equations
from .layer.layer_call import LayerCall, LayerOptions
from .layer.route import UnsupportedLayerError
from .layer.shapes import weights_per_direction

__all__ = ["UnsupportedLayerError", "export", "translation_table"]

# The order of the gates' rows is i, f, g, o here and i, o, f, c in ONNX, where c is our g.
_GATES = (0, 3, 1, 2)


def export(
    model: torch.nn.Module | torch.export.ExportedProgram | Callable[..., Any],
    args: tuple[Any, ...] = (),
    f: Any = None,
    *,
    custom_translation_table: dict[Callable[..., Any], Callable[..., Any]] | None = None,
    **options: Any,
) -> Any:
    """``torch.onnx.export(model, args, f, dynamo=True, ...)`` for a model that contains layers of this package.

    The file holds the weights in the gates' order of ONNX. Everything else is as in ``torch.onnx.export``; as there,
    ``dynamic_shapes`` has to name a batch size and a sequence length that may change::

        batch, time = torch.export.Dim("batch"), torch.export.Dim("time")
        lstm_ext.onnx.export(model.eval(), (x,), "model.onnx", dynamic_shapes=({0: batch, 1: time},))

    Args:
        model, args, f: as in ``torch.onnx.export``.
        custom_translation_table: for operators of your own, in addition to :func:`translation_table`.
        options: the other arguments of ``torch.onnx.export``, by name, except ``dynamo``.

    Returns:
        the ``torch.onnx.ONNXProgram``, also if ``f`` is given.

    Raises:
        ImportError: onnx, onnxscript or the compiled extension is missing.
        UnsupportedLayerError: the model has a layer with a projection, or with packed input; or it is an
            ``ExportedProgram`` of a layer with options whose number of steps may change.
    """
    if isinstance(model, torch.export.ExportedProgram):
        model = _with_equations(model)
    table = translation_table() | (custom_translation_table or {})
    # The program is saved below, when its weights are in the order of ONNX.
    saving = {
        "include_initializers": options.pop("export_params", True),
        "keep_initializers_as_inputs": options.pop("keep_initializers_as_inputs", False),
        "external_data": options.pop("external_data", True),
    }
    try:
        program = torch.onnx.export(model, args, dynamo=True, custom_translation_table=table, **options)
    except torch.onnx.OnnxExporterError as error:
        reason: BaseException | None = error
        while reason is not None and not isinstance(reason, UnsupportedLayerError):
            reason = reason.__cause__
        if reason is None:
            raise
        raise UnsupportedLayerError(str(reason)) from error
    if options.get("optimize", True):
        _fold_weights(program.model)
    if f is not None:
        program.save(f, **saving)
    return program


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The translations of this package, for ``torch.onnx.export(..., dynamo=True, custom_translation_table=...)``.

    With the table alone, the file holds large weights in torch's order, and nodes that reorder the gates for ONNX; a
    runtime runs these nodes once, when it loads the model. :func:`export` stores the weights in ONNX's order.

    Returns:
        a function for each operator of this package, as ``custom_translation_table`` takes it.

    Raises:
        ImportError: onnx, onnxscript or the compiled extension is missing.
    """
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"lstm_ext.onnx needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    from . import ops

    return {ops.lstm_layer: _translated_layer}


def _translated_layer(
    input: Any,
    h0: Any,
    c0: Any,
    weights: Sequence[Any],
    batch_sizes: Any,
    has_bias: bool,
    bidirectional: bool,
    **options: Any,
) -> tuple[Any, ...]:
    """The operator ``lstm_layer`` in the operators of ONNX; the exporter calls it with symbolic values."""
    from onnxscript import ir
    from onnxscript import opset18 as op

    directions = 2 if bidirectional else 1
    per_set, projected = weights_per_direction(len(weights), has_bias, bidirectional)
    if batch_sizes is not None:
        raise UnsupportedLayerError(
            "lstm_ext.onnx: a PackedSequence cannot be exported to ONNX: give the layer padded sequences"
        )
    if options:
        raise UnsupportedLayerError(
            f"lstm_ext.onnx: the operator LSTM of ONNX has no {', '.join(options)}: export the module, not a program"
        )
    if projected:
        raise UnsupportedLayerError(
            "lstm_ext.onnx: a layer with a projection (proj_size > 0) cannot be exported: "
            "the operator LSTM of ONNX has none"
        )
    kinds = [weights[kind::per_set] for kind in range(per_set)]  # each with one weight a direction
    hidden, features = weights[1].shape[1], weights[0].shape[1]
    dtype = input.dtype
    # Same as in the kernels: everything between the arguments and the results is float32.
    widened = dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)

    def wide(x: Any) -> Any:
        return op.Cast(x, to=ir.DataType.FLOAT) if widened and x is not None else x

    def narrow(x: Any) -> Any:
        return op.Cast(x, to=dtype) if widened else x

    def reordered(parts: Sequence[Any], sets: int, *columns: int) -> Any:
        """(directions, sets * 4 * H, *columns)"""
        joined = op.Concat(*parts, axis=0) if len(parts) > 1 else parts[0]
        by_gate = op.Reshape(joined, op.Constant(value_ints=[directions, sets, 4, hidden, *columns]))
        by_gate = op.Gather(by_gate, op.Constant(value_ints=_GATES), axis=2)
        return wide(op.Reshape(by_gate, op.Constant(value_ints=[directions, sets * 4 * hidden, *columns])))

    biases = None
    if has_bias:
        biases = reordered([b for pair in zip(*kinds[2:], strict=True) for b in pair], 2)
    output, h_n, c_n = op.LSTM(
        wide(input),
        reordered(kinds[0], 1, features),
        reordered(kinds[1], 1, hidden),
        biases,
        None,  # lengths
        wide(h0),
        wide(c0),
        direction="bidirectional" if bidirectional else "forward",
        hidden_size=hidden,
    )
    # (T, directions, B, H) to (T, B, directions * H)
    output = op.Transpose(output, perm=[0, 2, 1, 3])
    output = op.Reshape(output, op.Constant(value_ints=[0, 0, directions * hidden]))
    # Cell states and gate values are not requested.
    nothing = op.CastLike(op.ConstantOfShape(op.Constant(value_ints=[0])), input)
    return narrow(output), narrow(h_n), narrow(c_n), nothing, nothing


def _with_equations(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program with torch's operators in place of each layer that has options, for which ONNX has no operator."""
    from . import ops

    if not any([node.target is ops.lstm_layer and node.kwargs for node in program.graph.nodes]):
        return program
    return program.run_decompositions({ops.lstm_layer: _equations})


def _equations(
    input: torch.Tensor,
    h0: torch.Tensor | None,
    c0: torch.Tensor | None,
    weights: Sequence[torch.Tensor],
    batch_sizes: torch.Tensor | None,
    has_bias: bool,
    bidirectional: bool,
    **options: Any,
) -> Any:
    """The operator ``lstm_layer`` in torch's operators; without options NotImplemented, which keeps the operator."""
    if not options:
        return NotImplemented
    if batch_sizes is not None or not isinstance(input.size(0), int):
        raise UnsupportedLayerError(
            "lstm_ext.onnx: a layer with options is exported step by step: it needs padded sequences and a fixed "
            "number of steps"
        )
    call = LayerCall(input, h0, c0, weights, batch_sizes, has_bias, bidirectional, LayerOptions(**options))
    return tuple([input.new_empty(0) if r is None else r for r in equations.lstm_layer(call)])


def _fold_weights(model: Any) -> None:
    """Compute all nodes between the weights and the layers. The exporter does so only up to a few kB."""
    from onnxscript import optimizer

    before = [
        value.producer()
        for node in model.graph.all_nodes()
        if node.op_type == "LSTM" and node.domain == ""
        for value in node.inputs[1:4]
        if value is not None
    ]
    found = set()
    while before:
        node = before.pop()
        if node is not None and node not in found:
            found.add(node)
            before += [value.producer() for value in node.inputs if value is not None]
    optimizer.fold_constants(
        model,
        # A node is folded only if all its inputs are known, so never a weight that the model computes.
        should_fold=lambda node: True if node in found else None,
    )
    optimizer.remove_unused_nodes(model)
