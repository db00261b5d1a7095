"""Python threads: the kernels run without the GIL, and callers at the same time do not disturb each other."""

from __future__ import annotations

import ast
import dataclasses
import itertools
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import forks
import internals
import pytest
import torch
from cases import Case, layer, ours
from torch import Tensor

import lstm_ext
from lstm_ext.native import loader

pytestmark = pytest.mark.alone

CSRC = Path(__file__).resolve().parents[2] / "csrc"
# Seconds of processor time. The interpreter takes the GIL from a thread that runs Python every 0.005.
ENOUGH = 0.1


def call_of(direction: str, steps: int) -> Callable[[], object]:
    """A call that spends nearly all of its time in one kernel."""
    module, x = lstm_ext.LSTM(64, 128), torch.randn(steps, 16, 64)
    if direction == "forward":

        def forward() -> object:
            with torch.no_grad():
                return module(x)

        return forward
    output, _ = module(x)
    gradient, weights = torch.randn_like(output), list(module.parameters())
    return lambda: torch.autograd.grad(output, weights, gradient, retain_graph=True)


def long_enough(direction: str) -> Callable[[], object]:
    steps = 100
    while True:
        call = call_of(direction, steps)
        times = []
        for _ in range(3):
            start = time.thread_time()
            call()
            times.append(time.thread_time() - start)
        if min(times) > ENOUGH:
            return call
        steps *= 2


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_others_run_during_a_kernel(direction):
    """While a thread is in a long kernel, another one runs Python and kernels of its own: no GIL, no lock."""
    torch.set_num_threads(1)
    long, short = long_enough(direction), call_of(direction, 1)
    done = threading.Event()
    # The time that this thread has had, which no other program on the machine changes.
    clock = time.pthread_getcpuclockid(threading.get_ident())
    calls: list[float] = []

    def other() -> None:
        while not done.is_set():
            time.sleep(0.001)
            short()
            calls.append(time.clock_gettime(clock))

    thread = threading.Thread(target=other)
    thread.start()
    during = 0
    try:
        for _ in range(50):
            start = time.thread_time()
            long()
            end = time.thread_time()
            # not the edges, where the long call is in Python
            margin = 0.2 * (end - start)
            during += sum(start + margin < t < end - margin for t in calls)
            if during >= 20:
                break
    finally:
        done.set()
        thread.join()
    # Nothing could happen if the kernel kept the GIL; on an idle machine dozens of calls do in each one.
    assert during >= 20


# What one call does differs: weights read in place or packed, one worker or several, teams that meet every step.
SHAPES = {
    "streaming": ({"hidden_size": 24}, 1),
    "row-major": ({"hidden_size": 40, "num_layers": 2, "bidirectional": True}, 2),
    "packed": ({"hidden_size": 72, "num_layers": 2, "bidirectional": True}, 12),
    "projection": ({"hidden_size": 72, "proj_size": 20, "num_layers": 2}, 12),
    "shared units": ({"hidden_size": 320}, 1),
    "norm of c": ({"hidden_size": 72, "layer_norm": "cell"}, 12),
    "GRU, streaming": ({"hidden_size": 24, "gru": True}, 1),
    "GRU, packed": ({"hidden_size": 72, "num_layers": 2, "bidirectional": True, "gru": True}, 12),
    "GRU, shared units": ({"hidden_size": 320, "gru": True}, 1),
}
CALLERS = 8
FEATURES = 48


def results(module: Any, x: Tensor, states: tuple[Tensor, ...]) -> list[Tensor]:
    """Outputs and all gradients; inference as well. A GRU has one state."""
    hx = states[0] if len(states) == 1 else states
    with torch.no_grad():
        inference, _ = module(x, hx)
    output, last = module(x, hx)
    last = (last,) if len(states) == 1 else last
    loss = output.square().sum() + last[0].sum() + last[-1].square().sum()
    return [inference, output, *last, *torch.autograd.grad(loss, [x, *states, *module.parameters()])]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_callers_do_not_disturb_each_other(shape, threads):
    config, batch = SHAPES[shape]
    gru = config.get("gru", False)
    options = {name: value for name, value in config.items() if name != "gru"}
    module = (lstm_ext.GRU if gru else lstm_ext.LSTM)(FEATURES, **options)
    torch.set_num_threads(threads)
    arguments = []
    for i in range(CALLERS):
        x = torch.randn(1 if shape.endswith("streaming") else 10 + i, batch, FEATURES, requires_grad=True)
        _, state = module(x.detach())
        states = (state,) if gru else state
        arguments.append((x, tuple(torch.randn_like(s).requires_grad_() for s in states)))
    alone = [results(module, *a) for a in arguments]
    start = threading.Barrier(CALLERS)

    def call(i: int) -> list[list[Tensor]]:
        start.wait()
        return [results(module, *arguments[i]) for _ in range(4)]

    with ThreadPoolExecutor(CALLERS) as pool:
        together = list(pool.map(call, range(CALLERS)))
    assert not any(p.grad is not None for p in module.parameters())
    for i, repeated in enumerate(together):
        for found in repeated:
            assert [torch.equal(a, b) for a, b in zip(found, alone[i], strict=True)] == [True] * len(alone[i])


