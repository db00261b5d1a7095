"""call/cuda_choice.py: which way plain layers of CUDA tensors take, on a stand-in with made-up times."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import lstm_ext
from lstm_ext.call import cuda_choice
from lstm_ext.layer import cuda_kernels, route
from lstm_ext.native import loader, selftest_record

CPU = torch.device("cpu")
KEY = {name: name for name in selftest_record.KEY}
FAST = {"torch": 30.0, "stepwise": 27.0}
SLOW = {"torch": 1.0, "stepwise": 9.0}


class Card:
    """What `prefers_torch` sees of a GPU. `times` are what a measurement finds; it counts them in `measurements`."""

    def __init__(self) -> None:
        self.times: Any = FAST
        self.measurements = 0
        self.told: list[tuple[str, bool]] = []
        self.capturing = False

    def measure(self) -> cuda_choice.Times:
        self.measurements += 1
        return self.times() if callable(self.times) else self.times

    def set_cuda_measured(self, *, kernel: str, backward: bool, **_: Any) -> str:
        self.told.append((kernel, backward))
        return ""


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Card]:
    found = Card()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("LSTM_EXT_CUDA_KERNEL", raising=False)
    monkeypatch.setattr(selftest_record, "key_of", lambda device: KEY)
    monkeypatch.setattr(loader, "extension", lambda: found)
    monkeypatch.setattr(loader, "wants_equations", lambda: False)
    monkeypatch.setattr(cuda_kernels, "_forced", Counter())  # conftest.py forces the kernels
    monkeypatch.setattr(cuda_kernels, "deciding_anew", 0)
    monkeypatch.setattr(route, "has_operators", lambda device: True)
    monkeypatch.setattr(cuda_kernels, "has_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: found.capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(cuda_choice, "times_of", lambda *_: found.measure())
    forget(monkeypatch)
    yield found


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a new process does not know."""
    monkeypatch.setattr(cuda_choice, "_fixed", {})
    monkeypatch.setattr(cuda_choice, "_ways", {})
    monkeypatch.setattr(cuda_choice, "_records", {})
    monkeypatch.setattr(cuda_choice, "_spent", 0.0)


def layer(
    batch: int = 8,
    steps: int = 20,
    device: str = "cuda:0",
    layers: int = 1,
    dropout: float = 0.0,
    training: bool = True,
) -> tuple[Any, ...]:
    """The arguments of `prefers_torch` for H 32."""
    stack = cuda_choice.PlainStack(True, layers, dropout, training, False)
    weights = [[torch.empty(128, 5), torch.empty(128, 32)]] * layers
    sizes = (steps, batch, 5)
    return stack, weights, stand_in(sizes, device), None, None


def stand_in(sizes: tuple[int, ...], device: str = "cuda:0", dtype: torch.dtype = torch.bfloat16) -> Any:
    place = torch.device(device)
    return SimpleNamespace(
        device=place, get_device=lambda: place.index, dtype=dtype, shape=sizes, size=lambda i: sizes[i]
    )


def prefers_torch(**arguments: Any) -> bool:
    return cuda_choice.prefers_torch(*layer(**arguments))


@pytest.mark.parametrize(
    ("times", "ours", "kernel"),
    [
        (FAST, True, "stepwise"),
        ({"torch": 30.0, "stepwise": 28.0, "persistent": 27.0}, True, "persistent"),
        ({"torch": 30.0, "stepwise": 30.0}, False, "stepwise"),  # a tie
        ({"torch": 30.0, "stepwise": 29.1}, False, "stepwise"),  # a gain below 5 %
    ],
    ids=["faster", "two", "tie", "little"],
)
def test_the_fastest_wins_and_ties_are_torchs(
    card: Card, times: cuda_choice.Times, ours: bool, kernel: str
) -> None:
    """One kernel for both passes."""
    card.times = times
    assert prefers_torch() is not ours
    (choice,) = cuda_choice.recorded(CPU).values()
    assert (choice.ours, choice.kernel) == (ours, kernel)
    assert card.told == ([(kernel, False), (kernel, True)] if ours else [])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("times", [FAST, SLOW], ids=["ours", "torch"])
