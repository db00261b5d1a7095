"""Changes single places of the product at random and says which changes no test of `make test` sees.

    python tests/tools/mutants.py               # 200 of seed 1: `make mutants`, about an hour on two cores
    python tests/tools/mutants.py --seeds 1 2 3 # 200 of each, in one build
    python tests/tools/mutants.py --only layer/ # of the files whose names contain one of these parts

A mutant is one operator, number, condition or statement that is another one or gone. Those of the C++ files all go into
one build of a copy of the tree, in build/mutants, each behind a switch; those of the Python files are written into the
copy, one after the other. First each test runs once without a mutant, which says how long it takes and which lines and
switches it reaches. A mutant meets the tests that reach it, one of each function first, until one fails or those that
passed take more than --seconds without a mutant.

The build has the kernels of AVX2. The files of the CUDA kernels are tried on the emulator, with the tests of
`make test-tools` that run it; these tests, which take half of the time, are left out where --only names no such file.
Survivors and their lines are printed, and all verdicts are in build/mutants.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import mmap
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import mutant_sites
import planted
import pytest
from mutant_sites import Site

ROOT = planted.ROOT
WORK = ROOT / "build" / "mutants"
# Not compiled without nvcc; and the C library, which no test of `make test` compiles.
NOT_HERE = ("csrc/torch/cuda_backend.cpp", "csrc/torch/gemm_cublas", "csrc/cuda/ptx.h", "csrc/library/")
EMULATED = ("test_stepwise", "test_modes", "test_first_use")
# One test of each program that compiles the C++ files by itself: their errors are found with those of the extension.
PROBES = (
    "tests/cpu/test_tile_engine.py::test_int8_on_bytes_in_software",
    "tests/cuda/test_gpu_plan.py::test_older_cards_are_refused",
    "tests/cpu/test_driver.py::test_cell",
    "tests/simt/test_stepwise.py::test_values_and_gradients[float64-dense]",
    "tests/simt/test_modes.py::test_the_same_bits",
    "tests/simt/test_first_use.py::test_it_is_right[all]",
)
JOBS = 2

SWITCH = """#pragma once
#pragma GCC diagnostic ignored "-Wtautological-compare"
// Written by mutants.py. LSTM_EXT_MUTANTS names a file, which says what mutant is on and is told what is reached.
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>
namespace lstm_ext_mutants {
struct Table {
  volatile int active;
  volatile unsigned char reached[%(size)d];
};
static Table* open_table() {
  static Table none{};
  const char* path = getenv("LSTM_EXT_MUTANTS");
  const int file = path ? open(path, O_RDWR) : -1;
  if (file < 0) return &none;
  void* table = mmap(nullptr, sizeof(Table), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  return table == MAP_FAILED ? &none : static_cast<Table*>(table);
}
static Table* kTable;
__attribute__((constructor(101))) static void begin() { kTable = open_table(); }
static __attribute__((unused)) bool on(int mutant) {
  if (!kTable) return false;
  kTable->reached[mutant] = 1;
  return kTable->active == mutant;
}
}  // namespace lstm_ext_mutants
#define LSTM_EXT_MUTANT(k) (!__builtin_is_constant_evaluated() && lstm_ext_mutants::on(k))
"""


@dataclass
class Mutant:
    number: int  # from 1, for the switch
    seed: int
    site: Site
    verdict: str = "not tried"
    seconds: float = 0.0
    tests: int = 0  # that reach it

    def line(self) -> str:
        return f"{self.site.file}:{self.site.line}: {self.site.what}"


class Table:
    """The file that the switches look at."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        path.write_bytes(bytes(4 + size))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)

    def activate(self, number: int) -> None:
        self._map[:4] = struct.pack("i", number)

    def take(self) -> list[int]:
        """The switches that were reached since the last call."""
        reached = [i for i, seen in enumerate(self._map[4:]) if seen]
        self._map[4:] = bytes(len(self._map) - 4)
        return reached


@dataclass
class Reach:
    """What one test needs and sees."""

    seconds: float = 0.0
    switches: list[int] = field(default_factory=list)
    lines: dict[str, list[int]] = field(default_factory=dict)  # of the Python files


class Observer:
    """A plugin of pytest: runs every test of a file, and notes what each reaches."""

    def __init__(self, folder: Path, table: Table, output: Path) -> None:
        self.folder, self.table, self.output = folder, table, output
        self.passed: dict[str, Reach] = {}
        self.loading: set[int] = set()  # switches that are reached outside tests: every test needs them
        self.failed: list[str] = []
        import coverage

