"""One layer, differentiable: chooses between the compiled kernels and the equations in plain PyTorch.

The routes, chosen in `lstm_layer` and nowhere else (`lstm_cell`, for one step,
`plain_layers` and `plain_cell` know the first):

1. plain tensors: a compiled function, which calls the kernels, and records a step of autograd where a gradient is
   requested;
2. a compiler, a transform of ``torch.func``, a dispatch mode, fake and meta tensors: one registered operator a layer,
   through `transforms` where something may differentiate it;
3. forward-mode AD, ``torch.jit.trace``, tensor subclasses, and dtypes and devices without a kernel: the differentiable
   `equations`.

Options take the same routes, with two exceptions: an export to ONNX takes the equations for what is random, and
``recompute`` without kernels for it computes the whole layer again. An export to ONNX that does not know our operator
gets torch's, and the equations for options.

A tensor without real memory must never reach a kernel directly.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..native import loader
from ..native.integrations import constant_for_dynamo, onnx_has_our_operator
from . import cuda_kernels, equations, transforms
from .layer_call import PLAIN, LayerCall, LayerFunction, LayerOptions, LayerResults
from .shapes import weights_per_direction
from .tracing import (
    KERNEL_DTYPES,
    LEGACY_VMAP,
    PLAIN_TYPES,
    PRE_DISPATCH,
    any_autocast,
    are_plain,
    dispatch_modes,
    innermost_transform,
    is_active,
    is_exporting,
    is_exporting_to_onnx,
    is_plain_eager,
    refuse_shards,
)


class TorchIsFaster(NamedTuple):
    """Eager calls of plain stacks on the CPU in which torch's operator takes at least 3 percent less time than ours."""

    instruction_set: str  # the set that our kernels use
    dtype: torch.dtype
    training: bool
    threads: int
    least_steps: int
    least_batch: int
    hidden_sizes: range
    records: tuple[str, ...]  # in benchmarks/results, two or more

    def has(self, dtype: torch.dtype, steps: int, batch: int, hidden_size: int) -> bool:
        """Checks everything except `training`, which takes longer to find out."""
        return (
            dtype == self.dtype
            and steps >= self.least_steps
            and batch >= self.least_batch
            and hidden_size in self.hidden_sizes
            and torch.get_num_threads() == self.threads
            and torch.backends.mkldnn.is_available()
            and torch._C._get_mkldnn_enabled()
            and loader.extension().cpu_capability() == self.instruction_set  # type: ignore[union-attr]
        )


# One direction, no projection, dense data.
TORCH_IS_FASTER = (
    # oneDNN multiplies pairs of bfloat16 here; our kernels sum in float32.
    TorchIsFaster(
        "avx512_bf16", torch.bfloat16, True, 1, 50, 64, range(256, 512),
        ("suite_epyc_zen4_2_cores.json", "suite_epyc_zen5_2_cores.json"),
    ),
)  # fmt: skip
_ROW_DTYPES = frozenset([row.dtype for row in TORCH_IS_FASTER])

_is_compiling = torch.compiler.is_compiling
_CPU = torch.device("cpu")
_is_compiled_by_dynamo = torch.compiler.is_dynamo_compiling


class UnsupportedLayerError(NotImplementedError):
    """A layer that the operator ``LSTM`` of ONNX cannot express."""


UnsupportedLayerError.__module__ = "lstm_ext.onnx"  # the public module


def is_direct(call: LayerCall) -> bool:
    """Whether the kernels may be called without the dispatcher."""
    if not is_plain_eager() or forward_ad._current_level >= 0:
        return False
    input, h0, c0 = call.input, call.h0, call.c0
    device = input.device
    if device != _CPU and device.type != "cuda":
        return False
    if input.dtype not in KERNEL_DTYPES or type(input) not in PLAIN_TYPES:
        return False
    for w in call.weights:
        if type(w) not in PLAIN_TYPES:
            return False
    options = call.options
    if options.gru and device != _CPU:
        return False
    if options is not PLAIN and options.native is None and not are_plain(options.tensors()):
        return False
    if not ((h0 is None or type(h0) in PLAIN_TYPES) and (c0 is None or type(c0) in PLAIN_TYPES)):
        return False
    return device == _CPU or cuda_kernels.may_run(device.index)


