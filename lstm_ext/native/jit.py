"""Builds the extension on request, once for each torch, set of flags and state of the sources."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import torch

from . import config
from .config import BuildError
from .trust import distrust, make_folder, resolved

MODULE = "lstm_ext_C"
_OPS_MODULE = "lstm_ext_ops"
# Only the owner can write the folders of a build. Others can read them: root may build for all.
_MODE = 0o755
# Seconds for which a process waits for the build of another one.
LONGEST_WAIT = 1800.0
_log = logging.getLogger("lstm_ext")


def module(directory: Path) -> Path:
    """The Python module in a folder of a build."""
    return directory / f"{MODULE}.so"


def ops_library(directory: Path) -> Path:
    """The operators' library in a folder of a build."""
    return directory / f"{_OPS_MODULE}.so"


def problem() -> str | None:
    """Why no build can work here, or None; finds out without building."""
    try:
        source_dir()
        _requirements()
    except BuildError as error:
        return str(error)
    return None


def source_dir() -> Path:
    """The path of csrc/, or a BuildError."""
    if not config.is_supported_platform():
        raise BuildError(
            "the extension supports Linux on x86-64 with AVX2, FMA and F16C, and on aarch64 only."
        )
    directory = config.source_dir()
    if directory is None:
        raise BuildError(f"the C++ sources were not found beside {config.PACKAGE}: reinstall lstm_ext.")
    return directory


def _requirements() -> tuple[str, str]:
    """The compiler's command and version, or a BuildError."""
    config.check_torch(torch.__version__)
    compiler = config.find_compiler()
    config.check_headers()
    if shutil.which("ninja", path=config.search_path()) is None:
        raise BuildError("ninja was not found: `pip install ninja`.")
    if importlib.util.find_spec("setuptools") is None:
        raise BuildError("setuptools, which torch's builder needs, was not found: `pip install setuptools`.")
    return compiler


def folder(sources: Path, *kind: str) -> Path:
    """The folder of the build of these sources. Its name has a digest of everything that the build depends on, so that
    a finished folder never changes."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX") or ""
    key = config.digest(sources, torch.__version__, suffix, *config.cpu_sets(), *kind)
    return _root() / f"{MODULE}_{key}"


def finished_with_cuda() -> list[Path]:
    """The folders of finished builds of these sources, for this torch and Python, that have CUDA kernels; newest first.

    Whatever architectures they are for: a process that sees no GPU finds the build of one that did.
    """
    root = _root()
    records = [
        (path.parent, config.read_record(path.parent)) for path in root.glob(f"{MODULE}_*/{config.RECORD}")
    ]
    there = [(folder, record) for folder, record in records if record is not None and record.get("cuda")]
    if not there:
        return []
    wanted = {
        "torch": torch.__version__,
        "python": config.python_version(),
        "sources": config.digest(source_dir()),
    }
    fits = [folder for folder, record in there if wanted.items() <= record.items() and _runs_here(record)]
    return sorted(fits, key=lambda folder: (folder / config.RECORD).stat().st_mtime, reverse=True)


def _runs_here(record: dict) -> bool:
    """Whether a build has CPU kernels for this processor. Machines may share a home."""
    return any([config.runs_here(name) for name in record.get("cpu_sets", "").split(",") if name])


def _hidden() -> str:
    """The end of a warning that names an installed, built lstm_ext which the one in this folder hides; else ""."""
    for entry in sys.path:
        package = Path(entry).absolute() / "lstm_ext"
        if package != config.PACKAGE and (package / "native" / config.RECORD).is_file():
            return f". {package} is installed and built: {config.PACKAGE} comes first in this folder; run from another"
    return ""


def _root() -> Path:
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    if root:
        return Path(root).absolute()
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        raise BuildError(
            "there is no home folder: set TORCH_EXTENSIONS_DIR to a folder that you can write."
        ) from None
    return cache / "torch_extensions" / "lstm_ext"


def trusted(directory: Path) -> Path:
    """The folder of a build without symbolic links. Raises BuildError if another user could have written into it."""
    try:
        without_links = resolved(directory)
    except OSError as error:  # a relative path, and the working directory is gone
        raise BuildError(
            f"{directory} cannot be found ({error}): set TORCH_EXTENSIONS_DIR to a full path."
        ) from error
    files = [module(without_links), ops_library(without_links), without_links / config.RECORD]
    for path in (directory, without_links, *files):
        reason = distrust(path)
        if reason is not None:
            raise BuildError(
                f"what is in {directory.parent} is not trusted: {reason}, or set TORCH_EXTENSIONS_DIR to a folder that "
                "is yours alone."
            )
        if path in files and path.is_symlink():
            raise BuildError(
                f"what is in {directory.parent} is not trusted: {path} is a symbolic link: remove it."
            )
    return without_links


def finished(directory: Path) -> dict | None:
    """The record of a finished build. None for a build that was killed, or if a library was truncated since."""
    record = config.read_record(directory)
    return record if record is not None and record.get("sizes") == _sizes(directory) else None


def _sizes(directory: Path) -> list[int] | None:
    paths = (module(directory), ops_library(directory))
    return [path.stat().st_size for path in paths] if all(path.is_file() for path in paths) else None


@contextlib.contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """One process at a time. The kernel frees the lock of a process that dies; torch's own lock file would stay."""
    import fcntl  # not on every platform that runs the reference

    make_folder(directory.parent, _MODE)
    path = directory.with_suffix(".lock")
    # Follows no link that another user may have put there, and truncates nothing.
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with open(handle, "r+") as file:
        _wait_for(file, path)
        file.seek(0)
        file.write(f"{os.getpid()}\n")
        file.truncate()
        file.flush()
        try:
            yield
        finally:
            # Unlocked explicitly, because a child forked meanwhile holds the file open too.
            fcntl.flock(file, fcntl.LOCK_UN)


