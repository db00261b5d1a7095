"""What the options cost on the CPU, in time and in memory: the layer with one against the layer without.

    python benchmarks/bench_options.py [--only GROUP ...] [--shapes NAME ...] [--threads N ...] [--budget SECONDS]
                                      [--output results/NAME.json]

time    a call of the layer with the option over one without; the time includes drawing random masks;
        layer_norm, recompute is over layer_norm
memory  bytes that a layer with recompute=True saves for its backward pass beyond input, output and weights, and the
        peak of a training step, both over those without
step    microseconds of one step with carried state: the kernel's function, LSTMCell, LSTM.step, and torch.nn.LSTMCell

The process keeps freed memory for the measurement: see `harness.keep_freed_memory`.

Nothing fails here: what a busy machine measures is no verdict.
"""

from __future__ import annotations

from collections.abc import Callable

import harness
import torch
from shapes import TASKS, Shape
from torch import nn

import lstm_ext
from lstm_ext.native import loader

STEPS = {"small": Shape(1, 1, 32, 64), "speech": Shape(1, 1, 80, 128), "large": Shape(1, 1, 256, 256)}
OPTIONS: dict[str, dict] = {
    "recurrent_dropout=0.25": {"recurrent_dropout": 0.25},
    "zoneout=0.1": {"zoneout": 0.1},
    "zoneout=(0.1, 0.1)": {"zoneout": (0.1, 0.1)},
    "layer_norm": {"layer_norm": True},
    "recompute": {"recompute": True},
    "layer_norm, recompute": {"layer_norm": True, "recompute": True},
}
CALLS: dict[str, Callable[[Shape], dict]] = {
    "resets": lambda shape: {"resets": torch.rand(shape.steps, shape.batch) < 0.03},
    "return_cell_states": lambda shape: {"return_cell_states": True},
}
# A training step with the option costs at most so many times one without.
TARGETS = {
    "recurrent_dropout=0.25": 1.2,
    "zoneout=0.1": 1.2,
    "zoneout=(0.1, 0.1)": 1.2,
    "layer_norm": 1.6,
    "recompute": 1.5,
    "layer_norm, recompute": 1.5,
    "resets": 1.05,
}


class Called(nn.Module):
    """A layer that is always called with the same keyword arguments."""

    def __init__(self, layer: nn.Module, **arguments: object) -> None:
        super().__init__()
        self.layer = layer
        self.hidden_size = layer.hidden_size
        self.arguments = arguments

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.layer(x, **self.arguments)


def layer_of(shape: Shape, **options: object) -> nn.Module:
    torch.manual_seed(0)
    return lstm_ext.LSTM(shape.input_size, shape.hidden_size, **options)


def with_and_without(name: str, shape: Shape) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(1)
    without = layer_of(shape, layer_norm=True) if name == "layer_norm, recompute" else layer_of(shape)
    if name in CALLS:
        return Called(layer_of(shape), **CALLS[name](shape)), without
    return layer_of(shape, **OPTIONS[name]), without


def time_of(shape: Shape, threads: int, budget: float) -> list[dict]:
    results = []
    for name in (*OPTIONS, *CALLS):
        for training in (False, True):
            if "recompute" in name and not training:
                continue  # there is nothing to keep
            call = harness.training_call if training else harness.inference_call
            sides = [call(layer.train(), shape) for layer in with_and_without(name, shape)]
            comparison = harness.compare(*sides, budget)
            times = {"with": comparison.torch.median, "without": comparison.ours.median}
            figures = {"cost": comparison.ratio, "milliseconds": times, "repeats": comparison.repeats}
            results.append({"option": name, "training": training, **figures})
    return results


def saved_bytes(layer: nn.Module, shape: Shape) -> int:
    """Of storages that a graph keeps, each once, without those of input, output and weights."""
    x = torch.randn(shape.steps, shape.batch, shape.input_size, requires_grad=True)
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        output = layer(x)[0]
    for known in (x, output, *layer.parameters()):
        kept.pop(known.untyped_storage().data_ptr(), None)
    return sum(kept.values())


def memory_of(shape: Shape, threads: int, budget: float) -> list[dict]:
    results = []
    for name, other in [("recompute", "none"), ("layer_norm, recompute", "layer_norm")]:
        options = OPTIONS.get(other, {})
        both = {"with": OPTIONS[name], "without": options}
        saved = {side: saved_bytes(layer_of(shape, **o), shape) for side, o in both.items()}
        peaks = {side: harness.peak_memory("ours", shape, threads, o) for side, o in both.items()}
        ratios = {key: b["with"] / b["without"] for key, b in (("saved", saved), ("peak", peaks))}
        results.append({"option": name, **ratios, "bytes_saved": saved, "bytes_at_peak": peaks})
    return results


def step_of(shape: Shape, threads: int, budget: float) -> list[dict]:
    torch.manual_seed(0)
    theirs = nn.LSTMCell(shape.input_size, shape.hidden_size)
    cell = lstm_ext.LSTMCell(shape.input_size, shape.hidden_size)
    cell.load_state_dict(theirs.state_dict())
    layer = layer_of(shape)
    x = torch.randn(shape.batch, shape.input_size)
    h, c = (torch.randn(shape.batch, shape.hidden_size) for _ in range(2))
    hx = (h[None], c[None])
    arguments = (x[None], *hx, list(cell.parameters()), None, True, False, None, False)
    kernel = loader.extension().lstm_layer_forward

    def inferring(function: Callable[[], object]) -> Callable[[], object]:
        def call() -> object:
            with torch.inference_mode():
                return function()

        return call

    sides = {
        "LSTMCell": inferring(lambda: cell(x, (h, c))),
        "LSTM.step": inferring(lambda: layer.step(x, hx)),
        "torch.nn.LSTMCell": inferring(lambda: theirs(x, (h, c))),
    }
    alone = inferring(lambda: kernel(*arguments))
    results = []
    for name, side in sides.items():
        comparison = harness.compare(side, alone, budget)
        took, kernel_took = (1e3 * t.median for t in (comparison.torch, comparison.ours))
        times = {
            "microseconds": took,
            "kernel_microseconds": kernel_took,
            "beyond_the_kernel": took - kernel_took,
        }
        results.append({"call": name, **times})
    return results


MEASURE = {"time": time_of, "memory": memory_of, "step": step_of}


def main() -> None:
    parser = harness.options_of(__doc__, TASKS, budget=2.0)
    parser.add_argument("--only", nargs="+", choices=MEASURE, default=list(MEASURE), metavar="GROUP")
    options = parser.parse_args()

    facts = {**harness.facts(), "freed_memory_kept": harness.keep_freed_memory()}
    results = []
    for group in options.only:
        shapes = STEPS if group == "step" else {name: TASKS[name] for name in options.shapes}
        for threads in [1] if group == "step" else options.threads:
            for name, shape in shapes.items():
                torch.set_num_threads(threads)
                for figures in MEASURE[group](shape, threads, options.budget):
                    case = {"group": group, "shape": name, **shape._asdict(), "threads": threads, **figures}
                    results.append(case)
                    harness.show(case, figures)
    for option, target in TARGETS.items():
        costs = [r["cost"] for r in results if r.get("option") == option and r.get("training")]
        if costs:
            print(
                f"{option}: a training step costs {harness.geometric_mean(costs):.2f} in the mean, "
                f"at most {max(costs):.2f} (target: at most {target})"
            )
    harness.write(options.output, {"facts": facts, "targets": TARGETS, "results": results})


if __name__ == "__main__":
    main()
