"""The layer for a tracer or transform, which may differentiate it again.

A pair of `autograd.Function`s around the registered operators, the layer and its gradients, in the style that
functorch asks for (`setup_context`, a rule for `vmap`): they serve ``grad``, ``vjp``, ``jacrev`` and ``vmap`` of
``torch.func`` in any nesting, dispatch modes, and ``create_graph=True``. Second derivatives are those of `equations`,
and so is everything where forward-mode AD is on.
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
from torch.utils.checkpoint import checkpoint

from . import equations
from .layer_call import LayerCall, LayerOptions, LayerResults, Signature
from .tracing import LEGACY_VMAP, is_active, is_exporting

# Types of tensors that the operators accept: those with numbers, and those of their fake kernels.
OPERATOR_TYPES = frozenset((Tensor, torch.nn.Parameter, FakeTensor, FunctionalTensor))
# The layer's own results; the results after them are saved for the backward pass.
_RESULTS = 5
_SAVED = 5
# The arguments of the backward operator after the layer's: the gradients of the results, the output, and the saved
# tensors.
_BACKWARD_ARGUMENTS = (
    *("grad_output", "grad_h_n", "grad_c_n", "grad_cell_states", "grad_gate_values"),
    *("output", "gates", "cells", "hidden", "norm_products", "norm_factors"),
)

_Dims = Sequence[Any]  # for each argument, the axis of the samples, or None
_Tensors = tuple[Tensor, ...]


def are_supported() -> bool:
    """Whether this module supports the active transforms, if there are any."""
    if forward_ad._current_level >= 0 or is_active(LEGACY_VMAP):
        return False
    kinds = {t.key() for t in torch._C._functorch.get_interpreter_stack() or ()}
    return kinds <= {TransformType.Grad, TransformType.Vmap}


def lstm_layer(call: LayerCall) -> LayerResults:
    """Arguments, results and shapes are those of `equations.lstm_layer`; call only if `are_supported`."""
    results = flat_lstm_layer(tuple(call.signature()), call.batch_sizes, call.tensors())
    return _requested(call, results)


def operator(call: LayerCall) -> LayerResults:
    """The layer by the registered operator, which is differentiable once."""
    layer, options = _operator_arguments(call)
    return _requested(call, torch.ops.lstm_ext.lstm_layer(*layer, **options))


def _requested(call: LayerCall, results: _Tensors) -> LayerResults:
    """The results of an operator, with None in place of those that were not requested."""
    *always, cells, gates = results
    options = call.options
    return (*always, cells if options.return_cell_states else None, gates if options.return_gates else None)


def flat_lstm_layer(
    signature: Sequence[Any], batch_sizes: Tensor | None, tensors: Sequence[Tensor | None]
) -> _Tensors:
    """The layer of a signature and its tensors; all arguments are of types that a graph can hold."""
    function = _Layer if torch.is_grad_enabled() else _InferenceLayer
    return function.apply(Signature(*signature), batch_sizes, *tensors)[:_RESULTS]


def _operator_arguments(call: LayerCall) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call that all operators share."""
    layer = (
        call.input,
        call.h0,
        call.c0,
        list(call.weights),
        call.batch_sizes,
        call.bias,
        call.bidirectional,
    )
    return layer, call.options.as_keywords()


