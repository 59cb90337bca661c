"""Live matching: proving that a function of an object is what runs in the process, or finding where it differs.

Object code and live code are walked side by side. Bytes that encode no reference must be equal; every
reference is checked by what it means, never by its number: functions, variables and imports by symbol,
strings, constants and jump tables by contents. (Known from Ksplice as run-pre matching.)

Two walks give the same verdict. The first compares whole bodies with the reference fields masked, and
settles nearly every unchanged function. Where lengths or bytes differ, the second goes instruction by
instruction, since an assembler may have made a tail call within a section a short jump, a linker may have
rewritten a GOT load, and padding differs; it keeps a map of object offsets to live offsets.

What matches also tells where the unit's renumbered and ambiguous variables are: each matched reference
binds its block to a live address (`Delta.bindings`).

Decides same or changed, and why. What to do about it is `link`'s and `session`'s business.
"""

from patcher.match.matcher import Matcher, match, past_lines
from patcher.match.threads import MODULE_BASE
from patcher.match.verdict import (
    Cause,
    Delta,
    FunctionMatch,
    Status,
    fingerprint,
    is_cold_piece,
    is_private_piece,
    parent_of,
)

__all__ = [
    "MODULE_BASE",
    "Cause",
    "Delta",
    "FunctionMatch",
    "Matcher",
    "Status",
    "fingerprint",
    "is_cold_piece",
    "is_private_piece",
    "match",
    "parent_of",
    "past_lines",
]
