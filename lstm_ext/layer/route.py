"""One layer of an LSTM, differentiable: chooses between the compiled kernels and the reference equations.

The routes, chosen in `lstm_layer` and nowhere else (`lstm_cell`, for one step, knows the first):

1. plain tensors, no gradient wanted: the kernel is called directly and saves nothing;
2. plain tensors with gradients: an `autograd.Function` around the forward and backward kernels;
3. what looks into the computation sees one registered operator a layer: the compilers call it, the transforms of
   ``torch.func``, dispatch modes, fake and meta tensors reach it through `transforms`;
4. forward-mode AD, ``torch.jit.trace``, tensor subclasses, and dtypes and devices without a kernel take the
   differentiable equations of `reference`.

With `LayerExtras`, which say what the layer does beyond that of torch, it is `_layer_with_extras` that chooses: of the
same routes where the extras have kernels, else 4.

A tensor without real memory must never reach a kernel directly.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from ..native import devices, loader
from . import equations, transforms
from .options import LayerExtras
from .tracing import PRE_DISPATCH, dispatch_modes, innermost_transform, is_active, nothing_looks_on

# (input, h0, c0, weights, batch_sizes, bias, bidirectional[, LayerExtras]) -> (output, h_n, c_n[, cell states, gates])
LayerFunction = Callable[..., Any]

_PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter))
_KERNEL_DTYPES = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))
_CPU = torch.device("cpu")

_is_compiling = torch.compiler.is_compiling


def lstm_layer(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    bias: bool,
    bidirectional: bool,
    extras: LayerExtras | None = None,
) -> Any:
    """Arguments, results and shapes as in `equations.lstm_layer`."""
    if extras is not None:
        return _layer_with_extras(input, h0, c0, weights, batch_sizes, bias, bidirectional, extras)
    kernels = loader.extension() if _is_direct(input, h0, c0, weights) else None
    if kernels is None:
        layer = _indirect_layer(input, h0, c0, weights)
        if batch_sizes is not None:
            h0 = _with_batch_known(input, h0, c0, weights, batch_sizes, bidirectional)
        return layer(input, h0, c0, weights, batch_sizes, bias, bidirectional)
    if torch.is_grad_enabled() and (
        input.requires_grad
        or any([w.requires_grad for w in weights])
        or (h0 is not None and h0.requires_grad)
        or (c0 is not None and c0.requires_grad)
    ):
        return _LSTMLayer.apply(kernels, input, h0, c0, batch_sizes, bias, bidirectional, *weights)
    return kernels.lstm_layer_forward(input, h0, c0, weights, batch_sizes, bias, bidirectional, False)[:3]


def lstm_cell(
    input: Tensor, h: Tensor | None, c: Tensor | None, weights: Sequence[Tensor], bias: bool
) -> tuple[Tensor, Tensor]:
    """One step of a layer without a projection: input (B, I), h and c (B, H); returns h and c after it."""
    if (
        weights[1].size(-1)
        and _is_direct(input, h, c, weights)
        and not (
            torch.is_grad_enabled()
            and any([t is not None and t.requires_grad for t in (input, h, c, *weights)])
        )
    ):
        kernels = loader.extension()
        if kernels is not None:
            return kernels.lstm_cell_forward(input, h, c, weights, bias)
    # Without hidden units there is nothing to compute, and nothing that a kernel accepts.
    layer = lstm_layer if weights[1].size(-1) else equations.lstm_layer
    _, h_n, c_n = layer(
        input[None],  # quicker than unsqueeze
        None if h is None else h[None],
        None if c is None else c[None],
        weights,
        None,
        bias,
        False,
    )
    return h_n[0], c_n[0]


def _layer_with_extras(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    bias: bool,
    bidirectional: bool,
    extras: LayerExtras,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """The one place that decides what computes the extras: the kernels, or the equations of `reference`."""
    tensors = (*weights, *extras.tensors())
    direct = _is_direct(input, h0, c0, tensors) and loader.has_kernels()
    # The backward kernels compute the gates again by themselves, but for those with layer normalisation.
    if extras.recompute and (not direct or extras.norm):
        return _recomputed(input, h0, c0, weights, batch_sizes, bias, bidirectional, extras)
    if extras.is_plain() and not extras.recompute:
        return *lstm_layer(input, h0, c0, weights, batch_sizes, bias, bidirectional), None, None
    if direct:
        return _fused_layer_with_extras(input, h0, c0, weights, batch_sizes, bias, bidirectional, extras)
    if _is_exporting_to_onnx():
        layer = equations.lstm_layer
        refuse_none(weights)
        _refuse_shards([input, *weights])
    else:
        layer = _indirect_layer(input, h0, c0, tensors)
    if batch_sizes is not None:
        if layer is equations.lstm_layer and (_is_compiling() or dispatch_modes() > 0):
            # The equations loop over the numbers in batch_sizes, which nobody knows while a graph is made.
            if _is_exporting_to_onnx():
                from ..onnx import UnsupportedLayerError

                raise UnsupportedLayerError(
                    "lstm_ext.onnx: a PackedSequence cannot be exported to ONNX: give the layer padded sequences, "
                    "and their lengths"
                )
            raise RuntimeError(
                "LSTM: torch.compile, torch.export and tracing do not support a PackedSequence together with extras "
                "that have no kernels here (docs/options.md): give padded input and lengths"
            )
        h0 = _with_batch_known(input, h0, c0, weights, batch_sizes, bidirectional)
    return layer(input, h0, c0, weights, batch_sizes, bias, bidirectional, extras)


def _recomputed(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    bias: bool,
    bidirectional: bool,
    extras: LayerExtras,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """The layer, of which only the arguments are kept for the backward pass: that computes it once more."""
    if forward_ad._current_level >= 0:
        raise RuntimeError(
            "LSTM: recompute=True is not supported with forward-mode AD: there is nothing to keep"
        )
    count = len(weights)

    def computed(*tensors: Tensor | None) -> tuple[Tensor, ...]:
        input, h0, c0 = tensors[:3]
        own = replace(extras.with_tensors(tensors[3 + count :]), recompute=False)
        results = _layer_with_extras(
            input, h0, c0, tensors[3 : 3 + count], batch_sizes, bias, bidirectional, own
        )
        return tuple([r for r in results if r is not None])

    arguments = (input, h0, c0, *weights, *extras.tensors())
    if torch.compiler.is_exporting() or not torch.is_grad_enabled():
        results = computed(*arguments)
    elif _is_compiling():
        # What the compilers know, and it keeps the same. All random masks are among the arguments.
        results = checkpoint(computed, *arguments, use_reentrant=False, preserve_rng_state=False)
    else:
        results = _Recomputed.apply(computed, *arguments)
    left = iter(results[3:])
    cells = next(left) if extras.return_cell_states else None
    gates = next(left) if extras.return_gates else None
    return *results[:3], cells, gates


class _Recomputed(torch.autograd.Function):
    """A function of tensors, computed again in the backward pass; differentiable again and transformable."""

    generate_vmap_rule = True

    @staticmethod
    def forward(function: Callable[..., tuple[Tensor, ...]], *arguments: Tensor | None) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return function(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.function, *arguments = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*arguments)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *transforms.gradients_of(
            ctx.function, ctx.needs_input_grad[1:], transforms.saved(ctx), grads
        )


def _is_direct(input: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor]) -> bool:
    """Whether the kernels may be called past the dispatcher."""
    if not nothing_looks_on() or forward_ad._current_level >= 0:
        return False
    device = input.device
    if device != _CPU and (device.type != "cuda" or not devices.is_supported(device.index)):
        return False
    if input.dtype not in _KERNEL_DTYPES or type(input) not in _PLAIN_TYPES:
        return False
    for w in weights:
        if type(w) not in _PLAIN_TYPES:
            return False
    return (h0 is None or type(h0) in _PLAIN_TYPES) and (c0 is None or type(c0) in _PLAIN_TYPES)


def _indirect_layer(
    input: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor]
) -> LayerFunction:
    """The function that computes the layer for arguments that must not reach the kernels directly."""
    tensors = [t for t in (input, h0, c0, *weights) if t is not None]
    refuse_none(weights)
    if not _has_operators(input.device):
        if input.device.type == "cuda" and not torch.compiler.is_compiling():
            _warn_of_cuda(devices.problem(input.device.index))
        return equations.lstm_layer
    if input.dtype not in _KERNEL_DTYPES or torch.autograd.forward_ad._current_level >= 0:
        return equations.lstm_layer
    if torch.compiler.is_compiling():
        return _COMPILED_LAYERS[_transformed_by()]
    if torch._C._is_tracing() or not all([type(t) in transforms.OPERATOR_TYPES for t in tensors]):
        _refuse_shards(tensors)
        return equations.lstm_layer
    if not transforms.are_supported():
        return equations.lstm_layer
    wants_gradients = torch.is_grad_enabled() and any([t.requires_grad for t in tensors])
    if innermost_transform() is None and (is_active(PRE_DISPATCH) or not wants_gradients):
        return _operator
    return transforms.lstm_layer


def refuse_none(weights: Sequence[Tensor]) -> None:
    if any([w is None for w in weights]):
        raise TypeError(
            "LSTM: one of the weights is None, expected Tensors (bias=False makes a layer without biases)"
        )


def _has_operators(device: torch.device) -> bool:
    if device.type == "cuda":
        return devices.is_supported(device.index)
    return device.type in ("cpu", "meta") and loader.has_kernels()


def _is_traced(batch_sizes: Tensor) -> bool:
    return not _is_compiling() and dispatch_modes() > 0 and type(batch_sizes) is Tensor


def _is_exporting_to_onnx() -> bool:
    """ONNX has no operator for the extras: they go there as equations."""
    return torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()


_is_exporting_to_onnx._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _with_batch_known(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor,
    bidirectional: bool,
) -> Tensor | None:
    """h0, or zeros where the fake kernels, which get batch_sizes without its numbers, need it for the batch."""
    if h0 is None and c0 is None and _is_traced(batch_sizes):
        return input.new_zeros(2 if bidirectional else 1, batch_sizes.tolist()[0], weights[1].size(1))
    return h0


def _transformed_by() -> str:
    """Which transforms of ``torch.func`` are at work while dynamo looks: a key of `_COMPILED_LAYERS`."""
    if not torch._C._functorch.get_interpreter_stack():
        return "none"
    if not transforms.are_supported():
        return "others"
    if torch.compiler.is_exporting():
        return "others"  # torch.export takes no Function with a rule for vmap
    # Dynamo cannot look into a Function with a rule for vmap; what comes after dynamo can.
    torch.compiler.allow_in_graph(transforms.flat_lstm_layer)
    return "grad and vmap"


# Called by dynamo, not traced, as `loader.has_kernels` is: dynamo enters the transforms while it traces them.
_transformed_by._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _operator(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    bias: bool,
    bidirectional: bool,
    extras: LayerExtras | None = None,
) -> Any:
    if extras is None:
        return torch.ops.lstm_ext.lstm_layer(input, h0, c0, list(weights), batch_sizes, bias, bidirectional)
    asked = extras.return_cell_states, extras.return_gates
    *results, cells, gates = torch.ops.lstm_ext.lstm_layer_with_extras(
        input, h0, c0, list(weights), batch_sizes, bias, bidirectional, *extras.operands(), *asked
    )
    return *results, cells if asked[0] else None, gates if asked[1] else None


_COMPILED_LAYERS: dict[str, LayerFunction] = {
    "none": _operator,
    "grad and vmap": transforms.lstm_layer,
    "others": equations.lstm_layer,
}


@functools.cache
def _warn_of_cuda(reason: str) -> None:
    warnings.warn(
        f"lstm_ext runs CUDA tensors on its PyTorch reference, which is slow: {reason}",
        RuntimeWarning,
        stacklevel=2,
    )


def _refuse_shards(tensors: Sequence[Tensor]) -> None:
    dtensor = sys.modules.get("torch.distributed.tensor")
    if dtensor is None or isinstance(tensors[0], dtensor.DTensor):
        return
    if any([isinstance(t, dtensor.DTensor) for t in tensors]):
        raise RuntimeError(
            "LSTM: the weights are DTensors and the input is not. FSDP2 gathers its shards in hooks: call the "
            "module, not its forward(); to use step(), say once after fully_shard: "
            "torch.distributed.fsdp.register_fsdp_forward_method(module, 'step')"
        )


class _LSTMLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernels, input, h0, c0, batch_sizes, bias, bidirectional, *weights):
        output, h_n, c_n, saved = kernels.lstm_layer_forward(
            input, h0, c0, weights, batch_sizes, bias, bidirectional, True
        )
        ctx.kernels = kernels
        ctx.bias = bias
        ctx.bidirectional = bidirectional
        ctx.weight_count = len(weights)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(batch_sizes, input, h0, c0, *weights, output, *saved)
        return output, h_n, c_n

    @staticmethod
    def backward(ctx, *grads):
        kept = ctx.saved_tensors  # once: checkpoint recomputes it at the first access and refuses a second
        end = 4 + ctx.weight_count
        batch_sizes, layer = kept[0], kept[1:end]
        wanted = ctx.needs_input_grad[1:4] + ctx.needs_input_grad[7:]
        input, h0, c0, *weights = layer
        output, *saved = kept[end:]
        if (
            not torch.is_grad_enabled()  # create_graph=True: the gradients must themselves be differentiable
            and _is_direct(input, h0, c0, weights)
            and all([g is None or type(g) in _PLAIN_TYPES for g in grads])
            and any([g is not None for g in grads])
        ):
            result = ctx.kernels.lstm_layer_backward(
                *grads,
                input,
                h0,
                c0,
                weights,
                batch_sizes,
                output,
                saved,
                ctx.bias,
                ctx.bidirectional,
                wanted,
            )
        else:
            if len(saved) == 2:
                saved = [*saved, saved[0].new_empty(0)]  # no hidden without a projection
            call = transforms.LayerCall(ctx.bias, ctx.bidirectional, ctx.weight_count)
            result = transforms.layer_gradients(call, wanted, batch_sizes, grads, (output, *saved), layer)
        return None, *result[:3], None, None, None, *result[3:]


def _fused_layer_with_extras(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    bias: bool,
    bidirectional: bool,
    extras: LayerExtras,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    kernels = loader.extension()
    tensors = [input, h0, c0, *weights, extras.reset_h, extras.reset_c, *extras.norm]
    if torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in tensors]):
        *layer, cells, gates = _LSTMLayerWithExtras.apply(
            kernels, batch_sizes, bias, bidirectional, extras, len(weights), *tensors
        )
    else:
        returned = extras.return_cell_states or extras.return_gates
        *layer, saved = kernels.lstm_layer_forward(
            input,
            h0,
            c0,
            weights,
            batch_sizes,
            bias,
            bidirectional,
            returned,
            _of_kernels(kernels, extras.operands(), recompute=False),
        )
        gates, cells = (_gate_values(saved[0]), saved[1]) if returned else (None, None)
    return (
        *layer,
        cells.to(input.dtype) if extras.return_cell_states else None,
        _with_gates_last(gates).to(input.dtype) if extras.return_gates else None,
    )


def _of_kernels(kernels: Any, operands: Sequence[Any], recompute: bool) -> Any:
    """The extras as the kernels take them; by place, which is quicker than by name."""
    return kernels.Extras(*operands, recompute)


def _gate_values(saved: Tensor) -> Tensor:
    """i, f, g, o of what the kernels save of the gates."""
    return saved if saved.is_cpu else _nonlinearities(saved)


def _nonlinearities(pre_activations: Tensor) -> Tensor:
    """(..., 4H): what the CUDA kernels save. Past the end of a row they are such that the values are 0."""
    values = pre_activations.sigmoid()
    hidden = values.size(-1) // 4
    values.narrow(-1, 2 * hidden, hidden).copy_(pre_activations.narrow(-1, 2 * hidden, hidden).tanh())
    return values


def _with_gates_last(gates: Tensor) -> Tensor:
    """(..., H, 4) of (..., 4H)."""
    return gates.unflatten(-1, (4, -1)).transpose(-1, -2)


def _as_operators_keep(output: Tensor, saved: Sequence[Tensor], normalised: bool) -> list[Tensor]:
    """The output and what the kernels saved, with an empty tensor for each that the layer does not need."""
    count = len(saved) - (2 if normalised else 0)  # without those of layer normalisation
    hidden = saved[2:count] or [saved[0].new_empty(0)]
    norm = saved[count:] or [saved[0].new_empty(0)] * 2
    return [output, *saved[:2], *hidden, *norm]


class _LSTMLayerWithExtras(torch.autograd.Function):
    """As `_LSTMLayer`; the tensors are input, h0, c0, the weights, reset_h, reset_c and the parameters of norm.

    Results: output, h_n, c_n, and the saved cells and gates where they are wanted, else None.
    """

    @staticmethod
    def forward(ctx, kernels, batch_sizes, bias, bidirectional, extras, weight_count, *tensors):
        # Gates that are returned are there anyway.
        recompute = extras.recompute and not extras.return_gates
        input, h0, c0, *weights = tensors[: 3 + weight_count]
        operands = extras.operands()
        output, h_n, c_n, saved = kernels.lstm_layer_forward(
            *(input, h0, c0, weights, batch_sizes, bias, bidirectional, True),
            _of_kernels(kernels, operands, recompute),
        )
        resets, _, _, lengths, mask, kept_h, kept_c, *shares, _ = operands
        ctx.kernels = kernels
        ctx.bias = bias
        ctx.bidirectional = bidirectional
        ctx.returned = extras.return_cell_states, extras.return_gates
        ctx.recompute = recompute
        ctx.shares = shares
        ctx.weight_count = weight_count
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(batch_sizes, resets, lengths, mask, kept_h, kept_c, *tensors, output, *saved)
        cells = saved[0 if recompute else 1] if extras.return_cell_states else None
        return output, h_n, c_n, cells, _gate_values(saved[0]) if extras.return_gates else None

    @staticmethod
    def backward(ctx, *grads):
        batch_sizes, *kept = ctx.saved_tensors
        wanted = ctx.needs_input_grad[6:]
        constants, tensors, (output, *saved) = kept[:5], kept[5 : 5 + len(wanted)], kept[5 + len(wanted) :]
        weight_count, bias, bidirectional = ctx.weight_count, ctx.bias, ctx.bidirectional
        reset_h, reset_c, *norm = tensors[3 + weight_count :]
        operands = (constants[0], reset_h, reset_c, *constants[1:], *ctx.shares, norm)
        *grads_of_layer, grad_cells, grad_gates = grads
        if all([g is None for g in grads]):
            result = [None] * len(tensors)
        elif (
            not torch.is_grad_enabled()
            and _is_direct(tensors[0], None, None, [t for t in (*tensors, *constants) if t is not None])
            and all([g is None or type(g) in _PLAIN_TYPES for g in grads])
        ):
            result = ctx.kernels.lstm_layer_backward(
                *grads_of_layer,
                *tensors[:3],
                tensors[3 : 3 + weight_count],
                batch_sizes,
                output,
                saved,
                bias,
                bidirectional,
                wanted,
                _of_kernels(ctx.kernels, operands, ctx.recompute),
                grad_gates,
                grad_cells,
            )
        else:
            call, arguments = transforms.flattened(
                tensors[: 3 + weight_count], bias, bidirectional, operands, *ctx.returned
            )
            # As the operators have them: of the results, not of what is saved.
            dtype = tensors[0].dtype
            grads = (
                *grads_of_layer,
                None if grad_cells is None else grad_cells.to(dtype),
                None if grad_gates is None else _with_gates_last(grad_gates).to(dtype),
            )
            kept = None if ctx.recompute else _as_operators_keep(output, saved, len(norm) > 0)
            result = transforms.layer_gradients(call, wanted, batch_sizes, grads, kept, arguments)
        return None, None, None, None, None, None, *result
