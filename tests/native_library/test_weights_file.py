"""The weights file holds all that a frozen layer computes with; docs/guide/c-library.md says where."""

from __future__ import annotations

import os
import resource
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

import lstm_ext
from lstm_ext.options import OPTIONS

# As the page has it, and not as the writer.
FIELDS = (
    ("magic", "8s"), ("version", "I"), ("byte_order", "I"), ("total_bytes", "Q"), ("checksum", "I"), ("flags", "I"),
    ("dtype", "I"), ("weight_kind", "I"), ("bf16_parts", "I"), ("num_layers", "I"), ("directions", "I"), ("zero", "I"),
    ("input_size", "Q"), ("hidden_size", "Q"), ("output_size", "Q"), ("cell_clip", "d"), ("preactivation_clip", "d"),
    ("zoneout_h", "d"), ("zoneout_c", "d"),
)  # fmt: skip


def frozen_of(weights: torch.dtype | None = None, **options: Any) -> lstm_ext.FrozenLSTM:
    torch.manual_seed(0)
    layer = lstm_ext.LSTM(3, 5, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return lstm_ext.freeze(layer, weights)


def content_of(layer: lstm_ext.FrozenLSTM, tmp_path: Path) -> bytes:
    layer.save_native(tmp_path / "weights")
    return (tmp_path / "weights").read_bytes()


def header_of(content: bytes) -> dict[str, Any]:
    layout = "<" + "".join(kind for _, kind in FIELDS)
    found = dict(zip([name for name, _ in FIELDS], struct.unpack_from(layout, content), strict=True))
    found["activations"] = [struct.unpack_from("<IIdd", content, 112 + 24 * i) for i in range(3)]
    return found


class Reader:
    def __init__(self, content: bytes) -> None:
        self.content, self.at = content, 192

    def next(self, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        count = torch.Size(shape).numel()
        found = torch.frombuffer(bytearray(self.content), dtype=dtype, count=count, offset=self.at).view(
            shape
        )
        self.at += -(-count * dtype.itemsize // 8) * 8
        return found


def test_header(tmp_path: Path) -> None:
    options = {
        "num_layers": 3,
        "bidirectional": True,
        "proj_size": 2,
        "zoneout": (0.25, 0.5),
        "cell_clip": 2.0,
    }
    content = content_of(frozen_of(torch.int8, peephole=True, preactivation_clip=1e-300, **options), tmp_path)
    found = header_of(content)
    assert found.pop("checksum") == zlib.crc32(content[:24] + bytes(4) + content[28:])
    expected = {
        "magic": b"\x89LSTM\r\n\x1a", "version": 1, "byte_order": 0x01020304, "total_bytes": len(content), "flags": 7,
        "dtype": 0, "weight_kind": 2, "bf16_parts": 3, "num_layers": 3, "directions": 2, "zero": 0, "input_size": 3,
        "hidden_size": 5, "output_size": 2, "cell_clip": 2.0, "preactivation_clip": torch.finfo(torch.float32).tiny,
        "zoneout_h": 0.25, "zoneout_c": 0.5, "activations": 3 * [(0, 0, 0.0, 0.0)],
    }  # fmt: skip
    assert found == expected
    assert content[184:192] == bytes(8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_arrays(dtype: torch.dtype, tmp_path: Path) -> None:
    """In the order of the page, in torch's layout, each from a multiple of 8 bytes on."""
    layer = frozen_of(num_layers=2, bidirectional=True, proj_size=2, peephole=True, dtype=dtype)
    content = content_of(layer, tmp_path)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    kind = dtype if dtype == torch.bfloat16 else wide
    reader = Reader(content)
    for suffix in ("l0", "l0_reverse", "l1", "l1_reverse"):
        for name in (
            "weight_ih",
            "weight_hh",
            "bias_ih",
            "bias_hh",
            "weight_hr",
            "weight_ci",
            "weight_cf",
            "weight_co",
        ):
            expected = getattr(layer, f"{name}_{suffix}")
            own = kind if name in ("weight_ih", "weight_hh") else wide
            found = reader.next(own, *expected.shape)
            assert torch.equal(found.to(wide), expected.to(wide)), name
    assert reader.at == len(content)
    header = header_of(content)
    bf16_parts = {torch.bfloat16: 1, torch.float16: 2}.get(dtype, 3)
    names = ("dtype", "weight_kind", "bf16_parts")
    assert [header[n] for n in names] == [dtype == torch.float64, dtype == torch.bfloat16, bf16_parts]


def test_rounded_weights(tmp_path: Path) -> None:
    layer = frozen_of(torch.int8, layer_norm=True, bias=False)
    reader = Reader(content_of(layer, tmp_path))
    for name in ("weight_ih", "weight_hh"):
        expected = getattr(layer, f"{name}_l0")
        numbers, factors = reader.next(torch.int8, *expected.shape), reader.next(torch.float32, 20)
        assert torch.equal(factors, expected.abs().amax(1) / 127)
        assert torch.equal(numbers.abs().amax(1), torch.full((20,), 127, dtype=torch.int8))
        assert ((numbers * factors[:, None] - expected).abs() <= 0.5001 * factors[:, None]).all()
    for name in ("gain_ih", "gain_hh", "gain_c"):
        expected = getattr(layer, f"ln_{name}_l0")
        assert torch.equal(reader.next(torch.float32, *expected.shape), expected)
    assert reader.at == len(reader.content)
    reader = Reader(content_of(frozen_of(torch.bfloat16), tmp_path))
    assert torch.equal(reader.next(torch.bfloat16, 20, 3), frozen_of().weight_ih_l0.bfloat16())


def test_activations(tmp_path: Path) -> None:
    layer = frozen_of(gate_activation=("hard_sigmoid", 0.25), cell_activation=("softsign", ("affine", -2.0)))
    found = header_of(content_of(layer, tmp_path))
    assert found["activations"] == [(8, 0, 0.25, 0.5), (9, 0, 0.0, 0.0), (2, 0, -2.0, 0.0)]
    assert found["flags"] == 1 + 32


def test_each_option_is_saved_or_changes_nothing() -> None:
    saved = "zoneout layer_norm peephole cell_clip coupled_gates gate_activation cell_activation preactivation_clip"
    of_training = "recurrent_dropout weight_dropout forget_bias recompute"
    assert {name for name, option in OPTIONS.items() if option.saved} == {
        *saved.split(),
        *of_training.split(),
    }


def test_another_option_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPTIONS, "zoneout", OPTIONS["zoneout"]._replace(saved=False))
    with pytest.raises(ValueError, match="save_native: the file has no place for zoneout"):
        frozen_of(zoneout=0.1).save_native(tmp_path / "weights")
    assert not (tmp_path / "weights").exists()


def test_an_error_leaves_the_old_file(tmp_path: Path) -> None:
    before = content_of(frozen_of(), tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400, limits[1]))  # as a disk that is full
    try:
        with pytest.raises(OSError, match="File too large"):
            frozen_of(zoneout=0.5).save_native(tmp_path / "weights")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "weights").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]


