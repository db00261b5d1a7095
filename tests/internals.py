"""The one place through which tests reach one layer, below the modules and the functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lstm_ext.layer import route
from lstm_ext.layer.layer_call import PLAIN, LayerCall, LayerFunction, LayerOptions

__all__ = ["LayerOptions", "layer_call", "lstm_layer", "results_of"]


def layer_call(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    bias: bool,
    bidirectional: bool,
    options: LayerOptions | None = None,
) -> LayerCall:
    return LayerCall(input, h0, c0, weights, batch_sizes, bias, bidirectional, options or PLAIN)


def results_of(function: LayerFunction, *arguments: Any) -> tuple[Any, ...]:
    """Arguments and results as `reference.lstm_layer`."""
    call = layer_call(*arguments)
    results = function(call)
    return results[:3] if call.options is PLAIN else results


def lstm_layer(*arguments: Any) -> tuple[Any, ...]:
    """As `reference.lstm_layer`, on the route that the arguments take."""
    return results_of(route.lstm_layer, *arguments)
