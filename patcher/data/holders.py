"""Who refers to memory of a process: the one place that looks for it through code, cells and words.

Code is searched for fields that lead there: displacements from RIP, numbers where code may have them, offsets from the
table of cells in the large model. Such a field lies in code of the module that has the memory, or of ours; whoever
else refers to it goes through a cell, which is a word that is there for nothing else. Any other word that holds an
address may be used by anybody.

What code that nobody enters any more counts for, and which words count, is the asker's to say: `data.constants` asks
who goes on with the old contents of a constant, `data.still_used` whether a variable can be given up for new storage.

Not found are addresses that code computes from others, and such as lie outside of what is asked about. Of a process
that runs, stacks are left out: what frames left behind there looks like pointers.

Specification: AMD64 supplement, section 3.5 (code models), table 4.9.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from patcher.elf.relocations import R
from patcher.errors import PatcherError
from patcher.image import Image, LoadedModule
from patcher.live import base_name
from patcher.part import is_migration
from patcher.patch.journal import FORMER

if TYPE_CHECKING:
    from patcher.patch.journal import ArenaView, Placed, Redirect
    from patcher.target import Mapping

Range = tuple[int, int]  # low <= address < high
Array = np.ndarray[Any, Any]

MOST = 64 << 20  # bytes of a running program's own memory that are looked through
_COPY_SIZE = 128  # more than any displaced entry takes
_MARKING = ("deregister_tm_clones", "register_tm_clones")  # they compare the address where the data ends
_IMMEDIATES = (0, 1, 2, 4)  # bytes of one behind a displacement, which counts from the end of its instruction
_MOVABS = re.compile(rb"[\x48\x49][\xb8-\xbf]")
_GUARD = 64 << 10  # what lies below a thread's stack; what an allocator keeps back is larger


@dataclass(frozen=True, slots=True)
class Extent:
    """A piece of code, by name."""

    name: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class User:
    """The code that a reference is in. `out_of_use`: nobody enters it any more, but threads may still be in it."""

    name: str
    home: str  # the file or module, with ` of ` before it; "" where nobody knows
    extent: Extent
    out_of_use: bool


@dataclass(frozen=True, slots=True)
class Words:
    """The words that lead to one range: cells, through which code goes, and all others."""

    cells: tuple[int, ...]
    others: tuple[int, ...]


class Holders:
    """Who refers to what in one process. `replaced`: the old code that a change puts out of use."""

    def __init__(self, image: Image, view: ArenaView, replaced: Iterable[Extent] = ()) -> None:
        self._image = image
        self._view = view
        self._memory = image.target.memory
        self._replaced = tuple(replaced)
        self._code = sorted((p for p in view.journal.placed if p.kind in ("code", FORMER)), key=lambda p: p.address)
        self._redirects = {r.original: r for r in view.journal.redirects if not r.born}
        self._texts: dict[Range, bytes] = {}

    # --- code ---------------------------------------------------------------------------------------------------

    def users(self, ranges: Sequence[Range]) -> list[tuple[User, ...]]:
        """Return for each range the code that refers to it."""
        found: list[dict[User, None]] = [{} for _ in ranges]
        for start, end, absolute, concerned in self._extents(ranges):
            text = self._text(start, end)
            for at, i in displacements(text, start, [ranges[i] for i in concerned]):
                self._note(start + at, ranges[concerned[i]], found[concerned[i]], certain=False)
            for at, i in self._numbers(text, [ranges[i] for i in concerned], absolute):
                self._note(start + at, ranges[concerned[i]], found[concerned[i]], certain=True)
        return [tuple(users) for users in found]

    def users_through(self, words: Sequence[Words]) -> list[tuple[User, ...]]:
        """Return for each range, of which these are the words, the code that goes through its cells."""
        cells = [(cell, cell + 8) for found in words for cell in found.cells]
        users = iter(self.users(cells) if cells else ())
        return [tuple(dict.fromkeys(u for _ in found.cells for u in next(users))) for found in words]

    def _note(self, at: int, wanted: Range, found: dict[User, None], *, certain: bool) -> None:
        user = self._user(at)
        if user is not None and user not in found and (certain or self._leads(at, wanted)):
            found[user] = None

    def _extents(self, ranges: Sequence[Range]) -> Iterator[tuple[int, int, bool, list[int]]]:
        """Yield where code may be that refers to some ranges: to which, and whether it has whole addresses in it."""
        homes: dict[LoadedModule, list[int]] = {}
        for i, (low, _) in enumerate(ranges):
            home = self._image.module_at(low)
            if home is not None:
                homes.setdefault(home, []).append(i)
        for module, concerned in homes.items():
            yield (*module.text, not module.module.position_independent, concerned)
        every = [*range(len(ranges))]
        for placed in self._code:
            yield placed.address, placed.address + placed.size, True, every
        for redirect in self._redirects.values():
            yield redirect.copy, redirect.copy + _COPY_SIZE, True, every

    def _text(self, start: int, end: int) -> bytes:
        if (start, end) not in self._texts:
            self._texts[start, end] = self._memory.read_available(start, end - start)
        return self._texts[start, end]

    def _numbers(self, text: bytes, ranges: Sequence[Range], absolute: bool) -> Iterator[tuple[int, int]]:
        """Yield where code has addresses themselves, or offsets from the table of cells, and of which range."""
        yield from ((at, i) for at, _, i in numbers(text, ranges, absolute=absolute))
        for table in self._tables:  # to whose address the large model of position-independent code adds
            offsets = [(low - table, high - table) for low, high in ranges]
            for at, i in _held(text, "<i8", range(8), offsets):
                if _MOVABS.fullmatch(text[max(0, at - 2) : at]):
                    yield at, i

    @cached_property
    def _tables(self) -> tuple[int, ...]:
        return tuple(table for m in self._image.modules if (table := m.offset_table) is not None)

    def _leads(self, at: int, wanted: Range) -> bool:
        """Tell whether the instruction that a field belongs to leads there: an immediate behind it counts too."""
        from patcher.code.instructions import UndecodableCode, references_into

        start, end = self._function_at(at)
        if start == end:
            return True
        try:
            found = references_into(self._text(start, end), start, *wanted)
        except UndecodableCode:
            return True
        return any(start + i[0] <= at < start + i[0] + i[1] for i, _ in found)

    def _function_at(self, at: int) -> Range:
        placed = self._placed_at(at)
        if placed is not None:
            return placed.address, placed.address + placed.size
        redirect = self._copied_at(at)
        if redirect is not None:
            return redirect.copy, redirect.copy + _COPY_SIZE
        module = self._image.module_at(at)
        symbol = module.module.symbols.function_before(at - module.bias) if module is not None else None
        if module is None or symbol is None:
            return at, at
        # Those of the C library's start-up files have no size.
        end = module.module.symbols.next_address(symbol.value)
        return symbol.value + module.bias, (end or symbol.value + symbol.size) + module.bias

    def _placed_at(self, at: int) -> Placed | None:
        return next((p for p in self._code if p.address <= at < p.address + p.size), None)

    def _copied_at(self, at: int) -> Redirect | None:
        return next((r for r in self._redirects.values() if r.copy <= at < r.copy + _COPY_SIZE), None)

    # --- whose code it is ---------------------------------------------------------------------------------------

    def _user(self, at: int) -> User | None:
        """Return the code that a field belongs to; None where nobody can ever enter it."""
        replaced = next((e for e in self._replaced if e.start <= at < e.end), None)
        if replaced is not None:
            return User(f"`{base_name(replaced.name)}`", "", replaced, True)
        placed = self._placed_at(at)
        if placed is not None:
            return self._placed_user(placed)
        redirect = self._copied_at(at)
        if redirect is not None:
            return self._original(redirect)
        module = self._image.module_at(at)
        symbol = module.module.symbols.function_before(at - module.bias) if module is not None else None
        if symbol is not None and symbol.name in _MARKING:
            return None
        if module is None or symbol is None:
            where = f" of {module.name}" if module is not None else ""
            return User(f"code at {at:#x}", where, Extent("", at, at), False)
        start = symbol.value + module.bias
        redirect = self._redirects.get(start)
        if redirect is not None:
            return self._original(redirect)
        extent = Extent(symbol.name, start, start + symbol.size)
        return User(f"`{base_name(symbol.name)}`", _file(module, symbol.group), extent, False)

    def _original(self, redirect: Redirect) -> User:
        body = self._view.bodies.get((redirect.arena, redirect.index), redirect.copy)
        extent = Extent(redirect.name, redirect.original, redirect.original + redirect.size)
        in_use = body == redirect.copy and not any(e.start == redirect.original for e in self._replaced)
        return User(f"`{base_name(redirect.name)}`", f" of {redirect.unit.partition('#')[0]}", extent, not in_use)

    def _placed_user(self, placed: Placed) -> User | None:
        if is_migration(placed.name):
            return None  # it ran, and has no entry for anybody
        extent = Extent(placed.name, placed.address, placed.address + placed.size)
        home = f" of {placed.unit.partition('#')[0]}"
        return User(f"`{base_name(placed.name)}`", home, extent, placed.kind == FORMER or self._is_left(placed))

    def _is_left(self, placed: Placed) -> bool:
        """Tell whether nothing enters what a patch brought any more."""
        record = next(g for g in self._view.journal.generations.values() if placed in g.placed)
        own = [p for p in record.placed if p.kind == "code" and p.unit == placed.unit]
        doors = {body for _, _, body in record.bodies}
        # What is no door is used by those that came with it.
        using = [placed.address] if placed.address in doors else [p.address for p in own if p.address in doors]
        return all(body in self._out_of_use for body in using)

    @cached_property
    def _out_of_use(self) -> frozenset[int]:
        live = set(self._view.bodies.values())
        known = {body for g in self._view.journal.generations.values() for _, _, body in g.bodies}
        return frozenset((known - live) | {e.start for e in self._replaced})

    # --- words --------------------------------------------------------------------------------------------------

    def words(self, mappings: Iterable[Mapping], ranges: Sequence[Range], most: int | None = None) -> list[Words]:
        """Return for each range the aligned words of some mappings that lead to it, in at most `most` bytes of memory
        that is no module's and not ours."""
        found: list[tuple[list[int], list[int]]] = [([], []) for _ in ranges]
        low, high = min(r[0] for r in ranges), max(r[1] for r in ranges)
        for start, words in self._read(mappings, most):
            near = np.flatnonzero((words >= np.uint64(low)) & (words < np.uint64(high)))
            for k, word in zip(near.tolist(), words[near].tolist(), strict=True):
                at = start + 8 * k
                for i, (first, end) in enumerate(ranges):
                    if first <= word < end:
                        found[i][self.is_cell(at)].append(at)
        return [Words(tuple(cells), tuple(others)) for others, cells in found]

    def mapped(self) -> list[Mapping]:
        """Return the mappings of the modules and of ours, where cells are."""
        readable = (m for m in self._image.target.mappings() if m.readable and not m.executable)
        return [m for m in readable if self._is_known(m.start)]

    def heaps(self) -> list[Mapping]:
        """Return the memory that a running program got for itself, stacks left out."""
        found, before = [], None
        for mapping in self._image.target.mappings():
            guarded = before is not None and before.end == mapping.start and before.size <= _GUARD
            guarded = guarded and before is not None and before.permissions.startswith("---")
            own = mapping.permissions.startswith("rw-p") and not mapping.inode and mapping.path in ("", "[heap]")
            if own and not guarded and not self._is_known(mapping.start):
                found.append(mapping)
            before = mapping
        return found

    def _is_known(self, address: int) -> bool:
        return self._view.contains(address) or self._image.module_at(address) is not None

    def _read(self, mappings: Iterable[Mapping], most: int | None) -> Iterator[tuple[int, Array]]:
        """Yield what some mappings hold; pages that were never touched hold nothing."""
        left = most
        with self._image.target.pages() as pages:
            for mapping in mappings:
                known = left is None or self._is_known(mapping.start)
                for start, end in pages.of(mapping):
                    size = end - start if known or left is None else min(end - start, left)
                    try:
                        data = self._memory.read_available(start, size)
                    except PatcherError:
                        continue  # unmapped meanwhile, or of a device
                    left = left if known or left is None else left - len(data)
                    yield start, np.frombuffer(data, np.uint64, len(data) // 8)

    def is_cell(self, address: int) -> bool:
        """Tell whether a word is there for code to go through it, and for nothing else."""
        if self._view.contains(address):
            return not any(start <= address < end for start, end in self._data)
        module = self._image.module_at(address)
        if module is None:
            return False
        known = module.module.cells.get(address - module.bias)
        if known is not None and known.type == R.GLOB_DAT:
            return True
        return bool(module.module.offset_tables) and module.in_offset_table(address)

    @cached_property
    def _data(self) -> tuple[Range, ...]:
        placed = self._view.journal.placed
        return tuple((p.address, p.address + p.size) for p in placed if p.kind not in ("code", FORMER))

    def variable_at(self, at: int) -> str:
        """Return the variable or constant that a word is part of, in quotes; "" where there is none."""
        if self._view.contains(at):
            data = (p for p in self._view.journal.placed if p.kind not in ("code", FORMER))
            name = next((p.name for p in data if p.address <= at < p.address + p.size), "")
        else:
            module = self._image.module_at(at)
            symbol = module.module.symbols.covering(at - module.bias) if module is not None else None
            name = symbol.name if symbol is not None else ""
        return f"`{base_name(name)}`" if name else ""


def displacements(text: bytes, address: int, ranges: Sequence[Range]) -> Iterator[tuple[int, int]]:
    """Yield the offsets where a displacement from RIP may stand that leads to one of some ranges, and to which.

    The byte before says that it is one (ModRM: mod 0, r/m 5; no SIB). It may be parts of two other fields all the
    same, and an immediate behind it moves what it counts from.
    """
    low, high = min(r[0] for r in ranges) - address - max(_IMMEDIATES), max(r[1] for r in ranges) - address
    for shift in range(4):
        count = (len(text) - shift) // 4
        if count <= 0:
            continue
        values = np.frombuffer(text, "<i4", count, shift)
        pointed = values + np.arange(shift + 4, shift + 4 + 4 * count, 4, dtype=np.int64)
        near = np.flatnonzero((pointed >= low) & (pointed < high))
        for k, to in zip(near.tolist(), (pointed[near] + address).tolist(), strict=True):
            at = 4 * k + shift
            if at and text[at - 1] & 0xC7 == 0x05:
                for i, (first, end) in enumerate(ranges):
                    if any(first <= to + behind < end for behind in _IMMEDIATES):
                        yield at, i


def numbers(text: bytes, ranges: Sequence[Range], *, absolute: bool = True) -> Iterator[tuple[int, int, int]]:
    """Yield the offsets of fields of four bytes (where `absolute`) or eight in one of some ranges: width, which one."""
    for at, i in _held(text, "<u4", range(4), ranges) if absolute else ():
        yield at, 4, i
    for at, i in _held(text, "<u8", range(8), ranges):
        yield at, 8, i


def _held(text: bytes, kind: str, shifts: Iterable[int], ranges: Sequence[Range]) -> Iterator[tuple[int, int]]:
    """Yield the offsets, aligned or not, where a number stands that is in one of some ranges, and in which."""
    form = np.dtype(kind)
    limits = np.iinfo(form)
    low, high = min(r[0] for r in ranges), max(r[1] for r in ranges) - 1
    if low > limits.max or high < limits.min:
        return
    least, largest = form.type(max(low, limits.min)), form.type(min(high, limits.max))
    for shift in shifts:
        count = (len(text) - shift) // form.itemsize
        if count <= 0:
            continue
        values = np.frombuffer(text, form, count, shift)
        for k in np.flatnonzero((values >= least) & (values <= largest)).tolist():
            value = int(values[k])
            yield from ((form.itemsize * k + shift, i) for i, (a, b) in enumerate(ranges) if a <= value < b)


def _file(module: LoadedModule, group: int) -> str:
    name = module.module.symbols.group_name(group) if group >= 0 else ""
    return f" of {name}" if name else f" of {module.name}"