def lstm_layer(call: LayerCall) -> LayerResults:
    """Arguments, results and shapes are those of `equations.lstm_layer`."""
    options = call.options
    if is_direct(call):
        kernels = loader.extension()
        if kernels is not None:
            if options.recompute:
                # The kernels cannot recompute these gates.
                on_gpu = call.input.device.type != "cpu"
                others = options.peephole or options.activations or options.preactivation_clip
                if options.norm or (on_gpu and others):
                    return _recomputed(call)
                if options.return_gates:  # they are saved anyway
                    call = replace(call, options=replace(options, recompute=False))
            return _directly(kernels, call)
    if options.recompute:
        return _recomputed(call)
    layer = _indirect_layer(call)
    if call.batch_sizes is not None:
        _check_packed(call, layer)
        call = _with_known_batch(call)
    return layer(call)


def _directly(kernels: Any, call: LayerCall) -> LayerResults:
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


def plain_layers(
    module: Any, weights: list[list[Tensor]], input: Tensor, hx: tuple[Tensor, Tensor] | None, layout: int
) -> Any:
    """The results of a module without options for plain tensors on the CPU, checked, by the shortest path.

    None for every other call, and if an argument is wrong: `lstm_layer` and its callers handle these.

    Args:
        layout: the code of the layout of ``input`` and ``hx``, which are the user's.
    """
    if _is_compiling() or forward_ad._current_level >= 0 or (module.dropout and module.training):
        return None
    kernels = loader.extension()
    if kernels is None:
        return None
    if input.dtype in _ROW_DTYPES and prefers_torch(input, weights, module.bidirectional, module.batch_first):
        return None
    return kernels.lstm_module(
        input,
        hx,
        weights,
        module._native_options or (_native_gru(kernels, len(weights)) if module.gru else None),
        layout,
        module.input_size,
        module.hidden_size,
        module.proj_size,
        module.bias,
        module.bidirectional,
    )


@functools.cache
def _native_gru(kernels: Any, layers: int) -> list[Any]:
    """The options of the layers of a GRU, in the extension's form."""
    return [kernels.LayerOptions(gru=True)] * layers


def plain_cell(weights: list[Tensor], input: Tensor, hx: Any, gru: bool = False) -> Any:
    """The same for a cell, with ``weight_ih, weight_hh, bias_ih, bias_hh``; the biases may be None."""
    if _is_compiling() or forward_ad._current_level >= 0:
        return None
    kernels = loader.extension()
    return None if kernels is None else kernels.lstm_cell_module(input, hx, weights, gru)


def lstm_cell(
    input: Tensor, h: Tensor | None, c: Tensor | None, weights: Sequence[Tensor], preferred: bool = False
) -> tuple[Tensor, Tensor]:
    """One step of a layer without a projection: input (B, I), h and c (B, H); returns h and c after it.

    `preferred`: see `torch_route`.
    """
    bias = len(weights) == 4
    call = LayerCall(input, h, c, weights, None, bias, False, PLAIN)
    if not preferred and weights[1].size(-1) and is_direct(call):
        kernels = loader.extension()
        if kernels is not None:
            return kernels.lstm_cell(input, h, c, weights, bias)
    if torch_route(input, h, c, [weights], preferred):
        if h is None or c is None:
            h = c = input.new_zeros(input.size(0), weights[1].size(-1))
        return torch.lstm_cell(input, (h, c), *weights)
    # Without hidden units there is nothing to compute, and nothing that a kernel accepts.
    layer = lstm_layer if weights[1].size(-1) else equations.lstm_layer
    # Indexing by None is quicker than unsqueeze.
    call.input, call.h0, call.c0 = input[None], None if h is None else h[None], None if c is None else c[None]
    _, h_n, c_n, *_ = layer(call)
    return h_n[0], c_n[0]


