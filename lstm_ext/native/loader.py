"""Finds the compiled extension: built ahead of time, else by `python -m lstm_ext.build`, else none.

It is two libraries in one folder: that of the operators is loaded first, and the Python module, linked with it, finds
it in the process. A wheel has these two for each torch and Python, and a third one, of the CPU kernels, for all. One
with CUDA also has a library of the CUDA kernels, and one for each torch that registers them, which is loaded last.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import logging
import os
import re
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from . import config, jit
from .config import BuildError
from .integrations import constant_for_dynamo

BUILD = "python -m lstm_ext.build"
_log = logging.getLogger("lstm_ext")


@dataclass(frozen=True)
class Status:
    """How the extension was found; `reason` says why there is none, or why it was chosen."""

    backend: (
        str  # "aot", "jit"; without an extension "torch", torch's own operator, or "reference", the equations
    )
    path: str | None = None  # path of the Python module
    ops_path: str | None = None  # path of the operators' library
    reason: str | None = None
    torch_version: str | None = None  # the version that it was built for
    compiler: str | None = None
    sources: str | None = None  # digest of the sources
    cuda: str | None = None  # the CUDA version and the architectures that it has kernels for
    cuda_reason: str | None = None  # why it has no CUDA kernels


@dataclass(frozen=True)
class _Result:
    module: ModuleType | None
    status: Status
    error: str | None = None  # raised as ImportError by every call


_result: _Result | None = None
_waiting: list[Callable[[], None]] = []  # see on_load
_lock = threading.Lock()


def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    # A process forked while another thread was building would wait for a thread that it does not have.
    os.register_at_fork(after_in_child=_renew_lock)


def extension() -> ModuleType | None:
    """The compiled module, or None if there is none. Decided once: by `load_built`, or by the first call.

    It compiles only if LSTM_EXT_BACKEND=jit asks for it. Without a library that fits, torch's own operator computes,
    and a warning says how to build one.

    Raises ImportError for an extension that refuses to run, and for a backend that was requested by name
    (LSTM_EXT_BACKEND=aot or jit) and is not available; ValueError for an invalid LSTM_EXT_BACKEND.
    """
    global _result
    result = _result
    if result is None:
        unavailable = None
        with _lock:
            result = _result
            if result is None:
                result, unavailable = _choose()
                while result.module is not None and _waiting:
                    _waiting.pop(0)()
                # This is last: no other thread gets the module before the functions of on_load have run.
                _result = result
        # Where nothing can be built, torch's operator is what the user expects.
        if unavailable is not None and config.is_supported_platform():
            warn(
                f"lstm_ext has no kernels here, so torch's own operator computes its layers: {unavailable.rstrip('.')}."
                f" `{BUILD}` compiles them (LSTM_EXT_BACKEND=torch is for no kernels, without a warning)"
            )
    if result.error is not None:
        raise ImportError(result.error)
    return result.module


_INSIDE = (f"{config.PACKAGE}{os.sep}", f"{Path(torch.__file__).parent}{os.sep}")


def warn(text: str) -> None:
    """A RuntimeWarning at the line outside this package and torch that led here."""
    frame: Any = sys._getframe(1)
    level = 2
    while frame is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, RuntimeWarning, stacklevel=level)


def release_memory() -> int:
    """Give back the memory on the CPU that calls keep for later calls, at most 256 MiB in a process.

    Calls and backward passes reuse large buffers, since new memory costs a page fault for each 4 KiB. After a model is
    gone, or before a program waits for long, this returns them to the system. It waits for no call and takes nothing
    from one that runs in another thread. The next call allocates anew.

    Returns:
        the number of bytes; 0 where there are no kernels.
    """
    module = None if _result is None else _result.module
    return 0 if module is None else module.release_memory()


def on_load(function: Callable[[], None]) -> None:
    """Calls a function as soon as the operators are registered; at once if they already are.

    `extension` calls it before it returns the module for the first time. The function must not call `extension`.
    """
    with _lock:
        if not _has_operators():
            _waiting.append(function)
            return
    function()


def _has_operators() -> bool:
    """Whether the operators are registered in this process, whoever loaded their library."""
    return bool(torch._C._jit_get_operation("lstm_ext::lstm_layer")[0])


@constant_for_dynamo
def has_kernels() -> bool:
    """Whether extension() returns a module. Dynamo calls it, so the operators are registered when it reaches them."""
    return extension() is not None


@constant_for_dynamo
def wants_equations() -> bool:
    """Whether the equations replace the kernels, and not torch's own operator."""
    return status().backend == "reference"


