"""The values of a call's options: lengths, masks, resets and the states after them, checked and brought to (T, B)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ..layer.tracing import LEGACY_VMAP, any_autocast, is_active
from ..native import config
from .layout import JaggedLayout, Layout, PackedLayout

# Whether values on a device are checked there, by an assertion that nobody waits for (LSTM_EXT_CHECK=1).
CHECK = config.chosen("LSTM_EXT_CHECK", "0") == "1"


def is_readable(x: Tensor) -> bool:
    """Whether the host can read the numbers: they are not symbolic, and the same for all samples of a vmap."""
    return (
        not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
        and not is_active(LEGACY_VMAP)
        and type(x) in (Tensor, torch.nn.Parameter)
    )


def kind_of(x: Any) -> str:
    if isinstance(x, Tensor):
        return f"a Tensor of shape {tuple(x.shape)}"
    return type(x).__name__


def is_pair(states: Any) -> bool:
    """Whether these are two Tensors, in a tuple or list."""
    return (
        isinstance(states, (tuple, list))
        and len(states) == 2
        and isinstance(states[0], Tensor)
        and isinstance(states[1], Tensor)
    )


def described_pair(states: Any) -> str:
    """The type of states that are no pair, with the types inside if it is a tuple or list."""
    if isinstance(states, (tuple, list)):
        return f"{type(states).__name__} of ({', '.join([type(x).__name__ for x in states])})"
    return type(states).__name__


def check_like_input(name: str, x: Tensor, shape: tuple[int, ...], input: Tensor, what: str = "") -> None:
    """Raises: ValueError for a tensor of another shape, or of another device or dtype than the input."""
    if tuple(x.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}{what}, got {tuple(x.shape)}")
    if x.device != input.device:
        raise ValueError(f"{name}: expected device {input.device} as input, got {x.device}")
    if x.dtype != input.dtype and not any_autocast():
        raise ValueError(f"{name}: expected dtype {input.dtype} as input, got {x.dtype}")


def refuse_meta(name: str, value: Any, x: Tensor) -> None:
    """Lengths and masks may be on any device except meta, which has no numbers."""
    if isinstance(value, Tensor) and value.device.type == "meta" and x.device.type != "meta":
        raise ValueError(f"{name}: expected a device with numbers, as input on {x.device}, got meta")


def _assert_later(good: Tensor, message: str) -> None:
    """Checks values on their device without waiting, with LSTM_EXT_CHECK=1."""
    if CHECK:
        torch._assert_async(good.all(), message)


def _per_step(name: str, value: Any, x: Tensor, layout: Layout) -> Tensor:
    """Converts a tensor of the input's shape, without features or with one, to (T, B)."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(value).__name__}")
    shape = layout.shape(x)
    if tuple(value.shape) == (*shape, 1):
        value = value.squeeze(-1)
    if tuple(value.shape) != shape:
        raise ValueError(
            f"{name}: expected shape {shape} or {(*shape, 1)}, that of the input without its features, "
            f"got {tuple(value.shape)}"
        )
    return layout.rows(value)


def resets_of(resets: Any, x: Tensor, layout: Layout) -> Tensor:
    """Resets as bool, (T, B) or (N,)."""
    if isinstance(layout, PackedLayout):
        steps = _packed_resets(resets, layout.packed, layout.batch(x))
    elif isinstance(layout, JaggedLayout):
        steps = layout.flags_of("resets", resets)
    elif isinstance(resets, PackedSequence):
        raise TypeError("resets: expected a Tensor, as the input is one, got PackedSequence")
    else:
        steps = _per_step("resets", resets, x, layout)
    if steps.dtype != torch.bool and not steps.is_floating_point():
        raise ValueError(
            f"resets: expected dtype torch.bool, or a floating-point dtype with values 0 and 1, got {steps.dtype}. "
            "Convert it: resets.bool()"
        )
    if steps.device != x.device:
        raise ValueError(f"resets: expected device {x.device} as input, got {steps.device}")
    if steps.dtype == torch.bool:
        return steps
    set_ = steps != 0
    good = ~set_ | (steps == 1)
    if not is_readable(steps):
        _assert_later(good, "resets: expected the values 0 and 1")
    elif not good.all():
        raise ValueError(f"resets: expected the values 0 and 1, got {steps[~good][0].item()}")
    return set_


