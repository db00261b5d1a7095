"""``lstm_ext.from_gates``: a layer from the per-gate matrices of lectures and notebooks."""

from __future__ import annotations

import torch
from torch import Tensor

from .from_frameworks import Direction, Source
from .lstm import LSTM


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

    The matrices are for row vectors, as in lectures and notebooks: gate i is ``sigmoid(x @ W_i + h @ U_i + b_i)``, and
    likewise the forget gate f, the cell candidate g (with tanh) and the output gate o.

    Args:
        W_i, W_f, W_g, W_o: (features, hidden).
        U_i, U_f, U_g, U_o: (hidden, hidden).
        b_i, b_f, b_g, b_o: (hidden,) or (1, hidden).
        batch_first: as in :class:`lstm_ext.LSTM`.

    Returns:
        a layer with new parameters that hold copies of the values, with the same device and dtype. b becomes
        ``bias_ih``; ``bias_hh`` is zero.

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

    # A hidden unit is a row of the layer's weights and a column of the matrices.
    W, U, b = [
        torch.cat(parts).detach()
        for parts in zip(*[(W.T, U.T, b.reshape(hidden)) for W, U, b in gates.values()], strict=True)
    ]
    return Source("from_gates", "ifgo").layer([[Direction(W, U, b)]], batch_first)