def status() -> Status:
    """The result of extension(), which is called first if nobody has."""
    if _result is None:
        try:
            extension()
        except ImportError:
            pass
    assert _result is not None
    return _result.status


def load_built() -> None:
    """Called when the package is imported: loads an extension that was built ahead of time, so that no call has to.

    It takes some milliseconds. Raises ValueError for an invalid LSTM_EXT_BACKEND; other errors are left to the calls.
    """
    # These programs import the package first, and then say all by themselves.
    if {"lstm_ext.info", "lstm_ext.build"} & set(sys.orig_argv):
        return
    if _requested() in ("auto", "aot") and config.is_supported_platform() and find_aot() is not None:
        with contextlib.suppress(ImportError, ValueError):
            extension()


def _requested() -> str:
    return config.chosen("LSTM_EXT_BACKEND", "auto", ("auto", "aot", "jit", "torch", "reference"))


def _failed(error: str) -> tuple[_Result, None]:
    return _Result(None, Status("torch", reason=error), error=error), None


def _choose() -> tuple[_Result, str | None]:
    """The result, and why there are no kernels, if a warning is due."""
    requested = _requested()
    config.check_cuda_variables()  # they raise as early as a bad backend
    if requested in ("torch", "reference"):
        return _Result(None, Status(requested, reason=f"LSTM_EXT_BACKEND={requested} asks for it")), None
    try:
        if requested == "jit":
            return _load_or_build(_log.info)[0], None
        result, reason = _find(requested)
    except (_Refused, config.SwitchError) as error:
        return _failed(str(error))
    except BuildError as error:  # jit alone raises it
        return _failed(f"LSTM_EXT_BACKEND=jit, but the build failed: {error}")
    if result is not None:
        return result, None
    if requested == "aot":
        return _failed(f"LSTM_EXT_BACKEND=aot, but {reason.rstrip('.')}: build it with {build_command()}.")
    return _Result(None, Status("torch", reason=reason)), reason


def _find(requested: str) -> tuple[_Result | None, str]:
    """A library that is built and fits, and why there is none."""
    if not config.is_supported_platform():
        return None, str(jit.problem())
    no_cuda = "LSTM_EXT_BACKEND=aot asks for the wheel, which has none"
    wheel = _wheel()
    if requested == "auto" and wheel is not None:
        result, no_cuda = _cuda_build_before_wheel(wheel)
        if result is not None:
            return result, ""
    reason = _missing_in_wheel() or f"there is no {config.MODULE}"
    try:
        result = _load_aot(no_cuda)
    except _Refused:
        raise
    except ImportError as error:
        result, reason = None, str(error)
    if result is None and requested == "auto":
        try:
            result = next(filter(None, map(_load_finished, _built_on_request())), None)
        except BuildError as error:
            reason = f"{reason}, and {error}"
    return result, reason


def _built_on_request() -> list[Path]:
    """The folders of finished builds for this torch and Python, the one with CUDA kernels for this GPU first."""
    sources = jit.source_dir()
    cuda = []
    if config.no_cuda_wanted(torch.version.cuda) is None:
        cuda = [jit.folder(sources, "cuda", config.requested_architectures()), *jit.finished_with_cuda()]
    return [*cuda, jit.folder(sources, "cpu")]


def build(say: Callable[[str], None]) -> tuple[Status, bool]:
    """Compiles for this torch and Python, unless a library is there that fits: for `python -m lstm_ext.build`.

    Args:
        say: is called with a line of text for each file that is compiled.

    Returns:
        The library, and whether it was compiled now.

    Raises:
        BuildError: something is missing, or the compiler refused.
        ImportError: the library refuses to run here.
        ValueError: a variable of the environment has a value that means nothing.
    """
    # A wheel's libraries cannot be loaded beside others, which have the CUDA kernels that it has not.
    wheel = _wheel()
    if not (config.cuda_switch() and wheel is not None and _cuda_of_wheel(wheel)[0] is None):
        try:
            result = _load_aot("")
        except _Refused:
            raise
        except ImportError:  # it does not fit
            result = None
        if result is not None:
            return result.status, False
    result, was_built = _load_or_build(say)
    return result.status, was_built


