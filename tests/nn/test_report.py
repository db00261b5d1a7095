"""Nothing found is not silence: ``report``, what ``convert`` says where it finds nothing, and what it refuses."""

from __future__ import annotations

import functools
import re
import warnings

import pytest
import torch
import torch.distributed as dist
from lstm_models import Doubling
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import lstm_ext

I, H = 3, 4


def test_report():
    model = nn.ModuleDict(
        {
            "ours": lstm_ext.LSTM(2, 3),
            "theirs": nn.LSTM(2, 3),
            "cell": nn.LSTMCell(2, 3),
            "subclass": Doubling(2, 3),
            "gru": nn.GRU(2, 3),
            "rnn": nn.RNN(2, 3),
        }
    )
    scripted = torch.jit.script(nn.Sequential(nn.LSTM(2, 3)))
    model["scripted"] = scripted
    entries = {entry.name: entry for entry in lstm_ext.report(model)}
    assert list(entries)[:4] == ["ours", "theirs", "cell", "subclass"] and "rnn" not in entries
    assert entries["ours"].ours and entries["ours"].reason == ""
    assert {entries[name].reason for name in ("theirs", "cell", "gru")} == {"not converted"}
    assert "subclasses=True" in entries["subclass"].reason
    assert "compiled by torch.jit" in entries["scripted.0"].reason
    assert str(entries["ours"]) == "ours (lstm_ext.LSTM): ours"
    assert str(lstm_ext.report(nn.LSTM(2, 3))[0]).startswith("the model itself (torch.nn.LSTM): not ours:")
    with pytest.raises(TypeError, match=r"report: expected model to be a torch\.nn\.Module, got int"):
        lstm_ext.report(3)
    hidden = Hiding([nn.LSTM(2, 3), lstm_ext.LSTM(2, 3)])
    assert [str(entry) for entry in lstm_ext.report(hidden)] == [
        "held[0] (torch.nn.LSTM): not ours: held outside the model's table of modules: convert does not "
        "see it",
        "held[1] (lstm_ext.LSTM): ours: held outside the model's table of modules: convert does not see it",
    ]


# What is in no table of modules


class Hiding(nn.Module):
    def __init__(self, held):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.__dict__["held"] = held


