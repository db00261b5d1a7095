"""``lstm_ext.GRU`` and ``GRUCell`` beside torch's; tests/matrix has the numbers of their calls."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

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
    with pytest.raises(RuntimeError, match=r"lstm_ext.GRU: torch.jit.script does not compile it"):
        torch.jit.script(lstm_ext.GRU(3, 4))


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


def test_onnx_refuses_it() -> None:
    pytest.importorskip("onnxscript")
    with pytest.raises(lstm_ext.onnx.UnsupportedLayerError, match="a GRU of this package cannot be exported"):
        lstm_ext.onnx.export(lstm_ext.GRU(3, 4), (torch.randn(5, 2, 3),), verbose=False)
