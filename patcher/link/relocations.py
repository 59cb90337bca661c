"""x86-64 relocations: one row each, with the formula in the psABI's letters.

    S    value of the symbol             A    addend
    P    address of the field            Z    size of the symbol
    GOT  address of the table of cells   G    offset of the symbol's cell in that table
    L    where a call of the symbol goes (the psABI's PLT entry)
    TP   offset of a thread-local variable from the thread pointer
    D    offset of a thread-local variable in its module's block

A formula takes numbers or arrays of them: the linker computes all fields of one type together.
Decides the value and whether it fits its field; never looks a symbol up.

Specification: System V ABI, AMD64 supplement, tables 4.9 and 4.10 and section 4.4.1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from patcher.elf.relocations import R, is_pc_relative, type_name


class Need(Enum):
    """What a relocation wants made for its symbol."""

    NOTHING = "nothing"
    CELL = "a cell that holds the symbol's address"
    ISLAND = "a jump within reach, when the symbol is not"
    TABLE = "the table of cells, and no symbol"
    SIZE = "the symbol's size"
    THREAD_OFFSET = "the variable's offset from the thread pointer"
    THREAD_CELL = "a cell that holds the variable's offset from the thread pointer"
    MODULE_OFFSET = "the variable's offset in the thread-local block of its module"
    MODULE_CELLS = "two cells that hold the number of the variable's module, and its offset there"
    MODULE_BASE_CELLS = "two cells that hold the number of the variable's module, and zero"
    DESCRIPTOR = "two cells that hold a function which finds the variable, and its argument"
    MARK = "nothing written: it marks the call through a descriptor"

    @property
    def thread_local(self) -> bool:
        """Tell whether it is about a thread-local variable."""
        return self in _THREAD_LOCAL


_THREAD_LOCAL = frozenset(
    {
        Need.THREAD_OFFSET,
        Need.THREAD_CELL,
        Need.MODULE_OFFSET,
        Need.MODULE_CELLS,
        Need.MODULE_BASE_CELLS,
        Need.DESCRIPTOR,
        Need.MARK,
    }
)


@dataclass(frozen=True, slots=True)
class Operands:
    """The numbers, or arrays of numbers, that a formula may use."""

    S: Any = 0
    A: Any = 0
    P: Any = 0
    G: Any = 0
    GOT: Any = 0
    L: Any = 0
    Z: Any = 0
    TP: Any = 0
    D: Any = 0


class Sign(Enum):
    SIGNED = "signed"
    UNSIGNED = "unsigned"
    EITHER = "signed or unsigned"


@dataclass(frozen=True, slots=True)
class Rule:
    """How one relocation type is computed: the formula, and the field's width in bytes and signedness."""

    formula: Callable[[Operands], Any]
    width: int
    sign: Sign
    need: Need = Need.NOTHING

    @property
    def limits(self) -> tuple[int, int]:
        """Return the least and the greatest value that the field can hold."""
        bits = 8 * self.width
        low = 0 if self.sign is Sign.UNSIGNED else -(1 << bits - 1)
        high = (1 << bits - 1) - 1 if self.sign is Sign.SIGNED else (1 << bits) - 1
        return low, high

    @property
    def wraps(self) -> bool:
        """Tell whether every value fits: fields of eight bytes wrap as addresses do."""
        return self.width == 8

    def fits(self, value: int) -> bool:
        """Tell whether the field can hold a value."""
        low, high = self.limits
        return self.wraps or low <= value <= high


