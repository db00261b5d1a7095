"""Finds out who intercepts a call: compilers, tracers, transforms and dispatch modes. Used in every call."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from ..native.integrations import constant_for_dynamo

_T = TypeVar("_T")
# Bound here, because a lookup through the modules costs time.
_is_compiling = torch.compiler.is_compiling
_is_jit_tracing = torch._C._is_tracing
innermost_transform = torch._C._functorch.peek_interpreter_stack
dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
is_active = torch._C._dispatch_tls_is_dispatch_key_included
# Active within the vmap of is_grads_batched=True and of torch.autograd.functional, whose batches look like plain
# tensors and have no memory of their own.
LEGACY_VMAP: Any = torch._C._parse_dispatch_key("VmapMode")
# The key of make_fx(pre_dispatch=True), whose mode is not in the list of the others.
PRE_DISPATCH = torch._C.DispatchKey.PreDispatch
KERNEL_DTYPES = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))
PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter))
# One query for all device types; RNNBase.check_input uses the same.
any_autocast: Callable[[], bool] = torch._C._is_any_autocast_enabled


def is_watched() -> bool:
    """Whether a torch function mode is on, which sees what goes through the dispatcher.

    The mode of ``torch.set_default_device`` looks at functions that make tensors only.
    """
    return _function_modes() > 0 and any(
        [type(mode) is not DeviceContext for mode in _get_current_function_mode_stack()]
    )


def is_plain_eager() -> bool:
    """Whether no compiler, tracer, transform or mode intercepts calls. Ignores forward-mode AD."""
    return (
        not _is_compiling()
        and not _is_jit_tracing()
        and innermost_transform() is None
        and dispatch_modes() == 0
        and not is_active(LEGACY_VMAP)
        and not is_active(PRE_DISPATCH)
        and not is_watched()
    )


def in_a_thread(device: torch.device, run: Callable[[], _T]) -> _T:
    """Runs a function in a thread of its own, which has none of the caller's modes, transforms, hooks and autocast.

    It has the caller's stream. An exception is raised here.
    """
    stream = torch.cuda.stream(torch.cuda.current_stream(device)) if device.type == "cuda" else None

    def work() -> _T:
        with stream or contextlib.nullcontext():
            return run()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(work).result()


def are_plain(tensors: Sequence[Tensor | None]) -> bool:
    """Whether none of the tensors is of a subclass."""
    return all([t is None or type(t) in PLAIN_TYPES for t in tensors])


@constant_for_dynamo
def is_jit_tracing() -> bool:
    """torch.jit.is_tracing(), with less overhead, because every call needs it."""
    return _is_jit_tracing()


def is_zero(size: int) -> bool:
    """Whether a size is known to be 0. In a compiled program it may be a number that depends on the data."""
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import guard_or_false

        return guard_or_false(size == 0)
    return size == 0


@constant_for_dynamo
def is_exporting() -> bool:
    """torch.compiler.is_exporting(), for which dynamo of torch 2.11 writes True into each compiled program."""
    return torch.compiler.is_exporting()  # noqa: TID251


@constant_for_dynamo
def is_exporting_to_onnx() -> bool:
    return is_exporting() and torch.onnx.is_in_onnx_export()


def leaf_of_graph(
    module: torch.nn.Module, input: torch.fx.Proxy, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> torch.fx.Proxy:
    """``torch.fx.symbolic_trace`` treats the layers of ``torch.nn`` as leaves: ours too."""
    tracer = input.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), args, kwargs)


def refuse_shards(tensors: Sequence[Tensor]) -> None:
    """Raises: RuntimeError if a tensor is a DTensor and the first one, the input, is not."""
    dtensor = sys.modules.get("torch.distributed.tensor")
    if dtensor is None or isinstance(tensors[0], dtensor.DTensor):
        return
    if any([isinstance(t, dtensor.DTensor) for t in tensors]):
        raise RuntimeError(
            "LSTM: the weights are DTensors and the input is not. FSDP2 gathers its shards in hooks: call the "
            "module, not its forward(); to use step(), say once after fully_shard: "
            "torch.distributed.fsdp.register_fsdp_forward_method(module, 'step')"
        )
