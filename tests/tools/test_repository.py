"""The files that GitHub, pre-commit and citation tools read are complete, and name what exists."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.pages

ROOT = Path(__file__).resolve().parents[2]
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
TEMPLATES = [*FORMS, ROOT / ".github" / "pull_request_template.md"]
# The elements of a form that take an answer, and what each must have beside a label.
ANSWERS = {"input": (), "textarea": (), "dropdown": ("options",), "checkboxes": ("options",)}


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def problems_of(form: Any) -> list[str]:
    """What GitHub would refuse, and what each form has to ask for."""
    found = [f"no {key}" for key in ("name", "description", "body") if not form.get(key)]
    questions = [element for element in form.get("body", ()) if element["type"] != "markdown"]
    for element in questions:
        needed = ANSWERS.get(element["type"])
        if needed is None:
            found.append(f"unknown type {element['type']}")
            continue
        attributes = element.get("attributes", {})
        found += [f"{element.get('id')}: no {key}" for key in ("label", *needed) if not attributes.get(key)]
    ids = [element.get("id") for element in questions]
    if None in ids or len(ids) != len(set(ids)):
        found.append(f"ids that are missing or not unique: {ids}")
    asked = [
        element
        for element in questions
        if "python -m lstm_ext.info" in element["attributes"].get("label", "")
        and element.get("validations", {}).get("required") is True
    ]
    return found if asked else [*found, "does not require the output of lstm_ext.info"]


@pytest.mark.parametrize("form", FORMS, ids=lambda path: path.stem)
def test_issue_forms(form: Path) -> None:
    assert problems_of(load(form)) == []


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.name)
def test_templates_name_what_exists(template: Path) -> None:
    text = template.read_text()
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in re.findall(r"`make ([a-z-]+)", text):
        assert target in targets, target
    for page, heading in re.findall(r'(docs/[\w/]+\.md)(?:[^".]*?under\s+"([^"]+)")?', text):
        assert (ROOT / page).is_file(), page
        assert not heading or f"# {' '.join(heading.split())}\n" in (ROOT / page).read_text(), heading


def test_hooks_are_the_linters_of_this_project() -> None:
    """All those of `make lint` that take seconds, and nothing from another host."""
    repositories = load(ROOT / ".pre-commit-config.yaml")["repos"]
    assert [repository["repo"] for repository in repositories] == ["local"]
    hooks = repositories[0]["hooks"]
    assert all([hook["language"] == "system" and hook["id"] and hook["name"] for hook in hooks])
    commands = " ".join([hook["entry"] for hook in hooks])
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    linters = ["ruff check", "ruff format", "lint-imports", "clang-format", "check_comments.py"]
    for linter in linters:
        assert linter in recipe[1] and linter in commands, linter
    for program in re.findall(r"[\w/]+\.py", commands):
        assert (ROOT / program).is_file(), program


def test_citation() -> None:
    citation, project = load(ROOT / "CITATION.cff"), (ROOT / "pyproject.toml").read_text()
    assert citation["cff-version"] == "1.2.0" and citation["message"] and citation["authors"][0]["name"]
    assert f'name = "{citation["title"]}"' in project
    assert f'description = "{citation["abstract"]}"' in project
    assert f'license = "{citation["license"]}"' in project