def _indirect_layer(call: LayerCall) -> LayerFunction:
    """The function that computes the layer for arguments that must not reach the kernels directly."""
    input = call.input
    tensors = [t for t in (input, call.h0, call.c0, *call.weights, *call.options.tensors()) if t is not None]
    refuse_none(call.weights)
    if call.options.frozen:
        return _frozen_layer(tensors)
    if is_exporting_to_onnx():
        options, known = call.options, onnx_has_our_operator()
        random = not (options.recurrent_mask is options.keep_h is options.keep_c is None)
        if random or (options.as_keywords() and not known):
            refuse_shards(tensors)
            return equations.lstm_layer
        if not known:
            return _layer_without_our_operator(call)
    if not (has_gru(input.device) if call.options.gru else has_operators(input.device)):
        if torch.compiler.is_compiling() or loader.wants_equations():
            return equations.lstm_layer
        # On other devices torch's operator has no second derivatives.
        is_plain = input.is_cpu and not call.options.as_keywords() and not any_autocast()
        if is_plain and torch_route(input, call.h0, call.c0, [call.weights]) == "direct":
            return _torch_operator
        _warn_about_options(call.options, input.device)
        return equations.lstm_layer
    if input.dtype not in KERNEL_DTYPES or torch.autograd.forward_ad._current_level >= 0:
        return equations.lstm_layer
    if torch.compiler.is_compiling():
        return _COMPILED_LAYERS[_active_transforms()]
    if torch._C._is_tracing() or not all([type(t) in transforms.OPERATOR_TYPES for t in tensors]):
        refuse_shards(tensors)
        return equations.lstm_layer
    if not transforms.are_supported():
        return equations.lstm_layer
    needs_grad = torch.is_grad_enabled() and any([t.requires_grad for t in tensors])
    if innermost_transform() is None and (is_active(PRE_DISPATCH) or not needs_grad):
        return transforms.operator
    return transforms.lstm_layer


def _frozen_layer(tensors: Sequence[Tensor]) -> LayerFunction:
    """The operator, because no other route has these weights."""
    if is_exporting_to_onnx():
        raise UnsupportedLayerError(
            "lstm_ext.onnx: a frozen layer cannot be exported to ONNX: export lstm_ext.unfreeze(model)"
        )
    if torch.compiler.is_compiling():
        seen = _active_transforms() != "none"
    else:
        known = all([type(t) in transforms.OPERATOR_TYPES for t in tensors])
        seen = (
            innermost_transform() is not None or torch._C._is_tracing() or is_active(LEGACY_VMAP) or not known
        )
    if seen or torch.autograd.forward_ad._current_level >= 0:
        raise RuntimeError(
            "LSTM: a frozen layer has its kernels only, and no transforms of torch.func, forward-mode AD, torch.jit "
            "or tensor subclasses: lstm_ext.unfreeze gives a layer that has them"
        )
    return transforms.operator


def refuse_none(weights: Sequence[Tensor]) -> None:
    """Raises: TypeError if one of the weights is None."""
    if any([w is None for w in weights]):
        raise TypeError(
            "LSTM: one of the weights is None, expected Tensors (bias=False makes a layer without biases)"
        )


def has_operators(device: torch.device) -> bool:
    """Whether we have kernels for a device. On a GPU they count once they have been right there."""
    if device.type == "cuda":
        return cuda_kernels.may_run(device.index)
    return device.type in ("cpu", "meta") and loader.has_kernels()


def has_gru(device: torch.device) -> bool:
    """Whether we have kernels of a GRU for a device."""
    return device.type != "cuda" and has_operators(device)


def torch_is_faster(dtype: torch.dtype, steps: int, batch: int, hidden_size: int) -> list[TorchIsFaster]:
    """The rows of TORCH_IS_FASTER that have a layer of these sizes."""
    return [row for row in TORCH_IS_FASTER if row.has(dtype, steps, batch, hidden_size)]


def prefers_torch(
    x: Tensor, weights: Sequence[Sequence[Tensor | None]], bidirectional: bool, batch_first: bool = False
) -> bool:
    """Whether torch's operator computes plain layers of dense data although we have kernels: TORCH_IS_FASTER."""
    if (
        _is_compiling()
        or x.dtype not in _ROW_DTYPES
        or x.dim() != 3
        or not x.is_cpu
        or bidirectional
        or not has_operators(x.device)
    ):
        return False
    recurrent = weights[0][1]
    hidden_size = 0 if recurrent is None else recurrent.size(-1)
    steps, batch = (x.size(1), x.size(0)) if batch_first else (x.size(0), x.size(1))
    rows = torch_is_faster(x.dtype, steps, batch, hidden_size)
    if not rows or not is_plain_eager():
        return False
    gates, features = 4 * hidden_size, x.size(2)
    for layer in weights:  # torch's operator does not check their shapes
        shapes = [(gates, features), (gates, hidden_size), (gates,), (gates,)][: len(layer)]
        if [None if w is None or w.dtype != x.dtype else w.shape for w in layer] != shapes:
            return False
        features = hidden_size
    training = torch.is_grad_enabled() and (
        x.requires_grad or any([w.requires_grad for layer in weights for w in layer if w is not None])
    )
    return any([row.training == training for row in rows])


