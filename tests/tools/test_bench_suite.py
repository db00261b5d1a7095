"""The suite of benchmarks runs and its files are compared; what the figures say is no matter of a test."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
from test_benchmarks import BENCHMARKS, environment, run

pytestmark = pytest.mark.tools

# The smallest of each group.
SMALLEST = (
    "B1-T1-H128", "small", "stream-H16", "cell-B1-H64", "rollout-B1-H64", "B32-T100-H64", "one-row", "process",
    "both-B1-T30-H100",
)  # fmt: skip
GROUPS = {
    "inference", "frozen", "training", "step", "ragged", "resets", "extras", "dtypes", "memory", "busy", "first-call",
    "import", "library",
}  # fmt: skip


def failing(script, *arguments, **variables):
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**environment(), **variables},
    )


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    path = tmp_path_factory.mktemp("suite") / "record.json"
    stdout = run(
        "bench.py",
        *("--shapes", *SMALLEST, "--threads", 1, "--dtypes", "float32", "bfloat16"),
        *("--budget", 0.01, "--repeats", 1, "--output", path),
    )
    return path, stdout


@pytest.fixture
def modules(monkeypatch):
    """For `import harness` and the like."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_every_group_once(suite):
    path, stdout = suite
    record = json.loads(path.read_text())
    assert {r["group"] for r in record["results"]} == GROUPS
    for name in (
        "cpu",
        "cores",
        "torch",
        "lstm_ext",
        "lstm_ext_cpu_capability",
        "git_commit",
        "caches",
        "peers",
    ):
        assert name in record["facts"]
    assert record["settings"]["threads"] == [1]
    for result in record["results"]:
        assert result["threads"] == 1
        for name, side in result["sides"].items():
            assert len(side["samples"]) >= (1 if result["unit"] == "bytes" or "calls" not in result else 3)
            assert 0 < side["first_quartile"] <= side["median"] <= side["third_quartile"], name
        for name, difference in result.get("differences", {}).items():
            rounded = (
                name in ("frozen-bfloat16", "frozen-int8", "torch-int8") or result["dtype"] == "bfloat16"
            )
            assert difference < (0.2 if rounded else 1e-3), (result["case"], name)
        assert "refused" not in result
    assert "| inference | 1 thread |" in stdout and "| dtypes, training step, bfloat16 | 1 thread |" in stdout
    assert "| 16 | 1 thread |" in stdout and "Geometric mean" in stdout and str(path) in stdout


def test_what_a_group_has(suite):
    record = json.loads(suite[0].read_text())

    def one(group, case, training=False):
        found = [
            r for r in record["results"] if (r["group"], r["case"], r["training"]) == (group, case, training)
        ]
        assert len(found) == 1
        return found[0]

    assert {"torch", "ours", "frozen", "onnxruntime"} <= set(one("inference", "both-B1-T30-H100")["sides"])
    assert {"frozen-int8", "torch-int8"} <= set(one("frozen", "small")["sides"])
    assert set(one("training", "small", True)["sides"]) == {"torch", "ours"}
    bound = one("step", "stream-H16")["bounds"]["frozen"]
    assert bound["weight_bytes"] == 4 * 4 * 16 * 32
    reading = 1.25 * bound["weight_bytes"] / bound["gigabytes_per_second"] / 1e3
    assert bound["bound_us"] == pytest.approx(8 + reading, rel=1e-3)
    assert set(one("step", "cell-B1-H64", True)["sides"]) == {"torch", "ours"}
    assert one("ragged", "small", True)["time_of_a_row_over_padded"]["lengths"] > 0
    assert "resets" in one("resets", "rollout-B1-H64")["sides"]
    assert "recompute" in one("extras", "small", True)["cost"]
    assert {"torch", "ours", "float32"} == set(one("dtypes", "small", True)["sides"])
    assert {"torch", "ours", "recompute"} == set(one("memory", "B32-T100-H64", True)["sides"])
    assert "ours_beside_2" in one("busy", "one-row")["slowdowns"]
    assert one("first-call", "B1-T1-H128")["make"]["ours"]["median"] > 0
    assert "torch alone" in one("import", "process")["sides"]
    assert {p["dtype"] for p in record["machine"]["peak"]} == {"float32", "bfloat16"}
    assert all(b["gigabytes_per_second"] > 0 for b in record["machine"]["bandwidth"])


