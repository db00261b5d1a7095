"""The compiled module: one call computes one layer, all time steps, both directions."""

from collections.abc import Sequence

from torch import Tensor

class Extras:
    """What a layer does beyond torch.nn.LSTM.

    D directions, T steps, B sequences (N rows of packed data), H hidden units, P the size of h. All on the device of
    the input; meanings as in :class:`lstm_ext.layer.options.LayerExtras`.
    """

    def __init__(
        self,
        resets: Tensor | None = None,  # bool (T, B) or (N)
        reset_h: Tensor | None = None,  # (D, B, P)
        reset_c: Tensor | None = None,  # (D, B, H)
        lengths: Tensor | None = None,  # int64 (B), not with packed input
        recurrent_mask: Tensor | None = None,  # (D, B, P), float32 for a 16-bit input
        kept_h: Tensor | None = None,  # bool (D, T, B, P) or (D, N, P)
        kept_c: Tensor | None = None,  # bool (D, T, B, H) or (D, N, H)
        zoneout_h: float = 0.0,  # the share that is kept, without kept_h
        zoneout_c: float = 0.0,
        norm: Sequence[Tensor] = (),
        recompute: bool = False,
    ) -> None: ...

def lstm_layer_forward(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    has_bias: bool,
    bidirectional: bool,
    save: bool,
    extras: Extras = ...,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """output, h_n, c_n, and with ``save`` what the backward pass needs.

    Shapes as in :func:`lstm_ext.reference.lstm_layer`. What is needed: gates, cells, with a projection hidden, with
    layer normalisation two more; with ``extras.recompute`` only the cells.
    """

def lstm_cell_forward(
    input: Tensor, h: Tensor | None, c: Tensor | None, weights: Sequence[Tensor], has_bias: bool
) -> tuple[Tensor, Tensor]:
    """h and c after one step, for input (B, I), h and c (B, H); without a gradient, and without a projection."""

def lstm_layer_backward(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    output: Tensor,
    saved: Sequence[Tensor],
    has_bias: bool,
    bidirectional: bool,
    wanted: Sequence[bool],
    extras: Extras = ...,
    grad_gates: Tensor | None = None,
    grad_cells: Tensor | None = None,
) -> list[Tensor | None]:
    """The gradients of input, h0, c0, each weight, and, if ``wanted`` goes on so far, reset_h, reset_c, each of norm.

    None where ``wanted`` is False. ``grad_gates`` and ``grad_cells`` are those of the values of the gates and of c_t.
    """

def random_flags(sizes: Sequence[int], probability: float, seed: int) -> Tensor:
    """Flags on the CPU, each True with ``probability``; the same for the same seed. How: csrc/torch/random_flags.h."""

def cpu_capability() -> str:
    """The instruction set in use."""

def cpu_capabilities() -> list[str]:
    """The instruction sets that this processor can run."""

def set_cpu_capability(name: str) -> None:
    """Use another one of :func:`cpu_capabilities`."""

def cpu_plan(
    *,
    steps: int,
    batch: int,
    input_size: int,
    hidden_size: int,
    proj_size: int = 0,
    threads: int = 1,
    save: bool = False,
    float64: bool = False,
    batch_sizes: Sequence[int] | None = None,
) -> dict[str, int | bool]:
    """How a call of these sizes is cut up with the instruction set in use; see csrc/cpu/plan.h.

    ``save`` is True for a forward pass that a backward pass will follow; ``batch_sizes`` are those of packed data.
    """

def build_info() -> dict[str, str]:
    """How this binary was built: ``version``, ``torch``, ``compiler``, and ``cuda``, which is empty without kernels
    for it, else CUDA's version and the architectures ("13.0 for 8.0 9.0+PTX")."""
