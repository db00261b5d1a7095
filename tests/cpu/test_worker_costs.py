"""The costs of workers: from times to plans, when it is measured, and the user's record of it.

The times of these tests are made up. The plans for many cores are simulated; see benchmarks/many_cores.py.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
from pathlib import Path

import forks
import pytest
import torch

import lstm_ext
from lstm_ext import info
from lstm_ext.native import loader

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import many_cores  # noqa: E402

extension = loader.extension()
CONSTANTS = {"thread": [6e5] * 8, "barrier": [6e4] * 8}


def times(threads: int = 16, **changed: list[float]) -> dict:
    found = {"thread": [2e-6, 3e-6, 5e-6, 9e-6], "barrier": [1e-7, 3e-7, 8e-7, 2e-6], "tree": [2e-7] * 4}
    return {"threads": threads, **found, **changed}


def lists(costs: dict) -> dict:
    return {name: costs[name] for name in CONSTANTS}


# ---- from times to costs


def test_costs_are_the_constants_of_two_and_what_more_workers_take() -> None:
    # A fifth time is of no number of 16 workers.
    costs = extension.costs_from(times(thread=[*times()["thread"], 1.0], tree=[1e-7, 2e-7, 7.5e-7, 1e-6]))
    assert costs["thread"] == pytest.approx([6e5, 6.6e5, 7.8e5, 10.2e5, *[10.2e5] * 4])
    # 16 meet in a tree, in half of the time of one line; 8 gain too little.
    assert costs["tree_from"] == 16
    assert costs["barrier"] == pytest.approx([6e4, 7.2e4, 10.2e4, 11.4e4, *[11.4e4] * 4])


@pytest.mark.parametrize(
    ("barrier", "tree", "first"),
    [
        ([1.0, 1.0, 1.0, 1.0], [0.1, 0.1, 0.1, 0.1], 8),  # not for the few that one line is for
        ([1.0, 1.0, 1.0, 1.0], [0.1, 0.1, 0.95, 0.1], 16),
        ([1.0, 1.0, 1.0, 1.0], [0.1, 0.1, 0.1, 0.95], None),
    ],
)
def test_a_tree_pays_from_some_number_on(barrier: list[float], tree: list[float], first: int | None) -> None:
    costs = extension.costs_from(times(barrier=barrier, tree=tree))
    assert (costs["tree_from"] if costs["tree_from"] <= 16 else None) == first


def test_the_last_time_is_that_of_all_threads() -> None:
    of_24 = extension.costs_from(
        times(24, **{name: [1e-7] * 4 + [1.1e-6] for name in ("thread", "barrier", "tree")})
    )
    # On the line from 16 to 32 workers, 24 cost what was measured.
    assert of_24["barrier"] == pytest.approx([6e4] * 4 + [18e4] * 4)
    assert (of_24["barrier"][3] + of_24["barrier"][4]) / 2 == pytest.approx(12e4)
    with pytest.raises(ValueError, match="expected positive numbers, got 0"):
        extension.costs_from(times(24))  # it has no fifth


def test_costs_stay_within_bounds_and_never_fall() -> None:
    wild = extension.costs_from(
        times(thread=[1e-6, 1, 1e-6, 1e-6], barrier=[1e-6, 1e-9, 1, 1e-9], tree=[1] * 4)
    )
    assert wild["thread"] == [6e5, *[12e6] * 7]
    assert wild["barrier"] == [6e4, 6e4, *[12e5] * 6]


@pytest.mark.parametrize(
    "changed",
    [
        {"threads": 1},
        {"thread": [1e-6, 0, 1e-6, 1e-6]},
        {"barrier": [1e-6, float("nan"), 1e-6, 1e-6]},
        {"tree": []},
        {"tree": [1e-6] * 9},
    ],
)
def test_times_that_are_none(changed: dict) -> None:
    with pytest.raises(ValueError, match="expected"):
        extension.costs_from({**times(), **changed})
    with pytest.raises(ValueError, match="tree"):
        extension.costs_from({name: value for name, value in times().items() if name != "tree"})


@pytest.mark.parametrize(
    ("samples", "median"),
    [
        ([3, 1, 9, 9, 2], 3),
        ([1, 1, 3.1, 4, 4], None),  # other programs had the cores
        ([1, 2, 4, 4, 4], None),
        ([0, 0, 0, 0, 0], None),
    ],
)
def test_times_that_other_programs_disturbed_do_not_count(samples: list[float], median: float | None) -> None:
    assert extension.steady_median(samples) == median


# ---- plans


def test_two_threads_plan_as_by_the_constants() -> None:
    for machine, factor in itertools.product(many_cores.MACHINES, (0.5, 1, 2)):
        costs = extension.costs_from(machine.times(128, factor))
        for batch, hidden, steps in many_cores.calls():
            sizes = {"steps": steps, "batch": batch, "input_size": 64, "hidden_size": hidden, "threads": 2}
            assert extension.cpu_plan(**sizes, costs=costs) == extension.cpu_plan(**sizes)


def test_dear_workers_are_fewer() -> None:
    sizes = {"steps": 100, "batch": 1, "input_size": 128, "hidden_size": 256, "threads": 16}

    def members(**costs: list[float]) -> int:
        return extension.cpu_plan(**sizes, costs={**CONSTANTS, "tree_from": 2, **costs})[
            "forward_hidden_groups"
        ]

    growing = [6e4 * 2**i for i in range(8)]
    assert 1 < members(barrier=growing) < members()
    assert members(thread=[6e5, 2e7, *[4e7] * 6]) == 2
    assert members(barrier=[1e7] * 8) == 1


@pytest.mark.parametrize("belief", many_cores.BELIEFS)
@pytest.mark.parametrize("machine", many_cores.MACHINES, ids=lambda machine: machine.name)
def test_many_workers_are_never_slower_than_one(machine: many_cores.Machine, belief: str) -> None:
    """In the model. The constants alone, which two threads have shown, promise this for a few threads only."""
    for threads in many_cores.THREADS:
        if belief == "constants" and threads > 4:
            continue
        found = many_cores.simulated(machine, threads, belief)
        assert found["slower_than_one"] == 0, found
        assert found["speed"] > 0.2 * threads if threads <= 64 else found["speed"] > 20, found


def test_nor_if_each_time_is_wrong_by_up_to_two() -> None:
    generator = random.Random(3)
    for machine, threads, _ in itertools.product(many_cores.MACHINES, (8, 32, 128), range(4)):
        wrong = machine.times(threads, 1)
        for name in ("thread", "barrier", "tree"):
            wrong[name] = [time * 2 ** generator.choice((-1, 0, 1)) for time in wrong[name]]
        costs = extension.costs_from(wrong)
        for call in many_cores.calls():
            for one in many_cores.chosen(machine, threads, costs, call):
                assert one["speed"] >= 1, (machine, threads, wrong, call, one)


# ---- measuring


@pytest.mark.alone
def test_what_is_measured() -> None:
    """On a busy machine nothing may come out. What does are times."""
    for _ in range(20):
        found = extension.measure_workers(2)
        if found is not None:
            assert found["threads"] == 2
            # From an atomic addition (threads of one core meet within 36 ns) to a few turns of other programs.
            times = [found[name][0] for name in ("thread", "barrier", "tree")]
            assert min(times) > 5e-9 and max(times) < 0.1, times
            assert lists(extension.costs_from(found)) == CONSTANTS
    with pytest.raises(ValueError, match="expected at least 2 threads, got 1"):
        extension.measure_workers(1)


WHEN = """
import os, torch, lstm_ext
from lstm_ext.native import loader
extension = loader.extension()
extension.set_fewer_when_crowded(False)
child = os.fork() if os.environ.get("FORKED") else 0
if child:
    os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
