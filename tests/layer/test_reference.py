"""The oracle itself: the reference against torch.nn.LSTM in float64, and functional.lstm against the module."""

import pytest
import torch
from judge import relative_error
from torch import nn

import lstm_ext
from lstm_ext import functional, reference

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

CONFIGS = [
    {},
    {"bias": False},
    {"bidirectional": True},
    {"proj_size": 3},
    {"bidirectional": True, "proj_size": 3},
    {"bidirectional": True, "proj_size": 3, "bias": False},
    {"num_layers": 3},
    {"num_layers": 2, "bidirectional": True, "proj_size": 3, "batch_first": True},
    {"num_layers": 3, "dropout": 0.4, "batch_first": True},
]
NAMES = ("num_layers", "bias", "batch_first", "dropout", "bidirectional")


def make(config, with_hx):
    theirs = nn.LSTM(5, 7, **config, dtype=torch.float64)
    x = torch.randn(6, 4, 5, dtype=torch.float64, requires_grad=True)
    sets = theirs.num_layers * (2 if theirs.bidirectional else 1)
    batch = 6 if theirs.batch_first else 4
    hx = None
    if with_hx:
        hx = tuple(
            torch.randn(sets, batch, size, dtype=torch.float64, requires_grad=True)
            for size in (theirs.proj_size or 7, 7)
        )
    return theirs, x, hx


def flat(result):
    output, (h_n, c_n) = result
    return [output, h_n, c_n]


@pytest.mark.parametrize("with_hx", [False, True])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("function", [reference.lstm, functional.lstm], ids=["reference", "functional"])
def test_against_torch(function, config, with_hx):
    theirs, x, hx = make(config, with_hx)
    weights = list(theirs.parameters())
    leaves = [x, *(hx or ()), *weights]
    torch.manual_seed(1)
    expected = flat(theirs(x, hx))
    grads = [torch.randn_like(t) for t in expected]
    expected += torch.autograd.grad(expected, leaves, grads)
    torch.manual_seed(1)
    result = flat(function(x, hx, weights, **{name: getattr(theirs, name) for name in NAMES}, training=True))
    result += torch.autograd.grad(result, leaves, grads)
    for a, b in zip(result, expected, strict=True):
        assert relative_error(a, b) <= 64 * torch.finfo(torch.float64).eps


@pytest.mark.parametrize("config", [c for c in CONFIGS if "num_layers" not in c], ids=str)
def test_one_layer(config):
    theirs, x, hx = make(config, True)
    bias, bidirectional = theirs.bias, theirs.bidirectional
    weights = list(theirs.parameters())
    result = reference.lstm_layer(x, *hx, weights, None, bias, bidirectional)
    for a, b in zip(result, flat(theirs(x, hx)), strict=True):
        torch.testing.assert_close(a, b)
    pointers = {t.untyped_storage().data_ptr() for t in [*result, x, *hx]}
    assert len(pointers) == 6
    zeros = [torch.zeros_like(s) for s in hx]
    for a, b in zip(
        reference.lstm_layer(x, None, None, weights, None, bias, bidirectional),
        reference.lstm_layer(x, *zeros, weights, None, bias, bidirectional),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_by_hand():
    """One unit, one feature, two steps, with numbers that can be followed on paper."""
    sigmoid, tanh = torch.sigmoid, torch.tanh
    w_ih = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    w_hh = torch.tensor([[0.5], [-0.5], [0.25], [-0.25]])
    b = torch.tensor([0.1, 0.2, 0.3, 0.4])
    x = torch.tensor([1.0, -1.0])
    h = c = torch.tensor(0.0)
    for x_t in x:
        i = sigmoid(1 * x_t + 0.5 * h + 0.1)
        f = sigmoid(2 * x_t - 0.5 * h + 0.2)
        g = tanh(3 * x_t + 0.25 * h + 0.3)
        o = sigmoid(4 * x_t - 0.25 * h + 0.4)
        c = f * c + i * g
        h = o * tanh(c)
    output, (h_n, c_n) = reference.lstm(x.view(2, 1, 1), None, [w_ih, w_hh, b, torch.zeros(4)])
    torch.testing.assert_close(output[1, 0, 0], h)
    torch.testing.assert_close(h_n[0, 0, 0], h)
    torch.testing.assert_close(c_n[0, 0, 0], c)


def test_second_derivatives():
    weights = [
        p.detach() for p in nn.LSTM(2, 3, bidirectional=True, proj_size=2, dtype=torch.float64).parameters()
    ]
    x = torch.randn(2, 1, 2, dtype=torch.float64, requires_grad=True)
    hx = [torch.randn(2, 1, size, dtype=torch.float64, requires_grad=True) for size in (2, 3)]

    def layer(*args):
        return reference.lstm_layer(*args, weights, None, True, True)

    assert torch.autograd.gradgradcheck(layer, (x, *hx))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.complex64], ids=str)
def test_any_dtype(dtype):
    weights = [p.to(dtype) for p in nn.LSTM(5, 7, 2, bidirectional=True).parameters()]
    x = torch.randn(6, 4, 5, dtype=dtype, requires_grad=True)
    output, (h_n, c_n) = reference.lstm(x, None, weights, num_layers=2, bidirectional=True)
    assert output.dtype == h_n.dtype == c_n.dtype == dtype
    output.abs().sum().backward()
    assert x.grad.dtype == dtype


def test_meta():
    weights = list(nn.LSTM(5, 7, device="meta").parameters())
    for function in (reference.lstm, functional.lstm):
        output, (h_n, c_n) = function(torch.empty(6, 4, 5, device="meta"), None, weights)
        assert (output.shape, h_n.shape, c_n.shape) == ((6, 4, 7), (1, 4, 7), (1, 4, 7))
        assert output.is_meta


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_functional_is_the_module(config):
    module = lstm_ext.LSTM(5, 7, **config)
    x = torch.randn(6, 4, 5)
    weights = tuple(module.parameters())
    torch.manual_seed(1)
    result = functional.lstm(
        x, None, weights, **{name: getattr(module, name) for name in NAMES}, training=True
    )
    torch.manual_seed(1)
    for a, b in zip(flat(result), flat(module(x)), strict=True):
        assert torch.equal(a, b)


def test_functional_has_the_arguments_of_torch():
    """Positionally: (input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first)."""
    theirs, x, hx = make({"num_layers": 2, "bidirectional": True, "batch_first": True}, True)
    weights = list(theirs.parameters())
    arguments = (x, hx, weights, True, 2, 0.0, False, True, True)
    output, h_n, c_n = torch.lstm(*arguments)
    for a, b in zip(flat(functional.lstm(*arguments)), (output, h_n, c_n), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l0", "bias_hh_l0_reverse", "weight_hr_l0"])
def test_shapes_of_weights_are_checked(name):
    """Also where no kernel looks at them: with forward-mode AD, on meta tensors."""
    module = lstm_ext.LSTM(3, 4, bidirectional=True, proj_size=2)
    weight = getattr(module, name)
    for shape in ((*weight.shape[:-1], 1), (*weight.shape[:-1], weight.size(-1) + 1)):
        setattr(module, name, torch.nn.Parameter(torch.ones(shape)))
        x = torch.randn(5, 2, 3)
        with pytest.raises(RuntimeError, match="has shape"):
            module(x)
        with pytest.raises(RuntimeError, match="has shape"):
            torch.func.jvp(lambda x: module(x)[0], (x,), (x,))
        with pytest.raises(RuntimeError, match="has shape"):
            torch.func.functional_call(
                module, {k: v.to("meta") for k, v in module.named_parameters()}, (x.to("meta"),)
            )
