"""ORPHANS: slots of functions that went with the library that they were patched in.

Nothing enters such a function but through its island, and its entry, which led there, is gone. So its slot is no reason
to keep what it leads to; an address of the island is, in a word, in a register, or in the instructions of code that is
kept itself. Decides which slots these are, and which code refers to their islands: as the displacement of a call, a
jump or a `lea`, or as an absolute address. Whatever looks like one counts, at any byte. Does not decide what is freed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from patcher.patch.arena import ISLAND_SIZE
from patcher.patch.journal import Allocation, GenerationRecord, Journal, Redirect, Stretch, without
from patcher.patch.ledger import Ledger

_ALIGNMENT = 16  # of displaced entries
_WORD = np.uint64(1 << 32)

Extent = tuple[int, int]
Addresses = npt.NDArray[np.uint64]


def with_copies(journal: Journal, void: Sequence[tuple[GenerationRecord, Redirect]]) -> Journal:
    """Return a journal in which the displaced entries of such functions are memory that can be freed, in the first
    record."""
    copies = sorted((r.copy, r.copy + r.copied, g) for g, r in void if r.copied)
    if not copies:
        return journal
    known = [s for g in journal.generations.values() for s in g.stretches]
    ends = {end for _, end in journal.free} | {s.end for s in known} | {end for _, end, _ in copies}
    found = []
    for copy, end, record in copies:
        start = max((e for e in ends if copy - _ALIGNMENT < e <= copy), default=copy)
        owner = max(record.allocations, key=lambda a: a.islands, default=Allocation(""))
        found.append(Stretch(0, start, end, taken=(Allocation(owner.object, islands=end - start),)))
    number, first = next(iter(journal.generations.items()))
    first = replace(first, stretches=(*first.stretches, *found))
    return Journal({**journal.generations, number: first})


class Orphans:
    """The slots of a process that no recorded function has."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        owned = {(r.arena, r.index) for r in ledger.journal.redirects}
        found = [
            (arena, index, body)
            for base, arena in ledger.arenas.items()
            for index, body in enumerate(ledger.slots[base])
            if index and body and (base, index) not in owned
        ]
        self._slots = {arena.island(index): arena.slot(index) for arena, index, _ in found}
        self._islands: Addresses = np.array(sorted(self._slots), np.uint64)
        self.bodies = {arena.island(index): body for arena, index, body in found}  # by their islands

    @property
    def slots(self) -> list[Extent]:
        return [(slot, slot + 8) for slot in self._slots.values()]

    @property
    def islands(self) -> list[Extent]:
        return [(island, island + ISLAND_SIZE) for island in self._slots]

    def calls(self, extents: Sequence[Extent]) -> list[frozenset[int]]:
        """Return the islands that what is in each of some extents refers to."""
        if not self._slots:
            return [frozenset()] * len(extents)
        return [self._called_in(*extent) for extent in extents]

    def called_beside(self, extents: Sequence[Extent]) -> frozenset[int]:
        """Return the islands that the rest of the arenas' code and constants refers to, except what is free."""
        if not self._slots:
            return frozenset()
        left_out = sorted([*extents, *self._ledger.journal.free])
        found: set[int] = set()
        for base, arena in self._ledger.arenas.items():
            usage, fresh = self._ledger.usages[base], arena.fresh_usage()
            used = [(base, usage.read_only), (fresh.code, usage.code)]
            for extent in without(used, left_out):
                found |= self._called_in(*extent)
        return frozenset(found)

    def let_go(self, freed: Iterable[Extent]) -> None:
        """Clear the slots that lead into memory that was freed."""
        places = list(freed)
        for island, body in self.bodies.items():
            if any(start <= body < end for start, end in places):
                self._ledger.target.memory.write(self._slots[island], bytes(8))

    def _called_in(self, start: int, end: int) -> frozenset[int]:
        data, found = self._ledger.target.memory.read(start, end - start), set[int]()
        for shift in range(max(0, min(4, len(data) - 3))):
            words = np.frombuffer(data, "<u4", (len(data) - shift) // 4, shift).astype(np.uint64)
            following = np.arange(len(words), dtype=np.uint64) * 4 + (start + shift + 4)
            for value in (words, words + following):
                found.update(self._islands[np.isin(self._islands % _WORD, value % _WORD)].tolist())
        return frozenset(found)
