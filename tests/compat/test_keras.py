"""``patch_keras``: layers of Keras on its torch backend, with its results as it computes them in float64."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from judge import Worst
from torch import Tensor

import lstm_ext

pytestmark = pytest.mark.full
keras = pytest.importorskip("keras")
ops = pytest.importorskip("keras.src.ops")  # as the layers see them

B, T, I, H = 3, 12, 5, 7
BOTH = {"return_sequences": True, "return_state": True}
SEEDS = 20


@pytest.fixture(autouse=True)
def _the_torch_backend() -> None:
    assert keras.backend.backend() == "torch"


class Case(NamedTuple):
    """A layer and a call of it.

    ``mask`` is the share of the steps that count. ``wrapper`` is Bidirectional or RNN.
    """

    options: Mapping[str, Any] = MappingProxyType({})
    kind: str = "LSTM"
    mask: float | None = None
    states: bool = False
    training: bool = False
    dtype: str = "float32"
    wrapper: str = ""
    calls: int = 1  # of a Bidirectional two layers, of a stateful one two calls


CASES = {
    "last output": Case(),
    "float64": Case(BOTH, dtype="float64"),
    "bfloat16": Case(BOTH, dtype="bfloat16"),
    "float16": Case(BOTH, dtype="float16"),
    "mixed bfloat16": Case(BOTH, dtype="mixed_bfloat16", mask=0.6),
    "sequences and states": Case(BOTH, states=True),
    "no bias": Case({**BOTH, "use_bias": False}),
    "backwards": Case({**BOTH, "go_backwards": True}),
    "unrolled": Case({**BOTH, "unroll": True, "use_cudnn": False}),
    "mask, last output": Case({"return_state": True}, mask=0.6, states=True),
    "mask": Case(BOTH, mask=0.6, states=True),
    "no step counts": Case(BOTH, mask=0.0, states=True),
    "mask, float64": Case(BOTH, mask=0.6, dtype="float64"),
    "mask, zeros": Case({**BOTH, "zero_output_for_mask": True}, mask=0.6),
    "mask, zeros, last output": Case({"zero_output_for_mask": True}, mask=0.6),
    "mask, backwards": Case({**BOTH, "go_backwards": True}, mask=0.6),
    "mask, unrolled": Case({**BOTH, "unroll": True}, mask=0.6),
    "stateful": Case({**BOTH, "stateful": True}, calls=2),
    "stateful, mask": Case({**BOTH, "stateful": True}, mask=0.6, calls=2),
    "dropout": Case({**BOTH, "dropout": 0.4}, training=True),
    "dropout, mask": Case({**BOTH, "dropout": 0.4}, mask=0.6, training=True),
    "dropout in inference": Case({**BOTH, "dropout": 0.4, "recurrent_dropout": 0.4}),
    "both directions": Case({"return_sequences": True}, wrapper="Bidirectional", calls=2),
    "both directions, mask": Case({"return_sequences": True}, mask=0.6, wrapper="Bidirectional", calls=2),
    "RNN of a cell": Case(BOTH, mask=0.6, wrapper="RNN"),
    "GRU": Case(BOTH, "GRU", states=True),
    "GRU, last output": Case({"use_bias": False, "go_backwards": True}, "GRU"),
    "GRU, float64": Case({**BOTH, "go_backwards": True}, "GRU", dtype="float64"),
    "GRU, dropout": Case({**BOTH, "dropout": 0.4}, "GRU", training=True),
    "GRU, mask": Case(BOTH, "GRU", mask=0.6, states=True),
    "GRU, both directions, mask": Case({}, "GRU", mask=0.6, wrapper="Bidirectional", calls=2),
    "GRU, stateful": Case({**BOTH, "stateful": True}, "GRU", calls=2),
}
CASES |= {
    name: Case({**BOTH, "activation": name, "recurrent_activation": "hard_sigmoid"})
    for name in ("relu", "hard_sigmoid", "leaky_relu", "elu", "softplus", "softsign", "linear", "sigmoid")
}


def layer_of(case: Case, dtype: str) -> Any:
    # The usual initialiser of this kernel has no 16-bit version.
    options = {**case.options, "dtype": dtype}
    if case.wrapper == "RNN":
        cell = keras.layers.LSTMCell(H, dtype=dtype)
        return keras.layers.RNN(cell, **options)
    layer = getattr(keras.layers, case.kind)(H, recurrent_initializer="glorot_uniform", **options)
    return keras.layers.Bidirectional(layer, dtype=dtype) if case.wrapper else layer


def exact_product(a: Any, b: Any) -> Tensor:
    """For the reference, since the one of Keras 3.15 computes numbers of float64 in float32."""
    return keras.ops.convert_to_tensor(a) @ keras.ops.convert_to_tensor(b)


def flat(results: Any) -> list[Tensor]:
    return [t for r in results for t in flat(r)] if isinstance(results, (tuple, list)) else [results]


def results_of(case: Case, layer: Any, seed: int) -> dict[str, Tensor]:
    """The results and the gradients with the numbers of this seed, in the dtype of the layer."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    dtype = getattr(torch, layer.compute_dtype)
    x = numbers(B, T, I)
    arguments: dict[str, Any] = {"training": case.training}
    if case.mask is not None:
        arguments["mask"] = torch.rand(B, T, generator=generator) < case.mask
    if case.states:
        arguments["initial_state"] = [numbers(B, H).to(dtype) for _ in range(1 + (case.kind == "LSTM"))]
    if not layer.built:
        layer.build((B, T, I))
    for variable in layer.trainable_variables:
        variable.assign(numbers(*variable.shape).div(3).numpy())
        variable.value.grad = None
    if getattr(layer, "stateful", False):
        layer.reset_state()
    x = x.to(dtype).requires_grad_()
    outputs: list[Tensor] = []
    for _ in range(case.calls if case.options.get("stateful") else 1):
        if outputs and not layer.stateful:
            arguments["initial_state"] = [state.detach() for state in outputs[-1 - (case.kind == "LSTM") :]]
        if case.training:  # the masks that Keras draws depend on the dtype
            keep = torch.rand(B, I, generator=generator) < 0.6
            layer.cell._dropout_mask = keep.to(dtype) / 0.6
        outputs += flat(layer(x, **arguments))
    cotangents = [numbers(*y.shape).to(y.dtype) for y in outputs]
    torch.autograd.backward(outputs, cotangents)
    found = {f"result {k}": y.detach() for k, y in enumerate(outputs)}
    found["gradient of the input"] = x.grad
    for variable in layer.trainable_variables:
        found[f"gradient of {variable.path}"] = variable.value.grad
    return dict(zip([str(k) for k in range(len(found))], found.values(), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_a_layer(name: str) -> None:
    """The worst of 20 seeds, against Keras' own loop in float64."""
    case, worst = CASES[name], Worst()
    # Gradients through a stateful layer of Keras fail, since it writes into the states.
    plain = case._replace(options={k: v for k, v in case.options.items() if k != "stateful"})
    exact, alike, layer = layer_of(plain, "float64"), layer_of(plain, case.dtype), layer_of(case, case.dtype)
    for seed in range(SEEDS):
        with mock.patch.object(ops, "matmul", exact_product):
            reference = results_of(case, exact, seed)
        theirs = results_of(case, alike, seed)
        with lstm_ext.patch_keras() as handle:
            ours = results_of(case, layer, seed)
        assert (handle.computed, handle.left) == (case.calls, {})
        worst.add(ours, theirs, reference)
    assert worst.problems() == []


def test_a_mask_unrolled_and_backwards() -> None:
    """Keras' own code for this one fails."""
    case = Case({**BOTH, "go_backwards": True}, mask=0.6, dtype="float64")
    with mock.patch.object(ops, "matmul", exact_product):
        expected = results_of(case, layer_of(case, "float64"), 1)
    unrolled = layer_of(case._replace(options={**case.options, "unroll": True}), "float64")
    with lstm_ext.patch_keras():
        torch.testing.assert_close(results_of(case, unrolled, 1), expected)


def user_function(x: Tensor) -> Tensor:
    return torch.tanh(x) / 2


user_function.__name__ = "tanh"

KERAS_WAY = {
    "recurrent_dropout in training": Case({**BOTH, "recurrent_dropout": 0.3}, training=True),
    "the activation gelu": Case({"activation": "gelu"}),
    "the activation tanh": Case({"activation": user_function}),  # by its name only
    "few steps for the size of the kernels": Case(),
    "cells of the class SimpleRNNCell": Case(kind="SimpleRNN"),
    "a GRU with other activations": Case({**BOTH, "activation": "relu"}, "GRU"),
    "a GRU with reset_after=False": Case({"reset_after": False}, "GRU"),
}


@pytest.mark.parametrize("reason", KERAS_WAY)
def test_what_goes_the_way_of_keras(reason: str) -> None:
    """With its bits and its random numbers."""
    case = KERAS_WAY[reason]
    layer, steps = layer_of(case, "float32"), 2 if reason.startswith("few") else T
    x = torch.randn(B, steps, I, generator=torch.Generator().manual_seed(1))
    mask = {} if case.mask is None else {"mask": torch.arange(steps)[None].expand(B, -1) % 3 > 0}

    def run() -> list[Tensor]:
        keras.utils.set_random_seed(1)
        return flat(layer(x, training=case.training, **mask))

    expected = run()
    handle = lstm_ext.patch_keras().start()
    try:
        found = run()
    finally:
        handle.stop()
    assert (handle.computed, handle.left) == (0, {reason: 1})
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_dropout_draws_as_keras() -> None:
    layer = keras.layers.LSTM(H, dropout=0.4, recurrent_dropout=0.0)
    x = torch.randn(B, T, I)
    keras.utils.set_random_seed(2)
    layer(x)
    results = []
    for patched in (False, True):
        keras.utils.set_random_seed(3)
        layer.cell.seed_generator.state.assign([0, 1])
        handle = lstm_ext.patch_keras()
        if patched:
            handle.start()
        results.append([layer(x, training=True) for _ in range(2)])
        handle.stop()
        assert handle.computed == 2 * patched
    torch.testing.assert_close(*results)


def model() -> Any:
    keras.utils.set_random_seed(0)
    layers = keras.layers
    found = keras.Sequential(
        [
            keras.Input((T,), dtype="int32"),
            layers.Embedding(20, 6, mask_zero=True),
            layers.Bidirectional(layers.LSTM(H, return_sequences=True)),
            layers.LSTM(H),
            layers.Dense(1),
        ]
    )
    found.compile("adam", "mse")
    return found


def test_fit_and_predict(tmp_path: Any) -> None:
    """Four steps of Adam; the file of the model is Keras' own."""
    tokens = torch.randint(0, 20, (16, T), generator=torch.Generator().manual_seed(1)).numpy()
    targets = tokens[:, :1] / 20.0
    found = []
    for patched in (False, True):
        one, handle = model(), lstm_ext.patch_keras()
        if patched:
            handle.start()
        history = one.fit(tokens, targets, batch_size=8, epochs=2, shuffle=False, verbose=0).history
        found.append([torch.tensor(history["loss"]), torch.tensor(one.predict(tokens, verbose=0))])
        handle.stop()
        assert bool(handle.computed) == patched and not handle.left
    torch.testing.assert_close(*found)
    one.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    torch.testing.assert_close(torch.tensor(again.predict(tokens, verbose=0)), found[1][1])


def test_a_compiled_layer_and_an_export() -> None:
    layer, x = keras.layers.LSTM(H, return_sequences=True), torch.randn(B, T, I)
    expected = layer(x)
    with lstm_ext.patch_keras() as handle:
        torch.testing.assert_close(torch.compile(lambda x: layer(x), backend="aot_eager")(x), expected)
        before = handle.computed
        for variable in layer.variables:
            variable.value.requires_grad_(False)  # the layer is no submodule of what is traced
        traced = torch.jit.trace(lambda x: layer(x), x, check_trace=False)
        assert (handle.computed, handle.left) == (before, {"an export": 1})
        layer(x)
    assert "lstm_ext" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x), expected)


