"""Checks whether another user could have written files that this process would run or read as its own."""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

_OTHERS, _GROUP = 0o002, 0o020
_MOST_LINKS = 40  # the same number as Linux
# POSIX access control lists in Linux's form: a version number, then tag, permissions and id of each entry.
_ACL, _ACL_FORM, _ACL_ENTRY = "system.posix_acl_access", struct.Struct("<I"), struct.Struct("<HHI")
_USER, _OWN_GROUP, _OTHER_GROUP, _MASK, _ALL = 0x02, 0x04, 0x08, 0x10, 0x20
_WRITE = 2


def distrust(path: Path) -> str | None:
    """Why another user could have written the file at ``path``, and the command that fixes it; None if nobody could.

    Checks everything on the path, as far as it exists: folders, symbolic links, and the file at its end. Each must
    belong to the effective user or to root, and nobody else may write it, by its mode or by its access control list. A
    folder with the sticky bit, such as /tmp, may be writable for all: nobody can remove another user's entries there. A
    group without other members may have write access too.
    """
    if not hasattr(os, "geteuid"):  # no such owners here
        return None
    for place, found in _way_to(path):
        reason = _reason_against(place, found)
        if reason is not None:
            return reason
    return None


def resolved(path: Path) -> Path:
    """The path without symbolic links: nobody can redirect it between a check and its use."""
    return Path(os.path.realpath(path))


def make_folder(path: Path, mode: int = 0o700) -> None:
    """Makes a folder and its missing parents, with a mode that the umask may reduce."""
    for each in (*reversed(path.parents), path):
        try:
            os.mkdir(each, mode)
        except FileExistsError:
            pass
        except OSError:  # a parent is not writable, or is no folder
            if not each.is_dir():
                raise


def _way_to(path: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Each folder, link and file on the way to ``path``, with its state, until one is not there."""
    # The path is not normalised: `..` after a link leads to the parent of the link's target.
    rest = list(reversed((path if path.is_absolute() else Path.cwd() / path).parts))
    here, links = Path(rest.pop()), 0
    yield here, os.lstat(here)
    while rest:
        part = rest.pop()
        if part == "..":
            here = here.parent
            continue
        try:
            found = os.lstat(here / part)
            target = Path(os.readlink(here / part)) if stat.S_ISLNK(found.st_mode) else None
        except OSError:
            return
        yield here / part, found
        if target is None:
            here = here / part
            continue
        links += 1
        if links > _MOST_LINKS:
            return
        rest += reversed(target.parts)
        if target.is_absolute():
            here = Path(rest.pop())


def _reason_against(place: Path, found: os.stat_result) -> str | None:
    me = os.geteuid()
    if found.st_uid not in (0, me):
        change = "chown -h" if stat.S_ISLNK(found.st_mode) else "chown"
        return (
            f"{place} belongs to {_user(found.st_uid)}, and not to {_user(me)} or root: "
            f"`{change} {me} {place}` if it is yours"
        )
    if stat.S_ISLNK(found.st_mode):  # the folder's permissions say who can change it
        return None
    if stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX:
        return None
    entries = _access_list(place)
    if entries is None:
        writable = found.st_mode & _OTHERS or (found.st_mode & _GROUP and not _is_private(found.st_gid))
        return f"others than {_user(me)} can write {place}: `chmod go-w {place}`" if writable else None
    mask = next((allowed for tag, allowed, _ in entries if tag == _MASK), ~0)
    for tag, allowed, who in entries:
        if tag == _ALL and allowed & _WRITE:
            return f"others than {_user(me)} can write {place}: `chmod o-w {place}`"
        if not allowed & mask & _WRITE:
            continue
        if tag == _USER and who not in (0, me):
            return f"an access control entry lets {_user(who)} write {place}: `setfacl -x u:{who} {place}`"
        if tag == _OTHER_GROUP and not _is_private(who):
            return f"an access control entry lets group {who} write {place}: `setfacl -x g:{who} {place}`"
        if tag == _OWN_GROUP and not _is_private(found.st_gid):
            return f"others than {_user(me)} can write {place}: `setfacl -m g::- {place}`"
    return None


def _access_list(place: Path) -> list[tuple[int, int, int]] | None:
    """Tag, permissions and number of each entry; None if there is no list in addition to the mode."""
    try:
        value = os.getxattr(place, _ACL)
    except (OSError, AttributeError):
        return None
    return list(_ACL_ENTRY.iter_unpack(value[_ACL_FORM.size :]))


def _user(uid: int) -> str:
    import pwd  # not on every platform that runs the reference

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"


def _is_private(gid: int) -> bool:
    """Whether a group is root's, or this user's alone; many systems make one for each user."""
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
