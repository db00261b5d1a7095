"""The benchmarks run, records are compared and put into pages; what the figures say is no matter of a test."""

from __future__ import annotations

import copy
import importlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
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
    names = ("groups", "harness", "neighbours", "peers", "records", "shapes", "report.pages", "report.tables")
    return SimpleNamespace(**{name.split(".")[-1]: importlib.import_module(name) for name in names})


def one(record, group, case, training=False, dtype="float32"):
    key = group, case, training, dtype
    found = [r for r in record["results"] if (r["group"], r["case"], r["training"], r["dtype"]) == key]
    assert len(found) == 1, key
    return found[0]


# ---- the suite


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    path = tmp_path_factory.mktemp("suite") / "record.json"
    listed = run("bench.py", "--list", "--output", path)
    assert "frozen: " in listed and "stream-H16" in listed and "peers:" in listed and not path.exists()
    more = [name for name in re.findall(r"^\[(\S+)\]", listed, re.MULTILINE) if "fallback" not in name]
    groups = [*re.findall(r"^(\S+): .* cases$", listed, re.MULTILINE), *more]
    stdout = run(
        "bench.py",
        *("--only", *groups, "--shapes", *SMALLEST, "--threads", 1, "--dtypes", "float32", "bfloat16"),
        *("--budget", 0.01, "--repeats", 1, "--output", path),
    )
    for part in (
        "| inference | 1 thread |",
        "| dtypes, training step, bfloat16 | 1 thread |",
        "| 16 | 1 thread |",
    ):
        assert part in stdout
    assert "Geometric mean" in stdout and str(path) in stdout and "layer_norm costs" in stdout
    return path, json.loads(path.read_text()), groups


def test_every_group_once(suite, modules):
    _, record, groups = suite
    assert {*groups} | {f"fallback-{way}" for way in ("eager", "packed", "deep", "compiled", "whole")} == set(
        modules.groups.GROUPS
    )
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
    assert {p["dtype"] for p in record["machine"]["peak"]} == {"float32", "bfloat16"}
    assert all(b["gigabytes_per_second"] > 0 for b in record["machine"]["bandwidth"])


@pytest.mark.parametrize(
    ("group", "case", "training", "sides"),
    [
        ("inference", "both-B1-T30-H100", False, {"torch", "ours", "frozen", "onnxruntime"}),
        ("frozen", "small", False, {"frozen-int8", "torch-int8"}),
        ("frozen-alone", "stream-H16", False, {"torch", "ours", "frozen", "frozen-int8"}),
        ("training", "small", True, {"torch", "ours"}),
        ("step", "cell-B1-H64", True, {"torch", "ours"}),
        ("resets", "rollout-B1-H64", False, {"resets"}),
        ("memory", "B32-T100-H64", True, {"torch", "ours", "recompute"}),
        ("import", "process", False, {"torch alone"}),
        ("callers", "small", True, {"one caller", "two callers"}),
        ("overhead", "H64", False, {"kernel", "LSTMCell", "LSTM.step", "torch.nn.LSTMCell"}),
        ("torchrl", "small", True, {"torch", "ours", "pad"}),
        ("bursts", "one-row", True, {"ours", "torch beside 2_50_in_50ms"}),
    ],
)
def test_the_sides_of_a_group(suite, group, case, training, sides):
    assert sides <= set(one(suite[1], group, case, training)["sides"])


def test_what_a_group_has(suite):
    record = suite[1]
    bound = one(record, "step", "stream-H16")["bounds"]["frozen"]
    assert bound["weight_bytes"] == 4 * 4 * 16 * 32
    reading = 1.25 * bound["weight_bytes"] / bound["gigabytes_per_second"] / 1e3
    assert bound["bound_us"] == pytest.approx(8 + reading, rel=1e-3)
    assert one(record, "ragged", "small", True)["time_of_a_row_over_padded"]["lengths"] > 0
    assert len(one(record, "extras", "small", True)["cost"]) == 8
    assert set(one(record, "vmap", "small")["cost"]) == {"vmap"}
    assert {"torch", "ours", "float32"} == set(one(record, "dtypes", "small", True, "bfloat16")["sides"])
    assert one(record, "cell-dtypes", "cell-B1-H64", True, "bfloat16")["sides"]["ours"]["median"] > 0
    assert "ours_beside_2" in one(record, "busy", "one-row")["slowdowns"]
    assert "kept_beside_1_20_in_5ms" in one(record, "bursts", "one-row")["slowdowns"]
    assert one(record, "first-call", "B1-T1-H128")["make"]["ours"]["median"] > 0
    assert one(record, "torchrl", "small")["episodes"] > 0
    saved = one(record, "saved", "small", True)["saved"]
    # Exactly: c_t of 5 numbers a unit, step and sequence.
    assert saved["recompute"] / saved["ours"] == pytest.approx(0.2, abs=0.01)


