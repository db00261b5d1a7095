"""The first use of a CUDA kernel, on a stand-in for a GPU: the emulated layer, on tensors of the CPU."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from build import missing
from emulated_layer import CHUNK_BYTES, stepwise_module
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lstm_ext.layer import cuda_kernels, trial
from lstm_ext.native import config, loader, selftest_record

pytestmark = [
    pytest.mark.tools,
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]

CPU = torch.device("cpu")
RIGHT = [("step", False), ("step", True)]
CASES = cuda_kernels.CASES


class StandIn:
    """`_C` of a machine with a GPU. `fault` changes what a kernel that is tried gives."""

    def __init__(self) -> None:
        self.module = stepwise_module()
        self.kernel = ""
        self.validated: list[tuple[str, bool]] = []  # kernel, and whether for float32
        self.expired = False  # a wait of every persistent kernel
        self.limit: float | None = None
        self.LayerOptions = self.module.LayerOptions
        self.calls = 0
        self.fault: Any = lambda calls, output: output
        self.fault_of_stepwise: Any = lambda output: output

    def set_cuda_kernel_of_thread(self, name: str) -> None:
        self.kernel = name
        self.module.set_device(True, CHUNK_BYTES, name or "stepwise")

    def set_cuda_validated(self, index: int | None, kernel: str, tf32: bool, validated: bool) -> None:
        assert index is None and validated
        self.validated.append((kernel, tf32))

    def set_cuda_wait_limit_of_thread(self, seconds: float | None) -> None:
        self.limit = seconds

    def cuda_wait_expired(self, index: int | None) -> bool:
        assert index is None
        return self.expired and self.kernel == "persistent"

    def lstm_layer_forward(self, *call: Any) -> Any:
        output, *others = self.module.lstm_layer_forward(*call)
        if self.kernel in config.TRIED_CUDA_KERNELS:
            assert self.limit in cuda_kernels.WAIT_LIMITS
            self.calls += 1
            output = self.fault(self.calls, output)
        elif self.kernel == "stepwise":
            output = self.fault_of_stepwise(output)
        return (output, *others)

    def lstm_layer_backward(self, *call: Any) -> Any:
        return self.module.lstm_layer_backward(*call)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, request: pytest.FixtureRequest) -> StandIn:
    """It tries the kernels of the parameter."""
    stand_in = StandIn()
    tried = getattr(request, "param", ("step",))
    monkeypatch.setattr(config, "TRIED_CUDA_KERNELS", tuple(tried))
    extension = loader.extension()  # what a record is about
    key = selftest_record.key_of(CPU)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("LSTM_EXT_CUDA_KERNEL", raising=False)
    monkeypatch.delenv("LSTM_EXT_CUDA_CHECK", raising=False)
    monkeypatch.setattr(loader, "extension", lambda: stand_in)
    monkeypatch.setattr(selftest_record, "key_of", lambda device: key)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.device(device))
    monkeypatch.setattr(cuda_kernels, "_chosen", {})
    monkeypatch.setattr(cuda_kernels, "_forced", Counter())  # conftest.py forces the kernels
    monkeypatch.setattr(cuda_kernels, "_found", {})
    monkeypatch.setattr(cuda_kernels, "CASES", CASES[2:4])  # the small ones
    monkeypatch.setattr(cuda_kernels, "REPEATS", 3)
    monkeypatch.setattr(cuda_kernels, "LIMIT", 60)
    selftest_record.write(CPU, ["stepwise"], [])
    yield stand_in
    assert stand_in.limit is None
    stand_in.set_cuda_kernel_of_thread("")
    stand_in.module.set_device(False, CHUNK_BYTES, "stepwise")
    assert extension is not None


def test_a_packed_problem_needs_two_launches() -> None:
    header = (config.source_dir() / "cuda" / "persistent.h").read_text()
    steps = int(re.search(r"kPersistentPackedSteps = (\d+);", header).group(1))
    assert any(case.lengths is not None and case.lengths[0] > steps for case in CASES)


def recorded() -> dict[str, Any] | None:
    return selftest_record.find(CPU)


def choose_again() -> bool:
    """As the next process does, which knows what the record says."""
    cuda_kernels._chosen.clear()
    cuda_kernels._found.clear()
    return cuda_kernels.choose(CPU)


@pytest.mark.parametrize("gpu", [("step", "persistent")], ids=["all"], indirect=True)
def test_it_is_right(gpu: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_kernels, "CASES", CASES[:5])
    before = torch.get_rng_state()
    cuda_kernels.choose(CPU)
    assert torch.equal(torch.get_rng_state(), before)
    assert gpu.validated == [*RIGHT, ("persistent", False), ("persistent", True)] and gpu.kernel == ""
    names = ["stepwise", "step", "step-tf32", "persistent", "persistent-tf32"]
    assert recorded()["passed"] == names and recorded()["failed"] == []
    calls = gpu.calls
    cuda_kernels.choose(CPU)  # once a process
    choose_again()
    assert gpu.calls == calls
    assert len(gpu.validated) == 2 * 4


@pytest.mark.parametrize("gpu", [("step", "persistent")], ids=["all"], indirect=True)
def test_a_wait_that_expires_is_no_verdict(gpu: StandIn) -> None:
    """The GPU may have been busy with something else."""
    gpu.expired = True
    said = (
        "'persistent' is not used on cpu: it could not be tried: .*waited for another one in vain for 2.0 s"
    )
    with pytest.warns(RuntimeWarning, match=said):
        assert cuda_kernels.choose(CPU)
    assert gpu.validated == RIGHT and recorded()["failed"] == []
    assert recorded()["passed"] == ["stepwise", "step", "step-tf32"]
    gpu.expired = False
    choose_again()
    assert gpu.validated[-2:] == [("persistent", False), ("persistent", True)]


def test_stepwise_is_compared_with_the_equations(gpu: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a kernel that was right, none runs."""
    selftest_record.path().unlink()
    assert cuda_kernels.choose(CPU) and recorded()["passed"][0] == "stepwise"
    selftest_record.path().unlink()
    gpu.validated.clear()
    gpu.fault_of_stepwise = flip
    with pytest.warns(
        RuntimeWarning, match="'stepwise' is not used on cpu: it was wrong: .*output is .* off"
    ):
        assert not choose_again()
    assert gpu.validated == [] and recorded()["failed"] == ["stepwise"]
    assert not cuda_kernels.choose(CPU) and not cuda_kernels.outcome(CPU, "stepwise", torch.bfloat16)
    assert not choose_again()  # never again on that device


