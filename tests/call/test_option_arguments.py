"""The options: defaults that change nothing, attributes, parameters, random masks. Errors are in matrix/faults.py."""

from __future__ import annotations

import copy
import inspect
import typing
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import lstm_ext
from lstm_ext.call import masks
from lstm_ext.layer.layer_call import OPTION_NAMES
from lstm_ext.options import OPTIONS as OPTIONS_TABLE
from lstm_ext.options import FunctionalOptions, LayerArguments

T, B, I, H = 5, 3, 4, 6
OPTIONS = {
    "recurrent_dropout": 0.25,
    "zoneout": (0.1, 0.2),
    "layer_norm": True,
    "forget_bias": 1.5,
    "recompute": True,
}


# The constructor


def test_signature():
    parameters = inspect.signature(lstm_ext.LSTM.forward).parameters
    assert list(parameters) == [
        "self", "input", "hx", "lengths", "resets", "reset_state", "mask", "return_cell_states", "return_gates",
    ]  # fmt: skip
    assert all(p.kind is p.KEYWORD_ONLY for p in list(parameters.values())[3:])


def test_each_row_is_where_users_look():
    """The types of keywords, attributes, keywords of the function, the docstring and the page follow from the rows."""
    functional = inspect.signature(lstm_ext.functional.lstm).parameters
    page = (Path(__file__).parents[2] / "docs" / "options.md").read_text().split("\n## ")[0]
    assert typing.get_type_hints(LayerArguments).keys() == OPTIONS_TABLE.keys()
    for name, option in OPTIONS_TABLE.items():
        keyword = option.parameters.keyword if option.parameters else name
        assert (keyword in functional and keyword in typing.get_type_hints(FunctionalOptions)) == option.call
        assert getattr(lstm_ext.LSTM(I, H), name) == option.default
        assert f"\n        {name}: " in lstm_ext.LSTM.__doc__ and f"{name}=" in page
        assert not option.field or name in OPTION_NAMES
    assert lstm_ext.LSTM.zoneout.__doc__ == OPTIONS_TABLE["zoneout"].text


def test_a_layer_of_torch_whose_attribute_would_become_an_option():
    module = nn.Sequential(nn.LSTM(I, H))
    module[0].zoneout = "mine"
    with pytest.raises(TypeError, match="zoneout is an option of our layer"):
        lstm_ext.convert(module)
    assert type(module[0]) is nn.LSTM and module[0].zoneout == "mine"


def test_options_at_their_defaults_change_nothing():
    defaults = {"recurrent_dropout": 0, "zoneout": (0.0, 0), "layer_norm": False, "recompute": False}
    torch.manual_seed(1)
    ours = lstm_ext.LSTM(I, H, 2, dropout=0.5, forget_bias=None, **defaults)
    after = torch.get_rng_state()
    torch.manual_seed(1)
    theirs = nn.LSTM(I, H, 2, dropout=0.5)
    assert torch.equal(after, torch.get_rng_state())
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert not set(OPTIONS) & set(vars(ours))
    plain = lstm_ext.convert(copy.copy(theirs), as_subclass=False)
    x = torch.randn(T, B, I)
    torch.manual_seed(2)
    expected = plain(x)
    torch.manual_seed(2)
    given = ours(
        x,
        lengths=None,
        resets=None,
        reset_state=None,
        mask=None,
        return_cell_states=False,
        return_gates=False,
    )
    torch.testing.assert_close(given, expected, rtol=0, atol=0)
    assert repr(lstm_ext.revert(copy.copy(ours))) == repr(theirs)


