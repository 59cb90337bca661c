"""What the bytes of a function say: its instructions, and where each of them points.

Decides where instructions start, of which kind they are, and which of their bytes hold a relative
reference (a branch displacement or the displacement of a RIP-relative operand). Does not decide what
a reference means; that takes symbols. Decoding in full detail costs ten times `decode_lite`, so the
bulk functions look at plain bytes first, and at the listing second.

Specification: Intel SDM volume 2, chapter 2 (instruction format) and appendix A (opcode maps).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto
from functools import cache
from typing import Any

import capstone
from capstone import x86_const as x86

from patcher.errors import PatcherError

MAX_INSTRUCTION = 15
"""Bytes of the longest instruction (SDM 2.3.11)."""

Lite = tuple[int, int, str, str]
"""Offset, size, mnemonic, operands: an instruction as `decode_lite` gives it."""


class UndecodableCode(PatcherError):
    """Bytes that are no instruction; `offset` is where, from the start of the decoded bytes."""

    code = "undecodable"

    def __init__(self, code: bytes, address: int, offset: int) -> None:
        found = code[offset : offset + 8].hex(" ") or "nothing"
        super().__init__(
            f"no instruction at {address + offset:#x} (offset {offset:#x} of the code at {address:#x}): found {found}",
            "data between the instructions, or an instruction newer than the decoder; leave this function as it is",
        )
        self.offset = offset


class Kind(Enum):
    """What an instruction does to the flow of control."""

    OTHER = auto()
    CALL = auto()
    JUMP = auto()
    CONDITIONAL_JUMP = auto()
    RETURN = auto()
    NOP = auto()
    TRAP = auto()


@dataclass(frozen=True, slots=True)
class Instruction:
    """One decoded instruction.

    `target` is the address a relative branch goes to; `reference` the address its RIP-relative operand
    means. Either has a `field` (offset within the instruction) of `width` bytes that encodes it, and
    `trailing` bytes of immediate after that field. Without one, `field`, `width` and `trailing` are 0.
    """

    offset: int
    size: int
    mnemonic: str
    operands: str
    raw: bytes
    kind: Kind = Kind.OTHER
    target: int | None = None
    reference: int | None = None
    field: int = 0
    width: int = 0
    trailing: int = 0

    @property
    def end(self) -> int:
        """The offset after the instruction."""
        return self.offset + self.size

    @property
    def falls_through(self) -> bool:
        """Whether control can go on to the next instruction (a call counts as coming back)."""
        return self.kind not in (Kind.JUMP, Kind.RETURN) and self.mnemonic not in ("ud2", "hlt")


_KINDS = {
    x86.X86_INS_JMP: Kind.JUMP,
    x86.X86_INS_LJMP: Kind.JUMP,
    x86.X86_INS_CALL: Kind.CALL,
    x86.X86_INS_LCALL: Kind.CALL,
    x86.X86_INS_RET: Kind.RETURN,
    x86.X86_INS_RETF: Kind.RETURN,
    x86.X86_INS_RETFQ: Kind.RETURN,
    x86.X86_INS_IRET: Kind.RETURN,
    x86.X86_INS_IRETD: Kind.RETURN,
    x86.X86_INS_IRETQ: Kind.RETURN,
    x86.X86_INS_NOP: Kind.NOP,
    x86.X86_INS_INT3: Kind.TRAP,
    x86.X86_INS_UD2: Kind.TRAP,
    x86.X86_INS_HLT: Kind.TRAP,
}


@cache
def _decoder(detail: bool) -> Any:
    decoder = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
    decoder.detail = detail
    return decoder


def decode(code: bytes, address: int) -> list[Instruction]:
    """Decode all of `code`, which lies at `address`, in full detail (about 8 us an instruction).

    Raises UndecodableCode at the first bytes that are no instruction, or are cut off by the end.
    """
    found = [_instruction(i, address) for i in _decoder(True).disasm(code, address)]
    decoded = found[-1].end if found else 0
    if decoded != len(code):
        raise UndecodableCode(code, address, decoded)
    return found


def detailed(code: bytes, address: int) -> list[Any]:
    """Decode all of `code` to the decoder's own instructions, with their operands. Raises UndecodableCode."""
    found = list(_decoder(True).disasm(code, address))
    decoded = sum(i.size for i in found)
    if decoded != len(code):
        raise UndecodableCode(code, address, decoded)
    return found


def decode_start(code: bytes, address: int, length: int) -> list[Instruction]:
    """Decode the first whole instructions of `code` that cover at least `length` bytes, or all of `code` if shorter.

    Raises UndecodableCode when they are no instructions.
    """
    found: list[Instruction] = []
    window = code[: length + MAX_INSTRUCTION]
    for i in _decoder(True).disasm(window, address, length):
        found.append(_instruction(i, address))
        if found[-1].end >= length:
            return found
    decoded = found[-1].end if found else 0
    if decoded != len(code):
        raise UndecodableCode(code, address, decoded)
    return found


