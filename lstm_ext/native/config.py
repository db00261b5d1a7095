"""The one description of the compiled extension, used by setup.py (ahead of time) and jit.py (on request).

It is two libraries, in a wheel three (see KERNELS_LIBRARY). The operators' (_ops) has the kernels and registers the
operators; it needs libtorch and no Python, so that a C++ process can load it too. The Python module (_C), one source,
is linked with it and calls it directly. All lie in one folder.

With a torch that is built with CUDA, and nvcc, the operators' library has the CUDA kernels too (see "CUDA" below).

It imports neither torch nor anything of this package: setup.py loads it by path.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Between releases that of the next one, with .dev0 at its end.
VERSION = "0.2.0.dev0"
MODULE = "lstm_ext.native._C"
OPS_MODULE = "lstm_ext.native._ops"  # Python cannot import it: setuptools names libraries like this
OPS_LIBRARY = "_ops.so"
# A wheel has the CPU kernels in a library of their own, and the operators and the module for each of these torches.
KERNELS_LIBRARY = "_kernels.so"
# And those of CUDA, if it has them, with a library for each torch that registers them.
CUDA_KERNELS_LIBRARY = "_kernels_cuda.so"
TORCHES = ("2.11", "2.12", "2.13", "2.14", "2.15")
# For each machine the instruction sets that the CPU kernels are compiled for, in the order of preference, and what a
# processor needs for each: flags of Linux. avx512 also has the kernels of the tile engines, amx and avx512_bf16.
CPU_SETS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "avx512": ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx2", "fma"),
        "avx2": ("avx2", "fma", "f16c"),
    },
    "aarch64": {"neon": ()},
}
SOURCE_KINDS = ("cpp", "h", "def", "cu", "cuh")
TOGETHER = "operators_together.cpp"  # see split_sources
# The package's folder, and that of the two libraries.
PACKAGE = Path(__file__).resolve().parents[1]
LIBRARIES = Path(__file__).resolve().parent
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
# For nvcc. Neither -std= nor -gencode: torch adds its own, the latter from TORCH_CUDA_ARCH_LIST, but not if it finds
# "arch" in a flag. No paths either: a kernel includes nothing but the C++ standard library, CUDA and csrc/.
NVCC_FLAGS = [
    "-O3",
    "-Xcompiler=-fvisibility=hidden,-fvisibility-inlines-hidden,-Wall,-Wextra",
]
# -fopenmp is missing here on purpose. It would link the system's libgomp, but torch's wheels carry their own copy,
# in some releases under another name: two OpenMP runtimes in one process have two thread pools and two thread
# counts. Left undefined, GOMP_* is found in whichever runtime libtorch_cpu.so itself depends on.
LINK_FLAGS: list[str] = []


# The C library (native_library.py) has no OpenMP and no backward pass. Its one variable of a thread is in place before
# a step first asks for it.
C_LIBRARY_FLAGS = [
    *[flag for flag in COMPILE_FLAGS if flag != "-fopenmp"],
    "-std=c++17",
    "-fPIC",
    "-ftls-model=initial-exec",
    "-DLSTM_EXT_INFERENCE_ONLY",
]


def ops_library(torch_minor: str) -> str:
    """The name of the operators' library in a wheel."""
    return f"_ops-{torch_minor}.so"


def cuda_library(torch_minor: str) -> str:
    """The name of the library in a wheel that registers the CUDA kernels."""
    return f"_cuda-{torch_minor}.so"


def ops_library_of(module: Path) -> Path:
    """The operators' library that a Python module is linked with: `_ops-2.13.so` for `_C-2.13.*.so`, of a wheel."""
    minor = re.match(r"_C-(\d+\.\d+)\.", module.name)
    return module.with_name(ops_library(minor[1]) if minor else OPS_LIBRARY)


def ops_link_flags(file_name: str) -> list[str]:
    """Flags for the operators' library, with the name under which the Python module asks the system for it."""
    # torch's own builder also links libtorch_python, which this library does not use; --as-needed drops it.
    return [*LINK_FLAGS, f"-Wl,-soname,{file_name}", "-Wl,--as-needed"]


def module_link_flags(ops_library: str | Path) -> list[str]:
    """Flags for the Python module, which finds the operators' library in its own folder."""
    return [*LINK_FLAGS, str(ops_library), "-Wl,-rpath,$ORIGIN"]


