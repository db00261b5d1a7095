"""The layer under the transforms of ``torch.func``: ``grad``, ``vjp``, ``jacrev``, ``vmap``, in any nesting.

A pair of `autograd.Function`s in the style that functorch asks for (`setup_context`, a rule for `vmap`), around the
registered operators. Forward-mode transforms (``jvp``, ``jacfwd``, ``hessian``) are not among them: they take the
equations of `reference`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference

__all__ = ["lstm_layer"]


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
    function = _Layer if torch.is_grad_enabled() else _InferenceLayer
    return function.apply(input, h0, c0, batch_sizes, bias, bidirectional, *weights)[:3]


# What one call of a function under vmap becomes: one call on a batch that holds all samples, where they share their
# weights; else one call each. Axis 2 of dense data (T, B, samples, features) and of states (D, B, samples, features),
# axis 1 of packed data (N, samples, features): the samples of one sequence lie side by side, so that packed data stay
# sorted by length.


def _joined(x: Tensor | None, dim: int | None, samples: int, axis: int) -> Tensor | None:
    """The samples of ``x`` within the axis before ``axis``; each the same where ``x`` has only one."""
    if x is None:
        return None
    x = x.unsqueeze(axis) if dim is None else x.movedim(dim, axis)
    shape = list(x.shape)
    shape[axis] = samples
    return x.expand(shape).flatten(axis - 1, axis)


def _parted(x: Tensor, samples: int, axis: int) -> Tensor:
    return x.unflatten(axis - 1, (-1, samples))


def _sample(argument: Any, dim: Any, n: int) -> Any:
    return argument.select(dim, n) if isinstance(argument, Tensor) and dim is not None else argument


def _one_by_one(
    samples: int,
    in_dims: tuple[int | None, ...],
    args: tuple[Any, ...],
    call: Callable[..., tuple[Tensor, ...]],
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    results = [
        call(*[_sample(a, d, n) for a, d in zip(args, in_dims, strict=True)])
        for n in range(samples)
    ]
    stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)


class _InferenceLayer(torch.autograd.Function):
    @staticmethod
    def forward(input, h0, c0, batch_sizes, bias, bidirectional, *weights):
        return torch.ops.lstm_ext.lstm_layer(input, h0, c0, weights, batch_sizes, bias, bidirectional)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def vmap(info, in_dims, *args):
        return _vmap_layer(_InferenceLayer, info, in_dims, args)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(input, h0, c0, batch_sizes, bias, bidirectional, *weights):
        return torch.ops.lstm_ext.lstm_layer_forward(input, h0, c0, weights, batch_sizes, bias, bidirectional)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, h0, c0, batch_sizes, ctx.bias, ctx.bidirectional, *weights = inputs
        ctx.mark_non_differentiable(*output[3:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, h0, c0, batch_sizes, output[0], *output[3:], *weights)

    @staticmethod
    def backward(ctx, grad_output, grad_h_n, grad_c_n, *_):
        input, h0, c0, batch_sizes, output, gates, cells, hidden, *weights = ctx.saved_tensors
        needed = ctx.needs_input_grad
        wanted = (*needed[:3], *needed[6:])
        grads = [None] * len(wanted)
        if any(wanted) and not (grad_output is None and grad_h_n is None and grad_c_n is None):
            computed = iter(
                _LayerGradients.apply(
                    wanted,
                    ctx.bias,
                    ctx.bidirectional,
                    batch_sizes,
                    grad_output,
                    grad_h_n,
                    grad_c_n,
                    output,
                    gates,
                    cells,
                    hidden,
                    input,
                    h0,
                    c0,
                    *weights,
                )
            )
            grads = [next(computed) if w else None for w in wanted]
        return (*grads[:3], None, None, None, *grads[3:])

    @staticmethod
    def vmap(info, in_dims, *args):
        return _vmap_layer(_Layer, info, in_dims, args)


def _vmap_layer(function, info, in_dims, args):
    samples = info.batch_size
    if any(d is not None for d in in_dims[6:]):
        return _one_by_one(samples, in_dims, args, function.apply)
    input, h0, c0, batch_sizes, bias, bidirectional, *weights = args
    axis = 2 if batch_sizes is None else 1
    results = function.apply(
        _joined(input, in_dims[0], samples, axis),
        _joined(h0, in_dims[1], samples, 2),
        _joined(c0, in_dims[2], samples, 2),
        None if batch_sizes is None else batch_sizes * samples,
        bias,
        bidirectional,
        *weights,
    )
    axes = (axis, 2, 2) + (axis + 1,) * (len(results) - 3)
    # Without a projection there is no hidden, but an empty tensor in its place.
    dims = tuple(None if x.dim() == 1 else a for x, a in zip(results, axes, strict=True))
    return tuple(x if a is None else _parted(x, samples, a) for x, a in zip(results, dims, strict=True)), dims


class _LayerGradients(torch.autograd.Function):
    """The backward pass as a function of its own, so that it can be transformed and differentiated again."""

    @staticmethod
    def forward(
        wanted, bias, bidirectional, batch_sizes, grad_output, grad_h_n, grad_c_n,
        output, gates, cells, hidden, input, h0, c0, *weights,
    ):  # fmt: skip
        return tuple(
            torch.ops.lstm_ext.lstm_layer_backward(
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
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        # What was kept of the forward pass is left out: it follows from the layer's arguments, and it is by them
        # that backward differentiates.
        ctx.wanted, ctx.bias, ctx.bidirectional = inputs[:3]
        ctx.save_for_backward(*inputs[3:7], *inputs[11:])

    @staticmethod
    def backward(ctx, *grads):
        batch_sizes, *primals = ctx.saved_tensors
        wanted, bias, bidirectional = ctx.wanted, ctx.bias, ctx.bidirectional
        given = [t is not None for t in primals]

        def gradients(*present):
            present = iter(present)
            everything = [next(present) if g else None for g in given]
            cotangents, layer = everything[:3], everything[3:]

            def outputs_of(*chosen):
                chosen = iter(chosen)
                full = [next(chosen) if w else t for t, w in zip(layer, wanted, strict=True)]
                results = reference.lstm_layer(*full[:3], full[3:], batch_sizes, bias, bidirectional)
                return tuple(y for y, g in zip(results, cotangents, strict=True) if g is not None)

            _, pull = torch.func.vjp(outputs_of, *[t for t, w in zip(layer, wanted, strict=True) if w])
            return pull(tuple(g for g in cotangents if g is not None))

        _, pull = torch.func.vjp(gradients, *[t for t in primals if t is not None])
        pulled = iter(pull(grads))
        result = [next(pulled) if g else None for g in given]
        return (None, None, None, None, *result[:3], None, None, None, None, *result[3:])

    @staticmethod
    def vmap(info, in_dims, *args):
        samples = info.batch_size
        wanted, bias, bidirectional, batch_sizes = args[:4]
        if any(wanted[3:]) or any(d is not None for d in in_dims[14:]):
            # Each sample has gradients of the weights of its own.
            return _one_by_one(samples, in_dims, args, _LayerGradients.apply)
        axis = 2 if batch_sizes is None else 1
        axes = (axis, 2, 2, axis, *(axis + 1,) * 3, axis, 2, 2)
        joined = [
            x if x is None or x.dim() == 1 else _joined(x, d, samples, a)
            for x, d, a in zip(args[4:14], in_dims[4:14], axes, strict=True)
        ]
        sizes = None if batch_sizes is None else batch_sizes * samples
        results = _LayerGradients.apply(wanted, bias, bidirectional, sizes, *joined, *args[14:])
        dims = tuple(a for a, w in zip((axis, 2, 2), wanted[:3], strict=True) if w)
        return tuple(_parted(x, samples, a) for x, a in zip(results, dims, strict=True)), dims
