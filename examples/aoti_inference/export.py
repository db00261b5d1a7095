"""Compiles a model with lstm_ext.LSTM into one file that a C++ program runs without Python: see Makefile."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

import lstm_ext


class Policy(nn.Module):
    """Scores for five actions from sequences of observations; the state goes in and comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = lstm_ext.LSTM(8, 32, num_layers=2, batch_first=True)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, (h, c) = self.lstm(x, (h, c))
        return self.head(y), h, c


def arguments(batch: int, time: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(batch, time, 8), torch.randn(2, batch, 32), torch.randn(2, batch, 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="the compiled model, model.pt2")
    parser.add_argument("sample", type=Path, help="arguments and results to compare with, sample.pt")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = Policy().eval()

    batch, time = torch.export.Dim("batch"), torch.export.Dim("time")
    program = torch.export.export(
        model, arguments(2, 3), dynamic_shapes=({0: batch, 1: time}, {1: batch}, {1: batch})
    )
    options.model.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch about torch
        torch._inductor.aoti_compile_and_package(program, package_path=str(options.model))

    # Another batch and another number of steps than the model was exported with.
    sample = arguments(3, 10)
    with torch.inference_mode():
        torch.save([*sample, *model(*sample)], options.sample)
    print(f"{options.model}: {sum(p.numel() for p in model.parameters())} parameters")


if __name__ == "__main__":
    main()
