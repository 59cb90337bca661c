"""DIRECTORY: what a program can read about its own generations, as `patcher.h` has it.

Decides which symbols a generation has, and how they are laid out for the program. A table is written once, before its
generation is live, and never changes: they form a chain from the newest back, and a reader takes the one whose number
is that of the live generation, which flips with the code. So nobody sees half a table, and a revert writes none.
When most of a chain is of generations that were forgotten, the next one begins a chain of its own, with the tables of
all that are recorded; the old chain is memory that nothing needs but who has an address in it (`patch.reclaim`).
Does not decide when anything is written (`patch.ledger`).

The layouts are those of `header/patcher.h`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from patcher.image import Image
from patcher.link.place import ArenaFull
from patcher.patch.arena import Arena, Usage
from patcher.patch.commit import Commit
from patcher.patch.journal import FORMER, GenerationRecord, Journal, Placed, Stretch, without
from patcher.patch.ledger import Ledger

STATE = "patcher_state"
MAGIC = int.from_bytes(b"patstate", "little")
VERSION = 1

_STATE = struct.Struct("<QIIQQ")  # magic, version, size, where the live number is, newest table
_LIVE, _NEWEST = 16, 24  # offsets in it
_TABLE = struct.Struct("<QQQQ")  # previous, generation, count, symbols
_FEW = 16  # tables of forgotten generations, in any case
_SYMBOL = struct.Struct("<QQQQ")  # name, file, address, size


@dataclass(frozen=True, slots=True)
class State:
    """A module's `patcher_state`, and what it holds now."""

    address: int
    live: int
    newest: int


@dataclass(frozen=True, slots=True)
class Entry:
    """A symbol of a generation."""

    name: str
    file: str
    address: int
    size: int


def published(image: Image, ledger: Ledger, change: Commit) -> Commit:
    """Return a change with the tables that the program is to find; the same when it has nowhere to look for them.

    Raises `ArenaFull` when there is no room for them.
    """
    states = _states(image, ledger, change)
    arena = ledger.primary
    if not states or arena is None or not change.record.bodies:
        return change
    known = {**ledger.journal.generations, change.record.number: change.record}
    newest = next((s.newest for s in states if s.newest), 0)
    if _outgrown(ledger, newest, known):
        newest = 0
    missing = [change.record.number] if newest else sorted(known)
    listed = [(number, entries(Journal(known), number)) for number in missing]
    tables, usage = _placed(ledger, change, arena, newest, listed)
    stretch = Stretch(change.record.number, tables.start, tables.end, (newest,) if newest else ())
    pointers = [(s.address + _NEWEST, tables.newest) for s in states]
    pointers += [(s.address + _LIVE, arena.slot(0)) for s in states if s.live != arena.slot(0)]
    return replace(
        change,
        record=replace(change.record, stretches=(*change.record.stretches, stretch)),
        writes=(*change.writes, (tables.start, bytes(tables.data))),
        usage=tuple({**dict(change.usage), arena.base: usage}.items()),
        published=tuple((address, value.to_bytes(8, "little")) for address, value in pointers),
    )


def _outgrown(ledger: Ledger, newest: int, known: Mapping[int, GenerationRecord]) -> bool:
    """Tell whether most tables are of generations that were forgotten, so that it is time for a new chain."""
    table, count, most = newest, 0, 2 * len(known) + _FEW
    while table and count < most:
        found = ledger.target.memory.read_available(table, _TABLE.size)
        if len(found) != _TABLE.size:
            return True
        table, count = _TABLE.unpack(found)[0], count + 1
    return count >= most


def _placed(
    ledger: Ledger, change: Commit, arena: Arena, newest: int, listed: Sequence[tuple[int, Sequence[Entry]]]
) -> tuple[_Tables, Usage]:
    """Return tables in memory that was freed, if there is enough, or behind what is in use, and what then is in use."""
    usage = dict(change.usage).get(arena.base, ledger.usages[arena.base])
    taken = sorted((s.start, s.end) for s in change.record.stretches)
    holes = without([h for h in ledger.journal.free if arena.has_used(*h, usage) and h[1] <= usage.read_only], taken)
    for start, end in sorted(holes, key=lambda hole: hole[1] - hole[0]):
        tables = _Tables(start, newest, listed)
        if tables.end <= end:
            return tables, usage
    tables = _Tables(usage.read_only, newest, listed)
    if tables.end > arena.code_start:
        raise ArenaFull(f"the arena at {arena.base:#x} has no room for the table of its symbols", "restart the program")
    return tables, replace(usage, read_only=tables.end)


def _states(image: Image, ledger: Ledger, change: Commit) -> list[State]:
    found = dict.fromkeys(_in_modules(image))
    found |= dict.fromkeys(p.address for p in ledger.journal.placed if p.kind == "data" and STATE in p.names)
    states = [s for address in found if (s := _read(image, address)) is not None]
    fresh = [p for p in change.record.placed if p.kind == "data" and STATE in p.names and p.size >= _STATE.size]
    return states + [State(p.address, 0, 0) for p in fresh]


def _in_modules(image: Image) -> Iterator[int]:
    for module in image.modules:
        named = [s.value for s in module.module.symbols.named(STATE) if not s.function]
        named += [s.value for s in module.module.exports.get(STATE, ()) if s.defined]
        yield from (value + module.bias for value in named)


def _read(image: Image, address: int) -> State | None:
    found = image.target.memory.read_available(address, _STATE.size)
    if len(found) != _STATE.size:
        return None
    magic, version, size, live, newest = _STATE.unpack(found)
    # Another variable of that name is the program's own affair; a later header only adds to the end.
    return State(address, live, newest) if magic == MAGIC and version == VERSION and size >= _STATE.size else None


def entries(journal: Journal, number: int) -> tuple[Entry, ...]:
    """Return the symbols that a generation has other than the program as it was started."""
    placed = {p.address: p for p in journal.placed}
    bodies = journal.bodies_at(number).values()
    found = [placed[body] for body in bodies if body in placed]
    named: dict[tuple[str, str, str], Placed] = {}
    for record in journal.lineage(number):
        named |= {(p.module, p.unit if p.local else "", p.name): p for p in _data_of(record)}
    return tuple(Entry(p.name, p.unit.partition("#")[0], p.address, p.size) for p in (*found, *named.values()))


def _data_of(record: GenerationRecord) -> Sequence[Placed]:
    return [p for p in record.placed if p.kind not in ("code", FORMER)]


class _Tables:
    """Tables, one behind another, from an address on."""

    def __init__(self, start: int, newest: int, listed: Sequence[tuple[int, Sequence[Entry]]]) -> None:
        self.start = start
        self._texts: dict[str, int] = {}
        self.data = bytearray()
        self.newest = newest
        for number, symbols in listed:
            self._add(number, symbols)

    @property
    def end(self) -> int:
        return self.start + len(self.data)

    def _add(self, number: int, symbols: Sequence[Entry]) -> None:
        texts: Mapping[str, int] = {t: self._text(t) for s in symbols for t in (s.name, s.file)}
        self.data += bytes(-self.end % 8)
        rows = self.end
        for s in symbols:
            self.data += _SYMBOL.pack(texts[s.name], texts[s.file], s.address, s.size)
        table = self.end
        self.data += _TABLE.pack(self.newest, number, len(symbols), rows)
        self.newest = table

    def _text(self, text: str) -> int:
        if text not in self._texts:
            self._texts[text] = self.end
            self.data += text.encode("utf-8", "surrogateescape") + b"\0"
        return self._texts[text]
