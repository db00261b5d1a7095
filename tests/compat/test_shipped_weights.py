"""Models whose packages carry their weights: EasyOCR's recognition, Resemblyzer's encoder, Silero's detector."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from before_after import check_accuracy, check_state_dicts, converted, with_gradients
from torch import Tensor, nn

import lstm_ext

pytestmark = pytest.mark.full


def reader_of_easyocr(quantize: bool):
    easyocr = pytest.importorskip("easyocr")
    weights = pytest.importorskip("easyocr_en_models")
    # It compares the weights' digest with the one that it has itself.
    return easyocr.Reader(
        ["en"],
        gpu=False,
        quantize=quantize,
        detector=False,
        download_enabled=False,
        model_storage_directory=weights.model_dir(),
        verbose=False,
    )


def line_of_text(text: str) -> np.ndarray:
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("L", (320, 48), 255)
    ImageDraw.Draw(image).text((10, 8), text, font=ImageFont.load_default(28), fill=0)
    return np.array(image)


def read(reader, image: np.ndarray) -> tuple[str, float]:
    height, width = image.shape
    ((_, text, confidence),) = reader.recognize(
        image, horizontal_list=[[0, width, 0, height]], free_list=[], batch_size=1
    )
    return text, confidence


def test_easyocr_reads_the_same():
    reader = reader_of_easyocr(quantize=False)
    image = line_of_text("Long short memory 1997")
    theirs = read(reader, image)
    assert "short" in theirs[0]
    lstm_ext.convert(reader.recognizer)
    assert [entry.ours for entry in lstm_ext.report(reader.recognizer)] == [True, True]
    ours = read(reader, image)
    assert ours[0] == theirs[0]
    assert ours[1] == pytest.approx(theirs[1], rel=1e-4)


def test_easyocr_quantized_is_refused():
    reader = reader_of_easyocr(quantize=True)
    if not any(["quantized" in type(module).__module__ for module in reader.recognizer.modules()]):
        pytest.skip("this torch quantizes no layers")
    with pytest.raises(TypeError, match=r"'SequenceModeling\.0\.rnn' .* a quantized layer"):
        lstm_ext.convert(reader.recognizer)


def test_resemblyzer():
    pytest.importorskip("resemblyzer")
    from resemblyzer import VoiceEncoder, audio

    encoder = VoiceEncoder("cpu", verbose=False)
    time = np.arange(16000, dtype=np.float64) / 16000
    pitch = 2 * np.pi * (120 * time + 5 * np.sin(2 * np.pi * 3 * time))
    voice = sum(np.sin(k * pitch) / k for k in range(1, 20)) * (1 + np.sin(2 * np.pi * 4 * time))
    mels = torch.from_numpy(audio.wav_to_mel_spectrogram((0.05 * voice).astype(np.float32)))[None]

    def run(model: nn.Module) -> dict[str, Tensor]:
        return with_gradients(model, {"embedding": model(mels.to(model.linear.weight.dtype))})

    check_accuracy(encoder, run)
    check_state_dicts(encoder)
    ours = converted(encoder)
    wav = (0.05 * voice).astype(np.float32)
    np.testing.assert_allclose(ours.embed_utterance(wav), encoder.embed_utterance(wav), atol=1e-5)


def test_silero_is_refused():
    """Its weights come compiled by TorchScript, where no layer can be exchanged; it stays as it is."""
    silero = pytest.importorskip("silero_vad")
    model = silero.load_silero_vad()
    x = torch.sin(torch.arange(512) / 5)[None]
    before = model(x, 16000)
    with pytest.raises(TypeError, match=r"RecursiveScriptModule\): compiled by torch\.jit") as error:
        lstm_ext.convert(model)
    assert "'_model.decoder" in str(error.value)
    model.reset_states()
    torch.testing.assert_close(model(x, 16000), before, rtol=0, atol=0)
