"""Layers that `convert` does not reach, and the words for them: compiled, quantized, hidden, or none at all."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .torch_layers import LAYERS, OURS

_KNOWN = (*LAYERS, *OURS)


def place_of(name: str) -> str:
    return repr(name) if name else "the model itself"


def modules_of(model: nn.Module) -> list[nn.Module]:
    """All of them, also where a library (AgileRL) gives ``modules()`` another meaning."""
    return [module for _, module in model.named_modules()]


def kind_of(module: nn.Module) -> str:
    """The class, by its public name if it is torch's or ours. Layers that are made under a patch are TorchLSTM."""
    name = f"{type(module).__module__}.{type(module).__qualname__}"
    name = re.sub(r"^(lstm_ext|torch\.nn)\.(nn|modules)\.\w+\.", r"\1.", name)
    return name.replace("lstm_ext.Patched", "lstm_ext.Torch")


_SCRIPTED = re.compile(
    r"__torch__\.(torch\.nn\.modules\.rnn|lstm_ext\.nn\.\w+)\.(___torch_mangle_\d+\.)?(Torch|Patched)?(LSTM|GRU)(Cell)?"
)


def foreign_layer(module: nn.Module) -> str | None:
    """Why a layer of torch that is of no class of ``torch.nn`` cannot be converted; None for any other module."""
    if isinstance(module, torch.jit.ScriptModule):
        if _SCRIPTED.fullmatch(module._c._type().qualified_name()) or any(_layer_nodes(module)):
            return "compiled by torch.jit; convert the model it was compiled from"
    elif any(
        cls.__module__.startswith("torch.ao.nn.quant")
        and cls.__name__ in [known.__name__ for known in LAYERS]
        for cls in type(module).__mro__
    ):
        return "a quantized layer; convert the model before it is quantized, or load it with float weights"
    return None


def _layer_nodes(module: torch.jit.ScriptModule) -> Iterator[Any]:
    """The layers in the module's own code, where torch.jit.freeze puts them."""
    for name in module._c._method_names():
        graph = module._c._get_method(name).graph
        for kind in ("aten::lstm", "aten::lstm_cell", "aten::gru", "aten::gru_cell"):
            yield from graph.findAllNodes(kind)


def is_or_was_layer(module: nn.Module) -> bool:
    return isinstance(module, _KNOWN) or foreign_layer(module) is not None


HIDDEN = "held outside the model's table of modules"


def hidden_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers in plain attributes, their lists, tuples and dicts, that no table of modules has; with paths."""
    known = set(modules_of(model))
    found = []
    for name, module in model.named_modules():
        for path, value in _inside(vars(module), 3):
            if isinstance(value, nn.Module) and value not in known:
                known.update(modules_of(value))
                place = f"{name}.{path}" if name else path
                found += [
                    (f"{place}.{inner}" if inner else place, m)
                    for inner, m in value.named_modules()
                    if is_or_was_layer(m)
                ]
    return found


def _inside(values: Any, depth: int, place: str = "") -> Iterator[tuple[str, Any]]:
    """The values in a container, and those in the containers within it; with paths."""
    # Copied, since another thread may convert the module whose attributes these are.
    for key, value in list(values.items()) if isinstance(values, dict) else enumerate(list(values)):
        path = f"{place}[{key!r}]" if place else str(key)
        yield path, value
        if depth > 1 and isinstance(value, (list, tuple, dict)):
            yield from _inside(value, depth - 1, path)


def _near_misses(model: nn.Module) -> Iterator[str]:
    """Layers that somebody may take for some that could be converted."""
    for name, module in model.named_modules():
        if isinstance(module, _KNOWN):
            continue
        if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
            yield f"{place_of(name)} ({kind_of(module)}) is a recurrent layer of another kind"
        elif "lstm" in type(module).__name__.lower():
            yield f"{place_of(name)} ({kind_of(module)}) is called LSTM and not derived from torch.nn.LSTM or LSTMCell"


_SHOWN = 8  # classes, and places of near misses


def nothing_found(model: nn.Module, passed_over: list[str]) -> str:
    """The text of the warning that nothing was found; empty if all hidden layers are ours."""
    hidden = hidden_layers(model)
    if hidden and all(isinstance(module, OURS) for _, module in hidden):
        return ""
    return (
        f"convert: found no LSTM, GRU or cell of torch.nn to convert in this {type(model).__name__}, so nothing "
        f"was changed. {where_it_looked(model, passed_over)}"
    )


def where_it_looked(model: nn.Module, passed_over: list[str]) -> str:
    """The modules of a model without a layer to convert, and where one may be all the same, line by line."""
    hidden = hidden_layers(model)
    classes = Counter(type(module).__name__ for module in modules_of(model))
    looked = ", ".join(f"{count} {name}" for name, count in classes.most_common(_SHOWN))
    if len(classes) > _SHOWN:
        looked += f" and {sum(sorted(classes.values())[:-_SHOWN])} of other classes"
    near = list(_near_misses(model))
    places = [*passed_over, *near[:_SHOWN]]
    if len(near) > _SHOWN:
        places.append(f"and {len(near) - _SHOWN} more of these kinds")
    places += [f"{path!r} is {HIDDEN}" for path, _ in hidden]
    places += [
        f"{name or 'the model itself'!r} is a graph, in which a layer is an operator and no module"
        for name, module in model.named_modules()
        if isinstance(module, torch.fx.GraphModule)
        and any(
            re.search("lstm|gru", str(node.target))
            for node in module.graph.nodes
            if node.op == "call_function"
        )
    ]
    return (
        f"It looked at {classes.total()} module{'s' * (classes.total() > 1)}: {looked}. Layers hide in plain "
        "lists and dicts (use torch.nn.ModuleList or ModuleDict, or convert each), in exported graphs (convert before "
        "the export), and in layers that are built at the first call (call the model once before)"
        + "".join(f"\n  {place}" for place in places)
    )
