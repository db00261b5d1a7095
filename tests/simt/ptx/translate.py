"""A module of PTX as one C++ source."""

from __future__ import annotations

from simt.ptx import arithmetic, memory  # noqa: F401  their functions register themselves as handlers
from simt.ptx.emit import Emitter, identifier
from simt.ptx.parse import Module, Variable


def _data(variable: Variable) -> str:
    constant = "const " if variable.space == "const" else ""
    array = f"{constant}unsigned char {identifier(variable.name)}[{variable.size}]"
    data = ", ".join(str(byte) for byte in variable.data)
    return f"alignas({variable.alignment}) static {array} = {{{data}}};"


def translate(module: Module) -> str:
    """Its kernels register themselves under the names that g++ gives the same kernels."""
    lines = ['#include "simt/ptx/runtime.h"', "", "namespace ptx {", "namespace {", ""]
    lines += [_data(v) for v in module.variables if v.space in ("global", "const")]
    for function in module.functions:
        lines += [Emitter(function, module).definition(), ""]
    lines += ["}  // namespace", ""]
    for function in module.functions:
        name = f"kernel_{identifier(function.name)}"
        lines.append(f'PTX_KERNEL({name}, "{function.name}", {function.parameter_size});')
    return "\n".join([*lines, "}  // namespace ptx", ""])