def test_what_is_at_the_path(tmp_path: Path) -> None:
    """A link and the mode of a file stay, and no device is replaced."""
    (tmp_path / "weights").symlink_to("target")
    (tmp_path / "target").touch(0o600)
    content = content_of(frozen_of(), tmp_path)
    assert (tmp_path / "weights").is_symlink() and (tmp_path / "target").read_bytes() == content
    assert (tmp_path / "target").stat().st_mode & 0o777 == 0o600
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    frozen_of().save_native(tmp_path / "pipe")
    assert os.read(reader, 1 << 16) == content
    os.close(reader)


def test_precision_of_a_tile_engine(tmp_path: Path) -> None:
    rnn = torch.backends.mkldnn.rnn
    before = rnn.fp32_precision
    try:
        for precision, bf16_parts in (("bf16", 1), ("tf32", 2), ("none", 3), ("ieee", 0)):
            rnn.fp32_precision = precision
            assert header_of(content_of(frozen_of(), tmp_path))["bf16_parts"] == bf16_parts
    finally:
        rnn.fp32_precision = before


def test_a_weight_that_was_not_packed_is_an_error(tmp_path: Path) -> None:
    layer = frozen_of()
    layer.weight_ih_l0 = torch.nn.Parameter(torch.zeros(20, 3), requires_grad=False)
    with pytest.raises(RuntimeError, match="weight_ih_l0 is another tensor than the one that was packed"):
        layer.save_native(tmp_path / "weights")


def test_layers_of_torch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = torch.nn.LSTM(3, 5, num_layers=2)
    frozen = lstm_ext.freeze(theirs)
    assert isinstance(frozen, lstm_ext.FrozenTorchLSTM)
    reader = Reader(content_of(frozen, tmp_path))
    assert torch.equal(reader.next(torch.float32, 20, 3), theirs.weight_ih_l0)
