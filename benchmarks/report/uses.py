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

from .ages import age, dated
from .tables import over
from .text import conditions, table

RECORDS = ("suite_*_cores.json", "cpu_*_cores.json", "contract_*_cores.json", "malloc_*_cores.json")
# suite_epyc_zen5_avx2_2_cores.json; the name may have the one group of the record.
FILE = re.compile(
    r"(?P<kind>suite|cpu|contract|library|malloc)(_(packed|vmap|callers|16-bit|cell|frozen|rollout|busy|fallback|gru))?"
    r"_(?P<machine>\w+)_(?P<cores>\d+)_cores\.json"
)
LARGE = 256  # hidden units from which the layer gains little without a tile engine, with a batch
PEERS = ("torch", "onnxruntime", "openvino")
SETS = {
    "amx": "AMX", "avx512_bf16": "AVX-512", "avx512": "AVX-512", "avx2": "AVX2", "neon": "NEON",
}  # fmt: skip
AS_IT_IS = "malloc as it is"  # of the records of `bench.py --usual-malloc`, whose keys end so
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
    Use("gru-inference", "`GRU`, inference, T > 1"),
    Use("gru-peers", "`GRU`, frozen, inference, over the best of torch, ONNX Runtime, OpenVINO"),
    Use("gru-training", "`GRU`, training step"),
    Use("gru-step", "`GRU`, one step, by a call or by `step()`"),
    Use("gru-cell", "`GRUCell`, with and without gradients"),
    Use("memory", "peak memory of a training step, share of torch's", cost=True),
    Use(
        "busy-1",
        "two threads beside one busy program, times the idle time",
        True,
        "torch-busy-1",
    ),
    Use("busy-2", "two threads beside two busy programs", True, "torch-busy-2"),
    Use("first", "import after torch's and first call of a process, ms", True, "torch-first"),
    Use("import", "of these the import, ms", cost=True, part_of="first"),
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


def of_gru(cases: Cases, result: Result) -> None:
    sides = result["sides"]
    kind = "-training" if result["training"] else "-inference"
    if result["case"].startswith("cell-"):
        kind = "-cell"
    elif result["steps"] == 1 and not result["training"]:
        kind = "-step"
    put(cases, ratio(result, "ours"), f"gru{kind}")
    put(cases, ratio(result, "step"), "gru-step")
    if kind == "-inference" and set(PEERS) <= set(sides):
        best = min(sides[peer]["median"] for peer in PEERS)
        put(cases, best / sides["frozen"]["median"], "gru-peers")


def cases_of(record: Result) -> Cases:
    cases: Cases = {}
    steps = {r["case"] for r in record["results"] if r["group"] == "step"}
    plain = {
        (r["case"], r["threads"], r["training"]): r
        for r in record["results"]
        if r["group"] in ("inference", "training") and r["dtype"] == "float32"
    }
    # A first call that loads nothing has an import that does.
    imports = [r["sides"]["ours after torch"]["median"] for r in record["results"] if r["group"] == "import"]
    imported = imports[0] if imports else None
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
        elif group == "gru":
            of_gru(cases, result)
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
        elif group == "first-call" and imported is not None:
            put(cases, imported + sides["ours"]["median"], "first")
            put(cases, sides["torch"]["median"], "torch-first")
        elif group == "import":
            put(cases, imported, "import")
    if record["settings"].get("usual_malloc"):
        return {f"{use}, {AS_IT_IS}": values for use, values in cases.items()}
    return cases


# ---- the newest of each machine


