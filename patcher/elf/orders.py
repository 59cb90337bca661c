"""The two orders in which a symbol table is searched: by the hash of the name, and by address.

Both are arrays over the entries of the table, made by passes over whole columns: a program of a million symbols
gets no object per symbol. A hash only proposes entries; who asks compares the name. What is made for a large table
is kept on disk (`order_cache`), as long as the module has a build-id.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from patcher.elf import tables as t

# From here on, reading the orders back is quicker than making them anew.
LARGE = 20_000

_WORD = 8
_LONGEST = 4096  # bytes of a name that count for its hash: tails of one huge string may be names too
_ONES, _TOPS, _ATS = (np.uint64(0x0101010101010101 * byte) for byte in (1, 0x80, ord("@")))
_FACTOR, _SHIFT = np.uint64(0x9E3779B97F4A7C15), 29
_ENTRY = 0xFFFFFFFF  # the lower half


@dataclass(frozen=True, slots=True, eq=False)
class Orders:
    """Entries of a table by name and by address."""

    names: t.Table  # ascending: the hash of the name in the upper half, the entry in the lower
    addresses: t.Table  # entries by ascending value; in the order of the table where values are equal
    values: t.Table  # their values

    def candidates(self, name: str) -> list[int]:
        """Return the entries, in table order, that may be called `name`: their names' hashes agree."""
        hashed = _hash(name.encode("utf-8", "surrogatepass")) << 32
        low = int(np.searchsorted(self.names, np.uint64(hashed), "left"))
        high = int(np.searchsorted(self.names, np.uint64(hashed | _ENTRY), "right"))
        return [entry & _ENTRY for entry in self.names[low:high].tolist()]

    def position(self, address: int, side: Literal["left", "right"]) -> int:
        """Return where an address stands among the values."""
        if not 0 <= address < 1 << 64:
            return 0 if address < 0 else len(self.values)
        # As an integer of their type: otherwise numpy compares, and copies, all of them as floats.
        return int(np.searchsorted(self.values, np.uint64(address), side))

    def starting(self, address: int) -> list[int]:
        """Return the entries whose value is an address, in table order."""
        found: list[int] = self.addresses[self.position(address, "left") : self.position(address, "right")].tolist()
        return found


def orders(
    table: t.Table, strings: bytes, chosen: Callable[[], tuple[t.Table, t.Table]], build_id: str, what: str
) -> Orders:
    """Return the orders of a table, from the disk where they are kept.

    `chosen` tells by two masks which entries have names that are asked for, and which have addresses; `what` tells
    the tables of one module apart.
    """
    if len(table) <= LARGE or not build_id:
        return _make(table, strings, *chosen())
    from patcher.elf import order_cache

    source = order_cache.Source.of(build_id, what, table, strings)
    kept = order_cache.load(source)
    found = _checked(table, *kept) if kept is not None else None
    if found is None:
        found = _make(table, strings, *chosen())
        order_cache.store(source, found.names, found.addresses)
    return found


def _checked(table: t.Table, names: t.Table, addresses: t.Table) -> Orders | None:
    if not np.all((names & np.uint64(_ENTRY)) < len(table)) or not np.all(addresses < len(table)):
        return None
    values = np.ascontiguousarray(table["value"])[addresses]  # a third of the time that picking from the rows takes
    ascending = np.all(values[1:] >= values[:-1]) and np.all(names[1:] > names[:-1])
    return Orders(names, addresses, values) if ascending else None


def _make(table: t.Table, strings: bytes, named: t.Table, addressed: t.Table) -> Orders:
    entries = np.flatnonzero(named)
    hashes = _hashes(strings, table["name"][entries].astype(np.int64))
    names = hashes << np.uint64(32) | entries.astype(np.uint64)
    names.sort()
    entries = np.flatnonzero(addressed)
    values = table["value"][entries]
    by_value = np.argsort(values, kind="stable")
    return Orders(names, entries[by_value].astype(np.uint32), values[by_value])


def _hash(name: bytes) -> int:
    """Return what `_hashes` gives for a name."""
    hashed = 0
    for start in range(0, min(len(name) + 1, _LONGEST), _WORD):
        hashed = (hashed ^ int.from_bytes(name[start : start + _WORD], "little")) * int(_FACTOR) & (1 << 64) - 1
        hashed ^= hashed >> _SHIFT
    return hashed >> 32


def _hashes(strings: bytes, starts: t.Table) -> t.Table:
    """Return 32-bit hashes of the names at some offsets of a string table, each up to its NUL or "@"."""
    padded = strings + bytes(_WORD)
    # Every offset is the start of a word, whatever its alignment: the words overlap.
    words: t.Table = np.ndarray(len(padded) - _WORD + 1, "<u8", padded, strides=(1,))
    hashes = np.zeros(len(starts), np.uint64)
    places: t.Table = np.arange(len(starts))
    offsets = np.minimum(starts, len(strings))
    for _ in range(_LONGEST // _WORD):
        if not len(places):
            break
        word = words[offsets]
        ends = _zero_bytes(word) | _zero_bytes(word ^ _ATS)
        first = ends & -ends
        word &= (first >> np.uint64(7)) - np.uint64(1)  # what stands before the end; all of it when there is none
        hashes[places] = _mixed(hashes[places], word)
        longer = first == 0
        places, offsets = places[longer], np.minimum(offsets[longer] + _WORD, len(strings))
    return hashes >> np.uint64(32)


def _zero_bytes(words: t.Table) -> Any:
    # The top bit of each zero byte, exact for the lowest one: only above a zero does the subtraction borrow.
    return (words - _ONES) & ~words & _TOPS


def _mixed(hashes: t.Table, words: t.Table) -> t.Table:
    mixed = (hashes ^ words) * _FACTOR
    return mixed ^ mixed >> np.uint64(_SHIFT)
