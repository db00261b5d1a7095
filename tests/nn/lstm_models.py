"""One list of models that hold LSTMs, and one of what is done to models: the tests of this folder read both.

Most models hold their layers in the ways that published models do. Each is built with the layers of a library, takes
(batch, time, 6) and gives a tensor, or a tuple that begins with one.
"""

from __future__ import annotations

import copy
import functools
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import (
    parametrizations,
    parametrize,
    prune,
    remove_spectral_norm,
    remove_weight_norm,
    spectral_norm,
    weight_norm,
)

import lstm_ext
from lstm_ext.nn.torch_layers import PATCHED

# --- the libraries that models are built with


class Plain(nn.LSTM):
    """A subclass without code."""


class PlainGRU(nn.GRU):
    """A subclass without code."""


class PlainOurs(lstm_ext.LSTM):
    """A subclass without code."""


class WithCode(lstm_ext.LSTM):
    """A subclass as users write them: a submodule, a buffer, attributes, a forward of its own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.head = nn.Linear(1, 1)
        self.register_buffer("scale", torch.full((), 2.0))
        self.vocabulary = ["a", "b"]

    def forward(self, input: Any, hx: Any = None) -> Any:
        output, states = super().forward(input, hx)
        return self.head(output[..., None])[..., 0] * self.scale, states


class Doubling(nn.LSTM):
    """A subclass of torch's layer with code of its own."""

    def __init__(self, *args: Any, factor: float = 2.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.factor = factor

    def forward(self, x: Any, hx: Any = None) -> Any:
        output, states = super().forward(x, hx)
        return self.factor * output, states


class DoublingGRU(nn.GRU):
    """The same of a GRU."""

    def forward(self, x: Any, hx: Any = None) -> Any:
        output, h = super().forward(x, hx)
        return 2 * output, h


class Halving(nn.LSTMCell):
    """A subclass of torch's cell with code of its own."""

    def forward(self, x: Any, hx: Any = None) -> Any:
        h, c = super().forward(x, hx)
        return h / 2, c


class OurHalving(lstm_ext.LSTMCell):
    forward = Halving.forward


class Library(NamedTuple):
    LSTM: Any
    LSTMCell: Any
    GRU: Any = lstm_ext.GRU
    GRUCell: Any = lstm_ext.GRUCell

    def of_gru(self) -> Library:
        """The same for models that are written for LSTMs."""
        return Library(self.GRU, self.GRUCell, self.GRU, self.GRUCell)


TORCH = Library(nn.LSTM, nn.LSTMCell, nn.GRU, nn.GRUCell)
OURS = Library(lstm_ext.LSTM, lstm_ext.LSTMCell)
# Ours that are torch's to isinstance.
SUBCLASSES = Library(lstm_ext.TorchLSTM, lstm_ext.TorchLSTMCell, lstm_ext.TorchGRU, lstm_ext.TorchGRUCell)
LIBRARIES = {
    "torch": TORCH,
    "ours": OURS,
    "ours as torch's": SUBCLASSES,
    "patched": Library(**PATCHED),
    "subclass of torch's": Library(Plain, nn.LSTMCell, PlainGRU, nn.GRUCell),
    "subclass of ours": Library(PlainOurs, lstm_ext.LSTMCell),
    "converted subclass": Library(lambda *a, **k: lstm_ext.convert(Plain(*a, **k)), lstm_ext.LSTMCell),
    "subclass with code": Library(WithCode, lstm_ext.LSTMCell),
}

# --- models


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
        self.gru = lib.GRU(6, 6, batch_first=True)
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


class LayerAndCell(nn.Module):
    """A stack in both directions and a cell, in a class that ``torch.jit`` compiles."""

    def __init__(self, layer: Any = nn.LSTM, cell: Any = nn.LSTMCell) -> None:
        super().__init__()
        self.lstm = layer(5, 7, 2, bidirectional=True)
        self.cell = cell(14, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(self.lstm(x)[0].sum(0))[0]


class Tied(nn.Module):
    """Two layers of common weights, one of them used twice, and a table whose rows a layer reads as a weight."""

    def __init__(self, lib):
        super().__init__()
        self.first, self.second, self.third = (lib.LSTM(6, 6, batch_first=True) for _ in range(3))
        self.second.weight_hh_l0, self.again = self.first.weight_hh_l0, self.third
        self.read = nn.Linear(6, 24)
        self.third.weight_ih_l0 = self.read.weight
        self.read.weight.requires_grad_(False)
        self.first.bias_ih_l0.requires_grad_(False)
        self.second._init_flat_weights()
        self.third._init_flat_weights()

    def forward(self, x):
        for layer in (self.first, self.second, self.third, self.again):
            x = layer(x)[0]
        return self.read(x)


def layer_of(lib, **options):
    return lib.LSTM(6, 4, **options)


def cell_of(lib, **options):
    return lib.LSTMCell(6, 4, **options)


def with_attributes(lib):
    """What users put on modules: attributes, buffers, a module and a parameter."""
    model = nn.Sequential(lib.LSTM(6, 4), nn.Identity())
    layer = model[0]
    layer.tag, layer.packed_lengths = {"mine": [1]}, [3, 2]
    layer.register_buffer("calls", torch.zeros(1))
    layer.register_buffer("scratch", torch.zeros(1), persistent=False)
    layer.adapter, layer.lora = nn.Linear(2, 2), nn.Parameter(torch.ones(2))
    model.first = layer.weight_ih_l0
    return model


class Halve:
    """A hook with a state of its own."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, module, args, output):
        self.calls += 1
        return (output[0] / 2, *output[1:])


def tripled(module, args):
    return (3 * args[0], *args[1:])


def with_hooks(lib):
    layer = lib.LSTM(6, 4, 2, bidirectional=True)
    layer.register_forward_pre_hook(tripled)
    layer.handle = layer.register_forward_hook(Halve())
    return layer


def used(lib):
    """After all that leaves something behind in a layer."""
    layer, x = lib.LSTM(6, 4, 2, bidirectional=True, proj_size=2), torch.randn(5, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that oneDNN knows no projections
        layer(x)[0].sum().backward()
        zeros = {name: torch.zeros_like(p) for name, p in layer.named_parameters()}
        torch.func.functional_call(layer, zeros, (x,))
        layer.double()(x.double())
    layer.float().flatten_parameters()
    layer.bias_hh_l1 = layer.bias_ih_l1
    return layer


def _quietly(change):
    def changed(module, name):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's deprecation of weight_norm
            change(module, name)

    return changed


class Softplus(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.softplus(x) - 0.5


def _pruned_twice(module, name):
    prune.l1_unstructured(module, name, amount=0.4)
    prune.ln_structured(module, name, amount=0.3, n=2, dim=0)


_keep = functools.partial(parametrize.remove_parametrizations, leave_parametrized=True)
# Weights that are computed: what puts the computation in place, and what makes its present result a parameter again.
COMPUTED: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "weight_norm by hook": (_quietly(weight_norm), remove_weight_norm),
    "spectral_norm by hook": (spectral_norm, remove_spectral_norm),
    "weight_norm": (parametrizations.weight_norm, _keep),
    "spectral_norm": (parametrizations.spectral_norm, _keep),
    "orthogonal": (parametrizations.orthogonal, _keep),
    "softplus": (lambda m, name: parametrize.register_parametrization(m, name, Softplus()), _keep),
    "pruned": (functools.partial(prune.l1_unstructured, amount=0.4), prune.remove),
    "pruned twice": (_pruned_twice, prune.remove),
    "pruned at random": (functools.partial(prune.random_unstructured, amount=0.4), prune.remove),
}


class Model(NamedTuple):
    """One row.

    Attributes:
        build: makes it with a library.
        computed: the kind of computed weights (`COMPUTED`) of a layer or a cell. They can be converted. torch does not
            copy all of them, and no layer with one is frozen.
        layers: whether it has an LSTM, so that it can be frozen.
    """

    build: Callable[[Library], Any]
    computed: str = ""
    layers: bool = True


def _computed(make: Callable[[Library], Any], way: str) -> Callable[[Library], Any]:
    def build(lib: Library) -> Any:
        module = make(lib)
        COMPUTED[way][0](module, hidden_weight(module))
        return module

    return build


def hidden_weight(module: nn.Module) -> str:
    return "weight_hh" if isinstance(module, nn.RNNCellBase) else "weight_hh_l0"


MODELS: dict[str, Model] = {
    **{cls.__name__: Model(cls) for cls in (Tagger, Separator, ELMo, ActorCritic, Tied)},
    "Decoder": Model(Decoder, layers=False),
    "WeightDrop": Model(WeightDrop, computed="dropout"),
    "a layer": Model(functools.partial(layer_of, bias=False)),
    "a cell": Model(functools.partial(cell_of, bias=False), layers=False),
    "attributes": Model(with_attributes),
    "hooks": Model(with_hooks),
    "used": Model(used),
    "a GRU": Model(lambda lib: layer_of(lib.of_gru(), num_layers=2, bidirectional=True)),
    "a GRU cell": Model(lambda lib: cell_of(lib.of_gru()), layers=False),
    "GRU, attributes": Model(lambda lib: with_attributes(lib.of_gru())),
    "GRU, hooks": Model(lambda lib: with_hooks(lib.of_gru())),
    **{f"layer, {way}": Model(_computed(layer_of, way), way) for way in COMPUTED},
    **{f"cell, {way}": Model(_computed(cell_of, way), way, False) for way in COMPUTED},
}


def made(name: str, library: Library, seed: int = 3) -> Any:
    torch.manual_seed(seed)
    return MODELS[name].build(library)


def call(model: nn.Module, x: Tensor) -> Tensor:
    """A layer or a cell alone takes the rows: as one sequence, or as a batch."""
    alone = isinstance(model, (nn.RNNBase, nn.RNNCellBase))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch: oneDNN knows no projections
        torch.manual_seed(1)
        result = model(x.flatten(0, 1) if alone else x)
    return result[0] if isinstance(result, tuple) else result


# --- operations


to_plain = functools.partial(lstm_ext.convert, as_subclass=False)
# In place: the function, the library that it starts from, and the one that it leads to.
CONVERSIONS: dict[str, tuple[Callable[[Any], Any], Library, Library]] = {
    "convert": (lstm_ext.convert, TORCH, SUBCLASSES),
    "convert, plain": (to_plain, TORCH, OURS),
    "convert ours": (lstm_ext.convert, OURS, SUBCLASSES),
    "convert ours, plain": (to_plain, SUBCLASSES, OURS),
    "revert": (lstm_ext.revert, SUBCLASSES, TORCH),
    "revert, plain": (lstm_ext.revert, OURS, TORCH),
}
BACK = {TORCH: lstm_ext.revert, OURS: to_plain, SUBCLASSES: lstm_ext.convert}


def saved_and_loaded(module: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def pickled(module: nn.Module, protocol: int = 2) -> Any:
    return pickle.loads(pickle.dumps(module, protocol=protocol))


def frozen(module: nn.Module, weights: torch.dtype | None = None) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the cells of a model stay
        return lstm_ext.freeze(module, weights)


class Copy(NamedTuple):
    """One row.

    Attributes:
        run: gives another model.
        kind: "" for a copy as it is, "frozen", or "thawed" for one that was frozen in between.
    """

    run: Callable[[Any], Any]
    kind: str = ""


COPIES: dict[str, Copy] = {
    "deepcopy": Copy(copy.deepcopy),
    "deepcopy twice": Copy(lambda m: copy.deepcopy(copy.deepcopy(m))),
    "pickle": Copy(pickled),
    "pickle 5": Copy(functools.partial(pickled, protocol=5)),
    "save": Copy(saved_and_loaded),
    "freeze": Copy(frozen, "frozen"),
    "freeze, bfloat16": Copy(lambda m: frozen(m, torch.bfloat16), "frozen"),
    "freeze, int8": Copy(lambda m: frozen(m, torch.int8), "frozen"),
    "freeze twice": Copy(lambda m: frozen(frozen(m), torch.bfloat16), "frozen"),
    "freeze, deepcopy": Copy(lambda m: copy.deepcopy(frozen(m)), "frozen"),
    "freeze, pickle": Copy(lambda m: pickled(frozen(m)), "frozen"),
    "freeze, save": Copy(lambda m: saved_and_loaded(frozen(m, torch.int8)), "frozen"),
    "unfreeze": Copy(lambda m: lstm_ext.unfreeze(frozen(m)), "thawed"),
    "freeze twice, pickle, unfreeze": Copy(
        lambda m: lstm_ext.unfreeze(pickled(frozen(frozen(m), torch.bfloat16))), "thawed"
    ),
}


PRIVATE = ("_layer_names", "_flat_weight")


def snapshot(model: nn.Module) -> Any:
    """All that a model is, apart from the classes of its modules."""
    return {
        name: (
            id(module),
            {key: id(value) for key, value in vars(module).items() if not key.startswith(PRIVATE)},
            {
                key: {name: id(value) for name, value in vars(module).get(key, {}).items()}
                for key in ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")
            },
        )
        for name, module in model.named_modules(remove_duplicate=False)
    }


def required(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
