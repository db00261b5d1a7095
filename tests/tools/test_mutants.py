"""The tool that changes single places of the product at random."""

import subprocess
from pathlib import Path

import mutant_sites
import mutants
import pytest

pytestmark = pytest.mark.tools

CPP = b"""// Begins with a comment.
#pragma once
constexpr int kSize = 4;
template <int n = 3>
int scaled(int a, int b) {
  if constexpr (n > 2) return 1;
  if (a < b && !(b == 0)) {
    for (int i = 0; i < kSize; ++i) a += b * 2;
    record(a);
  } else
    record(b);
  return a > 0 ? a : -b;
}
"""

PYTHON = '''"""Text with 1 < 2."""
def scaled(a: int | None, b=(1)) -> int:
    if a is None or not b:  # "é"
        raise ValueError(f"a is {a + 1}")
    log(a)
    return "é" and (a) < (b + 2)
'''


def texts(file: str, source: bytes) -> list[str]:
    return [site.changed(source).decode() for site in mutant_sites.sites(file, source)]


def test_places_of_cpp() -> None:
    found = texts("csrc/a.h", CPP)
    assert sorted(found) == sorted(
        [
            "!(a < b && !(b == 0))", "a < b || !(b == 0)", "a <= b", " (b == 0)", "b != 0", "0 + 1", "0 + 1",
            "i <= kSize", "a -= b * 2", "b + 2", "2 + 1", "a += b * 2;", "record(a);", "record(b);", "!(a > 0)",
            "a >= 0", "0 + 1", " b", "1 + 1",
        ]
    )  # fmt: skip


def test_places_of_python() -> None:
    source = PYTHON.encode()
    for site in mutant_sites.sites("lstm_ext/a.py", source):
        compile(site.applied(source), "a.py", "exec")
    assert sorted(texts("lstm_ext/a.py", source)) == sorted(
        [
            "(1 + 1)", "(not (a is None or not b))", "a is None and not b", "a is not None", "    b", "pass",
            '"é" or (a) < (b + 2)', "(a) <= (b + 2)", "b - 2", "(2 + 1)",
        ]
    )  # fmt: skip


def test_switches_of_all_places_at_once(tmp_path: Path) -> None:
    """With every switch off the program is as it was; with one on it is not. Lines keep their numbers."""
    sites = mutant_sites.sites("csrc/a.h", CPP)
    text = mutant_sites.switched(CPP, list(enumerate(sites, 1)))
    assert text.count(b"\n") == CPP.count(b"\n")
    lines = CPP.splitlines()
    for site in sites:
        assert CPP[site.begin : site.end].splitlines()[0] in lines[site.line - 1]
    (tmp_path / "mutant.h").write_text(mutants.SWITCH % {"size": len(sites) + 1})
    main = """#include <cstdio>
int main() {
  for (int a = -2; a < 3; ++a)
    for (int b = -2; b < 3; ++b) std::printf("%d %d ", scaled<1>(a, b), last);
}
"""
    (tmp_path / "a.cpp").write_text(
        '#include "mutant.h"\nint last;\nvoid record(int x) { last = 2 * last + x; }\n'
        + text.decode().replace("#pragma once", "")
        + main
    )
    subprocess.run(["g++", "-std=c++17", "a.cpp", "-o", "a"], cwd=tmp_path, check=True)
    table = mutants.Table(tmp_path / "table", len(sites) + 1)

    def says(number: int) -> bytes:
        table.activate(number)
        environment = {"LSTM_EXT_MUTANTS": str(tmp_path / "table")}
        return subprocess.run([tmp_path / "a"], env=environment, capture_output=True, check=True).stdout

    right = says(0)
    reached = table.take()
    # All but that of the branch that is not compiled for n = 1.
    assert reached == list(range(2, len(sites) + 1)) and table.take() == []
    assert not [number for number in reached if says(number) == right]


def test_jobs_end(tmp_path: Path) -> None:
    ended: dict[str, int | None] = {}

    def job(name: str, code: str, limit: float) -> mutants.Job:
        return mutants.Job(
            lambda copy: mutants.in_child(tmp_path, tmp_path, tmp_path / "log", lambda: eval(code)),
            lambda copy, status, seconds: ended.update({name: status}),
            limit,
        )

    mutants.run_jobs(
        [
            job("good", "0", 60),
            job("bad", "3", 60),
            job("slow", "mutants.time.sleep(60)", 0.5),
            job("crash", "1 / 0", 60),
        ]
    )
    assert ended == {"good": 0, "bad": 3, "slow": None, "crash": 70}
