"""The arguments of the options: defaults that change nothing, and errors that name what is wrong."""

from __future__ import annotations

import copy
import inspect
import pickle
import typing
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import lstm_ext
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


def zeros(*shape: int, **kwargs) -> Tensor:
    return torch.zeros(*shape, **kwargs)


# The constructor


def test_signature():
    parameters = inspect.signature(lstm_ext.LSTM).parameters
    named = {name: p.default for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert named == {
        "recurrent_dropout": 0.0,
        "weight_dropout": 0.0,
        "zoneout": 0.0,
        "layer_norm": False,
        "peephole": False,
        "cell_clip": None,
        "coupled_gates": False,
        "gate_activation": "sigmoid",
        "cell_activation": "tanh",
        "preactivation_clip": None,
        "forget_bias": None,
        "recompute": False,
    }
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


def layer_with(**options):
    return lstm_ext.LSTM(I, H, **options)


def function_with(**options):
    return lstm_ext.functional.lstm(zeros(T, B, I), None, list(lstm_ext.LSTM(I, H).parameters()), **options)


@pytest.mark.parametrize(
    ("function", "name", "near"),
    [
        (lambda **options: lstm_ext.LSTM(I, H, **options), "zoneot", "zoneout"),
        (lambda **options: lstm_ext.LSTM(I, H, **options), "hiden_size", "hidden_size"),
        (
            lambda **options: lstm_ext.functional.lstm(zeros(T, B, I), None, [], **options),
            "length",
            "lengths",
        ),
        (
            lambda **options: lstm_ext.functional.lstm(zeros(T, B, I), None, [], **options),
            "norm_weight",
            "norm_weights",
        ),
        (lambda **options: lstm_ext.functional.lstm(zeros(T, B, I), None, [], **options), "forget_bias", ""),
    ],
)
def test_an_unknown_option_names_the_nearest(function, name, near):
    text = f"unexpected keyword argument '{name}'" + (f"; did you mean '{near}'" if near else "")
    with pytest.raises(TypeError, match=text):
        function(**{name: 1})


def test_states_from_before_the_options_were_a_table():
    module = lstm_ext.LSTM(I, H, zoneout=(0.1, 0.2), peephole=True)
    state = {**module.__getstate__(), "zoneout": (0.1, 0.2), "peephole": True}
    del state["_given"]
    other = lstm_ext.LSTM.__new__(lstm_ext.LSTM)
    other.__setstate__(state)
    assert repr(other) == repr(module)
    assert other.__dict__.keys() == module.__dict__.keys()
    x = torch.randn(T, B, I)
    torch.testing.assert_close(other.eval()(x), module.eval()(x), rtol=0, atol=0)


def test_a_layer_of_torch_whose_attribute_would_become_an_option():
    module = nn.Sequential(nn.LSTM(I, H))
    module[0].zoneout = "mine"
    with pytest.raises(TypeError, match="zoneout is an option of our layer"):
        lstm_ext.convert(module)
    assert type(module[0]) is nn.LSTM and module[0].zoneout == "mine"


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"recurrent_dropout": 1.5}, ValueError, r"recurrent_dropout.* range \[0, 1\], got 1.5"),
        ({"recurrent_dropout": True}, ValueError, "recurrent_dropout.* got True"),
        ({"weight_dropout": 1.5}, ValueError, r"weight_dropout.* range \[0, 1\], got 1.5"),
        ({"recurrent_dropout": None}, ValueError, "recurrent_dropout.* got None"),
        ({"recurrent_dropout": float("nan")}, ValueError, "recurrent_dropout.* got nan"),
        ({"zoneout": -0.1}, ValueError, r"zoneout should be a number in range \[0, 1\], got -0.1"),
        ({"zoneout": (0.1, 2)}, ValueError, r"zoneout\[1\] \(for c\).* got 2"),
        ({"zoneout": ("a", 0)}, ValueError, r"zoneout\[0\] \(for h\).* got 'a'"),
        ({"zoneout": (0.1, 0.1, 0.1)}, ValueError, r"zoneout.* a pair of numbers.* got \(0.1, 0.1, 0.1\)"),
        ({"layer_norm": 1}, TypeError, "layer_norm should be a bool, got 1"),
        ({"recompute": None}, TypeError, "recompute should be a bool, got None"),
        ({"forget_bias": "1"}, ValueError, "forget_bias should be a finite number or None, got '1'"),
        ({"forget_bias": float("inf")}, ValueError, "forget_bias.* got inf"),
        ({"forget_bias": 1.0, "bias": False}, ValueError, "forget_bias needs .* biases, got bias=False"),
    ],
    ids=str,
)
def test_wrong_options(options, error, text):
    with pytest.raises(error, match=text):
        lstm_ext.LSTM(I, H, **options)


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


