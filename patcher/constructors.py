"""What an object has the program start with: the functions that its .init_array and .ctors sections point to.

Decides which they are, in which order they run, what else of the object belongs to them alone, and which variables
all of that touches. Whether they are to run in a process that has already started is not decided here.

Specification: System V ABI, chapter 5, "Initialization and Termination Functions"; ld(1) sorts by priority, the
lowest first and those without one last (`SORT_BY_INIT_PRIORITY`); a .ctors section runs from its end, and what its
name has is 65535 less the priority.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from patcher.blocks import Block, Blocks, External, Kind, Place
from patcher.elf import Section
from patcher.errors import LinkError

_LISTS = re.compile(r"\.(init_array|ctors)(?:\.(\d+))?")
_LAST = 65536
_WORD = 8


@dataclass(frozen=True, slots=True)
class Starter:
    """A function that runs when a program starts; those of lower priority first."""

    priority: int
    function: Block

    @property
    def made(self) -> bool:
        """Tell whether the compiler made it, of the initialisers of several variables."""
        return self.function.name.startswith(("_GLOBAL__", "__cxx_global_var_init"))


def starters(blocks: Blocks, *, complete: bool = True) -> tuple[Starter, ...]:
    """Return the functions that an object has run at the start of a program, in their order.

    Raises `LinkError` for an entry that is no function of the object, if they have to be `complete`.
    """
    found: list[Starter] = []
    for section in blocks.object.sections.values():
        name = _LISTS.fullmatch(section.name)
        if name is None:
            continue
        entries = [Starter(_priority(*name.groups()), f) for f in _listed(blocks, section, complete)]
        found += entries if name[1] == "init_array" else reversed(entries)
    return tuple(sorted(found, key=lambda s: s.priority))


def _priority(kind: str, number: str | None) -> int:
    if number is None:
        return _LAST
    return int(number) if kind == "init_array" else _LAST - 1 - int(number)


def _listed(blocks: Blocks, section: Section, complete: bool) -> list[Block]:
    found = []
    for offset in range(0, section.size, _WORD):
        block, within = blocks.at(section.index, offset)
        target = next((r.target for r in blocks.references(block) if r.offset == within), None)
        if isinstance(target, Place) and target.block.kind is Kind.CODE and not target.offset:
            found.append(target.block)
        elif complete and (target is not None or any(block.data[within : within + _WORD])):
            what = f"`{target.name}`" if isinstance(target, External) else "something else"
            raise LinkError(
                f"{blocks.object.name}: what runs at the start of the program ({block.name}) includes {what}, "
                "which is no function of this object",
                "call it from a function of this file that has __attribute__((constructor))",
                code="constructor",
            )
    return found


def belonging(blocks: Blocks, entries: Sequence[Block]) -> dict[Block, frozenset[Block]]:
    """Return what runs with each entry and for nothing else: itself, and local functions that only entries use."""
    reached = {entry: _reached(blocks, entry) for entry in entries}
    own = frozenset().union(*reached.values()) if reached else frozenset()
    if own != frozenset(entries):
        own = _used_within(blocks, own, frozenset(entries))
    return {entry: (found & own) | {entry} for entry, found in reached.items()}


def _reached(blocks: Blocks, entry: Block) -> frozenset[Block]:
    found, wave = {entry}, [entry]
    while wave:
        local = {b for b in _targets(blocks, wave) if b.kind is Kind.CODE and not b.exported} - found
        found |= local
        wave = list(local)
    return frozenset(found)


def _used_within(blocks: Blocks, some: frozenset[Block], entries: frozenset[Block]) -> frozenset[Block]:
    lists = {s.index for s in blocks.object.sections.values() if _LISTS.fullmatch(s.name)}
    others = [b for b in (*blocks.functions, *blocks.data_blocks()) if b not in some and b.section not in lists]
    while True:
        used = {b for b in _targets(blocks, others) if b in some and b not in entries}
        if not used:
            return some
        some -= used
        others = list(used)


def touched(blocks: Blocks, functions: Iterable[Block]) -> tuple[Block, ...]:
    """Return the variables of the object that functions refer to."""
    found = (b for b in _targets(blocks, functions) if b.kind is Kind.DATA and b.symbols)
    return tuple(dict.fromkeys(found))


def _targets(blocks: Blocks, users: Iterable[Block]) -> Iterable[Block]:
    return (r.target.block for user in users for r in blocks.references(user) if isinstance(r.target, Place))
