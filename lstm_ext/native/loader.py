"""Finds the compiled extension: built ahead of time, else built on first use, else none (the PyTorch reference).

It is two libraries in one folder: that of the operators is loaded first, and the Python module, linked with it, finds
it in the process.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import logging
import os
import re
import shlex
import shutil
import sys
import sysconfig
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import torch

from . import config, cuda
from .config import BuildError

CHOICES = ("auto", "aot", "jit", "reference")
_JIT_NAME = "lstm_ext_C"
_JIT_OPS_NAME = "lstm_ext_ops"
_log = logging.getLogger("lstm_ext")


@dataclass(frozen=True)
class Status:
    """How the extension was found; `reason` says why there is none, or why the choice fell as it did."""

    backend: str  # "aot", "jit" or "reference"
    path: str | None = None  # of the Python module
    ops_path: str | None = None  # of the operators' library
    reason: str | None = None
    torch_version: str | None = None  # that it was built for
    compiler: str | None = None
    sources: str | None = None  # their digest
    cuda: str | None = None  # the CUDA version and the architectures that it has kernels for
    cuda_reason: str | None = None  # why it has none


@dataclass(frozen=True)
class _Result:
    module: ModuleType | None
    status: Status
    error: str | None = None  # raised as ImportError by every call


_result: _Result | None = None
_lock = threading.Lock()


def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    # A process forked while another thread was building would wait for a thread that it does not have.
    os.register_at_fork(after_in_child=_renew_lock)


def extension() -> ModuleType | None:
    """The compiled module, or None where the reference has to do. Decided by the first call, for good.

    Raises ImportError for an extension that is there and does not fit, and for a backend that was asked for by
    name (LSTM_EXT_BACKEND=aot or jit) and is not to be had; ValueError for a bad LSTM_EXT_BACKEND.
    """
    global _result
    result = _result
    if result is None:
        unavailable = None
        with _lock:
            result = _result
            if result is None:
                result, unavailable = _choose()
                _result = result
        if result.module is not None:
            # After the lock: whoever imports it first, in another thread, may wait for the lock.
            from ..layer import operators  # noqa: F401  (registers the fake kernels)
        if unavailable is not None:
            warnings.warn(
                f"lstm_ext runs on its PyTorch reference, which is slow: {unavailable}",
                RuntimeWarning,
                stacklevel=2,
            )
    if result.error is not None:
        raise ImportError(result.error)
    return result.module


def has_kernels() -> bool:
    """Whether extension() gives a module: for tracers, to whom the answer is a constant."""
    return extension() is not None


# What torch.compiler.assume_constant_result does, without its import of torch._dynamo, which would be most of the
# time of importing this package: the compiler calls the function, so that the operators are there when it meets
# them, and does not look into it.
has_kernels._dynamo_marked_constant = True  # type: ignore[attr-defined]


def has_cuda_kernels() -> bool:
    """As `has_kernels`, for CUDA tensors."""
    return extension() is not None and status().cuda is not None


has_cuda_kernels._dynamo_marked_constant = True  # type: ignore[attr-defined]


def status() -> Status:
    """What extension() found; looks for it first, where nothing has yet."""
    if _result is None:
        try:
            extension()
        except ImportError:
            pass
    assert _result is not None
    return _result.status


def check() -> None:
    """Raises the ImportError for an ahead-of-time build that does not fit this torch, without loading anything."""
    if "lstm_ext.info" in sys.orig_argv:
        return  # python -m lstm_ext.info imports the package first, and then tells the whole story
    if _requested() in ("auto", "aot"):
        found = _find_aot()
        if found is not None:
            _check_record(found)


def _requested() -> str:
    value = os.environ.get("LSTM_EXT_BACKEND") or "auto"
    if value not in CHOICES:
        raise ValueError(
            f"LSTM_EXT_BACKEND is {value!r}: set it to one of {', '.join(CHOICES)}, or unset it."
        )
    return value


def _choose() -> tuple[_Result, str | None]:
    """The result, and the text of the warning that is due."""
    requested = _requested()
    cuda.requested()  # as early as for the one above, and once
    if requested == "reference":
        return _Result(None, Status("reference", reason="LSTM_EXT_BACKEND=reference asks for it")), None

    if requested in ("auto", "aot"):
        try:
            result = _load_aot()
        except ImportError as error:
            return _Result(None, Status("reference", reason=str(error)), error=str(error)), None
        if result is not None:
            return result, None
        if requested == "aot":
            error = (
                f"LSTM_EXT_BACKEND=aot, but there is no {config.MODULE}: build it with {_build_command()}."
            )
            return _Result(None, Status("reference", reason=error), error=error), None

    try:
        return _load_jit(), None
    except (_Refused, config.SwitchError) as error:
        return _Result(None, Status("reference", reason=str(error)), error=str(error)), None
    except BuildError as error:
        reason = str(error)
    if requested == "jit":
        error = f"LSTM_EXT_BACKEND=jit, but the build on first use failed: {reason}"
        return _Result(None, Status("reference", reason=error), error=error), None
    return _Result(None, Status("reference", reason=reason)), reason


def _build_command() -> str:
    root = config.PACKAGE.parent
    if (root / "setup.py").is_file() and (root / "csrc").is_dir():
        return f"`python setup.py build_ext --inplace` in {root}"
    # --no-deps: without it, --force-reinstall would replace torch as well.
    return "`pip install --no-build-isolation --no-deps --force-reinstall .` in lstm_ext's source folder"


class _Refused(ImportError):
    """The library fits and says itself why it does not want to run, e.g. for a bad LSTM_EXT_CPU_CAPABILITY."""


def _load(name: str, path: Path, ops_path: Path) -> ModuleType:
    _refuse_second_registration(ops_path)
    try:
        torch.ops.load_library(str(ops_path))
    except OSError as error:
        # torch's message says which library, its cause says why.
        raise ImportError(str(error.__cause__ or error), path=str(ops_path)) from error
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        if error.path is None:  # what the loader of the operating system complains of has one
            raise _Refused(str(error).partition("\n")[0]) from error
        raise
    sys.modules[name] = module
    return module


def _refuse_second_registration(ops_path: Path) -> None:
    """A second library that registers the operators would end the process."""
    if not torch._C._jit_get_operation("lstm_ext::lstm_layer")[0]:
        return
    loaded = {line.split(maxsplit=5)[-1].strip() for line in Path("/proc/self/maps").read_text().splitlines()}
    if str(ops_path.resolve()) not in loaded:
        others = sorted(name for name in loaded if Path(name).name == config.OPS_LIBRARY)
        raise _Refused(
            "the operators of lstm_ext are registered in this process already, "
            f"by {', '.join(others) or 'another file'}; {ops_path} cannot be loaded beside it"
        )


# ---- built ahead of time


def _find_aot() -> Path | None:
    # In this folder only: asked for lstm_ext._C, an editable install's finder may offer that of another checkout.
    directory = config.LIBRARIES
    candidates = (directory / f"_C{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    return next((path for path in candidates if path.is_file()), None)


def _check_record(path: Path) -> dict:
    """Before the library is opened: one built for another torch can crash the process as it loads."""
    record = config.read_record(path.parent)
    if record is None:
        raise ImportError(f"{path} has no {config.RECORD} beside it: rebuild it with {_build_command()}.")
    if record["torch"].split(".")[:2] != torch.__version__.split(".")[:2]:
        raise ImportError(
            f"{path} was built for torch {record['torch']}, but torch {torch.__version__} is installed: "
            f"rebuild it with {_build_command()}."
        )
    if not (path.parent / config.OPS_LIBRARY).is_file():
        raise ImportError(
            f"{path} has no {config.OPS_LIBRARY} beside it: rebuild it with {_build_command()}."
        )
    return record


def _load_aot() -> _Result | None:
    path = _find_aot()
    if path is None:
        return None
    record = _check_record(path)
    try:
        module = _load(config.MODULE, path, path.parent / config.OPS_LIBRARY)
    except _Refused:
        raise
    except ImportError as error:
        first_line = str(error).partition("\n")[0]
        raise ImportError(
            f"the extension does not fit the installed torch {torch.__version__} ({first_line}): "
            f"rebuild it with {_build_command()}."
        ) from error
    return _Result(module, _status_of("aot", path, path.parent / config.OPS_LIBRARY, record))


def _status_of(backend: str, path: Path, ops_path: Path, record: dict) -> Status:
    return Status(
        backend,
        str(path),
        str(ops_path),
        None,
        record["torch"],
        record.get("compiler"),
        record.get("sources"),
        record.get("cuda"),
        record.get("cuda_reason"),
    )


# ---- built on first use


def jit_problem() -> str | None:
    """Why a build on first use cannot work here, or None; finds out without building."""
    try:
        _jit_sources()
        _jit_requirements()
    except BuildError as error:
        return str(error)
    return None


def _jit_sources() -> Path:
    if not config.is_supported_platform():
        raise BuildError("the extension supports Linux on x86-64 only.")
    source_dir = config.source_dir()
    if source_dir is None:
        raise BuildError(f"the C++ sources were not found beside {config.PACKAGE}: reinstall lstm_ext.")
    return source_dir


def _jit_requirements() -> tuple[str, str]:
    """The compiler's command and version, or a BuildError."""
    compiler = config.find_compiler()
    config.check_headers()
    if shutil.which("ninja", path=config.search_path()) is None:
        raise BuildError("ninja was not found: `pip install ninja`.")
    if importlib.util.find_spec("setuptools") is None:
        raise BuildError(
            "setuptools, which torch's build on first use needs, was not found: `pip install setuptools`."
        )
    return compiler


