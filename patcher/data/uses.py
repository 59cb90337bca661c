"""Which functions use a variable: the new ones of an object, and the bodies that they have in the process.

A function that is new is what its callers were: they may have had its code in them. A function that is gone is part of
its callers in the same way, and what a compiler split off one (`.part`, `.isra`, `.constprop`, `.cold`) always is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cached_property

from patcher.blocks import Block, Place
from patcher.elf.dynamic import TLSDESC
from patcher.elf.relocations import R
from patcher.errors import PatcherError
from patcher.live import LiveFunction, LiveVariable, thread_place
from patcher.part import Part

_PIECE = re.compile(r"\.(cold|part|isra|constprop)(\.\d+)?(?=\.|$)")
_NUMBER = re.compile(r"0x[0-9a-f]+")

Bodies = tuple[LiveFunction, ...]


def owner(name: str) -> str:
    """Return the function that a piece was split off, by name."""
    return _PIECE.sub("", name)


class Uses:
    """Who uses the variables of one unit, in its object and in the process."""

    def __init__(self, part: Part) -> None:
        self.part = part
        self._touched: dict[tuple[int, int], frozenset[int]] = {}
        self._current: dict[Block, Bodies] = {}
        self._earlier: dict[Block, list[Bodies]] = {}

    # --- the object ---------------------------------------------------------------------------------------------

    @cached_property
    def _referrers(self) -> dict[Block, list[Block]]:
        found: dict[Block, list[Block]] = {}
        blocks = self.part.blocks
        for function in blocks.functions:
            targets = {r.target.block for r in blocks.references(function) if isinstance(r.target, Place)}
            for target in targets:
                found.setdefault(target, []).append(function)
        return found

    @cached_property
    def functions(self) -> frozenset[str]:
        """The names of the functions that the object has as such, without what was split off them."""
        return frozenset(map(owner, self._names))

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(s.name for b in self.part.blocks.functions for s in b.symbols)

    def direct(self, block: Block) -> set[Block]:
        """Return the functions that refer to a variable."""
        return set(self._referrers.get(block, ()))

    def users(self, block: Block) -> set[Block]:
        """Return the functions that refer to a variable, and who calls those of them that are new."""
        found: set[Block] = set()
        work = list(self.direct(block))
        while work:
            function = work.pop()
            if function not in found:
                found.add(function)
                if self.part.live(function) is None:
                    work += self._referrers.get(function, ())
        return found

    # --- the process --------------------------------------------------------------------------------------------

    def current(self, function: Block) -> Bodies:
        """Return what runs as a function: its body, what was split off it, and what it calls that is gone."""
        if function not in self._current:
            live = self.part.live(function)
            self._current[function] = () if live is None else self._with_callees(live, self.part.unit.pieces_of(live))
        return self._current[function]

    def earlier(self, function: Block) -> list[Bodies]:
        """Return what ran, or was to run, as a function in other generations, the newest first."""
        if function not in self._earlier:
            live = self.part.live(function)
            found = self.part.unit.earlier_bodies(live) if live is not None else []
            self._earlier[function] = [self._with_callees(b[0], b[1:]) for b in found]
        return self._earlier[function]

    def _with_callees(self, live: LiveFunction, pieces: Sequence[LiveFunction]) -> Bodies:
        found = [live, *pieces]
        seen, bodies = {live.address, live.body}, {body.body for body in found}
        for body in found:  # grows
            for address in self.touched(body) - seen:
                seen.add(address)
                callee = self.part.unit.function_at(address)
                if callee is None or callee.name in self._names:
                    continue
                more = [b for b in (callee, *self.part.unit.pieces_of(callee)) if b.body not in bodies]
                bodies |= {b.body for b in more}
                found += more
        return tuple(found)

    def uses(self, bodies: Iterable[LiveFunction], variable: LiveVariable, *, thread_local: bool = False) -> bool:
        """Tell whether some code refers to a variable."""
        if thread_local:
            return any(self._accesses(body, variable.address) for body in bodies)
        end = variable.address + max(variable.size, 1)
        within = range(variable.address, end + self._ends_alone(variable, end))
        return any(a in within for body in bodies for a in self.touched(body))

    def _ends_alone(self, variable: LiveVariable, end: int) -> bool:
        """Tell whether nothing else is where a variable ends: code that counts up to zero may name that alone.

        Behind a constant there may be one that has no name.
        """
        unit = self.part.unit
        constant = unit.module.module.constant(variable.address - unit.module.bias, variable.size)
        constant = constant or any(low <= variable.address < high for low, high in unit.view.constants)
        return not constant and not unit.names_at(end)

    def touched(self, live: LiveFunction) -> frozenset[int]:
        """Return every address that a body's instructions name, and those in the cells that they read."""
        key = live.body, live.size
        if key not in self._touched:
            self._touched[key] = frozenset(self._addresses(live))
        return self._touched[key]

    def _addresses(self, live: LiveFunction) -> Iterable[int]:
        from patcher.code.instructions import UndecodableCode, decode_lite, lite_reference, lite_target

        fixed = not self.part.unit.module.module.position_independent
        try:
            listing = decode_lite(live.code, live.body)
        except UndecodableCode as error:
            listing = decode_lite(live.code[: error.offset], live.body) if error.offset else []
        for instruction in listing:
            address = lite_target(instruction)
            if address is None:
                address = lite_reference(instruction, live.body)
            if address is not None:
                yield address
                if self._is_cell(address):
                    yield self._read(address)
            elif "0x" in instruction[3]:
                # Code at a fixed place, or that reaches everything, has the address itself in an instruction.
                yield from (int(n, 16) for n in _NUMBER.findall(instruction[3]) if len(n) > (6 if fixed else 10))

    def _is_cell(self, address: int) -> bool:
        unit = self.part.unit
        return not address & 7 and (unit.module.in_offset_table(address) or unit.view.contains(address))

    def _read(self, cell: int) -> int:
        try:
            return self.part.unit.image.target.memory.read_u64(cell)
        except PatcherError:
            return 0

    # --- thread-locals ------------------------------------------------------------------------------------------

    def _accesses(self, piece: LiveFunction, offset: int) -> bool:
        """Tell whether a body has a thread-local's offset in some form: as a displacement, or in a cell that it uses.

        Offsets from the thread pointer are like no other numbers; those in the module's block are looked for only
        where code that a linker filled in has them: in displacements that are wider than they have to be, and in
        cells that the dynamic linker fills.
        """
        from patcher.code.instructions import decode, wide_displacements

        added = thread_place(offset)
        if added is not None:
            return self._uses_added(piece, *added)
        image = self.part.unit.image
        block = image.thread_block(self.part.unit.module)
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
