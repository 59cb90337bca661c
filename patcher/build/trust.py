"""Whose word is taken for how a file is compiled: a compile command runs with our privileges.

A file says so only if nobody but us, or root, can have written it. Decides that; whoever reads the file looks at the
status of the very file that it opened.
"""

from __future__ import annotations

import grp
import os
import pwd
import stat

from patcher.errors import NoCompileCommand


def check_trusted(status: os.stat_result, name: object) -> None:
    """Raise NoCompileCommand when somebody else than we or root may have written a file."""
    why = doubt(status)
    if why:
        raise NoCompileCommand(
            f"{name}: {why}, so the commands in it are not run",
            "make it again as the user that runs patcher, writable by nobody else, or run patcher as its owner",
        )


def is_private_directory(status: os.stat_result) -> bool:
    """Tell whether a directory is ours, and nobody else may make or rename files in it."""
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not doubt(status)


def doubt(status: os.stat_result) -> str:
    """Return why somebody else than we or root may have written a file; "" when nobody can."""
    if status.st_uid not in (0, os.geteuid()):
        return f"it belongs to user {status.st_uid}, we are user {os.geteuid()}"
    if status.st_mode & stat.S_IWOTH:
        return "everybody may write it"
    if status.st_mode & stat.S_IWGRP and not _is_private_group(status.st_gid, status.st_uid):
        return f"everybody in group {status.st_gid} may write it"
    return ""


def _is_private_group(group: int, user: int) -> bool:
    """Tell whether a group is a user's own: of the same name, with nobody else in it (as most systems set it up)."""
    if group == 0 and user == 0:
        return True
    try:
        entry, owner = grp.getgrgid(group), pwd.getpwuid(user)
    except KeyError:
        return False
    return entry.gr_name == owner.pw_name and set(entry.gr_mem) <= {owner.pw_name}