def build_command() -> str:
    root = config.PACKAGE.parent
    if (root / "setup.py").is_file() and (root / "csrc").is_dir():
        return f"`python setup.py build_ext --inplace` in {root}"
    # --no-deps: without it, --force-reinstall would replace torch as well.
    return "`pip install --no-build-isolation --no-deps --force-reinstall .` in lstm_ext's source folder"


class _Refused(ImportError):
    """The library fits and refuses to run by itself, e.g. for a bad LSTM_EXT_CPU_CAPABILITY."""


def _load(name: str, path: Path, ops_path: Path) -> ModuleType:
    _refuse_second_registration(ops_path)
    try:
        torch.ops.load_library(str(ops_path))
    except OSError as error:
        # torch's message names the library, its cause gives the reason.
        raise ImportError(str(error.__cause__ or error), path=str(ops_path)) from error
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        if error.path is None:  # errors of the operating system's loader have a path
            raise _Refused(str(error).partition("\n")[0]) from error
        raise
    sys.modules[name] = module
    return module


def _refuse_second_registration(ops_path: Path) -> None:
    """Raises if the operators are registered: a second library that registers them would end the process."""
    if not _has_operators():
        return
    loaded = {line.split(maxsplit=5)[-1].strip() for line in Path("/proc/self/maps").read_text().splitlines()}
    if str(ops_path.resolve()) not in loaded:
        others = sorted(name for name in loaded if re.search(r"/(lstm_ext)?_ops(-[\d.]+)?\.so$", name))
        raise _Refused(
            "the operators of lstm_ext are registered in this process already, "
            f"by {', '.join(others) or 'another file'}; {ops_path} cannot be loaded beside it"
        )


# ---- built ahead of time


