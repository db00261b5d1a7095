"""Models with our layers in ``torch.jit`` and ``torch.fx``, which see the layers of torch.

The numbers of dense calls are those of the routes TorchScript and trace of tests/matrix.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import subprocess
import sys
from typing import Any

import pytest
import torch
from lstm_models import LIBRARIES, Doubling, LayerAndCell, OurHalving, PlainOurs
from matrix.routes import Holder as Padded
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import lstm_ext
from lstm_ext.options import OPTIONS

# torch's deprecation of TorchScript
pytestmark = pytest.mark.filterwarnings("ignore")


class Packed(nn.Module):
    def __init__(self, lstm: nn.Module):
        super().__init__()
        self.lstm = lstm

    def forward(
        self, x: PackedSequence, hx: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        output, states = self.lstm(x, hx)
        return output.data, states


def ours_of(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, lstm_ext.nn.torch_layers.OURS)]


LAYERS = {
    "one layer": {},
    "three layers": {"num_layers": 3},
    "both directions": {"bidirectional": True, "num_layers": 2},
    "projection": {"proj_size": 2},
    "batch first, no bias": {"batch_first": True, "bias": False},
}


# torch.jit.script: calls


def arguments(lstm: nn.LSTM) -> list[tuple]:
    sets = lstm.num_layers * (2 if lstm.bidirectional else 1)
    rows = 5 if lstm.batch_first else 2
    h = torch.randn(sets, rows, lstm.proj_size or lstm.hidden_size)
    x = torch.randn(5, 2, 3)
    return [(x,), (x, (h, torch.randn(sets, rows, lstm.hidden_size)))]


@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_packed_data_of_a_scripted_layer(options):
    theirs = nn.LSTM(3, 4, **{**options, "batch_first": False})
    scripted = torch.jit.script(Packed(lstm_ext.convert(copy.copy(theirs), as_subclass=False)))
    expected = torch.jit.script(Packed(theirs))
    packed = pack_sequence([torch.randn(n, 3) for n in (2, 5)], enforce_sorted=False)
    for args in ((packed,), (packed, arguments(theirs)[1][1])):
        torch.testing.assert_close(scripted(*args), expected(*args), rtol=0, atol=0)


def test_errors_of_a_scripted_layer_are_torchs():
    theirs = nn.LSTM(3, 4)
    scripted, expected = (
        torch.jit.script(Padded(m)) for m in (lstm_ext.convert(copy.copy(theirs), as_subclass=False), theirs)
    )
    states = torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)
    for args in (
        (torch.zeros(3),),
        (torch.zeros(5, 2, 4),),
        (torch.zeros(5, 3, 3), states),
        (torch.zeros(5, 3), states),
        (torch.zeros(5, 2, 3), (states[0][0], states[1])),
    ):
        texts = []
        for model in (scripted, expected):
            with pytest.raises(torch.jit.Error) as error:
                model(*args)
            texts.append(str(error.value).strip().splitlines()[-1])
        assert texts[0] == texts[1]


@pytest.mark.parametrize("cell", [lstm_ext.LSTMCell, lstm_ext.TorchLSTMCell])
@pytest.mark.parametrize("bias", [True, False])
def test_scripted_cell_is_torchs(cell, bias):
    ours = cell(3, 4, bias=bias)
    theirs = nn.LSTMCell(3, 4, bias=bias)
    theirs.load_state_dict(ours.state_dict())
    scripted = torch.jit.script(ours)
    x, hx = torch.randn(2, 3), (torch.randn(2, 4), torch.randn(2, 4))
    for args in ((x,), (x, hx), (x[0],), (x[0], (hx[0][0], hx[1][0]))):
        torch.testing.assert_close(scripted(*args), theirs(*args), rtol=0, atol=0)
        torch.testing.assert_close(ours(*args), theirs(*args))


# torch.jit.script: the model


@pytest.mark.parametrize("gru", [False, True])
@pytest.mark.parametrize("kind", ["ours", "ours as torch's", "patched"])
def test_the_model_stays_converted(kind, gru):
    library = LIBRARIES[kind].of_gru() if gru else LIBRARIES[kind]
    model, x = LayerAndCell(library.LSTM, library.LSTMCell), torch.randn(4, 2, 5)
    layers = ours_of(model)
    with lstm_ext.patch() if kind == "patched" else contextlib.nullcontext():
        scripted = torch.jit.script(model)
    assert model.lstm is model._modules["lstm"] is layers[0] and model.cell is layers[1]
    assert [type(m) for m in layers] == list(library)[:2]
    torch.testing.assert_close(scripted(x), model(x))
    torch.testing.assert_close(torch.jit.freeze(copy.deepcopy(scripted).eval())(x), model(x))
    # The same weights, and not copies of them.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    torch.testing.assert_close(scripted(x), model(x))
    scripted(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))
    torch.testing.assert_close(torch.jit.script(lstm_ext.revert(model))(x), scripted(x), rtol=0, atol=0)


class Containers(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Sequential(lstm_ext.LSTM(3, 3))
        self.several = nn.ModuleList([lstm_ext.LSTM(3, 3), lstm_ext.LSTM(3, 3)])
        self.named = nn.ModuleDict({"a": lstm_ext.LSTM(3, 3)})
        self.again = self.several[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.one(x)[0]
        for layer in self.several:
            x = layer(x)[0]
        return self.again(self.named["a"](x)[0])[0]


def test_containers_and_a_layer_at_two_places():
    model = Containers()
    before = dict(model.named_modules(remove_duplicate=False))
    scripted = torch.jit.script(model)
    after = dict(model.named_modules(remove_duplicate=False))
    assert before.keys() == after.keys() and all(after[name] is before[name] for name in before)
    assert model.again is model.several[0]
    x = torch.randn(4, 2, 3)
    torch.testing.assert_close(scripted(x), model(x))


def test_a_layer_on_its_own_has_the_methods_of_torchs():
    ours = lstm_ext.LSTM(3, 4)
    scripted, theirs = torch.jit.script(ours), torch.jit.script(lstm_ext.revert(copy.copy(ours)))
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(scripted.forward__0(x), theirs.forward__0(x), rtol=0, atol=0)
    packed = pack_sequence([torch.randn(n, 3) for n in (5, 2)])
    torch.testing.assert_close(scripted.forward__1(packed), theirs.forward__1(packed), rtol=0, atol=0)
    assert list(scripted.state_dict()) == list(theirs.state_dict())


class Unscriptable(nn.Module):
    def forward(self, x):
        return print(*x, sep=x)


def test_the_model_stays_converted_after_a_failure():
    model = nn.Sequential(lstm_ext.convert(LayerAndCell()), Unscriptable())
    layers = ours_of(model)
    with pytest.raises(Exception, match=r"sep|print|eyword"):
        torch.jit.script(model)
    assert ours_of(model) == layers and model[0].lstm is layers[0]
    model[0](torch.randn(4, 2, 5))


def test_a_scripted_layer_is_still_copied_and_converted():
    model = nn.Sequential(nn.LSTM(3, 4))
    x = torch.randn(5, 2, 3)
    torch.jit.script(model)
    lstm_ext.convert(model)  # what torch.jit.script left in torch's layer is of no use to ours
    torch.testing.assert_close(torch.jit.script(model)(x)[0], model(x)[0])
    torch.testing.assert_close(copy.deepcopy(model)(x)[0], model(x)[0])
    lstm_ext.revert(model)
    assert type(model[0]) is nn.LSTM and "__overloads__" not in vars(model[0])
    torch.testing.assert_close(torch.jit.script(model)(x)[0], model(x)[0])


LOADING = """
import sys
sys.modules["lstm_ext"] = None  # no such module
import torch
model, x, expected = torch.jit.load(sys.argv[1]), *torch.load(sys.argv[2])
torch.testing.assert_close(model(x), expected)
"""


def test_a_saved_model_needs_no_lstm_ext(tmp_path):
    model, x = lstm_ext.convert(LayerAndCell()), torch.randn(4, 2, 5)
    torch.jit.script(model).save(tmp_path / "model.pt")
    torch.save((x, model(x).detach()), tmp_path / "values.pt")
    command = [sys.executable, "-c", LOADING, tmp_path / "model.pt", tmp_path / "values.pt"]
    subprocess.run(command, check=True, cwd=tmp_path)


def test_a_subclass_that_overrides_nothing():
    model, x = nn.Sequential(PlainOurs(3, 4)), torch.randn(5, 2, 3)
    torch.testing.assert_close(torch.jit.script(model)(x)[0], model(x)[0])


# torch.jit.ScriptModule


class Compiled(torch.jit.ScriptModule):
    """It compiles itself when it is made."""

    def __init__(self, lstm: nn.Module, cell: nn.Module):
        super().__init__()
        self.lstm = lstm
        self.rest = nn.Sequential(cell)

    @torch.jit.script_method
    def forward(
        self, x: torch.Tensor, hx: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        output, states = self.lstm(x, hx)
        return self.rest(output[0])[0], states


class CompiledPacked(torch.jit.ScriptModule):
    def __init__(self, lstm: nn.Module):
        super().__init__()
        self.lstm = lstm

    @torch.jit.script_method
    def forward(self, x: PackedSequence) -> torch.Tensor:
        return self.lstm(x)[0].data


@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("as_subclass", [False, True])
def test_a_script_module_holds_our_layers(options, as_subclass, tmp_path):
    theirs = nn.LSTM(3, 4, **options)
    cell = nn.LSTMCell((options.get("proj_size") or 4) * (2 if theirs.bidirectional else 1), 5)
    expected = Compiled(theirs, cell)
    ours = nn.ModuleList([copy.deepcopy(theirs), copy.deepcopy(cell)])
    model = Compiled(*lstm_ext.convert(ours, as_subclass=as_subclass))
    assert list(model.state_dict()) == list(expected.state_dict())
    model.save(tmp_path / "model.pt")
    for args in arguments(theirs):
        result = expected(*args)
        torch.testing.assert_close(model(*args), result, rtol=0, atol=0)
        torch.testing.assert_close(torch.jit.load(tmp_path / "model.pt")(*args), result, rtol=0, atol=0)
    ours[0](*args)  # which is still ours
    assert isinstance(ours[0], lstm_ext.LSTM) and isinstance(ours[1], lstm_ext.LSTMCell)


def test_a_script_module_takes_packed_sequences():
    theirs = nn.LSTM(3, 4, 2)
    x = pack_sequence([torch.randn(n, 3) for n in (2, 5)], enforce_sorted=False)
    model = CompiledPacked(lstm_ext.convert(copy.copy(theirs), as_subclass=False))
    torch.testing.assert_close(model(x), CompiledPacked(theirs)(x), rtol=0, atol=0)


def of_its_own(cls: type) -> Any:
    return lstm_ext.convert(cls(3, 3), subclasses=True)


VALUES = {
    "cell_clip": 1.0,
    "forget_bias": 1.0,
    "preactivation_clip": 1.0,
    "layer_norm": True,
    "peephole": True,
}
VALUES |= {"gate_activation": "relu", "cell_activation": "relu", "coupled_gates": True, "recompute": True}
REFUSED = {
    **{
        name: (
            lambda name=name: lstm_ext.LSTM(3, 3, **{name: VALUES.get(name, 0.1)}),
            rf"has no {name}: use torch\.ex",
        )
        for name in OPTIONS
    },
    "frozen": (lambda: lstm_ext.freeze(lstm_ext.LSTM(3, 3)), "do not know frozen layers"),
    "layer": (lambda: of_its_own(Doubling), r"Doubling has a forward of its own.*lstm_ext\.revert"),
    "cell": (lambda: of_its_own(OurHalving), r"OurHalving has a forward of its own.*lstm_ext\.revert"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused_by_name(kind):
    make, text = REFUSED[kind]
    model = nn.Sequential(nn.Identity(), make())
    layer = model[1]
    with pytest.raises(RuntimeError, match=text):
        torch.jit.script(model)
    assert model[1] is layer
    with pytest.raises(RuntimeError, match=text):
        Compiled(nn.Identity(), layer) if kind == "cell" else Compiled(layer, nn.Identity())


class WithExport(LayerAndCell):
    @torch.jit.export
    def twice(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def test_a_trace_of_a_model_with_exported_methods_compiles_no_layer():
    model, x = lstm_ext.convert(WithExport()), torch.randn(4, 2, 5)
    traced = torch.jit.trace(model, x)
    torch.testing.assert_close(traced(x), model(x))
    torch.testing.assert_close(traced.twice(x), 2 * x)
    assert not hasattr(model.lstm, "forward__0") and not hasattr(traced.lstm, "forward__0")


def test_a_look_at_all_attributes_prepares_nothing():
    for layer in (lstm_ext.LSTM(3, 4, zoneout=0.1), lstm_ext.LSTMCell(3, 4)):
        before = dict(vars(layer))
        inspect.getmembers(layer)
        assert vars(layer).keys() == before.keys()


def test_the_cells_own_interface_is_as_it_was():
    parameters = inspect.signature(lstm_ext.LSTMCell.forward).parameters
    assert list(parameters) == ["self", "input", "hx"]


# torch.jit.trace and torch.fx


@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_a_trace_has_torchs_layer(options):
    """As of torch.nn.LSTM: for any sizes, and the module is still ours."""
    model = lstm_ext.convert(nn.Sequential(nn.LSTM(3, 4, **options))).eval()
    traced = torch.jit.trace(model, torch.randn(5, 2, 3))
    assert "aten::lstm" in str(traced.inlined_graph) and "lstm_ext::" not in str(traced.inlined_graph)
    assert type(model[0]) is lstm_ext.TorchLSTM
    longer = torch.randn(7, 3, 3)
    torch.testing.assert_close(traced(longer), model(longer))


def test_a_trace_has_no_compiled_methods():
    lstm, x = lstm_ext.LSTM(3, 4), torch.randn(5, 2, 3)
    assert not hasattr(lstm, "forward__0")
    for module in (lstm, nn.utils.parametrizations.weight_norm(lstm_ext.LSTM(3, 4), "weight_hh_l0")):
        traced = torch.jit.trace(module, x)
        assert not hasattr(traced, "forward__0")
        torch.testing.assert_close(traced(x), module(x))


class Packing(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = lstm_ext.LSTM(3, 4)

    def forward(self, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
        return nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0])[0]


def test_a_trace_of_packed_data():
    module, x, lengths = Packing(), torch.randn(5, 2, 3), torch.tensor([3, 5])
    traced = torch.jit.trace(module, (x, lengths), check_trace=False)
    torch.testing.assert_close(traced(x, lengths), module(x, lengths))


def test_what_torchs_layer_does_not_have_is_not_traced():
    x, lstm = torch.randn(5, 2, 3), lstm_ext.LSTM(3, 4)
    for function in (
        lstm_ext.LSTM(3, 4, layer_norm=True),
        lambda x: lstm(x, lengths=[5, 2])[0],
        lambda x: lstm.step(x[0])[0],
    ):
        with pytest.raises(RuntimeError, match=r"torch\.export, or lstm_ext\.onnx for ONNX"):
            torch.jit.trace(function, x)


class WithStates(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.cell = nn.LSTM(3, 4), nn.LSTMCell(4, 5)

    def forward(self, x, states):
        output, (h, _) = self.lstm(x, states)
        return self.cell(output[-1])[0] + h.sum()


class WithLengths(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = lstm_ext.LSTM(3, 4)

    def forward(self, x, lengths):
        return self.lstm(x, lengths=lengths)[0]


def test_symbolic_trace_has_a_leaf():
    """As for the modules of torch.nn: the graph calls the layer, which stays the same object."""
    model, x = WithStates(), torch.randn(5, 2, 3)
    states = torch.randn(1, 2, 4), torch.randn(1, 2, 4)
    theirs = torch.fx.symbolic_trace(model)
    ours = torch.fx.symbolic_trace(lstm_ext.convert(model))
    assert [(n.op, n.target) for n in ours.graph.nodes] == [(n.op, n.target) for n in theirs.graph.nodes]
    assert ours.lstm is model.lstm and type(ours.cell) is lstm_ext.TorchLSTMCell
    torch.testing.assert_close(ours(x, states), model(x, states))
    model, lengths = WithLengths(), torch.tensor([5, 2])
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x, lengths), model(x, lengths))


@pytest.mark.parametrize("cell", [lstm_ext.LSTMCell, lstm_ext.TorchLSTMCell])
def test_traced_cell(cell):
    layer, x = cell(3, 4), torch.randn(2, 3)
    traced = torch.jit.trace(layer, x)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    theirs = torch.jit.trace(lstm_ext.revert(copy.copy(layer)), x)
    kinds, expected = ([n.kind() for n in t.inlined_graph.nodes()] for t in (traced, theirs))
    assert kinds == expected
    torch.testing.assert_close(torch.jit.load(file)(x), layer(x))
    graph = torch.fx.symbolic_trace(nn.Sequential(layer))
    assert [n.op for n in graph.graph.nodes] == ["placeholder", "call_module", "output"]
    torch.testing.assert_close(graph(x), layer(x))
    torch.testing.assert_close(torch.jit.script(graph)(x)[0], layer(x)[0])
