"""Crossing over between ``torch.nn.LSTM``, ``lstm_ext.LSTM`` and per-gate matrices."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from .modules import LSTM

__all__ = ["from_gates", "from_torch", "to_torch"]


def from_torch(module: nn.LSTM) -> LSTM:
    """The :class:`lstm_ext.LSTM` with the parameters of a ``torch.nn.LSTM``.

    The two modules are two faces of one layer. They share the *same* ``Parameter`` objects, so an optimizer
    that holds them stays valid, and the same tables of hooks, so handles returned by
    ``register_forward_hook`` and its like stay valid. The training flag, ``requires_grad`` and the attributes
    set by the user are kept.

    Raises:
        TypeError: ``module`` is not a ``torch.nn.LSTM`` itself but a subclass; or it has something that
            cannot be carried, which the text names: parametrized, normed or pruned weights, added parameters,
            buffers or submodules, methods replaced on the instance, hooks on loading that are tied to the
            module.
    """
    return _carry_over(module, nn.LSTM, LSTM, "from_torch")


def to_torch(module: LSTM) -> nn.LSTM:
    """The ``torch.nn.LSTM`` with the parameters of a :class:`lstm_ext.LSTM`; inverse of :func:`from_torch`.

    Parameters, hooks, flags and errors are as described there.
    """
    return _carry_over(module, LSTM, nn.LSTM, "to_torch")


# Tables of hooks that hold nothing tied to one module.
_HOOK_TABLES = (
    "_backward_pre_hooks",
    "_backward_hooks",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def _carry_over(module: Any, source: type[Any], target: type[Any], function: str) -> Any:
    wanted = "lstm_ext.LSTM" if source is LSTM else "torch.nn.LSTM"

    def refuse(reason: str) -> TypeError:
        return TypeError(f"{function}: cannot convert this {type(module).__name__}: {reason}")

    if not isinstance(module, source):
        raise TypeError(
            f"{function}: expected a {wanted}, got {type(module).__module__}.{type(module).__name__}"
        )
    if "parametrizations" in module._modules:
        tensors = ", ".join(module.parametrizations)
        raise refuse(
            f"{tensors} is parametrized; call torch.nn.utils.parametrize.remove_parametrizations on it first"
        )
    if type(module) is not source:
        raise refuse(f"it is a subclass of {wanted}, whose own behaviour would be lost")

    names: list[str] = module._flat_weights_names
    for name in names:
        if not isinstance(module._parameters.get(name), nn.Parameter):
            raise refuse(
                f"{name} is not a plain parameter (weight_norm, pruning or dropped weights?); undo that first"
            )
    for kind, table in (
        ("parameter", module._parameters),
        ("buffer", module._buffers),
        ("submodule", module._modules),
    ):
        for name in table:
            if name not in names:
                raise refuse(f"it has an additional {kind}, {name}")
    if module._load_state_dict_pre_hooks:
        raise refuse("it has load_state_dict pre-hooks, which are tied to the module; remove them first")

    with warnings.catch_warnings():
        # dropout with one layer: said when the module was made
        warnings.simplefilter("ignore", UserWarning)
        # On the meta device nothing is allocated and no random number is drawn.
        new = target(
            module.input_size,
            module.hidden_size,
            module.num_layers,
            module.bias,
            module.batch_first,
            module.dropout,
            module.bidirectional,
            module.proj_size,
            device="meta",
        )
    known = new.__dict__.keys() | source(1, 1, device="meta").__dict__.keys()
    for name, value in module.__dict__.items():
        if name in known:
            continue
        if hasattr(source, name):
            raise refuse(f"{name} is replaced on the instance")
        new.__dict__[name] = value
    for name in names:
        setattr(new, name, module._parameters[name])
    new._init_flat_weights()
    for name in _HOOK_TABLES:
        if name in module.__dict__:
            new.__dict__[name] = module.__dict__[name]
    new._is_full_backward_hook = module._is_full_backward_hook
    new.training = module.training
    return new


def from_gates(
    *,
    W_i: Tensor,
    U_i: Tensor,
    b_i: Tensor,
    W_f: Tensor,
    U_f: Tensor,
    b_f: Tensor,
    W_g: Tensor,
    U_g: Tensor,
    b_g: Tensor,
    W_o: Tensor,
    U_o: Tensor,
    b_o: Tensor,
    batch_first: bool = False,
) -> LSTM:
    """An :class:`lstm_ext.LSTM` of one layer from one set of matrices per gate.

    For row vectors, as in lectures and notebooks: gate i is ``sigmoid(x @ W_i + h @ U_i + b_i)``, and so on
    for the forget gate f, the cell candidate g (with tanh) and the output gate o.

    Args:
        W_i, W_f, W_g, W_o: (features, hidden).
        U_i, U_f, U_g, U_o: (hidden, hidden).
        b_i, b_f, b_g, b_o: (hidden,) or (1, hidden).
        batch_first: of the layer.

    Returns:
        a layer with new parameters that hold copies of the values, on the same device and with the same
        dtype. b becomes ``bias_ih``; ``bias_hh`` is zero.

    Raises:
        TypeError: an argument is not a Tensor, or ``W_i`` is not of a floating-point dtype.
        ValueError: a shape, dtype or device that does not fit ``W_i``; the text names the argument.
    """
    gates = {"i": (W_i, U_i, b_i), "f": (W_f, U_f, b_f), "g": (W_g, U_g, b_g), "o": (W_o, U_o, b_o)}
    for gate, tensors in gates.items():
        for letter, x in zip("WUb", tensors, strict=True):
            if not isinstance(x, Tensor):
                raise TypeError(f"from_gates: {letter}_{gate}: expected a Tensor, got {type(x).__name__}")
    if not W_i.is_floating_point():
        raise TypeError(f"from_gates: W_i: expected a floating-point dtype, got {W_i.dtype}")
    if W_i.dim() != 2 or 0 in W_i.shape:
        raise ValueError(f"from_gates: W_i: expected shape (features, hidden), got {tuple(W_i.shape)}")

    features, hidden = W_i.shape
    shapes: dict[str, list[tuple[int, ...]]] = {
        "W": [(features, hidden)],
        "U": [(hidden, hidden)],
        "b": [(hidden,), (1, hidden)],
    }
    for gate, tensors in gates.items():
        for letter, x in zip("WUb", tensors, strict=True):
            name = f"from_gates: {letter}_{gate}"
            if tuple(x.shape) not in shapes[letter]:
                allowed = " or ".join(map(str, shapes[letter]))
                raise ValueError(f"{name}: expected shape {allowed}, got {tuple(x.shape)}")
            if x.dtype != W_i.dtype:
                raise ValueError(f"{name}: expected dtype {W_i.dtype} as W_i, got {x.dtype}")
            if x.device != W_i.device:
                raise ValueError(f"{name}: expected device {W_i.device} as W_i, got {x.device}")

    module = LSTM(features, hidden, batch_first=batch_first, device="meta")
    with torch.no_grad():
        values = {
            # Here a row of the weights is one hidden unit, there it is a column.
            "weight_ih_l0": torch.cat([W.T for W, _, _ in gates.values()]),
            "weight_hh_l0": torch.cat([U.T for _, U, _ in gates.values()]),
            "bias_ih_l0": torch.cat([b.reshape(hidden) for _, _, b in gates.values()]),
            "bias_hh_l0": W_i.new_zeros(4 * hidden),
        }
        for name, value in values.items():
            setattr(module, name, nn.Parameter(value.contiguous()))
    module._init_flat_weights()
    return module
