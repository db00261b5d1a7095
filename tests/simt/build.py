"""Compiles drivers and torch extensions against the emulator, into build/simt, keyed by what goes into them."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

from locks import locked

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "simt"
EMULATOR = sorted(
    HERE / f"{name}.cpp"
    for name in (
        "async_copy",
        "block_barrier",
        "fiber",
        "global_memory",
        "launch",
        "race",
        "race_hooks",
        "scheduler",
        "shared_memory",
        "tensor_core",
        "warp",
        "wavefronts",
        "weak_memory",
    )
)

# What a mode is for is in README.md. The race detector's hooks are in the emulator, so libtsan is not linked.
COMPILE_FLAGS = {
    "plain": ["-O2"],
    "asan": ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "race": ["-O1", "-g1", "-fsanitize=thread"],
    "ucontext": ["-O2", "-DSIMT_UCONTEXT"],  # fibers as other processors than x86-64 have them
}
# The hooks are in the kernels' code only; the emulator's objects serve two modes.
EMULATOR_FLAGS = {
    **COMPILE_FLAGS,
    "asan": ["-O1", "-g1", "-fsanitize=address"],
    "race": COMPILE_FLAGS["plain"],
}
LINK_FLAGS = {"asan": ["-fsanitize=address,undefined"]}
# "#pragma unroll" is for nvcc.
COMMON_FLAGS = ["-std=c++17", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-DLSTM_EXT_SIMT"]
FOLDERS = (ROOT / "tests", ROOT / "csrc")
MAX_JOBS = 2


class BuildError(RuntimeError):
    """The compiler's output."""


def compiler() -> str | None:
    """g++ and no other: the race detector is made of its hooks."""
    return shutil.which(os.environ.get("LSTM_EXT_SIMT_CXX", "g++"))


def cuda_include() -> Path | None:
    """The folder of cuda_fp16.h: CUDA_HOME's, nvcc's, or that of NVIDIA's wheels."""
    candidates = [
        Path(os.environ[name]) / "include" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)
    ]
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        candidates.append(Path(nvcc).resolve().parents[1] / "include")
    candidates += sorted(Path("/usr/local").glob("cuda*/include"), reverse=True)
    wheels = importlib.util.find_spec("nvidia")
    for folder in (wheels.submodule_search_locations or ()) if wheels is not None else ():
        candidates += sorted(Path(folder).glob("*/include"), reverse=True)
    wanted = ("cuda_fp16.h", "cuda_bf16.h", "driver_types.h", "crt/host_defines.h")
    return next((path for path in candidates if all((path / name).is_file() for name in wanted)), None)


def missing() -> str | None:
    """Why nothing can be compiled here, in words for a skip."""
    if compiler() is None:
        return "the emulator needs g++"
    if cuda_include() is None:
        return "the emulator needs CUDA's headers (cuda_fp16.h); CUDA_HOME says where they are"
    return None


def _digest(command: Sequence[str], files: Iterable[tuple[str, bytes]] = ()) -> str:
    content = hashlib.sha256("\0".join(command).encode())
    for name, text in sorted(files):
        content.update(name.encode() + b"\0" + text)
    return content.hexdigest()[:20]


_INCLUDE = re.compile(rb'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)


def _included(source: Path, folders: Sequence[Path]) -> dict[str, bytes]:
    """What the source includes by quotes, and what that includes, by the names that stand there."""
    found: dict[str, bytes] = {}
    todo = [source]
    while todo:
        path = todo.pop()
        for name in map(bytes.decode, _INCLUDE.findall(path.read_bytes())):
            places = (folder / name for folder in (path.parent, *folders))
            header = next((place for place in places if place.is_file()), None)
            if header is not None and name not in found:
                found[name] = header.read_bytes()
                todo.append(header)
    return found


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise BuildError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    if done.stderr:
        print(done.stderr)


def _object(source: Path, flags: Sequence[str], folders: Sequence[Path]) -> Path:
    """`folders` are those in which headers are looked for, the first one first. An object is the same wherever they
    lie: so a copy of csrc/ in which a file differs needs the objects only that include it."""
    language = ["-x", "c++"] if source.suffix in (".cu", ".cuh") else []
    files = {source.name: source.read_bytes(), **_included(source, folders)}
    digest = _digest([compiler(), *flags], files.items())
    target = BUILD / "objects" / f"{source.stem}-{digest}.o"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target.with_suffix(".building")):
            if not target.exists():
                partial = target.with_suffix(
                    f".{os.getpid()}.o"
                )  # the name is given when the object is whole
                paths = [f"-I{folder}" for folder in folders]
                _run([compiler(), *flags, *paths, *language, "-c", str(source), "-o", str(partial)])
                partial.replace(target)
    return target


