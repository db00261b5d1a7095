"""The CUDA layer as a Python module: the project's host code and kernels, on the emulator. As a program it is the layer
of one mode, in a process of its own (`in_mode`)."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))

import internals
from build import HERE, ROOT, Sources, compile_module, compiler, flags_of, load_module
from cases import CASES, Case, Layer, with_strides
from judge import relative_error

CHUNK_BYTES = 1 << 25
NAME = "lstm_ext_stepwise_emulated"
FAMILIES = ("stepwise", "step", "persistent")
TYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32, "f64": torch.float64}


def module_path(
    mode: str = "plain", types: Sequence[str] = tuple(TYPES), folders: Sequence[Path] = ()
) -> Path:
    """`folders` have headers of kernels that stand for those of csrc/."""
    csrc = ROOT / "csrc" / "cuda"
    paths = [csrc / f"{family}_{type}.cu" for family in FAMILIES for type in types]
    kernels = Sources([path for path in paths if path.exists()], flags_of(mode), folders)
    host = Sources([HERE / "stepwise_module.cpp", HERE / "stepwise_host.cpp"], [])
    return compile_module(NAME, host, [kernels], mode)


@functools.cache
def stepwise_module() -> ModuleType:
    """It has `LayerOptions`, `lstm_layer_forward` and `lstm_layer_backward` of `_C`."""
    return load_module(NAME, module_path())


@contextlib.contextmanager
def emulated_device(
    tf32: bool = False, chunk_bytes: int = CHUNK_BYTES, kernel: str = "stepwise", **more: Any
) -> Iterator[ModuleType]:
    """The module, on a device whose products may round to TF32, with chunks of so many bytes, and this kernel."""
    module = stepwise_module()
    module.set_device(tf32, chunk_bytes, kernel, **more)
    try:
        yield module
    finally:
        module.set_device(False, CHUNK_BYTES, "stepwise")


def same(a: Tensor, b: Tensor) -> bool:
    """The same numbers, and NaNs in the same places: their bits are a matter of the compiler."""
    numbers = torch.equal(a.nan_to_num(nan=0, posinf=torch.inf), b.nan_to_num(nan=0, posinf=torch.inf))
    return numbers and torch.equal(a.isnan(), b.isnan())


def call_of(layer: Layer, dtype: torch.dtype) -> tuple[Any, ...]:
    """What the module's functions take of a dense layer with biases."""
    learned = [t if t is None else t.to(dtype) for t in layer.learned()]
    options = layer.options(dtype, learned) or internals.LayerOptions()
    options = stepwise_module().LayerOptions(**options.as_keywords())
    tensors = [t.to(dtype) for t in (layer.input, layer.h0, layer.c0)]
    return (*tensors, [w.to(dtype) for w in layer.weights], None, True, layer.case.bidirectional, options)


def emulated(
    layer: Layer, dtype: torch.dtype, tf32: bool = False, kernel: str = "stepwise", **device: Any
) -> dict[str, Tensor]:
    """Results and gradients of the emulated layer."""
    case = layer.case

    def stored(t: Tensor | None) -> Tensor | None:
        return t if t is None else with_strides(t, "dense").to(dtype)

    input = layer.input.to(dtype)  # keeps the strides of dense tensors
    if case.strides != "dense":
        input = with_strides(input.contiguous(), case.strides)
    grads = [stored(g) for g in layer.grads] + [None] * (5 - len(layer.grads))
    if grads[0] is not None and case.strides != "dense":
        grads[0] = with_strides(grads[0].contiguous(), case.strides)
    learned = [stored(t) for t in layer.learned()]
    if "float32" in (case.norm, case.peephole) and dtype != torch.float64:
        learned[2:] = [t.float() for t in (*layer.norm, *layer.peephole)]
    weights = [w.to(dtype) for w in layer.weights]
    options = layer.options(dtype, learned) or internals.LayerOptions()
    options = stepwise_module().LayerOptions(**options.as_keywords())
    call = (input, stored(layer.h0), stored(layer.c0), weights, layer.batch_sizes)
    call = (*call, case.bias, case.bidirectional, options)
    needs_grad = layer.needs_grad + [False] * (0 if learned else 2)
    with emulated_device(tf32, case.chunk_bytes, kernel, **device) as module:
        *results, saved = module.lstm_layer_forward(*call, True)
        *inferred, nothing = module.lstm_layer_forward(*call, False)
        assert nothing is None
        results, inferred = ([t for t in ts if t is not None] for ts in (results, inferred))
        for a, b in zip(results, inferred, strict=True):
            assert same(a, b), "inference and training differ"
        assert case.recompute or saved[0].dtype == dtype
        before = [t if t is None else t.clone() for t in saved]
        computed = module.lstm_layer_backward(*call, *grads, results[0], saved, needs_grad)
    assert all(t is None or same(t, b) for t, b in zip(saved, before, strict=True)), (
        "saved tensors were changed"
    )
    assert [g is not None for g in computed] == needs_grad
    assert {g.dtype for g in computed[: 3 + len(weights)] if g is not None} <= {dtype}
    for t, g in zip(learned[2:], computed[5 + len(weights) :], strict=True):
        assert g is None or g.dtype == t.dtype
    values = [*results, *[g.to(dtype) for g in computed if g is not None]]
    return dict(zip(layer.names(), values, strict=True))


