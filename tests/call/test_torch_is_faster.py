"""Calls that torch's own operator computes on the CPU although there are kernels: records say that it is faster."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import lstm_ext
from lstm_ext import functional
from lstm_ext.call import run as call_run
from lstm_ext.layer import route
from lstm_ext.native import loader

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
T, B, I, H = 5, 6, 4, 8
IN_BFLOAT16 = {"dtype": torch.bfloat16}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """One row for small layers here; the list gets an entry for each call that torch's operator computes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    row = route.TORCH_IS_FASTER[0]._replace(
        instruction_set=loader.extension().cpu_capability(),
        least_steps=T,
        least_batch=B,
        hidden_sizes=range(H // 2, H + 1),
    )
    monkeypatch.setattr(route, "TORCH_IS_FASTER", (row,))
    found: list[str] = []
    original = call_run.lstm_by_torch

    def counted(*arguments: Any) -> Any:
        results = original(*arguments)
        if results is not None:
            found.append("torch")
        return results

    monkeypatch.setattr(call_run, "lstm_by_torch", counted)
    yield found
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "config", [{}, {"num_layers": 3, "batch_first": True}, {"num_layers": 2, "dropout": 0.3}]
)
def test_it_is_used(calls, config):
    theirs = nn.LSTM(I, H, **config, **IN_BFLOAT16)
    ours = lstm_ext.convert(copy.copy(theirs), as_subclass=False)
    x = torch.randn(
        B if config.get("batch_first") else T, T if config.get("batch_first") else B, I
    ).bfloat16()
    hx = tuple(torch.randn(theirs.num_layers, B, H).bfloat16() for _ in range(2))
    for state in (None, hx):
        found = []
        for module in (theirs, ours):
            torch.manual_seed(1)
            module.zero_grad()
            output, states = module(x, state)
            (output.square().sum() + states[1].sum()).backward()
            found.append([output, *states, *[p.grad for p in module.parameters()]])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
        assert found[0][0].stride() == found[1][0].stride()
    assert len(calls) == 2