def _load_jit() -> _Result:
    source_dir = _jit_sources()
    reason = config.no_cuda_wanted(torch.version.cuda)
    if reason is None:
        # Once it is built, it needs no nvcc: so it is looked for first.
        directory = _jit_folder(source_dir, "cuda", config.requested_architectures())
        result = _load_finished(directory)
        if result is not None:
            return result
        cuda, reason = config.choose_cuda(torch.version.cuda)
        if cuda is not None:
            return _load_or_build(source_dir, directory, cuda, None)
    return _load_or_build(source_dir, _jit_folder(source_dir, "cpu"), None, reason)


def _jit_folder(source_dir: Path, *kind: str) -> Path:
    # Everything that the library depends on is in the folder's name, so a finished folder never changes.
    key = config.digest(source_dir, torch.__version__, sysconfig.get_config_var("EXT_SUFFIX") or "", *kind)
    return _jit_root() / f"{_JIT_NAME}_{key}"


def _load_or_build(
    source_dir: Path, directory: Path, cuda: config.Cuda | None, cuda_reason: str | None
) -> _Result:
    result = _load_finished(directory)
    if result is None:
        try:
            directory.parent.mkdir(parents=True, exist_ok=True)
            with _exclusive(directory.with_suffix(".lock")):
                result = _load_finished(directory)  # another process may have built it while we waited
                if result is None:
                    if cuda_reason is not None and torch.version.cuda is not None:
                        _log.warning("lstm_ext: the extension is built without CUDA kernels: %s", cuda_reason)
                    _build(source_dir, directory, cuda)
                    result = _load_finished(directory)
        except OSError as error:
            raise BuildError(
                f"cannot build in {directory.parent} ({error}): "
                "set TORCH_EXTENSIONS_DIR to a folder that you can write."
            ) from error
    if result is None:
        raise BuildError(
            f"the library in {directory} does not load: report this with `python -m lstm_ext.info`."
        )
    # Not what was missing when it was built, but what is missing now.
    return replace(result, status=replace(result.status, cuda_reason=cuda_reason))


