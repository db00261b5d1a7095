"""How exact a result has to be: no more than twice torch's own error at the same dtype.

An error is ``|out - ref| / |ref|`` (2-norms over the whole tensor) against a float64 reference. Allowed is 2 x torch's
error + 4 eps of the dtype. In float64 it is 64 eps, since the reference has an error of that kind itself. Where torch
has no such layer, the equations in plain PyTorch stand in for it, computed in the same dtype.

One draw says little about a tensor of a few numbers, of which torch may happen to have an error of next to nothing:
`Worst` compares the worst errors of several draws, and `stacked` judges several draws as one tensor.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import lstm_ext

# Machine precision, the smallest distance from 1 to another number.
EPS = {torch.float64: 2**-52, torch.float32: 2**-23, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def absolute_error(out: Tensor, ref: Tensor) -> float:
    """``|out - ref|``; inf for anything not finite."""
    out, ref = (t.detach().double().cpu() for t in (out, ref))
    assert out.shape == ref.shape, f"shape {tuple(out.shape)}, expected {tuple(ref.shape)}"
    error = torch.linalg.vector_norm(out - ref).item()
    return error if math.isfinite(error) else math.inf


def relative_error(out: Tensor, ref: Tensor) -> float:
    """``|out - ref| / |ref|``; inf for anything not finite, and for anything but zeros where ref is zero."""
    error, norm = absolute_error(out, ref), torch.linalg.vector_norm(ref.detach().double()).item()
    if norm == 0:
        return math.inf if error > 0 else 0.0
    return error / norm


def allowed_error(torch_error: float, dtype: torch.dtype) -> float:
    eps = EPS[dtype]
    return 64 * eps if dtype == torch.float64 else 2 * torch_error + 4 * eps


class Worst:
    """The worst errors of several draws, by the names of the tensors: ours and torch's."""

    def __init__(self) -> None:
        self.errors: dict[str, tuple[float, float]] = {}
        self.dtypes: dict[str, torch.dtype] = {}

    def add(
        self, ours: Mapping[str, Tensor], by_torch: Mapping[str, Tensor], ref: Mapping[str, Tensor]
    ) -> None:
        """``ours`` and ``by_torch`` at one dtype, ``ref`` in float64."""
        assert ours.keys() == by_torch.keys() == ref.keys()
        for name, out in ours.items():
            expected = by_torch[name]
            assert out.shape == expected.shape, (
                f"{name}: shape {tuple(out.shape)}, torch's {tuple(expected.shape)}"
            )
            assert out.dtype == expected.dtype, f"{name}: dtype {out.dtype}, torch's {expected.dtype}"
            errors = relative_error(out, ref[name]), relative_error(expected, ref[name])
            before = self.errors.get(name, (0.0, 0.0))
            self.errors[name] = max(before[0], errors[0]), max(before[1], errors[1])
            self.dtypes[name] = out.dtype

    def problems(self) -> list[str]:
        """A line for each tensor that is not exact enough."""
        assert self.errors, "nothing was judged"
        return [
            f"{name}: error {ours:.3g}, allowed {allowed_error(by_torch, self.dtypes[name]):.3g}, "
            f"torch's {by_torch:.3g}"
            for name, (ours, by_torch) in self.errors.items()
            if not ours <= allowed_error(by_torch, self.dtypes[name])
        ]


def assert_as_accurate_as_torch(
    ours: Tensor | Mapping[str, Tensor],
    by_torch: Tensor | Mapping[str, Tensor],
    ref: Tensor | Mapping[str, Tensor],
) -> None:
    """``ours`` and ``by_torch`` at one dtype, ``ref`` in float64: tensors, or mappings from names to tensors.

    The error lists every tensor that is not exact enough.
    """
    if isinstance(ours, Tensor):
        ours, by_torch, ref = {"result": ours}, {"result": by_torch}, {"result": ref}
    worst = Worst()
    worst.add(ours, by_torch, ref)
    problems = worst.problems()
    assert not problems, "\n".join(problems)


def stacked(results: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Several results as one, so that their errors are judged together."""
    return {name: torch.stack([result[name] for result in results]) for name in results[0]}


def torch_dtypes(module: nn.Module, dtype: torch.dtype, *arguments: Any) -> list[torch.dtype]:
    """Those of the results of torch's layer or cell, which is asked now, under autocast to ``dtype``.

    ``dtype`` itself where torch's fails, as oneDNN does with float16 and gradients.
    """
    theirs = lstm_ext.revert(copy.deepcopy(module))
    device = next(module.parameters()).device.type
    with torch.autocast(device, dtype=dtype):
        try:
            results = theirs(*arguments)
        except RuntimeError as error:
            assert "could not create a primitive" in str(error)
            return [dtype] * (3 if isinstance(module, nn.RNNBase) else 2)
    return [t.dtype for t in tree_leaves(tuple(results)) if t.is_floating_point()]
