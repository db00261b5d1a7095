"""How exact a result has to be: no more than twice torch's own error at the same dtype.

An error is ``|out - ref| / |ref|`` (2-norms over the whole tensor) against a float64 reference. Allowed is
2 x torch's error + 4 eps of the dtype; in float64, 64 eps, since the reference has an error of that kind
itself.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import lstm_ext


def tensors(result: tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Output, or its data where it is packed, h_n and c_n."""
    output, (h_n, c_n) = result
    return [output.data if isinstance(output, PackedSequence) else output, h_n, c_n]


def relative_error(out: Tensor, ref: Tensor) -> float:
    """``|out - ref| / |ref|``; the absolute error where ref is zero or empty; inf for anything not finite."""
    out, ref = out.detach().double(), ref.detach().double()
    assert out.shape == ref.shape, f"shape {tuple(out.shape)}, expected {tuple(ref.shape)}"
    error = torch.linalg.vector_norm(out - ref).item()
    norm = torch.linalg.vector_norm(ref).item()
    if not math.isfinite(error):
        return math.inf
    return error / norm if norm > 0 else error


def allowed_error(torch_error: float, dtype: torch.dtype) -> float:
    eps = torch.finfo(dtype).eps
    return 64 * eps if dtype == torch.float64 else 2 * torch_error + 4 * eps


def assert_as_accurate_as_torch(
    ours: Tensor | Mapping[str, Tensor],
    torchs: Tensor | Mapping[str, Tensor],
    ref: Tensor | Mapping[str, Tensor],
) -> None:
    """``ours`` and ``torchs`` at one dtype, ``ref`` in float64: tensors, or mappings from names to tensors.

    The error lists every tensor that is not exact enough.
    """
    if isinstance(ours, Tensor):
        ours, torchs, ref = {"result": ours}, {"result": torchs}, {"result": ref}
    assert ours.keys() == torchs.keys() == ref.keys()
    wrong = []
    for name, out in ours.items():
        expected = torchs[name]
        assert out.shape == expected.shape, (
            f"{name}: shape {tuple(out.shape)}, torch's {tuple(expected.shape)}"
        )
        assert out.dtype == expected.dtype, f"{name}: dtype {out.dtype}, torch's {expected.dtype}"
        error, torch_error = relative_error(out, ref[name]), relative_error(expected, ref[name])
        allowed = allowed_error(torch_error, out.dtype)
        if not error <= allowed:
            wrong.append(f"{name}: error {error:.3g}, allowed {allowed:.3g}, torch's {torch_error:.3g}")
    assert not wrong, "\n".join(wrong)


def values_and_gradients(
    module: nn.Module,
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None = None,
    *,
    seed: int = 1,
    grad_of: tuple[str, ...] = ("output", "h_n", "c_n"),
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Outputs, and the gradients of everything, for random gradients of the outputs named in ``grad_of``.

    With ``dtype`` the computation runs on a copy of the module and the arguments converted to it. The
    gradients that go in are drawn in float32, so that they are the same numbers for each dtype.
    """
    if dtype is not None:
        module, input = copy.deepcopy(module).to(dtype), input.to(dtype)
        hx = None if hx is None else (hx[0].to(dtype), hx[1].to(dtype))
    leaves = {"input": input.detach().clone().requires_grad_()}
    if hx is not None:
        leaves |= {f"hx[{i}]": state.detach().clone().requires_grad_() for i, state in enumerate(hx)}
    state = None if hx is None else (leaves["hx[0]"], leaves["hx[1]"])
    output, (h_n, c_n) = module(leaves["input"], state)
    values = {"output": output, "h_n": h_n, "c_n": c_n}

    leaves |= {name: p for name, p in module.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(v.shape, generator=generator, device="cpu").to(v) for v in values.values()]
    chosen = [i for i, name in enumerate(values) if name in grad_of]
    gradients = torch.autograd.grad(
        [list(values.values())[i] for i in chosen],
        list(leaves.values()),
        [grads[i] for i in chosen],
        allow_unused=True,
        materialize_grads=True,
    )
    result = {name: value.detach() for name, value in values.items()}
    return result | {f"grad of {name}": g for name, g in zip(leaves, gradients, strict=True)}


def stacked(results: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Several results as one, so that their errors are judged together."""
    return {name: torch.stack([result[name] for result in results]) for name in results[0]}


def assert_module_as_accurate_as_torch(
    module: lstm_ext.LSTM,
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None = None,
    *,
    grad_of: tuple[str, ...] = ("output", "h_n", "c_n"),
) -> None:
    """Values and all gradients of a module, against torch's layer with the same weights."""
    theirs = lstm_ext.to_torch(module)
    if not theirs.training:
        # cuDNN has no backward pass in eval mode. Without dropout, training mode computes the same.
        theirs.dropout = 0.0
        theirs.train()
    assert_as_accurate_as_torch(
        values_and_gradients(module, input, hx, grad_of=grad_of),
        values_and_gradients(theirs, input, hx, grad_of=grad_of),
        values_and_gradients(theirs, input, hx, grad_of=grad_of, dtype=torch.float64),
    )
