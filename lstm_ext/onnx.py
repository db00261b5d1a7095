"""``lstm_ext.onnx``: export to ONNX, in which a layer becomes the standard operator ``LSTM`` or ``GRU``, or a loop.

Its functions need the packages onnx and onnxscript (``pip install 'lstm_ext[onnx]'``); importing this module does not.
"""

from __future__ import annotations

import importlib.util
import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .layer import equations
from .layer.activations import ONNX_NAMES, split_text
from .layer.layer_call import LayerCall, LayerOptions
from .layer.route import UnsupportedLayerError
from .layer.shapes import direction_of, weights_per_direction
from .options import OPTIONS

__all__ = ["UnsupportedLayerError", "export", "translation_table"]


def __dir__() -> list[str]:
    return __all__


# The order of the gates' rows is i, f, g, o here and i, o, f, c in ONNX, where c is our g; of peepholes i, f, o here.
# The order of those of a GRU is r, z, n here and z, r, h in ONNX, where h is our n.
_GATES = (0, 3, 1, 2)
_GRU_GATES = (1, 0, 2)
_PEEPHOLES = (0, 2, 1)


def export(
    model: torch.nn.Module | torch.export.ExportedProgram | Callable[..., Any],
    args: tuple[Any, ...] = (),
    f: Any = None,
    *,
    custom_translation_table: dict[Callable[..., Any], Callable[..., Any]] | None = None,
    loops: bool = False,
    **options: Any,
) -> Any:
    """``torch.onnx.export(model, args, f, dynamo=True, ...)`` for a model that contains layers of this package.

    A layer becomes one operator ``LSTM`` or ``GRU``, with ``lengths`` as its ``sequence_lens``, with its peepholes,
    activations, coupled gates and ``preactivation_clip``. One with a projection, ``resets``, ``zoneout``,
    ``layer_norm``, ``cell_clip``, ``return_cell_states`` or ``return_gates`` becomes a ``Scan`` for each direction,
    which takes any number of steps as well. The file holds the weights in the gates' order of ONNX. Everything else is
    as in ``torch.onnx.export``; as there, ``dynamic_shapes`` has to name a batch size and a sequence length that may
    change::

        batch, time = torch.export.Dim("batch"), torch.export.Dim("time")
        lstm_ext.onnx.export(model.eval(), (x,), "model.onnx", dynamic_shapes=({0: batch, 1: time},))

    Args:
        model, args, f: as in ``torch.onnx.export``.
        custom_translation_table: for operators of your own, in addition to :func:`translation_table`.
        loops: whether every layer becomes a ``Scan`` of basic operators, for runtimes whose LSTM has less than the
            standard's: OpenVINO 2026 leaves ``sequence_lens``, peepholes and ``input_forget`` out in silence. ONNX
            Runtime refuses an LSTM of float64, which is exported with a warning; it runs the loop, unless an activation
            is other than sigmoid, tanh, relu, affine and scaled_tanh.
        options: the other arguments of ``torch.onnx.export``, by name, except ``dynamo``.

    Returns:
        the ``torch.onnx.ONNXProgram``, also if ``f`` is given.

    Raises:
        ImportError: onnx, onnxscript or the compiled extension is missing.
        UnsupportedLayerError: the model has a layer with packed input; or it is an ``ExportedProgram`` of a layer in
            training mode with random options, whose number of steps may change.
    """
    if isinstance(model, torch.export.ExportedProgram):
        model = _with_equations(model)
    table = translation_table(loops) | (custom_translation_table or {})
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


def translation_table(loops: bool = False) -> dict[Callable[..., Any], Callable[..., Any]]:
    """The translations of this package, for ``torch.onnx.export(..., dynamo=True, custom_translation_table=...)``.

    With the table alone, the file holds large weights in torch's order, and nodes that reorder the gates for ONNX; a
    runtime runs these nodes once, when it loads the model. :func:`export` stores the weights in ONNX's order.

    Args:
        loops: as in :func:`export`.

    Returns:
        a function for each operator of this package, as ``custom_translation_table`` takes it.

    Raises:
        ImportError: onnx, onnxscript or the compiled extension is missing.
    """
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"lstm_ext.onnx needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    from . import ops

    return {ops.lstm_layer: _translated_to_loops if loops else _translated_layer}