OTHERS: dict[str, Callable[[lstm_ext.LSTM, torch.Tensor], Any]] = {
    "no gradients": lambda layer, x: torch.no_grad()(layer)(x),
    "fewer rows": lambda layer, x: layer(x[:, 1:]),
    "fewer steps": lambda layer, x: layer(x[1:]),
    "unbatched": lambda layer, x: layer(x[:, 0]),
    "packed": lambda layer, x: layer(pack_padded_sequence(x, [T] * B)),
    "an option": lambda layer, x: layer(x, return_cell_states=True),
    "compiled": lambda layer, x: torch.compile(layer, backend="eager", fullgraph=True)(x),
    "vmap": lambda layer, x: torch.vmap(lambda one: layer(one)[0])(x[None]),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_calls_keep_the_kernels(calls, kind):
    layer = lstm_ext.LSTM(I, H, **IN_BFLOAT16)
    OTHERS[kind](layer, torch.randn(T, B, I).bfloat16())
    assert not calls


@pytest.mark.parametrize(
    "layer",
    [
        lstm_ext.LSTM(I, H),
        lstm_ext.LSTM(I, H // 2 - 1, **IN_BFLOAT16),
        lstm_ext.LSTM(I, H + 1, **IN_BFLOAT16),
        lstm_ext.LSTM(I, H, bidirectional=True, **IN_BFLOAT16),
        lstm_ext.LSTM(I, H, proj_size=H // 2, **IN_BFLOAT16),
        lstm_ext.LSTM(I, H, proj_size=H // 2, bias=False, **IN_BFLOAT16),
        lstm_ext.freeze(lstm_ext.LSTM(I, H, **IN_BFLOAT16)),
    ],
    ids=[
        "float32",
        "fewer units",
        "more units",
        "both directions",
        "projected",
        "projected, no bias",
        "frozen",
    ],
)
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_other_layers_keep_the_kernels(calls, layer, monkeypatch):
    dtype = next(layer.parameters()).dtype
    if isinstance(layer, lstm_ext.FrozenLSTM):  # it has no gradients
        row = route.TORCH_IS_FASTER[0]._replace(training=False)
        monkeypatch.setattr(route, "TORCH_IS_FASTER", (row,))
    layer(torch.randn(T, B, I).to(dtype))
    assert not calls


def test_other_threads_and_instruction_sets_keep_the_kernels(calls, monkeypatch):
    layer, x = lstm_ext.LSTM(I, H, **IN_BFLOAT16), torch.randn(T, B, I).bfloat16()
    torch.set_num_threads(2)
    layer(x)
    torch.set_num_threads(1)
    monkeypatch.setattr(
        route, "TORCH_IS_FASTER", (route.TORCH_IS_FASTER[0]._replace(instruction_set="another"),)
    )
    layer(x)
    assert not calls


def test_without_onednn_the_kernels_compute(calls):
    layer, x = lstm_ext.LSTM(I, H, **IN_BFLOAT16), torch.randn(T, B, I).bfloat16()
    with torch.backends.mkldnn.flags(enabled=False):
        layer(x)
    assert not calls


def test_some_gradients_are_enough(calls):
    layer = lstm_ext.LSTM(I, H, **IN_BFLOAT16).requires_grad_(False)
    layer(torch.randn(T, B, I).bfloat16())
    assert not calls
    layer.bias_hh_l0.requires_grad_(True)
    layer(torch.randn(T, B, I).bfloat16())[0].sum().backward()
    assert calls == ["torch"] and layer.bias_hh_l0.grad is not None


def test_wrong_weights_are_our_error(calls):
    """torch's operator would read behind them."""
    for name, shape in (
        ("weight_ih_l0", (4 * H, I - 1)),
        ("weight_hh_l1", (4 * H, H - 1)),
        ("bias_ih_l1", (H,)),
    ):
        layer = lstm_ext.LSTM(I, H, 2, **IN_BFLOAT16)
        setattr(layer, name, nn.Parameter(torch.randn(shape).bfloat16()))
        with pytest.raises(RuntimeError, match=name[:7]):
            layer(torch.randn(T, B, I).bfloat16())
    assert not calls


def test_explain_says_so(calls):
    for layer in (nn.LSTM(I, H, **IN_BFLOAT16), lstm_ext.LSTM(I, H, **IN_BFLOAT16)):
        (found,) = lstm_ext.explain(layer, (T, B, I)).data["layers"]
        assert found["kernel"] == "torch" and "torch's own operator" in found["summary"]
        assert "torch's own operator" in lstm_ext.explain(layer, (T, B, I))
    for other, shape in (
        (layer, (T, B - 1, I)),
        (lstm_ext.LSTM(I, H, layer_norm=True, **IN_BFLOAT16), (T, B, I)),
    ):
        assert lstm_ext.explain(other, shape).data["layers"][0]["kernel"] != "torch"


def test_without_a_module(calls):
    layer, x = lstm_ext.LSTM(I, H, **IN_BFLOAT16), torch.randn(T, B, I).bfloat16()
    functional.lstm(x, None, list(layer.parameters()))
    assert calls == ["torch"]


def test_second_derivatives(calls):
    theirs = nn.LSTM(I, H, **IN_BFLOAT16)
    found = []
    for module in (theirs, lstm_ext.convert(copy.copy(theirs), as_subclass=False)):
        x = torch.linspace(-1, 1, T * B * I).view(T, B, I).bfloat16().requires_grad_()
        (first,) = torch.autograd.grad(module(x)[0].square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), module.weight_hh_l0)[0])
    assert torch.equal(*found)
    assert calls == ["torch"]


@pytest.mark.parametrize("row", route.TORCH_IS_FASTER, ids=str)
def test_records_say_so(row):
    """In at least two records torch takes at least 3 percent less time in a case of the row."""
    assert len(row.records) >= 2
    for name in row.records:
        record = json.loads((RESULTS / name).read_text())
        assert record["facts"]["lstm_ext_cpu_capability"] == row.instruction_set
        ratios = [
            r["sides"]["torch"]["median"] / r["sides"].get("kernels", r["sides"]["ours"])["median"]
            for r in record["results"]
            if r["group"] == "dtypes"
            and f"torch.{r['dtype']}" == str(row.dtype)
            and (r["training"], r["threads"]) == (row.training, row.threads)
            and r["steps"] >= row.least_steps
            and r["batch"] >= row.least_batch
            and r["hidden_size"] in row.hidden_sizes
        ]
        assert ratios and max(ratios) < 0.97, name
