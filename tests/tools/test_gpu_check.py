"""gpu_check.py without a GPU: a trial of the whole, and what it says when something crashes, hangs or fails."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "cuda"))

import bench_gpu  # noqa: E402
import cuda_diagnosis  # noqa: E402
import gpu_check  # noqa: E402
import gpu_session  # noqa: E402
import gpu_shapes  # noqa: E402
from test_benchmarks import run  # noqa: E402

from lstm_ext.layer import cuda_kernels  # noqa: E402
from lstm_ext.native.config import CUDA_KERNELS  # noqa: E402

pytestmark = pytest.mark.tools


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """Both commands, one after the other."""
    path = tmp_path_factory.mktemp("gpu") / "dry.json"
    stdout = "".join(run("gpu_check.py", c, "--dry", "--output", path) for c in gpu_check.COMMANDS)
    return json.loads(path.read_text()), stdout, path


def test_dry_run(dry):
    record, stdout, path = dry
    assert record["verdict"] == "passed" and record["dry"]
    phases = {p["phase"]: p for p in record["phases"]}
    not_run = dict.fromkeys(("selftest", "sanitizer"), "not run")
    expected = dict.fromkeys(gpu_check.PHASES, "passed") | not_run | {"build": phases["build"]["result"]}
    assert {name: p["result"] for name, p in phases.items()} == expected
    checks = {c["check"]: c["result"] for c in phases["checks"]["checks"]}
    assert checks["graph_of_training"] == "not run" and checks["gradcheck"] == checks["race_loop"] == "passed"
    assert phases["suite"]["groups"][0]["counts"]["passed"] > 0
    results = record["benchmark"]["results"]
    assert len(results) == 2 * len(gpu_shapes.TINY) - 2  # there is no graph on a CPU
    assert all(r["agree"] and {"torch", "ours"} <= set(r["sides"]) for r in results)
    assert [set(r["sides"]) for r in record["audit"]["results"]] == [{"auto", "torch", *CUDA_KERNELS}] * 2
    text = run("report", "gpu", "--record", path)
    assert (
        text in stdout
        and text.startswith("| B | T | I | H |")
        and "| 3 | 10 | 8 | 8 | packed | tf32 |" in text
    )
    assert "auto meets 0 of 5 targets, misses 0; 5 not measured" in text and " Phases: build " in text
    with tarfile.open(path.with_suffix(".tar.gz")) as archive:
        names = {Path(name).name for name in archive.getnames()}
    assert {"record.json", "info.txt", "checks_list.txt", "benchmark.txt"} <= names


def test_each_kind_of_mistake_is_reported(dry):
    """So that who reads the archive can mend the kernel: what was wrong, where, and by which pattern."""
    phase = next(p for p in dry[0]["phases"] if p["phase"] == "diagnosis")
    found = {one["variant"].partition(", ")[2]: one for one in phase["variants"]}
    assert set(found) == {"", *cuda_diagnosis.FAULTS}
    assert found[""]["report"]["wrong"] == [] and found[""]["end"] == "exit code 0"
    assert found["crash"]["end"] == "ended by SIGSEGV" and found["hang"]["end"] == "the time was up"
    reports = {
        fault: {report["test"]: report for report in found[fault]["report"]["wrong"]}
        for fault in ("gates", "row", "unit", "part", "nan", "fragment")
    }
    values = {fault: report["values"] for fault, report in reports.items()}
    assert [n > 0 for n in values["row"]["by_row_of_8"]] == [row == 3 for row in range(8)]
    assert [n > 0 for n in values["unit"]["by_unit_of_16"]] == [unit == 5 for unit in range(16)]
    assert values["gates"]["by_gate"]["i"] > 0 and values["gates"]["by_gate"]["g"] == 0
    assert [n > 0 for n in values["part"]["by_part_of_depth"]] == [part == 1 for part in range(8)]
    assert values["nan"]["nan"] == values["nan"]["wrong"] == 1
    # Which number came in the place of which.
    example = reports["fragment"]["fragments"]["first"][0]
    assert example["came"]["unit"] == example["expected"]["unit"] ^ 1


def test_verdict(tmp_path, monkeypatch):
    """Of the phases that say whether the layer is right; one that fails leaves the others."""

    def broken(session, seconds):
        raise OSError("no space")

    outcomes = {name: gpu_check.Outcome("passed") for name in gpu_check.PHASES}
    for name in gpu_check.PHASES:
        monkeypatch.setitem(gpu_check.PHASES, name, lambda session, seconds, name=name: outcomes[name])
    arguments = ["--dry", "--output", str(tmp_path / "out.json")]
    assert gpu_check.main(arguments) == 0
    outcomes["benchmark"] = gpu_check.Outcome("incomplete", "the time was up")
    assert gpu_check.main(["speed", *arguments]) == 0
    monkeypatch.setitem(gpu_check.PHASES, "selftest", broken)
    assert gpu_check.main(arguments) == 1
    record = json.loads((tmp_path / "out.json").read_text())
    assert (record["verdict"], record["failed"]) == ("failed", ["selftest"])
    phases = {p["phase"]: p for p in record["phases"]}
    assert phases["selftest"]["reason"] == "OSError: no space" and phases["checks"]["result"] == "passed"
    # Without a GPU, and not dry, nothing has been shown.
    assert gpu_check.main(["--skip", "selftest", *arguments[1:]]) == 1


def test_a_result_is_put_into_the_release(dry, tmp_path, monkeypatch, capsys):
    from lstm_ext.native import selftest_record

    monkeypatch.setattr(selftest_record, "COMMITTED", tmp_path / "results.json")
    selftest_record.COMMITTED.write_text("[]")
    record, _, path = dry
    with pytest.raises(SystemExit):
        gpu_check.main(["--accept", str(path)])
    assert "expected a result of a GPU that passed" in capsys.readouterr().err
    variants = {"capability": "9.0", "passed": ["stepwise", "step"], "failed": [], "kernels": "0123"}
    phases = [
        {**p, "result": "passed", "variants": variants} if p["phase"] == "selftest" else p
        for p in record["phases"]
    ]
    passed = tmp_path / "passed.json"
    passed.write_text(json.dumps({**record, "dry": False, "phases": phases}))
    assert gpu_check.main(["--accept", str(passed)]) == 0
    assert json.loads(selftest_record.COMMITTED.read_text()) == [{**variants, "result": "passed.json"}]


# ---- what a machine may lack. Stand-ins for the processes say what a real one would.


class Processes:
    """In the place of `Session.start`: each says its text and ends with its code after a moment."""

    def __init__(self, folder: Path, code: int | None, text: str = "") -> None:
        self.folder, self.code, self.text = folder, code, text
        self.alive = self.most = 0
        self.started: list[str] = []

    def __call__(self, name, arguments, **environment):
        self.alive += 1
        self.most = max(self.most, self.alive)
        self.started.append(name)
        return SimpleNamespace(wait=lambda *_: self.finished(name))

    def finished(self, name: str) -> gpu_session.Finished:
        time.sleep(0.05)
        self.alive -= 1
        code, text = (0, '["gradcheck"]') if name == "checks_list" else (self.code, self.text)
        (self.folder / name).write_text(text)
        return gpu_session.Finished(code, self.folder / name, self.folder)


@pytest.fixture
def session(tmp_path, monkeypatch):
    """Of a machine with a GPU and compute-sanitizer."""
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tool.parent), prepend=os.pathsep)
    options = {
        "command": "values",
        "dry": False,
        "output": tmp_path / "out.json",
        "budget": 300.0,
        "commit": None,
    }
    return gpu_check.Session(argparse.Namespace(**options))


@pytest.mark.parametrize("phase", [name for name in gpu_check.PHASES if name != "build"])
def test_time_that_ran_out_is_no_verdict(phase, session, tmp_path, monkeypatch):
    text = json.dumps({"check": "gradcheck", "result": "started"}) if phase == "checks" else ""
    monkeypatch.setattr(session, "start", Processes(tmp_path, None, text))
    assert gpu_check.PHASES[phase](session, 10.0).result == "incomplete"
    session.gpu_works, session.deadline = True, time.monotonic()
    session.command = next(name for name, phases in gpu_check.COMMANDS.items() if phase in phases)
    assert gpu_check.perform(phase, session)["result"] == "not run"


def test_what_there_was_no_time_for_is_said(tmp_path, monkeypatch, capsys):
    for name in gpu_check.PHASES:
        monkeypatch.setitem(gpu_check.PHASES, name, lambda session, seconds: gpu_check.Outcome("passed"))
    late = gpu_check.Outcome("incomplete", "the time was up")
    monkeypatch.setitem(gpu_check.PHASES, "suite", lambda session, seconds: late)
    path = tmp_path / "out.json"
    assert gpu_check.main(["--dry", "--output", str(path)]) == 0
    assert "incomplete: suite; written to" in capsys.readouterr().out
    record = json.loads(path.read_text()) | {"dry": False}
    assert record["verdict"] == "incomplete"
    path.write_text(json.dumps(record))
    with pytest.raises(SystemExit):
        gpu_check.main(["--accept", str(path)])


@pytest.mark.parametrize("reason", ["no nvcc", "time"])
def test_without_an_extension_it_stops_at_once(reason, tmp_path, monkeypatch, capsys):
    found = {"problem": "none is there", "no_toolkit": "nvcc was not found" if reason == "no nvcc" else None}
    monkeypatch.setattr(gpu_check, "existing_extension", lambda session: found)
    processes = Processes(tmp_path, None)
    monkeypatch.setattr(gpu_check.Session, "start", lambda self, *a, **more: processes(*a, **more))
    path = tmp_path / "out.json"
    code = gpu_check.main(["--output", str(path)])
    lines = capsys.readouterr().out.splitlines()
    verdict = json.loads(path.read_text())["verdict"]
    assert lines[0] == "build ..." and len(lines) == 2
    if reason == "no nvcc":
        assert (code, verdict, processes.started) == (1, "failed", []) and "nvcc was not found" in lines[1]
    else:
        assert (code, verdict, processes.started) == (
            0,
            "incomplete",
            ["build"],
        ) and "call it again" in lines[1]


def test_nvcc_is_looked_for_where_a_build_is_needed(tmp_path):
    program = f"import torch\ntorch.version.cuda = '13.0'\n{gpu_check.FITS}"
    environment = {**os.environ, "CUDA_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    assert found["problem"] and found["no_toolkit"].startswith("nvcc was not found in CUDA_HOME=")


@pytest.mark.parametrize(
    ("code", "text", "result"),
    [
        (0, '"began"\n"done"', "passed"),
        (0, "========= ERROR SUMMARY: 0 errors", "not run"),  # and the program never ran
        (1, "========= Error: Device not supported", "not run"),
        (99, '"began"\n"done"\n========= ERROR SUMMARY: 1 error', "failed"),
        (1, '"began"\nRuntimeError', "failed"),
        (0, '"began"', "failed"),
    ],
)
def test_a_sanitizer_that_cannot_watch_is_no_verdict(code, text, result, session, tmp_path, monkeypatch):
    monkeypatch.setattr(session, "start", Processes(tmp_path, code, text))
    outcome = gpu_check.sanitizer(session, 10.0)
    assert outcome.result == result and f"racecheck: {result}" in outcome.reason


@pytest.mark.parametrize(
    ("facts", "at_once"),
    [
        ({"nvidia_smi": None}, 4),
        ({"nvidia_smi": {"compute_mode": "Default"}, "free_bytes": 70 << 30}, 4),
        ({"nvidia_smi": {"compute_mode": "Exclusive_Process"}, "free_bytes": 70 << 30}, 1),
        ({"free_bytes": 7 << 29}, 2),  # of a card with 4 GB
        ({"free_bytes": 1 << 29}, 1),
    ],
    ids=str,
)
def test_processes_at_once(facts, at_once, session, tmp_path, monkeypatch):
    session.know(facts | {"git_commit": None})
    assert session.at_once(4) == at_once
    most = {"suite": at_once, "diagnosis": min(at_once, 2), "sanitizer": min(at_once, 3)}
    for phase, expected in most.items():
        processes = Processes(tmp_path, 0, "{}")
        monkeypatch.setattr(session, "start", processes)
        gpu_check.PHASES[phase](session, 10.0)
        assert processes.most == expected, phase


def test_the_clocks_are_those_of_the_card_in_use(monkeypatch):
    """Of CUDA_VISIBLE_DEVICES=1, torch's first card is the second of nvidia-smi."""
    asked = []

    def answer(command, **_):
        asked.append(command)
        return SimpleNamespace(stdout="580.1, 345 MHz, 1980 MHz, 700.00 W, 30, 0 %, Exclusive_Process\n")

    monkeypatch.setattr(bench_gpu.shutil, "which", lambda name: name)
    monkeypatch.setattr(bench_gpu.subprocess, "run", answer)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="01-ab"))
    found = bench_gpu.nvidia_smi(torch.device("cuda", 0))
    assert asked[0][1:3] == ["-i", "GPU-01-ab"]
    assert (found["clocks.max.sm"], found["compute_mode"]) == ("1980 MHz", "Exclusive_Process")


