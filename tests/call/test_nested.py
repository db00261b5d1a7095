"""Nested tensors of the jagged layout: each sequence as alone, and nothing padded."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

import lstm_ext
from lstm_ext.call import layout

I, H = 3, 6
LENGTHS = (3, 7, 0, 1, 4)


def jagged(sequences: list[Tensor]) -> Tensor:
    return torch.nested.as_nested_tensor(sequences, layout=torch.jagged)


def sequences(
    *features: int, lengths: tuple[int, ...] = LENGTHS, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    return [torch.randn(n, *features, dtype=dtype, requires_grad=True) for n in lengths]


def states(module: lstm_ext.LSTM, batch: int = len(LENGTHS)) -> tuple[Tensor, Tensor]:
    sets = module.num_layers * (2 if module.bidirectional else 1)
    sizes = (module.proj_size or H, H)
    h, c = [torch.randn(sets, batch, n, dtype=torch.float64, requires_grad=True) for n in sizes]
    return h, c


def test_the_same_bits_as_a_packed_sequence():
    """And the same masks of dropout: the kernels see the same rows."""
    module = lstm_ext.LSTM(I, H, 2, bidirectional=True, dropout=0.4, recurrent_dropout=0.2)
    xs = sequences(I, lengths=(7, 4, 4, 1), dtype=torch.float32)
    torch.manual_seed(1)
    output, final = module(jagged(xs))
    torch.manual_seed(1)
    packed, expected = module(pack_sequence(xs))
    ours = pack_sequence(output.unbind()).data
    assert torch.equal(ours, packed.data)
    assert all(torch.equal(a, b) for a, b in zip(final, expected, strict=True))


def test_the_form_of_the_input_is_kept():
    """Its ragged size, so that both go into one expression; and rows that belong to no sequence."""
    module = lstm_ext.LSTM(I, H, dtype=torch.float64)
    x = jagged(sequences(I))
    output, _ = module(x)
    assert output.shape[:2] == x.shape[:2]
    assert (output * x.sum(-1, keepdim=True)).shape == output.shape
    padded = output.to_padded_tensor(0.0)
    assert padded.shape[:2] == x.to_padded_tensor(0.0).shape[:2] == (len(LENGTHS), max(LENGTHS))
    values = torch.randn(12, I, dtype=torch.float64)
    holes = torch.nested.nested_tensor_from_jagged(
        values, torch.tensor([0, 5, 7, 12]), torch.tensor([3, 0, 5])
    )
    output, (h_n, _) = module(holes)
    for b, rows in enumerate((slice(0, 3), slice(5, 5), slice(7, 12))):
        if rows.stop > rows.start:
            expected, (h, _) = module(values[rows])
            torch.testing.assert_close(output.values()[rows], expected)
            torch.testing.assert_close(h_n[:, b], h)
    assert not output.values()[3:7].any() and not h_n[:, 1].any()


def test_without_a_module():
    module = lstm_ext.LSTM(I, H, 2, dtype=torch.float64)
    x = jagged(sequences(I))
    weights = list(module.parameters())
    for lstm in (lstm_ext.functional.lstm, lstm_ext.reference.lstm):
        output, final = lstm(x, None, weights, num_layers=2)
        torch.testing.assert_close((output.values(), final), (module(x)[0].values(), module(x)[1]))


def test_a_frozen_layer_and_autocast():
    module = lstm_ext.LSTM(I, 40)
    x = jagged([s.detach() for s in sequences(I, dtype=torch.float32)])
    torch.testing.assert_close(lstm_ext.freeze(module)(x)[0].values(), module(x)[0].values())
    with torch.autocast("cpu", torch.bfloat16):
        packed, _ = module(pack_sequence([s for s in x.unbind() if len(s)], enforce_sorted=False))
        assert module(x)[0].dtype == packed.data.dtype
        # A sequence without a step keeps its state, in the dtype of the others: with a projection h is in 16 bits.
        hx = torch.randn(1, len(LENGTHS), 5), torch.randn(1, len(LENGTHS), 40)
        output, states = lstm_ext.LSTM(I, 40, proj_size=5)(x, hx)
        assert states[0].dtype == output.dtype == torch.bfloat16
        for state, initial in zip(states, hx, strict=True):
            kept = [b for b, n in enumerate(LENGTHS) if not n]
            assert kept and torch.equal(state[:, kept], initial[:, kept].to(state.dtype))


@pytest.mark.parametrize("grad", [False, True])
def test_compiled_without_a_break(grad):
    module = lstm_ext.LSTM(I, H, 2, bidirectional=True, dtype=torch.float64)

    def function(x: Tensor, resets: Tensor | None = None) -> tuple[Tensor, Tensor]:
        output, (h_n, _) = module(2 * x, resets=resets)
        return output.sin(), h_n

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for lengths in (LENGTHS, (2, 9, 5, 0, 0)):
        xs = sequences(I, lengths=lengths)
        for resets in (None, jagged([torch.rand(n) < 0.5 for n in lengths])):
            found = []
            for run in (function, compiled):
                x = jagged(xs)
                if resets is not None:  # one ragged size for both, as a compiler needs it
                    given = torch.nested.nested_tensor_from_jagged(resets.values(), x.offsets())
                    output, h_n = run(x, given)
                else:
                    output, h_n = run(x)
                values = [output.values(), h_n]
                if grad:
                    values += torch.autograd.grad(
                        values[0].sum() + h_n.sum(), [*xs, *module.parameters()], allow_unused=True
                    )
                found.append([v for v in values if v is not None])
            torch.testing.assert_close(*found)


def test_resets_of_the_same_lengths_elsewhere():
    """In a tensor with other rows between the sequences; and other lengths are an error in a compiled function too."""
    module = lstm_ext.LSTM(I, H, dtype=torch.float64)
    values, flags = torch.randn(12, I, dtype=torch.float64), torch.rand(9) < 0.5
    offsets, lengths = torch.tensor([0, 5, 7, 12]), torch.tensor([3, 2, 4])
    holes = torch.nested.nested_tensor_from_jagged(values, offsets, lengths)
    resets = torch.nested.nested_tensor_from_jagged(flags, torch.tensor([0, 3, 5, 9]))
    output, _ = module(holes, resets=resets)
    expected, _ = module(values[7:11], resets=flags[5:])
    torch.testing.assert_close(output.values()[7:11], expected)
    compiled = torch.compile(lambda x, r: module(x, resets=r)[0], backend="aot_eager")
    x = jagged(sequences(I, lengths=(3, 2, 4)))
    torch.testing.assert_close(compiled(x, resets).values(), module(x, resets=resets)[0].values())
    other = torch.nested.nested_tensor_from_jagged(flags, torch.tensor([0, 4, 5, 9]))
    for call in (lambda: module(x, resets=other), lambda: compiled(x, other)):
        with pytest.raises(Exception, match="expected one flag for each step of the input's sequences"):
            call()
    empty = torch.nested.nested_tensor_from_jagged(values, offsets, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(RuntimeError, match=layout.EMPTY_SEQUENCE):
        module(empty)


def test_states_that_do_not_fit_a_function():
    module = lstm_ext.LSTM(I, H, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"\(1, 5, 6\)"):
        lstm_ext.functional.lstm(jagged(sequences(I)), states(module, 4), list(module.parameters()))
