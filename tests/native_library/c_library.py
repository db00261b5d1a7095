"""The C library, built into build/native_library, keyed by what goes in, and its functions from Python."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import torch
from locks import locked
from torch import Tensor

from lstm_ext.native import config, loader

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "native_library"


class Description(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("input_size", "hidden_size", "output_size")),
        *((name, ctypes.c_int32) for name in ("num_layers", "directions", "dtype", "weights")),
        ("capability", ctypes.c_char_p),
    )


class Setup(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int64) for name in ("batch", "max_steps", "threads"))


def sets() -> str:
    """The instruction sets of the library: the least, and the one that the extension uses."""
    used, known = loader.extension().cpu_capability(), list(config.CPU_SETS[config.machine()])
    best = next(name for name in known if used.startswith(name) or (used == "amx" and name == "avx512"))
    return ",".join(dict.fromkeys((best, known[-1])))


def built(flags: str = "", cpu_sets: str | None = None) -> Path:
    """The folder with `include` and `lib`."""
    cpu_sets = cpu_sets or sets()
    compiler = os.environ.get("CXX", "")
    content = hashlib.sha256(f"{config.digest(ROOT / 'csrc')}\0{flags}\0{cpu_sets}\0{compiler}".encode())
    content.update(Path(sys.modules["lstm_ext.native.config"].__file__).read_bytes())
    content.update((config.PACKAGE / "native_library.py").read_bytes())
    prefix = BUILD / content.hexdigest()[:20]
    BUILD.mkdir(parents=True, exist_ok=True)
    with locked(BUILD / "lock"):
        if not (prefix / "done").exists():
            environment = os.environ | {"LSTM_EXT_CPU_SETS": cpu_sets, "CXXFLAGS": flags}
            command = [sys.executable, "-m", "lstm_ext.native_library", str(prefix)]
            subprocess.run(command, check=True, env=environment)
            (prefix / "done").touch()
    return prefix


def linked(source: Path, prefix: Path, program: Path, *flags: str) -> Path:
    """A program in C that uses the library in a folder that `built` returned."""
    command = ["gcc", "-std=gnu11", "-O1", "-Wall", "-Wextra", *flags, str(source), "-o", str(program)]
    found = [f"-I{prefix}/include", f"-L{prefix}/lib", "-llstm_ext", f"-Wl,-rpath,{prefix}/lib"]
    subprocess.run([*command, *found], check=True)
    return program


@functools.cache
def library() -> ctypes.CDLL:
    found = ctypes.CDLL(str(built() / "lib" / "liblstm_ext.so"))
    for name in ("stream_h", "stream_c"):
        getattr(found, f"lstm_ext_{name}").restype = ctypes.c_void_p
    for name in ("model_destroy", "stream_destroy"):
        getattr(found, f"lstm_ext_{name}").restype = None
    return found


class LibraryError(Exception):
    pass


def call(name: str, *arguments: object) -> None:
    function = getattr(library(), f"lstm_ext_{name}")
    function.restype = ctypes.c_char_p
    error = function(*arguments)
    if error is not None:
        text = error.decode()
        assert text and "\n" not in text
        raise LibraryError(text)


def capability() -> str:
    found = ctypes.c_char_p()
    call("capability", ctypes.byref(found))
    return found.value.decode()


class Aligned:
    """Bytes at an address that is a multiple of 64, plus `offset`."""

    def __init__(self, size: int, offset: int = 0) -> None:
        self.buffer = ctypes.create_string_buffer(size + 128 + offset)
        address = ctypes.addressof(self.buffer)
        self.address, self.size = address + -address % 64 + offset, size

    def behind(self) -> bytes:
        """What lies behind it."""
        end = ctypes.addressof(self.buffer) + len(self.buffer)
        return ctypes.string_at(self.address + self.size, end - self.address - self.size)


def copied(content: bytes, offset: int = 0) -> Aligned:
    found = Aligned(len(content), offset)
    ctypes.memmove(found.address, content, len(content))
    return found


class Model:
    """Of the bytes of a weights file, or of a path; `in_place` in memory of the caller."""

    def __init__(self, source: bytes | Path, in_place: bool = False) -> None:
        self.pointer = ctypes.c_void_p()
        if isinstance(source, Path):
            call("model_load", os.fsencode(source), ctypes.byref(self.pointer))
        else:
            given = copied(source)
            arguments = (ctypes.c_void_p(given.address), ctypes.c_size_t(len(source)))
            if in_place:
                needed = ctypes.c_size_t()
                call("model_size", *arguments, ctypes.byref(needed))
                self.memory = Aligned(needed.value, offset=24)
                place = (ctypes.c_void_p(self.memory.address), needed)
                call("model_create_in", *arguments, *place, ctypes.byref(self.pointer))
            else:
                call("model_create", *arguments, ctypes.byref(self.pointer))
            ctypes.memset(given.address, 0xFF, len(source))  # it is not needed any more
        self.description = Description()
        call("model_describe", self.pointer, ctypes.byref(self.description))

    def __del__(self) -> None:
        library().lstm_ext_model_destroy(self.pointer)


class Stream:
    def __init__(
        self, model: Model, batch: int = 1, max_steps: int = 1, threads: int = 1, in_place: bool = False
    ) -> None:
        self.model, self.batch, self.threads = model, batch, threads
        self.pointer, setup = ctypes.c_void_p(), Setup(batch, max_steps, threads)
        if in_place:
            needed = ctypes.c_size_t()
            call("stream_size", model.pointer, ctypes.byref(setup), ctypes.byref(needed))
            self.memory = Aligned(needed.value, offset=8)
            ctypes.memset(self.memory.address, 0xFF, needed.value)
            place = (ctypes.c_void_p(self.memory.address), needed)
            call("stream_create_in", model.pointer, ctypes.byref(setup), *place, ctypes.byref(self.pointer))
        else:
            call("stream_create", model.pointer, ctypes.byref(setup), ctypes.byref(self.pointer))

    def __del__(self) -> None:
        library().lstm_ext_stream_destroy(self.pointer)

    def state(self, name: str) -> Tensor:
        """h or c, which shares the stream's memory."""
        m = self.model.description
        size = m.output_size if name == "h" else m.hidden_size
        shape = (m.num_layers * m.directions, self.batch, size)
        kind = ctypes.c_double if m.dtype else ctypes.c_float
        address = getattr(library(), f"lstm_ext_stream_{name}")(self.pointer)
        array = (kind * (shape[0] * shape[1] * shape[2])).from_address(address)
        return torch.frombuffer(array, dtype=torch.float64 if m.dtype else torch.float32).view(shape)

    def reset(self) -> None:
        call("stream_reset", self.pointer)

    def run(self, x: Tensor, step: bool = False) -> Tensor:
        """x (T, B, I); with `step`, one call for each step."""
        m = self.model.description
        x = x.contiguous()
        y = x.new_full((*x.shape[:2], m.directions * m.output_size), float("nan"))
        parts = [(x[t], y[t]) for t in range(len(x))] if step else [(x, y)]
        for part_x, part_y in parts:
            data_x, data_y = ctypes.c_void_p(part_x.data_ptr()), ctypes.c_void_p(part_y.data_ptr())
            middle = () if step else (ctypes.c_int64(len(x)),)
            self._all("step" if step else "run", data_x, *middle, data_y)
        return y

    def _all(self, name: str, *arguments: object) -> None:
        if self.threads == 1:
            call(name, self.pointer, *arguments)
            return
        errors: list[LibraryError] = []

        def work(worker: int) -> None:
            try:
                call(f"{name}_part", self.pointer, *arguments, ctypes.c_int64(worker))
            except LibraryError as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(worker,)) for worker in range(self.threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
