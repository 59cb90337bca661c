"""The two orders in which a symbol table is searched: by the hash of the name, and by address.

Both are arrays over the entries of the table, made by passes over whole columns: a program of a million symbols
gets no object per symbol. A hash only proposes entries; who asks compares the name. What is made for a large table
is kept on disk (`order_cache`), as long as the module has a build-id.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from patcher.elf import tables as t

# From here on, reading the orders back is quicker than making them anew.
LARGE = 20_000

_WORD = 8
_LONGEST = 4096  # bytes of a name that count for its hash: tails of one huge string may be names too
_ONES, _TOPS, _ATS = (np.uint64(0x0101010101010101 * byte) for byte in (1, 0x80, ord("@")))
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True, eq=False)
class Orders:
    """Entries of a table by name and by address."""

    names: t.Table  # ascending: the hash of the name in the upper half, the entry in the lower
    addresses: t.Table  # entries by ascending value; in the order of the table where values are equal

    def candidates(self, name: str) -> list[int]:
        """Return the entries, in table order, that may be called `name`: their names' hashes agree."""
        hashed = int(_hashes(name.encode("utf-8", "surrogatepass"), np.zeros(1, np.int64))[0]) << 32
        low = int(np.searchsorted(self.names, np.uint64(hashed), "left"))
        high = int(np.searchsorted(self.names, np.uint64(hashed | 0xFFFFFFFF), "right"))
        return [entry & 0xFFFFFFFF for entry in self.names[low:high].tolist()]

    def fits(self, table: t.Table) -> bool:
        """Tell whether all entries are the table's, and stand in the order of their values."""
        count = len(table)
        if not np.all((self.names & np.uint64(0xFFFFFFFF)) < count) or not np.all(self.addresses < count):
            return False
        values = table["value"][self.addresses]
        return bool(np.all(values[1:] >= values[:-1]))


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
    found = order_cache.load(source)
    if found is None or not found.fits(table):
        found = _make(table, strings, *chosen())
        order_cache.store(source, found)
    return found


def _make(table: t.Table, strings: bytes, named: t.Table, addressed: t.Table) -> Orders:
    entries = np.flatnonzero(named)
    hashes = _hashes(strings, table["name"][entries].astype(np.int64))
    names = hashes << np.uint64(32) | entries.astype(np.uint64)
    names.sort()
    entries = np.flatnonzero(addressed)
    by_value = np.argsort(table["value"][entries], kind="stable")
    return Orders(names, entries[by_value].astype(np.uint32))


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
    return mixed ^ mixed >> np.uint64(29)
