"""The static symbol table of a module, as arrays: address to symbols, name to symbols, local groups.

Local symbols are told apart by the STT_FILE symbol they stand under (its ordinal in the table): the
file's name alone is a base name, and several units share one. GNU ld puts hidden symbols that it
turned local under a nameless STT_FILE, the other linkers under the defining file.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from patcher.elf import tables as t
from patcher.elf.object import SymbolBinding, SymbolType

_ADDRESSABLE = (SymbolType.NOTYPE, SymbolType.OBJECT, SymbolType.FUNC, SymbolType.IFUNC)


@dataclass(frozen=True, slots=True)
class StaticSymbol:
    """A defined symbol of a module; `value` is its link-time address (an offset for a TLS symbol)."""

    name: str
    value: int
    size: int
    type: int
    binding: int
    group: int  # ordinal of the STT_FILE symbol it stands under, for local symbols; -1 otherwise

    @property
    def local(self) -> bool:
        return self.binding == SymbolBinding.LOCAL

    @property
    def function(self) -> bool:
        return self.type in (SymbolType.FUNC, SymbolType.IFUNC)


class SymbolIndex:
    """Look-ups over one symbol table. Read-only after construction; indexes are made when first wanted."""

    def __init__(self, table: t.Table, strings: bytes) -> None:
        self._table = table
        self._strings = strings
        self._types = table["info"] & 15
        self._files = np.flatnonzero(self._types == SymbolType.FILE)

    @classmethod
    def empty(cls) -> SymbolIndex:
        return cls(np.empty(0, t.SYM), b"")

    def __len__(self) -> int:
        return len(self._table)

    def _name(self, index: int) -> str:
        # Binutils writes versioned names into .symtab as name@version: the name alone is what objects ask for.
        return t.string_at(self._strings, int(self._table["name"][index])).partition("@")[0]

    def _symbol(self, index: int, name: str | None = None) -> StaticSymbol:
        row = self._table[index]
        info = int(row["info"])
        binding = info >> 4
        group = -1
        if binding == SymbolBinding.LOCAL:
            group = int(np.searchsorted(self._files, index, side="right")) - 1
        text = self._name(index) if name is None else name
        return StaticSymbol(text, int(row["value"]), int(row["size"]), info & 15, binding, group)

    @cached_property
    def _names(self) -> dict[str, list[int]]:
        names: dict[str, list[int]] = {}
        sections = self._table["section"]
        wanted = (sections != t.SHN_UNDEF) & (self._types != SymbolType.FILE) & (self._types != SymbolType.SECTION)
        offsets = self._table["name"]
        find = self._strings.find
        for index in np.flatnonzero(wanted).tolist():
            start = int(offsets[index])
            name = self._strings[start : find(b"\0", start)].decode("utf-8", "replace")
            names.setdefault(name.partition("@")[0], []).append(index)
        return names

    @cached_property
    def _by_address(self) -> tuple[t.Table, t.Table]:
        mask = np.isin(self._types, _ADDRESSABLE) & (self._table["section"] != t.SHN_UNDEF)
        mask &= self._table["section"] != t.SHN_ABS
        indexes = np.flatnonzero(mask)
        order = np.argsort(self._table["value"][indexes], kind="stable")
        indexes = indexes[order]
        return self._table["value"][indexes], indexes

    def named(self, name: str) -> list[StaticSymbol]:
        """Return every defined symbol of that name."""
        return [self._symbol(i, name) for i in self._names.get(name, ())]

    def at(self, address: int) -> list[StaticSymbol]:
        """Return the symbols whose value is exactly this link-time address."""
        values, indexes = self._by_address
        low, high = np.searchsorted(values, address, "left"), np.searchsorted(values, address, "right")
        return [self._symbol(int(i)) for i in indexes[low:high]]

    def covering(self, address: int) -> StaticSymbol | None:
        """Return a function or object whose extent holds this link-time address, the nearest below it."""
        values, indexes = self._by_address
        position = int(np.searchsorted(values, address, "right"))
        for i in indexes[max(0, position - 16) : position][::-1]:
            symbol = self._symbol(int(i))
            if symbol.value <= address < symbol.value + max(symbol.size, 1):
                return symbol
        return None

    def next_address(self, address: int) -> int | None:
        """Return the lowest symbol value above this link-time address."""
        values, _ = self._by_address
        position = int(np.searchsorted(values, address, "right"))
        return int(values[position]) if position < len(values) else None

    def groups(self, file_name: str) -> list[int]:
        """Return the ordinals of the STT_FILE symbols of that name; "" gives the nameless ones."""
        return [i for i, index in enumerate(self._files.tolist()) if self._name(index) == file_name]

    def group_name(self, group: int) -> str:
        return self._name(int(self._files[group])) if 0 <= group < len(self._files) else ""

    def members(self, group: int) -> list[StaticSymbol]:
        """Return the addressable and thread-local symbols that stand under one STT_FILE symbol."""
        start = int(self._files[group]) + 1
        end = int(self._files[group + 1]) if group + 1 < len(self._files) else len(self._table)
        found = []
        for index in range(start, end):
            kind = int(self._types[index])
            if int(self._table["info"][index]) >> 4 != SymbolBinding.LOCAL:
                break
            if kind in _ADDRESSABLE or kind == SymbolType.TLS:
                found.append(self._symbol(index))
        return found
