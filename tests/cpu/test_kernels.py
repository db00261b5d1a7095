"""Every kernel of every instruction set against float64, around every edge of the tiles."""

from __future__ import annotations

import dataclasses
import os
import resource
import shutil
import subprocess
import sys
from typing import Any

import forks
import internals
import pytest
import torch
from cases import Case, check, layer, ours, problems
from judge import assert_as_accurate_as_torch
from torch import Tensor

import lstm_ext
from lstm_ext import reference
from lstm_ext.native import loader

_C = loader.extension()
CAPABILITIES = _C.cpu_capabilities() if _C else []
DTYPES = [torch.float32, torch.float64]


@pytest.fixture(params=[1, pytest.param(2, marks=pytest.mark.alone)])
def threads(request: pytest.FixtureRequest) -> int:
    torch.set_num_threads(request.param)
    return request.param


def sized(T: int, B: int, I: int, H: int, P: int, bidirectional: bool, bias: bool) -> Case:
    P = 0 if P >= H else P
    sizes = {"steps": T, "batch": B, "input_size": I, "hidden_size": H, "proj_size": P}
    return Case(**sizes, bidirectional=bidirectional, bias=bias, weights_first=True)


def plan_of(case: Case, dtype: torch.dtype, threads: int) -> dict[str, int]:
    return _C.cpu_plan(
        steps=case.steps, batch=case.batch, input_size=case.input_size, hidden_size=case.hidden_size,
        proj_size=case.proj_size, threads=threads, save=True, float64=dtype == torch.float64,
    )  # fmt: skip


def edges(lanes: int, tile_rows: int) -> dict[str, list[Case]]:
    """Sizes one below, at and above each boundary, one axis at a time, the others in the middle of a tile."""
    units = [1, lanes - 1, lanes, lanes + 1, 4 * lanes - 1, 4 * lanes, 4 * lanes + 1, 5 * lanes + 3]
    # The gates of the last units may share registers.
    units += [lanes + lanes // 4, lanes + lanes // 4 + 1, lanes + lanes // 2, lanes + lanes // 2 + 1]
    features = [1, lanes - 1, lanes, lanes + 1, 31, 37]
    rows = [1, 2, 3, tile_rows - 1, tile_rows, tile_rows + 1, 2 * tile_rows + 1]
    groups = {
        "hidden units": [(4, 9, 5, h, 0, False, True) for h in units if h > 0],
        "hidden units, row-major": [(3, 2, 5, h, 0, False, True) for h in units if h > 0],
        "hidden units, one row": [(t, 1, 5, h, 0, False, True) for t in (3, 33) for h in units if h > 0],
        "batch rows, row-major": [(2, b, 7, 4 * lanes - 1, 0, True, True) for b in (1, 3, 4, 5, 7)],
        "input features": [(5, 8, i, lanes + 2, 0, False, True) for i in features if i > 0],
        "input features, row-major": [(2, 3, i, lanes + 2, 0, False, True) for i in features if i > 0],
        "batch rows": [(12, b, 6, lanes + 2, 0, True, False) for b in rows if b > 0],
        "time steps": [(t, 5, 6, lanes + 2, 0, True, True) for t in (1, 2, 7, 61)],
        "projection": [
            (6, 7, 5, 2 * lanes + 3, p, True, True) for p in (1, lanes - 1, lanes, lanes + 1) if p
        ],
        "projection, row-major": [
            (2, 2, 5, lanes + 3, p, False, False) for p in (1, lanes - 1, lanes + 1) if p
        ],
    }
    return {name: [sized(*sizes) for sizes in group] for name, group in groups.items()}


GROUPS = list(edges(4, 3))


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
def test_tile_edges(capability, threads, dtype, group):
    plan = _C.cpu_plan(steps=1, batch=1, input_size=1, hidden_size=1, float64=dtype == torch.float64)
    wrong: list[str] = []
    for case in edges(plan["lanes"], plan["tile_rows"])[group]:
        wrong += problems(case, dtype, draws=3)
    assert not wrong, "\n".join(wrong)


# What a call of each size is for, and how the plan shows that it gets there.
PATHS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "row-major": ((3, 2, 20, 40, 0, False, True), {"pack": False}),
    "packed, few rows": ((50, 2, 20, 40, 0, False, True), {"pack": True}),
    "packed": ((10, 9, 20, 40, 0, False, True), {"pack": True}),
    "several forward chunks": (
        (150, 7, 5, 100, 0, True, True),
        {"forward_chunk_rows": range(2 * 7, 150 * 7)},
    ),
    "several backward chunks": (
        (150, 7, 5, 50, 0, True, True),
        {"backward_chunk_rows": range(2 * 7, 75 * 7)},
    ),
    "several backward chunks, projected": (
        (150, 7, 5, 50, 9, True, True),
        {"backward_chunk_rows": range(2 * 7, 75 * 7)},
    ),
    # Where the buffer of the chunk before must not be written.
    "a backward chunk a step": ((3, 530, 5, 70, 0, True, True), {"backward_chunk_rows": 530}),
    # Gradient products copy their left factor, too: see kFarBytes.
    "blocks of k": ((4, 13, 515, 590, 0, False, True), {"pack": True}),
    "in place in the backward pass": ((2, 3, 70, 70, 0, False, True), {"backward_pack": False}),
    "in place, projected": ((2, 3, 70, 70, 33, False, True), {"backward_pack": False}),
    "one step, packed as it is used": ((1, 40, 37, 70, 0, False, True), {"pack_as_used": True}),
    "one step, large weights": ((1, 3, 300, 330, 0, True, True), {"unit_groups": range(3, 14)}),
    "one step, large weights, projected": ((1, 2, 900, 330, 50, False, True), {"unit_groups": range(2, 30)}),
    "one step, projected": ((1, 70, 37, 70, 33, True, True), {"pack_as_used": True}),
}


