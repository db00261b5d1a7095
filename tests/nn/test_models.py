"""Each model with each operation: what becomes of its modules, parameters, hooks and numbers."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from lstm_models import (
    BACK,
    COMPUTED,
    CONVERSIONS,
    COPIES,
    LIBRARIES,
    MODELS,
    TORCH,
    call,
    hidden_weight,
    made,
    required,
    snapshot,
)
from torch import Tensor, nn
from torch.nn.utils import parametrize

import lstm_ext

CLOSE = {"rtol": 1e-10, "atol": 1e-11}


def classes_of(model: nn.Module) -> dict[str, type]:
    modules = model.named_modules(remove_duplicate=False)
    return {name: parametrize.type_before_parametrizations(m) for name, m in modules}


def attributes_of(model: nn.Module) -> dict[str, Any]:
    return {name: vars(m).keys() for name, m in model.named_modules()}


def run(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """The output and the gradients."""
    model.zero_grad()
    output = call(model, x)
    output.square().sum().backward()
    grads = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return output.detach(), grads


def change_parameters(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5).add_(0.1)


@pytest.mark.parametrize("way", CONVERSIONS)
@pytest.mark.parametrize("name", MODELS)
def test_conversions(name: str, way: str) -> None:
    """The model is the same objects in other classes, and the one that is built with these classes."""
    function, source, target = CONVERSIONS[way]
    # Which of the two modes it is does not matter to a conversion; spectral_norm changes its weight in training.
    training = not MODELS[name].computed and "plain" in way
    model, built, twin = (
        made(name, library).double().train(training) for library in (source, target, source)
    )
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    expected, before, classes = run(model, x), snapshot(model), classes_of(model)
    state_dict, random_state = model.state_dict(keep_vars=True), torch.get_rng_state()

    assert function(model) is model
    assert torch.equal(torch.get_rng_state(), random_state)
    assert snapshot(model) == before
    assert classes_of(model) == classes_of(built) and repr(model) == repr(built)
    assert attributes_of(model) == attributes_of(built)
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(state_dict) and all(after[n] is state_dict[n] for n in after)
    function(model)  # again: nothing is left to do
    assert snapshot(model) == before

    run(built, x)
    torch.testing.assert_close(run(model, x), run(built, x), rtol=0, atol=0)
    torch.testing.assert_close(run(model, x), expected, **CLOSE)
    change_parameters(model)
    changed = run(model, x)
    assert not torch.equal(changed[0], expected[0])
    BACK[source](model)
    assert classes_of(model) == classes and attributes_of(model) == attributes_of(twin)
    torch.testing.assert_close(run(model, x), changed, **CLOSE)
    run(twin, x)
    change_parameters(twin)
    torch.testing.assert_close(run(model, x), run(twin, x), rtol=0, atol=0)


@pytest.mark.parametrize("way", CONVERSIONS)
@pytest.mark.parametrize("name", [n for n, model in MODELS.items() if model.computed in COMPUTED])
def test_computed_weights_after_a_conversion(name: str, way: str) -> None:
    """A layer is copied where torch copies it, and the computation can be taken away."""
    function, source, target = CONVERSIONS[way]
    module, x = made(name, source).double().eval(), torch.randn(3, 5, 6, dtype=torch.float64)
    function(module)
    same = copy.deepcopy(module) if parametrize.is_parametrized(module) else None
    expected = call(module, x)
    if same is not None:
        assert type(module).__name__ == f"Parametrized{'LSTM' if MODELS[name].layers else 'LSTMCell'}"
        torch.testing.assert_close(call(same, x), expected)
    COMPUTED[MODELS[name].computed][1](module, hidden_weight(module))
    assert type(module) is (target.LSTM if MODELS[name].layers else target.LSTMCell)
    torch.testing.assert_close(call(module, x), expected, **CLOSE)


# --- copies


def first_names(named: dict[str, Any]) -> dict[str, str]:
    """For each name, the first name of the same object."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(value), name) for name, value in named.items()}


def check_classes(same: nn.Module, model: nn.Module, is_frozen: bool) -> None:
    for ours, theirs in zip(same.modules(), model.modules(), strict=True):
        if not (is_frozen and isinstance(theirs, (nn.LSTM, nn.GRU, lstm_ext.LSTM, lstm_ext.GRU))):
            assert type(ours) is type(theirs)
            continue
        is_lstm = theirs.mode == "LSTM"
        assert isinstance(ours, lstm_ext.FrozenLSTM if is_lstm else lstm_ext.FrozenGRU)
        of_torch = isinstance(theirs, nn.LSTM if is_lstm else nn.GRU)
        assert isinstance(ours, nn.LSTM if is_lstm else nn.GRU) == of_torch
        assert isinstance(ours, lstm_ext.FrozenTorchLSTM if is_lstm else lstm_ext.FrozenTorchGRU) == of_torch
        kind = type(theirs)
        assert kind in (nn.LSTM, nn.GRU) or isinstance(ours, getattr(kind, "_derived_from", kind))


