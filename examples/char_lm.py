"""A character language model trained twice: with torch.nn.LSTM and with lstm_ext.LSTM.

The text is the English documentation that every CPython carries (pydoc's topics). Both models start from the
same weights and see the same batches; one line differs, the class of the recurrent layer. The run ends with a
table, a picture and a sample of generated text. Its exit code is 1 if the two trainings differ by more than
float32 rounding explains.

A third run measures how much rounding explains. Training is chaotic, so a difference in the last bit grows with
the number of steps, whatever its cause. The third run trains torch.nn.LSTM from weights that are each moved by one
unit in the last place. lstm_ext may change the curves by FACTOR times as much as that.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from shown import picture, progress_bar
from torch import nn
from torch.nn import functional as F

import lstm_ext

LAYERS = 2
EMBEDDING = 64
LEARNING_RATE = 4e-3
MAX_GRAD_NORM = 1.0
BLOCK = 10  # training steps that one model does before the next one's turn
EARLY_STEPS = 10  # the phase in which a rounding difference has not grown yet

# The bound of the comparison: FACTOR times what one unit in the last place does, plus a floor. The two runs
# are one draw each from the same chaos, hence the factor; the floors are for the draws that happen to come
# out near zero. A relative 1e-5 is about 80 units in the last place; gradients are sums of many terms that
# nearly cancel.
FACTOR = 4.0
LOSS_FLOOR = 1e-5
GRADIENT_FLOOR = 1e-4
CURVE_FLOOR = 1e-3

CLASSES: dict[str, type[nn.Module]] = {"torch": nn.LSTM, "lstm_ext": lstm_ext.LSTM}
NAMES = {
    "torch": "torch.nn.LSTM",
    "lstm_ext": "lstm_ext.LSTM",
    "perturbed": "torch, weights moved by one ulp",
}


class CharModel(nn.Module):
    def __init__(self, lstm_class: type[nn.Module], vocabulary: int, hidden: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, EMBEDDING)
        self.lstm = lstm_class(EMBEDDING, hidden, num_layers=LAYERS)  # the one line that differs
        self.head = nn.Linear(hidden, vocabulary)

    def forward(self, characters, state=None):
        output, state = self.lstm(self.embed(characters), state)
        return self.head(output), state


@dataclass
class Trainee:
    """One model in training, and what was recorded on the way."""

    model: CharModel
    optimizer: torch.optim.Optimizer
    state: tuple[torch.Tensor, torch.Tensor] | None = None
    losses: list[float] = field(default_factory=list)
    # per early step, the gradient norm of each parameter of the LSTM. Adam divides a gradient by its own
    # size, so a gradient that is wrong by a constant factor would hardly show in the losses; here it does.
    early_norms: list[list[float]] = field(default_factory=list)
    block_seconds: list[float] = field(default_factory=list)
    block_speeds: list[float] = field(default_factory=list)  # characters per second


def make_trainee(kind: str, vocabulary: int, options: argparse.Namespace) -> Trainee:
    torch.manual_seed(options.seed)  # the same seed gives the same weights, whichever class
    model = CharModel(CLASSES.get(kind, nn.LSTM), vocabulary, options.hidden)
    if kind == "perturbed":
        generator = torch.Generator().manual_seed(options.seed + 1)
        with torch.no_grad():
            for p in model.parameters():
                up = torch.rand(p.shape, generator=generator) < 0.5
                p.copy_(torch.nextafter(p, torch.where(up, math.inf, -math.inf)))
    return Trainee(model, torch.optim.Adam(model.parameters(), lr=LEARNING_RATE))


def train_step(trainee: Trainee, inputs: torch.Tensor, targets: torch.Tensor) -> None:
    """One window of truncated backpropagation through time: the state is carried on, the graph is not."""
    trainee.optimizer.zero_grad()
    logits, (h, c) = trainee.model(inputs, trainee.state)
    trainee.state = (h.detach(), c.detach())
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    if len(trainee.early_norms) < EARLY_STEPS:
        trainee.early_norms.append([p.grad.norm().item() for p in trainee.model.lstm.parameters()])
    nn.utils.clip_grad_norm_(trainee.model.parameters(), MAX_GRAD_NORM)
    trainee.optimizer.step()
    trainee.losses.append(loss.item())


def load_text(options: argparse.Namespace) -> str:
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    return text[: options.characters] if options.characters else text


def make_windows(ids: torch.Tensor, batch: int, window: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Cut the text into `batch` parallel streams; window k + 1 of a stream goes on where window k ended."""
    length = (len(ids) - 1) // batch
    length -= length % window
    if length == 0:
        raise SystemExit("the text is too short for this batch and window")
    inputs = ids[: batch * length].view(batch, length).t().contiguous()
    targets = ids[1 : batch * length + 1].view(batch, length).t().contiguous()
    return [(inputs[t : t + window], targets[t : t + window]) for t in range(0, length, window)]