def test_without_kernels(tmp_path):
    path = tmp_path / "fallback.json"
    of_one = ("--shapes", "one-T50-H32", "--threads", 1, "--budget", 0.01, "--output", path)
    done = started("bench.py", "--only", "fallback-eager", *of_one)
    assert done.returncode == 1 and "expected the environment to have LSTM_EXT_BACKEND=torch" in done.stderr
    groups = [f"fallback-{way}" for way in ("eager", "packed", "deep", "compiled", "whole")]
    run("bench.py", "--only", *groups, *of_one, LSTM_EXT_BACKEND="torch")
    record = json.loads(path.read_text())
    assert [(r["group"], r["training"]) for r in record["results"]] == [
        (group, training) for group in groups for training in (False, True)
    ]
    assert record["facts"]["set_by_environment"]["LSTM_EXT_BACKEND"] == "torch"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--threads", "0"), "--threads: expected a whole number above 0, got '0'"),
        (("--budget", "no"), "--budget: expected a number above 0, got 'no'"),
        (("--shapes", "B0"), "--shapes: expected a name that --list shows, got 'B0'"),
        (("--only", "memory", "--shapes", "small"), "expected at least one case that all of them name, got none"),
        (("--pair", "--only", "frozen"), "--pair: expected groups among inference, training, step, memory"),
    ],
)  # fmt: skip
def test_bad_arguments(arguments, named):
    done = started("bench.py", *arguments)
    assert done.returncode == 2
    assert named in done.stderr.splitlines()[-1]


def test_a_missing_peer_is_one_line(tmp_path):
    (tmp_path / "openvino.py").write_text("raise ModuleNotFoundError(\"No module named 'openvino'\")")
    paths = [str(tmp_path), str(Path(lstm_ext.__file__).resolve().parents[1])]
    lines = run("peers.py", PYTHONPATH=os.pathsep.join(paths)).splitlines()
    assert [line for line in lines if "openvino" in line] == [
        "openvino: not measured: openvino is not installed; pip install openvino"
    ]
    assert len(lines) == 3


@pytest.mark.parametrize("state", [False, True])
def test_peers_compute_the_layer(modules, state):
    harness, peers, Shape = modules.harness, modules.peers, modules.shapes.Shape
    shape = Shape(2, 1, 4, 5) if state else Shape(2, 3, 4, 5, layers=2, directions=2)
    theirs, _ = harness.make_layers(shape)
    expected = harness.step_call(theirs, shape, "call") if state else harness.inference_call(theirs, shape)
    calls, refused = peers.calls(theirs, shape, 1, peers.FLOAT_PEERS, state)
    assert "onnxruntime" in calls and not refused
    for call in calls.values():
        assert harness.largest_difference(expected, call) < 1e-5


def test_a_peer_that_fails_leaves_the_others(modules, monkeypatch):
    peers = modules.peers

    def broken(*_):
        raise RuntimeError("no such layer\nand much more")

    monkeypatch.setitem(
        peers.PEERS, "openvino", peers.Peer("openvino", ("torch",), "a peer that cannot", broken)
    )
    theirs, _ = modules.harness.make_layers(shape := modules.shapes.Shape(2, 3, 4, 5))
    calls, refused = peers.calls(theirs, shape, 1)
    assert list(calls) == ["onnxruntime"]
    assert refused == {"openvino": "RuntimeError: no such layer"}


def test_turns(modules):
    seen = []
    sides = {name: lambda name=name: seen.append(name) for name in "abc"}
    found = modules.harness.interleave(sides, 1e-9, least=6, most=6)
    assert {name: len(samples) for name, samples in found.seconds.items()} == {"a": 6, "b": 6, "c": 6}
    turns = ["".join(modules.harness.order_of(list("abc"), turn)) for turn in range(7)]
    assert turns == ["abc", "bca", "cab", "acb", "bac", "cba", "abc"]
    # As many calls in a sample for each side.
    assert seen.count("a") == seen.count("b") == seen.count("c")


# ---- make bench-quick


def test_a_pair(tmp_path):
    path = tmp_path / "pair.json"
    stdout = run(
        "bench.py",
        *("--pair", "--shapes", "B1-T1-H128", "stream-H128", "B10-T30-H10", "B32-T100-H64", "--threads", 1),
        *("--budget", 0.05, "--repeats", 1, "--output", path),
    )
    record = json.loads(path.read_text())
    counts = Counter(r["group"] for r in record["results"])
    assert counts == {"inference": 3, "training": 3, "step": 1, "memory": 1}
    for result in record["results"]:
        step = {"step"} if result["group"] == "step" else set()
        assert set(result["sides"]) == {"torch", "ours"} | step
        assert all(difference < 1e-3 for difference in result.get("differences", {}).values())
    assert "geometric mean (target)" in stdout and "with `step()`" in stdout
    assert "| B | T | I | H | inference, 1 thread |" in stdout and "| 10 | 30 | 20 | 10 |" in stdout