KNOWN = {name: [1e-6, 2e-6] for name in ("thread", "barrier", "tree")} | {"threads": 3}
def measurements(threads=3, cores=16, hidden=160, deterministic=False, times=None):
    torch.set_num_threads(threads)
    extension.pretend_cores(cores)
    torch.use_deterministic_algorithms(deterministic)
    if times:
        extension.set_worker_times(times, recorded=False)
    layer, x = lstm_ext.LSTM(hidden, hidden), torch.randn(20, 9, hidden)
    with torch.no_grad():
        for _ in range(3):
            layer(x)
    return extension.worker_measurements()
print(measurements(), measurements(threads=2), measurements(hidden=4), measurements(cores=2),
      measurements(deterministic=True), measurements(times=KNOWN), flush=True)
"""


@pytest.mark.alone
def test_when_it_is_measured(tmp_path: Path) -> None:
    """Once, and the next calls do not try again at once. Not for two threads, for a call of one worker, for more
    threads than cores, in deterministic mode, and where it is known."""
    here = {"LSTM_EXT_CPU_MEASURE": "1", "XDG_CACHE_HOME": str(tmp_path)}
    runs = forks.run(WHEN, here, {**here, "FORKED": "1"}, {**here, "LSTM_EXT_CPU_MEASURE": "0"})
    assert [(run.stdout, run.stderr) for run in runs] == [
        ("1 0 0 0 0 0\n", ""),
        ("0 0 0 0 0 0\n", ""),
        ("0 0 0 0 0 0\n", ""),
    ]


def test_sums_over_workers_keep_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bits of layer normalisation's gradients depend on it, so no measurement changes it."""
    threads = torch.get_num_threads()
    layer, x = lstm_ext.LSTM(40, 96, layer_norm=True), torch.randn(40, 6, 40)

    def gradients() -> list[torch.Tensor]:
        return list(torch.autograd.grad(layer(x)[0].square().sum(), list(layer.parameters())))

    torch.set_num_threads(3)
    try:
        extension.pretend_cores(0)
        before = gradients()
        dear = {name: [1e-6, 1.0] for name in ("thread", "barrier", "tree")}
        extension.set_worker_times({"threads": 3, **dear}, recorded=False)
        assert extension.worker_costs(3)["thread"][1] == 12e6
        assert all(map(torch.equal, before, gradients()))
    finally:
        extension.pretend_cores(0)
        torch.set_num_threads(threads)