@pytest.mark.parametrize("bias", [True, False])
def test_parameters_of_layer_norm(bias):
    torch.manual_seed(1)
    module = lstm_ext.LSTM(I, H, 2, bias, bidirectional=True, layer_norm=True)
    torch.manual_seed(1)
    plain = nn.LSTM(I, H, 2, bias, bidirectional=True)
    weights = list(plain.state_dict())
    names = list(module.state_dict())
    assert names[: len(weights)] == weights
    assert all(torch.equal(module.state_dict()[n], w) for n, w in plain.state_dict().items())
    kinds = {"gain_ih": 4 * H, "gain_hh": 4 * H, "gain_c": H} | ({"bias_c": H} if bias else {})
    expected = {
        f"ln_{kind}_l{k}{suffix}": size
        for k in range(2)
        for suffix in ("", "_reverse")
        for kind, size in kinds.items()
    }
    assert names[len(weights) :] == list(expected)
    for name, size in expected.items():
        assert torch.equal(getattr(module, name), torch.full((size,), 0.0 if "bias" in name else 1.0))
    other = lstm_ext.LSTM(I, H, 2, bias, bidirectional=True, layer_norm=True).double()
    other.load_state_dict(module.state_dict())
    x = torch.randn(T, B, I)
    torch.testing.assert_close(other(x.double())[0].float(), module(x)[0])
    with pytest.raises(RuntimeError, match="ln_gain_ih_l0"):
        plain.load_state_dict(module.state_dict())


def test_initialisation():
    module = lstm_ext.LSTM(I, H, 2, bidirectional=True, **OPTIONS)
    torch.manual_seed(1)
    plain = nn.LSTM(I, H, 2, bidirectional=True)
    for how in ("made", "reset", "on meta"):
        torch.manual_seed(1)
        if how == "made":
            module = lstm_ext.LSTM(I, H, 2, bidirectional=True, **OPTIONS)
        elif how == "on meta":
            module = lstm_ext.LSTM(I, H, 2, bidirectional=True, **OPTIONS, device="meta").to_empty(
                device="cpu"
            )
            torch.manual_seed(1)
            module.reset_parameters()
        else:
            module.reset_parameters()
        for name, weight in plain.named_parameters():
            expected = weight.detach().clone()
            if name.startswith("bias_"):
                expected[H : 2 * H] = 1.5 if name.startswith("bias_ih") else 0.0
            assert torch.equal(getattr(module, name), expected), (how, name)
        assert all(
            (p == (0.0 if "bias" in n else 1.0)).all() for n, p in module.named_parameters() if "ln_" in n
        )


def test_copies_and_pickles_keep_the_options():
    module = lstm_ext.LSTM(I, H, 2, **OPTIONS).eval()
    x = torch.randn(T, B, I)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert repr(other) == repr(module)
        torch.testing.assert_close(other(x), module(x), rtol=0, atol=0)


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


def test_recurrent_dropout_and_zoneout_rest_in_evaluation():
    module = lstm_ext.LSTM(I, H, recurrent_dropout=0.5)
    x = torch.randn(T, B, I)
    before = torch.get_rng_state()
    plain = lstm_ext.LSTM(I, H)
    plain.load_state_dict(module.state_dict())
    torch.testing.assert_close(module.eval()(x), plain(x), rtol=0, atol=0)
    module = lstm_ext.LSTM(I, H, zoneout=(0.5, 0.5)).eval()
    before = torch.get_rng_state()
    module(x)
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


