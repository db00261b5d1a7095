"""Compiles what runs the CPU kernels on a tile engine in plain C++, into build/tile_engine, keyed by what goes in."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
import subprocess
from pathlib import Path

from lstm_ext.native import loader

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
BUILD = ROOT / "build" / "tile_engine"
# For this processor: the same source as the extension's, fused multiply-adds included, gives the same bits.
FLAGS = [
    "-std=c++17",
    "-O2",
    "-march=native",
    "-fPIC",
    "-shared",
    "-Wall",
    "-Wextra",
    f"-I{ROOT / 'csrc'}",
    f"-I{HERE.parent}",
]


def _library(source: str, *arguments: str) -> Path:
    command = [*shlex.split(os.environ.get("CXX") or "g++"), *FLAGS, str(HERE / source), *arguments]
    content = hashlib.sha256("\0".join(command).encode())
    headers = [path for folder in (HERE, ROOT / "csrc") for path in folder.rglob("*.h")]
    for path in sorted([HERE / source, *headers]):
        content.update(path.read_bytes())
    target = BUILD / f"{Path(source).stem}-{content.hexdigest()[:20]}.so"
    if not target.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        # Two processes may build the same thing: each its own file, the name given when it is whole.
        partial = target.with_suffix(f".{os.getpid()}.so")
        subprocess.run([*command, "-o", str(partial)], check=True)
        partial.replace(target)
    return target


@functools.cache
def add_kernels() -> None:
    """Afterwards the loaded extension knows the instruction set "software"."""
    ctypes.CDLL(str(_library("kernels.cpp", loader.status().ops_path)))


@functools.cache
def engine(hardware: bool) -> ctypes.CDLL:
    """products.cpp over AMX, which this processor must have, or over the engine in plain C++."""
    return ctypes.CDLL(str(_library("products.cpp", *(["-DHARDWARE"] if hardware else []))))
