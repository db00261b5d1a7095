"""Packed weights out of a file may be anything: an error, or the right numbers; never a crash, never other numbers."""

from __future__ import annotations

import ctypes
import io
import mmap
import random
import struct
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import lstm_ext

# The header of csrc/torch/frozen.cpp: mark, instruction set, sizes and length, then flags, then the plan of the weights
# and their length. They begin at FIRST.
HEADER, LENGTH_AT, PLAN_LENGTH_AT, FIRST = 96, 56, 88, 128
SET_AT, ROUNDED_AT, CHECKSUM_AT, PLAN_AT = 8, 72, 76, 80
KINDS: dict[str, tuple[dict[str, Any], torch.dtype | None]] = {
    "float32": ({}, None),
    "float64": ({"dtype": torch.float64}, None),
    "bfloat16": ({}, torch.bfloat16),
    "int8": ({}, torch.int8),
    "bfloat16 layer": ({"dtype": torch.bfloat16}, None),
    "projected": ({"proj_size": 20}, torch.int8),
    "few weights": ({"hidden_size": 16}, torch.bfloat16),
}
I, H, T, B = 37, 72, 3, 2
EXTREMES = (0, 1, -1, 2, 3, 4, 5, 7, 64, 176, 191, 192, 1 << 20, 1 << 31, 1 << 40, (1 << 63) - 1, -(1 << 63))