def torch_route(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Sequence[Tensor | None]],
    preferred: bool = False,
) -> str | None:
    """How torch's own operator computes plain layers of these tensors, if we have no kernels for them.

    If it is `preferred`, it is used even with kernels. "direct": by a call of torch's function. "operator": by the
    operator for compilers, exporters and dispatch modes. None: not at all, because there are kernels, or because the
    equations are requested or are the only way, as under the transforms of ``torch.func`` and forward-mode AD.
    """
    device = x.device
    if (has_operators(device) and not preferred) or loader.wants_equations():
        return None
    if x.dtype not in KERNEL_DTYPES or forward_ad._current_level >= 0:
        return None
    if _is_compiling():
        return "operator" if _active_transforms() == "none" and not is_exporting_to_onnx() else None
    for state in (x, h0, c0):
        if state is not None and type(state) not in transforms.OPERATOR_TYPES:
            return None
    for layer in weights:
        for w in layer:
            if type(w) not in transforms.OPERATOR_TYPES:
                return None
    if device.type == "cuda" and not preferred:
        _warn_about_cuda(cuda_kernels.why_not(device.index))
    if is_plain_eager() or torch._C._is_tracing():
        return "direct"
    return None if innermost_transform() is not None or is_active(LEGACY_VMAP) else "operator"


def _check_packed(call: LayerCall, layer: LayerFunction) -> None:
    """The equations loop over the numbers in batch_sizes, which are unknown while a graph is traced."""
    if layer is not equations.lstm_layer or not (_is_compiling() or dispatch_modes() > 0):
        return
    if not call.options.as_keywords():
        return
    if is_exporting_to_onnx():
        raise UnsupportedLayerError(
            "lstm_ext.onnx: a PackedSequence cannot be exported to ONNX: give the layer padded sequences, "
            "and their lengths"
        )
    raise RuntimeError(
        "LSTM: torch.compile, torch.export and tracing do not support a PackedSequence together with options "
        "that have no kernels here (docs/options.md): give padded input and lengths"
    )


def _with_known_batch(call: LayerCall) -> LayerCall:
    """Zeros for h0 if the fake kernels, which get batch_sizes without its numbers, need them for the batch size."""
    batch_sizes = call.batch_sizes
    traced = not _is_compiling() and dispatch_modes() > 0 and type(batch_sizes) is Tensor
    if call.h0 is not None or call.c0 is not None or not traced:
        return call
    zeros = call.input.new_zeros(
        2 if call.bidirectional else 1, batch_sizes.tolist()[0], call.weights[1].size(1)
    )
    return replace(call, h0=zeros)


@constant_for_dynamo
def _active_transforms() -> str:
    """The transforms of ``torch.func`` that are active while dynamo traces: a key of `_COMPILED_LAYERS`.

    Dynamo enters the transforms while it traces them.
    """
    if not torch._C._functorch.get_interpreter_stack():
        return "none"
    if not transforms.are_supported():
        return "others"
    if is_exporting():
        return "others"  # torch.export accepts no Function with a rule for vmap
    # Dynamo cannot trace a Function with a rule for vmap; the stages after dynamo can.
    torch.compiler.allow_in_graph(transforms.flat_lstm_layer)
    return "grad and vmap"


