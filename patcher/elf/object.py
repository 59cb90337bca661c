"""A relocatable object file (`ET_REL`): its allocated sections, symbols and relocations, frozen.

Debug sections and their relocations are skipped: four in five relocations of a unit are theirs,
and nothing on the way to the live process looks at them.

Specification: System V ABI, chapter 4; AMD64 supplement, chapter 4.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from itertools import repeat
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from patcher.bulk import collector_paused
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

    `key`: section and offset as one rising number (`row_key`). Rows of type R_X86_64_NONE are left out.
    """

    key: Column
    offset: Column
    type: Column
    symbol: Column
    addend: Column

    def between(self, first: Column, last: Column) -> tuple[Column, Column]:
        """Return, for pairs of keys, the first row from the one on, and the first row from the other on."""
        return np.searchsorted(self.key, first), np.searchsorted(self.key, last)


@dataclass(frozen=True, slots=True, eq=False)
class SymbolRows:
    """The numbers of `ObjectFile.symbols` as columns; what looks at all symbols would take ten times as long."""

    section: Column
    value: npt.NDArray[np.uint64]
    size: npt.NDArray[np.uint64]
    type: Column
    binding: Column

    @classmethod
    def of(cls, symbols: Sequence[Symbol]) -> SymbolRows:
        """Return the columns of some symbols."""
        value, size = (np.array([s[i] for s in symbols], np.uint64) for i in (3, 4))
        section, kind, binding = (np.array([s[i] for s in symbols], np.int64) for i in (2, 5, 6))
        return cls(section, value, size, kind, binding)


KEY_BITS = 33  # no section is larger than 1 << 32


def row_key(section: Column | np.int64, offset: Column) -> Column:
    """Return a place in a section as a number by which rows are sorted; its lower `KEY_BITS` are the offset."""
    return section << KEY_BITS | offset


# Not frozen: a large unit has hundreds of thousands, and a frozen dataclass takes three times as long to make.
@dataclass(slots=True, eq=False)
class Section:
    """One allocated section; it never changes. `data` is empty for one that takes no room in the file."""

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
    _symbol_rows: SymbolRows | None = field(default=None, repr=False)

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

    @cached_property
    def symbol_rows(self) -> SymbolRows:
        """The symbols as columns."""
        return self._symbol_rows or SymbolRows.of(self.symbols)

    def relocations(self, section: int) -> list[Relocation]:
        """Return the relocations of a section, by rising offset. Raises `ObjectError` for impossible ones."""
        rows = self.relocation_rows
        start, end = np.searchsorted(
            rows.key, row_key(np.array([section, section + 1]), np.zeros(2, np.int64))
        ).tolist()
        columns = (rows.offset, rows.type, rows.symbol, rows.addend)
        return list(map(Relocation._make, zip(*(c[start:end].tolist() for c in columns), strict=True)))

    @cached_property
    def relocation_rows(self) -> RelocationRows:
        """The relocations of all allocated sections. Raises `ObjectError` for impossible ones."""
        targets, tables = self._relocation_sections()
        counts, words = _relocation_words(self._raw, tables)
        offset, info, addend = words[:, 0], words[:, 1], words[:, 2]
        kind, symbol = info & 0xFFFFFFFF, info >> 32 & 0xFFFFFFFF
        owner = np.repeat(targets, counts)
        self._check_rows(owner, offset, symbol)
        key = row_key(owner, offset)
        order = np.argsort(key, kind="stable")
        order = order[kind[order] != R.NONE]
        return RelocationRows(key[order], offset[order], kind[order], symbol[order], addend[order])

    def _relocation_sections(self) -> tuple[Column, Column]:
        """Return the allocated sections that have relocations, and the sections of those."""
        headers = self._raw.section_headers
        loaded = np.zeros(len(headers), bool)
        loaded[list(self.sections)] = True
        tables = np.flatnonzero((headers["type"] == t.SHT_REL) | (headers["type"] == t.SHT_RELA))
        targets = headers["info"][tables].astype(np.int64)
        known = targets < len(headers)
        known[known] = loaded[targets[known]]
        tables, targets = tables[known], targets[known]
        without_addends = tables[headers["type"][tables] == t.SHT_REL].tolist()
        if without_addends:
            raise ObjectError(
                f"{self.name}: section {without_addends[0]} has relocations without addends (SHT_REL)",
                "x86-64 objects use SHT_RELA; compile it with a standard toolchain",
            )
        return targets, tables

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


