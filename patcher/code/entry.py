"""The five-byte jump at a function's entry, and the copy of what it overwrites.

Decides whether an entry can take the jump (`plan_entry`), and writes the bytes: the detour, the displaced
instructions relocated to another address, islands and far jumps. Does not decide where these lie or when they
are written, and sees no thread: a program counter or return address inside the overwritten bytes is the
caller's to check against `Displaced.boundaries`.

A displaced call is emulated (the original return address is pushed), so that no return address ever lies in
the copy, which no unwind information describes, and the frame finishes in the original code.

What these bytes cannot tell, the caller must (`entered`): a jump table, a landing pad, or another function that
jumps past the entry. Compilers emit the last only between a function and its `.cold`; hand-written assembly does
it freely (glibc's mempcpy goes to memmove+3).

Specification: Intel SDM volume 2 (JMP, CALL, Jcc, LOOP, PUSH); 2.2.1.6 (RIP-relative addressing).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from patcher.code.border import DETOUR_SIZE, PAGE, SHORT_JUMP_SIZE, Crossing, crossing, is_across
from patcher.code.instructions import (
    Instruction,
    Kind,
    Lite,
    UndecodableCode,
    decode_start,
    lite_target,
    padding_length,
    references_into,
)
from patcher.errors import PatcherError, RelocationOverflow

ISLAND_SIZE = 16
FAR_JUMP_SIZE = 8
SWITCH_SIZE = 64
SWITCH_CELLS = 48
COPY_SIZE = 96
"""No displaced copy is longer (the worst case is three far conditional branches and the far jump back)."""

_TRAP = b"\xcc"  # int3
_SHORT_JUMP = 0xEB  # jmp rel8
_SHORT_LOOPS = range(0xE0, 0xE4)  # loopne, loope, loop, jrcxz: they have no long form


class NotDetourable(PatcherError):
    """A function whose entry cannot take the five-byte jump."""

    code = "entry"

    def __init__(self, name: str, address: int, found: str) -> None:
        super().__init__(
            f"the entry of {name} at {address:#x} cannot take a {DETOUR_SIZE}-byte jump: {found}",
            f"redirect the callers of {name} (GOT cells, call sites) instead, or restart the program",
        )


@dataclass(frozen=True, slots=True)
class Displaced:
    """The first instructions of a function, to be run out of line.

    `length`: bytes of the function that count as displaced, at least 5; control goes back to `address + length`.
    `copied`: bytes of instructions among them; less than `length` only where padding follows a short function.
    `boundaries`: offsets below `length` at which a displaced instruction starts.
    `reentries`: offsets of jumps elsewhere in the function (or its siblings, relative to the entry) that go back to
    its first instruction. When the slot changes, a thread running the old body goes through them to the new one,
    in the middle of a loop: such a function may be switched only while no thread is inside it.
    """

    name: str
    length: int
    copied: int
    boundaries: frozenset[int]
    reentries: tuple[int, ...] = ()


def plan_entry(
    name: str,
    code: bytes,
    address: int,
    size: int,
    following: bytes,
    siblings: Sequence[tuple[int, bytes]] = (),
    *,
    entered: Collection[int] = (),
    table: int | None = None,
) -> Displaced:
    """Plan the displacement of the first instructions of function `name`, `size` bytes of live `code` at `address`.

    `following`: the bytes after it, up to the next function. `siblings`: (address, bytes) of the pieces that belong
    to it, like `.cold`. `entered`: further offsets at which control may enter (jump tables, landing pads, jumps from
    other functions). `table`: the address of the module's global offset table.
    Raises NotDetourable, saying what was found.
    """
    body = code[:size]
    try:
        instructions, across = _displaced(name, body, address)
    except UndecodableCode as error:
        raise NotDetourable(name, address, error.message) from error
    copied = instructions[-1].end if instructions else 0
    length = max(copied, DETOUR_SIZE)
    boundaries = frozenset(i.offset for i in instructions)
    moved = [i for i in instructions if not _computes_table(i, body, table)]
    found = (
        (_short(instructions, size, following) if across is None else _ends_before(across.end, copied))
        or _entered_inside(entered, length)
        or next(filter(None, (_unmovable(i, address, boundaries, length, across) for i in moved)), None)
    )
    if found:
        raise NotDetourable(name, address, found)
    reentries = _reentries(name, address, length, ((address + copied, body[copied:]), *siblings))
    return Displaced(name, length, copied, boundaries, reentries)


def _displaced(name: str, body: bytes, address: int) -> tuple[list[Instruction], Crossing | None]:
    """Return the first instructions, as many as a detour takes, and where it stands if a page ends inside of it."""
    instructions = decode_start(body, address, DETOUR_SIZE)
    if not is_across(address):
        return instructions, None
    across = crossing(address, instructions)
    if across is None:
        found = "a page ends inside of it, and there is no way to change it in steps that are each whole"
        raise NotDetourable(name, address, found)
    return decode_start(body, address, across.end), across


def _ends_before(needed: int, copied: int) -> str | None:
    if copied >= needed:
        return None
    return f"a page ends inside of it, so that it takes {needed} bytes, and the function has {copied}"


def behind_function(following: bytes, end: int) -> bytes:
    """Return what follows a function up to `end`, where the next begins, as `plan_entry` is to be given it.

    Zeros up to the next aligned function are padding too (mold fills gaps so).
    """
    gap = end % 16 == 0 and len(following) < 16 and not any(following)
    return b"\x90" * len(following) if gap else following


def _short(instructions: Sequence[Instruction], size: int, following: bytes) -> str | None:
    if not instructions:
        return "it has no instructions"
    missing = DETOUR_SIZE - instructions[-1].end
    if missing <= 0:
        return None
    if instructions[-1].falls_through:
        return f"it has {size} bytes and goes on into what follows it"
    if padding_length(following) < missing:
        return f"it has {size} bytes, followed by {following[:missing].hex(' ') or 'nothing'}, which is not padding"
    return None


def _entered_inside(entered: Collection[int], length: int) -> str | None:
    inside = [offset for offset in entered if 0 < offset < length]
    return (
        f"control may enter at offset {min(inside)} from elsewhere (jump table, landing pad, other function)"
        if inside
        else None
    )


def _unmovable(
    i: Instruction, address: int, boundaries: frozenset[int], length: int, across: Crossing | None
) -> str | None:
    """Say why a displaced instruction cannot run elsewhere, or None."""
    text = f"{i.mnemonic} {i.operands}".rstrip() + f" at offset {i.offset}"
    if i.kind is Kind.CALL and i.end < length and (across is None or i.end != across.back):
        return f"{text} returns into the overwritten bytes, at offset {i.end}"
    if i.mnemonic in ("xbegin", "lcall") or "[eip" in i.operands or _is_word_branch(i):
        return f"{text} cannot be moved"
    if i.target is not None and 0 <= i.target - address < length and i.target - address not in boundaries:
        return f"{text} branches into an instruction"
    if i.reference is not None and 0 < i.reference - address < length:
        return f"{text} refers to the overwritten bytes"
    return None


def _computes_table(i: Instruction, body: bytes, table: int | None) -> bool:
    """Tell whether an instruction takes its own address only to count from there to the global offset table.

    lea label(%rip), %reg; movabs $table-label, %other: so begin functions of the large position-independent model.
    """
    behind = body[i.end : i.end + 10]
    if table is None or i.reference is None or i.mnemonic != "lea" or len(behind) < 10:
        return False
    is_constant = behind[0] & 0xFE == 0x48 and behind[1] & 0xF8 == 0xB8
    return is_constant and i.reference + int.from_bytes(behind[2:], "little", signed=True) == table


def _is_word_branch(i: Instruction) -> bool:
    # With an operand-size prefix and no REX.W, Intel takes 32 bits of displacement and AMD 16 (SDM, JMP; APM, JMP).
    opcode = next(n for n, byte in enumerate(i.raw) if byte not in _PREFIXES)
    has_wide_rex = 0x48 <= i.raw[opcode] <= 0x4F
    return i.kind in _TRANSFERS and 0x66 in i.raw[:opcode] and not has_wide_rex


_PREFIXES = b"\x66\x67\xf2\xf3\xf0\x2e\x36\x3e\x26\x64\x65"
_TRANSFERS = (Kind.CALL, Kind.JUMP, Kind.CONDITIONAL_JUMP)


def _reentries(name: str, entry: int, length: int, pieces: Iterable[tuple[int, bytes]]) -> tuple[int, ...]:
    """Return the offsets of jumps back to the entry; raise for what points between it and the end of the displaced."""
    back = []
    for address, code in pieces:
        try:
            references = references_into(code, address, entry, entry + length)
        except UndecodableCode as error:
            raise NotDetourable(name, entry, f"no telling whether it branches there: {error.message}") from error
        for instruction, pointed in references:
            offset = address + instruction[0] - entry
            if pointed != entry:
                verb = "refers" if lite_target(instruction) is None else "branches"
                raise NotDetourable(name, entry, f"{_text(instruction)} at offset {offset} {verb} into these bytes")
            if lite_target(instruction) is not None and "call" not in instruction[2]:
                back.append(offset)
    return tuple(back)


def _text(instruction: Lite) -> str:
    return f"{instruction[2]} {instruction[3]}"


# --- the copy ---


def displaced_copy(plan: Displaced, code: bytes, address: int, copy_address: int) -> bytes:
    """Return the displaced instructions of `code` (at `address`) as they must read at `copy_address`.

    At most COPY_SIZE bytes. They end with a jump back to `address + plan.length` unless control cannot get there.
    Flags and registers are those of the original at every step; only a call writes the stack, as it did.
    Raises NotDetourable when a RIP-relative operand does not reach from there.
    """
    copy = _copy(plan, code, address, copy_address).finished()
    if len(copy) > COPY_SIZE:
        found = f"its {plan.length} bytes take {len(copy)} elsewhere, and there is room for {COPY_SIZE}"
        raise NotDetourable(plan.name, address, found)
    return copy


def _copy(plan: Displaced, code: bytes, address: int, copy_address: int) -> _Copy:
    copy = _Copy(plan, address, copy_address)
    instructions = decode_start(code[: plan.copied], address, plan.copied)
    for instruction in instructions:
        copy.add(instruction)
    # The callee of an emulated call returns to the original code.
    if instructions[-1].falls_through and instructions[-1].kind is not Kind.CALL:
        copy.transfer(address + plan.length)
    return copy


class _Copy:
    """Displaced instructions while they are being laid out at another address."""

    def __init__(self, plan: Displaced, address: int, copy_address: int) -> None:
        self.plan = plan
        self.address = address
        self.copy_address = copy_address
        self.code = bytearray()
        self.positions: dict[int, int] = {}
        self.internal: list[tuple[int, int]] = []  # (offset of a rel32 in the copy, displaced offset it goes to)

    def finished(self) -> bytes:
        for field, offset in self.internal:
            distance = self.positions[offset] - (field + 4)
            self.code[field : field + 4] = distance.to_bytes(4, "little", signed=True)
        return bytes(self.code)

    def add(self, i: Instruction) -> None:
        self.positions[i.offset] = len(self.code)
        if i.kind is Kind.CALL:
            self._call(i)
        elif i.target is None:
            self._move(i, i.raw)
        elif i.kind is Kind.JUMP:
            self.transfer(i.target)
        elif i.raw[-2] in _SHORT_LOOPS and i.width == 1:
            self._loop(i, i.target)
        else:
            self._conditional(i, i.target)

    def transfer(self, target: int) -> None:
        """Jump to an address of the original program, or to its copy if it is displaced."""
        if self._is_displaced(target):
            self.code += b"\xe9" + self._internal(1, target)  # jmp rel32
        elif (distance := self._distance(target, 5)) is not None:
            self.code += b"\xe9" + distance  # jmp rel32
        else:
            self.code += b"\xff\x25\0\0\0\0" + target.to_bytes(8, "little")  # jmp *0(%rip); .quad target

    def _conditional(self, i: Instruction, target: int) -> None:
        condition = i.raw[-1 - i.width] & 0xF
        if self._is_displaced(target):
            self.code += bytes((0x0F, 0x80 | condition)) + self._internal(2, target)  # jcc rel32
        elif (distance := self._distance(target, 6)) is not None:
            self.code += bytes((0x0F, 0x80 | condition)) + distance  # jcc rel32
        else:
            self.code += bytes((0x70 | condition ^ 1, 0))  # jncc over the jump
            self._skipped_transfer(target)

    def _loop(self, i: Instruction, target: int) -> None:
        self.code += i.raw[:-1] + b"\x02"  # loop/jrcxz over the next, with its address-size prefix
        self.code += b"\xeb\x00"  # jmp over the jump
        self._skipped_transfer(target)

    def _skipped_transfer(self, target: int) -> None:
        skip = len(self.code)
        self.transfer(target)
        self.code[skip - 1] = len(self.code) - skip

    def _call(self, i: Instruction) -> None:
        back = self.address + i.end
        if i.target is not None:
            self._push(back)
            self.transfer(i.target)
        elif _uses_stack_pointer(i):
            # push evaluates its operand before it moves rsp (SDM, PUSH); then the target is on top of the new frame.
            self._move(i, _with_extension(i, 6))  # push operand
            self.code += b"\xff\x34\x24"  # push (%rsp)
            self.code += b"\xc7\x44\x24\x08" + _low(back)  # movl $low, 8(%rsp)
            self.code += b"\xc7\x44\x24\x0c" + _high(back)  # movl $high, 12(%rsp)
            self.code += b"\xc3"  # ret, to the target
        else:
            self._push(back)
            self._move(i, _with_extension(i, 4))  # jmp operand

    def _push(self, value: int) -> None:
        self.code += b"\x68" + _low(value)  # push $low, sign-extended to 64 bits
        self.code += b"\xc7\x44\x24\x04" + _high(value)  # movl $high, 4(%rsp); no flags, no register

    def _move(self, i: Instruction, raw: bytes) -> None:
        """Put the instruction's bytes, its RIP-relative operand meaning what it meant."""
        if i.reference is not None:
            distance = self._distance(i.reference, i.size)
            if distance is None:
                raise NotDetourable(
                    self.plan.name,
                    self.address,
                    f"{i.mnemonic} {i.operands} refers to {i.reference:#x}, out of reach of its copy at "
                    f"{self.copy_address + len(self.code):#x}",
                )
            raw = raw[: i.field] + distance + raw[i.field + 4 :]
        self.code += raw

    def _distance(self, target: int, size: int) -> bytes | None:
        distance = target - (self.copy_address + len(self.code) + size)
        return distance.to_bytes(4, "little", signed=True) if -(1 << 31) <= distance < 1 << 31 else None

    def _is_displaced(self, target: int) -> bool:
        return target - self.address in self.plan.boundaries

    def _internal(self, opcode_size: int, target: int) -> bytes:
        self.internal.append((len(self.code) + opcode_size, target - self.address))
        return bytes(4)