def assert_planned(plan: dict[str, int], expected: dict[str, Any]) -> None:
    for name, value in expected.items():
        assert plan[name] in (value if isinstance(value, range) else [value]), (name, plan)


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
def test_paths(capability, threads, dtype, path):
    sizes, expected = PATHS[path]
    case = sized(*sizes)
    assert_planned(plan_of(case, dtype, threads), expected)
    small = case.steps * case.batch * case.hidden_size < 10_000
    check(case, dtype, draws=20 if small else 3)


def test_when_weights_are_packed(capability):
    """Large ones for more rows than small ones, since packed they push out what else the cache holds."""

    def packed(*sizes: int) -> tuple[bool, bool]:
        plan = plan_of(sized(*sizes, 0, False, True), torch.float32, 1)
        return plan["pack"], plan["backward_pack"]

    lanes = _C.cpu_plan(steps=1, batch=1, input_size=1, hidden_size=1)["lanes"]
    assert packed(8, 1, 32, 32) == packed(20, 1, 64, 64) == packed(32, 1, 100, 100) == (False, False)
    assert packed(9, 1, 32, 32) == packed(21, 1, 64, 64) == (True, False)
    assert packed(33, 1, 64, 64) == packed(33, 1, 100, 100) == (True, lanes < 16)
    assert packed(48, 1, 256, 256) == (lanes < 8, lanes < 16)
    assert packed(49, 1, 256, 256) == (True, lanes < 16)
    assert packed(65, 1, 256, 256) == (True, True)
    on_engine = _C.cpu_capability() == "amx"
    assert packed(3, 13, 256, 256) == (on_engine or lanes < 8, on_engine or lanes < 16)
    assert packed(1, 33, 256, 256)[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("scale", [5.0, 60.0])
def test_closed_and_open_gates(capability, scale, dtype):
    """Where a gate is next to 1, its slope is what is left of 1 - value."""
    check(Case(steps=14, batch=3, input_size=1, input_scale=scale, hidden_size=16), dtype)


def test_one_unit(capability):
    """A tensor of one number may have any error in a single draw: many draws as one."""
    case = Case(steps=2, batch=1, input_size=64, hidden_size=1, weights_first=True)
    check(case, torch.float32, draws=200, together=True)


# Two workers: as two teams, each with half of the batch; as one team whose members share the units; or a direction
# each, forward and, without the gradient of the input, backward.
ONE_AFTER_THE_OTHER = {"directions_at_once": False}
TEAMS = {"forward_batch_groups": 2, "backward_batch_groups": 2, **ONE_AFTER_THE_OTHER}
MEMBERS = {"forward_hidden_groups": 2, "backward_hidden_groups": 2, **ONE_AFTER_THE_OTHER}
AT_ONCE = {"directions_at_once": True, "backward_directions_at_once": True}
BOTH = sized(40, 1, 64, 64, 0, True, True)
WORKERS: dict[str, tuple[Case, dict[str, Any]]] = {
    "teams": (sized(40, 32, 30, 70, 0, True, True), TEAMS),
    "teams, projected": (sized(40, 32, 30, 70, 33, True, True), TEAMS),
    "members": (sized(30, 1, 200, 401, 0, True, True), MEMBERS),
    "members, projected": (sized(30, 1, 200, 401, 77, True, True), MEMBERS),
    "members, packed": (sized(30, 3, 200, 401, 0, True, True), MEMBERS),
    "directions": (BOTH, AT_ONCE),
    "directions, no gradient of the input": (dataclasses.replace(BOTH, frozen=(0,)), AT_ONCE),
    "directions, one trained": (dataclasses.replace(BOTH, frozen=(0, 7, 8, 9, 10)), AT_ONCE),
}


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
def test_two_workers(capability, dtype, workers):
    """What the workspace held before does not matter, and the number of workers changes no bit."""
    case, expected = WORKERS[workers]
    torch.set_num_threads(2)
    assert_planned(plan_of(case, dtype, 2), expected)
    check(case, dtype, draws=2)
    two = ours(case, dtype, 0)
    for _ in range(5):
        garbage = [torch.full((n,), 255, dtype=torch.uint8) for n in (10**4, 10**5, 10**6, 10**7)]
        del garbage
        again = ours(case, dtype, 0)
        assert all(torch.equal(two[name], again[name]) for name in two)
    torch.set_num_threads(1)
    one = ours(case, dtype, 0)
    assert not [name for name in two if not torch.equal(two[name], one[name])]


@pytest.mark.alone
def test_frozen_directions_at_once():
    frozen, x = lstm_ext.freeze(lstm_ext.LSTM(64, 64, bidirectional=True)), torch.randn(40, 1, 64)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(frozen(x)[0])
    assert torch.equal(*found)


def test_fewer_threads_than_planned():
    """Where the system refuses the second thread, one worker does all: it does not wait for the other."""
    # Against the reference, since torch's own layer gives nonsense under this limit.
    program = (
        "import torch, lstm_ext\n"
        "torch.set_num_threads(2)\n"
        "def check(x, hidden_size, both):\n"
        "    m = lstm_ext.LSTM(64, hidden_size, bidirectional=both)\n"
        "    weights = list(m.parameters())\n"
        "    y, _ = m(x); ours = torch.autograd.grad(y.sum(), weights)\n"
        "    r = lstm_ext.reference.lstm_layer(x, None, None, weights, None, True, both)[0]\n"
        "    torch.testing.assert_close(y, r)\n"
        "    ref = torch.autograd.grad(r.sum(), weights)\n"
        "    torch.testing.assert_close(ours, ref, rtol=1e-4, atol=1e-4)\n"
        "check(torch.randn(20, 8, 64), 256, False)\n"
        "check(torch.randn(40, 1, 64), 64, True)  # of two directions at the same time\n"
    )
    environment = os.environ | {"OMP_THREAD_LIMIT": "1"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)


on_each_device = pytest.mark.devices("cpu", "cuda")

# One below, at and above each boundary of the CUDA kernels, one axis at a time. A block is up to 128 units wide and 256
# threads in all; sums of columns are cut into parts of 512 rows.
ON_CUDA = {
    "hidden units": [
        (4, 9, 5, h, 0, False, True) for h in (1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 257)
    ],
    "input features": [(5, 8, i, 34, 0, False, True) for i in (1, 2, 3, 7, 8, 9, 31, 32, 33)],
    "batch rows": [(12, b, 6, 34, 0, True, False) for b in (1, 2, 3, 4, 5, 7, 8, 9, 65)],
    "time steps": [(t, 5, 6, 34, 0, True, True) for t in (1, 2, 7, 61)],
    "rows of all steps": [(t, 64, 3, 18, 0, False, True) for t in (7, 8, 9, 17)],
    "projection": [(6, 7, 5, 67, p, True, True) for p in (1, 31, 32, 33)],
}


@pytest.mark.devices("cuda")
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("group", ON_CUDA)
def test_edges_on_cuda(group, dtype, device):
    def computed(case: Case, dtype: torch.dtype, seed: int) -> dict[str, torch.Tensor]:
        return {name: t.cpu() for name, t in ours(case, dtype, seed, device).items()}

    wrong = [
        text for sizes in ON_CUDA[group] for text in problems(sized(*sizes), dtype, draws=3, ours=computed)
    ]
    assert not wrong, "\n".join(wrong)


@on_each_device
@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16, torch.float16], ids=str)
def test_training_and_inference_agree_to_the_bit(capability, threads, dtype, device):
    for sizes in [(3, 2, 5, 20, 0, True, True), (20, 9, 5, 20, 0, True, True), (20, 9, 5, 20, 3, True, True)]:
        _, arguments = layer(sized(*sizes), dtype, 0).arguments(dtype, device)
        training = internals.lstm_layer(*arguments)
        with torch.no_grad():
            inference = internals.lstm_layer(*arguments)
        for a, b in zip(training, inference, strict=True):
            assert a.requires_grad and torch.equal(a, b)


