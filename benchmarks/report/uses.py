"""What the layer gains, by use and by machine, from the newest record of each machine: the one rule for all figures.

A row is a use, with all cases that a record has of it; a column is a machine with one instruction set. No machine is
left out that has a record of the use, and no case.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import harness
from records import Result, ratio

from .ages import dated
from .tables import over
from .text import table

RECORDS = ("suite_*_cores.json", "cpu_*_cores.json", "contract_*_cores.json")
# suite_epyc_zen5_avx2_2_cores.json; the name may have the one group of the record.
FILE = re.compile(
    r"(?P<kind>suite|cpu|contract|library)(_(packed|vmap|callers|16-bit|cell|frozen|rollout|busy|fallback))?"
    r"_(?P<machine>\w+)_(?P<cores>\d+)_cores\.json"
)
LARGE = 256  # hidden units from which the layer gains little without a tile engine, with a batch
PEERS = ("torch", "onnxruntime", "openvino")
SETS = {
    "amx": "AMX", "avx512_bf16": "AVX-512", "avx512": "AVX-512", "avx2": "AVX2", "neon": "NEON",
}  # fmt: skip
Cases = dict[str, list[float]]


class Use(NamedTuple):
    """One row: torch's time over ours, or a cost, of which less is better."""

    key: str
    title: str
    cost: bool = False
    theirs: str = ""  # the key of torch's own cost, beside ours
    first: str = ""  # its title on the first screen of the README
    part_of: str = ""  # the key of the use that has these cases too


USES = (
    Use("inference", "inference, T > 1"),
    Use("training", "training step, T > 1"),
    Use("large", f"inference, T > 1, H ≥ {LARGE}, B > 1", part_of="inference"),
    Use(
        "small-training",
        f"training step, T > 1, H < {LARGE}",
        first=f"training, H < {LARGE}",
        part_of="training",
    ),
    Use(
        "large-training",
        f"training step, T > 1, H ≥ {LARGE}, B > 1",
        first=f"training, H ≥ {LARGE}, B > 1",
        part_of="training",
    ),
    Use("step", "one step (T = 1), by a call or by `step()`", first="one step with carried state"),
    Use("step-training", "training step, T = 1"),
    Use("cell", "`LSTMCell`, with and without gradients"),
    Use("ragged", "ragged batches (`PackedSequence`)", first="ragged batches (`PackedSequence`)"),
    Use("ragged-padded", "ragged batches, over torch's call on the padded batch"),
    Use("policy", "recurrent policies: a loop over the steps"),
    Use(
        "policy-resets",
        "recurrent policies: learning by one call with `resets`, over torch's loop",
        first="episodes that end inside a row: one call with `resets`, over torch's loop",
    ),
    Use("frozen-step", "frozen, one step"),
    Use("frozen-itself", "frozen, one step, over our layer before freezing"),
    Use("int8-itself", "frozen in int8, one step, H ≥ 512, over our layer before freezing"),
    Use("frozen-peers", "frozen, inference, over the best of torch, ONNX Runtime, OpenVINO"),
    Use("bfloat16", "bfloat16 inference, over torch's bfloat16"),
    Use("bfloat16-training", "bfloat16 training step, over torch's bfloat16"),
    Use("float16", "float16, inference and training"),
    Use("float64", "float64, inference and training"),
    Use("memory", "peak memory of a training step, share of torch's", cost=True),
    Use(
        "busy-1",
        "two threads beside one busy program, times the idle time",
        True,
        "torch-busy-1",
    ),
    Use("busy-2", "two threads beside two busy programs", True, "torch-busy-2"),
    Use("first", "first call of a process, ms", True, "torch-first"),
    Use("import", "import after torch's, ms", cost=True),
)


# ---- the cases of a record, by use


def put(cases: Cases, value: float | None, *keys: str) -> None:
    for key in keys if value is not None else ():
        cases.setdefault(key, []).append(value)