def _layer_without_our_operator(call: LayerCall) -> LayerFunction:
    """The function for a plain layer in ``torch.onnx.export``, which knows torch's operators only."""
    # Under dynamo, which the exporter tries last, a dynamic size looks like a number and would become one.
    if _is_compiled_by_dynamo() or (call.batch_sizes is None and not isinstance(call.input.size(0), int)):
        raise UnsupportedLayerError(
            "LSTM: torch.onnx.export alone takes a fixed number of steps, and no dynamo: use lstm_ext.onnx.export"
        )
    _, projected = weights_per_direction(len(call.weights), call.bias, call.bidirectional)
    # torch exports its operator as if there were no projection.
    return equations.lstm_layer if projected and call.batch_sizes is None else _torch_operator


def _torch_operator(call: LayerCall) -> LayerResults:
    """The plain layer by torch's own operator."""
    settings = (call.bias, 1, 0.0, False, call.bidirectional)
    return (*torch_lstm(call.input, call.h0, call.c0, call.weights, call.batch_sizes, *settings), None, None)


def torch_lstm(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    bias: bool,
    num_layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
) -> tuple[Tensor, ...]:
    """Output, h_n and c_n of a plain stack, by ``torch.lstm``; None for zeros."""
    h0, c0 = given_states(x, h0, c0, weights, batch_sizes, num_layers, bidirectional)
    settings = (bias, num_layers, dropout, training, bidirectional)
    if batch_sizes is None:
        return torch.lstm(x, (h0, c0), list(weights), *settings, False)
    return torch.lstm(x, batch_sizes, (h0, c0), list(weights), *settings)


def given_states(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    num_layers: int,
    bidirectional: bool,
) -> tuple[Tensor, Tensor]:
    """The states of all layers, zeros where one is None."""
    if h0 is None or c0 is None:
        batch = x.size(1) if batch_sizes is None else batch_sizes.tolist()[0]
        sets = num_layers * (2 if bidirectional else 1)
        h0 = x.new_zeros(sets, batch, weights[1].size(1)) if h0 is None else h0
        c0 = x.new_zeros(sets, batch, weights[1].size(0) // 4) if c0 is None else c0
    return h0, c0


_COMPILED_LAYERS: dict[str, LayerFunction] = {
    "none": transforms.operator,
    "grad and vmap": transforms.lstm_layer,
    "others": equations.lstm_layer,
}


@functools.cache
def _warn_about_cuda(reason: str) -> None:
    loader.warn(
        f"lstm_ext has no kernels for CUDA tensors here, so torch's own operator computes its layers: {reason}"
    )


# The options of a layer by their public names.
_USERS_NAMES = {
    "norm": "layer_norm",
    "norm_cell": "layer_norm",
    "recurrent_mask": "recurrent_dropout",
    "reset_h": "reset_state",
    "reset_c": "reset_state",
    "keep_h": "zoneout",
    "keep_c": "zoneout",
    "zoneout_h": "zoneout",
    "zoneout_c": "zoneout",
    "activations": "gate_activation or cell_activation",
}


def _warn_about_options(options: LayerOptions, device: torch.device) -> None:
    names = dict.fromkeys([_USERS_NAMES.get(name, name) for name in options.as_keywords()])
    if names:
        reason = cuda_kernels.problem(device.index) if device.type == "cuda" else loader.status().reason
        _warn_about_slow_options(", ".join(names), str(device), reason or "there are none for this device")


@functools.cache
def _warn_about_slow_options(names: str, device: str, reason: str) -> None:
    loader.warn(
        f"lstm_ext: {names} on {device}: the equations in plain PyTorch compute this, which is slow. There are no "
        f"kernels: {reason}"
    )


def _recomputed(call: LayerCall) -> LayerResults:
    """The layer, which saves only its arguments for the backward pass and recomputes everything there."""
    if forward_ad._current_level >= 0:
        raise RuntimeError(
            "LSTM: recompute=True is not supported with forward-mode AD: there is nothing to keep"
        )
    options = replace(call.options, recompute=False)
    signature = replace(call, options=options).signature()

    # batch_sizes are an argument too: under a transform they may belong to its level.
    def compute(batch_sizes: Tensor | None, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        return tuple([r for r in lstm_layer(signature.call(batch_sizes, tensors)) if r is not None])

    results = iter(transforms.recomputed(compute, [call.batch_sizes, *call.tensors()]))
    output, h_n, c_n = next(results), next(results), next(results)
    cells = next(results) if options.return_cell_states else None
    gates = next(results) if options.return_gates else None
    return output, h_n, c_n, cells, gates
