"""The benchmarks run and their reports come out; what the figures say is no matter of a test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import lstm_ext

pytestmark = pytest.mark.tools


BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def environment():
    """For child processes: they import the lstm_ext that this process imports."""
    paths = [str(Path(lstm_ext.__file__).resolve().parents[1]), os.environ.get("PYTHONPATH")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def run(script, *arguments):
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment(),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "tiny.json"
    stdout = run(
        "bench_quick.py",
        *("--shapes", "B1-T1-H128", "B10-T30-H10", "B32-T100-H64", "--threads", 1),
        *("--budget", 0.5, "--memory-repeats", 1, "--output", path),
    )
    return path, stdout


def test_figures(results):
    path, stdout = results
    record = json.loads(path.read_text())
    facts = record["facts"]
    for name in (
        "cpu",
        "cores",
        "torch",
        "lstm_ext",
        "lstm_ext_backend",
        "lstm_ext_cpu_capability",
        "git_commit",
    ):
        assert name in facts
    assert [line["group"] for line in record["summary"]] == ["inference", "training", "step", "memory"]
    # T = 1 does not count in the group "inference", nor step() in the group "step"
    assert [line["cases"] for line in record["summary"]] == [2, 3, 1, 1]
    assert len(record["results"]) == 3 + 3 + 2 + 1
    for result in record["results"]:
        assert result["threads"] == 1
        if result["group"] == "memory":
            assert result["torch_bytes"] > 0
            continue
        assert result["repeats"] >= 5
        assert result["largest_difference"] < 1e-3
        for side in ("torch", "ours"):
            assert (
                0 < result[side]["first_quartile"] <= result[side]["median"] <= result[side]["third_quartile"]
            )
        assert result["ratio"] == pytest.approx(result["torch"]["median"] / result["ours"]["median"])
    assert "geometric mean (target)" in stdout


def test_report(results, tmp_path):
    path, _ = results
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- bench:begin -->\nold figures\n<!-- bench:end -->\nafter\n")
    picture = tmp_path / "docs" / "bench.png"
    run("report.py", path, "--document", page, "--picture", picture)
    text = page.read_text()
    assert text.startswith("before\n<!-- bench:begin -->\n| B | T | I | H | inference, 1 thread |")
    assert text.endswith("\n<!-- bench:end -->\nafter\n")
    assert "old figures" not in text
    assert "| 10 | 30 | 20 | 10 |" in text
    assert picture.read_bytes().startswith(b"\x89PNG")
    run("report.py", path, "--document", page)
    assert page.read_text() == text


def test_report_wants_markers(results, tmp_path):
    path, _ = results
    page = tmp_path / "page.md"
    page.write_text("no markers\n")
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "report.py"), str(path), "--document", str(page)],
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "bench:begin" in done.stderr
    assert page.read_text() == "no markers\n"


def test_options(tmp_path):
    output = tmp_path / "options.json"
    stdout = run(
        "bench_options.py",
        *("--only", "time", "step", "--shapes", "small", "--threads", 1),
        *("--budget", 0.02, "--output", output),
    )
    results = json.loads(output.read_text())["results"]
    costs = {r["option"]: r["cost"] for r in results if r["group"] == "time" and r["training"]}
    assert len(costs) == 8 and all(cost > 0 for cost in costs.values())
    calls = [r["call"] for r in results if r["group"] == "step"]
    assert calls == ["LSTMCell", "LSTM.step", "torch.nn.LSTMCell"] * 3
    assert "layer_norm: a training step costs" in stdout


@pytest.mark.parametrize(
    ("group", "shape", "figures"),
    [
        ("packed", "small", {"cost", "over_torch"}),
        ("vmap", "small", {"cost"}),
        ("callers", "small", {"cost"}),
        ("16-bit", "small", {"bfloat16_over_torch", "float16_over_float32"}),
        ("cell", "cell-B1-H64", {"over_torch"}),
        ("frozen", "stream-H16", {"as_they_are_over_torch", "int8_over_ours"}),
        ("rollout", "rollout-B1-H64", {"over_torch"}),
        ("busy", "stream-H512", {"torch_beside_1", "ours_beside_2", "over_torch_beside_2"}),
    ],
)
def test_contract(group, shape, figures, tmp_path):
    output = tmp_path / "contract.json"
    run(
        "bench_contract.py",
        *("--only", group, "--shapes", shape, "--threads", 1, "--budget", 0.02, "--output", output),
    )
    results = json.loads(output.read_text())["results"]
    assert [r["training"] for r in results] == ([False] if group == "frozen" else [False, True])
    assert all(result[figure] > 0 for result in results for figure in figures)
    if group == "rollout":
        assert "resets_over_torch" in results[1]


def test_pictures_of_the_planner(tmp_path):
    run("report_gpu_plan.py", "--folder", tmp_path)
    for name in ("cuda_blocks", "cuda_timeline", "cuda_choice"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.full
def test_memory_of_recompute(tmp_path):
    output = tmp_path / "options.json"
    run("bench_options.py", "--only", "memory", "--shapes", "speech", "--threads", 1, "--output", output)
    recompute, _ = json.loads(output.read_text())["results"]
    # Exactly: c_t of 5 numbers a unit, step and sequence.
    assert recompute["saved"] == pytest.approx(0.2, abs=0.01)
    assert recompute["peak"] < 0.7


@pytest.mark.parametrize(
    ("page", "commands"),
    [
        ("README.md", [("report_readme.py",)]),
        (
            "docs/performance.md",
            [
                ("report.py", "cpu_epyc_zen5_2_cores.json"),
                ("report.py", "cpu_epyc_zen3_2_cores.json", "--block", "bench-avx2"),
                ("report.py", "cpu_xeon_amx_2_cores.json", "--block", "bench-amx"),
                ("report_bench.py", "suite_epyc_zen5_2_cores.json"),
                ("report_bench.py", "suite_epyc_zen5_avx2_2_cores.json", "--block", "bench-suite-avx2"),
                ("report_bench.py", "suite_epyc_zen4_2_cores.json", "--block", "bench-suite-zen4"),
                ("report_bench.py", "suite_xeon_amx_2_cores.json", "--block", "bench-suite-amx"),
                ("report_bench.py", "suite_xeon_avx512_2_cores.json", "--block", "bench-suite-xeon"),
                ("report_contract.py", "contract_epyc_zen5_2_cores.json"),
                ("report_contract.py", "contract_xeon_amx_2_cores.json", "--block=-amx"),
            ],
        ),
        ("docs/options.md", [("report_options.py", "options_cpu.json", "torchrl_cpu.json")]),
    ],
)
def test_pages_show_the_committed_figures(page, commands, tmp_path):
    committed = (BENCHMARKS.parent / page).read_text()
    copy = tmp_path / "page.md"
    copy.write_text(committed)
    for script, *arguments in commands:
        named = [BENCHMARKS / "results" / a if a.endswith(".json") else a for a in arguments]
        run(script, *named, "--document", copy)
    assert copy.read_text() == committed
    assert "torch.nn.LSTM" in committed


def test_the_picture_shows_the_committed_figures(tmp_path):
    image = pytest.importorskip("PIL.Image")
    run("report_readme.py", "--picture", tmp_path / "gains.png")
    drawn, committed = (image.open(folder / "gains.png") for folder in (tmp_path, BENCHMARKS.parent / "docs"))
    assert drawn.size == committed.size
    assert "ragged batches" in drawn.text["Description"]
    assert drawn.text["Description"] == committed.text["Description"]
