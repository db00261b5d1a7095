"""Layers that are torch's to isinstance, subclasses of torch's, and ``patch``."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import pickle
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.fsdp.wrap import ModuleWrapPolicy, transformer_auto_wrap_policy
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_sequence

import lstm_ext

TORCH_CLASSES = nn.LSTM, nn.LSTMCell


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
    assert lstm_ext.convert(model) is model
    assert type(model.lstm) is lstm_ext.TorchLSTM and type(model.cell) is lstm_ext.TorchLSTMCell
    assert isinstance(model.lstm, nn.LSTM) and isinstance(model.lstm, lstm_ext.LSTM)
    assert isinstance(model.cell, nn.LSTMCell) and isinstance(model.cell, lstm_ext.LSTMCell)
    torch.testing.assert_close(model(x), expected)
    assert count_of_kernel_calls(model, x) > 0
    lstm_ext.revert(model)
    assert type(model.lstm) is nn.LSTM and type(model.cell) is nn.LSTMCell
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


def kinds_of(model):
    return [type(model.lstm), type(model.cell)]


KINDS = {True: [lstm_ext.TorchLSTM, lstm_ext.TorchLSTMCell], False: [lstm_ext.LSTM, lstm_ext.LSTMCell]}


def public(module):
    attributes = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    return {name: id(value) for name, value in {**attributes, **module._parameters}.items()}


@pytest.mark.parametrize("as_subclass", [False, True])
def test_convert_again_makes_the_kind_that_is_asked_for(as_subclass):
    model = lstm_ext.convert(Tagger(), as_subclass=not as_subclass)
    model.lstm.zoneout = 0.25
    before = public(model.lstm)
    lstm_ext.convert(model, as_subclass=as_subclass)
    assert kinds_of(model) == KINDS[as_subclass]
    assert public(model.lstm) == before
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert kinds_of(copied) == KINDS[as_subclass]
        assert kinds_of(lstm_ext.convert(copied, as_subclass=as_subclass)) == KINDS[as_subclass]
    del model.lstm.zoneout
    assert kinds_of(lstm_ext.revert(model)) == list(TORCH_CLASSES)


def test_what_is_neither_kind_stays():
    class Ours(lstm_ext.LSTM):
        pass

    frozen = lstm_ext.freeze(lstm_ext.LSTM(3, 4))
    model = nn.Sequential(Ours(3, 4), frozen, lstm_ext.convert(Empty(3, 4)))
    before = [type(module) for module in model]
    for as_subclass in (False, True):
        assert [type(module) for module in lstm_ext.convert(model, as_subclass=as_subclass)] == before


@pytest.mark.parametrize("as_subclass", [False, True])
@pytest.mark.parametrize("made", ["convert", "patch"])
def test_parametrized_layers_change_their_kind(made, as_subclass):
    with lstm_ext.patch():
        module, theirs = nn.LSTM(3, 4), TORCH_CLASSES[0](3, 4)
    module = lstm_ext.convert(module if made == "patch" else theirs)
    parametrizations.weight_norm(module, "weight_hh_l0")
    x = torch.randn(5, 2, 3)
    expected = module(x)[0]
    lstm_ext.convert(module, as_subclass=as_subclass)
    assert isinstance(module, nn.LSTM) is as_subclass and isinstance(module, lstm_ext.LSTM)
    assert type(module).__name__ == "ParametrizedLSTM"
    torch.testing.assert_close(module(x)[0], expected, rtol=0, atol=0)
    parametrizations.weight_norm(lstm_ext.revert(module), "weight_ih_l0")
    assert not isinstance(module, lstm_ext.LSTM)
    torch.testing.assert_close(module(x)[0], expected)


def test_parametrized_after_a_conversion_of_a_subclass():
    module = lstm_ext.convert(Empty(3, 4))
    parametrizations.weight_norm(module, "weight_hh_l0")
    lstm_ext.revert(module)
    torch.nn.utils.parametrize.remove_parametrizations(module, "weight_hh_l0")
    assert type(module) is Empty


def test_names_are_torchs():
    with lstm_ext.patch():
        patched = nn.LSTM(3, 4), nn.LSTMCell(3, 4)
    for ours, theirs in zip(
        (lstm_ext.TorchLSTM(3, 4), lstm_ext.TorchLSTMCell(3, 4), *patched),
        (nn.LSTM(3, 4), nn.LSTMCell(3, 4)) * 2,
        strict=True,
    ):
        assert type(ours).__name__ == type(theirs).__name__ and repr(ours) == repr(theirs)
        # pickles of before have the name by which pickle still finds the class
        old = {lstm_ext.TorchLSTM: b"TorchLSTM", lstm_ext.TorchLSTMCell: b"TorchLSTMCell"}.get(type(ours))
        data = pickle.dumps(ours, protocol=0)
        assert old is None or b"clstm_ext.nn.torch_lstm\n%s\n" % old in data
        assert type(pickle.loads(data)) is type(copy.deepcopy(ours)) is type(ours)


def test_isinstance_tells_what_repr_does_not():
    theirs = nn.LSTM(3, 4)
    with lstm_ext.patch():
        made = (
            nn.LSTM(3, 4),
            lstm_ext.LSTM(3, 4),
            lstm_ext.TorchLSTM(3, 4),
            lstm_ext.convert(TORCH_CLASSES[0](3, 4)),
        )
        assert {repr(layer) for layer in made} == {repr(theirs)}
        assert [isinstance(layer, lstm_ext.LSTM) for layer in (*made, theirs)] == [True] * 4 + [False]
    assert [isinstance(layer, lstm_ext.LSTM) for layer in (*made, theirs)] == [True] * 4 + [False]


def test_code_that_goes_by_torchs_class_passes_the_other_kind_over():
    """Named, it is found. docs/guide/other-libraries.md says so."""
    model = lstm_ext.convert(Tagger(), as_subclass=False)
    assert not any(isinstance(module, TORCH_CLASSES) for module in model.modules())
    assert not ModuleWrapPolicy({nn.LSTM})._run_policy(model, set(), {})
    assert ModuleWrapPolicy({lstm_ext.LSTM})._run_policy(model, set(), {}).keys() == {model.lstm}


def test_code_that_goes_by_the_class_finds_the_layers():
    """Initialisers, activation checkpointing, FSDP's wrap policies."""
    model = lstm_ext.convert(Tagger())

    def initialise(module):
        if isinstance(module, nn.LSTM):
            nn.init.zeros_(module.weight_ih_l0)

    model.apply(initialise)
    assert not model.lstm.weight_ih_l0.any()
    policy = ModuleWrapPolicy({nn.LSTM})
    assert policy._run_policy(model, set(), {}).keys() == {model.lstm}
    wraps = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={nn.LSTM})
    assert wraps(module=model.lstm, recurse=False, nonwrapped_numel=0)
    expected = model(torch.ones(4, 2, 5))
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, nn.LSTM))
    assert type(model.lstm).__name__ == "CheckpointWrapper"
    torch.testing.assert_close(model(torch.ones(4, 2, 5)), expected)


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
    with pytest.raises(TypeError, match="remove its parametrizations, convert, and set them again"):
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
        assert issubclass(TORCH_CLASSES[0], nn.LSTM) and not issubclass(nn.GRU, nn.LSTM)

        class Mine(nn.LSTM):
            pass

        assert isinstance(Mine(2, 3), lstm_ext.LSTM) and not isinstance(before, Mine)
        assert "LSTM(5, 7" in repr(model) and "Patched" not in repr(model)
    assert (
        (nn.LSTM, nn.LSTMCell) == TORCH_CLASSES == (torch.nn.modules.rnn.LSTM, torch.nn.modules.rnn.LSTMCell)
    )
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
    assert nn.LSTM is TORCH_CLASSES[0]  # not yet
    outer.start().start()
    inner.start()
    ours = nn.LSTM
    assert ours is not TORCH_CLASSES[0]
    outer.stop()
    outer.stop()  # nothing
    assert nn.LSTM is ours
    inner.stop()
    assert nn.LSTM is TORCH_CLASSES[0]