INSTALL_COMPILER = "install one, e.g. `apt install g++` (Debian, Ubuntu) or `dnf install gcc-c++` (Fedora)"
INSTALL_TORCH = (
    "building lstm_ext needs the torch that it will run with: `pip install torch 'setuptools>=77' ninja`, "
    "then `pip install --no-build-isolation .`"
)


class BuildError(RuntimeError):
    """A build that cannot work. The message is one sentence that says what to do."""


class SwitchError(BuildError):
    """A variable is invalid, or requests something impossible."""


def machine() -> str:
    """The machine's name, as in CPU_SETS if it is one of them."""
    name = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name, name)


def is_supported_platform() -> bool:
    """Whether the kernels can run here: on Linux, and on a processor that has one of their instruction sets."""
    try:
        return sys.platform == "linux" and any([runs_here(name) for name in CPU_SETS.get(machine(), ())])
    except OSError:  # there is no /proc: the kernels ask the processor
        return True


def minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _minor_of(version: str) -> tuple[int, ...]:
    return tuple(map(int, minor(version).split(".")))


def check_torch(version: str) -> None:
    """Raises BuildError for a torch that is too old for the sources."""
    if _minor_of(version) < _minor_of(TORCHES[0]):
        raise BuildError(
            f"torch {version} is installed, and lstm_ext needs {TORCHES[0]} or later: "
            f"`pip install 'torch>={TORCHES[0]}'`, or install another lstm_ext."
        )


def untested(version: str) -> str | None:
    """A text for a torch that lstm_ext was not tried with, or None. It may work all the same."""
    if _is_release(version) and _minor_of(version) <= _minor_of(TORCHES[-1]):
        return None
    return f"lstm_ext was tested with torch {TORCHES[0]} to {TORCHES[-1]}, and not with torch {version}"


def fits_torch(built_for: str, version: str) -> bool:
    """Whether libraries that were built for one torch work with another one.

    Releases of one minor version have one binary interface. That of a nightly build or of a branch is its own.
    """
    if _is_release(built_for) and _is_release(version):
        return _minor_of(built_for) == _minor_of(version)
    return built_for == version


def _is_release(version: str) -> bool:
    return re.fullmatch(r"\d+\.\d+(\.\d+)?(\.post\d+)?(\+.*)?", version) is not None


def source_dir() -> Path | None:
    """The path of csrc/: inside an installed package, beside the package in a checkout or sdist."""
    if (PACKAGE / "csrc" / "python.cpp").is_file():
        return PACKAGE / "csrc"
    root = PACKAGE.parent
    # setup.py distinguishes our csrc/ from one that another project left in site-packages.
    if (root / "setup.py").is_file() and (root / "csrc" / "python.cpp").is_file():
        return root / "csrc"
    return None


def needs_cuda(source: Path) -> bool:
    """Whether a source is compiled only in a build with CUDA."""
    return source.suffix == ".cu" or "cuda" in source.stem or "cublas" in source.stem


def sources(directory: Path, with_cuda: bool) -> list[Path]:
    """Every source below `directory`, in a fixed order. It is also the only include directory of ours."""
    found = sorted([*directory.rglob("*.cpp"), *directory.rglob("*.cu")])
    if not found:
        raise BuildError(f"there are no C++ sources in {directory}: reinstall lstm_ext.")
    by_stem: dict[str, Path] = {}
    for path in found:
        # torch's JIT build names objects by stem: of two with the same one, the second would overwrite the first.
        other = by_stem.setdefault(path.stem, path)
        if other is not path:
            raise BuildError(f"{other} and {path} have the same stem: rename one of them.")
    return [path for path in found if with_cuda or not needs_cuda(path)]


def cpu_sets() -> tuple[str, ...]:
    """LSTM_EXT_CPU_SETS: the instruction sets to compile for. Unset: all of this machine; native: the best of this
    processor.

    Raises:
        SwitchError: it is no list of them.
    """
    known = CPU_SETS[machine()]
    wish = os.environ.get("LSTM_EXT_CPU_SETS") or ",".join(known)
    if wish == "native":
        best = next((name for name in known if runs_here(name)), None)
        if best is None:
            raise SwitchError(
                f"LSTM_EXT_CPU_SETS is 'native', and this processor runs none of {','.join(known)}."
            )
        return (best,)
    names = wish.split(",")
    if not set(names) <= set(known):
        raise SwitchError(
            f"LSTM_EXT_CPU_SETS is {wish!r}: set it to native or to some of {','.join(known)}, or unset it."
        )
    return tuple(name for name in known if name in names)


