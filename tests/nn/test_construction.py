"""The constructor: what nn.LSTM takes and refuses, lstm_ext.LSTM takes and refuses, in the same words."""

import inspect
import io
import warnings

import pytest
import torch
from torch import nn

import lstm_ext

CONFIGS = [
    {},
    {"num_layers": 3},
    {"bias": False},
    {"bidirectional": True, "num_layers": 2},
    {"proj_size": 2},
    {
        "proj_size": 2,
        "bias": False,
        "bidirectional": True,
        "num_layers": 2,
        "batch_first": True,
        "dropout": 0.5,
    },
    {"dtype": torch.float64},
    {"dtype": torch.bfloat16, "device": "cpu"},
]


def outcome(make):
    """The error, or the module, and the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = repr(make())
        except Exception as error:
            result = (type(error), str(error))
    return result, [(w.category, str(w.message)) for w in caught]


def test_signature():
    parameters = inspect.signature(lstm_ext.LSTM).parameters
    names = [name for name, p in parameters.items() if p.kind is not p.KEYWORD_ONLY]
    assert names == [
        "input_size",
        "hidden_size",
        "num_layers",
        "bias",
        "batch_first",
        "dropout",
        "bidirectional",
        "proj_size",
        "device",
        "dtype",
    ]
    positional = (3, 4, 2, False, True, 0.25, True, 2, "cpu", torch.float64)
    ours, theirs = lstm_ext.LSTM(*positional), nn.LSTM(*positional)
    for name in (*names[:8], "mode", "training"):
        assert getattr(ours, name) == getattr(theirs, name), name
        assert type(getattr(ours, name)) is type(getattr(theirs, name)), name
    assert ours.mode == "LSTM"
    assert ours.weight_ih_l0.dtype == torch.float64


def test_defaults():
    ours, theirs = lstm_ext.LSTM(3, 4), nn.LSTM(3, 4)
    for name in list(inspect.signature(lstm_ext.LSTM).parameters)[:8]:
        assert getattr(ours, name) == getattr(theirs, name), name
        assert type(getattr(ours, name)) is type(getattr(theirs, name)), name
    keywords = {"input_size": 3, "hidden_size": 4, "num_layers": 2, "bias": False, "batch_first": True}
    keywords |= {"dropout": 1, "bidirectional": True, "proj_size": 2, "device": None, "dtype": None}
    assert repr(lstm_ext.LSTM(**keywords)) == repr(nn.LSTM(**keywords))


def test_is_an_rnn_base():
    assert isinstance(lstm_ext.LSTM(2, 3), nn.RNNBase)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_parameters_and_initial_weights(config):
    torch.manual_seed(5)
    theirs = nn.LSTM(3, 4, **config)
    state = torch.get_rng_state()
    torch.manual_seed(5)
    ours = lstm_ext.LSTM(3, 4, **config)
    assert torch.equal(torch.get_rng_state(), state)

    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    for (name, ours_p), theirs_p in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert type(ours_p) is nn.Parameter
        assert ours_p.dtype == theirs_p.dtype
        assert torch.equal(ours_p, theirs_p), name
    assert repr(ours) == repr(theirs)
    assert ours._flat_weights_names == theirs._flat_weights_names
    assert ours._all_weights == theirs._all_weights
    assert [[id(w) for w in ws] for ws in ours.all_weights] == [
        [id(getattr(ours, name)) for name in names] for names in ours._all_weights
    ]


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
    (ours, _), (theirs, _) = (outcome(lambda m=m: m(*args, **kwargs)) for m in (lstm_ext.LSTM, nn.LSTM))
    assert ours[0] is theirs[0] is TypeError
    # nn.LSTM hands everything on, so Python names another function, and counts the mode as an argument.
    kind = ours[1].removeprefix("LSTM.__init__() ").split()[:2]
    assert kind == theirs[1].removeprefix("RNNBase.__init__() ").split()[:2]


def test_meta_to_empty_and_reset():
    ours = lstm_ext.LSTM(3, 4, 2, device="meta")
    assert all(p.is_meta for p in ours.parameters())
    ours.to_empty(device="cpu")
    torch.manual_seed(3)
    ours.reset_parameters()
    torch.manual_seed(3)
    theirs = nn.LSTM(3, 4, 2)
    for ours_p, theirs_p in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(ours_p, theirs_p)
    ours(torch.randn(2, 1, 3))


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


LAYERS = {
    "one layer": {},
    "three layers, dropout": {"num_layers": 3, "dropout": 0.5},
    "both directions": {"bidirectional": True, "num_layers": 2},
    "projection": {"proj_size": 2},
    "batch first, no bias": {"batch_first": True, "bias": False},
}


class Packing(nn.Module):
    def __init__(self, lstm):
        super().__init__()
        self.lstm = lstm

    def forward(self, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
        return nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0])[0]


@pytest.mark.filterwarnings(
    "ignore"
)  # torch's own deprecation of TorchScript, and its warnings about packed data
@pytest.mark.parametrize("name", LAYERS)
def test_a_trace_has_torchs_layer(name):
    """As of torch.nn.LSTM: for any sizes, and the module is still ours."""
    model = nn.Sequential(nn.LSTM(3, 4, **LAYERS[name])).eval()
    x = torch.randn(5, 2, 3)
    expected = model(x)
    lstm_ext.convert(model)
    traced = torch.jit.trace(model, x)
    assert "aten::lstm" in str(traced.inlined_graph) and "lstm_ext::" not in str(traced.inlined_graph)
    assert type(model[0]) is lstm_ext.TorchLSTM
    torch.testing.assert_close(traced(x), expected)
    longer = torch.randn(7, 3, 3)
    torch.testing.assert_close(traced(longer), model(longer))


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.cell = nn.LSTM(3, 4), nn.LSTMCell(4, 5)

    def forward(self, x, states):
        output, (h, _) = self.lstm(x, states)
        return self.cell(output[-1])[0] + h.sum()


def test_symbolic_trace_has_a_leaf():
    """As for the modules of torch.nn: the graph calls the layer, which stays the same object."""
    model = Tagger()
    x, states = torch.randn(5, 2, 3), (torch.randn(1, 2, 4), torch.randn(1, 2, 4))
    theirs = torch.fx.symbolic_trace(model)
    lstm_ext.convert(model)
    ours = torch.fx.symbolic_trace(model)
    assert [(n.op, n.target) for n in ours.graph.nodes] == [(n.op, n.target) for n in theirs.graph.nodes]
    assert ours.lstm is model.lstm and type(ours.cell) is lstm_ext.TorchLSTMCell
    torch.testing.assert_close(ours(x, states), model(x, states))

    class WithOptions(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = lstm_ext.LSTM(3, 4)

        def forward(self, x, lengths):
            return self.lstm(x, lengths=lengths)[0]

    model, lengths = WithOptions(), torch.tensor([5, 2])
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x, lengths), model(x, lengths))


@pytest.mark.filterwarnings("ignore")
def test_a_trace_of_packed_data():
    module = Packing(lstm_ext.LSTM(3, 4))
    x, lengths = torch.randn(5, 2, 3), torch.tensor([3, 5])
    traced = torch.jit.trace(module, (x, lengths), check_trace=False)
    torch.testing.assert_close(traced(x, lengths), module(x, lengths))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in LAYERS if name != "projection"])  # ONNX has none
def test_the_older_onnx_exporter(name):
    runtime = pytest.importorskip("onnxruntime")
    model = lstm_ext.convert(nn.Sequential(nn.LSTM(3, 4, **LAYERS[name]))).eval()
    x, file = torch.randn(5, 2, 3), io.BytesIO()
    torch.onnx.export(model, (x,), file, dynamo=False, input_names=["x"])
    output = runtime.InferenceSession(file.getvalue()).run(None, {"x": x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(output), model(x)[0], rtol=1e-4, atol=1e-5)
    assert type(model[0]) is lstm_ext.TorchLSTM


@pytest.mark.filterwarnings("ignore")
def test_what_torchs_layer_does_not_have_is_not_traced():
    x = torch.randn(5, 2, 3)
    text = r"torch\.export, or lstm_ext\.onnx for ONNX"
    with pytest.raises(RuntimeError, match=text):
        torch.jit.trace(lstm_ext.LSTM(3, 4, layer_norm=True), x)
    lstm = lstm_ext.LSTM(3, 4)
    with pytest.raises(RuntimeError, match=text):
        torch.jit.trace(lambda x: lstm(x, lengths=[5, 2])[0], x)
    with pytest.raises(RuntimeError, match=text):
        torch.jit.trace(lambda x: lstm.step(x[0])[0], x)
