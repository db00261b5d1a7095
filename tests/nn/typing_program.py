"""A user's program. Type checkers read it, in tests/tools/test_typing.py; its types are those of the real calls."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from typing_extensions import assert_type

import lstm_ext
from lstm_ext import functional

States = tuple[Tensor, Tensor]


class Tagger(nn.Module):
    def __init__(self, features: int, hidden: int, tags: int) -> None:
        super().__init__()
        self.lstm = lstm_ext.LSTM(features, hidden, num_layers=2, zoneout=(0.1, 0.0), cell_clip=3.0)
        self.cell = lstm_ext.LSTMCell(hidden, hidden)
        self.head = nn.Linear(hidden, tags)

    def forward(self, x: Tensor, lengths: list[int]) -> Tensor:
        output, (h, c) = self.lstm(x, lengths=lengths)
        assert_type(output, Tensor)
        last, _ = self.cell(h[-1], (h[0], c[0]))
        assert_type(last, Tensor)
        scores: Tensor = self.head(output + last)
        return scores


def calls(lstm: lstm_ext.LSTM, x: Tensor, packed: PackedSequence) -> None:
    assert_type(lstm(x), tuple[Tensor, States])
    assert_type(lstm(packed), tuple[PackedSequence, States])
    assert_type(lstm.forward(x), tuple[Tensor, States])
    assert_type(lstm.step(x[0]), tuple[Tensor, States])
    _, _, extras = lstm(x, return_gates=True, resets=torch.zeros(x.shape[:2]))
    assert_type(extras, lstm_ext.LSTMExtras)
    assert_type(extras.gates, Tensor | None)
    assert_type(lstm(packed, return_cell_states=True), tuple[PackedSequence, States, lstm_ext.LSTMExtras])


def either(lstm: lstm_ext.LSTM, x: Tensor | PackedSequence, extras: bool) -> None:
    output, states = lstm(x)
    assert_type(output, Tensor | PackedSequence)
    assert_type(states, States)
    if isinstance(x, Tensor):
        results = lstm(x, return_gates=extras)
        assert_type(results[0], Tensor)
        assert_type(results[1], States)


def without_a_module(x: Tensor, packed: PackedSequence, weights: list[Tensor]) -> None:
    assert_type(functional.lstm(x, None, weights, cell_clip=2.0), tuple[Tensor, States])
    assert_type(functional.lstm(packed, None, weights, num_layers=1), tuple[PackedSequence, States])
    results = functional.lstm(x, None, weights, lengths=[3, 2], return_cell_states=True)
    assert_type(results, tuple[Tensor, States, lstm_ext.LSTMExtras])


def models() -> None:
    lstm, theirs = lstm_ext.LSTM(3, 4), nn.LSTM(3, 4)
    assert_type(lstm_ext.convert(nn.LSTM(3, 4)), lstm_ext.TorchLSTM)
    assert_type(lstm_ext.convert(nn.LSTM(3, 4), as_subclass=False), lstm_ext.LSTM)
    assert_type(lstm_ext.convert(nn.LSTMCell(3, 4)), lstm_ext.TorchLSTMCell)
    assert_type(lstm_ext.convert(nn.LSTMCell(3, 4), as_subclass=False), lstm_ext.LSTMCell)
    assert_type(lstm_ext.revert(lstm_ext.TorchLSTM(3, 4)), nn.LSTM)
    assert_type(lstm_ext.revert(lstm_ext.LSTMCell(3, 4)), nn.LSTMCell)

    frozen = lstm_ext.freeze(lstm, weights=torch.int8)
    assert_type(frozen, lstm_ext.FrozenLSTM)
    assert_type(frozen(torch.randn(5, 2, 3)), tuple[Tensor, States])
    assert_type(frozen.step(torch.randn(2, 3)), tuple[Tensor, States])
    assert_type(lstm_ext.unfreeze(frozen), lstm_ext.LSTM)
    assert_type(lstm_ext.freeze(theirs), lstm_ext.FrozenTorchLSTM)
    assert_type(lstm_ext.unfreeze(lstm_ext.freeze(theirs)), nn.LSTM)

    # A model keeps its class.
    tagger = Tagger(3, 4, 5)
    assert_type(lstm_ext.convert(tagger), Tagger)
    assert_type(lstm_ext.freeze(tagger), Tagger)
    assert_type(lstm_ext.unfreeze(lstm_ext.freeze(tagger)), Tagger)
    assert_type(lstm_ext.revert(nn.Sequential(lstm_ext.LSTM(3, 4))), nn.Sequential)
    for entry in lstm_ext.report(tagger):
        assert_type(entry.ours, bool)
    with lstm_ext.patch() as patched:
        assert_type(patched.made, int)


def main() -> None:
    lstm, x = lstm_ext.LSTM(3, 4), torch.randn(5, 2, 3)
    packed = pack_sequence([torch.randn(3, 3), torch.randn(2, 3)])
    calls(lstm, x, packed)
    either(lstm, packed, False)
    either(lstm, x, True)
    without_a_module(x, packed, list(lstm.parameters()))
    models()
    Tagger(3, 4, 5)(x, [5, 3])


if __name__ == "__main__":
    main()
