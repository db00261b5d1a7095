"""The checks of cuda_checks.py as tests; and the errors that only CUDA has."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import cuda_checks
import cuda_persistent_checks
import internals
import pytest
import torch
from cases import Case, layer
from torch import nn

import lstm_ext
from lstm_ext.layer import cuda_kernels, route
from lstm_ext.layer.layer_call import LayerCall, LayerOptions
from lstm_ext.native import loader
from lstm_ext.native.config import CUDA_KERNELS


@pytest.mark.devices("cuda")
@pytest.mark.parametrize("name", cuda_checks.CHECKS)
def test_checks(name: str) -> None:
    torch.set_default_device(None)
    try:
        cuda_checks.CHECKS[name](cuda_checks.Run(torch.device("cuda", 0), quick=True))
    except cuda_checks.NotRun as reason:
        pytest.skip(str(reason))


def test_checks_fail_where_they_should(monkeypatch: pytest.MonkeyPatch) -> None:
    """A check that cannot fail shows nothing: here every second call is off by one bit."""
    run = cuda_checks.Run(torch.device("cpu"), quick=True)
    training, calls = cuda_checks.Problem.training, []

    def wrong(problem: cuda_checks.Problem) -> list[torch.Tensor]:
        results = training(problem)
        calls.append(len(results))
        if len(calls) % 2 == 0:
            results[-1] = torch.nextafter(results[-1].double(), torch.full((), torch.inf).double()).to(
                results[-1]
            )
            results[-1].view(-1)[-1] *= 1.25
        return results

    monkeypatch.setattr(cuda_checks.Problem, "training", wrong)
    for name in (
        "determinism",
        "race_loop",
        "agrees_with_float64_on_the_cpu",
        "persistent_kernels_agree_with_stepwise",
        "persistent_kernels_give_the_same_bits",
    ):
        result = cuda_checks.perform(name, run)
        assert result["result"] == "failed", result
        assert "AssertionError" in result["reason"]
    assert cuda_checks.perform("side_streams", run) == {
        "check": "side_streams",
        "result": "not run",
        "reason": "not on cpu",
    }


@pytest.fixture
def unforced(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process of its own: conftest.py forces our kernels."""
    monkeypatch.setattr(cuda_kernels, "_forced", Counter())
    monkeypatch.delenv("LSTM_EXT_CUDA_KERNEL", raising=False)


@pytest.mark.parametrize("name", [*cuda_checks.CHECKS, "sanitized"])
def test_a_check_that_runs_unforced_fails(name: str, unforced: None) -> None:
    """On a GPU it would check torch's own operator."""
    check = cuda_checks.CHECKS.get(name, cuda_checks.sanitized)
    with pytest.raises(AssertionError, match="none of our kernels is forced"):
        check(cuda_checks.Run(torch.device("cpu"), quick=True))