def test_patch_over_another_patch(monkeypatch):
    class Theirs(nn.LSTM):
        pass

    monkeypatch.setattr(nn, "LSTM", Theirs)
    with lstm_ext.patch():
        assert isinstance(nn.LSTM(2, 3), lstm_ext.LSTM)
    assert nn.LSTM is Theirs
    handle = lstm_ext.patch().start()
    ours = nn.LSTM
    nn.LSTM = Theirs
    with pytest.raises(RuntimeError, match=r"torch\.nn\.LSTM has become .*Theirs since; undo that first"):
        handle.stop()
    assert torch.nn.modules.rnn.LSTM is ours  # nothing was changed
    nn.LSTM = ours
    handle.stop()
    assert nn.LSTM is Theirs


def test_patches_of_several_threads():
    def work():
        for _ in range(200):
            with lstm_ext.patch():
                assert isinstance(nn.LSTM(2, 3, device="meta"), lstm_ext.LSTM)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert nn.LSTM is TORCH_CLASSES[0]


def test_a_patch_counts_what_it_made():
    class Mine(TORCH_CLASSES[0]):
        pass

    outer = lstm_ext.patch().start()
    with lstm_ext.patch() as inner:
        assert inner.made == outer.made == 0
        model = Tagger(nn.LSTM, nn.LSTMCell)

        class Theirs(nn.LSTM):
            pass

        Theirs(2, 3)
        Mine(2, 3)  # of the class of before: not made by the patch
        copy.deepcopy(model)
        assert inner.made == outer.made == 3
    nn.LSTM(2, 3)
    outer.stop()
    Theirs(2, 3)
    assert (inner.made, outer.made) == (3, 4)
    assert inspect.signature(type(model.lstm)) == inspect.signature(lstm_ext.LSTM)


def test_a_block_that_makes_no_layer_says_so():
    said = "no torch.nn.LSTM or LSTMCell was constructed"
    with pytest.warns(UserWarning, match=said) as caught, lstm_ext.patch():
        TORCH_CLASSES[0](2, 3)  # of the class of before
    assert [w.filename for w in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lstm_ext.patch().start().stop()
        with lstm_ext.patch():
            nn.LSTMCell(2, 3)
        with pytest.raises(KeyError), lstm_ext.patch():
            raise KeyError


def test_code_that_is_imported_under_a_patch_keeps_our_class():
    library: dict[str, type] = {}
    handle = lstm_ext.patch().start()
    exec("from torch.nn import LSTM", library)
    handle.stop()
    assert isinstance(library["LSTM"](2, 3), lstm_ext.LSTM) and not isinstance(nn.LSTM(2, 3), lstm_ext.LSTM)


def test_layers_that_are_made_in_several_threads_are_all_counted():
    def work():
        for _ in range(50):
            nn.LSTMCell(2, 3, device="meta")

    with lstm_ext.patch() as handle:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert handle.made == 200


def test_state_of_a_saved_patched_layer_loads_into_torchs():
    with lstm_ext.patch():
        layer = nn.LSTM(3, 4)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    nn.LSTM(3, 4).load_state_dict(torch.load(file))
