"""Modules of other packages that are an LSTM in other words, against what takes their place."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from judge import Worst
from torch import Tensor, nn

import lstm_ext

pytestmark = [pytest.mark.full, pytest.mark.filterwarnings("ignore")]


def seisbench(both: bool, function: str) -> nn.Module:
    base = pytest.importorskip("seisbench.models.base")
    gates = {"gate_activation": torch.sigmoid} if function == "sigmoid" else {}
    return base.CustomLSTM(base.ActivationLSTMCell, 5, 7, bidirectional=both, **gates)


CASES = {
    "SeisBench": lambda: seisbench(True, "hard_sigmoid"),
    "SeisBench, one direction": lambda: seisbench(False, "hard_sigmoid"),
    "SeisBench, sigmoid": lambda: seisbench(True, "sigmoid"),
}


def results_of(module: Any, seed: int, dtype: torch.dtype, names: dict[int, str]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(9, 3, 5, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    states = torch.randn(2, 3, 7, generator=generator, dtype=torch.float64).to(dtype)
    outputs = [module(x), module(x, (states[0], states[1]))]
    flat = torch.utils._pytree.tree_leaves(outputs)
    results = [y for y in flat if y is not None]
    cotangents = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(dtype) for y in results]
    torch.autograd.backward(results, cotangents)
    found = {f"result {k}": y.detach() for k, y in enumerate(results)} | {"gradient of the input": x.grad}
    for parameter in module.parameters():
        found[f"gradient of {names[id(parameter)]}"] = parameter.grad.clone()
        parameter.grad = None
    return found


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_it_computes_the_same(name: str, dtype: torch.dtype) -> None:
    """The worst of 20 seeds, with the very same Parameters."""
    torch.manual_seed(0)
    theirs, worst = CASES[name](), Worst()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.4)
    theirs = theirs.to(dtype)
    exact = copy.deepcopy(theirs).double()
    model = lstm_ext.convert(nn.Sequential(theirs))
    (entry,) = lstm_ext.report(model)
    assert entry.ours and "in the place of" in entry.reason and "copies" not in entry.reason
    assert {id(p) for p in model.parameters()} == {id(p) for p in theirs.parameters()}
    names = {id(p): n for one in (theirs, exact) for n, p in one.named_parameters()}
    for seed in range(20):
        reference = results_of(exact, seed, torch.float64, names)
        worst.add(results_of(model[0], seed, dtype, names), results_of(theirs, seed, dtype, names), reference)
    assert worst.problems() == []


def test_a_dropout_of_seisbench_stays() -> None:
    base = pytest.importorskip("seisbench.models.base")
    model = nn.Sequential(
        base.CustomLSTM(base.ActivationLSTMCell, 5, 7, recurrent_dropout=0.2), nn.LSTM(5, 7)
    )
    theirs = model[0]
    assert lstm_ext.convert(model)[0] is theirs
    assert "its recurrent_dropout drops elements of g" in lstm_ext.report(model)[0].reason