def test_seeds_repeat_and_steps_share_the_recurrent_mask():
    module = lstm_ext.LSTM(1, 400, recurrent_dropout=0.5, bias=False)
    with torch.no_grad():
        module.weight_ih_l0.zero_()
        module.weight_hh_l0.zero_()
        module.weight_hh_l0[800:1200] = torch.eye(400)  # g = tanh(h), so h stays 0 where it is dropped
    hx = torch.ones(1, 2, 400), torch.zeros(1, 2, 400)
    torch.manual_seed(1)
    output, _ = module(torch.zeros(6, 2, 1), hx)
    alive = output != 0
    assert (alive == alive[0]).all()
    assert not torch.equal(alive[0, 0], alive[0, 1])
    assert 0.4 < alive[0].float().mean() < 0.6
    torch.manual_seed(1)
    torch.testing.assert_close(module(torch.zeros(6, 2, 1), hx)[0], output, rtol=0, atol=0)


def test_evaluation_is_the_mean_of_zoneout_in_one_step():
    module = lstm_ext.LSTM(I, H, zoneout=(0.3, 0.6), dtype=torch.float64)
    x, hx = torch.randn(1, 1, I).double(), torch.randn(2, 1, 1, H).double().unbind()
    many = module(x.expand(-1, 20000, -1), tuple(s.expand(-1, 20000, -1).contiguous() for s in hx))
    expected = module.eval()(x, hx)
    for a, b in zip(many[1], expected[1], strict=True):
        torch.testing.assert_close(a.mean(1, keepdim=True), b, rtol=0, atol=0.02)


# step()


def test_step():
    module = lstm_ext.LSTM(I, H, 2, **OPTIONS).eval()
    for batch_first in (False, True):
        module.batch_first = batch_first
        x, state, outputs = torch.randn(T, B, I), None, []
        for t in range(T):
            y, state = module.step(x[t], state)
            outputs.append(y)
        whole, final = module(x.transpose(0, 1) if batch_first else x)
        whole = whole.transpose(0, 1) if batch_first else whole
        torch.testing.assert_close((torch.stack(outputs), state), (whole, final))
        y, (h, c) = module.step(x[0, 0])
        assert y.shape == (H,)
        assert h.shape == c.shape == (2, H)
        torch.testing.assert_close(y, outputs[0][0])


@pytest.mark.parametrize(
    "options",
    [
        {"dropout": 0.5},
        {"recurrent_dropout": 0.5},
        {"weight_dropout": 0.5},
        {"zoneout": 0.5},
        {"zoneout": (0, 0.5)},
    ],
    ids=str,
)
def test_step_in_training(options):
    module = lstm_ext.LSTM(I, H, 2, **options)
    with pytest.raises(RuntimeError, match=rf"LSTM.step: .* training mode with {next(iter(options))} > 0"):
        module.step(zeros(B, I))
    module.eval().step(zeros(B, I))


def test_step_refuses():
    with pytest.raises(RuntimeError, match="bidirectional"):
        lstm_ext.LSTM(I, H, bidirectional=True, layer_norm=True).step(zeros(B, I))
    module = lstm_ext.LSTM(I, H, layer_norm=True)
    with pytest.raises(TypeError, match=r"LSTM\.step: expected x_t to be a Tensor, got list"):
        module.step([0.0])
    with pytest.raises(ValueError, match="x_t to be 1D or 2D, got 3D"):
        module.step(zeros(1, B, I))
    with pytest.raises(RuntimeError, match="input_size"):
        module.step(zeros(B, I + 1))


# A call

PACKED = pack_padded_sequence(zeros(T, B, I), [5, 3, 2])
ROWS = PACKED.data.size(0)


