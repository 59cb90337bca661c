"""Which fields of an object are line numbers: told by compiling the same text 100,000 lines further down.

A 32-bit field that moved by exactly that much is a `__LINE__` site; whatever else differs is not. Comparing
immediates of old and new code by their difference would be a guess.
"""

from __future__ import annotations

import numpy as np

from patcher.elf import ObjectFile, Section

Fields = dict[int, frozenset[int]]
"""Section index -> offsets of the four-byte fields in it that hold line numbers."""


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
