"""How old a record may be where a page quotes it: twelve months, and one release."""

from __future__ import annotations

import datetime
import re
import subprocess
from pathlib import Path

from records import Result

ROOT = Path(__file__).resolve().parents[2]
MONTHS, RELEASES = 12, 1
HEADING = re.compile(r"^## \[(\d+\.\d+\.\d+)\]", re.MULTILINE)


def releases() -> list[str]:
    """The headings of the changelog, the newest first: the one that is being written, and those before it."""
    return HEADING.findall((ROOT / "CHANGELOG.md").read_text())


def today() -> datetime.date:
    """The date of the last commit, so that the pages of a commit stay right; without git, the day."""
    command = ["git", "-C", str(ROOT), "log", "-1", "--format=%cs"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        return datetime.date.fromisoformat(found)
    except (OSError, ValueError, subprocess.CalledProcessError):
        return datetime.date.today()


def months_between(first: datetime.date, last: datetime.date) -> int:
    return 12 * (last.year - first.year) + last.month - first.month - (last.day < first.day)


def age(facts: Result) -> str:
    """In words, why a record is old; empty for one that is not."""
    months = months_between(datetime.date.fromisoformat(facts["date"][:10]), today())
    known, version = releases(), re.match(r"\d+\.\d+\.\d+", facts["lstm_ext"])
    if version is None or version[0] not in known:
        return f"old: of {facts['lstm_ext']}, no release"
    behind = known.index(version[0])
    if behind > RELEASES:
        return f"old: {behind} releases before this one"
    return f"old: {months} months" if months >= MONTHS else ""


def dated(facts: Result) -> str:
    """The day of a record, with a mark if it is old."""
    why = age(facts)
    return f"{facts['date'][:10]}{f' (**{why}**)' if why else ''}"
