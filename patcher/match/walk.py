"""The comparison of one function, instruction by instruction, where lengths or bytes differ."""

from __future__ import annotations

import re
from typing import Protocol

from patcher.blocks import Block, Reference
from patcher.errors import PatcherError
from patcher.link.relocations import R, type_name
from patcher.match.meaning import Meaning
from patcher.match.rewritten import ASKING, MASK, NOP, REWRITTEN, Branch, field_of, relative_branch, width_of
from patcher.match.threads import ThreadReferences
from patcher.match.verdict import Cause, Mismatch

_Lite = tuple[int, int, str, str]
_NOP = re.compile(NOP)


class Comparison(Meaning, Protocol):
    """The comparison that a walk is part of."""

    threads: ThreadReferences

    def lines(self, block: Block) -> list[int]:
        """Return the offsets of the line numbers in a block."""

    def pass_over(self, ours: bytearray, theirs: bytes | bytearray, at: int, live: int) -> None:
        """Make a line number of ours equal to the live one, if both name the same line."""

    def check_at(self, r: Reference, code: bytes, offset: int, body: int) -> None:
        """Check the field at `offset` of a live body, which stands for `r`; raises `Mismatch`."""

    def check_rewritten(self, r: Reference, code: bytes, field_offset: int, body: int) -> None:
        """Check a GOT reference that the linker may have made direct; raises `Mismatch`."""