def changed(good: Tensor, rng: random.Random) -> Tensor:
    """One change of a header, or another length."""
    data = bytearray(good.numpy().tobytes())
    kind = rng.choice(["byte", "bit", "int32", "int64", "swapped", "cut", "extended", "cut and said so"])
    if kind == "byte":
        data[rng.randrange(HEADER)] = rng.randrange(256)
    elif kind == "bit":
        data[rng.randrange(HEADER)] ^= 1 << rng.randrange(8)
    elif kind == "int32":
        struct.pack_into(
            "<i", data, 4 * rng.randrange(HEADER // 4), rng.choice([0, 1, 2, 3, 4, -1, 255, 1 << 30])
        )
    elif kind == "int64":
        struct.pack_into("<q", data, 8 * rng.randrange(HEADER // 8), rng.choice(EXTREMES))
    elif kind == "swapped":
        a, b = (8 * rng.randrange(HEADER // 8) for _ in range(2))
        data[a : a + 8], data[b : b + 8] = data[b : b + 8], data[a : a + 8]
    elif kind == "extended":
        data += bytes(rng.randrange(1, 4096))
    else:
        del data[rng.randrange(len(data)) :]
        if kind == "cut and said so" and len(data) >= HEADER:
            struct.pack_into("<q", data, LENGTH_AT, len(data))
            struct.pack_into("<q", data, PLAN_LENGTH_AT, len(data) - FIRST)
    return before_a_forbidden_page(bytes(data))


def before_a_forbidden_page(data: bytes) -> Tensor:
    """A tensor behind whose end nothing can be read, but for less than a cache line."""
    if not data:
        return torch.empty(0, dtype=torch.uint8)
    size = -(-len(data) // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    end = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + size
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(end), mmap.PAGESIZE, 0) == 0
    start = (size - len(data)) // 64 * 64
    memory[start : start + len(data)] = data
    return torch.frombuffer(memory, dtype=torch.uint8, count=len(data), offset=start)


def frozen_layer(kind: str) -> tuple[list[Tensor], Any]:
    """Packed weights of both directions, and a call with others in their place."""
    options, weights_as = KINDS[kind]
    torch.manual_seed(0)
    layer = lstm_ext.LSTM(I, **{"hidden_size": H, "bidirectional": True, **options}).eval()
    weights = [p.detach() for p in layer.parameters()]

    def call(x: Tensor, frozen: list[Tensor]) -> Tensor:
        return torch.ops.lstm_ext.lstm_layer(x, None, None, weights, None, True, True, frozen=frozen)[0]

    return lstm_ext.freeze(layer, weights_as)._frozen[0].frozen, call


def check(kind: str, cases: int, seed: int) -> None:
    rng = random.Random(seed)
    good, call = frozen_layer(kind)
    for tensor in good:
        header = tensor[:HEADER].numpy().tobytes()
        assert struct.unpack_from("<q", header, LENGTH_AT) == (tensor.numel(),)
        assert struct.unpack_from("<q", header, PLAN_LENGTH_AT) == (tensor.numel() - FIRST,)
    inputs = [torch.randn(steps, B, I, dtype=KINDS[kind][0].get("dtype")) for steps in (1, T, 40)]
    expected = [call(x, good) for x in inputs]
    refused = 0
    for case in range(cases):
        direction = rng.randrange(2)
        frozen = list(good)
        frozen[direction] = changed(good[direction], rng)
        if case % 2:  # in memory of its own: there the address sanitizer sees the first byte behind it
            frozen[direction] = frozen[direction].clone()
        at = rng.randrange(len(inputs))
        try:
            found = call(inputs[at], frozen)
        except RuntimeError as error:
            refused += 1
            assert "frozen weights" in str(error), error
            continue
        difference = (found - expected[at]).norm() / expected[at].norm()
        assert difference < (2e-2 if found.dtype == torch.bfloat16 else 1e-5), (kind, seed, case, difference)
    assert refused > cases // 2


@pytest.fixture(autouse=True)
def _without_gradients_and_warnings():
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "lstm_ext: weights were frozen for")
        yield


@pytest.mark.parametrize("kind", KINDS)
def test_some_changes(kind):
    check(kind, 45, seed=1)


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
def test_many_changes(kind):
    check(kind, 10_000, seed=2)


def test_every_bit_of_a_header_counts():
    good, call = frozen_layer("float32")
    for bit in range(8 * HEADER):
        damaged = good[0].clone()
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(RuntimeError, match="frozen weights"):
            call(torch.randn(T, B, I), [damaged, good[1]])


def sealed(good: Tensor, changes: dict[int, bytes]) -> Tensor:
    """With these bytes at these places, and the checksum of such a header."""
    data = bytearray(good.numpy().tobytes())
    for at, new in {**changes, CHECKSUM_AT: bytes(4)}.items():
        data[at : at + len(new)] = new
    total = 0xCBF29CE484222325
    for (word,) in struct.iter_unpack("<Q", data[:HEADER]):
        total = ((total ^ word) * 0x100000001B3 & (1 << 64) - 1) ^ total >> 29
    struct.pack_into("<I", data, CHECKSUM_AT, (total ^ total >> 32) & (1 << 32) - 1)
    return torch.frombuffer(data, dtype=torch.uint8)


INT32 = [n.to_bytes(4, "little") for n in range(5)]
ELSEWHERE = {SET_AT: b"another processor"}  # then nothing but the header is read
FORGED = {
    "rounded to float16": ("float32", {ROUNDED_AT: INT32[3]}),
    "float64 in fewer bits": ("float64", {ROUNDED_AT: INT32[1]}),
    "kept in other bits than rounded to": ("float32", {PLAN_AT + 4: INT32[1], **ELSEWHERE}),
    "a name without end": ("float32", {SET_AT: b"x" * 24}),
    "four bf16 parts": ("float32", {PLAN_AT: INT32[4], **ELSEWHERE}),
    "minus one bf16 part": ("float32", {PLAN_AT: b"\xff" * 4, **ELSEWHERE}),
    "another length": ("float32", {PLAN_LENGTH_AT: INT32[4]}),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_header_is_refused(name):
    kind, changes = FORGED[name]
    good, call = frozen_layer(kind)
    x = torch.randn(T, B, I, dtype=KINDS[kind][0].get("dtype"))
    call(x, [sealed(good[0], {}), good[1]])
    with pytest.raises(RuntimeError, match="or are damaged: freeze the layer again"):
        call(x, [sealed(good[0], changes), good[1]])


def test_a_damaged_file_of_an_exported_model():
    """torch.export writes the packed weights as it finds them, with no check of its own."""
    layer = lstm_ext.freeze(lstm_ext.LSTM(I, H).eval())
    x = torch.randn(T, B, I)
    program = torch.export.export(layer, (x,))
    packed = (
        next(value for name, value in program.constants.items() if "packed" in name)
        if program.constants
        else None
    )
    if packed is None:
        packed = next(value for name, value in program.state_dict.items() if "packed" in name)
    packed[HEADER - 8 : HEADER] = 255  # the length of the weights
    file = io.BytesIO()
    torch.export.save(program, file)
    loaded = torch.export.load(io.BytesIO(file.getvalue())).module()
    text = rf"with {I} features and {H} units, direction 0, were made by another version of lstm_ext, or are damaged"
    with pytest.raises(RuntimeError, match=text):
        loaded(x)
