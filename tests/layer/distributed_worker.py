"""One of the processes that test_distributed.py starts with torchrun: python distributed_worker.py FOLDER CASE...

Every process leaves what it found of each case in FOLDER/CASE.RANK.pt. The test imports from here what the processes
and the single process that they are compared with have in common.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import lstm_ext

WORLD_SIZE = 2
DTYPE = torch.float64
FEATURES, HIDDEN, STEPS, BATCH = 3, 5, 4, 6

# Sizes that two processes cannot share evenly: 4 * 5 rows can, the projection's 3 rows cannot.
LAYERS: dict[str, dict[str, Any]] = {
    "one layer": {},
    "stack": {"num_layers": 2, "bidirectional": True, "proj_size": 3, "batch_first": True},
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": functools.partial(torch.optim.SGD, lr=0.5, momentum=0.9),
    "Adam": functools.partial(torch.optim.Adam, lr=0.02),
}


class Model(nn.Module):
    """An LSTM with a layer on top; every result of the LSTM matters to the loss."""

    def __init__(self, lstm_class: type[nn.RNNBase], config: dict[str, Any]) -> None:
        super().__init__()
        self.lstm = lstm_class(FEATURES, HIDDEN, **config, dtype=DTYPE)
        features = (2 if self.lstm.bidirectional else 1) * (self.lstm.proj_size or HIDDEN)
        self.head = nn.Linear(features, 2, dtype=DTYPE)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        output, (h_n, c_n) = self.lstm(x)
        # one number for each sequence: the mean over the batch is the same in one process and in two
        return self.head(output), h_n.square().sum(dim=(0, 2)) + c_n.sum(dim=(0, 2))


def make_model(lstm_class: type[nn.RNNBase], layers: str) -> Model:
    torch.manual_seed(0)
    return Model(lstm_class, LAYERS[layers])


def make_input(layers: str, part: slice = slice(None)) -> Tensor:
    """The batch, or a part of its sequences."""
    x = torch.randn(BATCH, STEPS, FEATURES, dtype=DTYPE, generator=torch.Generator().manual_seed(1))[part]
    return x if LAYERS[layers].get("batch_first") else x.transpose(0, 1)


def train(
    model: nn.Module,
    optimizer: str,
    x: Tensor,
    steps: int = 4,
    mean: Callable[[Tensor], Tensor] = lambda x: x,
) -> list[float]:
    """The loss of every step; ``mean`` takes a loss to its mean over the processes."""
    update = OPTIMIZERS[optimizer](model.parameters())
    losses = []
    for _ in range(steps):
        prediction, penalty = model(x)
        loss = (prediction - 1).square().mean() + penalty.mean()
        losses.append(mean(loss.detach().clone()).item())
        update.zero_grad()
        loss.backward()
        update.step()
    return losses


def mine() -> slice:
    """The sequences of this process."""
    share = BATCH // WORLD_SIZE
    return slice(dist.get_rank() * share, (dist.get_rank() + 1) * share)


def mean_over_processes(x: Tensor) -> Tensor:
    dist.all_reduce(x)
    return x / WORLD_SIZE


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (WORLD_SIZE,))


def whole(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in state.items()}


def ddp(layers: str, optimizer: str) -> dict[str, Any]:
    model = make_model(lstm_ext.LSTM, layers)
    wrapped = DistributedDataParallel(model)
    losses = train(wrapped, optimizer, make_input(layers, mine()), mean=mean_over_processes)
    return {"losses": losses, "state": model.state_dict()}


def shard(model: Model) -> Model:
    fully_shard(model.lstm, mesh=mesh())
    fully_shard(model, mesh=mesh())
    assert all(isinstance(p, DTensor) for p in model.parameters())
    return model


def fsdp(layers: str, optimizer: str) -> dict[str, Any]:
    model = shard(make_model(lstm_ext.LSTM, layers))
    losses = train(model, optimizer, make_input(layers, mine()), mean=mean_over_processes)
    return {"losses": losses, "state": whole(model.state_dict())}


def fsdp_from_meta(layers: str, optimizer: str) -> dict[str, Any]:
    """The way for models that are too large for one process: no weight is ever whole before the first forward."""
    with torch.device("meta"):
        model = make_model(lstm_ext.LSTM, layers)
    shard(model).to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(torch.nan)
    model.lstm.reset_parameters()
    drawn = whole(dict(model.lstm.named_parameters()))
    initial = make_model(lstm_ext.LSTM, layers).state_dict()
    set_model_state_dict(model, initial, options=StateDictOptions(full_state_dict=True))
    losses = train(model, optimizer, make_input(layers, mine()), mean=mean_over_processes)
    return {"losses": losses, "state": whole(model.state_dict()), "drawn": drawn}


def step() -> dict[str, Any]:
    """Streaming with a sharded module, once step() is registered as a way into it; with the gradients."""
    module = make_model(lstm_ext.LSTM, "one layer").lstm
    fully_shard(module, mesh=mesh())
    register_fsdp_forward_method(module, "step")
    x = make_input("one layer")
    with torch.no_grad():
        streamed, state = [], None
        for x_t in x:
            y_t, state = module.step(x_t, state)
            streamed.append(y_t)
    outputs, state = [], None
    for x_t in x:
        y_t, state = module.step(x_t, state)
        outputs.append(y_t)
    (torch.stack(outputs).square().sum() + state[1].sum()).backward()
    return {
        "streamed": torch.stack(streamed),
        "output": torch.stack(outputs).detach(),
        "h_n": state[0].detach(),
        "c_n": state[1].detach(),
        "gradients": whole({name: p.grad for name, p in module.named_parameters()}),
    }


def shards() -> dict[str, Any]:
    """The errors of calls that go past FSDP's hooks, so that the parameters are still shards."""
    module = make_model(lstm_ext.LSTM, "one layer").lstm
    fully_shard(module, mesh=mesh())
    x = make_input("one layer")

    def error_of(call: Callable[[], Any]) -> tuple[str, str]:
        try:
            call()
        except Exception as error:
            return type(error).__name__, str(error)
        return "nothing", ""

    errors = {}
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            errors |= {
                ("step", grad): error_of(lambda: module.step(x[0])),
                ("forward", grad): error_of(lambda: module.forward(x)),
                ("functional", grad): error_of(
                    lambda: lstm_ext.functional.lstm(x, None, list(module.parameters()))
                ),
            }
    return {"errors": errors, "output": module(x)[0].detach()}


