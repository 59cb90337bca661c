"""Directories of ours: where compilers write as long as a session lasts, and what is kept for the next one.

A session's is removed when it ends. One that was killed leaves it behind, with objects and preambles of many megabytes:
the next session removes it, since nobody holds its lock any more. Specification: flock(2), openat(2) "O_NOFOLLOW".
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Self

from patcher.build.trust import is_private_directory

_PREFIX = "patcher-build-"
_YOUNG_SECONDS = 60.0  # it may not have been locked yet


class Workplace:
    """A directory for nobody but us, locked until `close` removes it with all that is in it."""

    def __init__(self, parent: Path | None = None) -> None:
        """`parent` is where it is made; by default the user's runtime directory, or that of temporary files."""
        if parent is None:
            parent = runtime_directory() or Path(tempfile.gettempdir())
        parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _remove_left_behind(parent)
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        self._descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        with suppress(OSError):  # where there are no locks, nobody can take it for left behind
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)

    def close(self) -> None:
        """Remove it; no more than once."""
        if self._descriptor >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@cache
def _remove_left_behind(parent: Path) -> None:
    with suppress(OSError):
        for name in os.listdir(parent):
            if name.startswith(_PREFIX):
                with suppress(OSError):
                    _remove_if_left(parent / name)


def _remove_if_left(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if is_private_directory(status) and time.time() - status.st_ctime > _YOUNG_SECONDS:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(descriptor)


def runtime_directory() -> Path | None:
    """Return our directory below the user's runtime directory, None where somebody else may interfere in it."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if not os.path.isabs(runtime):
        return None
    own = Path(runtime, "patcher")
    try:
        if not is_private_directory(os.lstat(runtime)):
            return None
        own.mkdir(mode=0o700, exist_ok=True)
        return own if is_private_directory(os.lstat(own)) else None
    except OSError:
        return None


def kept_directory(name: str) -> Path | None:
    """Return a directory for what outlives a session, made if it is not there; None where others may interfere."""
    own = runtime_directory() or Path(tempfile.gettempdir(), f"patcher-{os.geteuid()}")
    try:
        (own / name).mkdir(mode=0o700, parents=True, exist_ok=True)
        private = all(is_private_directory(os.lstat(path)) for path in (own, own / name))
        return own / name if private else None
    except OSError:
        return None