def _jit_root() -> Path:
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


def _load_finished(directory: Path) -> _Result | None:
    """None too for what a killed build left, and for a library that was cut short since."""
    record = config.read_record(directory)
    library, ops_library = directory / f"{_JIT_NAME}.so", directory / f"{_JIT_OPS_NAME}.so"
    if record is None or record.get("sizes") != _sizes(library, ops_library):
        return None
    try:
        module = _load(_JIT_NAME, library, ops_library)
    except _Refused:
        raise
    except ImportError as error:
        _log.info("%s does not load: %s", library, error)
        return None
    return _Result(module, _status_of("jit", library, ops_library, record))


def _sizes(*paths: Path) -> list[int] | None:
    return [path.stat().st_size for path in paths] if all(path.is_file() for path in paths) else None


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """One process at a time. The kernel frees the lock of a process that dies; torch's own lock file would stay."""
    import fcntl  # not on every platform that runs the reference

    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _log.warning("lstm_ext: waiting for another process that is compiling the extension")
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            # Said explicitly: a child forked meanwhile holds the file open too.
            fcntl.flock(file, fcntl.LOCK_UN)


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _build(source_dir: Path, directory: Path, cuda: config.Cuda | None) -> None:
    """Compiles into `directory`; the record is written last, so a folder without one is unfinished."""
    command, compiler = _jit_requirements()
    ops_sources, module_sources = config.split_sources(source_dir, with_cuda=cuda is not None)
    ops_file = f"{_JIT_OPS_NAME}.so"
    if directory.exists():
        # Objects of a killed build, and the lock file that torch would wait for without end. Moved first: its
        # compiler may be running still, and takes the folder along as its working directory.
        leftovers = directory.with_suffix(f".{os.getpid()}")
        directory.rename(leftovers)
        shutil.rmtree(leftovers, ignore_errors=True)
    directory.mkdir()
    _log.warning("lstm_ext: compiling the extension, once, into %s (a minute or two)", directory)
    # torch would warn about a compiler that calls itself something else than g++.
    environment = {"CXX": command, "PATH": config.search_path(), "TORCH_DONT_CHECK_COMPILER_ABI": "1"}
    if cuda is not None:
        environment |= {"CUDA_HOME": str(cuda.home), "TORCH_CUDA_ARCH_LIST": cuda.architectures}
    with _environment(**environment):
        from torch.utils import cpp_extension

        if cuda is not None:
            # Read when it was imported, which may have been long before.
            cpp_extension.CUDA_HOME = str(cuda.home)

        def build(
            name: str, sources: list[Path], compile_flags: list[str], link_flags: list[str], with_cuda: bool
        ) -> None:
            header_dirs = cuda.header_dirs if cuda is not None and with_cuda else ()
            nvcc_flags = [*config.NVCC_FLAGS, *cuda.nvcc_flags] if cuda is not None and with_cuda else []
            cpp_extension.load(
                name,
                [str(path) for path in sources],
                extra_cflags=[
                    shlex.quote(flag)
                    for flag in (*compile_flags, *(f"-isystem{path}" for path in header_dirs))
                ],
                extra_cuda_cflags=[shlex.quote(flag) for flag in nvcc_flags],
                # ninja reads them first and a shell after it.
                extra_ldflags=[shlex.quote(flag).replace("$", "$$") for flag in link_flags],
                extra_include_paths=[str(source_dir)],
                build_directory=str(directory),
                with_cuda=with_cuda,
                # Only build it: it is imported in one place, _load_finished, whoever built it and when.
                is_python_module=False,
            )

        try:
            build(
                _JIT_OPS_NAME,
                ops_sources,
                config.compile_flags(cuda),
                config.ops_link_flags(ops_file),
                cuda is not None,
            )
            # By a relative path: the linker runs in the folder.
            link_flags = config.module_link_flags(f"./{ops_file}")
            build(_JIT_NAME, module_sources, config.module_compile_flags(cuda), link_flags, False)
        except RuntimeError as error:
            advice = "" if cuda is None else " (LSTM_EXT_CUDA=0 builds the CPU kernels alone)"
            raise BuildError(
                f"compiling with `{command}` failed: {_first_error(str(error))}{advice}"
            ) from error
        except OSError as error:
            raise BuildError(f"the new library does not load: {_first_error(str(error))}") from error
    sizes = _sizes(directory / f"{_JIT_NAME}.so", directory / ops_file)
    config.write_record(directory, torch.__version__, compiler, config.digest(source_dir), cuda, sizes=sizes)


def _first_error(output: str) -> str:
    """The compiler's own first complaint, out of all that ninja printed."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    for pattern in (r"\berror\b\s*:", r"\b(error|cannot|not found|undefined|killed)\b"):
        for line in lines:
            if re.search(pattern, line, re.IGNORECASE) and not line.startswith(
                ("Error building", "ninja:", "FAILED:")
            ):
                return line
    return lines[-1] if lines else "no output"
