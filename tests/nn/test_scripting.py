"""Models with our layers in ``torch.jit.script`` and ``torch.onnx.export``, which see torch's layers in their place."""

from __future__ import annotations

import copy
import inspect
import io
import subprocess
import sys

import pytest
import torch
from matrix.routes import Holder as Padded
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import lstm_ext

pytestmark = pytest.mark.filterwarnings(
    "ignore"
)  # torch's deprecation of TorchScript; its exporter, about itself


class Tagger(nn.Module):
    def __init__(self, kind=nn.LSTM, cell=nn.LSTMCell, **options):
        super().__init__()
        self.lstm = kind(5, 7, 2, bidirectional=True, **options)
        self.cell = cell(14, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.cell(self.lstm(x)[0].sum(0))[0]


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
    return [m for m in model.modules() if isinstance(m, (lstm_ext.LSTM, lstm_ext.LSTMCell))]


LAYERS = {
    "one layer": {},
    "three layers": {"num_layers": 3},
    "both directions": {"bidirectional": True, "num_layers": 2},
    "projection": {"proj_size": 2},
    "batch first, no bias": {"batch_first": True, "bias": False},
}


# torch.jit.script: the numbers


def arguments(lstm: nn.LSTM, kind: str) -> list[tuple]:
    sets = lstm.num_layers * (2 if lstm.bidirectional else 1)
    if kind == "unbatched":
        x: object = torch.randn(5, 3)
        shape: tuple[int, ...] = ()
    elif kind == "packed":
        x, shape = pack_sequence([torch.randn(n, 3) for n in (2, 5)], enforce_sorted=False), (2,)
    else:
        x = torch.randn(5, 2, 3)
        shape = (5 if lstm.batch_first else 2,)
    h = torch.randn(sets, *shape, lstm.proj_size or lstm.hidden_size)
    return [(x,), (x, (h, torch.randn(sets, *shape, lstm.hidden_size)))]


@pytest.mark.parametrize("kind", ["batched", "unbatched", "packed"])
@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_scripted_layer_is_torchs(options, kind):
    theirs = nn.LSTM(3, 4, **options)
    holder = Packed if kind == "packed" else Padded
    scripted = torch.jit.script(holder(lstm_ext.convert(copy.copy(theirs), as_subclass=False)))
    expected = torch.jit.script(holder(theirs))
    for args in arguments(theirs, kind):
        torch.testing.assert_close(scripted(*args), expected(*args), rtol=0, atol=0)


def test_scripted_layer_draws_torchs_dropout():
    theirs = nn.LSTM(3, 4, 3, dropout=0.5)
    scripted, expected = (
        torch.jit.script(Padded(m)) for m in (lstm_ext.convert(copy.copy(theirs), as_subclass=False), theirs)
    )
    x, results = torch.randn(5, 2, 3), []
    for model in (scripted, expected):
        torch.manual_seed(3)
        results.append(model(x)[0])
    assert torch.equal(*results)
    assert torch.equal(scripted.eval()(x)[0], expected.eval()(x)[0])


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


def test_the_model_stays_converted():
    model = lstm_ext.convert(Tagger())
    layers, x = ours_of(model), torch.randn(4, 2, 5)
    classes = [type(m) for m in layers]
    scripted = torch.jit.script(model)
    assert model.lstm is model._modules["lstm"] is layers[0] and model.cell is layers[1]
    assert [type(m) for m in layers] == classes == [lstm_ext.TorchLSTM, lstm_ext.TorchLSTMCell]
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


@pytest.mark.parametrize("how", ["convert", "plain", "patch"])
def test_layers_of_every_class(how):
    if how == "patch":
        with lstm_ext.patch():
            model = Tagger(nn.LSTM, nn.LSTMCell)
            scripted = torch.jit.script(model)
    else:
        model = lstm_ext.convert(Tagger(), as_subclass=how == "convert")
        scripted = torch.jit.script(model)
    layers = ours_of(model)
    assert len(layers) == 2
    x = torch.randn(4, 2, 5)
    torch.testing.assert_close(scripted(x), model(x))
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
    model = nn.Sequential(lstm_ext.convert(Tagger()), Unscriptable())
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


def test_convert_names_a_scripted_model():
    scripted = torch.jit.script(Padded(lstm_ext.LSTM(3, 4)))
    with pytest.raises(TypeError, match=r"compiled by torch\.jit; convert the model it was compiled from"):
        lstm_ext.convert(scripted)


LOADING = """
import sys
sys.modules["lstm_ext"] = None  # no such module
import torch
model, x, expected = torch.jit.load(sys.argv[1]), *torch.load(sys.argv[2])
torch.testing.assert_close(model(x), expected)
"""


def test_a_saved_model_needs_no_lstm_ext(tmp_path):
    model, x = lstm_ext.convert(Tagger()), torch.randn(4, 2, 5)
    torch.jit.script(model).save(tmp_path / "model.pt")
    torch.save((x, model(x).detach()), tmp_path / "values.pt")
    command = [sys.executable, "-c", LOADING, tmp_path / "model.pt", tmp_path / "values.pt"]
    subprocess.run(command, check=True, cwd=tmp_path)


@pytest.mark.parametrize(
    "option",
    [p.name for p in inspect.signature(lstm_ext.LSTM).parameters.values() if p.kind is p.KEYWORD_ONLY],
)
def test_options_are_refused_by_name(option):
    values = {
        "weight_dropout": 0.1,
        "recurrent_dropout": 0.1,
        "zoneout": 0.1,
        "cell_clip": 1.0,
        "forget_bias": 1.0,
    }
    values |= {"gate_activation": "relu", "cell_activation": "relu", "preactivation_clip": 1.0}
    value = values.get(option, True)
    model = Tagger(lstm_ext.LSTM, lstm_ext.LSTMCell, **{option: value})
    layers = ours_of(model)
    with pytest.raises(RuntimeError, match=rf"has no {option}: use torch\.export, or lstm_ext\.onnx"):
        torch.jit.script(model)
    assert ours_of(model) == layers


class Doubling(nn.LSTM):
    def forward(self, x, hx=None):
        output, states = super().forward(x, hx)
        return 2 * output, states


class Halving(lstm_ext.LSTMCell):
    def forward(self, x, hx=None):
        h, c = super().forward(x, hx)
        return h / 2, c


@pytest.mark.parametrize("make", [lambda: Doubling(3, 4), lambda: Halving(3, 4)], ids=["layer", "cell"])
def test_a_forward_of_its_own_is_refused(make):
    model = lstm_ext.convert(nn.Sequential(make()), subclasses=True)
    with pytest.raises(RuntimeError, match=r"(Doubling|Halving) has a forward of its own.*lstm_ext\.revert"):
        torch.jit.script(model)


def test_a_subclass_that_overrides_nothing():
    class Empty(lstm_ext.LSTM):
        pass

    model = nn.Sequential(Empty(3, 4))
    x = torch.randn(5, 2, 3)
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
    for args in arguments(theirs, "batched"):
        result = expected(*args)
        torch.testing.assert_close(model(*args), result, rtol=0, atol=0)
        torch.testing.assert_close(torch.jit.load(tmp_path / "model.pt")(*args), result, rtol=0, atol=0)
    ours[0](*args)  # which is still ours
    assert isinstance(ours[0], lstm_ext.LSTM) and isinstance(ours[1], lstm_ext.LSTMCell)


def test_a_script_module_takes_packed_sequences():
    theirs = nn.LSTM(3, 4, 2)
    (x,) = arguments(theirs, "packed")[0]
    model = CompiledPacked(lstm_ext.convert(copy.copy(theirs), as_subclass=False))
    torch.testing.assert_close(model(x), CompiledPacked(theirs)(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: lstm_ext.LSTM(3, 4, zoneout=0.1), r"has no zoneout: use torch\.export"),
        (lambda: lstm_ext.freeze(lstm_ext.LSTM(3, 4)), r"do not know frozen layers"),
        (lambda: lstm_ext.convert(Doubling(3, 4), subclasses=True), r"Doubling has a forward of its own"),
    ],
    ids=["option", "frozen", "subclass"],
)
def test_a_script_module_refuses_what_torch_jit_script_refuses(make, text):
    with pytest.raises(RuntimeError, match=text):
        CompiledPacked(make())
    with pytest.raises(RuntimeError, match=r"Halving has a forward of its own"):
        Compiled(nn.LSTM(3, 4), Halving(4, 4))