def layer_gradients(
    signature: Signature,
    needs_grad: Sequence[bool],
    batch_sizes: Tensor | None,
    grads: Sequence[Tensor | None],
    saved: Sequence[Tensor] | None,
    tensors: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The gradients of one layer as a differentiable function of ``grads`` and ``tensors``.

    Args:
        signature, batch_sizes, tensors: the layer.
        needs_grad: whether a gradient is requested, for each of the first ``signature.differentiable`` tensors.
        grads: those of the layer's results; None means zeros.
        saved: the output and the tensors that the forward operator saved; None if they were not kept.

    Returns:
        One gradient for each entry of ``needs_grad``: None where it is False, or if all of ``grads`` are None.
    """
    if all([g is None for g in grads]) or not any(needs_grad):
        return [None] * len(needs_grad)
    arguments: tuple[Any, ...] = (signature, tuple(needs_grad), batch_sizes, *grads, *(saved or ()), *tensors)
    computed: Sequence[Tensor]
    if saved is None:
        computed = _equation_gradients(signature, needs_grad, batch_sizes, grads, tensors)
    elif torch.compiler.is_compiling() and torch._C._functorch.get_dynamic_layer_stack_depth() == 0:
        # Compiled autograd: once differentiable, except under a transform that dynamo traces.
        computed = _LayerGradients.forward(*arguments)
    elif are_supported() and all([g is None or type(g) in OPERATOR_TYPES for g in grads]):
        computed = _LayerGradients.apply(*arguments)
    else:
        computed = _equation_gradients(signature, needs_grad, batch_sizes, grads, tensors)
    gradient = iter(computed)
    return [next(gradient) if needed else None for needed in needs_grad]


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
    return layer_gradients(call.signature(), needs_grad, batch_sizes, grads, saved_results, call.tensors())


def _equation_gradients(
    signature: Signature,
    needs_grad: Sequence[bool],
    batch_sizes: Tensor | None,
    grads: Sequence[Tensor | None],
    tensors: Sequence[Tensor | None],
) -> _Tensors:
    """Returns the requested gradients only."""
    constants = tensors[signature.differentiable :]

    def results(*own: Tensor | None) -> LayerResults:
        return equations.lstm_layer(signature.call(batch_sizes, (*own, *constants)))

    gradients = gradients_of(results, needs_grad, tensors[: signature.differentiable], grads)
    return tuple([g for g in gradients if g is not None])


def gradients_of(
    function: Callable[..., LayerResults],
    needs_grad: Sequence[bool],
    arguments: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The requested gradients for the ``grads`` of the results; a grad of None means zeros.

    Differentiable if gradients are enabled. None for an argument that needs no gradient, or if all ``grads`` are None.
    """
    if all([g is None for g in grads]) or not any(needs_grad):
        return [None] * len(arguments)

    def results(*chosen: Tensor) -> _Tensors:
        left = iter(chosen)
        all_results = function(
            *[next(left) if needed else t for t, needed in zip(arguments, needs_grad, strict=True)]
        )
        return tuple([y for y, g in zip(all_results, grads, strict=True) if g is not None])

    chosen = [t for t, needed in zip(arguments, needs_grad, strict=True) if needed and t is not None]
    gradient = iter(_pulled_back(results, chosen, [g for g in grads if g is not None]))
    return [next(gradient) if needed else None for needed in needs_grad]


def _pulled_back(
    function: Callable[..., _Tensors], primals: Sequence[Tensor], grads: Sequence[Tensor]
) -> _Tensors:
    """The gradients of ``primals`` for the ``grads`` of the results; differentiable if gradients are enabled."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        # This works for all wrappers, of active levels and of levels that are over.
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


# vmap turns one call of a function into one call on a batch of all samples if they share their weights; else into one
# call for each sample. In dense data the batch holds one sample after the other, so that copies move whole batches. In
# packed data the samples of one sequence are adjacent, so that they stay sorted by length.


class _Joining(NamedTuple):
    """The place of the samples' axis: it joins the batch (of packed data: the rows) of each tensor."""

    samples: int
    packed: bool

    def join(self, x: Tensor | None, dim: int | None, batch_axis: int) -> Tensor | None:
        """All samples of ``x``; if ``x`` has only one, it is repeated."""
        if x is None:
            return None
        axis = self.axis(batch_axis)
        x = x.unsqueeze(axis) if dim is None else x.movedim(dim, axis)
        shape = list(x.shape)
        shape[axis] = self.samples
        return x.expand(shape).flatten(batch_axis, batch_axis + 1)

    def split(self, x: Tensor, batch_axis: int) -> Tensor:
        return x.unflatten(batch_axis, (-1, self.samples) if self.packed else (self.samples, -1))

    def axis(self, batch_axis: int) -> int:
        """The axis of the samples after `split`."""
        return batch_axis + 1 if self.packed else batch_axis


def _sample(argument: Any, dim: Any, n: int) -> Any:
    return argument.select(dim, n) if isinstance(argument, Tensor) and dim is not None else argument


def _one_by_one(
    call: Callable[..., _Tensors], samples: int, in_dims: _Dims, args: Sequence[Any]
) -> tuple[_Tensors, tuple[int, ...]]:
    results = [call(*[_sample(a, d, n) for a, d in zip(args, in_dims, strict=True)]) for n in range(samples)]
    stacked = tuple([torch.stack(parts) for parts in zip(*results, strict=True)])
    return stacked, (0,) * len(stacked)


def _saved_tensors(ctx: Any) -> list[Any]:
    """The saved tensors, without the wrappers of a transform that is over (a function from ``vjp`` outlives it)."""
    return [t if t is None else torch._C._functorch.unwrap_if_dead(t) for t in ctx.saved_tensors]


def _join_tensors(
    joining: _Joining, tensors: Sequence[Any], in_dims: _Dims, axes: Sequence[int | None]
) -> list[Any]:
    return [
        x if axis is None else joining.join(x, dim, axis)
        for x, dim, axis in zip(tensors, in_dims, axes, strict=True)
    ]


def _split_tensors(
    joining: _Joining, results: Sequence[Tensor], axes: Sequence[int]
) -> tuple[_Tensors, tuple[int | None, ...]]:
    # An absent result, e.g. hidden without a projection, is an empty tensor.
    empty = [x.dim() == 1 for x in results]
    parted = [x if e else joining.split(x, a) for x, e, a in zip(results, empty, axes, strict=True)]
    return tuple(parted), tuple([None if e else joining.axis(a) for e, a in zip(empty, axes, strict=True)])


class _Batched(torch.autograd.Function):
    """A function with a rule for vmap."""

    # _rule(samples, in_dims, args): the results for one sample or more, and the axes of the samples in them.
    _rule: Callable[..., tuple[_Tensors, _Dims]]

    @classmethod
    def vmap(cls, info: Any, in_dims: _Dims, *args: Any) -> tuple[_Tensors, _Dims]:
        if info.batch_size > 0:
            return cls._rule(info.batch_size, in_dims, args)
        # No samples: computes one sample of zeros for the shapes, and keeps none of it.
        one = [
            a.sum(d, keepdim=True).to(a.dtype) if isinstance(a, Tensor) and d is not None else a
            for a, d in zip(args, in_dims, strict=True)
        ]
        results, dims = cls._rule(1, in_dims, one)
        return tuple(
            [x if d is None else x.narrow(d, 0, 0) for x, d in zip(results, dims, strict=True)]
        ), dims


class _LayerFunction(_Batched):
    """The base of both forms of the layer. Arguments: the signature, batch_sizes, and the call's tensors."""

    @classmethod
    def _rule(cls, samples: int, in_dims: _Dims, args: Sequence[Any]) -> tuple[_Tensors, _Dims]:
        signature, batch_sizes, *tensors = args
        if in_dims[1] is not None:
            raise ValueError(
                "batch_sizes: expected the same for all samples under vmap (in_dims=None), got one for each sample"
            )
        packed = batch_sizes is not None
        axes, dims = signature.batch_axes(packed), in_dims[2:]
        if any([d is not None and axis is None for d, axis in zip(dims, axes, strict=True)]):
            return _one_by_one(cls.apply, samples, in_dims, args)
        joining = _Joining(samples, packed)
        results = cls.apply(
            signature,
            batch_sizes * samples if packed else None,
            *_join_tensors(joining, tensors, dims, axes),
        )
        return _split_tensors(joining, results, signature.result_axes(packed, len(results)))


class _InferenceLayer(_LayerFunction):
    """Saves nothing."""

    @staticmethod
    def forward(signature: Signature, batch_sizes: Tensor | None, *tensors: Any) -> _Tensors:
        layer, options = _operator_arguments(signature.call(batch_sizes, tensors))
        return torch.ops.lstm_ext.lstm_layer(*layer, **options)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        # functorch calls forward with gradients enabled again, for the levels below.
        ctx.mark_non_differentiable(*output)


class _Layer(_LayerFunction):
    """Results: those of the layer, and the tensors that its forward operator saves for the backward pass."""

    @staticmethod
    def forward(signature: Signature, batch_sizes: Tensor | None, *tensors: Any) -> _Tensors:
        layer, options = _operator_arguments(signature.call(batch_sizes, tensors))
        return torch.ops.lstm_ext.lstm_layer_forward(*layer, **options)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        signature, batch_sizes, *tensors = inputs
        ctx.signature = signature
        constant = list(output[_RESULTS:])
        requested = [signature.value(f"return_{name}") for name in ("cell_states", "gates")]
        constant += [x for x, request in zip(output[3:_RESULTS], requested, strict=True) if not request]
        ctx.mark_non_differentiable(*constant)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(batch_sizes, output[0], *output[_RESULTS:], *tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        signature = ctx.signature
        batch_sizes, *rest = _saved_tensors(ctx)
        saved, tensors = rest[: 1 + _SAVED], rest[1 + _SAVED :]
        needs_grad = ctx.needs_input_grad[2 : 2 + signature.differentiable]
        result = layer_gradients(signature, needs_grad, batch_sizes, grads[:_RESULTS], saved, tensors)
        return None, None, *result, *[None] * (len(tensors) - signature.differentiable)


class _LayerGradients(_Batched):
    """The gradients as a function of their own, so that it can be transformed and differentiated again.

    Arguments: the signature, needs_grad, batch_sizes; the gradients of the layer's results; the output and the saved
    tensors; the call's tensors.
    """

    @staticmethod
    def forward(
        signature: Signature, needs_grad: Sequence[bool], batch_sizes: Tensor | None, *arguments: Any
    ) -> _Tensors:
        grads, saved, tensors = _LayerGradients._parts(arguments)
        layer, options = _operator_arguments(signature.call(batch_sizes, tensors))
        options |= dict(zip(_BACKWARD_ARGUMENTS, (*grads, *saved), strict=True))
        gradients = torch.ops.lstm_ext.lstm_layer_backward(*layer, **options, needs_grad=needs_grad)
        return tuple([g for g, needed in zip(gradients, needs_grad, strict=True) if needed])

    @staticmethod
    def _parts(arguments: Sequence[Any]) -> tuple[Sequence[Any], ...]:
        """The gradients of the results, the output and the saved tensors, and the call's tensors."""
        end = _RESULTS + 1 + _SAVED
        return arguments[:_RESULTS], arguments[_RESULTS:end], arguments[end:]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        # The saved tensors of the forward pass are left out: they follow from the layer's arguments, and backward
        # differentiates with respect to those.
        ctx.signature, ctx.needs_grad, batch_sizes, *arguments = inputs
        grads, _, tensors = _LayerGradients._parts(arguments)
        ctx.save_for_backward(batch_sizes, *grads, *tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        signature = ctx.signature
        batch_sizes, *arguments = _saved_tensors(ctx)
        needed = list(ctx.needs_input_grad[3:])
        del needed[_RESULTS : _RESULTS + 1 + _SAVED]
        constants = len(arguments) - _RESULTS - signature.differentiable
        needed[_RESULTS + signature.differentiable :] = [False] * constants

        def gradients(*chosen: Tensor) -> _Tensors:
            left = iter(chosen)
            full = [next(left) if n else t for t, n in zip(arguments, needed, strict=True)]
            return _equation_gradients(
                signature, ctx.needs_grad, batch_sizes, full[:_RESULTS], full[_RESULTS:]
            )

        chosen = [t for t, n in zip(arguments, needed, strict=True) if n]
        computed = iter(_pulled_back(gradients, chosen, grads))
        result = [next(computed) if n else None for n in needed]
        saved = (None,) * (1 + _SAVED)
        return (None,) * 3 + (*result[:_RESULTS], *saved, *result[_RESULTS:])

    @classmethod
    def _rule(cls, samples: int, in_dims: _Dims, args: Sequence[Any]) -> tuple[_Tensors, _Dims]:
        signature, needs_grad, batch_sizes, *arguments = args
        packed = batch_sizes is not None
        dims = in_dims[3:]
        axes = signature.batch_axes(packed)
        of_parameters = any([n and axis is None for n, axis in zip(needs_grad, axes, strict=False)])
        own = cls._parts(dims)[2]
        if of_parameters or any([d is not None and axis is None for d, axis in zip(own, axes, strict=True)]):
            # Each sample has its own weights, or its own gradients of them.
            return _one_by_one(cls.apply, samples, in_dims, args)
        joining = _Joining(samples, packed)
        result_axes = signature.result_axes(packed, _RESULTS + _SAVED)
        _, saved, _ = cls._parts(arguments)
        all_axes = [
            *result_axes[:_RESULTS],
            result_axes[0],
            *[None if x.dim() == 1 else a for x, a in zip(saved[1:], result_axes[_RESULTS:], strict=True)],
            *axes,
        ]
        joined = _join_tensors(joining, arguments, dims, all_axes)
        sizes = batch_sizes * samples if packed else None
        results = cls.apply(signature, needs_grad, sizes, *joined)
        batch_axes = [axis for axis, n in zip(axes, needs_grad, strict=False) if n and axis is not None]
        parted = [joining.split(x, a) for x, a in zip(results, batch_axes, strict=True)]
        return tuple(parted), tuple([joining.axis(a) for a in batch_axes])


# ---- a function whose results are computed once more in the backward pass


def recomputed(function: Callable[..., _Tensors], tensors: Sequence[Tensor | None]) -> _Tensors:
    """``function(*tensors)``, which saves only ``tensors`` for its backward pass."""
    if is_exporting() or not torch.is_grad_enabled():
        return function(*tensors)
    if torch.compiler.is_compiling():
        # The compilers support this one, and it saves the same. All random masks are among the arguments.
        return checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False)
    return _Recomputed.apply(function, *tensors)


class _Recomputed(torch.autograd.Function):
    """A function of tensors, computed again in the backward pass; differentiable again and transformable."""

    generate_vmap_rule = True

    @staticmethod
    def forward(function: Callable[..., _Tensors], *arguments: Tensor | None) -> _Tensors:
        with torch.no_grad():
            return function(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.function, *arguments = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*arguments)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *gradients_of(ctx.function, ctx.needs_input_grad[1:], _saved_tensors(ctx), grads)