def _with_extension(i: Instruction, extension: int) -> bytes:
    """Return an `ff` group 5 instruction with another operation: /2 call, /4 jmp, /6 push (SDM table A-6)."""
    modrm = i.raw.index(0xFF) + 1  # no legacy or REX prefix is ff
    return i.raw[:modrm] + bytes((i.raw[modrm] & 0xC7 | extension << 3,)) + i.raw[modrm + 1 :]


def _uses_stack_pointer(i: Instruction) -> bool:
    return "rsp" in i.operands or "esp" in i.operands


def _low(value: int) -> bytes:
    return (value & 0xFFFFFFFF).to_bytes(4, "little")


def _high(value: int) -> bytes:
    return (value >> 32).to_bytes(4, "little")


# --- jumps ---


def _rel32(what: str, address: int, end: int, target: int) -> bytes:
    distance = target - end
    if not -(1 << 31) <= distance < 1 << 31:
        missed = max(-(1 << 31) - distance, distance - (1 << 31) + 1)
        raise RelocationOverflow(
            f"{what} at {address:#x} cannot reach {target:#x}: {missed:#x} bytes beyond 2 GiB",
            "place it nearer to what it points to",
        )
    return distance.to_bytes(4, "little", signed=True)


def detour(address: int, target: int) -> bytes:
    """Return `jmp target` as it reads at `address`: 5 bytes. Raises RelocationOverflow beyond 2 GiB."""
    return b"\xe9" + _rel32("a jump", address, address + 5, target)  # jmp rel32