class Graph(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(I, H)

    def forward(self, x):
        return self.lstm(x)[0]


HIDDEN = {
    "list": (lambda: [nn.Linear(1, 1), nn.LSTM(I, H)], "held[1]"),
    "tuple": (lambda: (nn.LSTMCell(I, H),), "held[0]"),
    "dict": (lambda: {"a": nn.LSTM(I, H)}, "held['a']"),
    "list of lists": (lambda: [[nn.LSTM(I, H)]], "held[0][0]"),
    "model in a list": (lambda: [nn.Sequential(nn.ReLU(), nn.LSTM(I, H))], "held[0].1"),
    "attribute": (lambda: nn.LSTM(I, H), "held"),
    "GRU": (lambda: [nn.GRUCell(I, H)], "held[0]"),
}


@pytest.mark.parametrize("kind", HIDDEN)
def test_hidden_lstms_are_named(kind):
    make, path = HIDDEN[kind]
    model = nn.ModuleDict({"inner": Hiding(make())})
    with pytest.warns(UserWarning) as caught:
        assert lstm_ext.convert(model) is model
    assert len(caught) == 1 and caught[0].filename == __file__
    text = str(caught[0].message)
    assert "convert: found no LSTM, GRU or cell of torch.nn to convert in this ModuleDict" in text
    assert text.endswith(f"{'inner.' + path!r} is held outside the model's table of modules")


def test_a_model_whose_modules_are_not_torchs():
    """AgileRL's networks return a dict of some of them."""

    class Network(nn.Module):
        def __init__(self, **parts):
            super().__init__()
            self.parts = nn.ModuleDict(parts)

        def modules(self):
            return {"evolvable": 1}

    model = Network(lstm=nn.LSTM(I, H), inner=Network(cell=nn.LSTMCell(I, H)))
    lstm_ext.convert(model, skip=["parts.inner"])
    entries = lstm_ext.report(model)
    assert [(e.name, e.ours) for e in entries] == [("parts.lstm", True), ("parts.inner.parts.cell", False)]
    assert lstm_ext.freeze(model).parts["lstm"]._frozen
    with pytest.warns(UserWarning, match=r"It looked at 3 modules: 1 Network, 1 ModuleDict, 1 Linear\."):
        lstm_ext.convert(Network(out=nn.Linear(I, H)))


class LSTMOfItsOwn(nn.Module):
    pass


def test_the_warning_says_what_the_model_has_and_what_comes_near():
    layers = [nn.Linear(2, 2), nn.Linear(2, 2), nn.RNN(2, 2), nn.RNNCell(2, 2), LSTMOfItsOwn()]
    model = nn.ModuleDict({"body": nn.Sequential(*layers), "twice": Doubling(I, H)})
    with pytest.warns(UserWarning) as caught:
        lstm_ext.convert(model, skip=["twice"])
    text, *places = str(caught[0].message).split("\n  ")
    assert (
        "looked at 8 modules: 2 Linear, 1 ModuleDict, 1 Sequential, 1 RNN, 1 RNNCell, 1 LSTMOfItsOwn" in text
    )
    assert re.search(r"lists and dicts \(use .*exported graphs .*built at the first call", text)
    assert places[0].startswith(
        "'twice' (lstm_models.Doubling) is skipped: a subclass of torch.nn.LSTM, whose own"
    )
    assert places[1:] == [
        "'body.2' (torch.nn.RNN) is a recurrent layer of another kind",
        "'body.3' (torch.nn.RNNCell) is a recurrent layer of another kind",
        f"'body.4' ({__name__}.LSTMOfItsOwn) is called LSTM and not derived from torch.nn.LSTM or LSTMCell",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        lstm_ext.convert(model, subclasses=True)
        lstm_ext.convert(model, subclasses=True)


def test_the_warning_is_short_for_large_models():
    kinds = [nn.ReLU, nn.Tanh, nn.Sigmoid, nn.Identity, nn.GELU, nn.SiLU, nn.Mish, nn.ELU]
    with pytest.warns(UserWarning) as caught:
        lstm_ext.convert(nn.Sequential(*[kind() for kind in kinds], *[nn.RNN(2, 2) for _ in range(10)]))
    text = str(caught[0].message)
    assert (
        "looked at 19 modules: 10 RNN, 1 Sequential, 1 ReLU," in text
        and "1 SiLU and 2 of other classes. " in text
    )
    assert text.count("another kind") == 8 and text.endswith("\n  and 2 more of these kinds")


def test_an_exported_graph_is_named():
    program = torch.export.export(Graph().eval(), (torch.randn(5, 2, I),)).module()
    with pytest.warns(
        UserWarning, match=r"\n  'net' is a graph, in which a layer is an operator and no module"
    ):
        lstm_ext.convert(nn.ModuleDict({"net": program}))


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.LSTM(I, H),
        lambda: nn.Sequential(lstm_ext.LSTM(I, H)),
        lambda: Hiding([lstm_ext.LSTM(I, H)]),
        lambda: torch.compile(nn.Sequential(nn.LSTMCell(I, H)), backend="eager"),
    ],
)
def test_no_warning_where_there_is_one(make):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        lstm_ext.convert(make())
        lstm_ext.convert(nn.Sequential(nn.LSTM(I, H)), skip=["0"])
        lstm_ext.revert(nn.Linear(2, 2))


# Subclasses whose forward does not reach ours


def helper(layer, x, hx):
    return nn.LSTM.forward(layer, x, hx)


def twice(function):
    @functools.wraps(function)
    def wrapper(self, x, hx=None):
        return function(self, function(self, x)[0][..., : self.input_size], hx)

    return wrapper


class Helped(nn.LSTM):
    def forward(self, x, hx=None):
        return self.computed(x, hx)

    def computed(self, x, hx):
        return super().forward(x, hx)


