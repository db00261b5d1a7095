"""The compiled module: one call computes one layer, all time steps, both directions."""

from collections.abc import Sequence

from torch import Tensor

def lstm_layer_forward(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    has_bias: bool,
    bidirectional: bool,
    save: bool,
    resets: Tensor | None = None,
    reset_h: Tensor | None = None,
    reset_c: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """output, h_n, c_n, and with ``save`` what the backward pass needs.

    Shapes as in :func:`lstm_ext.reference.lstm_layer`; resets, reset_h and reset_c as in its ``extras``.
    """

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
    resets: Tensor | None = None,
    reset_h: Tensor | None = None,
    reset_c: Tensor | None = None,
) -> list[Tensor | None]:
    """The gradients of input, h0, c0, each weight, and with ``resets`` reset_h and reset_c, in this order.

    None where ``wanted`` is False.
    """

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