PLACEMENTS = {"replicated": Replicate(), "cut": Shard(1)}
if torch.__version__.startswith("2.11."):
    del PLACEMENTS["cut"]  # it cannot multiply (T, B, I) that is cut along B


def dtensors() -> dict[str, Any]:
    """Everything a DTensor: the weights the same in every process, the input the same or cut along the batch."""
    module = make_model(lstm_ext.LSTM, "one layer").lstm
    for name, p in list(module.named_parameters()):
        setattr(module, name, nn.Parameter(distribute_tensor(p.detach(), mesh(), [Replicate()])))
    found = {}
    for name, placement in PLACEMENTS.items():
        module.zero_grad()
        output, (_, c_n) = module(distribute_tensor(make_input("one layer"), mesh(), [placement]))
        (output.square().sum() + c_n.sum()).backward()
        found[name] = whole({"output": output.detach()} | {n: p.grad for n, p in module.named_parameters()})
    return found


TRAINING: dict[str, Callable[[], dict[str, Any]]] = {
    f"{way.__name__} {layers} {optimizer}": functools.partial(way, layers, optimizer)
    for way in (ddp, fsdp)
    for layers in LAYERS
    for optimizer in OPTIMIZERS
} | {"fsdp_from_meta stack Adam": functools.partial(fsdp_from_meta, "stack", "Adam")}
CALLS = {f.__name__: f for f in (step, shards, dtensors)}
CASES = TRAINING | CALLS


def main() -> None:
    folder, *names = sys.argv[1:]
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    for name in names:
        print(f"process {dist.get_rank()}: {name}", flush=True)
        torch.save(CASES[name](), Path(folder) / f"{name}.{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    # Without taking the interpreter down: a thread of gloo's may still drop a tensor that Python knows, which ends the
    # process if Python is on its way out (torch 2.13, ProcessGroupGloo::runLoop).
    os._exit(0)


if __name__ == "__main__":
    main()
