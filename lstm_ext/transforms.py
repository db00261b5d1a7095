"""The layer for what looks into the computation and may differentiate it again.

A pair of `autograd.Function`s around the registered operators, the layer and its gradients, in the style that
functorch asks for (`setup_context`, a rule for `vmap`): they serve ``grad``, ``vjp``, ``jacrev`` and ``vmap`` of
``torch.func`` in any nesting, dispatch modes, and ``create_graph=True``. Second derivatives are those of the equations
of `reference`, and so is everything where forward-mode AD is on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad

from . import reference

__all__ = [
    "LEGACY_VMAP",
    "OPERATOR_TYPES",
    "are_supported",
    "gradients_of",
    "layer_gradients",
    "lstm_layer",
    "saved",
]

# Types of tensors that the operators take: those with numbers, and those that their fake kernels serve.
OPERATOR_TYPES = frozenset((Tensor, torch.nn.Parameter, FakeTensor, FunctionalTensor))

# Active within the vmap of is_grads_batched=True and of torch.autograd.functional, whose batches look like plain
# tensors and have no memory of their own.
LEGACY_VMAP: Any = torch._C._parse_dispatch_key("VmapMode")

_Dims = Sequence[Any]  # for each argument, where the samples lie in it, or None
_Tensors = tuple[Tensor, ...]


def are_supported() -> bool:
    """Whether this module serves the transforms that are active, if there are any."""
    if forward_ad._current_level >= 0 or torch._C._dispatch_tls_is_dispatch_key_included(LEGACY_VMAP):
        return False
    kinds = {t.key() for t in torch._C._functorch.get_interpreter_stack() or ()}
    return kinds <= {TransformType.Grad, TransformType.Vmap}


def lstm_layer(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    bias: bool,
    bidirectional: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments, results and shapes as in `reference.lstm_layer`; only where `are_supported`."""
    function = _Layer if torch.is_grad_enabled() else _InferenceLayer
    return function.apply(input, h0, c0, batch_sizes, bias, bidirectional, *weights)[:3]


