"""Layers that are torch's to isinstance, subclasses of torch's, ``patch``, and ``report``."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_sequence

import lstm_ext

TORCHS = nn.LSTM, nn.LSTMCell


class Empty(nn.LSTM):
    """Only a name."""


class Doubling(nn.LSTM):
    def __init__(self, *args, factor=2.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.factor = factor

    def forward(self, x, hx=None):
        output, states = super().forward(x, hx)
        return self.factor * output, states


class Tired(nn.LSTMCell):
    def forward(self, x, hx=None):
        h, c = super().forward(x, hx)
        return h / 2, c


class Tagger(nn.Module):
    def __init__(self, kind=nn.LSTM, cell=nn.LSTMCell):
        super().__init__()
        self.lstm = kind(5, 7, 2, bidirectional=True)
        self.cell = cell(14, 3)

    def forward(self, x):
        return self.cell(self.lstm(x)[0].sum(0))[0]


def count_of_kernel_calls(model, x):
    with torch.profiler.profile() as profile:
        model(x)
    return sum(event.count for event in profile.key_averages() if "lstm_ext::" in event.key)


# Ours as torch's


def test_layers_are_torchs_to_isinstance():
    torch.manual_seed(0)
    model = Tagger()
    x = torch.randn(4, 2, 5)
    expected = model(x)
    assert lstm_ext.convert(model, as_torchs=True) is model
    assert type(model.lstm) is lstm_ext.TorchLSTM and type(model.cell) is lstm_ext.TorchLSTMCell
    assert isinstance(model.lstm, nn.LSTM) and isinstance(model.lstm, lstm_ext.LSTM)
    assert isinstance(model.cell, nn.LSTMCell) and isinstance(model.cell, lstm_ext.LSTMCell)
    torch.testing.assert_close(model(x), expected)
    assert count_of_kernel_calls(model, x) > 0
    lstm_ext.convert(model)  # stays
    assert type(model.lstm) is lstm_ext.TorchLSTM
    lstm_ext.revert(model)
    assert type(model.lstm) is nn.LSTM and type(model.cell) is nn.LSTMCell
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


def test_what_was_converted_may_become_torchs():
    model = lstm_ext.convert(Tagger())
    lstm_ext.convert(model, as_torchs=True)
    assert type(model.lstm) is lstm_ext.TorchLSTM


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"]
)
def test_it_is_made_and_copied_as_torchs_own(copied):
    torch.manual_seed(1)
    theirs = nn.LSTM(3, 4, num_layers=2, bidirectional=True, proj_size=2, dropout=0.0)
    torch.manual_seed(1)
    ours = lstm_ext.TorchLSTM(3, 4, num_layers=2, bidirectional=True, proj_size=2, dropout=0.0)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    again = copied(ours)
    assert type(again) is lstm_ext.TorchLSTM
    packed = pack_sequence([torch.randn(n, 3) for n in (5, 2)])
    for module in (ours, again):
        torch.testing.assert_close(module(packed)[0].data, theirs(packed)[0].data)
    again.load_state_dict(theirs.state_dict())


def test_compiles_with_a_break_as_torchs_does():
    layer = lstm_ext.TorchLSTM(3, 4)
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(torch.compile(layer, backend="eager")(x)[0], layer(x)[0])


# Subclasses of torch's


def test_an_empty_subclass_is_converted():
    model = nn.Sequential(Empty(3, 4))
    x = torch.randn(5, 2, 3)
    expected = model(x)[0]
    lstm_ext.convert(model)
    assert isinstance(model[0], (Empty, lstm_ext.LSTM)) and isinstance(model[0], Empty)
    torch.testing.assert_close(model(x)[0], expected)
    assert count_of_kernel_calls(model, x) > 0
    again = pickle.loads(pickle.dumps(model))
    assert type(again[0]) is type(model[0])
    torch.testing.assert_close(again(x)[0], expected)
    assert type(copy.deepcopy(model)[0]) is type(model[0])
    lstm_ext.revert(model)
    assert type(model[0]) is Empty


@pytest.mark.parametrize(
    "make", [lambda: Doubling(3, 4, factor=3.0), lambda: Tired(3, 4)], ids=["layer", "cell"]
)
def test_code_of_its_own_is_kept_where_asked_for(make):
    model = nn.Sequential(make())
    x = torch.randn(5, 3)
    expected = model(x)[0]
    with pytest.raises(TypeError, match=r"might be lost; convert\(model, subclasses=True\) keeps its code"):
        lstm_ext.convert(model)
    kind = type(model[0])
    lstm_ext.convert(model, subclasses=True)
    assert isinstance(model[0], kind) and isinstance(model[0], (lstm_ext.LSTM, lstm_ext.LSTMCell))
    torch.testing.assert_close(model(x)[0], expected)
    assert count_of_kernel_calls(model, x) > 0
    again = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(again(x)[0], expected)
    lstm_ext.revert(model)
    assert type(model[0]) is kind


def test_a_parametrized_subclass_is_refused_still():
    model = nn.Sequential(parametrizations.weight_norm(Doubling(3, 4), "weight_hh_l0"))
    with pytest.raises(TypeError, match="a subclass of"):
        lstm_ext.convert(model, subclasses=True)


# patch


def test_patch_and_the_way_back():
    before = nn.LSTM(2, 3)
    with lstm_ext.patch():
        model = Tagger(nn.LSTM, nn.LSTMCell)
        assert isinstance(model.lstm, lstm_ext.LSTM) and isinstance(model.cell, lstm_ext.LSTMCell)
        assert torch.nn.modules.rnn.LSTM is nn.LSTM is torch.nn.modules.LSTM
        # What torch's class made, and what ours did, is an instance; anything else is not.
        assert isinstance(before, nn.LSTM) and isinstance(lstm_ext.LSTM(2, 3), nn.LSTM)
        assert not isinstance(nn.GRU(2, 3), nn.LSTM) and not isinstance(before, nn.LSTMCell)
        assert issubclass(TORCHS[0], nn.LSTM) and not issubclass(nn.GRU, nn.LSTM)

        class Mine(nn.LSTM):
            pass

        assert isinstance(Mine(2, 3), lstm_ext.LSTM) and not isinstance(before, Mine)
        assert "LSTM(5, 7" in repr(model) and "Patched" not in repr(model)
    assert (nn.LSTM, nn.LSTMCell) == TORCHS == (torch.nn.modules.rnn.LSTM, torch.nn.modules.rnn.LSTMCell)
    x = torch.randn(4, 2, 5)
    expected = model(x)
    assert isinstance(model.lstm, nn.LSTM)
    again = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(again(x), expected)
    lstm_ext.revert(model)
    assert type(model.lstm) is nn.LSTM
    torch.testing.assert_close(model(x), expected)


def test_patches_may_be_nested():
    outer, inner = lstm_ext.patch(), lstm_ext.patch()
    ours = nn.LSTM
    assert ours is not TORCHS[0]
    outer.undo()
    outer.undo()  # nothing
    assert nn.LSTM is ours
    inner.undo()
    assert nn.LSTM is TORCHS[0]


def test_patch_over_another_patch(monkeypatch):
    class Theirs(nn.LSTM):
        pass

    monkeypatch.setattr(nn, "LSTM", Theirs)
    with lstm_ext.patch():
        assert nn.LSTM is not Theirs
    assert nn.LSTM is Theirs
    handle = lstm_ext.patch()
    ours = nn.LSTM
    nn.LSTM = Theirs
    with pytest.raises(RuntimeError, match=r"torch\.nn\.LSTM has become .*Theirs since; undo that first"):
        handle.undo()
    assert torch.nn.modules.rnn.LSTM is ours  # nothing was changed
    nn.LSTM = ours
    handle.undo()
    assert nn.LSTM is Theirs


def test_patches_of_several_threads():
    def work():
        for _ in range(200):
            with lstm_ext.patch():
                assert issubclass(nn.LSTM, lstm_ext.LSTM)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert nn.LSTM is TORCHS[0]


# report


def test_report():
    model = nn.ModuleDict(
        {
            "ours": lstm_ext.LSTM(2, 3),
            "torchs": nn.LSTM(2, 3),
            "cell": nn.LSTMCell(2, 3),
            "subclass": Doubling(2, 3),
            "gru": nn.GRU(2, 3),
        }
    )
    scripted = torch.jit.script(nn.Sequential(nn.LSTM(2, 3)))
    model["scripted"] = scripted
    entries = {entry.name: entry for entry in lstm_ext.report(model)}
    assert list(entries)[:4] == ["ours", "torchs", "cell", "subclass"] and "gru" not in entries
    assert entries["ours"].ours and entries["ours"].reason == ""
    assert entries["torchs"].reason == entries["cell"].reason == "not converted"
    assert "subclasses=True" in entries["subclass"].reason
    assert "compiled by torch.jit" in entries["scripted.0"].reason
    assert str(entries["ours"]) == "ours (lstm_ext.nn.lstm.LSTM): ours"
    assert str(lstm_ext.report(nn.LSTM(2, 3))[0]).startswith(
        "the model itself (torch.nn.modules.rnn.LSTM): not ours:"
    )
    with pytest.raises(TypeError, match=r"report: expected model to be a torch\.nn\.Module, got int"):
        lstm_ext.report(3)


def test_state_of_a_saved_patched_layer_loads_into_torchs():
    with lstm_ext.patch():
        layer = nn.LSTM(3, 4)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    nn.LSTM(3, 4).load_state_dict(torch.load(file))
