"""Which live variables have another initialiser in a unit's new source, and which of them the user wants written.

A variable's value is the program's: a changed initialiser is told, once, and written only where the user names the
variable. What it was before: the value that was last written, if a patch brought the variable or wrote one; else
what the module's file holds for it, zero beyond that (.bss), with the dynamic relocations applied. The two are
compared by meaning: a pointer by what it leads to, never by the address.

Of a thread-local each thread has its own value: what threads start with is compared, and one that is wanted is written
in every thread and in what threads to come start with. A number stands for its address (`live.thread_number`).

One that gets new storage because its layout changed starts there with the new value if it is wanted, and nothing is
carried over; a revert goes back to the old storage, and to the value in it.

Specification: System V ABI, chapter 5 (program header, dynamic linking); AMD64 supplement, table 4.10.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from patcher.blocks import Block, Kind, Place
from patcher.data.meaning import digest, shown, shown_bytes, shown_pointer
from patcher.data.migrate import plain_name
from patcher.data.names import spelling
from patcher.data.outcome import Datum, Fate
from patcher.elf.relocations import R
from patcher.errors import PatcherError, UnsafeChange
from patcher.image import LoadedModule
from patcher.lines import NONE as NO_LINES
from patcher.live import base_name, numbered, thread_place
from patcher.match import Matcher
from patcher.part import Part
from patcher.patch.journal import Initial, Journal

AddressOf = Callable[[Part, Block], "int | None"]
Told = dict[int, tuple[str, str]]  # by address: the unit's source, and the initial value that was told of
_CARRIED = "carried over"  # for a digest
_WORDS = (R.A64, R.GLOB_DAT, R.JUMP_SLOT)


@dataclass(frozen=True, slots=True, eq=False)
class Changed:
    """A live variable whose initialiser is another one than what it was given: what that is, and was, in few words."""

    part: Part
    block: Block
    address: int
    old: str
    new: str

    @property
    def name(self) -> str:
        return full_name(self.part, self.block)

    @property
    def note(self) -> str:
        return f"{self.old} -> {self.new}" if self.old and self.new and self.old != self.new else ""

    def datum(self, fate: Fate) -> Datum:
        return Datum(self.name, self.part.source, fate, self.note)

    def as_record(self, *, written: bool) -> Initial:
        return Initial(self.address, digest(self.part.blocks, self.block), self.new, written)


def first_value(part: Part, block: Block, address: int) -> tuple[Initial, ...]:
    """Return the record of the value that a new variable gets."""
    return (Initial(address, digest(part.blocks, block), shown(part.blocks, block), True),)


def carried_value(part: Part, block: Block, address: int) -> tuple[Initial, ...]:
    """Return the records of a variable with new storage and the value that it had: it never had the initial one."""
    (first,) = first_value(part, block, address)
    return replace(first, digest=_CARRIED), replace(first, written=False)


def initially_same(part: Part, block: Block, address: int) -> bool | None:
    """Tell whether a live variable began with the value that the source has for it now, or was told to have had it.

    None where it is not known what it began with.
    """
    journal = part.unit.view.journal
    known = [found[address] for written in (True, False) if address in (found := journal.initials(written=written))]
    if any(i.digest == digest(part.blocks, block) for i in known):
        return True
    if any(i.written for i in known):
        return False
    home = _home(part, block, address)
    if home is None:
        return None
    return not any(True for _ in _other_than_at_first(part, [_Live(block, address, *home)]))


class Initials:
    """What a user wants of changed initialisers in a session, and was told of them.

    `wanted`: the variables to write, as `name`, `function.name` for a static of a function, each with `file.c:`
    before it where several units have one. `strict`: it is an error when there is nothing to write for a name;
    `every`: all that changed are wanted. `told`: what the user was told before, by address; grows.
    """

    def __init__(
        self,
        wanted: Sequence[str] = (),
        told: Told | None = None,
        *,
        strict: bool = False,
        every: bool = False,
    ) -> None:
        self.wanted = tuple(wanted)
        self._strict = strict
        self._every = every
        self._told = {} if told is None else told

    def changed(self, part: Part, address_of: AddressOf, journal: Journal) -> tuple[Changed, ...]:
        """Return the live variables of a part whose initialiser is not what they were given."""
        found = tuple(_changed(part, address_of, journal))
        addresses = {c.address for c in found}
        for address, (source, _) in self._told.items():
            if source == part.source and address not in addresses:
                self._told[address] = source, _NOTHING  # it is as it was: to change it again is news
        return found

    def is_wanted(self, changed: Changed) -> bool:
        return self._every or self.names(changed.part, changed.block)

    def names(self, part: Part, block: Block) -> bool:
        """Tell whether a variable is among those that are wanted."""
        return any(_is_called(part, block, name) for name in self.wanted)

    def is_news(self, changed: Changed, journal: Journal) -> bool:
        """Tell whether a changed initialiser was not told of before."""
        found = digest(changed.part.blocks, changed.block)
        _, told = self._told.get(changed.address, ("", ""))
        return told != _told(found) if told else not _is_recorded(changed, found, journal)

    def to_record(self, changed: Sequence[Changed], journal: Journal) -> list[Initial]:
        """Return the records by which a later session knows what the user was told."""
        found = [c.as_record(written=False) for c in changed]
        return [r for c, r in zip(changed, found, strict=True) if not _is_recorded(c, r.digest, journal)]

    def news(self, changed: Sequence[Changed], journal: Journal) -> list[Changed]:
        return [c for c in changed if self.is_news(c, journal)]

    def remember(self, told: Sequence[Changed]) -> None:
        """Take note of what the user was told."""
        self._told |= {c.address: (c.part.source, _told(digest(c.part.blocks, c.block))) for c in told}

    def check(
        self,
        parts: Sequence[Part],
        address_of: AddressOf,
        changed: Sequence[Changed],
        renewed: Collection[Block] = (),
    ) -> None:
        """Raise `UnsafeChange` for a wanted name that is no variable, or several, or has nothing new to be written.

        `renewed` are the variables that get new storage.
        """
        for name in self.wanted:
            found = [(p, b) for p in parts for b in p.blocks.data_blocks() if _is_called(p, b, name)]
            written = [(c.part, c.block) for c in changed if _is_called(c.part, c.block, name)]
            written += [(p, b) for p, b in found if b in renewed]
            for part, block in found:
                _check_kind(part, block)
            if len(written) > 1:
                raise _several(name, written)
            if self._strict and not written:
                raise _nothing(name, parts, found, address_of)


_NOTHING = "nothing"


def _is_recorded(changed: Changed, found: str, journal: Journal) -> bool:
    record = journal.initials(written=False).get(changed.address)
    return record is not None and record.digest == found


def _told(found: str) -> str:
    return f"={found}"


def _check_kind(part: Part, block: Block) -> None:
    if block.kind in (Kind.DATA, Kind.THREAD_LOCAL):
        return
    raise UnsafeChange(
        f"`{base_name(block.name)}` of {part.source} is a constant, and cannot be initialised again",
        "leave out --reinit for it",
        code="reinit",
    )


def _several(name: str, found: Sequence[tuple[Part, Block]]) -> UnsafeChange:
    places = ", ".join(f"`{Path(part.source).name}:{full_name(part, block)}`" for part, block in found)
    return UnsafeChange(f"--reinit {name} may mean {places}", "give one of these", code="reinit")


def _nothing(
    name: str, parts: Sequence[Part], found: Sequence[tuple[Part, Block]], address_of: AddressOf
) -> UnsafeChange:
    sources = ", ".join(dict.fromkeys(p.source for p in parts))
    if not found:
        return UnsafeChange(f"--reinit {name}: {sources} has no such variable", "check the name", code="reinit")
    if all(address_of(part, block) is None for part, block in found):
        return UnsafeChange(
            f"--reinit {name}: it is new in {sources}, and gets its initial value anyway",
            "leave out --reinit for it",
            code="reinit",
        )
    return UnsafeChange(
        f"--reinit {name}: its initial value in {sources} is the one that it was given", "", code="reinit"
    )


# --- names ----------------------------------------------------------------------------------------------------


def _is_called(part: Part, block: Block, wanted: str) -> bool:
    """Tell whether a variable is what a user calls `wanted`."""
    file, colon, name = wanted.rpartition(":")
    if colon and file != Path(part.source).name and not part.source.endswith("/" + file) and file != part.source:
        return False
    if any(name in (s.name, base_name(s.name)) for s in block.symbols):
        return True
    if not spelling(block.name).guard and name == source_name(block.name):
        return True
    if base_name(block.name).rpartition(".")[2] != name.rpartition(".")[2]:
        return False
    return name in (base_name(block.name).rpartition(".")[2], full_name(part, block))


def source_name(symbol: str) -> str:
    """Return what the source calls a variable, as far as its symbol says; of clang, `function.name` as it is."""
    said = spelling(symbol)
    return said.source if symbol.startswith("_ZZ") else plain_name(base_name(symbol))


def full_name(part: Part, block: Block) -> str:
    """Return `function.name` for a static of a function, which gcc calls `name.N` and clang `function.name`."""
    name = source_name(block.name)
    if "." in name or not numbered(block.name):
        return name
    users = (f for f in part.blocks.functions if _uses(part, f, block))
    function = next(users, None)
    return f"{base_name(function.name).partition('.')[0]}.{name}" if function is not None else name


def _uses(part: Part, function: Block, variable: Block) -> bool:
    targets = (r.target for r in part.blocks.references(function))
    return any(isinstance(t, Place) and t.block is variable for t in targets)


# --- what is other than it was --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Live:
    """A variable of a unit that a module has, and the address where the module's file has its initial value."""

    block: Block
    address: int
    module: LoadedModule
    place: int


