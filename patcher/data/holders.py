"""Who holds an address in the process: code that refers to it, and words of memory in which the program keeps it.

Code that nobody enters any more does not count, nor do stacks: what frames left behind there looks like pointers.
Bytes that look like a reference and are in no known function count; better one holder too many than one too few.
Memory beyond the modules' is searched up to a limit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from patcher.code.instructions import references_into
from patcher.elf.relocations import R
from patcher.errors import PatcherError
from patcher.image import Image, LoadedModule
from patcher.live import base_name
from patcher.patch.journal import ArenaView
from patcher.target import Mapping

Extent = tuple[int, int]

_MOST = 64 << 20  # bytes of the program's memory, its modules' apart
_GUARD = 64 << 10  # what lies below a thread's stack; what an allocator keeps back is larger
_IMMEDIATES = (0, 1, 2, 4)  # bytes of one behind a displacement, which counts from the end of its instruction


@dataclass(frozen=True, slots=True)
class _Code:
    address: int
    contents: bytes
    name: str  # "" for a module's text
    module: LoadedModule | None


class Holders:
    """The code and the memory of a process, read when first asked. `gone`: extents that do not count."""

    def __init__(self, image: Image, view: ArenaView, gone: Sequence[Extent]) -> None:
        self._image = image
        self._view = view
        self._gone = tuple(gone)
        self._memory = image.target.memory
        self._code = [*self._texts(), *self._bodies()]
        self._words = [(start, np.frombuffer(data, "<u8")) for start, data in self._writable()]

    def of(self, low: int, high: int) -> tuple[str, ...]:
        """Return who holds an address in `low` <= address < `high`, in words."""
        return tuple(dict.fromkeys((*self._in_code(low, high), *self._in_memory(low, high))))

    # --- code -------------------------------------------------------------------------------------------------

    def _texts(self) -> Iterator[_Code]:
        for module in self._image.modules:
            for low, high in module.module.code_sections:
                start = low + module.bias
                yield _Code(start, self._memory.read_available(start, high - low), "", module)

    def _bodies(self) -> Iterator[_Code]:
        live = set(self._view.bodies.values())
        for placed in self._view.journal.placed:
            if placed.kind == "code" and placed.address in live:
                yield _Code(placed.address, self._memory.read_available(placed.address, placed.size), placed.name, None)

    def _in_code(self, low: int, high: int) -> Iterator[str]:
        for code in self._code:
            for at in _displacements(code, low, high):
                if not self._is_gone(at):
                    yield from self._user(code, at, low, high)
            if code.module is not None and not code.module.module.position_independent:
                for at in _numbers(code, low, high):
                    if not self._is_gone(at):
                        yield self._name(code, code.module, at)

    def _user(self, code: _Code, at: int, low: int, high: int) -> Iterator[str]:
        """Yield the function that a likely reference is in, if the reference is one."""
        if code.module is None:
            if _refers(code.contents, code.address, low, high):
                yield f"`{base_name(code.name)}`"
            return
        symbol = code.module.module.symbols.covering(at - code.module.bias)
        if symbol is not None and symbol.function and symbol.size:
            start = symbol.value + code.module.bias
            if not _refers(code.contents[start - code.address :][: symbol.size], start, low, high):
                return
        elif not _is_field(code, at, low, high):
            return
        yield self._name(code, code.module, at)

    def _name(self, code: _Code, module: LoadedModule, at: int) -> str:
        symbol = module.module.symbols.covering(at - module.bias)
        return f"`{base_name(symbol.name)}`" if symbol is not None else f"code at {at:#x} of {module.name}"

    def _is_gone(self, address: int) -> bool:
        return any(start <= address < end for start, end in self._gone)

    # --- memory -----------------------------------------------------------------------------------------------

    def _writable(self) -> Iterator[tuple[int, bytes]]:
        mappings = self._image.target.mappings()
        for module in self._image.modules:
            for segment in module.module.segments:
                if segment.writable:
                    start = segment.address + module.bias
                    skipped = -start % 8
                    yield start + skipped, self._read(start + skipped, segment.memory_size - skipped)
        for placed in self._view.journal.placed:
            if placed.kind == "data":
                yield placed.address & -8, self._read(placed.address & -8, placed.size + 8)
        left = _MOST
        for mapping in _heaps(mappings):
            if not self._view.contains(mapping.start) and self._image.module_at(mapping.start) is None:
                data = self._read(mapping.start, min(mapping.size, left))
                left -= len(data)
                yield mapping.start, data

    def _read(self, start: int, size: int) -> bytes:
        data = self._memory.read_available(start, size)
        return data[: len(data) & -8]

    def _in_memory(self, low: int, high: int) -> Iterator[str]:
        for start, words in self._words:
            for i in np.flatnonzero((words >= np.uint64(low)) & (words < np.uint64(high))).tolist():
                at = start + 8 * i
                if not self._is_gone(at):
                    yield from self._place(at)

    def _place(self, at: int) -> Iterator[str]:
        for placed in self._view.journal.placed:
            if placed.kind == "data" and placed.address <= at < placed.address + placed.size:
                yield f"stored in `{base_name(placed.name)}`"
                return
        module = self._image.module_at(at)
        if module is None:
            yield f"stored at {at:#x}"
            return
        if _is_cell(module, at):  # of interest to whom it is: code that goes through it
            yield from self._in_code(at, at + 8)
            return
        symbol = module.module.symbols.covering(at - module.bias)
        yield f"stored in `{base_name(symbol.name)}`" if symbol is not None else f"stored in {module.name}"


def _displacements(code: _Code, low: int, high: int) -> list[int]:
    """Return where a displacement from RIP may stand that leads to `low` <= address < `high`.

    The byte before says that it is one (ModRM: mod 0, r/m 5; no SIB).
    """
    found: list[int] = []
    for places, values in _words_of(code):
        pointed = values + places + 4
        near = (pointed >= low - max(_IMMEDIATES)) & (pointed < high)
        for place, to in zip(places[near].tolist(), pointed[near].tolist(), strict=True):
            before = place - code.address - 1
            if before >= 0 and code.contents[before] & 0xC7 == 0x05 and any(low <= to + i < high for i in _IMMEDIATES):
                found.append(place)
    return found


def _is_field(code: _Code, at: int, low: int, high: int) -> bool:
    """Tell whether a displacement leads there, in code of which nobody says where its instructions start.

    What follows the field depends on the opcode, which is the one byte before ModRM, or two.
    """
    offset = at - code.address
    starts = (offset - 3, offset - 2)
    return any(_refers(code.contents[max(0, s) : offset + 12], code.address + max(0, s), low, high) for s in starts)


def _numbers(code: _Code, low: int, high: int) -> list[int]:
    """Return where an address itself may stand in code, which can be where a program has its addresses below 2 GiB."""
    return [place for places, values in _words_of(code) for place in places[(values >= low) & (values < high)].tolist()]


def _words_of(code: _Code) -> Iterator[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """Yield the addresses of all four bytes, aligned or not, and their values."""
    for shift in range(4):
        count = (len(code.contents) - shift) // 4
        if count > 0:
            values = np.frombuffer(code.contents, "<i4", count, shift).astype(np.int64)
            yield code.address + shift + 4 * np.arange(count, dtype=np.int64), values


def _refers(body: bytes, address: int, low: int, high: int) -> bool:
    try:
        return bool(references_into(body, address, low, high))
    except PatcherError:
        return True


def _is_cell(module: LoadedModule, address: int) -> bool:
    known = module.module.cells.get(address - module.bias)
    if known is not None and known.type == R.GLOB_DAT:
        return True
    return bool(module.module.offset_tables) and module.in_offset_table(address)


def _heaps(mappings: Sequence[Mapping]) -> Iterator[Mapping]:
    """Yield the memory that the program got for itself, stacks left out."""
    before: Mapping | None = None
    for mapping in mappings:
        guarded = before is not None and before.end == mapping.start and before.size <= _GUARD
        guarded = guarded and before is not None and before.permissions.startswith("---")
        own = mapping.permissions.startswith("rw-p") and not mapping.inode and mapping.path in ("", "[heap]")
        if own and not guarded:
            yield mapping
        before = mapping
