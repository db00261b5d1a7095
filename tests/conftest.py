"""A run that tests the wrong thing fails: without the compiled extension, and with a skip nobody has agreed to."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

_PATTERNS = pytest.StashKey[list[re.Pattern[str]]]()
_skips: list[tuple[str, str]] = []
_unexpected: list[str] = []


def _expected_skips() -> list[re.Pattern[str]]:
    text = (Path(__file__).parent / "expected_skips.txt").read_text()
    patterns = []
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            pattern, separator, reason = line.partition("  #")
            if not separator or not reason.strip():
                raise pytest.UsageError(f"expected_skips.txt: no reason given in {line!r}")
            # Not fnmatch: the brackets in a test's id are not sets of characters.
            patterns.append(re.compile(re.escape(pattern.strip()).replace(r"\*", ".*")))
    return patterns


def pytest_sessionstart(session: pytest.Session) -> None:
    try:
        from lstm_ext import _backend

        loaded = _backend.extension() is not None
        reason = _backend.status().reason
    except ImportError as error:
        loaded, reason = False, error
    if not loaded:
        pytest.exit(
            f"the compiled extension is not loaded, so nothing would be tested: {reason}", returncode=1
        )
    session.config.stash[_PATTERNS] = _expected_skips()


def _note_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        _skips.append((report.nodeid, str(reason)))


pytest_runtest_logreport = _note_skip
pytest_collectreport = _note_skip


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    patterns = session.config.stash.get(_PATTERNS, [])
    _unexpected.extend(
        f"{nodeid}: {reason}" for nodeid, reason in _skips if not any(p.fullmatch(nodeid) for p in patterns)
    )
    if _unexpected and exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _unexpected:
        terminalreporter.section("skips that tests/expected_skips.txt does not list", red=True)
        for line in _unexpected:
            terminalreporter.line(line)


@pytest.fixture(params=["avx512", "avx2", "baseline"])
def capability(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that this processor runs, in use for one test."""
    from lstm_ext import _backend

    extension = _backend.extension()
    if request.param not in extension.cpu_capabilities():
        pytest.skip(f"this processor does not run {request.param}")
    before = extension.cpu_capability()
    extension.set_cpu_capability(request.param)
    yield request.param
    extension.set_cpu_capability(before)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