def test_a_decided_call_is_one_look_up(
    card: Card, monkeypatch: pytest.MonkeyPatch, times: cuda_choice.Times, dtype: torch.dtype
) -> None:
    card.times = times
    stack, weights, *_ = layer()
    calls: list[tuple[Callable[..., bool], Any]] = [
        (cuda_choice.prefers_torch, (stack, weights, stand_in((20, 8, 5), dtype=dtype), None, None)),
        (
            cuda_choice.prefers_torch,
            (stack, weights, stand_in((90, 5), dtype=dtype), torch.tensor([8] * 20), None),
        ),
        (cuda_choice.cell_prefers_torch, (stand_in((8, 5), dtype=dtype), weights[0], True)),
    ]
    for call, arguments in calls:
        assert call(*arguments) is (times is SLOW)
    monkeypatch.setattr(cuda_choice, "_decided", lambda *_: pytest.fail("it was decided again"))
    for call, arguments in calls:
        assert call(*arguments) is (times is SLOW)


@pytest.mark.parametrize(
    "changed",
    [{"layers": 2}, {"hidden": 16}, {"bidirectional": True}, {"dropout": 0.1}, {"training": False}],
    ids=lambda changed: next(iter(changed)),
)
def test_each_layer_is_looked_up_by_all_that_it_has(card: Card, changed: dict[str, Any]) -> None:
    for has in ({}, changed):
        layers, hidden = has.get("layers", 1), has.get("hidden", 32)
        of = (has.get("dropout", 0.0), has.get("training", True), has.get("bidirectional", False))
        weights = [[torch.empty(4 * hidden, 5), torch.empty(4 * hidden, hidden)]] * layers
        call = (cuda_choice.PlainStack(True, layers, *of), weights, stand_in((20, 8, 5)), None, None)
        assert not cuda_choice.prefers_torch(*call)
    assert len(cuda_choice._ways) == 2


@pytest.mark.parametrize("changed", ["tf32", "deterministic", "forced", "tune"])
def test_what_a_look_up_has_to_see(card: Card, monkeypatch: pytest.MonkeyPatch, changed: str) -> None:
    stack, weights, *_ = layer()
    call = (stack, weights, stand_in((20, 8, 5), dtype=torch.float32), None, None)
    decided: list[Any] = []
    of = cuda_choice._decided
    monkeypatch.setattr(cuda_choice, "_decided", lambda *a: (decided.append(a), of(*a))[1])
    cuda_choice.prefers_torch(*call)
    if changed == "tf32":
        precision = torch.backends.cudnn.rnn.fp32_precision
        torch.backends.cudnn.rnn.fp32_precision = "ieee" if precision == "tf32" else "tf32"
        try:
            cuda_choice.prefers_torch(*call)
        finally:
            torch.backends.cudnn.rnn.fp32_precision = precision
    elif changed == "deterministic":
        with deterministic():
            cuda_choice.prefers_torch(*call)
    elif changed == "forced":
        with cuda_kernels.forced("auto"):
            cuda_choice.prefers_torch(*call)
    else:
        monkeypatch.setattr(cuda_choice, "_why_not", lambda seen: "a test")
        lstm_ext.tune(Model(), 8)
        cuda_choice.prefers_torch(*call)
    count = len(decided)
    cuda_choice.prefers_torch(*call)
    assert count > 1 and len(decided) == count


def test_look_ups_have_a_limit(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_choice, "WAYS_LIMIT", 3)
    assert [prefers_torch(steps=steps) for steps in range(17, 30)] == [False] * 13
    assert len(cuda_choice._ways) <= 3 and card.measurements == 1


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def test_without_a_candidate_nothing_is_recorded(card: Card) -> None:
    """None of ours has been right, or each has failed."""
    card.times = {"torch": 30.0}
    assert prefers_torch() and prefers_torch() and card.measurements == 1
    assert cuda_choice.recorded(CPU) == {} and card.told == []