# Of the classes that few have, the models that say most.
OF_EVERY_LIBRARY = ("a layer", "attributes", "hooks", "Tied")
OF_MOST = ("torch", "ours", "ours as torch's")


def copies() -> list[Any]:
    return [
        (name, library, way)
        for name, model in MODELS.items()
        for library in LIBRARIES
        for way, operation in COPIES.items()
        if not model.computed and (name in OF_EVERY_LIBRARY or library in OF_MOST)
        if (model.layers and library != "subclass with code" if operation.kind else library != "torch")
    ]


@pytest.mark.parametrize(("name", "library", "way"), copies())
def test_copies(name: str, library: str, way: str) -> None:
    """Another model, of the same classes, ties, attributes and numbers, which changes with nothing of the first."""
    model, x = made(name, LIBRARIES[library]).eval(), torch.randn(3, 5, 6)
    model.train(len(name) % 2 == 0)
    operation, is_frozen = COPIES[way], COPIES[way].kind == "frozen"
    kept, training, wanted = snapshot(model), model.training, required(model)
    same = operation.run(model)
    assert snapshot(model) == kept and model.training == training and required(model) == wanted

    for table in ("named_modules", "named_parameters", "named_buffers"):
        ours, theirs = (dict(getattr(m, table)(remove_duplicate=False)) for m in (same, model))
        assert not {id(v) for v in ours.values()} & {id(v) for v in theirs.values()}
        if is_frozen and table == "named_buffers":  # the packed weights are among them
            ours = {n: b for n, b in ours.items() if n in theirs}
        assert list(ours) == list(theirs) and first_names(ours) == first_names(theirs)
    check_classes(same, model, is_frozen)
    assert list(same.state_dict()) == list(model.state_dict())
    assert required(same) == (set() if is_frozen else wanted)
    assert same.training == (training and not operation.kind)
    model.eval()
    same.eval()
    if not is_frozen:
        assert attributes_of(same) == attributes_of(model) and repr(same) == repr(model)
    for ours, theirs in zip(same.modules(), model.modules(), strict=True):
        for attribute in ("tag", "packed_lengths", "vocabulary", "handle"):
            value = getattr(theirs, attribute, None)
            assert value is None or getattr(ours, attribute) is not value
            assert attribute == "handle" or getattr(ours, attribute, None) == value
        if isinstance(ours, lstm_ext.LSTM):
            weights = [getattr(ours, n) for n in ours._flat_weights_names]
            assert all(a is b for a, b in zip(ours._flat_weights, weights, strict=True))

    with torch.no_grad():
        expected, found = call(model, x), call(same, x)
        rounded = "bfloat16" in way or "int8" in way or "save" in way or "twice" in way
        bound = 0 if not operation.kind else 2e-2 if rounded else 1e-5
        torch.testing.assert_close(found, expected, rtol=bound, atol=bound)
        for p in model.parameters():
            p.zero_()
        assert torch.equal(call(same, x), found) and not torch.equal(call(model, x), expected)
        zeros = call(model, x)
    if not is_frozen:
        call(same.train(), x).sum().backward()
        assert {name for name, p in same.named_parameters() if p.grad is not None} <= wanted
        with torch.no_grad():
            for p in same.parameters():
                p.zero_()
            assert torch.equal(call(same.eval(), x), zeros)


ALL_HOOKS = ["pre", "forward", "always", "state_dict pre", "state_dict", "load pre", "load"]
WITH_BACKWARD = ["backward pre", "grad", "accumulated", "backward"]
HOOKED = [
    *[("convert in place", function, source) for function, source, _ in CONVERSIONS.values()],
    *[
        (way, COPIES[way].run, library)
        for way in ("deepcopy", "freeze", "freeze twice", "freeze, deepcopy", "unfreeze")
        for library in LIBRARIES.values()
        if library is not LIBRARIES["subclass with code"] and not (way == "deepcopy" and library is TORCH)
    ],
]


