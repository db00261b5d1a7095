"""Layers that are torch's to isinstance, subclasses of torch's, and ``patch``."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
import warnings

import pytest
import torch
from lstm_models import Doubling, DoublingGRU, Halving, LayerAndCell, Plain
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.fsdp.wrap import ModuleWrapPolicy, transformer_auto_wrap_policy
from torch.nn.utils import parametrizations

import lstm_ext
from lstm_ext.nn.torch_layers import OURS

TORCH_CLASSES = nn.LSTM, nn.LSTMCell
NAMES = "LSTM", "LSTMCell", "GRU", "GRUCell"


def count_of_kernel_calls(model, x):
    with torch.profiler.profile() as profile:
        model(x)
    return sum(event.count for event in profile.key_averages() if "lstm_ext::" in event.key)


# Ours as torch's


def test_layers_are_torchs_to_isinstance():
    model, x = lstm_ext.convert(LayerAndCell()), torch.randn(4, 2, 5)
    assert isinstance(model.lstm, nn.LSTM) and isinstance(model.lstm, lstm_ext.LSTM)
    assert isinstance(model.cell, nn.LSTMCell) and isinstance(model.cell, lstm_ext.LSTMCell)
    assert count_of_kernel_calls(model, x) > 0


def test_what_is_neither_kind_stays():
    class Ours(lstm_ext.LSTM):
        pass

    frozen = lstm_ext.freeze(lstm_ext.LSTM(3, 4))
    model = nn.Sequential(Ours(3, 4), frozen, lstm_ext.convert(Plain(3, 4)))
    before = [type(module) for module in model]
    for as_subclass in (False, True):
        assert [type(module) for module in lstm_ext.convert(model, as_subclass=as_subclass)] == before


@pytest.mark.parametrize("as_subclass", [False, True])
def test_parametrized_layers_of_a_patch_change_their_kind(as_subclass):
    with lstm_ext.patch():
        module = nn.LSTM(3, 4)
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
    module = lstm_ext.convert(Plain(3, 4))
    parametrizations.weight_norm(module, "weight_hh_l0")
    lstm_ext.revert(module)
    torch.nn.utils.parametrize.remove_parametrizations(module, "weight_hh_l0")
    assert type(module) is Plain


def test_names_are_torchs():
    with lstm_ext.patch():
        patched = [getattr(nn, name)(3, 4) for name in NAMES]
    made = [getattr(lstm_ext, f"Torch{name}")(3, 4) for name in NAMES]
    for ours, theirs in zip((*made, *patched), [getattr(nn, name)(3, 4) for name in NAMES] * 2, strict=True):
        assert type(ours).__name__ == type(theirs).__name__ and repr(ours) == repr(theirs)
        assert isinstance(ours, type(theirs)) and ours.__class__ is not type(theirs)
        data = pickle.dumps(ours, protocol=0)
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
    """Named, it is found."""
    model = lstm_ext.convert(LayerAndCell(), as_subclass=False)
    assert not any(isinstance(module, TORCH_CLASSES) for module in model.modules())
    assert not ModuleWrapPolicy({nn.LSTM})._run_policy(model, set(), {})
    assert ModuleWrapPolicy({lstm_ext.LSTM})._run_policy(model, set(), {}).keys() == {model.lstm}


def test_code_that_goes_by_the_class_finds_the_layers():
    """Initialisers, activation checkpointing, FSDP's wrap policies."""
    model = lstm_ext.convert(LayerAndCell())

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


# Subclasses of torch's


@pytest.mark.parametrize(
    ("make", "more"),
    [
        (lambda: Plain(3, 4), {}),
        (lambda: Doubling(3, 4, factor=3.0), {"subclasses": True}),
        (lambda: Halving(3, 4), {"subclasses": True}),
        (lambda: DoublingGRU(3, 4), {"subclasses": True}),
    ],
    ids=["no code", "layer", "cell", "GRU"],
)
def test_subclasses_keep_their_code(make, more):
    model, x = nn.Sequential(make()), torch.randn(5, 3)
    expected, kind = model(x)[0], type(model[0])
    lstm_ext.convert(model, **more)
    for same in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(same[0], kind) and isinstance(same[0], OURS)
        assert type(same[0]) is type(model[0])
        torch.testing.assert_close(same(x)[0], expected)
        assert count_of_kernel_calls(same, x) > 0
        assert type(lstm_ext.revert(same)[0]) is kind
        lstm_ext.convert(same, **more)


def test_a_parametrized_subclass_is_refused_still():
    model = nn.Sequential(parametrizations.weight_norm(Doubling(3, 4), "weight_hh_l0"))
    with pytest.raises(TypeError, match="remove its parametrizations, convert, and set them again"):
        lstm_ext.convert(model, subclasses=True)


# patch


def test_patch_and_the_way_back():
    before = nn.LSTM(2, 3)
    with lstm_ext.patch():
        model = LayerAndCell(nn.LSTM, nn.LSTMCell)
        assert isinstance(model.lstm, lstm_ext.LSTM) and isinstance(model.cell, lstm_ext.LSTMCell)
        assert torch.nn.modules.rnn.LSTM is nn.LSTM is torch.nn.modules.LSTM
        assert isinstance(nn.GRU(2, 3), lstm_ext.GRU) and isinstance(nn.GRUCell(2, 3), lstm_ext.GRUCell)
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


def test_a_patch_counts_what_it_made():
    class Mine(TORCH_CLASSES[0]):
        pass

    outer = lstm_ext.patch().start()
    with lstm_ext.patch() as inner:
        assert inner.made == outer.made == 0
        model = LayerAndCell(nn.LSTM, nn.LSTMCell)

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
    said = "no LSTM, GRU or cell of torch.nn was constructed"
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
