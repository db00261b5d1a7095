"""torch's own operators for a whole stack of plain layers, used if we have no kernels or they are faster.

One call computes all layers and directions, as in ``torch.nn.LSTM``: cuDNN, MIOpen, MPS and oneDNN do that faster than
layer by layer. Eager calls go to ``torch.lstm``, so that the results have the bits of torch's layer. Compilers,
exporters and dispatch modes get one registered operator, ``lstm_ext::torchs_lstm``: they would unroll torch's.

cuDNN, MIOpen and MPS have no second derivatives. On these, ``create_graph=True`` recomputes the gradients with the
equations; those of a GRU on cuDNN only.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..layer import equations, operators, route, transforms
from ..layer.layer_call import LayerFunction
from ..layer.shapes import weight_counts
from ..layer.tracing import is_jit_tracing
from .arguments import Requested, Stack
from .autocast import in_autocast, result_dtypes
from .stack import run_stack

_Tensors = tuple[Tensor, ...]
_Gradients = tuple[Tensor | None, ...]


class PlainStack(NamedTuple):
    """A stack of plain layers, without its tensors.

    Those are input (T, B, I) or (N, I), h0 (L * D, B, P), c0 (L * D, B, H), and the weights of all layers.
    """

    bias: bool
    num_layers: int
    dropout: float
    training: bool
    bidirectional: bool
    gru: bool = False
    _frozen = ()

    def compute(self, batch_sizes: Tensor | None, tensors: Sequence[Tensor]) -> _Tensors:
        """By torch's operator: output, h_n and c_n."""
        x, h0, c0, *weights = tensors
        return route.torch_lstm(x, h0, c0, weights, batch_sizes, *self[:5])

    def by_layers(
        self,
        layer: LayerFunction,
        batch_sizes: Tensor | None,
        tensors: Sequence[Tensor],
        autocast: torch.dtype | None,
    ) -> _Tensors:
        """The same, layer by layer. The c0 of a GRU is None."""
        options = Requested({"gru": True}, 0.0, 0.0, (0.0, 0.0), self.training, {}) if self.gru else None
        x, h0, c0, *weights = tensors
        n = len(weights) // self.num_layers
        layers = [weights[k : k + n] for k in range(0, len(weights), n)]
        return run_stack(self, layer, layers, x, h0, c0, batch_sizes, options, autocast)[:3]  # type: ignore[arg-type]

    def is_projected(self, tensors: Sequence[Tensor]) -> bool:
        sets = self.num_layers * (2 if self.bidirectional else 1)
        return len(tensors) - 3 == weight_counts(sets, self.bias)[1]


def lstm(
    stack: Stack,
    weights: Sequence[Sequence[Tensor]],
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    batch_sizes: Tensor | None,
    autocast: torch.dtype | None,
    preferred: bool,
) -> _Tensors | None:
    """Output, h_n and c_n; None if the stack runs on our kernels or the equations instead.

    Arguments are those of `run_stack`. `preferred`: see `route.torch_route`.
    """
    way = None if stack._frozen else route.torch_route(x, h0, c0, weights, preferred)
    if way is None:
        return None
    flat = [w for layer in weights for w in layer]
    h0, c0 = route.given_states(x, h0, c0, flat, batch_sizes, len(weights), stack.bidirectional)
    tensors = [x, h0, c0, *flat]
    plain, needs_grad = _plain(stack, len(weights), tensors)
    if way == "operator":
        results = torch.ops.lstm_ext.torchs_lstm(
            x, h0, c0, flat, batch_sizes, *plain[:5], autocast, needs_grad
        )
        return results[:3]
    results = plain.compute(batch_sizes, tensors)
    # On the CPU torch's operator has second derivatives. On other devices the equations cannot draw dropout's masks.
    if not needs_grad or plain.dropout or x.is_cpu or is_jit_tracing():
        return results
    if autocast is None and _hooks_cudnn(results[0], plain, batch_sizes):
        return results
    return _TwiceDifferentiable.apply(plain, batch_sizes, autocast, *results, *tensors)