# ---- the cases of each kernel


# Of the kernels that do a step at once. Their tiles have 16 units, 16 or 64 rows, 256 or 128 bytes of a state, 64
# columns of U; and rows that do not begin at multiples of 16 bytes are copied.
STEP_CASES = {
    name: case
    for name, case in CASES.items()
    if not case.proj_size and not case.norm and not case.has_cell_options()
} | {
    "one step, rows that begin anywhere": Case(steps=1, batch=4, hidden_size=33, input_size=7),
    "one step, no hx": Case(steps=1, batch=20, hidden_size=16, input_size=8, hx=False, bidirectional=True),
    "one step, packed": Case(packed=(1, 1, 1), hidden_size=24, input_size=16, bidirectional=True),
    "one step, all": Case(steps=1, mask=True, zoneout="flags", lengths=(1, 0, 1), returned="both"),
    "one step, resets": Case(steps=1, resets="to a state"),
    "one step, resets to zeros, rows that begin anywhere": Case(
        steps=1, batch=5, hidden_size=19, resets="to zeros"
    ),
    "one step, resets, no hx, mask": Case(
        steps=1, hx=False, resets="to a state", mask=True, bidirectional=True
    ),
    "several tiles of everything": Case(steps=3, batch=17, hidden_size=72, input_size=16),
    "many rows, packed": Case(
        packed=(3,) * 40 + (2,) * 30 + (1,) * 10, hidden_size=40, input_size=8, bidirectional=True
    ),
    "a long state": Case(steps=3, batch=2, hidden_size=600, input_size=8),
    "both directions, rows that begin anywhere, mask": Case(
        steps=4, batch=5, hidden_size=19, bidirectional=True, mask=True, resets="to a state", zoneout="shares"
    ),
}
# Of a persistent kernel whose blocks have several turns in a step, of two tiles of rows or of one. A thread has several
# pieces from H 257 on, and from H 33 in the backward pass of float32.
TURN_CASES = {
    "turns": Case(steps=4, batch=37, hidden_size=40),
    "turns, many pieces": Case(steps=2, batch=17, hidden_size=264, input_size=8),
    "turns, packed": Case(
        packed=(3,) * 20 + (2,) * 9 + (1,) * 9, hidden_size=20, bidirectional=True, mask=True,
        zoneout="flags", resets="to a state",
    ),
    "turns of one tile": Case(steps=2, batch=17, hidden_size=520, input_size=8),
}  # fmt: skip
BIG = ("several tiles of everything", "many rows, packed", "a long state", *TURN_CASES)