def methods() -> list[Any]:
    return [getattr(keras.layers, name).inner_loop for name in ("LSTM", "GRU", "RNN")]


@pytest.fixture
def theirs() -> Iterator[list[Any]]:
    before = methods()
    yield before
    assert methods() == before


def test_patches_may_be_nested(theirs: list[Any]) -> None:
    outer, inner = lstm_ext.patch_keras().start(), lstm_ext.patch_keras()
    ours = methods()
    assert not set(ours) & set(theirs)
    inner.start().start()
    assert methods() == ours
    outer.stop()
    outer.stop()
    keras.layers.LSTM(H)(torch.randn(B, T, I))
    assert (outer.computed, inner.computed) == (0, 1) and methods() == ours
    inner.stop()
    assert methods() == theirs


def test_a_block_without_a_call_says_so(theirs: list[Any]) -> None:
    said = "a patch has to hold while fit, predict or a layer runs"
    with pytest.warns(UserWarning, match=said), lstm_ext.patch_keras():
        model()
    with pytest.warns(UserWarning, match="Keras computed 1 for the activation gelu"), lstm_ext.patch_keras():
        keras.layers.LSTM(H, activation="gelu")(torch.randn(B, T, I))


def test_a_keras_that_is_not_known(monkeypatch: pytest.MonkeyPatch, theirs: list[Any]) -> None:
    with monkeypatch.context() as other:
        other.setattr(keras.layers.GRU, "inner_loop", lambda self, sequences: None)
        with pytest.raises(RuntimeError, match=rf"Keras {keras.__version__} has no loop in .*GRU.* knows"):
            lstm_ext.patch_keras().start()
        assert methods()[0] is theirs[0]
    monkeypatch.setitem(sys.modules, "keras", None)
    with pytest.raises(ImportError, match="keras"):
        lstm_ext.patch_keras().start()


