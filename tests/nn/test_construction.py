"""The constructors: what those of torch make, ours make. What they refuse is in tests/matrix/option_faults.py."""

import inspect
import warnings

import pytest
import torch
from torch import nn

import lstm_ext

SIZES = [
    "input_size",
    "hidden_size",
    "num_layers",
    "bias",
    "batch_first",
    "dropout",
    "bidirectional",
    "proj_size",
]
FULL = {
    "proj_size": 2,
    "bias": False,
    "bidirectional": True,
    "num_layers": 2,
    "batch_first": True,
    "dropout": 0.5,
}
GRU_FULL = {name: value for name, value in FULL.items() if name != "proj_size"}
CALLS = [
    ("LSTM", (3, 4), {}),
    ("LSTM", (3, 4), {"num_layers": 3}),
    ("LSTM", (3, 4), {"bias": False}),
    ("LSTM", (3, 4), {"bidirectional": True, "num_layers": 2}),
    ("LSTM", (3, 4), {"proj_size": 2}),
    ("LSTM", (3, 4), FULL),
    ("LSTM", (3, 4), {"dtype": torch.float64}),
    ("LSTM", (3, 4), {"dtype": torch.bfloat16, "device": "cpu"}),
    ("LSTM", (3, 4, 2, False, True, 0.25, True, 2, "cpu", torch.float64), {}),
    ("LSTM", (), {"input_size": 3, "hidden_size": 4, **FULL, "dropout": 1, "device": None, "dtype": None}),
    ("GRU", (3, 4), {}),
    ("GRU", (3, 4), {**GRU_FULL, "dtype": torch.bfloat16}),
    ("GRU", (3, 4, 2, False, True, 0.25, True), {"device": "cpu", "dtype": torch.float64}),
    ("GRU", (), {"input_size": 3, "hidden_size": 4, **GRU_FULL, "dropout": 1, "device": None, "dtype": None}),
    ("GRUCell", (3, 4), {}),
    ("GRUCell", (3, 4, False, "cpu", torch.float64), {}),
    ("GRUCell", (0, 4), {}),
    ("LSTMCell", (3, 4), {}),
    ("LSTMCell", (3, 4, False), {}),
    ("LSTMCell", (3, 4, True, "cpu", torch.float64), {}),
    ("LSTMCell", (1, 1), {"bias": True, "dtype": torch.bfloat16}),
    ("LSTMCell", (), {"input_size": 3, "hidden_size": 5}),
    ("LSTMCell", (0, 4), {}),
    ("LSTMCell", (3, 4, None), {}),
]


def seeded(make, *args, **kwargs):
    torch.manual_seed(5)
    made = make(*args, **kwargs)
    return made, torch.get_rng_state()


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(("kind", "args", "kwargs"), CALLS, ids=str)
def test_same_module_from_the_same_seed(kind, args, kwargs):
    (ours, state), (theirs, expected) = (seeded(getattr(m, kind), *args, **kwargs) for m in (lstm_ext, nn))
    assert torch.equal(state, expected)
    assert isinstance(ours, (nn.RNNBase, nn.RNNCellBase)) and repr(ours) == repr(theirs)
    public = {name: value for name, value in vars(theirs).items() if not name.startswith("_")}
    for name, value in public.items():
        assert getattr(ours, name) == value and type(getattr(ours, name)) is type(value), name
    assert list(ours._parameters) == list(theirs._parameters)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert type(a) is nn.Parameter and a.dtype == b.dtype and torch.equal(a, b)
    if kind in ("LSTM", "GRU"):
        assert ours._flat_weights_names == theirs._flat_weights_names
        assert ours._all_weights == theirs._all_weights
        weights = [[id(getattr(ours, name)) for name in names] for names in ours._all_weights]
        assert [[id(w) for w in ws] for ws in ours.all_weights] == weights
    else:
        assert vars(ours).keys() == vars(theirs).keys()


@pytest.mark.parametrize(("kind", "sizes"), [("LSTM", SIZES), ("GRU", SIZES[:-1])])
def test_signature(kind, sizes):
    parameters = inspect.signature(getattr(lstm_ext, kind)).parameters
    names = [name for name, p in parameters.items() if p.kind is not p.KEYWORD_ONLY]
    assert names == [*sizes, "device", "dtype"] and getattr(lstm_ext, kind)(3, 4).mode == kind


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((), {}),
        ((3,), {}),
        ((3, 4, 1, True, False, 0.0, False, 0, None, None, 5), {}),
        ((3, 4), {"input_size": 3}),
        ((3, 4), {"layers": 2}),
    ],
    ids=str,
)
def test_wrong_calls(args, kwargs):
    texts = []
    for kind in (lstm_ext.LSTM, nn.LSTM):
        with pytest.raises(TypeError) as caught:
            kind(*args, **kwargs)
        # nn.LSTM hands everything on, so Python names another function, and counts the mode as an argument.
        texts.append(str(caught.value).partition("__init__() ")[2].split()[:2])
    assert texts[0] == texts[1]


@pytest.mark.devices("cpu", "cuda")
@pytest.mark.parametrize(
    ("kind", "args"), [("LSTM", (3, 4, 2)), ("LSTMCell", (3, 4)), ("GRU", (3, 4, 2)), ("GRUCell", (3, 4))]
)
def test_meta_to_empty_and_reset(kind, args, device):
    ours = getattr(lstm_ext, kind)(*args, device="meta")
    assert all(p.is_meta for p in ours.parameters()) and ours(torch.zeros(2, 3, device="meta"))[0].is_meta
    ours.to_empty(device=device)
    seeded(ours.reset_parameters)
    theirs, _ = seeded(getattr(nn, kind), *args)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    ours(torch.randn(2, 3))


def test_defaults_of_dtype_and_device():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert {p.dtype for p in lstm_ext.LSTM(3, 4).parameters()} == {torch.float64}
    finally:
        torch.set_default_dtype(before)
    with torch.device("meta"):
        assert all(p.is_meta for p in lstm_ext.LSTM(3, 4).parameters())
        assert not lstm_ext.LSTM(3, 4, device="cpu").weight_hh_l0.is_meta


def test_skip_init():
    """torch.nn.utils.skip_init draws no random numbers."""
    state = torch.get_rng_state()
    ours = nn.utils.skip_init(lstm_ext.LSTM, 3, 4, 2)
    assert torch.equal(torch.get_rng_state(), state)
    ours.load_state_dict(nn.LSTM(3, 4, 2).state_dict())
    assert torch.isfinite(ours(torch.randn(2, 1, 3))[0]).all()


def test_flatten_parameters_does_nothing():
    lstm = lstm_ext.LSTM(3, 4)
    pointers = [p.data_ptr() for p in lstm.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert lstm.flatten_parameters() is None
        lstm(torch.randn(2, 1, 3))
    assert pointers == [p.data_ptr() for p in lstm.parameters()]
