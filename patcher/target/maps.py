"""Mappings: what /proc/<pid>/maps says, line by line.

Decides how a line is read. Does not decide which mappings form a module (`elf`), nor which file may be
read for one (`image.py`). Specification: proc_pid_maps(5).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_DELETED = " (deleted)"
_ESCAPE = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Mapping:
    """One line of /proc/<pid>/maps: the addresses [start, end) and what is behind them.

    `offset` is the file position of `start`; `device` is "major:minor" in hexadecimal as the kernel prints
    it; `path` is "" for anonymous memory and "[stack]", "[vdso]" ... for the kernel's own; a file that was
    unlinked since has `deleted` set and its old path.
    """

    start: int
    end: int
    permissions: str
    offset: int
    device: str
    inode: int
    path: str
    deleted: bool = False

    @property
    def size(self) -> int:
        """Length in bytes."""
        return self.end - self.start

    @property
    def readable(self) -> bool:
        """Whether the program may read it."""
        return self.permissions[0] == "r"

    @property
    def writable(self) -> bool:
        """Whether the program may write it."""
        return self.permissions[1] == "w"

    @property
    def executable(self) -> bool:
        """Whether the program may run it."""
        return self.permissions[2] == "x"

    @property
    def private(self) -> bool:
        """Whether writes are copied instead of reaching the file or other processes."""
        return self.permissions[3] == "p"

    def __contains__(self, address: int) -> bool:
        return self.start <= address < self.end


def read_mappings(lines: Iterable[str]) -> tuple[Mapping, ...]:
    """Parse the lines of a maps file, in the order of the file (ascending addresses)."""
    return tuple(_mapping(line) for line in lines)


def processes_mapping(path: str) -> list[int]:
    """Return the processes of this user that have something of that path mapped, in the order of their numbers."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if folder.stat().st_uid != os.geteuid():
                continue
            with (folder / "maps").open(encoding="utf-8", errors="surrogateescape") as lines:
                if any(m.path.startswith(path) for m in read_mappings(lines)):
                    found.append(int(folder.name))
        except OSError:
            continue  # it ended meanwhile, or may not be looked at
    return sorted(found)


def processes_named(name: str) -> list[int]:
    """Return the processes whose program's file, or whose own name, is called so, in the order of their numbers."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            called = (folder / "comm").read_text(encoding="utf-8", errors="surrogateescape").rstrip("\n")
            if called == name or os.path.basename(os.readlink(folder / "exe")) == name:
                found.append(int(folder.name))
        except OSError:
            continue  # it ended meanwhile, or may not be looked at
    return sorted(found)


def _mapping(line: str) -> Mapping:
    fields = line.rstrip("\n").split(None, 5)
    start, _, end = fields[0].partition("-")
    path = fields[5] if len(fields) == 6 else ""
    deleted = path.endswith(_DELETED) and path.startswith("/")
    if deleted:
        path = path[: -len(_DELETED)]
    if "\\" in path:
        path = _ESCAPE.sub(lambda match: chr(int(match[1], 8)), path)
    return Mapping(
        int(start, 16), int(end, 16), fields[1], int(fields[2], 16), fields[3], int(fields[4]), path, deleted
    )
