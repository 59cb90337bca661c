"""Which live variable a static of a function is, when the compiler numbers it (`n.0`) and a change numbers it anew.

What matching could bind has its address already. For the rest, the old bodies of the functions that use a static
say which live ones they used: by exclusion, and by the set of functions that use it. Whoever is left without any is
a new variable; what cannot be told is refused, never guessed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from patcher.blocks import Block, Kind
from patcher.elf.dynamic import TLSDESC
from patcher.elf.relocations import R
from patcher.errors import UnsafeChange
from patcher.live import LiveFunction, LiveUnit, LiveVariable, base_name, numbered, thread_place

if TYPE_CHECKING:
    from patcher.part import Part


def candidates(unit: LiveUnit, block: Block) -> list[LiveVariable]:
    """Return the live variables that a block's names may stand for."""
    found: dict[int, LiveVariable] = {}
    for symbol in block.symbols:
        for variable in unit.variables(symbol.name, symbol.local, thread_local=block.kind is Kind.THREAD_LOCAL):
            found.setdefault(variable.address, variable)
    return list(found.values())


def find_static(part: Part, block: Block) -> LiveVariable | None:
    """Return the live variable that a numbered one is, or None when it is new.

    Raises `UnsafeChange` when two would do, or when it would do for two.
    """
    statics = _Statics(part, block)
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

    def __init__(self, part: Part, block: Block) -> None:
        self.part = part
        self.blocks = [b for b in part.blocks.data_blocks() if self._rivals(b, block)]
        self.thread_local = block.kind is Kind.THREAD_LOCAL
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
        own = [v for v in self._free(block) if self.thread_local or module.contains(v.address)]
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

        if self.thread_local:
            return any(self._accesses(piece, variable.address) for piece in pieces)
        within = range(variable.address, variable.address + variable.size)
        if any(references_into(piece.code, piece.body, within.start, within.stop) for piece in pieces):
            return True
        if self.part.unit.module.module.position_independent:
            return False
        # Position-dependent code may have the address itself in an instruction.
        words = (piece.code[i : i + 4] for piece in pieces for i in range(len(piece.code) - 3))
        return any(int.from_bytes(word, "little") in within for word in words)

    def _accesses(self, piece: LiveFunction, offset: int) -> bool:
        """Tell whether a body has a thread-local's offset in some form: as a displacement, or in a cell that it uses.

        Offsets from the thread pointer are like no other numbers; those in the module's block are looked for only
        where code that a linker filled in has them: in displacements that are wider than they have to be, and in
        cells that the dynamic linker fills.
        """
        from patcher.code.instructions import decode, wide_displacements

        image = self.part.unit.image
        block = image.thread_block(self.part.unit.module)
        added = thread_place(offset)
        if added is not None:
            return self._uses_added(piece, *added)
        if block is not None and (block + offset).to_bytes(4, "little", signed=True) in piece.code:
            return True
        if offset in wide_displacements(piece.code):
            return True
        return any(
            i.reference is not None and self._cell_tells(i.reference, i.raw, block, offset)
            for i in decode(piece.code, piece.body)
        )

    def _uses_added(self, piece: LiveFunction, offset: int, module_id: int) -> bool:
        """Tell whether a body uses a thread-local that a patch brought."""
        from patcher.code.instructions import decode

        if not module_id and offset.to_bytes(4, "little", signed=True) in piece.code:
            return True
        unit, memory = self.part.unit, self.part.unit.image.target.memory
        wanted = (module_id, offset) if module_id else (offset & (1 << 64) - 1,)
        cells = (i.reference for i in decode(piece.code, piece.body) if i.reference is not None)
        return any(
            unit.view.contains(cell) and _pair(memory.read_available(cell, 16))[: len(wanted)] == wanted
            for cell in cells
        )

    def _cell_tells(self, cell: int, user: bytes, block: int | None, offset: int) -> bool:
        """Tell whether the cell that an instruction uses leads to an offset in the module's block."""
        unit, memory = self.part.unit, self.part.unit.image.target.memory
        words = memory.read_available(cell, 16)
        if block is not None and words[:8] == (block + offset).to_bytes(8, "little", signed=True):
            return True
        # The sequence for one variable starts with a prefix (psABI, section 11.1); that for the whole block does not.
        for_one = user[:1] == b"\x66"
        index = unit.image.thread_module(unit.module) or 0, offset
        if unit.view.contains(cell):
            argument = int.from_bytes(words[8:], "little")
            return index == (_pair(words) if for_one else _pair(memory.read_available(argument, 16)))
        known = unit.image.cell_at(cell)
        if known is None or not unit.module.contains(cell):
            return False
        if known.type == TLSDESC:
            return known.addend == offset
        return (
            known.type == R.DTPMOD64
            and for_one
            and (not known.name or _pair(words)[0] == index[0])
            and (_pair(words)[1] == offset)
        )


def _pair(words: bytes) -> tuple[int, int]:
    return int.from_bytes(words[:8], "little"), int.from_bytes(words[8:16], "little")
