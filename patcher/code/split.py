"""The references between functions of one section that the assembler resolved, and how to loosen them.

Objects compiled without -ffunction-sections have all functions in one `.text`; what refers to a local symbol of
the same section has no relocation. To move one function alone, these references must become relocations again.
Decides where they are and what they mean as offsets; does not decide which symbol lies there.

A branch of two bytes cannot reach a function that was moved away. It is bound to a five-byte jump that moves with
its function, directly before or after it: the branch went in that direction at least as far, so it reaches.

    prefix jumps | function | suffix jumps          one block, placed as a whole

Specification: psABI x86-64 4.4 (relocation); Intel SDM volume 2 (Jcc, JMP, LOOP).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

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
    section: bytes, functions: Iterable[tuple[int, int]], relocated: Collection[int]
) -> tuple[HiddenReference, ...]:
    """Find every relative branch and RIP-relative operand that leaves its function without a relocation.

    `functions`: (offset, size) in `section`; `relocated`: offsets of fields that have relocations. The target lies
    inside the section, or at its end. Raises UndecodableCode (its `offset` counts from the start of the section).
    """
    fields = sorted(relocated)
    found = []
    for offset, size in sorted(set(functions)):
        for instruction in _listing(section, offset, size):
            reference = _outward(section, offset, size, instruction, fields)
            if reference and 0 <= reference.target <= len(section):
                found.append(reference)
    return tuple(found)


def _listing(section: bytes, offset: int, size: int) -> list[Lite]:
    try:
        return decode_lite(section[offset : offset + size], _BASE + offset)
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
