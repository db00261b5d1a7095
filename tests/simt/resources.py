"""Registers and shared memory of every kernel and architecture, as resources.json records them; and how many
instructions the loop over the steps of a persistent kernel has.

cd tests; python -m simt.resources            what has changed
cd tests; python -m simt.resources --write    records what is
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from simt import nvcc, sass

TABLE = Path(__file__).with_name("resources.json")
# By source, kernel and architecture.
Table = dict[str, dict[str, dict[str, dict[str, int]]]]


def units() -> list[nvcc.Unit]:
    return [nvcc.Unit(source, arch) for source in nvcc.sources() for arch in nvcc.architectures()]


def entry(kernel: nvcc.Resources) -> dict[str, int]:
    return {"registers": kernel.registers, "shared": kernel.shared, "barriers": kernel.barriers}


LOOPS = "persistent_kernel<"
SLACK = 0.1  # of a loop's length


def loops(compilations: nvcc.Compilations) -> dict[str, dict[str, int]]:
    """By kernel and architecture. Needs the disassembler."""
    found: dict[str, dict[str, int]] = {}
    for unit in units():
        if unit.source.stem.startswith("persistent"):
            for name, code in sass.opcodes(compilations[unit].path).items():
                if name.startswith(LOOPS):
                    found.setdefault(name, {})[unit.architecture] = len(code.longest_loop())
    return found


def recorded_loops() -> dict[str, dict[str, int]]:
    return json.loads(TABLE.read_text())["loops"]


def longer_loops(before: dict[str, dict[str, int]], after: dict[str, dict[str, int]]) -> list[str]:
    """Those whose length has changed by more than the slack, and those that only one of the tables has."""
    lines = []
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name, {}), after.get(name, {})
        for arch in sorted(old.keys() | new.keys()):
            was, now = old.get(arch, 0), new.get(arch, 0)
            if abs(now - was) > SLACK * was:
                lines.append(f"{name}, {arch}: {was} -> {now} instructions in the loop over the steps")
    return lines


def measure(compilations: nvcc.Compilations) -> Table:
    table: Table = {}
    for unit in units():
        kernels = table.setdefault(unit.source.stem, {})
        for name, found in nvcc.resources(compilations[unit].log).items():
            kernels.setdefault(name, {})[unit.architecture] = entry(found)
    return table


def recorded() -> tuple[str, Table]:
    """The version of nvcc, and its table."""
    data: dict[str, Any] = json.loads(TABLE.read_text())
    return data["nvcc"], data["kernels"]


def write(table: Table, lengths: dict[str, dict[str, int]]) -> None:
    """A kernel's architecture a line."""
    lines = [f'{{"nvcc": "{nvcc.version()}", "kernels": {{']
    for s, (source, kernels) in enumerate(sorted(table.items())):
        lines.append(f' "{source}": {{')
        for k, (kernel, architectures) in enumerate(sorted(kernels.items())):
            lines.append(f"  {json.dumps(kernel)}: {{")
            rows = [f'   "{arch}": {json.dumps(numbers)}' for arch, numbers in architectures.items()]
            lines.append(",\n".join(rows) + "}" + ("," if k + 1 < len(kernels) else "}"))
        lines[-1] += "," if s + 1 < len(table) else "},"
    lines.append(' "loops": {')
    rows = [f"  {json.dumps(kernel)}: {json.dumps(counts)}" for kernel, counts in sorted(lengths.items())]
    lines.append(",\n".join(rows) + "}}")
    TABLE.write_text("\n".join(lines) + "\n")


def differences(before: Table, after: Table) -> list[str]:
    def rows(table: Table) -> dict[tuple[str, str, str], dict[str, int]]:
        return {
            (source, kernel, arch): numbers
            for source, kernels in table.items()
            for kernel, architectures in kernels.items()
            for arch, numbers in architectures.items()
        }

    old, new = rows(before), rows(after)
    lines = []
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            lines.append(f"{', '.join(key)}: {old.get(key, 'nothing')} -> {new.get(key, 'nothing')}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--write", action="store_true", help="records what is")
    arguments = parser.parse_args()
    if nvcc.find_nvcc() is None:
        sys.exit("error: nvcc was not found: set CUDA_HOME.")
    compilations = nvcc.Compilations(units())
    try:
        table, lengths = measure(compilations), loops(compilations)
    except nvcc.CompileError as error:
        sys.exit(f"error: {error}")
    finally:
        compilations.close()
    version, before = recorded() if TABLE.exists() else ("none", {})
    shorter = longer_loops(recorded_loops(), lengths) if "loops" in json.loads(TABLE.read_text()) else []
    if version != nvcc.version():
        print(f"recorded with nvcc {version}, measured with {nvcc.version()}")
    print("\n".join([*differences(before, table), *shorter]) or "no differences")
    if arguments.write:
        write(table, lengths)


if __name__ == "__main__":
    main()
