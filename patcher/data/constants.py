"""What becomes of constants with other contents: a new copy, or the old one changed where it stands.

New code sees the new contents in any case. Where nobody else holds the old address, the new constant is a new copy.
Where somebody does (another unit, a pointer that the program stored), the old one is written, with the flip and taken
back by a revert, if every byte of it belongs to this constant alone and the size is the same; else it is told who goes
on with the old contents.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from patcher.blocks import Block, Kind, Place
from patcher.data.counterparts import Counterpart
from patcher.data.holders import MOST, Extent, Holders, Range
from patcher.data.initial import full_name
from patcher.data.outcome import Datum, Fate
from patcher.elf.relocations import is_pc_relative
from patcher.errors import PatcherError
from patcher.image import Image
from patcher.lines import NONE as NO_LINES
from patcher.live import LiveVariable, base_name
from patcher.match import Matcher
from patcher.part import Part
from patcher.patch.journal import ArenaView

ConstantOf = Callable[[Part, Block], "Counterpart | None"]

_LARGEST = 64 << 10  # what is written while threads stand, and kept in the journal
_NAMED = 4


@dataclass(frozen=True, slots=True, eq=False)
class Constant:
    """A constant of the process that has other contents in a unit's new object, and who else holds it."""

    part: Part
    block: Block
    address: int
    size: int
    holders: tuple[str, ...]
    in_place: bool

    def datum(self) -> Datum:
        note = listed(self.holders)
        if self.size != self.block.size:
            note = f"{self.size} -> {self.block.size} bytes; {note}"
        fate = Fate.REWRITTEN if self.in_place else Fate.STALE
        return Datum(full_name(self.part, self.block), self.part.source, fate, note)


def listed(names: Sequence[str]) -> str:
    """Return the first of some names, and how many there are beside."""
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


@dataclass(frozen=True, slots=True)
class Constants:
    """The constants that matching did not bind: those that are as they were, and those that are not."""

    same: tuple[tuple[Part, Block, int], ...] = ()
    changed: tuple[Constant, ...] = ()


def unbound_constants(image: Image, view: ArenaView, parts: Sequence[Part], constant_of: ConstantOf) -> Constants:
    """Return what becomes of the constants of some units that no function which stays the same uses."""
    compared = [(p, b, old, same) for p in parts for b, old, same in _compared(p, constant_of)]
    same = tuple((p, b, old.constant.address) for p, b, old, is_same in compared if is_same and _is_alone(b))
    found = [(p, b, old) for p, b, old, is_same in compared if not is_same]
    return Constants(same, _held(image, view, parts, found) if found else ())


def _held(
    image: Image, view: ArenaView, parts: Sequence[Part], found: Sequence[tuple[Part, Block, Counterpart]]
) -> tuple[Constant, ...]:
    """Return the changed constants, each with who holds it beside the code to be replaced."""
    ranges = [(old.constant.address, old.constant.address + max(old.constant.size, 1)) for _, _, old in found]
    claims = Counter(low for low, _ in ranges)
    who = _holders(image, view, parts, ranges)
    constants = []
    for (part, block, old), holders in zip(found, who, strict=True):
        address, size = old.constant.address, old.constant.size
        in_place = bool(holders) and old.certain and claims[address] == 1 and _is_writable(part, block, old.constant)
        constants.append(Constant(part, block, address, size, holders, in_place))
    return tuple(constants)


def _holders(
    image: Image, view: ArenaView, parts: Sequence[Part], ranges: Sequence[Range]
) -> Iterator[tuple[str, ...]]:
    """Yield who goes on using each of some constants, in words: code that is not replaced, and what keeps pointers."""
    search = Holders(image, view, replaced(parts))
    words = search.words([*search.mapped(), *search.heaps()], ranges, MOST)
    for direct, through, kept in zip(search.users(ranges), search.users_through(words), words, strict=True):
        users = [user.name for user in (*direct, *through) if not user.out_of_use]
        outside = (at for at in kept.others if not any(low <= at < high for low, high in ranges))
        places = (place_of(image, search, at) for at in outside)
        yield tuple(dict.fromkeys((*users, *filter(None, places))))


def place_of(image: Image, search: Holders, at: int) -> str:
    """Say what holds a word, "" where it is none of the program's."""
    module, name = image.module_at(at), search.variable_at(at)
    if name:
        return f"stored in {name}"
    if module is None:
        return f"stored at {at:#x}"
    link = at - module.bias  # what linkers make for themselves has no symbols, and cannot be written to
    own = any(seg.writable and seg.address <= link < seg.end for seg in module.module.segments)
    return f"stored in {module.name}" if own else ""


def _compared(part: Part, constant_of: ConstantOf) -> list[tuple[Block, Counterpart, bool]]:
    matcher = Matcher(part.blocks, part.unit, NO_LINES, part.delta.stamps)
    memory = part.unit.image.target.memory
    # Statics of functions share their names: what one is known to be, no other can be.
    claimed = {address for bound, address in part.delta.bindings.items() if bound.kind is Kind.READ_ONLY}
    found = []
    for block in part.blocks.data_blocks():
        if block.kind is not Kind.READ_ONLY or not block.size:
            continue
        matched = part.matched(block)
        if matched is not None and matched in part.delta.bindings:
            continue  # what is the same uses it, and it is what it was
        counterpart = constant_of(part, block)
        if counterpart is None or counterpart.constant.address in claimed:
            continue
        old = counterpart.constant
        try:
            contents = memory.read(old.address, old.size)
        except PatcherError:
            continue
        same = block.data == contents and not part.blocks.relocations(block)
        same = same or matcher.holds(block, old.address, contents)
        if matcher.pending:  # it refers to code that has to be compared itself: pieces, labels
            matcher.pending.clear()
            continue
        found.append((block, counterpart, same))
    return found


def _is_alone(block: Block) -> bool:
    """Tell whether a block has its section for itself: what is about its end cannot be about a neighbour's start."""
    return block.object.sections[block.section].size == block.size


def replaced(parts: Sequence[Part]) -> list[Extent]:
    """Return the extents of the bodies that new code takes the place of."""
    live = [
        piece
        for part in parts
        for block in part.blocks.functions
        if part.is_new(block) and (function := part.live(block)) is not None
        for piece in (function, *part.cold_pieces(block))
    ]
    return [Extent(piece.name, piece.body, piece.body + piece.size) for piece in live]


def _is_writable(part: Part, block: Block, old: LiveVariable) -> bool:
    """Tell whether a constant may be changed where it stands: no byte of it is anybody else's."""
    references = part.blocks.references(block)
    if old.size != block.size or block.size > _LARGEST or any(is_pc_relative(r.type) for r in references):
        return False
    if any(isinstance(r.target, Place) and r.target.block.kind is Kind.CODE and r.target.offset for r in references):
        return False  # labels: code that stays goes on in old code
    if not _is_alone(block) or part.blocks.object.sections[block.section].mergeable:
        return False
    module = part.unit.image.module_at(old.address)
    if module is None:
        return part.unit.view.contains(old.address)
    own = {base_name(s.name) for s in block.symbols}
    if any(base_name(s.name) not in own for s in module.symbols_at(old.address) if s.size):
        return False  # the linker made one of two that were the same
    following = module.module.symbols.next_address(old.address - module.bias)
    return following is None or following + module.bias >= old.address + old.size