def _changed(part: Part, address_of: AddressOf, journal: Journal) -> Iterator[Changed]:
    written = journal.initials(written=True)
    variables: list[_Live] = []
    for block in part.blocks.data_blocks():
        address = address_of(part, block) if block.kind in (Kind.DATA, Kind.THREAD_LOCAL) and block.size else None
        if address is None:
            continue
        known = written.get(address)
        if known is None:
            if block.kind is Kind.THREAD_LOCAL:
                yield from _other_in_threads(part, block, address)
            elif (home := _home(part, block, address)) is not None:
                variables.append(_Live(block, address, *home))
        elif known.digest != digest(part.blocks, block):
            yield Changed(part, block, address, known.shown, shown(part.blocks, block))
    yield from _other_than_at_first(part, variables)


def _other_than_at_first(part: Part, variables: Sequence[_Live]) -> Iterator[Changed]:
    matcher = Matcher(part.blocks, part.unit, NO_LINES, part.delta.stamps)
    first = FirstContents()
    for variable, relocated in zip(variables, _relocated(variables), strict=True):
        block = variable.block
        contents = first.of(variable.module, variable.place, block.size)
        if contents is None:
            continue
        if not relocated and (block.data or bytes(block.size)) == contents and not part.blocks.relocations(block):
            continue  # nearly all
        if relocated:
            contents = first.relocated(part, variable.module, variable.place, contents)
        if not matcher.holds(block, variable.place, contents):
            yield Changed(part, block, variable.address, _old(part, block, contents), shown(part.blocks, block))


