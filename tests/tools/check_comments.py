"""Refuses comments in csrc/ and lstm_ext/ that begin as fragments: `make lint` runs it.

It prints `file:line: the comment` for each; the exit status is 1 then. It looks at the sentences of the first line of a
comment or docstring, as far as they are on that line:

- None begins with "Of", "That of", "What" or "As".
- One that begins with "Where" has a comma, as in "Where a mask is given, it is applied first." Without a comma it is
  taken for a fragment, as in "Where the rows begin."
- A comment behind code on its line does not begin with "of".
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("csrc", "lstm_ext")
PYTHON = {".py", ".pyi"}
CXX = {".cpp", ".h", ".def", ".cu", ".cuh"}
REFUSED = ("Of ", "That of ", "What ", "As ")
# Comments, and the literals in which `//` starts none.
CXX_TOKEN = re.compile(
    r"""R"(?P<raw>[^(\s]*)\(.*?\)(?P=raw)"|"(?:\\.|[^"\\\n])*"|(?<![0-9a-fA-F])'(?:\\.|[^'\\\n])+'|(?P<block>/\*.*?\*/)|(?P<line>//[^\n]*)""",
    re.DOTALL,
)

# (the line's number, the comment's text, whether code stands before it on its line)
Comment = tuple[int, str, bool]


def python_comments(source: str) -> Iterator[Comment]:
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string.lstrip("# "), bool(token.line[: token.start[1]].strip())


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node, clean=False)
            if text:
                yield node.body[0].lineno, text.lstrip().partition("\n")[0]


def cxx_comments(source: str) -> Iterator[Comment]:
    for found in CXX_TOKEN.finditer(source):
        if text := found["line"] or found["block"]:
            before = source[source.rfind("\n", 0, found.start()) + 1 : found.start()]
            first = text.partition("\n")[0]
            yield source.count("\n", 0, found.start()) + 1, first.strip("/*! "), bool(before.strip())


def first_lines(comments: Iterator[Comment]) -> Iterator[Comment]:
    """Drops the later lines of a block of comments that stand alone on their lines."""
    last = -1
    for number, text, trailing in comments:
        if trailing or number != last + 1:
            yield number, text, trailing
        last = -1 if trailing else number


def is_refused(line: str, is_trailing: bool = False) -> bool:
    sentences = re.split(r"(?<=[.!?]) +", line)
    fragments = [s for s in sentences if s.startswith(REFUSED) or (s.startswith("Where ") and "," not in s)]
    return bool(fragments) or (is_trailing and line.startswith("of "))


def problems(name: str, source: str) -> list[str]:
    """`name:line: comment` for each refused comment."""
    is_python = Path(name).suffix in PYTHON
    comments = python_comments(source) if is_python else cxx_comments(source)
    found = [(number, text) for number, text, trailing in first_lines(comments) if is_refused(text, trailing)]
    if is_python:
        found += [(number, text) for number, text in docstrings(source) if is_refused(text)]
    return [f"{name}:{number}: {text}" for number, text in sorted(found)]


def main() -> int:
    listed = subprocess.run(
        ["git", "ls-files", *FOLDERS], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    found = []
    for name in listed:
        path = ROOT / name
        if path.suffix in PYTHON | CXX and path.is_file():
            found += problems(name, path.read_text())
    for problem in found:
        print(problem)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
