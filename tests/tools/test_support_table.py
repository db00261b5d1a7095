"""The support table: its record is whole, and is what comes out."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from lstm_ext.layer import equations, route
from lstm_ext.native import loader

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import bench_support  # noqa: E402
from report import pages, support, support_cells  # noqa: E402
from report.support_features import FEATURES  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread():
    """All sizes are small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def record():
    return pages.read(pages.RESULTS / "support_cpu.json")


def row(feature: str, *compositions: str, dtype: str = "float32"):
    return {c: support_cells.tried(feature, c, dtype).result for c in compositions}


def test_the_record_is_whole_and_without_failures(record):
    assert list(record["cells"]) == list(FEATURES)
    for of_feature in record["cells"].values():
        assert list(of_feature) == list(support.COLUMNS)
        for composition, of_dtypes in of_feature.items():
            assert tuple(of_dtypes) == support.dtypes_of(composition)
    assert set(support.COLUMNS) == set(support_cells.COMPOSITIONS)
    assert not bench_support.failures(record["cells"])


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.tools)])
def test_eager_cells_give_what_the_record_says(record, dtype):
    found = dict(bench_support.run_features(list(FEATURES), support_cells.EAGER, dtypes=(dtype,)))
    assert len(support.named(found)) == len(FEATURES) * len(support_cells.EAGER)
    assert not bench_support.differences(found, record["cells"], whole=False)


def plant(monkeypatch, changed):
    """Change the output of each layer."""
    layer = route.lstm_layer
    monkeypatch.setattr(route, "plain_layers", lambda *_: None)

    def planted(*arguments, **options):
        output, *others = layer(*arguments, **options)
        return changed(output), *others

    monkeypatch.setattr(route, "lstm_layer", planted)


def test_a_wrong_value_is_a_failure(monkeypatch, capsys):
    plant(monkeypatch, lambda y: y * 1.1)
    for dtype in support_cells.DTYPES:
        assert set(row("plain", *support_cells.EAGER, dtype=dtype).values()) == {"failure"}
    assert row("layer_norm", "export") == {"export": "failure"}
    assert bench_support.main(["--check", "--fast", "cell", "step"]) == 1
    said = capsys.readouterr().err
    assert "step, jvp, float16: failure: result 0: off by" in said


def test_a_wrong_gradient_is_a_failure(monkeypatch):
    plant(monkeypatch, lambda y: y + 0.1 * (y - y.detach()))
    assert row("lengths", "forward", "backward", "double_backward", "grad", "per_sample", "autocast") == {
        "forward": "kernels"
    } | dict.fromkeys(("backward", "double_backward", "grad", "per_sample", "autocast"), "failure")


def test_another_random_mask_is_a_failure(monkeypatch):
    drop = torch.nn.functional.dropout

    def late(*arguments):
        if len(arguments) == 3:  # the call of the layer, not that of the table
            torch.rand(())
        return drop(*arguments)

    monkeypatch.setattr(torch.nn.functional, "dropout", late)
    assert row("recurrent_dropout", "backward") == {"backward": "failure"}
    assert row("plain", "backward") == {"backward": "kernels"}


def test_an_unlisted_error_is_a_failure(monkeypatch, capsys):
    def raising(*arguments, **options):
        raise RuntimeError("no such layer")

    monkeypatch.setattr(route, "lstm_layer", raising)
    assert bench_support.main(["--check", "--fast", "recompute"]) == 1
    said = capsys.readouterr().err
    assert "recompute, backward, float64: failure: RuntimeError: no such layer" in said
    assert "recompute, jvp, float64: failure: RuntimeError: no such layer" in said  # there another is listed


def test_a_listed_error_that_does_not_come_is_a_failure(monkeypatch):
    wrong = support_cells.Refusal("forward", ("plain",), "not supported")
    monkeypatch.setattr(support_cells, "REFUSALS", (*support_cells.REFUSALS, wrong))
    assert support_cells.tried("plain", "forward", "float32") == (
        "failure",
        "expected an error, not supported",
    )
    assert support_cells.tried("plain", "backward", "float32").result == "kernels"


def test_check_notices_what_leaves_the_kernels(monkeypatch, capsys):
    monkeypatch.setattr(loader, "has_kernels", lambda: False)
    monkeypatch.setattr(loader, "extension", lambda: None)
    assert bench_support.main(["--check", "--fast", "layer_norm"]) == 1
    said = capsys.readouterr().err
    assert "layer_norm, forward, float32: equations, in the record: kernels" in said
    assert "double_backward" not in said
    assert equations.lstm_layer.__module__ == "lstm_ext.layer.equations"  # nothing stays patched


def test_check_notices_missing_cells(record):
    cells = {name: of_feature for name, of_feature in record["cells"].items() if name != "plain"}
    assert not bench_support.differences(cells, record["cells"], whole=False)
    assert "plain, forward, float64: not tried, in the record: kernels" in bench_support.differences(
        cells, record["cells"], whole=True
    )


def test_dtypes_that_differ_are_named():
    notes = support.Notes()
    said = {"float64": "kernels", "float32": "kernels", "bfloat16": "error: not so", "float16": "equations"}
    assert support.cell(said, notes) == "✓ (float64, float32), –<sup>1</sup> (bfloat16), eq (float16)"
    assert notes.texts == ["error: `not so`"]


def test_a_record_of_a_gpu_is_named(record):
    cells = {"plain": {"forward": {"float32": "kernels"}}}
    of_cuda = {"facts": {"card": "A GPU"}, "cells": cells}
    assert "CUDA: 1 cells tried on A GPU, all as on the CPU." in support.text(record, of_cuda)
    cells["plain"]["forward"]["float32"] = "equations"
    assert "different from the CPU: plain, forward, float32: equations." in support.text(record, of_cuda)


@pytest.mark.full
def test_all_cells_give_what_the_record_says():
    assert bench_support.main(["--check"]) == 0
