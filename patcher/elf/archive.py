"""`ar` archives: the System V / GNU format, with long names, and thin archives.

`read_archive` takes all members; `Archive` finds those that a linker would pull in for a symbol, by the symbol index
(`/`, or `/SYM64/` with wide offsets), or by the members' own symbol tables where there is none. Which symbols are
missing is decided elsewhere.

Specification: ar(5); System V ABI, chapter 7 ("Archive File", the symbol table member).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from patcher.elf import tables as t
from patcher.elf.object import ObjectFile, SymbolBinding, parse_object
from patcher.errors import ObjectError

_MAGIC = b"!<arch>\n"
_THIN_MAGIC = b"!<thin>\n"
_HEADER_SIZE = 60
_INDEXES = {b"/": ">I", b"/SYM64/": ">Q"}


class _Entry(NamedTuple):
    """A member as it stands in the archive; `size` bytes at `start` are its contents, unless the archive is thin."""

    offset: int
    raw_name: bytes
    start: int
    size: int


def is_archive(data: bytes) -> bool:
    """Tell whether a file starts as an archive does."""
    return data[:8] in (_MAGIC, _THIN_MAGIC)


def read_archive(path: Path, data: bytes) -> tuple[tuple[str, bytes], ...]:
    """Return the (name, contents) of each member, in order. Thin archives' members are read beside the archive."""
    archive = Archive(path, data)
    return tuple(archive.contents(offset) for offset in archive.members)


class Archive:
    """One archive's members, by where their headers stand. Nothing but the headers is read before it is asked for."""

    def __init__(self, path: Path, data: bytes) -> None:
        self.path = path
        self._data = data
        self._thin = data[:8] == _THIN_MAGIC
        self._objects: dict[int, ObjectFile | None] = {}

    @cached_property
    def _entries(self) -> dict[int, _Entry]:
        return {entry.offset: entry for entry in self._walk()}

    @cached_property
    def members(self) -> tuple[int, ...]:
        """The offsets of the members, in order; the tables of the archive itself are none."""
        return tuple(e.offset for e in self._entries.values() if not _is_table(e.raw_name))

    def _walk(self) -> Iterator[_Entry]:
        data, position = self._data, 8
        while position + _HEADER_SIZE <= len(data):
            header = data[position : position + _HEADER_SIZE]
            raw_name, size = header[:16].rstrip(), _size(self.path, header)
            start = position + _HEADER_SIZE
            stored = size if _is_table(raw_name) or not self._thin else 0
            if start + stored > len(data):
                raise ObjectError(
                    f"{self.path}: member at {position:#x} reaches beyond the end of the file",
                    "the archive is truncated; build it again",
                )
            yield _Entry(position, raw_name, start, size)
            position = start + stored + (stored & 1)

    def _table(self, raw_name: bytes) -> bytes:
        found = next((e for e in self._entries.values() if e.raw_name == raw_name), None)
        return b"" if found is None else self._data[found.start : found.start + found.size]

    @cached_property
    def _long_names(self) -> bytes:
        return self._table(b"//")

    def contents(self, offset: int) -> tuple[str, bytes]:
        """Return a member's name and bytes."""
        entry = self._entries[offset]
        name = _member_name(entry.raw_name, self._long_names)
        if self._thin:
            return name, _thin_member(self.path, name)
        return name, self._data[entry.start : entry.start + entry.size]

    def object(self, offset: int) -> ObjectFile | None:
        """Return a member, read once, or None when it is no object."""
        if offset not in self._objects:
            name, contents = self.contents(offset)
            is_object = contents[:4] in t.OBJECT_MAGIC
            self._objects[offset] = parse_object(f"{self.path}({name})", contents) if is_object else None
        return self._objects[offset]

    # --- symbols ----------------------------------------------------------------------------------------------

    def defining(self, name: str) -> ObjectFile | None:
        """Return the first member that defines a global symbol, as a linker would take it, or None."""
        offset = self.symbols.get(name)
        return None if offset is None else self.object(offset)

    @cached_property
    def symbols(self) -> dict[str, int]:
        """The global symbols that members define, each with the first one that does."""
        for raw_name, number in _INDEXES.items():
            table = self._table(raw_name)
            if table:
                return self._indexed(table, struct.Struct(number))
        found: dict[str, int] = {}
        for offset in self.members:
            for symbol in getattr(self.object(offset), "symbols", ()):
                if symbol.binding != SymbolBinding.LOCAL and not symbol.undefined:
                    found.setdefault(symbol.name, offset)
        return found

    def _indexed(self, table: bytes, number: struct.Struct) -> dict[str, int]:
        count = number.unpack_from(table)[0] if len(table) >= number.size else -1
        start = number.size * (count + 1)
        if not 0 <= count <= len(table) // number.size or start > len(table):
            raise self._damaged("its symbol index is cut off")
        offsets = [offset for (offset,) in number.iter_unpack(table[number.size : start])]
        names = table[start:].split(b"\0")
        if len(names) < count or not set(offsets) <= self._entries.keys():
            raise self._damaged("its symbol index does not fit its members")
        found: dict[str, int] = {}
        for name, offset in zip(names, offsets, strict=False):
            found.setdefault(name.decode("utf-8", "replace"), offset)
        return found

    def _damaged(self, how: str) -> ObjectError:
        return ObjectError(f"{self.path}: a damaged archive: {how}", "build the archive again, or run ranlib on it")


def _is_table(raw_name: bytes) -> bool:
    return raw_name in (b"/", b"//", b"/SYM64/")


def _size(path: Path, header: bytes) -> int:
    digits = header[48:58].strip()
    if header[58:60] != b"`\n" or not digits.isdigit():
        raise ObjectError(f"{path}: a damaged archive member header", "build the archive again")
    return int(digits)


def _member_name(raw: bytes, long_names: bytes) -> str:
    if raw[:1] == b"/" and raw[1:].isdigit():
        start = int(raw[1:])
        end = long_names.find(b"\n", start)
        raw = long_names[start : end if end >= 0 else len(long_names)]
    return raw.removesuffix(b"/").decode("utf-8", "replace")


def _thin_member(archive: Path, name: str) -> bytes:
    path = archive.parent / name
    try:
        if path.is_file():  # reading a device or a pipe might never end
            return path.read_bytes()
        reason = "it is no file" if path.exists() else "there is no such file"
    except OSError as error:
        reason = error.strerror or str(error)
    raise ObjectError(f"{archive}: member {name} of this thin archive cannot be read: {reason}", "build it again")