@dataclass(frozen=True, slots=True)
class DetourPart:
    """Bytes of a detour that are written at once; `offset` from the entry.

    No thread may stand in them but at the first byte; nor there and in so many bytes `ahead` of it, if that is not -1.
    """

    offset: int
    code: bytes
    ahead: int = -1


def detour_parts(address: int, entry: bytes, copy_address: int, target: int) -> tuple[DetourPart, ...]:
    """Return what makes a detour to `target`, in the order in which it is written: each part leaves the entry whole.

    `entry` is what is displaced, to `copy_address`. One part, unless a page ends inside of the detour.
    """
    across = crossing(address, decode_start(entry, address, DETOUR_SIZE)) if is_across(address) else None
    if across is None or across.end > len(entry):  # in the records of older versions
        return (DetourPart(0, detour(address, target)),)
    instructions = decode_start(entry, address, len(entry))
    plan = Displaced("", len(entry), len(entry), frozenset(i.offset for i in instructions))
    place = copy_address + _copy(plan, entry, address, copy_address).positions[across.back]
    behind = address + across.back + len(across.lead)
    landing = address + across.landing
    distance = across.landing - SHORT_JUMP_SIZE
    head = bytes((_SHORT_JUMP, distance))[: -address % PAGE]  # jmp rel8
    return (
        DetourPart(across.back, across.lead + detour(behind, place)),
        # A thread between the two would go on into the landing.
        DetourPart(across.landing, detour(landing, target), landing - behind - DETOUR_SIZE),
        DetourPart(0, head),
    )