        # Before pytest imports the package, so that lines of the import are seen.
        source = [str(folder / "lstm_ext")]
        self.coverage = coverage.Coverage(data_file=None, config_file=False, source=source)
        self.coverage.start()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[Any]:
        self.loading.update(self.table.take())
        self.coverage.switch_context(item.nodeid)
        start = time.monotonic()
        result = yield
        reach = self.passed.get(item.nodeid)
        if reach is not None:
            reach.seconds, reach.switches = time.monotonic() - start, self.table.take()
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.append(report.nodeid)
        elif report.when == "call" and report.passed:
            self.passed[report.nodeid] = Reach()

    def pytest_sessionfinish(self) -> None:
        self.coverage.stop()
        data = self.coverage.get_data()
        for file in data.measured_files():
            name = str(Path(file).relative_to(self.folder))
            for line, tests in data.contexts_by_lineno(file).items():
                for test in tests or ("",):
                    if test in self.passed:
                        self.passed[test].lines.setdefault(name, []).append(line)
                    elif not test:  # as the file is imported: every test does that
                        for reach in self.passed.values():
                            reach.lines.setdefault(name, []).append(line)
        for reach in self.passed.values():
            reach.switches = sorted(self.loading.union(reach.switches))
        kept = {k: vars(v) for k, v in self.passed.items() if k not in self.failed}
        self.output.write_text(json.dumps({"passed": kept, "failed": self.failed}))


class Chosen:
    """A plugin of pytest: these tests, in this order, each with a limit."""

    def __init__(self, tests: Sequence[str], seconds: Sequence[float]) -> None:
        self.order = {test: i for i, test in enumerate(tests)}
        self.seconds = dict(zip(tests, seconds, strict=True))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        signal.alarm(int(30 + 10 * self.seconds[nodeid]))  # nobody handles it, so it ends the process

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted(
            (item for item in items if item.nodeid in self.order), key=lambda i: self.order[i.nodeid]
        )


def in_child(folder: Path, table: Path, log: Path, work: Callable[[], int]) -> int:
    """Forks, so that torch is imported once."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        os.setsid()
        os.chdir(folder)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ["LSTM_EXT_MUTANTS"] = str(table)
        sys.path[:0] = [str(folder), str(folder / "tests")]
        sys.dont_write_bytecode = True
        code = int(work())
    except BaseException as error:
        print(repr(error), flush=True)
    finally:
        os._exit(code)


@dataclass
class Job:
    """Something to run in one of the copies, with a limit in seconds."""

    # From the copy's number the child's pid.
    start: Callable[[int], int]
    # With the copy's number, the exit code, None past the limit, and the seconds.
    end: Callable[[int, int | None, float], None]
    limit: float


def run_jobs(jobs: Iterable[Job]) -> None:
    waiting, running = iter(jobs), {}
    free = list(range(JOBS))
    while True:
        while free and (job := next(waiting, None)) is not None:
            copy = free.pop()
            running[job.start(copy)] = job, copy, time.monotonic()
        if not running:
            return
        time.sleep(0.02)
        for pid, (job, copy, began) in list(running.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            seconds = time.monotonic() - began
            if not done and seconds < job.limit:
                continue
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            if not done:
                os.waitpid(pid, 0)
            del running[pid]
            job.end(copy, os.waitstatus_to_exitcode(status) if done else None, seconds)
            free.append(copy)


class Session:
    def __init__(self, mutants: list[Mutant], seconds: float) -> None:
        self.mutants, self.seconds = mutants, seconds
        # Read once: the tree may change meanwhile.
        self.sources = {m.site.file: (ROOT / m.site.file).read_bytes() for m in mutants}
        self.emulated = any(["cuda" in m.site.file for m in mutants if not m.site.python])
        self.probes = [probe for probe in PROBES if self.emulated or "/simt/" not in probe]
        self.copies: list[Path] = []
        self.tables: list[Table] = []
        self.reach: dict[str, Reach] = {}

    # ---- the build

    def build(self) -> None:
        """Leaves out what does not compile, which says nothing of the tests."""
        copy = planted.Copy("mutants", every_set=False)
        switched = [m for m in self.mutants if not m.site.python]
        while True:
            self.write_switches(copy.folder, switched)
            copy.log.unlink(missing_ok=True)
            built = copy.build()
            if built:
                options = ["-q", "-n", "2", "--dist", "worksteal", "-m", "not full", "-p", "no:cacheprovider"]
                planted.run(
                    [sys.executable, "-m", "pytest", *options, *self.probes], copy.folder, copy.log, 1200
                )
            else:
                # setup.py ends at the first error. All of them are wanted.
                for script in (copy.folder / "build").rglob("build.ninja"):
                    planted.run(["ninja", "-k", "0", "-C", str(script.parent)], copy.folder, copy.log)
            bad = self.blamed(copy.log.read_text(), switched)
            if built and not bad:
                break
            if not bad:
                raise SystemExit(f"the copy does not build, and no mutant is to blame: {copy.log}")
            for mutant in bad:
                mutant.verdict = "does not compile"
            switched = [m for m in switched if m.verdict == "not tried"]
            print(f"{len(bad)} mutants do not compile", flush=True)
        for number in range(JOBS):
            folder = WORK / f"copy{number}"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(
                copy.folder, folder, ignore=shutil.ignore_patterns("build", ".git"), symlinks=True
            )
            self.copies.append(folder)
            self.tables.append(Table(WORK / f"table{number}", len(self.mutants) + 1))
        run_jobs(self.warm() for _ in range(JOBS))

    def warm(self) -> Job:
        """What tests compile is built in each copy before a test has a limit. The objects know their sources' paths."""

