"""The benchmarks run, records are compared and put into pages; what the figures say is no matter of a test."""

from __future__ import annotations

import copy
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import lstm_ext

pytestmark = pytest.mark.tools

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
# The smallest of each group.
SMALLEST = (
    "B1-T1-H128", "small", "stream-H16", "cell-B1-H64", "rollout-B1-H64", "B32-T100-H64", "one-row", "process",
    "both-B1-T30-H100", "H64",
)  # fmt: skip
FIELDS = {"group", "case", "threads", "dtype", "training", "unit", "sides"}
FALLBACK = [f"fallback-{way}" for way in ("eager", "packed", "deep", "compiled", "whole")]


def started(script, *arguments, **variables):
    """The processes import the lstm_ext that this process imports."""
    paths = [str(Path(lstm_ext.__file__).resolve().parents[1]), os.environ.get("PYTHONPATH")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **variables}
    command = [sys.executable, str(BENCHMARKS / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)


def run(script, *arguments, **variables):
    done = started(script, *arguments, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def modules(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    names = ("groups", "harness", "peers", "records", "shapes", "report.pages")
    return SimpleNamespace(**{name.split(".")[-1]: importlib.import_module(name) for name in names})


# ---- the suite


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    """All groups but those that want another environment, and those of --pair."""
    path = tmp_path_factory.mktemp("suite") / "record.json"
    listed = run("bench.py", "--list", "--output", path)
    assert "frozen: " in listed and "stream-H16" in listed and "peers:" in listed and not path.exists()
    more = [name for name in re.findall(r"^\[(\S+)\]", listed, re.MULTILINE) if name not in FALLBACK]
    groups = [*re.findall(r"^(\S+): .* cases$", listed, re.MULTILINE), *more]
    stdout = run(
        "bench.py",
        *("--only", *groups, "--shapes", *SMALLEST, "--threads", 1, "--dtypes", "float32", "bfloat16"),
        *("--budget", 0.01, "--repeats", 1, "--output", path),
    )
    assert "| inference | 1 thread |" in stdout and "layer_norm costs" in stdout and str(path) in stdout
    return path, json.loads(path.read_text()), groups


def test_every_group(suite, modules):
    _, record, groups = suite
    assert {*groups, *FALLBACK} == set(modules.groups.GROUPS)
    assert {r["group"] for r in record["results"]} == set(groups)
    wanted = {"cpu", "cores", "torch", "lstm_ext", "lstm_ext_cpu_capability", "git_commit", "caches", "peers"}
    assert wanted | {"torchrl"} <= set(record["facts"]) and record["settings"]["threads"] == [1]
    assert len({modules.records.key(r) for r in record["results"]}) == len(record["results"])
    for result in record["results"]:
        assert set(result) >= FIELDS and result["threads"] == 1 and "refused" not in result
        for name, side in result["sides"].items():
            assert len(side["samples"]) >= (3 if "calls" in result else 1)
            assert 0 < side["first_quartile"] <= side["median"] <= side["third_quartile"], name
        for name, difference in result.get("differences", {}).items():
            rounded = (
                name in ("frozen-bfloat16", "frozen-int8", "torch-int8") or result["dtype"] == "bfloat16"
            )
            assert difference < (0.2 if rounded else 1e-3), (result["case"], name)
    assert all(b["gigabytes_per_second"] > 0 for b in record["machine"]["bandwidth"])


SIDES = {
    ("inference", "both-B1-T30-H100", False): {"torch", "ours", "frozen", "onnxruntime"},
    ("frozen", "small", False): {"frozen-int8", "torch-int8"},
    ("frozen-alone", "stream-H16", False): {"torch", "ours", "frozen", "frozen-int8"},
    ("training", "small", True): {"torch", "ours"},
    ("step", "cell-B1-H64", True): {"torch", "ours"},
    ("resets", "rollout-B1-H64", False): {"resets"},
    ("memory", "B32-T100-H64", True): {"torch", "ours", "recompute"},
    ("import", "process", False): {"torch alone"},
    ("callers", "small", True): {"one caller", "two callers"},
    ("overhead", "H64", False): {"kernel", "LSTMCell", "LSTM.step", "torch.nn.LSTMCell"},
    ("torchrl", "small", True): {"torch", "ours", "pad"},
    ("bursts", "one-row", True): {"ours", "torch beside 2_50_in_50ms"},
}


def test_what_a_group_has(suite):
    found = {(r["group"], r["case"], r["training"]): r for r in suite[1]["results"]}
    for key, sides in SIDES.items():
        assert sides <= set(found[key]["sides"]), key
    bound = found["step", "stream-H16", False]["bounds"]["frozen"]
    reading = 1.25 * bound["weight_bytes"] / bound["gigabytes_per_second"] / 1e3
    assert bound["bound_us"] == pytest.approx(8 + reading, rel=1e-3)
    assert found["ragged", "small", True]["time_of_a_row_over_padded"]["lengths"] > 0
    assert len(found["extras", "small", True]["cost"]) == 8
    assert "kept_beside_1_20_in_5ms" in found["bursts", "one-row", False]["slowdowns"]
    saved = found["saved", "small", True]["saved"]
    # Exactly: c_t of 5 numbers a unit, step and sequence.
    assert saved["recompute"] / saved["ours"] == pytest.approx(0.2, abs=0.01)


def test_without_kernels(tmp_path):
    path = tmp_path / "fallback.json"
    of_one = ("--shapes", "one-T50-H32", "--threads", 1, "--budget", 0.01, "--output", path)
    done = started("bench.py", "--only", "fallback-eager", *of_one)
    assert done.returncode == 1 and "expected the environment to have LSTM_EXT_BACKEND=torch" in done.stderr
    run("bench.py", "--only", *FALLBACK, *of_one, LSTM_EXT_BACKEND="torch")
    record = json.loads(path.read_text())
    assert [r["group"] for r in record["results"]] == [group for group in FALLBACK for _ in range(2)]


def test_a_pair(tmp_path):
    """`make bench-quick`."""
    path = tmp_path / "pair.json"
    names = ("B1-T1-H128", "stream-H128", "B10-T30-H10", "B32-T100-H64")
    stdout = run("bench.py", "--pair", "--shapes", *names, "--threads", 1, "--budget", 0.05, "--output", path)
    for result in json.loads(path.read_text())["results"]:
        step = {"step"} if result["group"] == "step" else set()
        assert set(result["sides"]) == {"torch", "ours"} | step
    assert "geometric mean (target)" in stdout and "with `step()`" in stdout


def test_usual_malloc(tmp_path):
    """Each case in a process whose malloc nobody has told anything."""
    path = tmp_path / "malloc.json"
    names = ("stream-H16", "small", "rollout-B1-H64", "cell-B1-H64")
    of_some = ("--shapes", *names, "--threads", 1, "--budget", 0.01, "--output", path)
    run("bench.py", "--usual-malloc", *of_some, MALLOC_ARENA_MAX="1")
    record = json.loads(path.read_text())
    assert record["settings"]["usual_malloc"] and not record["facts"]["freed_memory_kept"]
    assert record["facts"]["set_by_environment"] == {"MALLOC_ARENA_MAX": "1"}
    cases = {(r["group"], r["case"], r["training"]) for r in record["results"]}
    assert {group for group, *_ in cases} == {"training", "step", "ragged", "resets"}
    assert ("step", "cell-B1-H64", True) not in cases and len(cases) == len(record["results"])
    done = started("bench.py", "--usual-malloc", "--only", "memory")
    assert done.returncode == 2 and "--usual-malloc: expected groups among training" in done.stderr


@pytest.mark.parametrize("gates", [4, 3])
@pytest.mark.parametrize("state", [False, True])
def test_peers_compute_the_layer(modules, state, gates):
    harness, peers, Shape = modules.harness, modules.peers, modules.shapes.Shape
    shape = Shape(2, 1, 4, 5) if state else Shape(2, 3, 4, 5, layers=2, directions=2)
    shape = shape._replace(gates=gates)
    theirs, _ = harness.make_layers(shape)
    expected = harness.step_call(theirs, shape, "call") if state else harness.inference_call(theirs, shape)
    calls, refused = peers.calls(theirs, shape, 1, peers.FLOAT_PEERS, state)
    assert "onnxruntime" in calls and not refused
    for call in calls.values():
        assert harness.largest_difference(expected, call) < 1e-5


# ---- what reads records


def test_compare(suite, tmp_path):
    path, record, _ = suite
    changed = copy.deepcopy(record)
    for result in changed["results"]:
        if "ours" in result["sides"]:
            result["sides"]["ours"]["median"] /= 2
    dropped = changed["results"].pop(0)
    after = tmp_path / "after.json"
    after.write_text(json.dumps(changed))
    stdout = run("compare.py", path, after)
    assert f"only in {path}, 1 cases:\n  inference {dropped['case']} float32 1 thr inference" in stdout
    means = stdout[stdout.index("(geometric means)") :].splitlines()
    # group, side, cases, before / after, against torch
    assert [line.split()[1:4:2] for line in means if line.startswith("training")] == [
        ["torch", "1.00"],
        ["ours", "2.00"],
    ]
    after.write_text("{")
    done = started("compare.py", path, after)
    assert done.returncode == 1 and "expected a file that benchmarks/bench.py wrote, got" in done.stderr


def test_a_block_is_renewed(modules, tmp_path):
    pages = modules.pages
    block = next(block for block in pages.BLOCKS if block.name == "cost")
    page = tmp_path / block.page
    page.parent.mkdir(parents=True)
    page.write_text("before\n<!-- cost:begin -->\nold figures\n<!-- cost:end -->\nafter\n")
    assert pages.renew(block, tmp_path, check=True) and "old figures" in page.read_text()
    assert pages.renew(block, tmp_path) and not pages.renew(block, tmp_path)
    assert page.read_text().startswith("before\n<!-- cost:begin -->\n| a training step costs |")
    assert page.read_text().endswith("\n<!-- cost:end -->\nafter\n")


def test_pages_show_the_committed_figures(modules):
    """All of them, and no page has a block that nothing renews."""
    run("report", "--check")
    root = BENCHMARKS.parent
    marked = {
        (str(page.relative_to(root)), name)
        for page in [root / "README.md", *(root / "docs").rglob("*.md")]
        for name in re.findall(r"<!-- (\S+):begin -->", page.read_text())
    }
    assert marked == {(block.page, block.name) for block in modules.pages.BLOCKS}


def test_pictures(tmp_path):
    """That of the README shows the committed figures, and those of the CUDA kernels can be drawn."""
    image = pytest.importorskip("PIL.Image")
    run("report", "faster", "--pictures", tmp_path)
    drawn, committed = (image.open(folder / "gains.png") for folder in (tmp_path, BENCHMARKS.parent / "docs"))
    assert drawn.size == committed.size
    assert drawn.text["Description"] == committed.text["Description"]
    run("../docs/draw_cuda.py", tmp_path)
    assert {path.stem for path in tmp_path.glob("*.png")} == {"gains", "cuda_blocks", "cuda_mailbox"}
