"""A build that is killed takes its compilers along, and leaves the way free for the next one."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from test_build import SHOW, Project

from lstm_ext.native import config

pytestmark = [
    pytest.mark.tools,
    pytest.mark.skipif(not config.is_supported_platform(), reason="no build here"),
]

MARK = "LSTM_EXT_TEST_OF_A_KILLED_BUILD"
WANTED = {"LSTM_EXT_BACKEND": "jit", "LSTM_EXT_CUDA": "0"}
# A driver and the compiler that it starts, as those of g++; both ignore polite requests.
SLOW = """
case $1 in --version) echo g++ 12; exit;; esac
trap '' INT TERM HUP
touch "$STARTED"
sleep 300
"""
# What nvcc is asked before it has something to compile.
SLOW_NVCC = SLOW.replace("g++ 12", "release 13.0")
# A program that a script starts in the background ignores SIGINT, and so would all that these tests start.
INTERRUPTIBLE = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
# In a process group of its own, as a shell starts it.
START = f"{INTERRUPTIBLE}import os; os.setpgid(0, 0)\n{SHOW}"


def marked(mark: str) -> list[str]:
    """The commands of all processes that have inherited the mark, except those that have ended."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and f"{MARK}={mark}".encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:  # it is gone, or not ours
            pass
    return found


def sleeps(mark: str) -> bool:
    return any(["sleep 300" in command for command in marked(mark)])


def wait_until(condition, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.parametrize("to", ["the process", "the group"])
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda kind: kind.name)
def test_no_compiler_is_left(tmp_path: Path, kind: signal.Signals, to: str) -> None:
    """A signal for the whole group is what a terminal sends."""
    project = Project(tmp_path / "with a space")
    started, mark = tmp_path / "started", str(tmp_path)
    environment = {"CXX": project.script(SLOW), "STARTED": str(started), MARK: mark, **WANTED}
    with project.start("-c", START, **environment) as process:
        assert wait_until(started.exists, 60), process.communicate()
        assert wait_until(lambda: sleeps(mark), 2), marked(mark)
        (os.killpg if to == "the group" else os.kill)(process.pid, kind)
        process.communicate(timeout=10)
    assert process.returncode in (-kind, 128 + kind)
    assert wait_until(lambda: not marked(mark), 2), marked(mark)

    returncode, out, err = project.run("-c", SHOW, **WANTED)
    assert (returncode, out) == (0, "jit"), err
    assert "waiting for" not in err
    assert "compiling the extension" in err


def test_an_exception_in_the_build_ends_it(tmp_path: Path) -> None:
    """The process goes on, as a notebook does after an interrupt."""
    project = Project(tmp_path / "with a space")
    started, mark = tmp_path / "started", str(tmp_path)
    program = (
        f"{INTERRUPTIBLE}import time\n"
        "from lstm_ext.native import loader\n"
        "try: loader.extension()\n"
        "except KeyboardInterrupt: print('interrupted', flush=True)\n"
        "time.sleep(300)\n"
    )
    environment = {"CXX": project.script(SLOW), "STARTED": str(started), MARK: mark, **WANTED}
    with project.start("-c", program, **environment) as process:
        assert wait_until(started.exists, 60), process.communicate()
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "interrupted\n"
        assert wait_until(lambda: len(marked(mark)) == 1, 2), marked(mark)
        assert project.run("-c", SHOW, **WANTED)[:2] == (0, "jit")  # beside it: the lock is free
        process.kill()
        process.communicate(timeout=10)


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGKILL], ids=lambda kind: kind.name)
def test_no_nvcc_is_left(tmp_path: Path, kind: signal.Signals) -> None:
    """It is tried out before anything is built."""
    project = Project(tmp_path / "with a space")
    home, started, mark = tmp_path / "cuda", tmp_path / "started", str(tmp_path)
    (home / "bin").mkdir(parents=True)
    shutil.copy2(project.script(SLOW_NVCC), home / "bin" / "nvcc")
    environment = {"CUDA_HOME": str(home), "TORCH_CUDA_ARCH_LIST": "8.0", "STARTED": str(started), MARK: mark}
    program = f"{INTERRUPTIBLE}from lstm_ext.native import config; config.find_cuda('13.0')"
    with project.start("-c", program, **environment) as process:
        assert wait_until(started.exists, 60), process.communicate()
        assert wait_until(lambda: sleeps(mark), 2), marked(mark)
        process.send_signal(kind)
        process.communicate(timeout=10)
    assert wait_until(lambda: not marked(mark), 2), marked(mark)
