"""`reference` and `functional`: their arguments, dtypes and shapes; tests/matrix has the numbers."""

import pytest
import torch
from torch import nn

import lstm_ext
from lstm_ext import functional, reference

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


def test_one_layer():
    theirs = nn.LSTM(5, 7, bidirectional=True, dtype=torch.float64)
    x, hx = torch.randn(6, 4, 5, dtype=torch.float64), torch.zeros(2, 2, 4, 7, dtype=torch.float64).unbind()
    weights = list(theirs.parameters())
    result = reference.lstm_layer(x, *hx, weights, None, True, True)
    pointers = {t.untyped_storage().data_ptr() for t in [*result, x, *hx]}
    assert len(pointers) == 5  # the states share one
    for a, b in zip(reference.lstm_layer(x, None, None, weights, None, True, True), result, strict=True):
        assert torch.equal(a, b)


def test_functional_has_the_arguments_of_torch():
    """Positionally: (input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first)."""
    theirs = nn.LSTM(5, 7, 2, bidirectional=True, batch_first=True)
    hx = torch.randn(2, 4, 6, 7).unbind()
    arguments = (torch.randn(6, 4, 5), hx, list(theirs.parameters()), True, 2, 0.0, False, True, True)
    output, states = functional.lstm(*arguments)
    for a, b in zip((output, *states), torch.lstm(*arguments), strict=True):
        torch.testing.assert_close(a, b)


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