def test_a_subclass_may_set_an_option_for_all_its_layers():
    class Mine(lstm_ext.LSTM):
        cell_activation = "softsign"

    module, other = Mine(I, H), lstm_ext.LSTM(I, H, cell_activation="softsign")
    other.load_state_dict(module.state_dict())
    x = torch.randn(T, B, I)
    assert torch.equal(module(x)[0], other(x)[0])
    module.cell_activation = "tanh"
    assert not torch.allclose(module(x)[0], other(x)[0])
    assert Mine(I, H, zoneout=0.5).cell_activation == "softsign"
    assert Mine(I, H, cell_activation="tanh").cell_activation == "tanh"

    class Normed(Mine):
        layer_norm = True
        forget_bias = 1.0

    assert repr(Normed(I, H)) == "Normed(4, 6, layer_norm=True, cell_activation=softsign, forget_bias=1.0)"
    assert Normed(I, H).bias_ih_l0[H : 2 * H].eq(1).all() and Normed(I, H).ln_gain_c_l0.eq(1).all()
    with pytest.raises(TypeError, match=r"Computed\.zoneout: expected a value of the option, got property"):
        type("Computed", (lstm_ext.LSTM,), {"zoneout": property(lambda self: 0.5)})
    with pytest.raises(ValueError, match="zoneout should be a number"):
        type("Wrong", (lstm_ext.LSTM,), {"zoneout": 2})


def test_repr():
    assert repr(lstm_ext.LSTM(I, H, 2, **OPTIONS)) == (
        "LSTM(4, 6, num_layers=2, recurrent_dropout=0.25, zoneout=(0.1, 0.2), layer_norm=True, "
        "forget_bias=1.5, recompute=True)"
    )
    assert repr(lstm_ext.LSTM(I, H, zoneout=(0.5, 0.0))) == "LSTM(4, 6, zoneout=0.5)"


NORM = {"ln_gain_ih": 4 * H, "ln_gain_hh": 4 * H, "ln_gain_c": H}
PEEPHOLES = {f"weight_c{gate}": H for gate in "ifo"}


@pytest.mark.parametrize(
    ("option", "bias", "sizes"),
    [
        ("layer_norm", True, {**NORM, "ln_bias_c": H}),
        ("layer_norm", False, NORM),
        ("peephole", True, PEEPHOLES),
    ],
)
def test_parameters_that_options_add(option, bias, sizes):
    torch.manual_seed(1)
    module = lstm_ext.LSTM(I, H, 2, bias, bidirectional=True, **{option: True})
    torch.manual_seed(1)
    plain = nn.LSTM(I, H, 2, bias, bidirectional=True)
    weights, names = plain.state_dict(), list(module.state_dict())
    assert all(torch.equal(module.state_dict()[n], w) for n, w in weights.items())
    places = [f"_l{k}{suffix}" for k in range(2) for suffix in ("", "_reverse")]
    assert names == [*weights, *[f"{name}{place}" for place in places for name in sizes]]
    for place in places:
        for name, size in sizes.items():
            expected = torch.full((size,), 1.0 if "gain" in name else 0.0)
            assert torch.equal(getattr(module, name + place), expected)
    with pytest.raises(RuntimeError, match=f"{next(iter(sizes))}_l0"):
        plain.load_state_dict(module.state_dict())


@pytest.mark.parametrize("options", [OPTIONS, {"peephole": True}], ids=str)
def test_initialisation_anew(options):
    """By ``reset_parameters``, of a layer on the meta device, too."""
    torch.manual_seed(1)
    made = lstm_ext.LSTM(I, H, 2, bidirectional=True, **options)
    for device in (None, "meta"):
        module = lstm_ext.LSTM(I, H, 2, bidirectional=True, **options, device=device).to_empty(device="cpu")
        with torch.no_grad():
            for p in module.parameters():
                p.fill_(torch.nan)
        torch.manual_seed(1)
        module.reset_parameters()
        assert all(map(torch.equal, module.parameters(), made.parameters()))


@pytest.mark.parametrize("name", OPTIONS)
def test_only_the_plain_layer_can_be_reverted(name):
    module = lstm_ext.LSTM(I, H, **{name: OPTIONS[name]})
    model = nn.Sequential(nn.Linear(I, I), module)
    with pytest.raises(TypeError, match=f"'1' .*: {name}"):
        lstm_ext.revert(model)
    assert type(module) is lstm_ext.LSTM
    lstm_ext.convert(model)  # changes nothing
    assert getattr(module, name) == OPTIONS[name]