def _other_in_threads(part: Part, block: Block, number: int) -> Iterator[Changed]:
    """Yield a thread-local of a module's own that its image has another initial value for."""
    storage, place = part.module.module.thread_storage, thread_place(number)
    if storage is None or place is None or place[1] != part.unit.image.thread_module(part.module):
        return
    start, left = part.module.bias + storage.address + place[0], max(0, storage.file_size - place[0])
    first, known = FirstContents(), min(left, block.size)
    contents = first.of(part.module, start, known) if known else b""
    if contents is None:
        return
    contents = first.relocated(part, part.module, start, contents).ljust(block.size, b"\0")
    if not Matcher(part.blocks, part.unit, NO_LINES, part.delta.stamps).holds(block, start, contents):
        yield Changed(part, block, number, _old(part, block, contents), shown(part.blocks, block))


def _relocated(variables: Sequence[_Live]) -> list[bool]:
    """Tell for each variable whether the dynamic linker has put something into it."""
    found = [False] * len(variables)
    for module in dict.fromkeys(v.module for v in variables):
        rows = [i for i, v in enumerate(variables) if v.module is module]
        low = np.array([variables[i].place - module.bias for i in rows], np.uint64)
        size = np.array([variables[i].block.size for i in rows], np.uint64)
        for i, is_relocated in zip(rows, module.module.cells.any_between(low, low + size).tolist(), strict=True):
            found[i] = is_relocated
    return found