# ---- what is measured


def test_sixty_cases_have_time():
    """By estimate: a second a case for its tensors and what only a first call does."""
    first = gpu_shapes.CASES[:60]
    kinds = sum(1 if case.graph else 2 if case.packed else 3 for case in first)
    assert kinds * bench_gpu.SECONDS + len(first) <= gpu_check.COMMANDS["speed"]["benchmark"] - 20
    assert {case.dtype for case in first if case.steps == 1 and case.kernel == "auto"} == set(
        gpu_shapes.DTYPES
    )
    assert (
        sum(gpu_check.COMMANDS["speed"].values()) - gpu_check.COMMANDS["speed"]["build"] <= gpu_check.BUDGET
    )


def test_cases_that_have_no_room_are_left_out(tmp_path, monkeypatch, capsys):
    """A card with 4 GB measures what fits, and that is no error."""
    small = [case for case in gpu_shapes.CASES if case.bytes_needed > 7 << 29]
    assert 0 < len(small) < len(gpu_shapes.CASES) / 4
    monkeypatch.setattr(bench_gpu, "free_bytes", lambda device: gpu_shapes.TINY[-1].bytes_needed - 1)
    measured = []

    def measure(case, device, seconds):
        measured.append(case)
        if case.graph:
            raise torch.OutOfMemoryError
        return []

    monkeypatch.setattr(bench_gpu, "measure", measure)
    path = tmp_path / "out.json"
    assert bench_gpu.main(["--device", "cpu", "--tiny", "--output", str(path)]) == 0
    record = json.loads(path.read_text())
    assert gpu_shapes.TINY[-1] not in measured and len(measured) > 1
    assert any(name.startswith("outside") for name in record["too_large"])
    assert any(name.startswith("step") for name in record["too_large"])
    assert "too large for the memory that is free: " in capsys.readouterr().out


