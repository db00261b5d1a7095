"""One layer of an LSTM, differentiable: chooses between the compiled kernels and the reference equations.

The routes, chosen in `lstm_layer` and nowhere else:

1. plain tensors, no gradient wanted: the kernel is called directly and saves nothing;
2. plain tensors with gradients: an `autograd.Function` around the forward and backward kernels;
3. what looks into the computation sees one registered operator a layer: the compilers, dispatch modes, fake and meta
   tensors through `ops`, the transforms of ``torch.func`` through `transforms`;
4. forward-mode AD, ``torch.jit.trace``, tensor subclasses, and dtypes and devices without a kernel take the
   differentiable equations of `reference`.

A tensor without real memory must never reach a kernel directly.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from . import _backend, reference, transforms
from ._stack import LayerFunction

_PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter))
# Types that an operator's fake kernel serves.
_TRACED_TYPES = _PLAIN_TYPES | {FakeTensor, FunctionalTensor}
_KERNEL_DTYPES = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))
_CPU = torch.device("cpu")
_OPERATOR_DEVICES = frozenset(("cpu", "meta"))


def lstm_layer(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    bias: bool,
    bidirectional: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments, results and shapes as in `reference.lstm_layer`."""
    kernels = _backend.extension() if _is_direct(input, h0, c0, weights) else None
    if kernels is None:
        layer = _indirect_layer(input, h0, c0, weights)
        return layer(input, h0, c0, weights, batch_sizes, bias, bidirectional)
    if torch.is_grad_enabled() and (
        input.requires_grad
        or any([w.requires_grad for w in weights])
        or (h0 is not None and h0.requires_grad)
        or (c0 is not None and c0.requires_grad)
    ):
        return _LSTMLayer.apply(kernels, input, h0, c0, batch_sizes, bias, bidirectional, *weights)
    return kernels.lstm_layer_forward(input, h0, c0, weights, batch_sizes, bias, bidirectional, False)[:3]


def _is_direct(input: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor]) -> bool:
    """Whether the kernels may be called past the dispatcher."""
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        return False
    if input.device != _CPU or input.dtype not in _KERNEL_DTYPES or type(input) not in _PLAIN_TYPES:
        return False
    for w in weights:
        if type(w) not in _PLAIN_TYPES:
            return False
    if (h0 is not None and type(h0) not in _PLAIN_TYPES) or (c0 is not None and type(c0) not in _PLAIN_TYPES):
        return False
    return (
        torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._len_torch_dispatch_stack() == 0
        and torch.autograd.forward_ad._current_level < 0
    )


def _indirect_layer(
    input: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor]
) -> LayerFunction:
    """The function that computes the layer for arguments that must not reach the kernels directly."""
    tensors = [t for t in (input, h0, c0, *weights) if t is not None]
    if any([w is None for w in weights]):
        raise TypeError("LSTM: a weight is None, expected a Tensor (bias=False makes a layer without biases)")
    if (
        input.device.type not in _OPERATOR_DEVICES
        or input.dtype not in _KERNEL_DTYPES
        or torch.autograd.forward_ad._current_level >= 0
        or not _backend.has_kernels()
    ):
        return reference.lstm_layer
    if torch.compiler.is_compiling():
        return _LAYERS[_transformed_by(compiling=True)]
    if torch._C._is_tracing() or not all([type(t) in _TRACED_TYPES for t in tensors]):
        _refuse_shards(tensors)
        return reference.lstm_layer
    return _LAYERS[_transformed_by(compiling=False)]


def _transformed_by(compiling: bool) -> str:
    """Which transforms of ``torch.func`` are at work: a key of `_LAYERS`."""
    stack = torch._C._functorch.get_interpreter_stack()
    if not stack:
        return "none"
    kinds = {t.key() for t in stack}
    if not kinds <= {torch._C._functorch.TransformType.Grad, torch._C._functorch.TransformType.Vmap}:
        return "others"
    if torch.compiler.is_exporting():
        return "others"  # torch.export takes no Function with a rule for vmap
    if compiling:
        # Dynamo cannot look into a Function with a rule for vmap; what comes after dynamo can.
        torch.compiler.allow_in_graph(transforms.lstm_layer)
    return "grad and vmap"


# Called by dynamo, not traced, as `_backend.has_kernels` is: dynamo enters the transforms while it traces them.
_transformed_by._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _operator(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    bias: bool,
    bidirectional: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.lstm_ext.lstm_layer(input, h0, c0, list(weights), batch_sizes, bias, bidirectional)


_LAYERS: dict[str, LayerFunction] = {
    "none": _operator,
    "grad and vmap": transforms.lstm_layer,
    "others": reference.lstm_layer,
}


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


def _is_plain(grad: Tensor) -> bool:
    # is_grads_batched=True hands in batches that look like plain tensors and have no memory of their own.
    return type(grad) in _PLAIN_TYPES and not torch._C._functorch.is_legacy_batchedtensor(grad)


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
        ctx.save_for_backward(input, h0, c0, batch_sizes, *weights, output, *saved)
        return output, h_n, c_n

    @staticmethod
    def backward(ctx, grad_output, grad_h_n, grad_c_n):
        kept = ctx.saved_tensors  # once: checkpoint recomputes it at the first access and refuses a second
        end = 4 + ctx.weight_count
        (input, h0, c0, batch_sizes), weights = kept[:4], kept[4:end]
        wanted = ctx.needs_input_grad[1:4] + ctx.needs_input_grad[7:]
        if grad_output is None and grad_h_n is None and grad_c_n is None:
            grads = [None] * len(wanted)
        elif (
            torch.is_grad_enabled()  # create_graph=True: the gradients must themselves be differentiable
            or not _is_direct(input, h0, c0, weights)
            or not all([g is None or _is_plain(g) for g in (grad_output, grad_h_n, grad_c_n)])
        ):
            grads = _differentiable_gradients(
                (grad_output, grad_h_n, grad_c_n),
                (input, h0, c0, *weights),
                batch_sizes,
                ctx.bias,
                ctx.bidirectional,
                wanted,
            )
        else:
            output, *saved = kept[end:]
            grads = ctx.kernels.lstm_layer_backward(
                grad_output,
                grad_h_n,
                grad_c_n,
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
        return None, *grads[:3], None, None, None, *grads[3:]


def _differentiable_gradients(grad_outputs, inputs, batch_sizes, bias, bidirectional, wanted):
    """The gradients of the wanted inputs as a differentiable function of inputs and grad_outputs."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # A view of each input, so that differentiation stops here even if one input was computed from another.
        local = [t.view_as(t) if w else t for t, w in zip(inputs, wanted, strict=True)]
        outputs = reference.lstm_layer(*local[:3], local[3:], batch_sizes, bias, bidirectional)
        pairs = [(y, g) for y, g in zip(outputs, grad_outputs, strict=True) if g is not None]
        grads = iter(
            torch.autograd.grad(
                [y for y, _ in pairs],
                [t for t, w in zip(local, wanted, strict=True) if w],
                [g for _, g in pairs],
                create_graph=create_graph,
                allow_unused=True,
            )
        )
    return [next(grads) if w else None for w in wanted]