class Decorated(nn.LSTM):
    @twice
    def forward(self, x, hx=None):
        return super().forward(x, hx)


class Inner(nn.LSTM):
    @torch.no_grad()
    def forward(self, x, hx=None):
        results = [super(Inner, self).forward(y[None]) for y in x]
        return results[-1]


class Grandchild(Doubling):
    def forward(self, x, hx=None):
        return super().forward(x + 1, hx)


class Own(nn.LSTM):
    def forward(self, x, hx=None):
        h = torch.tanh(x @ self.weight_ih_l0.T)
        return self.finished(h), hx

    def finished(self, h):
        return h[..., : self.hidden_size]


class OwnsGrandchild(Own):
    def forward(self, x, hx=None):
        return super().forward(x + 1, hx)


class Explicit(nn.LSTM):
    def forward(self, x, hx=None):
        return nn.LSTM.forward(self, x, hx)


class ByHelper(nn.LSTM):
    def forward(self, x, hx=None):
        return helper(self, x, hx)


class ByName(nn.LSTM):
    def forward(self, x, hx=None):
        return getattr(super(), "for" + "ward")(x, hx)


class OwnCell(nn.LSTMCell):
    forward = functools.partialmethod(lambda self, x, hx=None: (x, x))


REACHES = {
    True: [Doubling, Helped, Decorated, Inner, Grandchild],
    False: [Own, OwnsGrandchild],
    None: [Explicit, ByHelper, ByName, OwnCell],
}
REASONS = {
    True: "ours",
    False: "not ours: its forward does not reach ours",
    None: "ours: it is not known whether its forward reaches ours",
}


@pytest.mark.parametrize(
    ("kind", "reaches"), [(k, r) for r, kinds in REACHES.items() for k in kinds], ids=lambda v: str(v)
)
def test_report_says_whether_a_forward_reaches_ours(kind, reaches):
    model = lstm_ext.convert(nn.Sequential(kind(I, I)), subclasses=True)
    (entry,) = lstm_ext.report(model)
    assert f": {REASONS[reaches]}" in str(entry)
    assert entry.ours is (reaches is not False) and (entry.reason == "") is (reaches is True)
    if reaches is not None:
        called = []
        ours = lstm_ext.LSTM.forward

        def note(*args, **kwargs):
            called.append(True)
            return ours(*args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lstm_ext.LSTM, "forward", note)
            model[0](torch.randn(5, 2, I))
        assert bool(called) is reaches


# FSDP


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("subclasses", [False, True])
def test_a_layer_that_fully_shard_has_taken(one_process, subclasses):
    model = nn.Sequential(nn.LSTM(I, H), nn.LSTM(H, H))
    fully_shard(model[1], mesh=one_process)
    with pytest.raises(
        TypeError, match=r"'1' .*FSDPLSTM\): FSDP \(fully_shard\) has.*convert before fully_shard"
    ):
        lstm_ext.convert(model, subclasses=subclasses)
    assert type(model[0]) is nn.LSTM
    ours = lstm_ext.convert(nn.Sequential(nn.LSTM(I, H)))
    fully_shard(ours[0], mesh=one_process)
    with pytest.raises(TypeError, match=r"'0' .*revert before fully_shard"):
        lstm_ext.revert(ours)
    assert [entry.ours for entry in lstm_ext.report(ours)] == [True]
    ours(torch.randn(5, 2, I))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("use_orig_params", [False, True])
def test_fsdp1_wraps_and_a_layer_inside_is_converted(one_process, use_orig_params):
    model, x = nn.Sequential(nn.LSTM(I, H)), torch.randn(5, 2, I)
    expected = model(x)[0]
    model = FullyShardedDataParallel(model, use_orig_params=use_orig_params, device_id=torch.device("cpu"))
    lstm_ext.convert(model)
    torch.testing.assert_close(model(x)[0], expected)
    model(x)[0].sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert str(lstm_ext.report(model)[0]).endswith(": ours")
