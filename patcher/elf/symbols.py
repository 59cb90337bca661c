"""The static symbol table of a module, as arrays: address to symbols, name to symbols, local groups.

A symbol becomes an object when it is asked for; which one is looked up in the table's `orders`.

Local symbols are told apart by the STT_FILE symbol they stand under (its ordinal in the table): the
file's name alone is a base name, and several units share one. Symbols that a linker turned local are no
statics: GNU ld puts hidden ones under a nameless STT_FILE, gold under the last file, lld under the
defining file; mold turns every global of an executable that nobody imports local, under its file.
"""

from __future__ import annotations

from collections import Counter
from functools import cached_property
from typing import NamedTuple

import numpy as np

from patcher.elf import tables as t
from patcher.elf.object import SymbolBinding, SymbolType
from patcher.elf.orders import Orders, orders

_ADDRESSABLE = (SymbolType.NOTYPE, SymbolType.OBJECT, SymbolType.FUNC, SymbolType.IFUNC)


class StaticSymbol(NamedTuple):
    """A defined symbol of a module; `value` is its link-time address (an offset for a TLS symbol)."""

    name: str
    value: int
    size: int
    type: int
    binding: int
    group: int  # ordinal of the STT_FILE symbol it stands under, for local symbols; -1 otherwise
    hidden: bool = False  # of other than default visibility
    absolute: bool = False  # `value` is the same wherever the module is loaded

    @property
    def local(self) -> bool:
        return self.binding == SymbolBinding.LOCAL

    @property
    def function(self) -> bool:
        return self.type in (SymbolType.FUNC, SymbolType.IFUNC)


class SymbolIndex:
    """Look-ups over one symbol table. Read-only after construction; orders are made when first wanted.

    With the build-id of its module, the orders of a large table are kept on disk.
    """

    def __init__(self, table: t.Table, strings: bytes, build_id: str = "") -> None:
        self._table = table
        self._strings = strings
        self._build_id = build_id
        self._types = table["info"] & 15
        self._files = np.flatnonzero(self._types == SymbolType.FILE)
        # What was asked for once is asked for again at every save.
        self._made: dict[int, StaticSymbol] = {}
        self._called: dict[str, tuple[StaticSymbol, ...]] = {}
        self._starting: dict[int, tuple[StaticSymbol, ...]] = {}
        self._members: dict[int, tuple[StaticSymbol, ...]] = {}

    @classmethod
    def empty(cls) -> SymbolIndex:
        return cls(np.empty(0, t.SYM), b"")

    def __len__(self) -> int:
        return len(self._table)

    def _name(self, index: int) -> str:
        # Binutils writes versioned names into .symtab as name@version: the name alone is what objects ask for.
        return t.string_at(self._strings, int(self._table["name"][index])).partition("@")[0]

    def _symbol(self, index: int) -> StaticSymbol:
        found = self._made.get(index)
        if found is None:
            _, info, other, section, value, size = self._table[index].item()
            binding = info >> 4
            group = -1
            if binding == SymbolBinding.LOCAL:
                group = int(np.searchsorted(self._files, index, side="right")) - 1
            hidden = bool(other & 3)
            name, absolute = self._name(index), section == t.SHN_ABS
            found = self._made[index] = StaticSymbol(name, value, size, info & 15, binding, group, hidden, absolute)
        return found

    @cached_property
    def _orders(self) -> Orders:
        return orders(self._table, self._strings, self._chosen, self._build_id, "symbols")

    def _chosen(self) -> tuple[t.Table, t.Table]:
        sections = self._table["section"]
        defined = sections != t.SHN_UNDEF
        named = (defined & (self._types != SymbolType.SECTION)) | (self._types == SymbolType.FILE)
        return named, defined & (sections != t.SHN_ABS) & np.isin(self._types, _ADDRESSABLE)

    def _entries(self, name: str, *, files: bool) -> list[int]:
        # Bytes that are no UTF-8 became this character, so that hashes say nothing: all symbols are candidates.
        odd = "\ufffd" in name
        candidates = np.flatnonzero(self._chosen()[0]).tolist() if odd else self._orders.candidates(name)
        found = [i for i in candidates if self._name(i) == name]
        return [i for i in found if (int(self._types[i]) == SymbolType.FILE) == files]

    def named(self, name: str) -> list[StaticSymbol]:
        """Return every defined symbol of that name."""
        found = self._called.get(name)
        if found is None:
            found = self._called[name] = tuple(self._symbol(i) for i in self._entries(name, files=False))
        return list(found)

    def functions(self) -> tuple[StaticSymbol, ...]:
        """Return the functions that have an extent."""
        wanted = np.isin(self._types, (SymbolType.FUNC, SymbolType.IFUNC)) & (self._table["size"] > 0)
        return tuple(self._symbol(i) for i in np.flatnonzero(wanted & (self._table["section"] != t.SHN_UNDEF)).tolist())

    def at(self, address: int) -> tuple[StaticSymbol, ...]:
        """Return the symbols whose value is exactly this link-time address."""
        found = self._starting.get(address)
        if found is None:
            found = tuple(self._symbol(i) for i in self._orders.starting(address))
            if found:
                self._starting[address] = found
        return found

    def covering(self, address: int) -> StaticSymbol | None:
        """Return a function or object whose extent holds this link-time address, the nearest below it."""
        position = self._orders.position(address, "right")
        for i in self._orders.addresses[max(0, position - 16) : position][::-1].tolist():
            symbol = self._symbol(i)
            if symbol.value <= address < symbol.value + max(symbol.size, 1):
                return symbol
        return None

    def function_before(self, address: int) -> StaticSymbol | None:
        """Return the function that starts nearest below or at a link-time address, wherever it ends."""
        position = self._orders.position(address, "right")
        nearest = (self._symbol(i) for i in self._orders.addresses[max(0, position - 16) : position][::-1].tolist())
        return next((s for s in nearest if s.function), None)

    def next_address(self, address: int) -> int | None:
        """Return the lowest symbol value above this link-time address."""
        position = self._orders.position(address, "right")
        values = self._orders.values
        return int(values[position]) if position < len(values) else None

    def groups(self, file_name: str) -> list[int]:
        """Return the ordinals of the STT_FILE symbols of that name; "" gives the nameless ones."""
        found: list[int] = np.searchsorted(self._files, self._entries(file_name, files=True)).tolist()
        return found

    @cached_property
    def has_files(self) -> bool:
        """Tell whether the table says which files the module was built from."""
        return bool(self.file_counts)

    @cached_property
    def file_counts(self) -> Counter[str]:
        """How many units the module was built from of files of each name, as the table has them."""
        return Counter(filter(None, map(self._name, self._files.tolist())))

    def group_name(self, group: int) -> str:
        return self._name(int(self._files[group])) if 0 <= group < len(self._files) else ""

    def members(self, group: int) -> tuple[StaticSymbol, ...]:
        """Return the addressable and thread-local symbols that stand under one STT_FILE symbol."""
        found = self._members.get(group)
        if found is None:
            start = int(self._files[group]) + 1
            end = int(self._files[group + 1]) if group + 1 < len(self._files) else len(self._table)
            info = self._table["info"][start:end]
            others = np.flatnonzero(info >> 4 != SymbolBinding.LOCAL)  # locals come first
            kinds = info[: int(others[0]) if len(others) else None] & 15
            wanted = np.flatnonzero(np.isin(kinds, (*_ADDRESSABLE, SymbolType.TLS))) + start
            found = self._members[group] = tuple(self._symbol(i) for i in wanted.tolist())
        return found
