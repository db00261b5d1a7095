"""The benchmarks run and their reports come out; what the figures say is no matter of a test."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import lstm_ext

pytestmark = pytest.mark.tools


BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


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


@pytest.fixture
def bench_quick(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("bench_quick")


def test_figures(results, bench_quick):
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
    # T = 1 does not count in the group "inference", nor step() in the group "step"
    counted = [r for r in record["results"] if bench_quick.counted(r)]
    assert Counter(r["group"] for r in counted) == {"inference": 2, "training": 3, "step": 1, "memory": 1}
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
    assert "| B | T | I | H | inference, 1 thread |" in stdout and "| 10 | 30 | 20 | 10 |" in stdout
    assert "geometric mean (target)" in stdout


def test_a_case_that_another_program_disturbed_counts_for_no_mean(bench_quick):
    """The warning about it stands where the means do."""
    case = {"group": "training", "shape": "B1", "threads": 2, "method": "call", "largest_difference": 0.0}
    results = [
        {**case, "ratio": 1.5, "halves": (1.5, 1.6)},
        {**case, "ratio": 90.0, "halves": (1.4, 180.0)},
        {**case, "group": "memory", "ratio": 0.5},
    ]
    assert [(s["group"], s["cases"], s["worst"]) for s in bench_quick.summarise(results)] == [
        ("training", 1, 1.5),
        ("memory", 1, 0.5),
    ]
    facts = {"load_at_start": 2.0, "lstm_ext_cpu_capability": "avx2"}
    said = bench_quick.warnings_of(facts, results)
    assert said[0].startswith("warning: other programs are running")
    assert said[1:] == [
        "warning: left out of the means, since the ratio changed between the halves of the time:",
        "  training   B1             2 thr  1.40×, then 180.00×",
    ]
    assert bench_quick.warnings_of({**facts, "load_at_start": 0.1}, results[:1]) == []


def test_the_halves_of_a_comparison(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    harness = importlib.import_module("harness")
    samples = {"torch": [1.0, 1.0, 8.0, 8.0], "ours": [1.0, 1.0, 1.0, 2.0]}
    monkeypatch.setattr(harness, "interleave", lambda *_: harness.Interleaved(samples, 1))
    assert harness.compare(print, print, 1.0).halves == (1.0, 8.0 / 1.5)


def test_report_of_another_record():
    text = run("report", "uses", "--record", BENCHMARKS / "results" / "cpu_epyc_zen3_2_cores.json")
    assert text.startswith("|  | cases | AVX2, EPYC Zen 3 |")


@pytest.fixture
def pages(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("report.pages")


def test_a_block_is_renewed(pages, tmp_path):
    block = next(block for block in pages.BLOCKS if block.name == "cost")
    page = tmp_path / block.page
    page.parent.mkdir(parents=True)
    page.write_text("before\n<!-- cost:begin -->\nold figures\n<!-- cost:end -->\nafter\n")
    assert pages.renew(block, tmp_path, check=True) and "old figures" in page.read_text()
    assert pages.renew(block, tmp_path)
    assert page.read_text().startswith("before\n<!-- cost:begin -->\n| a training step costs |")
    assert page.read_text().endswith("\n<!-- cost:end -->\nafter\n")
    assert "old figures" not in page.read_text()
    assert not pages.renew(block, tmp_path)


def test_a_block_wants_markers(pages, tmp_path):
    page = tmp_path / "README.md"
    page.write_text("no markers\n")
    with pytest.raises(SystemExit, match="<!-- faster:begin -->"):
        pages.renew(pages.BLOCKS[0], tmp_path)
    assert page.read_text() == "no markers\n"


def test_bad_names(pages, capsys):
    for given, named in ((["no"], "expected names among faster, "), (["--record", "a.json"], "got 0")):
        with pytest.raises(SystemExit):
            pages.main(given)
        assert named in capsys.readouterr().err


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


def test_pictures_of_the_cuda_kernels(tmp_path):
    run("../docs/draw_cuda.py", tmp_path)
    for name in ("cuda_blocks", "cuda_mailbox"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.full
def test_memory_of_recompute(tmp_path):
    output = tmp_path / "options.json"
    run("bench_options.py", "--only", "memory", "--shapes", "speech", "--threads", 1, "--output", output)
    recompute, _ = json.loads(output.read_text())["results"]
    # Exactly: c_t of 5 numbers a unit, step and sequence.
    assert recompute["saved"] == pytest.approx(0.2, abs=0.01)
    assert recompute["peak"] < 0.7


def test_pages_show_the_committed_figures(pages):
    """All of them, and no page has a block that nothing renews."""
    run("report", "--check")
    root = BENCHMARKS.parent
    marked = {
        (str(page.relative_to(root)), name)
        for page in [root / "README.md", *(root / "docs").rglob("*.md")]
        for name in re.findall(r"<!-- (\S+):begin -->", page.read_text())
    }
    assert marked == {(block.page, block.name) for block in pages.BLOCKS}


def test_the_picture_shows_the_committed_figures(tmp_path):
    image = pytest.importorskip("PIL.Image")
    run("report", "faster", "--pictures", tmp_path)
    drawn, committed = (image.open(folder / "gains.png") for folder in (tmp_path, BENCHMARKS.parent / "docs"))
    assert drawn.size == committed.size
    assert "ragged batches" in drawn.text["Description"]
    assert drawn.text["Description"] == committed.text["Description"]
