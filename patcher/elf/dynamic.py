"""What the dynamic linker reads of a module: its symbols with their versions, its relocations, what it needs.

Taken from the program headers, as the dynamic linker does; section headers are asked only for the number of dynamic
symbols, which nothing else says when there is no DT_HASH. Tables stay arrays: a symbol or a cell becomes an object
when it is asked for. All addresses are link-time.

Specification: System V ABI, chapter 5; AMD64 supplement, section 5.2; LSB, symbol versioning; generic ABI, DT_RELR.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from patcher.elf import tables as t
from patcher.elf.object import SymbolBinding, SymbolType
from patcher.elf.orders import Orders, orders
from patcher.elf.relocations import R
from patcher.errors import ObjectError

_NEEDED, _PLTRELSZ, _HASH, _STRTAB, _SYMTAB, _RELA, _RELASZ = 1, 2, 4, 5, 6, 7, 8
_STRSZ, _SONAME, _SYMBOLIC, _JMPREL, _FLAGS, _RELRSZ, _RELR = 10, 14, 16, 23, 30, 35, 36
_DF_SYMBOLIC = 2
_GNU_HASH, _VERSYM, _VERDEF, _VERDEFNUM = 0x6FFFFEF5, 0x6FFFFFF0, 0x6FFFFFFC, 0x6FFFFFFD
_VERNEED, _VERNEEDNUM = 0x6FFFFFFE, 0x6FFFFFFF

TLSDESC = 36
"""The dynamic relocation of a thread-local descriptor: two words, a function and its argument (psABI, table 4.10)."""

THREAD_CELLS = (R.DTPMOD64, R.TPOFF64, TLSDESC)
"""The dynamic relocations by which code finds thread-local variables."""

_ENTRY = np.dtype([("tag", "<u8"), ("value", "<u8")])
_HIDDEN_VERSION = 0x8000
_BASE = 1  # no version: the definition of that number names the module itself
_RELR_BITS = 63


@dataclass(frozen=True, slots=True)
class DynamicSymbol:
    """One .dynsym entry. `value` of an undefined function may be its canonical PLT address."""

    name: str
    value: int
    size: int
    type: int
    binding: int
    version: str
    default: bool  # the version that a reference without a version binds to
    defined: bool
    absolute: bool = False  # `value` is the same wherever the module is loaded
    protected: bool = False  # the module's own references to it stay within it

    @property
    def function(self) -> bool:
        return self.type in (SymbolType.FUNC, SymbolType.IFUNC)


@dataclass(frozen=True, slots=True)
class Cell:
    """What the dynamic linker puts at one address: a relocation of type `type` against `name` (or "")."""

    type: int
    name: str
    addend: int


class Exports(Mapping[str, tuple[DynamicSymbol, ...]]):
    """The dynamic symbols by name; imported ones, which are undefined, are among them."""

    def __init__(
        self, table: t.Table, strings: bytes, versions: t.Table, version_names: dict[int, str], build_id: str
    ) -> None:
        self._table = table
        self._strings = strings
        self._versions = versions
        self._version_names = version_names
        self._build_id = build_id
        self._found: dict[str, tuple[DynamicSymbol, ...]] = {}

    @classmethod
    def empty(cls) -> Exports:
        return cls(np.empty(0, t.SYM), b"", np.empty(0, "<u2"), {}, "")

    def __getitem__(self, name: str) -> tuple[DynamicSymbol, ...]:
        found = self._found.get(name)
        if found is None:
            found = self._found[name] = tuple(self._symbol(i) for i in self.entries(name))
        if not found:
            raise KeyError(name)
        return found

    def __iter__(self) -> Iterator[str]:
        names = (self.name(i) for i in range(len(self._table)))
        return iter(dict.fromkeys(name for name in names if name))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def entries(self, name: str) -> list[int]:
        """Return which entries of the table have a name."""
        if not name:
            return []
        # In the hash, a name ends at "@", and bytes that are no UTF-8 have been lost: all entries are candidates.
        odd = "@" in name or "\ufffd" in name
        candidates = range(len(self._table)) if odd else self._orders.candidates(name)
        return [i for i in candidates if self.name(i) == name]

    def name(self, entry: int) -> str:
        """Return the name of an entry; "" when there is no such entry."""
        return t.string_at(self._strings, int(self._table["name"][entry])) if entry < len(self._table) else ""

    def local_start(self, entry: int) -> int | None:
        """Return the value of a local symbol, None for any other.

        Some linkers let cells of thread-locals name a module's statics, which says no more than their offset, and
        whose names need not be one's only.
        """
        if not 0 < entry < len(self._table) or self._table["section"][entry] == t.SHN_UNDEF:
            return None
        local = self._table["info"][entry] >> 4 == SymbolBinding.LOCAL
        return int(self._table["value"][entry]) if local else None

    def names_at(self, address: int) -> list[str]:
        """Return the names of the symbols that start at an address."""
        return [name for i in self._orders.starting(address) if (name := self.name(i))]

    @cached_property
    def _orders(self) -> Orders:
        return orders(self._table, self._strings, self._chosen, self._build_id, "exports")

    def _chosen(self) -> tuple[t.Table, t.Table]:
        placed = (self._table["section"] != t.SHN_UNDEF) | (self._table["value"] != 0)
        return np.ones(len(self._table), bool), placed

    def _symbol(self, entry: int) -> DynamicSymbol:
        _, info, other, section, value, size = self._table[entry].item()
        version = int(self._versions[entry]) if entry < len(self._versions) else 0
        named = self._version_names.get(version & ~_HIDDEN_VERSION, "")
        default = not version & _HIDDEN_VERSION
        defined = section != t.SHN_UNDEF
        absolute, protected = section == t.SHN_ABS, other & 3 == t.STV_PROTECTED
        kind, binding = info & 15, info >> 4
        return DynamicSymbol(self.name(entry), value, size, kind, binding, named, default, defined, absolute, protected)


class Cells(Mapping[int, Cell]):
    """What the dynamic linker fills in, by address; where several relocations apply to one address, the last."""

    def __init__(self, relocations: t.Table, exports: Exports) -> None:
        self._relocations = relocations
        self._exports = exports

    @cached_property
    def _ordered(self) -> tuple[t.Table, t.Table]:
        """The addresses, ascending, and where their relocations stand."""
        addresses = np.ascontiguousarray(self._relocations["offset"])
        order = np.argsort(addresses, kind="stable")
        addresses = addresses[order]
        last = np.append(addresses[1:] != addresses[:-1], np.ones(min(1, len(addresses)), bool))
        return addresses[last], order[last]

    def __getitem__(self, address: int) -> Cell:
        addresses, places = self._ordered
        if 0 <= address < 1 << 64:
            position = int(np.searchsorted(addresses, np.uint64(address)))
            if position < len(addresses) and int(addresses[position]) == address:
                _, kind, symbol, addend = self._relocations[int(places[position])].item()
                kind &= 0xFF
                start = self._exports.local_start(symbol) if kind in THREAD_CELLS else None
                if start is not None:
                    return Cell(kind, "", start + addend)
                return Cell(kind, self._exports.name(symbol), addend)
        raise KeyError(address)

    def __iter__(self) -> Iterator[int]:
        return iter(self._ordered[0].tolist())

    def __len__(self) -> int:
        return len(self._ordered[0])

    def named(self, name: str) -> list[int]:
        """Return the addresses of the cells that are relocated against a symbol, ascending."""
        symbols, addresses = self._by_symbol
        found: list[int] = []
        for entry in self._exports.entries(name):
            low, high = (int(np.searchsorted(symbols, np.uint32(entry), side)) for side in ("left", "right"))
            found += addresses[low:high].tolist()
        return sorted(found)

    def between(self, low: int, high: int) -> list[int]:
        """Return the addresses of the cells that start in `low` <= address < `high`, ascending."""
        addresses = self._ordered[0]
        first, last = (int(np.searchsorted(addresses, np.uint64(a))) for a in (low, high))
        found: list[int] = addresses[first:last].tolist()
        return found

    def any_between(self, low: t.Table, high: t.Table) -> t.Table:
        """Tell for each of many extents whether a cell starts in it."""
        addresses = self._ordered[0]
        found: t.Table = np.searchsorted(addresses, low) != np.searchsorted(addresses, high)
        return found

    def of_type(self, kind: int) -> list[int]:
        """Return the addresses of the cells of one relocation type, ascending."""
        addresses, places = self._ordered
        found: list[int] = addresses[self._relocations["type"][places] & 0xFF == kind].tolist()
        return found

    @cached_property
    def _by_symbol(self) -> tuple[t.Table, t.Table]:
        addresses, places = self._ordered
        symbols = np.ascontiguousarray(self._relocations["symbol"])[places]
        named = np.flatnonzero(symbols)
        addresses, symbols = addresses[named], symbols[named]
        order = np.argsort(symbols, kind="stable")
        return symbols[order], addresses[order]


@dataclass(frozen=True, slots=True, eq=False)
class Dynamic:
    """What the dynamic section says; empty for a static executable."""

    address: int
    soname: str
    needed: tuple[str, ...]
    symbolic: bool  # its own definitions come first for its own references (-Bsymbolic)
    cells: Cells
    exports: Exports


def read_dynamic(raw: t.RawFile, build_id: str) -> Dynamic:
    """Read the dynamic section and the tables that it names. Raises `ObjectError` when they lie outside the file."""
    header = next((p for p in raw.program_headers if int(p["type"]) == t.PT_DYNAMIC), None)
    if header is None:
        exports = Exports.empty()
        return Dynamic(0, "", (), False, Cells(_resolver_relocations(raw), exports), exports)
    return _Section(raw, int(header["address"]), int(header["offset"]), int(header["file_size"])).read(build_id)


def _resolver_relocations(raw: t.RawFile) -> t.Table:
    # A static executable's own start-up code applies these: to cells of IFUNCs.
    found = [
        raw.table(index, t.RELA)
        for index, header in enumerate(raw.section_headers)
        if int(header["type"]) == t.SHT_RELA and int(header["flags"]) & t.SHF_ALLOC
    ]
    every: t.Table = np.concatenate([np.empty(0, t.RELA), *found])
    resolved: t.Table = every[every["type"] == R.IRELATIVE]
    return resolved


class _Section:
    """The dynamic section, and how its addresses lead to bytes of the file."""

    def __init__(self, raw: t.RawFile, address: int, offset: int, size: int) -> None:
        self._raw = raw
        self._address = address
        data = raw.data[offset : offset + size]
        entries = np.frombuffer(data, _ENTRY, len(data) // _ENTRY.itemsize)
        ends = np.flatnonzero(entries["tag"] == 0)
        self._entries = [(tag, value) for tag, value in entries[: int(ends[0]) if len(ends) else None].tolist()]
        self._values = dict(self._entries)
        self._segments = [
            (int(p["address"]), int(p["file_size"]), int(p["offset"]))
            for p in raw.program_headers
            if int(p["type"]) == t.PT_LOAD
        ]

    def read(self, build_id: str) -> Dynamic:
        strings = t.as_bytes(self._bytes("string table", _STRTAB, self._values.get(_STRSZ, 0)))
        relocations = self._relocations()
        table = self._symbols(relocations)
        versions = self._bytes("version table", _VERSYM, 2 * len(table)) if _VERSYM in self._values else b""
        exports = Exports(table, strings, np.frombuffer(versions, "<u2"), self._version_names(strings), build_id)
        soname = t.string_at(strings, self._values[_SONAME]) if _SONAME in self._values else ""
        needed = tuple(t.string_at(strings, value) for tag, value in self._entries if tag == _NEEDED)
        symbolic = _SYMBOLIC in self._values or bool(self._values.get(_FLAGS, 0) & _DF_SYMBOLIC)
        return Dynamic(self._address, soname, needed, symbolic, Cells(relocations, exports), exports)

    def _at(self, what: str, address: int, size: int) -> memoryview:
        for start, length, offset in self._segments:
            if start <= address and address + size <= start + length and offset + length <= len(self._raw.data):
                return self._raw.data[offset + address - start : offset + address - start + size]
        raise ObjectError(
            f"{self._raw.name}: its dynamic tables cannot be read (the {what} at {address:#x} lies outside the file)",
            "the file is damaged",
        )

    def _bytes(self, what: str, tag: int, size: int) -> memoryview:
        return self._at(what, self._values.get(tag, 0), size) if size else memoryview(b"")

    def _relocations(self) -> t.Table:
        parts = []
        for tag, size in ((_RELA, _RELASZ), (_JMPREL, _PLTRELSZ)):
            whole = self._values.get(size, 0) // t.RELA.itemsize * t.RELA.itemsize
            parts.append(np.frombuffer(self._bytes("relocation table", tag, whole), t.RELA))
        size = self._values.get(_RELRSZ, 0) // 8 * 8
        packed = _unpacked(np.frombuffer(self._bytes("packed relocation table", _RELR, size), "<u8"))
        relative = np.zeros(len(packed), t.RELA)
        relative["offset"], relative["type"] = packed, R.RELATIVE
        some = [part for part in (relative, *parts) if len(part)]
        every: t.Table = some[0] if len(some) == 1 else np.concatenate([relative, *parts])
        return every

    def _symbols(self, relocations: t.Table) -> t.Table:
        if _SYMTAB not in self._values:
            return np.empty(0, t.SYM)
        size = self._count(relocations) * t.SYM.itemsize
        return np.frombuffer(self._bytes("symbol table", _SYMTAB, size), t.SYM)

    def _count(self, relocations: t.Table) -> int:
        for header in self._raw.section_headers:
            if int(header["type"]) == t.SHT_DYNSYM and int(header["address"]) == self._values[_SYMTAB]:
                return int(header["size"]) // t.SYM.itemsize
        if _HASH in self._values:
            return int.from_bytes(self._at("hash table", self._values[_HASH], 8)[4:], "little")
        used = int(relocations["symbol"].max()) + 1 if len(relocations) else 1
        return max(used, self._hashed()) if _GNU_HASH in self._values else used

    def _hashed(self) -> int:
        """Return one more than the last symbol in the GNU hash table: its chains stand in symbol order."""
        address = self._values[_GNU_HASH]
        buckets, first, bloom, _ = np.frombuffer(self._at("hash table", address, 16), "<u4").tolist()
        start = address + 16 + 8 * bloom
        last = int(np.frombuffer(self._at("hash table", start, 4 * buckets), "<u4").max()) if buckets else 0
        if last < first:
            return int(first)
        chain = start + 4 * buckets - 4 * first
        while not self._at("hash table", chain + 4 * last, 4)[0] & 1:
            last += 1
        return last + 1

    def _version_names(self, strings: bytes) -> dict[int, str]:
        """Return the names of the versions that the module defines and needs, by their number."""
        names: dict[int, str] = {}
        for place, count in self._chain(_VERDEF, _VERDEFNUM, 20, 16):
            number, auxiliary = (int.from_bytes(self._at("versions", place + o, s), "little") for o, s in _DEFINED)
            if count and number != _BASE:
                names[number] = self._string(strings, place + auxiliary)
        for place, count in self._chain(_VERNEED, _VERNEEDNUM, 16, 12):
            auxiliary = place + int.from_bytes(self._at("versions", place + 8, 4), "little")
            for _ in range(count):
                entry = self._at("versions", auxiliary, 16)
                names[int.from_bytes(entry[6:8], "little")] = self._string(strings, auxiliary + 8)
                step = int.from_bytes(entry[12:16], "little")
                if not step:
                    break
                auxiliary += step
        return names

    def _chain(self, tag: int, number: int, size: int, next_at: int) -> Iterator[tuple[int, int]]:
        """Yield the address and the number of auxiliary entries of each definition or need."""
        place = self._values.get(tag, 0)
        for _ in range(self._values.get(number, 0) if place else 0):
            entry = self._at("versions", place, size)
            count_at = 6 if tag == _VERDEF else 2
            yield place, int.from_bytes(entry[count_at : count_at + 2], "little")
            step = int.from_bytes(entry[next_at : next_at + 4], "little")
            if not step:
                return
            place += step

    def _string(self, strings: bytes, place: int) -> str:
        return t.string_at(strings, int.from_bytes(self._at("versions", place, 4), "little"))


_DEFINED = ((4, 2), (12, 4))  # in a version's definition: its number, and where its first name is


def _unpacked(words: t.Table) -> t.Table:
    """Return the addresses that DT_RELR means: an even word is one, an odd one a bitmap of those that follow."""
    found = [np.empty(0, "<u8")]
    place = 0
    for word in words.tolist():
        if not word & 1:
            found.append(np.array([word], "<u8"))
            place = word + 8
        else:
            bits = np.flatnonzero(np.unpackbits(np.array([word >> 1], "<u8").view("u1"), bitorder="little"))
            found.append((bits.astype("<u8") * np.uint64(8)) + np.uint64(place & (1 << 64) - 1))
            place += 8 * _RELR_BITS
    return np.concatenate(found)
