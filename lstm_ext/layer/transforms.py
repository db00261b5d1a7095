"""The layer for what looks into the computation and may differentiate it again.

A pair of `autograd.Function`s around the registered operators, the layer and its gradients, in the style that
functorch asks for (`setup_context`, a rule for `vmap`): they serve ``grad``, ``vjp``, ``jacrev`` and ``vmap`` of
``torch.func`` in any nesting, dispatch modes, and ``create_graph=True``. Second derivatives are those of the equations
of `reference`, and so is everything where forward-mode AD is on. The plain layer is the layer without extras.
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

from . import equations
from .options import LayerExtras
from .tracing import LEGACY_VMAP, is_active

__all__ = [
    "OPERATOR_TYPES",
    "LayerCall",
    "are_supported",
    "flat_lstm_layer",
    "flattened",
    "gradients_of",
    "layer_gradients",
    "lstm_layer",
    "saved",
]

# Types of tensors that the operators take: those with numbers, and those that their fake kernels serve.
OPERATOR_TYPES = frozenset((Tensor, torch.nn.Parameter, FakeTensor, FunctionalTensor))

_Dims = Sequence[Any]  # for each argument, where the samples lie in it, or None
_Tensors = tuple[Tensor, ...]


def are_supported() -> bool:
    """Whether this module serves the transforms that are active, if there are any."""
    if forward_ad._current_level >= 0 or is_active(LEGACY_VMAP):
        return False
    kinds = {t.key() for t in torch._C._functorch.get_interpreter_stack() or ()}
    return kinds <= {TransformType.Grad, TransformType.Vmap}


class LayerCall(NamedTuple):
    """What a layer computes, without its tensors.

    Those lie in one sequence: input, h0, c0 and the weights; with extras also reset_h, reset_c and the parameters of
    norm, which have gradients as well, and then resets, lengths, recurrent_mask and the two masks of zoneout.
    """

    bias: bool
    bidirectional: bool
    weight_count: int
    norm_count: int = -1  # -1 for the plain layer
    zoneout_h: float = 0.0
    zoneout_c: float = 0.0
    return_cell_states: bool = False
    return_gates: bool = False

    @property
    def has_extras(self) -> bool:
        return self.norm_count >= 0

    @property
    def weights(self) -> slice:
        return slice(3, 3 + self.weight_count)

    @property
    def differentiable(self) -> int:
        """How many of the tensors have gradients: the first ones."""
        return 3 + self.weight_count + (2 + self.norm_count if self.has_extras else 0)

    @property
    def results(self) -> int:
        """How many results the layer has, before those that the backward pass needs."""
        return 5 if self.has_extras else 3

    def operands(self, tensors: Sequence[Any]) -> tuple[Any, ...]:
        """The extras as the operators take them; none for the plain layer."""
        if not self.has_extras:
            return ()
        reset_h, reset_c, *norm = tensors[3 + self.weight_count : self.differentiable]
        resets, lengths, mask, kept_h, kept_c = tensors[self.differentiable :]
        return (resets, reset_h, reset_c, lengths, mask, kept_h, kept_c, self.zoneout_h, self.zoneout_c, norm)

    def arguments(self, batch_sizes: Tensor | None, tensors: Sequence[Any]) -> tuple[Any, ...]:
        """Those that all operators have."""
        return (
            *tensors[:3],
            list(tensors[self.weights]),
            batch_sizes,
            self.bias,
            self.bidirectional,
            *self.operands(tensors),
        )

    def on_reference(self, batch_sizes: Tensor | None, tensors: Sequence[Any]) -> tuple[Any, ...]:
        extras = ()
        if self.has_extras:
            asked = self.return_cell_states, self.return_gates
            extras = (LayerExtras.from_operands(self.operands(tensors), *asked),)
        return equations.lstm_layer(
            *tensors[:3],
            tensors[self.weights],
            batch_sizes,
            self.bias,
            self.bidirectional,
            *extras,
        )

    def batch_axes(self, packed: bool) -> tuple[int | None, ...]:
        """Of each tensor, where its batch (of packed data: the rows) lies; None for what belongs to the layer."""
        axis = 0 if packed else 1  # in the input
        axes = (axis, 1, 1) + (None,) * self.weight_count
        if self.has_extras:
            axes += (1, 1) + (None,) * self.norm_count + (axis, 0, 1, axis + 1, axis + 1)
        return axes

    def result_axes(self, packed: bool, count: int) -> tuple[int, ...]:
        """The same for the results of the layer, of which the last are those that the backward pass needs."""
        axis = 0 if packed else 1
        return (axis, 1, 1) + (axis + 1,) * (count - 3)


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
    """Arguments, results and shapes as in `reference.lstm_layer`; only where `are_supported`."""
    if extras is None:
        return flat_lstm_layer(input, h0, c0, weights, batch_sizes, bias, bidirectional)
    asked = extras.return_cell_states, extras.return_gates
    *results, cells, gates = flat_lstm_layer(
        input, h0, c0, weights, batch_sizes, bias, bidirectional, extras.operands(), *asked
    )
    return *results, cells if asked[0] else None, gates if asked[1] else None


def flat_lstm_layer(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    bias: bool,
    bidirectional: bool,
    operands: Sequence[Any] | None = None,
    return_cell_states: bool = False,
    return_gates: bool = False,
) -> _Tensors:
    """The layer with the extras as `LayerExtras.operands`: nothing here that a graph cannot hold as an argument."""
    call, tensors = flattened(
        (input, h0, c0, *weights), bias, bidirectional, operands, return_cell_states, return_gates
    )
    function = _Layer if torch.is_grad_enabled() else _InferenceLayer
    return function.apply(call, batch_sizes, *tensors)[: call.results]


def flattened(
    tensors: Sequence[Tensor | None],
    bias: bool,
    bidirectional: bool,
    operands: Sequence[Any] | None = None,
    return_cell_states: bool = False,
    return_gates: bool = False,
) -> tuple[LayerCall, tuple[Any, ...]]:
    """The layer as a call and its tensors, of ``tensors`` (input, h0, c0 and the weights) and all else."""
    weight_count = len(tensors) - 3
    if operands is None:
        return LayerCall(bias, bidirectional, weight_count), tuple(tensors)
    resets, reset_h, reset_c, lengths, mask, kept_h, kept_c, *shares, norm = operands
    call = LayerCall(bias, bidirectional, weight_count, len(norm), *shares, return_cell_states, return_gates)
    return call, (*tensors, reset_h, reset_c, *norm, resets, lengths, mask, kept_h, kept_c)


def layer_gradients(
    call: LayerCall,
    wanted: Sequence[bool],
    batch_sizes: Tensor | None,
    grads: Sequence[Tensor | None],
    kept: Sequence[Tensor] | None,
    tensors: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The gradients of one layer as a differentiable function of ``grads`` and ``tensors``.

    Args:
        call, tensors: the layer.
        wanted: for each of the first ``call.differentiable`` of ``tensors``, whether its gradient is.
        grads: those of the layer's results; None means zeros.
        kept: output, gates, cells, hidden and what follows, as the forward operator gives them; None where they were
            not kept.

    Returns:
        One gradient for each entry of ``wanted``, None where it is not wanted, or where all of ``grads`` are None.
    """
    if all([g is None for g in grads]) or not any(wanted):
        return [None] * len(wanted)
    arguments: tuple[Any, ...] = (call, tuple(wanted), batch_sizes, *grads, *(kept or ()), *tensors)
    computed: Sequence[Tensor]
    if kept is None:
        computed = _reference_gradients(call, wanted, batch_sizes, grads, tensors)
    elif torch.compiler.is_compiling() and torch._C._functorch.get_dynamic_layer_stack_depth() == 0:
        # Compiled autograd: once differentiable. Not so under a transform that dynamo looks at.
        computed = _LayerGradients.forward(*arguments)
    elif are_supported() and all([g is None or type(g) in OPERATOR_TYPES for g in grads]):
        computed = _LayerGradients.apply(*arguments)
    else:
        computed = _reference_gradients(call, wanted, batch_sizes, grads, tensors)
    gradient = iter(computed)
    return [next(gradient) if w else None for w in wanted]


