"""gpu_check.py without a GPU: a trial of the whole, and what it says when something crashes, hangs or fails."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "cuda"))

import cuda_diagnosis  # noqa: E402
import gpu_check  # noqa: E402
import gpu_shapes  # noqa: E402
from gpu_session import Session  # noqa: E402
from report import gpu as report_gpu  # noqa: E402
from test_benchmarks import run  # noqa: E402

pytestmark = pytest.mark.tools


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """Both commands, one after the other."""
    path = tmp_path_factory.mktemp("gpu") / "dry.json"
    stdout = "".join(
        run("gpu_check.py", command, "--dry", "--output", path) for command in gpu_check.COMMANDS
    )
    return json.loads(path.read_text()), stdout, path


def test_pages_say_which_command_measures():
    """`make gpu-check` has no phase that does."""
    root = BENCHMARKS.parent
    pages = [root / "Makefile", root / "README.md", *root.glob("docs/**/*.md"), *BENCHMARKS.rglob("*.py")]
    for page in pages:
        for sentence in re.split(r"\.\s|\n\n|\n\|", page.read_text()):
            if "gpu-check" in sentence and re.search("measures|figures", sentence):
                assert re.search("gpu-bench|nothing", sentence), (page, sentence)


def test_dry_run(dry):
    record, stdout, _ = dry
    assert record["verdict"] == "passed"
    assert record["dry"]
    phases = {p["phase"]: p for p in record["phases"]}
    assert set(phases) == set(gpu_check.PHASES)
    assert {name: p["result"] for name, p in phases.items() if name != "build"} == {
        "info": "passed",
        "diagnosis": "passed",
        "selftest": "not run",
        "suite": "passed",
        "checks": "passed",
        "sanitizer": "not run",
        "benchmark": "passed",
    }
    checks = {c["check"]: c for c in phases["checks"]["checks"]}
    for name in ("side_streams", "graph_of_training", "out_of_memory_is_an_error_and_no_more"):
        assert (checks[name]["result"], checks[name]["reason"]) == ("not run", "not on cpu")
    for name in ("gradcheck", "determinism", "race_loop"):
        assert checks[name]["result"] == "passed"
    assert phases["suite"]["tests"] > 0
    assert record["facts"]["torch"]
    assert record["facts"]["git_commit"] == record["git_commit"]
    results = record["benchmark"]["results"]
    measured = [r for r in results if "ratio" in r]
    assert len(measured) == 2 * len(gpu_shapes.TINY) - 2  # a graph is inference only, and not on a CPU
    assert [r["not_run"] for r in results if "ratio" not in r] == ["no graphs on cpu"]
    for r in measured:
        assert r["agree"], r
        for side in ("torch", "ours"):
            assert 0 < r[side]["first_quartile"] <= r[side]["median"] <= r[side]["third_quartile"]
            assert r[side]["us_per_step"] == pytest.approx(1e3 * r[side]["median"] / r["steps"])
            assert r[side]["share_of_floor"] > 0
    assert "| B | T | I | H |" in stdout
    assert "auto meets 0 of 5 targets, misses 0; 5 not measured" in stdout


def test_a_command_takes_five_minutes():
    for phases in gpu_check.COMMANDS.values():
        assert sum(seconds for name, seconds in phases.items() if name != "build") <= gpu_check.BUDGET == 300
    assert {name for phases in gpu_check.COMMANDS.values() for name in phases} == set(gpu_check.PHASES)


def test_each_kind_of_mistake_is_reported(dry):
    """So that who reads the archive can mend the kernel: what was wrong, where, and by which pattern."""
    phase = next(p for p in dry[0]["phases"] if p["phase"] == "diagnosis")
    found = {one["variant"].partition(", ")[2]: one for one in phase["variants"]}
    assert set(found) == {"", *cuda_diagnosis.FAULTS}
    assert found[""]["report"]["wrong"] == [] and found[""]["end"] == "exit code 0"
    assert found["crash"]["end"] == "ended by SIGSEGV" and found["hang"]["end"] == "the time was up"
    reports = {}
    for fault in ("gates", "row", "unit", "part", "nan", "fragment"):
        assert found[fault]["end"] == "exit code 1"
        reports[fault] = {report["test"]: report for report in found[fault]["report"]["wrong"]}

    values = {fault: report["values"] for fault, report in reports.items()}
    for fault, report in values.items():
        assert report["quantity"] == "z" and report["first"]["t"] == (fault in ("row", "unit", "nan"))
        assert {"row", "unit", "gate", "got", "float64", "stepwise"} <= set(report["first"])
        assert abs(report["first"]["stepwise"] - report["first"]["float64"]) < 0.02
    assert [n > 0 for n in values["row"]["by_row_of_8"]] == [row == 3 for row in range(8)]
    assert [n > 0 for n in values["unit"]["by_unit_of_16"]] == [unit == 5 for unit in range(16)]
    assert values["gates"]["by_gate"]["i"] > 0 and values["gates"]["by_gate"]["g"] == 0
    assert [n > 0 for n in values["part"]["by_part_of_depth"]] == [part == 1 for part in range(8)]
    assert values["nan"]["nan"] == values["nan"]["wrong"] == 1
    # A code says which number it is, in every dtype.
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        codes = torch.arange(cuda_diagnosis.CODES)
        h = torch.atanh(codes / 256).to(dtype).float().tanh().to(dtype)
        assert torch.equal((h.double() * 256).round().long(), codes)
    # Which number came in the place of which.
    example = reports["fragment"]["fragments"]["first"][0]
    assert example["came"]["unit"] == example["expected"]["unit"] ^ 1
    assert example["came"]["row"] == example["expected"]["row"]


def test_the_archive_has_everything(dry):
    path = dry[2]
    with tarfile.open(path.with_suffix(".tar.gz")) as archive:
        names = {Path(name).name for name in archive.getnames()}
    assert {"record.json", "info.txt", "checks_list.txt", "benchmark.txt"} <= names
    assert {f"diagnosis_mailbox_bfloat16_{fault}.txt" for fault in cuda_diagnosis.FAULTS} <= names
    assert "all of it, to send: " in dry[1]


def test_a_record_of_other_versions_is_not_added_to(tmp_path):
    output = tmp_path / "out.json"
    options = argparse.Namespace(command="values", dry=True, output=output, budget=1.0, commit=None)
    first = Session(options)
    card = {"git_commit": "0123", "card": "one"}
    first.know(card)
    first.add({"phase": "suite", "result": "passed"})
    first.add({"phase": "suite", "result": "failed"})
    first.write()

    def phases(command: str = "speed", **facts: str) -> list[str]:
        options.command = command
        session = Session(options)
        session.add({"phase": "build", "result": "passed"})
        session.know(card | facts)
        return [f"{phase['phase']} {phase['result']}" for phase in session.record["phases"]]

    assert phases() == ["suite failed", "build passed"]
    assert phases(card="another") == phases("values") == ["build passed"]
    for change in ({"packages": {"torch": "1.0"}}, {"sources": "others"}):
        output.write_text(json.dumps(first.record | change))
        assert phases() == ["build passed"]


CLOCKS = """#!/bin/sh
echo "1980, 2619, 45, 300.5"
echo "1755, 2619, 60, 650.0"
echo "1755, 2619, 61, [N/A]"
sleep 1000
"""


def test_clocks_are_sampled(session, tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text(CLOCKS)
    program.chmod(0o755)
    monkeypatch.setattr(gpu_check, "find_program", lambda *names: str(program))
    session.dry = False
    with gpu_check.sampled_clocks(session) as clocks:
        time.sleep(0.5)
    assert clocks() == {
        "clocks.sm": [1755, 1755, 1980],
        "clocks.mem": [2619] * 3,
        "temperature.gpu": [45, 60, 61],
    }
    monkeypatch.setattr(gpu_check, "find_program", lambda *names: None)
    with gpu_check.sampled_clocks(session) as clocks:
        pass
    assert clocks() is None


def test_report(dry):
    record, stdout, path = dry
    text = run("report", "gpu", "--record", path)
    assert text.startswith("| B | T |") and text in stdout
    assert "| 3 | 10 | 8 | 8 | packed | tf32 |" in text
    assert " Phases: build " in text
    assert report_gpu.text(record | {"benchmark": None}) == report_gpu.text(None) == report_gpu.NOT_YET


def test_the_grid():
    cases = gpu_shapes.CASES
    assert len({c.key for c in cases}) == len(cases)
    assert {c.dtype for c in cases} == set(gpu_shapes.DTYPES)
    assert [(c.group, c.shape) for c in cases[:4]] == [("flashrnn", "B16-T1024-H768")] * 4
    assert {c.steps for c in cases if c.group == "packed"} == {10, 100, 1000, 4000}
    assert all(c.steps == 1 for c in cases if c.graph)
    assert any(c.graph for c in cases)


def results_of(cases, kernel="auto", ratio=2.0, us=1.0, **also):
    """As bench_gpu.py has them."""
    sides = {
        "torch": {"backward": ratio, "us_per_step": us * ratio},
        "ours": {"backward": 1.0, "us_per_step": us},
    }
    return [
        {
            **dataclasses.asdict(case),
            "kernel": kernel,
            "kind": kind,
            "ratio": ratio,
            "agree": True,
            **sides,
            **also,
        }
        for case in cases
        for kind in ("inference", "training")
    ]


def test_targets():
    flash, outside, step = [gpu_shapes.FLASH], gpu_shapes.OUTSIDE, [gpu_shapes.PER_STEP]
    assert {*flash, *outside, *step} <= set(gpu_shapes.CASES)
    assert {dataclasses.replace(case, kernel="persistent") for case in (*flash, *outside, *step)} <= set(
        gpu_shapes.CASES
    )

    def verdicts(results, kernel="auto"):
        return list(report_gpu.verdicts(results, kernel).values())

    assert verdicts([]) == [None] * 5
    good = results_of(flash) + results_of(outside, ratio=3.5) + results_of(step, us=1.4)
    assert verdicts(good) == [True] * 5
    assert verdicts(good, "persistent") == [None] * 5
    slow = results_of(flash, ratio=1.05) + results_of(outside, ratio=2.0) + results_of(step, us=1.6)
    assert verdicts(slow) == [False, False, False, True, False]
    # One that is slower than cuDNN, whatever the mean; one that is missing, or wrong.
    worst = results_of(outside[1:], ratio=9.0) + results_of(outside[:1], ratio=0.9)
    assert verdicts(worst) == [None, None, True, False, None]
    assert verdicts(results_of(outside[1:], ratio=9.0)) == [None] * 5
    assert verdicts(results_of(flash, agree=False)) == [None] * 5
    said = "\n".join(report_gpu.targets(good + results_of(flash, "step", ratio=1.2)))
    assert (
        "| float16, B 16, T 1024, H 768, inference | ≥ 1.5 x cuDNN | 2.00: met | not measured | 1.20: not met |"
        in said
    )
    assert "auto meets 5 of 5 targets, misses 0; 0 not measured." in said


# ---- what goes wrong


@pytest.fixture
def session(tmp_path):
    """In a project of its own, whose tests and checks are what the test writes there."""
    (tmp_path / "project" / "tests" / "cuda").mkdir(parents=True)
    (tmp_path / "project" / "pyproject.toml").touch()
    options = argparse.Namespace(
        command="values", dry=True, output=tmp_path / "out.json", budget=100.0, commit=None
    )
    return Session(options, tmp_path / "project")


CHECKS = """
import json, os, sys, time
CHECKS = ["good", "bad", "dies", "hangs", "last"]
if "--list" in sys.argv:
    print(json.dumps(CHECKS))
