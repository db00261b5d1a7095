"""Writes into tests/full_results.md how long the tests took, file by file, from the junit.xml of a run.

    make test ARGS='--junitxml=build/test.xml'
    python tests/tools/durations.py build/test.xml [--title 'make test'] [--note '2 cores of ...']

`make durations` does both for `make test` and `make test-tools`.
"""

from __future__ import annotations

import argparse
import datetime
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from lstm_ext.native import config

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "tests" / "full_results.md"
SHOWN = 0.01  # files with a smaller share of the time are one line


def machine() -> str:
    return f"{len(os.sched_getaffinity(0))} cores of {config.processor()}"


def table(report: Path) -> str:
    """One line a file, the longest first."""
    suite = ElementTree.parse(report).getroot().find("testsuite")
    seconds: dict[str, float] = defaultdict(float)
    longest: dict[str, tuple[float, str]] = defaultdict(lambda: (0.0, ""))
    tests: dict[str, int] = defaultdict(int)
    for case in suite.iter("testcase"):
        file, time = case.get("classname").split(".test_")[0].replace(".", "/"), float(case.get("time"))
        file = f"{file}/test_{case.get('classname').split('.test_')[1]}.py"
        seconds[file] += time
        tests[file] += 1
        longest[file] = max(longest[file], (time, case.get("name")))
    total = sum(seconds.values())
    counts = {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")}
    passed = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    lines = [
        f"{passed} passed, {counts['failures'] + counts['errors']} failed, {counts['skipped']} skipped in "
        f"{float(suite.get('time')):.0f} s; {total:.0f} s of tests in all processes.",
        "",
        "| file | tests | s | the longest |",
        "|---|---|---|---|",
    ]
    short = [file for file in seconds if seconds[file] < SHOWN * total]
    for file in sorted(seconds, key=seconds.__getitem__, reverse=True):
        if file not in short:
            time, name = longest[file]
            lines.append(f"| `{file}` | {tests[file]} | {seconds[file]:.1f} | {time:.1f} s: `{name}` |")
    lines.append(
        f"| {len(short)} others | {sum(tests[f] for f in short)} | {sum(seconds[f] for f in short):.1f} | |"
    )
    return "\n".join(lines)


def written(text: str, title: str, section: str) -> str:
    """With this section in place of the one of the same title."""
    heading = f"## {title}\n"
    begin = text.find(heading)
    if begin < 0:
        return f"{text.rstrip()}\n\n{heading}\n{section}\n"
    end = text.find("\n## ", begin)
    return f"{text[:begin]}{heading}\n{section}\n{text[end:] if end >= 0 else ''}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("report", type=Path)
    parser.add_argument("--title", default="make test")
    parser.add_argument("--note", help="about the machine")
    options = parser.parse_args(arguments)
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    about = f"{datetime.date.today()}, {commit}, {options.note or machine()}: "
    RESULTS.write_text(written(RESULTS.read_text(), options.title, about + table(options.report)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