def gru(
    stack: Stack,
    weights: Sequence[Sequence[Tensor]],
    x: Tensor,
    h0: Tensor | None,
    batch_sizes: Tensor | None,
) -> tuple[Tensor, Tensor] | None:
    """Output and h_n of a stack of plain GRU layers; None if it runs on our kernels or the equations instead."""
    way = None if stack._frozen or route.has_gru(x.device) else route.torch_route(x, h0, None, weights, True)
    if way is None:
        return None
    flat = [w for layer in weights for w in layer]
    h0, _ = route.given_states(x, h0, h0, flat, batch_sizes, len(weights), stack.bidirectional)
    plain, needs_grad = _plain(stack, len(weights), [x, h0, *flat])
    if batch_sizes is None:
        results = torch.gru(x, h0, flat, *plain[:5], False)
    else:
        results = torch.gru(x, batch_sizes, h0, flat, *plain[:5])
    if way == "direct" and needs_grad and not plain.dropout:
        _hooks_cudnn(results[0], plain._replace(gru=True), batch_sizes)
    return results


def _plain(stack: Stack, num_layers: int, tensors: Sequence[Tensor]) -> tuple[PlainStack, bool]:
    """The settings of torch's operator, and whether gradients are requested."""
    needs_grad = torch.is_grad_enabled() and any([t.requires_grad for t in tensors])
    dropout = stack.dropout if stack.training and num_layers > 1 else 0.0
    # cuDNN has gradients in training mode only. Without dropout the mode changes nothing else.
    training = stack.training or (needs_grad and not tensors[0].is_cpu)
    return PlainStack(stack.bias, num_layers, dropout, training, stack.bidirectional), needs_grad


class _TwiceDifferentiable(torch.autograd.Function):
    """The results of torch's operator, and gradients by torch's operator or, where those have gradients, the equations.

    Arguments: the stack, batch_sizes, the dtype of autocast, the results, and the tensors that they were computed from.
    """

    @staticmethod
    def forward(
        ctx: Any,
        plain: PlainStack,
        batch_sizes: Tensor | None,
        autocast: torch.dtype | None,
        *tensors: Tensor,
    ) -> _Tensors:
        ctx.plain, ctx.batch_sizes, ctx.autocast = plain, batch_sizes, autocast
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors[3:])
        return tuple([t.detach() for t in tensors[:3]])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        needs_grad = ctx.needs_input_grad[6:]
        if not torch.is_grad_enabled():
            return (None,) * 3 + grads + (None,) * len(needs_grad)
        gradients = _equation_gradients(
            ctx.plain, ctx.autocast, ctx.batch_sizes, grads, ctx.saved_tensors, needs_grad
        )
        return (None,) * 6 + tuple(gradients)


def _hooks_cudnn(output: Tensor, plain: PlainStack, batch_sizes: Tensor | None) -> bool:
    """Gives second derivatives to results of cuDNN. Takes a third of the time of `_TwiceDifferentiable`."""
    node: Any = output.grad_fn
    # Hooks on saved tensors, as those of torch.utils.checkpoint, may give each of them once only, and cuDNN takes them.
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    if type(node).__name__ != "CudnnRnnBackward0" or hooks is not None:
        return False
    node.register_hook(functools.partial(_gradients_of_cudnn, plain, batch_sizes))
    return True


def _gradients_of_cudnn(
    plain: PlainStack, batch_sizes: Tensor | None, grad_inputs: _Gradients, grads: _Gradients
) -> _Gradients | None:
    """After the backward pass of cuDNN: differentiable gradients in the place of its own, if they are requested.

    They are of the input, the weights, h0 and c0. What was saved is read from the node, which frees it when it ends.
    """
    needs_grad = [g is not None for g in grad_inputs]
    if not torch.is_grad_enabled() or not any(needs_grad):
        return None
    node: Any = torch._C._current_autograd_node()
    tensors = [node._saved_input, node._saved_hx, node._saved_cx, *node._saved_weight]
    needs_grad = [needs_grad[0], *needs_grad[-2:], *needs_grad[1:-2]]
    x, h0, c0, *weights = _equation_gradients(plain, None, batch_sizes, grads, tensors, needs_grad)
    return (x, *weights, h0, c0)


