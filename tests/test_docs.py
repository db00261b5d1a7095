"""The README and the pages of docs/ name files that exist, and their links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
# Files of ours, by their endings; not those of other projects, nor places to fill in.
FILE = re.compile(r"[\w/]*\b[a-z_]\w*\.(?:py|cpp|cuh|cu|h|json|md)\b(?!\.)")
NOT_OURS = {"Python.h", "cusparse.h", "_build_info.json"}


def prose(page: Path) -> str:
    return re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files(page: Path) -> None:
    """In code spans, outside of the changelog's past."""
    folders = [ROOT / name for name in ("benchmarks", "csrc", "docs", "examples", "lstm_ext", "tests")]
    known = [f"/{path.relative_to(ROOT)}" for folder in folders for path in folder.rglob("*")]
    known += [f"/{path.name}" for path in ROOT.iterdir()]
    text = prose(page).partition("## [0.1.0]")[0]
    for span in re.findall(r"`([^`\n]+)`", text):
        for name in FILE.findall(span):
            if name in NOT_OURS or "NAME" in name or "docs/extras.md" in name:
                continue
            assert any([path.endswith(f"/{name.lstrip('/')}") for path in known]), f"{name} in `{span}`"
