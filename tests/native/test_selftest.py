"""python -m lstm_ext.selftest: it has to find what is wrong; and which CUDA kernel runs. python -m lstm_ext.info."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_build import Project
from test_config import git

from lstm_ext import info, selftest
from lstm_ext.layer import cuda_kernels
from lstm_ext.native import config, loader, selftest_record

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "CASES", (selftest.CASES[0], selftest.CASES[-1]))
    monkeypatch.setattr(selftest, "GRU_CASES", ())
    monkeypatch.setattr(selftest, "DTYPES", (torch.float32, torch.bfloat16))


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["selftest", *arguments])
    return selftest.main()


def test_every_case_passes_on_the_cpu(capability: str) -> None:
    for dtype in selftest.DTYPES:
        for case in (*selftest.CASES, *selftest.GRU_CASES):
            verdict = selftest._check(capability, case, dtype, CPU).run()
            assert verdict.passed, (case, dtype, str(verdict))


def test_report_and_record(few, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    capabilities = loader.extension().cpu_capabilities()
    before = loader.extension().cpu_capability()
    assert selftest_record.find(CPU) is None
    assert run_main(monkeypatch, "--device", "cpu") == 0
    lines = capsys.readouterr().out.splitlines()
    count = 4 * len(capabilities)
    assert len(lines) == count + 1
    assert all(line.startswith("ok ") for line in lines[:-1])
    assert lines[-1] == f"cpu: {count} of {count} checks passed; recorded in {selftest_record.path()}"
    assert loader.extension().cpu_capability() == before
    entry = selftest_record.find(CPU)
    assert entry["passed"] == capabilities
    assert entry["failed"] == []

    # Once more: the entry is replaced.
    assert run_main(monkeypatch, "--device", "cpu") == 0
    assert len(json.loads(selftest_record.path().read_text())) == 1


@pytest.mark.parametrize("changed", ["device", "capability", "driver", "torch", "lstm_ext", "sources"])
def test_a_record_is_about_one_state_of_things(monkeypatch: pytest.MonkeyPatch, changed: str) -> None:
    selftest_record.write(CPU, ["avx2"], [])
    key = selftest_record.key_of(CPU)
    assert set(key) == set(selftest_record.KEY)
    assert selftest_record.find(CPU)["passed"] == ["avx2"]
    monkeypatch.setattr(selftest_record, "key_of", lambda device: key | {changed: "another"})
    assert selftest_record.find(CPU) is None
    selftest_record.write(CPU, [], ["avx2"])
    monkeypatch.setattr(selftest_record, "key_of", lambda device: key)
    assert selftest_record.find(CPU)["passed"] == ["avx2"]


Layer = Callable[..., Any]


def slightly_wrong(output, h_n, c_n):
    return output * (1 + 2e-3), h_n, c_n


def wrong_gradient(output, h_n, c_n):
    """The values are right, their gradient is 1 % too large."""
    return output, h_n, c_n.detach() + (c_n - c_n.detach()) * 1.01


def not_a_number(output, h_n, c_n):
    return torch.where(torch.arange(output.size(-1)) == 3, torch.nan, output), h_n, c_n


def wrong_dtype(output, h_n, c_n):
    return output, h_n.double(), c_n


def wrong_shape(output, h_n, c_n):
    return output, h_n, c_n[..., :1].expand_as(c_n)


def raises(output, h_n, c_n):
    raise RuntimeError("no such kernel\nand more")


@pytest.mark.parametrize(
    "bug", [slightly_wrong, wrong_gradient, not_a_number, wrong_dtype, wrong_shape, raises]
)
def test_a_wrong_kernel_is_found(few, monkeypatch: pytest.MonkeyPatch, capsys, bug: Layer) -> None:
    right = selftest._operator
    module = loader.extension()
    broken, *sound = module.cpu_capabilities()[::-1]

    def operator(*arguments: Any) -> Any:
        result = right(*arguments)
        is_broken = module.cpu_capability() == broken and result[0].dtype == torch.float32
        return bug(*result) if is_broken else result

    monkeypatch.setattr(selftest, "_operator", operator)
    assert run_main(monkeypatch, "--device", "cpu") == 1
    lines = capsys.readouterr().out.splitlines()
    failed = [line for line in lines if line.startswith("FAILED")]
    assert len(failed) == 2  # the two cases in float32
    assert all(broken in line and "float32" in line for line in failed)
    if bug is raises:
        assert failed[0].endswith("RuntimeError: no such kernel")
    entry = selftest_record.find(CPU)
    assert (entry["passed"], entry["failed"]) == (sound[::-1], [broken])


def test_where_nothing_can_be_recorded(few, monkeypatch: pytest.MonkeyPatch, capsys, tmp_path: Path) -> None:
    (tmp_path / "cache").touch()
    assert run_main(monkeypatch, "--device", "cpu") == 0
    assert "; not recorded: " in capsys.readouterr().out


def test_arguments_hold_zeros_until_they_are_filled() -> None:
    """What the checks on a stream and of a captured graph rely on: both fail if they see the zeros."""
    case, dtype = selftest.CASES[-1], torch.float32
    problem = selftest.Problem(case, dtype, CPU)
    assert not selftest.judge(selftest.compute(problem, selftest._operator), case, dtype).passed
    problem.fill()
    assert selftest.judge(selftest.compute(problem, selftest._operator), case, dtype).passed


def test_precision_is_put_back() -> None:
    places = (torch.backends.cudnn.rnn, torch.backends.cuda.matmul)
    before = [place.fp32_precision for place in places]
    with selftest._fp32_precision("ieee"):
        assert [place.fp32_precision for place in places] == ["ieee", "ieee"]
    assert [place.fp32_precision for place in places] == before


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run_main(monkeypatch, "--device", "cuda") == 1
    assert capsys.readouterr().out == "cuda: not checked: there is no GPU that this torch can use\n"


def test_without_the_extension(tmp_path: Path) -> None:
    project = Project(tmp_path)
    returncode, out, err = project.run("-m", "lstm_ext.selftest", CXX="no-such-compiler")
    assert returncode == 1
    assert out == ""
    assert "there is no compiled extension: there is no lstm_ext.native._C" in err


class Gpus:
    """GPUs that torch tells of and that nothing runs on."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, built: str | None, *capabilities: tuple[int, int]
    ) -> None:
        class Properties:
            def __init__(self, capability: tuple[int, int]) -> None:
                self.name, (self.major, self.minor) = "A GPU", capability

        def index(device: torch.device | int) -> int:
            return device.index if isinstance(device, torch.device) else device

        status = loader.Status(
            "aot", "_C.so", "_ops.so", sources="0", cuda=built, cuda_reason=None if built else "none"
        )
        monkeypatch.setattr(loader, "status", lambda: status)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[index(device)])
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda device: Properties(capabilities[index(device)])
        )
        monkeypatch.setattr(selftest_record, "_driver", lambda: "580.65")


