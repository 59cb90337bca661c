"""The names of x86-64 relocation types, and which are relative to their own place.

What they compute is `link.relocations`' business. Specification: System V ABI, AMD64 supplement, table 4.9.
"""

from __future__ import annotations

from enum import IntEnum


class R(IntEnum):
    """Relocation types, by the psABI's name without its prefix; a leading A stands for an address field (A64: 64)."""

    NONE = 0
    A64 = 1
    PC32 = 2
    GOT32 = 3
    PLT32 = 4
    COPY = 5
    GLOB_DAT = 6
    JUMP_SLOT = 7
    RELATIVE = 8
    GOTPCREL = 9
    A32 = 10
    A32S = 11
    A16 = 12
    PC16 = 13
    A8 = 14
    PC8 = 15
    DTPMOD64 = 16
    DTPOFF64 = 17
    TPOFF64 = 18
    TLSGD = 19
    TLSLD = 20
    DTPOFF32 = 21
    GOTTPOFF = 22
    TPOFF32 = 23
    PC64 = 24
    GOTOFF64 = 25
    GOTPC32 = 26
    GOT64 = 27
    GOTPCREL64 = 28
    GOTPC64 = 29
    GOTPLT64 = 30
    PLTOFF64 = 31
    SIZE32 = 32
    SIZE64 = 33
    GOTPC32_TLSDESC = 34
    TLSDESC_CALL = 35
    IRELATIVE = 37
    GOTPCRELX = 41
    REX_GOTPCRELX = 42


OFFSET_TABLE = "_GLOBAL_OFFSET_TABLE_"
"""The symbol that stands for the table of cells (GOT) of whoever refers to it."""

_PC_RELATIVE = {
    R.PC64, R.PC32, R.PC16, R.PC8, R.PLT32, R.GOTPCREL, R.GOTPCRELX, R.REX_GOTPCRELX, R.GOTTPOFF,
    R.TLSGD, R.TLSLD, R.GOTPC32, R.GOTPC32_TLSDESC, R.GOTPCREL64, R.GOTPC64,
}  # fmt: skip


def is_pc_relative(kind: int) -> bool:
    """Tell whether a relocation's value is relative to its own place."""
    return kind in _PC_RELATIVE


def type_name(kind: int) -> str:
    """Return the psABI's name of a relocation type, for messages."""
    try:
        name = R(kind).name
    except ValueError:
        return f"relocation type {kind}"
    return "R_X86_64_" + (name[1:] if name[0] == "A" and name[1:].rstrip("S").isdigit() else name)
