"""gpu_check.py without a GPU: a trial of the whole, and what it says when something crashes, hangs or fails."""

from __future__ import annotations

import json
import sys
import tarfile
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "cuda"))

import cuda_diagnosis  # noqa: E402
import gpu_check  # noqa: E402
import gpu_shapes  # noqa: E402
from test_benchmarks import run  # noqa: E402

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
    assert phases["suite"]["files"][0]["counts"]["passed"] > 0
    results = record["benchmark"]["results"]
    assert len(results) == 2 * len(gpu_shapes.TINY) - 2  # there is no graph on a CPU
    assert all(r["agree"] and {"torch", "ours"} <= set(r["sides"]) for r in results)
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