# Of the kernel that does all steps of a chunk. Its tiles have 8 rows and 8 or 16 units, and its pieces 8 or 4 numbers.
CHUNK_CASES = {name: case for name, case in STEP_CASES.items() if max(case.packed or (case.steps,)) > 1} | {
    "packed, more steps than a table": Case(
        packed=(300, 257, 1), hidden_size=2, input_size=1, bidirectional=True
    ),
}
# Of dependent launches: rows of the weights begin at multiples of 16 bytes, and so are read as they are.
DEPENDENT_CASES = {
    "dependent": Case(steps=4, batch=3, hidden_size=24, input_size=8, bidirectional=True),
    # Of rows that are copied, which the first launch may not read early: it is no dependent one.
    "dependent, one step": Case(steps=1, batch=3, hidden_size=20, input_size=5, bidirectional=True),
    "dependent, packed, resets": Case(
        packed=(4, 4, 2), hidden_size=40, input_size=8, resets="to a state", bidirectional=True
    ),
    "dependent, many rows": Case(
        steps=3, batch=20, hidden_size=16, input_size=16, mask=True, zoneout="shares"
    ),
}
# In a row of the states and in one of the gradients.
NAN = "NaNs"
NAN_CASES = {
    NAN: Case(steps=6, batch=4, hidden_size=24, chunk_bytes=2000, resets="to zeros", reset_share=0.1)
}
# A piece that is not handed on: the first one of the second of three launches.
LOST = "a lost piece"
TWO_TILES = "two tiles at once"
LOST_CASES = {
    "forward": Case(steps=9, batch=9, hidden_size=24, bidirectional=True, zoneout="flags", chunk_bytes=2880),
    "backward": Case(steps=9, batch=9, hidden_size=24, zoneout="flags", chunk_bytes=1440),
    "backward, units that are no whole pieces": Case(steps=9, batch=9, hidden_size=20, chunk_bytes=1200),
    TWO_TILES: Case(steps=9, batch=9, hidden_size=24, bidirectional=True, zoneout="flags", chunk_bytes=2880),
}
LARGE_CASES = {
    "weights that have no room in registers": Case(steps=2, batch=1, hidden_size=1032, input_size=8)
}
CASES_OF = {
    "stepwise": CASES,
    "step": NAN_CASES | STEP_CASES,
    "persistent": NAN_CASES | CHUNK_CASES,
    "dependent": DEPENDENT_CASES,
    "large": LARGE_CASES,
    "turns": TURN_CASES,
    LOST: LOST_CASES,
}


# Of the emulated card, for cases that so have several tiles of rows in a group.
MULTIPROCESSORS = {
    "turns": 6,
    "turns, many pieces": 33,
    "turns, packed": 6,
    "turns of one tile": 65,
    TWO_TILES: 6,
}


def device_of(kernel: str, name: str) -> dict[str, Any]:
    """The arguments of `emulated` for a case of CASES_OF."""
    if kernel == "dependent":
        return {"kernel": "step", "dependent": True}
    if kernel in ("large", "turns", LOST):
        return {"kernel": "persistent", "multiprocessors": MULTIPROCESSORS.get(name, 0)}
    return {"kernel": kernel}


def layer_of(kernel: str, name: str, dtype: torch.dtype) -> Layer:
    layer = Layer(CASES_OF[kernel][name], dtype, 0)
    if name == NAN:
        layer.c0[:, 1, :8] = layer.grads[0][:, 2, :8] = float("nan")
    return layer


WAIT_LIMIT = 1 << 20


