"""Two processes train the tagger of tagger.py, each on its half of every batch, as one process would on all of it.

    torchrun --nproc-per-node 2 examples/data_parallel.py

DistributedDataParallel takes the mean of the gradients of all processes. The first process then trains the same model
by itself on the whole batches. The losses of the two trainings have to agree; the picture shows both. They are in
float64, where rounding does not grow to something that can be seen within these steps.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from shown import picture
from tagger import Line, Tagger, load_lines, pack
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

HALF = 24  # lines of each process in a step
# Relative, in any step: the sums over a batch are taken in another order, and training makes more of the difference.
ALLOWED = 1e-6


def train(model: nn.Module, train_lines: list[Line], steps: int, rank: int, world: int) -> list[float]:
    """The loss of each step. A process takes every ``world``-th line of a batch, from ``rank`` on."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    draws = random.Random(0)  # the same in all processes
    shares = dist.get_world_size()
    losses = []
    for _ in range(steps):
        batch = draws.sample(train_lines, HALF * shares)
        characters, tags = pack(batch[rank::world])
        # A sum over characters, divided by what is the same in all processes: their mean is then a sum over the batch,
        # although one has more characters than the other.
        count = sum([len(text) for text, _ in batch]) / world
        loss = F.cross_entropy(model(characters), tags.data, reduction="sum") / count
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def draw(plt: Any, together: list[float], alone: list[float]) -> Any:
    figure, axis = plt.subplots(figsize=(7, 3.2), layout="constrained")
    steps = range(1, len(alone) + 1)
    axis.plot(steps, together, color="#4477aa", lw=5, alpha=0.5, label="two processes, mean of their losses")
    axis.plot(steps, alone, color="#dd7722", lw=1.5, label="one process")
    axis.set(xlabel="step", ylabel="loss", ylim=(0, None))
    axis.legend()
    return figure


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--files", type=int, default=20, help="how many files of the standard library")
    parser.add_argument("--quick", action="store_true", help="a few files and steps")
    output = Path(__file__).parent / "output" / "data_parallel.png"
    parser.add_argument("--output", type=Path, default=output)
    options = parser.parse_args()
    if options.quick:
        options.files, options.steps = 6, 25
    if "RANK" not in os.environ:
        print(f"error: start it with torchrun --nproc-per-node 2 {sys.argv[0]}", file=sys.stderr)
        return 1

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    lines, _ = load_lines(options.files)
    torch.manual_seed(0)
    model = DistributedDataParallel(Tagger().double())
    losses = torch.tensor(train(model, lines, options.steps, rank, world))
    dist.all_reduce(losses)
    together = (losses / world).tolist()

    failed = False
    if rank == 0:
        torch.manual_seed(0)
        alone = train(Tagger().double(), lines, options.steps, 0, 1)
        worst = max([abs(a - b) / b for a, b in zip(together, alone, strict=True)])
        print(
            f"{world} processes: loss {together[0]:.4f} → {together[-1]:.4f}; one: {alone[0]:.4f} → {alone[-1]:.4f}"
        )
        print(f"largest relative difference of a step: {worst:.1e}")
        picture(options.output, draw, together, alone)
        failed = worst > ALLOWED
        if failed:
            print("error: the two trainings differ", file=sys.stderr)
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    # Without taking the interpreter down: a thread of gloo's may still drop a tensor that Python knows, which ends the
    # process if Python is on its way out (torch 2.13).
    os._exit(int(failed))


if __name__ == "__main__":
    sys.exit(main())
