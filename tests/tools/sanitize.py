"""Runs the tests that reach C++ under sanitizers: `make sanitize`, an hour on two cores.

    python tests/tools/sanitize.py                  # all
    python tests/tools/sanitize.py address [ARG...] # the extension's tests, or what pytest is asked for
    python tests/tools/sanitize.py driver           # tests/cpu/driver: the CPU kernels without torch, 2 to 8 workers

The first builds a copy of the tree for the address and the undefined-behaviour sanitizer. Before the tests, two
functions of that build that are wrong have to be reported. The driver runs under these two, which see each load of its
registers in plain C++, and under the thread sanitizer, which has to report each wrong memory order of
csrc/cpu/barrier.h. The exit code is 1 if anything is reported, or is not reported that should be.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import planted

ROOT = planted.ROOT
BUILD = ROOT / "build" / "sanitize"
SANITIZERS = "-fsanitize=address,undefined"
ADDRESS = [
    "-O1",
    "-g1",
    SANITIZERS,
    "-fno-sanitize-recover=undefined",
    "-fno-wrapv",  # Python's own flags have -fwrapv, with which signed numbers may overflow
    # A call for each access, and none for null, which the address sanitizer sees: else GCC takes a quarter of an hour.
    "--param=asan-instrumentation-with-call-threshold=0",
    "-fno-sanitize=null",
]
THREAD = ["-O1", "-g1", "-fsanitize=thread"]
SETS = ("avx512",)  # beside AVX2

# What calls the kernels. Tests of times and of machine code have nothing to say here.
FOLDERS = {
    "cpu": "kernels options_kernels frozen_bytes threads low_precision",
    "call": "packed lengths",
    "matrix": "matrix faults",
    "nn": "frozen streaming forward cell serialization",
    "layer": "ops",
    "fuzz": "fuzz",
}
TESTS = tuple(f"tests/{folder}/test_{name}.py" for folder, names in FOLDERS.items() for name in names.split())
LEFT_OUT = (
    "tests/cpu/test_kernels.py::test_no_newer_instructions_outside_the_sets",
    "tests/cpu/test_kernels.py::test_calls_take_no_new_memory",
    "tests/cpu/test_threads.py::test_others_run_during_a_kernel",
    "tests/cpu/test_threads.py::test_workers_that_share_a_core_become_one",
)
LONG = ("tests/cpu/test_frozen_bytes.py",)  # here the full tier runs too

# Two mistakes, compiled and linked as all the rest is.
CANARY = """#include "contract/visibility.h"
extern "C" LSTM_EXT_PUBLIC int lstm_ext_read_beyond(int n) {
  volatile int* const numbers = new int[n]();
  const int beyond = numbers[n];
  delete[] numbers;
  return beyond;
}
extern "C" LSTM_EXT_PUBLIC int lstm_ext_overflow(int n) { return n + 0x7fffffff; }
"""
CALL = """import ctypes, sys
from lstm_ext.native import loader
getattr(ctypes.CDLL(loader.status().ops_path), sys.argv[1])(4)"""
CANARIES = {"lstm_ext_read_beyond": "heap-buffer-overflow", "lstm_ext_overflow": "signed integer overflow"}


# Blocks of scratch memory that are kept, and may be larger than asked for, would hide what is read beyond them.
SCRATCH = ("kLeastBytes = size_t{64} << 10;", "kLeastBytes = ~size_t{};")

# In csrc/cpu/barrier.h. Without one of them, a worker may go on before it sees what another one has written.
ORDERS = ("__ATOMIC_ACQ_REL", "__ATOMIC_RELEASE", "__ATOMIC_ACQUIRE")
# Registers in plain C++, whose loads and stores are all seen, with and without a tile engine.
SOFTWARE = ["-DLSTM_EXT_ISA_SOFTWARE", '-DLSTM_EXT_SOFTWARE_SIMD="tile_engine/simd.h"', "-march=native"]
DRIVERS = {"registers": SOFTWARE, "engine": [*SOFTWARE, '-DLSTM_EXT_TILE_ENGINE="tile_engine/engine.h"']}
DRIVER = (
    "tests/cpu/driver/main.cpp",
    *(f"csrc/cpu/{name}.cpp" for name in ("cost", "layout", "plan", "wait_limit")),
)


def runtime(name: str) -> str:
    """The path of a library of the compiler's."""
    return subprocess.run(
        ["g++", f"-print-file-name={name}"], capture_output=True, check=True, text=True
    ).stdout.strip()


