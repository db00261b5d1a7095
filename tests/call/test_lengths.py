"""Lengths and masks: padded data, on the CPU at the cost of packed data."""

from __future__ import annotations

import itertools

import forks
import internals
import pytest
import torch
from cases import Case, Layer
from judge import assert_as_accurate_as_torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import tree_map

import lstm_ext
from lstm_ext import reference
from lstm_ext.call import values
from lstm_ext.layer import equations, route
from lstm_ext.native import loader

T, B, I, H = 7, 5, 3, 6
LENGTHS = [3, 7, 1, 7, 4]


def same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def through_packing(module, x, lengths, hx=None):
    """What ``lengths`` must equal."""
    packed = pack_padded_sequence(x, lengths, batch_first=module.batch_first, enforce_sorted=False)
    output, states = module(packed, hx)
    time = x.size(1) if module.batch_first else x.size(0)
    padded, _ = pad_packed_sequence(output, batch_first=module.batch_first, total_length=time)
    return padded, states


def states(module, batch=B):
    sets = module.num_layers * (2 if module.bidirectional else 1)
    return tuple(
        torch.randn(sets, batch, n) for n in (module.proj_size or module.hidden_size, module.hidden_size)
    )


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"num_layers": 2, "dropout": 0.5, "bidirectional": True}, {"proj_size": 2, "num_layers": 2}],
    ids=str,
)
def test_equals_packing_by_hand(options, batch_first):
    """Bit for bit: the same kernels on the same rows, and the same masks of dropout."""
    module = lstm_ext.LSTM(I, H, batch_first=batch_first, **options)
    x, hx = torch.randn((B, T, I) if batch_first else (T, B, I), requires_grad=True), states(module)
    torch.manual_seed(1)
    ours = module(x, hx, lengths=LENGTHS)
    torch.manual_seed(1)
    expected = through_packing(module, x, LENGTHS, hx)
    same(ours, expected)
    assert ours[0].is_contiguous()
    grad = torch.randn_like(ours[0])
    leaves = [x, *module.parameters()]
    for a, b in zip(
        torch.autograd.grad(ours[0], leaves, grad),
        torch.autograd.grad(expected[0], leaves, grad),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_forms():
    module = lstm_ext.LSTM(I, H)
    x = torch.randn(T, B, I)
    expected = module(x, lengths=LENGTHS)
    for dtype in (torch.int64, torch.int32, torch.int16, torch.uint8):
        same(module(x, lengths=torch.tensor(LENGTHS, dtype=dtype)), expected)
    same(module(x, lengths=tuple(LENGTHS)), expected)
    mask = torch.arange(T).unsqueeze(1) < torch.tensor(LENGTHS)
    same(module(x, mask=mask), expected)
    same(module(x, mask=mask.unsqueeze(-1)), expected)
    module.batch_first = True
    output, final = module(x.transpose(0, 1), mask=mask.T)
    same((output.transpose(0, 1), final), expected)
    alone = module(x[:, 0], lengths=3)
    for form in (torch.tensor(3), torch.tensor([3]), [3]):
        same(module(x[:, 0], lengths=form), alone)
    same(module(x[:, 0], mask=mask[:, 0]), alone)
    torch.testing.assert_close(alone[0], expected[0][:, 0])


def test_sequences_without_a_step():
    module = lstm_ext.LSTM(I, H, 2, bidirectional=True)
    x, hx = torch.randn(T, 4, I), states(module, 4)
    output, final = module(x, hx, lengths=[0, 5, 0, 2])
    for b in (0, 2):
        assert not output[:, b].any()
        same([s[:, b] for s in final], [s[:, b] for s in hx])
    assert not output[5:, 1].any()
    for b, n in ((1, 5), (3, 2)):
        y, one = module(x[:n, b], tuple(s[:, b] for s in hx))
        torch.testing.assert_close(output[:n, b], y)
        torch.testing.assert_close([s[:, b] for s in final], list(one))
    output, final = module(x, lengths=[0, 5, 0, 2])
    assert not any(s[:, b].any() for s in final for b in (0, 2))

    hx = tuple(s.requires_grad_() for s in hx)
    output, final = module(x, hx, lengths=[0] * 4)
    assert output.shape == (T, 4, 2 * H)
    assert not output.any()
    same(final, hx)
    assert all(a is not b for a, b in zip(final, hx, strict=True))
    assert torch.equal(torch.autograd.grad(final[0].sum(), hx[0])[0], torch.ones_like(hx[0]))
    output, final = module(torch.randn(T, 0, I), lengths=[])
    assert output.shape == (T, 0, 2 * H)


def test_full_lengths_are_the_dense_layer():
    module = lstm_ext.LSTM(I, H, 2, dropout=0.5)
    x = torch.randn(T, B, I)
    for form in ({"lengths": [T] * B}, {"mask": torch.ones(T, B, dtype=torch.bool)}):
        torch.manual_seed(1)
        expected = module(x)
        torch.manual_seed(1)
        same(module(x, **form), expected)


@pytest.mark.parametrize("read", [True, False])
@pytest.mark.parametrize("options", [{}, {"layer_norm": True, "bidirectional": True}], ids=str)
def test_padding_may_hold_anything(options, read, monkeypatch):
    if not read:
        monkeypatch.setattr(values, "is_readable", lambda x: False)
    module = lstm_ext.LSTM(I, H, 2, **options)
    x = torch.randn(T, B, I)
    garbage = x.clone()
    for b, n in enumerate(LENGTHS):
        garbage[n:, b] = float("nan")
    results = []
    for data in (x, garbage):
        data = data.clone().requires_grad_()
        output, (h_n, c_n) = module(data, lengths=torch.tensor(LENGTHS))
        loss = output.square().sum() + h_n.sum() + c_n.square().sum()
        results.append([output, h_n, c_n, *torch.autograd.grad(loss, [data, *module.parameters()])])
    same(*results)
    assert all(r.isfinite().all() for r in results[0])


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


MASKS = {
    "padding at the beginning": torch.arange(T).unsqueeze(1) >= torch.tensor([4, 0, 6, 1, 3]),
    "holes": torch.rand(T, B, generator=torch.Generator().manual_seed(3)) < 0.5,
    "a sequence without a step": torch.tensor(
        [[1, 0, 1, 0, 0], [0, 0, 0, 1, 1]] * 3 + [[1, 0, 1, 1, 1]]
    ).bool(),
    "nothing counts": torch.zeros(T, B, dtype=torch.bool),
    "at the end": torch.arange(T).unsqueeze(1) < torch.tensor(LENGTHS),
}


@pytest.mark.parametrize("read", [True, False])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(
    "options",
    [{}, {"bidirectional": True, "num_layers": 2, "batch_first": True}, {"layer_norm": True, "proj_size": 2}],
    ids=str,
)
def test_a_mask_leaves_steps_out(options, name, read, monkeypatch):
    """The same as each sequence alone without them: values, cell states, and all gradients. Padding may be NaN."""
    module = lstm_ext.LSTM(I, H, **options).double()
    mask, hx = MASKS[name], tuple(s.double().requires_grad_() for s in states(module))
    x = torch.randn(T, B, I, dtype=torch.float64)
    x[~mask] = float("nan")
    x.requires_grad_()
    leaves = [x, *hx, *module.parameters()]
    first = module.batch_first

    def turned(t):
        return t.transpose(0, 1) if first else t

    if not read:
        monkeypatch.setattr(values, "is_readable", lambda x: False)
    output, (h_n, c_n), extras = module(turned(x), hx, mask=turned(mask), return_cell_states=True)
    output, cells = turned(output), extras.cell_states.transpose(1, 2) if first else extras.cell_states
    columns, finals = [], []
    for b in range(B):
        kept = mask[:, b].nonzero().flatten()
        one = tuple(s[:, b] for s in hx)
        y, c = x.new_zeros(T, output.size(-1)), x.new_zeros(cells.size(0), T, H)
        if len(kept):
            found, one, more = module(x[kept, b], one, return_cell_states=True)
            y, c = y.index_copy(0, kept, found), c.index_copy(1, kept, more.cell_states)
        columns.append((y, c))
        finals.append(one)
    expected = [torch.stack([y for y, _ in columns], 1), torch.stack([c for _, c in columns], 2)]
    expected += [torch.stack([s[i] for s in finals], 1) for i in range(2)]
    ours = [output, cells, h_n, c_n]
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    factors = [torch.randn_like(t) for t in ours]
    gradients = [
        torch.autograd.grad(
            [(t * f).sum() for t, f in zip(side, factors, strict=True) if t.requires_grad],
            leaves,
            allow_unused=True,
        )
        for side in (ours, expected)
    ]
    for a, b, leaf in zip(*gradients, leaves, strict=True):
        b = torch.zeros_like(leaf) if b is None else b.nan_to_num()
        torch.testing.assert_close(torch.zeros_like(leaf) if a is None else a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("read", [True, False])
def test_resets_where_a_mask_leaves_steps_out(read, monkeypatch):
    """They count for the next step that does, and after the last for none."""
    module = lstm_ext.LSTM(I, H, bidirectional=True)
    x = torch.randn(8, 1, I)
    mask = torch.tensor([0, 1, 0, 0, 1, 1, 0, 1]).bool().unsqueeze(1)
    resets = torch.tensor([0, 0, 1, 0, 0, 0, 1, 0]).bool().unsqueeze(1)
    kept = mask.flatten().nonzero().flatten()
    expected = module(x[kept], resets=torch.tensor([0, 1, 0, 1]).bool().unsqueeze(1))
    if not read:
        monkeypatch.setattr(values, "is_readable", lambda x: False)
    output, final = module(x, mask=mask, resets=resets)
    torch.testing.assert_close((output[kept], final), expected)
    assert not output[~mask.flatten()].any()


def test_a_mask_in_a_compiled_function():
    module = lstm_ext.LSTM(I, H, 2, bidirectional=True)
    x, mask = torch.randn(T, B, I), MASKS["holes"]
    compiled = torch.compile(lambda x, mask: module(x, mask=mask), fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(x, mask), module(x, mask=mask))
    x, mask = torch.randn(T + 3, B, I), torch.rand(T + 3, B) < 0.7
    torch.testing.assert_close(compiled(x, mask), module(x, mask=mask))


def test_a_mask_for_each_sample_of_a_vmap():
    module = lstm_ext.LSTM(I, H)
    x, mask = torch.randn(3, T, B, I), torch.rand(3, T, B) < 0.6
    found = torch.vmap(lambda x, mask: module(x, mask=mask)[0])(x, mask)
    torch.testing.assert_close(
        found, torch.stack([module(a, mask=m)[0] for a, m in zip(x, mask, strict=True)])
    )


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
    off, on, wrong = forks.run(program, *({"LSTM_EXT_CHECK": value} for value in ("0", "1", "yes")))
    assert (off.returncode, on.returncode) == (0, 0), (off.stderr, on.stderr)
    assert off.stdout.split() == [] and on.stdout.split() == ["lengths", "resets", "order"]
    assert wrong.returncode == 1
    assert "LSTM_EXT_CHECK is 'yes', expected 0 or 1" in wrong.stderr


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


def test_torch_agrees():
    module = lstm_ext.LSTM(I, H, 2, bidirectional=True, dtype=torch.float64)
    theirs = nn.LSTM(I, H, 2, bidirectional=True, dtype=torch.float64)
    theirs.load_state_dict(module.state_dict())
    x = torch.randn(T, B, I, dtype=torch.float64)
    torch.testing.assert_close(module(x, lengths=LENGTHS), through_packing(theirs, x, LENGTHS))


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


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("lengths", [[3, 0, 7, 7, 1], [7] * 5, [0] * 5, [7, 1, 1, -2, 9]], ids=str)
def test_kernels_read_them(lengths, bidirectional, monkeypatch):
    choices = {
        "proj_size": [0, 2],
        "hx": [False, True],
        "resets": ["", "to a state"],
        "returned": ["", "both"],
        "batch_first": [False, True],
    }
    clamped = tuple(min(max(n, 0), T) for n in lengths)
    for drawn in itertools.product(*choices.values()):
        case = Case(
            **dict(zip(choices, drawn, strict=True)),
            steps=T, lengths=clamped, input_size=I, hidden_size=H, bidirectional=bidirectional,
        )  # fmt: skip
        layer = Layer(case, torch.float64, 3)
        expected = layer.results(reference.lstm_layer, torch.float64)
        layer.lengths = torch.tensor(lengths)
        with monkeypatch.context() as patch:
            patch.setattr(equations, "lstm_layer", lambda *_: pytest.fail("the equations ran"))
            ours = layer.results(internals.lstm_layer, torch.float64)
        assert all(r.isfinite().all() for r in ours.values())
        assert_as_accurate_as_torch(ours, expected, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_that_read_them_give_the_bits_of_packed_data(dtype, monkeypatch):
    module = lstm_ext.LSTM(I, H, 2, bidirectional=True, dtype=dtype)
    x, hx = torch.randn(T, B, I, dtype=dtype), tuple(s.to(dtype) for s in states(module))
    lengths = torch.tensor([3, 0, 7, 7, 1])
    expected = module(x, hx, lengths=lengths)
    monkeypatch.setattr(values, "is_readable", lambda x: False)
    same(module(x, hx, lengths=lengths), expected)


def test_no_sequence_under_kernels_that_read_lengths(monkeypatch):
    monkeypatch.setattr(values, "is_readable", lambda x: False)
    module = lstm_ext.LSTM(I, H)
    output, _ = module(torch.randn(T, 0, I), lengths=torch.zeros(0, dtype=torch.int64))
    output.sum().backward()
    assert output.shape == (T, 0, H)