def runs_here(cpu_set: str) -> bool:
    """Whether this processor runs a set of CPU_SETS."""
    needed = CPU_SETS.get(machine(), {}).get(cpu_set)
    if not needed:
        return needed is not None
    with open("/proc/cpuinfo") as lines:  # no more of it: it is long where there are many processors
        return set(needed) <= set(next((line for line in lines if line.startswith("flags")), "").split())


def processor() -> str:
    """The processor's name. Linux names those of ARM by two numbers, of who designed them and of the design."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    facts = {
        key: found[1].strip()
        for key in ("model name", "CPU implementer", "CPU part")
        if (found := re.search(rf"^{key}\s*:(.+)$", text, re.MULTILINE))
    }
    if "model name" in facts:
        return facts["model name"]
    numbers = [f"{key.removeprefix('CPU ')} {value}" for key, value in facts.items()]
    return " ".join([platform.machine(), *numbers])


def _is_kernel(source: Path, sets: tuple[str, ...]) -> bool:
    """Whether a source is one of the CPU kernels, and of one of some instruction sets or of none."""
    name = source.stem.removeprefix("kernels_")
    return source.parent.name == "cpu" and (name == source.stem or name[:-4] in sets)


def c_library_sources(directory: Path, sets: tuple[str, ...]) -> list[Path]:
    """The sources of the C library: its own, and those of the CPU kernels."""
    found = sources(directory, with_cuda=False)
    return [path for path in found if _is_kernel(path, sets) or path.parent.name == "library"]


def split_sources(
    directory: Path, with_cuda: bool, sets: tuple[str, ...], folder: Path
) -> tuple[list[Path], list[Path], list[Path]]:
    """The sources of the CPU kernels, which need neither torch nor Python, of the operators, and of the Python module.

    But in a wheel, the kernels are a part of the operators' library. Of the CPU kernels those of some instruction sets.
    A source that includes all of the operators' that need no CUDA is written to `folder`: compiled one by one, each
    would take longer to read torch's headers than itself.
    """
    found = sources(directory, with_cuda)
    kernels = [path for path in found if _is_kernel(path, sets)]
    module = [path for path in found if path.name == "python.cpp"]
    apart = ("cpu", "library")
    operators = [path for path in found if path.parent.name not in apart and path not in module]
    together = [path.relative_to(directory) for path in operators if not needs_cuda(path)]
    text = "".join(f'#include "{path.as_posix()}"\n' for path in together)
    one = folder / TOGETHER
    if not one.is_file() or one.read_bytes() != text.encode():
        one.parent.mkdir(parents=True, exist_ok=True)
        one.write_text(text)
    return kernels, [one, *(path for path in operators if needs_cuda(path))], module


def digest(directory: Path, *more: str) -> str:
    """A digest that changes with every source, header and flag, and with `more`."""
    result = hashlib.sha256()
    for path in sorted(path for kind in SOURCE_KINDS for path in directory.rglob(f"*.{kind}")):
        result.update(path.relative_to(directory).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    flags = (COMPILE_FLAGS, NVCC_FLAGS, ops_link_flags(OPS_LIBRARY), module_link_flags(OPS_LIBRARY))
    for text in (*[text for each in flags for text in (*each, "--")], *more):
        result.update(text.encode() + b"\0")
    return result.hexdigest()[:16]


def search_path() -> str:
    """PATH, with this Python's own scripts at the end: there is ninja in an environment that is not activated."""
    return os.pathsep.join(filter(None, [os.environ.get("PATH"), sysconfig.get_path("scripts")]))


def find_compiler(openmp: bool = True) -> tuple[str, str]:
    """The C++ compiler's command and the first line of its --version, or a BuildError.

    With `openmp`, it is one whose OpenMP runtime this torch has.
    """
    chosen = os.environ.get("CXX")
    candidates = [chosen] if chosen else ["c++", "g++", "clang++"]
    problem = f"no C++ compiler was found (looked for {', '.join(candidates)}): {INSTALL_COMPILER}."
    for command in candidates:
        # CXX may be a path with a space in it, or a command with arguments.
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
            said = first_error(run.stderr or run.stdout, f"exit code {run.returncode}")
            problem = (
                f"the C++ compiler `{command}` does not work ({said}): repair it, or set CXX to another one."
            )
            continue
        version = run.stdout.splitlines()[0] if run.stdout else command
        if openmp and "clang" in run.stdout and not _process_exports("__kmpc_fork_call"):
            problem = (
                f"clang (`{command}`) calls an OpenMP runtime that this torch does not carry: "
                "install g++ and set CXX=g++."
            )
            continue
        return command, version
    raise BuildError(problem)


