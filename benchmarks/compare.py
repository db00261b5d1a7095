"""Compare two files of bench.py: a line for each case that both have, and the geometric mean of each group.

    python benchmarks/compare.py BEFORE.json AFTER.json

"before / after" is the ratio of the medians: above 1, the second file is faster, or needs less memory. "against torch"
is the same ratio after each file's figures are divided by its own of torch, which takes out how fast the machine was
on the day. A star says that the quartiles of the two do not overlap: less may be noise.

Exits with 1 where a file cannot be read, and with 0 whatever the figures say.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import harness
import records
from records import Result

FACTS = ("cpu", "cores", "torch", "lstm_ext", "lstm_ext_cpu_capability", "git_commit", "python")


@dataclass
class Line:
    group: str
    title: str
    side: str
    unit: str
    before: float
    after: float
    ratio: float
    against_torch: float | None
    apart: bool


def compared(before: Result, after: Result) -> list[Line]:
    """Of two results of one case, a line for each side that both have."""
    lines = []
    for name, a in before["sides"].items():
        b = after["sides"].get(name)
        if b is None:
            continue
        of_torch = [records.ratio(result, name) for result in (before, after)]
        against = (
            of_torch[1] / of_torch[0] if None not in of_torch and name != records.base_of(name) else None
        )
        apart = b["third_quartile"] < a["first_quartile"] or a["third_quartile"] < b["first_quartile"]
        title, unit = records.title(before), before["unit"]
        medians = a["median"], b["median"]
        ratio = a["median"] / b["median"]
        lines.append(Line(before["group"], title, name, unit, *medians, ratio, against, apart))
    return lines


def amount(value: float, unit: str) -> str:
    return f"{value / harness.MEBIBYTE:.4g} MiB" if unit == "bytes" else f"{value:.4g} {unit}"


def print_lines(lines: list[Line]) -> None:
    width = max(len(line.title) for line in lines)
    side = max(max(len(line.side) for line in lines), 4)
    print(
        f"{'case':<{width}}  {'side':<{side}}  {'before':>11}  {'after':>11}  before / after  against torch"
    )
    for line in lines:
        against = f"{line.against_torch:.2f}" if line.against_torch is not None else ""
        times = "".join(f"  {amount(value, line.unit):>11}" for value in (line.before, line.after))
        ratio = f"{line.ratio:13.2f}{'*' if line.apart else ' '}"
        print(f"{line.title:<{width}}  {line.side:<{side}}{times}  {ratio}  {against:>13}".rstrip())


def print_means(lines: list[Line]) -> None:
    print(f"\n{'group':<11}  {'side':<20}  cases  before / after  against torch   (geometric means)")
    groups: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        groups.setdefault((line.group, line.side), []).append(line)
    for (group, side), found in groups.items():
        against = [line.against_torch for line in found if line.against_torch is not None]
        text = f"{harness.geometric_mean(against):.2f}" if against else ""
        mean = harness.geometric_mean(line.ratio for line in found)
        print(f"{group:<11}  {side:<20}  {len(found):5}  {mean:14.2f}  {text:>13}".rstrip())


def difference_of_facts(before: Result, after: Result) -> list[str]:
    a, b = before["facts"], after["facts"]
    return [f"{name}: {a.get(name)} -> {b.get(name)}" for name in FACTS if a.get(name) != b.get(name)]


def main(arguments: list[str] | None = None) -> int:
    parser = harness.parser_of(__doc__)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    options = parser.parse_args(arguments)
    both = [records.read(path) for path in (options.before, options.after)]
    before, after = ({records.key(r): r for r in record["results"]} for record in both)

    for line in difference_of_facts(*both):
        print(line)
    common = [key for key in before if key in after]
    lines = [line for key in common for line in compared(before[key], after[key])]
    if lines:
        print_lines(lines)
        print_means(lines)
    else:
        print("no case and side is in both files")
    for path, here, there in ((options.before, before, after), (options.after, after, before)):
        only = [records.title(result) for key, result in here.items() if key not in there]
        if only:
            print(f"\nonly in {path}, {len(only)} cases:", *only, sep="\n  ")
    return 0


if __name__ == "__main__":
    sys.exit(main())
