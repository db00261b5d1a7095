"""Peepholes, clips, coupled gates and other functions of a cell, as a user meets them."""

from __future__ import annotations

import copy
import inspect
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import lstm_ext

T, B, I, H = 5, 3, 4, 6


@pytest.mark.parametrize("clip", [1e-46, 1e39])
def test_a_clip_beyond_what_the_dtype_holds(clip):
    module = lstm_ext.LSTM(I, H, cell_clip=clip)
    plain, x = lstm_ext.LSTM(I, H), torch.randn(T, B, I)
    plain.load_state_dict(module.state_dict())
    expected = plain(x)[0] if clip > 1 else torch.torch.zeros(T, B, H)
    weights = list(module.parameters())
    for y in (module(x)[0], lstm_ext.reference.lstm(x, None, weights, cell_clip=clip)[0]):
        torch.testing.assert_close(y, expected)


def test_names_and_numbers_of_functions():
    same = [
        ("hard_sigmoid", ("hard_sigmoid", 0.2, 0.5)),
        (("hard_sigmoid", np.float32(0.5)), ("hard_sigmoid", 0.5, 0.5)),
        ("identity", ("affine", 1, 0)),
        (["elu"], "elu"),
    ]
    x = torch.randn(T, B, I)
    for one, other in same:
        a = lstm_ext.LSTM(I, H, gate_activation=one, cell_activation=("leaky_relu", np.float32(0.25)))
        b = lstm_ext.LSTM(I, H, gate_activation=other, cell_activation=("leaky_relu", 0.25))
        b.load_state_dict(a.state_dict())
        assert torch.equal(a(x)[0], b(x)[0])
    assert (
        repr(lstm_ext.LSTM(I, H, gate_activation="sigmoid", cell_activation=("tanh", "tanh"))) == "LSTM(4, 6)"
    )
    text = repr(lstm_ext.LSTM(I, H, gate_activation=("elu", 0.5)))
    assert text == "LSTM(4, 6, gate_activation=('elu', 0.5))"


def operator_with(activations: str) -> None:
    weights = [torch.ones(4 * H, n) for n in (I, H)]
    x = torch.ones(T, B, I)
    torch.ops.lstm_ext.lstm_layer(x, None, None, weights, None, False, False, activations=activations)


@pytest.mark.parametrize(
    "function",
    ["", "gelu", "tanhs", "tanh ", "tanh()", "elu", "elu()", "elu(1", "elu(1,2)", "elu(x)", "elu(1x)", "elu(inf)",
     "elu(1e999)", "elu(-0.1)", "affine(1)", "affine(1;2)", "scaled_tanh(0,1)", "scaled_tanh(-1,1)"],
)  # fmt: skip
def test_kernels_refuse_functions_that_nobody_wrote(function):
    for text in (f"{function} tanh tanh", f"tanh {function} tanh", f"tanh tanh {function}"):
        with pytest.raises(
            ValueError, match="expected three names with a space between them, of sigmoid, tanh"
        ):
            operator_with(text)


@pytest.mark.parametrize("function", ["elu(0)", "affine(-1,-2)", "scaled_tanh(1,-1)", "hard_sigmoid(0,-1)"])
def test_kernels_take_the_least_numbers_of_functions(function):
    operator_with(f"{function} {function} {function}")


LOCALE = """
import locale, torch, lstm_ext
module, x = lstm_ext.LSTM(4, 6, gate_activation="hard_sigmoid"), torch.randn(5, 3, 4)
expected = module(x)[0]
locale.setlocale(locale.LC_ALL, "xx_XX.UTF-8")
assert locale.localeconv()["decimal_point"] == ","
assert torch.equal(module(x)[0], expected)
"""


def test_the_locale_does_not_matter(tmp_path):
    """The kernels read numbers with a point where the process has a comma."""
    command = ["localedef", "-i", "de_DE", "-f", "UTF-8", str(tmp_path / "xx_XX.UTF-8")]
    subprocess.run(command, capture_output=True)  # it warns, and then its status is 1
    environment = {**os.environ, "LOCPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", LOCALE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_reference_has_the_signature_of_the_function():
    assert inspect.signature(lstm_ext.reference.lstm) == inspect.signature(lstm_ext.functional.lstm)
    module = lstm_ext.LSTM(I, H)
    for name in ("peephole", "frozen", "bogus"):
        with pytest.raises(TypeError, match=name):
            lstm_ext.reference.lstm(torch.zeros(T, B, I), None, list(module.parameters()), **{name: True})


def test_a_subclass_may_have_parameters_of_these_names():
    class Mine(lstm_ext.LSTM):
        def __init__(self) -> None:
            super().__init__(I, H)
            self.weight_ci_l0 = nn.Parameter(torch.zeros(H))

    assert copy.deepcopy(Mine()).weight_ci_l0.shape == (H,)
