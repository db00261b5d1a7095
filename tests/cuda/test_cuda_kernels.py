"""The CUDA kernels through the layer: around the edges of warps, blocks and grids, and over the range of numbers."""

from __future__ import annotations

import cases
import internals
import pytest
import torch
from cases import Case, layer
from test_kernels import (
    DTYPES,
    assert_infinities_and_nan,
    assert_nonlinearities,
    assert_subsets_of_gradients,
    assert_training_and_inference_agree,
    sized,
)

pytestmark = pytest.mark.devices("cuda")

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])

# (T, B, I, H, P, bidirectional, bias): one below, at and above each boundary, one axis at a time. A block is up to 128
# units wide and 256 threads in all; sums of columns are cut into parts of 512 rows.
EDGES: dict[str, list[tuple[int, int, int, int, int, bool, bool]]] = {
    "hidden units": [
        (4, 9, 5, h, 0, False, True) for h in (1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 257)
    ],
    "input features": [(5, 8, i, 34, 0, False, True) for i in (1, 2, 3, 7, 8, 9, 31, 32, 33)],
    "batch rows": [(12, b, 6, 34, 0, True, False) for b in (1, 2, 3, 4, 5, 7, 8, 9, 65)],
    "time steps": [(t, 5, 6, 34, 0, True, True) for t in (1, 2, 7, 61)],
    "rows of all steps": [(t, 64, 3, 18, 0, False, True) for t in (7, 8, 9, 17)],
    "projection": [(6, 7, 5, 67, p, True, True) for p in (1, 31, 32, 33)],
}


def ours(case: Case, dtype: torch.dtype, seed: int) -> dict[str, torch.Tensor]:
    return {name: t.cpu() for name, t in cases.ours(case, dtype, seed, "cuda").items()}


@every_dtype
@pytest.mark.parametrize("group", EDGES)
def test_edges(group: str, dtype: torch.dtype) -> None:
    wrong = [
        text for sizes in EDGES[group] for text in cases.problems(sized(*sizes), dtype, draws=3, ours=ours)
    ]
    assert not wrong, "\n".join(wrong)


@every_dtype
def test_more_rows_than_a_grid_is_high(dtype: torch.dtype) -> None:
    """A grid has at most 65,535 blocks in y, of up to 8 rows: the kernels take the rows in strides."""
    few, many = 300, 8 * 65_535 + 5
    _, (x, h0, c0, *others) = layer(sized(2, few, 2, 3, 0, False, True), dtype, 0).arguments(dtype, "cuda")
    places = torch.randint(few, (many,))
    x, h0, c0 = (t.detach()[:, places] for t in (x, h0, c0))
    results = []
    for rows in (slice(None), slice(-few, None)):
        leaf = x[:, rows].clone().requires_grad_()
        output, _, c_n = internals.lstm_layer(
            leaf, h0[:, rows].contiguous(), c0[:, rows].contiguous(), *others
        )
        (grad,) = torch.autograd.grad(output.square().sum() + c_n.sum(), leaf)
        results.append([output[:, -few:], c_n[:, -few:], grad[:, -few:]])
    torch.testing.assert_close(*results)


@every_dtype
def test_nonlinearities_over_their_whole_range(dtype: torch.dtype) -> None:
    assert_nonlinearities(dtype)


@every_dtype
def test_infinities_and_nan_follow_the_equations(dtype: torch.dtype) -> None:
    assert_infinities_and_nan(dtype)


def test_every_subset_of_gradients() -> None:
    assert_subsets_of_gradients("cuda")


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16, torch.float16], ids=str)
def test_training_and_inference_agree_to_the_bit(dtype: torch.dtype) -> None:
    assert_training_and_inference_agree(dtype, "cuda")