def _translated_layer(
    input: Any,
    h0: Any,
    c0: Any,
    weights: Sequence[Any],
    batch_sizes: Any,
    has_bias: bool,
    bidirectional: bool,
    *,
    loops: bool = False,
    **options: Any,
) -> tuple[Any, ...]:
    """The operator ``lstm_layer`` in the operators of ONNX; the exporter calls it with symbolic values."""
    from onnxscript import ir
    from onnxscript import opset18 as op

    if batch_sizes is not None:
        raise UnsupportedLayerError(
            "lstm_ext.onnx: a PackedSequence cannot be exported to ONNX: give the layer padded sequences"
        )
    given = LayerOptions(**{name: value for name, value in options.items() if value is not None})
    for name, option in OPTIONS.items():
        if option.field and not option.onnx and getattr(given, name):
            raise UnsupportedLayerError(f"lstm_ext.onnx: {name} cannot be exported to ONNX")
    random = [name for name in _RANDOM if getattr(given, name) is not None]
    if random:
        raise UnsupportedLayerError(
            f"lstm_ext.onnx: {', '.join(random)} cannot be exported from a program: export the module, not a program"
        )
    dtype = input.dtype
    # Same as in the kernels: everything between the arguments and the results is float32.
    widened = dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)

    def wide(x: Any) -> Any:
        if not widened or x is None:
            return x
        cast = op.Cast(x, to=ir.DataType.FLOAT)
        cast.shape, cast.dtype = x.shape, ir.DataType.FLOAT
        return cast

    for name in ("reset_h", "reset_c"):
        setattr(given, name, wide(getattr(given, name)))
    given.norm, given.peephole = [wide(x) for x in given.norm], [wide(x) for x in given.peephole]
    call = LayerCall(
        wide(input), wide(h0), wide(c0), [wide(w) for w in weights], None, has_bias, bidirectional, given
    )
    _, projected = weights_per_direction(len(weights), has_bias, bidirectional)
    results = _scans(call) if loops or projected or _needs_scan(given) else _node(call)
    # An operator cannot return nothing.
    nothing = op.CastLike(op.ConstantOfShape(op.Constant(value_ints=[0])), input)
    return tuple([nothing if r is None else op.Cast(r, to=dtype) if widened else r for r in results])


def _translated_to_loops(*layer: Any, **options: Any) -> tuple[Any, ...]:
    return _translated_layer(*layer, loops=True, **options)


_RANDOM = ("recurrent_mask", "keep_h", "keep_c")


def _needs_scan(options: LayerOptions) -> bool:
    """Whether the operator LSTM of ONNX has not all that these options ask for."""
    fields = [name for name, option in OPTIONS.items() if option.field and option.onnx == "scan"]
    fields += ["zoneout_h", "zoneout_c", "norm", "return_cell_states", "return_gates"]
    return options.resets is not None or any([getattr(options, name) for name in fields])


