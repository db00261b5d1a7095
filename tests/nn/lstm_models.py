"""Small models that hold LSTMs in the ways that published models do.

Each is built with the layers of ``torch.nn`` or of ``lstm_ext``, takes (batch, time, 6) and gives a tensor.
"""

import torch
from torch import nn


class Tagger(nn.Module):
    """Stacked bidirectional layers, one of them used twice."""

    def __init__(self, lib):
        super().__init__()
        self.layers = nn.ModuleList(
            [
                lib.LSTM(6, 3, bidirectional=True, batch_first=True),
                nn.Sequential(nn.LayerNorm(6), nn.Dropout(0.0)),
                lib.LSTM(6, 3, num_layers=2, dropout=0.1, bidirectional=True, batch_first=True),
            ]
        )
        self.again = self.layers[0]
        self.gru = nn.GRU(6, 6, batch_first=True)
        self.out = nn.Linear(6, 5)

    def forward(self, x):
        x = self.layers[1](self.layers[0](x)[0])
        x = self.again(self.layers[2](x)[0])[0]
        return self.out(self.gru(x)[0])


class Separator(nn.Module):
    """As source separation does: residual blocks in a dict, flatten_parameters() in forward, a projection."""

    def __init__(self, lib):
        super().__init__()
        self.blocks = nn.ModuleDict({n: lib.LSTM(6, 8, batch_first=True, proj_size=6) for n in "ab"})

    def forward(self, x):
        for rnn in self.blocks.values():
            rnn.flatten_parameters()
            x = x + rnn(x)[0]
        return x


class Decoder(nn.Module):
    """Cells in a loop, with the attention that makes the loop necessary."""

    def __init__(self, lib):
        super().__init__()
        self.cells = nn.ModuleList([lib.LSTMCell(6 + 7, 7), lib.LSTMCell(7, 7, bias=False)])
        self.key = nn.Linear(6, 7)

    def forward(self, x):
        key = self.key(x)
        states = [None] * 2
        y, outputs = x.new_zeros(x.size(0), 7), []
        for _ in range(x.size(1)):
            weights = torch.softmax(torch.einsum("bh,bth->bt", y, key), dim=1)
            y = torch.cat([torch.einsum("bt,bti->bi", weights, x), y], dim=1)
            for i, cell in enumerate(self.cells):
                states[i] = cell(y, states[i])
                y = states[i][0]
            outputs.append(y)
        return torch.stack(outputs, dim=1)


class ELMo(nn.Module):
    """As AllenNLP's stacks: the layers registered by name, and held in plain lists as well."""

    def __init__(self, lib):
        super().__init__()
        self.forward_layers, self.by_name = [], {}
        for k in range(2):
            layer = lib.LSTM(6, 6, batch_first=True)
            self.add_module(f"forward_layer_{k}", layer)
            self.forward_layers.append(layer)
            self.by_name["layer", k] = layer

    def forward(self, x):
        for layer in self.forward_layers:
            x = layer(x)[0] + x
        return x


class WeightDrop(nn.Module):
    """As AWD-LSTM: the recurrent weight becomes a computed attribute; flatten_parameters is silenced."""

    def __init__(self, lib):
        super().__init__()
        self.module = lib.LSTM(6, 4, batch_first=True)
        weight = self.module._parameters.pop("weight_hh_l0")
        self.weight_hh_l0_raw = nn.Parameter(weight.data)
        self.module.flatten_parameters = self.do_nothing
        self.module.weight_hh_l0 = self.weight_hh_l0_raw * 1.0

    def do_nothing(self):
        pass

    def forward(self, x):
        self.module.weight_hh_l0 = nn.functional.dropout(self.weight_hh_l0_raw * 1.0, 0.5, self.training)
        return self.module(x)[0]


class ActorCritic(nn.Module):
    """As in reinforcement learning: one layer under two names, the critic's frozen, the state cut by hand."""

    def __init__(self, lib):
        super().__init__()
        self.actor = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
        self.lstm_actor = lib.LSTM(6, 4)
        self.shared = nn.ModuleDict({"critic": self.lstm_actor})
        self.lstm_critic = lib.LSTM(6, 4).requires_grad_(False)

    def forward(self, x):
        x = self.actor(x).transpose(0, 1)
        state = None
        values = []
        for t, row in enumerate(x):
            y, state = self.lstm_actor(row[None], state)
            state = tuple(s * (t % 2) for s in state)
            values.append(y[0])
        y = torch.stack(values) + self.lstm_critic(x)[0] + self.shared["critic"](x)[0]
        return y.transpose(0, 1)


MODELS = [Tagger, Separator, Decoder, ELMo, WeightDrop, ActorCritic]
