"""References relative to the table of cells: what position-independent code of the large model is made of.

A function computes the table's address from its own and adds 64-bit offsets to it. Which address it takes is known
from the function itself, and everything that it reaches from there is checked.

Specification: AMD64 supplement, section 3.5.5 (large position-independent code model) and table 4.9.
"""

from __future__ import annotations

from patcher.blocks import External, Reference
from patcher.elf.relocations import OFFSET_TABLE, R, is_pc_relative
from patcher.match.meaning import Meaning
from patcher.match.rewritten import MASK
from patcher.match.verdict import Cause, Mismatch

_RELATIVE = frozenset((R.GOTPC32, R.GOTPC64, R.GOTOFF64, R.PLTOFF64, R.GOT32, R.GOT64, R.GOTPLT64))


def is_table_relative(r: Reference) -> bool:
    """Tell whether a reference is to the table itself, or counts from there."""
    return r.type in _RELATIVE or (isinstance(r.target, External) and r.target.name == OFFSET_TABLE)


class TableReferences:
    """The references of one unit's functions that start at the table of cells."""

    def __init__(self, matcher: Meaning) -> None:
        self.matcher = matcher
        self._table: int | None = None  # what the function takes for the table
        self._waiting: list[tuple[Reference, int, int]] = []  # until that is known

    def start(self) -> None:
        """Begin with another function."""
        self._table = None
        self._waiting.clear()

    def check(self, r: Reference, value: int, place: int) -> None:
        """Check a field that holds `value`; raises `Mismatch`."""
        if r.type not in _RELATIVE or r.type in (R.GOTPC32, R.GOTPC64):
            self._take((value + place if is_pc_relative(r.type) else value) - r.addend & MASK)
        elif self._table is None:
            self._waiting.append((r, value, place))
        elif r.type in (R.GOTOFF64, R.PLTOFF64):
            self.matcher.check_target(r.target, self._table + value - r.addend & MASK)
        else:
            self.matcher.check_cell(r.target, self._table + value - r.addend & MASK)

    def finish(self) -> None:
        """Check what is left of a function; a split-off piece gets the table from its parent. Raises `Mismatch`."""
        if self._waiting:
            module = self.matcher.unit.module
            if module.offset_table is None or not all(module.contains(place) for _, _, place in self._waiting):
                raise Mismatch(Cause.REFERENCE, "does not say which table of cells it uses")
            self._take(module.offset_table)

    def _take(self, table: int) -> None:
        if self._table not in (None, table):
            raise Mismatch(Cause.REFERENCE, f"takes both {self._table:#x} and {table:#x} for the table of cells")
        self._table = table
        waiting, self._waiting = self._waiting, []
        for reference in waiting:
            self.check(*reference)
