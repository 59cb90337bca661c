"""Whether two objects are the same but for their debug information: every other section, symbol and relocation.

Specification: System V ABI, "Object Files": ELF header, section header table.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

_HEADER = struct.Struct("<HHIQQQIHHHHHH")  # behind e_ident
_SECTION = struct.Struct("<IIQQQQIIQQ")
_NOBITS = 8
_DEBUG = (".debug_", ".rela.debug_")


@dataclass(frozen=True, slots=True)
class _Section:
    name: str
    shape: tuple[int, ...]  # type, flags, link, info, alignment, entry size
    size: int
    contents: bytes


def same_but_debug(one: bytes, other: bytes) -> bool:
    """Tell whether two objects have the same sections in the same order, debug information aside in what it says.

    Raises ValueError for what is no 64-bit little-endian ELF file.
    """
    return one[4:20] == other[4:20] and list(_compared(one)) == list(_compared(other))


def _compared(file: bytes) -> Iterator[_Section]:
    for section in _sections(file):
        if section.name.startswith(_DEBUG):
            section = _Section(section.name, section.shape, 0, b"")
        elif section.name == ".shstrtab":
            section = _Section(section.name, section.shape, section.size, b"")  # names are compared one by one
        yield section


def _sections(file: bytes) -> Iterator[_Section]:
    if file[:6] != b"\x7fELF\x02\x01":
        raise ValueError("not a 64-bit little-endian ELF file")
    try:
        header = _HEADER.unpack_from(file, 16)
        table, count, names_index = header[5], header[11], header[12]
        count = count or _SECTION.unpack_from(file, table)[5]
        if names_index == 0xFFFF:
            names_index = _SECTION.unpack_from(file, table)[6]
        rows = [_SECTION.unpack_from(file, table + index * _SECTION.size) for index in range(count)]
        names_at = rows[names_index][4]
        for name, kind, flags, _, offset, size, link, info, alignment, entry in rows:
            start = names_at + name
            text = file[start : file.index(b"\0", start)].decode("utf-8", "replace")
            contents = b"" if kind == _NOBITS else file[offset : offset + size]
            yield _Section(text, (kind, flags, link, info, alignment, entry), size, contents)
    except (struct.error, IndexError) as error:
        raise ValueError(str(error)) from None
