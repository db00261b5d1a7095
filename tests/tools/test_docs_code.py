"""The code blocks of the README and of the pages of docs/ run.

What a block is for stands behind its fence. Each `python` block runs alone, as a reader pastes it: with no names but
its own, in an empty folder. What it prints is the `text` block right below it. `python compat` runs in tests/compat,
where the libraries are. Commands (`sh`) have to name targets, modules and files that exist. Other `text`, `cpp` and
`{eval-rst}` do not run; tests/native_library has those of the C library.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import io
import operator
import re
import shlex
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import lstm_ext
import lstm_ext.onnx

pytestmark = pytest.mark.pages

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "tests/simt").rglob("*.md")),
]
# The emulator's page: tests/simt/test_readme.py runs its blocks.
ELSEWHERE = {"tests/simt/README.md": {"python"}}
NOT_RUN = {"dockerfile", "text", "cpp", "cmake", "{eval-rst}"}
# A fence with what stands behind it, to its end, and the fence with its output.
BLOCK = re.compile(r"^```([^\n`]*)\n(.*?)^```$(?:\n+(?=```text\n(.*?)^```$))?", re.DOTALL | re.MULTILINE)
MOST_LINES = 15  # of a block of Python: what is longer belongs into examples/


class Block(NamedTuple):
    kind: str
    code: str
    line: int
    shown: str  # the text block right below it, or nothing


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(text: str) -> Iterator[Block]:
    for found in BLOCK.finditer(text):
        yield Block(found[1], found[2], text.count("\n", 0, found.start(2)) + 1, found[3] or "")


def run(code: str, line: int, page: str, names: dict) -> str:
    """Run the code as if it stood at this line of the page: what it prints. An error is one line that says where."""
    at = line
    printed = io.StringIO()
    try:
        # So that each line of the code has its number in the page.
        program = compile("\n" * (line - 1) + code, page, "exec")
        with contextlib.redirect_stdout(printed), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(program, names)
    except Exception as error:
        if isinstance(error, SyntaxError):
            at = error.lineno or at
        traceback = error.__traceback__
        while traceback is not None:
            if traceback.tb_frame.f_code.co_filename == page:
                at = traceback.tb_lineno
            traceback = traceback.tb_next
        message = str(error).strip().split("\n")[0]
        pytest.fail(f"{page}:{at}: {type(error).__name__}: {message}", pytrace=False)
    return printed.getvalue()


def run_alone(block: Block, page: str) -> None:
    torch.manual_seed(0)
    printed = run(block.code, block.line, page, {"__name__": "__main__"})
    if printed != block.shown:
        pytest.fail(
            f"{page}:{block.line}: the block prints\n{printed}and the page shows\n{block.shown}",
            pytrace=False,
        )


def commands(code: str) -> Iterator[tuple[int, list[str]]]:
    """The words of each command, with its line in the block, of which those that a backslash joins are one."""
    for number, line in enumerate(code.replace("\\\n", " ").splitlines()):
        for part in line.split(" && "):
            words = shlex.split(part, comments=True)
            while words and re.match(r"[A-Z_]+=", words[0]):
                del words[0]  # a variable of the environment
            if words:
                yield number, words


def problem_of(words: list[str]) -> str | None:
    """What is wrong with a command, as far as that can be seen without running it."""
    program, *arguments = words
    if program == "make":
        targets = [a for a in arguments if "=" not in a]
        known = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        unknown = [target for target in targets if target not in known]
        return f"no such target: {' '.join(unknown)}" if unknown else None
    if program in ("python", "torchrun"):
        scripts = [a for a in arguments if a.endswith(".py")]
        missing = [script for script in scripts if not (ROOT / script).is_file()]
        if missing:
            return f"no such file: {' '.join(missing)}"
        if "-m" in arguments:
            module = arguments[arguments.index("-m") + 1]
            if module.startswith("simt"):
                return (
                    None
                    if (ROOT / "tests" / f"{module.replace('.', '/')}.py").is_file()
                    else "no such module"
                )
            if importlib.util.find_spec(module) is None:
                return f"no such module: {module}"
        return None
    if program == "pip":
        groups = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
        asked = re.findall(r"\[(\w+)\]", " ".join(arguments))
        return None if set(asked) <= set(groups) else f"no such optional group: {' '.join(asked)}"
    if program in ("apt", "dnf"):
        return None
    return f"the test does not know the command {program}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.backends.mkldnn.rnn.fp32_precision  # a page shows how it is set
    try:
        for block in blocks(page.read_text()):
            if block.kind == "python" and block.kind not in ELSEWHERE.get(name_of(page), ()):
                folder = tmp_path / str(block.line)
                folder.mkdir()
                monkeypatch.chdir(folder)
                run_alone(block, name_of(page))
    finally:
        torch.backends.mkldnn.rnn.fp32_precision = before


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_blocks_say_what_they_are(page: Path) -> None:
    text = page.read_text()
    assert "<!-- setup" not in text
    for kind, code, line, _ in blocks(text):
        if kind.startswith("python"):
            lines = code.count("\n")
            assert lines <= MOST_LINES, (
                f"{name_of(page)}:{line}: {lines} lines of Python, {MOST_LINES} at most"
            )
        if kind == "sh":
            for number, words in commands(code):
                problem = problem_of(words)
                assert problem is None, f"{name_of(page)}:{line + number}: {problem}"
        else:
            known = {"python", "python compat"} | NOT_RUN
            assert kind in known, f"{name_of(page)}:{line - 1}: a block of the kind '{kind}'"
    # Indented code says nothing of itself. In a list, the indentation means something else.
    outside = BLOCK.sub(lambda found: "\n" * found[0].count("\n"), text).split("\n")
    in_list = False
    for number, line in enumerate(outside, 1):
        if line and not line.startswith(" "):
            in_list = bool(re.match(r"[-*]|\d+\.", line))
        after_blank = number > 1 and not outside[number - 2]
        indented = line.startswith("    ") and after_blank and not in_list
        assert not indented, f"{name_of(page)}:{number}: indented code: put it between fences"


# The public objects whose docstrings have code, with the Python that makes what it takes as given.
IN_DOCSTRINGS = {
    "FrozenGRU": "",
    "FrozenLSTM": "",
    "FrozenTorchGRU": "",
    "FrozenTorchLSTM": "",
    "GRU": "",
    "GRUCell": "",
    "LSTM": "",
    "LSTMCell": "",
    "LSTMExtras": "",
    "TorchGRU": "",
    "TorchGRUCell": "",
    "TorchLSTM": "",
    "TorchLSTMCell": "",
    "patch": "import types\nlibrary = types.SimpleNamespace(build=lambda: torch.nn.LSTM(3, 4))",
    "register": (
        "class TheirLSTM(torch.nn.Module): pass\nn = torch.nn.Parameter\nmodule = TheirLSTM()\n"
        "module.n_in, module.n_out, module.w_ih, module.w_hh = 3, 4, n(torch.ones(16, 3)), n(torch.ones(16, 4))\n"
        "module.b_ih = module.b_hh = n(torch.ones(16))"
    ),
    "onnx.export": "model, x = lstm_ext.LSTM(3, 4), torch.randn(5, 2, 3)",
}


def literal_blocks(text: str) -> list[str]:
    return [textwrap.dedent(block) for block in re.findall(r"::\n\n((?:(?: {4}.*)?\n)+)", text + "\n")]


@pytest.mark.parametrize("name", IN_DOCSTRINGS)
def test_code_in_docstrings_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = operator.attrgetter(name)(lstm_ext)
    names: dict = {"lstm_ext": lstm_ext, "torch": torch}
    exec(IN_DOCSTRINGS[name], names)
    (code,) = literal_blocks(inspect.cleandoc(found.__doc__))
    try:
        run(code, 1, f"docstring of lstm_ext.{name}", names)
    finally:
        if "handle" in names:
            names["handle"].stop()


def test_docstrings_with_code_are_known() -> None:
    with_code = set()
    for face in (lstm_ext, lstm_ext.functional, lstm_ext.reference, lstm_ext.onnx):
        prefix = face.__name__.removeprefix("lstm_ext").lstrip(".")
        for name in face.__all__:
            public = getattr(face, name)
            members = [public, *vars(public).values()] if inspect.isclass(public) else [public]
            if any([literal_blocks(inspect.cleandoc(getattr(m, "__doc__", None) or "")) for m in members]):
                with_code.add(f"{prefix}.{name}".lstrip("."))
    # That of patch_keras needs Keras, as the snippet of the guide that tests/compat runs.
    assert with_code == {*IN_DOCSTRINGS, "patch_keras"}
    classes = {name for name in lstm_ext.__all__ if inspect.isclass(getattr(lstm_ext, name))}
    assert classes <= with_code, "each public class has an example"


def test_library_snippets_run_in_compat() -> None:
    """Every heading with a block `python compat` is run by tests/compat/test_guide.py."""
    page = ROOT / "docs" / "guide" / "other-libraries.md"
    sections = re.split(r"^###? ", page.read_text(), flags=re.MULTILINE)[1:]
    with_code = {s.split("\n", 1)[0] for s in sections if "```python compat\n" in s}
    tested = set(re.findall(r'run\("([^"]+)"', (ROOT / "tests/compat/test_guide.py").read_text()))
    assert with_code
    assert with_code == tested
    elsewhere = [p for p in PAGES if p != page and "```python compat" in p.read_text()]
    assert not elsewhere, "tests/compat looks at docs/guide/other-libraries.md only"
