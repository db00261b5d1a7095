"""Crossing over: from_torch, to_torch and the per-gate matrices of lectures and notebooks."""

import copy
import gc

import pytest
import torch
from judge import relative_error
from torch import nn
from torch.nn.utils import parametrizations, prune

import lstm_ext

pytestmark = [
    pytest.mark.devices("cpu", "cuda"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]

CONFIGS = [
    {},
    {
        "num_layers": 2,
        "dropout": 0.25,
        "bidirectional": True,
        "proj_size": 2,
        "bias": False,
        "batch_first": True,
    },
    {"dtype": torch.float64},
    {"device": "meta"},
]
WAYS = {
    "from_torch": (lstm_ext.from_torch, nn.LSTM, lstm_ext.LSTM),
    "to_torch": (lstm_ext.to_torch, lstm_ext.LSTM, nn.LSTM),
}


@pytest.fixture(params=WAYS)
def way(request):
    return WAYS[request.param]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_same_parameters(way, config):
    convert, source, target = way
    module = source(3, 4, **config)
    state = torch.get_rng_state()
    new = convert(module)
    assert torch.equal(torch.get_rng_state(), state)
    assert type(new) is target
    assert repr(new) == repr(module)
    assert list(dict(new.named_parameters())) == list(dict(module.named_parameters()))
    for ours, theirs, flat in zip(new.parameters(), module.parameters(), new._flat_weights, strict=True):
        assert ours is theirs
        assert flat is ours
    if config.get("device") != "meta":
        x = torch.randn(5, 2, 3, dtype=config.get("dtype"))
        torch.testing.assert_close(new.eval()(x), module.eval()(x))


def test_training_and_requires_grad(way):
    convert, source, _ = way
    module = source(3, 4).eval()
    module.weight_hh_l0.requires_grad_(False)
    new = convert(module)
    assert not new.training
    assert [p.requires_grad for p in new.parameters()] == [True, False, True, True]
    assert convert(module.train()).training


def test_optimizer_stays_valid(way):
    convert, source, _ = way
    module = source(3, 4)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    new = convert(module)
    before = new.weight_hh_l0.detach().clone()
    new(torch.randn(5, 2, 3))[0].sum().backward()
    optimizer.step()
    assert not torch.equal(new.weight_hh_l0, before)


def test_there_and_back():
    module = nn.LSTM(3, 4, 2, dropout=0.5, batch_first=True).eval()
    back = lstm_ext.to_torch(lstm_ext.from_torch(module))
    assert type(back) is nn.LSTM
    assert all(a is b for a, b in zip(back.parameters(), module.parameters(), strict=True))
    copy.deepcopy(back)(torch.randn(2, 5, 3))


def test_tied_weights(way):
    convert, source, _ = way
    module = source(4, 4)
    module.weight_hh_l0 = module.weight_ih_l0
    new = convert(module)
    assert new.weight_hh_l0 is new.weight_ih_l0
    assert len(list(new.parameters())) == 3


def test_hooks_are_carried(way):
    convert, source, _ = way
    module = source(3, 4)
    seen = []
    handles = [
        module.register_forward_pre_hook(lambda m, args: seen.append(("pre", m))),
        module.register_forward_pre_hook(
            lambda m, args, kwargs: seen.append(("pre kw", m)), with_kwargs=True
        ),
        module.register_forward_hook(lambda m, args, out: seen.append(("forward", m))),
        module.register_forward_hook(
            lambda m, args, kw, out: seen.append(("forward kw", m)), with_kwargs=True
        ),
        module.register_full_backward_hook(lambda m, grad_in, grad_out: seen.append(("backward", m))),
        module.register_full_backward_pre_hook(lambda m, grad_out: seen.append(("backward pre", m))),
        module.register_state_dict_pre_hook(lambda m, prefix, keep_vars: seen.append(("state_dict", m))),
        module.register_load_state_dict_post_hook(lambda m, keys: seen.append(("load", m))),
    ]
    new = convert(module)
    del module
    gc.collect()

    def use():
        x = torch.randn(5, 2, 3, requires_grad=True)
        new(x)[0].sum().backward()
        new.load_state_dict(new.state_dict())

    use()
    names = ["pre", "pre kw", "forward", "forward kw", "backward pre", "backward", "state_dict", "load"]
    assert [name for name, _ in seen] == names
    assert all(m is new for _, m in seen)
    for handle in handles:
        handle.remove()
    use()
    assert len(seen) == len(names)


def test_attributes_of_the_user_are_carried(way):
    convert, source, _ = way
    module = source(3, 4)
    module.tag = ["mine"]
    assert convert(module).tag is module.tag


def test_other_types_are_refused(way):
    convert, source, target = way
    package = "torch.nn" if source is nn.LSTM else "lstm_ext"
    name = f"{package}.LSTM or {package}.LSTMCell"
    other = lstm_ext.TorchLSTM(3, 4) if source is nn.LSTM else nn.LSTM(3, 4)
    for wrong in (target(3, 4), other, nn.GRU(3, 4), None):
        with pytest.raises(TypeError, match=f"expected a {name}, got .*{type(wrong).__name__}"):
            convert(wrong)

    class Mine(source):
        pass

    with pytest.raises(TypeError, match="this Mine: it is a subclass of"):
        convert(Mine(3, 4))


def replace_forward(module):
    module.forward = lambda *args: None


def add_weight_norm(module):
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(module, "weight_hh_l0")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda m: parametrizations.weight_norm(m, "weight_hh_l0"), "weight_hh_l0 is parametrized"),
        (add_weight_norm, "weight_hh_l0 is not a plain parameter"),
        (
            lambda m: prune.l1_unstructured(m, "weight_ih_l0", 0.5),
            "weight_ih_l0 is not a plain parameter",
        ),
        (lambda m: setattr(m, "bias_hh_l0", None), "bias_hh_l0 is not a plain parameter"),
        (lambda m: m.register_parameter("extra", nn.Parameter(torch.ones(1))), "additional parameter, extra"),
        (lambda m: m.register_buffer("steps", torch.ones(1)), "additional buffer, steps"),
        (lambda m: m.add_module("norm", nn.LayerNorm(4)), "additional submodule, norm"),
        (lambda m: m.register_load_state_dict_pre_hook(lambda *args: None), "load_state_dict pre-hooks"),
        (replace_forward, "forward is replaced"),
        (lambda m: m.compile(), "_compiled_call_impl is replaced"),
    ],
)
def test_what_cannot_be_carried_is_refused(way, change, text):
    convert, source, _ = way
    module = source(3, 4)
    change(module)
    with pytest.raises(TypeError, match=text):
        convert(module)


