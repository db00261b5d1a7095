"""What the plan of a call on the CPU chooses on machines with many cores, in a model: nothing here is measured.

    python benchmarks/many_cores.py                     # prints the table
    python benchmarks/many_cores.py --json FILE         # also writes a record, for benchmarks/report

The real planner chooses (`_C.cpu_plan`), with the costs that it would have measured. The model then says how long that
takes on a machine whose barriers and threads cost what `Machine` says, against one thread. Both count the arithmetic of
a call as the planner does; nothing is known here of caches, of memory that cores share, and of frequencies.
"""

from __future__ import annotations

import itertools
import math
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness

from lstm_ext.native import loader

Result = dict[str, Any]
THREADS = (2, 4, 8, 16, 32, 64, 128)
BATCHES, HIDDEN, STEPS = (1, 3, 16, 64, 256), (64, 100, 256, 512, 1024, 2048), (1, 10, 50, 200)
PASSES = ("forward", "backward")
# Multiply-adds in a second, as in csrc/torch/worker_costs.cpp.
WORK_PER_SECOND = 6e10
RADIX = 4  # of a tree
# What the planner takes for the costs, as a multiple of the true times; None: the constants, LSTM_EXT_CPU_MEASURE=0.
BELIEFS: dict[str, float | None] = {
    "measured": 1.0,
    "half of them": 0.5,
    "twice them": 2.0,
    "constants": None,
}
CONSTANTS: Result = {"thread": [6e5] * 8, "barrier": [6e4] * 8, "tree_from": 1 << 30}


@dataclass(frozen=True)
class Machine:
    """The time of a barrier and of a thread follows from that in which a cache line goes from one core to another."""

    name: str
    line: float  # seconds

    def on_one_line(self, workers: int) -> float:
        """The line goes to each that arrives, one after the other, and to those that wait, two at once."""
        return 1.5 * workers * self.line

    def in_a_tree(self, workers: int) -> float:
        """In each level four arrive, and the others are let go."""
        levels = 0
        while levels == 0 or workers > 1:
            workers, levels = -(-workers // RADIX), levels + 1
        return 6 * levels * self.line

    def of_threads(self, workers: int) -> float:
        """To start and to end a parallel region, by a thread that tells the others one after the other."""
        return 1e-6 + 2 * workers * self.line

    def times(self, threads: int, factor: float) -> dict[str, Any]:
        """What csrc/torch/worker_costs.cpp would measure."""
        workers = []
        while not workers or workers[-1] < threads:
            workers.append(min(2 << len(workers), threads))
        functions = {"thread": self.of_threads, "barrier": self.on_one_line, "tree": self.in_a_tree}
        lists = {name: [factor * time(n) for n in workers] for name, time in functions.items()}
        return {"threads": threads, **lists}


# Zen 4: 15 to 19 ns within an L3 cache, up to 80 between two. 200: two sockets, or a large mesh that is busy.
MACHINES = (
    Machine("one L3 cache, 20 ns", 20e-9),
    Machine("one socket, 80 ns", 80e-9),
    Machine("two sockets, 200 ns", 200e-9),
)


def calls() -> Iterator[tuple[int, int, int]]:
    """Batch, hidden size and steps."""
    return itertools.product(BATCHES, HIDDEN, STEPS)


def costs_of(machine: Machine, threads: int, factor: float | None) -> Result:
    extension = loader.extension()
    return CONSTANTS if factor is None else extension.costs_from(machine.times(threads, factor))


def chosen(machine: Machine, threads: int, costs: Result, call: tuple[int, int, int]) -> Iterator[Result]:
    """Of both passes: the workers, and the speed over that of one thread on this machine."""
    batch, hidden, steps = call
    plan = loader.extension().cpu_plan(
        steps=steps,
        batch=batch,
        input_size=hidden,
        hidden_size=hidden,
        threads=threads,
        save=True,
        costs=costs,
    )

    def barrier(workers: int) -> float:
        return machine.in_a_tree(workers) if workers >= costs["tree_from"] else machine.on_one_line(workers)

    for name in PASSES:
        teams, members = plan[f"{name}_batch_groups"], plan[f"{name}_hidden_groups"]
        workers, work, seconds = teams * members, plan[f"{name}_most_work"], 0.0
        if workers > 1:
            # All meet once they have packed the weights, and in the backward pass after each chunk.
            chunks = math.ceil(steps * batch / plan["backward_chunk_rows"]) if name == "backward" else 0
            seconds = machine.of_threads(workers) + (1 + chunks) * barrier(workers)
            seconds += steps * barrier(members) if members > 1 else 0
        speed = plan[f"{name}_work"] / (work + WORK_PER_SECOND * seconds)
        yield {"pass": name, "teams": teams, "members": members, "speed": speed}


def simulated(machine: Machine, threads: int, belief: str) -> Result:
    costs = costs_of(machine, threads, BELIEFS[belief])
    found = [(call, one) for call in calls() for one in chosen(machine, threads, costs, call)]
    (batch, hidden, steps), worst = min(found, key=lambda pair: pair[1]["speed"])
    return {
        "machine": machine.name,
        "threads": threads,
        "costs": belief,
        "tree_from": costs["tree_from"] if costs["tree_from"] <= threads else None,
        "calls": len(found),
        "speed": harness.rounded(harness.geometric_mean([one["speed"] for _, one in found])),
        "workers": statistics.median([one["teams"] * one["members"] for _, one in found]),
        "slower_than_one": sum(one["speed"] < 1 for _, one in found),
        "worst": harness.rounded(worst["speed"]),
        "worst_call": {"batch": batch, "hidden_size": hidden, "steps": steps, "pass": worst["pass"]},
    }


def record() -> Result:
    results = [
        simulated(machine, threads, belief)
        for machine in MACHINES
        for threads in THREADS
        for belief in BELIEFS
    ]
    return {"simulated": True, "capability": loader.extension().cpu_capability(), "results": results}


def main(arguments: list[str] | None = None) -> int:
    parser = harness.parser_of(__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write a record")
    options = parser.parse_args(arguments)
    found = record()
    for r in found["results"]:
        worst = " ".join(f"{name} {value}" for name, value in r["worst_call"].items())
        print(
            f"{r['machine']:<20} {r['threads']:>3} threads, {r['costs']:<12} {r['speed']:>6.2f} of one thread, "
            f"{r['workers']:>5.1f} workers, worst {r['worst']:.2f} ({worst})"
        )
    harness.write(options.json, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