def _reference_gradients(
    call: LayerCall,
    wanted: Sequence[bool],
    batch_sizes: Tensor | None,
    grads: Sequence[Tensor | None],
    tensors: Sequence[Tensor | None],
) -> _Tensors:
    """Those that are wanted and no others."""
    constants = tensors[call.differentiable :]

    def results_of(*own: Tensor | None) -> _Tensors:
        return call.on_reference(batch_sizes, (*own, *constants))

    gradients = gradients_of(results_of, wanted, tensors[: call.differentiable], grads)
    return tuple([g for g in gradients if g is not None])


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
        a.sum(d, keepdim=True).to(a.dtype) if isinstance(a, Tensor) and d is not None else a
        for a, d in zip(args, in_dims, strict=True)
    ]
    results, dims = rule(1, in_dims, one)
    return tuple([x if d is None else x.narrow(d, 0, 0) for x, d in zip(results, dims, strict=True)]), dims


def saved(ctx: Any) -> list[Any]:
    """The saved tensors, without the wrappers of a transform that is over (a function from ``vjp`` outlives it)."""
    return [t if t is None else torch._C._functorch.unwrap_if_dead(t) for t in ctx.saved_tensors]


def _joined_tensors(
    joining: _Joining, tensors: Sequence[Any], in_dims: _Dims, axes: Sequence[int | None]
) -> list[Any]:
    return [
        x if axis is None else joining.joined(x, dim, axis)
        for x, dim, axis in zip(tensors, in_dims, axes, strict=True)
    ]


