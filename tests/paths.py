"""What the tests reach: every way through the kernels that some call took, on the CPU and in the emulator.

    make test ARGS='-p paths --list-paths build/paths.json'        # lists them, with the number of calls
    python tests/paths.py build/paths.json                          # how many there are
    python tests/paths.py before.json build/paths.json              # and what has been lost

A path is what the kernels decide on: the instruction set, the dtype, the pass, the grid of workers, whether weights are
packed, the kind of data, what a step does, projection, directions. pytest finds the module with tests/ on PYTHONPATH.
"""

from __future__ import annotations

import contextlib
import functools
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

FIELDS = (
    "device", "instruction set", "dtype", "pass", "workers", "weights", "chunks", "data", "step", "projection",
    "directions",
)  # fmt: skip
# Which fields are looked at together: all at once would be as many paths as there are tests.
VIEWS = {
    "grids and layouts": ("instruction set", "dtype", "pass", "workers", "weights", "chunks", "projection"),
    "kinds of steps": ("instruction set", "dtype", "pass", "data", "step", "projection"),
    "kinds of steps, by workers": ("pass", "workers", "weights", "step"),
    "directions": ("dtype", "pass", "data", "projection", "directions"),
}

seen: Counter[tuple[str, ...]] = Counter()


CALLS = ("lstm_layer", "lstm_cell", "lstm_layer_forward", "lstm_layer_backward")