def _home(part: Part, block: Block, address: int) -> tuple[LoadedModule, int] | None:
    """Return the module whose file has a variable's initial value, and the address that it has there."""
    module = part.module
    if module.contains(address):
        return module, address
    for symbol in block.symbols:  # a library's own variable, of which the executable has a copy
        definition = part.unit.image.exported(module, symbol.name) if not symbol.local else None
        if definition is not None:
            return module, definition.address
    return None


def _old(part: Part, block: Block, contents: bytes) -> str:
    references = part.blocks.references(block)
    target = references[0].target if len(references) == 1 and block.size == 8 else None
    if isinstance(target, Place):
        return shown_pointer(part.unit, int.from_bytes(contents, "little"), target.block)
    return shown_bytes(contents) if not references else ""


class FirstContents:
    """What modules' variables held when they were loaded."""

    def __init__(self) -> None:
        self._files: dict[LoadedModule, mmap.mmap | None] = {}

    def of(self, module: LoadedModule, address: int, size: int) -> bytes | None:
        """Return what a module's file has for `size` bytes at a live address, None when it has no say."""
        link = address - module.bias
        segment = next((s for s in module.module.segments if s.address <= link and link + size <= s.end), None)
        file = self._file(module)
        if segment is None or file is None:
            return None
        start = segment.offset + link - segment.address
        found = file[start : max(start, min(start + size, segment.offset + segment.file_size))]
        return found.ljust(size, b"\0")

    def relocated(self, part: Part, module: LoadedModule, address: int, found: bytes) -> bytes:
        """Return what the dynamic linker made of a part of a module's file."""
        link, contents = address - module.bias, bytearray(found)
        for cell in module.module.cells.between(link, link + len(contents)):
            self._relocate(part, module, contents, cell, cell - link)
        return bytes(contents)

    def _file(self, module: LoadedModule) -> mmap.mmap | None:
        if module not in self._files:
            try:
                with module.file.open("rb") as file:
                    self._files[module] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError):
                self._files[module] = None
        return self._files[module]

    def _relocate(self, part: Part, module: LoadedModule, contents: bytearray, cell: int, offset: int) -> None:
        if offset + 8 > len(contents):
            return
        relocation = module.module.cells[cell]
        image = part.unit.image
        if relocation.type == R.RELATIVE:  # the packed form keeps the addend in place
            value = (relocation.addend or int.from_bytes(contents[offset : offset + 8], "little")) + module.bias
        elif relocation.type in _WORDS and relocation.name:
            value = _denoted(part, module, relocation.name)
            value += relocation.addend if value and relocation.type == R.A64 else 0
        else:
            value = image.target.memory.read_u64(cell + module.bias)
        contents[offset : offset + 8] = (value % (1 << 64)).to_bytes(8, "little")


def _denoted(part: Part, module: LoadedModule, name: str) -> int:
    try:
        found = part.unit.image.search(name, module, weak=True)
    except PatcherError:
        found = None
    return found.address if found is not None else 0
