"""The ratios that are written by hand in the prose of pages: each names its record, or why it needs none.

A generated block shows its record anyway. The lab is left out, since it is a log of what was measured by hand.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import harness

from . import uses
from .ages import age
from .pages import RESULTS, ROOT, read

PAGES = ("README.md", "docs/index.md", "docs/performance.md", "docs/guide/*.md")
NUMBER = r"\d+(?:\.\d+)?"
RATIO = re.compile(
    rf"{NUMBER}(?: (?:to|and|or) {NUMBER})?"
    r"(?:×| x\b(?! \d)| times\b(?! \d)| ?%| percent\b| as (?:fast|slow|long)\b| of torch)"
)
CALCULATED = {"mean": harness.geometric_mean, "least": min, "greatest": max}


class Figure(NamedTuple):
    record: str  # its file in benchmarks/results/
    use: str  # a key of uses.USES
    of: str  # one of CALCULATED


class Quote(NamedTuple):
    page: str
    text: str  # as in the page, with single spaces; its numbers are the figures, in this order
    figures: Sequence[Figure] = ()
    why: str = ""  # in place of figures: what the numbers are, where nothing was measured


QUOTES = (
    Quote(
        "docs/guide/frozen-inference.md",
        "With int8 it is 1.25 and 2.75 times",
        why="bytes of the packed weights and the plain ones, by what is stored of each",
    ),
    Quote(
        "docs/performance.md",
        "8 µs plus 1.25 times the time to read a buffer",
        why="the bound is defined so",
    ),
)


def prose(page: Path) -> str:
    """A page without code, comments and generated blocks, with single spaces."""
    hidden = r"```.*?```|<!-- (\S+):begin -->.*?<!-- \1:end -->|<!--.*?-->"
    return " ".join(re.sub(hidden, " ", page.read_text(), flags=re.DOTALL).split())


def unexplained(root: Path = ROOT, quotes: Sequence[Quote] = QUOTES) -> list[str]:
    """Ratios in the prose of pages that no quote has."""
    found = []
    for path in sorted({path for pattern in PAGES for path in root.glob(pattern)}):
        name, text = str(path.relative_to(root)), prose(path)
        for quote in quotes:
            if quote.page == name:
                text = text.replace(quote.text, "…")
        found += [f"{name}: {text[max(0, m.start() - 40) : m.end() + 20]}" for m in RATIO.finditer(text)]
    return found


def shown(figure: Figure) -> float:
    record = read(RESULTS / figure.record)
    name = uses.FILE.fullmatch(figure.record)
    if name is None:
        raise SystemExit(f"{figure.record}: expected a name like suite_epyc_zen5_2_cores.json")
    return CALCULATED[figure.of](uses.OF[name["kind"]](record)[figure.use])


def wrong(root: Path = ROOT, quotes: Sequence[Quote] = QUOTES) -> list[str]:
    """Quotes that their page no longer has, whose figures are others in the record, or whose record is old."""
    found = []
    for quote in quotes:
        if quote.text not in prose(root / quote.page):
            found.append(f"{quote.page}: no longer has {quote.text!r}")
        if bool(quote.figures) == bool(quote.why):
            found.append(f"{quote.page}: {quote.text!r} needs either figures or a reason")
        numbers = re.findall(NUMBER, quote.text) if quote.figures else []
        for number, figure in zip(numbers, quote.figures, strict=False):
            digits = len(number.partition(".")[2])
            if f"{shown(figure):.{digits}f}" != number:
                found.append(
                    f"{quote.page}: {number} is {shown(figure):.4g} in {figure.record}, {figure.use}"
                )
            if (why := age(read(RESULTS / figure.record)["facts"])) and "old" not in quote.text:
                found.append(f"{quote.page}: {quote.text!r} is {why}: say so, or measure again")
        if len(numbers) != len(quote.figures):
            found.append(
                f"{quote.page}: {quote.text!r} has {len(numbers)} numbers for {len(quote.figures)} figures"
            )
    return found