class WithExport(Tagger):
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


def test_a_trace_has_no_compiled_methods():
    lstm, x = lstm_ext.LSTM(3, 4), torch.randn(5, 2, 3)
    assert not hasattr(lstm, "forward__0")
    for module in (lstm, nn.utils.parametrizations.weight_norm(lstm_ext.LSTM(3, 4), "weight_hh_l0")):
        traced = torch.jit.trace(module, x)
        assert not hasattr(traced, "forward__0")
        torch.testing.assert_close(traced(x), module(x))


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


# torch.onnx.export, without lstm_ext.onnx


def exported(model: nn.Module, args: tuple, **options) -> object:
    pytest.importorskip("onnxscript")
    return torch.onnx.export(model.eval(), args, dynamo=True, verbose=False, **options).model_proto


def run_onnx(model: object, *args: torch.Tensor) -> list[torch.Tensor]:
    onnxruntime = pytest.importorskip("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    names = [i.name for i in session.get_inputs()]
    values = dict(zip(names, [x.numpy() for x in args], strict=True))
    return [torch.from_numpy(x) for x in session.run(None, values)]


def needs_several_operators(layers: int) -> None:
    if layers > 1 and torch.__version__.startswith("2.11."):
        pytest.skip("torch 2.11 cannot export two of its operators to ONNX")


@pytest.mark.tools
@pytest.mark.parametrize("has_hx", [False, True], ids=["", "hx"])
@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_onnx_export_by_torch_alone(options, has_hx):
    needs_several_operators(options.get("num_layers", 1))
    layer = lstm_ext.LSTM(3, 4, **options)
    args = arguments(layer, "batched")[has_hx]
    results = run_onnx(exported(layer, args), args[0], *(args[1] if has_hx else ()))
    with torch.no_grad():
        output, states = layer(*args)
    torch.testing.assert_close(results, [output, *states])


@pytest.mark.tools
@pytest.mark.parametrize("kind", [lstm_ext.LSTMCell, lstm_ext.TorchLSTM])
def test_onnx_export_of_others_by_torch_alone(kind):
    layer, x = kind(3, 4), torch.randn(2, 3)
    results = run_onnx(exported(layer, (x,)), x)
    with torch.no_grad():
        torch.testing.assert_close(results[0], layer(x)[0])


@pytest.mark.tools
def test_onnx_export_by_torch_alone_with_a_batch_that_changes():
    needs_several_operators(2)
    layer, batch = lstm_ext.LSTM(3, 4, 2, bidirectional=True), torch.export.Dim("batch")
    model = exported(layer, (torch.randn(5, 2, 3),), dynamic_shapes=({1: batch},))
    x = torch.randn(5, 3, 3)
    with torch.no_grad():
        torch.testing.assert_close(run_onnx(model, x)[0], layer(x)[0])


@pytest.mark.tools
def test_onnx_export_by_torch_alone_takes_options_in_basic_operators():
    layer, x = lstm_ext.LSTM(3, 4, zoneout=0.1, layer_norm=True), torch.randn(5, 2, 3)
    model = exported(layer, (x,))
    assert not any(node.op_type == "LSTM" for node in model.graph.node)
    with torch.no_grad():
        torch.testing.assert_close(run_onnx(model, x)[0], layer(x)[0])


@pytest.mark.tools
def test_onnx_export_by_torch_alone_refuses_a_time_that_changes():
    pytest.importorskip("onnxscript")
    shapes = ({0: torch.export.Dim("time")},)
    with pytest.raises(torch.onnx.OnnxExporterError, match=r"fixed number of steps.*lstm_ext\.onnx\.export"):
        exported(lstm_ext.LSTM(3, 4), (torch.randn(5, 2, 3),), dynamic_shapes=shapes)


@pytest.mark.tools
def test_onnx_export_by_torch_with_our_table():
    pytest.importorskip("onnxscript")
    from lstm_ext import onnx

    layer, x = lstm_ext.LSTM(3, 4), torch.randn(5, 2, 3)
    shapes = ({0: torch.export.Dim("time")},)
    # One of several translations, in a table of the caller's own; then none, which is another export.
    table = {**onnx.translation_table()}
    model = exported(layer, (x,), dynamic_shapes=shapes, custom_translation_table=table)
    assert sum(node.op_type == "LSTM" for node in model.graph.node) == 1
    x = torch.randn(7, 2, 3)
    with torch.no_grad():
        torch.testing.assert_close(run_onnx(model, x)[0], layer(x)[0])
        torch.testing.assert_close(run_onnx(exported(layer, (x,)), x)[0], layer(x)[0])