def find_aot() -> Path | None:
    # Searched in this folder only: an editable install may offer the lstm_ext.native._C of another checkout.
    directory = config.LIBRARIES
    # A wheel has a module for each torch and Python.
    stem = "_C" if _wheel() is None else f"_C-{config.minor(torch.__version__)}"
    candidates = (directory / f"{stem}{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    return next((path for path in candidates if path.is_file()), None)


def _wheel() -> dict | None:
    """The record of a wheel; None for a build of this machine's own, or none."""
    record = config.read_record(config.LIBRARIES)
    return record if record is not None and "wheel" in record else None


def _missing_in_wheel() -> str | None:
    """Why a wheel has no library for this process, or None."""
    if _wheel() is None or find_aot() is not None:
        return None
    version = f"{sys.version_info[0]}.{sys.version_info[1]}{sys.abiflags}"
    return f"the wheel has no library for torch {config.minor(torch.__version__)} with Python {version}"


def check_record(path: Path) -> dict:
    """Checks the record before the library is opened: one built for another torch can crash the process as it loads."""
    record = config.read_record(path.parent)
    if record is None:
        raise ImportError(f"{path} has no {config.RECORD} beside it")
    built_for = (
        record["wheel"].get(config.minor(torch.__version__), "") if "wheel" in record else record["torch"]
    )
    if not config.fits_torch(built_for, torch.__version__):
        raise ImportError(
            f"{path} was built for torch {built_for}, and torch {torch.__version__} is installed"
        )
    ops_path = config.ops_library_of(path)
    if not ops_path.is_file():
        raise ImportError(f"{path} has no {ops_path.name} beside it")
    return record


def _load_aot(no_cuda_in_wheel: str) -> _Result | None:
    path = find_aot()
    if path is None:
        return None
    record = check_record(path)
    try:
        module = _load(config.MODULE, path, config.ops_library_of(path))
    except _Refused:
        raise
    except ImportError as error:
        first_line = str(error).partition("\n")[0]
        raise ImportError(
            f"the extension does not fit the installed torch {torch.__version__} ({first_line})"
        ) from error
    status = _status_of("aot", path, config.ops_library_of(path), record)
    if "wheel" in record:
        version = record["wheel"].get(config.minor(torch.__version__))
        cuda, reason = _cuda_of_wheel(record)
        if cuda is not None:
            try:
                torch.ops.load_library(str(cuda))
            except OSError as error:
                first_line = str(error.__cause__ or error).partition("\n")[0]
                cuda, no_cuda_in_wheel = None, f"{cuda.name} does not load ({first_line})"
        status = replace(
            status,
            torch_version=version,
            cuda=None if cuda is None else record["cuda"],
            cuda_reason=None if cuda is not None else no_cuda_in_wheel or reason,
        )
    return _Result(module, status)


def _cuda_of_wheel(record: dict) -> tuple[Path | None, str]:
    """The library that registers a wheel's CUDA kernels for this torch; or None, and why."""
    reason = config.no_cuda_wanted(torch.version.cuda)
    if reason is not None:
        return None, reason
    built, minor = record.get("cuda") or "", config.minor(torch.__version__)
    major, wheels_major = str(torch.version.cuda).split(".")[0], built.split(".")[0]
    library = config.LIBRARIES / config.cuda_library(minor)
    if major == wheels_major and library.is_file():
        return library, ""
    has = "none"
    if built:
        has = f"those of CUDA {wheels_major}" if major != wheels_major else f"none for torch {minor}"
    how = f"with nvcc of CUDA {major} and a C++ compiler, `LSTM_EXT_CUDA=1 {BUILD}` builds them"
    return None, f"the wheel has {has}; {how}"


def _cuda_build_before_wheel(wheel: dict) -> tuple[_Result | None, str]:
    """A build on request that has CUDA kernels, if the wheel has none; else why there is none."""
    cuda, reason = _cuda_of_wheel(wheel)
    if cuda is not None or config.no_cuda_wanted(torch.version.cuda) is not None:
        return None, reason
    try:
        for directory in jit.finished_with_cuda():
            result = _load_finished(directory)
            if result is not None:
                return result, ""
    except BuildError as error:
        _log.warning("lstm_ext: a build with CUDA kernels is not used: %s", error)
        return None, str(error)
    return None, reason


def _status_of(backend: str, path: Path, ops_path: Path, record: dict) -> Status:
    more = {name: record.get(name) for name in ("compiler", "sources", "cuda", "cuda_reason")}
    return Status(backend, str(path), str(ops_path), torch_version=record["torch"], **more)


# ---- built on request


def _load_or_build(say: Callable[[str], None]) -> tuple[_Result, bool]:
    """The library of a finished build, or of one that is made now; and whether it was made now."""
    sources = jit.source_dir()
    reason = config.no_cuda_wanted(torch.version.cuda)
    directory, cuda = jit.folder(sources, "cpu"), None
    if reason is None:
        # A finished build needs no nvcc, so it is looked for first.
        with_cuda = jit.folder(sources, "cuda", config.requested_architectures())
        result = _load_finished(with_cuda)
        if result is not None:
            return result, False
        cuda, reason = config.choose_cuda(torch.version.cuda)
        directory = directory if cuda is None else with_cuda
    directory, was_built = jit.trusted(directory), False
    result = _load_finished(directory)
    if result is None:
        try:
            with jit.exclusive(directory):
                result = _load_finished(directory)  # another process may have built it while we waited
                if result is None:
                    if (untested := config.untested(torch.__version__)) is not None:
                        _log.warning("lstm_ext: %s", untested)
                    if reason is not None and torch.version.cuda is not None:
                        _log.warning("lstm_ext: the extension is built without CUDA kernels: %s", reason)
                    jit.build(sources, directory, cuda, reason, say)
                    was_built = True
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
    return result, was_built


def _load_finished(directory: Path) -> _Result | None:
    """None also for an unfinished build, and for a library that no longer loads."""
    directory = jit.trusted(directory)
    record = jit.finished(directory)
    if record is None:
        return None
    module, ops_library = jit.module(directory), jit.ops_library(directory)
    try:
        loaded = _load(config.MODULE, module, ops_library)
    except _Refused:
        raise
    except ImportError as error:
        _log.info("%s does not load: %s", module, error)
        return None
    status = _status_of("jit", module, ops_library, record)
    if status.cuda is None:
        # The variable may ask for something else than when it was built.
        status = replace(status, cuda_reason=config.no_cuda_wanted(torch.version.cuda) or status.cuda_reason)
    return _Result(loaded, status)
