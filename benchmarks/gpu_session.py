"""How gpu_check.py runs its phases: processes that can be killed with all that they started, and one record."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import harness

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ["torch", "triton", "ninja", "setuptools", "pytest", "numpy", "expecttest", "matplotlib"]

PROCESS_BYTES = 3 << 29  # of a process that tests


@dataclass
class Outcome:
    result: str  # "passed", "failed", "incomplete" (no verdict, above all for want of time), "not run"
    reason: str = ""
    details: dict[str, Any] = field(default_factory=dict)


@dataclass
class Finished:
    code: int | None  # None: killed, the time was up
    log: Path
    root: Path

    @property
    def text(self) -> str:
        # What is committed of it names no folder of the machine.
        return self.log.read_text(errors="replace").replace(f"{self.root}{os.sep}", "")

    @property
    def tail(self) -> str:
        return self.text[-3000:]

    def last_json(self) -> Any:
        """What its last line says, or None."""
        try:
            return json.loads(self.text.splitlines()[-1])
        except (ValueError, IndexError):
            return None

    def __str__(self) -> str:
        if self.code is None:
            return "the time was up"
        return f"ended by {signal.Signals(-self.code).name}" if self.code < 0 else f"exit code {self.code}"


class Session:
    """What the phases have in common: the time, the environment of their processes, and the record."""

    def __init__(self, options: argparse.Namespace, root: Path = ROOT) -> None:
        self.root = root
        self.command: str = options.command
        self.dry: bool = options.dry
        self.device = "cpu" if options.dry else "cuda"
        self.output: Path = options.output.resolve()
        self.logs = self.output.with_name(self.output.stem + "_logs")
        self.logs.mkdir(parents=True, exist_ok=True)
        self.deadline = time.monotonic() + options.budget
        self.gpu_works = options.dry
        self.exclusive = False  # the card takes one process at a time
        self.free_bytes = float("inf")
        paths = [os.environ.get("PYTHONPATH"), str(root)]
        self.environment = {
            **os.environ,
            # Dry, the lstm_ext that is there; else the one that was built in place.
            "PYTHONPATH": os.pathsep.join(filter(None, paths if options.dry else reversed(paths))),
            # Neither torch's operator nor the reference: they would look like a success.
            "LSTM_EXT_BACKEND": "aot",
        }
        if options.dry:
            self.environment["OMP_NUM_THREADS"] = "1"
        if options.commit:
            self.environment["LSTM_EXT_COMMIT"] = options.commit
        self.record: dict[str, Any] = {
            "format": 3,
            "started": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
            "dry": options.dry,
            "git_commit": options.commit,
            "packages": {name: version_of(name) for name in PACKAGES},
            "facts": None,
            "verdict": "unfinished",
            "phases": [],
            "benchmark": None,
            "audit": None,
        }
        # Read before this session writes its own.
        self.before: dict[str, Any] = {}
        if self.command == "speed":
            with contextlib.suppress(OSError, ValueError):
                self.before = json.loads(self.output.read_text())

    def know(self, facts: dict[str, Any]) -> None:
        """Of the card and the commit: `speed` adds to what `values` found, if that ran with the same ones."""
        self.record |= {"facts": facts, "git_commit": facts["git_commit"]}
        mode = (facts.get("nvidia_smi") or {}).get("compute_mode", "")
        self.exclusive = mode.startswith("Exclusive")
        self.free_bytes = facts.get("free_bytes", self.free_bytes)
        names = ("card", "capability", "cuda_of_driver", "git_commit", "lstm_ext_cuda")
        try:
            same = [self.before["facts"].get(name) == facts.get(name) for name in names]
            same += [self.before[name] == self.record[name] for name in ("format", "dry", "packages")]
        except (TypeError, KeyError, AttributeError):
            return
        if all(same):
            now, self.record["phases"] = self.record["phases"], self.before["phases"]
            for phase in now:
                self.add(phase)

    def at_once(self, most: int) -> int:
        """How many processes may use the card at a time. Each has a context, and what it watches or computes."""
        return 1 if self.exclusive else int(max(1, min(most, self.free_bytes / PROCESS_BYTES)))

    def add(self, phase: dict[str, Any]) -> None:
        """In the place of an earlier one of this name."""
        by_name = {p["phase"]: p for p in self.record["phases"]} | {phase["phase"]: phase}
        self.record["phases"] = list(by_name.values())

    def archive(self) -> Path:
        """The record and the output of all processes."""
        shutil.copy(self.output, self.logs / "record.json")
        base = self.output.with_suffix("")
        return Path(shutil.make_archive(str(base), "gztar", self.logs.parent, self.logs.name))

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def write(self) -> None:
        harness.write(self.output, self.record)

    def start(self, name: str, arguments: Sequence[str | Path], **environment: str) -> Child:
        return Child(arguments, self.logs / f"{name}.txt", self.root, {**self.environment, **environment})

    def python(
        self, name: str, arguments: Sequence[str | Path], seconds: float, **environment: str
    ) -> Finished:
        child = self.start(name, [sys.executable, *arguments], **environment)
        return child.wait(time.monotonic() + seconds)


class Child:
    """A process whose output goes to a file, in a group of its own, so that nothing of it is left behind."""

    def __init__(
        self, arguments: Sequence[str | Path], log: Path, root: Path, environment: dict[str, str]
    ) -> None:
        self.log, self.root = log, root
        # Python looks for modules in the current folder first, and that may have another lstm_ext than is meant.
        folder = root if "setup.py" in arguments else log.parent
        with log.open("wb") as output:
            output.write(f"$ {' '.join(str(a).partition(chr(10))[0] for a in arguments)}\n".encode())
            output.flush()
            self.process = subprocess.Popen(
                [str(a) for a in arguments],
                cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip

    def wait(self, deadline: float, patience: float = float("inf")) -> Finished:
        """Until the end, the deadline, or until nothing new has been said for `patience` seconds."""
        size, since = -1, time.monotonic()
        while self.process.poll() is None and time.monotonic() < min(deadline, since + patience):
            if self.log.stat().st_size != size:
                size, since = self.log.stat().st_size, time.monotonic()
            time.sleep(0.05)
        code = self.process.poll()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        return Finished(code, self.log, self.root)


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def judged(run: Finished, **details: Any) -> Outcome:
    if run.code == 0:
        return Outcome("passed", details=details)
    return Outcome("incomplete" if run.code is None else "failed", str(run), {**details, "output": run.tail})