def first_error(output: str, otherwise: str = "no output") -> str:
    """The first complaint in what a compiler, or ninja, printed."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    for pattern in (r"\berror\b\s*:", r"\b(error|cannot|not found|undefined|killed)\b"):
        for line in lines:
            of_ninja = line.startswith(("Error building", "ninja:", "FAILED:"))
            if re.search(pattern, line, re.IGNORECASE) and not of_ninja:
                return line
    return [otherwise, *lines][-1]


def _process_exports(symbol: str) -> bool:
    # torch, which is imported by now, makes its OpenMP runtime visible to the whole process.
    return hasattr(ctypes.CDLL(None), symbol)


def supervised(command: list[str]) -> list[str]:
    """The command, wrapped so that it and its processes end with this process, even if this process is killed."""
    # In a program that embeds Python, sys.executable may be that program.
    if "python" not in Path(sys.executable or "").name:
        return command
    supervisor = Path(__file__).absolute().with_name("supervisor.py")
    return [sys.executable, "-I", "-S", str(supervisor), str(os.getpid()), *command]


def check_headers() -> None:
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        raise BuildError(
            "Python.h was not found: install Python's headers, e.g. `apt install python3-dev` (Debian, Ubuntu) "
            "or `dnf install python3-devel` (Fedora)."
        )


# ---- CUDA

# The one list of the GPU architectures that the kernels support, oldest first. A build without a GPU and without
# TORCH_CUDA_ARCH_LIST compiles for all of them that nvcc knows, and adds PTX for newer ones: torch itself would take
# those of the GPUs, and fail where there is none. The tests compile for the first of each generation.
ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
OLDEST_CAPABILITY = tuple(map(int, ARCHITECTURES[0].split(".")))
USUAL_TOOLKITS = Path("/usr/local")
OLDEST_NVCC = (12, 4)  # older ones do not know the number of registers that a kernel asks for
# stepwise: a product and a small kernel for each step. step: one kernel for each. persistent: one for all steps of a
# chunk, whose blocks keep the recurrent weights.
CUDA_KERNELS = ("stepwise", "step", "persistent")
# The kernels that are tried before they compute for users.
TRIED_CUDA_KERNELS = CUDA_KERNELS[1:]
# Included by torch's own CUDA headers; in some installations of the toolkit one or another is missing.
_TORCH_CUDA_HEADERS = ("cuda_runtime_api.h", "cublas_v2.h", "cublasLt.h", "cusolverDn.h", "cusparse.h")


@dataclass(frozen=True)
class Cuda:
    """A CUDA toolkit that fits the torch at hand, and what to build with it."""

    home: Path
    version: str  # version of nvcc
    architectures: str  # in the form of TORCH_CUDA_ARCH_LIST
    nvcc_flags: tuple[str, ...]  # in addition to NVCC_FLAGS
    header_dirs: tuple[str, ...]  # for headers that the toolkit lacks

    def __str__(self) -> str:
        """The text that the binary also returns in build_info()."""
        return f"{self.version} for {' '.join(self.architectures.replace(';', ' ').split())}"


def compile_flags(cuda: Cuda | None) -> list[str]:
    """The compile flags of C++, with a record of the CUDA build."""
    return [*COMPILE_FLAGS, *([f'-DLSTM_EXT_CUDA_BUILD="{cuda}"'] if cuda else [])]


def chosen(
    variable: str, default: str, choices: Sequence[str] = ("0", "1"), error: type[Exception] = ValueError
) -> str:
    """The value of an environment variable. Raises: `error` for a value that is none of the choices."""
    value = os.environ.get(variable) or default
    if value not in (default, *choices):
        known = f"one of {', '.join(choices)}" if len(choices) > 2 else " or ".join(choices)
        raise error(f"{variable} is {value!r}: set it to {known}, or unset it.")
    return value


def cuda_switch() -> bool | None:
    """LSTM_EXT_CUDA: False for no CUDA kernels, True to require them, None to build them if possible."""
    value = chosen("LSTM_EXT_CUDA", "", error=SwitchError)
    return value == "1" if value else None


def requested_cuda_kernel() -> str:
    """LSTM_EXT_CUDA_KERNEL: the name of a kernel, "torch" for torch's operator, or "auto"."""
    return chosen("LSTM_EXT_CUDA_KERNEL", "auto", ("auto", "torch", *CUDA_KERNELS))


