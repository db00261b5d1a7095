"""``patch_keras``: the recurrent layers of Keras 3, on its torch backend, computed by this package.

Tried with Keras 3.3.3 and 3.15.1. Nothing here imports Keras before a patch starts.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..call import run
from ..layer import route
from ..layer.activations import Activation
from ..layer.tracing import is_exporting
from ..native import integrations
from .from_frameworks import KERAS, KERAS_ASKED, keras_activation
from .registered import repeat_outputs
from .torch_layers import Replacement, lock

_States = Sequence[Tensor]
_PLAIN: tuple[Activation, Activation] = ("sigmoid", "tanh")


class _Cell(NamedTuple):
    """A cell of Keras.

    Attributes:
        why_not: the reason for which Keras computes a layer of such cells, or an empty text. Its arguments are the
            cell, its two functions by our names, the device, and whether there is a mask.
        run: the outputs (B, T, H), 0 where the mask is False, and the states after them. Its arguments are the input
            (B, T, I), the states (B, H), the mask (B, T) and, in the form of Keras, the kernels and the bias; and the
            functions.
        transposed: how many numbers of the kernels are transposed, which each call does, in the time that a step of
            Keras takes longer. Measured with Keras 3.15.1, whose loop is the fastest, on one row.
    """

    why_not: Callable[[Any, tuple[Activation, Activation], torch.device, bool], str]
    run: Callable[..., tuple[Tensor, list[Tensor]]]
    transposed: int


def _why_not_lstm(
    cell: Any, functions: tuple[Activation, Activation], device: torch.device, masked: bool
) -> str:
    # torch's own operator computes plain layers where there are no kernels.
    plain = functions == _PLAIN and not masked
    return "" if plain or route.has_operators(device) else f"there are no kernels for {device}"


def _run_lstm(
    x: Tensor,
    states: _States,
    mask: Tensor | None,
    weights: Sequence[Tensor],
    bias: Tensor | None,
    functions: tuple[Activation, Activation],
) -> tuple[Tensor, list[Tensor]]:
    h, c = (state[None] for state in states)
    arrays = [w.T for w in weights]
    arrays += [] if bias is None else [bias, torch.zeros_like(bias)]
    gate, cell = functions
    output, (h_n, c_n) = run.lstm(
        route.lstm_layer, x, (h, c), arrays, bias is not None, 1, 0.0, False, False, True,
        mask=mask, gate_activation=gate, cell_activation=cell,
    )  # fmt: skip
    return output, [h_n[0], c_n[0]]


def _why_not_gru(
    cell: Any, functions: tuple[Activation, Activation], device: torch.device, masked: bool
) -> str:
    if not cell.reset_after:
        return "a GRU with reset_after=False"
    if functions != _PLAIN:
        return "a GRU with other activations"
    # torch's own operator computes plain layers where there are no kernels.
    return "" if not masked or route.has_gru(device) else f"there are no kernels of a GRU for {device}"


def _run_gru(
    x: Tensor,
    states: _States,
    mask: Tensor | None,
    weights: Sequence[Tensor],
    bias: Tensor | None,
    functions: tuple[Activation, Activation],
) -> tuple[Tensor, list[Tensor]]:
    """The gates have the order r, z, n here: those of Keras are z, r, n."""
    # Transposed before they are cut, since torch transposes whole matrices four times as fast.
    arrays = [*[w.T.contiguous() for w in weights], *(() if bias is None else bias)]
    parts = [w.chunk(3) for w in arrays]
    arrays = [torch.cat([r, z, n]) for z, r, n in parts]
    output, h_n = run.lstm(
        route.lstm_layer, x, states[0][None], arrays, bias is not None, 1, 0.0, False, False, True, gru=True, mask=mask
    )  # fmt: skip
    return output, [h_n[0]]


_CELLS = {
    "LSTMCell": _Cell(_why_not_lstm, _run_lstm, 100_000),
    "GRUCell": _Cell(_why_not_gru, _run_gru, 16_000),
}
_ARGUMENTS = ["self", "sequences", "initial_state", "mask", "training"]


class patch_keras(Replacement):
    """Let the LSTM and GRU layers of Keras 3, on its torch backend, compute on this package's kernels.

    Keras runs a loop in Python there. Example::

        with lstm_ext.patch_keras():
            model.fit(x, y)                   # and predict, evaluate, layer(x)

        handle = lstm_ext.patch_keras().start()   # until handle.stop()

    A patch holds for the whole process, for the calls made while it holds, of models made before and after. Models,
    weights and files stay those of Keras, and so do the results: a masked step repeats the output before it. It reaches
    ``LSTM``, ``GRU`` and ``RNN(LSTMCell(...))``, in a ``Bidirectional`` too, and subclasses that do not replace Keras'
    ``inner_loop``. These calls go Keras' way, which is chosen before anything is computed:

    - in training, ``recurrent_dropout``, and ``dropout`` with ``implementation=1``: each gate has a mask of its own;
    - an ``activation`` other than tanh, sigmoid, hard_sigmoid, relu, leaky_relu, elu, softplus, softsign and linear;
    - a GRU with another activation or ``reset_after=False``;
    - ``use_cudnn=True``; cells of other classes;
    - fewer than 3 steps, or than 13 with 512 units, since transposing the kernels would take longer than Keras' loop;
      of a GRU, more;
    - whatever an export traces, so that its result does not need this package;
    - on devices without kernels, and a GRU on all but the CPU, a layer with a mask or with other activations.

    Patches may be nested, and stopped in any order. Keras' methods come back when all are stopped.

    Attributes:
        computed: how many calls of layers this package computed while this patch held, in any thread; those within a
            graph of ``torch.compile`` are not counted. A ``with`` block without one gives a UserWarning.
        left: how many calls went Keras' way, by the reason.

    Raises:
        ImportError: on starting, Keras is not installed.
        RuntimeError: on starting, Keras has another backend than torch, or it is a version whose layers this package
            does not know; on stopping, other code has put other methods in place of these in the meantime.
    """

    computed: int
    left: Counter[str]

    def __init__(self) -> None:
        self.computed, self.left = 0, Counter()

    def _replaced(self) -> Iterable[tuple[Any, str, Any]]:
        keras = importlib.import_module("keras")
        if keras.backend.backend() != "torch":
            raise RuntimeError(
                f"patch_keras: expected the backend torch of Keras, got {keras.backend.backend()}: set "
                "KERAS_BACKEND=torch before Keras is imported"
            )
        places = [getattr(keras.layers, name, None) for name in ("LSTM", "GRU", "RNN")]
        for place in places:
            theirs = vars(place).get("inner_loop")
            if theirs is None or list(inspect.signature(theirs).parameters) != _ARGUMENTS:
                raise RuntimeError(
                    f"patch_keras: Keras {keras.__version__} has no loop in {place} that this package knows: it knows "
                    "those of Keras 3.3.3 and 3.15.1"
                )
        integrations.install()
        return [(place, "inner_loop", _loop(keras, place)) for place in places]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        if error is None and not self.computed:
            left = ", ".join(f"{count} for {reason}" for reason, count in self.left.items())
            warnings.warn(
                "patch_keras: no call of an LSTM or GRU layer of Keras was computed by lstm_ext in this block; "
                f"{f'Keras computed {left}' if left else 'a patch has to hold while fit, predict or a layer runs'}",
                UserWarning,
                stacklevel=2,
            )


def _loop(keras: Any, place: Any) -> Any:
    """The method ``inner_loop`` of a class of layers."""
    theirs = vars(place)["inner_loop"]
    cells = {getattr(keras.layers, name): cell for name, cell in _CELLS.items()}
    # By the function, since one of the user's may have the name of one of Keras'.
    known = [
        (name, getattr(keras.activations, name)) for name in (*KERAS, *KERAS_ASKED) if name != "identity"
    ]
    names = {function: keras_activation(function, name) for name, function in known}
    inner = () if place is not keras.layers.RNN else (keras.layers.LSTM, keras.layers.GRU)

    def why_not(layer: Any, x: Tensor, masked: bool, training: bool) -> str:
        cell = layer.cell
        if type(cell) not in cells:
            return f"cells of the class {type(cell).__name__}"
        if getattr(layer, "use_cudnn", False) is True:
            return "use_cudnn=True"
        if training and cell.recurrent_dropout:
            return "recurrent_dropout in training"
        if training and cell.dropout and (cell.dropout >= 1 or getattr(cell, "dropout_mask_count", None)):
            return "dropout with a mask for each gate"
        if torch._C._is_tracing() or is_exporting():
            return "an export"
        weights = cell.kernel.shape[1] * sum(cell.kernel.shape[:1] + cell.recurrent_kernel.shape[:1])
        if x.size(1) < 3 + weights // cells[type(cell)].transposed:
            return "few steps for the size of the kernels"
        functions = cell.recurrent_activation, cell.activation
        for function in functions:
            if function not in names:
                return f"the activation {getattr(function, '__name__', type(function).__name__)}"
        gate, candidate = functions
        return cells[type(cell)].why_not(cell, (names[gate], names[candidate]), x.device, masked)

    @functools.wraps(theirs)
    def inner_loop(
        self: Any, sequences: Tensor, initial_state: Any, mask: Any, training: bool = False
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        mask_ = mask[0] if isinstance(mask, (list, tuple)) else mask
        # The loop of LSTM and GRU, which has been asked, goes on to that of RNN.
        if isinstance(self, inner):
            return theirs(self, sequences, initial_state, mask, training=training)
        reason = why_not(self, sequences, mask_ is not None, training)
        _count(reason)
        if reason:
            return theirs(self, sequences, initial_state, mask, training=training)
        cell, tensor = self.cell, keras.ops.convert_to_tensor
        weights = [tensor(cell.kernel), tensor(cell.recurrent_kernel)]
        dtype = weights[0].dtype
        states = initial_state if isinstance(initial_state, (list, tuple)) else [initial_state]
        states = [tensor(state).to(dtype) for state in states]
        if self.stateful:  # Keras writes the next states into the same tensors.
            states = [state.clone() for state in states]
        x = sequences
        if training and cell.dropout:
            x = x * cell.get_dropout_mask(x[:, 0])[:, None]
        x = x.to(dtype)
        if mask_ is not None:
            mask_ = tensor(mask_).to(torch.bool).reshape(x.shape[:2])
        if self.go_backwards:
            x, mask_ = x.flip(1), None if mask_ is None else mask_.flip(1)
        output, states = cells[type(cell)].run(
            x,
            states,
            mask_,
            weights,
            None if cell.bias is None else tensor(cell.bias),
            (names[cell.recurrent_activation], names[cell.activation]),
        )
        if mask_ is not None and not self.zero_output_for_mask:
            output = repeat_outputs(output, mask_, self.return_sequences)
        elif not self.return_sequences:
            output = output[:, -1:]
        return output[:, -1], output, states

    return inner_loop


def _count(reason: str) -> None:
    if torch.compiler.is_compiling():
        return
    with lock:
        for active in patch_keras._active:
            if reason:
                active.left[reason] += 1
            else:
                active.computed += 1
