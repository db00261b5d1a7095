"""One case on one route: ``python -m tests.matrix "CASE" ROUTE``, with a name of the table or the repr of a case."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from matrix.cases import CASES, Case, Options
from matrix.judge import check
from matrix.routes import ROUTES

if __name__ == "__main__":
    text, route = sys.argv[1:]
    case = CASES[text] if text in CASES else eval(text, {"Case": Case, "Options": Options})
    check(case, ROUTES[route].kind, ROUTES[route].call)
    print("as exact as it has to be")