def _relocation_words(raw: t.RawFile, sections: Column) -> tuple[Column, Column]:
    """Return how many rows each table has, and the (offset, info, addend) rows of one after another."""
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
        return counts, np.concatenate([np.empty(0, np.int64), *tables]).reshape(-1, 3)
    # Thousands of little tables, one for each function, are gathered in one go.
    words = np.frombuffer(data, "<i8", len(data) // 8)
    row = np.arange(int(ends[-1]) if len(ends) else 0, dtype=np.int64)
    first = np.repeat(positions // 8 - 3 * starts, counts) + 3 * row
    return counts, words[first[:, None] + np.arange(3)]


_ROW = t.RELA.itemsize


def parse_object(name: str, data: bytes) -> ObjectFile:
    """Read a relocatable object from its bytes; `name` is for messages."""
    raw = t.read_raw(name, data)
    if raw.type != t.ET_REL:
        kinds = {t.ET_EXEC: "an executable", t.ET_DYN: "a shared library or executable", t.ET_CORE: "a core file"}
        kind = kinds.get(raw.type, f"of type {raw.type}")
        raise ObjectError(f"{name}: {kind}, not a relocatable object", "give what the compiler makes with -c")
    with collector_paused():
        sections = _read_sections(raw)
        symbols, rows = _read_symbols(raw)
    slim_lto = b".gnu.lto_" in raw.section_names and not any(
        s.size for s in sections.values() if not s.name.startswith(".note")
    )
    if slim_lto or any(s.name == "__gnu_lto_slim" for s in symbols):
        raise ObjectError(f"{name}: LTO bytecode without machine code", "compile it with -fno-lto or -ffat-lto-objects")
    return ObjectFile(name, sections, symbols, raw, rows)


_WIDEST_CHARACTER = 16


def _read_sections(raw: t.RawFile) -> dict[int, Section]:
    headers = raw.section_headers
    loaded = (headers["flags"] & t.SHF_ALLOC != 0) & ~np.isin(headers["type"], (t.SHT_NULL, t.SHT_GROUP))
    indexes = np.flatnonzero(loaded)
    headers = headers[indexes]
    for row in np.flatnonzero(_looks_damaged(headers)).tolist():
        _check_section(raw, int(indexes[row]))
    numbers = indexes.tolist()
    names = t.strings_at(raw.section_names, headers["name"])
    kinds, flags, sizes, entry_sizes = (headers[c].tolist() for c in ("type", "flags", "size", "entry_size"))
    alignments = np.maximum(headers["alignment"], 1).tolist()
    contents = _contents(raw, indexes)
    sections = map(Section, numbers, names, kinds, flags, sizes, alignments, entry_sizes, contents)
    return dict(zip(numbers, sections, strict=True))


def _looks_damaged(headers: t.Table) -> npt.NDArray[np.bool_]:
    """Tell which sections `_check_section` may object to."""
    flags, alignment = headers["flags"], headers["alignment"]
    code_and_thread_local = t.SHF_TLS | t.SHF_EXECINSTR
    damaged: npt.NDArray[np.bool_] = (alignment & (alignment - np.uint64(1)) != 0) | (alignment > 1 << 30)
    damaged |= (headers["size"] > 1 << 32) | (flags & code_and_thread_local == code_and_thread_local)
    damaged |= (flags & t.SHF_STRINGS != 0) & (headers["entry_size"] > _WIDEST_CHARACTER)
    return damaged


def _check_section(raw: t.RawFile, index: int) -> None:
    name = raw.section_name(index)
    _, _, flags, _, _, size, _, _, alignment, entry_size = raw.section_headers[index].tolist()
    claim = ""
    if alignment & (alignment - 1) or alignment > 1 << 30:
        claim = f"wants an alignment of {alignment}"
    elif size > 1 << 32:
        claim = f"claims {size} bytes"
    elif flags & t.SHF_TLS and flags & t.SHF_EXECINSTR:
        claim = "claims to be code and thread-local"
    elif flags & t.SHF_STRINGS and entry_size > _WIDEST_CHARACTER:
        claim = f"claims characters of {entry_size} bytes"
    if claim:
        raise ObjectError(f"{raw.name}: section {name} {claim}", "the object is damaged; compile it again")


def _contents(raw: t.RawFile, indexes: Column) -> list[bytes]:
    """Return the bytes of some sections; none for those that take no room in the file."""
    headers, room = raw.section_headers[indexes], np.uint64(len(raw.data))
    absent = headers["type"] == t.SHT_NOBITS
    start, size = (np.where(absent, np.uint64(0), headers[name]) for name in ("offset", "size"))
    for row in np.flatnonzero((start > room) | (size > room - np.minimum(start, room))).tolist():
        raw.contents(int(indexes[row]))  # says which section, and what is wrong with it
    data = raw.data[:]
    return [bytes(data[a:b]) for a, b in zip(start.tolist(), (start + size).tolist(), strict=True)]


def _read_symbols(raw: t.RawFile) -> tuple[tuple[Symbol, ...], SymbolRows]:
    headers = raw.section_headers
    tables = np.flatnonzero(headers["type"] == t.SHT_SYMTAB).tolist()
    if not tables:
        return (), SymbolRows.of(())
    link = int(headers[tables[0]]["link"])
    if link >= len(headers):
        raise ObjectError(
            f"{raw.name}: the symbol table has no string table", "the object is damaged; compile it again"
        )
    rows = raw.table(tables[0], t.SYM)
    names = t.strings_at(bytes(raw.contents(link)), rows["name"])
    info, visibility = rows["info"], rows["other"] & 3
    sections = _symbol_sections(raw, rows["section"].astype(np.int64))
    kinds, bindings = (info & 15).astype(np.int64), (info >> 4).astype(np.int64)
    found = SymbolRows(sections, rows["value"].astype(np.uint64), rows["size"].astype(np.uint64), kinds, bindings)
    columns = (found.section, found.value, found.size, found.type, found.binding, visibility)
    numbers = zip(range(len(rows)), names, *(c.tolist() for c in columns), strict=True)
    # What `Symbol._make` does, without a call of Python for each of hundreds of thousands.
    return tuple(map(tuple.__new__, repeat(Symbol), numbers)), found


def _symbol_sections(raw: t.RawFile, sections: Column) -> Column:
    """Return the sections of symbols as `Symbol.section` has them."""
    kinds = raw.section_headers["type"]
    extended = np.empty(0, np.int64)
    for index in np.flatnonzero(kinds == t.SHT_SYMTAB_SHNDX).tolist()[:1]:
        extended = raw.table(index, np.dtype("<u4")).astype(np.int64)[: len(sections)]
    elsewhere = np.flatnonzero(sections[: len(extended)] == t.SHN_XINDEX)
    reserved = sections >= t.SHN_LORESERVE
    found = sections - np.where(reserved, _RESERVED, 0)
    found[elsewhere] = extended[elsewhere]
    for number in np.flatnonzero(found >= len(kinds)).tolist():
        raise ObjectError(
            f"{raw.name}: symbol {number} stands in section {int(found[number])} of {len(kinds)}",
            "the object is damaged; compile it again",
        )
    return found