@pytest.mark.parametrize("name", ["determinism", "race_loop", "sanitized", "gradcheck"])
def test_the_checks_force_our_kernels(name: str, unforced: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the program, where nobody else does; and each of them where bits are compared, or a sanitizer watches."""
    kernels = set()

    def forward(problem: cuda_checks.Problem) -> list[torch.Tensor]:
        assert cuda_kernels.is_forced()
        kernels.update(kernel for kernel, contexts in cuda_kernels._forced.items() if contexts)
        return real(problem)

    real = cuda_checks.Problem.forward
    monkeypatch.setattr(cuda_checks.Problem, "forward", forward)
    assert cuda_checks.main(["--device", "cpu", "--quick", name]) == 0
    assert not cuda_kernels.is_forced()
    assert kernels >= ({"auto"} if name == "gradcheck" else set(CUDA_KERNELS))


def test_what_the_check_of_waits_does_without_a_gpu() -> None:
    """It finds a layer for every card that the planner knows, but for one of which the shared memory is too small; on a
    CPU nobody waits, and results are right."""
    run = cuda_checks.Run(torch.device("cpu"), quick=True)
    shape = cuda_persistent_checks.whole_device(run, 108)
    assert shape is not None
    plan = cuda_persistent_checks.plan(run, shape, torch.bfloat16, "persistent")
    assert plan["persistent"]["blocks"] == 108
    assert not cuda_persistent_checks.held_up(run, cuda_checks.sized(4, 3, 8, 16), 1e-3, 1)


@pytest.mark.parametrize("fault", ["an error", "NaN", "another number"])
def test_the_check_of_waits_looks_at_the_results(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second call is held up, and the third one would say that a wait had expired."""
    calls: list[int] = []

    class Waiting(lstm_ext.LSTM):
        def forward(self, *args, **kwargs):
            calls.append(len(calls))
            if calls[-1] == 2 and fault == "an error":
                raise RuntimeError("longer than LSTM_EXT_CUDA_WAIT_LIMIT allows")
            output, (h, c) = super().forward(*args, **kwargs)
            if calls[-1] == 1 and fault != "an error":
                output = output * (torch.nan if fault == "NaN" else 2)
            return output, (h, c)

    monkeypatch.setattr(lstm_ext, "LSTM", Waiting)
    run = cuda_checks.Run(torch.device("cpu"), quick=True)
    with pytest.raises(Exception, match=r"WAIT_LIMIT allows|is not finite|multiprocessor"):
        cuda_persistent_checks.held_up(run, cuda_checks.sized(4, 3, 8, 16), 1e-3, 1)


def test_the_kernel_that_takes_a_multiprocessor_compiles(tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not Path(nvcc).is_file():
        pytest.skip("nvcc is not installed")
    source = tmp_path / "occupy.cu"
    source.write_text(cuda_persistent_checks.OCCUPIER)
    command = [nvcc, "-cubin", "-arch=sm_90", "-o", str(tmp_path / "occupy.cubin"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.devices("cuda")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_more_rows_than_a_grid_is_high(dtype: torch.dtype) -> None:
    """A grid has at most 65,535 blocks in y, of up to 8 rows: the kernels take the rows in strides."""
    few, many = 300, 8 * 65_535 + 5
    _, (x, h0, c0, *others) = layer(
        Case(steps=2, batch=few, input_size=2, hidden_size=3), dtype, 0
    ).arguments(dtype, "cuda")
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


# ---- without the tests' own settings

# A converted model by its default way, as a user runs it. conftest.py makes our kernels run on every GPU.
DEFAULT_WAY = """
import sys, torch, lstm_ext
device = torch.device(sys.argv[1])
torch.manual_seed(0)
theirs = torch.nn.LSTM(24, 64, 2, bidirectional=True).to(device)
ours = lstm_ext.convert(torch.nn.Sequential(theirs))[0]
assert isinstance(ours, lstm_ext.LSTM)
theirs = torch.nn.LSTM(24, 64, 2, bidirectional=True).to(device)
theirs.load_state_dict(ours.state_dict())
x = torch.randn(30, 16, 24, device=device)
def results(layer):
    layer.zero_grad()
    output, states = layer(x)
    (output.square().sum() + sum(s.sum() for s in states)).backward()
    return [output, *states, *(p.grad for p in layer.parameters())]
expected = results(theirs)
for _ in range(3):
    for a, b in zip(results(ours), expected, strict=True):
        assert (a - b).norm() <= 2e-2 * b.norm(), (a - b).norm() / b.norm()
explained = lstm_ext.explain(ours, x.shape, device=device)
print(explained)
assert device.type == "cpu" or "measured" in explained
"""


def by_default(device: str, folder: Path) -> None:
    environment = {n: v for n, v in os.environ.items() if not n.startswith("LSTM_EXT_CUDA")}
    for _ in range(2):  # the second process finds what the first one recorded
        done = subprocess.run(
            [sys.executable, "-W", "error::RuntimeWarning", "-c", DEFAULT_WAY, device],
            capture_output=True,
            text=True,
            env={**environment, "XDG_CACHE_HOME": str(folder)},
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_program_of_the_default_way(tmp_path: Path) -> None:
    by_default("cpu", tmp_path)


@pytest.mark.devices("cuda")
def test_the_default_way(tmp_path: Path) -> None:
    by_default("cuda", tmp_path)


# ---- errors


def outcome(call) -> tuple[type, str] | None:
    try:
        call()
    except Exception as error:
        return type(error), str(error)
    return None


@pytest.mark.devices("cuda")
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("on_cpu", ["input", "h", "c", "hx", "module"])
def test_tensors_on_two_devices(on_cpu: str, grad: bool) -> None:
    errors = []
    for make in (lstm_ext.LSTM, nn.LSTM):
        module, x = make(3, 4), torch.randn(5, 2, 3)
        h, c = torch.randn(1, 2, 4), torch.randn(1, 2, 4)
        if on_cpu == "module":
            module.cpu()
        x = x.cpu() if on_cpu == "input" else x
        h = h.cpu() if on_cpu in ("h", "hx") else h
        c = c.cpu() if on_cpu in ("c", "hx") else c
        with torch.set_grad_enabled(grad):
            errors.append(outcome(lambda m=module, x=x, h=h, c=c: m(x, (h, c))))
    assert errors[0] is not None and errors[1] is not None
    assert errors[0][0] is errors[1][0]
    assert "device" in errors[0][1]


@pytest.mark.devices("cuda")
def test_a_weight_on_the_cpu_is_refused() -> None:
    module = lstm_ext.LSTM(3, 4)
    module.weight_hh_l0 = nn.Parameter(module.weight_hh_l0.detach().cpu())
    with pytest.raises((RuntimeError, ValueError), match="cpu"):
        module(torch.randn(5, 2, 3))


@pytest.mark.devices("cuda")
def test_the_same_seed_gives_the_same_weights_and_masks() -> None:
    """Weights are those of torch's layer; the masks of dropout are our own, and come again with the seed."""
    modules = []
    for make in (nn.LSTM, lstm_ext.LSTM):
        torch.manual_seed(5)
        modules.append(make(3, 4, 3, dropout=0.5))
    for a, b in zip(*[m.parameters() for m in modules], strict=True):
        assert torch.equal(a, b)
    x = torch.randn(5, 2, 3)
    outputs = []
    for _ in range(2):
        torch.cuda.manual_seed(7)
        outputs.append(modules[1](x)[0])
    assert torch.equal(*outputs)
    assert not torch.equal(modules[1](x)[0], outputs[0])


@pytest.mark.devices("cuda")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_moving_between_devices(dtype: torch.dtype) -> None:
    module = lstm_ext.LSTM(3, 4, 2, bidirectional=True, dtype=dtype)
    x = torch.randn(5, 2, 3).to(dtype)
    result = module(x)[0]
    torch.testing.assert_close(module.cpu()(x.cpu())[0], result.cpu(), rtol=0.05, atol=0.05)
    assert torch.equal(module.cuda()(x)[0], result)


# ---- which devices have kernels. Without a GPU: torch's answers are made up.


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cuda_kernels, "_problems", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=None: "Pretended")
    built = dataclasses.replace(loader.status(), cuda="13.0 for 8.0 9.0+PTX")
    monkeypatch.setattr(loader, "status", lambda: built)

    def capability(*value: int) -> None:
        cuda_kernels._problems.clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: value)

    capability(9, 0)
    return capability


def test_cards_that_are_too_old(pretend) -> None:
    for old in ((7, 5), (7, 0), (6, 1)):
        pretend(*old)
        problem = cuda_kernels.problem(0)
        assert problem is not None
        assert re.search(rf"Pretended.* {old[0]}\.{old[1]}.* 8\.0 or later", problem)
        assert not cuda_kernels.may_run(0)
    for new in ((8, 0), (8, 6), (9, 0), (12, 0)):
        pretend(*new)
        assert cuda_kernels.problem(0) is None


def test_an_extension_without_cuda(pretend, monkeypatch: pytest.MonkeyPatch) -> None:
    built = dataclasses.replace(loader.status(), cuda=None, cuda_reason="nvcc was not found")
    monkeypatch.setattr(loader, "status", lambda: built)
    assert cuda_kernels.problem(0) == "nvcc was not found"


@pytest.mark.filterwarnings("error")
def test_a_card_without_kernels_takes_torchs_operator(pretend, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one warning, that says why, and another one where an option makes it take the equations."""
    pretend(7, 5)
    route._warn_about_cuda.cache_clear()
    route._warn_about_slow_options.cache_clear()
    monkeypatch.setattr(torch.Tensor, "device", property(lambda t: torch.device("cuda", 0)))
    x = torch.zeros(1)
    call = LayerCall(x, None, None, [x], None, True, False, LayerOptions(zoneout_c=0.1))
    assert not route.is_direct(call)
    with pytest.warns(RuntimeWarning, match=r"no kernels for CUDA tensors.*Pretended.*7\.5"):
        assert route.torch_route(x, None, None, [[x]]) == "direct"
    assert route.torch_route(x, None, None, [[x]]) == "direct"
    with pytest.warns(RuntimeWarning, match=r"zoneout on cuda:0.*slow.*Pretended.*7\.5"):
        assert route._indirect_layer(call) is route.equations.lstm_layer
    assert route._indirect_layer(call) is route.equations.lstm_layer
    route._warn_about_cuda.cache_clear()
    route._warn_about_slow_options.cache_clear()