@pytest.mark.parametrize(("way", "function", "library"), HOOKED)
def test_hooks_of_every_kind(way: str, function: Any, library: Any) -> None:
    """They are called with the module that the operation gives, and their handles take them from the first one."""
    layer: Any = library.LSTM(3, 4)
    seen: list[Any] = []

    def note(name: str) -> Any:
        return lambda module, *args, **kwargs: seen.append((name, module))

    handles = [
        layer.register_forward_pre_hook(note("pre"), with_kwargs=True),
        layer.register_forward_hook(note("forward"), with_kwargs=True),
        layer.register_forward_hook(note("always"), always_call=True),
        layer.register_full_backward_pre_hook(note("backward pre")),
        layer.register_full_backward_hook(note("backward")),
        layer.register_state_dict_pre_hook(note("state_dict pre")),
        layer.register_state_dict_post_hook(note("state_dict")),
        layer.register_load_state_dict_pre_hook(note("load pre")),  # it holds its module by a weak reference
        layer.register_load_state_dict_post_hook(note("load")),
        layer.weight_hh_l0.register_hook(lambda grad: seen.append(("grad", None))),
        layer.weight_hh_l0.register_post_accumulate_grad_hook(lambda p: seen.append(("accumulated", None))),
    ]
    layer.handle = handles[1]
    same = function(layer)

    def names_of(module: Any) -> list[str]:
        seen.clear()
        grad = not isinstance(module, lstm_ext.FrozenLSTM)
        with torch.set_grad_enabled(grad):
            output = module(torch.randn(5, 2, 3, requires_grad=grad))[0]
        if grad:
            output.sum().backward()
        module.load_state_dict(module.state_dict())
        assert all(m is module for _, m in seen if m is not None)
        return sorted([name for name, _ in seen])

    backward = [] if isinstance(same, lstm_ext.FrozenLSTM) else WITH_BACKWARD
    if same is not layer:  # torch copies no hooks of tensors
        backward = [name for name in backward if name.startswith("backward")]
        # A handle that a module has as an attribute is copied with it.
        handles[1].remove()
        assert len(same._forward_hooks) == 2 and len(layer._forward_hooks) == 1
        assert names_of(same) == sorted([*ALL_HOOKS, *backward])
        same.handle.remove()
        assert len(same._forward_hooks) == len(layer._forward_hooks) == 1
        return
    assert names_of(same) == sorted([*ALL_HOOKS, *backward])
    for handle in handles:
        handle.remove()
    assert names_of(same) == []


# --- what is not a matter of one model


@pytest.mark.parametrize("way", CONVERSIONS)
def test_a_model_without_lstms(way: str) -> None:
    function, _, target = CONVERSIONS[way]
    model = nn.Sequential(nn.Linear(3, 3), nn.RNN(3, 3), nn.RNNCell(3, 3), target.LSTM(3, 3))
    before, classes = snapshot(model), [type(m) for m in model.modules()]
    assert function(model) is model
    assert snapshot(model) == before and [type(m) for m in model.modules()] == classes


@pytest.mark.parametrize("how", ["wrapped", "in place", "inner", "root"])
@pytest.mark.parametrize("way", CONVERSIONS)
def test_compiled_models(way: str, how: str) -> None:
    """The compiled code of before is not used any more."""
    function, source, target = CONVERSIONS[way]
    model = nn.Sequential(source.LSTMCell(3, 4))
    cell, used = model[0], []
    hook = cell.register_forward_hook(lambda module, args, output: used.append(type(module)))
    if how == "in place":
        model.compile(backend="eager")
        compiled = model
    elif how == "inner":
        model[0] = torch.compile(cell, backend="eager")
        compiled = model
    else:
        compiled = torch.compile(model if how == "wrapped" else cell, backend="eager")
    x = torch.randn(2, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = compiled(x)
        assert function(compiled) is compiled
        assert type(cell) is target.LSTMCell
        torch.testing.assert_close(compiled(x), expected)
    assert used == [source.LSTMCell, target.LSTMCell]
    hook.remove()
    prefix = {"wrapped": "_orig_mod.0.", "in place": "0.", "inner": "0._orig_mod.", "root": "_orig_mod."}[how]
    assert compiled.state_dict().keys() == {prefix + name for name in cell.state_dict()}


@pytest.mark.parametrize("way", CONVERSIONS)
def test_graphs_of_fx(way: str) -> None:
    function, source, target = CONVERSIONS[way]
    model = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(3, 3), nn.LSTM(3, 4)))
    if source is not TORCH:
        BACK[source](model)
    x = torch.randn(5, 2, 3)
    expected = model(x)
    function(model)
    assert type(model.get_submodule("1")) is target.LSTM
    torch.testing.assert_close(model(x), expected)
