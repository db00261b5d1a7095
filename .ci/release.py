"""What has to agree before a release: python .ci/release.py [vX.Y.Z] [--notes]

The tag, VERSION in lstm_ext/native/config.py and the topmost section of CHANGELOG.md. Without a tag VERSION may be that
of the next release, with .dev0 at its end. --notes prints that section. The exit code is 1 if something differs.
"""

from __future__ import annotations

import argparse
import re
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("tag", nargs="?")
    parser.add_argument("--notes", action="store_true", help="print the changes of this release")
    options = parser.parse_args()
    version = runpy.run_path(str(ROOT / "lstm_ext/native/config.py"))["VERSION"]
    changes = re.split(r"^## ", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)[1]
    found = re.match(r"\[([\d.]+)\](?: - \d{4}-\d\d-\d\d|, not released yet)\n", changes)
    released = version.removesuffix(".dev0")
    problems = []
    if found is None or found[1] != released:
        problems.append(f"CHANGELOG.md begins with {changes.splitlines()[0]!r}, and VERSION is {version!r}")
    if options.tag is not None and options.tag != f"v{version}":
        problems.append(f"the tag is {options.tag!r}, and VERSION is {version!r}")
    if options.tag is not None and "not released yet" in changes.splitlines()[0]:
        problems.append("CHANGELOG.md has no date for this release")
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if options.notes:
        print(changes.partition("\n")[2].strip())
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
