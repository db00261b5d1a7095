"""The benchmark suite: `make bench`.

    python benchmarks/bench.py [--only GROUP ...] [--shapes NAME ...] [--threads N ...] [--dtypes NAME ...]
                               [--budget SECONDS] [--repeats N] [--quick | --pair | --usual-malloc] [--list]
                               [--output FILE]

--pair measures torch.nn.LSTM and our layer only, on nine shapes and in four minutes, and prints their table beside the
project's targets: `make bench-quick`. Groups that --list shows in brackets run only where --only names them.

All sides of a case take turns in one run, and every sample is kept. Peers that are not installed are named in one line
and left out (peers.py). Results are torch's time over that of a side: above 1 the side is faster. compare.py compares
two files.

The process keeps freed memory: see `harness.keep_freed_memory`. --usual-malloc leaves malloc as it is, and measures the
rows of the README, torch and our layer only, each case in a process of its own. Nothing fails here: what a busy machine
measures is no verdict.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import multiprocessing
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import groups
import harness
import machine
import peers
import records
import torch
from groups import GROUPS, PAIR, USUAL_MALLOC, Case, Settings
from records import Result
from report import suite, tables

OUTPUT = Path("build") / "bench.json"
BUDGET, QUICK_BUDGET = 2.0, 0.15  # seconds of a case
PAIR_SECONDS = 240.0  # of all timed cases of --pair
REPEATS, QUICK_REPEATS = 3, 1  # of child processes
# Of the largest value; a warning, no verdict.
DIFFERENCE = {"float32": 1e-3, "float64": 1e-3, "bfloat16": 0.1, "float16": 0.02}
# Rounded weights: the difference is meant.
ROUNDED = ("frozen-bfloat16", "frozen-int8", "torch-int8")


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = harness.parser_of(__doc__)
    names = {name for group in GROUPS.values() for name in group.shapes}

    def shape_name(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"expected a name that --list shows, got {text!r}")
        return text

    positive = harness.positive
    parser.add_argument("--only", nargs="+", choices=list(GROUPS), metavar="GROUP",
                        help=", ".join(GROUPS))  # fmt: skip
    parser.add_argument(
        "--shapes", nargs="+", type=shape_name, metavar="NAME", help="of the cases: see --list"
    )
    parser.add_argument("--threads", nargs="+", type=positive(int), default=[1, 2], metavar="N")
    parser.add_argument("--dtypes", nargs="+", choices=machine.DTYPES, default=list(machine.DTYPES), metavar="NAME",
                        help=", ".join(machine.DTYPES))  # fmt: skip
    parser.add_argument("--budget", type=positive(float), help=f"seconds for each case ({BUDGET})")
    parser.add_argument("--repeats", type=positive(int), help=f"processes for each figure of one ({REPEATS})")
    parser.add_argument("--quick", action="store_true",
                        help=f"a few cases of each group, {QUICK_BUDGET} s each, in about five minutes")  # fmt: skip
    parser.add_argument(
        "--pair", action="store_true", help=f"torch and our layer only, {PAIR_SECONDS:.0f} s for all cases"
    )
    parser.add_argument(
        "--usual-malloc",
        action="store_true",
        help="torch and our layer only, malloc as it is: a quarter of an hour",
    )
    parser.add_argument(
        "--list", action="store_true", help="show groups, cases and peers, and measure nothing"
    )
    parser.add_argument("--output", type=Path, default=OUTPUT, help=f"where to write the JSON ({OUTPUT})")
    options = parser.parse_args(arguments)
    usual = [name for name, group in GROUPS.items() if group.usual]
    if options.pair and options.usual_malloc:
        parser.error("--pair, --usual-malloc: expected one of them")
    options.some = PAIR if options.pair else USUAL_MALLOC if options.usual_malloc else {}
    options.only = options.only or list(options.some) or usual
    if options.some and set(options.only) - set(options.some):
        flag = "--pair" if options.pair else "--usual-malloc"
        parser.error(f"{flag}: expected groups among {', '.join(options.some)}")
    options.cases = cases_of(options)
    if options.pair and not options.budget:
        options.budget = PAIR_SECONDS / max(1, sum(case.group != "memory" for case in options.cases))
    options.budget = options.budget or (QUICK_BUDGET if options.quick else BUDGET)
    options.repeats = options.repeats or (QUICK_REPEATS if options.quick else REPEATS)
    if not options.cases:
        parser.error(
            "--only, --shapes and --dtypes: expected at least one case that all of them name, got none"
        )
    return options


def cases_of(options: argparse.Namespace) -> list[Case]:
    found = []
    for name in options.only:
        group = GROUPS[name]
        wanted = options.shapes or (group.quick if options.quick else ()) or list(group.shapes)
        cases = group.cases(name, options.threads, options.dtypes)
        found += [c for c in cases if c.name in wanted and c.name in options.some.get(name, wanted)]
    return found


def show_list(options: argparse.Namespace) -> None:
    for name in options.only:
        cases = [case for case in options.cases if case.group == name]
        print(f"{name}: {GROUPS[name].about}; {len(cases)} cases")
        for shape_name, shape in {case.name: case.shape for case in cases}.items():
            print(f"  {shape_name:<20} {text_of(shape)}".rstrip())
    others = [f"[{name}] {group.about}" for name, group in GROUPS.items() if name not in options.only]
    print(*others, "peers:", sep="\n")
    for peer in peers.PEERS.values():
        print(f"  {peer.missing() or f'{peer.name}: {peer.how}'}")


def text_of(shape: Any) -> str:
    if shape is None:
        return ""
    text = f"B {shape.batch}, T {shape.steps}, I {shape.input_size}, H {shape.hidden_size}"
    text += f", {shape.layers} layers" if shape.layers > 1 else ""
    return text + (", both directions" if shape.directions > 1 else "")


def measure_case(case: Case, settings: Settings) -> Result:
    torch.set_num_threads(case.threads)
    sizes = case.shape._asdict() if case.shape else {}
    head = {"group": case.group, "case": case.name, **sizes, "threads": case.threads}
    start = time.perf_counter()
    figures = GROUPS[case.group].measure(case, settings)
    took = harness.rounded(time.perf_counter() - start)
    return {**head, "dtype": case.dtype, "training": case.training, "seconds": took, **figures}


def measure_alone(case: Case, settings: Settings) -> Result:
    """In a new process, since what was freed decides what malloc does, and a fork may compute on one thread only."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure_case, (case, settings))


