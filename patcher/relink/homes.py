"""HOMES: which arenas the code of a generation goes into, and how far they are in use with it.

Memory that was freed is taken first, if it has room in one piece. What is decided here is noted for the generation's
record (`stretches`, `usages`) and not written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count

from patcher.blocks import Block
from patcher.errors import TargetBusy
from patcher.image import LoadedModule
from patcher.link.place import ArenaFull, Placement, Region, Space, place
from patcher.link.plan import Bound, Plan
from patcher.linkage import Linkage
from patcher.patch.arena import Arena, Usage
from patcher.patch.journal import Allocation, Stretch, without
from patcher.patch.ledger import Ledger


@dataclass(frozen=True, slots=True)
class Home:
    """Where new code goes: islands and displaced entries in one arena, bodies in the same or in another."""

    entries: Arena
    bodies: Arena


class Homes:
    """Where the code of one generation goes."""

    def __init__(self, ledger: Ledger, number: int) -> None:
        self.ledger = ledger
        self.usages: dict[int, Usage] = {}  # of the arenas that something was put into
        self.stretches: list[Stretch] = []
        self._number = number
        self._slots: set[tuple[int, int]] = set()  # that functions got with this generation

    def of(self, module: LoadedModule) -> Iterator[Home]:
        """Yield where a module's new code may go, the best first; raises `TargetBusy` when there is no arena for it.

        Islands and the copies of displaced entries are within reach of the module's text. Bodies are as well, as long
        as the address space has room there.
        """
        low, high = module.text
        near = [arena for arena in self.ledger.arenas.values() if arena.reaches(low, high)]
        for arena in near:
            yield Home(arena, arena)
        try:
            arena = self.ledger.plan_near(low, high, below_2g=not module.module.position_independent)
        except TargetBusy:
            if not near:
                raise
        else:
            yield Home(arena, arena)
            return
        far = [arena for arena in self.ledger.arenas.values() if arena not in near]
        yield from (Home(entries, bodies) for bodies in far for entries in near)
        anywhere = self.ledger.plan_anywhere()
        yield from (Home(entries, anywhere) for entries in near)

    def place(
        self,
        arena: Arena,
        found: Plan,
        space: Space,
        islands: Mapping[Block, int],
        originals: Mapping[Block, int],
        *,
        early: bool,
    ) -> tuple[Space, Placement]:
        """Place a plan into memory that was freed, if there is enough in one piece, or into `space`.

        `early`: some of it may run before the generation is live.
        """
        # What may run before the generation is live may hand out addresses, also should it then not become live.
        free = [] if early else self._free_in(arena)
        for reused in _reused(space, free, arena.code_start, found):
            with suppress(ArenaFull):
                return reused, place(found, reused, islands, originals)
        return space, place(found, space, islands, originals)

    def _free_in(self, arena: Arena) -> list[tuple[int, int]]:
        own = sorted((s.start, s.end) for s in self.stretches)
        usage = self.usage(arena)
        return without([h for h in self.ledger.journal.free if arena.has_used(*h, usage)], own)

    def free_slots(self, arena: Arena) -> Iterator[int]:
        """Yield the slots that no function has: those that were given back, and then those that none had yet."""
        taken = {r.index for r in self.ledger.journal.redirects if r.arena == arena.base}
        taken |= {index for base, index in self._slots if base == arena.base}
        slots = self.ledger.slots[arena.base]
        yield from (i for i, body in enumerate(slots) if i and not body and i not in taken)
        yield from count(self.usage(arena).slots)

    def usage(self, arena: Arena) -> Usage:
        """Return how far an arena is in use, with what this generation has put into it so far."""
        return self.usages.get(arena.base) or self.ledger.usages[arena.base]

    def use(self, home: Home, space: Space, end_of_copies: int, doors: Sequence[int]) -> None:
        """Note how far arenas are in use now."""
        entries = self.usage(home.entries)
        self.usages[home.entries.base] = replace(
            entries, code=end_of_copies, slots=max([entries.slots, *(index + 1 for index in doors)])
        )
        self._slots.update((home.entries.base, index) for index in doors)
        bodies = self.usage(home.bodies)
        self.usages[home.bodies.base] = replace(
            bodies,  # which end below what was placed, unless that is in memory that was freed
            read_only=max(bodies.read_only, space.read_only.start),
            code=max(bodies.code, space.code.start),
            data=space.data.start,
        )

    def record_stretches(self, found: Plan, before: Space, placement: Placement, linkage: Linkage) -> None:
        """Note which memory this took, and what in other stretches its code refers to."""
        arenas = tuple(self.ledger.arenas.values())
        bound = [b for b in (*found.bound.values(), *found.externals.values()) if isinstance(b, Bound)]
        addresses = {b.address for b in bound if not b.thread_local}
        used = tuple(sorted(a for a in addresses if any(arena.contains(a) for arena in arenas)))
        names = {source: linkage.part_with(source).name for source in placement.accounts}
        accounts = [(names[source], account) for source, account in placement.accounts.items()]
        constants = tuple(Allocation(n, read_only=a.read_only, cells=a.cells) for n, a in accounts)
        text = tuple(Allocation(n, text=a.text, islands=a.jumps) for n, a in accounts)
        start = before.read_only.start
        if placement.space.read_only.start > start:
            self.stretches.append(Stretch(self._number, start, placement.space.read_only.start, used, constants))
            used = (*used, start)
        if placement.space.code.start > before.code.start:
            self.stretches.append(Stretch(self._number, before.code.start, placement.space.code.start, used, text))


def _reused(space: Space, free: Sequence[tuple[int, int]], code_start: int, found: Plan) -> Iterator[Space]:
    """Yield spaces that have code and constants where something was freed: the closest fit first, then the largest."""
    code = [hole for hole in free if hole[0] >= code_start]
    constants = [hole for hole in free if hole[0] < code_start]
    sizes = [sum(b.size + max(b.alignment, 16) for b in blocks) for blocks in (found.code, found.read_only)]
    tried: set[Space] = {space}
    for choose in (min, max):
        at = [_hole(holes, size, choose) for holes, size in zip((code, constants), sizes, strict=True)]
        reused = replace(space, code=at[0] or space.code, read_only=at[1] or space.read_only)
        if reused not in tried:
            tried.add(reused)
            yield reused


def _hole(holes: Sequence[tuple[int, int]], size: int, choose: Callable[..., tuple[int, int]]) -> Region | None:
    fitting = [hole for hole in holes if hole[1] - hole[0] >= size]
    return Region(*choose(fitting, key=lambda hole: hole[1] - hole[0])) if fitting else None
