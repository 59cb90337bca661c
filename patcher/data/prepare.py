"""PREPARING: an object's debug information as readers of it want it: in a copy, inflated and relocated.

Two forms: a whole file that drgn takes (`readable`), and the bare sections (`sections`). Whether it can be read at
all is said here. Specification: System V ABI, "Section compression"; DWARF 5, section 7.4.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import numpy as np

from patcher.data.dies import NotUnderstood, Sections
from patcher.elf import tables as t
from patcher.elf.relocations import R
from patcher.errors import PatcherError

_DTPOFF64, _DTPOFF32, _NONE = 17, 21, 0
_DENSEST = 100  # debug information that is smaller than this part of itself when compressed is made to fill memory


def has_types(data: bytes, name: str = "the object") -> bool:
    """Tell whether an object has debug information, and in a form that can be read here.

    Raises `PatcherError` when it is damaged; `name` is for its message.
    """
    raw = t.read_raw(name, data)
    names = t.strings_at(raw.section_names, raw.section_headers["name"])
    if ".debug_info" not in names:
        return False
    debug = [i for i, found in enumerate(names) if found.startswith(".debug_")]
    packed = [i for i in debug if int(raw.section_headers[i]["flags"]) & t.SHF_COMPRESSED]
    return all(_inflate(raw, i) is not None for i in packed)


def readable(data: bytes, name: str) -> bytes:
    """Return an object as drgn can read it: without the debug relocations that it does not know (offsets of
    thread-locals, which are no types), and with compressed debug sections inflated, behind the end of the file."""
    raw = t.read_raw(name, data)
    _check_apart(raw)
    patched = bytearray(data)
    for index in range(len(raw.section_headers)):
        header = raw.section_headers[index]
        if ".debug" not in raw.section_name(index):
            continue
        if int(header["type"]) == t.SHT_RELA:
            _drop_tls(raw, index, patched)
        elif int(header["flags"]) & t.SHF_COMPRESSED:
            _append_inflated(raw, index, patched)
    return bytes(patched)


def debug_strings(raw: t.RawFile) -> bytes:
    found = b""
    for index in range(len(raw.section_headers)):
        if raw.section_name(index) in (".debug_str", ".debug_line_str"):
            compressed = int(raw.section_headers[index]["flags"]) & t.SHF_COMPRESSED
            found += b"\0" + ((_inflate(raw, index) or b"") if compressed else bytes(raw.contents(index)))
    return found


_SECTIONS = (".debug_info", ".debug_abbrev", ".debug_str", ".debug_line_str", ".debug_str_offsets", ".debug_addr")
_WIDTHS = {int(R.A32): 4, int(R.A64): 8}


def sections(raw: t.RawFile) -> Sections | None:
    """Return the debug sections of a program or an object, None when it has none.

    Raises `NotUnderstood` for several units of types in sections of their own, `PatcherError` for damaged ones.
    """
    found: dict[str, bytes] = dict.fromkeys(_SECTIONS, b"")
    headers = raw.section_headers
    names = dict(enumerate(t.strings_at(raw.section_names, headers["name"])))
    indexes = [i for i, name in names.items() if name in found]
    if len({names[i] for i in indexes}) < len(indexes) or ".debug_types" in names.values():
        raise NotUnderstood("types in sections of their own")
    for index in indexes:
        packed = int(raw.section_headers[index]["flags"]) & t.SHF_COMPRESSED
        contents = _inflate(raw, index) if packed else bytes(raw.contents(index))
        if contents is None:
            raise NotUnderstood("its compression")
        found[names[index]] = contents
    tables = (headers["type"] == t.SHT_RELA).nonzero()[0].tolist() if raw.type == t.ET_REL else []
    for index, about in zip(tables, headers["info"][tables].tolist(), strict=True):
        if names.get(about) in (".debug_info", ".debug_str_offsets"):
            found[names[about]] = _relocated(raw, index, found[names[about]])
    info, abbreviations, strings, line_strings, offsets, addresses = found.values()
    return Sections(info, abbreviations, strings, line_strings, offsets, addresses) if info else None


def _relocated(raw: t.RawFile, index: int, contents: bytes) -> bytes:
    """Return a debug section of an object with what leads to other debug sections filled in: S + A, of no module."""
    rows = raw.table(index, t.RELA)
    symbols = raw.table(int(raw.section_headers[index]["link"]), t.SYM)
    data = np.frombuffer(bytearray(contents), np.uint8)
    for kind, width in _WIDTHS.items():
        chosen = rows[rows["type"] == kind]
        if not len(chosen):
            continue
        places, which = chosen["offset"].astype(np.int64), chosen["symbol"]
        if int(places.max()) + width > len(data) or int(which.max()) >= len(symbols):
            raise unreadable(raw.name, "a relocation leads beyond its section, or the symbols")
        values = (symbols["value"][which].astype(np.int64) + chosen["addend"]).astype(f"<i{width}")
        data[places[:, None] + np.arange(width)] = values.view(np.uint8).reshape(-1, width)
    return data.tobytes()


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Refuse a file whose debug information turns out to be damaged, or of a form that drgn does not know."""
    try:
        yield
    except (PatcherError, MemoryError, NotUnderstood):
        raise
    except Exception as error:  # drgn has no class of its own for what libelf refuses
        raise unreadable(name, str(error)) from None