# How a call may be cut up: teams that have rows of the batch, members of a team that have hidden units, and both.
GRIDS = {
    "teams": Case(steps=20, batch=8, input_size=48, hidden_size=72),
    "members": Case(steps=48, batch=1, input_size=48, hidden_size=160),
    "both": Case(steps=3, batch=8, input_size=48, hidden_size=330),
}
CELL = {"cell_clip": 0.5, "preactivation_clip": 0.5, "activations": "sigmoid relu relu"}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "both directions": {"bidirectional": True},
    "projection": {"proj_size": 40},
    "mask": {"mask": True},
    "zoneout": {"zoneout": "flags"},
    "layer_norm": {"norm": "own"},
    "peephole": {"peephole": "own", **CELL},
    "coupled_gates": {"coupled_gates": True},
    "resets": {"resets": "to a state"},
    "lengths": {"lengths": True},
    "results": {"returned": "both"},
}
# Gradients that are sums over the workers, by the beginnings of their names: docs/guide/precision.md.
SUMS = {"layer_norm": ("grad of norm", "grad of b_"), "peephole": ("grad of peephole",)}


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def passes(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """Results of training, gradients, and the output of inference."""
    with torch.no_grad():
        inference, *_ = internals.lstm_layer(*layer(case, dtype, 0).arguments(dtype)[1])
    return {"inference": inference, **ours(case, dtype, 0)}


@pytest.fixture
def many_workers() -> Iterator[None]:
    """Workers that cost nothing, so that small layers have many of them, on two cores."""
    loader.extension().set_worker_costs(0)
    yield
    loader.extension().set_worker_costs(1)


@pytest.mark.slow
@pytest.mark.usefixtures("many_workers")
@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("grid", GRIDS)
def test_a_number_of_threads_changes_no_bit(grid: str, option: str, recompute: bool) -> None:
    """Except in the gradients of some vectors."""
    case = dataclasses.replace(GRIDS[grid], **OPTIONS[option], recompute=recompute)
    if case.lengths:
        case = dataclasses.replace(case, lengths=tuple(case.steps - b for b in range(case.batch)))
    for dtype in DTYPES if option == "plain" else DTYPES[:1]:
        torch.set_num_threads(1)
        expected = passes(case, dtype)
        for threads in (2, 3, 8, 16, 64):
            torch.set_num_threads(threads)
            plan = loader.extension().cpu_plan(
                steps=case.steps, batch=case.batch, input_size=case.input_size, hidden_size=case.hidden_size,
                threads=threads, save=True,
            )  # fmt: skip
            teams, members = plan["forward_batch_groups"], plan["forward_hidden_groups"]
            assert teams * members > threads // 4 or grid != "both"
            assert (teams > 1 or grid != "teams") and (members > 1 or grid != "members")
            for name, found in passes(case, dtype).items():
                if name.startswith(SUMS.get(option, "none")):
                    torch.testing.assert_close(found, expected[name])
                else:
                    assert torch.equal(found, expected[name]), (dtype, threads, name)


@pytest.mark.usefixtures("many_workers")
@pytest.mark.parametrize("weights", [None, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("grid", GRIDS)
def test_a_number_of_threads_changes_no_bit_of_a_frozen_layer(grid: str, weights: torch.dtype | None) -> None:
    case = GRIDS[grid]
    module = lstm_ext.LSTM(case.input_size, case.hidden_size, bidirectional=True).requires_grad_(False)
    frozen, x = lstm_ext.freeze(module, weights), torch.randn(case.steps, case.batch, case.input_size)
    torch.set_num_threads(1)
    expected = frozen(x)[0]
    for threads in (2, 3, 8, 16, 64):
        torch.set_num_threads(threads)
        assert torch.equal(frozen(x)[0], expected), threads


def test_dear_workers_are_fewer() -> None:
    extension = loader.extension()

    def members(costs: float) -> int:
        extension.set_worker_costs(costs)
        sizes = {"steps": 100, "batch": 1, "input_size": 128, "hidden_size": 256}
        return extension.cpu_plan(**sizes, threads=16)["forward_hidden_groups"]

    assert members(0) > members(1) > members(2) > members(4) == 1


ON_ONE_CORE = """
import os, time, torch, lstm_ext
from lstm_ext.native import loader
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
torch.manual_seed(0)
layer, x = lstm_ext.LSTM(160, 160), torch.randn(200, 8, 160)
torch.set_num_threads(1)
expected = layer(x)[0]
torch.set_num_threads(2)
calls, limits = [], 0
while limits < 4 and len(calls) < 5000:
    begin = time.perf_counter()
    found = layer(x)[0]
    calls.append((time.perf_counter() - begin, *loader.extension().worker_limit()))
    limits += calls[-1][2] > (calls[-2][2] if len(calls) > 1 else 0)
    assert torch.equal(found, expected)
print(calls)
"""


AFTER_FORK = """
import os, signal, torch, lstm_ext
from lstm_ext.native import loader
torch.manual_seed(0)
layer, x = lstm_ext.LSTM(64, 64), torch.randn(50, 8, 64)  # so small that torch's operators use no threads
loader.extension().set_fewer_when_crowded(False)
loader.extension().set_worker_costs(0)
def call():
    output = layer(x)[0]
    return [output, *torch.autograd.grad(output.sum(), list(layer.parameters()))]
torch.set_num_threads(1)
expected = call()
torch.set_num_threads(2)
if os.environ["BEFORE"] == "a team":
    call()
if os.fork() == 0:
    signal.alarm(60)
    print(all(map(torch.equal, call(), expected)), len(os.listdir("/proc/self/task")) > 1, flush=True)
    os._exit(0)
os.wait()
"""


@pytest.mark.parametrize(("before", "has_team"), [("a team", False), ("one thread", True)])
def test_a_child_of_fork_computes(before: str, has_team: bool) -> None:
    """On one thread, where OpenMP would wait for the threads of the parent for ever."""
    command = [sys.executable, "-c", AFTER_FORK]
    done = subprocess.run(
        command, env={**os.environ, "BEFORE": before}, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"True {has_team}\n", done.stderr


@pytest.mark.slow
def test_workers_that_share_a_core_become_one() -> None:
    """Two of them, on a core that both need, hold each other up. The numbers stay the same."""
    done = subprocess.run([sys.executable, "-c", ON_ONE_CORE], capture_output=True, text=True, check=True)
    calls = ast.literal_eval(done.stdout)
    times, workers, left = zip(*calls, strict=True)
    begins = [i for i in range(len(calls)) if left[i] > (left[i - 1] if i else 0)]
    assert len(begins) == 4, calls
    assert all(workers[i] == 1 for i in begins)
    # A limit lasts for at most eight times what was lost; then it tries again with both.
    for before, i in itertools.pairwise([-1, *begins]):
        unlimited = sum(times[k] for k in range(before + 1, i + 1) if k == 0 or left[k - 1] == 0)
        assert left[i] <= 8 * unlimited, (i, calls)
    # It counts the time of limited calls, so that it ends: sooner than that if they are not faster.
    limited = [k for k in range(1, len(calls)) if left[k - 1] > 0 and k not in begins]
    assert all(left[k] < left[k - 1] for k in limited), calls
    assert all(left[k - 1] - left[k] <= times[k] for k in limited if left[k] > 0), calls


# Calls as a machine would make them, and a clock of their own: how many were limited, of the first 200 and the last,
# and how many came before the first limit.
CROWDING = """
#include <cstdio>
#include "torch/crowding.h"
// Seconds of a call with all four workers, lost by the worst of them, and of a call with the workers of a limit; cores.
void calls(const char* name, double all, double lost, double limited, double cores) {
  lstm_ext::Crowding crowding;
  int found[2] = {0, 0}, workers = 4, before = 0;
  double most = 0;
  for (int i = 0; i < 400; ++i) {
    if (crowding.limits()) {
      workers = crowding.limited(4);
      crowding.note_limited(limited, 1);
      ++found[i / 200];
    } else {
      crowding.note(4, all, 1, lost, cores);
      before += found[0] + found[1] == 0;
      if (crowding.left() > most) most = crowding.left();
    }
  }
  std::printf("%s,%d,%d,%d,%g,%d\\n", name, found[0], found[1], workers, most, before);
}
int main() {
  calls("nothing is lost", 0.01, 0, 0.01, 4);
  calls("limits help", 0.01, 0.006, 0.006, 2);
  calls("limits do not help", 0.01, 0.006, 0.011, 2);
  calls("stopped for an hour", 3600, 3599.99, 0.01, 2);
  // The first limit is a quarter of what was lost, 0.125 s: a call of two workers, and less than one.
  calls("a limit of one call", 0.5625, 0.5, 0.125, 2);
  calls("a limit of less", 0.5703125, 0.5, 0.140625, 2);
}
"""


def test_how_long_workers_are_limited(tmp_path: Path) -> None:
    program = tmp_path / "crowding"
    command = [*shlex.split(os.environ.get("CXX") or "g++"), "-std=c++17", f"-I{CSRC}", "-x", "c++", "-"]
    subprocess.run([*command, "-o", str(program)], input=CROWDING, text=True, check=True)
    said = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    rows = [line.split(",") for line in said.splitlines()]
    found = {name: tuple(map(float, numbers)) for name, *numbers in rows}
    assert found["nothing is lost"] == (0, 0, 4, 0, 400)
    first, last, workers, most, _ = found["limits help"]
    assert workers == 2 and first < last > 160  # trying all workers becomes rare
    assert most < 8 * 0.06  # what was lost in ten calls
    first, last, workers, *_ = found["limits do not help"]
    assert workers == 2 and 0 < first < 100 and 0 < last < 100
    assert found["stopped for an hour"][2:4] == (2, 0.5)
    assert [found[f"a limit of {what}"][-1] for what in ("one call", "less")] == [1, 2]


LATE = """
import ctypes, os, platform, re, signal, threading, torch, lstm_ext
from lstm_ext.native import loader
extension, module, x = loader.extension(), lstm_ext.LSTM(48, 330), torch.randn(20, 8, 48)
extension.set_fewer_when_crowded(False)
torch.set_num_threads(2)
known = set(os.listdir("/proc/self/task"))
output, _ = module(x)
(worker,) = map(int, set(os.listdir("/proc/self/task")) - known)
libc = ctypes.CDLL(None)
for number, function in ((signal.SIGUSR1, libc.pause), (signal.SIGUSR2, libc.abs)):
    libc.signal(number, ctypes.cast(function, ctypes.c_void_p))

def send(number):
    tgkill = {"x86_64": 234, "aarch64": 131}[platform.machine()]
    assert libc.syscall(tgkill, os.getpid(), worker, number) == 0

weights, gradient = list(module.parameters()), torch.ones_like(output)
extension.set_cpu_wait_limit(0.2)
for call in (lambda: module(x), lambda: torch.autograd.grad(output, weights, gradient, retain_graph=True)):
    send(signal.SIGUSR1)
    timer = threading.Timer(1, send, (signal.SIGUSR2,))
    timer.start()
    try:
        call()
    except RuntimeError as error:
        print(error)
    timer.join()
extension.set_cpu_wait_limit(300)
assert torch.equal(module(x)[0], output)
"""


@pytest.mark.slow
def test_a_wait_that_is_too_long_raises() -> None:
    """A signal stops the other worker of two until another signal comes. The next call is right."""
    (run,) = forks.run(LATE, {})
    said = (
        r"lstm_ext: a worker has waited for 0.2 s, .* LSTM_EXT_CPU_WAIT_LIMIT .* barrier \d+ of its call, .*"
    )
    assert run.returncode == 0 and re.fullmatch(f"({said}\n){{2}}", run.stdout), (run.stdout, run.stderr)


@pytest.mark.slow
def test_the_limit_of_waits_need_not_be_set() -> None:
    program = """
if os.environ.get("WITHOUT"):
    del os.environ["LSTM_EXT_CPU_WAIT_LIMIT"]
import lstm_ext
print(tuple(lstm_ext.LSTM(2, 3)(torch.zeros(1, 1, 2))[0].shape))
"""
    for run in forks.run(program, {"WITHOUT": "1"}, {"LSTM_EXT_CPU_WAIT_LIMIT": ""}):
        assert (run.returncode, run.stdout) == (0, "(1, 1, 3)\n"), run.stderr


@pytest.mark.parametrize("units", [1, 2])
@pytest.mark.parametrize("rows", [1, 2])
def test_explain_says_what_the_threads_share(rows: int, units: int, monkeypatch: pytest.MonkeyPatch) -> None:
    extension = loader.extension()
    plan = extension.cpu_plan
    groups = {"forward_batch_groups": rows, "forward_hidden_groups": units}
    monkeypatch.setattr(extension, "cpu_plan", lambda **sizes: plan(**sizes) | groups)
    text = lstm_ext.explain(lstm_ext.LSTM(3, 4), (2, 5, 3))
    assert f"{rows * units} of " in text
    assert (f"{rows} share the batch" in text) == (rows > 1)
    assert (f"{units} share the hidden units" in text) == (units > 1)


# ---- memory that is kept

KEEP = """
import gc, torch, lstm_ext
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
layer, x = lstm_ext.LSTM(512, 512), torch.randn(100, 64, 512)
layer(x)[0].sum().backward()
layer.zero_grad()
gc.collect()
before, kept = resident(), lstm_ext.release_memory()
assert 1 << 24 < kept <= 1 << 28, kept
assert before - resident() > 0.9 * kept, (before, resident(), kept)
assert lstm_ext.release_memory() == 0
layer(x)[0].sum().backward()
"""


@pytest.mark.slow
def test_kept_memory_is_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", KEEP], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
