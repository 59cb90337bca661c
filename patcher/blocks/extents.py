"""Where the pieces of a section start and end: functions at their symbols, data at symbols and where code points.

Decides the extents and which symbols name them, not what becomes of a piece (`blocks`). The symbols of an object
are looked at as columns: one section may have hundreds of thousands, and an object as many sections.

Specification: System V ABI, chapter 4 (symbol table: st_value, st_size).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from patcher.elf import ObjectFile, Section, Symbol, SymbolType
from patcher.elf.object import KEY_BITS, Column, row_key

_LARGEST = 1 << 32  # no section is larger


class Extents(NamedTuple):
    """Pieces by section and rising start. `owners`: which of the sections that were asked for each is of."""

    owners: list[int]
    starts: list[int]
    ends: list[int]
    names: list[tuple[Symbol, ...]]

    @classmethod
    def whole(cls, sections: Sequence[Section], names: Iterable[tuple[Symbol, ...]]) -> Extents:
        """Return sections as one piece each."""
        return cls([*range(len(sections))], [0] * len(sections), [s.size for s in sections], [*names])


def function_extents(source: ObjectFile, sections: Sequence[Section], numbers: Column) -> Extents:
    """Cut sections of code, given by rising index; `numbers` are those of the symbols to look at.

    A function ends where its symbol says, or, without a size, where the next one starts. What has but one entry, at
    its start, is one piece, however large the symbol is.
    """
    rows = source.symbol_rows
    index, sizes = (np.array(column, np.int64) for column in ([s.index for s in sections], [s.size for s in sections]))
    owner = np.minimum(np.searchsorted(index, rows.section[numbers]), len(index) - 1)
    inside = (rows.section[numbers] == index[owner]) & (rows.value[numbers] <= sizes[owner].astype(np.uint64))
    owner, numbers = owner[inside], numbers[inside]
    key = row_key(owner, rows.value[numbers].astype(np.int64))
    order = np.argsort(key, kind="stable")
    owner, numbers, key = owner[order], numbers[order], key[order]
    function = np.isin(rows.type[numbers], (SymbolType.FUNC, SymbolType.IFUNC))
    enters = function & (rows.value[numbers] < sizes[owner].astype(np.uint64))
    entered = _entered(source, sizes, owner[enters], numbers[enters], key[enters])
    # A symbol at the very end, or one that is no function, names a section that is one piece.
    counts = np.bincount(np.array(entered.owners, np.int64), minlength=len(sections))
    elsewhere = ~enters & (counts[owner] < 2)
    if counts.all() and not (elsewhere & function).any():
        return entered
    return _with_others(source, sections, entered, owner[elsewhere], numbers[elsewhere])


def _entered(source: ObjectFile, sizes: Column, owner: Column, numbers: Column, key: Column) -> Extents:
    """Return the pieces that start at functions."""
    if not len(key):
        return Extents([], [], [], [])
    first = np.flatnonzero(np.diff(key, prepend=-1))
    owners = owner[first]
    starts = key[first] & (1 << KEY_BITS) - 1
    limits = sizes[owners]
    followed = np.flatnonzero(owners[1:] == owners[:-1])
    limits[followed] = starts[followed + 1]
    claimed = np.minimum(source.symbol_rows.size[numbers], np.uint64(_LARGEST)).astype(np.int64)
    longest = np.maximum.reduceat(claimed, first)
    alone = (np.bincount(owners)[owners] == 1) & (starts == 0)
    ends = np.where(alone | (longest == 0), limits, np.minimum(starts + longest, limits))
    return Extents(owners.tolist(), starts.tolist(), ends.tolist(), _grouped(source, numbers, first))


def _with_others(
    source: ObjectFile, sections: Sequence[Section], entered: Extents, owner: Column, numbers: Column
) -> Extents:
    """Add the sections without entries, and the names that are no entry of sections that are one piece."""
    pieces: dict[int, list[tuple[int, int, tuple[Symbol, ...]]]] = {i: [] for i in range(len(sections))}
    for i, start, end, names in zip(*entered, strict=True):
        pieces[i].append((start, end, names))
    others: dict[int, list[Symbol]] = {}
    for i, number in zip(owner.tolist(), numbers.tolist(), strict=True):
        others.setdefault(i, []).append(source.symbols[number])
    for i, found in pieces.items():
        if len(found) > 1 or (found and found[0][0]):
            continue
        functions = [s for s in others.get(i, []) if s.type in (SymbolType.FUNC, SymbolType.IFUNC)]
        entries = found[0][2] if found else ()
        found[:] = [(0, sections[i].size, (*entries, *functions) or tuple(others.get(i, [])))]
    rows = [(i, *piece) for i, found in pieces.items() for piece in found]
    return Extents(*map(list, zip(*rows, strict=True)))


def _grouped(source: ObjectFile, numbers: Column, first: Column) -> list[tuple[Symbol, ...]]:
    """Return the symbols of some numbers, in groups of which each starts at one of `first`."""
    named = list(map(source.symbols.__getitem__, numbers.tolist()))
    if len(first) == len(named):
        return [(symbol,) for symbol in named]
    bounds = [*first.tolist(), len(named)]
    return [tuple(named[a:b]) for a, b in pairwise(bounds)]


# --- data -----------------------------------------------------------------------------------------------------


def is_one_variable(section: Section, symbols: Sequence[Symbol]) -> bool:
    """Tell whether one variable, which may have several names, fills a whole section (-fdata-sections)."""
    return bool(symbols) and all(
        s.value == 0 and s.size == section.size and s.type in (SymbolType.OBJECT, SymbolType.TLS) for s in symbols
    )


def data_extents(source: ObjectFile, section: Section, numbers: Column, pointed: Iterable[int]) -> Extents:
    """Cut a section of data at its symbols' starts and ends, and at the offsets that are pointed to.

    `numbers`: those of the section's symbols. What a symbol with a size covers is not cut.
    """
    rows = source.symbol_rows
    kinds = (SymbolType.OBJECT, SymbolType.TLS, SymbolType.NOTYPE)
    numbers = numbers[np.isin(rows.type[numbers], kinds) & (rows.value[numbers] <= section.size)]
    numbers = numbers[np.argsort(rows.value[numbers], kind="stable")]
    values = rows.value[numbers].astype(np.int64)
    sizes = np.minimum(rows.size[numbers], np.uint64(_LARGEST)).astype(np.int64)
    sized = (rows.type[numbers] != SymbolType.NOTYPE) & (sizes > 0)
    starts, ends = _covered(section.size, values[sized], sizes[sized])
    aimed = np.array([offset for offset in pointed if 0 <= offset < section.size], np.int64)
    aimed = aimed[~_inside(starts, ends, aimed)]
    aimed = aimed[[not _inside_string(section.data, offset) for offset in aimed.tolist()]] if len(aimed) else aimed
    cuts = np.concatenate(([0], starts, ends, values[~_inside(starts, ends, values)], aimed))
    cuts = np.sort(cuts[cuts < section.size], kind="stable")
    cuts = cuts[np.diff(cuts, prepend=-1) > 0]
    first = np.flatnonzero(np.diff(values, prepend=-1))
    group = np.full(len(cuts), -1)
    entered = np.searchsorted(cuts, values[first])
    found = entered < len(cuts)
    found[found] = cuts[entered[found]] == values[first][found]
    group[entered[found]] = np.flatnonzero(found)
    groups = [*_grouped(source, numbers, first), ()]
    ordered = cuts.tolist()
    names = list(map(groups.__getitem__, group.tolist()))
    return Extents([0] * len(ordered), ordered, [*ordered[1:], section.size][: len(ordered)], names)


def _covered(room: int, values: Column, sizes: Column) -> tuple[Column, Column]:
    """Return where the variables start and end; what lies inside of another one is part of it."""
    if (values[1:] >= values[:-1] + sizes[:-1]).all():
        return values, np.minimum(values + sizes, room)
    starts: list[int] = []
    ends: list[int] = []
    end = 0
    for value, size in zip(values.tolist(), sizes.tolist(), strict=True):
        if not starts or value >= end:
            end = min(value + size, room)
            starts.append(value)
            ends.append(end)
        elif value == starts[-1]:
            end = ends[-1] = min(max(end, value + size), room)
    return np.array(starts, np.int64), np.array(ends, np.int64)


def _inside(starts: Column, ends: Column, offsets: Column) -> npt.NDArray[np.bool_]:
    """Tell which offsets are inside of an extent, its start left out."""
    if not len(starts):
        return np.zeros(len(offsets), bool)
    before = np.maximum(np.searchsorted(starts, offsets, "right") - 1, 0)
    return (starts[before] < offsets) & (offsets < ends[before])


def _inside_string(data: bytes, offset: int) -> bool:
    """Tell whether an offset may be in the middle of a string, of wide characters too: what leads there is no start.

    A pool's string ends with a terminator; that some pieces become larger than they are does no harm.
    """
    if not offset or not data:
        return False
    return data[offset - 1] != 0 or any(_are_wide(data, offset, width) for width in _WIDE)


_WIDE = {2: 0x100, 4: 0x110000}
"""The first number that is no character, by bytes; more would be narrow strings seen two bytes at a time."""


def _are_wide(data: bytes, offset: int, width: int) -> bool:
    """Tell whether there is a character of several bytes before an offset, and another one at it."""
    around = data[max(offset - 4, 0) : offset + 4]
    if offset % width or len(around) < 8:
        return False
    characters = (int.from_bytes(around[i : i + width], "little") for i in range(0, 8, width))
    return all(0 < c < _WIDE[width] for c in characters)


def string_extent(data: bytes, offset: int, width: int) -> tuple[int, int]:
    """Return where the string at an offset of a pool starts, and where it ends with its terminator."""
    if width == 1:
        end = data.find(b"\0", offset)
        return data.rfind(b"\0", 0, offset) + 1, end + 1 if end >= 0 else len(data)
    terminator = bytes(width)
    start = end = offset - offset % width
    while start > 0 and data[start - width : start] != terminator:
        start -= width
    while end < len(data) and data[end : end + width] != terminator:
        end += width
    return start, min(end + width, len(data))
