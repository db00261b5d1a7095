"""Recurrent PPO trained twice: sequences by one call with `resets`, and by the usual loop over the steps.

The task needs memory: the first observation of an episode shows a symbol, and the last one asks for it; between
them, 3 to 19 steps later, other symbols pass by. No policy without memory gets a mean return above 1 / SYMBOLS.
Episodes begin and end inside the rollouts, so a state is replaced by zeros where an episode begins.

The two models differ in how the update does that. One is a torch.nn.LSTM, called once per step with the states
multiplied by (1 - done), as in CleanRL's ppo_atari_lstm. The other is an lstm_ext.LSTM, called once, with `resets`.
Both start from the same weights, and environments, actions and minibatches come from the same random numbers, so that
they differ only by rounding. The run ends with a table and a picture. Its exit code is 1 if they differ by more than
that, or if a model does not learn the task.

A third run measures how much rounding explains: it uses `resets`, from initial weights that are each moved by one unit
in the last place. The two models may differ by FACTOR times as much as that, plus a floor.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from char_lm import Check
from shown import picture, progress_bar
from torch import Tensor, nn
from torch.nn import functional as F

import lstm_ext

SYMBOLS = 4
OBSERVATION = SYMBOLS + 2  # a symbol, and the two marks "first step" and "now answer"
LENGTHS = (4, 20)  # steps of an episode
DISCOUNT, GAE_LAMBDA = 0.95, 0.95
EPOCHS, MINIBATCHES = 4, 4
CLIP, VALUE_WEIGHT, ENTROPY_WEIGHT = 0.2, 0.5, 0.003
LEARNING_RATE, MAX_GRAD_NORM = 3e-3, 0.5
UPDATES = 50  # in which the task is learned
SOLVED = 0.9  # of 1
EARLY_STEPS, EARLY_UPDATES = EPOCHS * MINIBATCHES, 5  # in which a rounding difference has not grown yet

FACTOR = 4.0
LOSS_FLOOR = 1e-5
GRADIENT_FLOOR = 1e-4
RETURN_FLOOR = 0.02  # a few episodes of an update's three hundred

NAMES = {
    "loop": "torch.nn.LSTM, loop over steps",
    "resets": "lstm_ext.LSTM, resets",
    "perturbed": "resets, weights moved by one ulp",
}
State = tuple[Tensor, Tensor]


def number(mask: Tensor) -> Tensor:
    return mask.to(torch.get_default_dtype())


class Recall:
    """`count` environments side by side. What they show does not depend on the actions; the rewards do."""

    def __init__(self, count: int, generator: torch.Generator) -> None:
        self.generator = generator
        self.cue, self.length, self.age = torch.zeros(3, count, dtype=torch.long)
        self.begin(torch.ones(count, dtype=torch.bool))

    def begin(self, where: Tensor) -> None:
        def draw(low: int, high: int) -> Tensor:
            return torch.randint(low, high, where.shape, generator=self.generator)

        self.cue = torch.where(where, draw(0, SYMBOLS), self.cue)
        self.length = torch.where(where, draw(LENGTHS[0], LENGTHS[1] + 1), self.length)
        self.age = torch.where(where, 0, self.age + 1)
        self.first, self.last = self.age == 0, self.age == self.length - 1
        self.shown = torch.where(self.first, self.cue, draw(0, SYMBOLS))

    def observe(self) -> Tensor:
        """(count, OBSERVATION)"""
        marks = torch.stack([self.first, self.last], -1)
        return number(torch.cat([F.one_hot(self.shown, SYMBOLS), marks], -1))

    def step(self, actions: Tensor) -> Tensor:
        """The rewards, (count,); an episode that has ended is followed by the next one's first observation."""
        rewards = number(self.last & (actions == self.cue))
        self.begin(self.last)
        return rewards