def test_the_pair_takes_four_minutes(modules, monkeypatch):
    options = importlib.import_module("bench").parse_options(["--pair"])
    timed = [case for case in options.cases if case.group != "memory"]
    assert len(timed) == 38 and options.budget * len(timed) == pytest.approx(240)


def test_a_case_that_another_program_disturbed_counts_for_no_mean(modules):
    """The warning about it stands where the means do."""

    def result(theirs, group="training"):
        samples = {"torch": theirs, "ours": [1.0, 1.0, 1.0, 1.0]}
        sides = {name: {"median": sorted(s)[2], "samples": s} for name, s in samples.items()}
        case = {"case": "B1", "threads": 2, "dtype": "float32", "training": True, "steps": 2}
        return {"group": group, **case, "sides": sides}

    steady, disturbed = result([1.5, 1.5, 1.6, 1.6]), result([1.4, 1.4, 180.0, 180.0])
    record = {"settings": {"pair": True}, "results": [steady, disturbed, result([2.0] * 4, "memory")]}
    assert [row[:2] for row in modules.tables.summary(record)] == [
        ["training step", "1"],
        ["peak memory", "1"],
    ]
    assert modules.tables.unsteady(record) == [
        "warning: left out of the means, since the ratio changed between the halves of the time:",
        "  training B1 float32 2 thr training: 1.40×, then 180.00×",
    ]
    assert modules.tables.unsteady({**record, "results": [steady]}) == []


# ---- what reads records


def test_compare(suite, tmp_path):
    path, record, _ = suite
    changed = copy.deepcopy(record)
    for result in changed["results"]:
        for name in ("median", "first_quartile", "third_quartile"):
            if "ours" in result["sides"]:
                result["sides"]["ours"][name] /= 2
    dropped = changed["results"].pop(0)
    changed["facts"]["git_commit"] = "another"
    after = tmp_path / "after.json"
    after.write_text(json.dumps(changed))
    stdout = run("compare.py", path, after)
    assert "git_commit: " in stdout and "-> another" in stdout
    assert f"only in {path}, 1 cases:\n  inference {dropped['case']} float32 1 thr inference" in stdout
    means = stdout[stdout.index("(geometric means)") :].splitlines()
    training = [line.split() for line in means if line.startswith("training")]
    # group, side, cases, before / after, against torch
    assert [line[1] for line in training] == ["torch", "ours"]
    assert [float(line[3]) for line in training] == [1.0, 2.0]
    assert float(training[1][4]) == 2.0


def test_compare_wants_files_of_the_suite(suite, tmp_path):
    text = tmp_path / "text.json"
    text.write_text("{")
    for bad in (tmp_path / "none.json", BENCHMARKS / "results" / "support_cpu.json", text):
        done = started("compare.py", suite[0], bad)
        assert done.returncode == 1
        assert done.stderr.startswith(f"{bad}: expected a file that benchmarks/bench.py wrote, got")
        assert len(done.stderr.splitlines()) == 1


def test_report_of_another_record():
    text = run("report", "uses", "--record", BENCHMARKS / "results" / "cpu_epyc_zen3_2_cores.json")
    assert text.startswith("|  | cases | AVX2, EPYC Zen 3 |")


def test_a_block_is_renewed(modules, tmp_path):
    pages = modules.pages
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
    page = tmp_path / "README.md"
    page.write_text("no markers\n")
    with pytest.raises(SystemExit, match="<!-- faster:begin -->"):
        pages.renew(pages.BLOCKS[0], tmp_path)
    assert page.read_text() == "no markers\n"


def test_bad_names(modules, capsys):
    for given, named in ((["no"], "expected names among faster, "), (["--record", "a.json"], "got 0")):
        with pytest.raises(SystemExit):
            modules.pages.main(given)
        assert named in capsys.readouterr().err


def test_pictures_of_the_cuda_kernels(tmp_path):
    run("../docs/draw_cuda.py", tmp_path)
    for name in ("cuda_blocks", "cuda_mailbox"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


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


def test_the_picture_shows_the_committed_figures(tmp_path):
    image = pytest.importorskip("PIL.Image")
    run("report", "faster", "--pictures", tmp_path)
    drawn, committed = (image.open(folder / "gains.png") for folder in (tmp_path, BENCHMARKS.parent / "docs"))
    assert drawn.size == committed.size
    assert "ragged batches" in drawn.text["Description"]
    assert drawn.text["Description"] == committed.text["Description"]
