"""A run that tests the wrong thing fails: without the compiled extension, and with a skip nobody has agreed to.

Tests marked ``devices("cpu", "cuda")``, most often by a file's ``pytestmark``, run once on each of these devices: what
they make without saying where, is made there. A mark on a test goes before that of its file. All others run on the CPU.
``--device cuda`` runs what is for CUDA and nothing else, and fails where that cannot be; without the option CUDA's
tests are skipped there.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

_PATTERNS = pytest.StashKey[list[re.Pattern[str]]]()
_skips: list[tuple[str, str]] = []
_unexpected: list[str] = []


DEVICES = ("cpu", "cuda")
NO_GPU = "no GPU with kernels"
NO_GPU_PATTERN = "*cuda]"  # in expected_skips.txt


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=DEVICES, help="run the tests of this device only")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "devices(*names): the devices that a test runs on")


@functools.cache
def _problem_of_cuda() -> str | None:
    """Why the tests of CUDA cannot run here."""
    from lstm_ext.native import cuda as native_cuda

    if not torch.cuda.is_available():
        return f"{NO_GPU}: torch finds none"
    problem = native_cuda.problem(torch.cuda.current_device())
    return None if problem is None else f"{NO_GPU}: {problem}"


def _expected_skips() -> list[re.Pattern[str]]:
    text = (Path(__file__).parent / "expected_skips.txt").read_text()
    patterns = []
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            pattern, separator, reason = line.partition("  #")
            if not separator or not reason.strip():
                raise pytest.UsageError(f"expected_skips.txt: no reason given in {line!r}")
            if pattern.strip() == NO_GPU_PATTERN and _problem_of_cuda() is None:
                continue  # here a test of CUDA that is skipped is one too few
            # Not fnmatch: the brackets in a test's id are not sets of characters.
            patterns.append(re.compile(re.escape(pattern.strip()).replace(r"\*", ".*")))
    return patterns


def pytest_sessionstart(session: pytest.Session) -> None:
    try:
        from lstm_ext.native import loader

        loaded = loader.extension() is not None
        reason = loader.status().reason
    except ImportError as error:
        loaded, reason = False, error
    if not loaded:
        pytest.exit(
            f"the compiled extension is not loaded, so nothing would be tested: {reason}", returncode=1
        )
    if session.config.getoption("--device") == "cuda" and (problem := _problem_of_cuda()):
        pytest.exit(f"--device cuda, but {problem}", returncode=1)
    session.config.stash[_PATTERNS] = _expected_skips()


@pytest.hookimpl(trylast=True)  # the device is the last part of a test's id
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("devices")
    if marker is not None:
        metafunc.parametrize("device", marker.args, indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen = config.getoption("--device")
    if chosen is None:
        return

    def device_of(item: pytest.Item) -> str:
        # Others may have a parameter of this name that means something else.
        return item.callspec.params["device"] if item.get_closest_marker("devices") else "cpu"

    config.hook.pytest_deselected(items=[item for item in items if device_of(item) != chosen])
    items[:] = [item for item in items if device_of(item) == chosen]


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


def pytest_report_teststatus(report: pytest.TestReport | pytest.CollectReport) -> tuple[str, str, str] | None:
    """A kind of their own for tests that want a GPU: counted, and not listed one by one."""
    if report.skipped and isinstance(report.longrepr, tuple) and f"Skipped: {NO_GPU}" in report.longrepr[2]:
        return "skipped for want of a GPU", "", "SKIPPED"
    return None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if wanting := len(terminalreporter.stats.get("skipped for want of a GPU", ())):
        terminalreporter.write_line(f"SKIPPED [{wanting}] tests for CUDA: {_problem_of_cuda()}")
    if _unexpected:
        terminalreporter.section("skips that tests/expected_skips.txt does not list", red=True)
        for line in _unexpected:
            terminalreporter.line(line)


@pytest.fixture(params=["avx512", "avx2", "baseline"])
def capability(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that this processor runs, in use for one test."""
    from lstm_ext.native import loader

    extension = loader.extension()
    if request.param not in extension.cpu_capabilities():
        pytest.skip(f"this processor does not run {request.param}")
    before = extension.cpu_capability()
    extension.set_cpu_capability(request.param)
    yield request.param
    extension.set_cpu_capability(before)


@pytest.fixture(autouse=True)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """The device that the test is for, and the default of everything in it."""
    name = getattr(request, "param", "cpu")
    if name == "cpu":  # the default as it is
        yield name
        return
    if problem := _problem_of_cuda():
        pytest.skip(problem)
    torch.set_default_device(name)
    allow_tf32(False)
    try:
        yield name
    finally:
        allow_tf32(True)
        torch.set_default_device(None)


def allow_tf32(allow: bool) -> None:
    """In cuDNN, and so in this layer: torch's default, against which no float32 result can be checked."""
    # torch.backends.cudnn.allow_tf32 cannot be set once torch's own test helpers have been imported. There is a newer
    # switch, with which some of torch does not get along.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch._C._set_cudnn_allow_tf32(allow)


@pytest.fixture(autouse=True)
def _seed(device: str) -> None:
    torch.manual_seed(0)
