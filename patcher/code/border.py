"""A detour whose entry lies across the border of two pages.

The kernel writes page by page, and whoever writes may be killed in between: five bytes across a border may stay half
written. So such an entry becomes a jump by three writes, none across a border, and may be left after any of them:

    back      at the first instruction that begins behind the border: a jump to its place in the displaced copy; what
              stands before it runs where it is, and the rest of the entry in the copy
    landing   further on, where nobody comes any more: a jump to where the detour leads
    head      at the entry: a jump of two bytes to the landing. If only one byte lies before the border, it becomes the
              opcode, and the byte behind it, which stays what it is, the distance

Taking it away goes the other way round. Decides where these stand. Specification: Intel SDM volume 2 (JMP, NOP).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from patcher.code.instructions import Instruction

PAGE = 4096
DETOUR_SIZE = 5
SHORT_JUMP_SIZE = 2
FURTHEST = 40
"""No landing lies further on: a longer entry has a branch or a call that cannot be displaced."""

_NOP = b"\x0f\x1f\x00"  # nopl (%rax); its first byte is the distance from the head to the landing too


@dataclass(frozen=True, slots=True)
class Crossing:
    """Offsets from the entry. `lead` is an instruction without effect that stands before the jump back."""

    back: int
    landing: int
    lead: bytes = b""

    @property
    def end(self) -> int:
        """The offset behind all that is written."""
        return self.landing + DETOUR_SIZE


def is_across(address: int) -> bool:
    """Tell whether five bytes at an address lie on two pages."""
    return address % PAGE > PAGE - DETOUR_SIZE


def crossing(address: int, instructions: Sequence[Instruction]) -> Crossing | None:
    """Return where the parts of a detour across a border stand, or None when it cannot be made there.

    `instructions` are the first of the function, up to behind the border at least.
    """
    before = -address % PAGE
    back = next((i.end for i in instructions if i.end >= before), 0)
    if not back:
        return None
    if before >= SHORT_JUMP_SIZE:
        return Crossing(back, back + DETOUR_SIZE)
    if back == before:
        return Crossing(back, SHORT_JUMP_SIZE + _NOP[0], _NOP)
    distance = b"".join(i.raw for i in instructions)[before]
    landing = SHORT_JUMP_SIZE + distance
    return Crossing(back, landing) if back + DETOUR_SIZE <= landing <= FURTHEST else None


def led_to(head: int, code: bytes) -> int:
    """Return where a jump of two bytes, which stands at `head`, leads; 0 when `code` is none."""
    return head + SHORT_JUMP_SIZE + code[1] if code[:1] == b"\xeb" and len(code) > 1 and code[1] < 1 << 7 else 0