# ---- the record

PROCESSES = """
import json, os, sys
from lstm_ext.native import loader
extension = loader.extension()
print(json.dumps([extension.worker_times(recorded=True), extension.worker_costs(16)]))
if os.environ.get("TIMES"):
    extension.set_worker_times(json.loads(os.environ["TIMES"]), recorded=False)
"""


def test_a_later_process_does_not_measure(tmp_path: Path) -> None:
    here = {"LSTM_EXT_CPU_MEASURE": "1", "XDG_CACHE_HOME": str(tmp_path)}
    given = times()
    runs = forks.run(
        PROCESSES,
        {**here, "TIMES": json.dumps(given)},
        here,
        {**here, "LSTM_EXT_CPU_MEASURE": "0"},
        {
            **here,
            "TIMES": json.dumps(
                times(4, **{name: given[name][:2] for name in ("thread", "barrier", "tree")})
            ),
        },
        here,
    )
    assert [(run.returncode, run.stderr) for run in runs] == [(0, "")] * 5
    first, second, off, _, last = [json.loads(run.stdout) for run in runs]
    assert first[0] == off[0] == []
    assert lists(first[1]) == lists(off[1]) == CONSTANTS
    (found,) = second[0]
    assert found["threads"] == 16 and found["barrier"] == pytest.approx(given["barrier"])
    for name, costs in lists(extension.costs_from(given)).items():
        assert second[1][name] == pytest.approx(costs)
    assert sorted(times["threads"] for times in last[0]) == [4, 16]
    (entry,) = json.loads((tmp_path / "lstm_ext" / "selftest.json").read_text())
    assert set(entry["measured"]) == {"4 threads", "16 threads"}
    # in microseconds
    assert entry["measured"]["16 threads"]["tree"] == pytest.approx([0.2] * 4)


def test_what_somebody_wrote_into_the_record(tmp_path: Path) -> None:
    """The first two are no records at all, and importing the package goes on, with a warning."""
    ones = [1] * 4
    entries = [
        [],
        {"threads": 16, "thread": [1, 10**400, 1, 1], "barrier": ones, "tree": ones},
        {"threads": 16},
        {"threads": "many", "thread": ones, "barrier": ones, "tree": ones},
        {"threads": 16, "thread": [1, 1, -1, 1], "barrier": ones, "tree": ones},
        {"threads": 16, "thread": None, "barrier": ones, "tree": ones},
    ]
    here = {"LSTM_EXT_CPU_MEASURE": "1", "XDG_CACHE_HOME": str(tmp_path)}
    forks.run(PROCESSES, {**here, "TIMES": json.dumps(times())})
    (record,) = json.loads((tmp_path / "lstm_ext" / "selftest.json").read_text())
    environments = []
    for i, entry in enumerate(entries):
        file = tmp_path / str(i) / "lstm_ext" / "selftest.json"
        file.parent.mkdir(parents=True, mode=0o700)
        file.write_text(json.dumps([{**record, "measured": {"16 threads": entry}}]))
        environments.append({**here, "XDG_CACHE_HOME": str(tmp_path / str(i))})
    for i, run in enumerate(forks.run(PROCESSES, *environments)):
        assert (run.returncode, "is damaged" in run.stderr) == (0, i < 2), run.stderr
        recorded, costs = json.loads(run.stdout)
        assert recorded == [] and lists(costs) == CONSTANTS


def test_info_says_where_costs_are_from() -> None:
    try:
        assert info._worker_costs(extension, 2).startswith("a thread 600000, a barrier 60000 multiply-adds (")
        assert "(LSTM_EXT_CPU_MEASURE=0)" in info._worker_costs(extension, 16)
        extension.set_worker_times(times(), recorded=True)
        assert info._worker_costs(extension, 16) == (
            "of 16: a thread 1020000, a barrier 72000 multiply-adds, a tree from 8 on (measured on this machine)"
        )
    finally:
        extension.pretend_cores(0)