def unreadable(name: str, why: str) -> PatcherError:
    return PatcherError(
        f"the debug information of {name} cannot be read: {why}",
        "compile it again with plain -g; or without -g, then the layouts of its types are not checked",
        code="debug-info",
    )


def _check_apart(raw: t.RawFile) -> None:
    """Refuse sections that share bytes with something: drgn relocates debug sections in place, libelf goes on
    reading what it wrote over, and the two end this process."""
    headers = raw.section_headers
    taken = headers[(headers["type"] != t.SHT_NOBITS) & (headers["type"] != t.SHT_NULL) & (headers["size"] > 0)]
    table = int.from_bytes(raw.data[40:48], "little")  # e_shoff
    extents = [(0, t.EHDR.itemsize), (table, table + headers.nbytes)]
    extents += [(start, start + size) for start, size in taken[["offset", "size"]].tolist()]
    extents.sort()
    if any(end > start for (_, end), (start, _) in pairwise(extents)) or extents[-1][1] > len(raw.data):
        raise unreadable(raw.name, "its sections overlap, or reach beyond its end")


def _drop_tls(raw: t.RawFile, index: int, patched: bytearray) -> None:
    rows = raw.table(index, t.RELA)
    start = int(raw.section_headers[index]["offset"])
    for row in ((rows["type"] == _DTPOFF64) | (rows["type"] == _DTPOFF32)).nonzero()[0].tolist():
        struct.pack_into("<I", patched, start + row * t.RELA.itemsize + 8, _NONE)


def _append_inflated(raw: t.RawFile, index: int, patched: bytearray) -> None:
    contents = _inflate(raw, index) or b""
    headers = int.from_bytes(raw.data[40:48], "little")  # e_shoff
    place = headers + index * t.SHDR.itemsize
    flags = int(raw.section_headers[index]["flags"]) & ~t.SHF_COMPRESSED
    struct.pack_into("<Q", patched, place + 8, flags)
    struct.pack_into("<QQ", patched, place + 24, len(patched), len(contents))
    struct.pack_into("<Q", patched, place + 48, 1)
    patched += contents


def _inflate(raw: t.RawFile, index: int) -> bytes | None:
    """Return what a compressed section holds, or None when it is not in zlib's format (but in zstd's).

    Raises `PatcherError` when it is damaged.
    """
    contents, name = bytes(raw.contents(index)), raw.section_name(index)
    # Elf64_Chdr: type, reserved, size, alignment (System V ABI, "Section compression"); 1 is zlib
    kind, size = int.from_bytes(contents[:4], "little"), int.from_bytes(contents[8:16], "little")
    if kind != 1:
        return None
    if size > _DENSEST * len(contents):
        raise unreadable(raw.name, f"{name} claims {size} bytes, compressed to {len(contents)}")
    try:
        return zlib.decompressobj().decompress(contents[24:], size) if size else b""
    except zlib.error as error:
        raise unreadable(raw.name, f"{name}: {error}") from None