def _parted_tensors(
    joining: _Joining, results: Sequence[Tensor], axes: Sequence[int]
) -> tuple[_Tensors, tuple[int | None, ...]]:
    # Where there is nothing, as of hidden without a projection, an empty tensor is in its place.
    empty = [x.dim() == 1 for x in results]
    parted = [x if e else joining.parted(x, a) for x, e, a in zip(results, empty, axes, strict=True)]
    return tuple(parted), tuple([None if e else joining.axis(a) for e, a in zip(empty, axes, strict=True)])


class _LayerFunction(torch.autograd.Function):
    """What the two forms of the layer have in common. Arguments: the call, batch_sizes, and the call's tensors."""

    @classmethod
    def _rule(cls, samples: int, in_dims: _Dims, args: Sequence[Any]) -> tuple[_Tensors, _Dims]:
        call, batch_sizes, *tensors = args
        if in_dims[1] is not None:
            raise ValueError(
                "batch_sizes: expected the same for all samples under vmap (in_dims=None), got one for each sample"
            )
        packed = batch_sizes is not None
        axes, dims = call.batch_axes(packed), in_dims[2:]
        if any([d is not None and axis is None for d, axis in zip(dims, axes, strict=True)]):
            return _one_by_one(cls.apply, samples, in_dims, args)
        joining = _Joining(samples, packed)
        results = cls.apply(
            call,
            batch_sizes * samples if packed else None,
            *_joined_tensors(joining, tensors, dims, axes),
        )
        return _parted_tensors(joining, results, call.result_axes(packed, len(results)))


