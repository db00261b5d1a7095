"""The facts of the machine, and its bandwidth for buffers of given sizes.

That is measured with torch and not with lstm_ext, and the best of several tries counts: what is asked for is a bound.
"""

from __future__ import annotations

import os
import platform
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import harness
import torch

DTYPES = ("float32", "bfloat16", "float16", "float64")
KIBIBYTE = 1024
MEMORY = 128 * harness.MEBIBYTE  # of a buffer that no cache holds
SIZES = (*(size * KIBIBYTE for size in (8, 128, 512, 2048, 8192)), MEMORY)
READ_AT_LEAST = 32 * harness.MEBIBYTE  # in one call, so that the call itself does not count


def bandwidth(size: int, threads: int, budget: float) -> float:
    """GB/s at which a buffer of so many bytes is read again and again, a share of it by each thread.

    Read by a sum, whose rows are all one and the same memory: one call of torch reads it many times.
    """
    import numpy

    torch.set_num_threads(1)  # each of the threads below is one
    numbers = max(16, size // 4 // threads)
    times = max(1, READ_AT_LEAST // (4 * numbers))
    # numpy asks for huge pages where a buffer is large, as a frozen layer does.
    shares = [torch.from_numpy(numpy.ones(numbers, numpy.float32)).expand(times, -1) for _ in range(threads)]
    return 1e-9 * 4 * numbers * times * threads / _best_of_threads(shares, budget)


def _best_of_threads(shares: list[torch.Tensor], budget: float) -> float:
    """Seconds in which all threads read their share once, from the start of the first to the end of the last."""
    together = threading.Barrier(len(shares))
    times: list[tuple[float, float]] = [(0.0, 0.0)] * len(shares)
    rounds: list[float] = []
    deadline = time.perf_counter() + budget
    going_on = [True]

    def read(place: int) -> None:
        while True:
            together.wait()
            if not going_on[0]:
                return
            start = time.perf_counter()
            shares[place].sum()
            times[place] = start, time.perf_counter()
            together.wait()
            if place == 0:
                rounds.append(max(end for _, end in times) - min(start for start, _ in times))
                going_on[0] = len(rounds) < 3 or time.perf_counter() < deadline

    workers = [threading.Thread(target=read, args=(place,)) for place in range(len(shares))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return min(rounds[1:])


class Machine:
    """Measures on demand, each figure once; `record` has what was measured."""

    def __init__(self, budget: float = 0.2) -> None:
        self.budget = budget
        self.bandwidths: dict[tuple[int, int], float] = {}

    def bandwidth(self, size: int, threads: int) -> float:
        key = size, threads
        if key not in self.bandwidths:
            before = torch.get_num_threads()
            self.bandwidths[key] = bandwidth(size, threads, self.budget)
            torch.set_num_threads(before)
        return self.bandwidths[key]

    def measure(self, every: Iterable[int]) -> None:
        """For each number of threads; printed."""
        for threads in every:
            for size in SIZES:
                speed = self.bandwidth(size, threads)
                print(f"bandwidth, {size // KIBIBYTE} KiB, threads {threads}: {speed:.0f} GB/s", flush=True)

    def record(self) -> dict[str, list[dict[str, object]]]:
        return {
            "bandwidth": [
                {"bytes": size, "threads": threads, "gigabytes_per_second": harness.rounded(value)}
                for (size, threads), value in sorted(self.bandwidths.items())
            ]
        }


def facts() -> dict[str, object]:
    """Of the machine, beyond harness.facts."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "kernel": platform.release(),
        "libc": " ".join(platform.libc_ver()),
        "memory_bytes": memory,
        "caches": _caches(),
        "huge_pages": _chosen("/sys/kernel/mm/transparent_hugepage/enabled"),
        "governor": _text("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "set_by_environment": {
            name: os.environ[name]
            for name in (
                *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "LSTM_EXT_BACKEND"),
                *harness.HELD_BY,
                *harness.ALLOCATOR,
            )
            if name in os.environ
        },
    }


def _text(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _chosen(path: str) -> str | None:
    """Of "always [madvise] never", the word in brackets."""
    text = _text(path)
    return text.partition("[")[2].partition("]")[0] if text else None


def _caches() -> dict[str, str]:
    """Of the first core: {"L1 Data": "32K", ...}"""
    found = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (_text(str(folder / name)) for name in ("level", "type", "size"))
        if level and kind and size:
            found[f"L{level} {kind}"] = size
    return found