def test_once_a_process_and_once_a_record(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [prefers_torch(), prefers_torch(), prefers_torch(steps=17), prefers_torch(batch=5)] == [False] * 4
    assert card.measurements == 1  # all in one class of shapes
    forget(monkeypatch)
    card.times, told = SLOW, len(card.told)
    assert not prefers_torch() and card.measurements == 1
    assert len(card.told) == 2 * told  # each process has to be told
    assert prefers_torch(batch=9) and prefers_torch(training=False) and card.measurements == 3


def test_the_grad_mode_is_no_part_of_a_class(card: Card) -> None:
    """A checkpoint's first forward pass has no gradients, and its second one has."""
    with torch.no_grad():
        first = prefers_torch()
    card.times = SLOW
    assert prefers_torch() == first


class InBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, call: Callable[[], None]) -> torch.Tensor:
        ctx.call = call
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.call()
        return grad, None


def test_not_within_a_backward_pass(card: Card) -> None:
    """As with reentrant checkpointing: the thread that runs it would have to wait for itself."""
    found = []
    x = torch.ones(1, requires_grad=True)
    InBackward.apply(x, lambda: found.append(prefers_torch())).backward()
    assert found == [True] and card.measurements == 0
    assert prefers_torch() and card.measurements == 0  # a process does not change its mind
    assert not prefers_torch(batch=100) and card.measurements == 1


