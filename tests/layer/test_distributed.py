"""Two processes train a model as one process does on their batches joined: DDP, and FSDP2 (fully_shard)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import distributed_worker as worker
import pytest
import torch
from torch import nn

import lstm_ext

pytestmark = pytest.mark.tools  # takes long

# A run takes about five seconds; a processor that is busy elsewhere may need many more.
TIMEOUT = 120
# After four updates, in float64: the sums over the batch are taken in another order.
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def launch(folder: Path, *names: str) -> list[dict[str, dict]]:
    """Run the cases in two processes; what each process found, by case. A process that fails is an error."""
    package = str(Path(lstm_ext.__file__).parent.parent)
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH")))),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    command = [
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--nproc-per-node", str(worker.WORLD_SIZE)),
        # a port that is free, on this machine
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--local-addr", "127.0.0.1"),
        *(worker.__file__, str(folder), *names),
    ]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        output, _ = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun then ends the processes that it has started
        output, _ = process.communicate(timeout=60)
        raise AssertionError(f"not done after {TIMEOUT} seconds:\n{output}") from None
    assert process.returncode == 0, f"exit code {process.returncode}:\n{output}"
    return [
        {name: torch.load(folder / f"{name}.{rank}.pt") for name in names}
        for rank in range(worker.WORLD_SIZE)
    ]


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("found"), *worker.TRAINING, *worker.CALLS)


@pytest.mark.parametrize("name", worker.TRAINING)
def test_training_equals_that_of_one_process(processes, name):
    layers, optimizer = re.fullmatch(r"\w+ (.*) (\w+)", name).groups()
    # torch's own layer: another implementation, that knows nothing of other processes
    model = worker.make_model(nn.LSTM, layers)
    losses = worker.train(model, optimizer, worker.make_input(layers))
    assert losses[-1] < losses[0] - 0.1
    for found in processes:
        assert found[name]["losses"] == pytest.approx(losses, rel=1e-10)
        torch.testing.assert_close(found[name]["state"], model.state_dict(), **CLOSE)


def test_initial_weights_of_shards(processes):
    """reset_parameters() reaches every weight of every shard, none of which had a value."""
    for found in processes:
        drawn = found["fsdp_from_meta stack Adam"]["drawn"]
        assert len(drawn) == 20
        for name, p in drawn.items():
            assert 0 < p.abs().max() <= worker.HIDDEN**-0.5, name


@pytest.fixture
def expected():
    """Of the layer in one process: its results, and the gradients for the loss that the worker takes."""
    module = worker.make_model(nn.LSTM, "one layer").lstm
    output, (h_n, c_n) = module(worker.make_input("one layer"))
    (output.square().sum() + c_n.sum()).backward()
    return {"output": output.detach(), "h_n": h_n.detach(), "c_n": c_n.detach()} | {
        name: p.grad for name, p in module.named_parameters()
    }


def test_step_of_a_sharded_module(processes, expected):
    for found in processes:
        step = found["step"]
        for name in ("output", "h_n", "c_n"):
            torch.testing.assert_close(step[name], expected[name], **CLOSE)
        torch.testing.assert_close(step["streamed"], expected["output"], **CLOSE)
        for name, gradient in step["gradients"].items():
            torch.testing.assert_close(gradient, expected[name], **CLOSE)


def test_shards_are_refused(processes, expected):
    """A call past FSDP's hooks finds parameters that are shards: an error, and the module works afterwards."""
    for found in processes:
        errors = found["shards"]["errors"]
        assert len(errors) == 6
        for call, (kind, text) in errors.items():
            assert kind == "RuntimeError", call
            assert "DTensor" in text, call
        torch.testing.assert_close(found["shards"]["output"], expected["output"], **CLOSE)


@pytest.mark.parametrize("placement", ["replicated", "cut"])
def test_dtensors_throughout(processes, expected, placement):
    if placement not in worker.PLACEMENTS:
        pytest.skip("torch 2.11 cannot multiply a DTensor (T, B, I) that is cut along B")
    for found in processes:
        for name, value in found["dtensors"][placement].items():
            torch.testing.assert_close(value, expected[name], **CLOSE)
