"""The examples run in their short form and draw a picture; those that compare two trainings see a wrong layer."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lstm_ext

pytestmark = pytest.mark.tools

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TORCHRUN = [
    *("-m", "torch.distributed.run", "--nproc-per-node", "2"),
    # a port that is free, on this machine
    *("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--local-addr", "127.0.0.1"),
]
# What an example prints, as patterns of whole lines.
NUMBERS = r"  +[\d.,]+  +[\d.,]+.*"
PRINTED = {
    "forecast": [],
    "tagger": [],
    "streaming": [],
    "data_parallel": [],
    "char_lm": [
        f"loss, epoch 1{NUMBERS}",
        f"loss, epoch 2{NUMBERS}",
        rf"characters per second \(training\){NUMBERS}",
        r"peak memory of training \(MiB\)  +[\d.,-]+  +[\d.,-]+.*",
        ".*sampled from the lstm_ext model.*",
    ],
    "recurrent_ppo": [
        f"return, last eighth of the updates{NUMBERS}",
        rf"time of one update \(ms\){NUMBERS}",
        rf"time of one rollout \(ms\){NUMBERS}",
        r"  returns of the first 5 updates +\S+   allowed \S+   ok",
    ],
}
WITH_BARS = ("char_lm", "recurrent_ppo")

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
    # Child processes import the lstm_ext that this process imports.
    paths = [str(Path(lstm_ext.__file__).resolve().parents[1]), os.environ.get("PYTHONPATH")]
    more = {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    more |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=300, env={**os.environ, **more}
    )


@pytest.mark.parametrize("name", PRINTED)
def test_quick_run(name: str, tmp_path: Path) -> None:
    if name == "forecast" and importlib.util.find_spec("statsmodels") is None:
        pytest.skip("statsmodels, of the optional group `demo`, is not installed")
    picture = tmp_path / "picture.png"
    launcher = TORCHRUN if name == "data_parallel" else []
    done = run(*launcher, str(EXAMPLES / f"{name}.py"), "--quick", "--output", str(picture))
    assert done.returncode == 0, done.stdout + done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert f"the picture is {picture}\n" in done.stdout
    for line in PRINTED[name]:
        assert re.search(f"^{line}$", done.stdout, re.MULTILINE), done.stdout
    if name in WITH_BARS:  # which are readable in a log file
        assert "100%" in done.stderr and "\r" not in done.stderr


@pytest.mark.parametrize("name", ["tagger", "streaming", *WITH_BARS])
def test_nothing_else_is_needed(name: str, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    done = run("-c", WITHOUT, str(EXAMPLES / f"{name}.py"), "--quick", "--output", str(picture))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no picture, since matplotlib is not installed: pip install matplotlib\n" in done.stdout
    assert not picture.exists()
    said = done.stderr.count("no progress bar, since tqdm is not installed: pip install tqdm\n")
    assert said == (name in WITH_BARS)


def test_data_parallel_alone_says_how_to_start_it() -> None:
    assert "RANK" not in os.environ
    done = run(str(EXAMPLES / "data_parallel.py"))
    assert done.returncode == 1
    assert done.stderr.startswith("error: start it with torchrun --nproc-per-node 2 ")
    assert len(done.stderr.splitlines()) == 1


@pytest.fixture
def example(request, monkeypatch):
    """The module of an example, as when it is run by its name."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    spec = importlib.util.spec_from_file_location(
        f"{request.param}_under_test", EXAMPLES / f"{request.param}.py"
    )
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up there
    spec.loader.exec_module(module)
    dtype = torch.get_default_dtype()
    yield module
    torch.set_default_dtype(dtype)


def one_percent(lstm):
    lstm.weight_hh_l0.register_hook(lambda grad: grad * 1.01)


def wrong_result(lstm):
    lstm.register_forward_hook(lambda module, args, result: (result[0] * 1.0005, result[1]))


def resets_one_step_late(model):
    unroll = model.unroll
    model.unroll = lambda x, first, state: unroll(x, first.roll(1, 0), state)


def gradient_crosses(model):
    """The state is right, and its gradient goes on into the episode before."""

    def unroll(x, first, state):
        outputs = []
        for x_t, first_t in zip(x, first, strict=True):
            state = tuple(torch.where(first_t[:, None], s - s.detach(), s) for s in state)
            y, state = model.lstm.step(x_t, state)
            outputs.append(y)
        return torch.stack(outputs)

    model.unroll = unroll


@pytest.mark.parametrize(
    ("example", "fault", "arguments"),
    [
        ("char_lm", one_percent, ("--threads", "1", "--epochs", "1")),
        ("char_lm", wrong_result, ("--threads", "1", "--epochs", "1")),
        ("recurrent_ppo", resets_one_step_late, ("--updates", "2")),
        ("recurrent_ppo", gradient_crosses, ("--updates", "2")),
    ],
    indirect=["example"],
)
def test_a_wrong_layer_is_seen(example, fault, arguments, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(
        example, "peak_memory", lambda options: {"torch": None, "lstm_ext": None}, raising=False
    )
    options = example.parse_options(["--quick", *arguments, "--output", str(tmp_path / "x.png")])
    assert example.run(options, tamper=fault) == 1
    assert re.search(r"more than (float32 )?rounding explains", capfd.readouterr().err)


@pytest.mark.parametrize("example", ["recurrent_ppo"], indirect=True)
def test_both_updates_are_the_same_in_double(example):
    """Three updates: the returns to the last bit, and the weights that come out."""
    torch.set_default_dtype(torch.float64)
    options = example.parse_options(["--quick", "--updates", "3", "--double"])
    trainees = {kind: example.Trainee(kind, options) for kind in ("loop", "resets")}
    example.train(trainees, options)
    loop, ours = trainees["loop"], trainees["resets"]
    assert loop.returns == ours.returns
    pairs = zip(ours.first_gradients, loop.first_gradients, strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14)
    for a, b in zip(ours.model.parameters(), loop.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
