"""Modules of other packages that are an LSTM or a GRU in other words, against what takes their place."""

from __future__ import annotations

import copy
from collections.abc import Callable
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


def torchrl(name: str, **arguments: Any) -> nn.Module:
    return getattr(pytest.importorskip("torchrl.modules"), name)(5, 7, **arguments)


CASES = {
    "SeisBench": lambda: seisbench(True, "hard_sigmoid"),
    "SeisBench, one direction": lambda: seisbench(False, "hard_sigmoid"),
    "SeisBench, sigmoid": lambda: seisbench(True, "sigmoid"),
    "TorchRL LSTM": lambda: torchrl("LSTM", num_layers=2, dropout=0.5).eval(),
    "TorchRL LSTM, time first": lambda: torchrl("LSTM", batch_first=False, bias=False),
    "TorchRL GRU": lambda: torchrl("GRU", num_layers=2, dropout=0.5).eval(),
    "TorchRL GRU, time first": lambda: torchrl("GRU", batch_first=False, bias=False),
    "TorchRL LSTMCell": lambda: torchrl("LSTMCell"),
    "TorchRL GRUCell": lambda: torchrl("GRUCell", bias=False),
}


def calls_of(name: str, module: Any, draw: Callable[..., Tensor]) -> tuple[Tensor, list[tuple]]:
    """The input, and the arguments of the calls: with and without states, and TorchRL's masks."""
    x = draw(9, 5) if "Cell" in name else draw(9, 3, 5)
    if "TorchRL" not in name:
        return x, [(x,), (x, (draw(3, 7), draw(3, 7)))]
    size = (len(x), 7) if "Cell" in name else (module.num_layers, 9 if module.batch_first else 3, 7)
    h = draw(*size)
    hx = h if "GRU" in name else (h, draw(*size))
    mask = draw(9, 3).detach() > 0
    masked = [] if "Cell" in name else [(x, hx, mask), (x, None, mask)]
    return x, [(x,), (x, hx), *masked]


def results_of(
    name: str, module: Any, seed: int, dtype: torch.dtype, names: dict[int, str]
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    x, calls = calls_of(name, module, draw)
    flat = torch.utils._pytree.tree_leaves([module(*arguments) for arguments in calls])
    results = [y for y in flat if y is not None]
    cotangents = [draw(*y.shape).detach() for y in results]
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
        ours, same = (results_of(name, module, seed, dtype, names) for module in (model[0], theirs))
        worst.add(ours, same, results_of(name, exact, seed, torch.float64, names))
    assert worst.problems() == []


def test_a_dropout_of_seisbench_stays() -> None:
    base = pytest.importorskip("seisbench.models.base")
    model = nn.Sequential(
        base.CustomLSTM(base.ActivationLSTMCell, 5, 7, recurrent_dropout=0.2), nn.LSTM(5, 7)
    )
    theirs = model[0]
    assert lstm_ext.convert(model)[0] is theirs
    assert "its recurrent_dropout drops elements of g" in lstm_ext.report(model)[0].reason


def test_a_projection_of_torchrl_stays() -> None:
    """Its constructor takes proj_size, and its loop does not project."""
    model = nn.Sequential(torchrl("LSTM", proj_size=3), nn.LSTM(5, 7))
    theirs = model[0]
    assert lstm_ext.convert(model)[0] is theirs
    assert "its proj_size or bidirectional is set" in lstm_ext.report(model)[0].reason