def checks_cuda_kernels() -> bool:
    """LSTM_EXT_CUDA_CHECK: whether the first call on a GPU may try a kernel."""
    return chosen("LSTM_EXT_CUDA_CHECK", "1") == "1"


def check_cuda_variables() -> None:
    """Raises: ValueError: a variable of the CUDA kernels, which they read on a GPU, has a value that means nothing."""
    requested_cuda_kernel()
    checks_cuda_kernels()
    for variable, kind, most, expected in (
        ("LSTM_EXT_CUDA_WAIT_LIMIT", float, 1e9, "a number of seconds"),
        ("LSTM_EXT_CUDA_FREE_MULTIPROCESSORS", int, 10001, "a whole number from 0 to 10000"),
    ):
        value = os.environ.get(variable) or "0"
        try:
            is_number = 0 <= kind(value) < most
        except ValueError:
            is_number = False
        if not is_number:
            raise ValueError(f"{variable} is {value!r}: set it to {expected}, or unset it.")


def no_cuda_wanted(torch_cuda: str | None) -> str | None:
    """Why a build has no CUDA kernels whatever is installed, or None. `torch_cuda` is torch.version.cuda."""
    switch = cuda_switch()
    if switch is False:
        return "LSTM_EXT_CUDA=0 asks for none"
    if torch_cuda is None:
        reason = "this torch is a build without CUDA"
        if switch:
            raise SwitchError(
                f"LSTM_EXT_CUDA=1, but {reason}: install a torch with CUDA, or unset LSTM_EXT_CUDA."
            )
        return reason
    return None


def choose_cuda(torch_cuda: str | None) -> tuple[Cuda | None, str | None]:
    """The CUDA toolkit for the kernels, or None and the reason. Raises BuildError if LSTM_EXT_CUDA=1 is impossible."""
    reason = no_cuda_wanted(torch_cuda)
    if reason is None:
        assert torch_cuda is not None
        try:
            return find_cuda(torch_cuda), None
        except BuildError as error:
            reason = str(error)
            if cuda_switch():
                raise SwitchError(f"LSTM_EXT_CUDA=1, but {reason}") from None
    return None, reason


def find_cuda(torch_cuda: str) -> Cuda:
    """The CUDA toolkit for the build, after a trial, or a BuildError."""
    home, version = _find_toolkit(torch_cuda)
    nvcc = home / "bin" / "nvcc"
    flags = _host_compiler_flags()
    architectures = _architectures(nvcc)
    with tempfile.TemporaryDirectory() as directory:
        trial = Path(directory) / "trial.cu"
        trial.write_text("#include <cuda_runtime.h>\n__global__ void trial(float* x) { *x = 1; }\n")
        _run_nvcc(nvcc, *NVCC_FLAGS, *flags, "-c", str(trial), "-o", str(trial.with_suffix(".o")))
    return Cuda(home, version, architectures, tuple(flags), tuple(_header_dirs(home, version)))


def requested_architectures() -> str:
    """TORCH_CUDA_ARCH_LIST, else the architectures of the present GPUs, else "default"."""
    chosen = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if chosen and chosen != "native":
        return chosen
    found = sorted({capability for capability in gpu_capabilities() if capability >= OLDEST_CAPABILITY})
    return ";".join(f"{major}.{minor}" for major, minor in found) + "+PTX" if found else "default"


def _architectures(nvcc: Path) -> str:
    requested = requested_architectures()
    if os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip() == requested:
        return requested
    known = set(_run_nvcc(nvcc, "--list-gpu-arch").split())

    def is_known(architecture: str) -> bool:
        return "compute_" + architecture.removesuffix("+PTX").replace(".", "") in known

    if requested != "default" and all(is_known(a) for a in requested.split(";")):
        return requested
    # A GPU that is newer than nvcc runs the PTX of the newest architecture that nvcc knows.
    usable = [architecture for architecture in ARCHITECTURES if is_known(architecture)]
    if not usable:
        raise BuildError(f"`{nvcc}` knows none of {', '.join(ARCHITECTURES)}: install a newer CUDA toolkit.")
    return ";".join(usable) + "+PTX"


