"""torch.compile of layers that are ``torch.nn.LSTM`` to isinstance: one graph, and torch's own are refused as before.

Nothing here needs the compiled kernels: ``LSTM_EXT_BACKEND=reference`` runs it under any torch.
"""

from __future__ import annotations

import copy
import subprocess
import sys
import threading
import types
import warnings

import pytest
import torch
import torch._dynamo
from graphs import Graphs
from lstm_models import Doubling
from torch import nn
from torch.nn.utils import parametrizations

import lstm_ext
from lstm_ext.native import integrations, loader
from lstm_ext.nn.torch_layers import PATCHED

pytestmark = pytest.mark.slow

T, B, I, H = 4, 2, 3, 5


@pytest.fixture(autouse=True)
def _nothing_compiled_yet() -> None:
    torch._dynamo.reset()


class Model(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        return sum(layer(x)[0].sum(-1) for layer in self.layers)


class Own(nn.LSTM):
    def forward(self, x, hx=None):
        return nn.LSTM.forward(self, x, hx)


def normed() -> nn.Module:
    return lstm_ext.convert(parametrizations.weight_norm(nn.LSTM(I, H), "weight_hh_l0"))


KINDS = {
    "converted": lambda: lstm_ext.convert(nn.LSTM(I, H, 2, bidirectional=True)),
    "patched": lambda: PATCHED["LSTM"](I, H),
    "GRU": lambda: lstm_ext.convert(nn.GRU(I, H, 2, bidirectional=True)),
    "parametrized": normed,
    "subclass": lambda: lstm_ext.convert(Doubling(I, H), subclasses=True),
}


def step(module, x):
    module.zero_grad()
    y = module(x)
    y.sin().sum().backward()
    return [y.detach(), *(p.grad for p in module.parameters())]


def whole(module, **options):
    module = copy.deepcopy(module)
    module.compile(backend="aot_eager", fullgraph=True, **options)
    return module


def is_refused(module, x) -> bool:
    torch._dynamo.reset()
    try:
        torch.compile(module, backend="eager", fullgraph=True)(x)
    except torch._dynamo.exc.Unsupported as error:
        assert "RNN, GRU" in str(error)
        return True
    return False


@pytest.mark.parametrize("kind", KINDS)
def test_one_graph_with_gradients(kind):
    model, x = Model(KINDS[kind](), KINDS[kind]()), torch.randn(T, B, I)
    assert all(isinstance(layer, (nn.LSTM, nn.GRU)) for layer in model.layers)
    graphs, ours = Graphs(), copy.deepcopy(model)
    ours.compile(backend=graphs, fullgraph=True)
    torch.testing.assert_close(step(ours, x), step(model, x))
    assert len(graphs.all) == 1
    if loader.extension():
        graphs.assert_layers(sum(layer.num_layers for layer in model.layers))


def test_any_batch_and_time_without_compiling_again():
    model = Model(KINDS["converted"]())
    ours = whole(model, dynamic=True)
    step(ours, torch.randn(T, B, I))
    with torch._dynamo.config.patch(error_on_recompile=True):
        # The equations in plain PyTorch have a fixed number of steps.
        for time, batch in ((T, B), (6, 3), (5, 7)) if loader.extension() else ((T, B), (T, 3)):
            x = torch.randn(time, batch, I)
            torch.testing.assert_close(step(ours, x), step(model, x))


def test_export():
    model, x = Model(KINDS["converted"]()).eval(), torch.randn(T, B, I)
    sizes = ({1: torch.export.Dim("batch")},)
    program = torch.export.export(model, (x,), dynamic_shapes=sizes, strict=True)
    x = torch.randn(T, 5, I)
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("theirs", [nn.LSTM, nn.GRU, nn.RNN])
def test_torchs_own_layers_are_refused_in_the_same_graph(theirs):
    x = torch.randn(T, B, I)
    ours = KINDS["converted"]()
    assert not is_refused(Model(ours), x)
    assert is_refused(Model(ours, theirs(I, H)), x)
    assert is_refused(Model(theirs(I, H), ours), x)
    ours.child = theirs(I, H)
    ours.register_forward_hook(lambda module, args, output: (module.child(args[0])[0], None))
    assert is_refused(Model(ours), x)
    assert not torch._dynamo.config.allow_rnn


def builder_that(wraps) -> types.SimpleNamespace:
    """A module like dynamo's, whose setting is one for all threads."""

    class VariableBuilder:
        def wrap_module(self, value):
            return wraps(self, value, config.allow_rnn)

    config = types.SimpleNamespace(allow_rnn=False)
    builder = types.SimpleNamespace(VariableBuilder=VariableBuilder, config=config)
    integrations._wrap(builder, lambda module: isinstance(module, lstm_ext.LSTM), lambda module: False)
    return builder


def test_a_layer_of_torchs_that_is_wrapped_within_ours():
    """Which dynamo does not do today: it looks at a layer while it looks at another."""
    seen = []

    def wraps(self, value, allowed):
        seen.append((type(value).__name__, allowed))
        for child in value.children():
            self.wrap_module(child)
        if isinstance(value, nn.GRU):
            raise ValueError

    builder = builder_that(wraps)
    ours = lstm_ext.TorchLSTM(I, H)
    ours.one, ours.two = nn.GRU(I, H), nn.Linear(1, 1)
    for users in (False, True):
        builder.config.allow_rnn = users
        with pytest.raises(ValueError):
            builder.VariableBuilder().wrap_module(ours)
        assert builder.config.allow_rnn is users
    assert seen == [("LSTM", True), ("GRU", False), ("LSTM", True), ("GRU", True)]


def test_a_layer_of_torchs_in_another_thread():
    seen, threads = [], []

    def wraps(self, value, allowed):
        if isinstance(value, lstm_ext.LSTM):
            threads.append(threading.Thread(target=self.wrap_module, args=(nn.LSTM(I, H),)))
            threads[-1].start()
            threads[-1].join(0.2)  # it waits for us
        seen.append((type(value), allowed))

    builder_that(wraps).VariableBuilder().wrap_module(lstm_ext.TorchLSTM(I, H))
    threads[0].join()
    assert seen == [(lstm_ext.TorchLSTM, True), (nn.LSTM, False)]


def test_the_users_setting_holds():
    x = torch.randn(T, B, I)
    with torch._dynamo.config.patch(allow_rnn=True):
        assert not is_refused(Model(KINDS["converted"](), nn.LSTM(I, H)), x)
        assert torch._dynamo.config.allow_rnn
    torch._dynamo.reset()
    assert is_refused(Model(nn.LSTM(I, H)), x)


def test_a_subclass_whose_forward_does_not_reach_ours_is_torchs():
    layer = lstm_ext.convert(Own(I, H), subclasses=True)
    assert is_refused(Model(layer), torch.randn(T, B, I))


def test_twice_is_as_once():
    integrations.let_dynamo_take(lambda module: isinstance(module, lstm_ext.LSTM), lambda module: False)
    x = torch.randn(T, B, I)
    assert not is_refused(Model(KINDS["converted"]()), x)
    assert is_refused(Model(nn.LSTM(I, H)), x)
    assert not any(getattr(finder, "_lstm_ext_key", "") == "dynamo" for finder in sys.meta_path)


# ---- processes of their own

USE = """
layer = lstm_ext.convert(torch.nn.Sequential(torch.nn.LSTM(3, 4)))
layer.compile(backend="eager", fullgraph=True)
layer(torch.randn(2, 1, 3))[0].sum().backward()
assert not any(getattr(finder, "_lstm_ext_key", "") == "dynamo" for finder in sys.meta_path)
"""
CHANGE = """
from torch._dynamo.variables.builder import VariableBuilder
original = VariableBuilder.wrap_module
"""
PROGRAMS = {
    "dynamo comes later": """
import sys, torch, lstm_ext
assert "torch._dynamo" not in sys.modules
"""
    + USE,
    "dynamo is there": "import sys, torch, torch._dynamo, lstm_ext" + USE,
    "dynamo is half there": """
import sys, threading, time, torch
thread = threading.Thread(target=lambda: __import__("torch._dynamo"))
thread.start()
while "torch._dynamo.variables.builder" not in sys.modules:
    time.sleep(0.001)
import lstm_ext
thread.join()
"""
    + USE,
}


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.parametrize(
    "order",
    ["dynamo comes later", *[pytest.param(o, marks=pytest.mark.tools) for o in list(PROGRAMS)[1:]]],
)
def test_order_of_imports(order):
    assert "lstm_ext" not in run(PROGRAMS[order])


UNFIT = """
import warnings, torch
from torch import nn
CHANGE
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import lstm_ext, torch._dynamo
    model = lstm_ext.convert(nn.Sequential(nn.LSTM(3, 4)))
    x = torch.randn(2, 1, 3)
    y = torch.compile(model, backend="eager")(x)  # with a break
    torch._dynamo.reset()
    try:
        torch.compile(model, backend="eager", fullgraph=True)(x)
    except torch._dynamo.exc.Unsupported:
        pass
    else:
        raise AssertionError
    lstm_ext.convert(model, as_subclass=False)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), y)
text = [str(w.message) for w in caught if "lstm_ext" in str(w.message)]
assert len(text) == 1 and "lstm_ext.convert(model, as_subclass=False)" in text[0], text
"""
CHANGES = {
    "signature": "VariableBuilder.wrap_module = lambda self, value, more=None: original(self, value)",
    "setting": "VariableBuilder.wrap_module = lambda self, value: original(self, value)",
}


@pytest.mark.parametrize("change", ["signature", pytest.param("setting", marks=pytest.mark.tools)])
def test_a_dynamo_that_does_not_fit_is_one_warning(change):
    run(UNFIT.replace("CHANGE", CHANGE + CHANGES[change]))


def test_a_dynamo_without_the_class_is_a_warning():
    with pytest.warns(UserWarning, match=r"the dynamo of torch .*convert\(model, as_subclass=False\)"):
        integrations._wrap(types.ModuleType("builder"), lambda module: True, lambda module: False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings(
            "ignore", "Guards may run slower on Python 3.13.0", RuntimeWarning
        )  # torch's own
        assert not is_refused(Model(KINDS["converted"]()), torch.randn(T, B, I))
