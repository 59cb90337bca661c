"""Where the code of a function uses its variables, before and after: which of the old places is which of the new.

Two listings are laid side by side without anything that a compiler is free to choose anew: addresses, distances,
places on the stack. What stands in a run of equal instructions in both is the same place in the source.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from patcher.blocks import Block, Blocks, Place
from patcher.live import LiveFunction, LiveVariable

_RUN = 3  # instructions in a row that have to be the same
_AWAY = ("j", "ret", "bnd", "end")  # what comes next in the listing need not come next
_AROUND = 5  # instructions on either side of a place that tell what it is
_MEMORY = re.compile(r"\[[^]]*\]")
_LONGEST = 20_000  # instructions that are compared; more would take too long
_NUMBER = re.compile(r"0x[0-9a-f]+")


@dataclass(frozen=True, slots=True)
class Votes:
    """Which old variable stands where a new one does; what has other places; and how alike the places are.

    `likeness`: of each new variable and each old one, wherever in the functions they stand; once between the nearest
    jumps only, and once beyond them.
    """

    pairs: frozenset[tuple[Block, int]]
    loose_new: frozenset[Block]
    loose_old: frozenset[int]
    likeness: Mapping[tuple[Block, int], tuple[int, int]]

    def of(self, block: Block) -> set[int]:
        return {address for b, address in self.pairs if b is block}


@dataclass(frozen=True, slots=True)
class Pairs:
    """What the code says: `complete`, no place is left over; `likely`, no other pair is more alike; `distinct`, none
    is as alike."""

    pairs: dict[Block, LiveVariable]
    complete: bool
    likely: bool
    distinct: bool


def clearly(
    pairs: dict[Block, LiveVariable], seen: Votes, group: Sequence[Block], found: Sequence[LiveVariable]
) -> tuple[bool, bool]:
    """Tell whether no other pair's places are more alike than those of each pair, and whether none are as much so."""
    gaps = []
    for block, variable in pairs.items():
        own = seen.likeness[block, variable.address]
        others = [(b, variable.address) for b in group if b is not block]
        others += [(block, v.address) for v in found if v is not variable]
        gaps += [a - b for other in others for a, b in zip(own, seen.likeness[other], strict=True)]
    return all(gap >= 0 for gap in gaps), all(gap > 0 for gap in gaps)


@dataclass(frozen=True, slots=True)
class _Listing:
    words: list[str]
    uses: dict[int, Block | int]  # index in `words` -> variable


def votes(
    blocks: Blocks,
    new: Iterable[Block],
    old: Sequence[LiveFunction],
    wanted: Sequence[Block],
    variables: Sequence[LiveVariable],
) -> Votes:
    """Compare how new functions use some variables with how old bodies do."""
    ours = _joined([_new_listing(blocks, function, wanted) for function in new])
    theirs = _joined([_old_listing(body, variables) for body in old])
    pairs: set[tuple[Block, int]] = set()
    paired_new: set[int] = set()
    paired_old: set[int] = set()
    if max(len(ours.words), len(theirs.words)) <= _LONGEST:
        for a, b, size in SequenceMatcher(None, ours.words, theirs.words, autojunk=False).get_matching_blocks():
            for i in range(size if size >= _RUN else 0):
                block, address = ours.uses.get(a + i), theirs.uses.get(b + i)
                if isinstance(block, Block) and isinstance(address, int):
                    pairs.add((block, address))
                    paired_new.add(a + i)
                    paired_old.add(b + i)
    loose_new = {v for i, v in ours.uses.items() if i not in paired_new and isinstance(v, Block)}
    loose_old = {v for i, v in theirs.uses.items() if i not in paired_old and isinstance(v, int)}
    likeness = {(b, v.address): _likeness(ours, b, theirs, v.address) for b in wanted for v in variables}
    return Votes(frozenset(pairs), frozenset(loose_new), frozenset(loose_old), likeness)


