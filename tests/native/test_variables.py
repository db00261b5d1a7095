"""Every environment variable that the product reads: a value that means nothing is an error that names the legal ones,
and each variable stands on the page of its readers."""

from __future__ import annotations

import re
from pathlib import Path

import forks
import pytest

from lstm_ext.native import config

ROOT = Path(__file__).resolve().parents[2]
LAYER = "import lstm_ext, torch; lstm_ext.LSTM(3, 4)(torch.zeros(2, 1, 3))"
SETS = "from lstm_ext.native import config; config.cpu_sets()"
BUILT_WITH = "from lstm_ext.native import config; config.choose_cuda('13.0')"
# Nothing is built for this one, but all of setup.py runs.
SETUP = f"import os, runpy, sys; os.chdir({str(ROOT)!r}); sys.argv[1:] = ['--version']; runpy.run_path('setup.py')"
# The variable, values that mean nothing, what the last line of the error says of the legal ones, a program.
VARIABLES = (
    ("LSTM_EXT_BACKEND", ["fast"], "set it to one of auto, aot, jit, torch, reference, or unset it", LAYER),
    (
        "LSTM_EXT_CPU_CAPABILITY",
        ["sse9"],
        "'neon'" if config.machine() == "aarch64" else "'amx', 'avx512_bf16', 'avx512' or 'avx2'",
        LAYER,
    ),
    ("LSTM_EXT_CPU_VNNI", ["no"], "expected '0' or '1'", LAYER),
    ("LSTM_EXT_CPU_WAIT_LIMIT", ["no", "-1"], "expected a number of seconds", LAYER),
    ("LSTM_EXT_INTEGRATIONS", ["yes"], "set it to 0 or 1, or unset it", LAYER),
    ("LSTM_EXT_CHECK", ["yes"], "set it to 0 or 1, or unset it", LAYER),
    (
        "LSTM_EXT_CUDA_KERNEL",
        ["fast"],
        f"set it to one of auto, torch, {', '.join(config.CUDA_KERNELS)}, or unset it",
        LAYER,
    ),
    ("LSTM_EXT_CUDA_CHECK", ["no"], "set it to 0 or 1, or unset it", LAYER),
    ("LSTM_EXT_CUDA_WAIT_LIMIT", ["10 s", "-1"], "set it to a number of seconds, or unset it", LAYER),
    (
        "LSTM_EXT_CUDA_FREE_MULTIPROCESSORS",
        ["many", "-1", "1.5", "10001"],
        "set it to a whole number from 0 to 10000, or unset it",
        LAYER,
    ),
    ("LSTM_EXT_SKIP_BUILD", ["yes"], "set it to 0 or 1, or unset it", SETUP),
    (
        "LSTM_EXT_CPU_SETS",
        ["sse9", "native,sse9"],
        f"set it to native or to some of {','.join(config.CPU_SETS.get(config.machine(), ()))}, or unset it",
        SETS,
    ),
    ("LSTM_EXT_CUDA", ["yes"], "set it to 0 or 1, or unset it", BUILT_WITH),
)
# For tests: they are no matter of users, and stand in docs/contributing.md.
SWITCHES_OF_TESTS = {"LSTM_EXT_CPU_VNNI"}


@pytest.mark.slow
def test_a_value_that_means_nothing() -> None:
    """Whatever the device: what was asked for is not to be had."""
    cases = [(name, value, said, program) for name, values, said, program in VARIABLES for value in values]
    environments = [{name: value, "PROGRAM": program} for name, value, _, program in cases]
    runs = forks.run("import os; exec(os.environ['PROGRAM'])", *environments)
    for (name, value, said, _), run in zip(cases, runs, strict=True):
        assert run.returncode == 1, (name, value, run.stderr)
        last = run.stderr.splitlines()[-1]
        assert name in last and repr(value) in last and said in last, last


def test_no_variable_is_missing() -> None:
    """In the table above, and on the pages; and no page names one that nothing reads."""
    found = set()
    read = r"(?:environ(?:\.get)?[\[(]|getenv\(|chosen\(|\n +\(|[vV]ariable = )\s*\"(LSTM_EXT_[A-Z_]+)\""
    sources = [ROOT / "setup.py", *(ROOT / "lstm_ext").rglob("*.py")]
    sources += [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".cuh")]
    for path in sources:
        found |= set(re.findall(read, path.read_text()))
    assert found == {name for name, *_ in VARIABLES}

    def named(page: str) -> set[str]:
        return set(re.findall(r"^\| `(LSTM_EXT_[A-Z_]+)`", (ROOT / "docs" / page).read_text(), re.MULTILINE))

    assert named("environment.md") == found - SWITCHES_OF_TESTS
    assert named("contributing.md") == SWITCHES_OF_TESTS
