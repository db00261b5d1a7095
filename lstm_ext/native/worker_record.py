"""The costs of workers on this machine, in the user's record: read once the extension is loaded, written as the process
ends, so that no call reads or writes a file.

The kernels measure it themselves: see csrc/torch/worker_costs.h.
"""

from __future__ import annotations

import atexit
import contextlib
from typing import Any

import torch

from . import selftest_record

_CPU = torch.device("cpu")
_ERRORS = (OSError, RuntimeError, ValueError, TypeError, KeyError)  # a file that somebody wrote
_UNIT = 1e-6  # seconds, of the times in the record
_LISTS = ("thread", "barrier", "tree")


def use(extension: Any) -> None:
    """Gives the extension the times of the record, for each number of threads, and records those that it measures."""
    if not extension.measures_workers():
        return
    for times in _recorded():
        with contextlib.suppress(*_ERRORS):
            seconds = {name: [_UNIT * us for us in times[name]] for name in _LISTS}
            extension.set_worker_times({"threads": times["threads"], **seconds}, recorded=True)
    atexit.register(_record_measured, extension)


def _recorded() -> list[dict]:
    with contextlib.suppress(*_ERRORS):
        if selftest_record.path().is_file():  # else there is no need to look for the processor's name
            entry = selftest_record.find(_CPU) or {}
            return [times for key, times in (entry.get("measured") or {}).items() if key.endswith(" threads")]
    return []


def _record_measured(extension: Any) -> None:
    for times in extension.worker_times(recorded=False):
        us = {name: [round(seconds / _UNIT, 4) for seconds in times[name]] for name in _LISTS}
        with contextlib.suppress(OSError, RuntimeError):  # the next process measures again
            threads = times["threads"]
            selftest_record.add_measured(_CPU, f"{threads} threads", {"threads": threads, **us})
