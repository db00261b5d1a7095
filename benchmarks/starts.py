"""How long the first call of a process takes, and the imports before it: each figure is of a process of its own.

Nothing slow is imported here before the clock runs: torch is, where it is timed.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time

from shapes import Shape

PACKAGES = {"torch": "torch", "ours": "lstm_ext", "frozen": "lstm_ext"}  # those of peers have their names


def start(kind: str, threads: int, shape: Shape | None = None) -> dict[str, float]:
    """Seconds of a fresh process: "import" of the package, for all but torch's after that of torch, and with a shape

    "make", from the weights to what can be called, and "first" and "second", the calls.
    """
    command = [sys.executable, __file__, kind, str(threads), *map(str, shape or ())]
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(child.stdout.splitlines()[-1])


def _since(start: float) -> float:
    return time.perf_counter() - start


def _child(kind: str, threads: int, shape: Shape | None) -> dict[str, float]:
    if kind != "torch":
        importlib.import_module("torch")
    begin = time.perf_counter()
    package = importlib.import_module(PACKAGES.get(kind, kind))
    times = {"import": _since(begin)}
    if shape is None:
        return times

    import harness
    import peers
    import torch
    from torch import nn

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    layer = nn.LSTM(shape.input_size, shape.hidden_size, **harness.layer_options(shape))
    begin = time.perf_counter()
    if kind in peers.PEERS:
        call = peers.PEERS[kind].make(layer, shape, threads, False)
    else:
        if kind == "ours":
            layer = package.convert(layer)
        elif kind == "frozen":
            layer = package.freeze(layer)
        call = harness.inference_call(layer, shape)
    times["make"] = _since(begin)
    for name in ("first", "second"):
        begin = time.perf_counter()
        call()
        times[name] = _since(begin)
    return times


if __name__ == "__main__":
    name, count, *sizes = sys.argv[1:]
    print(json.dumps(_child(name, int(count), Shape(*map(int, sizes)) if sizes else None)))