def same_code(blocks: Blocks, function: Block, live: LiveFunction) -> bool:
    """Tell whether a new function is an old one in all but its name, as far as its instructions tell."""
    return _new_listing(blocks, function, ()).words == _old_listing(live, ()).words


def _likeness(ours: _Listing, block: Block, theirs: _Listing, address: int) -> tuple[int, int]:
    """Return how many of the words around the places of a new variable stand around places of an old one."""
    new = [i for i, v in ours.uses.items() if v is block]
    old = [i for i, v in theirs.uses.items() if v == address]
    found = [[_alike(ours.words, i, theirs.words, j) for j in old] for i in new]
    return sum(max((a for a, _ in f), default=0) for f in found), sum(max((b for _, b in f), default=0) for f in found)


def _alike(ours: Sequence[str], i: int, theirs: Sequence[str], j: int) -> tuple[int, int]:
    """Compare the words around two places, between the nearest jumps and beyond them."""
    within, beyond = 0, 0
    for step in (-1, 1):
        straight = True
        for k in range(0 if step > 0 else 1, _AROUND + 1):
            a, b = i + step * k, j + step * k
            if not (0 <= a < len(ours) and 0 <= b < len(theirs)):
                break
            straight = straight and not (step < 0 and ours[a].startswith(_AWAY))
            beyond += ours[a] == theirs[b]
            within += straight and ours[a] == theirs[b]
            straight = straight and not ours[a].startswith(_AWAY)
    return within, beyond


def _joined(listings: Sequence[_Listing]) -> _Listing:
    words: list[str] = []
    uses: dict[int, Block | int] = {}
    for number, listing in enumerate(listings):
        uses |= {len(words) + i: v for i, v in listing.uses.items()}
        words += [*listing.words, f"end {number}"]
    return _Listing(words, uses)


def _new_listing(blocks: Blocks, function: Block, wanted: Sequence[Block]) -> _Listing:
    from patcher.code.instructions import decode_lite

    at: dict[int, Block] = {}
    referring: set[int] = set()
    for r in blocks.references(function):
        referring.add(r.offset)
        if isinstance(r.target, Place) and r.target.block in wanted:
            at[r.offset] = r.target.block
    words: list[str] = []
    uses: dict[int, Block | int] = {}
    for offset, size, mnemonic, operands in decode_lite(function.data, 0):
        inside = range(offset, offset + size)
        used = next((at[o] for o in inside if o in at), None)
        if used is not None:
            uses[len(words)] = used
        refers = used is not None or any(o in referring for o in inside)
        words.append(_word(mnemonic, operands, used is not None, refers))
    return _Listing(words, uses)


def _old_listing(live: LiveFunction, variables: Sequence[LiveVariable]) -> _Listing:
    from patcher.code.instructions import decode_lite, lite_reference

    words: list[str] = []
    uses: dict[int, Block | int] = {}
    for instruction in decode_lite(live.code, live.body):
        address = lite_reference(instruction, live.body)
        named = [address] if address is not None else [int(n, 16) for n in _NUMBER.findall(instruction[3])]
        used = next((v for v in variables for n in named if v.address <= n < v.address + max(v.size, 1)), None)
        if used is not None:
            uses[len(words)] = used.address
        refers = used is not None or address is not None or any(n > 0xFFFF for n in named)
        words.append(_word(instruction[2], instruction[3], used is not None, refers))
    return _Listing(words, uses)


def _word(mnemonic: str, operands: str, used: bool, refers: bool) -> str:
    """Return an instruction without what may differ although it means the same."""
    if mnemonic.startswith(("j", "call", "bnd")):
        return mnemonic
    plain = _MEMORY.sub(lambda found: "[]" if refers else _without_distance(found[0]), operands)
    if refers:
        plain = _NUMBER.sub("", plain) if "[]" not in plain else plain
    return f"{mnemonic} {plain}{' *' if used else ''}"


def _without_distance(memory: str) -> str:
    return "[stack]" if "rbp" in memory or "rsp" in memory else memory