def test_without_kernels() -> None:
    """torch's own operator computes what is plain; the rest goes the way of Keras. The import needs no Keras."""
    program = (
        "import sys, lstm_ext; assert 'keras' not in sys.modules; import keras, torch; x = torch.randn(2, 9, 3)\n"
        "with lstm_ext.patch_keras() as handle:\n"
        "    layer = keras.layers.LSTM(4); layer(x); layer(x, mask=x[..., 0] > 0)\n"
        "    keras.layers.LSTM(4, activation='relu')(x)\n"
        "print(handle.computed, dict(handle.left))"
    )
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env=os.environ | {"LSTM_EXT_BACKEND": "torch"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert run.stdout == "1 {'there are no kernels for cpu': 2}\n"


def test_another_backend_is_an_error(monkeypatch: pytest.MonkeyPatch, theirs: list[Any]) -> None:
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(RuntimeError) as caught:
        lstm_ext.patch_keras().start()
    assert str(caught.value) == (
        "patch_keras: expected the backend torch of Keras, got jax: set KERAS_BACKEND=torch before Keras is imported"
    )


@pytest.mark.parametrize("bias", [True, False])
def test_a_gru_from_keras(bias: bool) -> None:
    gru = keras.layers.GRU(H, return_sequences=True, use_bias=bias, bias_initializer="random_normal")
    for layer in (gru, keras.layers.Bidirectional(gru)):
        x = torch.randn(B, T, I)
        expected = layer(x)
        found = lstm_ext.from_keras(layer)
        assert isinstance(found, lstm_ext.GRU)
        torch.testing.assert_close(found(x)[0], torch.as_tensor(expected))
    with pytest.raises(ValueError, match="from_keras: reset_after=False"):
        before = keras.layers.GRU(H, reset_after=False)
        before(x)
        lstm_ext.from_keras(before)