def test_list_measures_nothing(tmp_path):
    output = tmp_path / "no.json"
    stdout = run("bench.py", "--list", "--quick", "--only", "frozen", "step", "--output", output)
    assert "frozen: " in stdout and "stream-H16" in stdout and "peers:" in stdout
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--threads", "0"), "--threads: expected a whole number above 0, got '0'"),
        (("--budget", "no"), "--budget: expected a number above 0, got 'no'"),
        (("--shapes", "B0"), "--shapes: expected a name that --list shows, got 'B0'"),
        (
            ("--only", "memory", "--shapes", "small"),
            "expected at least one case that all of them name, got none",
        ),
    ],
)
def test_bad_arguments(arguments, named):
    done = failing("bench.py", *arguments)
    assert done.returncode == 2
    assert named in done.stderr.splitlines()[-1]


def test_a_missing_peer_is_one_line(tmp_path):
    (tmp_path / "openvino.py").write_text("raise ModuleNotFoundError(\"No module named 'openvino'\")")
    done = failing("peers.py", PYTHONPATH=f"{tmp_path}:{environment()['PYTHONPATH']}")
    lines = [line for line in done.stdout.splitlines() if "openvino" in line]
    assert lines == ["openvino: not measured: openvino is not installed; pip install openvino"]
    assert len(done.stdout.splitlines()) == 3


@pytest.mark.parametrize("state", [False, True])
def test_peers_compute_the_layer(modules, state):
    import harness
    import peers
    from shapes import Shape

    shape = Shape(2, 1, 4, 5) if state else Shape(2, 3, 4, 5, layers=2, directions=2)
    theirs, _ = harness.make_layers(shape)
    expected = harness.step_call(theirs, shape, "call") if state else harness.inference_call(theirs, shape)
    calls, refused = peers.calls(theirs, shape, 1, peers.FLOAT_PEERS, state)
    assert "onnxruntime" in calls and not refused
    for call in calls.values():
        assert harness.largest_difference(expected, call) < 1e-5


def test_a_peer_that_fails_leaves_the_others(modules, monkeypatch):
    import peers
    from shapes import Shape
    from torch import nn

    def broken(*_):
        raise RuntimeError("no such layer\nand much more")

    monkeypatch.setitem(
        peers.PEERS, "openvino", peers.Peer("openvino", ("torch",), "a peer that cannot", broken)
    )
    calls, refused = peers.calls(nn.LSTM(4, 5), Shape(2, 3, 4, 5), 1)
    assert list(calls) == ["onnxruntime"]
    assert refused == {"openvino": "RuntimeError: no such layer"}


def test_turns(modules):
    import harness

    seen = []
    sides = {name: lambda name=name: seen.append(name) for name in "abc"}
    found = harness.interleave(sides, 1e-9, least=6, most=6)
    assert {name: len(samples) for name, samples in found.seconds.items()} == {"a": 6, "b": 6, "c": 6}
    turns = ["".join(harness.order_of(list("abc"), turn)) for turn in range(7)]
    assert turns == ["abc", "bca", "cab", "acb", "bac", "cba", "abc"]
    # As many calls in a sample for each side.
    assert seen.count("a") == seen.count("b") == seen.count("c")


def test_compare(suite, tmp_path):
    path, _ = suite
    record = json.loads(path.read_text())
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
    path, _ = suite
    other = BENCHMARKS / "results" / "support_cpu.json"
    text = tmp_path / "text.json"
    text.write_text("{")
    for bad in (tmp_path / "none.json", other, text):
        done = failing("compare.py", path, bad)
        assert done.returncode == 1
        assert done.stderr.startswith(f"{bad}: expected a file that benchmarks/bench.py wrote, got")
        assert len(done.stderr.splitlines()) == 1
