"""What the examples show while they run: a picture where matplotlib is installed, a progress bar where tqdm is."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def picture(path: Path, draw: Callable[..., Any], *arguments: Any, dpi: int = 75) -> None:
    """Saves the figure that draw(pyplot, *arguments) returns. One line says where it is, or why there is none."""
    try:
        import matplotlib
    except ImportError:
        print("no picture, since matplotlib is not installed: pip install matplotlib", flush=True)
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = draw(plt, *arguments)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi)
    plt.close(figure)
    print(f"the picture is {path}", flush=True)


class LineWriter:
    """stderr for a progress bar that goes to a file: every refresh on a line of its own."""

    def write(self, text: str) -> None:
        text = text.strip("\r\n ")
        if text:
            sys.stderr.write(text + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


class NoBar(contextlib.AbstractContextManager):
    """In the place of tqdm's bar, where tqdm is not installed."""

    def __exit__(self, *error: Any) -> None:
        pass

    def update(self, count: int = 1) -> None:
        pass

    def set_postfix(self, values: dict[str, str], refresh: bool = True) -> None:
        pass


@functools.cache
def say_once(line: str) -> None:
    print(line, file=sys.stderr)


def progress_bar(total: int, title: str, **options: Any) -> Any:
    """tqdm's bar, with its options."""
    try:
        from tqdm import tqdm
    except ImportError:
        say_once("no progress bar, since tqdm is not installed: pip install tqdm")
        return NoBar()
    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        desc=title,
        file=sys.stderr if terminal else LineWriter(),
        mininterval=0.2 if terminal else 10.0,
        ascii=not terminal,
        ncols=None if terminal else 110,
        **options,
    )
