"""Bad arguments: the same exception and text as the installed torch, or a better one where torch's is no help."""

import warnings

import pytest
import torch
from devices import moved
from torch import nn

import lstm_ext

pytestmark = pytest.mark.devices("cpu", "cuda")


def zeros(*shape, **kwargs):
    return torch.zeros(*shape, **kwargs)


# arguments of forward, for LSTM(3, 4)
BAD = {
    "0-D": (zeros(()),),
    "1-D": (zeros(3),),
    "4-D": (zeros(2, 5, 2, 3),),
    "features": (zeros(5, 2, 4),),
    "features, unbatched": (zeros(5, 4),),
    "dtype": (zeros(5, 2, 3, dtype=torch.float64),),
    "integers": (zeros(5, 2, 3, dtype=torch.int64),),
    "complex": (zeros(5, 2, 3, dtype=torch.complex64),),
    "bool": (zeros(5, 2, 3, dtype=torch.bool),),
    "float16": (zeros(5, 2, 3, dtype=torch.float16),),
    "float16, T == 0": (zeros(0, 2, 3, dtype=torch.float16),),
    "dtype and features": (zeros(5, 2, 4, dtype=torch.float64),),
    "T == 0": (zeros(0, 2, 3),),
    "T == 0, unbatched": (zeros(0, 3),),
    "T == 0, B == 0": (zeros(0, 0, 3),),
    "T == 0, features": (zeros(0, 2, 4),),
    "h batch": (zeros(5, 2, 3), (zeros(1, 3, 4), zeros(1, 2, 4))),
    "c batch": (zeros(5, 2, 3), (zeros(1, 2, 4), zeros(1, 3, 4))),
    "h hidden": (zeros(5, 2, 3), (zeros(1, 2, 5), zeros(1, 2, 4))),
    "c hidden": (zeros(5, 2, 3), (zeros(1, 2, 4), zeros(1, 2, 5))),
    "h layers": (zeros(5, 2, 3), (zeros(2, 2, 4), zeros(1, 2, 4))),
    "hx batch-first": (zeros(5, 2, 3), (zeros(2, 1, 4), zeros(2, 1, 4))),
    "hx 2-D": (zeros(5, 2, 3), (zeros(1, 4), zeros(1, 4))),
    "c 2-D": (zeros(5, 2, 3), (zeros(1, 2, 4), zeros(1, 4))),
    "hx 3-D, unbatched": (zeros(5, 3), (zeros(1, 1, 4), zeros(1, 1, 4))),
    "hx 4-D": (zeros(5, 2, 3), (zeros(1, 1, 2, 4), zeros(1, 1, 2, 4))),
    "hx sizes, unbatched": (zeros(5, 3), (zeros(1, 5), zeros(1, 4))),
    "hx 1-D": (zeros(5, 2, 3), (zeros(4), zeros(4))),
    "hx 1-D, unbatched": (zeros(5, 3), (zeros(4), zeros(4))),
    "hx list": (zeros(5, 2, 3), [zeros(1, 3, 4), zeros(1, 3, 4)]),
    "T == 0, hx": (zeros(0, 2, 3), (zeros(1, 2, 4), zeros(1, 2, 4))),
    "T == 0 and h batch": (zeros(0, 2, 3), (zeros(1, 3, 4), zeros(1, 2, 4))),
    "features and h batch": (zeros(5, 2, 4), (zeros(1, 3, 4), zeros(1, 2, 4))),
    "dtype and h batch": (zeros(5, 2, 3, dtype=torch.float64), (zeros(1, 3, 4), zeros(1, 2, 4))),
    "B == 0 and h batch": (zeros(5, 0, 3), (zeros(1, 1, 4), zeros(1, 0, 4))),
    "hx rank and dtype": (zeros(5, 2, 3, dtype=torch.float64), (zeros(1, 4), zeros(1, 4))),
    "input device": (zeros(5, 2, 3, device="meta"),),
    "h device": (zeros(5, 2, 3), (zeros(1, 2, 4, device="meta"), zeros(1, 2, 4))),
}


