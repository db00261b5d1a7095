"""Compiles drivers and torch extensions against the emulator, into build/simt, keyed by what goes into them."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
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
# The hooks are in the driver's code only; the emulator's objects serve two modes.
EMULATOR_FLAGS = {
    **COMPILE_FLAGS,
    "asan": ["-O1", "-g1", "-fsanitize=address"],
    "race": COMPILE_FLAGS["plain"],
}
LINK_FLAGS = {"asan": ["-fsanitize=address,undefined"]}
# "#pragma unroll" is for nvcc.
COMMON_FLAGS = ["-std=c++17", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-DLSTM_EXT_SIMT"]
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


def _digest(command: Sequence[str], files: Iterable[Path]) -> str:
    content = hashlib.sha256("\0".join(command).encode())
    for path in sorted(set(files)):
        content.update(str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path).encode())
        content.update(path.read_bytes())
    return content.hexdigest()[:20]


def _headers(*folders: Path) -> list[Path]:
    # All that a source might include: cheaper to read than to ask the compiler.
    suffixes = {".h", ".def", ".cuh", ".cu", ".inc"}
    return [path for folder in folders for path in folder.rglob("*") if path.suffix in suffixes]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise BuildError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    if done.stderr:
        print(done.stderr)


def _object(source: Path, flags: list[str], headers: list[Path]) -> Path:
    language = ["-x", "c++"] if source.suffix in (".cu", ".cuh") else []
    digest = _digest([compiler(), *flags], [source, *headers])
    target = BUILD / "objects" / f"{source.stem}-{digest}.o"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        # Two processes may build the same thing: each its own file, the name given when it is whole.
        partial = target.with_suffix(f".{os.getpid()}.o")
        _run([compiler(), *flags, *language, "-c", str(source), "-o", str(partial)])
        partial.replace(target)
    return target


def compile_driver(
    sources: Sequence[Path | str],
    mode: str = "plain",
    defines: Sequence[str] = (),
    include_dirs: Sequence[Path | str] = (),
    flags: Sequence[str] = (),
) -> Path:
    """Compiles C++ sources (.cpp, .cu) with the emulator into a program; compiled before, it is only looked up.

    `mode` is plain, asan or race; `defines` are NAME or NAME=value; `include_dirs` come before the project's own.
    `flags` are for the sources, not for the emulator.
    """
    # As system headers: the warnings we want are about our code.
    system = ["-isystem", str(cuda_include())]
    common = [*COMMON_FLAGS, *(f"-I{path}" for path in (ROOT / "tests", ROOT / "csrc")), *system]
    first = [f"-I{path}" for path in include_dirs]
    driver_flags = [*COMPILE_FLAGS[mode], *first, *common, *(f"-D{define}" for define in defines), *flags]
    emulator_flags = [*EMULATOR_FLAGS[mode], *common]
    # Not csrc's: a kernel that changes leaves the emulator's objects as they are.
    own_headers = sorted(HERE.glob("*.h"))
    headers = _headers(HERE, ROOT / "csrc", *map(Path, include_dirs))
    jobs = [(Path(source).resolve(), driver_flags, headers) for source in sources]
    jobs += [(path, emulator_flags, own_headers) for path in EMULATOR]
    with ThreadPoolExecutor(MAX_JOBS) as pool:
        objects = list(pool.map(lambda job: _object(*job), jobs))
    name = Path(sources[0]).stem
    program = BUILD / f"{name}-{mode}-{_digest([str(path) for path in objects], [])}"
    if not program.exists():
        partial = program.with_suffix(f".{os.getpid()}")
        _run([compiler(), *LINK_FLAGS.get(mode, []), *map(str, objects), "-ldl", "-o", str(partial)])
        partial.replace(program)
    return program


# Memory has no types in PTX: an f32 may be stored and loaded as a b32.
PTX_FLAGS = ["-fno-strict-aliasing", "-ffp-contract=off"]
# A translated kernel is one long function. With checks in it GCC optimises it for a quarter of an hour and more.
PTX_ASAN_FLAGS = ["-O0"]
PTX_RUNTIME = HERE / "ptx" / "runtime.cpp"


def compile_ptx_driver(
    driver: Path | str, translated: Sequence[Path | str], mode: str = "plain", **more
) -> Path:
    """A driver whose kernels are C++ that ptx/translate.py made of nvcc's PTX."""
    flags = [*PTX_FLAGS, *(PTX_ASAN_FLAGS if mode == "asan" else [])]
    return compile_driver([driver, PTX_RUNTIME, *translated], mode, flags=flags, **more)


def compile_ptx_library(translated: Sequence[Path], module: Path) -> Path:
    """A library that, once loaded, has `module` (of build_extension_module) run translated kernels."""
    flags = [*COMPILE_FLAGS["plain"], *COMMON_FLAGS, *PTX_FLAGS, "-fPIC", f"-I{ROOT / 'tests'}"]
    flags += ["-isystem", str(cuda_include())]
    headers = _headers(HERE, ROOT / "csrc")
    with ThreadPoolExecutor(MAX_JOBS) as pool:
        objects = list(pool.map(lambda source: _object(source, flags, headers), [PTX_RUNTIME, *translated]))
    name = f"{translated[0].stem}-{_digest([str(path) for path in objects], [module])}.so"
    library = BUILD / name
    if not library.exists():
        partial = library.with_suffix(f".{os.getpid()}.so")
        _run([compiler(), "-shared", *map(str, objects), str(module), "-o", str(partial)])
        partial.replace(library)
    return library


def build_extension_module(
    name: str, sources: Sequence[Path | str], include_dirs: Sequence[Path | str] = ()
) -> ModuleType:
    """A Python module of torch whose kernels run on the emulator (mode plain), compiled without CUDA."""
    from torch.utils import cpp_extension

    folder = BUILD / "extensions" / name
    folder.mkdir(parents=True, exist_ok=True)
    plain_cpp = []
    for source in map(Path, sources):
        if source.suffix == ".cu":
            # cpp_extension would hand a .cu to nvcc.
            wrapper = folder / f"{source.stem}_cu.cpp"
            text = f'#include "{source.resolve()}"\n'
            if not wrapper.exists() or wrapper.read_text() != text:
                wrapper.write_text(text)
            plain_cpp.append(wrapper)
        else:
            plain_cpp.append(source.resolve())
    with locked(folder / "building"):
        (folder / "lock").unlink(missing_ok=True)  # torch's own, left by a process that was killed
        # ninja names objects by their sources' names, which must not repeat; its dependency files find changed headers.
        return cpp_extension.load(
            name=name,
            sources=[str(path) for path in (*plain_cpp, *EMULATOR)],
            extra_cflags=["-O2", "-Wno-unknown-pragmas", "-DLSTM_EXT_SIMT", f"-isystem{cuda_include()}"],
            extra_include_paths=[str(path) for path in (ROOT / "tests", ROOT / "csrc", *include_dirs)],
            extra_ldflags=["-ldl"],
            build_directory=str(folder),
            with_cuda=False,
        )