class Walk:
    """One function, instruction by instruction."""

    def __init__(
        self, matcher: Comparison, block: Block, code: bytes, body: int, references: tuple[Reference, ...]
    ) -> None:
        from patcher.code.instructions import decode_lite

        self.matcher = matcher
        self.block = block
        self.code = code
        self.body = body
        self.references = references
        try:
            self.ours = decode_lite(block.data, 0)
            self.theirs = decode_lite(code, 0)
        except PatcherError as error:
            raise Mismatch(Cause.CODE, f"cannot be decoded: {error}") from None
        self.map: dict[int, int] = {}
        self.inner: list[tuple[int, int]] = []
        self._next = 0
        self._lines = matcher.lines(block)

    def run(self) -> dict[int, int]:
        i = j = 0
        ours, theirs = self.ours, self.theirs
        while True:
            while i < len(ours) and self._nop(self.block.data, ours[i]):
                self.map[ours[i][0]] = theirs[j][0] if j < len(theirs) else len(self.code)
                self._skip_references(ours[i])
                i += 1
            while j < len(theirs) and self._nop(self.code, theirs[j]) and not self._marked(i):
                j += 1
            if i >= len(ours) or j >= len(theirs):
                break
            self.map[ours[i][0]] = theirs[j][0]
            behind = self._asking(i, j)
            if behind is None:
                self._pair(ours[i], theirs[j])
                behind = i + 1, j + 1
            i, j = behind
        if i < len(ours) or j < len(theirs):
            raise Mismatch(Cause.CODE, "is longer" if i < len(ours) else "is shorter")
        self.map[self.block.size] = len(self.code)
        for source, destination in self.inner:
            if self.map.get(source) != destination:
                raise Mismatch(Cause.CODE, f"branches elsewhere (to +{source:#x})")
        return self.map

    def _nop(self, data: bytes, instruction: _Lite) -> bool:
        offset, size, _, _ = instruction
        return _NOP.fullmatch(data, offset, offset + size) is not None

    def _reference(self, i: int) -> Reference | None:
        """Return the first reference in one of our instructions."""
        if i >= len(self.ours) or self._next >= len(self.references):
            return None
        r, end = self.references[self._next], self.ours[i][0] + self.ours[i][1]
        return r if r.offset < end else None

    def _marked(self, i: int) -> bool:
        """Tell whether an instruction is a call through a descriptor, which a linker may have made a no-op."""
        r = self._reference(i)
        return r is not None and r.type == R.TLSDESC_CALL

    def _asking(self, i: int, j: int) -> tuple[int, int] | None:
        """Pair code that asks for a thread-local with what a linker made of it; return what follows both.

        None where no such code starts, or where it stands as compiled.
        """
        r, start, live = self._reference(i), self.ours[i][0], self.theirs[j][0]
        if r is None or r.type not in ASKING:
            return None
        if self.code[live : live + r.offset - start] == self.block.data[start : r.offset]:
            return None
        last = next((k for k in range(i, min(i + 4, len(self.ours))) if self.ours[k][2] == "call"), None)
        if last is None:
            return None
        size = sum(self.ours[last][:2]) - start
        self.matcher.threads.check_sequence(r, self.code[live : live + size], self.body + live)
        while j < len(self.theirs) and self.theirs[j][0] < live + size:
            j += 1
        if (self.theirs[j][0] if j < len(self.theirs) else len(self.code)) != live + size:
            raise Mismatch(Cause.CODE, f"other code to find a thread-local at +{start:#x}")
        self._skip_references(self.ours[last])
        return last + 1, j

    def _skip_references(self, instruction: _Lite) -> None:
        while self._next < len(self.references) and self.references[self._next].offset < sum(instruction[:2]):
            self._next += 1

    def _pair(self, ours: _Lite, theirs: _Lite) -> None:
        start, size = ours[0], ours[1]
        found = []
        while self._next < len(self.references) and self.references[self._next].offset < start + size:
            found.append(self.references[self._next])
            self._next += 1
        mine = self.block.data[start : start + size]
        other = self.code[theirs[0] : theirs[0] + theirs[1]]
        branch = relative_branch(mine)
        if branch is not None and not (found and found[0].type in REWRITTEN):
            self._branch(branch, other, ours, theirs, found)
            return
        if found and mine[:2] == b"\xff\x25" and other[:1] == b"\xe9":
            self.matcher.check_rewritten(found[0], self.code, theirs[0] + 2, self.body)
            return
        if size != theirs[1]:
            raise Mismatch(Cause.CODE, f"other instruction at +{start:#x}: {ours[2]} instead of {theirs[2]}")
        self._plain(ours, theirs, mine, other, found)

    def _plain(self, ours: _Lite, theirs: _Lite, mine: bytes, other: bytes, found: list[Reference]) -> None:
        left, right = bytearray(mine), bytearray(other)
        for r in found:
            low, high = (max(0, b - ours[0]) for b in field_of(r.type, r.offset))
            left[low:high] = right[low:high] = bytes(high - low)
        for offset in self._lines:
            if ours[0] <= offset < ours[0] + ours[1]:
                self.matcher.pass_over(left, right, offset - ours[0], offset - ours[0])
        if not found and "[rip" in ours[3]:
            self._inner_operand(ours, theirs, left, right)
        if left != right:
            same_operation = ours[2] == theirs[2] and ours[1] == theirs[1]
            cause = Cause.CONSTANT if same_operation else Cause.CODE
            raise Mismatch(cause, f"{ours[2]} {ours[3]} instead of {theirs[2]} {theirs[3]} at +{ours[0]:#x}")
        for r in found:
            offset = theirs[0] + r.offset - ours[0]
            self.matcher.check_at(r, self.code, offset, self.body)

    def _inner_operand(self, ours: _Lite, theirs: _Lite, left: bytearray, right: bytearray) -> None:
        """Take a reference to the function's own code, which the assembler resolved, for one of the inner ones."""
        from patcher.code.instructions import field_end, lite_reference

        source, destination = lite_reference(ours, 0), lite_reference(theirs, 0)
        if source is None or destination is None:
            return
        value = (source - ours[0] - ours[1] & 0xFFFFFFFF).to_bytes(4, "little")
        position = left.rfind(value)
        if position > 1 and field_end(bytes(left), 0, position) + position + 4 == len(left):
            left[position : position + 4] = right[position : position + 4] = bytes(4)
            self.inner.append((source, destination))

    def _branch(self, branch: Branch, other: bytes, ours: _Lite, theirs: _Lite, found: list[Reference]) -> None:
        live = relative_branch(other)
        if live is None or live[:2] != branch[:2]:
            raise Mismatch(Cause.CODE, f"{ours[2]} {ours[3]} instead of {theirs[2]} {theirs[3]} at +{ours[0]:#x}")
        destination = theirs[0] + theirs[1] + live[2]
        if not found:
            self.inner.append((ours[0] + ours[1] + branch[2], destination))
            return
        reference = found[0]
        if reference.type not in (R.PC32, R.PLT32, R.PC8):
            raise Mismatch(Cause.CODE, f"{type_name(reference.type)} in a branch at +{ours[0]:#x}")
        width = width_of(reference)
        self.matcher.check_target(reference.target, self.body + destination - reference.addend - width & MASK)