def decode_lite(code: bytes, address: int, length: int | None = None) -> list[Lite]:
    """Decode `code` to (offset, size, mnemonic, operands): the quick one (about 0.7 us an instruction).

    All of it, or, given a `length`, whole instructions that cover at least so many bytes. Raises UndecodableCode at
    the first bytes that are no instruction, or are cut off by the end.
    """
    needed = len(code) if length is None else length
    window = code[: needed + MAX_INSTRUCTION]
    found = [(at - address, size, name, operands) for at, size, name, operands in _lite(window, address)]
    decoded = found[-1][0] + found[-1][1] if found else 0
    if decoded < needed:
        raise UndecodableCode(code, address, decoded)
    return found


def _lite(code: bytes, address: int, count: int = 0) -> Iterator[tuple[int, int, str, str]]:
    lite: Iterator[tuple[int, int, str, str]] = _decoder(False).disasm_lite(code, address, count)
    return lite


def _instruction(i: Any, base: int) -> Instruction:
    offset, raw, kind = i.address - base, bytes(i.bytes), _KINDS.get(i.id, Kind.OTHER)
    relative = x86.X86_GRP_BRANCH_RELATIVE in i.groups
    if relative and kind is Kind.OTHER:
        kind = Kind.CONDITIONAL_JUMP
    if relative:
        width = branch_width(i.size)
        target, field = i.operands[0].imm & _MASK64, i.size - width
        return Instruction(offset, i.size, i.mnemonic, i.op_str, raw, kind, target, None, field, width)
    if "[rip" in i.op_str:
        field = i.encoding.disp_offset
        reference = (i.address + i.size + i.disp) & _MASK64
        trailing = i.size - field - 4
        return Instruction(offset, i.size, i.mnemonic, i.op_str, raw, kind, None, reference, field, 4, trailing)
    return Instruction(offset, i.size, i.mnemonic, i.op_str, raw, kind)


_MASK64 = (1 << 64) - 1


def branch_width(size: int) -> int:
    """Return the bytes of the displacement of a relative branch of `size` bytes: 1 or 4.

    The long forms have at least five bytes; a short one has two, and rarely a prefix or two.
    """
    return 4 if size >= 5 else 1


# --- the field of a RIP-relative operand ---

_RIP_MODRM = frozenset(range(0x05, 0x40, 8))
"""ModRM bytes with mod=00 rm=101: disp32(%rip) (SDM table 2-7)."""

_OPCODES_WITH_IMMEDIATE = frozenset(
    b"\x69\x6b\x80\x81\x82\x83\xc0\xc1\xc6\xc7\xf6\xf7"  # one-byte map: imul, group 1, shifts, mov, test
    b"\x70\x71\x72\x73\xa4\xac\xba\xc2\xc4\xc5"  # map 0f (c6 too): shuffles, shifts, shld, bt, cmpps, pinsrw
)


def may_have_immediate(code: bytes, field: int) -> bool:
    """Whether, in any opcode map, the opcode before the ModRM byte before `field` can take an immediate.

    Never false for an instruction that has one; true for some that have none.
    """
    if field < 2 or code[field - 2] in _OPCODES_WITH_IMMEDIATE:
        return True
    before = code[max(0, field - 6) : field - 2]
    return (
        before[-1:] == b"\x3a"  # map 0f 3a: imm8, always
        or (before[-1:] == b"\x0f" and code[field - 2] == 0x0F)  # 3DNow!: the opcode is the last byte
        or before[-3:-2] in (b"\xc4", b"\x8f")  # VEX of three bytes (map 3: imm8), XOP (maps 8 and 10)
        or before[-4:-3] == b"\x62"  # EVEX (map 3: imm8)
    )


def field_end(code: bytes, start: int | None, field: int) -> int:
    """Return how many bytes of its instruction follow the four-byte relative field at offset `field`: 0, 1, 2 or 4.

    `start` is the offset of the instruction, or None: then `code` must start with an instruction, and is decoded
    up to the field when the bytes before it do not rule an immediate out.
    Raises UndecodableCode when that decoding fails before the field.
    """
    if code[field - 1] in _RIP_MODRM and not may_have_immediate(code, field):
        return 0
    if start is None:
        start = _instruction_at(code, field)
    for _, size, _, _ in _lite(code[start : start + MAX_INSTRUCTION], 0, 1):
        if start + size >= field + 4:
            return start + size - field - 4
    raise UndecodableCode(code, 0, start)


def _instruction_at(code: bytes, offset: int) -> int:
    decoded = 0
    for start, size, _, _ in _lite(code[: offset + MAX_INSTRUCTION], 0):
        decoded = start + size
        if decoded > offset:
            return start
    raise UndecodableCode(code, 0, decoded)


# --- padding ---

_PADDING = re.compile(
    rb"(?:\xcc"  # int3
    rb"|[\x66\x2e]*"  # data16 and cs prefixes
    rb"(?:\x90|\x0f\x1f(?:\x00|\x04.|\x40.|\x44..|\x80.{4}|\x84.{5})))*",  # nop; nop r/m with rax-based operands
    re.DOTALL,
)


