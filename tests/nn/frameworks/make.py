"""Makes frameworks.json: what other frameworks compute with their own weights, for test_from_frameworks.py.

    python -m venv /tmp/frameworks
    /tmp/frameworks/bin/pip install tensorflow-cpu flax dm-haiku equinox 'mlx[cpu]' onnx onnxruntime
    /tmp/frameworks/bin/python tests/nn/frameworks/make.py

A case has the arrays as the framework has them, an input (B, T, I), what the framework made of it, and the gradient of
sum(output * factors) by the input, where the framework gives one.
"""

from __future__ import annotations

import base64
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

B, T, I, H = 2, 5, 3, 4
RANDOM = np.random.default_rng(0)
CASES: list[dict[str, Any]] = []


def drawn(*shape: int, scale: float = 1.0) -> np.ndarray:
    return (RANDOM.standard_normal(shape) * scale).astype(np.float32)


X = drawn(B, T, I)


def listed(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: listed(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [listed(part) for part in value]
    return np.asarray(value, dtype=np.float64).tolist() if hasattr(value, "__array__") else value


def add(
    function: str, name: str, source: Any, output: Any, gradient: Any = None, packages: str = "", **how: Any
) -> None:
    """`how`: the importer's other arguments, and h and c of the last step."""
    CASES.append(
        {
            "function": function, "name": name, "version": f"{packages} {version(packages)}",
            "source": listed(source), "x": listed(X), "output": listed(output), "gradient": listed(gradient),
            **{key: listed(value) for key, value in how.items()},
        }
    )  # fmt: skip


def factors(shape: tuple[int, ...]) -> np.ndarray:
    return np.sin(np.arange(np.prod(shape))).reshape(shape).astype(np.float32)


def keras_cases() -> None:
    import keras
    import tensorflow as tf

    def run(name: str, layers: list[Any], **how: Any) -> None:
        x = tf.constant(X)
        keras.Sequential(layers)(x)  # makes the weights
        for layer in layers:
            layer.set_weights([drawn(*w.shape, scale=0.5) for w in layer.get_weights()])
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = x
            for layer in layers:
                y = layer(y)
            loss = tf.reduce_sum(y * factors(y.shape))
        source = [layer.get_weights() for layer in layers]
        add("from_keras", name, source, y.numpy(), tape.gradient(loss, x).numpy(), "keras", **how)

    def lstm(**arguments: Any) -> Any:
        return keras.layers.LSTM(H, return_sequences=True, **arguments)

    run("one layer", [lstm()])
    run("without bias", [lstm(use_bias=False)])
    run("both directions", [keras.layers.Bidirectional(lstm())])
    run("two layers, both directions", [keras.layers.Bidirectional(lstm()) for _ in range(2)])
    for activation, recurrent in (
        ("relu", "hard_sigmoid"), ("softsign", "sigmoid"), ("elu", "tanh"), ("leaky_relu", "softsign"),
        ("linear", "sigmoid"), ("softplus", "hard_sigmoid"),
    ):  # fmt: skip
        functions = {"activation": activation, "recurrent_activation": recurrent}
        run(f"{activation}, {recurrent}", [lstm(**functions)], functions=functions)


def tensorflow_cases() -> None:
    import tensorflow as tf

    for name, peephole, clip, forget in (
        ("plain", False, -1.0, 1.0),
        ("another forget bias", False, -1.0, 0.25),
        ("peepholes", True, -1.0, 1.0),
        ("peepholes and a clip", True, 0.4, 1.0),
    ):
        w, b = drawn(I + H, 4 * H, scale=0.5), drawn(4 * H)
        wci, wcf, wco = (drawn(H) for _ in range(3))
        x = tf.constant(np.swapaxes(X, 0, 1).copy())
        zeros = tf.zeros((B, H))
        with tf.GradientTape() as tape:
            tape.watch(x)
            found = tf.raw_ops.BlockLSTM(
                seq_len_max=tf.constant(T, tf.int64), x=x, cs_prev=zeros, h_prev=zeros, w=w, wci=wci, wcf=wcf, wco=wco,
                b=b, forget_bias=forget, cell_clip=clip, use_peephole=peephole,
            )  # fmt: skip
            output = tf.transpose(found.h, (1, 0, 2))
            loss = tf.reduce_sum(output * factors(output.shape))
        gradient = None if clip > 0 else np.swapaxes(tape.gradient(loss, x).numpy(), 0, 1)
        cell = {"lstm_cell/kernel:0": w, "lstm_cell/bias:0": b}
        if peephole:
            cell |= {"lstm_cell/w_i_diag:0": wci, "lstm_cell/w_f_diag:0": wcf, "lstm_cell/w_o_diag:0": wco}
        keywords = {"forget_bias": forget, "cell_clip": clip if clip > 0 else None}
        last = {"c": found.cs.numpy()[-1]}
        add("from_tensorflow", name, cell, output.numpy(), gradient, "tensorflow", keywords=keywords, **last)


def jax_cases() -> None:
    import equinox
    import flax.linen
    import haiku
    import jax
    import jax.numpy as jnp

    def run(name: str, package: str, source: Any, step: Any, **how: Any) -> None:
        def output(x: Any) -> Any:
            carry, found = (jnp.zeros((B, H)), jnp.zeros((B, H))), []
            for t in range(T):
                carry = step(carry, x[:, t])
                found.append(carry[0])
            return jnp.stack(found, 1)

        y = output(jnp.asarray(X))
        gradient = jax.grad(lambda x: (output(x) * factors(y.shape)).sum())(jnp.asarray(X))
        add("from_jax", name, source, y, gradient, package, **how)

    others = {"gate_fn": jax.nn.soft_sign, "activation_fn": jax.nn.relu}
    for name, cell_of, functions in (
        ("LSTMCell", flax.linen.LSTMCell, {}),
        ("OptimizedLSTMCell", flax.linen.OptimizedLSTMCell, {}),
        ("LSTMCell, other functions", flax.linen.LSTMCell, others),
    ):
        cell = cell_of(H, **functions)
        params = cell.init(jax.random.key(0), (jnp.zeros((B, H)),) * 2, jnp.asarray(X[:, 0]))
        params = jax.tree.map(lambda a: jnp.asarray(drawn(*a.shape, scale=0.5)), params)

        def flax_step(carry: Any, x: Any, cell: Any = cell, params: Any = params) -> Any:
            (c, h), _ = cell.apply(params, (carry[1], carry[0]), x)
            return h, c

        keywords = {"gate_activation": "softsign", "cell_activation": "relu"} if functions else {}
        run(f"Flax {name}", "flax", params, flax_step, keywords=keywords)

    core = haiku.without_apply_rng(
        haiku.transform(lambda x, h, c: haiku.LSTM(H)(x, haiku.LSTMState(h, c))[1])
    )
    params = core.init(jax.random.key(0), jnp.asarray(X[:, 0]), jnp.zeros((B, H)), jnp.zeros((B, H)))
    params = jax.tree.map(lambda a: jnp.asarray(drawn(*a.shape, scale=0.5)), params)

    def haiku_step(carry: Any, x: Any) -> Any:
        state = core.apply(params, x, *carry)
        return state.hidden, state.cell

    run("Haiku", "dm-haiku", {key: dict(value) for key, value in params.items()}, haiku_step)

    cell = equinox.nn.LSTMCell(I, H, key=jax.random.key(0))
    arrays = {"weight_ih": cell.weight_ih, "weight_hh": cell.weight_hh, "bias": cell.bias}

    def equinox_step(carry: Any, x: Any) -> Any:
        return jax.vmap(lambda x, h, c: cell(x, (h, c)))(x, *carry)

    run("Equinox", "equinox", arrays, equinox_step)


def mlx_cases() -> None:
    import mlx.core as mx
    import mlx.nn

    for name, bias in (("one layer", True), ("without bias", False)):
        layer = mlx.nn.LSTM(I, H, bias=bias)
        arrays = {key: drawn(*a.shape, scale=0.5) for key, a in layer.parameters().items()}
        layer.update({key: mx.array(a) for key, a in arrays.items()})
        y, c = layer(mx.array(X))

        def loss(x: Any, layer: Any = layer, shape: Any = y.shape) -> Any:
            return (layer(x)[0] * mx.array(factors(shape))).sum()

        gradient = mx.grad(loss)(mx.array(X))
        add("from_mlx", name, arrays, np.array(y), np.array(gradient), "mlx", c=np.array(c[:, -1]))


def onnx_cases() -> None:
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    each = [
        "Affine",
        "LeakyRelu",
        "ThresholdedRelu",
        "ScaledTanh",
        "Elu",
        "Softplus",
        "Softsign",
        "Relu",
        "Tanh",
    ]
    numbers = {
        "Affine": (0.7, 0.1), "LeakyRelu": (0.2,), "ThresholdedRelu": (0.15,), "ScaledTanh": (0.8, 1.3), "Elu": (0.6,),
    }  # fmt: skip
    for name, count, peephole, coupled, bias, more in (
        ("one direction", 1, False, 0, True, {}),
        ("both directions", 2, False, 0, True, {}),
        ("peepholes, both directions", 2, True, 0, True, {}),
        ("input_forget", 1, False, 1, True, {}),
        ("without biases", 1, False, 0, False, {}),
        ("clip", 1, True, 0, True, {"clip": 0.4}),
        ("HardSigmoid", 1, False, 0, True, {"activations": ["HardSigmoid", "Tanh", "Tanh"]}),
        (
            "HardSigmoid with numbers, both directions", 2, True, 1, True,
            {
                "activations": ["HardSigmoid", "ScaledTanh", "Elu"] * 2,
                "activation_alpha": [0.3, 0.8, 0.6] * 2, "activation_beta": [0.4, 1.2] * 2, "clip": 0.9,
            },
        ),
        *[
            (
                f"Sigmoid, {g}, {h}", 1, False, 0, True,
                {"activations": ["Sigmoid", g, h]}
                | {
                    f"activation_{key}": found
                    for k, key in enumerate(("alpha", "beta"))
                    if (found := [numbers[f][k] for f in (g, h) if len(numbers.get(f, ())) > k])
                },
            )
            for g, h in zip(each, each[3:] + each[:3], strict=True)
        ],
    ):  # fmt: skip
        arrays = {"W": drawn(count, 4 * H, I, scale=0.5), "R": drawn(count, 4 * H, H, scale=0.5)}
        if bias:
            arrays["B"] = drawn(count, 8 * H, scale=0.5)
        if peephole:
            arrays["P"] = drawn(count, 3 * H)
        inputs = ["x", "W", "R", "B" if bias else "", "", "", "", "P" if peephole else ""]
        while not inputs[-1]:
            inputs.pop()
        node = helper.make_node(
            "LSTM", inputs, ["Y", "Y_h", "Y_c"], name="layer", hidden_size=H, input_forget=coupled,
            direction="bidirectional" if count == 2 else "forward", **more,
        )  # fmt: skip
        shapes = {"Y": [T, count, B, H], "Y_h": [count, B, H], "Y_c": [count, B, H]}
        values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n, shape in shapes.items()]
        graph = helper.make_graph(
            [node], "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [T, B, I])], values,
            [numpy_helper.from_array(array, key) for key, array in arrays.items()],
        )  # fmt: skip
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
        onnx.checker.check_model(model)
        session = onnxruntime.InferenceSession(model.SerializeToString())
        y, _, c = session.run(None, {"x": np.swapaxes(X, 0, 1).copy()})
        output = y.transpose(2, 0, 1, 3).reshape(B, T, count * H)  # (T, D, B, H)
        source = base64.b64encode(model.SerializeToString()).decode()
        add("from_onnx", name, source, output, None, "onnxruntime", c=c)


if __name__ == "__main__":
    keras_cases()
    tensorflow_cases()
    jax_cases()
    mlx_cases()
    onnx_cases()
    path = Path(__file__).with_name("frameworks.json")
    lines = ",\n".join(json.dumps(case) for case in CASES)
    path.write_text(f"[{lines}]\n")
    print(f"{len(CASES)} cases, {path.stat().st_size} bytes")
