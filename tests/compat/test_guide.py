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
        rf"^###? {re.escape(heading)}\n(.*?)(?=^##|\Z)", GUIDE.read_text(), re.DOTALL | re.MULTILINE
    )
    assert section is not None, heading
    return re.findall(r"```python compat\n(.*?)```", section[1], re.DOTALL)


def run(heading: str) -> list[dict]:
    """Runs each snippet under the heading alone, as a reader pastes it: its names."""
    found = []
    for snippet in snippets(heading):
        names: dict = {"__name__": "__main__"}
        exec(compile(snippet, f"other-libraries.md, {heading}", "exec"), names)
        found.append(names)
    return found


def are_ours(*models: torch.nn.Module) -> bool:
    entries = [entry for model in models for entry in lstm_ext.report(model)]
    return bool(entries) and all([entry.ours for entry in entries])


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_sb3_contrib():
    pytest.importorskip("sb3_contrib")
    plain, with_resets = run("sb3-contrib")
    assert are_ours(plain["agent"].policy)
    agent, policy = with_resets["agent"], with_resets["agent"].policy
    assert are_ours(policy)
    # Episodes start inside the sequences: by their loop and by one call.
    features, starts = torch.randn(40, 4, dtype=torch.float64), (torch.rand(40) < 0.3).double()
    lstm = policy.lstm_actor.double()
    states = tuple(torch.randn(1, 4, lstm.hidden_size, dtype=torch.float64) for _ in range(2))
    ours = type(policy)._process_sequence(features, states, starts, lstm)
    theirs = with_resets["RecurrentActorCriticPolicy"]._process_sequence(features, states, starts, lstm)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    lstm.float()
    agent.learn(128)
    agent.save("resets.zip")
    loaded = type(agent).load("resets.zip", custom_objects={"policy_class": with_resets["ResetPolicy"]})
    assert type(loaded.policy) is with_resets["ResetPolicy"]


def test_rsl_rl():
    pytest.importorskip("rsl_rl.runners")
    from test_policies import config_of_rsl_rl, toy_env

    (found,) = run("rsl_rl")
    runner = found["train"](toy_env(), config_of_rsl_rl())
    assert are_ours(runner.alg.critic)
    assert Path("exported", "policy.pt").is_file()


def test_torchrl():
    pytest.importorskip("torchrl.modules")
    (found,) = run("TorchRL")
    assert are_ours(found["policy"], found["module"])


def test_lightning():
    lightning = pytest.importorskip("lightning")
    from test_forecasting import QUIET

    (found,) = run("Lightning")
    model = found["model"]
    assert are_ours(model)
    trainer = lightning.Trainer(**QUIET)
    trainer.strategy.connect(model)
    trainer.save_checkpoint("model.ckpt")
    loaded = lstm_ext.convert(found["Forecaster"].load_from_checkpoint("model.ckpt"))
    assert are_ours(loaded)
    x = torch.randn(5, 2, 1)
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)


def test_gluonts():
    pytest.importorskip("gluonts")
    (found,) = run("gluonts")
    assert are_ours(found["predictor"].prediction_net)


def test_neuralforecast():
    pytest.importorskip("neuralforecast")
    (found,) = run("neuralforecast")
    assert are_ours(*found["forecast"].models)


def test_easyocr(monkeypatch):
    easyocr = pytest.importorskip("easyocr")
    weights = pytest.importorskip("easyocr_en_models")
    # The folder in which a user of EasyOCR has the weights.
    Path("model").symlink_to(weights.model_dir())
    monkeypatch.setattr(easyocr.easyocr, "MODULE_PATH", str(Path.cwd()))
    (found,) = run("EasyOCR")
    assert are_ours(found["reader"].recognizer)


def test_neuralhydrology():
    pytest.importorskip("neuralhydrology")
    from test_forecasting import config_of_neuralhydrology

    (found,) = run("neuralhydrology")
    assert are_ours(found["build"](config_of_neuralhydrology("cudalstm")))


def test_keras():
    pytest.importorskip("keras")
    (found,) = run("Keras on torch")
    found["handle"].stop()
    assert found["handle"].computed and not found["handle"].left
