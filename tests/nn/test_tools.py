"""Tools that look layers up by their exact class: right, or a warning that says the way out.

The tools themselves are in `tests/compat`.
"""

from __future__ import annotations

import copy
import importlib
import os
import subprocess
import sys
import types
import warnings

import pytest
import torch
from lstm_models import LayerAndCell
from torch import nn

import lstm_ext
from lstm_ext import reference
from lstm_ext.native import integrations
from lstm_ext.nn.torch_layers import PATCHED

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

CLASSES = [
    lstm_ext.LSTM,
    lstm_ext.LSTMCell,
    lstm_ext.TorchLSTM,
    lstm_ext.TorchLSTMCell,
    lstm_ext.FrozenLSTM,
    *PATCHED.values(),
    lstm_ext.GRU,
    lstm_ext.FrozenGRU,
]


def converted(model: nn.Module, **how) -> nn.Module:
    return lstm_ext.convert(copy.deepcopy(model), **how)


# Tables of other packages


TABLES = [
    ("thop.profile", "register_hooks"),
    ("ptflops.pytorch_ops", "MODULES_MAPPING"),
    ("deepspeed.profiling.flops_profiler.profiler", "MODULE_HOOK_MAPPING"),
    ("calflops.pytorch_ops", "MODULE_HOOK_MAPPING"),
]


def load(monkeypatch, place: tuple[str, str], table: dict) -> None:
    """As if the tool had just been imported."""
    monkeypatch.setitem(sys.modules, place[0], types.SimpleNamespace(**{place[1]: table}))


@pytest.mark.parametrize(
    "walk", [lambda m: m.apply(id), lambda m: list(m.modules())], ids=["apply", "modules"]
)
@pytest.mark.parametrize("place", TABLES, ids=[name for name, _ in TABLES])
def test_a_tool_that_is_loaded_after_conversion(monkeypatch, place, walk):
    """It sees a layer of torch that has the attributes of ours, and what it sets there is set in ours."""

    def count(layer, *arguments):
        layer.__flops__ = (type(layer), arguments)

    model = nn.Sequential(converted(LayerAndCell()))
    load(monkeypatch, place, table := {nn.LSTM: count, nn.LSTMCell: count, nn.Linear: len})
    walk(model)
    for layer, theirs in ((model[0].lstm, nn.LSTM), (model[0].cell, nn.LSTMCell)):
        table[type(layer)](layer, 1, 2)
        assert layer.__flops__ == (theirs, (1, 2))


def test_opacus_loaded_after_conversion(monkeypatch):
    class ModuleValidator:
        VALIDATORS = {nn.LSTM: type, nn.LSTMCell: type}  # noqa: RUF012
        FIXERS = {nn.LSTM: type, nn.LSTMCell: type}  # noqa: RUF012

    model = converted(LayerAndCell())
    monkeypatch.setitem(
        sys.modules, "opacus.validators", types.SimpleNamespace(ModuleValidator=ModuleValidator)
    )
    list(model.named_modules())
    for table in (ModuleValidator.VALIDATORS, ModuleValidator.FIXERS):
        assert table[type(model.lstm)](model.lstm) is nn.LSTM
        assert table[type(model.cell)](model.cell) is nn.LSTMCell
    other = lstm_ext.LSTM(3, 4, zoneout=0.1)
    list(other.modules())
    assert ModuleValidator.VALIDATORS[lstm_ext.LSTM](other) is nn.LSTM
    with pytest.raises(TypeError, match="zoneout; no other layer can take its place"):
        ModuleValidator.FIXERS[lstm_ext.LSTM](other)


class Mine(lstm_ext.LSTM):
    pass


