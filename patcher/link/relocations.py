"""x86-64 relocations: one row each, with the formula in the psABI's letters.

    S   value of the symbol          A   addend
    P   address of the field         G   address of the symbol's cell (the psABI's G + GOT)
    TP  offset of a thread-local variable from the thread pointer

Decides the value and whether it fits its field; never looks a symbol up.

Specification: System V ABI, AMD64 supplement, table 4.9 and section 4.4.1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from patcher.elf.relocations import R, is_pc_relative, type_name


class Need(Enum):
    """What a relocation wants made for its symbol."""

    NOTHING = "nothing"
    CELL = "a cell that holds the symbol's address"
    ISLAND = "a jump within reach, when the symbol is not"
    THREAD_OFFSET = "the variable's offset from the thread pointer"
    THREAD_CELL = "a cell that holds the variable's offset from the thread pointer"


@dataclass(frozen=True, slots=True)
class Operands:
    """The numbers a formula may use."""

    S: int
    A: int
    P: int
    G: int = 0
    TP: int = 0


class Sign(Enum):
    SIGNED = "signed"
    UNSIGNED = "unsigned"
    EITHER = "signed or unsigned"


@dataclass(frozen=True, slots=True)
class Rule:
    """How one relocation type is computed: the formula, and the field's width in bytes and signedness."""

    formula: Callable[[Operands], int]
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

    def encode(self, value: int) -> bytes | None:
        """Return the field's bytes, or None when the value does not fit."""
        if self.width == 8:
            return (value & (1 << 64) - 1).to_bytes(8, "little")  # wraps, as addresses do
        low, high = self.limits
        if not low <= value <= high:
            return None
        return (value & (1 << 8 * self.width) - 1).to_bytes(self.width, "little")


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
    R.PLT32: Rule(lambda o: o.S + o.A - o.P, 4, Sign.SIGNED, Need.ISLAND),
    R.GOTPCREL: Rule(lambda o: o.G + o.A - o.P, 4, Sign.SIGNED, Need.CELL),
    R.GOTPCRELX: Rule(lambda o: o.G + o.A - o.P, 4, Sign.SIGNED, Need.CELL),
    R.REX_GOTPCRELX: Rule(lambda o: o.G + o.A - o.P, 4, Sign.SIGNED, Need.CELL),
    R.GOTTPOFF: Rule(lambda o: o.G + o.A - o.P, 4, Sign.SIGNED, Need.THREAD_CELL),
    R.TPOFF32: Rule(lambda o: o.TP + o.A, 4, Sign.SIGNED, Need.THREAD_OFFSET),
    R.TPOFF64: Rule(lambda o: o.TP + o.A, 8, Sign.EITHER, Need.THREAD_OFFSET),
}

__all__ = ["RULES", "Need", "Operands", "R", "Rule", "Sign", "is_pc_relative", "type_name"]
