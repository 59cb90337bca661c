"""Which bytes of a variable code reaches through the address that one instruction loads.

Follows the register only as long as that is plain: to where it is overwritten, or control may go elsewhere. What is
found is reached; what is not found may be reached all the same. Specification: Intel SDM volume 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from capstone import x86_const as x86

from patcher.code.instructions import UndecodableCode, detailed

_LEAVES = (x86.X86_GRP_CALL, x86.X86_GRP_RET, x86.X86_GRP_INT)


def reached_through(code: bytes, field: int) -> tuple[int, ...]:
    """Return the offsets at which code goes to memory by the address that the instruction around a field loads."""
    try:
        listing = detailed(code, 0)
    except UndecodableCode:
        return ()
    at = next((n for n, i in enumerate(listing) if i.address <= field < i.address + i.size), len(listing))
    if at == len(listing) or listing[at].mnemonic != "mov" or listing[at].operands[0].type != x86.X86_OP_REG:
        return ()
    return tuple(_reached(listing[at + 1 :], listing[at].operands[0].reg))


def _reached(listing: list[Any], register: int) -> Iterator[int]:
    for instruction in listing:
        memory = [o.mem for o in instruction.operands if o.type == x86.X86_OP_MEM and instruction.mnemonic != "lea"]
        yield from (int(m.disp) for m in memory if m.base == register and not m.index)
        name = instruction.reg_name(register)
        written = {instruction.reg_name(r) for r in instruction.regs_access()[1]}
        if instruction.mnemonic == "jmp" or any(instruction.group(g) for g in _LEAVES):
            return
        if written & {name, "e" + name[1:], name + "d"}:
            return
