"""Which live variable one of an object is: its storage and value outlive every compile, its name may not.

A file's own names last. Compilers number the static variables of functions (`names`), so these go by evidence
(`scoped`); never by number. What is declared otherwise than before is the same one where that is certain (`moves`).
Whoever is left without any is a new variable; what cannot be told is refused, never guessed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from patcher.blocks import Block, Kind
from patcher.data.counterparts import Counterpart, counterpart
from patcher.data.known import Description, Found, Known, ambiguous, is_scoped, source_of
from patcher.data.moves import Moves
from patcher.data.names import spelling
from patcher.data.outcome import Fate
from patcher.data.scoped import Scoped
from patcher.errors import UnsafeChange
from patcher.live import LiveVariable, base_name
from patcher.part import Part


class Variables:
    """The variables of some units that are linked together."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._units = {part: _Unit(part) for part in parts}

    def find(self, part: Part, block: Block) -> Found | None:
        """Return the live variable that one of a unit is, or None when it is new.

        Raises `UnsafeChange` when two would do, or when it would do for two.
        """
        if block.anonymous:
            return None
        unit = self._unit(part)
        found = unit.scoped.find(block) if is_scoped(block) else unit.plain(block)
        return found or unit.moves.find(block) or self._from_another_unit(unit, block)

    def constant(self, part: Part, block: Block, known: Sequence[LiveVariable]) -> Counterpart | None:
        """Return which of some live constants a function's own one is, None when it is new or cannot be told."""
        return counterpart(self._unit(part).known, block, known)

    def outgrown(self, part: Part, block: Block) -> LiveVariable | None:
        """Return the live variable that a static of a function is, of whatever type that is.

        Raises `UnsafeChange` when two would do.
        """
        return self._unit(part).scoped.outgrown(block)

    def describe(self, part: Part, block: Block) -> Description:
        """Return what debug information says of a variable of an object."""
        return self._unit(part).known.description(block)

    def _unit(self, part: Part) -> _Unit:
        if part not in self._units:
            self._units[part] = _Unit(part)
        return self._units[part]

    def _from_another_unit(self, unit: _Unit, block: Block) -> Found | None:
        """Return the variable that left another unit of the same generation, and came to this one."""
        others = [u for u in self._units.values() if u is not unit and u.known.module is unit.known.module]
        found = [(u.known, v) for u in others for v in u.moves.left(block, unit.known)]
        if not found:
            return None
        if len(found) > 1 or any(u.has_new(block) for u in others):
            raise ambiguous(unit.known, block, [v for _, v in found], [u.describe(v) for u, v in found])
        other, variable = found[0]
        return Found(replace(variable, born=False), Fate.MOVED, f"was in {other.part.source}")


class _Unit:
    """One unit's variables: those whose names last, and the others."""

    def __init__(self, part: Part) -> None:
        self.known = Known(part)
        self.scoped = Scoped(self.known)
        self.moves = Moves(self.known, self.scoped)

    def plain(self, block: Block) -> Found | None:
        """Return the variable that a name of the file, or of the program, has always denoted."""
        found: dict[int, LiveVariable] = {}
        for symbol in block.symbols:
            for variable in self.known.live.variables(
                symbol.name, symbol.local, trusted=self.known.is_own, thread_local=block.kind is Kind.THREAD_LOCAL
            ):
                found.setdefault(variable.address, variable)
        if not found:
            return None
        variable = next(iter(found.values()))
        if self._became_another(block, variable):
            return None
        if block.kind is Kind.THREAD_LOCAL:
            return Found(variable)
        away = self.known.live.moved_away(variable.address, exported=block.exported)
        if away and not self.known.is_used(variable):
            raise ambiguous(self.known, block, [variable], ["which another unit has now"])
        if not variable.born and self._was_static(variable) == block.exported:
            return Found(variable, Fate.MOVED, "was static" if block.exported else "was global")
        return self.known.found_again(block, variable)

    def _was_static(self, variable: LiveVariable) -> bool | None:
        """Tell whether the program has a variable as a static; None when the linker left no difference."""
        known = self.known.declaration(variable)
        if known is not None:
            return not known.external
        return None if self.known.module.module.demotes else variable.local

    def _became_another(self, block: Block, variable: LiveVariable) -> bool:
        """Tell whether what a patch brought under a name is gone, so that another type may have the name."""
        if not variable.born or self.known.same_type(block, variable):
            return False
        if self.known.is_used(variable):
            raise UnsafeChange(
                f"`{base_name(block.name)}` of {self.known.part.source} has another type than before, and code that "
                "runs uses the old one",
                "give it another name, or go back to the type that it had",
                code="layout",
            )
        return True

    def has_new(self, wanted: Block) -> bool:
        """Tell whether the object has a variable that is new as well, and like one of another unit's."""
        source = spelling(wanted.name).source
        data = (b for b in self.known.part.blocks.data_blocks() if b.kind is Kind.DATA and b.symbols)
        alike = [b for b in data if source_of(b.name) == source and b.size == wanted.size]
        return any(not self.known.is_matched(b) and not is_scoped(b) and self.plain(b) is None for b in alike)
