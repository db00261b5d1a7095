"""``lstm_ext.GRU`` and ``GRUCell`` beside torch's; tests/matrix has the numbers of their calls."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import Graphs
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import lstm_ext

SIZES = (7, 12, 2, True, True, 0.0, True)


def pair(*args: Any, **kwargs: Any) -> tuple[lstm_ext.GRU, nn.GRU]:
    torch.manual_seed(0)
    ours = lstm_ext.GRU(*args, **kwargs)
    torch.manual_seed(0)
    return ours, nn.GRU(*args)


def test_parameters_are_those_of_torch() -> None:
    ours, theirs = pair(*SIZES)
    state = theirs.state_dict()
    assert list(ours.state_dict()) == list(state)
    assert all(torch.equal(a, state[name]) for name, a in ours.state_dict().items())
    assert repr(ours) == repr(theirs)
    loaded = pickle.loads(pickle.dumps(ours))
    x = torch.randn(3, 5, 7)
    assert torch.equal(loaded(x)[0], ours(x)[0])


@pytest.mark.parametrize(
    "call",
    [
        lambda gru, x, h: gru(x[:, :, :3]),
        lambda gru, x, h: gru(x, h[:2]),
        lambda gru, x, h: gru(x, h[0]),
        lambda gru, x, h: gru(x[0], h),
        lambda gru, x, h: gru(x.double()),
        lambda gru, x, h: gru(x[0, 0]),
        lambda gru, x, h: gru(x[:, :0]),
        lambda gru, x, h: gru(pack_padded_sequence(x, [5, 5, 5], batch_first=True), h[:, :2]),
    ],
)
def test_errors_are_those_of_torch(call: Callable[..., Any]) -> None:
    x, h = torch.randn(3, 5, 7), torch.randn(4, 3, 12)
    ours, theirs = pair(*SIZES)
    with pytest.raises((RuntimeError, ValueError)) as expected:
        call(theirs, x, h)
    with pytest.raises(expected.type, match=f"^{re.escape(str(expected.value))}$"):
        call(ours, x, h)


def test_what_a_gru_does_not_have() -> None:
    has = "not an option of a GRU, which has recurrent_dropout, weight_dropout, recompute"
    for name, value in {"peephole": True, "cell_clip": 1.0, "coupled_gates": True, "zoneout": 0.1}.items():
        with pytest.raises(ValueError, match=f"{name}: {has}"):
            lstm_ext.GRU(3, 4, **{name: value})  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=f"{name}: {has}"):
            setattr(lstm_ext.GRU(3, 4), name, value)
    with pytest.raises(TypeError, match="unexpected keyword argument 'recompte'; did you mean 'recompute'"):
        lstm_ext.GRU(3, 4, recompte=True)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="proj_size argument is only supported for LSTM"):
        lstm_ext.GRU(3, 4, proj_size=2)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"GRU: expected hx to be a Tensor, h_0, got tuple"):
        lstm_ext.GRU(3, 4)(torch.randn(2, 1, 3), (torch.zeros(1, 1, 4),) * 2)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="reset_state: expected a Tensor, h, got tuple"):
        lstm_ext.GRU(3, 4)(
            torch.randn(2, 1, 3), resets=torch.zeros(2, 1) > 0, reset_state=(torch.zeros(1, 1, 4),) * 2
        )  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"GRU.step: not available for a bidirectional layer"):
        lstm_ext.GRU(3, 4, bidirectional=True).step(torch.randn(1, 3))
    with pytest.raises(
        RuntimeError, match=r"lstm_ext.GRU: torch.jit.script takes the layer as torch's, which has no"
    ):
        torch.jit.script(lstm_ext.GRU(3, 4, recompute=True))


def results_of(gru: Any, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    output, h_n = gru(x, h)
    return output, h_n, *torch.autograd.grad([output.sin().sum(), h_n.cos().sum()], list(gru.parameters()))


@pytest.mark.tools
def test_compiled_exported_and_without_kernels() -> None:
    from matrix.routes import without_kernels

    x, h = torch.randn(3, 5, 7), torch.randn(4, 3, 12)
    ours, theirs = pair(*SIZES)
    expected = results_of(theirs, x, h)
    for gru in (ours, torch.compile(ours, fullgraph=True)):
        for a, b in zip(results_of(gru, x, h), expected, strict=True):
            torch.testing.assert_close(a, b)
    program = torch.export.export(ours, (x, h)).module()
    for a, b in zip(program(x, h), expected[:2], strict=True):
        torch.testing.assert_close(a, b)
    with without_kernels():
        for a, b in zip(results_of(ours, x, h), expected, strict=True):
            assert torch.equal(a, b)  # torch's own operator
        for converted in (lstm_ext.convert(copy.deepcopy(theirs)), ours):
            torch._dynamo.reset()
            compiled = torch.compile(converted, backend=(graphs := Graphs()))
            for a, b in zip(results_of(compiled, x, h), expected, strict=True):
                assert torch.equal(a, b)
            assert graphs.all == []  # a break, as at torch's layer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_under_autocast(dtype: torch.dtype) -> None:
    x, h = torch.randn(3, 5, 7), torch.randn(4, 3, 12)
    ours, theirs = pair(*SIZES)
    cells = lstm_ext.GRUCell(7, 12), nn.GRUCell(7, 12)
    cells[1].load_state_dict(cells[0].state_dict())
    with torch.autocast("cpu", dtype):
        for given in ((x,), (x, h), (x.to(dtype),), (x, h.to(dtype))):
            for a, b in zip(ours(*given), theirs(*given), strict=True):
                assert a.dtype == b.dtype
                torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)
        for given in ((x[0],), (x[0], h[0, 0].expand(5, 12)), (x[0, 0],)):
            a, b = (cell(*given) for cell in cells)
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("bias", [True, False])
def test_cell(bias: bool) -> None:
    torch.manual_seed(0)
    ours = lstm_ext.GRUCell(7, 12, bias)
    torch.manual_seed(0)
    theirs = nn.GRUCell(7, 12, bias)
    x, h = torch.randn(3, 7), torch.randn(3, 12, requires_grad=True)
    for given in ((x,), (x, h), (x[0], h[0]), (x[:0], h[:0])):
        torch.testing.assert_close(ours(*given), theirs(*given))
    grads = [torch.autograd.grad(cell(x, h).sin().sum(), [h, *cell.parameters()]) for cell in (ours, theirs)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
    per_sample = torch.func.vmap(lambda x, h: ours(x, h))(x, h)
    torch.testing.assert_close(per_sample, theirs(x, h))
    for wrong in ((x[:, :3],), (x, h[:2]), (x.double(),), (x[None],)):
        with pytest.raises((RuntimeError, ValueError)) as expected:
            theirs(*wrong)
        with pytest.raises(expected.type, match=re.escape(str(expected.value).splitlines()[0])):
            ours(*wrong)
    with pytest.raises(TypeError, match="GRUCell: expected input and hx to be Tensors, got tuple"):
        ours(x, (h, h))  # type: ignore[arg-type]


def test_flops_are_those_of_three_gates() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    gru = lstm_ext.GRU(7, 12)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        gru(torch.randn(5, 3, 7))
    assert counter.get_total_flops() == 2 * 5 * 3 * 3 * 12 * (7 + 12)


# ---- from and to other frameworks


@pytest.mark.tools
@pytest.mark.parametrize("bidirectional", [False, True])
def test_to_onnx_and_back(bidirectional: bool) -> None:
    pytest.importorskip("onnxscript")
    gru = lstm_ext.GRU(3, 4, bidirectional=bidirectional).eval()
    program = lstm_ext.onnx.export(gru, (torch.randn(5, 2, 3),), verbose=False)
    (back,) = lstm_ext.from_onnx(program.model_proto).values()
    assert isinstance(back, lstm_ext.GRU)
    state = gru.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in back.state_dict().items())


def onnx_node(**changes: Any) -> Any:
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper, numpy_helper

    arrays = {"W": torch.zeros(1, 12, 3), "R": torch.zeros(1, 12, 4), "B": torch.zeros(1, 24)}
    attributes = {"hidden_size": 4, "linear_before_reset": 1, **changes}
    attributes = {name: value for name, value in attributes.items() if value is not None}
    node = helper.make_node("GRU", ["x", *arrays], ["y"], name="it", **attributes)
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [5, 2, 3])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [5, 1, 2, 4])
    initializers = [numpy_helper.from_array(a.numpy(), name) for name, a in arrays.items()]
    return onnx.helper.make_model(helper.make_graph([node], "g", [value], [result], initializers))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"linear_before_reset": None}, "linear_before_reset: expected 1, got 0"),
        ({"clip": 1.0}, "clip: expected none for a GRU"),
        (
            {"activations": ["Relu", "Tanh"]},
            "activations: expected Sigmoid and Tanh for a GRU, got Relu, Tanh",
        ),
        ({"direction": "reverse"}, "direction: expected forward or bidirectional, got reverse"),
        ({"hidden_size": 5}, r"R: expected shape \(1, 15, 5\), got \(1, 12, 4\)"),
        ({"input_forget": 1}, "expected no attribute input_forget"),
    ],
)
def test_what_from_onnx_refuses(changes: dict[str, Any], said: str) -> None:
    assert isinstance(lstm_ext.from_onnx(onnx_node())["it"], lstm_ext.GRU)
    with pytest.raises(ValueError, match=f"from_onnx: node it: {said}"):
        lstm_ext.from_onnx(onnx_node(**changes))


def test_arrays_of_keras() -> None:
    """tests/compat compares with Keras itself. Gates are z, r, n there."""
    gru, gate = nn.GRU(3, 4, batch_first=True, bidirectional=True), [1, 0, 2]
    arrays = []
    for suffix in ("", "_reverse"):
        W, U, b, d = [
            torch.cat([getattr(gru, f"{name}_l0{suffix}").chunk(3)[k] for k in gate]).detach()
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        ]
        arrays += [W.T, U.T, torch.stack([b, d])]
    found, x = lstm_ext.from_keras(arrays), torch.randn(2, 5, 3)
    assert isinstance(found, lstm_ext.GRU)
    torch.testing.assert_close(found(x), gru(x))
    with pytest.raises(
        ValueError, match="from_keras: reset_after=False: this layer multiplies by the reset gate"
    ):
        lstm_ext.from_keras([arrays[0], arrays[1], arrays[2][0]])
    with pytest.raises(ValueError, match="from_keras: a GRU with other activations than sigmoid and tanh"):
        lstm_ext.from_keras(arrays[:3], cell_activation="relu")
    with pytest.raises(ValueError, match=r"from_keras: bias: expected shape \(2, 12\), got \(1, 12\)"):
        lstm_ext.from_keras([arrays[0], arrays[1], arrays[2][:1]])


# ---- without a module, and frozen


def test_what_the_function_refuses() -> None:
    x, weights = torch.randn(5, 2, 3), list(nn.GRU(3, 4).parameters())
    function: Any = lstm_ext.functional.gru
    for wrong, error, said in (
        ({"weights": weights[:3]}, ValueError, r"weights: expected 4 tensors for num_layers=1, .* got 3"),
        (
            {"weights": list(nn.LSTM(3, 4).parameters())},
            ValueError,
            r"expected shape \(3 \* hidden, state\)",
        ),
        ({"hx": (x, x)}, TypeError, "hx: expected None or a Tensor, got tuple"),
        ({"hx": torch.zeros(1, 2, 3)}, ValueError, r"hx: expected shape \(1, 2, 4\)"),
        ({"cell_clip": 1.0}, ValueError, "cell_clip: not an option of a GRU, which has recurrent_dropout"),
        (
            {"recompte": True},
            TypeError,
            r"gru\(\) got an unexpected keyword argument 'recompte'; did you mean 'reco",
        ),
        ({"return_gates": True}, TypeError, "return_gates"),
    ):
        with pytest.raises(error, match=said):
            function(**{"input": x, "hx": None, "weights": weights, **wrong})


def test_a_frozen_gru_is_no_file_of_the_c_library(tmp_path: Any) -> None:
    frozen = lstm_ext.freeze(lstm_ext.GRU(3, 4))
    with pytest.raises(ValueError, match="save_native: expected a FrozenLSTM, got a GRU"):
        frozen.save_native(tmp_path / "weights")
    frozen.weight_hh_l0.data = torch.zeros(12, 4)
    with pytest.raises(RuntimeError, match="FrozenGRU: a weight was changed in place after it was packed"):
        frozen(torch.randn(5, 2, 3))


# ---- torch.jit.script, which gets torch's layer


class Scripted(nn.Module):
    def __init__(self, gru: nn.Module, cell: nn.Module) -> None:
        super().__init__()
        self.gru, self.cell = gru, cell

    def forward(self, x: Tensor, h: Tensor | None = None) -> tuple[Tensor, Tensor]:
        output, h_n = self.gru(x, h)
        return self.cell(output.flatten(0, -2)), h_n


class ScriptedPacked(nn.Module):
    def __init__(self, gru: nn.Module) -> None:
        super().__init__()
        self.gru = gru

    def forward(self, x: PackedSequence, h: Tensor | None = None) -> tuple[Tensor, Tensor]:
        output, h_n = self.gru(x, h)
        return output.data, h_n


@pytest.mark.filterwarnings("ignore")  # torch's deprecation of TorchScript
@pytest.mark.parametrize("as_subclass", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 2, "bidirectional": True}, {"batch_first": True, "bias": False}]
)
def test_scripted(options: dict[str, Any], as_subclass: bool) -> None:
    gru = nn.GRU(3, 4, **options)
    sets = gru.num_layers * (2 if gru.bidirectional else 1)
    theirs = Scripted(gru, nn.GRUCell(4 * (1 + gru.bidirectional), 4))
    ours = lstm_ext.convert(copy.deepcopy(theirs), as_subclass=as_subclass)
    x, h = torch.randn(5, 2, 3), torch.randn(sets, 5 if gru.batch_first else 2, 4)
    found, expected = torch.jit.script(ours), torch.jit.script(theirs)
    for given in ((x,), (x, h), (x[0],), (x[0], h[:, 0])):
        torch.testing.assert_close(found(*given), expected(*given), rtol=0, atol=0)
    for wrong in ((x[..., :2],), (x, h[:, 0]), (x[0], h), (x[0, 0],)):
        errors = []
        for model in (found, expected):
            with pytest.raises(Exception) as raised:  # torch.jit has its own
                model(*wrong)
            errors.append(str(raised.value).strip().splitlines()[-1])
        assert errors[0] == errors[1]
    torch.testing.assert_close(ours(x, h), theirs(x, h))  # as before
    packed = pack_padded_sequence(x, [2, 5], enforce_sorted=False)
    found, expected = torch.jit.script(ScriptedPacked(ours.gru)), torch.jit.script(ScriptedPacked(theirs.gru))
    for given in ((packed,), (packed, torch.randn(sets, 2, 4))):
        torch.testing.assert_close(found(*given), expected(*given), rtol=0, atol=0)