def test_the_audit_measures_what_auto_takes(monkeypatch):
    """Not forced, where the benchmark's `auto` is any kernel of ours; and each kernel beside it."""
    assert len(set(gpu_shapes.AUDIT)) == 10 and {case.steps for case in gpu_shapes.AUDIT} == {1024}
    seen = set()
    monkeypatch.setattr(cuda_kernels, "_forced", Counter())

    def note(layer, x, training):
        return lambda: seen.add(
            (type(layer).__module__, *sorted(k for k, n in cuda_kernels._forced.items() if n))
        )

    monkeypatch.setattr(bench_gpu.harness, "call_of", note)
    bench_gpu.audit(gpu_shapes.TINY_AUDIT[0], torch.device("cpu"), 0.01)
    ours, torchs = "lstm_ext.nn.lstm", "torch.nn.modules.rnn"
    assert seen == {(torchs,), (ours,), *[(ours, kernel) for kernel in CUDA_KERNELS]}
    with cuda_kernels.forced("step"), pytest.raises(AssertionError, match="nothing to choose"):
        bench_gpu.audit(gpu_shapes.TINY_AUDIT[0], torch.device("cpu"), 0.01)


@pytest.mark.parametrize(("auto", "result"), [(1.05, "passed"), (1.2, "failed")])
def test_the_audit_says_where_auto_is_slow(auto, result, session, tmp_path, monkeypatch):
    compared = bench_gpu.compared({"auto": auto, "torch": 3.0, "step": 1.0})
    assert compared == {"fastest": "step", "auto_to_fastest": auto}
    found = gpu_shapes.AUDIT[0].head("training") | compared

    def start(name, arguments, XDG_CACHE_HOME, **more):
        assert not Path(XDG_CACHE_HOME).exists()
        written = {"results": [found], "left_out": [], "too_large": []}
        Path(arguments[-1]).write_text(json.dumps(written))
        return processes(name, arguments)

    processes = Processes(tmp_path, 0)
    monkeypatch.setattr(session, "start", start)
    outcome = gpu_check.audit(session, 50.0)
    assert outcome.result == result
    said = ["audit B16-T1024-H768 float16 training: 1.20 times step"]
    assert outcome.details["failed"] == (said if result == "failed" else [])
