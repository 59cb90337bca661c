"""The references between functions of one section that the assembler resolved, and how to loosen them.

Objects compiled without -ffunction-sections have all functions in one `.text`; what refers to a local symbol of
the same section has no relocation. To move one function alone, these references must become relocations again.
Decides where they are and what they mean as offsets; does not decide which symbol lies there.

A branch of two bytes cannot reach a function that was moved away. It is bound to a five-byte jump that moves with
its function, directly before or after it: the branch went in that direction at least as far, so it reaches.

    prefix jumps | function | suffix jumps          one block, placed as a whole

Decoding is what this costs, and few functions have such a reference: `suspects` looks at all places where the bytes
of one could be, and so tells which functions need not be decoded.

Specification: psABI x86-64 4.4 (relocation); Intel SDM volume 2 (Jcc, JMP, LOOP; table 2-7, RIP-relative operands).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from patcher.code.instructions import (
    Lite,
    UndecodableCode,
    branch_width,
    decode,
    decode_lite,
    lite_reference,
    lite_target,
)
from patcher.errors import RelocationOverflow

STUB_SIZE = 5
"""Bytes of one `jmp rel32` before or after a function."""

_BASE = 1 << 40
"""Where sections are decoded as if they lay there: no target wraps around zero."""


@dataclass(frozen=True, slots=True)
class HiddenReference:
    """A relative field without a relocation that points out of its function.

    `field` and `target` are offsets in the section; `width` is 1 (a short branch) or 4 bytes; `end` counts the bytes
    of the instruction after the field. As a PC-relative relocation: symbol of `target`, addend `-(width + end)`.
    """

    field: int
    width: int
    target: int
    end: int
    is_branch: bool


@dataclass(frozen=True, slots=True)
class Stubs:
    """The jumps that let the short branches of one function reach.

    `prefix` and `suffix`: targets (offsets in the section) of the `jmp rel32` before and after the function, in the
    order in which they lie. `displacements`: (field offset in the section, signed byte to write there).
    """

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    displacements: tuple[tuple[int, int], ...]


def hidden_references(
    section: bytes, functions: Iterable[tuple[int, int]], relocated: Collection[int], until: int | None = None
) -> tuple[HiddenReference, ...]:
    """Find every relative branch and RIP-relative operand that leaves its function without a relocation.

    `functions`: (offset, size) in `section`; `relocated`: offsets of fields that have relocations; `until`: where in
    the section the last such field may start, when that is known (`suspects`): what follows it is not decoded. The
    target lies inside the section, or at its end. Raises UndecodableCode (its `offset` counts from the start of the
    section).
    """
    fields = sorted(relocated)
    found = []
    for offset, size in sorted(set(functions)):
        for instruction in _listing(section, offset, size, until):
            operands = instruction[3]
            if not operands[:1].isdigit() and "[rip" not in operands:
                continue  # nearly all: neither a branch to a number nor RIP-relative
            reference = _outward(section, offset, size, instruction, fields)
            if reference and 0 <= reference.target <= len(section):
                found.append(reference)
    return tuple(found)


Column = npt.NDArray[np.int64]

_NONE, _SHORT, _NEAR, _OPERAND, _AFTER_0F, _AFTER_C7 = range(6)


def _classes() -> npt.NDArray[np.uint8]:
    """Return what each byte may be, directly before a relative field."""
    classes = np.full(256, _NONE, np.uint8)
    classes[[*range(0x70, 0x80), *range(0xE0, 0xE4), 0xEB]] = _SHORT  # jcc, loopne/loope/loop/jrcxz, jmp rel8
    classes[[0xE8, 0xE9]] = _NEAR  # call, jmp rel32
    classes[0x05:0x40:8] = _OPERAND  # ModRM of disp32(%rip)
    classes[0x80:0x90] = _AFTER_0F  # jcc rel32
    classes[0xF8] = _AFTER_C7  # xbegin rel32
    return classes


_CLASSES = _classes()


def suspects(section: bytes, functions: Sequence[tuple[int, int]], relocated: Column) -> dict[int, int]:
    """Return which functions may have hidden references, and where the last may have its field; misses none.

    Both are offsets in the section. `functions`: (offset, size), by rising offset and without overlap; `relocated`:
    offsets of fields that have relocations, rising. Whatever its alignment, each byte that could end the opcode or
    ModRM before a relative field is taken for one; a function without such a field that leaves it needs no decoding.
    """
    low, high = functions[0][0], min(functions[-1][0] + functions[-1][1], len(section))
    if low >= high:  # a damaged object's code that takes no room in its file
        return {}
    starts, sizes = np.array(functions, np.int64).T
    fields, classes = _possible_fields(np.frombuffer(section, np.uint8, high - low, low))
    fields += low
    owner = np.searchsorted(starts, fields - 1, "right") - 1
    start, end = starts[owner], starts[owner] + sizes[owner]
    width = np.where(classes == _SHORT, 1, 4)
    target = fields + width + _values(section, fields, width)
    # An immediate of up to four bytes may stand between the displacement and the end of the instruction.
    slack = np.where(classes == _OPERAND, 4, 0)
    leaves = ((target < start) | (target + slack >= end)) & (target + slack >= 0) & (target <= len(section))
    leaves &= fields + width <= end
    leaves[leaves] = ~_among(fields[leaves], relocated)
    return dict(zip(start[leaves].tolist(), fields[leaves].tolist(), strict=True))  # of several, the last


def _among(offsets: Column, known: Column) -> npt.NDArray[np.bool_]:
    """Tell which offsets are among some known ones, which are rising."""
    place = np.searchsorted(known, offsets)
    found: npt.NDArray[np.bool_] = np.append(known, -1)[place] == offsets
    return found


def _possible_fields(code: npt.NDArray[np.uint8]) -> tuple[Column, npt.NDArray[np.uint8]]:
    """Return where a relative field may start, and the class of the byte before it."""
    classes = _CLASSES[code]
    at = np.flatnonzero(classes)
    classes, before = classes[at], code[at - 1]
    after = {_AFTER_0F: 0x0F, _AFTER_C7: 0xC7}
    for kind, prefix in after.items():
        kept = (classes != kind) | (before == prefix)
        at, classes, before = at[kept], classes[kept], before[kept]
    return at.astype(np.int64) + 1, classes


def _values(section: bytes, fields: Column, width: Column) -> Column:
    """Return the signed numbers of one or four bytes at some offsets, which may reach beyond the end."""
    value = np.zeros(len(fields), np.int64)
    contents = np.frombuffer(section, np.uint8)
    for i in range(4):
        byte = contents[np.minimum(fields + i, len(section) - 1)].astype(np.int64)
        value |= np.where(i < width, byte << 8 * i, 0)
    sign = np.int64(1) << (8 * width - 1)
    return (value ^ sign) - sign


def _listing(section: bytes, offset: int, size: int, until: int | None) -> list[Lite]:
    length = None if until is None else until + 1 - offset
    try:
        return decode_lite(section[offset : offset + size], _BASE + offset, length)
    except UndecodableCode as error:
        raise UndecodableCode(section, 0, offset + error.offset) from None


def _outward(
    section: bytes, offset: int, size: int, instruction: Lite, relocated: Sequence[int]
) -> HiddenReference | None:
    """Return the reference of an instruction at an offset of the function, when it leaves it and has no relocation."""
    target = lite_target(instruction)
    is_branch = target is not None
    if target is None:
        target = lite_reference(instruction, _BASE + offset)
    if target is None or offset <= target - _BASE < offset + size:
        return None
    start, end = offset + instruction[0], offset + instruction[0] + instruction[1]
    width = branch_width(end - start) if is_branch else 4
    inside = relocated[bisect_left(relocated, start) : bisect_left(relocated, end)]
    field = end - width if is_branch else _operand_field(section, start, end, inside)
    if field in inside:
        return None
    return HiddenReference(field, width, target - _BASE, end - field - width, is_branch)


def _operand_field(section: bytes, start: int, end: int, relocated: Sequence[int]) -> int:
    """Return where the RIP-relative displacement is, without decoding where a relocation gives it away.

    An immediate ends its instruction, and beside a four-byte one there is no room for the displacement below ten
    bytes (opcode, ModRM, displacement, immediate).
    """
    if len(relocated) == 1 and (relocated[0] + 4 < end or end - start < 10):
        return relocated[0]
    return start + decode(section[start:end], 0)[0].field


def short_branch_stubs(function: tuple[int, int], references: Iterable[HiddenReference]) -> Stubs:
    """Return the jumps to place around `function` (offset, size), so that its short branches reach what they reached.

    `references`: all of the section or of this function; only one-byte branches inside it count. One jump serves all
    branches to the same target on the same side. Raises RelocationOverflow when too many crowd one side.
    """
    offset, size = function
    inside = [r for r in references if r.width == 1 and offset <= r.field < offset + size]
    after = _by_urgency([r for r in inside if r.target > r.field], nearest_first=True)
    before = _by_urgency([r for r in inside if r.target <= r.field], nearest_first=False)
    positions = {(target, True): offset + size + n * STUB_SIZE for n, target in enumerate(after)}
    positions |= {(target, False): offset - (n + 1) * STUB_SIZE for n, target in enumerate(before)}
    displacements = tuple((r.field, _short(r, positions[r.target, r.target > r.field])) for r in inside)
    return Stubs(tuple(reversed(before)), tuple(after), displacements)


def _by_urgency(references: list[HiddenReference], *, nearest_first: bool) -> list[int]:
    """Order targets by urgency: the branch farthest from that end of the function needs the nearest jump."""
    urgency: dict[int, int] = {}
    for r in references:
        here = r.field if nearest_first else -r.field
        urgency[r.target] = min(urgency.get(r.target, here), here)
    return sorted(urgency, key=lambda target: urgency[target])


def _short(reference: HiddenReference, stub: int) -> int:
    displacement = stub - (reference.field + 1)
    if not -128 <= displacement <= 127:
        raise RelocationOverflow(
            f"the short branch with its field at section offset {reference.field:#x} misses its jump "
            f"by {max(-128 - displacement, displacement - 127)} bytes",
            "compile the unit with -ffunction-sections",
        )
    return displacement
