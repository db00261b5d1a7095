"""The weights file of the C library: docs/guide/c-library.md describes it byte by byte.

It holds the weights in torch's layout, rounded as the frozen layer has them. csrc/library packs them for the processor
on which it runs.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
import threading
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..layer.activations import ACTIVATIONS, activation_text, split_text
from ..options import OPTIONS, zoneout_pair

_MAGIC = b"\x89LSTM\r\n\x1a"
_FORMAT = 1
# csrc/library/weights_file.h has the same as a struct.
_HEADER = "<8sIIQII6I3Q4d" + 3 * "IIdd" + "Q"
_CHECKSUM_AT = 24
_HAS_BIAS, _IS_PROJECTED, _HAS_PEEPHOLES, _HAS_LAYER_NORM, _IS_COUPLED, _HAS_ACTIVATIONS, _NORM_CELL = (
    1 << bit for bit in range(7)
)
_KINDS = {None: 0, torch.bfloat16: 1, torch.int8: 2}


def save(layer: Any, path: str | os.PathLike[str]) -> None:
    """Write a FrozenLSTM into a weights file.

    Raises:
        ValueError: it has an option that the format does not have.
        OSError: the file cannot be written.
    """
    if layer.gru:
        raise ValueError(
            "save_native: expected a FrozenLSTM, got a GRU, which the C library does not compute"
        )
    unknown = [name for name in layer._given if not OPTIONS[name].saved]
    if unknown:
        raise ValueError(f"save_native: the file has no place for {', '.join(unknown)}")
    content = list(_arrays(layer))
    header = bytearray(_header(layer, sum(map(len, content))))
    checksum = zlib.crc32(header)
    for array in content:
        checksum = zlib.crc32(array, checksum)
    struct.pack_into("<I", header, _CHECKSUM_AT, checksum)
    _write(Path(os.path.realpath(path)), [header, *content])


def _write(path: Path, parts: Sequence[bytes | bytearray]) -> None:
    """Write a file beside a path and rename it, so that an error leaves the old file there."""
    if path.exists() and not path.is_file():  # a device or a pipe, which is no file to replace
        with open(path, "wb") as device:
            device.writelines(parts)
        return
    unfinished = path.with_name(f"{path.name}.{threading.get_native_id()}")  # a thread's own
    try:
        with open(unfinished, "wb") as file:
            file.writelines(parts)
        if path.exists():
            shutil.copymode(path, unfinished)
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def _type_of(layer: Any) -> torch.dtype:
    """The dtype in which it computes."""
    return torch.float64 if layer.weight_ih_l0.dtype == torch.float64 else torch.float32


def _kind_of(layer: Any) -> torch.dtype | None:
    """The dtype that weight_ih and weight_hh are rounded to."""
    if layer.frozen_weights is None and layer.weight_ih_l0.dtype == torch.bfloat16:
        return torch.bfloat16
    return layer.frozen_weights


def _bf16_parts(dtype: torch.dtype) -> int:
    """The bfloat16 numbers that make an operand on a tile engine, 0 for none; csrc/torch/cpu_layer.cpp has the same."""
    if dtype in (torch.bfloat16, torch.float16):
        return 1 if dtype == torch.bfloat16 else 2
    precision = torch.backends.mkldnn.rnn.fp32_precision  # type: ignore[attr-defined]
    return {"bf16": 1, "tf32": 2, "ieee": 0}.get(precision, 3)


def _header(layer: Any, content_bytes: int) -> bytes:
    dtype = _type_of(layer)
    numbers = torch.finfo(dtype)

    def bound(name: str) -> float:
        """A clip that the dtype cannot hold is the next one that it can."""
        value = getattr(layer, name)
        return min(max(value, numbers.tiny), numbers.max) if value else 0.0

    text = activation_text(layer.gate_activation, layer.cell_activation)
    activations: list[float] = []
    for name, given in split_text(text) if text else 3 * [("sigmoid", ())]:
        activations += [list(ACTIVATIONS).index(name), 0, *(*given, 0.0, 0.0)[:2]]
    flags = (
        _HAS_BIAS * bool(layer.bias)
        | _IS_PROJECTED * bool(layer.proj_size)
        | _HAS_PEEPHOLES * layer.peephole
        | _HAS_LAYER_NORM * bool(layer.layer_norm)
        | _IS_COUPLED * layer.coupled_gates
        | _HAS_ACTIVATIONS * bool(text)
        | _NORM_CELL * (layer.layer_norm == "cell")
    )
    return struct.pack(
        _HEADER,
        *(_MAGIC, _FORMAT, 0x01020304, struct.calcsize(_HEADER) + content_bytes),
        *(0, flags),
        *(dtype == torch.float64, _KINDS[_kind_of(layer)], _bf16_parts(layer.weight_ih_l0.dtype)),
        *(layer.num_layers, 2 if layer.bidirectional else 1, 0),
        *(layer.input_size, layer.hidden_size, layer.proj_size or layer.hidden_size),
        *(bound("cell_clip"), bound("preactivation_clip"), *zoneout_pair(layer.zoneout)),
        *activations,
        0,
    )


def _arrays(layer: Any) -> Iterator[bytes]:
    """The arrays of all layers and directions, in the order of the file."""
    dtype, kind = _type_of(layer), _kind_of(layer)
    cells = layer._cell_weights()
    directions = 2 if layer.bidirectional else 1
    for k, weights in enumerate(layer._weights_by_layer()):
        for d in range(directions):

            def of_direction(tensors: Any, d: int = d) -> Any:
                count = len(tensors) // directions
                return tensors[d * count : (d + 1) * count]

            w, u, *others = of_direction(weights)
            for weight in (w, u):
                yield from _weight(weight.detach().to(dtype), kind)
            for field in ("norm", "peephole"):
                others += of_direction(cells[field][k]) if field in cells else []
            for tensor in others:
                yield _bytes(tensor.detach().to(dtype))


def _weight(weight: Tensor, kind: torch.dtype | None) -> Iterator[bytes]:
    """Rounded as csrc/torch/frozen.cpp does it."""
    if kind != torch.int8:
        yield _bytes(weight if kind is None else weight.to(kind))
        return
    factors = weight.abs().amax(1).div_(127).clamp_min_(torch.finfo(torch.float32).tiny)
    yield _bytes(weight.div(factors.unsqueeze(1)).round_().clamp_(-127, 127).to(torch.int8))
    yield _bytes(factors)


def _bytes(tensor: Tensor) -> bytes:
    """Its numbers, with zeros up to a multiple of 8 bytes."""
    tensor = tensor.contiguous()
    found = ctypes.string_at(tensor.data_ptr(), tensor.nbytes)
    return found + bytes(-len(found) % 8)
