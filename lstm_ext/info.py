"""python -m lstm_ext.info: says what is installed, how it was built and what runs here.

The exit code is 1 if the compiled extension is not loaded.

python -m lstm_ext.info --operators: prints only the path of the operators' library, as :func:`operators_library`
returns it.
"""

from __future__ import annotations

import os
import platform
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from .layer import cuda_kernels
from .native import config, jit, loader, selftest_record

__all__ = ["operators_library"]


def __dir__() -> list[str]:
    return __all__


def operators_library() -> str:
    """The path of the shared library that registers the operators, ``torch.ops.lstm_ext``.

    A C++ process that has libtorch loads it with ``dlopen`` before it runs a model made by AOTInductor; the library
    needs no Python. The process has to be linked with all of libtorch (``-Wl,--no-as-needed -ltorch``), because a
    library that was built with CUDA needs the CUDA part of libtorch. See examples/aoti_inference.

    Raises:
        ImportError: there is no compiled extension; the text says why.
    """
    if loader.extension() is None:
        raise ImportError(f"there is no compiled extension: {loader.status().reason}")
    return str(loader.status().ops_path)


def _lines() -> list[tuple[str, str]]:
    lines = [
        ("lstm_ext", f"{config.VERSION}, in {config.PACKAGE}"),
        ("  commit", _commit()),
        ("torch", torch.__version__),
        ("python", f"{config.python_version()} on {sys.platform} {platform.machine()}"),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the lines below say the same as the warning
        status = loader.status()
        try:
            module = loader.extension()
            in_use = status.backend
        except ImportError:  # every call raises it, and torch's operator is not used either
            module, in_use = None, "none"

    if module is None:
        lines.append(("extension", f"not loaded: {status.reason}"))
    else:
        how = {"aot": "built ahead of time", "jit": "built on request"}[status.backend]
        lines.append(("extension", f"loaded, {how}"))
        lines.append(("  module", str(status.path)))
        lines.append(("  operators", str(status.ops_path)))
        lines.append(("  built for", f"torch {status.torch_version}"))
        lines.append(("  built at", _built_at(config.read_record(Path(str(status.path)).parent))))
        lines.append(("  compiler", str(status.compiler)))
        changed = _changed_sources(status)
        if changed:
            lines.append(("  sources", changed))
        forced = os.environ.get("LSTM_EXT_CPU_CAPABILITY")
        note = f" (LSTM_EXT_CPU_CAPABILITY={forced})" if forced else ""
        lines.append(("instructions", f"{module.cpu_capability()}{note}"))
        lines.append(("  available", ", ".join(module.cpu_capabilities())))
    lines.append(("threads", f"{torch.get_num_threads()} of {os.cpu_count()} processors"))

    lines.append(("backends", ""))
    lines.append(("  aot", "in use" if in_use == "aot" else _aot_state()))
    lines.append(("  jit", "in use" if in_use == "jit" else _jit_state()))
    for name in ("torch", "reference"):
        lines.append((f"  {name}", "in use" if in_use == name else f"works (LSTM_EXT_BACKEND={name})"))
    lines += _cuda_lines(module is not None, status)
    return lines


def _commit() -> str:
    """The commit of this checkout, or of the one that the libraries beside this package were built in."""
    found = config.commit()
    if found is not None:
        return found
    record = config.read_record(config.LIBRARIES)
    if record is not None and record.get("commit"):
        return f"{record['commit']}, recorded by the build"
    return "not known: this is no git checkout, or there is no git, and no build has recorded it"


def _built_at(record: dict[str, Any] | None) -> str:
    """The version and the commit from which the extension in use was built."""
    known = record or {}
    return f"{known.get('version') or 'a version that is not recorded'}, commit {known.get('commit') or 'not recorded'}"


def _cuda_lines(is_loaded: bool, status: loader.Status) -> list[tuple[str, str]]:
    if not is_loaded:
        lines = [("cuda", "no kernels: the extension is not loaded")]
    elif status.cuda is None:
        lines = [
            (
                "cuda",
                f"no kernels, torch's own operator computes layers of CUDA tensors: {status.cuda_reason}",
            )
        ]
    else:
        lines = [("cuda", f"kernels built with CUDA {status.cuda}")]
        lines.append(("  kernel", cuda_kernels.requested()))
    built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    lines.append(("  devices", f"{count or 'none'}; torch is built {built}"))
    for i in range(count):
        lines += _device_lines(torch.device("cuda", i), status)
    return lines


def _device_lines(device: torch.device, status: loader.Status) -> list[tuple[str, str]]:
    major, minor = torch.cuda.get_device_capability(device)
    text = f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}"
    if status.cuda is None:
        return [(f"  {device}", f"{text}: torch's own operator")]
    reason = cuda_kernels.unsupported((major, minor), status.cuda)
    if reason is not None:
        return [(f"  {device}", f"{text}: not supported: {reason}")]
    entry = selftest_record.find(device)
    if entry is None:
        tested = "not run for this device and build: python -m lstm_ext.selftest"
    else:
        results = [(entry.get("passed"), "passed"), (entry.get("failed"), "FAILED")]
        tested = "; ".join(f"{', '.join(names)} {said}" for names, said in results if names)
        tested += f" on {entry.get('date')}"
    return [(f"  {device}", f"{text}: supported"), ("    selftest", tested)]


def _changed_sources(status: loader.Status) -> str | None:
    source_dir = config.source_dir()
    record = config.read_record(Path(str(status.path)).parent)
    if source_dir is None or record is None or record.get("sources") == config.digest(source_dir):
        return None
    return f"{source_dir} has changed since the build: rebuild with {loader.build_command()}"


def _aot_state() -> str:
    path = loader.find_aot()
    if not config.is_supported_platform():
        return f"cannot be built: {jit.problem()}"
    if path is None:
        return f"no {config.MODULE} here: build it with {loader.build_command()}"
    try:
        loader.check_record(path)
    except ImportError as error:
        return f"does not fit: {error}"
    return f"there, not in use: {path}"


def _jit_state() -> str:
    problem = jit.problem()
    return f"cannot be built: {problem}" if problem else f"can be built: `{loader.BUILD}`"


def main() -> int:
    try:
        if sys.argv[1:] == ["--operators"]:
            print(operators_library())
            return 0
        if sys.argv[1:]:
            print(
                f"lstm_ext.info: expected no argument or --operators, got {' '.join(sys.argv[1:])}",
                file=sys.stderr,
            )
            return 2
        lines = _lines()
    except (ImportError, ValueError) as error:  # no extension; a bad LSTM_EXT_BACKEND
        print(error, file=sys.stderr)
        return 1
    for name, text in lines:
        print(f"{name:<13}{text}".rstrip())
    return 0 if loader.status().backend in ("aot", "jit") else 1


if __name__ == "__main__":
    sys.exit(main())
