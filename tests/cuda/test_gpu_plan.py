"""Which kernels a GPU would run, and why: rules that hold for every layer and device, and the texts of `explain`."""

from __future__ import annotations

import functools
import os
import random
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lstm_ext
from lstm_ext.call import cuda_choice
from lstm_ext.layer import cuda_kernels
from lstm_ext.native import config, loader

_C = loader.extension()
CUDA = config.source_dir() / "cuda"
DEVICES = {device["name"]: device for device in _C.cuda_devices()}
REGISTERS = 65536  # of a multiprocessor of every supported card


def instances() -> set[int]:
    """The rows of a block for which step_launch.cuh instantiates the forward kernel."""
    constants = dict(re.findall(r"constexpr int (kStepRows\w+) = (\d+);", (CUDA / "gpu_plan.h").read_text()))
    used = re.findall(r"step_forward_kernel<T, \w+, (\w+)>", (CUDA / "step_launch.cuh").read_text())
    return {int(constants[name]) for name in used}


def drawn(rng: random.Random) -> dict[str, Any]:
    def size(most: int) -> int:
        return max(1, round(2 ** rng.uniform(0, most)))

    return {
        "steps": size(11),
        "batch": size(13),
        "input_size": size(12),
        "hidden_size": size(12),
        "directions": rng.choice((1, 2)),
        "dtype": rng.choice(("float64", "float32", "float16", "bfloat16")),
        "tf32": rng.random() < 0.5,
        "projected": rng.random() < 0.1,
        "normalised": rng.random() < 0.1,
        "cell_options": rng.random() < 0.1,
        "backward": rng.random() < 0.5,
        "packed": rng.random() < 0.2,
        "options": rng.random() < 0.2,
        "kernel": rng.choice(("auto", "auto", "step", "stepwise", "persistent")),
        "step_outcome": rng.choice((None, True, False)),
        "persistent_outcome": rng.choice((None, True, False)),
    }


def some_device(rng: random.Random) -> dict[str, Any]:
    """One of the table's, or a part of one."""
    device = dict(rng.choice(list(DEVICES.values())))
    if rng.random() < 0.5:
        device["multiprocessors"] = rng.randint(1, device["multiprocessors"])
        device["l2_bytes"] = rng.randint(1 << 20, device["l2_bytes"])
    return device


def launches(layer: dict[str, Any], kernel: str) -> int:
    """Of a time step: a kernel of all directions, and their products."""
    if kernel != "stepwise":
        return 1 if kernel == "step" else 0
    products = layer["directions"]
    if not layer["projected"]:
        return 1 + (1 if layer["steps"] >= 8 and not layer["packed"] else products)
    return 1 + 2 * products + (1 if layer["backward"] or layer["options"] else 0)