def _equation_gradients(
    plain: PlainStack,
    autocast: torch.dtype | None,
    batch_sizes: Tensor | None,
    grads: Sequence[Tensor | None],
    tensors: Sequence[Tensor],
    needs_grad: Sequence[bool],
) -> list[Tensor | None]:
    """Differentiable gradients, for the tensors that need one."""

    def results(*tensors: Any) -> _Tensors:
        return plain.by_layers(equations.lstm_layer, batch_sizes, tensors, autocast)

    return transforms.gradients_of(results, needs_grad, tensors, grads)


# ---- what compilers, exporters and dispatch modes see


def _split(arguments: Sequence[Any]) -> tuple[PlainStack, Tensor | None, list[Tensor], torch.dtype | None]:
    x, h0, c0, weights, batch_sizes, *plain, autocast = arguments
    return PlainStack(*plain), batch_sizes, [x, h0, c0, *weights], autocast


def _with_autograd() -> Any:
    """Autograd records in this context, although an operator's own function runs below it."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView):
        excluded = excluded.remove(key)
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)


def _graph(arguments: Sequence[Any]) -> tuple[list[Tensor], _Tensors]:
    """The tensors of a call as the leaves of a graph of its own, and its results."""
    plain, batch_sizes, tensors, autocast = _split(arguments)
    device_type = tensors[0].device.type
    with _with_autograd(), torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in tensors]
        with in_autocast(device_type, autocast):
            return leaves, plain.compute(batch_sizes, leaves)


def _forward(*arguments: Any) -> _Tensors:
    *arguments, save = arguments  # type: ignore[assignment]
    # This tensor has no elements: it carries torch's graph, whose saved tensors differ from device to device. It is on
    # the CPU, so that a CUDA graph does not treat it as memory of its own.
    saved = torch.empty(0, dtype=torch.uint8, device="cpu")
    # An exported program may have been traced with gradients and run without them.
    if (
        save
        and not torch.is_inference_mode_enabled()
        and not any([t.is_inference() for t in _split(arguments)[2]])
    ):
        saved.graph = _graph(arguments)  # type: ignore[attr-defined]
        results = saved.graph[1]  # type: ignore[attr-defined]
    else:
        plain, batch_sizes, tensors, autocast = _split(arguments)
        with in_autocast(tensors[0].device.type, autocast):
            results = plain.compute(batch_sizes, tensors)
    return (*[r.detach().contiguous() for r in results], saved)


def _backward(*arguments: Any) -> list[Tensor]:
    *arguments, saved, grad_output, grad_h_n, grad_c_n, needs_grad = arguments  # type: ignore[assignment]
    graph, plain = getattr(saved, "graph", None), _split(arguments)[0]
    # Either a hook on saved tensors replaced it by a copy, or this is the second backward pass.
    if graph is None:
        if plain.dropout:
            raise RuntimeError(
                "LSTM: torch's operator, which computes this layer here, needs what its forward pass saved, and a hook "
                "on saved tensors has copied it: with dropout, do not use save_on_cpu and the like around a compiled "
                "layer"
            )
        graph = _graph(arguments)
    elif not plain.dropout:
        del saved.graph  # type: ignore[attr-defined]
    leaves, results = graph
    grads = (grad_output, grad_h_n, grad_c_n)
    with _with_autograd():
        gradients = iter(
            torch.autograd.grad(
                [r for r, g in zip(results, grads, strict=True) if g is not None],
                [t for t, n in zip(leaves, needs_grad, strict=True) if n],
                [g for g in grads if g is not None],
                retain_graph=plain.dropout > 0,
                materialize_grads=True,
            )
        )
    return [
        next(gradients).contiguous() if n else t.new_empty(0) for t, n in zip(leaves, needs_grad, strict=True)
    ]


def _fake_forward(*arguments: Any) -> _Tensors:
    plain, _, (x, h0, c0, *_), autocast = _split(arguments[:-1])
    directions = 2 if plain.bidirectional else 1
    h_dtype, c_dtype = x.dtype, x.dtype
    if autocast is not None:
        projected = plain.is_projected(_split(arguments[:-1])[2])
        h_dtype, c_dtype = result_dtypes(autocast, x, c0, fused=arguments[4] is None, projected=projected)
    return (
        x.new_empty((*x.shape[:-1], directions * h0.shape[2]), dtype=h_dtype),
        x.new_empty(h0.shape, dtype=h_dtype),
        x.new_empty(c0.shape, dtype=c_dtype),
        torch.empty(0, dtype=torch.uint8, device="cpu"),
    )


def _fake_backward(*arguments: Any) -> list[Tensor]:
    tensors, needs_grad = _split(arguments[:-5])[2], arguments[-1]
    return [t.new_empty(t.shape if n else (0,)) for t, n in zip(tensors, needs_grad, strict=True)]


def _set_up(ctx: Any, inputs: Sequence[Any], output: _Tensors) -> None:
    *arguments, _ = inputs
    plain, batch_sizes, tensors, ctx.autocast = _split(arguments)
    ctx.plain = plain
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[3], batch_sizes, *tensors)


def _differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    saved, batch_sizes, *tensors = ctx.saved_tensors
    grads = grads[:3]
    x, h0, c0, *weights = tensors
    needs_grad = [*ctx.needs_input_grad[:3], *ctx.needs_input_grad[3]]
    if all([g is None for g in grads]):
        gradients: list[Tensor | None] = [None] * len(tensors)
    elif torch.is_grad_enabled() and not torch.compiler.is_compiling():
        if ctx.plain.dropout:
            raise RuntimeError(
                "LSTM: create_graph=True with dropout between layers is not supported in a graph or under a dispatch "
                "mode where torch's operator computes the layer"
            )
        gradients = _equation_gradients(ctx.plain, ctx.autocast, batch_sizes, grads, tensors, needs_grad)
    else:
        layer = (x, h0, c0, weights, batch_sizes, *ctx.plain[:5], ctx.autocast)
        computed = torch.ops.lstm_ext.torchs_lstm_backward(*layer, saved, *grads, needs_grad)
        gradients = [g if n else None for g, n in zip(computed, needs_grad, strict=True)]
    return (*gradients[:3], gradients[3:], *[None] * 8)


def _flops(input: Any, h0: Any, c0: Any, weights: Sequence[Any], *settings: Any, **_: Any) -> int:
    _, has_bias, num_layers, _, _, bidirectional, *_ = settings
    n = len(weights) // num_layers
    return sum(
        operators.forward_flops(input, weights[k : k + n], has_bias, bidirectional)
        for k in range(0, len(weights), n)
    )


_ARGUMENTS = (
    "Tensor input, Tensor h0, Tensor c0, Tensor[] weights, Tensor? batch_sizes, bool has_bias, int num_layers, "
    "float dropout, bool training, bool bidirectional, ScalarType? autocast"
)
# A CUDA graph must not keep the Python objects of the forward pass, and dropout draws random numbers.
_TAGS = [torch.Tag.pt2_compliant_tag, torch.Tag.nondeterministic_seeded]
_TAGS += [torch.Tag.cudagraph_unsafe] if hasattr(torch.Tag, "cudagraph_unsafe") else []


def _register() -> torch.library.Library:
    library = torch.library.Library("lstm_ext", "FRAGMENT")
    forward, backward = "torchs_lstm", "torchs_lstm_backward"
    library.define(
        f"{forward}({_ARGUMENTS}, bool save) -> (Tensor output, Tensor h_n, Tensor c_n, Tensor saved)",
        tags=_TAGS,
    )
    library.define(
        f"{backward}({_ARGUMENTS}, Tensor saved, Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, "
        "bool[] needs_grad) -> Tensor[]",
        tags=_TAGS,
    )
    for name, compute, fake in ((forward, _forward, _fake_forward), (backward, _backward, _fake_backward)):
        library.impl(name, compute, "CompositeExplicitAutograd")
        torch.library.register_fake(f"lstm_ext::{name}", fake, lib=library)
    torch.library.register_autograd(
        f"lstm_ext::{forward}", _differentiate, setup_context=_set_up, lib=library
    )
    # The gradients through time and of the weights need twice the products of the forward pass.
    operators.register_flops({forward: _flops, backward: lambda *a, **k: 2 * _flops(*a, **k)})
    return library


# torch keeps operators for the life of the process, even if this module is imported again.
if not torch._C._jit_get_operation("lstm_ext::torchs_lstm")[0]:
    _library = _register()
