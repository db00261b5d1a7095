"""The snippets of docs/guide/other-libraries.md run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import lstm_ext

pytestmark = [pytest.mark.full, pytest.mark.filterwarnings("ignore::UserWarning")]

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "guide" / "other-libraries.md"


def snippets(heading: str) -> list[str]:
    section = re.search(
        rf"^### {re.escape(heading)}\n(.*?)(?=^##|\Z)", GUIDE.read_text(), re.DOTALL | re.MULTILINE
    )
    assert section is not None, heading
    return re.findall(r"```python compat\n(.*?)```", section[1], re.DOTALL)


def run(heading: str, **names: object) -> dict:
    """What the names stand for after all snippets under the heading."""
    found = {"lstm_ext": lstm_ext, "torch": torch, **names}
    for snippet in snippets(heading):
        exec(compile(snippet, f"other-libraries.md, {heading}", "exec"), found)
    return found


def are_ours(*models: torch.nn.Module) -> bool:
    entries = [entry for model in models for entry in lstm_ext.report(model)]
    return bool(entries) and all([entry.ours for entry in entries])


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_sb3_contrib():
    pytest.importorskip("sb3_contrib")
    import gymnasium

    found = run("sb3-contrib", env=gymnasium.make("CartPole-v1"))
    agent, policy = found["agent"], found["agent"].policy
    assert are_ours(policy)
    # Episodes start inside the sequences: by their loop and by one call.
    features, starts = torch.randn(40, 4, dtype=torch.float64), (torch.rand(40) < 0.3).double()
    lstm = policy.lstm_actor.double()
    states = tuple(torch.randn(1, 4, lstm.hidden_size, dtype=torch.float64) for _ in range(2))
    ours = type(policy)._process_sequence(features, states, starts, lstm)
    theirs = found["RecurrentActorCriticPolicy"]._process_sequence(features, states, starts, lstm)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    lstm.float()
    agent.learn(128)
    agent.save("resets.zip")
    loaded = type(agent).load("resets.zip", custom_objects={"policy_class": found["ResetPolicy"]})
    assert type(loaded.policy) is found["ResetPolicy"]


def test_rsl_rl():
    runners = pytest.importorskip("rsl_rl.runners")
    from test_policies import config_of_rsl_rl, toy_env

    found = run("rsl_rl", OnPolicyRunner=runners.OnPolicyRunner, env=toy_env(), config=config_of_rsl_rl())
    assert are_ours(found["runner"].alg.critic)
    assert Path("exported", "policy.pt").is_file()


def test_torchrl():
    modules = pytest.importorskip("torchrl.modules")
    keys = {"in_keys": ["x", "h", "c"], "out_keys": ["y", ("next", "h"), ("next", "c")]}
    policy = modules.LSTMModule(input_size=3, hidden_size=8, **keys)
    found = run("TorchRL", policy=policy)
    assert are_ours(policy, found["module"])


def test_lightning():
    lightning = pytest.importorskip("lightning")
    from test_forecasting import QUIET, forecaster, rows

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(rows()), batch_size=4)
    trainer = lightning.Trainer(max_epochs=1, **QUIET)
    assert are_ours(run("Lightning", Forecaster=type(forecaster()), trainer=trainer, data=data)["model"])


def test_gluonts(tmp_path):
    pytest.importorskip("gluonts")
    from gluonts.torch import PyTorchPredictor
    from test_forecasting import data_of_gluonts, estimator_of_gluonts

    (tmp_path / "saved").mkdir()
    names = {"PyTorchPredictor": PyTorchPredictor, "folder": tmp_path / "saved"}
    found = run("gluonts", estimator=estimator_of_gluonts(tmp_path), dataset=data_of_gluonts(), **names)
    assert are_ours(found["predictor"].prediction_net)


def test_neuralforecast():
    neuralforecast = pytest.importorskip("neuralforecast")
    from neuralforecast.models import LSTM
    from test_forecasting import frame

    names = {"LSTM": LSTM, "NeuralForecast": neuralforecast.NeuralForecast}
    assert are_ours(*run("neuralforecast", frame=frame(), **names)["forecast"].models)


def test_easyocr(monkeypatch):
    easyocr = pytest.importorskip("easyocr")
    weights = pytest.importorskip("easyocr_en_models")
    # The folder in which a user of EasyOCR has the weights.
    Path("model").symlink_to(weights.model_dir())
    monkeypatch.setattr(easyocr.easyocr, "MODULE_PATH", str(Path.cwd()))
    assert are_ours(run("EasyOCR", easyocr=easyocr)["reader"].recognizer)


def test_neuralhydrology():
    pytest.importorskip("neuralhydrology")
    from test_forecasting import config_of_neuralhydrology

    assert are_ours(run("neuralhydrology", config=config_of_neuralhydrology("cudalstm"))["model"])