def test_options_of_a_module_may_be_changed():
    module = lstm_ext.LSTM(I, H)
    x = torch.randn(T, B, I)
    plain = module.eval()(x)
    module.zoneout = (0.5, 0.5)
    assert not torch.equal(module(x)[0], plain[0])
    module.zoneout = 0.0
    torch.testing.assert_close(module(x), plain, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"zoneout.* got 3\.0"):
        module.zoneout = 3.0
    assert torch.equal(module(x)[0], plain[0])


# Random masks


def test_nothing_is_drawn_in_evaluation():
    module = lstm_ext.LSTM(I, H, recurrent_dropout=0.5).eval()
    x = torch.randn(T, B, I)
    plain = lstm_ext.LSTM(I, H)
    plain.load_state_dict(module.state_dict())
    before = torch.get_rng_state()
    torch.testing.assert_close(module(x), plain(x), rtol=0, atol=0)
    assert torch.equal(before, torch.get_rng_state())


def test_limits():
    x = torch.randn(T, B, I)
    hx = torch.randn(1, B, H), torch.randn(1, B, H)
    for training in (True, False):
        frozen = lstm_ext.LSTM(I, H, zoneout=(1.0, 1.0)).train(training)
        output, states = frozen(x, hx)
        torch.testing.assert_close(output, hx[0].expand(T, -1, -1), rtol=0, atol=0)
        torch.testing.assert_close(states, hx, rtol=0, atol=0)
    deaf = lstm_ext.LSTM(I, H, recurrent_dropout=1.0)
    with torch.no_grad():
        expected = lstm_ext.LSTM(I, H)
        expected.load_state_dict(deaf.state_dict())
        expected.weight_hh_l0.zero_()
    torch.testing.assert_close(deaf(x, hx), expected(x, hx))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_masks_of_16_bit_layers_are_not_rounded(dtype):
    drawn = []
    for own in (dtype, torch.float32):
        torch.manual_seed(1)
        drawn.append(masks.recurrent_mask(torch.ones(3, 2, 4, dtype=own), None, None, 1, 50, 0.3))
    assert torch.equal(*drawn)


# The results


@pytest.mark.parametrize("returned", ["return_cell_states", "return_gates"])
def test_one_of_the_two_results(returned):
    module = lstm_ext.LSTM(I, H, 2)
    x = torch.randn(T, B, I)
    output, states_, extras = module(x, **{returned: True})
    assert isinstance(extras, lstm_ext.LSTMExtras)
    plain, plain_states = module(x)
    torch.testing.assert_close((output, states_), (plain, plain_states))
    if returned == "return_cell_states":
        assert extras.gates is None
        assert extras.cell_states.shape == (2, T, B, H)
        torch.testing.assert_close(extras.cell_states[:, -1], plain_states[1])
    else:
        assert extras.cell_states is None
        assert extras.gates.shape == (2, T, B, H, 4)


# The default device


@pytest.mark.devices("cpu")
def test_another_default_device():
    """What is made of the arguments is where they are, not where new tensors go."""
    module = lstm_ext.LSTM(I, H, 2, zoneout=0.3, recurrent_dropout=0.2)
    x, resets = torch.randn(T, B, I), torch.rand(T, B) < 0.3
    packed = pack_padded_sequence(x, [3, 5, 2], enforce_sorted=False)
    packed_resets = pack_padded_sequence(resets, [3, 5, 2], enforce_sorted=False)

    def results():
        torch.manual_seed(3)
        y = module(x, lengths=[3, 5, 2], resets=resets)[0]
        return y, module(packed, resets=packed_resets)[0].data, module(x, mask=x[..., 0] < 9)[0]

    expected = results()
    torch.set_default_device("meta")
    try:
        found = results()
    finally:
        torch.set_default_device(None)
    for y, e in zip(found, expected, strict=True):
        assert torch.equal(y, e)
