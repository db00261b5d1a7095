"""Registers and shared memory of every kernel and architecture, as resources.json records them; of the persistent
kernels how many instructions the loop over the steps has, how many of them others wait for (the turn, from the barrier
to the store), and how many products follow from each other (the chain); and the wavefronts of accesses to shared memory
on the emulator.

cd tests; python -m simt.resources            what has changed
cd tests; python -m simt.resources --write    records what is
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from simt import build, nvcc, sass
from simt.ptx_route import translated

TABLE = Path(__file__).with_name("resources.json")
# By source, kernel and architecture.
Table = dict[str, dict[str, dict[str, dict[str, int]]]]


def units() -> list[nvcc.Unit]:
    return [nvcc.Unit(source, arch) for source in nvcc.sources() for arch in nvcc.architectures()]


def entry(kernel: nvcc.Resources) -> dict[str, int]:
    return {"registers": kernel.registers, "shared": kernel.shared, "barriers": kernel.barriers}


LOOPS = "persistent_kernel<"
SLACK = 0.1  # of a loop's length
# By kernel and architecture.
Loops = dict[str, dict[str, dict[str, int]]]


def loops(compilations: nvcc.Compilations) -> Loops:
    """Needs the disassembler."""
    found: Loops = {}
    for unit in units():
        if unit.source.stem.startswith("persistent"):
            for name, code in sass.opcodes(compilations[unit].path).items():
                if name.startswith(LOOPS):
                    numbers = {"loop": len(code.longest_loop()), "turn": code.turn(), "chain": code.chain()}
                    found.setdefault(name, {})[unit.architecture] = numbers
    return found


def recorded_loops() -> Loops:
    return json.loads(TABLE.read_text())["loops"]


def longer_loops(before: Loops, after: Loops) -> list[str]:
    """Those whose numbers have changed by more than the slack, and those that only one of the tables has."""
    lines = []
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name, {}), after.get(name, {})
        for arch in sorted(old.keys() | new.keys()):
            for what in ("loop", "turn", "chain"):
                was, now = (table.get(arch, {}).get(what) for table in (old, new))
                if was is None or now is None or abs(now - was) > SLACK * was:
                    lines.append(f"{name}, {arch}: {what} {was} -> {now} instructions")
    return lines


# By the file of the access, and whether it is a load or a store of how many bytes: wavefronts, and how few there could
# be.
Wavefronts = dict[str, list[int]]
WAVEFRONTS = ("step", "persistent")  # kernels in bfloat16, by their driver


def wavefronts(kernels: str) -> Wavefronts:
    """All of one run of the driver, as nvcc compiles its kernels."""
    cuda = nvcc.CSRC / "cuda"
    sources = [translated(cuda / f"{name}_bf16.cu") for name in (kernels, "stepwise")]
    driver = Path(__file__).with_name(f"{kernels}_driver.cpp")
    program = build.compile_ptx_driver(driver, sources, "plain", defines=["BFLOAT_ONLY"])
    done = subprocess.run(
        [program], env={**os.environ, "SIMT_WAVEFRONTS": "yes"}, capture_output=True, text=True
    )
    if done.returncode != 0:
        raise RuntimeError(done.stdout + done.stderr)
    found: Wavefronts = {}
    for (file, _, access), (_, number, least) in counted(done.stdout).items():
        sums = found.setdefault(f"{file} {access}", [0, 0])
        sums[0] += number
        sums[1] += least
    return found


def counted(text: str) -> dict[tuple[str, int, str], tuple[int, int, int]]:
    """By file, line and access: accesses of a warp, their wavefronts, and how few there could be."""
    pattern = r"^wavefronts: (\S+):(\d+) (\w+ \d+): (\d+) accesses, (\d+) wavefronts, (\d+) at least$"
    lines = re.findall(pattern, text, re.MULTILINE)
    return {(file, int(line), access): (int(n), int(w), int(m)) for file, line, access, n, w, m in lines}


def recorded_wavefronts() -> dict[str, Wavefronts]:
    return json.loads(TABLE.read_text())["wavefronts"]


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


def write(table: Table, lengths: Loops, accesses: dict[str, Wavefronts]) -> None:
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
    lines.append(",\n".join(rows) + "},")
    lines.append(' "wavefronts": {')
    rows = [f"  {json.dumps(kernels)}: {json.dumps(found)}" for kernels, found in accesses.items()]
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
        accesses = {kernels: wavefronts(kernels) for kernels in WAVEFRONTS}
    except nvcc.CompileError as error:
        sys.exit(f"error: {error}")
    finally:
        compilations.close()
    version, before = recorded() if TABLE.exists() else ("none", {})
    shorter = longer_loops(recorded_loops(), lengths)
    if accesses != recorded_wavefronts():
        shorter.append(f"wavefronts: {recorded_wavefronts()} -> {accesses}")
    if version != nvcc.version():
        print(f"recorded with nvcc {version}, measured with {nvcc.version()}")
    print("\n".join([*differences(before, table), *shorter]) or "no differences")
    if arguments.write:
        write(table, lengths, accesses)


if __name__ == "__main__":
    main()