@pytest.mark.parametrize(
    "mode", [torch.inference_mode, torch.no_grad, FakeTensorMode], ids=lambda m: m.__name__
)
def test_the_first_call_may_be_in_any_mode(gpu: StandIn, mode: Any) -> None:
    selftest_record.path().unlink()
    with mode():
        assert cuda_kernels.choose(CPU)
    assert recorded()["passed"] == ["stepwise", "step", "step-tf32"]


def test_without_a_verdict_the_next_process_tries(gpu: StandIn) -> None:
    """No memory, say: a check and a warning at each call would be worse."""
    selftest_record.path().unlink()
    tried: list[int] = []

    def fail(output: Tensor) -> Tensor:
        tried.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory")

    gpu.fault_of_stepwise = fail
    with pytest.warns(RuntimeWarning, match="'stepwise' is not used on cpu: it could not be tried") as caught:
        assert not cuda_kernels.choose(CPU) and not cuda_kernels.choose(CPU)
    assert len(tried) == len(caught) == 1 and selftest_record.find(CPU) is None
    gpu.fault_of_stepwise = lambda output: output
    assert choose_again()


def test_float64_needs_the_room_of_rounding() -> None:
    """By the CPU's kernels, on every problem: the emulator would take too long."""
    for case in CASES:
        found = cuda_kernels._by_kernels(loader.extension(), trial.Problem(case, torch.float64, CPU))
        verdict = trial.judge(found, cuda_kernels._by_equations(case, torch.float64, CPU), torch.float64)
        assert verdict.passed, (case.name, str(verdict))


