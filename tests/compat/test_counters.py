"""Tools that know layers by their exact class: those that count operations, and Opacus."""

from __future__ import annotations

import contextlib
import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import lstm_ext

pytestmark = [pytest.mark.full, pytest.mark.filterwarnings("ignore")]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(24, 32, 2, bidirectional=True, batch_first=True, dropout=0.2)
        self.cell = nn.LSTMCell(64, 8)
        self.out = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.cell(self.lstm(x)[0][:, -1])[0])


class OnlyLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(24, 32, 2, bidirectional=True, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lstm(x)[0]


def thop(model: nn.Module, x: torch.Tensor) -> Any:
    return pytest.importorskip("thop").profile(model, (x,), verbose=False)


def ptflops(model: nn.Module, x: torch.Tensor) -> Any:
    options = {"as_strings": False, "print_per_layer_stat": False, "backend": "pytorch"}
    return pytest.importorskip("ptflops").get_model_complexity_info(model, tuple(x.shape[1:]), **options)


def deepspeed(model: nn.Module, x: torch.Tensor) -> Any:
    profiler = pytest.importorskip("deepspeed.profiling.flops_profiler")
    return profiler.get_model_profile(model, args=[x], print_profile=False, as_string=False)


def calflops(model: nn.Module, x: torch.Tensor) -> Any:
    calculate = pytest.importorskip("calflops").calculate_flops
    return calculate(model, args=[x], print_results=False, output_as_string=False)


# What has the table of each, so that a test can import it anew.
TOOLS: dict[Callable[[nn.Module, torch.Tensor], Any], str] = {
    thop: "thop",
    ptflops: "ptflops",
    deepspeed: "deepspeed.profiling",
    calflops: "calflops",
}
by_tool = pytest.mark.parametrize("tool", TOOLS, ids=[tool.__name__ for tool in TOOLS])
WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "convert": lstm_ext.convert,
    "freeze": lstm_ext.freeze,
}


@contextlib.contextmanager
def not_imported(monkeypatch: pytest.MonkeyPatch, package: str) -> Iterator[None]:
    with monkeypatch.context() as patch:
        for name in [n for n in sys.modules if n == package or n.startswith(f"{package}.")]:
            patch.delitem(sys.modules, name)
        yield


@by_tool
@pytest.mark.parametrize("way", WAYS)
def test_counts_are_torchs_with_a_tool_that_is_imported_later(tool, way, monkeypatch):
    model, x = Model(), torch.randn(1, 5, 24)
    if way == "freeze":  # which torch's layer is not: no parameter counts as one that is trained
        model.eval().lstm.requires_grad_(False)
        model.requires_grad_(False)
    with not_imported(monkeypatch, TOOLS[tool]):
        ours = WAYS[way](copy.deepcopy(model))
        assert TOOLS[tool] not in sys.modules
        counted = tool(ours, x)
        expected = tool(model, x)
    assert counted == expected and counted[0] > 150_000
    # and they leave behind what they leave in a model of torch's
    left = [name for name, _ in ours.named_buffers() if "packed" not in name]
    assert left == [name for name, _ in model.named_buffers()]


ON_THE_EQUATIONS = """
import sys
sys.path.insert(0, {folder!r})
import copy, torch, lstm_ext, test_counters
from lstm_ext.native import loader
assert loader.extension() is None
model, x = test_counters.Model(), torch.randn(1, 5, 24)
expected = test_counters.{tool}(copy.deepcopy(model), x)
assert test_counters.{tool}(lstm_ext.convert(model), x) == expected
"""


@by_tool
def test_counts_are_torchs_without_the_kernels(tool):
    """The equations are made of functions that these tools count too."""
    program = ON_THE_EQUATIONS.format(folder=os.path.dirname(__file__), tool=tool.__name__)
    environment = os.environ | {"LSTM_EXT_BACKEND": "reference"}
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, env=environment)


def test_fvcore():
    analysis = pytest.importorskip("fvcore.nn").FlopCountAnalysis
    model, x = Model(), torch.randn(2, 5, 24)
    ours, theirs = analysis(lstm_ext.convert(copy.deepcopy(model)), x), analysis(model, x)
    assert ours.total() == theirs.total()
    assert ours.unsupported_ops() == theirs.unsupported_ops()


def test_opacus(monkeypatch):
    pytest.importorskip("opacus")

    model, x = OnlyLayer(), torch.randn(2, 5, 24)
    with not_imported(monkeypatch, "opacus"):
        ours = lstm_ext.convert(copy.deepcopy(model))
        import opacus.validators as validators

        errors = validators.ModuleValidator.validate(ours, strict=False)
        expected = validators.ModuleValidator.validate(model, strict=False)
        assert [str(e) for e in errors] == [str(e) for e in expected] and len(errors) == 1
        fixed = validators.ModuleValidator.fix(ours)
        assert type(fixed.lstm).__name__ == "DPLSTM"
        torch.testing.assert_close(fixed(x), model(x))
        with pytest.raises(TypeError, match="zoneout; no other layer can take its place"):
            validators.ModuleValidator.fix(nn.Sequential(lstm_ext.LSTM(3, 4, zoneout=0.1)).train())