def packed_like(rows: Tensor, batch_sizes: Tensor = PACKED.batch_sizes, order: Tensor | None = None):
    return PackedSequence(rows, batch_sizes, order, None if order is None else torch.argsort(order))


BAD = [
    ({"lengths": "abc"}, TypeError, "lengths: expected a list of integers or a Tensor, got str"),
    ({"lengths": 3}, TypeError, "lengths: .* got int"),
    ({"lengths": [1.0, 2, 3]}, TypeError, "lengths: expected integers, got float"),
    ({"lengths": [True, 2, 3]}, TypeError, "lengths: expected integers, got bool"),
    ({"lengths": [1, 2]}, ValueError, "lengths: expected 3 numbers, one a sequence, got 2"),
    ({"lengths": [1, 2, 6]}, ValueError, "lengths: .* from 0 to 5, .* got 6 for sequence 2"),
    ({"lengths": [1, -1, 3]}, ValueError, "lengths: .* from 0 to 5, .* got -1 for sequence 1"),
    ({"lengths": torch.tensor([1, 6, 3])}, ValueError, "lengths: .* got 6 for sequence 1"),
    ({"lengths": torch.tensor([1, 2, -3])}, ValueError, "lengths: .* got -3 for sequence 2"),
    ({"lengths": zeros(3)}, ValueError, "lengths: expected an integer dtype, got torch.float32"),
    ({"lengths": zeros(3).bool()}, ValueError, "lengths: expected an integer dtype, got torch.bool"),
    ({"lengths": zeros(3, 1).long()}, ValueError, r"lengths: expected shape \(3,\).* got \(3, 1\)"),
    (
        {"lengths": zeros(3, device="meta").long()},
        ValueError,
        "lengths: expected a device with numbers.* got meta",
    ),
    (
        {"mask": zeros(5, 3, device="meta").bool()},
        ValueError,
        "mask: expected a device with numbers.* got meta",
    ),
    ({"mask": [True] * 5}, TypeError, "mask: expected a Tensor, got list"),
    (
        {"mask": zeros(5, 2).bool()},
        ValueError,
        r"mask: expected shape \(5, 3\) or \(5, 3, 1\).* got \(5, 2\)",
    ),
    ({"mask": zeros(5, 3)}, ValueError, "mask: expected dtype torch.bool, got torch.float32"),
    (
        {"mask": zeros(5, 3).bool(), "lengths": [1, 2, 3]},
        ValueError,
        "^mask: expected without lengths, got both$",
    ),
    ({"resets": [1] * 5}, TypeError, "resets: expected a Tensor, got list"),
    ({"resets": packed_like(zeros(ROWS))}, TypeError, "resets: expected a Tensor, .* got PackedSequence"),
    ({"resets": zeros(3, 5)}, ValueError, r"resets: expected shape \(5, 3\) or \(5, 3, 1\).* got \(3, 5\)"),
    ({"resets": zeros(5, 3, 2)}, ValueError, r"resets: .* got \(5, 3, 2\)"),
    ({"resets": zeros(5, 3).long()}, ValueError, "resets: expected dtype torch.bool, or .* got torch.int64"),
    ({"resets": zeros(5, 3) + 0.5}, ValueError, "resets: expected the values 0 and 1, got 0.5"),
    ({"resets": zeros(5, 3) * float("nan")}, ValueError, "resets: expected the values 0 and 1, got nan"),
    ({"resets": zeros(5, 3, device="meta")}, ValueError, "resets: expected device cpu as input, got meta"),
    ({"reset_state": (zeros(1, 3, H),) * 2}, ValueError, "reset_state: expected together with resets"),
    ({"return_gates": 1}, TypeError, "return_gates should be a bool, got 1"),
    ({"return_gates": None}, TypeError, "return_gates should be a bool, got None"),
    ({"return_cell_states": 0}, TypeError, "return_cell_states should be a bool, got 0"),
    ({"return_cell_states": "yes"}, TypeError, "return_cell_states should be a bool, got 'yes'"),
]
STATE = zeros(1, B, H)
BAD_STATES = [
    (STATE, TypeError, r"reset_state: expected a tuple of two Tensors \(h, c\), got Tensor"),
    ((STATE,), TypeError, r"reset_state: .* got tuple of \(Tensor\)"),
    ((STATE, None), TypeError, r"reset_state: .* got tuple of \(Tensor, NoneType\)"),
    ((STATE, zeros(1, B, H + 1)), ValueError, r"reset_state\[1\] \(c\): .*\(1, 3, 6\).* got \(1, 3, 7\)"),
    ((zeros(2, B, H), STATE), ValueError, r"reset_state\[0\] \(h\): .*\(1, 3, 6\).* got \(2, 3, 6\)"),
    ((STATE[0], STATE), ValueError, r"reset_state\[0\] \(h\): .* got \(3, 6\)"),
    ((STATE, STATE.double()), ValueError, r"reset_state\[1\] .* dtype torch.float32 .* got torch.float64"),
    ((STATE.to("meta"), STATE), ValueError, r"reset_state\[0\] .* device cpu as input, got meta"),
]


