"""The demonstration runs end to end, and its check of the two trainings catches a wrong gradient."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lstm_ext

pytestmark = pytest.mark.tools


EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "char_lm.py"


def environment():
    """For child processes: they import the lstm_ext that this process imports."""
    paths = [str(Path(lstm_ext.__file__).resolve().parents[1]), os.environ.get("PYTHONPATH")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def load_example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))  # as when it is run by its name
    spec = importlib.util.spec_from_file_location("char_lm_under_test", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def test_quick_run(tmp_path):
    picture = tmp_path / "curves.png"
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), "--quick", "--threads", "1", "--output", str(picture)],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment(),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    for row in ("loss, epoch 1", "loss, epoch 2", r"characters per second \(training\)"):
        assert re.search(rf"^{row}  +[\d.,]+  +[\d.,]+", done.stdout, re.MULTILINE), done.stdout
    assert re.search(r"^peak memory of training \(MiB\)  +[\d.,-]+  +[\d.,-]+", done.stdout, re.MULTILINE)
    assert "sampled from the lstm_ext model" in done.stdout
    assert "100%" in done.stderr and "\r" not in done.stderr  # the progress bar is readable in a log file


def one_percent(lstm):
    lstm.weight_hh_l0.register_hook(lambda grad: grad * 1.01)


def one_gate_lost(lstm):
    def hook(grad):
        grad = grad.clone()
        grad[: grad.shape[0] // 4] = 0
        return grad

    lstm.weight_ih_l1.register_hook(hook)


def wrong_result(lstm):
    lstm.register_forward_hook(lambda module, args, result: (result[0] * 1.0005, result[1]))


@pytest.mark.parametrize("fault", [one_percent, one_gate_lost, wrong_result])
def test_planted_fault_is_found(fault, tmp_path, capfd, monkeypatch):
    example = load_example(monkeypatch)
    monkeypatch.setattr(example, "peak_memory", lambda options: {"torch": None, "lstm_ext": None})
    options = example.parse_options(
        ["--quick", "--threads", "1", "--epochs", "1", "--output", str(tmp_path / "x.png")]
    )
    threads = example.torch.get_num_threads()
    try:
        assert example.run(options, tamper=fault) == 1
    finally:
        example.torch.set_num_threads(threads)
    assert "more than float32 rounding explains" in capfd.readouterr().err