class Recorder:
    """The extension, or the emulated layer, with a note of each call."""

    def __init__(self, module: Any, device: str) -> None:
        self._module, self._device = module, device
        self._options: dict[int, dict[str, Any]] = {}

    def __getattr__(self, name: str) -> Any:
        if name in ("lstm_module", "lstm_cell_module"):
            return lambda *_: None  # declined: what Python calls in their place is noted
        if name == "LayerOptions":
            return self._layer_options
        value = getattr(self._module, name)
        return functools.partial(self._noted, name, value) if name in CALLS else value

    def _layer_options(self, **options: Any) -> Any:
        made = self._module.LayerOptions(**options)
        self._options[id(made)] = options
        return made

    def _noted(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """The backward pass of results that autograd knows is noted when it runs."""
        results = function(*arguments)
        layer = arguments
        if name == "lstm_cell":
            input, h, c, weights, bias = arguments
            layer = (input.unsqueeze(0), h, c, weights, None, bias, False, None)
        if name == "lstm_layer_backward":
            self._note(layer, "backward")
        elif name == "lstm_layer_forward":
            self._note(layer, "training" if arguments[8] else "inference")
        else:
            node = results[0].grad_fn
            self._note(layer, "inference" if node is None else "training")
            if node is not None:
                node.register_prehook(lambda _: self._note(layer, "backward"))
        return results

    def _note(self, arguments: Sequence[Any], kind: str) -> None:
        with contextlib.suppress(RuntimeError, ValueError, IndexError, AttributeError):
            seen[self._path(*arguments[:8], kind=kind)] += 1  # the kernels refuse what has no path

    def _path(self, input: Any, _h: Any, _c: Any, weights: Any, batch_sizes: Any, _bias: Any, both: bool, given: Any,
              kind: str) -> tuple[str, ...]:  # fmt: skip
        import torch

        options = self._options.get(id(given), {}) if given is not None else {}
        proj_size = weights[1].size(1) if weights[1].size(1) * 4 < weights[1].size(0) else 0
        grid = "", "", "", ""
        if self._device == "cpu" and not input.is_cuda:
            sizes = None if batch_sizes is None else batch_sizes.tolist()
            plan = self._module.cpu_plan(
                steps=input.size(0) if sizes is None else len(sizes),
                batch=input.size(1) if sizes is None else sizes[0],
                input_size=input.size(-1),
                hidden_size=weights[1].size(0) // 4,
                proj_size=proj_size,
                threads=torch.get_num_threads(),
                save=kind == "training",
                float64=input.dtype == torch.float64,
                batch_sizes=sizes,
            )
            rows = input.numel() // max(1, input.size(-1))
            grid = self._module.cpu_capability(), *planned(plan, rows, kind)
        data = "dense" if batch_sizes is None else "packed"
        data = "lengths" if options.get("lengths") is not None else data
        data += ", resets" if options.get("resets") is not None else ""
        return (
            "cuda" if input.is_cuda else self._device,
            grid[0],
            str(input.dtype).removeprefix("torch."),
            kind,
            *grid[1:],
            data,
            step_of(options),
            "projected" if proj_size else "",
            "2" if both else "1",
        )


def planned(plan: dict[str, int], rows: int, kind: str) -> tuple[str, str, str]:
    """Workers, layout of the weights, and whether there are several chunks."""
    which = "backward" if kind == "backward" else "forward"
    teams, members = plan[f"{which}_batch_groups"], plan[f"{which}_hidden_groups"]
    workers = {(False, False): "one", (True, False): "teams", (False, True): "members"}.get(
        (teams > 1, members > 1), "teams of members"
    )
    if kind == "backward":
        layout = "panels" if plan["backward_pack"] else "as they are"
    else:
        layout = "panels" if plan["pack"] else "as they are"
    return workers, layout, "several" if plan[f"{which}_chunk_rows"] * teams < rows else "one"


CELLS = ("norm", "peephole", "cell_clip", "coupled_gates", "activations", "preactivation_clip")


def step_of(options: dict[str, Any]) -> str:
    parts = []
    if options.get("recurrent_mask") is not None:
        parts.append("mask")
    for state in ("h", "c"):
        if options.get(f"keep_{state}") is not None:
            parts.append(f"flags of {state}")
        elif options.get(f"zoneout_{state}"):
            parts.append(f"share of {state}")
    parts += [name for name in CELLS if options.get(name)]
    parts += ["recompute"] if options.get("recompute") else []
    parts += ["returned"] if options.get("return_cell_states") or options.get("return_gates") else []
    return ", ".join(parts) or "plain"


# ---- the plugin


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--list-paths", type=Path, help="a JSON file for what the tests reach in the kernels")


def pytest_sessionstart(session: Any) -> None:
    if session.config.getoption("--list-paths") is None:
        return
    from lstm_ext.native import loader

    recorder = Recorder(loader.extension(), "cpu")
    loader.extension = lambda: recorder
    try:
        import emulated_layer
    except ImportError:
        sys.path.append(str(Path(__file__).parent / "simt"))
        import emulated_layer
    make = emulated_layer.stepwise_module
    emulated_layer.stepwise_module = functools.cache(lambda: Recorder(make(), "emulated"))


def pytest_testnodedown(node: Any) -> None:
    seen.update({tuple(path): count for path, count in node.workeroutput.get("paths", ())})


def pytest_sessionfinish(session: Any) -> None:
    config = session.config
    if config.getoption("--list-paths") is None:
        return
    listed = [[list(path), count] for path, count in sorted(seen.items())]
    if hasattr(config, "workeroutput"):
        config.workeroutput["paths"] = listed
    else:
        config.getoption("--list-paths").parent.mkdir(parents=True, exist_ok=True)
        config.getoption("--list-paths").write_text(json.dumps({"fields": FIELDS, "paths": listed}))


# ---- the program


def read(path: str) -> list[dict[str, str]]:
    text = json.loads(Path(path).read_text())
    return [dict(zip(text["fields"], values, strict=True)) for values, _ in text["paths"]]


def main(files: Sequence[str]) -> int:
    """How many paths of each view a run has, and those of the first run that the last one has not."""
    first, last = (read(file) for file in (files[0], files[-1]))
    all_lost = []
    for device in ("cpu", "emulated", "cuda"):
        for name, fields in VIEWS.items():
            before, after = (
                {tuple(p[f] for f in fields) for p in run if p["device"] == device} for run in (first, last)
            )
            lost = [f"  {' | '.join(path)}" for path in sorted(before - after)]
            print(f"{device}, {name} ({', '.join(fields)}): {len(after)}, {len(lost)} lost", *lost, sep="\n")
            all_lost += lost
    return int(bool(all_lost))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
