"""The README and the pages of docs/ name files that exist, and their links lead somewhere."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
from pathlib import Path

import pytest
import torch
from matrix import support
from matrix.routes import ROUTES

import lstm_ext

ROOT = Path(__file__).resolve().parents[2]
TOP = [ROOT / name for name in ("README.md", "CHANGELOG.md", "SECURITY.md")]
PAGES = [*TOP, *sorted((ROOT / "docs").rglob("*.md"))]
# Files of ours, by their endings; not those of other projects, nor what is made here, nor places to fill in.
FILE = re.compile(r"[\w/]*\b[a-z_]\w*\.(?:py|cpp|cuh|cu|h|json|md)\b(?!\.)")
NOT_OURS = {"Python.h", "cusparse.h", "_build_info.json"}


def prose(page: Path) -> str:
    return re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.pages
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.pages
def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 700


@pytest.mark.pages
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_files(page: Path) -> None:
    """In code spans, outside of the changelog's past."""
    folders = [ROOT / name for name in ("benchmarks", "csrc", "docs", "examples", "lstm_ext", "tests")]
    known = [f"/{path.relative_to(ROOT)}" for folder in folders for path in folder.rglob("*")]
    known += [f"/{path.name}" for path in ROOT.iterdir()]
    # FILE leaves out the point in front of a name.
    hidden = [path for folder in (".ci", ".github") for path in (ROOT / folder).rglob("*")]
    known += [f"/{path.relative_to(ROOT)}".replace("/.", "/") for path in hidden]
    text = prose(page).partition("## [0.1.0]")[0]
    for span in re.findall(r"`([^`\n]+)`", text):
        for name in FILE.findall(span):
            if name in NOT_OURS or "NAME" in name or "docs/extras.md" in name:
                continue
            assert any([path.endswith(f"/{name.lstrip('/')}") for path in known]), f"{name} in `{span}`"


@pytest.mark.pages
def test_every_public_name_is_in_the_reference() -> None:
    pages = "".join([page.read_text() for page in (ROOT / "docs" / "api").glob("*.md")])
    documented = set(re.findall(r"^\.\. auto\w+:: (\S+)$", pages, flags=re.MULTILINE))
    no_faces = ("__init__", "options")  # the table of options lies below the calls
    faces = {
        f"lstm_ext.{path.stem}" for path in (ROOT / "lstm_ext").glob("*.py") if path.stem not in no_faces
    }
    names = {f"lstm_ext.{name}" for name in lstm_ext.__all__ if name != "__version__"}
    assert documented == faces | names


@pytest.mark.pages
def test_the_reference_says_what_each_name_is_without_a_site() -> None:
    """In the words of the docstring."""
    for page in (ROOT / "docs" / "api").glob("*.md"):
        for kind, name in re.findall(r"^\.\. auto(\w+):: (\S+)$", page.read_text(), flags=re.MULTILINE):
            found = (
                importlib.import_module(name) if kind == "module" else getattr(lstm_ext, name.split(".")[1])
            )
            summary = inspect.getdoc(found).partition("\n\n")[0].replace("``", "`")
            assert f"{re.sub(':[a-z]+:`', '`', summary)}\n" in prose(page), (page.name, name)


@pytest.mark.pages
def test_names_of_torch_that_the_site_links_to_exist() -> None:
    lines = (ROOT / "docs" / "names_torch.txt").read_text().splitlines()
    assert lines[0] == "# Sphinx inventory version 1"
    for line in lines[3:]:
        name, kind, page = line.split()
        found = importlib.import_module("torch.export") if name.startswith("torch.export.") else torch
        for part in name.split(".")[2 if found is not torch else 1 :]:
            found = importlib.import_module("torch.onnx") if part == "onnx" else getattr(found, part)
        assert isinstance(found, type) == (kind == "class") and page.endswith(".html"), line


def test_dir_has_public_names_only() -> None:
    """And each of them can be had; the modules beside them can be imported all the same."""
    submodules = {"info", "onnx", "ops", "selftest"}
    for name in sorted(submodules):
        importlib.import_module(f"lstm_ext.{name}")
    assert set(dir(lstm_ext)) == {*lstm_ext.__all__, *submodules}
    for name in ("functional", "reference", "onnx", "ops", "info"):
        module = importlib.import_module(f"lstm_ext.{name}")
        assert dir(module) == sorted(module.__all__)
        assert all([hasattr(module, public) for public in dir(module)])
    assert all([hasattr(lstm_ext, public) for public in dir(lstm_ext)])
    for name in ("call", "layer", "native", "nn"):
        assert getattr(lstm_ext, name) is importlib.import_module(f"lstm_ext.{name}")


def test_the_table_of_routes() -> None:
    """What docs/support.md shows is what the matrix has, and the matrix has a case of each option."""
    assert support.shown() == support.table(), "python -m tests.matrix --support writes it"
    assert support.missing(ROUTES["eager"]) == []