@pytest.mark.parametrize(("arguments", "error", "text"), BAD, ids=[text for _, _, text in BAD])
def test_wrong_arguments(arguments, error, text):
    with pytest.raises(error, match=text):
        lstm_ext.LSTM(I, H)(zeros(T, B, I), **arguments)


def test_wrong_shapes_batch_first():
    module = lstm_ext.LSTM(I, H, batch_first=True)
    for name, dtype in (("mask", torch.bool), ("resets", torch.float32)):
        with pytest.raises(ValueError, match=rf"{name}: expected shape \(3, 5\) or .* got \(5, 3\)"):
            module(zeros(B, T, I), **{name: zeros(T, B, dtype=dtype)})


@pytest.mark.parametrize(("state", "error", "text"), BAD_STATES, ids=[text for _, _, text in BAD_STATES])
def test_wrong_reset_state(state, error, text):
    with pytest.raises(error, match=text):
        lstm_ext.LSTM(I, H)(zeros(T, B, I), resets=zeros(T, B), reset_state=state)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"lengths": [5, 3, 2]}, ValueError, "lengths: expected None for a PackedSequence.* got list"),
        ({"mask": zeros(T, B).bool()}, ValueError, r"mask: expected None for a PackedSequence.*\(5, 3\)"),
        ({"resets": zeros(T, B)}, TypeError, "resets: expected a PackedSequence, .* got a Tensor"),
        (
            {"resets": packed_like(zeros(ROWS - 1))},
            ValueError,
            r"resets: expected data of shape \(10,\) or \(10, 1\).* got \(9,\)",
        ),
        (
            {"resets": packed_like(zeros(ROWS), torch.tensor([3, 3, 2, 2]))},
            ValueError,
            r"resets: expected the batch_sizes of the input, \[3, 3, 2, 1, 1\], got \[3, 3, 2, 2\]",
        ),
        (
            {"resets": packed_like(zeros(ROWS), order=torch.tensor([1, 0, 2]))},
            ValueError,
            r"resets: expected the sorted_indices of the input, \[0, 1, 2\], got \[1, 0, 2\]",
        ),
        ({"resets": packed_like(zeros(ROWS) + 2)}, ValueError, "resets: expected the values 0 and 1, got 2"),
    ],
    ids=str,
)
def test_wrong_arguments_with_packed_input(arguments, error, text):
    with pytest.raises(error, match=text):
        lstm_ext.LSTM(I, H)(PACKED, **arguments)


def test_unbatched():
    module = lstm_ext.LSTM(I, H)
    x = zeros(T, I)
    for arguments, text in (
        ({"lengths": [5, 5]}, "lengths: expected 1 numbers"),
        ({"lengths": 6}, "lengths: .* got 6"),
        ({"resets": zeros(T, 2)}, r"resets: expected shape \(5,\) or \(5, 1\)"),
        ({"mask": zeros(T - 1).bool()}, r"mask: expected shape \(5,\)"),
        (
            {"resets": zeros(T), "reset_state": (STATE, STATE)},
            r"reset_state\[0\] \(h\): expected shape \(1, 6\)",
        ),
    ):
        with pytest.raises(ValueError, match=text):
            module(x, **arguments)