def error_of(module, arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            module(*arguments)
        except Exception as error:
            return type(error), str(error)
    return None


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("name", BAD)
def test_errors_are_those_of_torch(name, batch_first, grad, device):
    arguments = moved(BAD[name], device)
    if batch_first and arguments[0].dim() == 3:
        arguments = (arguments[0].transpose(0, 1), *arguments[1:])
    with torch.set_grad_enabled(grad):
        ours = error_of(lstm_ext.LSTM(3, 4, batch_first=batch_first), arguments)
        theirs = error_of(nn.LSTM(3, 4, batch_first=batch_first), arguments)
    assert ours is not None
    assert ours == theirs


@pytest.mark.parametrize("shape", [(1, 4, 5), (1, 5, 4)], ids=str)
@pytest.mark.parametrize("place", [0, 1])
def test_a_state_of_another_size_where_batch_and_units_are_as_many(place, shape, device):
    """So each axis has to be asked for by its place."""
    states = [zeros(1, 4, 4), zeros(1, 4, 4)]
    states[place] = zeros(*shape)
    arguments = moved((zeros(5, 4, 3), tuple(states)), device)
    with torch.no_grad():
        ours, theirs = (error_of(kind(3, 4), arguments) for kind in (lstm_ext.LSTM, nn.LSTM))
    assert ours is not None
    assert ours == theirs


@pytest.mark.parametrize("kwargs", [{}, {"input": zeros(5, 2, 3), "h0": None}], ids=str)
def test_wrong_calls(kwargs, device):
    errors = []
    kwargs = moved(kwargs, device)
    for module in (lstm_ext.LSTM(3, 4), nn.LSTM(3, 4)):
        with pytest.raises(TypeError) as caught:
            module(**kwargs)
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("config", [{"proj_size": 2}, {"num_layers": 2, "bidirectional": True}], ids=str)
def test_sizes_of_states_with_projection_and_directions(config):
    for h, c in ((zeros(1, 2, 4), zeros(1, 2, 4)), (zeros(4, 2, 4), zeros(2, 2, 4))):
        arguments = (zeros(5, 2, 3), (h, c))
        ours, theirs = (
            error_of(lstm_ext.LSTM(3, 4, **config), arguments),
            error_of(nn.LSTM(3, 4, **config), arguments),
        )
        assert ours is not None
        assert ours == theirs


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (([[1.0]],), TypeError, "expected input to be a Tensor or PackedSequence, got list"),
        ((None,), TypeError, "expected input to be a Tensor or PackedSequence, got NoneType"),
        (
            (zeros(5, 2, 3), zeros(1, 2, 4)),
            TypeError,
            r"hx to be a tuple of two Tensors \(h_0, c_0\), got Tensor",
        ),
        ((zeros(5, 2, 3), zeros(2, 2, 4)), TypeError, "got Tensor"),
        (
            (zeros(5, 2, 3).numpy(),),
            TypeError,
            "expected input to be a Tensor or PackedSequence, got ndarray",
        ),
        ((zeros(5, 2, 3).to_sparse(),), RuntimeError, "input has layout Sparse, expected strided"),
        ((zeros(5, 2, 3), ()), TypeError, r"got tuple of \(\)"),
        ((zeros(5, 2, 3), (zeros(1, 2, 4),)), TypeError, r"got tuple of \(Tensor\)"),
        ((zeros(5, 2, 3), [zeros(1, 2, 4)] * 3), TypeError, r"got list of \(Tensor, Tensor, Tensor\)"),
        ((zeros(5, 2, 3), (zeros(1, 2, 4), None)), TypeError, r"got tuple of \(Tensor, NoneType\)"),
        ((zeros(5, 2, 3), 5), TypeError, "got int"),
        (
            (zeros(5, 2, 3), (zeros(1, 2, 4, dtype=torch.float64), zeros(1, 2, 4))),
            RuntimeError,
            r"hx\[0\] dtype \(torch.float64\) does not match input dtype \(torch.float32\)",
        ),
        (
            (zeros(5, 2, 3), (zeros(1, 2, 4), zeros(1, 2, 4, dtype=torch.float16))),
            RuntimeError,
            r"hx\[1\] dtype \(torch.float16\).*hx\[1\]\.to\(torch.float32\)",
        ),
        (
            (zeros(5, 2, 3), (zeros(1, 2, 4), zeros(1, 2, 4, device="meta"))),
            RuntimeError,
            "not at the same device.*input tensor at (cpu|cuda:0) and hidden tensor at meta",
        ),
    ],
)
def test_errors_better_than_torchs(arguments, error, text, device):
    with pytest.raises(error, match=text):
        lstm_ext.LSTM(3, 4)(*moved(arguments, device))