BATCH, STEPS, FEATURES, HIDDEN = 30, 10, 20, 10


def notebook_parameters(dtype=torch.float64):
    """As a lecture's notebook makes them: one W, U and b for each gate."""
    generator = torch.Generator().manual_seed(4)
    shapes = {"W": (FEATURES, HIDDEN), "U": (HIDDEN, HIDDEN), "b": (1, HIDDEN)}
    return {
        f"{letter}_{gate}": torch.randn(
            shapes[letter], generator=generator, dtype=torch.float64, device="cpu"
        )
        .to(torch.get_default_device(), dtype)
        .mul(0.3)
        for gate in "ifgo"
        for letter in "WUb"
    }


def test_from_gates_on_the_notebook_case():
    p = {name: value.requires_grad_() for name, value in notebook_parameters().items()}
    x = torch.randn(BATCH, STEPS, FEATURES, dtype=torch.float64, requires_grad=True)
    h = torch.zeros(BATCH, HIDDEN, dtype=torch.float64)
    c = torch.zeros(BATCH, HIDDEN, dtype=torch.float64)
    outputs = []
    for t in range(STEPS):
        i = torch.sigmoid(x[:, t] @ p["W_i"] + h @ p["U_i"] + p["b_i"])
        f = torch.sigmoid(x[:, t] @ p["W_f"] + h @ p["U_f"] + p["b_f"])
        g = torch.tanh(x[:, t] @ p["W_g"] + h @ p["U_g"] + p["b_g"])
        o = torch.sigmoid(x[:, t] @ p["W_o"] + h @ p["U_o"] + p["b_o"])
        c = f * c + i * g
        h = o * torch.tanh(c)
        outputs.append(h)
    expected = torch.stack(outputs, dim=1)

    module = lstm_ext.from_gates(**p, batch_first=True)
    output, (h_n, c_n) = module(x)
    limit = 64 * torch.finfo(torch.float64).eps
    assert output.shape == (BATCH, STEPS, HIDDEN)
    assert relative_error(output, expected) <= limit
    assert relative_error(h_n[0], h) <= limit
    assert relative_error(c_n[0], c) <= limit

    grad = torch.randn_like(expected)
    by_hand = dict(zip(["x", *p], torch.autograd.grad(expected, [x, *p.values()], grad), strict=True))
    ours = [x, module.weight_ih_l0, module.weight_hh_l0, module.bias_ih_l0, module.bias_hh_l0]
    d_x, d_W, d_U, d_b, d_b_hh = torch.autograd.grad(output, ours, grad)
    assert relative_error(d_x, by_hand["x"]) <= limit
    for k, gate in enumerate("ifgo"):
        rows = slice(k * HIDDEN, (k + 1) * HIDDEN)
        assert relative_error(d_W[rows].T, by_hand[f"W_{gate}"]) <= limit
        assert relative_error(d_U[rows].T, by_hand[f"U_{gate}"]) <= limit
        assert relative_error(d_b[rows], by_hand[f"b_{gate}"][0]) <= limit
    assert relative_error(d_b_hh, d_b) <= limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_from_gates_parameters(dtype):
    p = notebook_parameters(dtype)
    module = lstm_ext.from_gates(**p)
    assert not module.batch_first
    assert type(module) is lstm_ext.LSTM
    for weight, shape in zip(module.parameters(), [(40, 20), (40, 10), (40,), (40,)], strict=True):
        assert type(weight) is nn.Parameter
        assert weight.shape == shape
        assert weight.dtype == dtype
        assert weight.requires_grad
        assert weight.is_contiguous()
    assert not module.bias_hh_l0.any()
    assert torch.equal(module.weight_ih_l0[10:20], p["W_f"].T)

    before = module.bias_ih_l0.detach().clone()
    p["b_i"].zero_()
    assert torch.equal(module.bias_ih_l0, before)

    flat = {
        name: value[0] if name.startswith("b") else value
        for name, value in notebook_parameters(dtype).items()
    }
    assert torch.equal(lstm_ext.from_gates(**flat).bias_ih_l0, module.bias_ih_l0)


