"""What a function may leave behind: whether it stores into its own frame only, and tells nobody where that is.

Such a function hands values on in registers and on the stack of what it calls, and in no other way. Anything in doubt
counts as leaving something behind. Specification: Intel SDM volume 2; the frame is that of psABI 3.2.2.
"""

from __future__ import annotations

from typing import Any

from capstone import CS_AC_WRITE
from capstone import x86_const as x86

from patcher.code.instructions import detailed
from patcher.errors import PatcherError

_STACK = (x86.X86_REG_RSP, x86.X86_REG_ESP, x86.X86_REG_SP, x86.X86_REG_SPL)
_BASE = (x86.X86_REG_RBP, x86.X86_REG_EBP, x86.X86_REG_BP, x86.X86_REG_BPL)
_MOVES_STACK = ("add", "sub", "and")
_NOT_OPERANDS = ("maskmov", "xsave", "syscall", "int")  # they write where no operand says


def keeps_to_its_frame(code: bytes, address: int) -> bool:
    """Tell whether a function stores nowhere but into its frame, and never has the address of what is in it."""
    try:
        listing = detailed(code, address)
    except PatcherError:
        return False
    framed = any(_enters(i) for i in listing[:3])
    return all(_is_harmless(i, framed) for i in listing)


def _enters(instruction: Any) -> bool:
    return bool(instruction.mnemonic == "mov" and instruction.op_str == "rbp, rsp")


def _is_harmless(instruction: Any, framed: bool) -> bool:
    if instruction.mnemonic.startswith(_NOT_OPERANDS):
        return False
    if _enters(instruction) or instruction.mnemonic in ("nop", "leave"):
        return True
    if instruction.mnemonic in ("push", "pop") and instruction.op_str == "rbp":
        return True
    frame = (*_STACK, *_BASE) if framed else _STACK
    return all(_is_harmless_operand(instruction, operand, frame) for operand in instruction.operands)


def _is_harmless_operand(instruction: Any, operand: Any, frame: tuple[int, ...]) -> bool:
    if operand.type == x86.X86_OP_REG:
        moves = instruction.mnemonic in _MOVES_STACK and instruction.operands[1].type == x86.X86_OP_IMM
        return operand.reg not in frame or (moves and operand.reg in _STACK)
    if operand.type != x86.X86_OP_MEM:
        return True
    within = operand.mem.base in frame
    if instruction.mnemonic == "lea":
        return not within and operand.mem.index not in frame
    return within or not operand.access & CS_AC_WRITE