def _find_toolkit(torch_cuda: str) -> tuple[Path, str]:
    major = torch_cuda.split(".")[0]
    install = f"install the CUDA toolkit {major}.x, which has nvcc, or set CUDA_HOME to its folder"
    chosen = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    on_path = shutil.which("nvcc")
    if chosen:
        homes = [Path(chosen)]
    else:
        homes = [_home_of(Path(on_path))] if on_path else []
        homes += [USUAL_TOOLKITS / "cuda", *sorted(USUAL_TOOLKITS.glob(f"cuda-{major}.*"), reverse=True)]
        homes += [place / f"cu{major}" for place in _wheels_of_nvidia()]
    problem = None
    for home in homes:
        if not (home / "bin" / "nvcc").is_file():
            continue
        try:
            said = _run_nvcc(home / "bin" / "nvcc", "--version")
        except BuildError as error:
            problem = problem or str(error)
            continue
        version = re.search(r"release (\d+\.\d+)", said)
        if version and version[1].split(".")[0] == major:
            if tuple(map(int, version[1].split("."))) >= OLDEST_NVCC:
                return home, version[1]
            oldest = ".".join(map(str, OLDEST_NVCC))
            problem = problem or (
                f"{home} is CUDA {version[1]}, and the kernels need nvcc {oldest} or later (`__maxnreg__`): {install}."
            )
            continue
        problem = problem or (
            f"{home} is CUDA {version[1] if version else 'of an unknown version'}, "
            f"and this torch was built for CUDA {torch_cuda}: {install}."
        )
    where = f" in CUDA_HOME={chosen}" if chosen else ""
    raise BuildError(problem or f"nvcc was not found{where}: {install}.")


def _home_of(nvcc: Path) -> Path:
    """The toolkit's folder. An nvcc on the PATH may be a script somewhere else that starts the real one."""
    try:
        said = _run_nvcc(nvcc, "--dryrun", "-x", "cu", "-c", os.devnull)
    except BuildError:
        said = ""
    top = re.search(r"^#\$ TOP=(.+)$", said, re.MULTILINE)
    return Path(top[1]).resolve() if top else nvcc.resolve().parents[1]


def _host_compiler_flags() -> list[str]:
    # torch hands nvcc the command in CC. Without one, nvcc would take g++ whatever CXX says.
    chosen = shutil.which(os.environ.get("CXX") or "")
    return [f"-ccbin={chosen}"] if chosen and not os.environ.get("CC") else []