class ActorCritic(nn.Module):
    """One LSTM and two heads. `unroll` runs sequences, `step` a single step; in both `first` marks beginnings."""

    lstm_class: type[nn.Module]

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.lstm = self.lstm_class(OBSERVATION, hidden)
        with torch.no_grad():  # forget little at first: what forget_bias=1.0 of lstm_ext.LSTM does
            self.lstm.bias_ih_l0[hidden : 2 * hidden] = 1.0
            self.lstm.bias_hh_l0[hidden : 2 * hidden] = 0.0
        self.actor = nn.Linear(hidden, SYMBOLS)
        self.critic = nn.Linear(hidden, 1)

    def heads(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return torch.log_softmax(self.actor(y), -1), self.critic(y).squeeze(-1)


class WithResets(ActorCritic):
    lstm_class = lstm_ext.LSTM

    def step(self, x: Tensor, first: Tensor, state: State) -> tuple[Tensor, State]:
        """(B, OBSERVATION), (B,) -> (B, H)"""
        return self.lstm.step(x, tuple(torch.where(first[:, None], 0.0, s) for s in state))

    def unroll(self, x: Tensor, first: Tensor, state: State) -> Tensor:
        """(T, B, OBSERVATION), (T, B) -> (T, B, H)"""
        return self.lstm(x, state, resets=first)[0]


class ByLoop(ActorCritic):
    lstm_class = nn.LSTM

    def step(self, x: Tensor, first: Tensor, state: State) -> tuple[Tensor, State]:
        keep = 1.0 - number(first)[None, :, None]
        y, state = self.lstm(x[None], tuple(keep * s for s in state))
        return y[0], state

    def unroll(self, x: Tensor, first: Tensor, state: State) -> Tensor:
        outputs = []
        for x_t, first_t in zip(x, first, strict=True):
            y, state = self.step(x_t, first_t, state)
            outputs.append(y)
        return torch.stack(outputs)


@dataclass
class Rollout:
    """T steps of B environments: (T, B, ...), the state before the first step, and the value after the last."""

    x: Tensor
    first: Tensor
    actions: Tensor
    log_probs: Tensor
    values: Tensor
    rewards: Tensor
    state: State
    next_value: Tensor
    next_first: Tensor


class Trainee:
    """One model in training with its environments and random numbers, and what was recorded on the way."""

    def __init__(self, kind: str, options: argparse.Namespace) -> None:
        torch.manual_seed(options.seed)  # the same seed gives the same weights, whichever class
        self.model = ByLoop(options.hidden) if kind == "loop" else WithResets(options.hidden)
        self.generator = torch.Generator().manual_seed(options.seed)
        self.environments = Recall(options.environments, torch.Generator().manual_seed(options.seed + 1))
        self.state = torch.zeros(2, 1, options.environments, options.hidden).unbind()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=LEARNING_RATE, eps=1e-5)
        self.returns: list[float] = []
        self.early_losses: list[float] = []
        self.early_norms: list[list[float]] = []  # of the gradients of all parameters
        self.first_gradients: list[Tensor] = []
        self.seconds: dict[str, list[float]] = {"rollout": [], "update": []}
        if kind == "perturbed":
            generator = torch.Generator().manual_seed(options.seed + 2)
            with torch.no_grad():
                for p in self.model.parameters():
                    up = torch.rand(p.shape, generator=generator) < 0.5
                    p.copy_(torch.nextafter(p, torch.where(up, math.inf, -math.inf)))


@torch.no_grad()
def collect(trainee: Trainee, steps: int) -> Rollout:
    model, environments, state = trainee.model, trainee.environments, trainee.state
    before, rows = state, []
    for _ in range(steps):
        x, first = environments.observe(), environments.first
        y, state = model.step(x, first, state)
        log_probs, values = model.heads(y)
        # By hand, with one number drawn per action: a rounding difference then changes almost no action.
        draw = torch.rand(len(x), 1, generator=trainee.generator)
        actions = (draw > log_probs.exp().cumsum(-1)).sum(-1).clamp_max(SYMBOLS - 1)
        rewards = environments.step(actions)
        rows.append((x, first, actions, log_probs.gather(-1, actions[:, None])[:, 0], values, rewards))
    trainee.state = state
    y, _ = model.step(environments.observe(), environments.first, state)
    stacked = [torch.stack(column) for column in zip(*rows, strict=True)]
    return Rollout(*stacked, before, model.heads(y)[1], environments.first)


