"""The LSTM cases of ONNX's own backend test suite, and the same nodes with random numbers.

The suite's weights are all one number, so that it cannot tell one gate from another: the second test can.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
import torch
from judge import allowed_error, relative_error

import lstm_ext

pytest.importorskip("onnx")

from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator


def onnx_cases() -> list[Any]:
    """Importing the module of one operator adds its cases to this list; collect_testcases() imports all operators'."""
    importlib.import_module("onnx.backend.test.case.node.lstm")
    cases = importlib.import_module("onnx.backend.test.case.node")._NodeTestCases
    return [case for case in cases if case.model.graph.node[0].op_type == "LSTM"]


ALL_CASES = {case.name: case for case in onnx_cases()}
NAMES = sorted(ALL_CASES)
WEIGHTS = ("W", "R", "B", "P")


def run_node(node: Any, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the node computes, by the layer that ``from_onnx`` makes of it: Y, Y_h and Y_c in ONNX's shapes.

    ``inputs``: X (T, B, I), W (D, 4H, I), R (D, 4H, H) and perhaps B (D, 8H), P (D, 3H), initial_h and initial_c
    (D, B, H); with layout 1, X is (B, T, I) and the states are (B, D, H).
    """
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    direction, batch_first = (
        attributes.get("direction", b"forward").decode(),
        attributes.get("layout", 0) == 1,
    )
    W, hidden_size = inputs["W"], attributes["hidden_size"]
    forward = helper.make_node("LSTM", node.input, node.output, **attributes)
    # The layer has no reverse direction alone: time turned round, there and back.
    turned = direction == "reverse"
    for attribute in forward.attribute:
        if attribute.name == "direction" and turned:
            attribute.s = b"forward"
    values = [helper.make_tensor_value_info(n, TensorProto.DOUBLE, None) for n in ("X", "Y")]
    weights = [numpy_helper.from_array(inputs[name], name) for name in WEIGHTS if name in inputs]
    graph = helper.make_graph([forward], "lstm", values[:1], values[1:], weights)
    (module,) = lstm_ext.from_onnx(helper.make_model(graph)).values()
    assert module.batch_first == batch_first and module.peephole == ("P" in inputs)

    x = torch.from_numpy(inputs["X"])
    time = 1 if batch_first else 0
    batch = x.size(1 - time)
    states = [inputs.get(name) for name in ("initial_h", "initial_c")]
    hx = None
    if any(s is not None for s in states):
        zeros = np.zeros((W.shape[0], batch, hidden_size), W.dtype)
        h0, c0 = (
            zeros
            if s is None
            else s.swapaxes(0, 1)
            if batch_first
            else s  # batch first holds for ONNX's states, too
            for s in states
        )
        hx = (torch.from_numpy(h0), torch.from_numpy(c0))
    with torch.no_grad():
        output, (h_n, c_n) = module(x.flip(time) if turned else x, hx)
    if turned:
        output = output.flip(time)
    y = output.unflatten(2, (W.shape[0], hidden_size))  # ONNX has an axis for the direction
    if batch_first:
        return {"Y": y.numpy(), "Y_h": h_n.transpose(0, 1).numpy(), "Y_c": c_n.transpose(0, 1).numpy()}
    return {"Y": y.transpose(1, 2).numpy(), "Y_h": h_n.numpy(), "Y_c": c_n.numpy()}


def test_the_suite_is_there():
    assert {"test_lstm_defaults", "test_lstm_with_initial_bias", "test_lstm_batchwise"} <= set(NAMES)
    assert "test_lstm_with_peepholes" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_case_of_the_suite(name):
    case = ALL_CASES[name]
    (node,) = case.model.graph.node
    for inputs, outputs in case.data_sets:
        names = [n for n in node.input if n]
        result = run_node(node, dict(zip(names, inputs, strict=True)))
        compared = [n for n in node.output if n]
        assert compared
        for n, expected in zip(compared, outputs, strict=True):
            # Closer than the suite itself asks for (1e-3).
            np.testing.assert_allclose(result[n], expected, rtol=1e-5, atol=1e-6, err_msg=n)


def node_of(inputs: dict[str, np.ndarray], **attributes: Any) -> Any:
    order = ["X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c"]
    names = [name if name in inputs else "" for name in order]
    return helper.make_node("LSTM", names, ["Y", "Y_h", "Y_c"], **attributes)


def by_onnx(inputs: dict[str, np.ndarray], hidden_size: int) -> list[np.ndarray]:
    """Y, Y_h, Y_c by ONNX's reference implementation: forward, one direction, layout 0, all that older ones can."""
    node = node_of(inputs, hidden_size=hidden_size)
    given = [helper.make_tensor_value_info(n, TensorProto.DOUBLE, x.shape) for n, x in inputs.items()]
    results = [helper.make_tensor_value_info(n, TensorProto.DOUBLE, None) for n in node.output]
    graph = helper.make_graph([node], "lstm", given, results)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)])
    return list(ReferenceEvaluator(model).run(None, inputs))


@pytest.mark.parametrize("states", [(), ("initial_h", "initial_c"), ("initial_c",)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", [0, 1])
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
def test_random_numbers(direction, layout, bias, states):
    T, B, I, H, D = 5, 3, 4, 6, 2 if direction == "bidirectional" else 1
    random = np.random.default_rng(0)
    shapes = {"X": (T, B, I), "W": (D, 4 * H, I), "R": (D, 4 * H, H)}
    shapes |= ({"B": (D, 8 * H)} if bias else {}) | dict.fromkeys(states, (D, B, H))
    inputs = {name: random.uniform(-1, 1, shape) for name, shape in shapes.items()}

    parts = []
    for d in range(D):
        turned = direction == "reverse" or d == 1
        one = {name: x if name == "X" else x[d : d + 1] for name, x in inputs.items()}
        y, y_h, y_c = by_onnx(one | ({"X": inputs["X"][::-1]} if turned else {}), H)
        parts.append((y[::-1] if turned else y, y_h, y_c))
    axes = {"Y": 1, "Y_h": 0, "Y_c": 0}  # of the direction
    expected = {n: np.concatenate([p[i] for p in parts], a) for i, (n, a) in enumerate(axes.items())}
    if layout == 1:
        expected["Y"] = expected["Y"].transpose(2, 0, 1, 3)
        for name in ("Y_h", "Y_c"):
            expected[name] = expected[name].swapaxes(0, 1)
        for name in ("X", *states):
            inputs[name] = inputs[name].swapaxes(0, 1)

    result = run_node(node_of(inputs, hidden_size=H, direction=direction, layout=layout), inputs)
    for name, value in expected.items():
        error = relative_error(torch.from_numpy(result[name].copy()), torch.from_numpy(value.copy()))
        assert error <= allowed_error(0.0, torch.float64), name