def test_weights_of_two_dtypes():
    module = lstm_ext.LSTM(3, 4)
    module.weight_hh_l0.data = module.weight_hh_l0.data.double()
    with pytest.raises((RuntimeError, ValueError), match=r"dtype|Double"):
        module(zeros(5, 2, 3))


def test_weight_of_another_shape():
    module = lstm_ext.LSTM(3, 4)
    module.weight_hh_l0 = nn.Parameter(zeros(16, 5))
    with pytest.raises((RuntimeError, ValueError)):
        module(zeros(5, 2, 3))
    module.weight_hh_l0 = nn.Parameter(zeros(16, 4))
    module.bias_hh_l0 = nn.Parameter(zeros(15))
    with pytest.raises((RuntimeError, ValueError)):
        module(zeros(5, 2, 3))


@pytest.mark.parametrize(
    "value", [zeros(16, 4), 3, "text", nn.LSTM(3, 4)], ids=["Tensor", "int", "str", "Module"]
)
def test_what_may_not_be_assigned_to_a_parameter(value, device):
    errors = []
    value = moved(value, device)
    for module in (lstm_ext.LSTM(3, 4), nn.LSTM(3, 4)):
        before = module.weight_hh_l0
        with pytest.raises((TypeError, KeyError)) as caught:
            module.weight_hh_l0 = value
        errors.append((caught.type, str(caught.value)))
        assert module.weight_hh_l0 is before
    assert errors[0] == errors[1]


@pytest.mark.parametrize("part", ["input", "module", "hx"])
def test_inference_tensors_in_training(part, device):
    """What was made in inference mode may not be saved for a backward pass."""
    errors = []
    for make in (lstm_ext.LSTM, nn.LSTM):
        module, x, hx = make(3, 4), zeros(5, 2, 3), (zeros(1, 2, 4), zeros(1, 2, 4))
        with torch.inference_mode():
            if part == "input":
                x = zeros(5, 2, 3)
            elif part == "hx":
                hx = (zeros(1, 2, 4), zeros(1, 2, 4))
            else:
                module = make(3, 4)
            module(x, hx)
        with torch.no_grad():
            module(x, hx)
        errors.append(error_of(module, (x, hx)))
    assert errors[0] is not None
    # cuDNN packs the weights first, and may stumble over that.
    assert errors[0] == errors[1] or (device == "cuda" and errors[0][0] is errors[1][0])


def weights(input_size=3, hidden=4, bias=True, proj=0, layers=1, directions=1):
    module = nn.LSTM(input_size, hidden, layers, bias, bidirectional=directions == 2, proj_size=proj)
    return [p.detach() for p in module.parameters()]


def replaced(i, tensor):
    given = weights()
    given[i] = tensor
    return given


HX = (zeros(1, 2, 4), zeros(1, 2, 4))


