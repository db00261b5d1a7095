"""TorchRL's LSTMModule takes the layer as it is, and the module of examples/torchrl_lstm.py gives what it gives."""

from __future__ import annotations

import copy
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lstm_ext

pytest.importorskip("torchrl", reason="torchrl, of the optional group `test`, is not installed")

from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torchrl.envs import Compose, InitTracker, PendulumEnv, StepCounter, TransformedEnv
from torchrl.modules import GRU, LSTM, LSTMModule, set_recurrent_mode

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "torchrl_lstm.py"
spec = importlib.util.spec_from_file_location("torchrl_lstm_under_test", EXAMPLE)
example = importlib.util.module_from_spec(spec)
spec.loader.exec_module(example)
ResetLSTMModule = example.ResetLSTMModule

B, T, I, H = 4, 11, 3, 5
KEYS = example.KEYS
OPTIONS = [{}, {"num_layers": 2, "bias": False}, {"num_layers": 2, "proj_size": 2}, {"bidirectional": True}]
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Sizes so small that threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def layers(**options) -> tuple[nn.LSTM, lstm_ext.LSTM]:
    theirs = nn.LSTM(I, H, batch_first=True, dtype=torch.float64, **options)
    ours = lstm_ext.LSTM(I, H, batch_first=True, dtype=torch.float64, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def rollout(layer: nn.LSTM, shape: tuple[int, ...], zeros_at_init: bool, resets: float = 0.3) -> TensorDict:
    """Random numbers with states at every step; with ``zeros_at_init`` as torchrl's environments store them."""
    is_init = torch.rand(*shape, 1) < resets
    content = {"x": torch.randn(*shape, I, dtype=torch.float64), "is_init": is_init}
    sets = layer.num_layers * (2 if layer.bidirectional else 1)
    for key, size in (("h", layer.proj_size or H), ("c", H)):
        content[key] = torch.randn(*shape, sets, size, dtype=torch.float64)
        if zeros_at_init:
            content[key][is_init.squeeze(-1)] = 0
    return TensorDict(content, shape)


def run(module: LSTMModule, data: TensorDict, last_only: bool = False) -> tuple[list[Tensor], list[Tensor]]:
    """The results, and the gradients of x, h, c and the parameters.

    With ``last_only``, of the resulting states those of the last step, and of h's and c's gradients those of the first.
    """
    data = data.clone()
    inputs = [data[key].requires_grad_() for key in ("x", "h", "c")]
    module(data)
    y, *states = [data[key] for key in module.out_keys]
    results = [y, *([s.select(-3, -1) for s in states] if last_only else states)]
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(r.shape, dtype=r.dtype, generator=generator) for r in results]
    x, h, c, *parameters = torch.autograd.grad(results, [*inputs, *module.lstm.parameters()], weights)
    return results, [x, *([s.select(-3, 0) for s in (h, c)] if last_only else (h, c)), *parameters]


