"""Other programs that run the same layer: ONNX Runtime, OpenVINO, and torch.ao's dynamic int8 LSTM.

A peer is given a torch.nn.LSTM or GRU and takes its weights. ONNX Runtime and OpenVINO run one and the same ONNX model:
the standard operator LSTM or GRU with the weights in its order, every size fixed, time first. Both are held to float32
and to so many threads; ONNX Runtime's do not spin between calls, as they would on cores that the others need.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import harness
import torch
from shapes import Shape
from torch import nn

# By the number of the gates. Their rows are i, f, g, o in torch and i, o, f, c in ONNX, where c is torch's g; of a GRU
# r, z, n and z, r, h.
GATES = {4: (0, 3, 1, 2), 3: (1, 0, 2)}
Call = Callable[[], object]


@dataclass(frozen=True)
class Peer:
    name: str
    packages: tuple[str, ...]  # the first one is the peer itself
    how: str
    # Of a layer, its shape, threads, and whether state is carried: then the call is one step, from a state of zeros.
    make: Callable[[nn.LSTM, Shape, int, bool], Call]

    def missing(self) -> str | None:
        """One line that says why the peer cannot run here."""
        if any([name in os.environ for name in harness.HELD_BY]):
            return f"{self.name}: not measured: what holds the instruction set of torch does not hold it"
        absent = [name for name in self.packages if _problem_of_import(name)]
        if not absent:
            return None
        problem = _problem_of_import(absent[0])
        return f"{self.name}: not measured: {problem}; pip install {' '.join(absent)}"

    def version(self) -> str | None:
        try:
            return importlib.metadata.version(self.packages[0])
        except importlib.metadata.PackageNotFoundError:
            return None


@functools.cache
def _problem_of_import(package: str) -> str | None:
    try:
        importlib.import_module(package)
    except Exception as error:  # a package that is there and broken raises what it likes
        return (
            f"{package} is not installed" if isinstance(error, ModuleNotFoundError) else f"{package}: {error}"
        )
    return None


# ---- ONNX


def onnx_model(layer: nn.LSTM, shape: Shape, state: bool) -> bytes:
    """A model with the input x and the output y, and with `state` h0, c0 and h1, c1 (one layer; a GRU has no c)."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    directions, hidden = shape.directions, shape.hidden_size
    nodes, weights = [], []

    def constant(name: str, value: torch.Tensor) -> str:
        weights.append(numpy_helper.from_array(value.detach().contiguous().numpy(), name))
        return name

    def of_directions(kind: str, depth: int) -> torch.Tensor:
        """(directions, gates * H, ...) with the gates in the order of ONNX."""
        suffixes = ("", "_reverse")[:directions]
        found = [getattr(layer, f"{kind}_l{depth}{suffix}") for suffix in suffixes]
        return torch.stack(
            [torch.cat([w.chunk(shape.gates)[gate] for gate in GATES[shape.gates]]) for w in found]
        )

    constant("sizes", torch.tensor([0, 0, directions * hidden]))
    operator, more = ("LSTM", {}) if shape.gates == 4 else ("GRU", {"linear_before_reset": 1})
    names = (["h", "c"] if shape.gates == 4 else ["h"]) if state else []
    before, after = [f"{name}0" for name in names], [f"{name}1" for name in names]
    value = "x"
    for depth in range(shape.layers):
        last = depth == shape.layers - 1
        inputs = [
            value,
            constant(f"w{depth}", of_directions("weight_ih", depth)),
            constant(f"r{depth}", of_directions("weight_hh", depth)),
            constant(f"b{depth}", torch.cat([of_directions(k, depth) for k in ("bias_ih", "bias_hh")], 1)),
            *(["", *before] if state else []),
        ]
        outputs = [f"all{depth}", *after]
        direction = "bidirectional" if directions == 2 else "forward"
        nodes.append(
            helper.make_node(operator, inputs, outputs, hidden_size=hidden, direction=direction, **more)
        )
        # (T, directions, B, H) to (T, B, directions * H)
        nodes.append(helper.make_node("Transpose", [outputs[0]], [f"turned{depth}"], perm=[0, 2, 1, 3]))
        value = "y" if last else f"y{depth}"
        nodes.append(helper.make_node("Reshape", [f"turned{depth}", "sizes"], [value]))

    def described(name: str, *sizes: int) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes)

    states = (directions, shape.batch, hidden)
    graph = helper.make_graph(
        nodes,
        "layer",
        [
            described("x", shape.steps, shape.batch, shape.input_size),
            *[described(name, *states) for name in before],
        ],
        [
            described("y", shape.steps, shape.batch, directions * hidden),
            *[described(name, *states) for name in after],
        ],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def _inputs(shape: Shape, state: bool) -> dict[str, Any]:
    zeros = torch.zeros(shape.directions, shape.batch, shape.hidden_size).numpy()
    names = (["h0", "c0"] if shape.gates == 4 else ["h0"]) if state else []
    return {"x": harness.input_of(shape).numpy()} | dict.fromkeys(names, zeros)


def _onnxruntime(layer: nn.LSTM, shape: Shape, threads: int, state: bool) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(
        onnx_model(layer, shape, state), options, providers=["CPUExecutionProvider"]
    )
    inputs = _inputs(shape, state)
    return lambda: session.run(None, inputs)[0]


def _openvino(layer: nn.LSTM, shape: Shape, threads: int, state: bool) -> Call:
    import openvino

    core = openvino.Core()
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",  # else bfloat16 where the processor has it
    }
    compiled = core.compile_model(core.read_model(onnx_model(layer, shape, state)), "CPU", settings)
    request = compiled.create_infer_request()
    inputs, output = _inputs(shape, state), compiled.output("y")
    return lambda: request.infer(inputs, share_inputs=True, share_outputs=True)[output]


