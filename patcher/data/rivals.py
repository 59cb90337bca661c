"""Which is which where several static variables of one function have one name, in different blocks.

Where debug information says in how deep a block each is declared, and in which order, that decides, as long as neither
the code nor the initial contents speak against it: of the ways to pair variables that keep depth and order there has
to be one, or one for which both speak. Without it all evidence has to agree: the places in the code (`sites`), and the
initial contents where each has its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TypeVar

from patcher.blocks import Block
from patcher.data.known import Known, Position
from patcher.data.sites import Votes, votes
from patcher.live import LiveVariable

_T = TypeVar("_T")
Pairs = dict[Block, LiveVariable]
_MOST = 6  # of one name in one function
_ALIKE = 0.9  # how much of the code around two variables has to be the same for nothing else to decide


def paired(known: Known, group: Sequence[Block], found: Sequence[LiveVariable]) -> Pairs | None:
    """Pair new and old variables by all evidence together; None when it does not agree, or is not enough."""
    evidence = _Evidence.of(known, group, found)
    placed = _by_place(known, group, found)
    if placed is not None and (pairs := evidence.best(placed)) is not None:
        depths = (
            [d.depth for b in group if (d := known.position_of(b))],
            [d.depth for v in found if (d := known.position(v))],
        )
        if evidence.supports(pairs, apart=all(len(set(d)) == len(d) for d in depths)):
            return pairs
    return evidence.agreeing(placed[0] if placed is not None and len(placed) == 1 else None)


# --- by place ---------------------------------------------------------------------------------------------------------


def _by_place(known: Known, group: Sequence[Block], found: Sequence[LiveVariable]) -> list[Pairs] | None:
    """Return the ways to pair as many as possible that keep depth and order; None where these are not known."""
    ours = _ordered([(known.position_of(b), b) for b in group])
    theirs = _ordered([(known.position(v), v) for v in found])
    one_function = len({known.function_of(b) for b in group}) == len({known.function_now(v) for v in found}) == 1
    if ours is None or theirs is None or not one_function or max(len(ours), len(theirs)) > _MOST:
        return None
    size = min(len(ours), len(theirs))
    return [
        {b: v for (_, b), (_, v) in zip(new, old, strict=True)}
        for new in combinations(ours, size)
        for old in combinations(theirs, size)
        if all(a.depth == b.depth for (a, _), (b, _) in zip(new, old, strict=True))
    ]


def _ordered(known: Sequence[tuple[Position | None, _T]]) -> list[tuple[Position, _T]] | None:
    placed = [(position, value) for position, value in known if position is not None]
    if len(placed) < len(known) or len({p.order for p, _ in placed}) < len(placed):
        return None
    return sorted(placed, key=lambda p: p[0].order)


# --- by code and contents ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Evidence:
    """What the code and the initial contents say of which of `group` is which of `found`.

    `same`: whether one starts with the contents of the other, as far as that is known.
    """

    group: Sequence[Block]
    found: Sequence[LiveVariable]
    seen: Votes
    same: dict[tuple[Block, int], bool | None]

    @classmethod
    def of(cls, known: Known, group: Sequence[Block], found: Sequence[LiveVariable]) -> _Evidence:
        functions = sorted({f for b in group for f in known.uses.direct(b)}, key=lambda f: f.name)
        old = {b.body: b for f in functions for b in known.uses.current(f)}
        seen = votes(known.part.blocks, functions, list(old.values()), group, found)
        same = {(b, v.address): known.starts_as(b, v) for b in group for v in found}
        return cls(group, found, seen, same)

    def best(self, ways: Sequence[Pairs]) -> Pairs | None:
        """Return the way that nothing speaks against; of several the one for which contents or code speak clearly."""
        if len(ways) == 1:
            (only,) = ways
            return only if self._begins_alone(only) or not self._is_contradicted(only) else None
        alone = [way for way in ways if self._begins_alone(way) and not self._is_outvoted(way)]
        if len(alone) == 1:
            return alone[0]
        possible = [way for way in ways if not self._is_contradicted(way)]
        return possible[0] if len(possible) == 1 and self._is_unedited(possible[0]) else None

    def _begins_alone(self, way: Pairs) -> bool:
        """Tell whether what a way pairs begins alike, and like none of the others."""
        alone = (not any(self.same[r] is not False for r in self._rivals(b, v)) for b, v in way.items())
        return all(self.same[b, v.address] for b, v in way.items()) and all(alone)

    def _is_unedited(self, way: Pairs) -> bool:
        """Tell whether the code around what a way pairs is the same, and is not around any of the others."""
        return self._is_complete(way) and self._is_clear(way, strictly=True)

    def supports(self, way: Pairs, *, apart: bool) -> bool:
        """Tell whether the code says so too; a little is enough where all are declared in different depths."""
        if self._begins_alone(way) or self._is_complete(way) or self._is_clear(way, strictly=True):
            return True
        if apart and all((b, v.address) in self.seen.pairs for b, v in way.items()):
            return True
        return all(self.seen.alike(b, v.address) >= _ALIKE for b, v in way.items())

    def _is_outvoted(self, way: Pairs) -> bool:
        """Tell whether the places in the code say of one of a way's variables only that it is another one."""
        at = {v.address: b for b, v in way.items()}
        for block, variable in way.items():
            places = self.seen.of(block)
            if places and variable.address not in places:
                return True
        for address, block in at.items():
            blocks = {b for b, a in self.seen.pairs if a == address}
            if blocks and block not in blocks:
                return True
        return False

    def _is_contradicted(self, way: Pairs) -> bool:
        """Tell whether code or contents say that one of a way's variables is another one."""
        if self._is_outvoted(way):
            return True
        for block, variable in way.items():
            rivals = list(self._rivals(block, variable))
            if any(self.seen.alike(*r) > self.seen.alike(block, variable.address) for r in rivals):
                return True
            own = self.same[block, variable.address]
            if own is False and any(self.same[r] for r in rivals):
                return True
        return False

    # --- without places -------------------------------------------------------------------------------------------

    def agreeing(self, ordered: Pairs | None) -> Pairs | None:
        """Return what code and contents say where they are enough; `ordered` is what the places say, where known."""
        by_code = self._by_code()
        if by_code is None:
            return None
        by_contents = self._by_contents()
        if by_contents is not None:
            if any(by_contents[b] is not v for b, v in by_code.items()):
                return None
            return by_contents if by_code or by_contents == ordered else None
        whole = len(by_code) == min(len(self.group), len(self.found)) and self._is_complete(by_code)
        if not whole or (ordered is not None and by_code != ordered):
            return None
        if len(self.group) == len(self.found):
            return by_code if self._is_clear(by_code, strictly=False) else None
        # Some are new, or gone: those that are the same are so in every place, and begin as no other one does.
        own = all(self.same[b, v.address] for b, v in by_code.items())
        others = any(self.same[r] for b, v in by_code.items() for r in self._rivals(b, v))
        return by_code if own and not others and self._is_clear(by_code, strictly=True) else None

    def _by_code(self) -> Pairs | None:
        """Pair by the places in the code; None when these contradict each other."""
        pairs: Pairs = {}
        for block in self.group:
            places = self.seen.of(block)
            if len(places) > 1:
                return None
            pairs.update((block, v) for v in self.found if v.address in places)
        return pairs if len({v.address for v in pairs.values()}) == len(pairs) else None

    def _is_complete(self, pairs: Pairs) -> bool:
        """Tell whether no place of these variables is left over."""
        return not any(b in self.seen.loose_new or v.address in self.seen.loose_old for b, v in pairs.items())

    def _is_clear(self, pairs: Pairs, *, strictly: bool) -> bool:
        """Tell whether no other pair's places are more alike than those of each pair; strictly: or as much so."""
        for block, variable in pairs.items():
            own = self.seen.likeness[block, variable.address]
            rivals = (self.seen.likeness[r] for r in self._rivals(block, variable))
            gaps = [a - b for other in rivals for a, b in zip(own, other, strict=True)]
            if any(gap < 0 or (strictly and not gap) for gap in gaps):
                return False
        return True

    def _rivals(self, block: Block, variable: LiveVariable) -> Iterator[tuple[Block, int]]:
        """Yield the other pairs that either could be part of."""
        yield from ((b, variable.address) for b in self.group if b is not block)
        yield from ((block, v.address) for v in self.found if v is not variable)

    def _by_contents(self) -> Pairs | None:
        """Pair by initial contents, where each has its own."""
        if len(self.group) != len(self.found):
            return None
        said = {b: [v for v in self.found if self.same[b, v.address]] for b in self.group}
        if any(len(v) != 1 for v in said.values()) or len({v[0].address for v in said.values()}) < len(said):
            return None
        return {b: v[0] for b, v in said.items()}