def _wait_for(file: IO[str], path: Path) -> None:
    """Takes the lock, or raises a BuildError when another process has held it for too long."""
    import fcntl

    deadline = time.monotonic() + LONGEST_WAIT
    holder = ""
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pass
        if not holder:
            file.seek(0)
            holder = f"process {file.readline().strip() or 'unknown'}"
            _log.warning("lstm_ext: waiting for %s, which is compiling the extension", holder)
        if time.monotonic() > deadline:
            raise BuildError(
                f"{holder} has held {path} for {LONGEST_WAIT / 60:.0f} minutes: end it, or set TORCH_EXTENSIONS_DIR to "
                "another folder."
            )
        time.sleep(0.1)


def _python() -> str:
    """The path of the Python interpreter; in a program that embeds Python, sys.executable may be that program."""
    candidates = [Path(sys.executable or ""), Path(sys.exec_prefix, "bin", f"python{sys.version_info[0]}")]
    found = next((path for path in candidates if "python" in path.name and path.is_file()), None)
    if found is None:
        raise BuildError(f"no Python interpreter was found in {sys.exec_prefix}, which the build needs.")
    return str(found)


# The build's own process gets the arguments of torch's function for each library. That process, and not the one that
# wants the extension, has the variables that torch's function reads.
_PROGRAM = """
import json, sys
from torch.utils import cpp_extension
for arguments in json.loads(sys.argv[1]):
    cpp_extension.load(**arguments)
"""


def build(
    sources: Path,
    directory: Path,
    cuda: config.Cuda | None,
    cuda_reason: str | None,
    say: Callable[[str], None],
) -> None:
    """Compiles into ``directory``. The record is written last, so a folder without one is unfinished.

    Args:
        cuda_reason: why it has no CUDA kernels, for the record.
        say: is called with a line of text for each file that is compiled.

    Raises:
        BuildError: something is missing, or the compiler refused.
    """
    command, compiler = _requirements()
    python = _python()
    sets = config.cpu_sets()
    if directory.exists():
        # A killed build leaves objects, and a lock file for which torch would wait forever. The folder is moved first:
        # a compiler may still run, and moves along with its working directory.
        leftovers = directory.with_suffix(f".{os.getpid()}")
        directory.rename(leftovers)
        shutil.rmtree(leftovers, ignore_errors=True)
    make_folder(directory, _MODE)
    kernels, operators, module_sources = config.split_sources(sources, cuda is not None, sets, directory)
    _log.warning("lstm_ext: compiling the extension, once, into %s (a minute or two)%s", directory, _hidden())

    def library(
        name: str, sources_of_it: list[Path], flags: list[str], link_flags: list[str], with_cuda: bool
    ) -> dict:
        header_dirs = cuda.header_dirs if cuda is not None and with_cuda else ()
        nvcc_flags = [*config.NVCC_FLAGS, *cuda.nvcc_flags] if cuda is not None and with_cuda else []
        return {
            "name": name,
            "sources": [str(path) for path in sources_of_it],
            "extra_cflags": [shlex.quote(f) for f in (*flags, *(f"-isystem{path}" for path in header_dirs))],
            "extra_cuda_cflags": [shlex.quote(flag) for flag in nvcc_flags],
            # First ninja and then a shell read them.
            "extra_ldflags": [shlex.quote(flag).replace("$", "$$") for flag in link_flags],
            "extra_include_paths": [str(sources)],
            "build_directory": str(directory),
            "with_cuda": with_cuda,
            # Only builds it: the loader imports it, whoever built it.
            "is_python_module": False,
            "verbose": True,
        }

    ops_file, flags = ops_library(directory).name, config.compile_flags(cuda)
    ops_flags = [*config.ops_link_flags(ops_file), *(config.runtime_flags(cuda, directory) if cuda else ())]
    libraries = [
        library(_OPS_MODULE, [*kernels, *operators], flags, ops_flags, cuda is not None),
        # A relative path, because the linker runs in the folder.
        library(MODULE, module_sources, flags, config.module_link_flags(f"./{ops_file}"), False),
    ]
    # torch would warn about a compiler that calls itself something else than g++.
    more = {"CXX": command, "PATH": config.search_path(), "TORCH_DONT_CHECK_COMPILER_ABI": "1"}
    more["PYTHONPATH"] = os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path)
    if cuda is not None:
        more |= {"CUDA_HOME": str(cuda.home), "TORCH_CUDA_ARCH_LIST": cuda.architectures}
    lines = []
    with subprocess.Popen(
        config.supervised([python, "-c", _PROGRAM, json.dumps(libraries)]),
        env=os.environ | more,
        cwd=directory,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        try:
            for line in process.stdout or ():
                lines.append(line)
                if (compiled := re.match(r"(\[\d+/\d+\]).* -o (\S+)", line)) is not None:
                    say(" ".join(compiled.groups()))
        except BaseException:  # an interrupt, for instance
            process.kill()
            raise
    if process.returncode != 0:
        advice = "" if cuda is None else " (LSTM_EXT_CUDA=0 builds the CPU kernels alone)"
        raise BuildError(f"compiling with `{command}` failed: {config.first_error(''.join(lines))}{advice}")
    # Compilers create files by the umask. The record is last: it marks the build as finished.
    for path in directory.rglob("*"):
        if not path.is_symlink():
            path.chmod(path.stat().st_mode & ~0o022)
    sizes = _sizes(directory)
    config.write_record(
        directory,
        torch.__version__,
        compiler,
        config.digest(sources),
        cuda=str(cuda) if cuda else None,
        cuda_reason=cuda_reason,
        cpu_sets=",".join(sets),
        sizes=sizes,
    )