@on_each_device
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
def test_nonlinearities_over_their_whole_range(capability, dtype):
    """With one weight that is not zero, one gate is a function of one number: sweep it."""
    x = torch.cat(
        [torch.linspace(-120, 120, 1997), torch.logspace(-30, 2, 400), -torch.logspace(-30, 2, 400)]
    ).to(dtype)
    for gate in range(4):
        w_ih = torch.zeros(4, 1, dtype=dtype)
        w_ih[gate] = 1
        bias = torch.tensor([40.0, 40.0, 40.0, 40.0], dtype=dtype)  # the other gates: 1
        bias[gate] = 0
        c0 = torch.full((1, len(x), 1), 0.5 if gate == 1 else 0.0, dtype=dtype)  # else c could cancel
        weights = [w_ih, torch.zeros(4, 1, dtype=dtype), bias, torch.zeros_like(bias)]
        out = internals.lstm_layer(x.view(1, -1, 1), None, c0, weights, None, True, False)
        ref = reference.lstm_layer(
            x.double().view(1, -1, 1), None, c0.double(), [w.double() for w in weights], None, True, False
        )
        for value, exact in zip(out, ref, strict=True):
            # A gate that is closed further than the smallest normal number may be any number of about that size.
            floor = 0.0 if gate == 2 else 4 * torch.finfo(dtype).tiny
            allowed = 8 * torch.finfo(dtype).eps * exact.abs() + floor
            worst = ((value.double() - exact).abs() - allowed).argmax()
            assert ((value.double() - exact).abs() <= allowed).all(), (gate, x[worst], value.view(-1)[worst])


