"""A run that tests the wrong thing fails: without the compiled extension, and in CI with a skip nobody has agreed to.

The list of skips must also name every test that is marked ``skipif``, even if it is not skipped here.

Tests marked ``devices("cpu", "cuda")``, most often by a file's ``pytestmark``, run once on each of these devices. The
device is the default of everything that such a test makes. A mark on a test replaces that of its file. All others run
on the CPU. Without a GPU that the kernels run on, the tests of CUDA are not collected. ``--device cuda`` runs the tests
of CUDA and nothing else, and fails where they cannot run.

Tests run side by side, in pytest-xdist's processes, each with one thread. A test marked ``alone`` has the machine to
itself, and torch's own number of threads: it measures a time, or its threads wait for each other in a loop, which takes
ages where they share a core.

A test that hangs ends its process, with the stacks of its threads (pytest-timeout); pytest-xdist then names the test.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported. Each process would have a pool of inductor's compilers, and torch 2.11 can wait minutes for
# them as it exits.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# Seconds at one barrier, in the programs that tests start, too.
os.environ.setdefault("LSTM_EXT_CPU_WAIT_LIMIT", "20")

import pytest
import torch
from locks import locked

_PATTERNS = pytest.StashKey[list[re.Pattern[str]]]()
_skips: list[tuple[str, str]] = []
_unexpected: list[str] = []


DEVICES = ("cpu", "cuda")
THREADS = torch.get_num_threads()
# Seconds that a test of a tier may take; pyproject.toml has those of all others.
LIMITS = {"tools": 1200, "pages": 1200, "full": 0}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=DEVICES, help="run the tests of this device only")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "devices(*names): the devices that a test runs on")
    config.addinivalue_line("markers", "alone: no other test runs at the same time")
    config.addinivalue_line("markers", "timeout(seconds): see pytest-timeout, which may not be installed")


@functools.cache
def _problem_of_cuda() -> str | None:
    """Why the tests of CUDA cannot run here."""
    from lstm_ext.layer import cuda_kernels

    if not torch.cuda.is_available():
        return "torch finds no GPU"
    return cuda_kernels.problem(torch.cuda.current_device())


def _is_worker(config: pytest.Config) -> bool:
    """Whether this is one of pytest-xdist's processes. It reports to the first process, which judges the run."""
    return hasattr(config, "workerinput")


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
    if _is_worker(session.config):
        return
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


def _chosen_devices(config: pytest.Config) -> tuple[str, ...]:
    chosen = config.getoption("--device")
    if chosen is not None:
        return (chosen,)
    return DEVICES if _problem_of_cuda() is None else ("cpu",)


