"""A streaming loop: one character at a time, with the state carried on, and a histogram of the latencies.

The stream is the English documentation that every CPython carries (pydoc's topics). A frozen layer computes each
character by `step()`. The same loop runs with the layer as it is and with torch.nn.LSTM. All see the same weights and
characters, and have to give the same results. The run ends with the latencies, as a histogram of text and as a picture.
They mean something only on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import copy
import io
import math
import pydoc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from shown import picture
from torch import Tensor, nn

import lstm_ext

CHARACTERS = 128  # ASCII
PART = 50  # characters that one side does before the next one's turn
# Results are between -1 and 1. Rounded weights move them by some thousandths of that.
ALLOWED = {"torch.nn.LSTM": 1e-5, "lstm_ext.LSTM": 1e-5, "frozen": 1e-5, "frozen, int8": 5e-2}
COLUMNS = 60  # of the histogram of text
BARS = "▁▂▃▄▅▆▇█"

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


def torch_step(layer: nn.LSTM) -> Step:
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


def at(latencies: list[float], share: float) -> float:
    """The time that this share of the steps does not exceed."""
    return sorted(latencies)[int(share * len(latencies))]


def edges_of(latencies: dict[str, list[float]], count: int) -> list[float]:
    """The edges of so many bins, of equal width on a logarithmic axis: all but one step in a thousand is in them."""
    values = [x for each in latencies.values() for x in each]
    low, high = 0.8 * min(values), 1.5 * at(values, 0.999)
    return [low * (high / low) ** (n / count) for n in range(count + 1)]


def histogram(latencies: dict[str, list[float]]) -> str:
    """A line of text for each side, with a column for each bin, and the axis below them. The last bin has the rest."""
    edges = edges_of(latencies, COLUMNS)
    lines = []
    for name, each in latencies.items():
        counts = [0] * COLUMNS
        for x in each:
            counts[min(bisect.bisect_right(edges, x), COLUMNS) - 1] += 1
        heights = [math.ceil(len(BARS) * n / max(counts)) for n in counts]
        lines.append(f"{name:14}|" + "".join([" ", *BARS][height] for height in heights) + "|")
    marks = list(" " * (COLUMNS + 8))
    free = 0
    for value in [digit * 10**power for power in range(6) for digit in (1, 2, 5)]:
        place = bisect.bisect_right(edges, value) - 1
        if free <= place < COLUMNS and value >= edges[0]:
            marks[place : place + len(str(value))] = str(value)
            free = place + len(str(value)) + 1
    return "\n".join([*lines, f"{'microseconds':14} {''.join(marks).rstrip()}"])


def draw(plt: Any, latencies: dict[str, list[float]]) -> Any:
    figure, axes = plt.subplots(len(latencies), 1, figsize=(8, 5), sharex=True, layout="constrained")
    edges = edges_of(latencies, 80)
    for axis, (name, each) in zip(axes, latencies.items(), strict=True):
        axis.hist(each, bins=edges, color="#4477aa")
        axis.axvline(statistics.median(each), color="#dd7722", label="median")
        axis.axvline(at(each, 0.99), color="#dd7722", ls="--", label="99 %")
        axis.set(xscale="log", yticks=[])
        axis.set_title(name, loc="left", fontsize="medium")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    axes[-1].set_xlabel("microseconds for one character")
    return figure


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
        "torch.nn.LSTM": torch_step(lstm_ext.revert(copy.copy(layer))),
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
        median = statistics.median(side.latencies)
        print(f"{name:14}  {median:6.1f}  {at(side.latencies, 0.99):6.1f}  {error:.1e}")
        failed |= not error <= ALLOWED[name]
    latencies = {name: side.latencies for name, side in streams.items()}
    print(f"\nhow many characters took how long, of {options.count}; the axis is logarithmic")
    print(histogram(latencies))
    picture(options.output, draw, latencies)
    if failed:
        print("error: a result is further from float64 than it may be", file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