def advantages_of(rollout: Rollout) -> Tensor:
    """Generalised advantage estimation, (T, B). Nothing is expected from beyond the end of an episode."""
    result = torch.zeros_like(rollout.rewards)
    advantage, value, first = torch.zeros_like(rollout.next_value), rollout.next_value, rollout.next_first
    for t in reversed(range(len(result))):
        continues = 1.0 - number(first)
        delta = rollout.rewards[t] + DISCOUNT * continues * value - rollout.values[t]
        result[t] = advantage = delta + DISCOUNT * GAE_LAMBDA * continues * advantage
        value, first = rollout.values[t], rollout.first[t]
    return result


def loss_of(model: ActorCritic, rollout: Rollout, advantages: Tensor, rows: Tensor) -> Tensor:
    """The clipped loss of a minibatch: some environments, all of their steps in order."""
    state = tuple(s[:, rows] for s in rollout.state)
    y = model.unroll(rollout.x[:, rows], rollout.first[:, rows], state)
    log_probs, values = model.heads(y)
    chosen = log_probs.gather(-1, rollout.actions[:, rows, None]).squeeze(-1)
    ratio = (chosen - rollout.log_probs[:, rows]).exp()
    gain = advantages[:, rows]
    targets = gain + rollout.values[:, rows]
    gain = (gain - gain.mean()) / (gain.std() + 1e-8)
    policy_loss = -torch.min(gain * ratio, gain * ratio.clamp(1 - CLIP, 1 + CLIP)).mean()
    value_loss = 0.5 * (values - targets).square().mean()
    entropy = -(log_probs.exp() * log_probs).sum(-1).mean()
    return policy_loss + VALUE_WEIGHT * value_loss - ENTROPY_WEIGHT * entropy


def update(trainee: Trainee, rollout: Rollout) -> None:
    advantages = advantages_of(rollout)
    count = advantages.size(1)
    for _ in range(EPOCHS):
        for rows in torch.randperm(count, generator=trainee.generator).chunk(MINIBATCHES):
            trainee.optimizer.zero_grad()
            loss = loss_of(trainee.model, rollout, advantages, rows)
            loss.backward()
            if len(trainee.early_losses) < EARLY_STEPS:
                gradients = [p.grad for p in trainee.model.parameters()]
                if not trainee.early_losses:
                    trainee.first_gradients = [g.clone() for g in gradients]
                trainee.early_losses.append(loss.item())
                trainee.early_norms.append([g.norm().item() for g in gradients])
            nn.utils.clip_grad_norm_(trainee.model.parameters(), MAX_GRAD_NORM)
            trainee.optimizer.step()


def train(trainees: dict[str, Trainee], options: argparse.Namespace) -> None:
    """One update of each model in turn, in an order that rotates: what disturbs the machine disturbs all alike."""
    order = list(trainees)
    with progress_bar(options.updates, f"updates of {len(order)} models") as bar:
        for i in range(options.updates):
            for name in order:
                trainee = trainees[name]
                trainee.optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - i / options.updates)
                start = time.perf_counter()
                rollout = collect(trainee, options.steps)
                middle = time.perf_counter()
                update(trainee, rollout)
                trainee.seconds["rollout"].append(middle - start)
                trainee.seconds["update"].append(time.perf_counter() - middle)
                ended = rollout.x[..., -1].sum().item()
                trainee.returns.append(rollout.rewards.sum().item() / max(1, ended))
            order = order[1:] + order[:1]
            bar.set_postfix({k: f"{trainees[k].returns[-1]:.3f}" for k in ("loop", "resets")}, refresh=False)
            bar.update()


# ---- the comparison ------------------------------------------------------------------------------


