"""Orders of large symbol tables, kept on disk by build-id: $XDG_CACHE_HOME/patcher, or ~/.cache/patcher.

An entry is never trusted. It counts when it is ours alone to write, whole by its checksum, and was made from the very
table that is asked for: build-id, sizes and checksum of the table and its strings (`strip` and `objcopy` change those,
not the build-id). Whatever else is found, or cannot be written, is as good as nothing: the orders are made anew.

An entry is read, not mapped: somebody who truncates the file must not end a process that holds a stopped target.
Entries appear by renaming a finished file; the oldest in use go when there are too many.

Specification: XDG Base Directory Specification.
"""

from __future__ import annotations

import os
import stat
import struct
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from patcher.elf import tables as t

# Magic, version; build-id, which table; sizes and checksum of table and strings; entries by name, by address; checksum.
# Padded to eight bytes: numpy copies what is not aligned, at each search.
_HEADER = struct.Struct("<8sI128s16sQQIQQI4x")
_MAGIC = b"PTCHORDR"
_VERSION = 1
_SUFFIX, _PARTIAL = ".orders", ".partial"
_MOST_ENTRIES = 64
_MOST_BYTES = 512 << 20
_ABANDONED_SECONDS = 3600.0


@dataclass(frozen=True, slots=True)
class Source:
    """The table that orders are made from."""

    build_id: str
    what: str
    table_size: int
    strings_size: int
    checksum: int

    @classmethod
    def of(cls, build_id: str, what: str, table: t.Table, strings: bytes) -> Source:
        checksum = zlib.crc32(strings, zlib.crc32(np.ascontiguousarray(table).view("u1").data))
        return cls(build_id, what, table.nbytes, len(strings), checksum)

    @property
    def file_name(self) -> str:
        return f"{self.build_id}-{self.what}{_SUFFIX}"


def load(source: Source) -> tuple[t.Table, t.Table] | None:
    """Return what was stored for a table, or None when there is nothing to be relied on."""
    folder = _folder()
    try:
        if folder is None or not _ours(os.lstat(folder)):
            return None
        path = folder / source.file_name
        data = _read(path)
        found = _parse(source, data)
        if found is not None:
            os.utime(path)  # in use: not among the first to go
    except OSError:
        return None
    return found


def store(source: Source, names: t.Table, addresses: t.Table) -> None:
    """Keep the orders of a table by name and by address; where that is not possible, silently don't."""
    folder = _folder()
    try:
        if folder is None or not _made(folder):
            return
        partial = folder / f"{source.build_id}-{source.what}-{os.getpid()}{_PARTIAL}"
        partial.unlink(missing_ok=True)
        try:
            with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
                file.write(_bytes(source, names, addresses))
            partial.rename(folder / source.file_name)
        finally:
            partial.unlink(missing_ok=True)
        _prune(folder)
    except OSError:
        return


def _folder() -> Path | None:
    named = os.environ.get("XDG_CACHE_HOME", "")
    # The specification: a relative path is invalid and ignored.
    root = Path(named) if os.path.isabs(named) else Path(os.path.expanduser("~"), ".cache")
    return root / "patcher" if root.is_absolute() else None


def _ours(status: os.stat_result) -> bool:
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _made(folder: Path) -> bool:
    """Make the folder where it is missing; tell whether it is ours alone to write."""
    missing = [p for p in (folder, *folder.parents) if not p.exists()]
    # With the privileges of one user and the home of another, nothing is left behind there.
    if missing and missing[-1].parent.stat().st_uid != os.geteuid():
        return False
    for path in reversed(missing):
        path.mkdir(0o700, exist_ok=True)
    status = os.lstat(folder)
    return stat.S_ISDIR(status.st_mode) and _ours(status)


def _read(path: Path) -> bytes:
    """Read an entry; nothing when somebody else can have written it."""
    # A pipe in its place must not block.
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or not _ours(status) or status.st_size > _MOST_BYTES:
            return b""
        return file.read()


def _bytes(source: Source, names: t.Table, addresses: t.Table) -> bytes:
    body = names.astype("<u8").tobytes() + addresses.astype("<u4").tobytes()
    return _header(source, len(names), len(addresses), zlib.crc32(body)) + body


def _header(source: Source, names: int, addresses: int, checksum: int) -> bytes:
    build_id, what = source.build_id.encode(), source.what.encode()
    made_from = (source.table_size, source.strings_size, source.checksum)
    return _HEADER.pack(_MAGIC, _VERSION, build_id, what, *made_from, names, addresses, checksum)


def _parse(source: Source, data: bytes) -> tuple[t.Table, t.Table] | None:
    if len(data) < _HEADER.size:
        return None
    *_, names, addresses, _ = _HEADER.unpack_from(data)
    if len(data) != _HEADER.size + names * 8 + addresses * 4:
        return None
    if data[: _HEADER.size] != _header(source, names, addresses, zlib.crc32(memoryview(data)[_HEADER.size :])):
        return None
    start = _HEADER.size
    return np.frombuffer(data, "<u8", names, start), np.frombuffer(data, "<u4", addresses, start + names * 8)


def _prune(folder: Path) -> None:
    entries = [(e.stat(follow_symlinks=False), e.path) for e in os.scandir(folder) if e.name.endswith(_SUFFIX)]
    entries.sort(key=lambda entry: -entry[0].st_mtime_ns)
    total = 0
    for kept, (status, path) in enumerate(entries):
        total += status.st_size
        if kept >= _MOST_ENTRIES or total > _MOST_BYTES:
            Path(path).unlink(missing_ok=True)
    for entry in os.scandir(folder):
        if entry.name.endswith(_PARTIAL) and entry.stat().st_mtime < time.time() - _ABANDONED_SECONDS:
            Path(entry.path).unlink(missing_ok=True)