def test_errors_of_the_plain_layer_stay():
    """With an extra, the other arguments are checked as without."""
    theirs = nn.LSTM(I, H)
    module = lstm_ext.LSTM(I, H)
    for args in (
        (zeros(()),),
        (zeros(T, B, I + 1),),
        (zeros(T, B, I).double(),),
        (zeros(0, B, I),),
        (zeros(T, B, I), (zeros(1, 2, H), STATE)),
        (zeros(T, B, I), (zeros(B, H), zeros(B, H))),
        (zeros(T, I), (STATE, STATE)),
        (zeros(T, B, I, device="meta"),),
    ):
        errors = []
        for call in (lambda a=args: theirs(*a), lambda a=args: module(*a, return_gates=True)):
            with pytest.raises(Exception) as caught:
                call()
            errors.append((caught.type, str(caught.value)))
        assert errors[0] == errors[1]
    with pytest.raises(TypeError, match="expected input to be a Tensor or PackedSequence, got list"):
        module([1.0], return_gates=True)
    with pytest.raises(TypeError, match="expected hx to be a tuple of two Tensors"):
        module(zeros(T, B, I), STATE, return_gates=True)


def test_stateless_function():
    weights = [p.detach() for p in nn.LSTM(I, H).parameters()]
    norm = [zeros(4 * H), zeros(4 * H), zeros(H), zeros(H)]
    x = zeros(T, B, I)
    for arguments, error, text in (
        ({"norm_weights": norm[:3]}, ValueError, r"norm_weights: expected 4 tensors \(gain_ih.* got 3"),
        ({"norm_weights": zeros(4)}, TypeError, "norm_weights: expected None or a flat sequence of Tensors"),
        (
            {"norm_weights": [*norm[:3], zeros(1)]},
            ValueError,
            r"norm_weights\[3\] \(bias_c\).*\(6,\), got \(1,\)",
        ),
        (
            {"norm_weights": [n.double() for n in norm]},
            ValueError,
            r"norm_weights\[0\] \(gain_ih\): expected dtype torch.float32 as input, got torch.float64",
        ),
        ({"zoneout": 2}, ValueError, "zoneout.* got 2"),
        ({"recurrent_dropout": None}, ValueError, "recurrent_dropout.* got None"),
        ({"recompute": 1}, TypeError, "recompute should be a bool, got 1"),
        ({"lengths": [9, 9, 9]}, ValueError, "lengths: .* got 9"),
        ({"resets": zeros(1)}, ValueError, "resets: expected shape"),
    ):
        with pytest.raises(error, match=text):
            lstm_ext.functional.lstm(x, None, weights, **arguments)
    with pytest.raises(RuntimeError, match="sequence length to be larger than 0"):
        lstm_ext.functional.lstm(x[:0], None, weights, return_gates=True)


def test_resets_packed_for_more_sequences_than_there_are():
    packed = pack_padded_sequence(zeros(T, 1, I), [T])
    resets = PackedSequence(zeros(T), packed.batch_sizes, torch.arange(2), torch.arange(2))
    with pytest.raises(
        ValueError, match=r"resets: expected the sorted_indices of the input, .* shape \(1,\), got"
    ):
        lstm_ext.LSTM(I, H)(packed, resets=resets)


@pytest.mark.parametrize("name", ["weight_hh_l0", "bias_hh_l0", "ln_gain_hh_l0", "ln_bias_c_l0"])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_weight_that_is_none(name, recompute):
    module = lstm_ext.LSTM(I, H, layer_norm=True, recompute=recompute)
    setattr(module, name, None)
    with pytest.raises(TypeError, match=f"{name} is None" if "ln_" in name else "one of the weights is None"):
        module(zeros(T, B, I))


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
