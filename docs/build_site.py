"""Builds the site in build/docs from the pages of docs/ and the docstrings: python docs/build_site.py [OUTPUT]

A warning is an error. `make docs` installs what it needs and runs it.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("sphinx", "myst_parser", "furo", "sphinx_copybutton")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("output", nargs="?", type=Path, default=ROOT / "build" / "docs", help="a folder")
    output = parser.parse_args().output.resolve()
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"error: {', '.join(missing)} not installed: run `make docs`, or pip install 'lstm_ext[docs]'",
            file=sys.stderr,
        )
        return 1
    from sphinx.cmd.build import main as build

    doctrees = output.parent / f"{output.name}-doctrees"
    # All of it, since a page that has not changed has the contents of the site at its side all the same.
    options = ["-q", "-E", "-a", "-W", "--keep-going", "-c", str(ROOT / "docs"), "-d", str(doctrees)]
    done = build([*options, str(ROOT), str(output)])
    if not done:
        print(f"built {output / 'index.html'}")
    return done


if __name__ == "__main__":
    sys.exit(main())