def far_jump(address: int, cell: int) -> bytes:
    """Return `jmp *cell(%rip)` as it reads at `address`: FAR_JUMP_SIZE bytes. Raises RelocationOverflow."""
    jump = b"\xff\x25" + _rel32("an indirect jump", address, address + 6, cell)  # jmp *rel32(%rip)
    return jump.ljust(FAR_JUMP_SIZE, _TRAP)


def island(address: int, slot: int) -> bytes:
    """Return the island at `address` that jumps through `slot`: ISLAND_SIZE bytes. Raises RelocationOverflow."""
    return far_jump(address, slot).ljust(ISLAND_SIZE, _TRAP)


def switch(address: int, live: int, coming: int, old: int, new: int) -> bytes:
    """Return the code at `address` that goes on to `new` if the words at `live` and `coming` are equal, else to `old`.

    SWITCH_SIZE bytes, with `old` and `new` as the words at SWITCH_CELLS. No register and no flag changes. Raises
    RelocationOverflow when `coming` is out of reach; `live` may be anywhere.
    """
    code = b"\x50"  # push %rax: room for the address to go on to
    code += b"\x9c"  # pushfq
    code += b"\x50"  # push %rax
    code += b"\x48\xa1" + live.to_bytes(8, "little")  # movabs live, %rax
    compared = address + len(code) + 7
    code += b"\x48\x3b\x05" + _rel32("switch", address, compared, coming)  # cmp coming(%rip), %rax
    code += b"\x48\x8b\x05" + (SWITCH_CELLS - len(code) - 7).to_bytes(4, "little")  # mov old(%rip), %rax
    code += b"\x48\x0f\x44\x05" + (SWITCH_CELLS - len(code)).to_bytes(4, "little")  # cmove new(%rip), %rax
    code += b"\x48\x89\x44\x24\x10"  # mov %rax, 16(%rsp)
    code += b"\x58\x9d\xc3"  # pop %rax; popfq; ret
    return code.ljust(SWITCH_CELLS, _TRAP) + old.to_bytes(8, "little") + new.to_bytes(8, "little")
