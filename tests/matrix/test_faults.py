"""Each fault of the table, in all its variants, on each entry that it is wrong for, by small examples."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lstm_ext

from .broken import ENTRIES
from .cases import Case, Options
from .faults import FAULTS
from .judge_faults import Faulty, check_fault
from .option_faults import OPTIONS, VALUES

DENSE = {
    "plain": Case(lengths=(5, 5)),
    "all": Case(lengths=(2, 2), num_layers=2, bidirectional=True, proj_size=2, bias=False),
    "as many rows as units": Case(lengths=(3,) * 4, batch_first=True, mode="no_grad", bias=False),
    "unbatched": Case(layout="unbatched", lengths=(4,), num_layers=2),
    "options": Case(lengths=(5,) * 3, options=Options(return_gates=True), dtype="float64"),
}
PACKED = {
    "sorted": Case(layout="handmade", lengths=(3, 2, 2)),
    "with indices": Case(
        layout="packed", lengths=(2, 3, 2), mode="no_grad", options=Options(return_gates=True)
    ),
    "one sequence": Case(layout="packed", lengths=(3,), num_layers=2, bidirectional=True, proj_size=2),
}


def examples(fault: str, entry: str) -> list[Case]:
    if entry in ("packed", "nested", "equations"):
        return list(PACKED.values())
    if fault in VALUES or entry.endswith("constructor"):
        return [DENSE["plain"], DENSE["all"]]
    return [case for name, case in DENSE.items() if not (entry == "function" and name == "unbatched")]


def rows(of_options: bool) -> list[tuple[str, str]]:
    chosen = {fault: row for fault, row in FAULTS.items() if (fault in OPTIONS) == of_options}
    return [(fault, entry) for fault, row in chosen.items() for entry in ENTRIES if getattr(row, entry)]


def check_all(fault: str, entry: str, device: str) -> None:
    outcomes, seen = set(), [1]
    for case in examples(fault, entry):
        for which in range(60):
            if which < max(seen):
                outcomes.add(check_fault(Faulty(fault, entry, case, which), device, seen))
    assert outcomes - {"does not apply"}


@pytest.mark.devices("cpu", "cuda")
@pytest.mark.parametrize(("fault", "entry"), rows(of_options=False))
def test_faults(fault: str, entry: str, device: str) -> None:
    if device != "cpu" and fault.startswith("indices: "):
        return  # numbers on a device are not read
    check_all(fault, entry, device)


@pytest.mark.parametrize(("fault", "entry"), rows(of_options=True))
def test_faults_of_options(fault: str, entry: str) -> None:
    check_all(fault, entry, "cpu")


@pytest.mark.parametrize("kwargs", [{}, {"input": torch.zeros(5, 2, 3), "h0": None}], ids=str)
def test_calls_that_python_refuses(kwargs: dict[str, object]) -> None:
    errors = []
    for module in (lstm_ext.LSTM(3, 4), nn.LSTM(3, 4)):
        with pytest.raises(TypeError) as caught:
            module(**kwargs)
        errors.append(str(caught.value))
    assert errors[0] == errors[1]