def with_a_lost_piece(name: str, dtype: torch.dtype, multiprocessors: int) -> str:
    """What is wrong with it. Nobody takes what the launch leaves for results, nor what those behind it leave, which do
    not wait."""
    case, backward = LOST_CASES[name], name.startswith("backward")
    layer, steps, H = Layer(case, dtype, 0), case.steps // 3, case.hidden_size
    call = call_of(layer, dtype)
    grads = [*(g.to(dtype) for g in layer.grads), None, None]
    needs_grad = [True] * (3 + len(layer.weights)) + [False] * 2
    with emulated_device(
        dtype == torch.float32,
        case.chunk_bytes,
        "persistent",
        wait_limit=WAIT_LIMIT,
        multiprocessors=multiprocessors,
    ) as module:
        *results, saved = module.lstm_layer_forward(*call, True)

        def compute() -> list[Tensor]:
            if not backward:
                return module.lstm_layer_forward(*call, True)[:3]
            return module.lstm_layer_backward(*call, *grads, results[0], saved, needs_grad)[:-2]

        module.lose_piece(0)
        first, *_ = compute()
        before = module.waits()
        module.lose_piece(before["pieces"] // 3 + 1)  # read by the next step of the same launch
        found, *others = compute()
        waits = module.waits()
        module.lose_piece(0)
    assert not before["expired"], "a wait expired without a lost piece"
    if not waits["expired"]:
        return "nobody said so"
    if waits["polls"] >= 10000:
        return "the launch behind it waited"
    if "SIMT_SCHEDULE" not in os.environ and waits["clock"] - before["clock"] >= 16 * WAIT_LIMIT:
        return "a block was not counted"
    right = [slice(-steps, None)] if backward else [slice(steps), slice(-steps, None)]
    for n, times in enumerate(right[: 1 + case.bidirectional]):
        part = slice(None) if backward else slice(n * H, n * H + H)
        if not torch.equal(found[times, :, part], first[times, :, part]):
            return "the launch in front of it is spoiled"
        rest = found[: case.steps - steps] if times.start else found[steps:]
        if not rest[:, :, part].isnan().all():
            return "its results are not spoiled, or those of the launch behind it"
    return "" if all(t.isnan().all() for t in others) else "its final results are not spoiled"


# ---- a mode


def in_mode(module: Path, environments: Sequence[Mapping[str, str]], **job: Any) -> tuple[list[str], str]:
    """What is wrong with the layer in these environments, one after the other, until something is; and what the
    process has printed besides. See `run_job` for the rest of a job."""
    job = {"module": str(module), "environments": environments, **job}
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests", HERE)))
    variables = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    if "-asan-" in module.name:
        command = [compiler(), "-print-file-name=libasan.so"]
        library = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        variables |= {"LD_PRELOAD": library, "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps(job), capture_output=True, text=True, env={**os.environ, **variables}, timeout=900,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    problems = [line.removeprefix("wrong: ") for line in lines if line.startswith("wrong: ")]
    if done.returncode != 0 or "ended" not in lines:
        problems.append(f"exit code {done.returncode}: {done.stderr[-4000:]}")
    return problems, done.stdout


def difference(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> str:
    def is_right(f: Tensor, e: Tensor) -> bool:
        if tolerance == 0:
            return same(f, e)
        close = relative_error(f.nan_to_num(nan=0), e.nan_to_num(nan=0)) <= tolerance
        return close and torch.equal(f.isnan(), e.isnan())

    differing = [name for name, e in expected.items() if not is_right(found[name], e)]
    return ", ".join(differing) + " differ" if differing else ""


def run_job(
    module: str,
    environments: list[dict[str, str]],
    cases: list[tuple[str, str]],
    types: list[str],
    expected: str = "",
    save: str = "",
    tolerance: float = 0,
    library: str = "",
) -> None:
    """Computes the cases, of kernels by name, and compares what comes out with the file `expected`, or saves it. With
    a tolerance results may differ, by so many times the machine precision. `library` has kernels that stand for the
    module's own."""
    torch.set_num_threads(1)
    loaded = load_module(NAME, Path(module))
    stepwise_module.cache_clear()
    globals()["stepwise_module"] = lambda: loaded
    if library:
        import ctypes

        ctypes.CDLL(library)
    results = torch.load(expected) if expected else {}
    loaded.fence_tensors()
    for environment in environments:
        os.environ.update(environment)
        loaded.read_environment()
        for kernel, name in cases:
            for type in types:
                dtype = TYPES[type]
                if kernel != "stepwise" and dtype == torch.float64:
                    continue
                key, device = f"{kernel}, {name}, {type}", {**device_of(kernel, name), "tf32": type == "f32"}
                try:
                    if kernel == LOST:
                        wrong = with_a_lost_piece(name, dtype, device["multiprocessors"])
                    else:
                        found = emulated(layer_of(kernel, name, dtype), dtype, **device)
                        if save:
                            results[key] = found
                        wrong = difference(found, results[key], tolerance * torch.finfo(dtype).eps)
                except (RuntimeError, AssertionError) as error:
                    wrong = f"{error}"
                if wrong:
                    said = wrong.replace("\n", " | ")
                    print(f"wrong: {key} in {environment or 'no environment'}: {said}", flush=True)
                    print("ended", flush=True)
                    return
        for variable in environment:
            del os.environ[variable]
    if save:
        torch.save(results, save)
    print("ended", flush=True)


if __name__ == "__main__":
    run_job(**json.load(sys.stdin))
