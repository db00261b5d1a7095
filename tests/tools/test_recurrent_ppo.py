"""The demonstration of recurrent PPO runs, and its comparison of the two trainings catches wrong resets."""

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
EXAMPLE = EXAMPLES / "recurrent_ppo.py"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    spec = importlib.util.spec_from_file_location("recurrent_ppo_under_test", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up there
    spec.loader.exec_module(module)
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(1)
    yield module
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)


def test_quick_run(tmp_path):
    picture = tmp_path / "curves.png"
    paths = [str(Path(lstm_ext.__file__).resolve().parents[1]), os.environ.get("PYTHONPATH")]
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), "--quick", "--output", str(picture)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    for row in (
        "return, last eighth of the updates",
        r"time of one update \(ms\)",
        r"time of one rollout \(ms\)",
    ):
        assert re.search(rf"^{row}  +[\d.]+  +[\d.]+", done.stdout, re.MULTILINE), done.stdout
    assert re.search(r"^  returns of the first 5 updates +\S+   allowed \S+   ok$", done.stdout, re.MULTILINE)
    assert "100%" in done.stderr and "\r" not in done.stderr  # the progress bar is readable in a log file


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


def test_advantages(example):
    """The recursion against the definition: the discounted sum of what the value missed, up to the episode's end."""
    steps, count = 9, 3
    x, values, rewards = torch.randn(3, steps, count, dtype=torch.float64)
    first = torch.rand(steps + 1, count) < 0.3
    next_value = torch.randn(count, dtype=torch.float64)
    rollout = example.Rollout(
        x, first[:-1], x, x, values, rewards, state=(x, x), next_value=next_value, next_first=first[-1]
    )
    found = example.advantages_of(rollout)
    following = torch.cat([values[1:], next_value[None]])
    for t in range(steps):
        for b in range(count):
            expected, weight = 0.0, 1.0
            for k in range(t, steps):
                ends = bool(first[k + 1, b])
                expected += weight * (
                    rewards[k, b] + example.DISCOUNT * (not ends) * following[k, b] - values[k, b]
                )
                weight *= example.DISCOUNT * example.GAE_LAMBDA
                if ends:
                    break
            torch.testing.assert_close(found[t, b], expected)


def test_environment(example):
    """A perfect memory gets 1; the best without one, 1 / SYMBOLS on average."""
    environments = example.Recall(500, torch.Generator().manual_seed(0))
    cue = torch.zeros(500, dtype=torch.long)
    ended = recalled = guessed = 0.0
    for _ in range(60):
        x = environments.observe()
        cue = torch.where(x[:, -2] > 0, x[:, : example.SYMBOLS].argmax(-1), cue)
        last = x[:, -1] > 0
        assert torch.equal(last, environments.last) and not (last & environments.first).any()
        guessed += (environments.cue[last] == x[last, : example.SYMBOLS].argmax(-1)).sum().item()
        ended += last.sum().item()
        recalled += environments.step(cue).sum().item()
    assert recalled == ended > 1000
    assert guessed / ended == pytest.approx(1 / example.SYMBOLS, abs=0.04)


def resets_one_step_late(model):
    unroll = model.unroll
    model.unroll = lambda x, first, state: unroll(x, first.roll(1, 0), state)


def no_resets(model):
    unroll = model.unroll
    model.unroll = lambda x, first, state: unroll(x, torch.zeros_like(first), state)


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


def one_percent(model):
    model.lstm.weight_hh_l0.register_hook(lambda grad: grad * 1.01)


@pytest.mark.parametrize("fault", [resets_one_step_late, no_resets, gradient_crosses, one_percent])
def test_planted_fault_is_found(fault, example, tmp_path, capfd):
    arguments = ["--quick", "--updates", "2", "--output", str(tmp_path / "x.png")]
    assert example.run(example.parse_options(arguments), tamper=fault) == 1
    error = capfd.readouterr().err
    assert "more than rounding explains" in error and "gradient norms in the first update" in error
