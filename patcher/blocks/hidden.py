"""The references of an object's functions that have no relocation, found as they are asked for (`code.split`).

Only functions that share a section have some. To find them takes decoding, so the bytes of a part of a section are
searched first for functions that may have any.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from patcher.blocks.block import Block, Cuts
from patcher.elf import ObjectFile
from patcher.elf.object import Column, row_key

if TYPE_CHECKING:
    from patcher.code.split import HiddenReference

_WINDOW = 15
"""The functions of so many bits of a section's offsets are looked at together: one of them costs as much as all."""


class HiddenReferences:
    """Those of one object. `cuts` are its sections of several blocks; they may become more."""

    def __init__(self, source: ObjectFile, cuts: Mapping[int, Cuts]) -> None:
        self._object = source
        self._cuts = cuts
        self._shared: set[int] = set()  # sections of several functions
        self._windows: set[tuple[int, int]] = set()  # parts of those yet to be looked at
        self._suspects: dict[Block, int] = {}  # which may have some, until where
        self._found: dict[Block, tuple[HiddenReference, ...]] = {}

    def add(self, section: int) -> None:
        """Take note of a section of several functions."""
        self._shared.add(section)
        self._windows.update((section, window) for window in {start >> _WINDOW for start in self._cuts[section].starts})

    def of(self, block: Block) -> tuple[HiddenReference, ...]:
        """Return those of one block."""
        self.suspected((block,))
        return self._found.get(block, ())

    def suspected(self, blocks: Sequence[Block]) -> list[tuple[int, Block]]:
        """Return the blocks that may have references which the assembler resolved, each with its place among the given.

        To find the references takes decoding.
        """
        if not self._shared:
            return []
        if self._windows:
            shared = self._shared
            for window in {(b.section, b.start >> _WINDOW) for b in blocks if b.section in shared} & self._windows:
                self._windows.remove(window)
                self._look_for_suspects(*window)
        suspects = self._suspects
        found = [(i, b) for i, b in enumerate(blocks) if b in suspects]
        self._decode([b for _, b in found if b not in self._found])
        return found

    def _look_for_suspects(self, section: int, window: int) -> None:
        from patcher.code.split import suspects

        starts, blocks, _ = self._cuts[section]
        low, high = (bisect.bisect_left(starts, w << _WINDOW) for w in (window, window + 1))
        functions = [(b.start, b.size) for b in blocks[low:high]]
        end = functions[-1][0] + functions[-1][1]
        relocated = self._relocated(section, functions[0][0], end)
        found = suspects(self._object.sections[section].data, functions, relocated)
        self._suspects.update((b, found[b.start]) for b in blocks[low:high] if b.start in found)

    def _relocated(self, section: int, start: int, end: int) -> Column:
        """Return the offsets of the fields with relocations in a part of a section."""
        rows = self._object.relocation_rows
        first, last = np.searchsorted(rows.key, row_key(np.int64(section), np.array([start, end]))).tolist()
        return rows.offset[first:last]

    def _decode(self, blocks: Sequence[Block]) -> None:
        """Find the references without relocations of some blocks."""
        if not blocks:
            return
        from patcher.code.split import hidden_references

        offsets = self._object.relocation_rows.offset
        first, last = rows_of(self._object, blocks)
        for block, low, high in zip(blocks, first.tolist(), last.tolist(), strict=True):
            data, extent = self._object.sections[block.section].data, (block.start, block.size)
            self._found[block] = hidden_references(data, [extent], offsets[low:high].tolist(), self._suspects[block])


def rows_of(source: ObjectFile, blocks: Sequence[Block]) -> tuple[Column, Column]:
    """Return each block's first row among the relocations of its object, and the first one behind its last."""
    section = np.array([b.section for b in blocks], np.int64)
    start = np.array([b.start for b in blocks], np.int64)
    size = np.array([len(b.data) for b in blocks], np.int64)
    return source.relocation_rows.between(row_key(section, start), row_key(section, start + size))
