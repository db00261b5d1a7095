"""``python -m lstm_ext.native_library PREFIX`` builds the C library: LSTM layers without Python and torch.

It compiles the CPU kernels and ``csrc/library`` into::

    PREFIX/include/lstm_ext.h            the interface
    PREFIX/lib/liblstm_ext.so            needs the C library of the system, and nothing else
    PREFIX/lib/liblstm_ext.a             for static linking, which also needs a C++ compiler's libstdc++
    PREFIX/lib/pkgconfig/lstm_ext.pc

``CXX`` names the compiler, which may be one for AArch64; ``CXXFLAGS`` has more flags for it; ``LSTM_EXT_CPU_SETS`` the
instruction sets.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .native import config
from .native.config import BuildError

__all__ = ["build"]

_HEADER = Path("library") / "lstm_ext.h"


def build(prefix: Path) -> Path:
    """Build the C library.

    Args:
        prefix: the folder that gets ``include`` and ``lib``; it is made if it is not there.

    Returns:
        the path of the shared library.

    Raises:
        lstm_ext.native.config.BuildError: there is no compiler, or it fails; the text says why.
    """
    csrc = config.source_dir()
    if csrc is None:
        raise BuildError(f"the C++ sources were not found beside {config.PACKAGE}: reinstall lstm_ext.")
    command, _ = config.find_compiler(openmp=False)
    compiler = [command] if shutil.which(command) else shlex.split(command)
    machine = _run([*compiler, "-dumpmachine"]).strip()
    target = machine.partition("-")[0]
    if target not in config.CPU_SETS or "linux" not in machine:
        raise BuildError(
            f"the C library is for Linux on x86-64 and aarch64, and `{command}` compiles for {machine}."
        )
    sets = config.cpu_sets() if target == config.machine() else tuple(config.CPU_SETS[target])
    header = (csrc / _HEADER).read_text()
    with tempfile.TemporaryDirectory() as folder:
        whole = _object(compiler, csrc, sets, _functions(header), Path(folder))
        return _install(compiler, whole, csrc / _HEADER, prefix.absolute())


def _functions(header: str) -> list[str]:
    """The names of the functions that the header declares."""
    return re.findall(r"^LSTM_EXT_API .*?\b(lstm_ext_\w+)\(", header, re.MULTILINE)


def _object(
    compiler: list[str], csrc: Path, sets: tuple[str, ...], functions: list[str], folder: Path
) -> Path:
    """All sources as one object, in which nothing but the functions is visible."""
    more = shlex.split(os.environ.get("CXXFLAGS", ""))

    def compiled(source: Path) -> str:
        found = folder / f"{source.stem}.o"
        _run([*compiler, *config.C_LIBRARY_FLAGS, *more, f"-I{csrc}", "-c", str(source), "-o", str(found)])
        return str(found)

    # Those of the kernels take longest.
    sources = sorted(config.c_library_sources(csrc, sets), key=lambda path: -path.stem.startswith("kernels_"))
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(compiled, sources))
    whole = folder / "lstm_ext.o"
    # An archive of the single objects would lose the kernels, which are referred to weakly. Groups would make the
    # linker of a program replace functions of the library by others of the same name.
    _run([*compiler, "-r", "-nostdlib", "-Wl,--force-group-allocation", *objects, "-o", str(whole)])
    kept = [f"--keep-global-symbol={name}" for name in functions]
    _run([_tool(compiler, "objcopy"), *kept, str(whole)])
    return whole


def _install(compiler: list[str], whole: Path, header: Path, prefix: Path) -> Path:
    version = re.search(r"^#define LSTM_EXT_ABI_VERSION (\d+)$", header.read_text(), re.MULTILINE)
    assert version is not None
    lib = prefix / "lib"
    (lib / "pkgconfig").mkdir(parents=True, exist_ok=True)
    (prefix / "include").mkdir(exist_ok=True)
    shutil.copyfile(header, prefix / "include" / header.name)
    soname = f"liblstm_ext.so.{version[1]}"
    linked = whole.with_name(soname)
    more = shlex.split(os.environ.get("CXXFLAGS", ""))
    _run([
        *compiler, *more, "-shared", str(whole), "-static-libstdc++", "-static-libgcc", "-Wl,--exclude-libs,ALL",
        "-Wl,--gc-sections", "-Wl,--as-needed", "-Wl,-z,now", f"-Wl,-soname,{soname}", "-s", "-o", str(linked),
    ])  # fmt: skip
    archive = whole.with_name("liblstm_ext.a")
    _run([_tool(compiler, "ar"), "rcs", str(archive), str(whole)])
    for file in (linked, archive):
        _replace(file, lib / file.name)
    link = lib / "liblstm_ext.so"
    link.unlink(missing_ok=True)
    link.symlink_to(soname)
    (lib / "pkgconfig" / "lstm_ext.pc").write_text(
        f"prefix={prefix}\n"
        "includedir=${prefix}/include\n"
        "libdir=${prefix}/lib\n\n"
        "Name: lstm_ext\n"
        "Description: LSTM layers on the CPU, for programs in C and C++\n"
        f"Version: {config.VERSION}\n"
        'Cflags: -I"${includedir}"\n'
        'Libs: -L"${libdir}" -llstm_ext\n'
        "Libs.private: -lstdc++ -lm\n"
    )
    return lib / soname


def _replace(file: Path, target: Path) -> None:
    """Programs that run keep the library they have."""
    unfinished = target.with_name(f"{target.name}.{os.getpid()}")
    shutil.copyfile(file, unfinished)
    unfinished.chmod(0o755 if ".so" in target.name else 0o644)
    unfinished.replace(target)


def _tool(compiler: list[str], name: str) -> str:
    """The path of a tool that belongs to the compiler."""
    found = shutil.which(_run([*compiler, f"-print-prog-name={name}"]).strip())
    if found is None:
        raise BuildError(f"{name} was not found: install binutils.")
    return found


def _run(command: Sequence[str]) -> str:
    """The output, or a BuildError with the first complaint."""
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode != 0:
        said = config.first_error(run.stderr, f"exit code {run.returncode}")
        raise BuildError(f"`{Path(command[0]).name}` failed: {said}")
    return run.stdout


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lstm_ext.native_library",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("prefix", type=Path, metavar="PREFIX", help="the folder to install into")
    options = parser.parse_args(arguments)
    try:
        print(build(options.prefix))
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
