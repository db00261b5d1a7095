"""The ways of running a driver on the emulator, each good at finding something else (README.md says what)."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Mode:
    """A build of the driver (see build.py) and the environments to run it in, one after the other."""

    build: str
    environments: tuple[dict[str, str], ...] = ({},)


def _random(seeds: range, **also: str) -> tuple[dict[str, str], ...]:
    # With an even seed all threads have the same chance, with an odd one they have priorities.
    return tuple(
        {"SIMT_SEED": str(seed), "SIMT_SCHEDULE": "priority" if seed % 2 else "random", **also}
        for seed in seeds
    )


LATE = {"SIMT_COPIES": "late"}
NOW = {"SIMT_COPIES": "now"}
MIXED = {"SIMT_COPIES": "mixed"}


def _stores_seen_late(**also: str) -> tuple[dict[str, str], ...]:
    return {**LATE, "SIMT_STORES": "late", **also}, *_random(
        range(1, 7), **MIXED, SIMT_STORES="mixed", **also
    )


MODES = {
    # Threads in turn; copies as late as they may be.
    "late": Mode("plain", (LATE,)),
    # And at once, which hides a missing wait.
    "now": Mode("plain", (NOW,)),
    # Threads in any order, copies at any time.
    "random": Mode("plain", _random(range(1, 7), **MIXED)),
    # Relaxed stores that each block sees when it likes, in any order: as late as may be, and at any time.
    "weak": Mode("plain", _stores_seen_late()),
    # And of sixteen bytes each word on its own.
    "torn": Mode("plain", _stores_seen_late(SIMT_PIECES="torn")),
    # Sums of tensor cores as they might be, for what a tolerance has to allow.
    "truncated": Mode("plain", ({**LATE, "SIMT_MMA": "truncated"},)),
    "asan": Mode("asan", (LATE,)),
    "race": Mode("race", (LATE,)),
    "race-random": Mode("race", _random(range(1, 4), **MIXED)),
}

# For `make test-full`.
MANY_SEEDS = Mode("plain", _random(range(1, 17), **MIXED))


def run(
    program: Path, *arguments: object, mode: Mode, **environment: str
) -> Iterator[subprocess.CompletedProcess]:
    """Runs the program, built as `mode` says, in each of its environments."""
    command = [str(program), *map(str, arguments)]
    for settings in mode.environments:
        yield subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, **settings, **environment},
        )