def test_which_gpus_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    Gpus(monkeypatch, "13.0 for 8.0", (7, 5), (8, 6), (9, 0))
    devices, reasons = selftest.cuda_devices()
    assert devices == [torch.device("cuda", 1)]
    assert [reason.partition(": ")[0] for reason in reasons] == ["A GPU", "A GPU"]
    Gpus(monkeypatch, None, (8, 6))
    assert selftest.cuda_devices() == ([], ["the extension has no CUDA kernels: none"])


def test_info_about_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    Gpus(monkeypatch, "13.0 for 8.0", (7, 5), (8, 6))
    text = [f"{name.strip()}: {text}" for name, text in info._cuda_lines(True, loader.status())]
    assert text[0] == "cuda: kernels built with CUDA 13.0 for 8.0"
    assert (
        text[1]
        == "kernel: auto: of those that have been right here, the one measured fastest, else persistent, step, stepwise"
    )
    assert text[2].startswith("devices: 2; ")
    assert text[3].startswith("cuda:0: A GPU, compute capability 7.5: not supported: the kernels need")
    assert text[4] == "cuda:1: A GPU, compute capability 8.6: supported"
    assert text[5] == "selftest: not run for this device and build: python -m lstm_ext.selftest"

    selftest_record.write(torch.device("cuda", 1), ["stepwise"], [])
    assert info._device_lines(torch.device("cuda", 1), loader.status())[1][1].startswith(
        "stepwise passed on 2"
    )
    selftest_record.write(torch.device("cuda", 1), [], ["stepwise"])
    assert info._device_lines(torch.device("cuda", 1), loader.status())[1][1].startswith(
        "stepwise FAILED on 2"
    )

    Gpus(monkeypatch, None, (8, 6))
    text = [text for _, text in info._cuda_lines(True, loader.status())]
    assert text[0] == "no kernels, torch's own operator computes layers of CUDA tensors: none"
    assert text[-1] == "A GPU, compute capability 8.6: torch's own operator"


