"""The numbers of every case on every route that has it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from .cases import CASES, SLICE, STRIDES, WEIGHT_STRIDES, Case, case_of
from .judge import check
from .routes import ROUTES


def cases() -> Iterator[Any]:
    for number, (name, route) in enumerate(ROUTES.items()):
        taken = {case: dataclasses.replace(CASES[case], mode=route.modes[0]) for case in CASES}
        taken = {case: of_route for case, of_route in taken.items() if route.takes(of_route)}
        step = max(1, len(taken) // SHARE)
        first = SLICE if name == "eager" else list(taken)[number % step :: step]
        for case, of_route in taken.items():
            tier = route.tier if case in first else "full"
            marks = [getattr(pytest.mark, tier)] if tier else []
            yield pytest.param(name, of_route, id=f"{name}-{case}", marks=marks)


# So many cases of each route run first, besides "eager", which has one of each form and cell.
SHARE = 24


@pytest.mark.parametrize(("route", "case"), list(cases()))
def test_numbers(route: str, case: Case) -> None:
    torch._dynamo.reset()
    check(case, ROUTES[route].kind, ROUTES[route].call)


# ---- what is no axis of the table, on a part of it


@pytest.mark.parametrize("case", SLICE[::4])
def test_gradients_of_gradients(case: str) -> None:
    check(dataclasses.replace(CASES[case], mode="twice"))


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


@pytest.mark.parametrize("mode", ["grad", "twice"])
@pytest.mark.parametrize("form", ["all", "packed"])
@pytest.mark.parametrize("given", ["output", "h_n", "c_n", "output c_n", "gates", "cell_states"])
def test_gradients_of_some_results(given: str, form: str, mode: str) -> None:
    check(case_of(form, "plain", "returned", grad_of=tuple(given.split()), mode=mode))


@pytest.mark.parametrize("form", ["all", "packed"])
@pytest.mark.parametrize("wanted", ["input", "h0", "c0", "0", "1", "2", "4", "reset_h", ""])
def test_gradients_of_some_arguments(wanted: str, form: str) -> None:
    """Of one argument, or of one parameter by its place."""
    case = case_of(form, "plain", "resets to a state")
    everything = {"input", "h0", "c0", "reset_h", "reset_c", *map(str, range(20))}
    check(dataclasses.replace(case, frozen=frozenset(everything - {wanted})))