else:
    for name in sys.argv[1:]:
        if name not in CHECKS:
            continue
        print(json.dumps({"check": name, "result": "started"}), flush=True)
        if name == "dies":
            os.abort()
        if name == "hangs":
            time.sleep(1000)
        print(json.dumps({"check": name, "result": "failed" if name == "bad" else "passed"}), flush=True)
"""


def test_a_check_that_dies_or_hangs_leaves_the_others(session):
    (session.root / "tests" / "cuda" / "cuda_checks.py").write_text(CHECKS)
    outcome = gpu_check.checks(session, 9.0)
    assert outcome.result == "failed"
    found = {c["check"]: (c["result"], c.get("reason")) for c in outcome.details["checks"]}
    assert found == {
        "good": ("passed", None),
        "bad": ("failed", None),
        "dies": ("failed", "ended by SIGABRT"),
        "hangs": ("failed", "the time was up"),
        "last": ("passed", None),
    }
    session.deadline = 0
    late = gpu_check.checks(session, 0.0)
    assert late.result == "incomplete" and late.reason == "5 incomplete"


def test_checks_that_cannot_be_imported(session):
    (session.root / "tests" / "cuda" / "cuda_checks.py").write_text("import nothing_of_this_name\n")
    outcome = gpu_check.checks(session, 20.0)
    assert outcome.result == "failed"
    assert "nothing_of_this_name" in outcome.details["output"]


SUITE = """
import os, time, pytest
pytestmark = pytest.mark.devices("cpu", "cuda")
def test_good(): pass
def test_bad(): assert 1 == 2, "one is not two"
def test_slow(): time.sleep(float(os.environ.get("SLEEP", 0)))
def test_skipped(): pytest.skip("so")
"""
CONFTEST = """
def pytest_addoption(parser): parser.addoption("--device")
def pytest_configure(config): config.addinivalue_line("markers", "devices(*names): ")
"""


@pytest.mark.full
def test_a_suite_with_a_failure_and_one_that_hangs(session):
    (session.root / "tests" / "conftest.py").write_text(CONFTEST)
    (session.root / "tests" / "test_some.py").write_text(SUITE)
    (session.root / "tests" / "test_not_for_devices.py").write_text("def test_bad(): assert False\n")
    session.dry = False
    outcome = gpu_check.suite(session, 60.0)
    assert outcome.result == "failed"
    assert outcome.reason == "4 tests, 1 failed, 1 skipped"
    assert [f["test"] for f in outcome.details["failed"]] == ["tests.test_some::test_bad"]
    assert "one is not two" in outcome.details["failed"][0]["message"]

    session.environment["SLEEP"] = "1000"
    start = time.monotonic()
    outcome = gpu_check.suite(session, 6.0)
    assert outcome.result == "failed"
    assert [f["end"] for f in outcome.details["files"]] == ["the time was up"]
    assert time.monotonic() - start < 30


def test_a_suite_of_which_nothing_runs_has_not_passed(session):
    (session.root / "tests" / "conftest.py").write_text(CONFTEST)
    text = "import pytest\n@pytest.mark.devices('cuda')\ndef test_one(): pytest.skip('so')\n"
    (session.root / "tests" / "test_some.py").write_text(text)
    session.dry = False
    assert gpu_check.suite(session, 60.0).result == "failed"


def test_a_phase_that_fails_leaves_the_others(session, monkeypatch):
    def broken(session, seconds):
        raise OSError("no space")

    monkeypatch.setitem(gpu_check.PHASES, "selftest", broken)
    phase = gpu_check.perform("selftest", session)
    assert (phase["result"], phase["reason"]) == ("failed", "OSError: no space")
    session.deadline = time.monotonic()
    assert gpu_check.perform("suite", session)["result"] == "failed"
    session.command = "speed"
    assert gpu_check.perform("benchmark", session)["result"] == "incomplete"
    session.gpu_works = False
    assert gpu_check.perform("benchmark", session)["reason"] in (
        "the time was up before it began",
        "the kernels do not run here",
    )


def test_verdict(tmp_path, monkeypatch):
    """Of the phases that say whether the layer is right; a benchmark that is cut short is none of them."""
    outcomes = {name: gpu_check.Outcome("passed") for name in gpu_check.PHASES}
    for name in gpu_check.PHASES:
        monkeypatch.setitem(gpu_check.PHASES, name, lambda session, seconds, name=name: outcomes[name])
    arguments = ["--dry", "--output", str(tmp_path / "out.json")]
    assert gpu_check.main(arguments) == 0
    outcomes["benchmark"] = gpu_check.Outcome("incomplete", "the time was up")
    outcomes["sanitizer"] = gpu_check.Outcome("not run", "compute-sanitizer was not found")
    assert gpu_check.main(["speed", *arguments]) == 0
    outcomes["checks"] = gpu_check.Outcome("failed", "one", {"failed": ["one"]})
    assert gpu_check.main(arguments) == 1
    record = json.loads((tmp_path / "out.json").read_text())
    assert (record["verdict"], record["failed"]) == ("failed", ["checks"])
    # Without a GPU, and not dry, nothing has been shown.
    outcomes["checks"] = gpu_check.Outcome("passed")
    assert gpu_check.main(arguments[1:]) == 1


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
