"""The compiled module: one call computes one layer, all time steps, both directions."""

from collections.abc import Sequence

from torch import Tensor

class LayerOptions:
    """The options of a layer beyond torch.nn.LSTM. Nothing set is the plain layer."""

    def __init__(self, **options: Tensor | Sequence[Tensor] | float | bool | str | None) -> None:
        """Options by name, with the types and shapes of :class:`lstm_ext.layer.layer_call.LayerOptions`.

        ``recompute`` has no effect if ``return_gates`` is set.

        Raises:
            TypeError: there is no such option, or its value is of another type.
        """

# gates, cells, hidden, norm_products, norm_factors: None if the layer does not need it.
Saved = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]

def weights_stamp(weights: list[list[Tensor]]) -> int:
    """A number that changes with each change in place that torch counts, and where a weight has other memory."""

def release_memory() -> int:
    """Free the memory on the CPU that calls keep for later ones, and return how many bytes that were."""

def lstm_layer_forward(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    has_bias: bool,
    bidirectional: bool,
    options: LayerOptions | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Saved | None]:
    """output, h_n, c_n, cell states, gate values, and with ``save`` the tensors that the backward pass needs.

    Shapes are those of :func:`lstm_ext.reference.lstm_layer`. Cell states and gate values are None if ``options`` do
    not request them; they may share memory with saved tensors. With ``options.recompute`` only the cells are saved.
    """