RULES: dict[int, Rule] = {
    R.A64: Rule(lambda o: o.S + o.A, 8, Sign.EITHER),
    R.A32: Rule(lambda o: o.S + o.A, 4, Sign.UNSIGNED),
    R.A32S: Rule(lambda o: o.S + o.A, 4, Sign.SIGNED),
    R.A16: Rule(lambda o: o.S + o.A, 2, Sign.EITHER),
    R.A8: Rule(lambda o: o.S + o.A, 1, Sign.EITHER),
    R.PC64: Rule(lambda o: o.S + o.A - o.P, 8, Sign.EITHER),
    R.PC32: Rule(lambda o: o.S + o.A - o.P, 4, Sign.SIGNED),
    R.PC16: Rule(lambda o: o.S + o.A - o.P, 2, Sign.SIGNED),
    R.PC8: Rule(lambda o: o.S + o.A - o.P, 1, Sign.SIGNED),
    R.PLT32: Rule(lambda o: o.L + o.A - o.P, 4, Sign.SIGNED, Need.ISLAND),
    R.PLTOFF64: Rule(lambda o: o.L + o.A - o.GOT, 8, Sign.EITHER, Need.ISLAND),
    R.GOT32: Rule(lambda o: o.G + o.A, 4, Sign.SIGNED, Need.CELL),
    R.GOT64: Rule(lambda o: o.G + o.A, 8, Sign.EITHER, Need.CELL),
    R.GOTPLT64: Rule(lambda o: o.G + o.A, 8, Sign.EITHER, Need.CELL),
    R.GOTPCREL: Rule(lambda o: o.G + o.GOT + o.A - o.P, 4, Sign.SIGNED, Need.CELL),
    R.GOTPCRELX: Rule(lambda o: o.G + o.GOT + o.A - o.P, 4, Sign.SIGNED, Need.CELL),
    R.REX_GOTPCRELX: Rule(lambda o: o.G + o.GOT + o.A - o.P, 4, Sign.SIGNED, Need.CELL),
    R.GOTPCREL64: Rule(lambda o: o.G + o.GOT + o.A - o.P, 8, Sign.EITHER, Need.CELL),
    R.GOTOFF64: Rule(lambda o: o.S + o.A - o.GOT, 8, Sign.EITHER),
    R.GOTPC32: Rule(lambda o: o.GOT + o.A - o.P, 4, Sign.SIGNED, Need.TABLE),
    R.GOTPC64: Rule(lambda o: o.GOT + o.A - o.P, 8, Sign.EITHER, Need.TABLE),
    R.SIZE32: Rule(lambda o: o.Z + o.A, 4, Sign.UNSIGNED, Need.SIZE),
    R.SIZE64: Rule(lambda o: o.Z + o.A, 8, Sign.EITHER, Need.SIZE),
    R.TPOFF32: Rule(lambda o: o.TP + o.A, 4, Sign.SIGNED, Need.THREAD_OFFSET),
    R.TPOFF64: Rule(lambda o: o.TP + o.A, 8, Sign.EITHER, Need.THREAD_OFFSET),
    R.GOTTPOFF: Rule(lambda o: o.G + o.GOT + o.A - o.P, 4, Sign.SIGNED, Need.THREAD_CELL),
    R.DTPOFF32: Rule(lambda o: o.D + o.A, 4, Sign.SIGNED, Need.MODULE_OFFSET),
    R.DTPOFF64: Rule(lambda o: o.D + o.A, 8, Sign.EITHER, Need.MODULE_OFFSET),
    R.TLSGD: Rule(lambda o: o.G + o.GOT + o.A - o.P, 4, Sign.SIGNED, Need.MODULE_CELLS),
    R.TLSLD: Rule(lambda o: o.G + o.GOT + o.A - o.P, 4, Sign.SIGNED, Need.MODULE_BASE_CELLS),
    R.GOTPC32_TLSDESC: Rule(lambda o: o.G + o.GOT + o.A - o.P, 4, Sign.SIGNED, Need.DESCRIPTOR),
    R.TLSDESC_CALL: Rule(lambda o: 0, 0, Sign.EITHER, Need.MARK),
}

DYNAMIC_THREAD_LOCAL = (R.TLSGD, R.TLSLD, R.DTPOFF32, R.DTPOFF64, R.GOTPC32_TLSDESC, R.TLSDESC_CALL)
"""The types of code that asks at run time where a thread-local variable is."""

__all__ = ["DYNAMIC_THREAD_LOCAL", "RULES", "Need", "Operands", "R", "Rule", "Sign", "is_pc_relative", "type_name"]
