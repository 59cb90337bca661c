"""Which fields of an object are line numbers: told by compiling the same text 100,000 lines further down.

A 32-bit field that moved by exactly that much is a `__LINE__` site; whatever else differs is not. Comparing
immediates of old and new code by their difference would be a guess.

Such a site says the same as before when the line it named is, in the new text, the line that it names now:
`__LINE__ + 100` moves with the text as well, and is no line of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher

import numpy as np

from patcher.elf import ObjectFile, Section

Fields = dict[int, frozenset[int]]
"""Section index -> offsets of the four-byte fields in it that hold line numbers."""


@dataclass(frozen=True)
class LineNumbers:
    """The line-number fields of an object, and which old line each line of its text was.

    `moves`: for each earlier text that the live code may come from, old line -> new line.
    """

    fields: Fields
    moves: tuple[dict[int, int], ...] = field(repr=False)

    def in_section(self, index: int) -> frozenset[int]:
        return self.fields.get(index, frozenset())

    def says_the_same(self, old: bytes, new: bytes) -> bool:
        """Tell whether a field that held `old` names the same line of the text with `new`."""
        before, after = int.from_bytes(old, "little"), int.from_bytes(new, "little")
        return any(move.get(before) == after for move in self.moves)


NONE = LineNumbers({}, ())


def moved_lines(old: bytes, new: bytes) -> dict[int, int]:
    """Return, for every line of `old` that `new` has as well, its number there. Lines count from 1."""
    before, after = old.split(b"\n"), new.split(b"\n")
    same = min(len(before), len(after))
    head = next((i for i in range(same) if before[i] != after[i]), same)
    rest = same - head
    tail = next((i for i in range(rest) if before[-1 - i] != after[-1 - i]), rest)
    moves = {i + 1: i + 1 for i in range(head)}
    moves |= {len(before) - i: len(after) - i for i in range(tail)}
    middle = SequenceMatcher(None, before[head : len(before) - tail], after[head : len(after) - tail], autojunk=False)
    for block in middle.get_matching_blocks():
        moves |= {head + block.a + i + 1: head + block.b + i + 1 for i in range(block.size)}
    return moves


def moves_of_lines(new: bytes, old: Sequence[bytes]) -> tuple[dict[int, int], ...]:
    """Return how lines moved from each of some earlier texts to `new`."""
    return tuple(moved_lines(text, new) for text in dict.fromkeys(old))


def line_fields(plain: ObjectFile, shifted: ObjectFile, shift: int) -> Fields:
    """Return the line-number fields of `plain`, given the same unit compiled `shift` lines further down."""
    found: Fields = {}
    for index, section in plain.sections.items():
        other = shifted.sections.get(index)
        if other is not None and other.name == section.name and len(other.data) == len(section.data):
            fields = _moved(section, other, shift)
            if fields:
                found[index] = frozenset(fields)
    return found


def _moved(section: Section, other: Section, shift: int) -> list[int]:
    ours = np.frombuffer(section.data, np.uint8)
    theirs = np.frombuffer(other.data, np.uint8)
    fields: list[int] = []
    beyond = 0
    for position in np.flatnonzero(ours != theirs).tolist():
        if position < beyond:
            continue
        # 100,000 changes the lowest byte of every number it is added to, so a field starts at its first difference.
        before = int.from_bytes(section.data[position : position + 4], "little")
        after = int.from_bytes(other.data[position : position + 4], "little")
        if after - before == shift:
            fields.append(position)
            beyond = position + 4
    return fields
