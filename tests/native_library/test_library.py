"""The C library computes the bits of the frozen layer in Python, and streams share a model."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from c_library import Aligned, LibraryError, Model, Setup, Stream, call, capability, copied, library, sets
from torch import Tensor

import lstm_ext
from lstm_ext.native import loader

pytestmark = pytest.mark.tools  # the first test compiles it: a minute on two cores


class Case(NamedTuple):
    options: Mapping[str, Any] = MappingProxyType({})
    weights: torch.dtype | None = None
    dtype: torch.dtype = torch.float32
    inputs: int = 24
    hidden: int = 48
    batch: int = 3


CASES = {
    "plain": Case(),
    "one": Case(inputs=1, hidden=1, batch=1),
    "odd": Case({"num_layers": 2}, inputs=13, hidden=37, batch=5),
    "large": Case(inputs=96, hidden=256, batch=4),
    "rows": Case(inputs=64, hidden=64, batch=40),
    "one row": Case(inputs=160, hidden=256, batch=1),
    "deep": Case({"num_layers": 4}),
    "both": Case({"bidirectional": True, "num_layers": 3}),
    "both, at once": Case({"bidirectional": True}, inputs=64, hidden=64, batch=1),
    "projected": Case({"proj_size": 20, "num_layers": 2}),
    "no bias": Case({"bias": False, "bidirectional": True, "proj_size": 9}),
    "float64": Case({"num_layers": 2, "bidirectional": True}, dtype=torch.float64),
    "float64, projected": Case({"proj_size": 5}, dtype=torch.float64, hidden=130),
    "bfloat16": Case(weights=torch.bfloat16, hidden=130),
    "bfloat16, few": Case({"num_layers": 2}, weights=torch.bfloat16),
    "int8": Case({"num_layers": 2, "bidirectional": True}, weights=torch.int8, hidden=130),
    "int8, few": Case(weights=torch.int8),
    "int8, projected": Case({"proj_size": 33}, weights=torch.int8, hidden=200),
    "of bfloat16": Case(dtype=torch.bfloat16, hidden=130),
    "of bfloat16, rows": Case(dtype=torch.bfloat16, inputs=64, hidden=64, batch=40),
    "of bfloat16, int8": Case(dtype=torch.bfloat16, weights=torch.int8, hidden=130),
    "of float16": Case(dtype=torch.float16, inputs=64, hidden=64, batch=40),
    "zoneout": Case({"zoneout": (0.1, 0.3), "num_layers": 2}),
    "layer_norm": Case({"layer_norm": True, "bidirectional": True}, hidden=100),
    "layer_norm, no bias": Case({"layer_norm": True, "bias": False, "proj_size": 7}),
    "layer_norm, cell": Case({"layer_norm": "cell", "zoneout": 0.1, "num_layers": 2}, hidden=130),
    "peephole": Case({"peephole": True, "bidirectional": True, "num_layers": 2}),
    "clips": Case({"cell_clip": 0.4, "preactivation_clip": 1.5, "peephole": True}, dtype=torch.float64),
    "coupled": Case({"coupled_gates": True, "zoneout": 0.2}, weights=torch.int8, hidden=130),
    "activations": Case(
        {"gate_activation": ("hard_sigmoid", 0.3, 0.4), "cell_activation": ("softsign", ("elu", 0.7))}
    ),
    "of training": Case(
        {"recurrent_dropout": 0.5, "weight_dropout": 0.5, "forget_bias": 2.0, "recompute": True}
    ),
}


def frozen_of(case: Case) -> lstm_ext.FrozenLSTM:
    torch.manual_seed(1)
    layer = lstm_ext.LSTM(case.inputs, case.hidden, dtype=case.dtype, **case.options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return lstm_ext.freeze(layer, case.weights)


def saved(layer: lstm_ext.FrozenLSTM, tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    layer.save_native(path)
    return path


@contextlib.contextmanager
def instruction_set(name: str) -> Iterator[None]:
    extension = loader.extension()
    before, ours = extension.cpu_capability(), capability()
    extension.set_cpu_capability(name)
    call("set_capability", name.encode())
    try:
        yield
    finally:
        extension.set_cpu_capability(before)
        call("set_capability", ours.encode())


def compare(layer: lstm_ext.FrozenLSTM, stream: Stream, inputs: int, lengths: tuple[int, ...]) -> None:
    """One call after the other, each from the states of the one before."""
    dtype = layer.weight_ih_l0.dtype
    wide = dtype if dtype == torch.float64 else torch.float32
    state = None
    for length in lengths:
        x = torch.randn(length, stream.batch, inputs).to(dtype)
        with torch.no_grad():
            y, state = layer(x, state)
        found = stream.run(x.to(wide))
        assert torch.equal(found.to(dtype), y), length
        for name, expected in zip("hc", state, strict=True):
            own = stream.state(name)
            assert torch.equal(own.to(dtype), expected), (length, name)
            own.copy_(expected)  # in 16 bits, Python rounds it between two calls


@pytest.mark.alone
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("name", CASES)
def test_bits_of_the_frozen_layer(name: str, threads: int, tmp_path: Path) -> None:
    case = CASES[name]
    model = Model(saved(frozen_of(case), tmp_path))
    stream = Stream(model, case.batch, 30, threads)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        # Plans with more and with fewer barriers follow each other, in one workspace.
        compare(frozen_of(case), stream, case.inputs, (30, 1, 2, 30, 7, 1))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["deep", "float64", "int8, projected", "layer_norm", "one"])
@pytest.mark.parametrize("which", ["best", "least"])
def test_one_file_serves_each_instruction_set(which: str, name: str, tmp_path: Path) -> None:
    case = CASES[name]
    extension = loader.extension()
    wanted = extension.cpu_capabilities()[-1] if which == "least" else extension.cpu_capability()
    path = saved(frozen_of(case), tmp_path)
    with instruction_set(wanted):
        model = Model(path)
        assert model.description.capability.decode() == wanted
        compare(frozen_of(case), Stream(model, 2, 9), case.inputs, (9, 1, 4))


@pytest.mark.parametrize("name", ["plain", "deep", "projected", "int8", "zoneout", "float64, projected"])
def test_steps(name: str, tmp_path: Path) -> None:
    """Each step has the bits of step() in Python; all of them are a run, within rounding."""
    case = CASES[name]
    if "bidirectional" in case.options:
        case = case._replace(options={"num_layers": 2})
    layer = frozen_of(case)
    content = saved(layer, tmp_path).read_bytes()
    model = Model(content, in_place=True)
    stream, whole = Stream(model, case.batch, in_place=True), Stream(model, case.batch, 20)
    x = torch.randn(20, case.batch, case.inputs, dtype=case.dtype)
    expected, state = [], None
    with torch.no_grad():
        for x_t in x:
            y, state = layer.step(x_t, state)
            expected.append(y)
    found = stream.run(x, step=True)
    assert torch.equal(found, torch.stack(expected))
    assert torch.equal(stream.state("h"), state[0]) and torch.equal(stream.state("c"), state[1])
    torch.testing.assert_close(whole.run(x), found)


def test_states_are_read_written_and_reset(tmp_path: Path) -> None:
    case = CASES["both"]
    layer = frozen_of(case)
    stream = Stream(Model(saved(layer, tmp_path)), case.batch, 5)
    h, c = stream.state("h"), stream.state("c")
    assert not h.any() and not c.any()
    x = torch.randn(5, case.batch, case.inputs)
    first = stream.run(x)
    assert h.abs().min() > 0 and c.abs().min() > 0
    given = torch.randn_like(h), torch.randn_like(c)
    h.copy_(given[0])
    c.copy_(given[1])
    with torch.no_grad():
        assert torch.equal(stream.run(x), layer(x, given)[0])
    stream.reset()
    assert not h.any() and not c.any()
    assert torch.equal(stream.run(x), first)


def test_a_description(tmp_path: Path) -> None:
    case = Case({"bidirectional": True, "proj_size": 5, "num_layers": 3}, weights=torch.int8)
    found = Model(saved(frozen_of(case), tmp_path)).description
    names = ("input_size", "hidden_size", "output_size", "num_layers", "directions", "dtype", "weights")
    assert [getattr(found, name) for name in names] == [24, 48, 5, 3, 2, 0, 2]
    assert found.capability.decode() == capability()
    assert Model(saved(frozen_of(CASES["float64"]), tmp_path)).description.dtype == 1


def test_two_streams_of_one_model_in_two_threads(tmp_path: Path) -> None:
    case = CASES["deep"]
    layer = frozen_of(case)
    model = Model(saved(layer, tmp_path))
    inputs = [torch.randn(40, case.batch, case.inputs) for _ in range(2)]
    found: list[list[Tensor]] = [[], []]

    def work(number: int) -> None:
        stream = Stream(model, case.batch, 40)
        for _ in range(20):
            stream.reset()
            found[number].append(stream.run(inputs[number]))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with torch.no_grad():
        for x, results in zip(inputs, found, strict=True):
            assert len(results) == 20 and all(torch.equal(y, layer(x)[0]) for y in results)


# ---- errors


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return Model(saved(frozen_of(CASES["plain"]), tmp_path))


def test_bad_setups(model: Model) -> None:
    for setup, said in {
        (0, 1, 1): "setup: expected batch to be 1 to 1048576, got 0",
        (1, -1, 1): "setup: expected max_steps to be 1 to 1048576, got -1",
        (1, 1, 1025): "setup: expected threads to be 1 to 256, got 1025",
        (1 << 20, 1 << 20, 1): "setup: batch 1048576 and max_steps 1048576 are too large for this model",
    }.items():
        with pytest.raises(LibraryError) as error:
            Stream(model, *setup)
        assert str(error.value) == said


def test_bad_calls(model: Model, tmp_path: Path) -> None:
    stream = Stream(model, 2, 4)
    x = torch.randn(8, 2, 24)
    place, output = ctypes.c_void_p(x.data_ptr()), torch.empty(8, 2, 48)
    y = ctypes.c_void_p(output.data_ptr())
    for name, arguments, said in (
        ("run", (stream.pointer, place, ctypes.c_int64(5), y), "steps: expected 1 to 4, got 5"),
        ("run", (stream.pointer, place, ctypes.c_int64(0), y), "steps: expected 1 to 4, got 0"),
        ("run", (None, place, ctypes.c_int64(1), y), "stream: expected one, got NULL"),
        ("step", (stream.pointer, None, y), "x: expected an array, got NULL"),
        ("step", (stream.pointer, place, None), "y: expected an array, got NULL"),
        ("step_part", (stream.pointer, place, y, ctypes.c_int64(1)), "worker: expected 0 to 0, got 1"),
        ("stream_reset", (None,), "stream: expected one, got NULL"),
    ):
        with pytest.raises(LibraryError) as error:
            call(name, *arguments)
        assert str(error.value) == said
    alone = Stream(model, 2, 4, threads=2)
    with pytest.raises(
        LibraryError, match="of 1 thread, got one of 2, each of which calls lstm_ext_step_part"
    ):
        call("step", alone.pointer, place, y)
    both_ways = Stream(Model(saved(frozen_of(CASES["both"]), tmp_path)))
    with pytest.raises(LibraryError, match="a model of two directions has no single steps"):
        call("step", both_ways.pointer, place, y)


@pytest.mark.parametrize("name", ["plain", "both", "float64"])
def test_x_and_y_touch_but_do_not_overlap(name: str, tmp_path: Path) -> None:
    model = Model(saved(frozen_of(CASES[name]), tmp_path))
    stream, is_ = Stream(model, 2, 4), model.description
    width = 8 if is_.dtype else 4
    inputs = 4 * 2 * is_.input_size * width
    outputs = 4 * 2 * is_.directions * is_.output_size * width
    memory = Aligned(inputs + outputs)
    for x, y in ((0, inputs), (outputs, 0)):
        place_x, place_y = memory.address + x, memory.address + y
        call("run", stream.pointer, ctypes.c_void_p(place_x), ctypes.c_int64(4), ctypes.c_void_p(place_y))
        nearer = place_y - 1 if y > x else place_y + 1
        with pytest.raises(LibraryError, match="x and y: expected arrays that do not overlap, got 0x"):
            call("run", stream.pointer, ctypes.c_void_p(place_x), ctypes.c_int64(4), ctypes.c_void_p(nearer))


@pytest.mark.parametrize("kind", ["model", "stream"])
def test_little_memory(kind: str, tmp_path: Path) -> None:
    content = saved(frozen_of(CASES["int8"]), tmp_path).read_bytes()
    model, needed, setup, given = Model(content), ctypes.c_size_t(), Setup(2, 3, 2), copied(content)
    of = {
        "model": (ctypes.c_void_p(given.address), ctypes.c_size_t(len(content))),
        "stream": (model.pointer, ctypes.byref(setup)),
    }[kind]
    call(f"{kind}_size", *of, ctypes.byref(needed))
    pointer, memory = ctypes.c_void_p(), Aligned(needed.value)
    for address, size, got in (
        (memory.address, needed.value - 1, needed.value - 1),
        (None, needed.value, 0),
    ):
        place = ctypes.c_void_p(address), ctypes.c_size_t(size)
        with pytest.raises(LibraryError, match=f"memory: expected {needed.value} bytes, got {got}$"):
            call(f"{kind}_create_in", *of, *place, ctypes.byref(pointer))
    assert pointer.value is None


def test_all_is_within_the_memory(tmp_path: Path) -> None:
    """What lies behind the memory of a model and of a stream stays as it is, whatever runs."""
    case = CASES["int8"]
    content = saved(frozen_of(case), tmp_path).read_bytes()
    model = Model(content, in_place=True)
    stream = Stream(model, 7, 30, 2, in_place=True)
    for length in (30, 1, 17):
        stream.run(torch.randn(length, 7, case.inputs))
    for memory in (model.memory, stream.memory):
        assert len(memory.behind()) >= 64 and not memory.behind().strip(b"\0")


def test_instruction_sets() -> None:
    before = capability()
    with pytest.raises(LibraryError) as error:
        call("set_capability", b"sse9")
    expected = "'amx', 'avx512_bf16', 'avx512' or 'avx2'"
    assert str(error.value) == f"name: expected {expected}, got 'sse9'"
    left_out = {"avx512", "avx2"} - set(sets().split(","))
    for name in left_out:
        with pytest.raises(LibraryError, match=f"name: this build has no kernels for '{name}'"):
            call("set_capability", name.encode())
    if "avx512" in sets() and "amx" not in loader.extension().cpu_capabilities():
        with pytest.raises(LibraryError, match="name: this CPU does not run 'amx'; the best it runs is"):
            call("set_capability", b"amx")
    assert capability() == before


def test_versions() -> None:
    assert library().lstm_ext_abi_version() == 1
