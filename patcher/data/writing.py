"""What a change writes into data that the process has, and the bytes of that.

Contents with addresses in them are linked like any other block: a copy without a name is placed beside the new code,
and what it came to is what is written over the live variable.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from patcher.blocks import Block, Kind
from patcher.data.constants import Constant
from patcher.data.initial import AddressOf, Changed, Initials
from patcher.data.threads import ThreadPlace
from patcher.elf.relocations import is_pc_relative
from patcher.errors import LinkError
from patcher.part import Part
from patcher.patch.journal import Journal

PlaceOf = Callable[[Part, Block], "ThreadPlace | None"]


@dataclass(frozen=True, slots=True)
class DataDelta:
    """What some units change of live data: variables with another initialiser, kept or written again, and constants.

    `constants`: those that are other than they were.
    """

    kept: tuple[Changed, ...] = ()
    renewed: tuple[Changed, ...] = ()
    constants: tuple[Constant, ...] = ()

    def plus(self, other: DataDelta) -> DataDelta:
        return DataDelta(self.kept + other.kept, self.renewed + other.renewed, self.constants + other.constants)

    @property
    def rewritten(self) -> tuple[Constant, ...]:
        return tuple(c for c in self.constants if c.in_place)

    @property
    def copied(self) -> tuple[Constant, ...]:
        """Exported constants that other units shall find, once they have new code, whether this one has any or not."""
        return tuple(c for c in self.constants if not c.in_place and c.block.exported)

    @property
    def matters(self) -> bool:
        """Whether there is anything to write, or to tell of constants."""
        return bool(self.renewed or self.rewritten or self.copied or any(c.holders for c in self.constants))


def data_delta(
    parts: Sequence[Part],
    address_of: AddressOf,
    journal: Journal,
    initials: Initials,
    renewed: Collection[Block] = (),
) -> DataDelta:
    """Return what the data of some units' new objects changes; `renewed` are the variables that get new storage.

    Raises `UnsafeChange` for what cannot be written.
    """
    changed = [c for part in parts for c in initials.changed(part, address_of, journal)]
    initials.check(parts, address_of, changed, renewed)
    return DataDelta(
        kept=tuple(c for c in changed if not initials.is_wanted(c)),
        renewed=tuple(c for c in changed if initials.is_wanted(c)),
    )


class Writing:
    """The contents that are to be written into live data with a generation."""

    def __init__(self, data: DataDelta) -> None:
        self.data = data
        self._places = [(c.part, c.block, c.address) for c in data.renewed]
        self._places += [(c.part, c.block, c.address) for c in data.rewritten]
        self._copies = {b: p.blocks.contents_of(b) for p, b, _ in self._places if _is_linked(p, b)}

    def copies(self, part: Part) -> tuple[Block, ...]:
        """Return the blocks to place."""
        contents = [self._copies[b] for p, b, _ in self._places if p is part and b in self._copies]
        return (*contents, *(c.block for c in self.data.copied if c.part is part))

    def writes(self, addresses: Mapping[Block, int], placed: Sequence[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
        """Return what to write where, once the copies are placed."""
        places = (p for p in self._places if p[1].kind is not Kind.THREAD_LOCAL)
        return [(address, self._contents(block, addresses, placed)) for _, block, address in places]

    def thread_values(
        self, place_of: PlaceOf, addresses: Mapping[Block, int], placed: Sequence[tuple[int, bytes]]
    ) -> list[tuple[Changed, ThreadPlace, bytes]]:
        """Return what each thread's own variables become, and where that is, once the copies are placed."""
        renewed = (c for c in self.data.renewed if c.block.kind is Kind.THREAD_LOCAL)
        places = [(c, place_of(c.part, c.block)) for c in renewed]
        return [(c, place, self._contents(c.block, addresses, placed)) for c, place in places if place is not None]

    def _contents(self, block: Block, addresses: Mapping[Block, int], placed: Sequence[tuple[int, bytes]]) -> bytes:
        copy = self._copies.get(block)
        return block.data or bytes(block.size) if copy is None else _cut(placed, addresses[copy], copy.size)


def _is_linked(part: Part, block: Block) -> bool:
    references = part.blocks.references(block)
    if any(is_pc_relative(r.type) for r in references):
        raise LinkError(
            f"`{block.name}` of {part.source} holds distances to other data, which are right in one place only",
            "restart the program",
            code="relative-data",
        )
    return bool(references)


def _cut(placed: Sequence[tuple[int, bytes]], address: int, size: int) -> bytes:
    for start, contents in placed:
        if start <= address and address + size <= start + len(contents):
            return contents[address - start : address - start + size]
    raise AssertionError(f"nothing is placed at {address:#x}")
