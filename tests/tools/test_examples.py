"""The examples on real data run in their short form, draw a picture, and their own checks pass."""

from __future__ import annotations

import importlib.util
import itertools
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
from test_demo import environment

pytestmark = pytest.mark.tools

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TORCHRUN = [
    *("-m", "torch.distributed.run", "--nproc-per-node", "2"),
    # a port that is free, on this machine
    *("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--local-addr", "127.0.0.1"),
]


# As on a machine that has torch and lstm_ext only.
WITHOUT = """
import runpy, sys
sys.argv = sys.argv[1:]
sys.path[0] = sys.argv[0].rpartition("/")[0]
for name in ("matplotlib", "tqdm"):
    sys.modules[name] = None
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**environment(), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )


@pytest.mark.parametrize("name", ["forecast", "tagger", "streaming", "data_parallel"])
def test_quick_run(name: str, tmp_path: Path) -> None:
    if name == "forecast" and importlib.util.find_spec("statsmodels") is None:
        pytest.skip("statsmodels, of the optional group `demo`, is not installed")
    picture = tmp_path / "picture.png"
    launcher = TORCHRUN if name == "data_parallel" else []
    done = run(*launcher, str(EXAMPLES / f"{name}.py"), "--quick", "--output", str(picture))
    assert done.returncode == 0, done.stdout + done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert f"the picture is {picture}" in done.stdout


@pytest.mark.parametrize("name", ["tagger", "streaming", "recurrent_ppo", "char_lm"])
def test_nothing_else_is_needed(name: str, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    done = run("-c", WITHOUT, str(EXAMPLES / f"{name}.py"), "--quick", "--output", str(picture))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no picture, since matplotlib is not installed: pip install matplotlib\n" in done.stdout
    assert not picture.exists()
    bar = name in ("recurrent_ppo", "char_lm")
    assert done.stderr.count("no progress bar, since tqdm is not installed: pip install tqdm\n") == bar


def test_the_streaming_loop_prints_a_histogram(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    streaming = importlib.import_module("streaming")
    # Nearly all in one bin; one step in a hundred takes ten times as long, one longer than all bins.
    slow = [10.0] * 990 + [100.0] * 9 + [1e6]
    first, second, axis = streaming.histogram({"slow": slow, "fast": [5.0] * 1000}).split("\n")
    assert first.startswith("slow          |") and second.startswith("fast          |")
    bars = {"slow": first[15:-1], "fast": second[15:-1]}
    assert {len(bar) for bar in bars.values()} == {streaming.COLUMNS}
    assert bars["fast"].strip() == "█" and bars["slow"].count("█") == 1
    edges = streaming.edges_of({"slow": slow, "fast": [5.0] * 1000}, streaming.COLUMNS)
    for name, value in (("fast", 5.0), ("slow", 100.0)):
        column = next(n for n in range(streaming.COLUMNS) if edges[n] <= value < edges[n + 1])
        assert bars[name][column] in streaming.BARS
    assert bars["slow"][-1] == "▁"
    assert axis.startswith("microseconds")
    assert axis.index("5 ") - 15 == bars["fast"].index("█")


def test_legends_cover_no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("Agg")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    latencies = {name: [1.0, 2.0, 900.0] for name in ("torch.nn.LSTM", "lstm_ext.LSTM")}
    trainee = types.SimpleNamespace(returns=[0.0, 1.0], seconds={"update": [1.0, 2.0]})
    trainees = dict.fromkeys(("loop", "resets", "perturbed"), trainee)
    for name, shown, count in (("streaming", latencies, 1), ("recurrent_ppo", trainees, 2)):
        figure = importlib.import_module(name).draw(plt, shown)
        figure.canvas.draw()
        legends = [*figure.legends, *filter(None, [axes.get_legend() for axes in figure.axes])]
        assert len(legends) == count
        for legend, axes in itertools.product(legends, figure.axes):
            assert not legend.get_window_extent().overlaps(axes.get_window_extent()), name
        plt.close(figure)


def test_data_parallel_alone_says_how_to_start_it() -> None:
    assert "RANK" not in os.environ
    done = run(str(EXAMPLES / "data_parallel.py"))
    assert done.returncode == 1
    assert done.stderr.startswith("error: start it with torchrun --nproc-per-node 2 ")
    assert len(done.stderr.splitlines()) == 1