@pytest.hookimpl(trylast=True)  # the device is the last part of a test's id
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("devices")
    if marker is not None:
        here = [name for name in marker.args if name in _chosen_devices(metafunc.config)]
        # A test for none of the chosen devices is deselected below: pytest would skip it for want of a parameter.
        metafunc.parametrize("device", here or marker.args[:1], indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    def device_of(item: pytest.Item) -> str:
        # Others may have a parameter of this name that means something else.
        return item.callspec.params["device"] if item.get_closest_marker("devices") else "cpu"

    def repeats(item: pytest.Item) -> bool:
        # In float64, amx has the kernels of avx512; how its work is shared, test_tile_engine.py tries.
        params = item.callspec.params if hasattr(item, "callspec") else {}
        same = params.get("dtype") == torch.float64 or 2 in (
            params.get("threads"),
            params.get("number_of_threads"),
        )
        name = params.get("capability")
        # A GPU does not care.
        return (name == "amx" and same) or (params.get("device") == "cuda" and name not in (None, "avx2"))

    chosen = _chosen_devices(config)
    kept, left_out = [], []
    for item in items:
        for tier, seconds in LIMITS.items():
            if item.get_closest_marker(tier):
                item.add_marker(pytest.mark.timeout(seconds))
        (left_out if device_of(item) not in chosen or repeats(item) else kept).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept
    # The tests of one case for each instruction set follow each other, since cases.py keeps what torch makes of it.
    groups: dict[object, list[pytest.Item]] = {}
    for item in items:
        key: object = item.nodeid
        if hasattr(item, "callspec") and "capability" in item.callspec.params:
            others = {k: v for k, v in item.callspec.indices.items() if k not in ("capability", "threads")}
            key = item.parent.nodeid, item.originalname, tuple(others.items())
        groups.setdefault(key, []).append(item)
    # With --dist worksteal, each process gets one part of the list. It begins with the tests that have the machine to
    # themselves: two processes take turns then. Among other tests, each of them makes every process wait.
    alone, others = [], []
    for group in groups.values():
        for item in group:
            (others if item.get_closest_marker("alone") is None else alone).append(item)
    n = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    parts = [
        tests[len(tests) * k // n : len(tests) * (k + 1) // n] for k in range(n) for tests in (alone, others)
    ]
    items[:] = [item for part in parts for item in part]


def _note_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        _skips.append((report.nodeid, str(reason)))
    elif getattr(report, "when", None) == "setup" and report.passed and "skipif" in report.keywords:
        # The list has to be complete on the machine where a test is written, not on the first that cannot run it.
        _skips.append((report.nodeid, "marked skipif, so it is skipped elsewhere"))


# With pytest-xdist, the first process gets the reports of all.
pytest_runtest_logreport = _note_skip
pytest_collectreport = _note_skip


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if _is_worker(session.config):
        return
    patterns = session.config.stash.get(_PATTERNS, [])
    _unexpected.extend(
        f"{nodeid}: {reason}" for nodeid, reason in _skips if not any(p.fullmatch(nodeid) for p in patterns)
    )
    if _unexpected and exitstatus == pytest.ExitCode.OK and os.environ.get("CI"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if (problem := _problem_of_cuda()) is not None:
        terminalreporter.write_line(f"tests of CUDA were not collected: {problem}")
    if _unexpected:
        terminalreporter.section("skips that tests/expected_skips.txt does not list", red=True)
        for line in _unexpected:
            terminalreporter.line(line)


@pytest.fixture(scope="session")
def _locks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    """A folder that all processes of this run share."""
    if not _is_worker(request.config):
        return None
    return tmp_path_factory.getbasetemp().parent


@pytest.fixture(scope="session", autouse=True)
def _all_workers() -> None:
    """Also where the machine is busy: a test of two workers has them."""
    from lstm_ext.native import loader

    extension = loader.extension()
    if extension is not None:
        extension.set_fewer_when_crowded(False)


@pytest.fixture(scope="session", autouse=True)
def _kernels_on_a_gpu() -> Iterator[None]:
    """Plain layers too: by itself, torch's operator computes them where it is faster."""
    from lstm_ext.layer import cuda_kernels

    with cuda_kernels.forced("auto"):
        yield


@pytest.fixture(autouse=True)
def _share_of_the_machine(request: pytest.FixtureRequest, _locks: Path | None) -> Iterator[None]:
    """One thread beside the tests of other processes; all threads and no other test for one that is `alone`."""
    alone = request.node.get_closest_marker("alone") is not None
    with contextlib.ExitStack() as locks:
        if _locks is not None:
            # Who waits for the room waits in the door, so that tests that share the room cannot go on for ever.
            with locked(_locks / "door"):
                locks.enter_context(locked(_locks / "room", fcntl.LOCK_EX if alone else fcntl.LOCK_SH))
        torch.set_num_threads(THREADS if alone else 1)
        yield


@pytest.fixture(params=["amx", "avx512", "avx2"])
def capability(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that this processor runs, in use for one test.

    Not avx512_bf16: it differs from avx512 only in bfloat16 (test_tile_engine.py) and in frozen int8 weights
    (test_frozen.py).
    """
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