@pytest.mark.parametrize("resets", [0.3, 0.0])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_their_module_recurrent(options, resets):
    theirs, ours = layers(**options)
    data = rollout(theirs, (B, T), zeros_at_init=False, resets=resets)
    with set_recurrent_mode(True):
        expected = run(LSTMModule(lstm=theirs, **KEYS), data)
        found = run(LSTMModule(lstm=ours, **KEYS), data)
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("resets", [0.3, 0.0])
def test_their_module_with_their_layer_in_python(resets):
    """``convert`` puts ours in its place, which gets their mask of the steps that count."""
    theirs, _ = layers(num_layers=2)
    data = rollout(theirs, (B, T), zeros_at_init=False, resets=resets)
    module = LSTMModule(lstm=theirs, **KEYS).make_python_based()
    with set_recurrent_mode(True):
        expected = run(module, data)
        lstm_ext.convert(module)
        assert isinstance(module.lstm, lstm_ext.LSTM)
        torch.testing.assert_close(run(module, data), expected, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("cls", [LSTM, GRU])
def test_their_layer_in_autocast(cls, with_state, dtype):
    """The results have the dtypes of theirs."""
    theirs = cls(I, H)
    ours = lstm_ext.convert(copy.deepcopy(theirs))
    x, h = torch.randn(B, T, I).to(dtype), torch.randn(1, B, H)
    hx = (h if cls is GRU else (h, h)) if with_state else None
    with torch.autocast("cpu"):
        found, expected = ours(x, hx), theirs(x, hx)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


def test_their_layer_with_tied_weights_or_a_buffer():
    tied, other = LSTM(I, I, 2), LSTM(I, H)
    tied.weight_hh_l1 = tied.weight_hh_l0
    other.register_buffer("steps", torch.zeros(1))
    model = lstm_ext.convert(nn.ModuleList([tied, other]))
    assert model[0].weight_hh_l1 is model[0].weight_hh_l0 is tied.weight_hh_l0 and model[1] is other
    torch.testing.assert_close(model[0](torch.ones(B, T, I)), tied(torch.ones(B, T, I)))
    assert "it has modules or buffers" in lstm_ext.report(model)[1].reason


@pytest.mark.parametrize("module", [LSTMModule, ResetLSTMModule])
@pytest.mark.parametrize("options", OPTIONS[:2], ids=str)  # torchrl's single steps fail with proj_size
def test_single_steps(module, options):
    theirs, ours = layers(**options)
    data = rollout(theirs, (2, B), zeros_at_init=False)
    assert 0 < data["is_init"].sum() < data.numel()
    expected = run(LSTMModule(lstm=theirs, **KEYS), data)
    torch.testing.assert_close(run(module(lstm=ours, **KEYS), data), expected, **CLOSE)
    # and what that is: the states are zeros where an episode begins
    keep = 1.0 - data["is_init"].double().flatten()[None, :, None]
    hx = [keep * data[key].flatten(0, 1).transpose(0, 1) for key in ("h", "c")]
    y, _ = theirs(data["x"].reshape(-1, 1, I), hx)
    torch.testing.assert_close(expected[0][0], y.reshape(2, B, -1), **CLOSE)


@pytest.mark.parametrize("shape", [(B, T), (2, 3, T), (T,), (B, 1)], ids=str)
@pytest.mark.parametrize("options", OPTIONS[:3], ids=str)
def test_resets_equal_their_module(options, shape):
    theirs, ours = layers(**options)
    data = rollout(theirs, shape, zeros_at_init=True)
    # There, a stored state where a row begins gets a gradient even if it is a new episode's zeros.
    data["is_init"][..., 0, :] = False
    with set_recurrent_mode(True):
        expected = run(LSTMModule(lstm=theirs, **KEYS), data, last_only=True)
        found = run(ResetLSTMModule(lstm=ours, **KEYS), data, last_only=True)
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_resets_without_states(options):
    theirs, ours = layers(**options)
    data = rollout(theirs, (B, T), zeros_at_init=True).exclude("h", "c")
    weights = torch.randn(
        B, T, (theirs.proj_size or H) * (2 if theirs.bidirectional else 1), dtype=torch.float64
    )
    results = []
    with set_recurrent_mode(True):
        for module in (LSTMModule(lstm=theirs, **KEYS), ResetLSTMModule(lstm=ours, **KEYS)):
            y = module(data.clone())["y"]
            results.append([y, *torch.autograd.grad(y, list(module.lstm.parameters()), weights)])
    torch.testing.assert_close(results[1], results[0], **CLOSE)


class Observe(nn.Module):
    def forward(self, angle: Tensor, speed: Tensor) -> Tensor:
        return torch.stack([angle.cos(), angle.sin(), speed], -1)


def test_rollout_of_an_environment():
    """What the policy computed step by step while it collected comes out again, from the start and from the middle."""
    lstm = lstm_ext.LSTM(3, H, num_layers=2, batch_first=True)
    module = ResetLSTMModule(lstm=lstm, **KEYS)
    transforms = Compose(StepCounter(max_steps=7), InitTracker(), module.make_tensordict_primer())
    environment = TransformedEnv(PendulumEnv(), transforms)
    policy = TensorDictSequential(
        TensorDictModule(Observe(), in_keys=["th", "thdot"], out_keys=["x"]),
        module,
        TensorDictModule(nn.Linear(H, 1), in_keys=["y"], out_keys=["action"]),
    )
    with torch.no_grad():
        data = environment.rollout(30, policy, break_when_any_done=False)
        assert data["is_init"].sum() == 5
        assert data["h"].any() and not data["h"][data["is_init"].squeeze(-1)].any()
        for part in (data, data[4:19]):
            with set_recurrent_mode(True):
                found = module(part.clone())
            torch.testing.assert_close(found["y"], part["y"])
            for key in KEYS["out_keys"][1:]:
                torch.testing.assert_close(found[key][-1], part[key][-1])


@pytest.mark.tools
def test_program(capsys):
    example.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert all(float(line.split()[-1]) < 1e-5 for line in lines[1:])


IN_PLACE_OF_TORCH = """
import torch
import lstm_ext
torch.nn.LSTM, torch.nn.LSTMCell = lstm_ext.LSTM, lstm_ext.LSTMCell
import torchrl.modules
module = torchrl.modules.LSTMModule(3, 4, in_key="x", out_key="y")
assert type(module.lstm) is lstm_ext.LSTM
"""


@pytest.mark.slow
def test_torchrl_is_imported_where_our_classes_are_in_torchs_place():
    subprocess.run([sys.executable, "-W", "ignore", "-c", IN_PLACE_OF_TORCH], check=True)