def test_cuda_kernels() -> None:
    """The checks themselves, on every GPU that is here."""
    devices, reasons = selftest.cuda_devices()
    if not devices:
        pytest.skip(reasons[0])
    for device in devices:
        for check in selftest.cuda_checks(device):
            verdict = check.run()
            assert verdict.passed, (device, check.name, str(verdict))


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (
            None,
            "of those that have been right here, the one measured fastest, else persistent, step, stepwise",
        ),
        (
            "auto",
            "of those that have been right here, the one measured fastest, else persistent, step, stepwise",
        ),
        ("stepwise", "LSTM_EXT_CUDA_KERNEL=stepwise"),
        ("step", "LSTM_EXT_CUDA_KERNEL=step"),
        ("persistent", "LSTM_EXT_CUDA_KERNEL=persistent"),
        ("torch", "LSTM_EXT_CUDA_KERNEL=torch; options that torch lacks as with auto"),
    ],
)
def test_kernel_in_use(monkeypatch: pytest.MonkeyPatch, value: str | None, reason: str) -> None:
    monkeypatch.delenv("LSTM_EXT_CUDA_KERNEL", raising=False)
    if value is not None:
        monkeypatch.setenv("LSTM_EXT_CUDA_KERNEL", value)
    assert cuda_kernels.requested() == f"{value or 'auto'}: {reason}"


# ---- python -m lstm_ext.info


@pytest.mark.tools
def test_info_has_the_commit(tmp_path: Path) -> None:
    """Of a checkout by git; elsewhere from the record of the build, which wrote it there."""
    project = Project(tmp_path / "project")
    git(project.root, "init", "-q")
    git(project.root, "commit", "-q", "--allow-empty", "-m", "First")
    head = git(project.root, "rev-parse", "--short=12", "HEAD")
    build = "from lstm_ext.native import config; config.write_record(config.LIBRARIES, '2.13.0', 'g++', '0')"
    show = "from lstm_ext import info; print(); info.main()"
    _, out, err = project.run("-c", f"{build}; {show}", LSTM_EXT_BACKEND="torch")
    assert f"\n  commit     {head}+changes\n" in out, err
    record = config.read_record(project.package / "native")
    assert (record["commit"], record["version"]) == (f"{head}+changes", config.VERSION)
    shutil.rmtree(project.root / ".git")
    _, out, err = project.run("-c", show, LSTM_EXT_BACKEND="torch")
    assert f"\n  commit     {head}+changes, recorded by the build\n" in out, err


@pytest.mark.tools
def test_info_where_nothing_says_the_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "commit", lambda: None)
    monkeypatch.setattr(config, "read_record", lambda _: None)
    assert info._commit().startswith("not known: this is no git checkout")


@pytest.mark.tools
def test_info_has_the_version_of_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the extension in use, which may be older than the package around it; old records have none."""
    folder = Path(str(loader.status().path)).parent
    for more, said in (
        ({"version": "0.1.0", "commit": "abc"}, "0.1.0, commit abc"),
        ({"version": None, "commit": None}, "a version that is not recorded, commit not recorded"),
    ):
        record = config.read_record(folder) | more
        monkeypatch.setattr(config, "read_record", lambda _, record=record: record)
        assert dict(info._lines())["  built at"] == said
        monkeypatch.undo()


@pytest.mark.tools
@pytest.mark.parametrize(
    ("environment", "exit_code", "said"),
    [
        ({}, 0, "extension    loaded, built"),
        (
            {"LSTM_EXT_BACKEND": "reference"},
            1,
            "extension    not loaded: LSTM_EXT_BACKEND=reference asks for it",
        ),
        ({"LSTM_EXT_BACKEND": "torch"}, 1, "torch      in use"),
        ({"LSTM_EXT_BACKEND": "fast"}, 1, "LSTM_EXT_BACKEND is 'fast'"),
    ],
    ids=["loaded", "reference", "torch", "bad"],
)
def test_info(environment: dict[str, str], exit_code: int, said: str) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "lstm_ext.info"], env=os.environ | environment, capture_output=True, text=True
    )
    assert run.returncode == exit_code, run.stderr
    assert said in run.stdout + run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.tools
def test_info_where_the_extension_does_not_fit(tmp_path: Path) -> None:
    project = Project(tmp_path / "project")
    project.ahead_of_time("1.2.3")
    returncode, out, err = project.run("-m", "lstm_ext.info")
    assert returncode == 1
    assert "was built for torch 1.2.3" in out
    assert "Traceback" not in err
