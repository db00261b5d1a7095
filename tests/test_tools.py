"""Tools that look layers up by their exact class: right, or a warning that says the way out."""

from __future__ import annotations

import copy
import sys
import warnings

import pytest
import torch
from torch import nn

import lstm_ext
from lstm_ext.nn import tools

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(24, 32, 2, bidirectional=True, batch_first=True)
        self.out = nn.Linear(64, 4)

    def forward(self, x):
        return self.out(self.lstm(x)[0])


class OneStep(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.LSTMCell(24, 32)

    def forward(self, x):
        return self.cell(x[:, 0])[0]


WAYS = [{}, {"as_torchs": True}]


def converted(model: nn.Module, **how) -> nn.Module:
    return lstm_ext.convert(copy.deepcopy(model), **how)


@pytest.fixture
def no_warning_yet():
    tools._warn_about_quantization.cache_clear()


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("kind", [Model, OneStep])
def test_thop(kind, how):
    thop = pytest.importorskip("thop")
    model, x = kind(), torch.randn(2, 5, 24)
    ours = converted(model, **how)
    expected = thop.profile(model, (x,), verbose=False)
    assert thop.profile(ours, (x,), verbose=False) == expected
    assert [name for name, _ in ours.named_buffers()] == [name for name, _ in model.named_buffers()]


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("kind", [Model, OneStep])
def test_ptflops(kind, how):
    ptflops = pytest.importorskip("ptflops")
    model, options = kind(), {"as_strings": False, "print_per_layer_stat": False, "backend": "pytorch"}
    ours = converted(model, **how)
    expected = ptflops.get_model_complexity_info(model, (5, 24), **options)
    assert ptflops.get_model_complexity_info(ours, (5, 24), **options) == expected


@pytest.mark.parametrize("how", WAYS)
def test_fvcore(how):
    analysis = pytest.importorskip("fvcore.nn").FlopCountAnalysis
    model, x = Model(), torch.randn(2, 5, 24)
    ours, theirs = analysis(converted(model, **how), x), analysis(model, x)
    assert ours.total() == theirs.total()
    assert ours.unsupported_ops() == theirs.unsupported_ops()


@pytest.mark.parametrize("how", WAYS)
def test_opacus(how):
    validators = pytest.importorskip("opacus.validators")
    model, x = Model(), torch.randn(2, 5, 24)
    ours = converted(model, **how).train()
    errors = validators.ModuleValidator.validate(ours, strict=False)
    expected = validators.ModuleValidator.validate(model, strict=False)
    assert [str(e) for e in errors] == [str(e) for e in expected] and len(errors) == 1
    fixed = validators.ModuleValidator.fix(ours)
    assert type(fixed.lstm).__name__ == "DPLSTM"
    torch.testing.assert_close(fixed(x), model(x))
    with pytest.raises(TypeError, match="zoneout; no other layer can take its place"):
        validators.ModuleValidator.fix(nn.Sequential(lstm_ext.LSTM(3, 4, zoneout=0.1)).train())


@pytest.mark.parametrize("how", WAYS)
def test_quantization_warns_once_and_works_after_revert(how, no_warning_yet):
    model, x = Model().eval(), torch.randn(2, 5, 24)
    ours = converted(model, **how)
    with pytest.warns(
        UserWarning, match=r"leaves the layers of lstm_ext in floating point: call lstm_ext\.rev"
    ):
        same = torch.ao.quantization.quantize_dynamic(ours, {nn.LSTM, nn.Linear})
    assert isinstance(same.lstm, lstm_ext.LSTM)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        torch.ao.quantization.quantize_dynamic(nn.Sequential(lstm_ext.LSTMCell(3, 4)))
        lstm_ext.revert(ours)
        quantized = torch.ao.quantization.quantize_dynamic(ours, {nn.LSTM, nn.Linear})
    expected = torch.ao.quantization.quantize_dynamic(model, {nn.LSTM, nn.Linear})
    assert type(quantized.lstm) is type(expected.lstm) is torch.ao.nn.quantized.dynamic.LSTM
    torch.testing.assert_close(quantized(x), expected(x), rtol=0, atol=0)


def test_qconfig_is_an_attribute_as_before(no_warning_yet):
    layer = lstm_ext.LSTM(3, 4)
    assert not hasattr(layer, "qconfig") and not hasattr(lstm_ext.LSTM, "qconfig")
    with pytest.warns(UserWarning):
        layer.qconfig = 3
    assert layer.qconfig == copy.deepcopy(layer).qconfig == lstm_ext.to_torch(layer).qconfig == 3
    del layer.qconfig
    assert not hasattr(layer, "qconfig")


def test_a_rule_of_the_users_own_is_kept(monkeypatch):
    table = {nn.LSTM: print, lstm_ext.LSTM: len}
    monkeypatch.setitem(sys.modules, "thop.profile", type("thop", (), {"register_hooks": table}))
    lstm_ext.LSTM(3, 4).eval()
    lstm_ext.TorchLSTM(3, 4).eval()
    assert table[lstm_ext.LSTM] is len and lstm_ext.TorchLSTM in table


def test_a_table_without_torchs_layer_gets_none_of_ours(monkeypatch):
    table = {nn.Linear: print}
    monkeypatch.setitem(sys.modules, "thop.profile", type("thop", (), {"register_hooks": table}))
    lstm_ext.LSTM(3, 4).eval()
    assert table == {nn.Linear: print}