def train(trainees: dict[str, Trainee], windows: list, epochs: int) -> None:
    """Train all models side by side, BLOCK steps each in turn.

    The speed of a machine drifts, and other programs come and go: in turns, that hits all models alike. The
    order of the turns rotates, so that no model always runs after the same neighbour.
    """
    order = list(trainees)
    for name in order:  # first use compiles or loads the kernels; that is not training time
        scratch = Trainee(copy.deepcopy(trainees[name].model), trainees[name].optimizer)
        scratch.model(windows[0][0])[0].sum().backward()
    characters_per_step = windows[0][0].numel()
    for epoch in range(epochs):
        for trainee in trainees.values():
            trainee.state = None
        total = len(order) * len(windows) * characters_per_step
        with progress_bar(
            total, f"epoch {epoch + 1}/{epochs}, {len(order)} models", unit="char", unit_scale=True
        ) as bar:
            for first in range(0, len(windows), BLOCK):
                block = windows[first : first + BLOCK]
                for name in order:
                    trainee = trainees[name]
                    start = time.perf_counter()
                    for inputs, targets in block:
                        train_step(trainee, inputs, targets)
                    seconds = time.perf_counter() - start
                    trainee.block_seconds.append(seconds)
                    trainee.block_speeds.append(len(block) * characters_per_step / seconds)
                    bar.update(len(block) * characters_per_step)
                order = order[1:] + order[:1]
                bar.set_postfix(
                    {k: f"{trainees[k].losses[-1]:.3f}" for k in ("torch", "lstm_ext")},
                    refresh=False,
                )


# ---- the comparison ------------------------------------------------------------------------------


def smooth(values: list[float], width: int) -> torch.Tensor:
    """Moving average over `width` steps: what remains when the noise of single batches is gone."""
    return torch.tensor(values, dtype=torch.float64).unfold(0, width, 1).mean(-1)