class Sanitized(planted.Copy):
    """A copy that is built for the address and the undefined-behaviour sanitizer."""

    def __init__(self) -> None:
        super().__init__("address", every_set=False, also=SETS)
        config = self.folder / "lstm_ext" / "native" / "config.py"
        more = f"\nCOMPILE_FLAGS += {ADDRESS!r}\nLINK_FLAGS += {[SANITIZERS]!r}\n"
        config.write_text(config.read_text() + more)
        (self.folder / "csrc" / "torch" / "canary.cpp").write_text(CANARY)
        old, new = SCRATCH
        path = self.folder / "csrc" / "torch" / "scratch.cpp"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))
        self.reports = self.folder.with_name("address-reports")

    def run(self, command: Sequence[str]) -> tuple[int, str]:
        """The exit code, and what was reported by the process or one of those that it started."""
        self.reports.mkdir(exist_ok=True)
        for old in self.reports.iterdir():
            old.unlink()
        options = f"log_path={self.reports / 'report'}"
        said = self.log.stat().st_size
        code = planted.run(
            [sys.executable, *command],
            self.folder,
            self.log,
            LD_PRELOAD=f"{runtime('libasan.so')} {runtime('libstdc++.so.6')}",
            # torch and Python free little at their end, and tests ask for more memory than there is.
            ASAN_OPTIONS=f"{options}:detect_leaks=0:allocator_may_return_null=1",
            UBSAN_OPTIONS=f"{options}:print_stacktrace=1",
        )
        # The undefined-behaviour sanitizer beside the other one writes to stderr.
        lines = self.log.read_text(errors="replace")[said:].splitlines()
        overflows = [line for line in lines if "runtime error:" in line]
        return code, "\n".join([*[path.read_text() for path in sorted(self.reports.iterdir())], *overflows])


def address(arguments: Sequence[str] = ()) -> bool:
    """Whether all is well."""
    planted.WORK.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    copy = Sanitized()
    if not copy.build():
        print(f"the copy does not build: {copy.log}")
        return False
    print(f"built ({time.monotonic() - start:.0f} s)", flush=True)
    for function, expected in CANARIES.items():
        code, report = copy.run(["-c", CALL, function])
        if code == 0 or expected not in report:
            print(f"{function} gives no report of a {expected}: {copy.log}")
            return False
    pytest = ["-m", "pytest", "-q", "--timeout", "3000", "-p", "no:faulthandler", "-p", "no:cacheprovider"]
    runs = [list(arguments)]
    if not arguments:
        deselected = [f"--deselect={test}" for test in LEFT_OUT]
        runs = [["-n", "2", "--dist", "worksteal", "-m", "not full", *TESTS, *deselected]]
        runs += [["-n", "2", "-m", "full", *LONG]]
    well = True
    for run in runs:
        start = time.monotonic()
        code, report = copy.run([*pytest, *run])
        well = well and code == 0 and not report
        said = copy.log.read_text().rstrip().splitlines()[-1]
        print(f"{said} ({time.monotonic() - start:.0f} s, {len(report)} characters of reports)", flush=True)
        print(report, end="")
    return well


def driver(name: str, flags: Sequence[str] = THREAD, order: str | None = None) -> Path:
    """The program of DRIVERS, with one memory order of the barrier relaxed."""
    program = BUILD / f"teams-{name}{order or ''}"
    first = []
    if order is not None:
        header = (ROOT / "csrc" / "cpu" / "barrier.h").read_text()
        assert header.count(order) == 1
        wrong = program.with_suffix(".wrong") / "cpu" / "barrier.h"
        wrong.parent.mkdir(parents=True, exist_ok=True)
        wrong.write_text(header.replace(order, "__ATOMIC_RELAXED"))
        first = [f"-I{wrong.parents[1]}"]
    BUILD.mkdir(parents=True, exist_ok=True)
    command = [
        "g++",
        "-std=c++17",
        *flags,
        *first,
        *DRIVERS[name],
        "-Icsrc",
        "-Itests/cpu",
    ]
    subprocess.run([*command, *DRIVER, "-pthread", "-o", str(program)], cwd=ROOT, check=True)
    return program


def run_driver(program: Path, *cases: str) -> tuple[int, str]:
    """The exit code, and what was said."""
    done = subprocess.run(
        [str(program), *cases],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "TSAN_OPTIONS": "halt_on_error=1"},
    )
    return done.returncode, done.stdout


def drivers() -> bool:
    """Whether all is well."""
    well = True

    def judge(what: str, flags: Sequence[str], name: str, order: str | None = None, *cases: str) -> None:
        nonlocal well
        start = time.monotonic()
        code, said = run_driver(driver(name, flags, order), *cases)
        right = code == 0 if order is None else code != 0 and "data race" in said
        well = well and right
        if order is None or not right:
            print(said, end="")
        print(f"{what}: {'well' if right else 'FAILED'} ({time.monotonic() - start:.0f} s)", flush=True)

    for name in DRIVERS:
        judge(f"{name}, threads", THREAD, name)
        judge(f"{name}, addresses", ADDRESS, name)
    for order in ORDERS:
        judge(f"{order} relaxed, which has to be reported", THREAD, "registers", order, "members")
    return well


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("which", nargs="?", choices=("address", "driver"))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARG", help="for pytest")
    options = parser.parse_args(arguments)
    well = options.which == "address" or drivers()
    return 0 if (options.which == "driver" or address(options.arguments)) and well else 1


if __name__ == "__main__":
    sys.exit(main())