@on_each_device
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
def test_infinities_and_nan_follow_the_equations(capability, dtype):
    inf, nan = float("inf"), float("nan")
    for value in (inf, -inf, nan, 1e30, -1e30):
        for batch in (1, 9):  # row-major and packed
            x = torch.zeros(5, batch, 3, dtype=dtype)
            x[2, 0, 1] = value
            weights = [torch.randn(4 * 5, 3, dtype=dtype), torch.randn(4 * 5, 5, dtype=dtype)]
            if batch == 9:
                x = x.repeat(3, 1, 1)
            out = internals.lstm_layer(x, None, None, weights, None, False, False)
            ref = reference.lstm_layer(
                x.double(), None, None, [w.double() for w in weights], None, False, False
            )
            for result, exact in zip(out, ref, strict=True):
                torch.testing.assert_close(result, exact.to(dtype), equal_nan=True)
            if batch > 1:  # rows do not touch each other
                assert torch.isfinite(out[0][:, 1:]).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize(
    "options", [{}, {"cell_clip": 1e38}, {"cell_activation": ("tanh", ("scaled_tanh", 0.8, 1.3))}], ids=str
)
def test_gradients_of_large_states(capability, options, dtype):
    """The slope of tanh at a large c_t is 0, whatever multiplies it."""
    weights = [0.2 * torch.randn(4 * 20, *n) for n in ((5,), (20,), (), ())]
    for size in (0, 1, 10, 20, 1e3, 1e6, 1e20, 1e30):
        tensors = [torch.randn(3, 4, 5), *torch.randn(2, 1, 4, 20), *weights]
        tensors[2][..., ::2] *= size

        def gradients(lstm, dtype, tensors=tensors):
            x, h0, c0, *weights = leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
            output, _ = lstm(x, (h0, c0), weights, **options)
            names = ("x", "h0", "c0", "w_ih", "w_hh", "b_ih", "b_hh")
            return dict(zip(names, torch.autograd.grad(output.sin().sum(), leaves), strict=True))

        ours, equations = gradients(lstm_ext.functional.lstm, dtype), gradients(reference.lstm, dtype)
        assert_as_accurate_as_torch(ours, equations, gradients(reference.lstm, torch.float64))


