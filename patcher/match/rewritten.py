"""Fields and the instructions that a linker or an assembler may have written otherwise.

A GOT load made direct, a thread-local access made an offset, a branch in its short form. Pure: bytes in, answers out.
Specification: AMD64 supplement, section 11.1 and appendix B; ELF Handling For Thread-Local Storage, section 5.
"""

from __future__ import annotations

import re

from patcher.blocks import Reference
from patcher.elf.relocations import R
from patcher.link.relocations import RULES

MASK = (1 << 64) - 1
REWRITTEN = frozenset((R.GOTPCRELX, R.REX_GOTPCRELX, R.GOTTPOFF, R.GOTPCREL, R.GOTPC32_TLSDESC))
DIRECT = frozenset((R.PC32, R.PLT32))
ASKING = frozenset((R.TLSGD, R.TLSLD))
"""What starts a sequence of instructions, up to a call, that a linker may replace as a whole."""

NOP = rb"[\x66\x2e]*(?:\x90|\x0f\x1f(?:\x00|\x40\x00|\x44\x00\x00|\x80\x00{4}|\x84\x00{5}))"
"""A no-op as assemblers and linkers write it: other operand bytes would be somebody else's."""

_WIDTHS = {kind: rule.width for kind, rule in RULES.items()} | {R.DTPMOD64: 8, R.TLSDESC_CALL: 2}


def width_of(r: Reference) -> int:
    return _WIDTHS.get(r.type, 4)


def field_of(kind: int, offset: int) -> tuple[int, int]:
    """Return the bytes that are checked by meaning: for what a linker may rewrite, the opcode too."""
    return max(0, offset - opcode_bytes(kind)), offset + _WIDTHS.get(kind, 4)


def opcode_bytes(kind: int) -> int:
    """Return how many bytes before the field belong to the instruction for certain, where a linker may rewrite it."""
    if kind not in REWRITTEN:
        return 0
    return 2 if kind in (R.GOTPCRELX, R.GOTPCREL) else 3


def made_direct(ours: bytes, theirs: bytes) -> bool:
    """Tell whether `call *foo@GOTPCREL(%rip)` became `addr32 call foo`, or `mov` became `lea foo(%rip)`."""
    if len(ours) < 2 or ours[:-2] != theirs[:-2]:
        return False
    if ours[-2:] == b"\xff\x15":
        return theirs[-2:] == b"\x67\xe8"
    return ours[-2] == 0x8B and theirs[-2] == 0x8D and ours[-1] == theirs[-1]


def jump_and_nop(code: bytes, offset: int) -> bool:
    """Tell whether `jmp foo; nop` stands there, which `jmp *foo@GOTPCREL(%rip)` may have become."""
    return code[offset : offset + 1] == b"\xe9" and code[offset + 5 : offset + 6] == b"\x90"


def absolute_immediate(ours: bytes, theirs: bytes) -> bool:
    """Tell whether a GOT load became an instruction with the address as immediate (position-dependent code).

    Register numbers move from ModRM.reg to ModRM.rm and from REX.R to REX.B.
    """
    if len(ours) < 2 or len(ours) != len(theirs):
        return False
    opcode, modrm = ours[-2:]
    live_opcode, live_modrm = theirs[-2:]
    register = modrm >> 3 & 7
    if len(ours) == 3 and theirs[0] != (ours[0] & ~5 | (ours[0] >> 2 & 1)):
        return False
    if opcode == 0x8B:
        return live_opcode == 0xC7 and live_modrm == 0xC0 | register
    if opcode == 0x85:
        return live_opcode == 0xF7 and live_modrm == 0xC0 | register
    operation = opcode >> 3 & 7
    return opcode & 0xC7 == 0x03 and live_opcode == 0x81 and live_modrm == 0xC0 | operation << 3 | register


