"""Several threads at once: what they share stays whole, and each gets the numbers that it gets alone.

Under a Python without the GIL (`make free-threaded`) threads really meet; under the others they take turns.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lstm_ext
from lstm_ext.call import cuda_choice
from lstm_ext.native import config, loader, selftest_record

HAS_GIL = not sysconfig.get_config_var("Py_GIL_DISABLED")
THREADS = 4
# Without the GIL, so many that calls which own nothing that they read from lists meet what was freed.
ROUNDS = 150 if HAS_GIL else 8000


def together(*works: Callable[[], object]) -> list[object]:
    """The results of functions that begin at the same time, each in a thread. Raises the first error."""
    start = threading.Barrier(len(works))
    results: list[object] = [None] * len(works)
    errors: list[BaseException] = []

    def run(i: int, work: Callable[[], object]) -> None:
        start.wait()
        try:
            results[i] = work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=item) for item in enumerate(works)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    if errors:
        raise errors[0]
    assert getattr(sys, "_is_gil_enabled", lambda: True)() == HAS_GIL  # no import has turned it on
    return results


def while_another(change: Callable[[int], object], call: Callable[[], object]) -> None:
    """Several threads call; another one changes what they read until they are done."""
    left = [object()] * (THREADS - 1)

    def calls() -> None:
        try:
            for _ in range(ROUNDS):
                call()
        finally:
            left.pop()

    def changes() -> None:
        i = 0
        while left:
            change(i)
            i += 1

    together(changes, *[calls] * (THREADS - 1))


def same(found: Tensor, *expected: Tensor) -> bool:
    return any(torch.equal(found, tensor) for tensor in expected)


@pytest.mark.parametrize("kind", ["layer", "step", "cell"])
@torch.no_grad()
def test_states_in_a_list_that_another_thread_replaces(kind: str) -> None:
    """Both states of a call are of the same pair: the kernels read the list once."""
    module = lstm_ext.LSTMCell(5, 6) if kind == "cell" else lstm_ext.LSTM(5, 6)
    x = torch.randn(*(2, 3, 5) if kind == "layer" else (3, 5))
    run = module.step if kind == "step" else module
    shape = (3, 6) if kind == "cell" else (1, 3, 6)

    def pair(i: int) -> list[Tensor]:
        return [torch.full(shape, 0.1 * i), torch.full(shape, 0.1 * i)]

    expected = [run(x, tuple(pair(i)))[0] for i in range(2)]
    hx = pair(0)

    def change(i: int) -> None:
        hx[:] = pair(i % 2)  # the tensors of before are freed

    def call() -> None:
        assert same(run(x, hx)[0], *expected)

    while_another(change, call)


@torch.no_grad()
def test_weights_in_lists_that_another_thread_changes() -> None:
    """The lists and the options that the module gets, which Python makes anew for each call of a layer."""
    module = lstm_ext.LSTM(5, 6, num_layers=2)
    kernels, x = loader.extension(), torch.randn(2, 3, 5)
    expected = module(x)[0]
    own = module._weights_by_layer()
    weights = [list(layer) for layer in own]
    options = [kernels.LayerOptions() for _ in own]

    def change(i: int) -> None:
        k = i % 2
        weights[k] = [w.clone() for w in own[k]]
        weights[1 - k][i % 4] = own[1 - k][i % 4].clone()
        options[k] = kernels.LayerOptions()
        if i % 8 == 0:
            weights.append(weights.pop())
            weights[k].clear()
            weights[k].extend(own[k])

    def call() -> None:
        try:
            results = kernels.lstm_module(x, None, weights, options, 0, 5, 6, 0, True, False)
        except RuntimeError as error:
            assert "expected" in str(error)  # a layer had no weights at that moment
        else:
            assert results is None or same(results[0], expected)  # None: there was one layer fewer

    while_another(change, call)
    assert same(kernels.lstm_module(x, None, own, None, 0, 5, 6, 0, True, False)[0], expected)


@pytest.mark.parametrize("assign", [False, True])
@torch.no_grad()
def test_weights_that_another_thread_loads(assign: bool) -> None:
    """Assigned parameters come whole. Numbers that are copied may come half; the shapes stay, and nothing crashes."""
    module = lstm_ext.LSTM(5, 6, bidirectional=True)
    x = torch.randn(4, 3, 5)
    states = [
        {n: torch.full_like(p, 0.1 * (i + 1)) for n, p in module.state_dict().items()} for i in range(2)
    ]
    for state in states:
        module.load_state_dict(state)

    def change(i: int) -> None:
        module.load_state_dict({n: p.clone() for n, p in states[i % 2].items()}, assign=assign)
        module.flatten_parameters()

    def call() -> None:
        output = module(x)[0]
        assert output.shape == (4, 3, 12) and bool(torch.isfinite(output).all())

    while_another(change, call)
    module.load_state_dict(states[0], assign=assign)
    again = lstm_ext.LSTM(5, 6, bidirectional=True)
    again.load_state_dict(states[0])
    assert same(module(x)[0], again(x)[0])


@torch.no_grad()
def test_a_layer_that_another_thread_moves() -> None:
    """A move to where it is already: `Module.to` assigns all parameters anew."""
    module, x = lstm_ext.LSTM(5, 6), torch.randn(4, 3, 5)
    expected = module(x)[0]
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        while_another(
            lambda _: module._apply(lambda t: t.clone()),
            lambda: pytest.fail("other numbers") if not same(module(x)[0], expected) else None,
        )
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)


def train(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    module = lstm_ext.LSTM(5, 6 + seed, num_layers=2, peephole=seed % 2 == 1, recompute=seed == 2)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    x, state = torch.randn(6, 3, 5, generator=generator), None
    for _ in range(8):
        output, state = module(x, state)
        state = tuple(s.detach() for s in state)
        output.square().mean().backward()
        with torch.no_grad():
            for p in module.parameters():
                p.sub_(p.grad, alpha=0.1)
                p.grad = None
    return [p.detach() for p in module.parameters()]


def test_training_in_several_threads_gives_the_same_bits() -> None:
    alone = [train(seed) for seed in range(THREADS)]
    found = together(*[lambda seed=seed: train(seed) for seed in range(THREADS)])
    for a, b in zip(alone, found, strict=True):
        assert all(same(p, q) for p, q in zip(a, b, strict=True))


@pytest.mark.parametrize("kind", [None, torch.int8])
@torch.no_grad()
def test_several_threads_freeze_one_model(kind: torch.dtype | None) -> None:
    class Mine(lstm_ext.LSTM):
        pass

    module, x = Mine(24, 80), torch.randn(4, 3, 24)
    expected = lstm_ext.freeze(module, kind)(x)[0]

    class Other(lstm_ext.LSTM):  # its frozen class is made by the threads
        pass

    other = Other(24, 80)
    other.load_state_dict(module.state_dict())
    frozen = together(*[lambda: [lstm_ext.freeze(other, kind) for _ in range(5)]] * THREADS)
    copies = [layer for layers in frozen for layer in layers]
    assert len({type(layer) for layer in copies}) == 1
    assert all(same(layer(x)[0], expected) for layer in copies)
    shared = copies[0]
    while_another(
        lambda _: shared.load_state_dict(module.state_dict()),
        lambda: pytest.fail("other numbers") if not same(shared(x)[0], expected) else None,
    )


@torch.no_grad()
def test_several_threads_convert_one_model() -> None:
    class Mine(nn.LSTM):
        pass

    for _ in range(10):
        model = nn.ModuleList([nn.LSTM(5, 6), Mine(5, 6), nn.LSTMCell(5, 6)])
        x = torch.randn(4, 3, 5)
        expected = [model[0](x)[0], model[1](x)[0]]
        together(*[lambda model=model: lstm_ext.convert(model)] * THREADS)
        assert [entry.ours for entry in lstm_ext.report(model)] == [True] * 3
        for layer, output in zip(model, expected, strict=False):
            torch.testing.assert_close(layer(x)[0], output)


def test_layers_that_threads_make_under_a_patch_are_ours_and_counted() -> None:
    def work() -> list[bool]:
        ours = []
        for _ in range(30):
            with lstm_ext.patch():
                ours.append(isinstance(nn.LSTM(2, 3, device="meta"), lstm_ext.LSTM))
        return ours

    with lstm_ext.patch() as handle:
        assert all(ours for found in together(*[work] * THREADS) for ours in found)
    assert handle.made == 30 * THREADS and not issubclass(nn.LSTM, lstm_ext.LSTM)


FIRST_USE = """
import sys, threading, torch
import lstm_ext
from lstm_ext.native import loader
found, errors, start = [], [], threading.Barrier(8)
def work(i):
    try:
        layer, x = lstm_ext.LSTM(5, 6, layer_norm=i % 2 == 1, dtype=torch.float64), torch.ones(3, 2, 5).double()
        start.wait()
        output, _ = layer(x)
        output.sum().backward()
        found.append((id(loader.extension()), layer.weight_ih_l0.grad.shape))
    except BaseException as error:
        errors.append(error)
threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
[t.start() for t in threads], [t.join() for t in threads]
assert not errors, errors
assert len(found) == 8 and len(set(found)) == 1, found
print(loader.status().backend, getattr(sys, "_is_gil_enabled", lambda: True)())
"""


def test_the_first_calls_of_several_threads() -> None:
    """They load the extension, since the import left it to them. It turns no GIL on where there is none."""
    program = FIRST_USE.replace(
        "import lstm_ext", "sys.orig_argv.append('lstm_ext.info'); import lstm_ext", 1
    )
    run = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True)
    assert (run.returncode, run.stdout.strip()) == (0, f"{loader.status().backend} {HAS_GIL}"), run.stderr


def test_a_record_that_several_threads_write_and_read(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is whole at each moment, and the choices that a process has read are complete."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    device = torch.device("cpu")
    choices = {
        f"H{n}": cuda_choice.asdict(cuda_choice.Choice(True, "step", {"torch": 1.0})) for n in range(40)
    }
    selftest_record.write(device, ["step"], [], choices)
    kernels = [f"kernel{i}" for i in range(THREADS)]

    def write(i: int) -> None:
        for _ in range(10):
            selftest_record.add(device, kernels[i], True)

    def read() -> list[int]:
        counts = []
        for _ in range(20):
            assert "step" in selftest_record.find(device)["passed"]
            cuda_choice._records.clear()
            counts.append(len(cuda_choice.recorded(device)))
        return counts

    monkeypatch.setattr(cuda_choice, "_records", {})
    found = together(*[lambda i=i: write(i) for i in range(THREADS)], read)
    assert found[-1] == [len(choices)] * 20
    assert not [path.name for path in (tmp_path / "lstm_ext").iterdir() if path.name != "selftest.json"]


def test_a_build_record_names_the_python_without_the_gil(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both Pythons of a version have the same number, and neither loads the other's module."""
    for disabled, end in ((1, "t"), (0, ""), (None, "")):
        monkeypatch.setattr(sysconfig, "get_config_var", {"Py_GIL_DISABLED": disabled}.get)
        assert config.python_version() == sys.version.split()[0].rstrip("+") + end


def test_nothing_is_left_behind() -> None:
    """Tensors that calls read from lists are freed: an owned reference too many would keep them."""
    module, hx = lstm_ext.LSTM(5, 6), [torch.zeros(1, 3, 6), torch.zeros(1, 3, 6)]
    with torch.no_grad():
        module(torch.randn(2, 3, 5), hx)
    before = [sys.getrefcount(state) for state in hx]
    with torch.no_grad():
        for _ in range(20):
            module(torch.randn(2, 3, 5), hx)
    assert [sys.getrefcount(state) for state in hx] == before