@pytest.mark.parametrize(
    ("arguments", "kwargs", "error", "text"),
    [
        (([1.0], None, weights()), {}, TypeError, r"input: expected a Tensor.*got list"),
        (
            (zeros(2, 3), None, weights()),
            {},
            ValueError,
            r"input: expected 3 dimensions \(time, batch.*\(2, 3\)",
        ),
        ((zeros(2, 3), None, weights()), {"batch_first": True}, ValueError, r"\(batch, time, features\)"),
        ((zeros(0, 2, 3), None, weights()), {}, RuntimeError, "sequence length to be larger than 0"),
        ((zeros(5, 2, 3), None, weights()), {"dropout": 2}, ValueError, "dropout.*got 2"),
        ((zeros(5, 2, 3), None, weights()), {"num_layers": 0}, ValueError, "num_layers.*got 0"),
        ((zeros(5, 2, 3), None, weights()[:3]), {}, ValueError, "weights: expected 4 tensors.*got 3"),
        (
            (zeros(5, 2, 3), None, weights()),
            {"bias": False},
            ValueError,
            "weights: expected 2 tensors.*got 4",
        ),
        ((zeros(5, 2, 3), None, weights()), {"num_layers": 2}, ValueError, "expected 8 tensors.*got 4"),
        ((zeros(5, 2, 3), None, weights()), {"bidirectional": True}, ValueError, "expected 8 tensors.*got 4"),
        ((zeros(5, 2, 3), None, [None] * 4), {}, TypeError, "weights: expected a flat sequence of Tensors"),
        ((zeros(5, 2, 3), None, zeros(4, 4)), {}, TypeError, "weights: expected a flat sequence of Tensors"),
        (
            (zeros(5, 2, 2), None, weights()),
            {},
            ValueError,
            r"weights\[0\] \(weight_ih_l0\).*\(16, 2\), got \(16, 3\)",
        ),
        ((zeros(5, 2, 3), None, replaced(1, zeros(15, 4))), {}, ValueError, r"weights\[1\] \(weight_hh_l0\)"),
        ((zeros(5, 2, 3), None, replaced(1, zeros(16, 3))), {}, ValueError, r"\(16, 4\) without weight_hr"),
        (
            (zeros(5, 2, 3), None, replaced(3, zeros(12))),
            {},
            ValueError,
            r"weights\[3\] \(bias_hh_l0\).*\(16,\), got",
        ),
        (
            (zeros(5, 2, 3), None, replaced(2, zeros(16, dtype=torch.float64))),
            {},
            ValueError,
            r"weights\[2\] \(bias_ih_l0\): expected dtype torch.float32 as input, got torch.float64",
        ),
        (
            (zeros(5, 2, 3), None, replaced(2, zeros(16, device="meta"))),
            {},
            ValueError,
            r"weights\[2\] \(bias_ih_l0\): expected device (cpu|cuda:0) as input, got meta",
        ),
        (
            (zeros(5, 2, 3), None, weights(layers=2, directions=2)[:-1] + [zeros(9)]),
            {"num_layers": 2, "bidirectional": True},
            ValueError,
            r"weights\[15\] \(bias_hh_l1_reverse\): expected shape \(16,\), got \(9,\)",
        ),
        (
            (zeros(5, 2, 3), zeros(2, 2, 4), weights()),
            {},
            TypeError,
            "hx: expected None or a tuple.*got Tensor",
        ),
        ((zeros(5, 2, 3), (HX[0],), weights()), {}, TypeError, r"got tuple of \(Tensor\)"),
        (
            (zeros(5, 2, 3), (HX[0][0], HX[1]), weights()),
            {},
            ValueError,
            r"hx\[0\] \(h0\).*\(1, 2, 4\), got \(2, 4\)",
        ),
        (
            (zeros(5, 2, 3), (HX[0], zeros(1, 2, 5)), weights()),
            {},
            ValueError,
            r"hx\[1\] \(c0\).*got \(1, 2, 5\)",
        ),
        (
            (zeros(5, 2, 3), HX, weights(proj=2)),
            {},
            ValueError,
            r"hx\[0\] \(h0\).*\(1, 2, 2\), got \(1, 2, 4\)",
        ),
        (
            (zeros(5, 2, 3), (HX[0].double(), HX[1]), weights()),
            {},
            ValueError,
            r"hx\[0\] \(h0\): expected dtype",
        ),
        (
            (zeros(5, 2, 3), (HX[0], HX[1].to("meta")), weights()),
            {},
            ValueError,
            r"hx\[1\] \(c0\): expected device",
        ),
    ],
)
@pytest.mark.parametrize("function", [lstm_ext.functional.lstm, lstm_ext.reference.lstm])
def test_functional_errors(function, arguments, kwargs, error, text, device):
    with pytest.raises(error, match=text):
        function(*moved(arguments, device), **kwargs)


@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l1"])
def test_a_weight_of_none_is_refused(name):
    # Torch stumbles over the dtype of the first one.
    for module, errors in (
        (nn.LSTM(3, 4, 2), (TypeError, AttributeError)),
        (lstm_ext.LSTM(3, 4, 2), TypeError),
    ):
        setattr(module, name, None)
        with pytest.raises(errors):
            module(zeros(5, 2, 3))


def test_another_number_of_layers_is_refused():
    module = lstm_ext.LSTM(3, 4, 2)
    module.num_layers = 1
    with pytest.raises(RuntimeError, match="num_layers is 1, but the module was made with 2 layers"):
        module(zeros(5, 2, 3))
