"""A forecast of the sea's temperature, a year ahead, and what the layer's cells hold.

The data are the monthly temperatures of the Pacific off Peru, 1950 to 2010, which statsmodels ships. A layer reads the
months of a series one after the other. After each month it forecasts the next twelve. The call also returns the cell
states of all steps (`return_cell_states=True`); the picture shows which of them follow the seasons and which the warm
and cold years. The run ends with the error for each month ahead, beside two simple forecasts: the mean of the calendar
month, and that mean plus today's deviation from it.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import torch
from shown import picture
from torch import Tensor, nn

import lstm_ext

AHEAD = 12
FIRST_YEAR, TEST_YEAR = 1950, 1991
WINDOW = 120  # months of a training sequence


def load() -> Tensor:
    """Monthly temperatures in degrees Celsius, from January 1950 on."""
    try:
        from statsmodels.datasets import elnino
    except ImportError:
        sys.exit("error: statsmodels, which has the data, is not installed: pip install 'lstm_ext[demo]'")
    table = elnino.load_pandas().data
    assert int(table["YEAR"].iloc[0]) == FIRST_YEAR
    return torch.tensor(table.drop(columns="YEAR").to_numpy(), dtype=torch.float32).flatten()


def features(series: Tensor) -> Tensor:
    """The temperature and the place in the year of each month, (T, 3)."""
    angle = 2 * math.pi * torch.arange(len(series)) / 12
    return torch.stack([series, angle.sin(), angle.cos()], dim=1)


def targets(series: Tensor) -> Tensor:
    """For each month the AHEAD months after it, (T - AHEAD, AHEAD)."""
    return series[1:].unfold(0, AHEAD, 1)


class Forecaster(nn.Module):
    def __init__(self, hidden: int = 24) -> None:
        super().__init__()
        self.lstm = lstm_ext.LSTM(3, hidden, forget_bias=1.0)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(hidden, AHEAD)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The forecasts (T, B, AHEAD) and the cell states (T, B, H)."""
        output, _, extras = self.lstm(x, return_cell_states=True)
        # The layer forecasts the change from the month at hand.
        return x[..., :1] + self.head(self.drop(output)), extras.cell_states[0]


def train(model: Forecaster, series: Tensor, steps: int) -> float:
    """Returns the mean squared error of the last steps."""
    x, y = features(series), targets(series)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=1e-2)
    losses = []
    for step in range(1, steps + 1):
        starts = torch.randint(len(y) - WINDOW + 1, (32,))
        rows = starts + torch.arange(WINDOW)[:, None]  # (WINDOW, 32): time first
        forecast, _ = model(x[rows])
        # The first months of a window have seen too little of the past.
        loss = (forecast - y[rows])[12:].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % max(1, steps // 5) == 0:
            print(f"step {step:4}  mean squared error {losses[-1]:.3f}", flush=True)
    return sum(losses[-10:]) / len(losses[-10:])


def errors(forecast: Tensor, series: Tensor, begin: int) -> Tensor:
    """The root of the mean squared error for each number of months ahead, of forecasts made from ``begin`` on."""
    y = targets(series)[begin:]
    return (forecast[begin : begin + len(y)] - y).square().mean(0).sqrt()


def simple_forecasts(series: Tensor, begin: int) -> tuple[Tensor, Tensor]:
    """The mean of the calendar month, and that plus the deviation of the month at hand, (T, AHEAD)."""
    means = series[:begin].reshape(-1, 12).mean(0)
    month = torch.arange(len(series))
    ahead = means[(month[:, None] + 1 + torch.arange(AHEAD)) % 12]
    return ahead, ahead + (series - means[month % 12])[:, None]


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Of each column of ``a`` with ``b``."""
    a, b = a - a.mean(0), b - b.mean()
    return (a * b[:, None]).sum(0) / (a.norm(dim=0) * b.norm() + 1e-12)


def draw(
    plt: Any, series: Tensor, forecast: Tensor, cells: Tensor, begin: int, table: dict[str, Tensor]
) -> Any:
    blue, orange, grey = "#4477aa", "#dd7722", "#999999"
    years = FIRST_YEAR + torch.arange(len(series)) / 12
    usual = simple_forecasts(series, begin)[0]
    lead = 3
    figure, axes = plt.subplots(3, 1, figsize=(9, 7.5), height_ratios=(3, 3, 2), layout="constrained")

    axis = axes[0]
    shown = slice(begin, len(series))
    axis.plot(years[shown], series[shown], color=grey, lw=3, alpha=0.6, label="measured")
    axis.plot(
        years[begin:][lead:],
        forecast[begin:-lead, lead - 1],
        color=orange,
        lw=1.2,
        label=f"forecast {lead} months before",
    )
    axis.set(
        ylabel="°C",
        title="temperature of the sea in years that were not seen in training",
        xlim=(years[begin], years[-1]),
    )
    axis.legend(loc="upper right", ncols=2)

    # One unit that goes with the seasons, and one that goes with the deviation from them.
    season = torch.cat([usual[:1, 0], usual[:-1, 0]])
    deviation = series - season
    axis = axes[1]
    for what, color, name in (
        (season, blue, "the calendar month's mean"),
        (deviation, orange, "the deviation from it"),
    ):
        found = correlation(cells[shown], what[shown])
        unit = int(found.abs().argmax())
        values = cells[shown, unit] * found[unit].sign()
        axis.plot(
            years[shown],
            values,
            color=color,
            lw=1.2,
            label=f"unit {unit}: {found[unit].abs():.2f} with {name}",
        )
    axis.set(ylabel="cell state", title="the cell states that correlate most", xlim=(years[begin], years[-1]))
    low, high = axis.get_ylim()
    axis.set_ylim(low, high + 0.3 * (high - low))
    axis.legend(loc="upper right", ncols=2)

    axis = axes[2]
    for (name, values), color in zip(table.items(), (orange, grey, blue), strict=True):
        axis.plot(range(1, AHEAD + 1), values, color=color, marker=".", label=name)
    axis.set(xlabel="months ahead", ylabel="error, °C", ylim=(0, None), xticks=range(1, AHEAD + 1))
    axis.legend(loc="lower right", ncols=3)
    return figure


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--quick", action="store_true", help="a few steps")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output" / "forecast.png")
    options = parser.parse_args()
    if options.quick:
        options.steps = 60

    torch.manual_seed(0)
    celsius = load()
    begin = (TEST_YEAR - FIRST_YEAR) * 12
    mean, std = celsius[:begin].mean(), celsius[:begin].std()
    series = (celsius - mean) / std
    model = Forecaster()
    untrained = errors(model.eval()(features(series)[:, None])[0][:, 0].detach(), series, begin)
    model.train()
    train(model, series[:begin], options.steps)

    model.eval()
    with torch.no_grad():
        forecast, cells = model(features(series)[:, None])
    forecast, cells = forecast[:, 0] * std + mean, cells[:, 0]
    usual, persistent = simple_forecasts(celsius, begin)
    table = {
        "lstm_ext.LSTM": errors(forecast, celsius, begin),
        "calendar month's mean": errors(usual, celsius, begin),
        "mean plus deviation": errors(persistent, celsius, begin),
    }
    print(f"\nerror in °C, {TEST_YEAR} to 2010, by months ahead")
    for name, values in table.items():
        print(f"{name:22}", "  ".join(f"{n + 1}: {values[n]:.2f}" for n in (0, 2, 5, 11)))
    picture(options.output, draw, celsius, forecast, cells, begin, table)
    if not (table["lstm_ext.LSTM"].mean() < 0.7 * untrained.mean() * std):
        print("error: the training did not help", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