@pytest.mark.parametrize(
    ("table", "entered"),
    [
        ({nn.LSTM: print}, {lstm_ext.LSTM, lstm_ext.TorchLSTM}),
        ({nn.LSTM: print, lstm_ext.LSTM: len}, {lstm_ext.TorchLSTM}),  # a rule of the user's own
        ({nn.Linear: print}, set()),
    ],
)
def test_what_is_entered_in_a_table(monkeypatch, table, entered):
    """Not the subclasses of users."""
    before = dict(table)
    load(monkeypatch, TABLES[0], table)
    for layer in (lstm_ext.LSTM(3, 4), lstm_ext.TorchLSTM(3, 4), Mine(3, 4)):
        layer.apply(id)
    assert table.keys() - before.keys() == entered
    assert all(table[kind] is function for kind, function in before.items())


@pytest.mark.parametrize("norm", [False, True])
def test_what_replaces_functionals_sees_none_of_the_equations(monkeypatch, norm):
    """Profilers count the calls of ``torch.nn.functional``, and the layer as a whole beside them."""
    layer, x = lstm_ext.LSTM(3, 4, layer_norm=norm), torch.randn(5, 2, 3)
    gains = {"norm_weights": [p for n, p in layer.named_parameters() if n.startswith("ln_")]} if norm else {}
    weights = [p for n, p in layer.named_parameters() if not n.startswith("ln_")]
    for name in ("linear", "layer_norm"):
        monkeypatch.setattr(nn.functional, name, None)
    torch.testing.assert_close(reference.lstm(x, None, weights, **gains), layer(x))


def test_parameters_are_walked_over_in_a_compiled_function():
    model = converted(LayerAndCell())

    def squares():
        return sum([p.square().sum() for p in model.parameters()])

    torch.testing.assert_close(torch.compile(squares, backend="eager", fullgraph=True)(), squares())


# Attributes


@pytest.mark.parametrize("cls", CLASSES)
def test_every_name_of_a_class_is_an_attribute(cls):
    """Some copy the attributes of ``torch.nn.LSTM``, in whose place our class may be."""
    assert {"forward", "qconfig"} & set(dir(cls)) == {"forward"}
    for name in dir(cls):
        getattr(cls, name)


@pytest.mark.parametrize("cls", [lstm_ext.LSTM, lstm_ext.LSTMCell])
def test_qconfig_is_an_attribute_as_in_every_module(cls):
    layer = cls(3, 4)
    assert not hasattr(layer, "qconfig")
    with pytest.warns(UserWarning):
        layer.qconfig = 3
    assert layer.qconfig == copy.deepcopy(layer).qconfig == lstm_ext.revert(copy.copy(layer)).qconfig == 3
    del layer.qconfig
    assert not hasattr(layer, "qconfig")


# Quantization


def quantized(model: nn.Module) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(model, {nn.LSTM, nn.LSTMCell, nn.Linear})


@pytest.mark.parametrize("action", ["always", "default"])
def test_quantization_warns_once_a_model(action):
    """One warning for all layers of a model, and another one for a model like it, from the same line."""
    for _ in range(3):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("ignore")
            warnings.filterwarnings(action, ".*lstm_ext", UserWarning)
            same = quantized(converted(LayerAndCell().eval()))
        assert [str(w.message) for w in caught] == [
            "torch.ao.quantization (quantize_dynamic and others) leaves the layers of lstm_ext in floating point "
            "(lstm, cell): call lstm_ext.revert(model) before it to have them quantized"
        ]
        assert caught[0].filename == __file__
        assert isinstance(same.lstm, lstm_ext.LSTM) and isinstance(same.cell, lstm_ext.LSTMCell)


CONVERSION = """
def convert_to_quantized_model(model):
    replace_quant_module(model, version=None)
    return model

def replace_quant_module(model, version=None, registry=None):
    model.replaced = version, registry
"""


