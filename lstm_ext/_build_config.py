"""The one description of the compiled extension, used by setup.py (ahead of time) and _backend.py (on first use).

It is two libraries. The operators' (_ops) has the kernels and registers the operators; it needs libtorch and no
Python, so that a C++ process can load it too. The Python module (_C), one source, is linked with it and calls it
directly. Both lie in one folder.

It imports neither torch nor anything of this package: setup.py loads it by path.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

VERSION = "0.1.0"
MODULE = "lstm_ext._C"
OPS_MODULE = "lstm_ext._ops"  # not one that Python can import: setuptools names libraries so
OPS_LIBRARY = "_ops.so"
PACKAGE = Path(__file__).resolve().parent
# Written beside every library that we build, after it: says for which torch it was built.
RECORD = "_build_info.json"

# Neither -std= (torch adds the one its headers need), nor -march= (each kernel source names its own instruction
# set and the choice is made at load time), nor -g (most Pythons hand theirs on; it multiplies the library's size).
COMPILE_FLAGS = [
    "-O3",
    "-g0",
    "-fopenmp",
    "-fvisibility=hidden",
    "-fvisibility-inlines-hidden",
    "-Wall",
    "-Wextra",
    f'-DLSTM_EXT_VERSION="{VERSION}"',
]
# -fopenmp is missing here on purpose. It would link the system's libgomp, but torch's wheels carry their own copy,
# in some releases under another name: two OpenMP runtimes in one process have two thread pools and two thread
# counts. Left undefined, GOMP_* is found in whichever runtime libtorch_cpu.so itself depends on.
LINK_FLAGS: list[str] = []


def ops_link_flags(file_name: str) -> list[str]:
    """The operators' library, by the name under which the Python module asks the system for it."""
    # torch's build on first use also links libtorch_python, which nothing in this library calls: not taken along.
    return [*LINK_FLAGS, f"-Wl,-soname,{file_name}", "-Wl,--as-needed"]


def module_link_flags(ops_library: str | Path) -> list[str]:
    """The Python module, which finds the operators' library in its own folder."""
    return [*LINK_FLAGS, str(ops_library), "-Wl,-rpath,$ORIGIN"]


INSTALL_COMPILER = "install one, e.g. `apt install g++` (Debian, Ubuntu) or `dnf install gcc-c++` (Fedora)"
INSTALL_TORCH = (
    "building lstm_ext needs the torch that it will run with: `pip install torch setuptools ninja`, "
    "then `pip install --no-build-isolation .`"
)


class BuildError(RuntimeError):
    """A build that cannot work. The message is one sentence that says what to do."""


def is_supported_platform() -> bool:
    return sys.platform == "linux" and platform.machine().lower() in ("x86_64", "amd64")


def source_dir() -> Path | None:
    """csrc/: inside an installed package, beside the package in a checkout or sdist."""
    if (PACKAGE / "csrc" / "bindings.cpp").is_file():
        return PACKAGE / "csrc"
    root = PACKAGE.parent
    # setup.py tells our csrc/ from one that another project left in site-packages.
    if (root / "setup.py").is_file() and (root / "csrc" / "bindings.cpp").is_file():
        return root / "csrc"
    return None


def sources(directory: Path) -> list[Path]:
    """Every C++ file below `directory`, in a fixed order. It is also the only include directory."""
    found = sorted(directory.rglob("*.cpp"))
    if not found:
        raise BuildError(f"there are no C++ sources in {directory}: reinstall lstm_ext.")
    by_stem: dict[str, Path] = {}
    for path in found:
        # torch's JIT build names objects by stem: of two with the same one, the second would overwrite the first.
        other = by_stem.setdefault(path.stem, path)
        if other is not path:
            raise BuildError(f"{other} and {path} have the same stem: rename one of them.")
    return found


def split_sources(directory: Path) -> tuple[list[Path], list[Path]]:
    """The sources of the operators' library, and those of the Python module."""
    found = sources(directory)
    bindings = [path for path in found if path.name == "bindings.cpp"]
    return [path for path in found if path not in bindings], bindings


def digest(directory: Path, *more: str) -> str:
    """Changes with every source, header and flag, and with `more`."""
    result = hashlib.sha256()
    for path in sorted([*directory.rglob("*.cpp"), *directory.rglob("*.h")]):
        result.update(path.relative_to(directory).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    flags = (*COMPILE_FLAGS, "--", *ops_link_flags(OPS_LIBRARY), "--", *module_link_flags(OPS_LIBRARY))
    for text in (*flags, "--", *more):
        result.update(text.encode() + b"\0")
    return result.hexdigest()[:16]


def search_path() -> str:
    """PATH, with this Python's own scripts at the end: there is ninja in an environment that is not activated."""
    return os.pathsep.join(filter(None, [os.environ.get("PATH"), sysconfig.get_path("scripts")]))


def find_compiler() -> tuple[str, str]:
    """The C++ compiler's command and the first line of its --version, or a BuildError."""
    chosen = os.environ.get("CXX")
    candidates = [chosen] if chosen else ["c++", "g++", "clang++"]
    problem = f"no C++ compiler was found (looked for {', '.join(candidates)}): {INSTALL_COMPILER}."
    for command in candidates:
        # A path with a space in it, or a command with arguments.
        words = [command] if shutil.which(command) else shlex.split(command)
        if not words or shutil.which(words[0]) is None:
            continue
        try:
            run = subprocess.run([*words, "--version"], capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired) as error:
            problem = (
                f"the C++ compiler `{command}` does not run ({error}): repair it, or set CXX to another one."
            )
            continue
        if run.returncode != 0:
            said = (run.stderr.strip() or run.stdout.strip() or f"exit code {run.returncode}").splitlines()[0]
            problem = (
                f"the C++ compiler `{command}` does not work ({said}): repair it, or set CXX to another one."
            )
            continue
        version = run.stdout.splitlines()[0] if run.stdout else command
        if "clang" in run.stdout and not _process_exports("__kmpc_fork_call"):
            problem = (
                f"clang (`{command}`) calls an OpenMP runtime that this torch does not carry: "
                "install g++ and set CXX=g++."
            )
            continue
        return command, version
    raise BuildError(problem)


def _process_exports(symbol: str) -> bool:
    # torch, which is imported by now, makes its OpenMP runtime visible to the whole process.
    return hasattr(ctypes.CDLL(None), symbol)


def check_headers() -> None:
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        raise BuildError(
            "Python.h was not found: install Python's headers, e.g. `apt install python3-dev` (Debian, Ubuntu) "
            "or `dnf install python3-devel` (Fedora)."
        )


def write_record(
    directory: Path, torch_version: str, compiler: str, source_digest: str, **more: object
) -> None:
    record = {
        "torch": torch_version,
        "python": platform.python_version(),
        "compiler": compiler,
        "sources": source_digest,
        **more,
    }
    # Complete or absent, also when we are killed in between.
    unfinished = directory / f"{RECORD}.{os.getpid()}"
    unfinished.write_text(json.dumps(record, indent=1) + "\n")
    unfinished.replace(directory / RECORD)


def read_record(directory: Path) -> dict | None:
    try:
        record = json.loads((directory / RECORD).read_text())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("torch"), str) else None