        def start(copy: int) -> int:
            log = WORK / f"warm{copy}.log"
            options = ["-q", "-m", "not full", "-p", "no:cacheprovider", *self.probes]
            return in_child(self.copies[copy], self.tables[copy].path, log, lambda: int(pytest.main(options)))

        def end(copy: int, code: int | None, seconds: float) -> None:
            if code != 0:
                raise SystemExit(f"copy {copy} is not sound: {WORK / f'warm{copy}.log'}")

        return Job(start, end, 1800)

    def write_switches(self, folder: Path, mutants: list[Mutant]) -> None:
        (folder / "csrc/contract/mutant.h").write_text(SWITCH % {"size": len(self.mutants) + 1})
        by_file: dict[str, list[Mutant]] = collections.defaultdict(list)
        for mutant in (m for m in self.mutants if not m.site.python):
            by_file[mutant.site.file].append(mutant)
        for file, here in by_file.items():
            source = self.sources[file]
            kept = [(m.number, m.site) for m in here if m in mutants]
            text = mutant_sites.switched(source, kept)
            if kept:  # errors name the lines of the source
                text = b'#include "contract/mutant.h"\n#line 1\n' + text
            if (folder / file).read_bytes() != text:
                (folder / file).write_bytes(text)

    @staticmethod
    def blamed(log: str, mutants: list[Mutant]) -> list[Mutant]:
        """Those on the lines of errors; else those that an error names; else those a few lines away."""
        errors = re.findall(r"(csrc/[\w/.]+):(\d+):\d+: (?:fatal )?error(.*)", log)

        def near(mutant: Mutant, distance: int) -> bool:
            site = mutant.site
            return any(
                file == site.file and site.line - distance <= int(line) <= site.last_line + distance
                for file, line, _ in errors
            )

        named = {int(n) for *_, text in errors for n in re.findall(r"::on\((\d+)\)", text)}
        return (
            [m for m in mutants if near(m, 0)]
            or [m for m in mutants if m.number in named]
            or [m for m in mutants if near(m, 8)]
        )

    # ---- what the tests reach

    def observe(self, parts: Sequence[str] = ()) -> None:
        files = sorted(
            path.relative_to(self.copies[0]) for path in (self.copies[0] / "tests").rglob("test_*.py")
        )
        files = [f for f in files if "compat" not in f.parts]
        files = [f for f in files if not parts or any(part in f.name for part in parts)]
        failed: list[str] = []

        def job(file: Path) -> Job:
            output = WORK / f"{file.stem}.json"
            output.unlink(missing_ok=True)
            on_emulator = self.emulated and file.stem.startswith(EMULATED)
            marks = "not full" if on_emulator else "not tools and not full and not pages"

            def start(copy: int) -> int:
                def work() -> int:
                    options = ["-q", "-m", marks, "-p", "no:cacheprovider", "--tb=line", str(file)]
                    return int(pytest.main(options, [Observer(self.copies[copy], self.tables[copy], output)]))

                return in_child(self.copies[copy], self.tables[copy].path, WORK / f"{file.stem}.log", work)

            def end(copy: int, code: int | None, seconds: float) -> None:
                if not output.is_file():
                    print(f"{file} was not observed: exit code {code} after {seconds:.0f} s", flush=True)
                    return
                seen = json.loads(output.read_text())
                self.reach |= {name: Reach(**reach) for name, reach in seen["passed"].items()}
                failed.extend(seen["failed"])

            return Job(start, end, 1200)

        begin = time.monotonic()
        run_jobs(job(file) for file in files)
        print(f"{len(self.reach)} tests observed in {time.monotonic() - begin:.0f} s", flush=True)
        for test in failed:
            print(f"left out, since it fails without a mutant: {test}", flush=True)