@pytest.fixture
def modelopt(tmp_path, monkeypatch):
    """A package that has the names and the calls of NVIDIA's, and is imported after a model is converted."""
    name = "modelopt.torch.quantization.conversion"
    folder = tmp_path.joinpath(*name.split(".")[:-1])
    folder.mkdir(parents=True)
    (folder / "conversion.py").write_text(CONVERSION)
    monkeypatch.syspath_prepend(tmp_path)
    integrations.add("modelopt", name, integrations._warn_before_modelopt, "")
    yield lambda: importlib.import_module(name)
    for loaded in [n for n in sys.modules if n.partition(".")[0] == "modelopt"]:
        del sys.modules[loaded]
    integrations.add("modelopt", name, integrations._warn_before_modelopt, "")


@pytest.mark.parametrize("as_subclass", [False, True])
def test_modelopt_warns_once_a_model(modelopt, as_subclass):
    model = converted(LayerAndCell(), as_subclass=as_subclass)
    quantize = modelopt().convert_to_quantized_model
    with pytest.warns(UserWarning) as caught:
        assert quantize(model) is quantize(model) is model
    assert model.replaced == (None, None)
    assert [(w.filename, str(w.message)) for w in caught] == [
        (
            __file__,
            "modelopt leaves the layers of lstm_ext in floating point (lstm, cell): "
            "call lstm_ext.revert(model) before it to have them quantized",
        )
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize(lstm_ext.revert(converted(LayerAndCell())))


def test_a_modelopt_that_is_not_known_warns():
    with pytest.warns(UserWarning, match="modelopt leaves the layers of lstm_ext in floating point: call"):
        integrations._warn_before_modelopt(types.ModuleType("conversion"))


def test_static_quantization_warns_too():
    model = converted(LayerAndCell().train())
    model.qconfig = torch.ao.quantization.get_default_qat_qconfig()
    with pytest.warns(UserWarning, match=r"in floating point \(lstm, cell\)") as caught:
        torch.ao.quantization.prepare_qat(model, inplace=True)
    assert sum("lstm_ext" in str(w.message) for w in caught) == 1


def test_quantization_after_revert():
    model, x = LayerAndCell().eval(), torch.randn(4, 2, 5)
    ours, expected = lstm_ext.revert(converted(model)), quantized(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = quantized(ours)
    assert type(found.lstm) is type(expected.lstm) is torch.ao.nn.quantized.dynamic.LSTM
    torch.testing.assert_close(found(x), expected(x), rtol=0, atol=0)


# ---- what an import changes elsewhere

IMPORT = """
import sys, types
import torch, torch._dynamo.variables.builder, torch.utils.flop_counter
def state():
    modules = {n: m for n, m in sys.modules.items() if n.partition(".")[0] == "torch" and m is not None}
    found = {(n, k): v for n, m in modules.items() for k, v in list(vars(m).items())}
    classes = [v for v in found.values() if isinstance(v, type) and v.__module__.partition(".")[0] == "torch"]
    found |= {(id(c), k): v for c in classes for k, v in vars(c).items()}
    return found, list(sys.meta_path)
before, finders = state()
import lstm_ext
after, finders_after = state()
changed = [k for k, v in before.items() if k not in after or after[k] is not v]
assert finders_after == finders, finders_after
places = {place for place, _ in before}
new = [k for k, v in after.items() if k not in before and k[0] in places and not isinstance(v, types.ModuleType)]
assert not [k for k in changed + new if k[1] not in ("__warningregistry__", "_cached_ops")], (changed, new)
builder = torch._dynamo.variables.builder.VariableBuilder
"""


def run_alone(program: str, **environment: str) -> None:
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_import_changes_nothing_elsewhere():
    """A layer does, unless a variable says no."""
    hooked = "wrapped = hasattr(builder.wrap_module, '__wrapped__'); lstm_ext.LSTM(3, 4)\n"
    after = "assert not wrapped and hasattr(builder.wrap_module, '__wrapped__')\n"
    run_alone(f"{IMPORT}{hooked}{after}assert sys.meta_path != finders")
    none = "assert not hasattr(builder.wrap_module, '__wrapped__') and sys.meta_path == finders"
    run_alone(f"{IMPORT}{hooked}{none}", LSTM_EXT_INTEGRATIONS="0")
