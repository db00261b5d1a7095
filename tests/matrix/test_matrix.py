"""The numbers of every case on every route that has it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves

import lstm_ext
from lstm_ext.layer import cuda_kernels, equations

from .cases import (
    CAPABILITIES,
    CASES,
    LENGTHS_AS,
    RESETS_AS,
    SLICE,
    STRIDES,
    UNBATCHED_ONLY,
    WEIGHT_STRIDES,
    Case,
    case_of,
    tensors_of,
)
from .judge import check, run
from .routes import ROUTES, draws, on_device


def cases(mode: str = "", share: int = 0) -> Iterator[Any]:
    """The cases of each route in a mode, its own first one where none is given; ``share`` of them, or all."""
    for number, (name, route) in enumerate(ROUTES.items()):
        taken = route.cases(CASES, mode or route.modes[0])
        step = max(1, len(taken) // (share or route.share))
        first = list(taken)[number % step :: step]
        if name == "eager":  # of each form and cell
            first = SLICE[:: 4 if share else 1]
        for case in taken if route.others and not share else first:
            tier = route.tier if case in first else "full"
            marks = [getattr(pytest.mark, tier)] if tier else []
            yield pytest.param(name, taken[case], id=f"{name}-{case}", marks=marks)


@pytest.mark.parametrize(("route", "case"), list(cases()))
def test_numbers(route: str, case: Case) -> None:
    torch._dynamo.reset()
    call = ROUTES[route].call
    check(case, ROUTES[route].kind, call if route in ON_EQUATIONS else partial(on_kernels, call))


# All other ways run on the kernels.
ON_EQUATIONS = ("reference", "torch's operator", "forward mode")


def on_kernels(call: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
    def refused(*_: Any) -> Any:
        raise AssertionError("the equations compute it, and not the kernels")

    with mock.patch.object(equations, "lstm_layer", refused):
        return call(*arguments, **more)


# ---- what is no axis of the table, on a part of it


@pytest.mark.parametrize(("route", "case"), list(cases("twice", share=4)))
def test_gradients_of_gradients(route: str, case: Case) -> None:
    check(case, ROUTES[route].kind, ROUTES[route].call)


DTYPES = ("float32", "bfloat16", "float64", "float16")


# Without what is random: a GPU draws other numbers. A GRU has no kernels there.
ON_A_GPU = [name for name in SLICE if CASES[name].cell != "GRU" and not draws(CASES[name])]


@pytest.mark.devices("cuda")
@pytest.mark.parametrize("case", ON_A_GPU)
@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_on_a_gpu(dtype: str, case: str) -> None:
    """`make gpu-check` runs these."""
    torch.set_default_device(None)  # what a case is judged by is on the CPU
    index = torch.cuda.current_device()
    assert cuda_kernels.may_run(index), cuda_kernels.why_not(index)
    call = partial(on_kernels, partial(on_device, "cuda"))
    check(dataclasses.replace(CASES[case], dtype=dtype), call=call)


@pytest.mark.parametrize("case", ON_A_GPU[5::25])
def test_the_way_to_a_device_and_back(case: str) -> None:
    """Without a GPU: the numbers on the CPU, and on a device without numbers that everything came there."""
    check(CASES[case], call=partial(on_kernels, partial(on_device, "cpu")))
    seen = []

    def note(module: Any, arguments: Any, more: Any) -> None:
        found = [*arguments, *more.values(), *module.parameters()]
        leaves = tree_leaves([x.data if isinstance(x, PackedSequence) else x for x in found])
        seen.extend([t.device.type for t in leaves if isinstance(t, torch.Tensor)])

    def call(module: Any, *arguments: Any, **more: Any) -> None:
        module.register_forward_pre_hook(note, with_kwargs=True)
        on_device("meta", module, *arguments, **more)

    with pytest.raises(NotImplementedError, match="meta tensor"):
        run(lstm_ext.LSTM, CASES[case], tensors_of(CASES[case]), torch.float64, call)
    assert set(seen) == {"meta"}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("number", range(12))
def test_instruction_sets_and_threads(number: int, capability: str) -> None:
    """Rows and units that the registers of a set do not share evenly, on 1 to 8 threads, in each dtype in turn."""
    case, rows = CASES[SLICE[(len(SLICE) * number + 5) // 12]], 1 + number % 4
    rows = 1 if case.layout == "unbatched" else rows
    options = case.options and dataclasses.replace(
        case.options, lengths=case.options.lengths and case.options.lengths * rows
    )
    changed = dataclasses.replace(
        case,
        lengths=tuple(sorted(case.lengths * rows, reverse=True)),
        hidden_size=19 + number,
        dtype=DTYPES[number % 4],
        options=options,
        threads=number % 8 + 1,
        capability=capability,
    )
    check(changed)


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
@pytest.mark.parametrize("case", SLICE[1::16])
def test_modes(case: str, mode: str) -> None:
    check(dataclasses.replace(CASES[case], mode=mode))


@pytest.mark.parametrize("form", ["dense", "all", "packed"])
@pytest.mark.parametrize("strides", STRIDES)
def test_strides(strides: str, form: str) -> None:
    of_weights = strides if strides in WEIGHT_STRIDES else "dense"
    more = {"weight_strides": of_weights, "hx_strides": strides, "grad_strides": strides}
    check(case_of(form, "plain", "", input_strides=strides, **more))


@pytest.mark.parametrize(
    ("form", "lengths_as"),
    [("unbatched", name) for name in LENGTHS_AS]
    + [("all", n) for n in LENGTHS_AS if n not in UNBATCHED_ONLY],
)
def test_forms_of_lengths(form: str, lengths_as: str) -> None:
    """Some sequences have no step, or all steps; and then none of them has one, and all have all."""
    case = case_of(form, "plain", "resets")
    for share in ((0.7, 0, 1), (0, 0, 0), (1, 1, 1)):
        lengths = tuple([round(share[b] * n) for b, n in enumerate(case.lengths)])
        options = dataclasses.replace(case.options, lengths=lengths, lengths_as=lengths_as)
        check(dataclasses.replace(case, options=options))


@pytest.mark.parametrize("form", ["all", "unbatched", "packed"])
@pytest.mark.parametrize("resets_as", RESETS_AS)
def test_forms_of_resets(resets_as: str, form: str) -> None:
    case = case_of(form, "plain", "resets to a state")
    check(dataclasses.replace(case, options=dataclasses.replace(case.options, resets_as=resets_as)))


@pytest.mark.parametrize("mode", ["grad", "twice"])
@pytest.mark.parametrize("form", ["all", "packed"])
@pytest.mark.parametrize("given", ["output", "h_n", "c_n", "output c_n", "gates", "cell_states"])
def test_gradients_of_some_results(given: str, form: str, mode: str) -> None:
    check(case_of(form, "plain", "returned", grad_of=tuple(given.split()), mode=mode))


@pytest.mark.parametrize("mode", ["grad", "twice"])
@pytest.mark.parametrize("form", ["all", "packed"])
@pytest.mark.parametrize("wanted", ["input", "h0", "c0", "0", "1", "2", "4", "reset_h", ""])
def test_gradients_of_some_arguments(wanted: str, form: str, mode: str) -> None:
    """Of one argument, or of one parameter by its place."""
    case = case_of(form, "plain", "resets to a state")
    everything = {"input", "h0", "c0", "reset_h", "reset_c", *map(str, range(20))}
    check(dataclasses.replace(case, frozen=frozenset(everything - {wanted}), mode=mode))
