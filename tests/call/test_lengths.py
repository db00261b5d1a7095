"""Lengths and masks: padded data, on the CPU at the cost of packed data."""

from __future__ import annotations

import forks
import pytest
import torch
from torch.utils._pytree import tree_map

import lstm_ext
from lstm_ext.call import values
from lstm_ext.layer import equations, route
from lstm_ext.native import loader

T, B, I, H = 7, 5, 3, 6
LENGTHS = [3, 7, 1, 7, 4]


def same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def states(module, batch=B):
    sets = module.num_layers * (2 if module.bidirectional else 1)
    return tuple(
        torch.randn(sets, batch, n) for n in (module.proj_size or module.hidden_size, module.hidden_size)
    )


def test_the_kernels_compute_it_and_only_the_rows_that_count(monkeypatch):
    rows = []
    extension = loader.extension()

    class Recorder:
        def __getattr__(self, name):
            function = getattr(extension, name)
            if not name.startswith("lstm_layer"):
                return function

            def record(*args):
                rows.extend(
                    (name, a.shape[0]) for a in args[:4] if isinstance(a, torch.Tensor) and a.dim() == 2
                )
                return function(*args)

            return record

    def refused(*args):
        raise AssertionError("the reference ran")

    monkeypatch.setattr(route.loader, "extension", lambda: Recorder())
    monkeypatch.setattr(equations, "lstm_layer", refused)
    module = lstm_ext.LSTM(I, H, 2)
    module(torch.randn(T, B, I), lengths=torch.tensor(LENGTHS))[0].sum().backward()
    assert rows == [("lstm_layer", sum(LENGTHS))] * 2


def test_lengths_of_a_device_are_clamped(monkeypatch):
    module = lstm_ext.LSTM(I, H)
    x = torch.randn(T, B, I)
    expected = module(x, lengths=[0, 7, 2, 7, 3])
    monkeypatch.setattr(values, "is_readable", lambda x: False)
    torch.testing.assert_close(module(x, lengths=torch.tensor([-4, 7, 2, 99, 3])), expected)


def test_check_variable():
    """LSTM_EXT_CHECK=1 checks what is not read."""
    program = """
import torch, lstm_ext
from lstm_ext.call import values
values.is_readable = lambda x: False
module, x, bad = lstm_ext.LSTM(3, 4), torch.randn(5, 2, 3), []
for name, right, wrong in (
    ("lengths", torch.tensor([0, 5]), torch.tensor([0, 6])),
    ("resets", torch.ones(5, 2), torch.full((5, 2), 0.5)),
):
    module(x, **{name: right})
    try:
        module(x, **{name: wrong})
    except RuntimeError as error:
        assert name in str(error), error
        bad.append(name)
packed = torch.nn.utils.rnn.pack_sequence([torch.randn(2, 3), torch.randn(3, 3)], enforce_sorted=False)
flags = packed._replace(data=torch.zeros(5))
module(packed, resets=flags)
try:
    module(packed, resets=flags._replace(sorted_indices=torch.tensor([0, 1])))
except RuntimeError as error:
    assert "sorted_indices" in str(error), error
    bad.append("order")
print(*bad)
"""
    off, on = forks.run(program, *({"LSTM_EXT_CHECK": value} for value in ("0", "1")))
    assert (off.returncode, on.returncode) == (0, 0), (off.stderr, on.stderr)
    assert off.stdout.split() == [] and on.stdout.split() == ["lengths", "resets", "order"]


def test_meta_and_fake_tensors():
    module = lstm_ext.LSTM(I, H, 2, bidirectional=True, device="meta")
    output, (h_n, c_n), extras = module(
        torch.empty(T, B, I, device="meta"), lengths=LENGTHS, return_gates=True
    )
    assert output.shape == (T, B, 2 * H)
    assert h_n.shape == c_n.shape == (4, B, H)
    assert extras.gates.shape == (4, T, B, H, 4)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        fake = lstm_ext.LSTM(I, H)(torch.empty(T, B, I), lengths=torch.tensor(LENGTHS))
    assert tree_map(lambda t: t.shape, fake) == (torch.Size([T, B, H]), (torch.Size([1, B, H]),) * 2)


@pytest.mark.parametrize("checked", [False, True])
def test_no_number_on_a_device_is_read(checked, monkeypatch):
    """Meta tensors have none: whoever reads one gets an error, as on a GPU he would have to wait."""
    monkeypatch.setattr(values, "CHECK", checked)
    options = {"layer_norm": True, "zoneout": (0.1, 0.2), "recurrent_dropout": 0.5, "bidirectional": True}
    module = lstm_ext.LSTM(I, H, 2, **options, device="meta")
    x, resets = torch.empty(T, B, I, device="meta"), torch.empty(T, B, device="meta")
    counts = torch.empty(B, device="meta", dtype=torch.int32)
    mask = torch.empty(T, B, device="meta", dtype=torch.bool)
    for form in (
        {"lengths": counts},
        {"lengths": LENGTHS},
        {"lengths": torch.tensor(LENGTHS)},
        {"mask": mask},
    ):
        output, (h_n, _), extras = module(x, **form, resets=resets, return_cell_states=True)
        assert output.is_meta
        assert h_n.is_meta
        assert extras.cell_states.is_meta
        output.sum().backward()
    with pytest.raises((NotImplementedError, RuntimeError)):
        counts.tolist()


# ---- lengths that only the kernels read


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_that_read_them_give_the_bits_of_packed_data(dtype, monkeypatch):
    module = lstm_ext.LSTM(I, H, 2, bidirectional=True, dtype=dtype)
    x, hx = torch.randn(T, B, I, dtype=dtype), tuple(s.to(dtype) for s in states(module))
    lengths = torch.tensor([3, 0, 7, 7, 1])
    expected = module(x, hx, lengths=lengths)
    monkeypatch.setattr(values, "is_readable", lambda x: False)
    same(module(x, hx, lengths=lengths), expected)