@dataclass(frozen=True)
class Sources:
    """Compiled with the same flags. `folders` come in front of the project's own."""

    paths: Sequence[Path]
    flags: Sequence[str]
    folders: Sequence[Path] = ()


def _link(name: str, flags: Sequence[str], parts: Sequence[Sources], libraries: Sequence[str]) -> Path:
    """Compiles and links; compiled before, it is only looked up."""
    jobs = [(path, part.flags, (*part.folders, *FOLDERS)) for part in parts for path in part.paths]
    with ThreadPoolExecutor(MAX_JOBS) as pool:
        objects = [str(path) for path in pool.map(lambda job: _object(*job), jobs)]
    stem, suffix = os.path.splitext(name)
    target = BUILD / f"{stem}-{_digest([*flags, *objects, *libraries])}{suffix}"
    if not target.exists():
        partial = target.with_name(f"{target.name}.{os.getpid()}")
        _run([compiler(), *flags, *objects, *libraries, "-o", str(partial)])
        partial.replace(target)
    return target


def flags_of(mode: str, *more: str) -> list[str]:
    """Of kernels, and of what else a driver has."""
    # As system headers: the warnings we want are about our code.
    return [*COMPILE_FLAGS[mode], *COMMON_FLAGS, "-isystem", str(cuda_include()), *more]


def _emulator(mode: str) -> Sources:
    return Sources(EMULATOR, [*EMULATOR_FLAGS[mode], *COMMON_FLAGS, "-isystem", str(cuda_include())])


def compile_driver(
    sources: Sequence[Path | str],
    mode: str = "plain",
    include_dirs: Sequence[Path | str] = (),
    flags: Sequence[str] = (),
) -> Path:
    """Compiles C++ sources (.cpp, .cu) with the emulator into a program.

    `mode` is plain, asan or race; `include_dirs` come before the project's own. `flags` are for the sources, not for
    the emulator.
    """
    paths = [Path(source).resolve() for source in sources]
    own = Sources(paths, flags_of(mode, *flags), [Path(path) for path in include_dirs])
    return _link(f"{paths[0].stem}-{mode}", LINK_FLAGS.get(mode, []), [own, _emulator(mode)], ["-ldl"])


# Memory has no types in PTX: an f32 may be stored and loaded as a b32.
PTX_FLAGS = ["-fno-strict-aliasing", "-ffp-contract=off"]
PTX_RUNTIME = HERE / "ptx" / "runtime.cpp"


def compile_ptx_driver(driver: Path | str, translated: Sequence[Path | str], mode: str = "plain") -> Path:
    """A driver whose kernels are C++ that ptx/translate.py made of nvcc's PTX."""
    return compile_driver([driver, PTX_RUNTIME, *translated], mode, flags=PTX_FLAGS)


def compile_ptx_library(translated: Sequence[Path], module: Path, mode: str = "plain") -> Path:
    """A library that, once loaded, has `module` (of compile_module) run translated kernels."""
    sources = Sources([PTX_RUNTIME, *translated], flags_of(mode, *PTX_FLAGS))
    return _link(f"{translated[0].stem}-{mode}.so", ["-shared"], [sources], [str(module)])


def compile_module(name: str, host: Sources, kernels: Sequence[Sources], mode: str = "plain") -> Path:
    """A Python module of torch whose kernels run on the emulator, compiled without CUDA.

    The mode is that of the kernels: accesses of the host's code are neither watched nor checked.
    """
    import torch
    from torch.utils import cpp_extension

    system = [sysconfig.get_path("include"), *cpp_extension.include_paths()]
    flags = ["-std=c++20", *(flag for flag in flags_of("plain") if not flag.startswith(("-std", "-W")))]
    flags += [f"-DTORCH_EXTENSION_NAME={name}", "-DTORCH_API_INCLUDE_EXTENSION_H"]
    flags += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    flags += [word for folder in system for word in ("-isystem", folder)]
    # The kernels come first: of a function that several objects have, the linker takes the first one.
    parts = [*kernels, replace(host, flags=[*host.flags, *flags]), _emulator(mode)]
    library = Path(torch.__file__).parent / "lib"
    libraries = [f"-L{library}", *("-ltorch", "-ltorch_cpu", "-ltorch_python", "-lc10", "-ldl")]
    link = ["-shared", f"-Wl,-rpath,{library}", *LINK_FLAGS.get(mode, [])]
    return _link(f"{name}-{mode}.so", link, parts, libraries)


def load_module(name: str, path: Path) -> ModuleType:
    """Functions are looked up when they are called: those of kernels that were left out never are."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    before = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_LAZY)
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.setdlopenflags(before)
    return module
