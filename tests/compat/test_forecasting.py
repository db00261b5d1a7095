"""Forecasts: gluonts, neuralforecast and neuralhydrology; and a LightningModule, on which the first two are built."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from before_after import (
    TRAINED,
    assert_same,
    check_accuracy,
    check_state_dicts,
    converted,
    either,
    with_gradients,
)
from torch import Tensor, nn

import lstm_ext

pytestmark = [pytest.mark.full, pytest.mark.filterwarnings("ignore::UserWarning")]

FORECAST = {"rtol": 1e-4, "atol": 1e-5}
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}


def season(steps: int, phase: float) -> np.ndarray:
    t = np.arange(steps)
    return 10 + 3 * np.sin(2 * np.pi * t / 7 + phase) + 0.3 * np.cos(t * t)


# ---- Lightning


def forecaster(**options):
    lightning = pytest.importorskip("lightning")

    class Forecaster(lightning.LightningModule):
        def __init__(self, hidden_size: int = 16) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.lstm = nn.LSTM(1, hidden_size, num_layers=2, batch_first=True)
            self.head = nn.Linear(hidden_size, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.lstm(x)[0])

        def training_step(self, batch: list[Tensor], _: int) -> Tensor:
            (y,) = batch
            return nn.functional.mse_loss(self(y[:, :-1]), y[:, 1:])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters())

    torch.manual_seed(0)
    return Forecaster(**options)


def rows() -> Tensor:
    return torch.stack([torch.from_numpy(season(30, k)).float() for k in range(8)])[..., None] / 10


def test_lightning_fits_saves_and_loads(tmp_path):
    pytest.importorskip("lightning")
    from lightning import Trainer

    theirs, ours = forecaster(), lstm_ext.convert(forecaster())
    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(rows()), batch_size=4)
    for model, name in ((theirs, "theirs"), (ours, "ours")):
        trainer = Trainer(max_epochs=1, **QUIET)
        trainer.fit(model, batches)
        assert trainer.global_step == 2
        trainer.save_checkpoint(tmp_path / f"{name}.ckpt")
    assert_same(ours, theirs, **TRAINED)
    loaded = type(ours).load_from_checkpoint(tmp_path / "ours.ckpt")
    assert type(loaded.lstm) is nn.LSTM
    assert_same(loaded, ours, rtol=0, atol=0)
    torch.testing.assert_close(lstm_ext.convert(loaded)(rows()), ours(rows()), rtol=0, atol=0)
    # and on with the optimizer's state, from torch's checkpoint
    onward = lstm_ext.convert(forecaster())
    Trainer(max_epochs=2, **QUIET).fit(
        onward, batches, ckpt_path=tmp_path / "theirs.ckpt", weights_only=False
    )
    Trainer(max_epochs=2, **QUIET).fit(
        theirs, batches, ckpt_path=tmp_path / "theirs.ckpt", weights_only=False
    )
    assert_same(onward, theirs, **TRAINED)


def test_lightning_exports_to_onnx(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    ours = lstm_ext.convert(forecaster()).eval()
    path = str(tmp_path / "model.onnx")
    ours.to_onnx(path, rows(), dynamo=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: rows().numpy()})
    torch.testing.assert_close(torch.from_numpy(found), ours(rows()).detach(), rtol=1e-4, atol=1e-5)


# ---- gluonts


def data_of_gluonts():
    pytest.importorskip("gluonts")
    pytest.importorskip("lightning")
    from gluonts.dataset.common import ListDataset

    return ListDataset([{"start": "2024-01-01", "target": season(80, k)} for k in range(4)], freq="D")


def estimator_of_gluonts(folder: Path):
    from gluonts.torch import DeepAREstimator

    quiet = {key: value for key, value in QUIET.items() if key != "enable_checkpointing"}
    return DeepAREstimator(
        freq="D",
        prediction_length=5,
        context_length=10,
        hidden_size=16,
        dropout_rate=0.0,
        num_batches_per_epoch=2,
        batch_size=8,
        trainer_kwargs={**quiet, "max_epochs": 1, "default_root_dir": folder},
    )


def samples(predictor, data) -> np.ndarray:
    torch.manual_seed(1)
    return np.stack([forecast.samples for forecast in predictor.predict(data)])


def trained_by_gluonts(data, folder: Path, ours: bool):
    torch.manual_seed(0)
    np.random.seed(0)
    with either(ours):
        return estimator_of_gluonts(folder).train(data)


def test_gluonts_trains_predicts_and_saves(tmp_path):
    data = data_of_gluonts()
    theirs, ours = (trained_by_gluonts(data, tmp_path, ours) for ours in (False, True))
    assert [entry.ours for entry in lstm_ext.report(ours.prediction_net)] == [True]
    assert_same(ours.prediction_net, theirs.prediction_net, **TRAINED)
    expected = samples(ours, data)
    (tmp_path / "saved").mkdir()
    ours.serialize(tmp_path / "saved")
    loaded = type(ours).deserialize(tmp_path / "saved")
    assert_same(loaded.prediction_net, ours.prediction_net, rtol=0, atol=0)
    np.testing.assert_allclose(samples(loaded, data), expected, **FORECAST)
    lstm_ext.convert(loaded.prediction_net)
    np.testing.assert_allclose(samples(loaded, data), expected, **FORECAST)


# ---- neuralforecast


def frame():
    pandas = pytest.importorskip("pandas")
    days = pandas.date_range("2024-01-01", periods=60)
    parts = [pandas.DataFrame({"unique_id": str(k), "ds": days, "y": season(60, k)}) for k in range(3)]
    return pandas.concat(parts)


def forecast_of_neuralforecast(name: str, ours: bool, **options):
    models = pytest.importorskip("neuralforecast.models")
    from neuralforecast import NeuralForecast

    with either(ours):
        model = getattr(models, name)(h=4, input_size=14, max_steps=2, random_seed=1, **options, **QUIET)
    forecast = NeuralForecast([model], freq="D")
    forecast.fit(frame())
    return forecast


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("LSTM", {"encoder_hidden_size": 16}),
        ("LSTM", {"encoder_hidden_size": 16, "recurrent": True}),  # with a projection
        ("DeepAR", {"lstm_hidden_size": 16, "lstm_dropout": 0.0}),
        ("TFT", {"hidden_size": 16, "dropout": 0.0, "attn_dropout": 0.0}),
    ],
    ids=["LSTM", "recurrent", "DeepAR", "TFT"],
)
def test_neuralforecast_trains_predicts_and_saves(name, options, tmp_path):
    theirs, ours = (forecast_of_neuralforecast(name, ours, **options) for ours in (False, True))
    entries = lstm_ext.report(ours.models[0])
    assert entries and all([entry.ours for entry in entries])
    assert_same(ours.models[0], theirs.models[0], **TRAINED)

    def predicted(forecast) -> np.ndarray:
        torch.manual_seed(2)  # DeepAR draws samples
        return forecast.predict(frame()).iloc[:, 2:].to_numpy(dtype=float)

    np.testing.assert_allclose(predicted(ours), predicted(theirs), **FORECAST)
    ours.save(str(tmp_path / "saved"), overwrite=True)
    loaded = type(ours).load(str(tmp_path / "saved"))
    assert not any([entry.ours for entry in lstm_ext.report(loaded.models[0])])
    assert_same(loaded.models[0], ours.models[0], rtol=0, atol=0)
    expected = predicted(
        loaded
    )  # DeepAR's samples are others than before it was saved, with torch's layer too
    lstm_ext.convert(loaded.models[0])
    np.testing.assert_allclose(predicted(loaded), expected, **FORECAST)


# ---- neuralhydrology


def config_of_neuralhydrology(name: str):
    pytest.importorskip("neuralhydrology")
    from neuralhydrology.utils.config import Config

    return Config(
        {
            "model": name,
            "head": "regression",
            "hidden_size": 16,
            "initial_forget_bias": 3,
            "output_dropout": 0.0,
            "dynamic_inputs": ["rain", "temperature"],
            "target_variables": ["discharge"],
            "use_frequencies": ["1D"],
            "predict_last_n": 1,
            "seq_length": 30,
            "device": "cpu",
        }
    )


def model_of_neuralhydrology(name: str) -> nn.Module:
    config = config_of_neuralhydrology(name)
    from neuralhydrology.modelzoo import get_model

    torch.manual_seed(0)
    return get_model(config)


def weather() -> dict[str, Tensor]:
    values = [
        torch.from_numpy(np.stack([season(30, k + j) for k in range(5)]))[..., None] / 10 for j in (0, 2)
    ]
    return dict(zip(("rain", "temperature"), values, strict=True))


def simulate(model: nn.Module) -> dict[str, Tensor]:
    dtype = next(model.parameters()).dtype
    results = model({"x_d": {name: value.to(dtype) for name, value in weather().items()}})
    return {key: results[key] for key in ("y_hat", "h_n", "c_n")}


def test_neuralhydrology():
    model = model_of_neuralhydrology("cudalstm")
    check_accuracy(model, lambda model: with_gradients(model, simulate(model)))
    check_state_dicts(model)


def test_neuralhydrology_copies_our_weights():
    """Into its model for analysis, whose cell is its own."""
    ours = converted(model_of_neuralhydrology("cudalstm"))
    custom = model_of_neuralhydrology("customlstm")
    assert lstm_ext.report(custom) == []
    custom.copy_weights(ours)
    y = simulate(ours)["y_hat"]
    torch.testing.assert_close(simulate(custom)["y_hat"], y, rtol=1e-4, atol=1e-5)
