"""What the tests reach: every way through the kernels that some call took, on the CPU and in the emulator.

    make test ARGS='-p paths --list-paths build/paths.json'        # lists them, with the number of calls
    python tests/paths.py build/paths.json                          # as a table
    python tests/paths.py before.json build/paths.json              # and what has been lost

A path is what the kernels decide on: the instruction set, the dtype, the pass, the grid of workers, whether weights are
packed, the kind of data, what a step does, projection, directions. pytest finds the module with tests/ on PYTHONPATH.
"""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
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


class Recorder:
    """The extension, or the emulated layer, with a note of each call."""

    def __init__(self, module: Any, device: str) -> None:
        self._module, self._device = module, device
        self._options: dict[int, dict[str, Any]] = {}

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        if name == "LayerOptions":
            return self._layer_options
        if name in ("lstm_module", "lstm_cell_module"):
            return lambda *_: None  # declined: what Python calls in their place is noted
        if name in ("lstm_layer", "lstm_cell"):
            return self._layer if name == "lstm_layer" else self._cell
        if name == "lstm_layer_forward":
            return self._forward
        if name == "lstm_layer_backward":
            return self._backward
        return value

    def _layer_options(self, **options: Any) -> Any:
        made = self._module.LayerOptions(**options)
        self._options[id(made)] = options
        return made

    def _layer(self, *arguments: Any) -> Any:
        return self._noted(self._module.lstm_layer(*arguments), arguments)

    def _cell(self, input: Any, h: Any, c: Any, weights: Any, bias: bool) -> Any:
        layer = (input.unsqueeze(0), h, c, weights, None, bias, False, None)
        return self._noted(self._module.lstm_cell(input, h, c, weights, bias), layer)

    def _noted(self, results: Any, arguments: Sequence[Any]) -> Any:
        """The backward pass of the results is noted when it runs."""
        node = results[0].grad_fn
        self._note(arguments, "inference" if node is None else "training")
        if node is not None:
            node.register_prehook(lambda _: self._note(arguments, "backward"))
        return results

    def _forward(self, *arguments: Any) -> Any:
        self._note(arguments, "training" if arguments[8] else "inference")
        return self._module.lstm_layer_forward(*arguments)

    def _backward(self, *arguments: Any) -> Any:
        self._note(arguments, "backward")
        return self._module.lstm_layer_backward(*arguments)

    def _note(self, arguments: Sequence[Any], kind: str) -> None:
        input, _, _, weights, batch_sizes, _, bidirectional, options = arguments[:8]
        set_ = self._options.get(id(options), {}) if options is not None else {}
        try:
            seen[self._path(input, weights, batch_sizes, bidirectional, set_, kind)] += 1
        except (RuntimeError, ValueError, IndexError, AttributeError):
            pass  # bad input, which the kernels refuse

    def _path(
        self,
        input: Any,
        weights: Any,
        batch_sizes: Any,
        bidirectional: bool,
        options: dict[str, Any],
        kind: str,
    ) -> tuple[str, ...]:
        import torch

        proj_size = weights[1].size(1) if weights[1].size(1) * 4 < weights[1].size(0) else 0
        capability, workers, layout, chunks = "", "", "", ""
        if self._device == "cpu" and not input.is_cuda:
            capability = self._module.cpu_capability()
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
            workers, layout, chunks = planned(plan, input.numel() // max(1, input.size(-1)), kind)
        data = "dense" if batch_sizes is None else "packed"
        if options.get("lengths") is not None:
            data = "lengths"
        if options.get("resets") is not None:
            data += ", resets"
        return (
            self._device if not input.is_cuda else "cuda",
            capability,
            str(input.dtype).removeprefix("torch."),
            kind,
            workers,
            layout,
            chunks,
            data,
            step_of(options),
            "projected" if proj_size else "",
            "2" if bidirectional else "1",
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
    emulated_layer.stepwise_module = recorded(emulated_layer.stepwise_module)


def recorded(make: Callable[[], Any]) -> Callable[[], Recorder]:
    made: list[Recorder] = []

    def module() -> Recorder:
        if not made:
            made.append(Recorder(make(), "emulated"))
        return made[0]

    return module


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


def viewed(paths: list[dict[str, str]], device: str, fields: Sequence[str]) -> set[tuple[str, ...]]:
    return {tuple(p[f] for f in fields) for p in paths if p["device"] == device}


def main(files: Sequence[str]) -> int:
    runs = [read(file) for file in files]
    lost: dict[str, list[str]] = defaultdict(list)
    print("| device | view | " + " | ".join(files) + " | lost |")
    print("|---|---|" + "---|" * (len(files) + 1))
    for device in ("cpu", "emulated", "cuda"):
        for name, fields in VIEWS.items():
            found = [viewed(run, device, fields) for run in runs]
            if not any(found):
                continue
            missing = sorted(found[0] - found[-1])
            lost[f"{device}, {name} ({', '.join(fields)})"] += [" | ".join(path) for path in missing]
            print(f"| {device} | {name} | {' | '.join(str(len(f)) for f in found)} | {len(missing)} |")
    for name, missing in lost.items():
        if missing:
            print(f"\nlost: {name}", *missing, sep="\n  ")
    return 1 if any(lost.values()) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
