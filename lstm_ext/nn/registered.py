"""Classes of other packages that are an LSTM in other words: those that `convert` knows, and ``register`` for more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .lstm import LSTM

ToLayer = Callable[[Any], nn.Module]


def register(cls: type[nn.Module], to_layer: ToLayer) -> None:
    """Tell ``convert`` about a class that is an LSTM in other words.

    Example::

        def to_layer(module):
            layer = lstm_ext.LSTM(module.n_in, module.n_out, device="meta")
            layer.weight_ih_l0, layer.weight_hh_l0 = module.w_ih, module.w_hh   # the same Parameters
            layer.bias_ih_l0, layer.bias_hh_l0 = module.b_ih, module.b_hh
            return layer

        lstm_ext.register(TheirLSTM, to_layer)

    ``convert`` puts what ``to_layer`` returns in the place of each module of the class; subclasses stay as they are.
    :func:`lstm_ext.report` says which layers have copies in place of the Parameters of the module: an optimizer that
    holds these has to be made anew. :func:`lstm_ext.revert` does not bring the module back.

    Args:
        cls: a class of modules. A second call for it replaces the first.
        to_layer: gets a module of this class and returns the one that stands for it, with the same arguments and
            results as far as the model uses them: an :class:`lstm_ext.LSTM`, or a subclass whose ``forward`` takes the
            arguments and calls ``super().forward``. It changes nothing in the module, and raises a ValueError that says
            why for one that cannot be converted: ``convert`` leaves that one, and ``report`` gives the reason.

    Raises:
        TypeError: an argument is no class of modules, or no function.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"register: cls: expected a class of torch.nn.Module, got {cls!r}")
    if not callable(to_layer):
        raise TypeError(f"register: to_layer: expected a function, got {type(to_layer).__name__}")
    _registered[cls] = to_layer


def stand_in(module: nn.Module) -> tuple[nn.Module | None, str]:
    """The layer that takes the place of a module, or why none does; neither for classes that are not registered."""
    cls = type(module)
    to_layer = _registered.get(cls) or _KNOWN.get(f"{cls.__module__}.{cls.__qualname__}")
    if to_layer is None:
        return None, ""
    if hooks := [name for name, value in vars(module).items() if name.endswith("_hooks") and value]:
        return None, f"it has {', '.join(hooks)}, which another module would not have"
    try:
        new = to_layer(module)
    except ValueError as error:
        return None, str(error)
    if not isinstance(new, nn.Module):
        raise TypeError(
            f"register: to_layer for {cls.__qualname__}: expected a module, got {type(new).__name__}"
        )
    shared = {id(p) for p in module.parameters()}
    copied = any(id(p) not in shared for p in new.parameters())
    new.__dict__["_stands_for"] = f"in the place of {cls.__module__}.{cls.__qualname__}" + (
        ", with copies of its parameters" if copied else ""
    )
    return new.train(module.training), ""


def looks_like_lstm(module: nn.Module) -> bool:
    """Whether two of its own parameters have the shapes (4H, H) and (4H, any), or both transposed."""
    if type(module).__module__.startswith("torch."):  # a GRU of H = 4/3 I has them too
        return False
    shapes = [tuple(p.shape) for p in module.parameters(recurse=False) if p.dim() == 2]
    for turned in (shapes, [shape[::-1] for shape in shapes]):
        for rows, columns in turned:
            if rows == 4 * columns and [shape[0] for shape in turned].count(rows) > 1:
                return True
    return False


# ---- classes of other packages. Tried with SeisBench 0.12.6.


class LikeSeisBench(LSTM):
    """``seisbench.models.base.CustomLSTM``: one state (B, H) for both directions, and none is returned."""

    def forward(self, input: Tensor, state: Any = None) -> Any:  # type: ignore[override]
        directions = 1 + self.bidirectional
        hx = None if state is None else tuple([s.expand(directions, -1, -1) for s in state])
        return super().forward(input, hx)[0], None


def _from_seisbench(module: Any) -> nn.Module:
    cells = [module.cell_f, *([module.cell_b] if module.bidirectional else [])]
    functions = []
    for cell in cells:
        if type(cell).__name__ != "ActivationLSTMCell":
            raise ValueError(f"its cell is a {type(cell).__name__}")
        if cell.recurrent_dropout:
            raise ValueError("its recurrent_dropout drops elements of g, which no option does")
        function = cell.gate_activation
        if function is torch.sigmoid:
            functions.append("sigmoid")
        elif getattr(function, "__module__", "") == type(cell).__module__:
            functions.append(function.__name__)
        if functions[-1:] not in (["sigmoid"], ["hard_sigmoid"]):
            raise ValueError("its gate_activation is neither hard_sigmoid nor sigmoid")
    if len(set(functions)) > 1:
        raise ValueError("its directions have different gate_activations")
    first = cells[0]
    layer = LikeSeisBench(
        first.input_size, first.hidden_size, bidirectional=module.bidirectional, device="meta",
        gate_activation=functions[0],
    )  # fmt: skip
    for cell, suffix in zip(cells, ("", "_reverse"), strict=False):
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            setattr(layer, f"{name}_l0{suffix}", getattr(cell, name))
    return layer


_registered: dict[type[nn.Module], ToLayer] = {}
# By name, since nothing here imports these packages.
_KNOWN: dict[str, ToLayer] = {
    "seisbench.models.base.CustomLSTM": _from_seisbench,
}