def of_layer(cases: Cases, result: Result, group: str, value: float | None) -> None:
    """A case of `inference` or `training`."""
    kind = "-training" if group == "training" else ""
    if result["steps"] == 1:
        put(cases, value, f"step{kind}")
    else:
        put(cases, value, group)
        if result["hidden_size"] >= LARGE and result["batch"] > 1:
            put(cases, value, f"large{kind}")
        elif result["hidden_size"] < LARGE and kind:
            put(cases, value, f"small{kind}")


def of_step(cases: Cases, result: Result) -> None:
    if result["case"].startswith("cell-"):
        put(cases, ratio(result, "ours"), "cell")
        return
    for side in ("ours", "step"):
        put(cases, ratio(result, side), "step")
        put(cases, over(result, "frozen", side), "frozen-itself")
    put(cases, ratio(result, "frozen"), "frozen-step")
    if result["hidden_size"] >= 512:
        put(cases, over(result, "frozen-int8", "ours"), "int8-itself")


def cases_of(record: Result) -> Cases:
    cases: Cases = {}
    steps = {r["case"] for r in record["results"] if r["group"] == "step"}
    plain = {
        (r["case"], r["threads"], r["training"]): r
        for r in record["results"]
        if r["group"] in ("inference", "training") and r["dtype"] == "float32"
    }
    for result in record["results"]:
        group, sides = result["group"], result["sides"]
        if group in ("inference", "training"):
            if record["settings"].get("pair") and (group, result["steps"]) == ("inference", 1):
                continue  # the group "step" has it too
            of_layer(cases, result, group, ratio(result, "ours"))
            if "frozen" in sides and set(PEERS) <= set(sides):
                best = min(sides[peer]["median"] for peer in PEERS)
                put(cases, best / sides["frozen"]["median"], "frozen-peers")
        elif group == "step":
            of_step(cases, result)
        elif group == "frozen-alone" and result["case"].startswith("stream") and result["case"] not in steps:
            put(cases, ratio(result, "frozen"), "frozen-step")
            put(cases, over(result, "frozen", "ours"), "frozen-itself")
            if result["hidden_size"] >= 512:
                put(cases, over(result, "frozen-int8", "ours"), "int8-itself")
        elif group == "ragged":
            put(cases, ratio(result, "ours"), "ragged")
            padded = plain.get((result["case"], result["threads"], result["training"]))
            if padded is not None:
                put(cases, padded["sides"]["torch"]["median"] / sides["ours"]["median"], "ragged-padded")
        elif group == "resets":
            put(cases, ratio(result, "ours"), "policy")
            if result["training"]:
                put(cases, ratio(result, "resets"), "policy-resets")
        elif group == "dtypes":
            kind = "-training" if result["training"] and result["dtype"] == "bfloat16" else ""
            put(cases, ratio(result, "ours"), result["dtype"] + kind)
        elif group == "memory":
            put(cases, over(result, "torch", "ours"), "memory")
        elif group in ("busy", "bursts") and result["threads"] == 2:
            for count in (1, 2):
                put(cases, result["slowdowns"][f"ours_beside_{count}"], f"busy-{count}")
                put(cases, result["slowdowns"][f"torch_beside_{count}"], f"torch-busy-{count}")
        elif group == "first-call":
            put(cases, sides["ours"]["median"], "first")
            put(cases, sides["torch"]["median"], "torch-first")
        elif group == "import":
            put(cases, sides["ours after torch"]["median"], "import")
    return cases


# ---- the newest of each machine


class Machine(NamedTuple):
    name: str  # as in the names of its records
    set_name: str
    uses: dict[str, list[float]]
    files: dict[str, Result]  # of the records that the uses come from, the facts

    @property
    def processor(self) -> str:
        vendor, *rest = self.name.split("_")
        generation = next((f" Zen {part[3:]}" for part in rest if re.fullmatch(r"zen\d+", part)), "")
        held = " held to it" if generation and rest[-1] == "avx2" else ""
        return f"{vendor.upper() if vendor == 'epyc' else vendor.capitalize()}{generation}{held}"