# ---- torch.ao


def _torch_int8(layer: nn.LSTM, shape: Shape, threads: int, state: bool) -> Call:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is deprecated
        from torch.ao.quantization import quantize_dynamic

        quantized = quantize_dynamic(nn.Sequential(layer), {nn.LSTM}, torch.qint8)[0]
    return harness.step_call(quantized, shape, "call") if state else harness.inference_call(quantized, shape)


FLOAT_PEERS = ("onnxruntime", "openvino")
PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            "onnxruntime",
            ("onnxruntime", "onnx"),
            "ONNX Runtime, the operator LSTM or GRU, intra_op_num_threads set, session.intra_op.allow_spinning 0",
            _onnxruntime,
        ),
        Peer(
            "openvino",
            ("openvino", "onnx"),
            "OpenVINO, the same model, INFERENCE_NUM_THREADS set, PERFORMANCE_HINT LATENCY, float32",
            _openvino,
        ),
        Peer(
            "torch-int8",
            ("torch.ao.quantization",),
            "torch.ao.quantization.quantize_dynamic, int8 weights and activations; frozen int8 only",
            _torch_int8,
        ),
    )
}


def facts() -> dict[str, dict[str, str | None]]:
    """Of each peer: its version, how it is run, and why it is missing."""
    found = {}
    for peer in PEERS.values():
        missing = peer.missing()
        version = None if missing else peer.version() or torch.__version__
        found[peer.name] = {"version": version, "how": peer.how, "missing": missing}
    return found


def calls(
    layer: nn.LSTM, shape: Shape, threads: int, names: tuple[str, ...] = FLOAT_PEERS, state: bool = False
) -> tuple[dict[str, Call], dict[str, str]]:
    """A call of each installed peer among `names`; and one line for each that cannot run this layer."""
    made, refused = {}, {}
    for name in names:
        if PEERS[name].missing():
            continue
        try:
            made[name] = PEERS[name].make(layer, shape, threads, state)
            made[name]()
        except Exception as error:  # of a peer; the other sides are measured all the same
            made.pop(name, None)
            refused[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return made, refused
