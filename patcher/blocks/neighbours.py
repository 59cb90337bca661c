"""Which of two neighbours an address belongs to, where a section is cut and a reference names only a place in it.

A relocation against a section's symbol may be about the end of the piece before, or, with a register added, about
any near by; and the cuts between nameless constants are guesses. Decides what else a reference may be about, and
which pieces stay together; whether it matters, where they are in the process, is the linker's business.
"""

from __future__ import annotations

import bisect
from typing import Protocol

from patcher.blocks.block import Block, Cuts, Kind, Place, Reference
from patcher.elf import ObjectFile, Relocation, Section
from patcher.elf.relocations import R

_ACCESSES = (R.PC32, R.PLT32)  # fields of instructions that use what is there; but for lea
_LEA = 0x8D


class Surroundings(Protocol):
    """What is asked of the object that has been cut."""

    object: ObjectFile

    def run(self, block: Block) -> tuple[Block, ...]:
        """Return what `run` here said of a block."""

    def cuts(self, section: int) -> Cuts:
        """Return the blocks of a section that has several."""

    def pointed_offsets(self, section: Section) -> set[int]:
        """Return where code and data point into a section that may hold nameless things."""

    def relocations_in(self, block: Block) -> list[Relocation]:
        """Return the relocations of a block as they stand."""

    def reference(self, block: Block, r: Relocation) -> Reference:
        """Return one relocation of a block as a reference."""


def run(cuts: Cuts, block: Block) -> tuple[Block, ...]:
    """Return the constants without names that lie side by side with one, itself included.

    Their cuts are guesses from where references lead, which may be the middle of a string or a table: code that
    reads on from there finds what follows only if they stay together.
    """
    if not _is_nameless_constant(block):
        return (block,)
    low = high = bisect.bisect_left(cuts.starts, block.start)
    while low and _is_nameless_constant(cuts.blocks[low - 1]):
        low -= 1
    while high < len(cuts.blocks) and _is_nameless_constant(cuts.blocks[high]):
        high += 1
    return tuple(cuts.blocks[low:high])


def _is_nameless_constant(block: Block) -> bool:
    return not block.symbols and block.kind is Kind.READ_ONLY


def pairs(source: Surroundings, user: Block, r: Relocation, reference: Reference) -> list[tuple[Block, Block]]:
    """Return the neighbours of a reference's target that it may be about as well.

    An instruction reads or writes inside of what it is about; but an address may be that of a variable's end, and
    where a register is added it may be anywhere near: a loop may count from before the first element.
    """
    in_code = user.kind is Kind.CODE
    if in_code and r.type in _ACCESSES and user.data[reference.offset - 2] != _LEA:
        return []
    indexed = in_code and r.type == R.A32S
    assert isinstance(reference.target, Place)
    target, offset = reference.target
    run = source.run(target)
    before, after = _around(source, run)
    if target.anonymous and target.kind is Kind.DATA:  # nothing is there: it is about what lies around
        return [pair for pair in ((target, after), (before, target)) if None not in pair]  # type: ignore[misc]
    if before is None and (after is None or not indexed):
        return []
    at_end = before is not None and not before.anonymous and offset == 0 and target is run[0]
    at_end = at_end and before is not None and before.start + before.size == target.start
    if not (indexed or at_end) or _is_own_table(source, user, r, target, before, after):
        return []
    pairs = [(before, run[0])] if before is not None else []
    if indexed and after is not None:
        pairs.append((before if before is not None and _is_padding(source, target) else run[-1], after))
    return pairs


def _around(source: Surroundings, run: tuple[Block, ...]) -> tuple[Block | None, Block | None]:
    """Return what lies before and behind some blocks of a section that is cut, padding left out."""
    starts, blocks, _ = source.cuts(run[0].section)
    low = bisect.bisect_left(starts, run[0].start) - 1
    high = low + len(run) + 1
    while low >= 0 and _is_padding(source, blocks[low]):
        low -= 1
    while high < len(blocks) and _is_padding(source, blocks[high]):
        high += 1
    return blocks[low] if low >= 0 else None, blocks[high] if high < len(blocks) else None


def _is_padding(source: Surroundings, block: Block) -> bool:
    if block.symbols:
        return False
    unused = block.start not in source.pointed_offsets(source.object.sections[block.section])
    return block.kind is not Kind.READ_ONLY or (unused and not any(block.data))


def _is_own_table(
    source: Surroundings, user: Block, r: Relocation, table: Block, before: Block | None, after: Block | None
) -> bool:
    """Tell whether a reference is the one by which a function finds its jump table.

    There is at least one for each; so if it is the only one to that place, and what lies around is no table of
    addresses, it is about no neighbour.
    """
    own = source.relocations_in(table) if table.anonymous and user.kind is Kind.CODE else []
    if not own or any(b is not None and source.relocations_in(b) for b in (before, after)):
        return False
    if sum(o.symbol == r.symbol and o.addend == r.addend for o in source.relocations_in(user)) > 1:
        return False
    label = source.reference(table, own[0]).target
    return isinstance(label, Place) and label.block is user
