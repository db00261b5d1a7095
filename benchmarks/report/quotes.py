"""Ratios in the prose of pages: those that were measured stand in generated blocks, which show their records.

The few that were not measured are listed here. docs/lab.md is left out: it was measured by hand.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from .pages import ROOT

PAGES = ("README.md", "docs/index.md", "docs/performance.md", "docs/guide/*.md")
NUMBER = r"\d+(?:\.\d+)?"
RATIO = re.compile(
    rf"{NUMBER}(?: (?:to|and|or) {NUMBER})?"
    r"(?:×| x\b(?! \d)| times\b(?! \d)| ?%| percent\b| as (?:fast|slow|long)\b| of torch)"
)


class Quote(NamedTuple):
    page: str
    text: str  # as in the page, with single spaces
    why: str  # it needs no record


QUOTES = (
    Quote(
        "docs/guide/frozen-inference.md",
        "With int8 it is 1.25 and 2.75 times",
        "bytes of the packed weights and the plain ones, by what is stored of each",
    ),
    Quote(
        "docs/performance.md",
        "8 µs plus 1.25 times the time to read a buffer",
        "the bound is defined so",
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


def gone(root: Path = ROOT, quotes: Sequence[Quote] = QUOTES) -> list[str]:
    """Quotes that their page no longer has."""
    return [f"{quote.page}: {quote.text}" for quote in quotes if quote.text not in prose(root / quote.page)]