class Machine(NamedTuple):
    name: str  # as in the names of its records
    set_name: str
    uses: dict[str, list[float]]
    files: dict[str, Result]  # the records that the uses come from

    @property
    def place(self) -> str:
        return f"{SETS[self.set_name]}, {self.processor}"

    def plain(self) -> list[Result]:
        """Its records but for those of malloc as it is."""
        return [record for record in self.files.values() if not record["settings"].get("usual_malloc")]

    @property
    def is_old(self) -> bool:
        return any([age(record["facts"]) for record in self.files.values()])

    def over_torch(self, use: Use) -> list[float]:
        """Of each case of a row how many times better than torch it is; a cost of torch's may be none."""
        values = self.uses.get(use.key, [])
        if not use.cost:
            return values
        if use.theirs:
            return [theirs / ours for theirs, ours in zip(self.uses.get(use.theirs, []), values, strict=True)]
        return [1 / value for value in values] if use.key == "memory" else []

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
        files = {file: records[file] for _, file, _ in sorted(newest.values(), reverse=True)}
        capability = next(iter(files.values()))["facts"]["lstm_ext_cpu_capability"]
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


def cell(use: Use, found: Sequence[Machine], by_set: bool) -> str:
    ours = figures(use, found)
    if by_set and (usual := figures(use, found, f"{use.key}, {AS_IT_IS}")):
        ours += f" / {usual}"
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


def rows_of(found: list[Machine]) -> list[Use]:
    """All uses, and below those of the README the same with malloc as it is, where that was measured."""
    rows = []
    for use in USES:
        rows.append(use)
        usual = use._replace(key=f"{use.key}, {AS_IT_IS}", title=f"{use.title}, {AS_IT_IS}", first="")
        if use.first and any([usual.key in m.uses for m in found]):
            rows.append(usual)
    return rows


def of_uses(found: list[Machine], by_set: bool) -> list[str]:
    """The table: of the README by instruction set, or of all uses by machine."""
    columns, rows = columns_of(found, by_set), []
    for use in [use for use in rows_of(found) if use.first or not by_set]:
        cells = [cell(use, column, by_set) for column in columns.values()]
        if any(cells):
            rows.append([use.first, *cells] if by_set else [use.title, number_of_cases(use, found), *cells])
    return table(["", *([] if by_set else ["cases"]), *columns], rows)


def named(file: str, record: Result, folder: str) -> str:
    facts = record["facts"]
    return (
        f"[{file.removesuffix('.json')}]({folder}/{file}) of {dated(facts)} at {facts['git_commit']}, "
        f"{conditions(record)}"
    )


def sources(found: list[Machine], folder: str) -> list[str]:
    """Beside each machine its records, each with date, commit and conditions."""
    lines = []
    for machine in found:
        facts = next(iter(machine.files.values()))["facts"]
        records = "; ".join(named(file, record, folder) for file, record in machine.files.items())
        lines.append(
            f"- {SETS[machine.set_name]}: {machine.processor} ({facts['cpu']}, {facts['cores']} cores, "
            f"`{machine.set_name}`): {records}"
        )
    return lines


def slower(found: list[Machine]) -> list[str]:
    """Of each row how many cases are better with torch, or by the layer before freezing; then of all rows."""
    lines: list[str] = []
    behind = {machine.place: [0, 0] for machine in found}
    for use in rows_of(found):
        parts = []
        for machine in found:
            values = machine.over_torch(use)
            below = [value for value in values if value < 1]
            if not use.part_of:
                behind[machine.place][0] += len(below)
                behind[machine.place][1] += len(values)
            if below:
                parts.append(f"{machine.place}: {len(below)} of {len(values)}, worst {short(min(below))}")
        if parts:
            lines.append(f"- {use.title}{', counted above too' if use.part_of else ''}. {'; '.join(parts)}.")
    total = "; ".join(f"{place}: {count} of {of_all}" for place, (count, of_all) in behind.items())
    return [*lines, f"- **All rows.** {total}."]


def means_below_one(found: list[Machine]) -> list[str]:
    """The rows of torch's time over ours in which a machine is slower in the mean."""
    lines = []
    for machine in found:
        for use in rows_of(found):
            values = [] if use.cost else machine.over_torch(use)
            if values and harness.geometric_mean(values) < 1:
                mean = short(harness.geometric_mean(values))
                lines.append(f"{use.title}, on {machine.place}, {mean} (worst {short(min(values))})")
    return lines
