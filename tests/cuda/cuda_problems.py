"""Problems for cuda_checks.py: a layer, its arguments, and everything that it computes."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

import lstm_ext

LOW = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, torch.float64, *LOW)


@dataclasses.dataclass(frozen=True)
class Shape:
    steps: int
    batch: int
    input_size: int
    hidden_size: int
    options: tuple[tuple[str, Any], ...] = ()
    packed: bool = False
    per_call: bool = False  # lengths, resets, and cell states and gates as results

    def __str__(self) -> str:
        options = "".join(f", {name}={value}" for name, value in self.options)
        sizes = f"T {self.steps}, B {self.batch}, I {self.input_size}, H {self.hidden_size}"
        return f"{sizes}{options}{', packed' if self.packed else ''}{', lengths and resets' if self.per_call else ''}"


EVERYTHING = (("num_layers", 2), ("bidirectional", True), ("proj_size", 5))
SHAPES = (
    Shape(7, 5, 9, 24),
    Shape(6, 4, 9, 24, EVERYTHING),
    Shape(9, 6, 9, 24, EVERYTHING, packed=True),
    Shape(1, 1, 16, 64),
    Shape(
        6,
        5,
        9,
        24,
        (
            ("num_layers", 2),
            ("bidirectional", True),
            ("proj_size", 20),
            ("layer_norm", True),
            ("zoneout", (0.2, 0.1)),
        ),
        per_call=True,
    ),
)


class Problem:
    """Tensors that nobody else has: a layer, its input and states, a gradient for each result."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=generator, dtype=torch.float64).to(device, dtype)

        torch.manual_seed(seed)
        self.layer = lstm_ext.LSTM(
            shape.input_size, shape.hidden_size, **dict(shape.options), dtype=torch.float64
        ).to(device, dtype)
        m = self.layer.eval()  # zoneout without randomness
        sets, state = len(m.all_weights), m.proj_size or m.hidden_size
        self.batch_sizes = None
        rows: tuple[int, ...] = (shape.steps, shape.batch)
        if shape.packed:
            lengths = [max(1, shape.steps - 2 * b) for b in range(shape.batch)]
            self.batch_sizes = torch.tensor([sum(n > t for n in lengths) for t in range(shape.steps)])
            rows = (sum(lengths),)
        self.x = draw(*rows, shape.input_size).requires_grad_()
        self.h = draw(sets, shape.batch, state).requires_grad_()
        self.c = draw(sets, shape.batch, shape.hidden_size).requires_grad_()
        self.leaves = [self.x, self.h, self.c, *m.parameters()]
        features = state * (2 if m.bidirectional else 1)
        self.grads = [draw(*rows, features), draw(*self.h.shape), draw(*self.c.shape)]
        self.arguments: dict[str, Any] = {}
        if shape.per_call:
            lengths = torch.arange(shape.steps, shape.steps - shape.batch, -1).clamp_min(0)
            resets = torch.rand(rows, generator=generator) < 0.3
            self.arguments = {"lengths": lengths.to(device), "resets": resets.to(device)}
            self.arguments |= {"return_cell_states": True, "return_gates": True}
            self.grads += [draw(sets, *rows, m.hidden_size), draw(sets, *rows, m.hidden_size, 4)]

    def forward(self) -> list[Tensor]:
        x = self.x if self.batch_sizes is None else PackedSequence(self.x, self.batch_sizes)
        output, states, *extras = self.layer(x, (self.h, self.c), **self.arguments)
        return [
            output if self.batch_sizes is None else output.data,
            *states,
            *(values for result in extras for values in result),
        ]

    def inference(self) -> list[Tensor]:
        with torch.no_grad():
            return self.forward()

    def training(self) -> list[Tensor]:
        """Results and all gradients."""
        results = self.forward()
        return [*(t.detach() for t in results), *torch.autograd.grad(results, self.leaves, self.grads)]

    def on(self, device: str, dtype: torch.dtype) -> Problem:
        """The same numbers elsewhere."""
        other = copy.copy(self)
        other.layer = copy.deepcopy(self.layer).to(device, dtype)
        other.x, other.h, other.c = (
            t.detach().to(device, dtype, copy=True).requires_grad_() for t in (self.x, self.h, self.c)
        )
        other.leaves = [other.x, other.h, other.c, *other.layer.parameters()]
        other.grads = [g.to(device, dtype) for g in self.grads]
        other.arguments = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.arguments.items()}
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
