"""Compiled layers with and without options, one after the other in one process, in every order.

torch.compile keeps what it made of ``forward`` for all layers of a class. A layer that takes a graph of another one
computes without its options, or with those of the other. So nothing here resets dynamo between two layers, and each
order of two of them is tried: all orders are in one list and the same list backwards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from graphs import Graphs
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._pytree import tree_leaves

import lstm_ext

pytestmark = pytest.mark.slow

T, B, I, H = 4, 3, 2, 5
LENGTHS = [4, 1, 3]

# What differs from a plain layer in evaluation mode: arguments of the constructor, and of the call. Masks with
# probabilities of 1 are the same in each call.
LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "recurrent_dropout": {"recurrent_dropout": 0.5},
    "weight_dropout": {"weight_dropout": 0.5},
    "zoneout": {"zoneout": 0.3},
    "zoneout of c": {"zoneout": (0.0, 0.3)},
    "zoneout in training": {"zoneout": (1.0, 0.0)},
    "layer_norm": {"layer_norm": True},
    "peephole": {"peephole": True},
    "cell_clip": {"cell_clip": 0.1},
    "coupled_gates": {"coupled_gates": True},
    "gate_activation": {"gate_activation": "hard_sigmoid"},
    "cell_activation": {"cell_activation": "softsign"},
    "preactivation_clip": {"preactivation_clip": 0.1},
    "recompute": {"recompute": True},
}
IN_TRAINING = ("recurrent_dropout", "weight_dropout", "zoneout in training")
CALLS = ("lengths", "mask", "resets", "reset_state", "return_cell_states", "return_gates")
FORMS = ("dense", "packed", "nested", "step", "frozen", "cell")


def kinds_of(form: str) -> list[str]:
    if form == "cell":
        return ["no state", "state", "no bias"]
    if form == "step":
        return [name for name in LAYERS if name not in IN_TRAINING]
    calls = [name for name in CALLS if form in ("dense", "frozen") or name not in ("lengths", "mask")]
    return [*LAYERS, *calls]


def layer_of(kind: str, form: str) -> nn.Module:
    layer = lstm_ext.LSTM(I, H, **LAYERS.get(kind, {})).train(kind in IN_TRAINING)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape))
    return lstm_ext.freeze(layer) if form == "frozen" else layer


def in_form(data: torch.Tensor, form: str) -> Any:
    if form == "packed":
        return pack_padded_sequence(data, LENGTHS, enforce_sorted=False)
    if form == "nested":
        return torch.nested.as_nested_tensor(
            [data[:n, b] for b, n in enumerate(LENGTHS)], layout=torch.jagged
        )
    return data


def program(kind: str, form: str) -> tuple[nn.Module, Callable[[], tuple[Any, dict[str, Any]]], str]:
    """A module, its arguments, and the method that is called."""
    if form == "cell":
        cell, state = lstm_ext.LSTMCell(I, H, bias=kind != "no bias"), (torch.randn(B, H), torch.randn(B, H))
        return cell, lambda: ((torch.randn(B, I), *([state] if kind == "state" else [])), {}), "forward"
    flags, state = torch.rand(T, B, 1) < 0.6, (torch.randn(1, B, H), torch.randn(1, B, H))
    values = {
        "lengths": torch.tensor(LENGTHS),
        "mask": flags,
        "resets": in_form(flags, form),
        "reset_state": state,
        "return_cell_states": True,
        "return_gates": True,
    }
    call = {kind: values[kind]} if kind in values else {}
    if kind == "reset_state":
        call["resets"] = values["resets"]
    if form == "step":
        return layer_of(kind, form), lambda: ((torch.randn(B, I),), call), "step"
    return layer_of(kind, form), lambda: ((in_form(torch.randn(T, B, I), form),), call), "forward"


def tensors_of(results: Any) -> list[torch.Tensor]:
    leaves = tree_leaves(results, is_leaf=lambda r: isinstance(r, PackedSequence))
    leaves = [r.data if isinstance(r, PackedSequence) else r for r in leaves]
    return [r.values() if r.is_nested else r for r in leaves if r is not None]


def check(compiled: Callable[..., Any], eager: Callable[..., Any], args: Any, call: Any, what: str) -> None:
    results = []
    for function in (compiled, eager):
        torch.manual_seed(1)
        results.append(tensors_of(function(*args, **call)))
    torch.testing.assert_close(*results, msg=lambda text: f"{what}: {text}")


@contextlib.contextmanager
def one_process() -> Any:
    torch._dynamo.reset()
    limits = {
        "recompile_limit": 200,
        "accumulated_recompile_limit": 1000,
        "fail_on_recompile_limit_hit": True,
    }
    with torch._dynamo.config.patch(**limits):
        yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:.*Graph break")
def _ways() -> Iterator[Any]:
    for form in FORMS:
        for backwards in (False, True):
            is_quick = (form, backwards) in (("dense", False), ("packed", True))
            yield pytest.param(form, {}, backwards, marks=() if is_quick else pytest.mark.tools)
    for backwards in (False, True):
        yield pytest.param("dense", {"fullgraph": True, "dynamic": True}, backwards, marks=pytest.mark.tools)


@pytest.mark.parametrize(("form", "how", "backwards"), list(_ways()), ids=str)
def test_each_layer_takes_its_own_graph(form, how, backwards):
    programs, graphs = [], Graphs("eager")
    with one_process(), torch.set_grad_enabled(form != "frozen"):
        for kind in kinds_of(form)[:: -1 if backwards else 1]:
            module, arguments, method = program(kind, form)
            eager, before = getattr(module, method), len(graphs.all)
            compiled = torch.compile(eager, backend=graphs, **how)
            check(compiled, eager, *arguments(), kind)
            if kind == "recompute" and form != "frozen":  # its numbers are those of a plain layer
                assert len(graphs.all) > before
            programs.append((compiled, eager, arguments, kind))
        for compiled, eager, arguments, kind in programs:
            check(compiled, eager, *arguments(), f"{kind}, again")


@pytest.mark.parametrize("form", ["dense", "packed", "step"])
def test_an_option_that_is_set_after_a_compiled_call(form):
    with one_process():
        module, arguments, method = program("plain", form)
        eager = getattr(module, method)
        compiled = torch.compile(eager, backend="eager")
        for name, value in [
            ("cell_clip", 0.1),
            ("cell_clip", None),
            ("zoneout", 0.3),
            ("zoneout", 0),
            ("coupled_gates", True),
            ("gate_activation", "softsign"),
        ]:
            check(compiled, eager, *arguments(), "before")
            setattr(module, name, value)
            check(compiled, eager, *arguments(), f"{name}={value}")