def _node(call: LayerCall) -> tuple[Any, ...]:
    """One standard operator for a layer."""
    from onnxscript import ir
    from onnxscript import opset18 as op

    gates, kind = (_GRU_GATES, "a GRU") if call.options.gru else (_GATES, "an LSTM")
    if call.input.dtype == ir.DataType.DOUBLE:
        warnings.warn(
            f"lstm_ext.onnx: ONNX Runtime refuses {kind} of float64, which the standard has: export the layer with "
            "loops=True, or in float32, if ONNX Runtime is to run it",
            stacklevel=2,
        )
    weights, options = call.weights, call.options
    directions = 2 if call.bidirectional else 1
    kinds = [weights[kind :: len(weights) // directions] for kind in range(len(weights) // directions)]
    hidden, features = weights[1].shape[1], weights[0].shape[1]

    def reordered(parts: Sequence[Any], order: Sequence[int], sets: int, *columns: int) -> Any:
        """(directions, sets * len(order) * H, *columns), with blocks in another order."""
        joined = op.Concat(*parts, axis=0) if len(parts) > 1 else parts[0]
        count = len(order)
        by_gate = op.Reshape(joined, op.Constant(value_ints=[directions, sets, count, hidden, *columns]))
        by_gate = op.Gather(by_gate, op.Constant(value_ints=order), axis=2)
        return op.Reshape(by_gate, op.Constant(value_ints=[directions, sets * count * hidden, *columns]))

    biases = peepholes = lengths = None
    if call.bias:
        biases = reordered([b for pair in zip(*kinds[2:], strict=True) for b in pair], gates, 2)
    if options.peephole:
        peepholes = reordered(options.peephole, _PEEPHOLES, 1)
    if options.lengths is not None:
        lengths = op.Cast(options.lengths, to=ir.DataType.INT32)
    attributes: dict[str, Any] = {}
    if options.activations:
        functions = split_text(options.activations) * directions
        attributes["activations"] = [ONNX_NAMES[name] for name, _ in functions]
        for place, name in enumerate(("activation_alpha", "activation_beta")):
            numbers = [values[place] for _, values in functions if len(values) > place]
            if numbers:
                attributes[name] = numbers
    if options.preactivation_clip:
        attributes["clip"] = float(options.preactivation_clip)
    if options.coupled_gates:
        attributes["input_forget"] = 1
    attributes["direction"] = "bidirectional" if call.bidirectional else "forward"
    matrices = reordered(kinds[0], gates, 1, features), reordered(kinds[1], gates, 1, hidden)
    arguments = (call.input, *matrices, biases, lengths, call.h0)
    c_n = None
    if options.gru:
        output, h_n = op.GRU(*arguments, hidden_size=hidden, linear_before_reset=1, **attributes)
    else:
        output, h_n, c_n = op.LSTM(*arguments, call.c0, peepholes, hidden_size=hidden, **attributes)
    if options.lengths is not None:
        # Runtimes have zeros for a sequence without a step, and here it keeps its state.
        empty = op.Equal(options.lengths, op.Constant(value_int=0))
        empty = op.Unsqueeze(empty, op.Constant(value_ints=[0, 2]))
        h_n = h_n if call.h0 is None else op.Where(empty, call.h0, h_n)
        c_n = c_n if call.c0 is None else op.Where(empty, call.c0, c_n)
    # (T, directions, B, H) to (T, B, directions * H)
    output = op.Transpose(output, perm=[0, 2, 1, 3])
    output = op.Reshape(output, op.Constant(value_ints=[0, 0, directions * hidden]))
    return output, h_n, c_n, None, None


def _scans(call: LayerCall) -> tuple[Any, ...]:
    """A loop over the steps for each direction, with any number of steps."""
    from onnxscript import opset18 as op

    directions = 2 if call.bidirectional else 1
    found = [_scan(call, d) for d in range(directions)]

    def joined(parts: Sequence[Any]) -> Any:
        parts = [op.Unsqueeze(part, op.Constant(value_ints=[0])) for part in parts]
        return op.Concat(*parts, axis=0) if directions == 2 else parts[0]

    outputs, *others = zip(*found, strict=True)
    output = op.Concat(*outputs, axis=-1) if directions == 2 else outputs[0]
    return output, *[None if parts[0] is None else joined(parts) for parts in others]


def _scan(call: LayerCall, d: int) -> tuple[Any, ...]:
    """A direction: output (T, B, P), h_n and c_n (B, ...), cell states and gate values; None for what it lacks."""
    from onnxscript import evaluator, ir
    from onnxscript import opset18 as op

    x, options = call.input, call.options
    w_ih, w_hh, b_ih, b_hh, w_hr, norm, peephole = direction_of(call, d)
    sizes = (w_hh.shape[1],) if options.gru else (w_hh.shape[1], w_hh.shape[0] // 4)
    dtype = ir.DataType.FLOAT if x.dtype is None else x.dtype

    def transposed(weight: Any) -> Any:
        return op.Transpose(weight, perm=[1, 0])

    def of_direction(given: Any) -> Any:
        return op.Gather(given, op.Constant(value_int=d), axis=0)

    size = op.Shape(x, start=1, end=2)
    zero = op.Constant(value=ir.tensor(0.0, dtype=dtype))
    initial = [
        op.Expand(zero, op.Concat(size, op.Constant(value_ints=[features]), axis=0))
        if given is None
        else of_direction(given)
        for given, features in zip((call.h0, call.c0), sizes, strict=False)
    ]
    # The states of resets are carried along, because OpenVINO takes no results of other nodes in a body.
    if options.reset_h is not None:
        initial += [of_direction(given) for given in (options.reset_h, options.reset_c)[: len(sizes)]]
    products = op.MatMul(x, transposed(w_ih))
    if norm:
        products = _normalised(products, norm[0], b_ih)
    elif b_ih is not None:
        products = op.Add(products, b_ih if options.gru else op.Add(b_ih, b_hh))
    recurrent, projection = transposed(w_hh), None if w_hr is None else transposed(w_hr)
    scanned = [products, *_flags_of_steps(call, d)]
    inputs, results, body = _body(options, dtype, sizes, recurrent, projection, norm, b_hh, peephole)
    backwards = [int(d == 1)]
    node = ir.node(
        "Scan",
        [*initial, *scanned],
        {
            "body": ir.Graph(inputs, results, nodes=body, name=f"step_{next(_NUMBERS)}"),
            "num_scan_inputs": len(scanned),
            "scan_input_directions": backwards * len(scanned),
            "scan_output_directions": backwards * (len(results) - len(initial)),
        },
        num_outputs=len(results),
    )
    evaluator.default().nodes.append(node)
    for value in node.outputs:
        value.dtype = dtype
    h_n, c_n = (*node.outputs[: len(sizes)], None)[:2]
    output, *extras = node.outputs[len(initial) :]
    cells = extras.pop(0) if options.return_cell_states else None
    return output, h_n, c_n, cells, extras[0] if options.return_gates else None


def _flags_of_steps(call: LayerCall, d: int) -> list[Any]:
    """The resets and the steps that count, each (T, B, 1), where there are such options."""
    from onnxscript import opset18 as op

    resets, lengths = call.options.resets, call.options.lengths
    last = op.Constant(value_ints=[-1])
    found = []
    if resets is not None:
        if d == 1:  # a flag cuts between the times t - 1 and t
            ends = [op.Constant(value_ints=[n]) for n in (0, 1, 2**62)]
            none = op.Slice(resets, ends[0], ends[1], ends[0])
            none = op.And(none, op.Not(none))
            resets = op.Concat(op.Slice(resets, ends[1], ends[2], ends[0]), none, axis=0)
        found.append(op.Unsqueeze(resets, last))
    if lengths is not None:
        steps = op.Squeeze(op.Shape(call.input, start=0, end=1), op.Constant(value_ints=[0]))
        times = op.Range(op.Constant(value_int=0), steps, op.Constant(value_int=1))
        counts = op.Less(
            op.Unsqueeze(times, op.Constant(value_ints=[1])),
            op.Unsqueeze(lengths, op.Constant(value_ints=[0])),
        )
        found.append(op.Unsqueeze(counts, last))
    return found


def _body(
    options: LayerOptions,
    dtype: Any,
    sizes: tuple[int, ...],
    recurrent: Any,
    projection: Any,
    norm: Sequence[Any],
    b_hh: Any,
    peephole: Sequence[Any],
) -> tuple[list[Any], list[Any], list[Any]]:
    """One step: the inputs of the body of a ``Scan``, its results and its nodes. ``sizes``: those of h and c."""
    from onnxscript import evaluator, ir
    from onnxscript import opset18 as op

    def number(value: float) -> Any:
        # A node of its own: the recorder shares those it makes of plain numbers, and one of a body is not seen outside.
        return op.Constant(value=ir.tensor(float(value), dtype=dtype))

    def entry(features: int, kind: Any = dtype) -> Any:
        return ir.Value(
            name=f"step_{next(_NUMBERS)}", shape=ir.Shape([None, features]), type=ir.TensorType(kind)
        )

    def mixed(new: Any, old: Any, share: float) -> Any:
        return op.Add(new, op.Mul(number(share), op.Sub(old, new))) if share else new

    recorder = evaluator.default()
    outer, recorder.nodes = recorder.nodes, []
    try:
        states = [entry(features) for features in sizes]
        carried = [entry(features) for features in sizes] if options.reset_h is not None else []
        inputs = [*states, *carried, z := entry((3 if options.gru else 4) * sizes[-1])]
        if options.resets is not None:
            inputs.append(cut := entry(1, ir.DataType.BOOL))
            into = carried or [number(0.0)] * 2
            states = [op.Where(cut, new, old) for new, old in zip(into, states, strict=False)]
        counts = None
        if options.lengths is not None:
            inputs.append(counts := entry(1, ir.DataType.BOOL))
        product = op.MatMul(states[0], recurrent)
        if options.gru:
            new = [_gru(z, product if b_hh is None else op.Add(product, b_hh), states[0])]
        else:
            z = op.Add(z, _normalised(product, norm[1], b_hh) if norm else product)
            h, c, *gates = _cell(options, norm, peephole, number, z, states[1])
            new = [h if projection is None else op.MatMul(h, projection), c]
        shares = options.zoneout_h, options.zoneout_c
        new = [mixed(y, old, share) for y, old, share in zip(new, states, shares, strict=False)]

        def unless_ended(y: Any, otherwise: Any) -> Any:
            return y if counts is None else op.Where(counts, y, otherwise)

        zero = None if counts is None else number(0.0)
        results = [unless_ended(y, old) for y, old in zip(new, states, strict=True)]
        results += [*carried, unless_ended(new[0], zero)]
        if options.return_cell_states:
            results.append(unless_ended(new[1], zero))
        if options.return_gates:
            last = op.Constant(value_ints=[-1])
            values = op.Concat(*[op.Unsqueeze(y, last) for y in gates], axis=-1)
            ended = None if counts is None else op.Unsqueeze(counts, last)
            results.append(values if ended is None else op.Where(ended, values, zero))
        # The results of a body are values of their own.
        results = [op.Identity(y) for y in results]
        body = recorder.nodes
    finally:
        recorder.nodes = outer
    for value in [value for node in body for value in node.outputs]:  # no two of a model may have one name
        value.name = f"step_{next(_NUMBERS)}"
    return inputs, results, body


def _cell(
    options: LayerOptions,
    norm: Sequence[Any],
    peephole: Sequence[Any],
    number: Callable[[float], Any],
    z: Any,
    c: Any,
) -> tuple[Any, ...]:
    """The cell of `equations`, without projection and zoneout: h_t, c_t and i, f, g, o."""
    from onnxscript import opset18 as op

    gate, candidate, visible = [
        _function(name, values, number) for name, values in split_text(options.activations)
    ]

    def bounded(y: Any, bound: float) -> Any:
        return op.Clip(y, number(-bound), number(bound)) if bound else y

    i, f, g, o = op.Split(z, num_outputs=4, axis=-1)
    if peephole:
        i, f = op.Add(i, op.Mul(peephole[0], c)), op.Add(f, op.Mul(peephole[1], c))
    i, f, g = [bounded(y, options.preactivation_clip) for y in (i, f, g)]
    i, g = gate(i), candidate(g)
    f = op.Sub(number(1.0), i) if options.coupled_gates else gate(f)
    c = bounded(op.Add(op.Mul(f, c), op.Mul(i, g)), options.cell_clip)
    o = op.Add(o, op.Mul(peephole[2], c)) if peephole else o
    o = gate(bounded(o, options.preactivation_clip))
    seen = _normalised(c, norm[2], norm[3] if len(norm) == 4 else None) if norm else c
    return op.Mul(o, visible(seen)), seen if options.norm_cell else c, i, f, g, o


def _gru(from_input: Any, from_state: Any, h: Any) -> Any:
    """The cell of a GRU: h_t."""
    from onnxscript import opset18 as op

    x, y = op.Split(from_input, num_outputs=3, axis=-1), op.Split(from_state, num_outputs=3, axis=-1)
    r, z = op.Sigmoid(op.Add(x[0], y[0])), op.Sigmoid(op.Add(x[1], y[1]))
    n = op.Tanh(op.Add(x[2], op.Mul(r, y[2])))
    return op.Add(n, op.Mul(z, op.Sub(h, n)))


def _normalised(y: Any, gain: Any, shift: Any) -> Any:
    from onnxscript import opset18 as op

    found = op.LayerNormalization(y, gain, shift, axis=-1, epsilon=1e-5)
    return found[0] if isinstance(found, (tuple, list)) else found


_NUMBERS = itertools.count()


def _function(name: str, values: tuple[float, ...], number: Callable[[float], Any]) -> Callable[[Any], Any]:
    """An activation of `layer.activations` in the operators of ONNX."""
    from onnxscript import opset18 as op

    simple = {
        "sigmoid": op.Sigmoid,
        "tanh": op.Tanh,
        "relu": op.Relu,
        "softsign": op.Softsign,
        "softplus": op.Softplus,
    }
    if name in simple:
        return simple[name]
    if name == "affine":
        return lambda x: op.Add(op.Mul(number(values[0]), x), number(values[1]))
    if name == "scaled_tanh":
        return lambda x: op.Mul(number(values[0]), op.Tanh(op.Mul(number(values[1]), x)))
    if name == "hard_sigmoid":
        return lambda x: op.HardSigmoid(x, alpha=values[0], beta=values[1])
    if name == "thresholded_relu":
        return lambda x: op.ThresholdedRelu(x, alpha=values[0])
    return {
        "leaky_relu": lambda x: op.LeakyRelu(x, alpha=values[0]),
        "elu": lambda x: op.Elu(x, alpha=values[0]),
    }[name]


def _with_equations(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program with torch's operators in place of each layer with random numbers, which no operator has."""
    from . import ops

    def is_random(node: Any) -> bool:
        return node.target is ops.lstm_layer and any(node.kwargs.get(name) is not None for name in _RANDOM)

    if not any([is_random(node) for node in program.graph.nodes]):
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
    """The operator ``lstm_layer`` in torch's operators; NotImplemented, which keeps it, if nothing is random."""
    if not any([options.get(name) is not None for name in _RANDOM]):
        return NotImplemented
    if batch_sizes is not None or not isinstance(input.size(0), int):
        raise UnsupportedLayerError(
            "lstm_ext.onnx: a layer with random numbers is exported step by step: it needs padded sequences and a "
            "fixed number of steps"
        )
    given = {name: value for name, value in options.items() if value is not None}
    call = LayerCall(input, h0, c0, weights, batch_sizes, has_bias, bidirectional, LayerOptions(**given))
    return tuple([input.new_empty(0) if r is None else r for r in equations.lstm_layer(call)])


def _fold_weights(model: Any) -> None:
    """Compute all nodes between the weights and the layers. The exporter does so only up to a few kB."""
    from onnxscript import optimizer

    before = [
        value.producer()
        for node in model.graph.all_nodes()
        if node.op_type in ("LSTM", "GRU") and node.domain == ""
        for value in (*node.inputs[1:4], *node.inputs[7:8])
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
