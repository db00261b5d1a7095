"""Problems for cuda_checks.py: cases of the matrix on a device, and everything that they compute."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from matrix.cases import Case, Options, arguments_of, make_module, tensors_of
from matrix.judge import named
from torch import Tensor

import lstm_ext
from lstm_ext.options import OPTIONS

LOW = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, torch.float64, *LOW)


def sized(
    steps: int,
    batch: int,
    input_size: int,
    hidden_size: int,
    packed: bool = False,
    per_call: bool = False,
    **more: Any,
) -> Case:
    """A layer in evaluation, where zoneout draws nothing; `more` are other fields of a case and options.

    Args:
        per_call: lengths, resets, and cell states and gates as results.
    """
    given: dict[str, Any] = {name: more.pop(name) for name in OPTIONS if name in more}
    if per_call:
        lengths = tuple(max(0, steps - b) for b in range(batch))
        given |= {"lengths": lengths, "lengths_as": "int64", "resets": 0.3}
        given |= {"return_cell_states": True, "return_gates": True}
    rows = tuple(max(1, steps - 2 * b) if packed else steps for b in range(batch))
    return Case(
        layout="handmade" if packed else "batched", lengths=rows, input_size=input_size, hidden_size=hidden_size,
        training=False, hx=True, options=Options(**given) if given else None, **more,
    )  # fmt: skip


EVERYTHING: dict[str, Any] = {"num_layers": 2, "bidirectional": True, "proj_size": 5}
CASES = (
    sized(7, 5, 9, 24),
    sized(6, 4, 9, 24, **EVERYTHING),
    sized(9, 6, 9, 24, packed=True, **EVERYTHING),
    sized(1, 1, 16, 64),
    sized(6, 5, 9, 24, per_call=True, layer_norm=True, zoneout=(0.2, 0.1), **{**EVERYTHING, "proj_size": 20}),
)


class Problem:
    """A layer with tensors that nobody else has: its input and states, a gradient for each result."""

    def __init__(self, case: Case, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> None:
        self.case = dataclasses.replace(case, dtype=str(dtype).removeprefix("torch."), seed=seed)
        self._tensors = tensors_of(self.case)
        self._put(device, dtype)

    def _put(self, device: torch.device | str, dtype: torch.dtype) -> None:
        tensors = self._tensors.map(lambda t: t.to(device))
        self.layer: Any = make_module(lstm_ext.LSTM, self.case, dtype, tensors.weights)
        leaves, self._input, (self.h, self.c), arguments = arguments_of(self.case, tensors, dtype)
        self.x = leaves["input"]
        self.leaves = [self.x, self.h, self.c, *self.layer.parameters()]
        self.grads = [g.to(dtype) for g in tensors.grads.values()]
        self._arguments = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in arguments.items()}

    def forward(self) -> list[Tensor]:
        return list(named(self.layer(self._input, (self.h, self.c), **self._arguments)).values())

    def inference(self) -> list[Tensor]:
        with torch.no_grad():
            return self.forward()

    def training(self) -> list[Tensor]:
        """Results and all gradients."""
        results = self.forward()
        return [*(t.detach() for t in results), *torch.autograd.grad(results, self.leaves, self.grads)]

    def on(self, device: torch.device | str, dtype: torch.dtype) -> Problem:
        """The same numbers elsewhere."""
        other = copy.copy(self)
        other._put(device, dtype)
        return other


def assert_same_bits(result: list[Tensor], expected: list[Tensor], what: object) -> None:
    for i, (a, b) in enumerate(zip(result, expected, strict=True)):
        assert torch.isfinite(a).all(), f"{what}: result {i} is not finite"
        if not torch.equal(a, b):
            difference = (a.double() - b.double()).abs()
            raise AssertionError(
                f"{what}: result {i} of shape {tuple(a.shape)}: {int((difference > 0).sum())} numbers differ, "
                f"by up to {difference.max().item():.3g}"
            )


@contextlib.contextmanager
def tf32(rnn: bool, matmul: bool = False) -> Iterator[None]:
    """Whether cuDNN's RNNs, for which this layer stands in, and matrix products may round to TF32."""
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # there are newer switches, with which some of torch does not get along
        before = torch._C._get_cudnn_allow_tf32(), torch._C._get_cublas_allow_tf32()
        torch._C._set_cudnn_allow_tf32(rnn)
        torch._C._set_cublas_allow_tf32(matmul)
        try:
            yield
        finally:
            torch._C._set_cudnn_allow_tf32(before[0])
            torch._C._set_cublas_allow_tf32(before[1])