class _InferenceLayer(_LayerFunction):
    """Saves nothing."""

    @staticmethod
    def forward(call: LayerCall, batch_sizes: Tensor | None, *tensors: Any) -> _Tensors:
        arguments = call.arguments(batch_sizes, tensors)
        if not call.has_extras:
            return torch.ops.lstm_ext.lstm_layer(*arguments)
        return torch.ops.lstm_ext.lstm_layer_with_extras(
            *arguments, call.return_cell_states, call.return_gates
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        # functorch calls forward with gradients enabled again, for the levels below.
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def vmap(info: Any, in_dims: _Dims, *args: Any) -> tuple[_Tensors, _Dims]:
        return _vmap(_InferenceLayer._rule, info.batch_size, in_dims, args)


class _Layer(_LayerFunction):
    """Results: those of the layer, and what its forward operator gives for the backward pass."""

    @staticmethod
    def forward(call: LayerCall, batch_sizes: Tensor | None, *tensors: Any) -> _Tensors:
        arguments = call.arguments(batch_sizes, tensors)
        if not call.has_extras:
            return torch.ops.lstm_ext.lstm_layer_forward(*arguments)
        return torch.ops.lstm_ext.lstm_layer_with_extras_forward(
            *arguments, call.return_cell_states, call.return_gates
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        call, batch_sizes, *tensors = inputs
        ctx.call = call
        constant = list(output[call.results :])
        if call.has_extras:
            asked = (call.return_cell_states, call.return_gates)
            constant += [x for x, wanted in zip(output[3:5], asked, strict=True) if not wanted]
        ctx.mark_non_differentiable(*constant)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(batch_sizes, output[0], *output[call.results :], *tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        call = ctx.call
        batch_sizes, *rest = saved(ctx)
        count = 1 + len(grads) - call.results  # the output, and what was kept
        kept, tensors = rest[:count], rest[count:]
        wanted = ctx.needs_input_grad[2 : 2 + call.differentiable]
        result = layer_gradients(call, wanted, batch_sizes, grads[: call.results], kept, tensors)
        return None, None, *result, *[None] * (len(tensors) - call.differentiable)

    @staticmethod
    def vmap(info: Any, in_dims: _Dims, *args: Any) -> tuple[_Tensors, _Dims]:
        return _vmap(_Layer._rule, info.batch_size, in_dims, args)


class _LayerGradients(torch.autograd.Function):
    """The gradients as a function of their own, so that it can be transformed and differentiated again.

    Arguments: the call, wanted, batch_sizes; the gradients of the layer's results; the output and what was kept; the
    call's tensors.
    """

    @staticmethod
    def forward(
        call: LayerCall, wanted: Sequence[bool], batch_sizes: Tensor | None, *arguments: Any
    ) -> _Tensors:
        grads, kept, tensors = _LayerGradients._parts(call, arguments)
        layer = call.arguments(batch_sizes, tensors)
        if call.has_extras:
            gradients = torch.ops.lstm_ext.lstm_layer_with_extras_backward(*layer, *grads, *kept, wanted)
        else:
            *layer, bias, bidirectional = layer
            gradients = torch.ops.lstm_ext.lstm_layer_backward(
                *grads, *layer, *kept, bias, bidirectional, wanted
            )
        return tuple([g for g, w in zip(gradients, wanted, strict=True) if w])

    @staticmethod
    def _parts(call: LayerCall, arguments: Sequence[Any]) -> tuple[Sequence[Any], ...]:
        """The gradients of the results, what was kept, and the call's tensors."""
        start = call.results
        end = start + (6 if call.has_extras else 4)
        return arguments[:start], arguments[start:end], arguments[end:]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        # What was kept of the forward pass is left out: it follows from the layer's arguments, and it is by them
        # that backward differentiates.
        ctx.call, ctx.wanted, batch_sizes, *arguments = inputs
        grads, kept, tensors = _LayerGradients._parts(ctx.call, arguments)
        ctx.kept_count = len(kept)
        ctx.save_for_backward(batch_sizes, *grads, *tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        call = ctx.call
        batch_sizes, *arguments = saved(ctx)
        needed = list(ctx.needs_input_grad[3:])
        del needed[call.results : call.results + ctx.kept_count]
        needed[call.results + call.differentiable :] = [False] * (
            len(arguments) - call.results - call.differentiable
        )

        def gradients(*chosen: Tensor) -> _Tensors:
            left = iter(chosen)
            full = [next(left) if n else t for t, n in zip(arguments, needed, strict=True)]
            return _reference_gradients(
                call, ctx.wanted, batch_sizes, full[: call.results], full[call.results :]
            )

        chosen = [t for t, n in zip(arguments, needed, strict=True) if n]
        computed = iter(_pulled_back(gradients, chosen, grads))
        result = [next(computed) if n else None for n in needed]
        kept = (None,) * ctx.kept_count
        return (None,) * 3 + (*result[: call.results], *kept, *result[call.results :])

    @staticmethod
    def vmap(info: Any, in_dims: _Dims, *args: Any) -> tuple[_Tensors, _Dims]:
        return _vmap(_LayerGradients._rule, info.batch_size, in_dims, args)

    @staticmethod
    def _rule(samples: int, in_dims: _Dims, args: Sequence[Any]) -> tuple[_Tensors, _Dims]:
        call, wanted, batch_sizes, *arguments = args
        packed = batch_sizes is not None
        dims = in_dims[3:]
        grads, kept, _ = _LayerGradients._parts(call, arguments)
        axes = call.batch_axes(packed)
        of_each = any([w and axis is None for w, axis in zip(wanted, axes, strict=False)])
        own = dims[len(grads) + len(kept) :]
        if of_each or any([d is not None and axis is None for d, axis in zip(own, axes, strict=True)]):
            # Each sample has weights of its own, or gradients of them.
            return _one_by_one(_LayerGradients.apply, samples, in_dims, args)
        joining = _Joining(samples, packed)
        of_results = call.result_axes(packed, len(grads) + len(kept) - 1)
        all_axes = [
            *of_results[: len(grads)],
            of_results[0],
            *[None if x.dim() == 1 else a for x, a in zip(kept[1:], of_results[len(grads) :], strict=True)],
            *axes,
        ]
        joined = _joined_tensors(joining, arguments, dims, all_axes)
        sizes = batch_sizes * samples if packed else None
        results = _LayerGradients.apply(call, wanted, sizes, *joined)
        batch_axes = [axis for axis, w in zip(axes, wanted, strict=False) if w and axis is not None]
        parted = [joining.parted(x, a) for x, a in zip(results, batch_axes, strict=True)]
        return tuple(parted), tuple([joining.axis(a) for a in batch_axes])
