"""Bodies: all the code that the functions of a process have had, by the records of its journal.

A frame may be in any of them, however long ago it was replaced. Decides which code belongs to which function in which
generation, and which of it is out of use once slots have certain values. Does not look at any thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from patcher.patch.journal import GenerationRecord, Journal, Placed, Redirect

Door = tuple[int, int]  # arena, slot index
_COPY = 16  # of an entry that an older version displaced: how much longer its copy may be than the entry


@dataclass(frozen=True, slots=True)
class Version:
    """A piece of code of one function, [start, end), as a generation has it; 0 is the program as it was started.

    `doors`: the slots and the values of them that lead to it; `entry`: what its first bytes are, where a detour stands
    there now.
    """

    name: str
    generation: int
    start: int
    end: int
    doors: tuple[tuple[Door, int], ...]
    entry: bytes = b""

    def is_unused(self, slots: Mapping[Door, int]) -> bool:
        """Tell whether it is code of one of the functions that have these slots, and these values lead past it."""
        concerned = False
        for door, body in self.doors:
            found = slots.get(door)
            if found == body:
                return False
            concerned = concerned or found is not None
        return concerned


class Bodies:
    """The code of all functions that were ever patched; what it made of a record it keeps while that is asked for."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[GenerationRecord, tuple[Version, ...]]] = {}

    def out_of_use(self, journal: Journal, slots: Mapping[Door, int]) -> tuple[Version, ...]:
        """Return the code that no call reaches once slots have these values, of the functions that have these slots."""
        self._known = {record.number: self._of(record) for record in journal.generations.values()}
        return tuple(version for _, every in self._known.values() for version in every if version.is_unused(slots))

    def _of(self, record: GenerationRecord) -> tuple[GenerationRecord, tuple[Version, ...]]:
        known = self._known.get(record.number)
        if known is not None and known[0] is record:
            return known
        originals = [version for redirect in record.redirects for version in _original(redirect)]
        return record, (*originals, *_placed(record))


def _original(redirect: Redirect) -> Iterator[Version]:
    if redirect.born:
        return
    doors = (((redirect.arena, redirect.index), redirect.copy),)
    entry = bytes.fromhex(redirect.entry)
    extents = [(redirect.original, redirect.original + redirect.size, entry)]
    copied = redirect.copied or len(entry) + _COPY
    extents.append((redirect.copy, redirect.copy + copied, b""))
    extents += [(start, end, b"") for start, end in redirect.pieces]
    for start, end, known in extents:
        yield Version(redirect.name, 0, start, end, doors, known)


def _placed(record: GenerationRecord) -> Iterator[Version]:
    leading = {body: (arena, index) for arena, index, body in record.bodies}
    code = [p for p in record.placed if p.kind == "code"]
    own: dict[tuple[str, str], tuple[Door, int]] = {}
    for placed in code:
        if placed.address in leading:
            own[placed.unit, placed.name] = leading[placed.address], placed.address
    every = tuple(own.values())
    for placed in code:
        # What belongs to no function that is known by name is in use as long as anything of its generation is.
        found = _function_of(placed, own)
        name, doors = (found, (own[placed.unit, found],)) if found else (placed.name, every)
        yield Version(name, record.number, placed.address, placed.address + placed.size, doors)


def _function_of(placed: Placed, own: Mapping[tuple[str, str], tuple[Door, int]]) -> str:
    """Return the name of the function that a piece was split off (`f.cold`, `f.part.0`), or is."""
    name = placed.name
    while name and (placed.unit, name) not in own:
        name = name.rpartition(".")[0]
    return name
