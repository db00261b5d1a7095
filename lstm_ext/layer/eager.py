"""The layer on plain eager tensors: direct calls of the kernels, and one `autograd.Function` around them."""

from __future__ import annotations

from typing import Any

import torch

from . import transforms
from .layer_call import PLAIN, LayerCall, LayerOptions, LayerResults
from .shapes import weights_per_direction
from .tracing import are_plain, is_direct

__all__ = ["lstm_layer"]


def lstm_layer(kernels: Any, call: LayerCall) -> LayerResults:
    """Only where `tracing.is_direct`."""
    if torch.is_grad_enabled() and _needs_grad(call):
        if call.options is PLAIN:  # autograd takes its time over each argument and result, None or not
            return *_Layer.apply(kernels, call, call.input, call.h0, call.c0, *call.weights), None, None
        return _Layer.apply(kernels, call, *call.tensors())
    return kernels.lstm_layer_forward(
        call.input,
        call.h0,
        call.c0,
        call.weights,
        call.batch_sizes,
        call.bias,
        call.bidirectional,
        _native(kernels, call.options),
        False,
    )[:5]


def _needs_grad(call: LayerCall) -> bool:
    h0, c0, options = call.h0, call.c0, call.options
    return (
        call.input.requires_grad
        or any([w.requires_grad for w in call.weights])
        or (h0 is not None and h0.requires_grad)
        or (c0 is not None and c0.requires_grad)
        or (options is not PLAIN and any([t.requires_grad for t in options.tensors()]))
    )


def _native(kernels: Any, options: LayerOptions) -> Any:
    """The options as the kernels take them; None for nothing set."""
    if options is PLAIN or options.native is not None:
        return options.native
    return kernels.LayerOptions(**options.as_keywords())


class _Layer(torch.autograd.Function):
    """Arguments: the kernels, the call, and the call's tensors (see `Signature`).

    Of a plain call only input, h0, c0 and the weights, and only the first three results.
    """

    @staticmethod
    def forward(ctx, kernels, call, *tensors):
        options = call.options
        output, h_n, c_n, cells, gates, saved = kernels.lstm_layer_forward(
            call.input,
            call.h0,
            call.c0,
            call.weights,
            call.batch_sizes,
            call.bias,
            call.bidirectional,
            _native(kernels, options),
            True,
        )
        ctx.kernels = kernels
        ctx.flags = call.bias, call.bidirectional
        ctx.signature = None if options is PLAIN else call.signature()
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(call.batch_sizes, *tensors, output, *saved)
        return (output, h_n, c_n) if options is PLAIN else (output, h_n, c_n, cells, gates)

    @staticmethod
    def backward(ctx, *grads):
        # Once: checkpoint recomputes the tensors at the first access and refuses a second.
        batch_sizes, *rest = ctx.saved_tensors
        count = len(ctx.needs_input_grad) - 2
        if all([g is None for g in grads]):
            return None, None, *[None] * count
        tensors, (output, *saved) = rest[:count], rest[count:]
        signature = ctx.signature
        if signature is None:
            input, h0, c0, *weights = tensors
            call = LayerCall(input, h0, c0, weights, batch_sizes, *ctx.flags, PLAIN)
            needs_grad = (*ctx.needs_input_grad[2:], False, False)  # no reset_h, no reset_c
            grads = (*grads, None, None)
        else:
            call = signature.call(batch_sizes, tensors)
            needs_grad = ctx.needs_input_grad[2 : 2 + signature.differentiable]
        # With create_graph=True, the gradients must themselves be differentiable.
        if not torch.is_grad_enabled() and is_direct(call) and are_plain(grads):
            gradients = ctx.kernels.lstm_layer_backward(
                call.input,
                call.h0,
                call.c0,
                call.weights,
                batch_sizes,
                call.bias,
                call.bidirectional,
                _native(ctx.kernels, call.options),
                *grads,
                output,
                saved,
                needs_grad,
            )
        else:
            if call.options.recompute:
                saved_results = None
            else:
                # The operators have a tensor without elements where the layer needs none.
                saved_results = [output, *[output.new_empty(0) if t is None else t for t in saved]]
            gradients = transforms.layer_gradients(
                call.signature(), needs_grad, batch_sizes, grads, saved_results, call.tensors()
            )
        gradients = list(gradients[:count])
        if grads[0] is None and grads[1] is None and call.input.size(0) == 1 and batch_sizes is None:
            # c of the only step does not depend on the projection, which torch leaves without a gradient.
            per_set, projected = weights_per_direction(len(call.weights), call.bias, call.bidirectional)
            if projected:
                gradients[3 + per_set - 1 : 3 + len(call.weights) : per_set] = [None] * (
                    len(call.weights) // per_set
                )
        return None, None, *gradients, *[None] * (count - len(gradients))
