"""What a kernel gets wrong, in so much detail that it can be mended without the card; `make gpu-check` runs it.

    python tests/cuda/cuda_diagnosis.py --kernel persistent --dtype bfloat16 [--device cuda] [--fault NAME]

Prints one JSON object, and ends with 1 if something is wrong. On a CPU the kernels run on the emulator, where --fault
plants a mistake: so it can be seen what a report of it looks like.

Two tests. *Values*: preactivations z, output, and gradients dz of z, each of every step, row, gate and unit, against
float64. W is the identity, so that x is the input part of z and its gradient is dz. *Fragments*: U picks one unit of
h_{t-1} for each gate and unit, and h is a code of its row or of its unit, so that z says which number came.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

KERNELS = ("stepwise", "step", "persistent")
DTYPES = ("bfloat16", "float16", "float32", "float64")
# Of 1 + |value|: rough, since a kernel that is wrong is far off.
BOUND = {"bfloat16": 0.05, "float16": 0.01, "float32": 5e-3, "float64": 1e-12}
# Steps, rows and units: of one block and tile; of several; with weights that the registers do not hold.
SHAPES = ((3, 9, 40), (3, 70, 520), (3, 4, 1040))
FAULTS = ("gates", "row", "unit", "part", "nan", "fragment", "crash", "hang")
CODES = (
    64  # so few that tanh(atanh(code / 256)), rounded twice to 16 bits, is nearer to its code than to another
)
PARTS = 8  # of the depth, one for each warp that exchanges
GATES = "ifgo"


def variants() -> list[tuple[str, str]]:
    return [(k, d) for k in KERNELS for d in DTYPES if d != "float64" or k == "stepwise"]


# ---- what computes


@contextlib.contextmanager
def kernels_of(device: torch.device, kernel: str, dtype: str) -> Iterator[Any]:
    """A module with lstm_layer_forward and lstm_layer_backward, for which this kernel is requested."""
    if device.type == "cpu":
        sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "simt")]
        from emulated_layer import emulated_device

        with emulated_device(dtype == "float32", kernel=kernel) as module:
            yield module
        return
    from lstm_ext.layer import cuda_kernels
    from lstm_ext.native import loader

    torch.backends.cudnn.rnn.fp32_precision = "tf32"
    with cuda_kernels.forced(kernel):
        yield loader.extension()


def run(kernels: Any, x: Tensor, h0: Tensor, c0: Tensor, U: Tensor) -> dict[str, Tensor]:
    """z (T, B, 4, H), output (T, B, H) and dz like z, with W the identity and without biases."""
    T, B, H = *x.shape[:2], U.size(1)
    W = torch.eye(4 * H, dtype=x.dtype, device=x.device)
    call = (x, h0[None], c0[None], [W, U], None, False, False, None)
    output, h_n, c_n, _, _, saved = kernels.lstm_layer_forward(*call, True)
    grads = torch.sin(output.double()).to(x.dtype), torch.ones_like(h_n), torch.ones_like(c_n)
    needs_grad = [True] * 5 + [False] * 2
    dz = kernels.lstm_layer_backward(*call, *grads, None, None, output, saved, needs_grad)[0]
    if x.device.type == "cuda" and kernels.cuda_wait_expired(x.device.index or 0):
        raise TimeoutError("a block waited for another one in vain: all results are NaN")
    return {"z": saved[0].view(T, B, 4, H), "output": output, "dz": dz.view(T, B, 4, H)}


def by_equations(x: Tensor, h0: Tensor, c0: Tensor, U: Tensor) -> dict[str, Tensor]:
    """The same in float64."""
    from lstm_ext import reference

    T, B, H = *x.shape[:2], U.size(1)
    x, h0, c0, U = (t.detach().double().cpu().clone() for t in (x, h0[None], c0[None], U))
    weights = [torch.eye(4 * H, dtype=torch.float64), U]
    output, h_n, c_n = reference.lstm_layer(x.requires_grad_(), h0, c0, weights, None, False, False)
    grads = [torch.sin(output.detach()), torch.ones_like(h_n), torch.ones_like(c_n)]
    (dz,) = torch.autograd.grad([output, h_n, c_n], [x], grads)
    z = x + torch.cat([h0, output[:-1]]) @ U.T
    shape = (T, B, 4, H)
    return {"z": z.detach().view(shape), "output": output.detach(), "dz": dz.view(shape)}


# ---- values


def drawn(shape: tuple[int, int, int], dtype: str, device: torch.device) -> list[Tensor]:
    T, B, H = shape
    generator = torch.Generator().manual_seed(3)
    sizes = ((T, B, 4 * H), (B, H), (B, H), (4 * H, H))
    scales = (1.0, 0.5, 1.0, H**-0.5)
    return [
        (torch.randn(n, generator=generator) * s).to(device, getattr(torch, dtype))
        for n, s in zip(sizes, scales, strict=True)
    ]


def is_off(got: Tensor, expected: Tensor, dtype: str) -> Tensor:
    got, expected = got.double().cpu(), expected.double().cpu()
    return ~((got - expected).abs() <= BOUND[dtype] * (1 + expected.abs()))  # a NaN is off


def counts(places: Tensor, modulus: int) -> list[int]:
    return torch.bincount(places % modulus, minlength=modulus).tolist()


def described(name: str, got: Tensor, expected: Tensor, stepwise: Tensor, dtype: str) -> dict[str, Any]:
    """Where numbers are off. `first` is the one that the pass reached first."""
    places = is_off(got, expected, dtype).nonzero()
    if name == "dz":  # the pass goes backward
        places = places[(-places[:, 0]).argsort(stable=True)]
    first = places[0].tolist()
    t, row, unit = first[0], first[1], first[-1]
    report = {
        "quantity": name,
        "wrong": len(places),
        "of": got.numel(),
        "nan": int(got.isnan().sum()),
        "first": {
            "t": t,
            "row": row,
            "unit": unit,
            **({"gate": GATES[first[2]]} if len(first) == 4 else {}),
            "got": got[tuple(first)].item(),
            "float64": expected[tuple(first)].item(),
            "stepwise": stepwise[tuple(first)].item(),
        },
        "by_step": counts(places[:, 0], got.size(0)),
        "by_row_of_8": counts(places[:, 1], 8),
        "by_unit_of_16": counts(places[:, -1], 16),
    }
    if len(first) == 4:
        report["by_gate"] = dict(zip(GATES, counts(places[:, 2], 4), strict=True))
    return report


def part_of_depth(name: str, H: int, dtype: str) -> Tensor:
    """The part of the product's depth to which a number of U (4H, H) belongs: forward by its column, backward by its
    row, as the pieces of 16 bytes go round the warps."""
    size = 4 if dtype == "float32" or (dtype == "float16" and name == "dz") else 2
    numbers = 16 // size
    if name != "dz":
        return (torch.arange(H) // numbers // 4 % PARTS).expand(4 * H, H)
    padded = -(-H // numbers) * numbers
    place = torch.arange(4)[:, None] * padded + torch.arange(H)
    return (place.flatten() // numbers // 4 % PARTS)[:, None].expand(4 * H, H)


Compute = Callable[..., dict[str, Tensor]]


def another_kernel(device: torch.device, kernel: str, dtype: str, shape: tuple[int, int, int]) -> str:
    """Why another kernel would compute this, in one of the passes; else nothing."""
    if device.type == "cpu" or kernel != "persistent":
        return ""
    from lstm_ext.native import loader

    extension = loader.extension()
    sizes = dict(zip(("steps", "batch", "hidden_size"), shape, strict=True))
    plans = [
        extension.cuda_plan(
            device=extension.cuda_facts(device.index or 0), **sizes, input_size=4 * shape[2], dtype=dtype,
            backward=backward, kernel=kernel,
        )
        for backward in (False, True)
    ]  # fmt: skip
    return "; ".join(plan["persistent"]["problem"] for plan in plans if plan["kernel"] != "persistent")


def check_values(
    compute: Compute, stepwise: Compute, shape: tuple[int, int, int], dtype: str, device: torch.device
) -> dict[str, Any] | None:
    arguments = drawn(shape, dtype, device)
    got, expected = compute(*arguments), by_equations(*arguments)
    for name in expected:
        if not is_off(got[name], expected[name], dtype).any():
            continue
        report = described(name, got[name], expected[name], stepwise(*arguments)[name], dtype)
        # With one part of U at a time: the part of the depth that is wrong.
        x, h0, c0, U = arguments
        report["by_part_of_depth"] = []
        for part in range(PARTS):
            of_part = torch.where((part_of_depth(name, U.size(1), dtype) == part).to(device), U, 0)
            alone = compute(x, h0, c0, of_part)[name], by_equations(x, h0, c0, of_part)[name]
            report["by_part_of_depth"].append(int(is_off(*alone, dtype).sum()))
        return {"test": "values", "shape": shape, **report}
    return None


# ---- fragments


def check_fragments(
    compute: Compute, shape: tuple[int, int, int], dtype: str, device: torch.device
) -> dict[str, Any] | None:
    """After a step with i = 0 and f = o = 1, h is tanh(c0), which is a code; W x of the next step is 0."""
    _, B, H = shape
    real = getattr(torch, dtype)
    units, gates = torch.arange(H), torch.arange(4)[:, None]
    chosen = (units * 7 + gates * 3 + 1) % H  # which unit of h each gate and unit takes
    U = torch.zeros(4 * H, H)
    U[torch.arange(4 * H), chosen.flatten()] = 1
    x = torch.zeros(2, B, 4, H)
    x[0, :, 0], x[0, :, 1], x[0, :, 3] = -30, 30, 30
    codes = {
        "row": torch.arange(B)[:, None].expand(B, H) % CODES,
        "unit": (units % CODES).expand(B, H),
        f"unit / {CODES}": (units // CODES).expand(B, H),
    }
    found: dict[str, Tensor] = {}
    for name, code in codes.items():
        c0 = torch.atanh(code / 256)
        tensors = (x.view(2, B, 4 * H), torch.zeros(B, H), c0, U)
        z = compute(*(t.to(device, real) for t in tensors))["z"][1].double().cpu()
        found[name] = (z * 256).round().nan_to_num(-1).long()
    expected = {name: code[:, chosen.flatten()].view(B, 4, H) for name, code in codes.items()}
    wrong = torch.stack([found[name] != expected[name] for name in codes]).any(0).nonzero()
    if len(wrong) == 0:
        return None
    examples = []
    for row, gate, unit in wrong[:16].tolist():
        place = (row, gate, unit)
        examples.append(
            {
                "row": row, "gate": GATES[gate], "unit": unit,
                "came": {name: int(found[name][place]) for name in codes},
                "expected": {name: int(expected[name][place]) for name in codes},
            }
        )  # fmt: skip
    return {
        "test": "fragments",
        "shape": shape,
        "wrong": len(wrong),
        "of": B * 4 * H,
        "by_row_of_8": counts(wrong[:, 0], 8),
        "by_gate": dict(zip(GATES, counts(wrong[:, 1], 4), strict=True)),
        "by_unit_of_16": counts(wrong[:, 2], 16),
        "first": examples,
    }


# ---- planted mistakes, of the kernel as the tests see it


def with_fault(compute: Compute, fault: str | None) -> Compute:
    def faulty(x: Tensor, h0: Tensor, c0: Tensor, U: Tensor) -> dict[str, Tensor]:
        if fault == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if fault == "hang":
            time.sleep(1e6)
        if fault == "part":  # the second part of the depth is left out
            U = torch.where((part_of_depth("z", U.size(1), "bfloat16") == 1).to(U.device), 0, U)
        if fault == "fragment":  # neighbours change places
            U = U.view(U.size(0), -1, 2).flip(2).reshape(U.shape)
        results = compute(x, h0, c0, U)
        z = results["z"] = results["z"].clone()
        if fault == "gates":
            z[:] = z[:, :, [1, 0, 2, 3]]
        if fault == "row":
            z[1:, 3::8] += 1
        if fault == "unit":
            z[1:, :, :, 5::16] += 1
        if fault == "nan":
            z[1, 2, 3, 4] = torch.nan
        return results

    return faulty if fault else compute


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kernel", choices=KERNELS, required=True)
    parser.add_argument("--dtype", choices=DTYPES, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--fault", choices=FAULTS)
    options = parser.parse_args()
    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    shapes = SHAPES if on_gpu else SHAPES[:1]
    report: dict[str, Any] = {"kernel": options.kernel, "dtype": options.dtype, "wrong": [], "not_run": []}

    def by(kernel: str) -> Compute:
        def compute(*arguments: Tensor) -> dict[str, Tensor]:
            with kernels_of(device, kernel, options.dtype) as kernels:
                return run(kernels, *arguments)

        return compute

    compute = with_fault(by(options.kernel), options.fault)
    try:
        for shape in shapes:
            if reason := another_kernel(device, options.kernel, options.dtype, shape):
                report["not_run"].append({"shape": shape, "reason": reason})
                continue
            for found in (
                check_fragments(compute, shape, options.dtype, device),
                check_values(compute, by("stepwise"), shape, options.dtype, device),
            ):
                report["wrong"] += [found] if found else []
    except Exception as error:
        report["error"] = f"{type(error).__name__}: {error}"[:2000]
    print(json.dumps(report))
    return 1 if report["wrong"] or "error" in report else 0


if __name__ == "__main__":
    sys.exit(main())
