"""Run by `make cuda-build`, not by pytest: whether the installed extension has all that a build with CUDA has."""

from __future__ import annotations

import sys

import torch

from lstm_ext import info
from lstm_ext.native import loader


def problems() -> list[str]:
    module = loader.extension()
    status = loader.status()
    if module is None or status.backend != "aot":
        return [f"the extension is not one built ahead of time: {status}"]
    found = []
    if not module.build_info()["cuda"]:
        found.append(f"the binary has no CUDA part: {status.cuda_reason}")
    if module.build_info()["cuda"] != (status.cuda or ""):
        found.append(f"the binary says {module.build_info()['cuda']!r}, the record {status.cuda!r}")
    operators = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("lstm_ext::")]
    if not operators:
        found.append("no operator is registered")
    # Computed: those on torch's operator have one kernel for all devices.
    found += [
        f"{name} has no CUDA kernel"
        for name in operators
        if not torch._C._dispatch_has_computed_kernel_for_dispatch_key(name, "CUDA")
    ]
    return found


if __name__ == "__main__":
    sys.argv = sys.argv[:1]
    info.main()
    found = problems()
    for problem in found:
        print(f"error: {problem}")
    sys.exit(1 if found else 0)