def _run_nvcc(nvcc: Path, *arguments: str) -> str:
    """Everything that nvcc prints, or a BuildError."""
    try:
        run = subprocess.run(
            supervised([str(nvcc), *arguments]),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(
            f"`{nvcc}` does not run ({error}): repair it, or set CUDA_HOME to another toolkit."
        ) from None
    if run.returncode != 0:
        said = first_error(run.stdout, f"exit code {run.returncode}")
        raise BuildError(
            f"`{nvcc}` does not work ({said}): repair it, or set CUDA_HOME to another toolkit, or CXX to a compiler "
            "that it takes."
        )
    return run.stdout


def _header_dirs(home: Path, version: str) -> list[str]:
    """Header folders of the wheels that contain torch's own CUDA libraries, if the toolkit lacks a header."""

    missing = {header for header in _TORCH_CUDA_HEADERS if not (home / "include" / header).is_file()}
    # The folder is nvidia/cu13/include since CUDA 13; before, there was a folder for each library.
    places = _wheels_of_nvidia() if missing else []
    found: list[str] = []
    for folder in sorted(path for place in places for path in place.glob("*/include")):
        there = {header for header in missing if (folder / header).is_file()}
        if there:
            found.append(str(folder))
            missing -= there
    if missing:
        raise BuildError(
            f"{', '.join(sorted(missing))} was not found in {home / 'include'}: "
            f"install the whole CUDA toolkit {version}, with its libraries' headers."
        )
    return found


def _wheels_of_nvidia() -> list[Path]:
    """The folders of the packages in which CUDA comes by pip."""
    spec = importlib.util.find_spec("nvidia")
    return [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []


def runtime_flags(cuda: Cuda, folder: Path) -> list[str]:
    """The flags by which the linker finds ``-lcudart``, as torch says. A toolkit that pip installed has the library
    with its version only, and gets a link to it in `folder`."""
    libraries = [cuda.home / name for name in ("lib64", "lib")]
    if any((place / "libcudart.so").exists() for place in libraries):
        return []
    versions = [path for place in libraries for path in sorted(place.glob("libcudart.so.*"))]
    if not versions:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / "libcudart.so"
    link.unlink(missing_ok=True)
    link.symlink_to(versions[0].resolve())
    return [f"-L{folder}"]


def gpu_capabilities() -> list[tuple[int, int]]:
    """The compute capabilities of this machine's GPUs, from the driver's library. So no process has to start CUDA for
    the answer, after which it could not fork."""
    result = []
    with _management_library() as nvml:
        count = ctypes.c_uint(0)
        if nvml is None or nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
            return []
        for i in range(count.value):
            device, major, minor = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
            if (
                nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(i), ctypes.byref(device)) == 0
                and nvml.nvmlDeviceGetCudaComputeCapability(device, ctypes.byref(major), ctypes.byref(minor))
                == 0
            ):
                result.append((major.value, minor.value))
    return result


@contextlib.contextmanager
def _management_library() -> Iterator[ctypes.CDLL | None]:
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        started = nvml.nvmlInit_v2() == 0
    except (OSError, AttributeError):
        yield None
        return
    try:
        yield nvml if started else None
    finally:
        if started:
            nvml.nvmlShutdown()


# ---- the record


def python_version() -> str:
    """With a "t" at the end for a Python without the GIL, which cannot load the modules of the other one."""
    return platform.python_version() + ("t" if sysconfig.get_config_var("Py_GIL_DISABLED") else "")


def commit(root: Path = PACKAGE.parent) -> str | None:
    """The commit that a checkout is at, with "+changes" if a file differs from it; None where git does not say."""
    # An installed package may lie inside the repository of something else.
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def write_record(
    directory: Path, torch_version: str, compiler: str, source_digest: str, **more: object
) -> None:
    """Writes the record, with `more` that was built, such as `cuda`, `cuda_reason` and `cpu_sets`."""
    record = {
        "torch": torch_version,
        "python": python_version(),
        "compiler": compiler,
        "sources": source_digest,
        "version": VERSION,
        "commit": commit(),
        "cuda": None,
        "cuda_reason": None,
        **more,
    }
    # The record is complete or absent, even if the process is killed in between.
    unfinished = directory / f"{RECORD}.{os.getpid()}"
    unfinished.write_text(json.dumps(record, indent=1) + "\n")
    unfinished.chmod(unfinished.stat().st_mode & ~0o022)
    unfinished.replace(directory / RECORD)


_FORM = {"torch": str, "wheel": {str: str}, "sizes": list, "cpu_sets": str, str: str | None}


def read_record(directory: Path) -> dict | None:
    record = read_json(directory / RECORD, _FORM)
    return record if record and "torch" in record else None


_MOST_BYTES = 1 << 24  # a file of JSON is not larger
_MOST_DIGITS = 18  # a longer integer has no room in C++, and one of hundreds of digits none in a float


def read_json(path: Path, form: Any) -> Any:
    """The value in a file of JSON that anybody may have written. None if that is no value of this form: see `fits`."""
    try:
        if not path.is_file():  # to open a FIFO would wait for another process
            return None
        with path.open("rb") as file:
            value = json.loads(file.read(_MOST_BYTES), parse_int=_integer)
    except (OSError, ValueError, RecursionError):
        return None
    return value if fits(value, form) else None


def _integer(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def fits(value: object, form: Any) -> bool:
    """Whether a value of JSON has a form: a type, a set of texts, [the form of each item], or {name: the form of this
    field, str: that of all others}. Any field may be missing."""
    if isinstance(form, dict):
        rest = form.get(str, object)
        return isinstance(value, dict) and all([fits(v, form.get(name, rest)) for name, v in value.items()])
    if isinstance(form, list):
        return isinstance(value, list) and all([fits(item, form[0]) for item in value])
    if isinstance(form, set):
        return isinstance(value, str) and value in form
    return isinstance(value, form)
