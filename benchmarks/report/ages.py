"""When a record is old where a page quotes it: after twelve months, one release, or 90 commits in csrc/.

One that names no commit of its own is marked too. How many commits there are since, only a checkout with its history
says: elsewhere, as in the sources of a release or in a shallow clone, pages keep the marks that they have.
"""

from __future__ import annotations

import datetime
import functools
import re
import subprocess
from pathlib import Path

from records import Result

ROOT = Path(__file__).resolve().parents[2]
MONTHS, RELEASES, COMMITS = 12, 1, 90
HEADING = re.compile(r"^## \[(\d+\.\d+\.\d+)\]", re.MULTILINE)
MARK = re.compile(r" \(\*\*[^*]+\*\*\)")


def git(*arguments: str) -> str | None:
    """None where there is no git, or it does not know."""
    try:
        run = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()


@functools.cache
def has_history() -> bool:
    """Whether this is the top of a checkout that has all commits."""
    return git("rev-parse", "--is-shallow-repository", "--show-prefix") == "false"


@functools.cache
def commits_since(commit: str, *paths: str) -> int | None:
    """How many touch the paths; None where git does not know."""
    found = git("log", "--format=%h", f"{commit}..HEAD", "--", *paths)
    return None if found is None else len(found.split())


def releases() -> list[str]:
    """The headings of the changelog, the newest first: the one that is being written, and those before it."""
    return HEADING.findall((ROOT / "CHANGELOG.md").read_text())


def today() -> datetime.date:
    """The date of the last commit, so that the pages of a commit stay right; without git, the day."""
    found = git("log", "-1", "--format=%cs")
    return datetime.date.fromisoformat(found) if found else datetime.date.today()


def months_between(first: datetime.date, last: datetime.date) -> int:
    return 12 * (last.year - first.year) + last.month - first.month - (last.day < first.day)


def of_commit(commit: str | None) -> str:
    """Why a record cannot be had again from the sources, or is older than they are."""
    if commit is None:
        return "of no commit"
    if commit.endswith("+changes"):
        return "measured with changes that no commit has"
    if not has_history():
        return ""
    count = commits_since(commit, "csrc")
    if count is None:
        return "of a commit that is not here"
    return f"old: more than {COMMITS} commits in csrc/ since" if count > COMMITS else ""


def age(facts: Result) -> str:
    """In words, why a record is old; empty for one that is not."""
    months = months_between(datetime.date.fromisoformat(facts["date"][:10]), today())
    known, version = releases(), re.match(r"\d+\.\d+\.\d+", facts["lstm_ext"])
    if version is None or version[0] not in known:
        return f"old: of {facts['lstm_ext']}, no release"
    behind = known.index(version[0])
    if behind > RELEASES:
        return f"old: {behind} releases before this one"
    return f"old: {months} months" if months >= MONTHS else of_commit(facts["git_commit"])


def marked(text: str, why: str) -> str:
    return f"{text} (**{why}**)" if why else text


def dated(facts: Result) -> str:
    """The day of a record, with a mark if it is old."""
    return marked(facts["date"][:10], age(facts))


def differs(shown: str, text: str) -> bool:
    """Whether a page shows another text than its records make; without a history, whatever the marks are."""
    return shown != text and (has_history() or MARK.sub("", shown) != MARK.sub("", text))
