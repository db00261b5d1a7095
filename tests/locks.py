"""Locks between the processes of a run of tests. Who waits for one does not hang: conftest.py asks `waiting`."""

from __future__ import annotations

import contextlib
import fcntl
import threading
from collections.abc import Iterator
from pathlib import Path

waiting = threading.Event()


@contextlib.contextmanager
def locked(path: Path, how: int = fcntl.LOCK_EX) -> Iterator[None]:
    """Held by this process, and its own again if it dies."""
    with path.open("w") as file:
        waiting.set()
        try:
            fcntl.flock(file, how)
        finally:
            waiting.clear()
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # closing is not enough while a forked process has the file too
