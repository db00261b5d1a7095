"""lstm_ext.freeze and unfreeze of models: what they keep, and what they refuse."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lstm_models import LIBRARIES, TORCH, Doubling, Plain, WithCode, made, required
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import lstm_ext


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 37)
        self.lstm = lstm_ext.LSTM(37, 20, 2, bidirectional=True)
        self.same = self.lstm
        self.read = nn.Linear(40, 3)
        self.read.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.lstm(self.embed(x))[0])


def test_names_and_pickles() -> None:
    """A pickle is without what is packed; a shallow copy computes the same."""
    for name, text in (
        ("ours", "FrozenLSTM"),
        ("torch", "FrozenTorchLSTM"),
        ("subclass of torch's", "FrozenPlain"),
    ):
        layer, x = lstm_ext.freeze(LIBRARIES[name].LSTM(60, 90)), torch.randn(5, 60)
        assert repr(layer).startswith(f"{text}(60, 90")
        assert len(pickle.dumps(layer)) < 1.5 * sum(p.numel() * 4 for p in layer.parameters()) + 10_000
        shallow = copy.copy(layer)
        assert type(shallow) is type(layer) and torch.equal(shallow(x)[0], layer(x)[0])


def test_compiled_and_exported(tmp_path: Any) -> None:
    frozen, x = lstm_ext.freeze(Model(), torch.int8), torch.randn(6, 3, 8)
    with torch.no_grad():
        y = frozen(x)
        assert torch.equal(torch.compile(frozen, backend="aot_eager", fullgraph=True)(x), y)
        sizes = ({0: torch.export.Dim("steps", max=50), 1: torch.export.Dim("batch", max=50)},)
        program = torch.export.export(frozen, (x,), dynamic_shapes=sizes)
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        assert torch.equal(torch.export.load(file).module()(x), y)
        torch.library.opcheck(
            torch.ops.lstm_ext.lstm_layer.default,
            (torch.randn(4, 2, 37), None, None, list(frozen.lstm.parameters())[:8], None, True, True),
            {"frozen": list(frozen.lstm._frozen[0].frozen)},
            test_utils=("test_schema", "test_faketensor"),
        )
        other = lstm_ext.freeze(nn.LSTM(8, 4), torch.int8)
        with torch._dynamo.config.patch(allow_rnn=True):
            assert torch.equal(torch.compile(other, backend="aot_eager", fullgraph=True)(x)[0], other(x)[0])


@pytest.mark.tools
def test_ahead_of_time(tmp_path: Any) -> None:
    frozen, x = lstm_ext.freeze(Model(), torch.int8), torch.randn(6, 3, 8)
    with torch.no_grad():
        path = torch._inductor.aoti_compile_and_package(
            torch.export.export(frozen, (x,)), package_path=str(tmp_path / "model.pt2")
        )
        torch.testing.assert_close(torch._inductor.aoti_load_package(path)(x), frozen(x))


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Any:
    """After an error, dynamo does not compile the same code again."""
    yield
    torch._dynamo.reset()


def test_a_compiled_layer_is_copied_uncompiled() -> None:
    """What Module.compile leaves in a layer calls that layer, and its copies would call it, too."""
    layer, x = nn.LSTM(3, 4), torch.randn(5, 2, 3)
    layer.compile(backend="eager")
    frozen = lstm_ext.freeze(layer)
    with torch.no_grad():
        expected = layer(x)[0]
        layer.weight_ih_l0.zero_()
        torch.testing.assert_close(frozen(x)[0], expected)


def replaced(layer: Any, name: str = "forward", value: Any = lambda *args: 0) -> Any:
    layer.__dict__[name] = value
    return layer


def with_dropped_weights(layer: Any) -> Any:
    weight = layer._parameters.pop("weight_hh_l0")
    layer.weight_hh_l0 = weight.detach() * 2
    return layer


def with_added(layer: Any, name: str) -> Any:
    layer.register_buffer(name, torch.ones(1))
    return layer


REFUSED: dict[str, tuple[Any, str]] = {
    "forward": (replaced, "forward is replaced on the instance"),
    "a method it calls": (
        lambda layer: replaced(layer, "check_forward_args"),
        "check_forward_args is replaced on the instance",
    ),
    "pruned": (
        lambda layer: prune.l1_unstructured(layer, "weight_hh_l0", amount=0.5),
        "weight_hh_l0 is pruned; call torch.nn.utils.prune.remove on it first",
    ),
    "weight_norm": (
        lambda layer: nn.utils.weight_norm(layer, "weight_hh_l0"),
        "weight_hh_l0 is normed; call torch.nn.utils.remove_weight_norm on it first",
    ),
    "parametrized": (
        lambda layer: parametrizations.weight_norm(layer, "weight_hh_l0"),
        "weight_hh_l0 is parametrized; call torch.nn.utils.parametrize.remove_parametrizations on it first",
    ),
    "dropped": (with_dropped_weights, "weight_hh_l0 is not a plain parameter"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("cls", [nn.LSTM, lstm_ext.LSTM, lstm_ext.TorchLSTM, Plain])
@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_refused_by_name(reason: str, cls: Any) -> None:
    change, text = REFUSED[reason]
    model = nn.ModuleDict({"good": cls(3, 4), "part": nn.Sequential(nn.Linear(2, 2), cls(3, 4))})
    frozen = lstm_ext.freeze(model)
    for function, broken in (
        (lstm_ext.freeze, model),
        (lstm_ext.freeze, frozen),
        (lstm_ext.unfreeze, frozen),
    ):
        if not (broken is frozen and function is lstm_ext.unfreeze):  # the same model once more
            change(broken["part"][1])
        before = [(type(m), {*vars(m)}) for m in broken.modules()]
        with pytest.raises(TypeError) as raised:
            function(broken)
        assert "'part.1'" in str(raised.value) and text in str(raised.value)
        assert type(broken["part"][1]).__qualname__ in str(raised.value) and "good" not in str(raised.value)
        assert [(type(m), {*vars(m)}) for m in broken.modules()] == before


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (Doubling(3, 4), "Doubling.*: a subclass with code of its own"),
        (WithCode(3, 4), "WithCode.*: a subclass with code of its own"),
        (lstm_ext.convert(Doubling(3, 4), subclasses=True), "Doubling.*: a subclass with code of its own"),
        (replaced(nn.LSTM(3, 4), "frozen_weights", True), "its attribute frozen_weights has another meaning"),
        (replaced(nn.LSTM(3, 4), "step", 0), "its attribute step has another meaning"),
        (with_added(nn.LSTM(3, 4), "layer_norm"), "its attribute layer_norm has another meaning"),
        (with_added(lstm_ext.LSTM(3, 4), "packed_l0"), "its attribute packed_l0 has another meaning"),
    ],
)
def test_layers_of_another_kind_are_refused_by_name(layer: Any, text: str) -> None:
    with pytest.raises(TypeError, match=f"'1'.*{text}"):
        lstm_ext.freeze(nn.Sequential(nn.LSTM(2, 2), layer))


class Shared(nn.Sequential):
    def __deepcopy__(self, memo: Any) -> Shared:
        return self


def test_a_model_that_its_copies_share_is_refused() -> None:
    model = nn.Sequential(Shared(nn.LSTM(3, 4)))
    with pytest.raises(TypeError, match=r"does not copy '0\.0' with the model"):
        lstm_ext.freeze(model)
    assert type(model[0][0]) is nn.LSTM and all(p.requires_grad for p in model.parameters())


def test_requires_grad_is_as_it_was() -> None:
    """That of a part, of a larger model, and of what was set in between."""
    model = made("Tied", TORCH)
    wanted = required(model)
    frozen = lstm_ext.freeze(model)
    assert required(lstm_ext.unfreeze(frozen.first)) == required(model.first) != set()
    head = nn.Linear(2, 2)
    head.bias.requires_grad_(False)
    wrapper = nn.Sequential(frozen, head)
    everything = {f"0.{name}" for name in wanted} | {"1.weight"}
    for whole in (wrapper, lstm_ext.freeze(wrapper)):
        assert required(lstm_ext.unfreeze(whole)) == everything
    wrapper[0].read.weight.requires_grad_(True)
    everything |= {"0.read.weight", "0.third.weight_ih_l0", "0.again.weight_ih_l0"}
    for whole in (wrapper, lstm_ext.freeze(wrapper)):
        assert required(lstm_ext.unfreeze(whole)) == everything


@pytest.mark.parametrize(
    "options",
    [
        {"dropout": 0.5},
        {"zoneout": (0.3, 0.4), "recurrent_dropout": 0.5},
        {"layer_norm": True, "dropout": 0.9},
    ],
    ids=str,
)
def test_train_changes_no_result(options: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(3, 3), lstm_ext.LSTM(3, 4, 2, **options), nn.Dropout(0.5))
    frozen, x = lstm_ext.freeze(model), torch.randn(5, 2, 3)
    layer = frozen[1]
    expected, (y, _) = layer(x)[0], layer.step(x[0])
    assert frozen.train() is frozen and all(m.training for m in frozen.modules())
    state = torch.get_rng_state()
    assert torch.equal(layer(x)[0], expected) and torch.equal(layer.step(x[0])[0], y)
    layer(x, return_gates=True, lengths=[2, 5])
    assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(x)[0], expected)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(m.training for m in lstm_ext.unfreeze(frozen).modules())
    assert not any(m.training for m in frozen.eval().modules())


def test_other_parts_can_be_trained() -> None:
    frozen = lstm_ext.freeze(nn.Sequential(nn.Embedding(9, 3), lstm_ext.LSTM(3, 4))).train()
    head, x = nn.Linear(4, 2), torch.randint(9, (5, 2))

    def gradient(layer: Any) -> Tensor:
        head.weight.grad = None
        head(layer(frozen[0](x))[0]).sum().backward()
        return head.weight.grad

    expected = gradient(lstm_ext.unfreeze(frozen)[1])
    torch.testing.assert_close(gradient(frozen[1]), expected)
    torch.testing.assert_close(gradient(torch.compile(frozen[1], backend="aot_eager")), expected)


GRADIENTS = [{}, {"recompute": True}, {"layer_norm": True, "recompute": True}]


@pytest.mark.parametrize(
    ("compiled", "options"),
    [
        *((False, options) for options in GRADIENTS),
        *(pytest.param(True, options, marks=pytest.mark.tools) for options in GRADIENTS[:-1]),
        (True, GRADIENTS[-1]),
    ],
    ids=str,
)
def test_gradients_are_never_left_out_in_silence(compiled: bool, options: dict[str, Any]) -> None:
    layer = lstm_ext.freeze(lstm_ext.LSTM(3, 4, 2, **options)).train()
    call = torch.compile(layer, backend="aot_eager") if compiled else layer
    x, states = torch.randn(5, 2, 3), [torch.zeros(2, 2, 4) for _ in range(2)]
    leaves = {"x": x, "h": states[0], "c": states[1], "weight": layer.weight_hh_l1}
    if layer.layer_norm:
        leaves["gain"] = layer.ln_gain_c_l0
    functions: list[Any] = [lambda: call(x, states)]
    if not compiled:
        functions.append(lambda: layer.step(x[0], states))
        functions.append(lambda: layer(x, resets=torch.ones(5, 2, dtype=torch.bool), reset_state=states))
    for function in functions:
        for leaf in leaves.values():
            leaf.requires_grad_(True)
            with pytest.raises(RuntimeError, match=r"a frozen layer has no gradients.*lstm_ext\.unfreeze"):
                function()
            with torch.no_grad():
                function()
            leaf.requires_grad_(False)
        torch._dynamo.reset()  # torch 2.11 takes the graph of before, and so the error
        assert not function()[0].requires_grad


def test_other_weights_than_those_that_were_packed() -> None:
    layer, x = lstm_ext.freeze(lstm_ext.LSTM(3, 4, 2, layer_norm=True)), torch.randn(5, 2, 3)
    layer.scale = nn.Parameter(torch.ones(1))
    own, expected = dict(layer.named_parameters()), layer(x)[0]
    refused = pytest.raises(
        RuntimeError, match=r"FrozenLSTM: weight_hh_l1 is another tensor.*lstm_ext\.unfreeze"
    )

    def call(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, parameters, (x,))[0]

    for function in (call, torch.compile(call, backend="aot_eager")):
        with refused:
            function({"weight_hh_l1": torch.zeros(16, 4)}, x)
        assert torch.equal(function(own, x), expected)
        # These are read in each call.
        function({"scale": torch.zeros(1)}, x)
        assert not torch.equal(function({"ln_gain_c_l0": torch.zeros(4)}, x), expected)
    with refused:
        torch.func.functional_call(layer, {"weight_hh_l1": torch.zeros(16, 4)}, (x[0],))

    layer.weight_hh_l1 = nn.Parameter(torch.zeros(16, 4), requires_grad=False)
    for stale in (layer, copy.deepcopy(layer)):
        with refused:
            stale(x)
        with refused:
            stale(x, return_gates=True)
    thawed = lstm_ext.unfreeze(layer)(x)[0]
    torch.testing.assert_close(lstm_ext.freeze(layer)(x)[0], thawed)
    layer.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x)[0], thawed)
    layer.load_state_dict(own, assign=True)
    assert layer.weight_hh_l1 is own["weight_hh_l1"] and torch.equal(layer(x)[0], expected)
    parametrizations.weight_norm(layer, "weight_hh_l1")
    for stale in (layer, copy.deepcopy(layer)):
        with refused:
            stale.step(x[0])


# ---- what changes the weights of a frozen layer


def _loaded(layer: nn.Module, other: nn.Module) -> None:
    layer.load_state_dict(other.state_dict())


def _assigned(layer: nn.Module, other: nn.Module) -> None:
    layer.load_state_dict(other.state_dict(), assign=True)


def _set_state(layer: nn.Module, other: nn.Module) -> None:
    layer.__setstate__(lstm_ext.freeze(other, layer.frozen_weights).__getstate__())


CHANGES: dict[str, Callable[[Any, Any], Any]] = {
    "reset_parameters": lambda layer, _: layer.reset_parameters(),
    "load_state_dict": _loaded,
    "load_state_dict, assign": _assigned,
    "__setstate__": _set_state,
    "to another dtype": lambda layer, _: layer.bfloat16().float(),
    "to bfloat16": lambda layer, _: layer.bfloat16(),
    "_apply": lambda layer, _: layer._apply(lambda t: 2 * t if t.is_floating_point() else t),
    "share_memory": lambda layer, _: layer.share_memory(),
    "requires_grad_": lambda layer, _: layer.requires_grad_(False),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", [None, torch.bfloat16])
@torch.no_grad()
def test_what_changes_the_weights_packs_them(change: str, kind: torch.dtype | None) -> None:
    layer = lstm_ext.freeze(lstm_ext.LSTM(40, 70, num_layers=2).eval(), kind)
    CHANGES[change](layer, lstm_ext.LSTM(40, 70, num_layers=2).eval())
    plain = lstm_ext.unfreeze(layer)
    x = torch.randn(3, 2, 40, dtype=plain.weight_ih_l0.dtype)
    expected = lstm_ext.freeze(plain, kind)(x)[0]
    torch.testing.assert_close(layer(x)[0], expected, rtol=0, atol=0)
    torch.testing.assert_close(expected, plain(x)[0], rtol=0.05, atol=0.02)