def test_backward_leaves_what_was_saved(capability):
    """Two backward passes give the same gradients."""
    leaves, arguments = layer(sized(30, 9, 5, 20, 3, True, True), torch.float32, 0).arguments(torch.float32)
    output, *_ = internals.lstm_layer(*arguments)
    g = torch.randn_like(output)
    first = torch.autograd.grad(output, leaves, g, retain_graph=True)
    second = torch.autograd.grad(output, leaves, g)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@on_each_device
@pytest.mark.parametrize("resets", ["", "to a state"])
def test_every_subset_of_gradients(resets, device):
    """A gradient is the same whatever else is requested, and nothing else is computed."""
    case = dataclasses.replace(sized(6, 7, 5, 20, 3, True, True), resets=resets)
    leaves, arguments = layer(case, torch.float64, 0).arguments(torch.float64, device)
    options = _C.LayerOptions(**arguments[7].as_keywords()) if resets else None
    call = (*arguments[:7], options)
    with torch.no_grad():
        output, h_n, c_n, _, _, saved = _C.lstm_layer_forward(*call, True)
    grads = [torch.randn_like(t) for t in (output, h_n, c_n)]

    def backward(needs_grad: list[bool]) -> list[Tensor | None]:
        needs_grad = needs_grad if resets else [*needs_grad, False, False]
        with torch.no_grad():
            gradients = _C.lstm_layer_backward(*call, *grads, None, None, output, saved, needs_grad)
        assert [g is not None for g in gradients] == needs_grad
        return gradients[: len(leaves)]

    everything = backward([True] * len(leaves))
    for i in range(len(leaves)):
        for needs_grad in ([j == i for j in range(len(leaves))], [j != i for j in range(len(leaves))]):
            for some, one in zip(backward(needs_grad), everything, strict=True):
                assert some is None or torch.equal(some, one)


