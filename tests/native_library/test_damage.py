"""A damaged weights file is one clear line, and never a crash."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import struct
import subprocess
import threading
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from c_library import LibraryError, Model, built, call, copied, library, linked

import lstm_ext

pytestmark = pytest.mark.tools

SOURCE = Path(__file__).parent / "damage.c"
LAYERS = {
    "plain": (lambda: lstm_ext.LSTM(3, 4, num_layers=2, bidirectional=True, proj_size=2), None),
    "int8": (lambda: lstm_ext.LSTM(2, 5, peephole=True, gate_activation="hard_sigmoid"), torch.int8),
    "float64": (lambda: lstm_ext.LSTM(1, 2, layer_norm=True, dtype=torch.float64), None),
}


def content_of(name: str, tmp_path: Path) -> bytes:
    make, kind = LAYERS[name]
    lstm_ext.freeze(make(), kind).save_native(tmp_path / "weights")
    return (tmp_path / "weights").read_bytes()


def changed(content: bytes, at: int, kind: str, *values: Any, signed: bool = True) -> bytes:
    """With other values from a byte on, and then the checksum of them."""
    found = bytearray(content)
    struct.pack_into(f"<{kind}", found, at, *values)
    if signed:
        struct.pack_into("<I", found, 24, 0)
        struct.pack_into("<I", found, 24, zlib.crc32(found))
    return bytes(found)


def said_of(content: bytes) -> str:
    with pytest.raises(LibraryError) as error:
        Model(content)
    return str(error.value)


def test_lines(tmp_path: Path) -> None:
    good = content_of("plain", tmp_path)
    size = len(good)
    Model(good)
    assert said_of(b"PK\3\4" + good[4:]) == "this is no weights file of lstm_ext: its first bytes are others"
    assert (
        said_of(good[:100]) == "the weights file is cut off: it has 100 bytes, and its header alone has 192"
    )
    assert (
        said_of(good[:-8])
        == f"the weights file is cut off: it has {size - 8} bytes, and its header says {size}"
    )
    assert (
        said_of(good + b"\0")
        == f"the weights file is too long: it has more than the {size} bytes of its header"
    )
    assert said_of(changed(good, 200, "B", 255 - good[200], signed=False)) == (
        "the weights file is damaged: its checksum differs"
    )
    assert said_of(changed(good, 8, "I", 2)) == (
        "the weights file has format 2, and this library reads format 1: save it again"
    )
    assert said_of(changed(good, 12, "I", 0x04030201)) == (
        "the weights file is of the other byte order, which no machine of this library has"
    )
    assert said_of(changed(good, 12, "I", 0)) == "the weights file is damaged: its byte order mark is none"


@pytest.mark.parametrize(
    ("field", "at", "kind", "value"),
    [
        ("flags", 28, "I", 128),
        ("flags", 28, "I", 1 + 2 + 64),  # a normalised c_t without layer normalisation
        ("flags", 28, "I", 1 + 2 + 8 + 16),  # layer normalisation with coupled gates
        ("flags", 28, "I", 1 + 2 + 8 + 4),  # and with peepholes
        ("dtype", 32, "I", 2),
        ("weight_kind", 36, "I", 3),
        ("bf16_parts", 40, "I", 4),
        ("num_layers", 44, "I", 0),
        ("num_layers", 44, "I", 1 << 17),
        ("directions", 48, "I", 3),
        ("zero", 52, "I", 1),
        ("input_size", 56, "Q", 0),
        ("input_size", 56, "Q", 1 << 31),
        ("total_bytes", 56, "Q", (1 << 31) - 1),
        ("hidden_size", 64, "Q", 0),
        ("hidden_size", 64, "Q", 1 << 63),
        ("output_size", 72, "Q", 4),
        ("output_size", 72, "Q", 0),
        ("cell_clip", 80, "d", -1.0),
        ("cell_clip", 80, "d", 1e-300),
        ("preactivation_clip", 88, "d", float("inf")),
        ("preactivation_clip", 88, "d", float("nan")),
        ("zoneout_h", 96, "d", 1.5),
        ("zoneout_h", 96, "d", -5e-324),
        ("zoneout_c", 104, "d", float("nan")),
        ("activations", 112, "I", 1),
        ("activations", 120, "d", 0.5),
        ("zero", 184, "Q", 1),
    ],
)
def test_fields(field: str, at: int, kind: str, value: Any, tmp_path: Path) -> None:
    good = content_of("plain", tmp_path)
    assert said_of(changed(good, at, kind, value)) == (
        f"the weights file is not valid: its field {field} has no such value"
    )


def test_fields_of_other_layers(tmp_path: Path) -> None:
    good = content_of("int8", tmp_path)
    invalid = "the weights file is not valid: its field {} has no such value"
    for at, kind, value, field in (
        (32, "I", 1, "weight_kind"),  # int8 in float64
        (112, "I", 11, "activations"),
        (120, "d", -0.1, "activations"),
        (128, "d", float("inf"), "activations"),
        (128, "d", 1e300, "activations"),  # no number in float32
        (192 + 40, "f", 0.0, "factors"),  # those of weight_ih, (20, 2)
        (192 + 40, "f", float("nan"), "factors"),
        (192 + 40, "f", 3e38, "factors"),  # 127 times this is infinite
        (192 + 40 + 76, "f", 0.0, "factors"),  # the last of them
        (192 + 40 + 80 + 104, "f", 0.0, "factors"),  # those of weight_hh, (20, 5)
    ):
        assert said_of(changed(good, at, kind, value)) == invalid.format(field)
    for alpha in (0.0, 1e-60):  # of scaled_tanh; float32 has no such number but 0
        assert said_of(changed(good, 112, "IId", 7, 0, alpha)) == invalid.format("activations")


def test_the_largest_values(tmp_path: Path) -> None:
    good = content_of("plain", tmp_path)
    Model(changed(changed(good, 96, "d", 1.0), 104, "d", 1.0))  # zoneout_h and zoneout_c


@pytest.mark.parametrize(
    "said", ["its first bytes are others", r"too long: it has more than the \d+ bytes of"]
)
def test_a_file_without_an_end(said: str, tmp_path: Path) -> None:
    content = bytearray(content_of("plain", tmp_path) if "too long" in said else b"")
    os.mkfifo(tmp_path / "pipe")
    written = 0

    def write() -> None:
        nonlocal written
        with contextlib.suppress(BrokenPipeError), open(tmp_path / "pipe", "wb", buffering=0) as pipe:
            while written < 1 << 25:
                written += pipe.write(content or b"\xff" * 4096)
                content.clear()

    thread = threading.Thread(target=write)
    thread.start()
    with pytest.raises(LibraryError, match=said):
        Model(tmp_path / "pipe")
    thread.join()
    assert written < 1 << 18  # a pipe holds 2^16 bytes that nobody has read


def test_a_line_stays_for_63_more(tmp_path: Path) -> None:
    library().lstm_ext_model_load.restype = ctypes.c_void_p
    names = [os.fsencode(tmp_path / str(i)) for i in range(64)]
    lines = [library().lstm_ext_model_load(name, ctypes.byref(ctypes.c_void_p())) for name in names]
    for name, line in zip(names, lines, strict=True):
        assert ctypes.string_at(line) == b"could not open '%s': No such file or directory" % name


def test_files(tmp_path: Path) -> None:
    with pytest.raises(LibraryError) as error:
        Model(tmp_path / "none")
    assert str(error.value) == f"could not open '{tmp_path / 'none'}': No such file or directory"
    with pytest.raises(LibraryError, match=r"could not read .*: Is a directory"):
        Model(tmp_path)
    (tmp_path / "empty").touch()
    with pytest.raises(LibraryError, match="cut off: it has 0 bytes"):
        Model(tmp_path / "empty")
    place = copied(content_of("plain", tmp_path), offset=4)
    with pytest.raises(LibraryError, match="bytes: expected an address that is a multiple of 8, got 0x"):
        pointer = ctypes.c_void_p()
        call("model_create", ctypes.c_void_p(place.address), ctypes.c_size_t(192), ctypes.byref(pointer))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("flags", ["", "-fsanitize=address,undefined"], ids=["plain", "sanitized"])
def test_every_damage(flags: str, name: str, tmp_path: Path) -> None:
    """Each length, each byte in four ways, and 20,000 headers of unusual values; what is still a model runs."""
    content_of(name, tmp_path)
    if flags:
        flags += " -fno-sanitize-recover=all"
        prefix = built(f"-O1 {flags}", "avx2")
    else:
        prefix = built()
    program = linked(SOURCE, prefix, tmp_path / "damage", *flags.split())
    run = subprocess.run([program, tmp_path / "weights"], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    found = re.fullmatch(r"(\d+) files, (\d+) models, each other a line\n", run.stdout)
    assert found and int(found[1]) > 20_000 and int(found[2]) > 1000
