"""Whether a call is plain eager code, which may go past the dispatcher: asked in every call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = [
    "LEGACY_VMAP",
    "PRE_DISPATCH",
    "any_autocast",
    "dispatch_modes",
    "innermost_transform",
    "is_active",
    "nothing_looks_on",
]

# Without the way through the modules.
_is_compiling = torch.compiler.is_compiling
_is_jit_tracing = torch._C._is_tracing
innermost_transform = torch._C._functorch.peek_interpreter_stack
dispatch_modes = torch._C._len_torch_dispatch_stack
is_active = torch._C._dispatch_tls_is_dispatch_key_included
# Active within the vmap of is_grads_batched=True and of torch.autograd.functional, whose batches look like plain
# tensors and have no memory of their own.
LEGACY_VMAP: Any = torch._C._parse_dispatch_key("VmapMode")
# That of make_fx(pre_dispatch=True), whose mode is not among the others.
PRE_DISPATCH = torch._C.DispatchKey.PreDispatch

# One call for all device types; RNNBase.check_input asks the same.
any_autocast: Callable[[], bool] = torch._C._is_any_autocast_enabled


def nothing_looks_on() -> bool:
    """No compiler, tracer, transform or dispatch mode sees what is called. Forward-mode AD is not asked for."""
    return (
        not _is_compiling()
        and not _is_jit_tracing()
        and innermost_transform() is None
        and dispatch_modes() == 0
        and not is_active(LEGACY_VMAP)
        and not is_active(PRE_DISPATCH)
    )
