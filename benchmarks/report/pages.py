"""Renews what the pages show of the records in benchmarks/results/: the text between the two markers of a block.

    python benchmarks/report [NAME ...]                                   # the blocks named, or all of them
    python benchmarks/report --check                                      # says which pages differ from their records
    python benchmarks/report NAME --record FILE                           # prints what a block says of another record
    python benchmarks/report NAME --pictures FOLDER [--record FILE]       # draws the pictures that go with a block

BLOCKS says of each block which page it is in, of which record it is, and what makes the text.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import harness

from . import ages, gpu, readme, suite, tables, uses
from .text import RESULTS

ROOT = RESULTS.parents[1]
DPI = 110
PERFORMANCE = "docs/performance.md"


class Block(NamedTuple):
    name: str  # in its markers: <!-- NAME:begin --> and <!-- NAME:end -->
    page: str
    # A file; of those that a pattern fits, the newest; of several patterns, all files, by name.
    record: str | tuple[str, ...]
    text: Callable[[Any], str]
    pictures: str = ""  # the module that draws them: it needs matplotlib


BLOCKS = (
    Block("faster", "README.md", uses.RECORDS, readme.faster, "readme"),
    Block("slowest", "docs/index.md", uses.RECORDS, readme.slowest),
    Block("not-faster", PERFORMANCE, uses.RECORDS, readme.not_faster),
    Block("library", "docs/guide/c-library.md", ("library_*_cores.json",), suite.library),
    Block(
        "mac-or-arm",
        "docs/start/mac-or-arm.md",
        "contract_fallback_xeon_avx512_2_cores.json",
        readme.without_kernels,
    ),
    Block("uses", PERFORMANCE, (*uses.RECORDS, readme.TORCHRL), readme.by_processor),
    Block("gpu", PERFORMANCE, "gpu_*.json", gpu.text),
    Block("cost", PERFORMANCE, "options_cpu.json", tables.cost),
)


def read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path}: expected a record of benchmarks/, got: {error}") from None


def record_of(block: Block) -> Any:
    """None where a pattern fits no file."""
    if isinstance(block.record, tuple):
        paths = sorted({path for pattern in block.record for path in RESULTS.glob(pattern)})
        return {path.name: read(path) for path in paths}
    found = [read(path) for path in RESULTS.glob(block.record)]
    dates = [
        (gpu.benchmark_of(record) or record)["facts"]["date"] if len(found) > 1 else "" for record in found
    ]
    return found[dates.index(max(dates))] if found else None


def given_record(block: Block, path: Path) -> Any:
    record = read(path)
    return {path.name: record} if isinstance(block.record, tuple) else record


def split(page: Path, name: str) -> tuple[str, str, str]:
    """The text before the block, with its first marker; in it; and after it, with its last marker."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    text = page.read_text()
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise SystemExit(f"{page}: expected the line {begin}, and below it {end}, once each")
    head, rest = text.split(begin)
    inside, tail = rest.split(end)
    return head + begin, inside.strip("\n"), end + tail


def renew(block: Block, root: Path = ROOT, check: bool = False) -> bool:
    """Whether the page differed."""
    page, text = root / block.page, block.text(record_of(block))
    head, shown, tail = split(page, block.name)
    differs = ages.differs(shown, text)
    if differs and not check:
        page.write_text(f"{head}\n{text}\n{tail}")
    return differs


def draw(block: Block, record: Any, folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in importlib.import_module(f"report.{block.pictures}").pictures(record):
        # Its label says what it shows, for the test that looks whether it is up to date.
        figure.savefig(folder / f"{name}.png", dpi=DPI, metadata={"Description": figure.get_label()})
        print(folder / f"{name}.png")


def main(arguments: list[str] | None = None) -> int:
    names = [block.name for block in BLOCKS]
    parser = harness.parser_of(__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(names))
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with 1 where a page differs"
    )
    parser.add_argument(
        "--record", type=Path, metavar="FILE", help="of one block: take this record, and print"
    )
    parser.add_argument(
        "--pictures", type=Path, metavar="FOLDER", help="draw its pictures, in place of its text"
    )
    given = parser.parse_args(arguments)
    if unknown := set(given.names) - set(names):
        parser.error(f"expected names among {', '.join(names)}, got {', '.join(sorted(unknown))}")
    if given.record and len(given.names) != 1:
        parser.error(f"--record: expected one NAME, got {len(given.names)}")
    differ = []
    for block in [block for block in BLOCKS if block.name in (given.names or names)]:
        if given.pictures:
            if block.pictures:
                draw(
                    block,
                    given_record(block, given.record) if given.record else record_of(block),
                    given.pictures,
                )
        elif given.record:
            print(block.text(given_record(block, given.record)))
        elif renew(block, check=given.check):
            differ.append(f"{block.page}: {block.name}")
    if differ:
        if not (given.check or ages.has_history()):
            print(
                "without the history of git: what is renewed has no mark of how many commits there are since"
            )
        print(f"{'not as in the record' if given.check else 'renewed'}:", *differ, sep="\n  ")
        if given.check:
            print("`python benchmarks/report` writes them from the records")
    return int(given.check and bool(differ))
