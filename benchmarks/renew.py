"""Measures anew what this machine has a record of, and renews the pages: `make records`.

    python benchmarks/renew.py [NAME ...] [--list] [--force] [--new]

A record stays if it is newer than the code: if no commit since its own touches csrc/, lstm_ext/ or the benchmark. Those
whose benchmark ended well are replaced in the end. One of the suite takes half an hour. Close other programs.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import bench  # noqa: F401 - its modules are the sources of a record
import harness
from records import Result
from report import ages, pages, uses
from report.text import RESULTS, table

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


# What --new measures, and how long that takes.
NEW = {"suite": "in half an hour", "library": "in five minutes", "malloc": "in a quarter of an hour"}
ARGUMENTS = {"suite": [], "library": ["--only", "library"], "malloc": ["--usual-malloc"]}


def command_of(record: Result) -> list[str]:
    """A program and its arguments that make a record like a given one."""
    settings, command = record["settings"], ["bench.py"]
    if settings.get("pair"):
        return [*command, "--pair"]
    if settings.get("usual_malloc"):
        command.append("--usual-malloc")
    # A record of all groups, of which this is the last, gets those that are new as well.
    only = () if "import" in settings["only"] else ("only",)
    for name in (*only, "shapes", "threads", "dtypes", "budget", "repeats"):
        if value := settings[name]:
            command += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return command


# ---- this machine


class Machine(NamedTuple):
    names: tuple[str, ...]  # in the names of its records: as it is, and held to AVX2
    cpu: str
    capability: str
    cores: int

    @property
    def own(self) -> list[str]:
        """The machines of its records, as `Entry` has them."""
        return [*[f"{name}, {self.cores} cores" for name in self.names], f"{self.cpu}, {self.capability}"]


def name_of(cpuinfo: str, capability: str) -> str:
    """As in the names of records: epyc_zen5, xeon_amx."""

    def fact(key: str) -> str:
        found = re.search(rf"^{key}\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
        return found[1].strip() if found else ""

    words = re.sub(r"\([^)]*\)", "", fact("model name") or f"arm {fact('CPU part')}").lower().split()
    brand = "_".join([word for word in words if word not in ("intel", "amd")][:1])
    if fact("vendor_id") == "AuthenticAMD" and fact("cpu family") in ("25", "26"):
        model = int(fact("model"))
        is_zen4 = any([model in range(first, first + 16) for first in (0x10, 0x60, 0x70, 0xA0)])
        return f"{brand}_zen{5 if fact('cpu family') == '26' else 4 if is_zen4 else 3}"
    return f"{brand}_{capability.removesuffix('_bf16')}"


def machine_here() -> Machine:
    facts = harness.facts()
    capability = facts["lstm_ext_cpu_capability"]
    if capability is None:
        raise SystemExit("renew.py: expected the compiled extension, and it is not loaded: make build")
    name = name_of(Path("/proc/cpuinfo").read_text(), str(capability))
    return Machine((name, f"{name}_avx2"), str(facts["cpu"]), str(capability), int(str(facts["cores"])))


# ---- the records


class Entry(NamedTuple):
    path: Path
    record: Result

    @property
    def facts(self) -> Result:
        return self.record["facts"]

    @property
    def machine(self) -> str:
        """By the name of the record, or by its facts where the name has none."""
        found = uses.FILE.fullmatch(self.path.name)
        if found:
            return f"{found['machine']}, {found['cores']} cores"
        return f"{self.facts['cpu']}, {self.facts['lstm_ext_cpu_capability']}"


def entries(folder: Path = RESULTS) -> list[Entry]:
    """All records of a processor; those of a GPU are made by `make gpu-bench`."""
    paths = sorted(path for path in folder.glob("*.json") if not path.stem.startswith(("local", "gpu")))
    return [Entry(path, pages.read(path)) for path in paths]


def sources() -> list[str]:
    """The modules of the suite; what makes the tables, and what is of a GPU, is none of them."""
    paths = [Path(getattr(module, "__file__", None) or "") for module in sys.modules.values()]
    names = {path.name for path in paths if path.parent == HERE}
    return sorted(f"benchmarks/{name}" for name in names - {Path(__file__).name, "gpu_shapes.py"})


def changes_since(entry: Entry) -> str:
    """Why a record is older than the code; empty where it is not."""
    commit = entry.facts["git_commit"] or "no commit"
    if commit.endswith("+changes"):
        return "measured with changes that no commit has"
    count = ages.commits_since(commit, "csrc", "lstm_ext", *sources())
    if count is None:
        return "its commit is not in this checkout"
    return f"{count} commit{'s' if count > 1 else ''} since" if count else ""


def elsewhere(entry: Entry, machine: Machine) -> str:
    """Why this machine cannot renew a record; empty where it can."""
    return "" if entry.machine in machine.own else f"this is {machine.own[0]}"


def listed(found: list[Entry], machine: Machine) -> str:
    rows = []
    for entry in found:
        age, here = (
            changes_since(entry) or "newer than the code",
            elsewhere(entry, machine) or "can be renewed here",
        )
        facts = entry.facts
        rows.append([entry.path.stem, ages.dated(facts), entry.machine, facts["git_commit"], age, here])
    return "\n".join(table(["record", "date", "machine", "commit", "code", "here"], rows))


# ---- measuring


def measure(path: Path, command: list[str], held: dict[str, str]) -> Path:
    """The new record, in build/: git does not see it there, so that the next benchmark finds no change."""
    measured = ROOT / "build" / path.name
    measured.parent.mkdir(exist_ok=True)
    program, *arguments = command
    command = [sys.executable, str(HERE / program), *arguments, "--output", str(measured)]
    print(f"{path.stem}: {' '.join(command)}", flush=True)
    if subprocess.run(command, env=os.environ | held).returncode:
        raise SystemExit(f"renew.py: {program} failed, and {path} stays as it was")
    return measured


def renew_pages() -> None:
    """The tables, and those of the pictures that a page shows."""
    pages.main([])
    with tempfile.TemporaryDirectory() as folder:
        pages.main(["--pictures", folder])
        for picture in Path(folder).iterdir():
            if (ROOT / "docs" / picture.name).exists():
                shutil.copy(picture, ROOT / "docs")


def main(arguments: list[str] | None = None) -> int:
    found = entries()
    parser = harness.parser_of(__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of records, as --list shows them")
    parser.add_argument("--list", action="store_true", help="show all records, and measure nothing")
    parser.add_argument("--force", action="store_true", help="measure also what is newer than the code")
    parser.add_argument(
        "--new",
        action="store_true",
        help="measure the suite, the C library, and torch with malloc as it is, where they have no record",
    )
    given = parser.parse_args(arguments)
    if unknown := set(given.names) - {entry.path.stem for entry in found}:
        parser.error(f"expected names that --list shows, got {', '.join(sorted(unknown))}")
    machine = machine_here()
    if given.list:
        print(listed(found, machine))
        return 0
    chosen = [entry for entry in found if not given.names or entry.path.stem in given.names]
    here = [entry for entry in chosen if not elsewhere(entry, machine)]
    if given.names and (refused := [entry for entry in chosen if entry not in here]):
        parser.error("; ".join(f"{e.path.stem} cannot be renewed: {elsewhere(e, machine)}" for e in refused))
    stems = [f"{kind}_{machine.names[0]}_{machine.cores}_cores" for kind in NEW]
    new = [stem for stem in stems if stem not in [entry.path.stem for entry in found]]
    due = [entry for entry in here if given.force or changes_since(entry)]
    for entry in [entry for entry in here if entry not in due]:
        print(f"{entry.path.stem}: newer than the code; --force measures it all the same")
    for stem in () if given.new or given.names else new:
        print(f"{stem}: there is no record of this machine; --new measures it, {NEW[stem.split('_')[0]]}")
    if not due and not (new and given.new):
        print("nothing to measure")
        return 0
    if ages.git("status", "--porcelain", "--", "csrc", "lstm_ext", "benchmarks/*.py"):
        raise SystemExit(
            "renew.py: expected a checkout without changes, since a record names its commit; csrc/, lstm_ext/ or a "
            "benchmark has some: commit them"
        )
    measured = []
    try:
        for entry in due:
            held = entry.facts.get("set_by_environment", {})
            measured.append(measure(entry.path, command_of(entry.record), held))
        for stem in new if given.new else ():
            command = ["bench.py", *ARGUMENTS[stem.split("_")[0]]]
            measured.append(measure(RESULTS / f"{stem}.json", command, {}))
    finally:
        for path in measured:
            path.replace(RESULTS / path.name)
    renew_pages()
    return 0


if __name__ == "__main__":
    sys.exit(main())