def smoothing_width(steps: int) -> int:
    return max(1, min(steps, max(5, steps // 20)))


@dataclass
class Check:
    what: str
    found: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.found <= self.allowed  # False for nan


def compare(trainees: dict[str, Trainee], epochs: int) -> list[Check]:
    """Hold lstm_ext against torch with the perturbed run as the measure.

    The early phase is compared step by step and tightly: rounding has not grown yet, so that a gradient wrong
    by a fraction of a percent stands out. Later, single steps of any two runs differ freely; there the
    smoothed curve and the means of the epochs are compared.
    """
    base, ours, moved = (trainees[k] for k in ("torch", "lstm_ext", "perturbed"))
    width = smoothing_width(len(base.losses))

    def early(what: str, other: Trainee) -> float:
        a, b = (torch.tensor(getattr(t, what)[:EARLY_STEPS], dtype=torch.float64) for t in (base, other))
        return ((a - b).abs() / a).max().item()

    def curve_gap(other: Trainee) -> torch.Tensor:
        return (smooth(base.losses, width) - smooth(other.losses, width)).abs()

    def epoch_gap(other: Trainee) -> float:
        return max(
            abs(a - b) for a, b in zip(epoch_losses(base, epochs), epoch_losses(other, epochs), strict=True)
        )

    explained = curve_gap(moved)
    return [
        Check(
            f"loss, first {EARLY_STEPS} steps (relative)",
            early("losses", ours),
            FACTOR * early("losses", moved) + LOSS_FLOOR,
        ),
        Check(
            f"gradient norms, first {EARLY_STEPS} steps (relative)",
            early("early_norms", ours),
            FACTOR * early("early_norms", moved) + GRADIENT_FLOOR,
        ),
        Check(
            f"loss curve, mean of {width} steps",
            curve_gap(ours).max().item(),
            FACTOR * explained.max().item() + CURVE_FLOOR,
        ),
        # Against the mean size of the gap, not the gap of the epoch's means: that one is a sum of ups and
        # downs, and may come out near zero by luck.
        Check("mean loss of an epoch", epoch_gap(ours), FACTOR * explained.mean().item() + CURVE_FLOOR),
    ]


def epoch_losses(trainee: Trainee, epochs: int) -> list[float]:
    steps = len(trainee.losses) // epochs
    return [statistics.fmean(trainee.losses[e * steps : (e + 1) * steps]) for e in range(epochs)]


# ---- peak memory ---------------------------------------------------------------------------------


def memory_status(name: str) -> float:
    """A line of /proc/self/status (VmRSS: memory now, VmHWM: its peak) in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) / 1024
    raise OSError(f"no {name} in /proc/self/status")


def memory_child(kind: str, options: argparse.Namespace) -> None:
    """Runs in a process of its own: print by how many MiB a few training steps raise its peak memory.

    Why the process and not torch's profiler: oneDNN and lstm_ext also allocate workspaces that torch's
    allocator never sees. Why VmHWM and not getrusage: ru_maxrss of a new process starts at the size of its
    parent, and would hide everything below that. A tiny training goes first, so that what is loaded on first
    use (the optimizer's imports, thread stacks) is part of the baseline and not of the layer's bill.
    """
    vocabulary = 128
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (options.batch * options.window * 4 + 1,), generator=generator)
    tiny = make_trainee(kind, vocabulary, argparse.Namespace(seed=0, hidden=8))
    for inputs, targets in make_windows(ids[:100], 2, 4)[:2]:
        train_step(tiny, inputs, targets)
    del tiny
    windows = make_windows(ids, options.batch, options.window)
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from the memory in use now
        before = memory_status("VmRSS")
    except OSError:  # a sandbox may forbid it; the peak of the imports then hides a little, for both alike
        before = memory_status("VmHWM")
    trainee = make_trainee(kind, vocabulary, options)
    for inputs, targets in windows:
        train_step(trainee, inputs, targets)
    print(json.dumps(memory_status("VmHWM") - before))


def peak_memory(options: argparse.Namespace) -> dict[str, float | None]:
    result: dict[str, float | None] = {}
    for kind in CLASSES:
        command = [sys.executable, __file__, "--memory-child", kind]
        for name in ("hidden", "batch", "window", "threads", "seed"):
            command += [f"--{name}", str(getattr(options, name))]
        child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        result[kind] = json.loads(child.stdout) if child.returncode == 0 else None
    return result


# ---- results -------------------------------------------------------------------------------------


@torch.no_grad()
def sample_text(model: CharModel, vocabulary: str, prompt: str, length: int, seed: int) -> tuple[str, float]:
    """Generate text one character at a time; returns it and the characters per second."""
    generator = torch.Generator().manual_seed(seed)
    model.eval()
    h = c = torch.zeros(LAYERS, 1, model.lstm.hidden_size)
    text = prompt
    start = time.perf_counter()
    for i in range(len(prompt) + length - 1):
        x_t = model.embed(torch.tensor([vocabulary.index(text[i])]))
        y, (h, c) = model.lstm.step(x_t, (h, c))
        if i >= len(prompt) - 1:
            probabilities = torch.softmax(
                model.head(y)[0] / 0.7, -1
            )  # below 1: fewer risks, fewer typing errors
            text += vocabulary[torch.multinomial(probabilities, 1, generator=generator).item()]
    return text, (len(prompt) + length - 1) / (time.perf_counter() - start)


def speed(trainee: Trainee) -> float:
    return statistics.median(trainee.block_speeds)


def speed_ratio(trainees: dict[str, Trainee]) -> float:
    """Median of the ratios of neighbouring blocks."""
    pairs = zip(trainees["torch"].block_speeds, trainees["lstm_ext"].block_speeds, strict=True)
    return statistics.median(ours / theirs for theirs, ours in pairs)


def result_table(trainees: dict[str, Trainee], memory: dict[str, float | None], epochs: int) -> str:
    torch_run, our_run = trainees["torch"], trainees["lstm_ext"]
    rows = [("", "torch.nn.LSTM", "lstm_ext.LSTM", "ratio")]
    for e, (a, b) in enumerate(
        zip(epoch_losses(torch_run, epochs), epoch_losses(our_run, epochs), strict=True)
    ):
        rows.append((f"loss, epoch {e + 1}", f"{a:.4f}", f"{b:.4f}", ""))
    rows.append(
        (
            "characters per second (training)",
            f"{speed(torch_run):,.0f}",
            f"{speed(our_run):,.0f}",
            f"{speed_ratio(trainees):.2f}",
        )
    )
    theirs, ours = memory["torch"], memory["lstm_ext"]
    if theirs and ours:
        rows.append(("peak memory of training (MiB)", f"{theirs:.1f}", f"{ours:.1f}", f"{ours / theirs:.2f}"))
    else:
        rows.append(("peak memory of training (MiB)", "not measured", "not measured", ""))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = []
    for row in rows:
        cells = [
            row[0].ljust(widths[0]),
            *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)),
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def draw(plt: Any, trainees: dict[str, Trainee], characters_per_step: int) -> Any:
    base, ours, moved = (trainees[k] for k in ("torch", "lstm_ext", "perturbed"))
    width = smoothing_width(len(base.losses))
    seen = [(i + width) * characters_per_step / 1000 for i in range(len(base.losses) - width + 1)]
    blue, orange, grey = "#4477aa", "#dd7722", "#999999"

    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(13, 4.2), width_ratios=(5, 5, 2.4), layout="constrained"
    )
    left.plot(seen, smooth(base.losses, width), color=blue, lw=5, alpha=0.5, label=NAMES["torch"])
    left.plot(seen, smooth(ours.losses, width), color=orange, lw=1.5, label=NAMES["lstm_ext"])
    left.set(xlabel="thousand characters seen", ylabel="loss (nats per character)")
    left.set_title(f"training loss, mean of {width} steps")
    left.legend()

    for other, color, label in ((moved, grey, NAMES["perturbed"]), (ours, orange, NAMES["lstm_ext"])):
        gap = (smooth(base.losses, width) - smooth(other.losses, width)).abs()
        middle.semilogy(seen, gap.clamp_min(1e-9), color=color, label=label)
    middle.set(xlabel="thousand characters seen", ylabel="|loss - loss of torch.nn.LSTM|")
    middle.set_title("how far the curves part")
    middle.legend()

    speeds = [speed(base), speed(ours)]
    bars = right.bar(["torch.nn", "lstm_ext"], speeds, color=[blue, orange], width=0.6)
    right.bar_label(bars, [f"{s:,.0f}" for s in speeds], padding=2)
    right.set_ylim(0, max(speeds) * 1.12)
    right.set_ylabel("characters per second")
    right.set_title(f"training speed: {speed_ratio(trainees):.2f}x")
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def run(options: argparse.Namespace, tamper: Callable[[nn.Module], None] | None = None) -> int:
    """The whole demonstration; returns the exit code. `tamper` is for the tests: it may spoil the layer."""
    began = time.perf_counter()
    torch.set_num_threads(options.threads)
    text = load_text(options)
    vocabulary = "".join(sorted(set(text)))
    index = {character: i for i, character in enumerate(vocabulary)}
    ids = torch.tensor([index[character] for character in text])
    windows = make_windows(ids, options.batch, options.window)
    print(
        f"{len(text):,} characters, {len(vocabulary)} different ones; {LAYERS} layers of {options.hidden} "
        f"units; batch {options.batch}, windows of {options.window} characters, {options.epochs} epochs of "
        f"{len(windows)} steps; {options.threads} threads",
        flush=True,
    )

    trainees = {
        kind: make_trainee(kind, len(vocabulary), options) for kind in ("torch", "lstm_ext", "perturbed")
    }
    ours, theirs = (trainees[k].model.state_dict() for k in ("lstm_ext", "torch"))
    if ours.keys() != theirs.keys() or not all(torch.equal(ours[k], theirs[k]) for k in theirs):
        print("error: the same seed gave the two models different weights", file=sys.stderr)
        return 1
    if tamper is not None:
        tamper(trainees["lstm_ext"].model.lstm)
    train(trainees, windows, options.epochs)
    memory = peak_memory(options)

    print("\n" + result_table(trainees, memory, options.epochs))
    picture(options.output, draw, trainees, windows[0][0].numel(), dpi=120)
    sample, per_second = sample_text(
        trainees["lstm_ext"].model, vocabulary, "The ", options.sample, options.seed
    )
    print(f"\nText sampled from the lstm_ext model with step(), {per_second:,.0f} characters per second:\n")
    print("    " + sample.replace("\n", "\n    "))

    checks = compare(trainees, options.epochs)
    print("\nDifference between lstm_ext and torch, and how much float32 explains:")
    for check in checks:
        verdict = "ok" if check.passed else "TOO LARGE"
        print(f"  {check.what:<42} {check.found:.1e}   allowed {check.allowed:.1e}   {verdict}")
    print(f"\n{time.perf_counter() - began:.0f} seconds in all.", flush=True)

    failed = [check.what for check in checks if not check.passed]
    if failed:
        print(
            "\nerror: the two trainings part by more than float32 rounding explains "
            f"({'; '.join(failed)}). The bound is {FACTOR:g} times what moving every initial weight by one "
            "unit in the last place does to torch.nn.LSTM itself, plus a small floor. A result or a gradient of "
            "lstm_ext.LSTM is wrong.",
            file=sys.stderr,
        )
    return 1 if failed else 0


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a character model with torch.nn.LSTM and lstm_ext.LSTM."
    )
    parser.add_argument("--epochs", type=int, help="passes over the text (default 2)")
    parser.add_argument("--hidden", type=int, help="units per layer (default 256)")
    parser.add_argument("--batch", type=int, help="parallel streams of text (default 32)")
    parser.add_argument("--window", type=int, help="characters per training step and stream (default 32)")
    parser.add_argument("--characters", type=int, help="use only the first so many (default: the whole text)")
    parser.add_argument("--sample", type=int, help="characters to generate at the end (default 500)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--quick", action="store_true", help="seconds instead of minutes; the text will be poor"
    )
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "output" / "char_lm.png", help="the picture"
    )
    parser.add_argument("--memory-child", choices=list(CLASSES), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    sizes = {"epochs": 2, "hidden": 256, "batch": 32, "window": 32, "characters": 0, "sample": 500}
    if options.quick:
        sizes = {"epochs": 2, "hidden": 32, "batch": 8, "window": 16, "characters": 12_000, "sample": 100}
    for name, value in sizes.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def main() -> int:
    options = parse_options()
    if options.memory_child:
        torch.set_num_threads(options.threads)
        memory_child(options.memory_child, options)
        return 0
    return run(options)


if __name__ == "__main__":
    sys.exit(main())