def check(device: dict[str, Any], layer: dict[str, Any], compiled: set[int]) -> None:
    plan = _C.cuda_plan(device=device, **layer)
    eligible = not (
        layer["projected"]
        or layer["normalised"]
        or layer["cell_options"]
        or layer["dtype"] == "float64"
        or (layer["dtype"] == "float32" and not layer["tf32"])
    )
    if layer["kernel"] not in ("auto", "stepwise") and not eligible:
        assert plan["problem"] and plan["kernel"] == "stepwise"  # a backward pass goes on with that
        return
    assert not plan["problem"] and plan["reasons"]
    of, wanted = plan["persistent"], layer["kernel"]
    fits = {"persistent": not of["problem"], "step": not plan["step_problem"]}
    assert eligible or not any(fits.values())
    if wanted == "auto":
        fits["step"] = fits["step"] and 2 * plan["parts_bytes"] <= device["l2_bytes"]
        right = [kernel for kernel in fits if fits[kernel] and layer[f"{kernel}_outcome"]]
        assert plan["kernel"] == [*right, "stepwise"][0]
    else:
        # What does not find room is replaced by the next one.
        assert plan["kernel"] == ("step" if wanted == "persistent" and of["problem"] else wanted)
    assert plan["launches"] == launches(layer, plan["kernel"])
    assert (plan["launches"] > plan["products"]) == (plan["kernel"] != "persistent")
    if not eligible:
        return
    if not of["problem"]:
        check_persistent(device, layer, of)
    rows = plan["rows_of_block"]
    assert rows in compiled
    assert plan["shared_bytes"] <= device["shared_of_block"]
    assert plan["threads"] * 255 <= REGISTERS
    units_blocks = -(-layer["hidden_size"] // 16)
    assert plan["blocks"] == units_blocks * -(-layer["batch"] // rows)


def check_persistent(device: dict[str, Any], layer: dict[str, Any], of: dict[str, Any]) -> None:
    """All blocks that wait for each other are there at once, and all weights have a place."""
    size = 4 if layer["dtype"] == "float32" or (layer["dtype"] == "float16" and layer["backward"]) else 2
    numbers = 16 // size
    units = 8 if size == 4 and not layer["backward"] else 16
    of_group = -(-layer["hidden_size"] // units) * layer["directions"]
    assert of["blocks"] == of_group * of["groups"] <= device["multiprocessors"]
    assert 1 <= of["groups"] <= -(-layer["batch"] // of["rows"])
    # A group that has several tiles of 8 rows takes two at once, if 64 registers of a thread hold the rows of U of the
    # units; else 128 do, and the extra pieces.
    rows = units * (1 if layer["backward"] else 4)
    depth = -(-layer["hidden_size"] // numbers) * numbers * (4 if layer["backward"] else 1)
    in_registers = 256 * 128 * 4
    assert rows * depth * size <= in_registers * 8 // of["rows"] + (of["shared_bytes"] if of["extra"] else 0)
    room = device["multiprocessors"] // of_group * 8
    assert (of["rows"] == 16) == (layer["batch"] > room and rows * depth * size <= in_registers // 2)
    assert layer["steps"] > 1 and of["shared_bytes"] <= device["shared_of_block"]


@pytest.mark.parametrize("seed", [1, *(pytest.param(n, marks=pytest.mark.tools) for n in (2, 3, 4))])
def test_every_plan_can_run(seed: int) -> None:
    rng, compiled = random.Random(seed), instances()
    assert len(compiled) == 2
    for _ in range(50_000):
        check(some_device(rng), drawn(rng), compiled)


def test_the_kernel_is_chosen_only_where_it_has_been_right() -> None:
    layer = {"steps": 100, "batch": 16, "input_size": 512, "hidden_size": 768, "dtype": "bfloat16"}
    for device in DEVICES.values():
        assert _C.cuda_plan(device=device, **layer)["kernel"] == "stepwise"
        assert _C.cuda_plan(device=device, **layer, step_outcome=True)["kernel"] == "step"
        assert _C.cuda_plan(device=device, **layer, persistent_outcome=True)["kernel"] == "persistent"
    for kernel in ("stepwise", "step", "persistent"):  # a measurement counts for more than the order
        right = {"step_outcome": True, "persistent_outcome": True}
        plan = _C.cuda_plan(device=DEVICES["H100"], **layer, **right, measured=kernel)
        assert (
            plan["kernel"] == kernel and "it was the fastest when calls like this one" in plan["reasons"][-1]
        )
    projected = _C.cuda_plan(device=DEVICES["H100"], **layer, projected=True, measured="step")
    assert projected["kernel"] == "stepwise"  # it has no such layer
    with pytest.raises(ValueError, match="cuda_plan: expected stepwise, step or persistent, got fast"):
        _C.cuda_plan(device=DEVICES["H100"], **layer, measured="fast")
    both = _C.cuda_plan(device=DEVICES["H100"], **layer, step_outcome=True, persistent_outcome=True)
    assert both["kernel"] == "persistent" and both["launches"] == both["products"] == 0


def test_a_measurement_counts_for_a_class_of_sizes() -> None:
    layer = {
        "device": 63,
        "batch": 16,
        "hidden_size": 99,
        "directions": 1,
        "dtype": "bfloat16",
        "tf32": False,
    }
    layer |= {"steps": 65, "projected": False, "backward": False, "packed": False}

    def set_to(kernel: str, **other: Any) -> str:
        return _C.set_cuda_measured(**{**layer, **other}, kernel=kernel)

    assert set_to("step") == ""
    for other in ({"steps": 64}, {"batch": 17}, {"hidden_size": 98}, {"backward": True}, {"packed": True}):
        assert set_to("", **other) == "", other
    for other in (
        {"tf32": True},
        {"projected": True},
        {"directions": 2},
        {"device": 62},
        {"dtype": "float16"},
    ):
        assert set_to("", **other) == "", other
    assert set_to("persistent", steps=128, batch=9) == "step"  # 65 to 128 steps, 9 to 16 rows
    assert set_to("") == "persistent" and set_to("") == ""


def test_a_kernel_that_was_wrong_is_not_taken() -> None:
    layer = {"steps": 100, "batch": 16, "input_size": 512, "hidden_size": 768, "dtype": "bfloat16"}
    plan = _C.cuda_plan(device=DEVICES["H100"], **layer, step_outcome=False)
    assert plan["kernel"] == "stepwise"
    assert "not step: it was wrong on this device" in plan["reasons"]
    plan = _C.cuda_plan(device=DEVICES["H100"], **layer, step_outcome=True, persistent_outcome=False)
    assert plan["kernel"] == "step"
    assert "not persistent: it was wrong on this device" in plan["reasons"]


def test_what_the_backward_pass_keeps_fits_into_the_cache() -> None:
    """H / 16 partial sums of every number of dL/dh, of two steps."""
    layer = {"steps": 100, "batch": 256, "input_size": 1024, "hidden_size": 1024, "dtype": "bfloat16"}
    plan = _C.cuda_plan(device=DEVICES["RTX 4090"], **layer, backward=True, step_outcome=True)
    assert plan["parts_bytes"] == 2 * 64 * 256 * 1024 * 4
    assert plan["kernel"] == "stepwise"
    assert plan["reasons"][-1] == "not step: its partial sums would fill the second-level cache"
    small = _C.cuda_plan(device=DEVICES["H100"], **{**layer, "batch": 16}, backward=True, step_outcome=True)
    assert small["kernel"] == "step"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"steps": 1}, "the sequence has one step"),
        ({"hidden_size": 4096}, "its weights do not fit into registers and shared memory"),
        (
            {"hidden_size": 1024, "directions": 2, "batch": 1, "dtype": "float32"},
            "its blocks do not all find a ",
        ),
    ],
)
def test_what_persistent_kernels_have_no_room_for(change: dict[str, Any], problem: str) -> None:
    """Another kernel computes such a layer."""
    layer = {"steps": 9, "batch": 16, "input_size": 8, "hidden_size": 768, "dtype": "bfloat16", **change}
    plan = _C.cuda_plan(device=DEVICES["H100"], **layer, kernel="persistent")
    assert plan["persistent"]["problem"].startswith(problem) and plan["kernel"] == "step"
    assert plan["reasons"][0].startswith(f"not persistent: {problem}")


def test_blocks_do_not_wait_for_each_other_on_a_shared_device() -> None:
    layer = {"steps": 9, "batch": 16, "input_size": 8, "hidden_size": 768, "dtype": "bfloat16"}
    device = {**DEVICES["H100"], "shared": True}
    plan = _C.cuda_plan(device=device, **layer, kernel="persistent")
    assert "shared with other programs" in plan["persistent"]["problem"]
    assert plan["kernel"] == "step"


def test_fewer_blocks_than_multiprocessors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that the user leaves to others, as for NCCL; and those that the device refused."""
    layer = {"steps": 9, "batch": 64, "input_size": 8, "hidden_size": 512, "dtype": "bfloat16"}
    variable = "LSTM_EXT_CUDA_FREE_MULTIPROCESSORS"

    def blocks(**also: Any) -> int:
        plan = _C.cuda_plan(device={**DEVICES["H100"], **also}, **layer, kernel="persistent")
        return plan["persistent"]["blocks"] if plan["kernel"] == "persistent" else 0

    assert [blocks(), blocks(most_blocks=127), blocks(most_blocks=31)] == [128, 96, 0]
    for free, expected in (("4", 128), ("5", 96), ("100", 32), ("101", 0), ("10000", 0)):
        monkeypatch.setenv(variable, free)
        assert blocks() == expected
    for wrong in ("101x", "x", "-101", "10001", str(2**64 + 101)):  # a call on a GPU raises
        monkeypatch.setenv(variable, wrong)
        assert blocks() == 128


def test_more_rows_than_a_grid_has() -> None:
    layer = {"steps": 1, "batch": 64 * 65535 + 1, "input_size": 1, "hidden_size": 1, "dtype": "bfloat16"}
    plan = _C.cuda_plan(device=DEVICES["H100"], **layer, step_outcome=True)
    assert (plan["kernel"], plan["problem"]) == ("stepwise", "")
    plan = _C.cuda_plan(device=DEVICES["H100"], **layer, kernel="step")
    assert plan["problem"] == "its grid has no room for so many rows"


def test_older_cards_are_refused() -> None:
    layer = {"steps": 1, "batch": 1, "input_size": 1, "hidden_size": 1}
    plan = _C.cuda_plan(device={**DEVICES["A100"], "capability": 75}, **layer)
    assert plan["problem"] == "the kernels need compute capability 8.0 or later"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dtype": "int8"}, "dtype: expected float64, float32, float16 or bfloat16, got int8"),
        ({"kernel": "fast"}, "kernel: expected auto, torch, stepwise, step or persistent, got fast"),
        ({"batch": 0}, "expected sizes and directions of at least 1, got 0"),
    ],
)
def test_bad_questions(change: dict[str, Any], said: str) -> None:
    layer = {"steps": 1, "batch": 1, "input_size": 1, "hidden_size": 1, **change}
    with pytest.raises(RuntimeError, match=said):
        _C.cuda_plan(device=DEVICES["A100"], **layer)


# ---- explain

GOLDEN = Path(__file__).with_name("explained.txt")
# LSTM_EXT_CUDA_KERNEL, module, input, device, dtype.
EXPLAINED = (
    ("auto", nn.LSTM(512, 768), (100, 16, 512), "H100", torch.bfloat16),
    ("auto", nn.LSTM(64, 128, bidirectional=True, num_layers=2), (50, 1, 64), "RTX 4090", torch.float16),
    ("auto", nn.LSTM(64, 128, proj_size=32), (50, 8, 64), "A100", torch.float32),
    ("auto", nn.LSTM(64, 128, batch_first=True), (8, 50, 64), "L4", torch.float64),
    ("auto", nn.LSTMCell(256, 256), (32, 256), "B200", torch.bfloat16),
    ("step", nn.LSTM(1024, 1024), (200, 128, 1024), "A10", torch.float16),
    ("step", nn.LSTM(64, 128), (200, 64), "H200", torch.float64),
    ("persistent", nn.LSTM(64, 512, bidirectional=True), (200, 16, 64), "H100", torch.bfloat16),
    ("persistent", nn.LSTM(64, 96).eval(), (200, 400, 64), "A10", torch.float16),
    ("persistent", nn.LSTM(64, 2048).eval(), (200, 8, 64), "L4", torch.bfloat16),
)


@pytest.fixture(autouse=True)
def _nothing_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    """conftest.py forces the kernels."""
    monkeypatch.setattr(cuda_kernels, "_forced", Counter())


def explanation(monkeypatch: pytest.MonkeyPatch, kernel: str, module: nn.Module, *rest: Any) -> str:
    monkeypatch.setenv("LSTM_EXT_CUDA_KERNEL", kernel)
    shape, device, dtype = rest
    return lstm_ext.explain(module, shape, device=device, dtype=dtype)


def test_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of explained.txt. If a change is meant: LSTM_EXT_WRITE_GOLDEN=1 pytest tests/cuda/test_gpu_plan.py."""
    texts = "\n\n".join(f"[{case[0]}] {explanation(monkeypatch, *case)}" for case in EXPLAINED) + "\n"
    if os.environ.get("LSTM_EXT_WRITE_GOLDEN"):
        GOLDEN.write_text(texts)
    assert texts == GOLDEN.read_text()


@pytest.mark.parametrize("device", ["cpu", "H100"])
@pytest.mark.parametrize(
    "make", [nn.LSTM, nn.LSTMCell, functools.partial(nn.LSTM, num_layers=2, dropout=0.1), nn.GRU, nn.GRUCell]
)
def test_a_layer_of_torch_is_explained_as_what_it_becomes(
    make: Callable[..., nn.Module], device: str
) -> None:
    module = make(8, 16)
    shape = (3, 8) if isinstance(module, nn.RNNCellBase) else (5, 3, 8)
    said = lstm_ext.explain(module, shape, device=device)
    assert said == lstm_ext.explain(lstm_ext.convert(module), shape, device=device)
    assert ("torch's own operator" in said) == (device == "H100")


@pytest.mark.parametrize("ours", [False, True])
def test_what_was_measured_is_said(monkeypatch: pytest.MonkeyPatch, ours: bool) -> None:
    choice = cuda_choice.Choice(ours, "step", {"torch": 2.0, "step": 1.0})
    found = {"choices": {"bfloat16 H16 L1 B4 T8": choice}, "outcomes": {"step": True, "persistent": False}}
    monkeypatch.setattr(
        sys.modules["lstm_ext.nn.explain"], "_device", lambda *_: ("cuda:0", DEVICES["H100"], found)
    )
    module = nn.LSTM(8, 16).eval()
    layer = lstm_ext.explain(module, (5, 3, 8), dtype=torch.bfloat16).data["layers"][0]
    assert layer["kernel"] == ("step" if ours else "torch")
    assert layer["reasons"][-1] == "measured on this device: torch 2 us, step 1 us"
    other = lstm_ext.explain(module, (5, 30, 8), dtype=torch.bfloat16)
    assert "until it is measured" in other and "step can run" in other
    assert "persistent is not taken: it was wrong on this device" in other


def test_torch_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of layers that torch's operator can compute. In deterministic mode too, without a request."""
    monkeypatch.setenv("LSTM_EXT_CUDA_KERNEL", "torch")
    said = lstm_ext.explain(nn.LSTM(8, 16), (5, 3, 8), device="H100")
    assert said.endswith("torch's own operator, one call for all layers\n    LSTM_EXT_CUDA_KERNEL=torch")
    options = (lstm_ext.LSTM(8, 16, zoneout=0.1), (5, 3, 8))
    requested = lstm_ext.explain(*options, device="H100")
    monkeypatch.delenv("LSTM_EXT_CUDA_KERNEL")
    assert requested == lstm_ext.explain(*options, device="H100") and "torch" not in requested
    monkeypatch.setattr(cuda_choice, "_is_deterministic", lambda: True)
    said = lstm_ext.explain(nn.LSTM(8, 16), (5, 3, 8), device="H100")
    assert said.endswith("one call for all layers\n    in deterministic mode no measurement decides")


def test_torchs_operator_takes_no_layer_with_options() -> None:
    for layer in (lstm_ext.LSTM(8, 16, zoneout=0.1), lstm_ext.freeze(nn.LSTM(8, 16))):
        assert "torch's own" not in lstm_ext.explain(layer, (5, 3, 8), device="H100")


def test_data_of_a_layer_on_the_cpu() -> None:
    data = lstm_ext.explain(lstm_ext.LSTM(8, 16, num_layers=2, bidirectional=True), (5, 3, 8)).data
    assert (data["device"], data["dtype"], data["training"]) == ("cpu", "float32", True)
    assert [layer["input_size"] for layer in data["layers"]] == [8, 32]
    assert {layer["kernel"] for layer in data["layers"]} == {_C.cpu_capability()}
    text = lstm_ext.explain(lstm_ext.LSTM(8, 16).eval(), (5, 3, 8))
    assert text.startswith("LSTM(8, 16), input (5, 3, 8), float32, on cpu, in inference:\n  layer 0: ")


def test_frozen_layers_say_that_they_are_packed() -> None:
    for weights, said in (
        (None, "frozen"),
        (torch.bfloat16, "frozen, in bfloat16"),
        (torch.int8, "frozen, in int8"),
    ):
        text = lstm_ext.explain(lstm_ext.freeze(nn.LSTM(8, 16), weights), (5, 3, 8))
        assert f"    weights were packed when the layer was {said}\n" in f"{text}\n"
        assert "weights are" not in text


def test_a_device_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "torch's own operator, one call for all layers\n    there are no kernels for mps"
    assert said in lstm_ext.explain(nn.LSTM(8, 16), (5, 3, 8), device="mps")
    assert lstm_ext.explain(nn.LSTMCell(8, 16), (3, 8), device="mps").split("\n")[1].endswith("own operator")
    monkeypatch.setattr(loader, "_result", loader._Result(None, loader.Status("torch", reason="a test")))
    assert "a test" in lstm_ext.explain(nn.LSTM(8, 16), (5, 3, 8), device="mps")
    with pytest.raises(ValueError, match=r"expected a device of torch, got 'H100'; .* it is not: a test"):
        lstm_ext.explain(nn.LSTM(8, 16), (5, 3, 8), device="H100")


def test_without_a_batch_there_is_one_row() -> None:
    cells = [(cell, (8,), 1) for cell in (nn.LSTMCell(8, 16), nn.GRUCell(8, 16))]
    for module, shape, steps in (*cells, (nn.LSTM(8, 16), (5, 8), 5), (nn.GRU(8, 16), (5, 8), 5)):
        (layer,) = lstm_ext.explain(module, shape).data["layers"]
        assert (layer["steps"], layer["batch"]) == (steps, 1)


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ((nn.RNN(2, 3), (4, 1, 2)), TypeError, "module: expected an LSTM, a GRU or a cell of these, got RNN"),
        (
            (nn.RNNCell(2, 3), (4, 2)),
            TypeError,
            "module: expected an LSTM, a GRU or a cell of these, got RNNCell",
        ),
        ((nn.LSTM(2, 3), (4, 1, 3)), ValueError, "input_shape: expected .* with I = 2 .*, got \\(4, 1, 3\\)"),
        ((nn.LSTM(2, 3), (4, 0, 2)), ValueError, "input_shape: expected"),
        ((nn.LSTMCell(2, 3), (4, 1, 2)), ValueError, "input_shape: expected \\(B, I\\) or \\(I\\)"),
        (
            (nn.LSTM(2, 3), (4, 1, 2), "V100"),
            ValueError,
            "device: expected a device of torch or one of A100, A30",
        ),
        ((nn.LSTM(2, 3), (4, 1, 2), "meta"), ValueError, "device: expected one that computes, got meta"),
        ((nn.LSTM(2, 3), (4, 1, 2), "cpu", torch.int8), ValueError, "dtype: expected float32"),
    ],
)
def test_bad_arguments(arguments: tuple[Any, ...], error: type[Exception], said: str) -> None:
    module, shape, device, dtype = (*arguments, None, None)[:4]
    with pytest.raises(error, match=said):
        lstm_ext.explain(module, shape, device=device, dtype=dtype)
