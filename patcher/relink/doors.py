"""DOORS: which functions are entered through an island, and what their first instructions become.

A function that has an island keeps it. One that gets it now has the instructions that the jump at its entry takes the
place of displaced into a copy, which is what its old body is entered by from then on. Nothing is written here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from patcher.blocks import Block
from patcher.code.entry import (
    COPY_SIZE,
    Displaced,
    NotDetourable,
    behind_function,
    displaced_copy,
    plan_entry,
)
from patcher.image import Image
from patcher.labels import Kept
from patcher.link.place import ArenaFull, Region
from patcher.link.plan import Plan
from patcher.linkage import Linkage
from patcher.live import LiveFunction
from patcher.match import Status
from patcher.part import Part
from patcher.patch.arena import SLOT_COUNT, Arena
from patcher.relink.homes import Homes


@dataclass(frozen=True, slots=True)
class Door:
    """A function that is entered through an island; `fresh` when it gets it with this generation."""

    block: Block
    part: Part
    live: LiveFunction | None
    arena: Arena
    index: int
    fresh: bool


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry that is to be displaced, and the live bytes from there."""

    block: Block
    live: LiveFunction
    ahead: bytes
    displaced: Displaced


@dataclass(frozen=True, slots=True)
class Copy:
    """The first instructions of a function where they stand from now on; `displaced` is what they were."""

    block: Block
    address: int
    code: bytes
    displaced: bytes

    @property
    def end(self) -> int:
        return self.address + len(self.code)


def doors_of(found: Plan, linkage: Linkage, homes: Homes, arena: Arena) -> list[Door]:
    """Return the functions of a plan that are entered through an island; new islands are those of `arena`."""
    free = homes.free_slots(arena)
    doors, following = [], 0
    for block in found.code:
        if block not in found.doors:
            continue
        part = linkage.part_of(block)
        live = part.live(block)
        if live is not None and live.redirect is not None:
            home = homes.ledger.arenas[live.redirect.arena]
            doors.append(Door(block, part, live, home, live.redirect.index, False))
            continue
        following = next(free)
        doors.append(Door(block, part, live, arena, following, True))
    if following >= SLOT_COUNT:
        raise ArenaFull(f"the arena at {arena.base:#x} has no slot left", "restart the program")
    return doors


def entries_of(doors: Sequence[Door], near: int, image: Image) -> list[Entry]:
    """Plan the entries of the functions that get their island now, with copies to stand at `near` or behind it."""
    entries = []
    kept = False
    for door in doors:
        if not door.fresh or door.live is None:
            continue
        try:
            entry = _entry(door, door.live, image)
            displaced_copy(entry.displaced, entry.ahead, door.live.address, near)
            entries.append(entry)
        except NotDetourable:
            if door.part.status(door.block) is not Status.SAME or door.part.is_required(door.block):
                raise
            door.part.keep(door.block)
            kept = True
    if kept:
        raise Kept
    return entries


def _entry(door: Door, live: LiveFunction, image: Image) -> Entry:
    extent = max(door.part.unit.extent(live.address), live.size)
    ahead = image.target.memory.read(live.address, min(extent, live.size + 16))
    siblings = [(piece.body, piece.code) for piece in door.part.cold_pieces(door.block)]
    following = behind_function(ahead[live.size :], live.address + extent)
    table = door.part.module.offset_table
    displaced = plan_entry(live.name, ahead, live.address, live.size, following, siblings, table=table)
    return Entry(door.block, live, ahead, displaced)


def copies_of(entries: Sequence[Entry], near: Region) -> list[Copy]:
    """Displace the entries of functions into the code of an arena. Raises `ArenaFull`."""
    copies: list[Copy] = []
    cursor = near.start
    for entry in entries:
        address = (cursor + 15) & -16
        if address + COPY_SIZE > near.end:
            raise ArenaFull("the arena has no room for more code", "restart the program")
        code = displaced_copy(entry.displaced, entry.ahead, entry.live.address, address)
        displaced = entry.ahead[: entry.displaced.length]
        copies.append(Copy(entry.block, address, code, displaced))
        cursor = copies[-1].end
    return copies