    def tests_of(self, mutant: Mutant) -> list[str]:
        """One test of each function first, the quickest of each; as much as there is time for."""
        site = mutant.site
        lines = {site.first_line, *range(site.line, site.last_line + 1)}
        reaching = [
            (reach.seconds, test)
            for test, reach in self.reach.items()
            if (
                not lines.isdisjoint(reach.lines.get(site.file, ()))
                if site.python
                else mutant.number in reach.switches
            )
        ]
        turns: collections.Counter[str] = collections.Counter()
        order = []
        for seconds, test in sorted(reaching):
            function = test.partition("[")[0]
            order.append((turns[function], seconds, test))
            turns[function] += 1
        chosen, total = [], 0.0
        for _, seconds, test in sorted(order):
            total += seconds
            if total > self.seconds:
                break
            chosen.append(test)
        return chosen

    # ---- the mutants

    def judge(self, report: Callable[[Mutant], None]) -> None:
        def job(mutant: Mutant) -> Job:
            tests = self.tests_of(mutant)
            mutant.tests = len(tests)
            site = mutant.site
            files = sorted({test.partition("::")[0] for test in tests})
            seconds = [self.reach[test].seconds for test in tests]

            def start(copy: int) -> int:
                folder, table = self.copies[copy], self.tables[copy]
                log = WORK / f"mutant{mutant.number}.log"
                log.write_text(mutant.line() + "\n")
                if site.python:
                    (folder / site.file).write_bytes(site.applied(self.sources[site.file]))
                else:
                    table.activate(mutant.number)

                def work() -> int:
                    options = ["-q", "-x", "-m", "not full", "-p", "no:cacheprovider", "--tb=line", *files]
                    return int(pytest.main(options, [Chosen(tests, seconds)])) if tests else 0

                return in_child(folder, table.path, log, work)

            def end(copy: int, code: int | None, took: float) -> None:
                if site.python:
                    (self.copies[copy] / site.file).write_bytes(self.sources[site.file])
                self.tables[copy].activate(0)
                mutant.seconds = took
                by_time = code in (None, -signal.SIGALRM)
                if not tests:
                    mutant.verdict = "not reached"
                else:
                    mutant.verdict = "survives" if code == 0 else "killed by time" if by_time else "killed"
                report(mutant)

            return Job(start, end, 120 + 4 * sum(seconds))

        run_jobs(job(m) for m in self.mutants if m.verdict == "not tried")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], metavar="N")
    parser.add_argument("--count", type=int, default=200, help="mutants of each seed (default: 200)")
    parser.add_argument("--seconds", type=float, default=300, help="of tests for a mutant (default: 300)")
    parser.add_argument("--only", nargs="*", default=[], metavar="PART", help="a part of a file's name")
    parser.add_argument(
        "--tests", nargs="*", default=[], metavar="PART", help="only test files with such a name"
    )
    parser.add_argument("--list", action="store_true", help="try nothing, print the mutants")
    options = parser.parse_args(arguments)

    listed = subprocess.run(
        ["git", "ls-files", "csrc", "lstm_ext"], cwd=ROOT, capture_output=True, check=True, text=True
    ).stdout.split()
    sites = [
        site
        for name in sorted(listed)
        if not name.startswith(NOT_HERE)
        if not options.only or any(part in name for part in options.only)
        for site in mutant_sites.sites(name, (ROOT / name).read_bytes())
    ]
    mutants: list[Mutant] = []
    for seed in options.seeds:
        for site in random.Random(seed).sample(sites, min(options.count, len(sites))):
            mutants.append(Mutant(len(mutants) + 1, seed, site))
    print(f"{len(mutants)} of {len(sites)} places", flush=True)
    if options.list:
        print(*(m.line() for m in mutants), sep="\n")
        return 0

    WORK.mkdir(parents=True, exist_ok=True)
    planted.WORK.mkdir(parents=True, exist_ok=True)
    import torch  # noqa: F401  once, for all children

    session = Session(mutants, options.seconds)
    session.build()
    session.observe(options.tests)

    def report(mutant: Mutant) -> None:
        print(f"{mutant.line()}: {mutant.verdict} ({mutant.tests} tests, {mutant.seconds:.0f} s)", flush=True)

    session.judge(report)
    kept = [{**vars(m), "site": m.line()} for m in mutants]
    (WORK / f"verdicts_{'_'.join(map(str, options.seeds))}.json").write_text(
        json.dumps(kept, indent=1) + "\n"
    )
    alive = 0
    for seed in options.seeds:
        of_seed = [m for m in mutants if m.seed == seed and m.verdict != "does not compile"]
        left = [m for m in of_seed if not m.verdict.startswith("killed")]
        alive += len(left)
        print(f"\nseed {seed}: {len(of_seed) - len(left)} of {len(of_seed)} killed")
        print(*(f"  {m.verdict}: {m.line()}" for m in left), sep="\n")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