def _packed_resets(resets: Any, packed: PackedSequence, batch: int) -> Tensor:
    if not isinstance(resets, PackedSequence):
        raise TypeError(f"resets: expected a PackedSequence, as the input is one, got {kind_of(resets)}")
    rows = resets.data
    expected = (packed.data.size(0),)
    if tuple(rows.shape) == (*expected, 1):
        rows = rows.squeeze(-1)
    if tuple(rows.shape) != expected:
        raise ValueError(
            f"resets: expected data of shape {expected} or {(*expected, 1)}, the rows of the input, "
            f"got {tuple(rows.shape)}"
        )
    ours, theirs = resets.batch_sizes, packed.batch_sizes
    if ours is not theirs and is_readable(theirs) and not torch.equal(ours, theirs):
        raise ValueError(
            f"resets: expected the batch_sizes of the input, {theirs.tolist()}, got {ours.tolist()}"
        )
    ours, theirs = resets.sorted_indices, packed.sorted_indices
    if ours is not theirs:
        either = ours if theirs is None else theirs
        # A compiler may not know the number of sequences.
        count = batch if is_readable(packed.batch_sizes) else either.size(0)
        in_order = torch.arange(count, device=either.device)
        ours, theirs = [in_order if i is None else i for i in (ours, theirs)]
        if ours.device != theirs.device or ours.shape != theirs.shape:
            raise ValueError(
                f"resets: expected the sorted_indices of the input, on {theirs.device}, of shape "
                f"{tuple(theirs.shape)}, got them on {ours.device}, of shape {tuple(ours.shape)}"
            )
        if not is_readable(theirs):
            _assert_later(ours == theirs, "resets: expected the sorted_indices of the input")
        elif not torch.equal(ours, theirs):
            raise ValueError(
                f"resets: expected the sorted_indices of the input, {theirs.tolist()}, got {ours.tolist()}"
            )
    return rows


def reset_state_of(
    reset_state: Any, x: Tensor, shapes: Sequence[tuple[int, ...]], layout: Layout
) -> tuple[Tensor, Tensor | None]:
    """The replacing states, with a batch axis: one, and None, if there is one shape."""
    if len(shapes) == 1:
        expected = shapes[0] if layout.batched else (shapes[0][0], shapes[0][2])
        if not isinstance(reset_state, Tensor):
            raise TypeError(f"reset_state: expected a Tensor, h, got {described_pair(reset_state)}")
        check_like_input("reset_state", reset_state, expected, x, ", that of hx")
        return reset_state if layout.batched else reset_state.unsqueeze(1), None
    if not is_pair(reset_state):
        got = described_pair(reset_state)
        raise TypeError(f"reset_state: expected a tuple of two Tensors (h, c), got {got}")
    states = []
    for i, (state, shape) in enumerate(zip(reset_state, shapes, strict=True)):
        expected = shape if layout.batched else (shape[0], shape[2])
        check_like_input(f"reset_state[{i}] ({'hc'[i]})", state, expected, x, ", that of hx")
        states.append(state if layout.batched else state.unsqueeze(1))
    return states[0], states[1]


def lengths_of(lengths: Any, x: Tensor, layout: Layout) -> Tensor:
    """Lengths as int64 (B,), each in [0, T]: checked if the host can read the numbers, else clamped."""
    time, batch = x.size(0), x.size(1)
    if not layout.batched and isinstance(lengths, int):
        lengths = [lengths]
    if isinstance(lengths, (list, tuple)):
        for n in lengths:
            # A compiler may take an int for a number that changes, and cannot look for its methods.
            if isinstance(n, (bool, Tensor)) or not (isinstance(n, int) or hasattr(n, "__index__")):
                raise TypeError(f"lengths: expected integers, got {type(n).__name__}")
        if len(lengths) != batch:
            raise ValueError(f"lengths: expected {batch} numbers, one a sequence, got {len(lengths)}")
        for b, n in enumerate(lengths):
            if not 0 <= n <= time:
                raise ValueError(_wrong_length(time, n, b))
        return torch.tensor(lengths, dtype=torch.int64, device="cpu")
    if not isinstance(lengths, Tensor):
        raise TypeError(f"lengths: expected a list of integers or a Tensor, got {type(lengths).__name__}")
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise ValueError(f"lengths: expected an integer dtype, got {lengths.dtype}")
    if not layout.batched and lengths.dim() == 0:
        lengths = lengths.unsqueeze(0)
    if tuple(lengths.shape) != (batch,):
        raise ValueError(f"lengths: expected shape {(batch,)}, one a sequence, got {tuple(lengths.shape)}")
    lengths = lengths.to(torch.int64)
    good = (lengths >= 0) & (lengths <= time)
    if not is_readable(lengths):
        _assert_later(good, "lengths: expected numbers from 0 to the number of time steps")
        return lengths.clamp(0, time)
    if not good.all():
        b = int((~good).nonzero()[0])
        raise ValueError(_wrong_length(time, int(lengths[b]), b))
    return lengths


def _wrong_length(time: int, length: int, sequence: int) -> str:
    return (
        f"lengths: expected numbers from 0 to {time}, the number of time steps, "
        f"got {length} for sequence {sequence}"
    )


def steps_of_mask(mask: Any, x: Tensor, layout: Layout) -> Tensor:
    """The mask as bool (T, B)."""
    steps = _per_step("mask", mask, x, layout)
    if steps.dtype != torch.bool:
        raise ValueError(f"mask: expected dtype torch.bool, got {steps.dtype}. Convert it: mask.bool()")
    return steps