def machines(records: dict[str, Result]) -> list[Machine]:
    """Of each machine and use the newest record that has it; sorted by instruction set, the widest first."""
    found: dict[str, dict[str, tuple[str, str, list[float]]]] = {}
    for file, record in records.items():
        name = FILE.fullmatch(file)
        if name is None:
            raise SystemExit(f"{file}: expected a name like suite_epyc_zen5_2_cores.json")
        for use, values in cases_of(record).items():
            newest = found.setdefault(name["machine"], {})
            # Both sides of a use come from one record: they have the same date.
            newest[use] = max(newest.get(use, ("", "", [])), (record["facts"]["date"], file, values))
    result = []
    for name, newest in found.items():
        files = {file: records[file]["facts"] for _, file, _ in sorted(newest.values(), reverse=True)}
        capability = next(iter(files.values()))["lstm_ext_cpu_capability"]
        uses = {use: values for use, (_, _, values) in newest.items()}
        result.append(Machine(name, capability, uses, files))
    order = list(SETS)
    return sorted(result, key=lambda m: (order.index(m.set_name), m.name))


# ---- text


def worst_of(use: Use, values: Sequence[float]) -> float:
    return max(values) if use.cost else min(values)


def short(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def figures(use: Use, found: Sequence[Machine], key: str = "") -> str:
    """The geometric mean of each machine, as a span where there are several, and the worst case of all."""
    values = [m.uses[key or use.key] for m in found if (key or use.key) in m.uses]
    if not values:
        return ""
    means = sorted({short(harness.geometric_mean(v)) for v in values}, key=float)
    mean = f"{means[0]} to {means[-1]}" if len(means) > 1 else means[0]
    return f"{mean} ({short(worst_of(use, [x for v in values for x in v]))})"


def cell(use: Use, found: Sequence[Machine]) -> str:
    ours = figures(use, found)
    return f"{ours}; torch {figures(use, found, use.theirs)}" if ours and use.theirs else ours


def columns_of(found: list[Machine], by_set: bool) -> dict[str, list[Machine]]:
    columns: dict[str, list[Machine]] = {}
    for machine in found:
        title = SETS[machine.set_name] + ("" if by_set else f", {machine.processor}")
        columns.setdefault(title, []).append(machine)
    return columns


def number_of_cases(use: Use, found: list[Machine]) -> str:
    counts = sorted({len(m.uses[use.key]) for m in found if use.key in m.uses})
    return " to ".join(map(str, dict.fromkeys([counts[0], counts[-1]])))


def of_uses(found: list[Machine], by_set: bool) -> list[str]:
    """The table: of the README by instruction set, or of all uses by machine."""
    columns, rows = columns_of(found, by_set), []
    for use in [use for use in USES if use.first or not by_set]:
        cells = [cell(use, column) for column in columns.values()]
        if any(cells):
            rows.append([use.first, *cells] if by_set else [use.title, number_of_cases(use, found), *cells])
    return table(["", *([] if by_set else ["cases"]), *columns], rows)


def named(file: str, facts: Result, folder: str) -> str:
    return f"[{file.removesuffix('.json')}]({folder}/{file}) of {dated(facts)} at {facts['git_commit']}"


def sources(found: list[Machine], folder: str) -> list[str]:
    """Beside each machine its records, each with date and commit."""
    lines = []
    for machine in found:
        facts = next(iter(machine.files.values()))
        records = "; ".join(named(file, of_file, folder) for file, of_file in machine.files.items())
        lines.append(
            f"- {SETS[machine.set_name]}: {machine.processor} ({facts['cpu']}, {facts['cores']} cores, "
            f"`{machine.set_name}`): {records}"
        )
    return lines


def slower(found: list[Machine]) -> list[str]:
    """The uses that have cases in which torch, or the layer before freezing, is faster."""
    lines = []
    for use in USES:
        parts = []
        for machine in () if use.cost or use.part_of else found:
            values = machine.uses.get(use.key, [])
            below = [value for value in values if value < 1]
            if below:
                place = f"{SETS[machine.set_name]}, {machine.processor}"
                parts.append(f"{place}: {len(below)} of {len(values)}, worst {min(below):.2f}")
        if parts:
            lines.append(f"- {use.title}. {'; '.join(parts)}.")
    return lines
