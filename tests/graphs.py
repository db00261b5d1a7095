"""What a compiler was given, and what was called: a backend for torch.compile that keeps the graphs, and a mode."""

from __future__ import annotations

import types
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode

_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType)


def operators(graph: fx.Graph) -> Counter[str]:
    """How often a graph calls each function, by name, in the subgraphs of checkpointed regions too."""
    names: Counter[str] = Counter()
    for node in graph.nodes:
        if node.op == "call_function":
            name = node.target.__name__ if isinstance(node.target, _FUNCTIONS) else str(node.target)
            names[name.removesuffix(".default")] += 1
        elif node.op == "get_attr":
            part = getattr(graph.owning_module, node.target, None)
            if isinstance(part, fx.GraphModule):
                names += operators(part.graph)
        elif node.op == "call_method":
            names[node.target] += 1
    return names


def assert_layers(graph: fx.Graph, count: int, operator: str = "lstm_layer") -> None:
    """One operator a layer, and no equations of the reference."""
    names = operators(graph)
    ours = {name: n for name, n in names.items() if name.startswith("lstm_ext.")}
    assert ours == ({f"lstm_ext.{operator}": count} if count else {})
    assert not [name for name in names if "sigmoid" in name or "tanh" in name]


class Graphs:
    """``torch.compile(..., backend=Graphs("aot_eager"))``."""

    def __init__(self, backend: str = "aot_eager") -> None:
        self.backend = torch._dynamo.lookup_backend(backend)
        self.all: list[fx.GraphModule] = []

    def __call__(self, module: fx.GraphModule, inputs: Iterable[Any]) -> Any:
        self.all.append(module)
        return self.backend(module, inputs)

    def assert_layers(self, count: int, graphs: int = 1) -> None:
        assert len(self.all) == graphs
        for module in self.all:
            assert_layers(module.graph, count)


class Recorder(TorchDispatchMode):
    """The calls of this library's operators, below autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple, dict[str, Any]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "lstm_ext":
            self.calls.append((func._opname, args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    @property
    def names(self) -> list[str]:
        return [name for name, *_ in self.calls]
