"""Classes of other packages that are an LSTM or a GRU in other words: those that `convert` knows, and ``register``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .cell import LSTMCell
from .gru import GRU, GRUCell
from .lstm import LSTM

ToLayer = Callable[[Any], nn.Module]
COMPILED = "it is compiled: convert before torch.compile"


def register(cls: type[nn.Module], to_layer: ToLayer) -> None:
    """Tell ``convert`` about a class that is an LSTM or a GRU in other words.

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
    if own := [
        name
        for name, value in vars(module).items()
        if (name.endswith("_hooks") and value) or callable(getattr(cls, name, None))
    ]:
        return None, f"it has {', '.join(own)}, which another module would not have"
    if module._compiled_call_impl is not None:
        return None, COMPILED
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


def looks_like(module: nn.Module) -> str:
    """An LSTM or a GRU, if two of its own parameters are (4H, H) and (4H, any), or so with 3H, or all transposed.

    Some sizes fit both.
    """
    if type(module).__module__.startswith("torch."):
        return ""
    shapes = [tuple(p.shape) for p in module.parameters(recurse=False) if p.dim() == 2]
    found = {}
    for gates, name in ((4, "an LSTM"), (3, "a GRU")):
        for turned in (shapes, [shape[::-1] for shape in shapes]):
            for rows, columns in turned:
                if rows == gates * columns and [shape[0] for shape in turned].count(rows) > 1:
                    found[name] = True
    return " or ".join(found)


# ---- classes of other packages. Tried with SeisBench 0.12.6 and TorchRL 0.14.1.


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


class LikeTorchRL(LSTM):
    """``torchrl.modules.LSTM``: a step that does not count repeats the output before it."""

    def forward(self, input: Any, hx: Any = None, mask: Tensor | None = None) -> Any:  # type: ignore[override]
        if isinstance(input, Tensor) and torch.is_autocast_enabled(input.device.type):
            return self._in_autocast(input, hx, mask)
        output, state = super().forward(input, hx, mask=mask)
        return _with_repeats(self, output, mask, None if hx is None else hx[0]), state

    def _in_autocast(self, x: Tensor, hx: Any, mask: Tensor | None) -> Any:
        """In the dtype of the weights, and the results in that which c has in its loop."""
        weights, device = next(self.parameters()).dtype, x.device.type
        dtype = torch.promote_types(x.dtype if hx is None else hx[1].dtype, torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            states = None if hx is None else tuple([s.to(weights) for s in hx])
            output, (h, c) = self.forward(x.to(weights), states, mask)
        return output.to(dtype), (h.to(dtype), c.to(dtype))


class GRULikeTorchRL(GRU):
    """``torchrl.modules.GRU``: a step that does not count repeats the output before it."""

    def forward(self, input: Any, hx: Any = None, mask: Tensor | None = None) -> Any:  # type: ignore[override]
        output, state = super().forward(input, hx, mask=mask)
        return _with_repeats(self, output, mask, hx), state


def repeat_outputs(output: Tensor, mask: Tensor, all_steps: bool = True) -> Tensor:
    """Outputs (B, T, H) with the one before in place of each that is masked, or of the last step only, (B, 1, H).

    In front of the first step that counts they stay.
    """
    steps = torch.arange(mask.size(1), device=mask.device)
    places = torch.where(mask, steps, 0).cummax(1).values
    places = places if all_steps else places[:, -1:]
    return output.gather(1, places[..., None].expand(-1, -1, output.size(2)))


def _with_repeats(layer: LSTM | GRU, output: Any, mask: Tensor | None, h0: Tensor | None) -> Any:
    """The outputs with h0 of the last layer in front of the first step that counts."""
    if mask is None:
        return output
    if not layer.batch_first:
        output, mask = output.transpose(0, 1), mask.transpose(0, 1)
    first = torch.zeros_like(output[:, 0]) if h0 is None else h0[-1].to(output.dtype)
    mask = torch.cat([torch.ones_like(mask[:, :1]), mask], 1)
    output = repeat_outputs(torch.cat([first[:, None], output], 1), mask)[:, 1:]
    return output if layer.batch_first else output.transpose(0, 1)


def _from_torchrl(cls: type[nn.Module]) -> ToLayer:
    def to_layer(module: Any) -> nn.Module:
        if module._modules or module._buffers:
            raise ValueError("it has modules or buffers, which its class does not have")
        arguments = [module.input_size, module.hidden_size]
        if isinstance(module, nn.RNNBase):
            if module.proj_size or module.bidirectional:
                raise ValueError(
                    "its proj_size or bidirectional is set, and its forward does not look at them"
                )
            arguments += [module.num_layers, module.bias, module.batch_first, module.dropout]
        else:
            arguments += [module.bias]
        layer = cls(*arguments, device="meta")
        for name, parameter in module._parameters.items():
            layer.register_parameter(name, parameter)
        return layer

    return to_layer


_registered: dict[type[nn.Module], ToLayer] = {}
# By name, since nothing here imports these packages.
_KNOWN: dict[str, ToLayer] = {
    "seisbench.models.base.CustomLSTM": _from_seisbench,
    "torchrl.modules.tensordict_module.rnn.LSTM": _from_torchrl(LikeTorchRL),
    "torchrl.modules.tensordict_module.rnn.GRU": _from_torchrl(GRULikeTorchRL),
    "torchrl.modules.tensordict_module.rnn.LSTMCell": _from_torchrl(LSTMCell),
    "torchrl.modules.tensordict_module.rnn.GRUCell": _from_torchrl(GRUCell),
}