@pytest.mark.devices("cpu")
@pytest.mark.parametrize(
    ("name", "wrong", "error", "text"),
    [
        ("W_i", torch.zeros(20), ValueError, r"W_i: expected shape \(features, hidden\), got \(20,\)"),
        ("W_i", torch.zeros(0, 10), ValueError, r"W_i: expected shape \(features, hidden\), got \(0, 10\)"),
        ("W_f", torch.zeros(10, 20), ValueError, r"W_f: expected shape \(20, 10\), got \(10, 20\)"),
        ("U_g", torch.zeros(20, 10), ValueError, r"U_g: expected shape \(10, 10\), got \(20, 10\)"),
        ("b_o", torch.zeros(10, 1), ValueError, r"b_o: expected shape \(10,\) or \(1, 10\), got \(10, 1\)"),
        (
            "b_o",
            torch.zeros(10, dtype=torch.float64),
            ValueError,
            r"b_o: expected dtype torch.float32 as W_i",
        ),
        ("U_o", torch.zeros(10, 10, device="meta"), ValueError, r"U_o: expected device cpu as W_i, got meta"),
        ("b_i", [0.0] * 10, TypeError, r"b_i: expected a Tensor, got list"),
        ("W_i", torch.zeros(20, 10, dtype=torch.int64), TypeError, r"W_i: expected a floating-point dtype"),
    ],
)
def test_from_gates_errors(name, wrong, error, text):
    with pytest.raises(error, match=text):
        lstm_ext.from_gates(**(notebook_parameters(torch.float32) | {name: wrong}))


def test_from_gates_takes_keywords_only():
    with pytest.raises(TypeError, match="positional"):
        lstm_ext.from_gates(*notebook_parameters().values())
    p = notebook_parameters()
    del p["U_f"]
    with pytest.raises(TypeError, match="U_f"):
        lstm_ext.from_gates(**p)
