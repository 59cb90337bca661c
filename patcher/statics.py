"""Which live variable a static of a function is, when the compiler numbers it (`n.0`) and a change numbers it anew.

What matching could bind has its address already. For the rest, the old bodies of the functions that use a static
say which live ones they used: by exclusion, and by the set of functions that use it. Whoever is left without any is
a new variable; what cannot be told is refused, never guessed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from patcher.blocks import Block
from patcher.errors import UnsafeChange
from patcher.live import LiveFunction, LiveUnit, LiveVariable, base_name, numbered

if TYPE_CHECKING:
    from patcher.relink import Part


def candidates(unit: LiveUnit, block: Block) -> list[LiveVariable]:
    """Return the live variables that a block's names may stand for."""
    found: dict[int, LiveVariable] = {}
    for symbol in block.symbols:
        for variable in unit.variables(symbol.name, symbol.local):
            found.setdefault(variable.address, variable)
    return list(found.values())


def find_static(part: Part, block: Block, thread_block: int | None = None) -> LiveVariable | None:
    """Return the live variable that a numbered one is, or None when it is new.

    `thread_block` is given for a thread-local: its module's offset from the thread pointer. Raises `UnsafeChange`
    when two would do, or when it would do for two.
    """
    statics = _Statics(part, block, thread_block)
    options = statics.options()
    found = options[block]
    # Without any sign of use: new, unless the program has one that nobody else claims.
    doubtful = found or statics.unclaimed(block, options)
    if len(doubtful) > len(found) or len(found) > 1 or (found and sum(found == o for o in options.values()) > 1):
        places = ", ".join(f"`{v.name}` at {v.address:#x}" for v in doubtful)
        raise UnsafeChange(
            f"whether the static `{base_name(block.name)}` of {part.source} is {places} cannot be told",
            "give the function's static variables different names, one save at a time",
            code="ambiguous-variable",
        )
    return found[0] if found else None


class _Statics:
    """The numbered variables of one unit that share a name and that matching did not bind."""

    def __init__(self, part: Part, block: Block, thread_block: int | None) -> None:
        self.part = part
        self.blocks = [b for b in part.blocks.data_blocks() if self._rivals(b, block)]
        self.thread_block = thread_block
        self.taken = set(part.delta.bindings.values())

    def _rivals(self, block: Block, other: Block) -> bool:
        bindings = self.part.delta.bindings
        alike = block.kind is other.kind and numbered(block.name) and base_name(block.name) == base_name(other.name)
        matched = self.part.matched(block)
        return alike and (matched is None or matched not in bindings)

    def options(self) -> dict[Block, list[LiveVariable]]:
        options = {block: self._used(block) for block in self.blocks}
        for _ in options:  # what is certain for one is out of the question for the others
            certain = [found[0] for found in options.values() if len(found) == 1]
            for block, found in options.items():
                if len(found) > 1:
                    options[block] = [v for v in found if v not in certain]
        for variable in [found[0] for found in options.values() if len(found) == 1]:
            self._prefer_same_users(options, variable)
        return options

    def unclaimed(self, block: Block, options: dict[Block, list[LiveVariable]]) -> list[LiveVariable]:
        """Return the program's own variables that a block might be and no other one is."""
        claimed = {v.address for found in options.values() for v in found}
        module = self.part.unit.module
        own = [v for v in self._free(block) if self.thread_block is not None or module.contains(v.address)]
        return [v for v in own if v.address not in claimed]

    def _free(self, block: Block) -> list[LiveVariable]:
        found = candidates(self.part.unit, block)
        return [v for v in found if v.address not in self.taken and v.size == block.size]

    def _used(self, block: Block) -> list[LiveVariable]:
        """Return the live variables that the old bodies of a variable's users refer to."""
        free = self._free(block)
        old = [pieces for name in self._users(block) if (pieces := self._old(name))]
        used = [v for v in free if any(self._refers(pieces, v) for pieces in old)]
        # A caller that a function is inlined into uses its own variables as well; the function does not.
        return [v for v in used if all(self._refers(pieces, v) for pieces in old)] or used

    def _prefer_same_users(self, options: dict[Block, list[LiveVariable]], variable: LiveVariable) -> None:
        """Of several that one would do for, take the only one that is used by the very functions that used it."""
        rivals = [block for block, found in options.items() if found == [variable]]
        functions = self.part.blocks.functions
        before = {f for f in functions if self._refers(self._old(f), variable)}
        same = [block for block in rivals if self._users(block) == before]
        if len(same) == 1:
            options.update({block: [] for block in rivals if block is not same[0]})

    def _users(self, block: Block) -> set[Block]:
        blocks = self.part.blocks
        return {
            f for f in blocks.functions if any(getattr(r.target, "block", None) is block for r in blocks.references(f))
        }

    def _old(self, function: Block) -> tuple[LiveFunction, ...]:
        live = self.part.live(function)
        return () if live is None else (live, *self.part.cold_pieces(function))

    def _refers(self, pieces: Sequence[LiveFunction], variable: LiveVariable) -> bool:
        from patcher.code.instructions import references_into

        if self.thread_block is not None:
            return any(self._accesses(piece, self.thread_block + variable.address) for piece in pieces)
        within = range(variable.address, variable.address + variable.size)
        if any(references_into(piece.code, piece.body, within.start, within.stop) for piece in pieces):
            return True
        if self.part.unit.module.module.position_independent:
            return False
        # Position-dependent code may have the address itself in an instruction.
        words = (piece.code[i : i + 4] for piece in pieces for i in range(len(piece.code) - 3))
        return any(int.from_bytes(word, "little") in within for word in words)

    def _accesses(self, piece: LiveFunction, thread_offset: int) -> bool:
        """Tell whether a body has a thread-local's offset, as a displacement or in a cell that it loads."""
        from patcher.code.instructions import decode

        if thread_offset.to_bytes(4, "little", signed=True) in piece.code:
            return True
        image, cell = self.part.unit.image, thread_offset.to_bytes(8, "little", signed=True)
        references = {i.reference for i in decode(piece.code, piece.body) if i.reference is not None}
        mappings = image.target.mappings()
        return any(
            image.target.memory.read(r, 8) == cell for r in references if any(r in m and r + 7 in m for m in mappings)
        )