@pytest.mark.alone
@pytest.mark.parametrize(
    ("sizes", "inputs"),
    [
        # Autograd adds the gradients to others and frees them: 8 MB, which the system would clear anew in each call.
        ([512], [(1, 1, 512)]),
        # The small layer does not take the memory of the large one, 30 MB, nor frees it for its own.
        ([512, 64], [(16, 16, 512), (100, 16, 64)]),
    ],
    ids=["of one layer", "of layers of different sizes"],
)
def test_calls_take_no_new_memory(sizes, inputs):
    layers = [lstm_ext.LSTM(n, n) for n in sizes]
    tensors = [torch.randn(shape) for shape in inputs]

    def faults(calls: int) -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(calls):
            for module, x in zip(layers, tensors, strict=True):
                module(x)[0].sum().backward()
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults(5)
    assert faults(20) < 20 * 100  # 500 to 1,400 a call from the C library


def test_memory_that_the_system_does_not_have():
    """The text is that of torch's allocator, which programs that try batch sizes look for."""
    module = lstm_ext.LSTM(1, 16, dtype=torch.bfloat16)
    x = torch.zeros(1, 1, 1, dtype=torch.bfloat16).expand(1 << 44, 1, 1)
    text = f"DefaultCPUAllocator: can't allocate memory: you tried to allocate {(1 << 44) * 16 * 4} bytes"
    with torch.no_grad(), pytest.raises(RuntimeError, match=text):
        module(x)


def test_sigmoid_and_tanh_to_three_units_in_the_last_place(capability):
    """Of small results too: c_1 is the sigmoid of the input, or its tanh."""
    units = 32
    x = torch.cat((torch.logspace(-6, 1, 16000), torch.linspace(0, 10, 16000))).reshape(-1, units)
    module = lstm_ext.LSTM(units, units)
    for gate, function in ((0, torch.sigmoid), (2, torch.tanh)):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.zero_()
            module.weight_ih_l0.view(4, units, units)[gate] = torch.eye(units)
            module.bias_ih_l0.view(4, units)[2 - gate] = 100  # the other factor of c_1 is 1
            for values in (x, -x):
                _, (_, c) = module(values[None])
                exact = function(values.double())
                assert ((c[0].double() - exact).abs() <= 6 * 2.0**-24 * exact.abs()).all()


@pytest.mark.slow
def test_capability_by_name_and_variables():
    with pytest.raises(ValueError, match="expected 'amx', 'avx512_bf16', 'avx512' or 'avx2', got 'sse9'"):
        _C.set_cpu_capability("sse9")
    before = _C.cpu_capability()
    for name in CAPABILITIES:
        _C.set_cpu_capability(name)
        assert _C.cpu_capability() == name
    _C.set_cpu_capability(before)
    names = {CAPABILITIES[0], CAPABILITIES[-1]}
    environments = [{"LSTM_EXT_CPU_CAPABILITY": name} for name in names]
    environments += [{"LSTM_EXT_CPU_VNNI": value} for value in ("", "1", "0")]
    environments += [{"LSTM_EXT_CPU_WAIT_LIMIT": value} for value in ("", "0.5")]
    code = "from lstm_ext.native import loader; print(loader.extension().cpu_capability())"
    runs = forks.run(code, *environments)
    assert [run.returncode for run in runs] == [0] * len(environments)
    assert [run.stdout.strip() for run in runs[: len(names)]] == [*names]


@pytest.mark.tools
def test_no_newer_instructions_outside_the_sets():
    """The code that finds out what a processor has must run on every x86-64 CPU."""
    if shutil.which("objdump") is None:
        pytest.skip("objdump is not installed")
    listing = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", "-C", loader.status().ops_path],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    sets = ("avx512", "avx2")
    function, offenders, sets_with_wide_code = "", set(), set()
    for line in listing.splitlines():
        if line.endswith(">:"):
            function = line
        elif "%ymm" in line or "%zmm" in line:
            sets_with_wide_code.add(function.split("lstm_ext::cpu::")[-1].split("::")[0])
            # objdump cannot read the names of some lambdas, and shows them as the compiler wrote them.
            if not any(f"{name}::" in function or f"3cpu{len(name)}{name}" in function for name in sets):
                offenders.add(function)
    assert set(sets) <= sets_with_wide_code  # else the names have changed and this tests nothing
    assert not offenders, offenders