def padding_length(code: bytes) -> int:
    """Return how many bytes of whole padding instructions (nops of every form, int3) `code` starts with."""
    found = _PADDING.match(code)
    return found.end() if found else 0


# --- where code points ---

_BRANCHES = ("j", "call", "loop", "xbegin")
_RIP_OPERAND = re.compile(r"\[rip(?: ([+-]) (0x[0-9a-f]+|[0-9]+))?\]")


def lite_target(instruction: Lite) -> int | None:
    """Return the address a relative branch of a listing goes to, or None when it is no relative branch."""
    _, _, mnemonic, operands = instruction
    if not operands[:1].isdigit() or not mnemonic.rpartition(" ")[2].startswith(_BRANCHES):
        return None
    return int(operands, 0)


def lite_reference(instruction: Lite, address: int) -> int | None:
    """Return the address of a listed RIP-relative operand, or None; `address` is that of the listing's offset 0."""
    offset, size, _, operands = instruction
    found = _RIP_OPERAND.search(operands)
    if not found:
        return None
    distance = int(found[2] or "0", 0)
    return address + offset + size + (-distance if found[1] == "-" else distance)


_CANDIDATE = re.compile(
    rb"[\xeb\x70-\x7f\xe0-\xe3](?=(.))"  # jmp rel8, jcc rel8, loopne/loope/loop/jrcxz
    rb"|(?:[\xe8\xe9]|\x0f[\x80-\x8f]|\xc7\xf8)(?=(....))"  # call, jmp, jcc rel32, xbegin
    rb"|[\x05\x0d\x15\x1d\x25\x2d\x35\x3d](?=(....))",  # ModRM of disp32(%rip)
    re.DOTALL,
)


def references_into(code: bytes, address: int, low: int, high: int) -> tuple[tuple[Lite, int], ...]:
    """Return each instruction that branches to, or takes a RIP-relative address in, `low` <= address < `high`.

    Answers as (instruction, address it points to). Looks for bytes that could be such a field first (any
    alignment, so none is missed), and decodes only as far as the last of them; most functions have none.
    Raises UndecodableCode when that decoding fails.
    """
    last = max(_candidates(code, address, low, high), default=-1)
    found = []
    if last < 0:
        return ()
    decoded = 0
    for at, size, mnemonic, operands in _lite(code[: last + MAX_INSTRUCTION], address):
        instruction = (at - address, size, mnemonic, operands)
        decoded = at - address + size
        pointed = lite_target(instruction)
        if pointed is None:
            pointed = lite_reference(instruction, address)
        if pointed is not None and low <= pointed < high:
            found.append((instruction, pointed))
    if decoded <= last:
        raise UndecodableCode(code, address, decoded)
    return tuple(found)


def _candidates(code: bytes, address: int, low: int, high: int) -> Iterator[int]:
    for found in _CANDIDATE.finditer(code):
        value = found[1] or found[2] or found[3]
        end = address + found.end() + len(value)
        pointed = end + int.from_bytes(value, "little", signed=True)
        # An immediate after the field moves what the displacement counts from.
        if low <= pointed < high or (found[3] and any(low <= pointed + i < high for i in (1, 2, 4))):
            yield found.end()


def wide_displacements(code: bytes) -> frozenset[int]:
    """Return the displacements of four bytes that stand beside a base register (ModRM.mod = 2; RIP is none).

    An assembler takes four bytes for a number that would do with one only where a linker is to fill it in.
    Raises UndecodableCode.
    """
    found, decoded = set(), 0
    for i in _decoder(True).disasm(code, 0):
        decoded = i.address + i.size
        if i.encoding.disp_size == 4 and i.modrm >> 6 == 2:
            found.add(i.disp)
    if decoded != len(code):
        raise UndecodableCode(code, 0, decoded)
    return frozenset(found)


# --- stubs of the procedure linkage table ---

_PLT_STUB = re.compile(
    rb"(?:\xf3\x0f\x1e\xfa)?"  # endbr64
    rb"(?:\x41\xbb....)?"  # mov $index, %r11d
    rb"[\xf2\x3e]?"  # bnd or notrack
    rb"\xff\x25(....)",  # jmp *cell(%rip)
    re.DOTALL,
)


def plt_cell(code: bytes, address: int) -> int | None:
    """Return the address of the GOT cell through which the stub at `address` jumps, or None when it is no stub.

    `code` are up to 32 live bytes. Knows the `.plt`, `.plt.sec` and `.plt.got` stubs of GNU ld, gold, lld and mold.
    A function that starts with `jmp *pointer(%rip)` looks the same: ask whether the cell is a relocated GOT cell.
    The lazy half of a split PLT (`push $index; jmp PLT0`) names no cell: None.
    """
    found = _PLT_STUB.match(code)
    if not found:
        return None
    return address + found.end() + int.from_bytes(found[1], "little", signed=True)
