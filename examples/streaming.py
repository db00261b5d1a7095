"""A streaming loop: one character at a time, with the state carried on, and a histogram of the latencies.

The stream is the English documentation that every CPython carries (pydoc's topics). A frozen layer computes each
character by `step()`. The same loop runs with the layer as it is and with torch.nn.LSTM. All see the same weights and
characters, and have to give the same results. The run ends with the latencies and their picture. They mean something
only on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import pydoc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import lstm_ext

CHARACTERS = 128  # ASCII
PART = 50  # characters that one side does before the next one's turn
# Results are between -1 and 1. Rounded weights move them by some thousandths of that.
ALLOWED = {"torch.nn.LSTM": 1e-5, "lstm_ext.LSTM": 1e-5, "frozen": 1e-5, "frozen, int8": 5e-2}

State = tuple[Tensor, Tensor]
Step = Callable[[Tensor, State | None], tuple[Tensor, State]]


def stream(count: int) -> Tensor:
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        pydoc.Helper(output=text).showtopic("STRINGS")
        pydoc.Helper(output=text).showtopic("CLASSES")
        pydoc.Helper(output=text).showtopic("OPERATORS")
    codes = [ord(c) for c in text.getvalue() if ord(c) < CHARACTERS]
    return torch.tensor((codes * (1 + count // len(codes)))[:count])


def torchs_step(layer: nn.LSTM) -> Step:
    def step(x: Tensor, state: State | None) -> tuple[Tensor, State]:
        output, state = layer(x[None], state)
        return output[0], state

    return step


class Stream:
    """One side's loop over the characters: its state, its results, and the microseconds of each step."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self.state: State | None = None
        self.outputs: list[Tensor] = []
        self.latencies: list[float] = []

    def run(self, inputs: Tensor) -> None:
        for x_t in inputs:
            begin = time.perf_counter()
            y, self.state = self.step(x_t, self.state)
            self.latencies.append(1e6 * (time.perf_counter() - begin))
            self.outputs.append(y)


def draw(path: Path, latencies: dict[str, list[float]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(latencies), 1, figsize=(8, 5), sharex=True, layout="constrained")
    values = sorted([x for each in latencies.values() for x in each])
    low, high = 0.8 * values[0], 1.5 * values[int(0.999 * len(values))]
    bins = [low * (high / low) ** (n / 80) for n in range(81)]
    for axis, (name, each) in zip(axes, latencies.items(), strict=True):
        axis.hist(each, bins=bins, color="#4477aa")
        axis.axvline(statistics.median(each), color="#dd7722", label=f"{name}: median")
        axis.axvline(sorted(each)[int(0.99 * len(each))], color="#dd7722", ls="--", label="99 %")
        axis.set(xscale="log", yticks=[])
        axis.legend(loc="upper right")
    axes[-1].set_xlabel("microseconds for one character")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=75)


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=3000, help="how many characters")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--quick", action="store_true", help="a few characters")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output" / "streaming.png")
    options = parser.parse_args()
    if options.quick:
        options.count = 200

    torch.manual_seed(0)
    torch.set_num_threads(1)
    layer = lstm_ext.LSTM(32, options.hidden)
    embed = nn.Embedding(CHARACTERS, 32)
    inputs = embed(stream(options.count))[:, None]  # (T, 1, I): a batch of one
    steps: dict[str, Step] = {
        "torch.nn.LSTM": torchs_step(lstm_ext.to_torch(layer)),
        "lstm_ext.LSTM": layer.step,
        "frozen": lstm_ext.freeze(layer).step,
        "frozen, int8": lstm_ext.freeze(layer, torch.int8).step,
    }
    # In float64, by one call on the whole sequence.
    expected = lstm_ext.LSTM(32, options.hidden, dtype=torch.float64)
    expected.load_state_dict(layer.state_dict())
    exact = expected(inputs.double())[0]

    for step in steps.values():
        Stream(step).run(inputs[:50])
    streams = {name: Stream(step) for name, step in steps.items()}
    # In turn, so that a slow moment of the machine meets all sides.
    for part in inputs.split(PART):
        for side in streams.values():
            side.run(part)

    failed = False
    print(f"{'':14}  median  99 %    largest error  (microseconds)")
    for name, side in streams.items():
        error = (torch.stack(side.outputs) - exact).abs().max().item()
        ordered = sorted(side.latencies)
        print(
            f"{name:14}  {statistics.median(ordered):6.1f}  {ordered[int(0.99 * len(ordered))]:6.1f}  {error:.1e}"
        )
        failed |= not error <= ALLOWED[name]
    draw(options.output, {name: side.latencies for name, side in streams.items()})
    print(f"the picture is {options.output}")
    if failed:
        print("error: a result is further from float64 than it may be", file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
