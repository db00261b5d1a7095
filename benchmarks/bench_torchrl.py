"""TorchRL's LSTMModule against the module of examples/torchrl_lstm.py, on rows with episodes that begin inside.

    python benchmarks/bench_torchrl.py [--shapes NAME ...] [--threads N ...] [--budget SECONDS] [--resets SHARE]
                                       [--output results/NAME.json]

Times are of a call of the module in recurrent mode, with "training" of its backward pass too, the input's gradient
included. Of three sides, two comparisons, each in turns:

over_torch  LSTMModule with torch.nn.LSTM, over ResetLSTMModule with lstm_ext.LSTM
over_pad    LSTMModule with lstm_ext.LSTM, over the same

Needs torchrl. Nothing fails here: what a busy machine measures is no verdict.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import harness
import torch
from shapes import Shape
from tensordict import TensorDict
from torchrl.modules import LSTMModule, set_recurrent_mode

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
from torchrl_lstm import KEYS, ResetLSTMModule, make_data

SHAPES = {
    "policy": Shape(64, 128, 64, 128),
    "small": Shape(16, 64, 32, 64),
    "large": Shape(32, 128, 256, 256),
    "one-row": Shape(1, 512, 64, 128),
}


def call_of(module: LSTMModule, data: TensorDict, training: bool) -> Callable[[], torch.Tensor]:
    if not training:

        def infer() -> torch.Tensor:
            with torch.inference_mode(), set_recurrent_mode(True):
                return module(data.copy())["y"]

        return infer

    x = data["x"].clone().requires_grad_()
    data = data.copy().set("x", x)
    grad = torch.randn(*data.shape, module.lstm.hidden_size, generator=torch.Generator().manual_seed(2))

    def train() -> torch.Tensor:
        x.grad = None
        module.zero_grad(set_to_none=True)
        with set_recurrent_mode(True):
            module(data.copy())["y"].backward(grad)
        return x.grad

    return train


def measure(shape: Shape, resets: float, training: bool, budget: float) -> dict[str, object]:
    torch.manual_seed(1)
    data = make_data(shape.batch, shape.steps, shape.input_size, shape.hidden_size, resets)
    theirs, ours = harness.make_layers(shape)
    theirs.batch_first = ours.batch_first = True
    call = call_of(ResetLSTMModule(lstm=ours, **KEYS), data, training)
    figures: dict[str, object] = {"episodes": data["is_init"].sum().item()}
    for name, layer in (("over_torch", theirs), ("over_pad", ours)):
        other = call_of(LSTMModule(lstm=layer, **KEYS), data, training)
        difference = harness.largest_difference(other, call)
        comparison = harness.compare(other, call, budget / 2)
        figures[name] = {**harness.as_dict(comparison), "largest_difference": difference}
    return figures


def main() -> None:
    parser = harness.options_of(__doc__, SHAPES, budget=8.0)
    parser.add_argument(
        "--resets", type=float, default=0.025, help="share of the steps that begin an episode"
    )
    options = parser.parse_args()

    facts = {**harness.facts(), "torchrl": version("torchrl"), "tensordict": version("tensordict")}
    results = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        for name in options.shapes:
            for training in (False, True):
                figures = measure(SHAPES[name], options.resets, training, options.budget)
                case = {"shape": name, **SHAPES[name]._asdict(), "threads": threads, "training": training}
                results.append({**case, "resets": options.resets, **figures})
                harness.show(case, {key: figures[key]["ratio"] for key in ("over_torch", "over_pad")})
    for name in ("over_torch", "over_pad"):
        ratios = [r[name]["ratio"] for r in results]
        mean = harness.geometric_mean(ratios)
        print(f"{name}: {mean:.2f} times as fast in the mean, at least {min(ratios):.2f}")
    harness.write(options.output, {"facts": facts, "results": results})


if __name__ == "__main__":
    main()
