"""The registered operators: what torch demands of them, and that they compute what the kernels do."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from graphs import Recorder
from operator_cases import CASES, B, H, I, Operands, P, T, make
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import lstm_ext
from lstm_ext import ops, reference
from lstm_ext.layer import tracing
from lstm_ext.layer.layer_call import PLAIN, LayerOptions
from lstm_ext.native import loader

pytestmark = pytest.mark.devices("cpu", "cuda")

every_case = pytest.mark.parametrize("name", CASES)


# ---- what torch demands of an operator


@pytest.mark.slow
@pytest.mark.parametrize("requires_grad", [False, True], ids=["", "gradients"])
@every_case
def test_layer_passes_opcheck(name: str, requires_grad: bool) -> None:
    case = make(name, requires_grad=requires_grad)
    torch.library.opcheck(ops.lstm_layer, case.layer, case.options)


@pytest.mark.slow
@every_case
def test_forward_and_backward_pass_opcheck(name: str) -> None:
    case = make(name)
    torch.library.opcheck(ops.lstm_layer_forward, case.layer, case.options)
    torch.library.opcheck(ops.lstm_layer_backward, case.layer, case.backward_keywords())


def test_opcheck_with_some_gradients() -> None:
    case = make("both directions, projected")
    for t in (case.h0, case.weights[1]):
        t.requires_grad_()
    torch.library.opcheck(ops.lstm_layer, case.layer, case.options)
    some = case.backward_keywords([t is not None and t.requires_grad for t in case.inputs])
    detached = case.with_tensors(Tensor.detach)
    # None stands for what has no elements, too.
    for changes in ({}, {"grad_output": None}, {"norm_products": None, "norm_factors": None}):
        torch.library.opcheck(ops.lstm_layer_backward, detached.layer, {**some, **changes})


@pytest.mark.parametrize("name", ["plain", "reset state"])
def test_the_ends_have_no_gradient(name: str) -> None:
    case = make(name, requires_grad=True)
    # Autograd is registered on all three operators.
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    for op, keywords in (
        (ops.lstm_layer_forward, case.options),
        (ops.lstm_layer_backward, case.backward_keywords()),
    ):
        torch.library.opcheck(op, case.layer, keywords, test_utils=utils)
    output, *_ = case.call(ops.lstm_layer_forward)
    with pytest.raises(RuntimeError, match=r"lstm_layer_forward has no gradient.*lstm_ext::lstm_layer once"):
        output.sum().backward()
    output, *_ = case.call()
    (grad,) = torch.autograd.grad(output.sum(), case.input, create_graph=True)
    with pytest.raises(RuntimeError, match=r"lstm_layer_backward has no gradient.*the module lstm_ext\.LSTM"):
        grad.sum().backward()


def test_options_are_those_of_the_python_table() -> None:
    """By name, in order and with their defaults; the rows of csrc/contract/options.def make the schemas."""
    table = {field.name: field.default or 0 for field in dataclasses.fields(LayerOptions)}
    for op in (ops.lstm_layer, ops.lstm_layer_forward):
        options = [a for a in op._schema.arguments if a.kwarg_only]
        rows = [(option.name, option.default_value or 0) for option in options]
        assert rows == [row for row in table.items() if row[0] != "recompute"]  # no operator has it
    kernels = loader.extension()
    for name in table:
        kernels.LayerOptions(**{name: getattr(PLAIN, name)})


def test_options_are_taken_by_name_only() -> None:
    case = make("resets")
    with pytest.raises(RuntimeError, match="takes 7 positional argument"):
        ops.lstm_layer(*case.layer, case.options["resets"])


# ---- fake kernels


def assert_same_layout(fake: list[Tensor], real: list[Tensor]) -> None:
    # What is saved has another dtype on CUDA, and a meta tensor does not know what it stands for.
    known = 5 if fake[0].is_meta and real[0].is_cuda and len(real) == 10 else len(real)
    assert [f.dtype for f in fake[:known]] == [r.dtype for r in real[:known]]
    for f, r in zip(fake, real, strict=True):
        assert f.dim() == r.dim()
        if all(isinstance(n, int) for n in f.shape):
            assert (f.shape, f.stride()) == (r.shape, r.stride())
        else:
            # Only the values of batch_sizes say how many rows a state has, if no state was given.
            assert f.is_contiguous() and r.is_contiguous()
            assert [n for i, n in enumerate(f.shape) if i != 1] == [
                n for i, n in enumerate(r.shape) if i != 1
            ]
            assert isinstance(f.shape[1], torch.SymInt) and r.shape[1] == B


def on_meta(arguments: Any) -> Any:
    return torch.utils._pytree.tree_map_only(
        Tensor, lambda t: t.to("meta") if t.is_floating_point() or t.dtype == torch.bool else t, arguments
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@every_case
def test_fake_results_look_like_real_ones(name: str, dtype: torch.dtype) -> None:
    case = make(name, dtype=dtype)
    if dtype in (torch.float32, torch.bfloat16):
        # Batch-first; of packed data, rows in the order of columns.
        case.input = case.input.transpose(0, 1).contiguous().transpose(0, 1)
    for op, keywords in (
        (ops.lstm_layer, case.options),
        (ops.lstm_layer_forward, case.options),
        (ops.lstm_layer_backward, case.backward_keywords()),
    ):
        arguments = (case.layer, keywords)
        real = op(*case.layer, **keywords)
        with FakeTensorMode(shape_env=ShapeEnv()) as mode:
            layer, fakes = torch.utils._pytree.tree_map_only(
                Tensor, lambda t, m=mode: m.from_tensor(t, static_shapes=True), arguments
            )
            assert_same_layout(op(*layer, **fakes), real)
        layer, metas = on_meta(arguments)
        assert_same_layout(op(*layer, **metas), real)


def test_wrong_arguments_are_refused() -> None:
    """By the kernels, and by the fake kernels with the same words."""
    plain = make("plain")
    without_c0 = make("plain")
    without_c0.c0 = None
    resets, packed = make("resets, packed, no states"), make("packed")
    packed.options["lengths"] = torch.tensor([4, 0, 5])
    for change in (lambda x: x, on_meta):

        def call(case: Operands, op: Any = ops.lstm_layer, change: Any = change, **keywords: Any) -> None:
            layer, options = change((case.layer, {**case.options, **keywords}))
            op(*layer, **options)

        input, h0, c0, weights, *rest = change(plain.layer)
        with pytest.raises(RuntimeError, match="got 3 weights, expected 4, or 5 with a projection"):
            ops.lstm_layer(input, h0, c0, weights[:3], *rest)
        with pytest.raises(RuntimeError, match="input has 2 dimensions, expected 3"):
            ops.lstm_layer(input[0], h0, c0, weights, *rest)
        with pytest.raises(RuntimeError, match="got lengths and batch_sizes, expected one of them"):
            call(packed)
        (rows, *states, batch_sizes, bias, bidirectional), options = change((packed.layer, {}))
        with pytest.raises(RuntimeError, match="input has 3 dimensions, expected 2"):
            ops.lstm_layer(rows[None], *states, batch_sizes, bias, bidirectional, **options)
        for case, count in ((without_c0, 9), (resets, 9)):
            keywords = case.backward_keywords()
            keywords["needs_grad"] = [True] * count
            with pytest.raises(RuntimeError, match="asks for the gradient of a state that was not given"):
                call(case, ops.lstm_layer_backward, **keywords)
            keywords["needs_grad"] = [True] * 6
            with pytest.raises(RuntimeError, match=f"needs_grad has 6 entries, expected {count}"):
                call(case, ops.lstm_layer_backward, **keywords)


def test_kernels_refuse_saved_tensors_of_another_layer() -> None:
    case = make("plain")
    keywords = case.backward_keywords()
    with pytest.raises(RuntimeError, match="saved cells has shape"):
        ops.lstm_layer_backward(*case.layer, **{**keywords, "cells": keywords["cells"][..., 1:]})
    with pytest.raises(RuntimeError, match="saved has 3 tensors, expected 2"):
        ops.lstm_layer_backward(*case.layer, **{**keywords, "hidden": keywords["cells"]})
    keywords["cells"] = torch.empty(0)
    with pytest.raises(RuntimeError, match="saved cells is not given"):
        ops.lstm_layer_backward(*case.layer, **keywords)


# ---- values and gradients


@pytest.mark.parametrize("name", ["plain", "all"])
def test_values_without_gradients(name: str) -> None:
    case = make(name)
    for x, y in zip(case.call(), case.call(ops.lstm_layer_forward)[:5], strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("names", [("input",), ("h0", "weight 1"), ("reset_h", "weight 0"), ("c0",)], ids=str)
def test_only_requested_gradients_are_computed(names: tuple[str, ...]) -> None:
    case = make("reset state")
    weights = [f"weight {i}" for i in range(len(case.weights))]
    all_names = ["input", "h0", "c0", *weights, "reset_h", "reset_c"]
    for n, t in zip(all_names, case.inputs, strict=True):
        t.requires_grad_(n in names)
    with Recorder() as recorder:
        output, _, _, cells, gates = case.call()
        (output.sum() + cells.sum()).backward()
    assert recorder.names == ["lstm_layer_forward", "lstm_layer_backward"]
    _, _, keywords = recorder.calls[1]
    assert list(keywords["needs_grad"]) == [n in names for n in all_names]
    # No zeros are made for a result that nobody used.
    grads = [keywords[f"grad_{r}"] for r in ("output", "h_n", "c_n", "cell_states", "gate_values")]
    assert [g is None for g in grads] == [False, True, True, False, True]
    assert [t.grad is not None for t in case.inputs] == [n in names for n in all_names]
    assert cells.requires_grad and not gates.requires_grad and gates.numel() == 0


def test_gradients_that_the_caller_does_not_ask_for() -> None:
    case = make("no states", requires_grad=True)
    with Recorder() as recorder:
        output, *_ = case.call()
        (grad,) = torch.autograd.grad(output.sum(), case.weights[1])
    assert grad.shape == case.weights[1].shape
    assert [i for i, needed in enumerate(recorder.calls[1][2]["needs_grad"]) if needed] == [4]


@pytest.mark.parametrize("name", ["plain", "reset state"])
def test_nothing_is_saved_without_gradients(name: str) -> None:
    case, with_gradients = make(name), make(name, requires_grad=True)
    with Recorder() as recorder:
        assert not any(t.requires_grad for t in case.call())
        with torch.no_grad():
            assert not any(t.requires_grad for t in with_gradients.call())
        with torch.inference_mode():
            case.call()
    assert recorder.names == ["lstm_layer"] * 3


@pytest.mark.parametrize("name", ["plain", "both directions, projected", "norm"])
def test_saved_tensors_pass_through_hooks(name: str) -> None:
    case = make(name, requires_grad=True)
    packed: list[Tensor] = []

    def pack(t: Tensor) -> int:
        packed.append(t.detach().clone())
        return len(packed) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda i: packed[i]):
        output, *_ = case.call()
    grads = torch.autograd.grad(output.sum(), case.leaves)
    # output, gates and cells; hidden; lengths and the two of layer normalisation
    more = {"plain": 3, "both directions, projected": 4, "norm": 6}
    assert len(packed) == len(case.leaves) + more[name] and all(t.numel() for t in packed)
    expected = torch.autograd.grad(case.call()[0].sum(), case.leaves)
    assert all(torch.equal(g, e) for g, e in zip(grads, expected, strict=True))


def test_modified_input_is_noticed() -> None:
    case = make("plain", requires_grad=True)
    output, *_ = case.call()
    with torch.no_grad():
        case.input.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_results_may_be_changed_in_place() -> None:
    """They share no memory with what is saved."""
    case = make("lengths, resets", requires_grad=True)
    grads = []
    for change in (False, True):
        results = case.call()
        loss = sum(t.sum() for t in results)
        if change:
            for t in results[1:]:
                t.detach().zero_()
        grads.append(torch.autograd.grad(loss, case.weights))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_results_of_one_hidden_unit_share_no_memory() -> None:
    """Where the gate values lie as the saved gates do."""
    weights = [torch.randn(4, 1), torch.randn(4, 1)]
    options = {"return_cell_states": True, "return_gates": True}
    results = ops.lstm_layer_forward(torch.randn(2, 2, 1), None, None, weights, None, False, False, **options)
    storages = {t.untyped_storage().data_ptr() for t in results if t.numel()}
    assert len(storages) == 7


def test_results_that_are_not_requested_are_tensors_of_their_own() -> None:
    *_, cells, gates = make("plain").call()
    assert cells.shape == gates.shape == (0,) and cells.dtype == torch.float32
    assert cells.resize_(3).zero_().sum() == 0 and gates.shape == (0,)


@pytest.mark.parametrize("name", ["plain", "resets"])
def test_tangents_are_not_lost(name: str) -> None:
    case = make(name)
    with torch.autograd.forward_ad.dual_level():
        case.input = torch.autograd.forward_ad.make_dual(case.input, torch.ones_like(case.input))
        with torch.no_grad(), pytest.raises(RuntimeError, match="jvp is not implemented"):
            case.call()


# ---- floating-point operations


def flops(function: Any) -> tuple[int, int]:
    with FlopCounterMode(display=False) as forward:
        output, *_ = function()
    with FlopCounterMode(display=False) as backward:
        output.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.options])
def test_flops_are_those_of_the_products(name: str) -> None:
    case = make(name, requires_grad=True)
    ours, ours_backward = flops(case.call)
    theirs, theirs_backward = flops(lambda: reference.lstm_layer(*case.layer))
    if case.h0 is None:
        # Nothing is multiplied with an initial state of zeros, nor sent to it; the formulas are as for any step.
        first_step = (2 if case.bidirectional else 1) * 2 * B * 4 * H * H
        assert ours - theirs in (0, first_step)
        assert ours_backward - theirs_backward in (0, first_step, 2 * first_step)
    else:
        assert (ours, ours_backward) == (theirs, theirs_backward)
    with FlopCounterMode(display=False) as inference, torch.no_grad():
        case.call()
    assert inference.get_total_flops() == ours


@pytest.mark.parametrize("name", ["reset state", "resets, packed", "norm"])
def test_flops_of_options_are_those_of_the_plain_layer(name: str) -> None:
    case = make(name, requires_grad=True)
    assert flops(case.call) == flops(lambda: ops.lstm_layer(*case.layer)) > (0, 0)


def test_flops_of_requested_gradients_only() -> None:
    case = make("both directions, projected")
    needs_grad = [True, False, False] + [False, True, False, False, False] * 2 + [False, False]
    keywords = case.backward_keywords(needs_grad)
    with FlopCounterMode(display=False) as counter:
        ops.lstm_layer_backward(*case.layer, **keywords)
    product = 2 * 2 * T * B  # both directions
    through_time = product * 4 * H * P + product * P * H
    assert counter.get_total_flops() == through_time + product * 4 * H * I + product * 4 * H * P


# ---- the Python functions, which the eager route calls


@pytest.mark.devices("cpu")
@every_case
def test_python_functions_agree_with_the_operators(name: str) -> None:
    """lstm_layer_forward and lstm_layer_backward take the same arguments in the same order."""
    case = make(name)
    kernels = loader.extension()
    options = kernels.LayerOptions(**case.options) if case.options else None
    results = case.call(ops.lstm_layer_forward)
    values = [t if t.dim() > 1 else None for t in results]
    *found, saved = kernels.lstm_layer_forward(*case.layer, options, True)
    for x, y in zip((*found, *saved), values, strict=True):
        assert (x is None and y is None) or torch.equal(x, y)
    assert kernels.lstm_layer_forward(*case.layer, options, False)[5] is None
    keywords = case.backward_keywords()
    grads = [keywords[f"grad_{r}"] for r in ("output", "h_n", "c_n", "cell_states", "gate_values")]
    needs_grad = keywords["needs_grad"]
    gradients = kernels.lstm_layer_backward(*case.layer, options, *grads, found[0], saved, needs_grad)
    expected = ops.lstm_layer_backward(*case.layer, **keywords)
    for x, y, needed in zip(gradients, expected, needs_grad, strict=True):
        assert torch.equal(x, y) if needed else x is None
    with pytest.raises(TypeError):
        kernels.LayerOptions(None)


@pytest.mark.devices("cpu")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resets": 3}, "resets: expected a Tensor or None, got int"),
        ({"norm": 5}, "norm: expected a sequence of Tensors, got int"),
        ({"zoneout_h": "x"}, "zoneout_h: expected a number, got str"),
        ({"return_gates": "x"}, "return_gates: expected a bool, got str"),
        ({"recompute": True, "attention": True}, "there is no option attention"),
    ],
)
def test_options_of_another_kind(options: dict[str, object], message: str) -> None:
    with pytest.raises(TypeError, match=f"^LayerOptions: {message}$"):
        loader.extension().LayerOptions(**options)


# ---- modes


class Functions(TorchFunctionMode):
    """Notes the names of functions of torch, as a profiler or a counter does."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(getattr(function, "__name__", function)))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Functions, Recorder])
@pytest.mark.parametrize("call", ["call", "step", "cell", "frozen", "lengths", "no_grad"])
def test_a_mode_sees_one_operator(call: str, mode: Any) -> None:
    layer, cell, x = lstm_ext.LSTM(8, 16), lstm_ext.LSTMCell(8, 16), torch.randn(5, 3, 8)
    frozen = lstm_ext.freeze(layer)
    calls = {
        "call": lambda: layer(x)[0],
        "step": lambda: layer.step(x[0])[0],
        "cell": lambda: cell(x[0])[0],
        "frozen": lambda: frozen(x)[0],
        "lengths": lambda: layer(x, lengths=[5, 4, 3])[0],
        "no_grad": lambda: torch.no_grad()(layer)(x)[0],
    }
    expected = calls[call]()
    with mode() as seen:
        result = calls[call]()
    assert torch.equal(result, expected)
    assert sum("lstm_layer" in name for name in seen.names) == 1, seen.names


def test_a_default_device_is_no_mode_that_looks() -> None:
    assert tracing.is_plain_eager()
    with torch.device("cpu"):
        assert tracing.is_plain_eager()
        with Functions():
            assert not tracing.is_plain_eager()
