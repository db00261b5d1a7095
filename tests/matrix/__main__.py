"""One case on one route: ``python -m tests.matrix "CASE" ROUTE``, with a name of the table or the repr of a case.

``python -m tests.matrix --support`` writes the table of routes into docs/support.md.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from matrix import support
from matrix.cases import CASES, Case, Options
from matrix.judge import check
from matrix.routes import ROUTES


def main(arguments: list[str]) -> None:
    if arguments == ["--support"]:
        support.write()
        return
    text, route = arguments
    case = CASES[text] if text in CASES else eval(text, {"Case": Case, "Options": Options})
    case = dataclasses.replace(case, dtype=ROUTES[route].dtype or case.dtype)
    check(case, ROUTES[route].kind, ROUTES[route].call)
    print("as exact as it has to be")


if __name__ == "__main__":
    main(sys.argv[1:])