def final_return(trainee: Trainee) -> float:
    return statistics.fmean(trainee.returns[-max(1, len(trainee.returns) // 8) :])


def compare(trainees: dict[str, Trainee], options: argparse.Namespace) -> list[Check]:
    """Hold `resets` against the loop, with the perturbed run against `resets` as the measure."""
    loop, ours, moved = (trainees[k] for k in ("loop", "resets", "perturbed"))

    def check(what: str, gap: Callable[[Trainee, Trainee], float], floor: float) -> Check:
        return Check(what, gap(loop, ours), FACTOR * gap(ours, moved) + floor)

    def first_gradients(a: Trainee, b: Trainee) -> float:
        pairs = zip(a.first_gradients, b.first_gradients, strict=True)
        return max(((p - q).abs().max() / p.abs().max()).item() for p, q in pairs)

    def losses(a: Trainee, b: Trainee) -> float:
        return (torch.tensor(a.early_losses) - torch.tensor(b.early_losses)).abs().max().item()

    def norms(a: Trainee, b: Trainee) -> float:
        p, q = (torch.tensor(t.early_norms, dtype=torch.float64) for t in (a, b))
        return ((p - q).abs() / p).max().item()

    def returns(a: Trainee, b: Trainee) -> float:
        pairs = zip(a.returns[:EARLY_UPDATES], b.returns[:EARLY_UPDATES], strict=True)
        return max(abs(p - q) for p, q in pairs)

    checks = [
        check("gradients of the first minibatch (relative)", first_gradients, GRADIENT_FLOOR),
        check("losses in the first update", losses, LOSS_FLOOR),
        check("gradient norms in the first update (relative)", norms, GRADIENT_FLOOR),
        check(f"returns of the first {EARLY_UPDATES} updates", returns, RETURN_FLOOR),
    ]
    if options.updates >= UPDATES:
        final = [final_return(t) for t in (loop, ours)]
        checks.append(Check("final returns", abs(final[0] - final[1]), 2 * RETURN_FLOOR))
        checks.append(Check("what is missing to a return of 1", 1 - min(final), 1 - SOLVED))
    return checks


# ---- results -------------------------------------------------------------------------------------


def milliseconds(trainee: Trainee, what: str) -> float:
    return 1e3 * statistics.median(trainee.seconds[what])


def update_ratio(trainees: dict[str, Trainee]) -> float:
    """Median of the ratios of neighbouring updates."""
    pairs = zip(trainees["loop"].seconds["update"], trainees["resets"].seconds["update"], strict=True)
    return statistics.median(theirs / ours for theirs, ours in pairs)


def result_table(trainees: dict[str, Trainee]) -> str:
    loop, ours = trainees["loop"], trainees["resets"]
    rows = [("", "torch, loop", "lstm_ext, resets", "ratio")]
    rows.append(
        ("return, last eighth of the updates", f"{final_return(loop):.3f}", f"{final_return(ours):.3f}", "")
    )
    for what in ("update", "rollout"):
        a, b = milliseconds(loop, what), milliseconds(ours, what)
        ratio = update_ratio(trainees) if what == "update" else a / b
        rows.append((f"time of one {what} (ms)", f"{a:.1f}", f"{b:.1f}", f"{ratio:.2f}"))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def draw(plt: Any, trainees: dict[str, Trainee]) -> Any:
    loop, ours, moved = (trainees[k] for k in ("loop", "resets", "perturbed"))
    blue, orange, grey = "#4477aa", "#dd7722", "#999999"
    updates = range(1, len(loop.returns) + 1)
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(13, 4.8), width_ratios=(5, 5, 2.4), layout="constrained"
    )
    left.axhline(1 / SYMBOLS, color=grey, ls="--", lw=1)
    left.annotate(
        "bound without memory", (updates[-1], 1 / SYMBOLS), (0, -11), textcoords="offset points", ha="right"
    )
    left.plot(updates, loop.returns, color=blue, lw=5, alpha=0.5, label=NAMES["loop"])
    left.plot(updates, ours.returns, color=orange, lw=1.5, label=NAMES["resets"])
    left.set(xlabel="updates", ylabel="mean return of the episodes", ylim=(0, 1.03))
    left.set_title("return")

    for a, b, color, label in ((ours, moved, grey, NAMES["perturbed"]), (loop, ours, orange, "loop, resets")):
        gap = [abs(p - q) for p, q in zip(a.returns, b.returns, strict=True)]
        middle.plot(updates, gap, color=color, label=label)
    middle.set(xlabel="updates", ylabel="|difference of the returns|")
    middle.set_title("how far the curves part")

    times = [milliseconds(t, "update") for t in (loop, ours)]
    bars = right.bar(["torch,\nloop", "lstm_ext,\nresets"], times, color=[blue, orange], width=0.6)
    right.bar_label(bars, [f"{t:,.0f}" for t in times], padding=2)
    right.set_ylim(0, max(times) * 1.12)
    right.set_ylabel("milliseconds")
    right.set_title(f"time of an update: {update_ratio(trainees):.1f}x")
    for axes in (left, middle):  # below, where no curve can be
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), frameon=False)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def run(options: argparse.Namespace, tamper: Callable[[WithResets], None] | None = None) -> int:
    """The whole demonstration; returns the exit code. `tamper` is for the tests: it may spoil the model."""
    began = time.perf_counter()
    torch.set_num_threads(options.threads)
    torch.set_default_dtype(torch.float64 if options.double else torch.float32)
    print(
        f"{options.environments} environments, {options.updates} updates of {options.steps} steps, {EPOCHS} epochs of "
        f"{MINIBATCHES} minibatches; {options.hidden} units; {options.threads} threads",
        flush=True,
    )
    trainees = {kind: Trainee(kind, options) for kind in NAMES}
    ours, theirs = (trainees[k].model.state_dict() for k in ("resets", "loop"))
    if ours.keys() != theirs.keys() or not all(torch.equal(ours[k], theirs[k]) for k in theirs):
        print("error: the same seed gave the two models different weights", file=sys.stderr)
        return 1
    if tamper is not None:
        for kind in ("resets", "perturbed"):  # as a fault of the layer would hit both
            tamper(trainees[kind].model)
    train(trainees, options)

    print("\n" + result_table(trainees))
    print(f"\nA policy without memory cannot have a mean return above {1 / SYMBOLS:g}; the best is 1.")
    picture(options.output, draw, trainees, dpi=120)
    checks = compare(trainees, options)
    print("\nDifference between the two, and how much rounding explains:")
    for check in checks:
        verdict = "ok" if check.passed else "TOO LARGE"
        print(f"  {check.what:<46} {check.found:.1e}   allowed {check.allowed:.1e}   {verdict}")
    print(f"\n{time.perf_counter() - began:.0f} seconds in all.", flush=True)
    failed = [check.what for check in checks if not check.passed]
    if failed:
        print(
            f"\nerror: the two trainings part by more than rounding explains, or have not learned the task "
            f"({'; '.join(failed)}).",
            file=sys.stderr,
        )
    return 1 if failed else 0


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a recurrent policy by PPO: by a loop over steps, and with resets."
    )
    parser.add_argument("--updates", type=int, help=f"updates of each model (default {UPDATES})")
    parser.add_argument("--environments", type=int, help="environments side by side (default 32)")
    parser.add_argument("--steps", type=int, help="steps of a rollout (default 128)")
    parser.add_argument("--hidden", type=int, help="units of the LSTM (default 64)")
    parser.add_argument("--threads", type=int, default=1, help="default 1: the steps are too small to share")
    parser.add_argument("--double", action="store_true", help="in float64: rounding takes longer to show")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes; nothing is learned")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).parent / "output" / "recurrent_ppo.png",
        help="the picture",
    )
    options = parser.parse_args(arguments)
    sizes = {"updates": UPDATES, "environments": 32, "steps": 128, "hidden": 64}
    if options.quick:
        sizes = {"updates": 6, "environments": 8, "steps": 32, "hidden": 16}
    for name, value in sizes.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


if __name__ == "__main__":
    sys.exit(run(parse_options()))