def line_of(result: Result) -> str:
    parts = []
    for name, side in result["sides"].items():
        value = side["median"] / harness.MEBIBYTE if result["unit"] == "bytes" else side["median"]
        unit = "MiB" if result["unit"] == "bytes" else result["unit"]
        ratio = records.ratio(result, name)
        times = f" {ratio:.2f}x" if ratio and name != records.base_of(name) else ""
        parts.append(f"{name} {value:.4g} {unit}{times}")
    return f"{records.title(result)}: {', '.join(parts)}"


def warnings_of(result: Result) -> list[str]:
    lines = [f"{name} cannot run it: {why}" for name, why in result.get("refused", {}).items()]
    for name, difference in result.get("differences", {}).items():
        if name not in ROUNDED and not difference < DIFFERENCE[result["dtype"]]:
            lines.append(f"{name} differs from torch by {difference:.1e} of the largest value")
    for name, bound in result.get("bounds", {}).items():
        if not bound["met"]:
            lines.append(
                f"{name} takes {bound['alone_us']} us, more than the bound of {bound['bound_us']} us"
            )
    return [f"  {records.title(result)}: {line}" for line in lines]


@dataclass
class Run:
    """What is written: after each group, and where the run is stopped."""

    record: Result
    settings: Settings
    output: Path

    def write(self) -> None:
        self.record["facts"]["load_at_end"] = harness.load()
        self.record["machine"] = self.settings.machine.record()
        self.record["summary"] = records.summary(self.record["results"])
        records.write(self.record, self.output)


def new_record(options: argparse.Namespace, kept: bool) -> Result:
    facts = harness.facts() | machine.facts() | {"freed_memory_kept": kept}
    facts["peers"] = (
        {} if options.some else peers.facts()
    )  # they may have threads of their own once they are imported
    if "torchrl" in options.only:
        facts |= {name: importlib.metadata.version(name) for name in ("torchrl", "tensordict")}
    names = ("only", "shapes", "threads", "dtypes", "budget", "repeats", "quick", "pair", "usual_malloc")
    settings = {name: getattr(options, name) for name in names}
    settings |= {"pause": groups.PAUSE, "sample_seconds": harness.MIN_SAMPLE_SECONDS}
    return {
        "suite": records.SUITE, "format": records.FORMAT, "facts": facts, "settings": settings, "results": [],
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    options = parse_options(arguments)
    if options.list:
        show_list(options)
        return 0
    try:
        from tqdm import tqdm
    except ImportError:
        print("error: bench.py needs tqdm: pip install 'lstm_ext[bench]'", file=sys.stderr)
        return 1

    before = torch.get_num_threads()
    start = time.perf_counter()
    record = new_record(options, not options.usual_malloc and harness.keep_freed_memory())
    measure = measure_alone if options.usual_malloc else measure_case
    for name, value in record["facts"].items():
        if name != "peers":
            print(f"{name}: {value}")
    for name, peer in record["facts"]["peers"].items():
        print(peer["missing"] or f"{name} {peer['version']}: {peer['how']}")
    if record["facts"]["load_at_start"] > 0.3:
        print("warning: other programs are running; with more than one thread, they are what is measured")
    if record["facts"]["lstm_ext_cpu_capability"] is None:
        print("warning: the compiled extension is not loaded; these are figures of torch's own operator")
    settings = Settings(
        options.budget, options.repeats, bool(options.some), machine.Machine(min(0.2, options.budget))
    )
    run = Run(record, settings, options.output)
    try:
        if not options.some:
            settings.machine.measure(options.threads)
        with tqdm(options.cases, unit="case", dynamic_ncols=True, disable=None) as bar:  # none in a file
            for place, case in enumerate(bar):
                bar.set_description(f"{case.group} {case.name}", refresh=False)
                result = measure(case, settings)
                record["results"].append(result)
                for line in (line_of(result), *warnings_of(result)):
                    bar.write(line)
                if {c.group for c in options.cases[place + 1 : place + 2]} - {case.group}:
                    run.write()  # a group is done
    finally:
        torch.set_num_threads(before)
        record["seconds"] = round(time.perf_counter() - start, 1)
        run.write()
    print(f"\n{tables.quick(record) if options.pair else suite.text(record)}")
    print(*tables.costs(record), *tables.unsteady(record), sep="\n")
    print(f"{len(record['results'])} cases in {record['seconds']:.0f} s, written to {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
