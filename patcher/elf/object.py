"""A relocatable object file (`ET_REL`): its allocated sections, symbols and relocations, frozen.

Debug sections and their relocations are skipped: four in five relocations of a unit are theirs,
and nothing on the way to the live process looks at them.

Specification: System V ABI, chapter 4; AMD64 supplement, chapter 4.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from patcher.elf import tables as t
from patcher.elf.relocations import R
from patcher.errors import ObjectError


class SymbolType(IntEnum):
    NOTYPE = 0
    OBJECT = 1
    FUNC = 2
    SECTION = 3
    FILE = 4
    COMMON = 5
    TLS = 6
    IFUNC = 10


class SymbolBinding(IntEnum):
    LOCAL = 0
    GLOBAL = 1
    WEAK = 2
    UNIQUE = 10


_RESERVED = 0x10000
_ABSOLUTE = t.SHN_ABS - _RESERVED
_COMMON = (t.SHN_COMMON - _RESERVED, t.SHN_X86_64_LCOMMON - _RESERVED)


class Symbol(NamedTuple):
    """One entry of the symbol table.

    `section` is a section index; an SHN_ constant of the reserved range stands 0x10000 lower, since an object of
    more than 65,279 sections uses those numbers as indexes too.
    """

    number: int
    name: str
    section: int
    value: int
    size: int
    type: int
    binding: int
    visibility: int

    @property
    def undefined(self) -> bool:
        return self.section == t.SHN_UNDEF

    @property
    def common(self) -> bool:
        return self.section in _COMMON

    @property
    def absolute(self) -> bool:
        return self.section == _ABSOLUTE

    @property
    def local(self) -> bool:
        return self.binding == SymbolBinding.LOCAL

    @property
    def weak(self) -> bool:
        return self.binding == SymbolBinding.WEAK


class Relocation(NamedTuple):
    """One RELA entry: apply `type` at `offset` of its section, to symbol number `symbol`."""

    offset: int
    type: int
    symbol: int
    addend: int


Column = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class RelocationRows:
    """Relocations as columns, in which those of one section stand together, by rising offset.

    `extents`: section -> its rows (first, one beyond the last). Rows of type R_X86_64_NONE are left out.
    """

    extents: dict[int, tuple[int, int]]
    offset: Column
    type: Column
    symbol: Column
    addend: Column


@dataclass(frozen=True, slots=True)
class Section:
    """One allocated section; `data` is empty for one that takes no room in the file."""

    index: int
    name: str
    type: int
    flags: int
    size: int
    alignment: int
    entry_size: int
    data: bytes = field(repr=False)

    @property
    def code(self) -> bool:
        return bool(self.flags & t.SHF_EXECINSTR)

    @property
    def writable(self) -> bool:
        """True for what is writable as the program starts: RELRO data is."""
        return bool(self.flags & t.SHF_WRITE)

    @property
    def thread_local(self) -> bool:
        return bool(self.flags & t.SHF_TLS)

    @property
    def read_only(self) -> bool:
        """True for what the program cannot write once it runs, RELRO data included."""
        return not self.flags & t.SHF_WRITE or self.name.startswith((".data.rel.ro", ".ldata.rel.ro"))

    @property
    def strings(self) -> bool:
        return bool(self.flags & t.SHF_MERGE) and bool(self.flags & t.SHF_STRINGS)

    @property
    def mergeable(self) -> bool:
        return bool(self.flags & t.SHF_MERGE)


@dataclass(frozen=True, eq=False)
class ObjectFile:
    """A relocatable object. `name` is for messages: the path, or `archive(member)`."""

    name: str
    sections: dict[int, Section]
    symbols: tuple[Symbol, ...]
    _raw: t.RawFile = field(repr=False)

    @property
    def contents(self) -> memoryview:
        """The whole object, as it was read."""
        return self._raw.data[:]

    @cached_property
    def file_symbol(self) -> str:
        """The name in the object's STT_FILE symbol: the base name of its source file, or ""."""
        return next((s.name for s in self.symbols if s.type == SymbolType.FILE), "")

    @property
    def files(self) -> tuple[str, ...]:
        """The names of all its STT_FILE symbols: more than one when it was linked of several objects (`ld -r`)."""
        return tuple(dict.fromkeys(s.name for s in self._file_symbols if s.name))

    @cached_property
    def _file_symbols(self) -> tuple[Symbol, ...]:
        return tuple(s for s in self.symbols if s.type == SymbolType.FILE)

    def file_of(self, local: Symbol) -> str:
        """Return the STT_FILE symbol that a local symbol stands under, or ""."""
        before = bisect.bisect_left(self._file_symbols, local.number, key=lambda s: s.number)
        return self._file_symbols[before - 1].name if before else ""

    def relocations(self, section: int) -> list[Relocation]:
        """Return the relocations of a section, by rising offset. Raises `ObjectError` for impossible ones."""
        rows = self.relocation_rows
        start, end = rows.extents.get(section, (0, 0))
        columns = (rows.offset, rows.type, rows.symbol, rows.addend)
        return list(map(Relocation._make, zip(*(c[start:end].tolist() for c in columns), strict=True)))

    @cached_property
    def relocation_rows(self) -> RelocationRows:
        """The relocations of all allocated sections. Raises `ObjectError` for impossible ones."""
        sections = self._relocation_sections()
        starts, ends, words = _relocation_words(self._raw, [index for _, index in sections])
        offset, info, addend = words[:, 0], words[:, 1], words[:, 2]
        kind, symbol = info & 0xFFFFFFFF, info >> 32 & 0xFFFFFFFF
        targets = np.array([target for target, _ in sections], np.int64)
        owner = np.repeat(targets, ends - starts)
        self._check_rows(owner, offset, symbol)
        order = np.lexsort((offset, owner))
        order = order[kind[order] != R.NONE]
        owner = owner[order]
        cuts = np.flatnonzero(np.diff(owner)) + 1
        firsts, lasts = [0, *cuts.tolist()], [*cuts.tolist(), len(owner)]
        extents = {int(owner[a]): (a, b) for a, b in zip(firsts, lasts, strict=True) if b > a}
        return RelocationRows(extents, offset[order], kind[order], symbol[order], addend[order])

    def _relocation_sections(self) -> list[tuple[int, int]]:
        """Return (section, section of its relocations) for every allocated section that has some."""
        headers = self._raw.section_headers
        found = []
        for index in np.flatnonzero((headers["type"] == t.SHT_REL) | (headers["type"] == t.SHT_RELA)).tolist():
            target = int(headers["info"][index])
            if target not in self.sections:
                continue
            if headers["type"][index] == t.SHT_REL:
                raise ObjectError(
                    f"{self.name}: section {index} has relocations without addends (SHT_REL)",
                    "x86-64 objects use SHT_RELA; compile it with a standard toolchain",
                )
            found.append((target, index))
        return found

    def _check_rows(self, owner: Column, offset: Column, symbol: Column) -> None:
        sizes = np.zeros(max(self.sections, default=0) + 1, np.int64)
        sizes[list(self.sections)] = [section.size for section in self.sections.values()]
        bad = (symbol >= len(self.symbols)) | (offset < 0) | (offset >= sizes[owner])
        if bad.any():
            row = int(np.argmax(bad))
            section = self.sections[int(owner[row])]
            raise ObjectError(
                f"{self.name}: a relocation at {section.name}+{int(offset[row]) & (1 << 64) - 1:#x} names symbol "
                f"{int(symbol[row])} of {len(self.symbols)} in a section of {section.size} bytes",
                "the object is damaged; compile it again",
            )