def lstm_layer(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    has_bias: bool,
    bidirectional: bool,
    options: LayerOptions | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """The first five results of lstm_layer_forward, recorded by autograd if a gradient is requested.

    For plain tensors that no mode and no transform intercepts.
    """

def lstm_module(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | Tensor | None,
    weights: list[list[Tensor]],
    options: list[LayerOptions] | None,
    layout: int,
    input_size: int,
    hidden_size: int,
    proj_size: int,
    has_bias: bool,
    bidirectional: bool,
    /,
) -> tuple[Tensor, tuple[Tensor, Tensor] | Tensor] | None:
    """The results of a module, one layer after the other, from the user's arguments; autograd records each layer.

    None if an argument is not a plain tensor on the CPU, a mode or a transform intercepts it, or sizes do not fit. Does
    not check for forward-mode AD, compilers and dropout. Shapes are those of :class:`lstm_ext.LSTM`; with the option
    ``gru`` there is one state, h.

    Args:
        weights, options: one entry a layer.
        layout: the ``code`` of a :class:`lstm_ext.call.layout.Layout`.
    """

def lstm_cell_module(
    input: Tensor, hx: tuple[Tensor, Tensor] | Tensor | None, weights: list[Tensor | None], gru: bool, /
) -> tuple[Tensor, Tensor] | Tensor | None:
    """h and c of a cell, or h of a GRU, or None, like lstm_module; shapes are those of the cell's class."""

def lstm_cell(
    input: Tensor, h: Tensor | None, c: Tensor | None, weights: Sequence[Tensor], has_bias: bool
) -> tuple[Tensor, Tensor]:
    """h and c after one step, for input (B, I), h and c (B, H), without a projection; otherwise like lstm_layer."""

def freeze_weights(
    weights: Sequence[Tensor], has_bias: bool, bidirectional: bool, kind: str, gru: bool = False
) -> list[Tensor]:
    """Bytes for each direction: the weights packed for the instruction set in use.

    ``kind`` is ``"own"``, ``"bfloat16"`` or ``"int8"``: the type to which weight_ih and weight_hh are rounded.
    """

def lstm_layer_backward(
    input: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    has_bias: bool,
    bidirectional: bool,
    options: LayerOptions | None,
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    grad_cell_states: Tensor | None,
    grad_gate_values: Tensor | None,
    output: Tensor,
    saved: Saved,
    needs_grad: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of input, h0, c0, each weight, reset_h, reset_c and each parameter of norm.

    ``needs_grad`` has an entry for each of them; where it is False, the gradient is None. The options are those of the
    forward pass.
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
    bf16_parts: int = 3,
) -> dict[str, int | bool]:
    """The plan of a call of these sizes with the instruction set in use; see csrc/cpu/plan.h.

    ``save`` is True for a forward pass that a backward pass will follow; ``batch_sizes`` are those of packed data.
    ``bf16_parts`` are the bfloat16 numbers in an operand of the tile engine; in the result, 0 is a product without it.
    ``directions_at_once`` and ``backward_directions_at_once``: whether both directions of a bidirectional layer would
    run at the same time; backward, if the gradient of the input is not requested.
    """

def set_worker_costs(multiple: float) -> None:
    """Sets the cost of workers in plans, as a multiple of the constants: 0 gives small layers many. For tests."""

def worker_limit() -> tuple[int, float]:
    """How many workers a limited call may use, because workers had to share their cores with other programs, and for
    how many seconds of calls the limit lasts. For tests."""

def set_cpu_wait_limit(seconds: float) -> None:
    """LSTM_EXT_CPU_WAIT_LIMIT. For tests."""

def set_fewer_when_crowded(wanted: bool) -> None:
    """False: every call uses all its workers, however busy the cores are. For tests."""

# The facts of a GPU; see csrc/cuda/gpu_plan.h.
DeviceFacts = dict[str, str | int | bool]

def cuda_devices() -> list[DeviceFacts]:
    """The makers' data of the GPUs that :func:`cuda_plan` knows by name."""

def cuda_facts(device: int) -> DeviceFacts:
    """The facts of a present CUDA device for :func:`cuda_plan`, from its runtime. RuntimeError without CUDA kernels."""

def cuda_plan(
    *,
    device: DeviceFacts,
    steps: int,
    batch: int,
    input_size: int,
    hidden_size: int,
    directions: int = 1,
    dtype: str = "float32",
    tf32: bool = True,
    projected: bool = False,
    normalised: bool = False,
    cell_options: bool = False,
    backward: bool = False,
    packed: bool = False,
    options: bool = False,
    kernel: str = "auto",
    step_outcome: bool | None = None,
    persistent_outcome: bool | None = None,
    measured: str = "",
) -> dict[str, str | int | list[str] | dict[str, str | int]]:
    """Which kernel computes a layer on such a GPU, and why; see csrc/cuda/gpu_plan.h.

    ``kernel`` is a request in the form of LSTM_EXT_CUDA_KERNEL. The outcomes say whether the kernels ``"step"`` and
    ``"persistent"`` were correct on this GPU; None means not tried. ``measured`` is the kernel that was the
    fastest. ``options`` are lengths, zoneout or a recurrent mask. In the result ``problem`` is empty, or says why
    the requested kernel cannot run; ``launches`` are those of a time step; ``persistent``, ``step_problem`` and the
    figures of the kernel of a step describe these kernels even if another one is chosen.
    """

def set_cuda_kernel(name: str) -> None:
    """Sets the kernel of CUDA layers in place of LSTM_EXT_CUDA_KERNEL, with the same names; ``""`` returns to that."""

def set_cuda_kernel_of_thread(name: str) -> None:
    """The same for layers that this thread calls; it overrides everything else. They may round to TF32, whatever
    torch's settings are."""

def set_cuda_measured(
    *,
    device: int,
    steps: int,
    batch: int,
    hidden_size: int,
    directions: int,
    dtype: str,
    tf32: bool,
    projected: bool,
    backward: bool,
    packed: bool,
    kernel: str,
) -> str:
    """Sets the kernel that was the fastest when such layers were measured on this CUDA device of the process; ``""``
    forgets it. Returns what it was before."""

def set_cuda_validated(device: int, kernel: str, tf32: bool, validated: bool) -> None:
    """Sets whether the kernel ``"step"`` or ``"persistent"`` may be chosen on this CUDA device of the process, for
    float32 or for 16 bits."""

def set_cuda_wait_limit_of_thread(seconds: float | None) -> None:
    """Sets how long a block of a persistent kernel waits for another one in layers that this thread calls, in place of
    LSTM_EXT_CUDA_WAIT_LIMIT. 0 means no limit. None returns to that variable."""

def cuda_wait_expired(device: int | None) -> bool:
    """Whether such a wait has expired on this CUDA device since the last query, or a layer has raised for it: the
    results of that launch are NaN. It does not synchronise, so call it after a synchronisation. False without CUDA
    kernels."""

def build_info() -> dict[str, str]:
    """How this binary was built: ``version``, ``torch``, ``compiler``, and ``cuda``, which is empty without kernels
    for it, else CUDA's version and the architectures ("13.0 for 8.0 9.0+PTX")."""
