"""Who refers to some memory: code that has its address, and words that hold it.

Decides whether a variable can be given up for new storage: every reference must be in code that is replaced, or that
is out of use already. Code is searched for fields that lead there, and for cells through which it goes; a word anywhere
else that holds an address there may be used by anybody.

Not found are addresses that code computes from others, and such as lie outside of the variable.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from patcher.errors import PatcherError, UnsafeChange
from patcher.image import Image, LoadedModule
from patcher.live import base_name
from patcher.part import is_migration
from patcher.patch.journal import FORMER

if TYPE_CHECKING:
    from patcher.patch.journal import ArenaView, Placed, Redirect
    from patcher.target import Mapping, Target

Words = npt.NDArray[np.uint64]
_COPY_SIZE = 128  # more than any displaced entry takes
_PAGE = 4096
_MARKING = ("deregister_tm_clones", "register_tm_clones")  # they compare the address where the data ends
_MOVABS = re.compile(rb"[\x48\x49][\xb8-\xbf]")
_PIECE = 16 << 20  # looked at together
_PRESENT = np.uint64(0b11 << 62)  # present, or in swap (pagemap)
_IMMEDIATES = 4  # bytes that may stand between a field and the end of its instruction


@dataclass(frozen=True, slots=True)
class Extent:
    """A piece of code, by name."""

    name: str
    start: int
    end: int


class Holders:
    """Who refers to what in one process. `replaced`: the old code that a change puts out of use."""

    def __init__(self, image: Image, view: ArenaView, replaced: Iterable[Extent]) -> None:
        self._image = image
        self._view = view
        self._replaced = tuple(replaced)
        self._placed = sorted((p for p in view.journal.placed if p.kind in ("code", FORMER)), key=lambda p: p.address)
        self._redirects = {r.original: r for r in view.journal.redirects if not r.born}
        self._texts: dict[tuple[int, int], bytes] = {}

    def give_up(self, name: str, low: int, high: int) -> tuple[Extent, ...]:
        """Return the old code that refers to a variable at `low`..`high`: none of it may be running any more.

        Raises `UnsafeChange` naming whoever goes on referring to it.
        """
        users = [extent for at in self._code(low, high) if (extent := self._user(name, at)) is not None]
        for cell in self._cells(low, high):
            users += [e for at in self._code(cell, cell + 8) if (e := self._user(name, at)) is not None]
        return tuple(dict.fromkeys(users))

    # --- code ---------------------------------------------------------------------------------------------------

    def _code(self, low: int, high: int) -> Iterator[int]:
        """Yield the addresses of fields in code that lead to `low`..`high`."""
        tables = [table for m in self._image.modules if (table := m.offset_table) is not None]
        for start, end, absolute in self._extents(low):
            text = self._text(start, end)
            fields = _fields(text, start, low, high, absolute)
            for table in tables:  # to whose address the large model of position-independent code adds
                found = _wide(text, low - table, high - table)
                fields += [(at, True) for at in found if _MOVABS.fullmatch(text[max(0, at - 2) : at])]
            for at, certain in fields:
                if certain or self._leads(start + at, low, high):
                    yield start + at

    def _leads(self, at: int, low: int, high: int) -> bool:
        """Tell whether the instruction that a field belongs to leads there: an immediate behind it counts too."""
        from patcher.code.instructions import UndecodableCode, references_into

        start, end = self._function_at(at)
        if start == end:
            return True
        try:
            found = references_into(self._text(start, end), start, low, high)
        except UndecodableCode:
            return True
        return any(start + i[0] <= at < start + i[0] + i[1] for i, _ in found)

    def _function_at(self, at: int) -> tuple[int, int]:
        placed = next((p for p in self._placed if p.address <= at < p.address + p.size), None)
        if placed is not None:
            return placed.address, placed.address + placed.size
        redirect = next((r for r in self._redirects.values() if r.copy <= at < r.copy + _COPY_SIZE), None)
        if redirect is not None:
            return redirect.copy, redirect.copy + _COPY_SIZE
        module = self._image.module_at(at)
        symbol = module.module.symbols.function_before(at - module.bias) if module is not None else None
        if module is None or symbol is None:
            return at, at
        # Those of the C library's start-up files have no size.
        end = module.module.symbols.next_address(symbol.value)
        return symbol.value + module.bias, (end or symbol.value + symbol.size) + module.bias

    def _extents(self, low: int) -> Iterator[tuple[int, int, bool]]:
        home = self._image.module_at(low)
        fixed = home is not None and not home.module.position_independent
        if home is not None:
            yield (*home.text, fixed)
        for placed in self._placed:
            yield placed.address, placed.address + placed.size, True
        for redirect in self._redirects.values():
            yield redirect.copy, redirect.copy + _COPY_SIZE, True

    def _text(self, start: int, end: int) -> bytes:
        if (start, end) not in self._texts:
            self._texts[start, end] = self._image.target.memory.read_available(start, end - start)
        return self._texts[start, end]

    def _user(self, name: str, at: int) -> Extent | None:
        """Return the code that a field belongs to, which is out of use; None where nothing can enter it.

        Raises `UnsafeChange` when it stays in use.
        """
        replaced = next((e for e in self._replaced if e.start <= at < e.end), None)
        if replaced is not None:
            return replaced
        placed = next((p for p in self._placed if p.address <= at < p.address + p.size), None)
        if placed is not None:
            return self._placed_user(name, placed)
        redirect = next((r for r in self._redirects.values() if r.copy <= at < r.copy + _COPY_SIZE), None)
        if redirect is not None:
            return self._original(name, redirect)
        module = self._image.module_at(at)
        symbol = module.module.symbols.function_before(at - module.bias) if module is not None else None
        if symbol is not None and symbol.name in _MARKING:
            return None
        if module is None or symbol is None:
            raise _still_used(name, f"code at {at:#x}" + (f" of {module.name}" if module is not None else ""))
        redirect = self._redirects.get(symbol.value + module.bias)
        if redirect is not None:
            return self._original(name, redirect)
        raise _still_used(name, f"`{symbol.name}`{_file(module, symbol.group)}")

    def _original(self, name: str, redirect: Redirect) -> Extent:
        body = self._view.bodies.get((redirect.arena, redirect.index), redirect.copy)
        extent = Extent(redirect.name, redirect.original, redirect.original + redirect.size)
        if body == redirect.copy and not any(e.start == redirect.original for e in self._replaced):
            raise _still_used(name, f"`{redirect.name}` of {redirect.unit.partition('#')[0]}")
        return extent

    def _placed_user(self, name: str, placed: Placed) -> Extent | None:
        if is_migration(placed.name):
            return None  # it ran, and has no entry for anybody
        extent = Extent(placed.name, placed.address, placed.address + placed.size)
        if placed.kind == FORMER:
            return extent
        out_of_use = self._out_of_use()
        record = next(g for g in self._view.journal.generations.values() if placed in g.placed)
        own = [p for p in record.placed if p.kind == "code" and p.unit == placed.unit]
        doors = {body for _, _, body in record.bodies}
        # What is no door is used by those that came with it.
        using = [placed.address] if placed.address in doors else [p.address for p in own if p.address in doors]
        if all(body in out_of_use for body in using):
            return extent
        raise _still_used(name, f"`{placed.name}` of {placed.unit.partition('#')[0]}")

    def _out_of_use(self) -> set[int]:
        live = set(self._view.bodies.values())
        known = {body for g in self._view.journal.generations.values() for _, _, body in g.bodies}
        return (known - live) | {e.start for e in self._replaced}

    # --- cells --------------------------------------------------------------------------------------------------

    def _cells(self, low: int, high: int) -> Iterator[int]:
        """Yield the cells, of the modules and of ours, that hold an address in `low`..`high`."""
        mappings = [m for m in self._image.target.mappings() if m.readable and not m.executable]
        for at in words_into(self._image.target, mappings, low, high):
            if self.is_cell(at):
                yield at

    def is_cell(self, address: int) -> bool:
        """Tell whether a word is there for code to go through it, and for nothing else."""
        if self._view.contains(address):
            return not any(
                p.kind not in ("code", FORMER) and p.address <= address < p.address + p.size
                for p in self._view.journal.placed
            )
        module = self._image.module_at(address)
        return module is not None and bool(module.module.offset_tables) and module.in_offset_table(address)


def refuse_words(
    image: Image,
    view: ArenaView,
    name: str,
    ranges: Sequence[tuple[int, int]],
    stacks: Sequence[int],
    ends: Sequence[int] = (),
) -> None:
    """Raise `UnsafeChange` when a word of the process holds an address in one of `ranges`, or one of `ends`.

    `ends` are addresses behind variables, where loops end; others may begin there. Not counted are cells, the ranges
    themselves, and the stacks, one of which each address of `stacks` lies in.
    """
    holders = Holders(image, view, ())
    mappings = [
        m
        for m in image.target.mappings()
        if m.readable and not m.executable and not any(sp in m for sp in stacks) and not m.path.startswith("[v")
    ]
    for low, high in (*ranges, *((end, end + 1) for end in ends)):
        for at in words_into(image.target, mappings, low, high):
            inside = any(start <= at < end for start, end in ranges)
            if not inside and not holders.is_cell(at) and not (low in ends and _is_of_linker(image, at)):
                what = "the address behind its end" if low in ends else "its address"
                raise _still_used(name, f"{_word(image, view, mappings, at)}, which holds {what}")


def _is_of_linker(image: Image, at: int) -> bool:
    """Tell whether a word of a module is part of no variable: where sections end, linkers have words of their own."""
    module = image.module_at(at)
    return module is not None and module.module.symbols.covering(at - module.bias) is None


def _word(image: Image, view: ArenaView, mappings: Sequence[Mapping], at: int) -> str:
    placed = next((p for p in view.journal.placed if p.address <= at < p.address + p.size), None)
    module = image.module_at(at)
    symbol = module.module.symbols.covering(at - module.bias) if module is not None else None
    if placed is not None:
        return f"`{base_name(placed.name)}`"
    if symbol is not None:
        return f"`{base_name(symbol.name)}`"
    home = next((m.path for m in mappings if at in m), "")
    return f"a word at {at:#x} of {home or 'anonymous memory'}"


def words_into(target: Target, mappings: Sequence[Mapping], low: int, high: int) -> Iterator[int]:
    """Yield the addresses of aligned words that hold an address in `low`..`high`; pages never touched have none."""
    with open(f"/proc/{target.pid}/pagemap", "rb") as pagemap:
        for mapping in mappings:
            for start, end in _present(pagemap.fileno(), mapping):
                try:
                    data = target.memory.read(start, end - start)
                except PatcherError:
                    continue  # unmapped meanwhile, or of a device
                words = np.frombuffer(data, np.uint64)
                for i in np.flatnonzero((words >= np.uint64(low)) & (words < np.uint64(high))).tolist():
                    yield start + 8 * i


def _present(pagemap: int, mapping: Mapping) -> Iterator[tuple[int, int]]:
    for start in range(mapping.start, mapping.end, _PIECE):
        count = (min(mapping.end, start + _PIECE) - start) // _PAGE
        found = np.frombuffer(os.pread(pagemap, 8 * count, start // _PAGE * 8), np.uint64)
        there = np.flatnonzero(found & _PRESENT)
        if len(there):
            breaks = np.flatnonzero(np.diff(there) > 1) + 1
            for run in np.split(there, breaks):
                yield start + int(run[0]) * _PAGE, start + (int(run[-1]) + 1) * _PAGE


def _fields(text: bytes, address: int, low: int, high: int, absolute: bool) -> list[tuple[int, bool]]:
    """Return the offsets of fields that lead to `low`..`high`: relative ones, and absolute ones where there may be.

    Each with whether that is certain: what looks like a relative field may be parts of two others, and an immediate
    behind it moves what it counts from.
    """
    found: dict[int, bool] = {}
    for shift in range(4):
        values = np.frombuffer(text[shift : shift + (len(text) - shift) // 4 * 4], "<i4").astype(np.int64)
        places = address + shift + 4 * np.arange(len(values), dtype=np.int64)
        ends = places + 4 + values
        found.update(
            dict.fromkeys((4 * np.flatnonzero((ends + _IMMEDIATES >= low) & (ends < high)) + shift).tolist(), False)
        )
        if absolute:
            whole = values & 0xFFFFFFFF
            found.update(dict.fromkeys((4 * np.flatnonzero((whole >= low) & (whole < high)) + shift).tolist(), True))
    found.update(dict.fromkeys(_wide(text, low, high), True))
    return sorted(found.items())


def _wide(text: bytes, low: int, high: int) -> list[int]:
    """Return the offsets of 64-bit fields that hold a number in `low`..`high`."""
    found = []
    for shift in range(8):
        values = np.frombuffer(text[shift : shift + (len(text) - shift) // 8 * 8], np.int64)
        found += (8 * np.flatnonzero((values >= low) & (values < high)) + shift).tolist()
    return found


def _file(module: LoadedModule, group: int) -> str:
    name = module.module.symbols.group_name(group) if group >= 0 else ""
    return f" of {name}" if name else f" of {module.name}"


def _still_used(name: str, who: str) -> UnsafeChange:
    return UnsafeChange(
        f"`{name}` has another layout now, and {who} still refers to the old one",
        "save every file that uses it together; what holds its address in memory cannot be told to let go of it",
        code="still-used",
    )