@pytest.mark.parametrize("where", ["capture", "distributed", "dispatch mode"])
def test_where_nothing_is_measured_the_record_decides(
    card: Card, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    mode: Any = contextlib.nullcontext()
    if where == "capture":
        card.capturing = True
    elif where == "distributed":
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    else:
        mode = FlopCounterMode(display=False)
    with mode:
        assert prefers_torch() and card.measurements == 0  # first seen here
        choice = cuda_choice.Choice(True, "step", {"torch": 3.0, "step": 1.0})
        selftest_record.add_measured(CPU, class_of_layer().key, cuda_choice.asdict(choice))
        assert prefers_torch()  # a process reads the record once
        forget(monkeypatch)
        assert not prefers_torch() and card.told == [("step", False), ("step", True)]
    assert card.measurements == 0


@pytest.mark.parametrize("where", ["capture", "dispatch mode", "not tried"])
def test_a_process_does_not_change_its_mind(card: Card, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """What its first call of a class did, its later ones do, although they could measure."""
    with contextlib.ExitStack() as first:
        if where == "capture":
            card.capturing = True
        elif where == "dispatch mode":
            first.enter_context(FlopCounterMode(display=False))
        else:
            patch = first.enter_context(pytest.MonkeyPatch.context())
            patch.setattr(route, "has_operators", lambda device: False)
            patch.setattr(cuda_kernels, "problem", lambda index: None)
        assert prefers_torch() is (where != "not tried")  # without operators, torch's computes in any case
    card.capturing = False
    assert prefers_torch() and prefers_torch(steps=19) and card.measurements == 0
    assert not prefers_torch(batch=100) and card.measurements == 1


def test_a_call_that_cannot_wait_for_a_measurement_decides(card: Card) -> None:
    """Another thread, which captures a graph, say, has given its call to torch's operator meanwhile."""

    def measure() -> cuda_choice.Times:
        cuda_choice._fixed[torch.device("cuda:0").index, class_of_layer()] = None
        return FAST

    card.times = measure
    assert prefers_torch() and card.measurements == 1 and card.told == []


@pytest.mark.parametrize("what", ["deterministic", "LSTM_EXT_CUDA_KERNEL=torch"])
def test_a_setting_ignores_what_was_measured(card: Card, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    assert not prefers_torch()
    forget(monkeypatch)
    if what == "deterministic":
        with deterministic():
            assert prefers_torch() and prefers_torch(batch=100) and "deterministic" in str(explained())
            with cuda_kernels.forced("auto"):
                assert not prefers_torch()
            monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
            assert cuda_choice.way(False, lambda: True) == (True, True)  # C++ can load our operator
            monkeypatch.setattr(torch.compiler, "is_exporting", lambda: False)
        # The mode has decided, not the process.
        assert not prefers_torch()
    else:
        monkeypatch.setenv("LSTM_EXT_CUDA_KERNEL", "torch")
        assert prefers_torch() and prefers_torch(batch=100)
        assert not cuda_kernels.is_requested() and explained() == (False, "LSTM_EXT_CUDA_KERNEL=torch")
        with pytest.raises(RuntimeError, match="tune: LSTM_EXT_CUDA_KERNEL=torch has decided"):
            lstm_ext.tune(Model(), 8)
    assert card.measurements == 1


def explained() -> Any:
    return cuda_choice.way(False, lambda: cuda_choice.Choice(True, "step", {}))


def test_a_compiler_sees_the_deterministic_mode(card: Card) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: x + 1 if cuda_choice.way(False, lambda: True)[0] else x - 1, backend="eager", fullgraph=True
    )
    assert compiled(torch.zeros(1)) == 1
    with deterministic():
        assert compiled(torch.zeros(1)) == -1
    assert compiled(torch.zeros(1)) == 1


def test_a_compiler_sees_no_look_up(card: Card) -> None:
    """Dynamo makes no guard for a missing key. One for a key that is there would compile anew without need."""
    torch._dynamo.reset()
    stack, weights, *_ = layer()
    graphs: list[Any] = []

    def call(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if cuda_choice.prefers_torch(stack, weights, x, None, None) else x - 1

    compiled = torch.compile(call, backend=lambda graph, _: (graphs.append(graph), graph)[1], fullgraph=True)
    x = torch.zeros(20, 8, 5)
    assert compiled(x)[0, 0, 0] == 1 and not cuda_choice._ways
    assert call(x)[0, 0, 0] == -1  # measured
    with cuda_kernels.decide_anew():
        assert compiled(x)[0, 0, 0] == 1 and len(graphs) == 1


def test_a_record_of_another_form_does_not_count(card: Card) -> None:
    """It was measured in another way."""
    old = {"ours": True, "forward": "step", "backward": "step", "us": {"torch": 2.0, "step": 1.0}}
    selftest_record.add_measured(CPU, class_of_layer().key, old)
    card.times = SLOW
    assert prefers_torch() and card.measurements == 1


def class_of_layer() -> cuda_choice.ShapeClass:
    return cuda_choice.class_of(torch.bfloat16, 32, 0, 1, False, True, False, batch=8, steps=20)


def test_two_cards_have_choices_of_their_own(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest_record, "key_of", lambda device: {**KEY, "device": str(device)})
    assert not prefers_torch()
    card.times = SLOW
    assert prefers_torch(device="cuda:1") and not prefers_torch() and card.measurements == 2


@pytest.mark.parametrize("name", ["driver", "sources", "torch"])
def test_a_record_of_another_state_does_not_count(
    card: Card, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    assert not prefers_torch()
    forget(monkeypatch)
    monkeypatch.setattr(selftest_record, "key_of", lambda device: {**KEY, name: "another"})
    assert not prefers_torch() and card.measurements == 2


def test_two_processes_write_one_record(card: Card) -> None:
    program = (
        "import sys, torch\n"
        "from lstm_ext.native import selftest_record\n"
        "selftest_record.key_of = lambda device: {name: name for name in selftest_record.KEY}\n"
        "selftest_record.add_measured(torch.device('cpu'), sys.argv[1], {'ours': True, 'kernel': 'step', 'us': {}})\n"
    )
    for name in ("one", "two"):
        subprocess.run([sys.executable, "-c", program, name], check=True)
    selftest_record.add(CPU, "step", True)
    assert set(cuda_choice.recorded(CPU)) == {"one", "two"}


@pytest.mark.parametrize("text", ["{", "[1]", "{}"])
def test_a_damaged_record_is_one_warning(card: Card, text: str) -> None:
    selftest_record._warn_about_damage.cache_clear()
    selftest_record.path().parent.mkdir(parents=True)
    selftest_record.path().write_text(text)
    with pytest.warns(RuntimeWarning, match="selftest.json is damaged, and is not used") as found:
        assert not prefers_torch()
        assert not prefers_torch(batch=100)
    assert len(found) == 1 and len(json.loads(selftest_record.path().read_text())) == 1


def test_too_little_memory_means_torchs_operator(card: Card) -> None:
    def fail() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    card.times = fail
    assert prefers_torch() and prefers_torch() and card.measurements == 1
    assert cuda_choice.recorded(CPU) == {}


def test_a_process_measures_for_two_seconds_at_most(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_choice, "PROCESS_LIMIT", 0.0)
    assert prefers_torch() and card.measurements == 0 and cuda_choice.recorded(CPU) == {}


def test_active_dropout_and_a_requested_kernel(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card, "set_cuda_kernel", lambda name: None, raising=False)
    for kernel in ("auto", "stepwise"):
        with cuda_kernels.forced(kernel):
            assert not prefers_torch(layers=2, dropout=0.1) and card.measurements == 0
    assert prefers_torch(layers=2, dropout=0.1) and card.measurements == 0
    assert not prefers_torch(layers=2, dropout=0.1, training=False)
    monkeypatch.setenv("LSTM_EXT_CUDA_KERNEL", "stepwise")
    forget(monkeypatch)
    assert not prefers_torch(layers=2, dropout=0.1)


@pytest.mark.parametrize("size", ["hidden_size", "proj_size", "batch", "steps"])
def test_a_graph_takes_the_kernels_if_they_were_faster_in_all_sizes(card: Card, size: str) -> None:
    of_layer = (torch.bfloat16, 1, False, True)

    def choose(**changed: int) -> None:
        cuda_choice.choice_of(class_of_layer()._replace(**changed), torch.device("cuda:0"), card.measure)

    assert not cuda_choice._ours_in_graph(0, *of_layer, False)
    choose()
    assert cuda_choice._ours_in_graph(0, *of_layer, False) and not cuda_choice._ours_in_graph(
        0, *of_layer, True
    )
    card.times = SLOW
    choose(**{size: 64})
    assert not cuda_choice._ours_in_graph(0, *of_layer, False)


class Model(nn.Module):
    def forward(self, batch: int) -> bool:
        return prefers_torch(batch=batch) and prefers_torch(batch=2 * batch)


def test_tune_measures_on_request(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert prefers_torch()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    choices = lstm_ext.tune(Model(), 8)
    assert list(choices) == ["bfloat16 H32 L1 B8 T32 training", "bfloat16 H32 L1 B16 T32 training"]
    assert all(choice.ours for choice in choices.values()) and card.measurements == 2
    assert not prefers_torch() and cuda_choice.recorded(CPU) == choices
    card.times = SLOW
    lstm_ext.tune(Model(), 8)  # measured anew
    assert prefers_torch()
    monkeypatch.setenv("LSTM_EXT_CUDA_KERNEL", "step")
    with pytest.raises(RuntimeError, match="tune: LSTM_EXT_CUDA_KERNEL=step has decided"):
        lstm_ext.tune(Model(), 8)


@pytest.mark.parametrize(
    ("has_gpu", "problem", "times", "model", "why"),
    [
        (False, None, FAST, nn.Identity(), "torch finds no GPU"),
        (True, "too old", FAST, nn.Identity(), "too old"),
        (True, None, FAST, nn.Identity(), "no layer of lstm_ext without options ran on a CUDA device"),
        (True, None, {}, Model(), "no candidate could be timed; too little memory"),
    ],
    ids=["no GPU", "no kernels", "on the CPU", "no memory"],
)
def test_tune_says_why_it_measured_nothing(
    card: Card,
    monkeypatch: pytest.MonkeyPatch,
    has_gpu: bool,
    problem: str | None,
    times: cuda_choice.Times,
    model: nn.Module,
    why: str,
) -> None:
    card.times = times
    monkeypatch.setattr(cuda_kernels, "has_gpu", lambda: has_gpu)
    monkeypatch.setattr(cuda_kernels, "problem", lambda index: problem)
    with pytest.warns(UserWarning, match=f"tune: nothing was measured: {why}") as caught:
        assert lstm_ext.tune(model, 8) == {}
    assert [w.filename for w in caught] == [__file__]


def test_a_cell(card: Card) -> None:
    rows = stand_in((8, 5))
    weights = [torch.empty(128, 5), torch.empty(128, 32)]
    assert not cuda_choice.cell_prefers_torch(rows, weights, True)
    assert list(cuda_choice.recorded(CPU)) == ["bfloat16 H32 L0 B8 T1 training"]
    card.times = SLOW
    assert cuda_choice.cell_prefers_torch(rows, weights, False) and card.measurements == 2


# Without CUDA, no row of a fake CUDA tensor can be taken, as the cell does for our operator.
@pytest.mark.parametrize(
    ("kind", "preferred"), [(lstm_ext.LSTM, False), (lstm_ext.LSTM, True), (lstm_ext.LSTMCell, True)]
)
def test_what_is_preferred_computes(
    monkeypatch: pytest.MonkeyPatch, kind: type[nn.Module], preferred: bool
) -> None:
    """On fake CUDA tensors."""
    monkeypatch.setattr(cuda_choice, "prefers_torch", lambda *_: preferred)
    monkeypatch.setattr(cuda_choice, "cell_prefers_torch", lambda *_: preferred)
    monkeypatch.setattr(route, "has_operators", lambda device: True)
    seen: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    module = kind(5, 32)
    with FakeTensorMode(), torch.no_grad():
        for name, p in module.named_parameters():
            module._parameters[name] = nn.Parameter(torch.empty(p.shape, device="cuda"), False)
        x = torch.empty(4, 3, 5, device="cuda") if kind is lstm_ext.LSTM else torch.empty(3, 5, device="cuda")
        with Watch():
            module(x)
    ours = [name for name in seen if name.startswith("lstm_ext.lstm_layer")]
    assert bool(ours) is not preferred, seen


# ---- the measurement itself, on the CPU


class Kernels:
    """The extension of this machine, with a plan for a GPU."""

    def __init__(self) -> None:
        self.module = loader.extension()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def cuda_facts(self, index: int) -> Any:
        return next(facts for facts in self.module.cuda_devices() if "H100" in facts["name"])


@pytest.mark.parametrize(("layers", "packed"), [(2, False), (2, True), (0, False)])
@pytest.mark.parametrize("training", [False, True])
def test_both_are_timed_and_nothing_else_changes(
    monkeypatch: pytest.MonkeyPatch, layers: int, packed: bool, training: bool
) -> None:
    kernels = Kernels()
    monkeypatch.setattr(loader, "extension", lambda: kernels)
    monkeypatch.setattr(cuda_kernels, "outcome", lambda device, kernel, dtype: kernel != "step")
    before = torch.get_rng_state()
    steps = 9 if layers else 1
    shape = cuda_choice.class_of(
        torch.float32, 40, 0, layers, layers > 0, training, packed, batch=6, steps=steps
    )
    found = cuda_choice._measured(lambda: cuda_choice.times_of(shape, CPU, 7, 6, steps), CPU)
    assert set(found) == {"torch", "stepwise", *(["persistent"] if shape.tf32 and layers else [])}
    assert min(found.values()) > 0
    assert torch.equal(torch.get_rng_state(), before)


def test_a_candidate_that_fails_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = Kernels()
    monkeypatch.setattr(loader, "extension", lambda: kernels)
    monkeypatch.setattr(cuda_choice, "_candidates", lambda *_: ["persistent", "stepwise"])
    asked: list[str] = []

    def ours(scratch: Any) -> torch.Tensor:
        asked.append("")
        if len(asked) == 1:
            raise RuntimeError("it has no such sizes")
        return scratch.by_torch()

    monkeypatch.setattr(cuda_choice._Scratch, "ours", ours)
    shape = cuda_choice.class_of(torch.float32, 40, 0, 1, False, False, False, batch=6, steps=9)
    assert set(cuda_choice.times_of(shape, CPU, 7, 6, 9)) == {"torch", "stepwise"}


class Runs:
    """What `_timed` runs, by kernel ("": torch's operator), on a clock of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: Callable[[str, int, int], float]) -> None:
        self.now, self.all, self.kernel, self.steps = 0.0, [], "", 0
        self.passes: list[str] = []

        def run(work: Any, device: torch.device) -> float:
            self.all.append((self.steps, self.kernel))
            took = seconds(self.kernel, self.steps, len(self.all))
            self.now += took
            return took

        def tell(
            shape: cuda_choice.ShapeClass, device: torch.device, forward: str, backward: str
        ) -> list[str]:
            assert forward == backward  # the kernels of both passes are those of one candidate
            self.kernel, self.steps = forward, shape.steps
            return ["", ""]

        monkeypatch.setattr(cuda_choice, "_seconds", run)
        monkeypatch.setattr(cuda_choice, "_tell_kernels", tell)
        monkeypatch.setattr(cuda_choice, "_candidates", lambda *_: ["stepwise", "step"])
        monkeypatch.setattr(cuda_choice, "time", SimpleNamespace(monotonic=lambda: self.now))

    def times(self, steps: int) -> cuda_choice.Times:
        shape = cuda_choice.class_of(torch.float32, 8, 0, 1, False, True, False, batch=6, steps=steps)
        return cuda_choice.times_of(shape, CPU, 7, 6, steps)


def test_candidates_take_turns_after_a_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clocks rise: each run of the first 20 ms takes ten times as long as a later one."""
    runs = Runs(monkeypatch, lambda kernel, steps, count: 1e-3 if runs.now >= cuda_choice.WARM_UP else 1e-2)
    assert runs.times(20) == pytest.approx({"torch": 1000, "stepwise": 1000, "step": 1000})
    kernels = [kernel for _, kernel in runs.all]
    assert kernels == ["", "stepwise", "step"] * (len(kernels) // 3) and len(kernels) >= 4 * 3


def test_one_slow_run_decides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs(monkeypatch, lambda kernel, steps, count: 0.02 if count in (65, 69) else 1e-3)
    assert runs.times(20) == pytest.approx({"torch": 1000, "stepwise": 1000, "step": 1000})


def test_a_slow_layer_is_measured_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs(monkeypatch, lambda kernel, steps, count: 10.0 if count <= 3 else 1.0)
    assert runs.times(20) == pytest.approx({"torch": 1e6, "stepwise": 1e6, "step": 1e6})
    assert len(runs.all) == 2 * 3


def test_long_calls_are_extrapolated(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch of the whole layer costs 900 us; step is slower at both lengths that are measured, and faster later."""
    per_step = {"": 30e-6, "stepwise": 40e-6, "step": 20e-6}

    def seconds(kernel: str, steps: int, count: int) -> float:
        return (900e-6 if kernel == "step" else 0) + steps * per_step[kernel]

    runs = Runs(monkeypatch, seconds)
    found = runs.times(1000)
    assert {steps for steps, _ in runs.all} == {16, 64}
    assert found == pytest.approx({"torch": 1024 * 30, "stepwise": 1024 * 40, "step": 900 + 1024 * 20})
    assert cuda_choice._best(found) == cuda_choice.Choice(True, "step", found)
    runs.all.clear()
    runs.times(40)
    assert {steps for steps, _ in runs.all} == {64}  # the class of 40 steps, measured as they are


@pytest.mark.parametrize("training", [True, False])
def test_the_ways_that_are_timed_are_those_of_calls(monkeypatch: pytest.MonkeyPatch, training: bool) -> None:
    """Torch's operator with what gives it second derivatives, and in training both passes."""
    taken: list[Any] = []
    passes: list[Any] = []
    lstm, grad = cuda_choice.lstm_by_torch, torch.autograd.grad
    monkeypatch.setattr(cuda_choice, "lstm_by_torch", lambda *a: (taken.append(a), lstm(*a))[1])
    monkeypatch.setattr(torch.autograd, "grad", lambda *a: (passes.append(a), grad(*a))[1])
    shape = cuda_choice.class_of(torch.float32, 8, 0, 2, True, training, False, batch=6, steps=9)
    scratch = cuda_choice._Scratch(shape, CPU, 7, 6, 9)
    torch.testing.assert_close(scratch.by_torch(), scratch.ours())
    for forward in (scratch.by_torch, scratch.ours):
        scratch.call(forward)
    assert [[len(weights) for weights in layers] for _, layers, *_ in taken] == [[8, 8]] * 2
    assert all(preferred is True for *_, preferred in taken)
    assert [len(inputs) for _, inputs, _ in passes] == [17] * 2 * training
    assert all(output.requires_grad for output, *_ in passes)
