"""Whether files that this process would run or believe can have been written by another user."""

from __future__ import annotations

import os
import stat
from pathlib import Path

__all__ = ["distrust"]

_OTHERS, _GROUP = 0o002, 0o020


def distrust(path: Path) -> str | None:
    """Why somebody else may have put there what is at ``path``, and the command that mends it; None if nobody can.

    Looks at the file or folder and at every folder above it, as far as they exist: each must belong to the effective
    user or to root, and nobody else may write it. A folder with the sticky bit, such as /tmp, may be written by all:
    nobody can take another's entries away there. So may be written by a group that has no other members.
    """
    if not hasattr(os, "geteuid"):  # no such owners here
        return None
    resolved = Path(os.path.realpath(path))
    for each in (resolved, *resolved.parents):
        try:
            found = os.stat(each)
        except OSError:
            continue  # not there yet
        if found.st_uid not in (0, os.geteuid()):
            return (
                f"{each} belongs to {_user(found.st_uid)}, and not to {_user(os.geteuid())} or root: "
                f"`chown {os.geteuid()} {each}` if it is yours"
            )
        if stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX:
            continue
        if found.st_mode & _OTHERS or (found.st_mode & _GROUP and not _is_private(found.st_gid)):
            return f"others than {_user(os.geteuid())} can write {each}: `chmod go-w {each}`"
    return None


def _user(uid: int) -> str:
    import pwd  # not on every platform that runs the reference

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"


def _is_private(gid: int) -> bool:
    """Whether a group is that of root, or of this user alone, as many systems make one for each user."""
    import grp
    import pwd

    if gid == 0:
        return True
    try:
        name = pwd.getpwuid(os.geteuid()).pw_name
        group = grp.getgrgid(gid)
    except KeyError:
        return False
    return gid == os.getegid() and group.gr_name == name and set(group.gr_mem) <= {name}