def thread_immediate(ours: bytes, theirs: bytes) -> bool:
    """Tell whether an initial-exec access became local-exec (ELF Handling For TLS, section 5, IE to LE)."""
    if len(ours) < 3 or len(theirs) < 3:
        return False
    rex, opcode, modrm = ours
    register = modrm >> 3 & 7
    moved_rex = rex & ~5 | (rex >> 2 & 1)
    if opcode == 0x8B:
        return theirs == bytes((moved_rex, 0xC7, 0xC0 | register))
    if opcode == 0x03:
        lea_rex = rex & ~5 | (5 if rex & 4 else 0)
        return theirs in (
            bytes((moved_rex, 0x81, 0xC0 | register)),
            bytes((lea_rex, 0x8D, 0x80 | register << 3 | register)),
        )
    return False


_LOAD_POINTER = rb"\x64\x48\x8b\x04\x25\x00{4}"  # mov %fs:0, %rax
_GENERAL = re.compile(
    _LOAD_POINTER + rb"\x48(?:\x8d\x80|\x81\xc0|(\x03\x05))(?s:....)"  # lea x(%rax), add $x, add cell(%rip)
    rb"(?:" + NOP + rb")*"
)
_FIELD_AFTER = 12
_LOCAL = re.compile(
    rb"(?:" + NOP + rb")*\x66{0,4}" + _LOAD_POINTER + rb"(?:" + NOP + rb")*"
    rb"|\x31\xc0\x64\x48\x8b\x00\x48\x2d((?s:....))(?:" + NOP + rb")*"  # xor; mov %fs:(%rax), %rax; sub $x, %rax
)


def general_rewritten(live: bytes) -> tuple[bool, int] | None:
    """Tell what a general-dynamic sequence became: (whether it adds a cell's contents, where its field is)."""
    found = _GENERAL.fullmatch(live)
    return None if found is None else (found[1] is not None, _FIELD_AFTER)


def local_rewritten(live: bytes) -> int | None:
    """Tell how far below the thread pointer the base is that a local-dynamic sequence became."""
    found = _LOCAL.fullmatch(live)
    return None if found is None else int.from_bytes(found[1] or b"", "little", signed=True)


def descriptor_load(ours: bytes, theirs: bytes) -> bool:
    """Tell whether `lea x@tlsdesc(%rip), %r` became `mov x@gottpoff(%rip), %r`."""
    return len(ours) == 3 and theirs == bytes((ours[0], 0x8B, ours[2]))


def descriptor_immediate(ours: bytes, theirs: bytes) -> bool:
    """Tell whether `lea x@tlsdesc(%rip), %r` became `mov $offset, %r`."""
    return len(ours) == 3 and theirs == bytes((ours[0] & ~5 | (ours[0] >> 2 & 1), 0xC7, 0xC0 | ours[2] >> 3 & 7))


Branch = tuple[bytes, str, int]


def relative_branch(raw: bytes) -> Branch | None:
    """Return a relative branch's (prefixes, operation, displacement), the same for its short and long forms."""
    found = _BRANCH.match(raw)
    if found is None:
        return None
    opcode, rest = raw[found.end()], raw[found.end() + 1 :]
    operation = _branch_operation(opcode, rest)
    if operation is None:
        return None
    width = 1 if len(rest) == 1 else 4
    return found[0], operation, int.from_bytes(rest[-width:], "little", signed=True)


_BRANCH = re.compile(rb"[\x66\x67\xf2\xf3\x2e\x3e\x48\x40]*(?=[\xe8\xe9\xeb\x70-\x7f\x0f\xe0-\xe3])")


def _branch_operation(opcode: int, rest: bytes) -> str | None:
    if opcode == 0xE8 and len(rest) == 4:
        return "call"
    if opcode in (0xE9, 0xEB) and len(rest) in (1, 4):
        return "jmp"
    if opcode & 0xF0 == 0x70 and len(rest) == 1:
        return f"j{opcode & 15:x}"
    if opcode == 0x0F and len(rest) == 5 and rest[0] & 0xF0 == 0x80:
        return f"j{rest[0] & 15:x}"
    if 0xE0 <= opcode <= 0xE3 and len(rest) == 1:
        return f"loop{opcode & 3}"
    return None