def _relocation_words(raw: t.RawFile, sections: list[int]) -> tuple[Column, Column, Column]:
    """Return where each table starts and ends in one array of (offset, info, addend) rows, and that array."""
    headers = raw.section_headers[sections]
    data = raw.data[:]
    room = np.uint64(len(data))
    if (headers["offset"] > room).any() or (headers["size"] > room - headers["offset"]).any():
        raise ObjectError(
            f"{raw.name}: a relocation table reaches beyond the end of the file",
            "the file is truncated; compile it again",
        )
    counts = (headers["size"] // _ROW).astype(np.int64)
    ends = np.cumsum(counts)
    if len(ends) and int(ends[-1]) * _ROW > len(data):
        raise ObjectError(f"{raw.name}: relocation tables that overlap", "the object is damaged; compile it again")
    starts = ends - counts
    positions = headers["offset"].astype(np.int64)
    if (positions % 8).any():
        tables = [np.frombuffer(data, "<i8", 3 * int(n), int(p)) for p, n in zip(positions, counts, strict=True)]
        return starts, ends, np.concatenate([np.empty(0, np.int64), *tables]).reshape(-1, 3)
    # Thousands of little tables, one for each function, are gathered in one go.
    words = np.frombuffer(data, "<i8", len(data) // 8)
    row = np.arange(int(ends[-1]) if len(ends) else 0, dtype=np.int64)
    first = np.repeat(positions // 8 - 3 * starts, counts) + 3 * row
    return starts, ends, words[first[:, None] + np.arange(3)]


_ROW = t.RELA.itemsize


def read_object(path: Path) -> ObjectFile:
    """Read one relocatable object. Raises `ObjectError` with what the file is instead."""
    return parse_object(str(path), _file_bytes(path))


def read_objects(path: Path) -> tuple[ObjectFile, ...]:
    """Read an object, or every object of an archive, in archive order."""
    from patcher.elf.archive import is_archive, read_archive

    data = _file_bytes(path)
    if not is_archive(data):
        return (parse_object(str(path), data),)
    members = read_archive(path, data)
    objects = tuple(
        parse_object(f"{path}({name})", contents) for name, contents in members if contents[:4] in t.OBJECT_MAGIC
    )
    if not objects:
        raise ObjectError(f"{path}: an archive without objects", "give an archive of relocatable objects")
    return objects


def _file_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except IsADirectoryError:
        raise ObjectError(f"{path}: is a directory", "give an object, an archive or a source file") from None
    except OSError as error:
        raise ObjectError(f"{path}: {(error.strerror or str(error)).lower()}", "check the path") from None


def parse_object(name: str, data: bytes) -> ObjectFile:
    """Read a relocatable object from its bytes; `name` is for messages."""
    raw = t.read_raw(name, data)
    if raw.type != t.ET_REL:
        kinds = {t.ET_EXEC: "an executable", t.ET_DYN: "a shared library or executable", t.ET_CORE: "a core file"}
        kind = kinds.get(raw.type, f"of type {raw.type}")
        raise ObjectError(f"{name}: {kind}, not a relocatable object", "give what the compiler makes with -c")
    sections = _read_sections(raw)
    symbols = _read_symbols(raw)
    slim_lto = b".gnu.lto_" in raw.section_names and not any(
        s.size for s in sections.values() if not s.name.startswith(".note")
    )
    if slim_lto or any(s.name == "__gnu_lto_slim" for s in symbols):
        raise ObjectError(f"{name}: LTO bytecode without machine code", "compile it with -fno-lto or -ffat-lto-objects")
    return ObjectFile(name, sections, symbols, raw)


def defined_names(path: Path) -> dict[str, bool]:
    """Return the names that an object defines for others, each with whether its definition is weak.

    Empty for what is no object. Only the symbol table is looked at.
    """
    try:
        raw = t.read_raw(str(path), _file_bytes(path))
        kinds = raw.section_headers["type"].tolist() if raw.type == t.ET_REL else []
        if t.SHT_SYMTAB not in kinds:
            return {}
        index = kinds.index(t.SHT_SYMTAB)
        table = raw.table(index, t.SYM)
        strings = bytes(raw.contents(int(raw.section_headers[index]["link"])))
    except (ObjectError, IndexError):
        return {}
    bindings = table["info"] >> 4
    chosen = np.flatnonzero((table["section"] != t.SHN_UNDEF) & (bindings != SymbolBinding.LOCAL))
    names = (t.string_at(strings, int(offset)) for offset in table["name"][chosen])
    return dict(zip(names, (bindings[chosen] == SymbolBinding.WEAK).tolist(), strict=True))


_WIDEST_CHARACTER = 16


def _read_sections(raw: t.RawFile) -> dict[int, Section]:
    sections: dict[int, Section] = {}
    rows = raw.section_headers.tolist()
    for index, (name_offset, kind, flags, _, _, size, _, _, alignment, entry_size) in enumerate(rows):
        if not flags & t.SHF_ALLOC or kind in (t.SHT_NULL, t.SHT_GROUP):
            continue
        name = t.string_at(raw.section_names, name_offset)
        if alignment & (alignment - 1) or alignment > 1 << 30:
            raise ObjectError(
                f"{raw.name}: section {name} wants an alignment of {alignment}",
                "the object is damaged; compile it again",
            )
        if size > 1 << 32:
            raise ObjectError(
                f"{raw.name}: section {name} claims {size} bytes", "the object is damaged; compile it again"
            )
        if flags & t.SHF_TLS and flags & t.SHF_EXECINSTR:
            raise ObjectError(
                f"{raw.name}: section {name} claims to be code and thread-local",
                "the object is damaged; compile it again",
            )
        if flags & t.SHF_STRINGS and entry_size > _WIDEST_CHARACTER:
            raise ObjectError(
                f"{raw.name}: section {name} claims characters of {entry_size} bytes",
                "the object is damaged; compile it again",
            )
        data = bytes(raw.contents(index))
        sections[index] = Section(index, name, kind, flags, size, alignment or 1, entry_size, data)
    return sections


def _read_symbols(raw: t.RawFile) -> tuple[Symbol, ...]:
    kinds = raw.section_headers["type"].tolist()
    if t.SHT_SYMTAB not in kinds:
        return ()
    index = kinds.index(t.SHT_SYMTAB)
    link = int(raw.section_headers[index]["link"])
    if link >= len(raw.section_headers):
        raise ObjectError(
            f"{raw.name}: the symbol table has no string table", "the object is damaged; compile it again"
        )
    strings = bytes(raw.contents(link))
    extended: list[int] = []
    if t.SHT_SYMTAB_SHNDX in kinds:
        extended = raw.table(kinds.index(t.SHT_SYMTAB_SHNDX), np.dtype("<u4")).tolist()
    count = len(kinds)
    symbols = []
    for i, (name, info, other, section, value, size) in enumerate(raw.table(index, t.SYM).tolist()):
        if section == t.SHN_XINDEX and i < len(extended):
            section = extended[i]
        elif section >= t.SHN_LORESERVE:
            section -= _RESERVED
        if section >= count:
            raise ObjectError(
                f"{raw.name}: symbol {i} stands in section {section} of {count}",
                "the object is damaged; compile it again",
            )
        text = t.string_at(strings, name)
        symbols.append(Symbol(i, text, section, value, size, info & 15, info >> 4, other & 3))
    return tuple(symbols)