def test_nothing_runs_unchecked(gpu: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    selftest_record.path().unlink()
    monkeypatch.setenv("LSTM_EXT_CUDA_CHECK", "0")
    with pytest.warns(RuntimeWarning, match="no kernel has been checked on cpu, and LSTM_EXT_CUDA_CHECK=0"):
        assert not cuda_kernels.choose(CPU)
    monkeypatch.setenv("LSTM_EXT_CUDA_KERNEL", "stepwise")  # unless the user asks for it
    assert choose_again() and gpu.calls == 0


def test_a_result_that_comes_with_the_release_decides(
    gpu: StandIn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(selftest_record, "COMMITTED", tmp_path / "results.json")
    selftest_record.COMMITTED.write_text("[]")
    capability = selftest_record.key_of(CPU)["capability"]
    kernels = config.digest(config.source_dir() / "cuda")
    selftest_record.commit(capability, kernels, ["stepwise", "step"], ["step-tf32"], "a result")
    selftest_record.commit("another capability", kernels, ["step-tf32"], [], "another result")
    cuda_kernels.choose(CPU)
    assert gpu.validated == RIGHT[:1] and gpu.calls == 0 and recorded()["passed"] == ["stepwise"]
    # Of other kernels it says nothing.
    selftest_record.commit(capability, "of others", ["step", "step-tf32"], [], "an older result")
    choose_again()
    assert gpu.calls > 0 and recorded()["passed"] == ["stepwise", "step", "step-tf32"]
    # What the user's own card has found counts first.
    selftest_record.commit(capability, kernels, ["step", "step-tf32"], [], "a result")
    selftest_record.write(CPU, [], ["step"])
    gpu.validated.clear()
    choose_again()
    assert gpu.validated == RIGHT[1:]


def flip(output: Tensor) -> Tensor:
    output = output.clone()
    output[-1, -1] += 0.5
    return output


# What a kernel that is tried gives, at the call of that number; what is said; and which kernels are in the record, as
# right and as wrong.
OUTCOMES = {
    "wrong": (lambda calls, output: flip(output), "'step' .* wrong: .*output is .* off", [], ["step", "step-tf32"]),
    "NaN": (lambda calls, output: output * float("nan"), "'step' .*output is nan off", [], ["step", "step-tf32"]),
    "now and then": (
        lambda calls, output: flip(output) if calls > 2 + 1 else output,
        "'step' .*did not give the same bits", [], ["step", "step-tf32"],
    ),
    # What float32 does says nothing about 16 bits.
    "one of them": (
        lambda calls, output: flip(output) if output.dtype == torch.float32 else output,
        "'step-tf32' is not used on cpu: it was wrong", ["step"], ["step-tf32"],
    ),
    # No memory, say, which is no verdict.
    "error": (
        lambda calls, output: 1 / 0,
        "'step' is not used on cpu: it could not be tried: ZeroDivisionError: division by zero", [], [],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OUTCOMES)
def test_what_a_trial_finds(gpu: StandIn, name: str) -> None:
    gpu.fault, said, right, wrong = OUTCOMES[name]
    with pytest.warns(RuntimeWarning, match=said):
        cuda_kernels.choose(CPU)
    assert gpu.validated == RIGHT[: len(right)] and gpu.kernel == ""
    assert (recorded()["passed"], recorded()["failed"]) == (["stepwise", *right], wrong)
    if len(wrong) == 2:
        assert cuda_kernels.outcome(CPU, "step", torch.bfloat16) is False
        gpu.calls = 0
        choose_again()  # never again on that device
        assert gpu.calls == 0 and gpu.validated == []


@pytest.mark.parametrize("fewest", [None, 0])
def test_there_is_no_time(gpu: StandIn, monkeypatch: pytest.MonkeyPatch, fewest: int | None) -> None:
    """Or for the fewest repeats only."""
    monkeypatch.setattr(cuda_kernels, "LIMIT", -1)
    if fewest is not None:
        monkeypatch.setattr(cuda_kernels, "FEWEST_REPEATS", fewest)
    cuda_kernels.choose(CPU)
    right = [] if fewest is None else ["step", "step-tf32"]
    assert gpu.validated == RIGHT[: len(right)] and recorded()["passed"] == ["stepwise", *right]


@pytest.mark.filterwarnings("error")
def test_the_record_cannot_be_written(gpu: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(selftest_record, "write", refuse)
    cuda_kernels.choose(CPU)
    assert gpu.validated == RIGHT and recorded()["passed"] == ["stepwise"]
    assert cuda_kernels.outcome(CPU, "step", torch.bfloat16) and cuda_kernels.outcome(
        CPU, "step", torch.float32
    )


def test_somebody_has_decided(gpu: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LSTM_EXT_CUDA_CHECK", "0")
    cuda_kernels.choose(CPU)
    selftest_record.write(CPU, ["stepwise", "step"], [])
    choose_again()  # it asks for no more than a record
    assert gpu.validated.pop() == RIGHT[0]
    monkeypatch.delenv("LSTM_EXT_CUDA_CHECK")
    monkeypatch.setenv("LSTM_EXT_CUDA_KERNEL", "stepwise")
    choose_again()
    assert gpu.calls == 0 and gpu.validated == []


@pytest.mark.parametrize("where", ["capture", "backward"])
def test_not_while_a_check_would_disturb(gpu: StandIn, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """A graph that is captured would have it, and a backward pass, which it needs too, would wait for itself."""
    if where == "capture":
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        cuda_kernels.choose(CPU)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    else:
        x = torch.ones(1, requires_grad=True)
        y = x * 2
        y.register_hook(lambda grad: (cuda_kernels.choose(CPU), grad)[1])
        y.backward()
    assert gpu.calls == 0 and gpu.validated == []
    cuda_kernels.choose(CPU)
    assert gpu.calls > 0 and gpu.validated == RIGHT


ADD = """
import sys, torch
from lstm_ext.native import selftest_record
for _ in range(20): selftest_record.add(torch.device("cpu"), sys.argv[1], True)
"""


def test_two_processes_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is whole at any time. One may lose what the other has just added, and finds it out again."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    running = [subprocess.Popen([sys.executable, "-c", ADD, name]) for name in ("step", "other")]
    assert [process.wait() for process in running] == [0, 0]
    assert recorded()["passed"] and set(recorded()["passed"]) <= {"step", "other"}
