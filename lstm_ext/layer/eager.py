"""The layer on plain eager tensors: the compiled function that calls the kernels, and is one step of autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from . import transforms
from .layer_call import PLAIN, LayerCall, LayerOptions, LayerResults


def lstm_layer(kernels: Any, call: LayerCall) -> LayerResults:
    """Call only if `route.is_direct`."""
    options = call.options
    return kernels.lstm_layer(
        call.input,
        call.h0,
        call.c0,
        call.weights,
        call.batch_sizes,
        call.bias,
        call.bidirectional,
        # The options in the extension's form; None if none is set.
        options.native
        if options is PLAIN or options.native is not None
        else kernels.LayerOptions(**options.as_keywords()),
    )


def differentiable_backward(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    bias: bool,
    bidirectional: bool,
    options: dict[str, Any],
    grads: Sequence[Tensor | None],
    output: Tensor,
    saved: Sequence[Tensor | None],
    needs_grad: Sequence[bool],
) -> list[Tensor | None]:
    """The backward pass if its gradients are differentiated, or if a transform or mode intercepts them.

    The compiled function calls it by name. Arguments are those of the kernels' backward pass; the options by name.
    """
    call = LayerCall(input, h0, c0, weights, batch_sizes, bias, bidirectional, LayerOptions(**options))
    if call.options.recompute:
        saved_results = None
    else:
        # In place of a tensor that the layer does not need, the operators have one without elements.
        saved_results = [output, *[output.new_empty(0) if t is None else t for t in saved]]
    return transforms.layer_gradients(
        call.signature(), needs_grad, batch_sizes, grads, saved_results, call.tensors()
    )
