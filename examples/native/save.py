"""Writes the weights file that the programs of this folder read: of a detector with 40 features a frame."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import lstm_ext


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("weights", type=Path, help="the file")
    options = parser.parse_args()
    torch.manual_seed(0)
    layer = lstm_ext.LSTM(40, 64, num_layers=2)  # a trained one, in a program of yours
    lstm_ext.freeze(layer, torch.int8).save_native(options.weights)
    print(f"{options.weights}: {options.weights.stat().st_size} bytes")


if __name__ == "__main__":
    main()
