"""A model of each framework from which weights can be imported: its own layers, as it makes them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lstm_ext

pytestmark = pytest.mark.full

B, T, I, H = 3, 11, 5, 16


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


X = numbers(B, T, I)


def same(ours: Tensor, theirs: Any, tolerance: float = 2e-6) -> None:
    expected = torch.from_numpy(np.array(theirs))
    assert ours.shape == expected.shape
    assert torch.linalg.vector_norm(ours - expected) <= tolerance * torch.linalg.vector_norm(expected)


@pytest.mark.parametrize(
    "functions", [{}, {"activation": "relu", "recurrent_activation": "hard_sigmoid"}], ids=str
)
def test_keras(functions: dict[str, str]) -> None:
    """A stack of both directions, there and back."""
    keras = pytest.importorskip("keras")

    def model() -> Any:
        layers = [
            keras.layers.Bidirectional(keras.layers.LSTM(H, return_sequences=True, **functions))
            for _ in range(2)
        ]
        return keras.Sequential([keras.Input((T, I)), *layers])

    theirs = model()
    ours = lstm_ext.from_keras(list(theirs.layers))
    same(ours(torch.from_numpy(X))[0], theirs.predict(X, verbose=0))
    again = model()
    for layer, arrays in zip(again.layers, lstm_ext.to_keras(ours), strict=True):
        layer.set_weights(arrays)
    assert np.array_equal(again.predict(X, verbose=0), theirs.predict(X, verbose=0))


def test_a_mask_of_keras() -> None:
    """Steps that are left out keep the state in both; the output of Keras shows it there, and ours is 0."""
    keras = pytest.importorskip("keras")
    mask = np.random.default_rng(2).random((B, T)) < 0.6
    layer = keras.layers.LSTM(H, return_sequences=True)
    found = keras.ops.convert_to_numpy(layer(X, mask=mask))
    output, (h_n, _) = lstm_ext.from_keras(layer)(torch.from_numpy(X), mask=torch.from_numpy(mask))
    same(h_n[0], found[:, -1])
    same(output, found * mask[..., None])
    assert all(np.array_equal(found[:, t][~mask[:, t]], found[:, t - 1][~mask[:, t]]) for t in range(1, T))


def test_tensorflow() -> None:
    tf = pytest.importorskip("tensorflow")
    w, b, diagonals = numbers(I + H, 4 * H) / 4, numbers(4 * H), [numbers(H) for _ in range(3)]
    zeros = tf.zeros((B, H))
    found = tf.raw_ops.BlockLSTM(
        seq_len_max=tf.constant(T, tf.int64), x=X.swapaxes(0, 1).copy(), cs_prev=zeros, h_prev=zeros, w=w,
        wci=diagonals[0], wcf=diagonals[1], wco=diagonals[2], b=b, forget_bias=1.0, cell_clip=0.5, use_peephole=True,
    )  # fmt: skip
    names = ("w_i_diag", "w_f_diag", "w_o_diag")
    variables = {"kernel": w, "bias": b, **dict(zip(names, diagonals, strict=True))}
    layer = lstm_ext.from_tensorflow({n: tf.Variable(v) for n, v in variables.items()}, cell_clip=0.5)
    same(layer(torch.from_numpy(X))[0], found.h.numpy().swapaxes(0, 1))


def test_flax() -> None:
    linen = pytest.importorskip("flax.linen")
    import jax

    model = linen.RNN(linen.OptimizedLSTMCell(H))
    params = model.init(jax.random.key(0), X)
    same(lstm_ext.from_jax(params)(torch.from_numpy(X))[0], model.apply(params, X))


def test_haiku() -> None:
    haiku = pytest.importorskip("haiku")
    import jax

    def unrolled(x: Any) -> Any:
        core = haiku.LSTM(H)
        return haiku.dynamic_unroll(core, x, core.initial_state(B), time_major=False)[0]

    model = haiku.without_apply_rng(haiku.transform(unrolled))
    params = model.init(jax.random.key(0), X)
    same(lstm_ext.from_jax(params)(torch.from_numpy(X))[0], model.apply(params, X))


def test_equinox() -> None:
    equinox = pytest.importorskip("equinox")
    import jax
    import jax.numpy as jnp

    cell = equinox.nn.LSTMCell(I, H, key=jax.random.key(0))

    def run(x: Any) -> Any:
        def step(state: Any, x_t: Any) -> Any:
            state = cell(x_t, state)
            return state, state[0]

        return jax.lax.scan(step, (jnp.zeros(H), jnp.zeros(H)), x)[1]

    same(lstm_ext.from_jax(cell)(torch.from_numpy(X))[0], jax.vmap(run)(X))


def test_mlx() -> None:
    mlx = pytest.importorskip("mlx.nn")
    import mlx.core as mx

    layer = mlx.LSTM(I, H)
    same(lstm_ext.from_mlx(layer)(torch.from_numpy(X))[0], layer(mx.array(X))[0])


def test_onnx(tmp_path: Path) -> None:
    """A model that torch exported, from its file."""
    pytest.importorskip("onnxscript")
    theirs = nn.LSTM(I, H, bidirectional=True, batch_first=False).eval()
    x = torch.from_numpy(X.swapaxes(0, 1).copy())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(theirs, (x,), tmp_path / "model.onnx", dynamo=True)
    (ours,) = lstm_ext.from_onnx(tmp_path / "model.onnx").values()
    same(ours(x)[0].detach(), theirs(x)[0].detach())


def test_torch_ao() -> None:
    model = nn.Sequential(nn.LSTM(I, 64, 2, bidirectional=True, batch_first=True)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (quantized,) = torch.ao.quantization.quantize_dynamic(model, {nn.LSTM}, dtype=torch.qint8)
    x = torch.from_numpy(X)
    same(lstm_ext.from_torch_ao(quantized)(x)[0], quantized(x)[0], tolerance=2e-2)