def layer_gradients(
    wanted: Sequence[bool],
    bias: bool,
    bidirectional: bool,
    batch_sizes: Tensor | None,
    grads: Sequence[Tensor | None],
    kept: Sequence[Tensor],
    layer: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The gradients of one layer as a differentiable function of ``grads`` and ``layer``.

    Args:
        wanted: for each of ``layer``, whether its gradient is.
        grads: those of output, h_n and c_n; None means zeros.
        kept: output, gates, cells and hidden, as the operator ``lstm_layer_forward`` gives them.
        layer: input, h0, c0 and the weights.

    Returns:
        One gradient for each of ``layer``, None where it is not wanted, or where all of ``grads`` are None.
    """
    if all([g is None for g in grads]) or not any(wanted):
        return [None] * len(layer)
    arguments: tuple[Any, ...] = (tuple(wanted), bias, bidirectional, batch_sizes, *grads, *kept, *layer)
    if torch.compiler.is_compiling() and torch._C._functorch.get_dynamic_layer_stack_depth() == 0:
        # Compiled autograd: once differentiable. Not so under a transform that dynamo looks at.
        computed = _LayerGradients.forward(*arguments)
    elif are_supported() and all([g is None or type(g) in OPERATOR_TYPES for g in grads]):
        computed = _LayerGradients.apply(*arguments)
    else:
        computed = _reference_gradients(wanted, bias, bidirectional, batch_sizes, grads, layer)
    gradient = iter(computed)
    return [next(gradient) if w else None for w in wanted]


def _reference_gradients(
    wanted: Sequence[bool],
    bias: bool,
    bidirectional: bool,
    batch_sizes: Tensor | None,
    grads: Sequence[Tensor | None],
    layer: Sequence[Tensor | None],
) -> _Tensors:
    """Those that are wanted and no others."""

    def results_of(input: Tensor, h0: Tensor | None, c0: Tensor | None, *weights: Tensor) -> _Tensors:
        return reference.lstm_layer(input, h0, c0, weights, batch_sizes, bias, bidirectional)

    return tuple([g for g in gradients_of(results_of, wanted, layer, grads) if g is not None])


def gradients_of(
    function: Callable[..., _Tensors],
    wanted: Sequence[bool],
    arguments: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The gradients of the ``wanted`` arguments for the ``grads`` of the results, of which None means zeros.

    Differentiable, where gradients are enabled. None for an argument that is not wanted, or if all ``grads`` are.
    """
    if all([g is None for g in grads]) or not any(wanted):
        return [None] * len(arguments)

    def results_of(*chosen: Tensor) -> _Tensors:
        left = iter(chosen)
        results = function(*[next(left) if w else t for t, w in zip(arguments, wanted, strict=True)])
        return tuple([y for y, g in zip(results, grads, strict=True) if g is not None])

    chosen = [t for t, w in zip(arguments, wanted, strict=True) if w and t is not None]
    gradient = iter(_pulled_back(results_of, chosen, [g for g in grads if g is not None]))
    return [next(gradient) if w else None for w in wanted]


def _pulled_back(
    function: Callable[..., _Tensors], primals: Sequence[Tensor], grads: Sequence[Tensor]
) -> _Tensors:
    """The gradients of ``primals`` for the ``grads`` of the results; differentiable, where gradients are enabled."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        # Whatever the tensors are wrapped in, by levels in use or left.
        pull = torch.func.vjp(function, *primals)[1]
        return pull(tuple(grads))
    # Without a transform: torch.func refuses to run under saved_tensors_hooks.
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # A view of each, so that differentiation stops here even if one was computed from another.
        leaves = [t.view_as(t) for t in primals]
        for t in leaves:
            if not t.requires_grad:
                t.requires_grad_()
        return torch.autograd.grad(
            function(*leaves), leaves, grads, create_graph=create_graph, materialize_grads=True
        )


# What one call of a function under vmap becomes: one call on a batch that holds all samples, where they share their
# weights; else one call each. The batch of dense data holds one sample after the other, which moves whole batches when
# data is copied. In packed data the samples of one sequence lie side by side, so that they stay sorted by length.


class _Joining(NamedTuple):
    """Where the axis of the samples goes: into the batch (of packed data: the rows) of each tensor."""

    samples: int
    packed: bool

    def joined(self, x: Tensor | None, dim: int | None, batch_axis: int) -> Tensor | None:
        """All samples of ``x``; each the same where ``x`` has only one."""
        if x is None:
            return None
        axis = self.axis(batch_axis)
        x = x.unsqueeze(axis) if dim is None else x.movedim(dim, axis)
        shape = list(x.shape)
        shape[axis] = self.samples
        return x.expand(shape).flatten(batch_axis, batch_axis + 1)

    def parted(self, x: Tensor, batch_axis: int) -> Tensor:
        return x.unflatten(batch_axis, (-1, self.samples) if self.packed else (self.samples, -1))

    def axis(self, batch_axis: int) -> int:
        """Where `parted` puts the samples."""
        return batch_axis + 1 if self.packed else batch_axis


def _sample(argument: Any, dim: Any, n: int) -> Any:
    return argument.select(dim, n) if isinstance(argument, Tensor) and dim is not None else argument


def _one_by_one(
    call: Callable[..., _Tensors], samples: int, in_dims: _Dims, args: Sequence[Any]
) -> tuple[_Tensors, tuple[int, ...]]:
    results = [call(*[_sample(a, d, n) for a, d in zip(args, in_dims, strict=True)]) for n in range(samples)]
    stacked = tuple([torch.stack(parts) for parts in zip(*results, strict=True)])
    return stacked, (0,) * len(stacked)


def _vmap(
    rule: Callable[[int, _Dims, Sequence[Any]], tuple[_Tensors, _Dims]],
    samples: int,
    in_dims: _Dims,
    args: Sequence[Any],
) -> tuple[_Tensors, _Dims]:
    if samples > 0:
        return rule(samples, in_dims, args)
    # None of one sample, which is all zeros.
    one = [
        a.sum(d, keepdim=True) if isinstance(a, Tensor) and d is not None else a
        for a, d in zip(args, in_dims, strict=True)
    ]
    results, dims = rule(1, in_dims, one)
    return tuple([x if d is None else x.narrow(d, 0, 0) for x, d in zip(results, dims, strict=True)]), dims


def saved(ctx: Any) -> list[Any]:
    """The saved tensors, without the wrappers of a transform that is over (a function from ``vjp`` outlives it)."""
    return [t if t is None else torch._C._functorch.unwrap_if_dead(t) for t in ctx.saved_tensors]


class _LayerFunction(torch.autograd.Function):
    """What the two forms of the layer have in common."""

    @classmethod
    def _rule(cls, samples: int, in_dims: _Dims, args: Sequence[Any]) -> tuple[_Tensors, _Dims]:
        if in_dims[3] is not None:
            raise ValueError(
                "batch_sizes: expected the same for all samples under vmap (in_dims=None), got one for each sample"
            )
        if any([d is not None for d in in_dims[6:]]):
            return _one_by_one(cls.apply, samples, in_dims, args)
        input, h0, c0, batch_sizes, bias, bidirectional, *weights = args
        joining = _Joining(samples, batch_sizes is not None)
        axis = 1 if batch_sizes is None else 0  # of the batch in the input
        results = cls.apply(
            joining.joined(input, in_dims[0], axis),
            joining.joined(h0, in_dims[1], 1),
            joining.joined(c0, in_dims[2], 1),
            None if batch_sizes is None else batch_sizes * samples,
            bias,
            bidirectional,
            *weights,
        )
        axes = (axis, 1, 1) + (axis + 1,) * (len(results) - 3)
        # Without a projection there is no hidden, but an empty tensor in its place.
        parted = [x if x.dim() == 1 else joining.parted(x, a) for x, a in zip(results, axes, strict=True)]
        dims = [None if x.dim() == 1 else joining.axis(a) for x, a in zip(results, axes, strict=True)]
        return tuple(parted), tuple(dims)


class _InferenceLayer(_LayerFunction):
    """Saves nothing."""

    @staticmethod
    def forward(
        input: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        batch_sizes: Tensor | None,
        bias: bool,
        bidirectional: bool,
        *weights: Tensor,
    ) -> _Tensors:
        return torch.ops.lstm_ext.lstm_layer(input, h0, c0, weights, batch_sizes, bias, bidirectional)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        # functorch calls forward with gradients enabled again, for the levels below.
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def vmap(info: Any, in_dims: _Dims, *args: Any) -> tuple[_Tensors, _Dims]:
        return _vmap(_InferenceLayer._rule, info.batch_size, in_dims, args)


class _Layer(_LayerFunction):
    """Results: output, h_n, c_n, gates, cells, hidden."""

    @staticmethod
    def forward(
        input: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        batch_sizes: Tensor | None,
        bias: bool,
        bidirectional: bool,
        *weights: Tensor,
    ) -> _Tensors:
        return torch.ops.lstm_ext.lstm_layer_forward(input, h0, c0, weights, batch_sizes, bias, bidirectional)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        input, h0, c0, batch_sizes, ctx.bias, ctx.bidirectional, *weights = inputs
        kept = (output[0], *output[3:])
        ctx.mark_non_differentiable(*output[3:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(batch_sizes, *kept, input, h0, c0, *weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        batch_sizes, *tensors = saved(ctx)
        needed = ctx.needs_input_grad
        wanted = (*needed[:3], *needed[6:])
        kept, layer = tensors[:4], tensors[4:]
        result = layer_gradients(wanted, ctx.bias, ctx.bidirectional, batch_sizes, grads[:3], kept, layer)
        return (*result[:3], None, None, None, *result[3:])

    @staticmethod
    def vmap(info: Any, in_dims: _Dims, *args: Any) -> tuple[_Tensors, _Dims]:
        return _vmap(_Layer._rule, info.batch_size, in_dims, args)


class _LayerGradients(torch.autograd.Function):
    """The gradients as a function of their own, so that it can be transformed and differentiated again.

    Arguments: wanted, bias, bidirectional, batch_sizes; grad_output, grad_h_n, grad_c_n; output, gates, cells, hidden;
    input, h0, c0, and the weights.
    """

    @staticmethod
    def forward(
        wanted: Sequence[bool],
        bias: bool,
        bidirectional: bool,
        batch_sizes: Tensor | None,
        grad_output: Tensor | None,
        grad_h_n: Tensor | None,
        grad_c_n: Tensor | None,
        output: Tensor,
        gates: Tensor,
        cells: Tensor,
        hidden: Tensor,
        input: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        *weights: Tensor,
    ) -> _Tensors:
        gradients = torch.ops.lstm_ext.lstm_layer_backward(
            grad_output,
            grad_h_n,
            grad_c_n,
            input,
            h0,
            c0,
            weights,
            batch_sizes,
            output,
            gates,
            cells,
            hidden,
            bias,
            bidirectional,
            wanted,
        )
        return tuple([g for g, w in zip(gradients, wanted, strict=True) if w])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        # What was kept of the forward pass is left out: it follows from the layer's arguments, and it is by them
        # that backward differentiates.
        ctx.wanted, ctx.bias, ctx.bidirectional, batch_sizes = inputs[:4]
        ctx.save_for_backward(batch_sizes, *inputs[4:7], *inputs[11:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        batch_sizes, *arguments = saved(ctx)
        needed = (*ctx.needs_input_grad[4:7], *ctx.needs_input_grad[11:])

        def gradients(*chosen: Tensor) -> _Tensors:
            left = iter(chosen)
            full = [next(left) if n else t for t, n in zip(arguments, needed, strict=True)]
            return _reference_gradients(
                ctx.wanted, ctx.bias, ctx.bidirectional, batch_sizes, full[:3], full[3:]
            )

        chosen = [t for t, n in zip(arguments, needed, strict=True) if n]
        computed = iter(_pulled_back(gradients, chosen, grads))
        result = [next(computed) if n else None for n in needed]
        return (None,) * 4 + (*result[:3], None, None, None, None, *result[3:])

    @staticmethod
    def vmap(info: Any, in_dims: _Dims, *args: Any) -> tuple[_Tensors, _Dims]:
        return _vmap(_LayerGradients._rule, info.batch_size, in_dims, args)

    @staticmethod
    def _rule(samples: int, in_dims: _Dims, args: Sequence[Any]) -> tuple[_Tensors, _Dims]:
        wanted, bias, bidirectional, batch_sizes = args[:4]
        if any(wanted[3:]) or any([d is not None for d in in_dims[14:]]):
            # Each sample has gradients of the weights of its own.
            return _one_by_one(_LayerGradients.apply, samples, in_dims, args)
        joining = _Joining(samples, batch_sizes is not None)
        axis = 1 if batch_sizes is None else 0  # of the batch in the input
        axes = (axis, 1, 1, axis, axis + 1, axis + 1, axis + 1, axis, 1, 1)
        joined = [
            x if x is None or x.dim() == 1 else joining.joined(x, d, a)
            for x, d, a in zip(args[4:14], in_dims[4:14], axes, strict=True)
        ]
        sizes = None if batch_sizes is None else batch_sizes * samples
        results = _LayerGradients.apply(wanted, bias, bidirectional, sizes, *joined, *args[14:])
        batch_axes = [a for a, w in zip((axis, 1, 1), wanted[:3], strict=True) if w]
        parted = [joining.parted(x, a) for x, a in zip(results, batch_axes, strict=True)]
        return tuple(parted), tuple([joining.axis(a) for a in batch_axes])
