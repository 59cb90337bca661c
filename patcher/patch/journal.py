"""What patcher has done to a process, as records, and their form in the target's memory.

The journal lives inside the target, so that any later controller can list, undo and go on. It is a
sequence of records, each a frame (length, CRC-32) around zlib-compressed JSON; a record is complete or,
by its checksum, absent. To become shorter, it is written anew into the other half of its area. Which
generation is live is not in a record but in the arena's first slot, which flips in the same write as
the functions do.

What is read here was in the memory of another process: lengths are bounded, checksums checked,
fields converted one by one, and nothing is evaluated.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from patcher.errors import UnsafeChange

_FRAME = struct.Struct("<II")
_MAX_TEXT = 64 << 20  # of all records together, unpacked

FORMER = "former code"
"""The kind of code that no generation enters any more, and that a thread may still be in."""


@dataclass(frozen=True, slots=True)
class Redirect:
    """A function with an island. `original` is its address for life: its entry, or its island if born in a patch."""

    name: str
    names: tuple[str, ...]
    module: str
    unit: str
    local: bool
    original: int
    size: int
    arena: int
    index: int
    copy: int  # the displaced copy, which is the old body; 0 for a function born in a patch
    entry: str  # hex of the bytes the detour replaces; "" for a function born in a patch
    cells: tuple[tuple[int, int, int], ...] = ()  # GOT cells: address, original value, island
    pieces: tuple[tuple[int, int], ...] = ()  # extents of what the compiler split off the original
    copied: int = 0  # the copy's length; 0 in the records of older versions

    @property
    def born(self) -> bool:
        return not self.entry


@dataclass(frozen=True, slots=True)
class Placed:
    """A block that stands in an arena. For code: a body; for data: storage that lives as long as the process.

    `type` and `scope` are what debug information says of a variable's layout and of the function that it is in.
    `depth` says within how many blocks of it, and `order` as which of the variables of one name there; -1 if unknown.
    `moved`: storage that was there before, which is a variable's under this name from then on.
    """

    name: str
    names: tuple[str, ...]
    kind: str
    module: str
    unit: str
    local: bool
    address: int
    size: int
    type: str = ""  # these are not in the records of older versions
    scope: str = ""
    moved: bool = False
    depth: int = -1
    order: int = -1


@dataclass(frozen=True, slots=True)
class Body:
    """The extent of a function's code, for messages with its name."""

    name: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Allocation:
    """How many bytes of the arenas one object took, gaps for alignment included."""

    object: str
    text: int = 0
    read_only: int = 0
    data: int = 0
    cells: int = 0
    islands: int = 0  # with their slots, the entries that they displaced, and jumps to what is far away

    def plus(self, **more: int) -> Allocation:
        return replace(self, **{kind: getattr(self, kind) + size for kind, size in more.items()})

    @property
    def total(self) -> int:
        return self.text + self.read_only + self.data + self.cells + self.islands


@dataclass(frozen=True, slots=True)
class Initial:
    """An initial value that a variable has got since (`written`), or that the user was told it did not get."""

    address: int
    digest: str
    shown: str  # short, for people; "" where it is not
    written: bool


@dataclass(frozen=True, slots=True)
class Rewrite:
    """A constant that is changed where it stands: hex of what it was in the parent generation, and of what it is."""

    address: int
    old: str
    new: str
    module: str = ""  # not in the records of older versions


@dataclass(frozen=True, slots=True)
class Storage:
    """Storage that a variable got anew because its layout changed, and what it was filled from.

    `layout` is the new layout as JSON ("" when it is not known), `types` names the structures in it, `by` says what
    filled it. The storage belongs to the generations that follow: one that does not go on from there has the old.
    """

    name: str
    names: tuple[str, ...]
    module: str
    unit: str
    local: bool
    address: int
    size: int
    old: int
    old_size: int
    types: tuple[str, ...]
    layout: str
    by: str


@dataclass(frozen=True, slots=True)
class Stretch:
    """Memory of code, or of read-only data, that a generation got in an arena; it is freed as a whole.

    `uses`: what its contents refer to in other stretches; `taken`: what each object got of it. `searched`: a search for
    references to it, when no generation needed it any more, has found some.
    """

    generation: int
    start: int
    end: int
    uses: tuple[int, ...] = ()
    taken: tuple[Allocation, ...] = ()
    searched: bool = False

    def __contains__(self, address: int) -> bool:
        return self.start <= address < self.end


@dataclass(frozen=True, slots=True)
class Instance:
    """A module as it was when a generation was made: its path, an address in it, the number of its file and when that
    was written (0: not known)."""

    path: str
    address: int
    inode: int
    written: int


@dataclass(frozen=True, slots=True)
class GenerationRecord:
    """One generation: who its parent is, what it placed and where each function it changed now goes."""

    number: int
    parent: int
    time: float
    files: tuple[str, ...]
    bodies: tuple[tuple[int, int, int], ...]  # arena, slot index, body
    statuses: tuple[tuple[str, str, str], ...]  # function, module, "changed" or "added"
    placed: tuple[Placed, ...]
    redirects: tuple[Redirect, ...]  # the functions that got their island with this generation
    quiet: tuple[Body, ...] = ()  # bodies without a frame when it went live
    quiet_back: tuple[Body, ...] = ()  # bodies that must have no frame when it is taken back
    allocations: tuple[Allocation, ...] = ()  # this, and what follows, is not in the records of older versions
    chosen: tuple[tuple[str, int, int], ...] = ()  # IFUNCs that were asked: module, resolver, implementation
    initials: tuple[Initial, ...] = ()
    rewrites: tuple[Rewrite, ...] = ()
    storages: tuple[Storage, ...] = ()
    stretches: tuple[Stretch, ...] = ()
    merged: tuple[tuple[int, int], ...] = ()  # first and last numbers of forgotten generations that are part of it
    holes: tuple[tuple[int, int], ...] = ()  # memory that was free when the journal was written anew
    instances: tuple[Instance, ...] = ()  # of the modules that it changed
    departed: tuple[str, ...] = ()  # modules that were unloaded since: what is recorded of them before is void


@dataclass(frozen=True, slots=True)
class Numbers:
    """Numbers of generations: some, and all of some ranges."""

    single: frozenset[int]
    ranges: tuple[tuple[int, int], ...]

    def __contains__(self, number: object) -> bool:
        return number in self.single or any(a <= number <= b for a, b in self.ranges if isinstance(number, int))

    def are_among(self, known: Collection[int]) -> bool:
        """Tell whether every one of them is among some."""
        every = (*self.single, *(n for a, b in self.ranges for n in range(a, b + 1)))
        return all(n in known for n in every)


@dataclass
class Journal:
    """Every record of one process, and the look-ups that the records give."""

    generations: dict[int, GenerationRecord] = field(default_factory=dict)
    frames: dict[int, bytes] = field(default_factory=dict)  # the records as they stand in the target's memory

    def add(self, record: GenerationRecord, frame: bytes = b"") -> None:
        self.generations[record.number] = record
        self.frames[record.number] = frame

    def frame(self, record: GenerationRecord) -> bytes:
        """Return a record as it is to stand in the target's memory."""
        known = self.generations.get(record.number)
        return self.frames[record.number] if known == record and self.frames[record.number] else encode(record)

    @property
    def next_number(self) -> int:
        return max(self.generations, default=0) + 1

    @property
    def redirects(self) -> list[Redirect]:
        return [r for g in self.generations.values() for r in g.redirects]

    @property
    def allocations(self) -> list[Allocation]:
        """What each object took, in all generations together."""
        found: dict[str, Allocation] = {}
        for taken in (a for g in self.generations.values() for a in g.allocations):
            sizes = asdict(taken)
            name = sizes.pop("object")
            found[name] = found.get(name, Allocation(name)).plus(**sizes)
        return list(found.values())

    @property
    def chosen(self) -> dict[tuple[str, int], int]:
        """What resolvers of IFUNCs answered: by module and resolver."""
        return {(m, resolver): found for g in self.generations.values() for m, resolver, found in g.chosen}

    @property
    def placed(self) -> list[Placed]:
        return [p for g in self.generations.values() for p in g.placed]

    def lineage(self, number: int) -> list[GenerationRecord]:
        """Return the generations that lead to `number`, oldest first; none for 0.

        Raises `UnsafeChange` when a record is missing.
        """
        found: list[GenerationRecord] = []
        while number:
            record = self.generations.get(number)
            if record is None or len(found) > len(self.generations):
                raise UnsafeChange(
                    f"generation {number} is not recorded in the process",
                    "`patcher status PID` lists what can be reverted to",
                    code="no-such-generation",
                )
            found.append(record)
            number = record.parent
        return found[::-1]

    def numbers_to(self, number: int) -> Numbers:
        """Return the generations that lead to `number`, forgotten ones included."""
        records = self.lineage(number)
        return Numbers(frozenset(g.number for g in records), tuple(r for g in records for r in g.merged))

    def before(self, number: int) -> int:
        """Return the generation before a recorded one, which may be forgotten; 0 when it is the first."""
        record = self.lineage(number)[-1]
        return record.merged[-1][1] if record.merged else record.parent

    def is_forgotten(self, number: int) -> bool:
        """Tell whether a generation has become a part of a later one."""
        return any(number in Numbers(frozenset(), g.merged) for g in self.generations.values())

    @property
    def free(self) -> list[tuple[int, int]]:
        """The memory that was freed and is not in use again: starts and ends, rising."""
        holes = sorted(hole for g in self.generations.values() for hole in g.holes)
        taken = sorted((s.start, s.end) for g in self.generations.values() for s in g.stretches) if holes else []
        return without(_joined(holes), taken)

    def initials(self, *, written: bool) -> dict[int, Initial]:
        """Return the last initial value that each variable got, or (not `written`) that was told of, by address."""
        # What a variable was given it keeps, whichever generation is live.
        return {i.address: i for g in self.generations.values() for i in g.initials if i.written == written}

    def rewrites_at(self, number: int) -> dict[int, bytes]:
        """Return what stands at each address with a rewritten constant while generation `number` is live."""
        found: dict[int, bytes] = {}
        for record in self.generations.values():
            for rewrite in record.rewrites:
                found.setdefault(rewrite.address, bytes.fromhex(rewrite.old))
        for record in self.lineage(number):
            for rewrite in record.rewrites:
                found[rewrite.address] = bytes.fromhex(rewrite.new)
        return found

    def bodies_at(self, number: int) -> dict[tuple[int, int], int]:
        """Return (arena, slot index) -> body address for every function that generation `number` has changed."""
        bodies: dict[tuple[int, int], int] = {}
        for record in self.lineage(number):
            for arena, index, body in record.bodies:
                bodies[arena, index] = body
        return bodies

    def storages_at(self, number: int) -> tuple[Storage, ...]:
        """Return where generation `number` has the variables whose layout has changed since the start."""
        if not any(g.storages for g in self.generations.values()):
            return ()
        found = {}
        for record in self.lineage(number):
            for s in record.storages:
                found[s.module, s.unit if s.local else "", s.name] = s
        return tuple(found.values())

    def outdated_at(self, number: int) -> frozenset[int]:
        """Return the addresses of storage that belongs to other generations than `number`."""
        every = {s.address for g in self.generations.values() for s in g.storages}
        return frozenset(every - {s.address for s in self.storages_at(number)})


def _joined(holes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join rising ranges that touch."""
    found: list[tuple[int, int]] = []
    for start, end in holes:
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((start, end))
    return found


def without(holes: Sequence[tuple[int, int]], taken: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return what is left of some ranges without others; both rise."""
    found = []
    for hole_start, end in holes:
        start = hole_start
        for low, high in taken:
            if low < end and high > start:
                if low > start:
                    found.append((start, low))
                start = max(start, high)
        if start < end:
            found.append((start, end))
    return found


@dataclass(frozen=True, slots=True)
class ArenaView:
    """What earlier generations made: the records, the current slot values and where islands stand."""

    journal: Journal
    bodies: Mapping[tuple[int, int], int]  # (arena, slot index) -> body that the slot points at now
    islands: Mapping[int, tuple[int, int]]  # island address -> (arena, slot index)
    ranges: tuple[tuple[int, int], ...] = ()  # the arenas' extents
    generation: int = 0  # that is live
    constants: tuple[tuple[int, int], ...] = ()  # the extents of the arenas' constants and cells

    def contains(self, address: int) -> bool:
        return any(start <= address < end for start, end in self.ranges)


def encode(record: GenerationRecord) -> bytes:
    """Return a record as it stands in the target's memory."""
    body = zlib.compress(json.dumps(asdict(record), separators=(",", ":")).encode("utf-8"), 1)
    return _FRAME.pack(len(body), zlib.crc32(body)) + body


def decode(data: bytes) -> Journal:
    """Read back every record of a journal area. Raises `UnsafeChange` when one is damaged."""
    journal, position, room = Journal(), 0, _MAX_TEXT
    while position + _FRAME.size <= len(data):
        size, checksum = _FRAME.unpack_from(data, position)
        if size == 0:
            break
        position += _FRAME.size
        body = data[position : position + size]
        if len(body) != size or zlib.crc32(body) != checksum:
            raise damaged(f"at byte {position}")
        text = _unpack(body, room)
        room -= len(text)
        position += size
        journal.add(_parse(text), data[position - size - _FRAME.size : position])
    return journal


def damaged(how: str) -> UnsafeChange:
    """Return the error for a journal that nobody can go on from."""
    return UnsafeChange(
        f"the journal in the process is damaged: {how}",
        "restart the program; its memory was overwritten",
        code="damaged-journal",
    )


def _unpack(body: bytes, room: int) -> bytes:
    unpacker = zlib.decompressobj()
    try:
        text = unpacker.decompress(body, room + 1)
    except zlib.error as error:
        raise damaged(f"a record cannot be unpacked ({error})") from None
    if not unpacker.eof or len(text) > room:
        raise damaged("a record goes on for too long")
    return text


def _parse(text: bytes) -> GenerationRecord:
    try:
        return _record(json.loads(text))
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise damaged(f"a record cannot be read ({type(error).__name__}: {error})") from None


def _record(raw: dict[str, Any]) -> GenerationRecord:
    return GenerationRecord(
        number=_number(raw["number"]),
        parent=_number(raw["parent"]),
        time=float(raw["time"]),
        files=_strings(raw["files"]),
        bodies=tuple((_number(a), _number(b), _number(c)) for a, b, c in raw["bodies"]),
        statuses=tuple((str(a), str(b), str(c)) for a, b, c in raw["statuses"]),
        placed=tuple(_placed(p) for p in raw["placed"]),
        redirects=tuple(_redirect(r) for r in raw["redirects"]),
        quiet=_bodies(raw["quiet"]),
        quiet_back=_bodies(raw["quiet_back"]),
        allocations=tuple(_allocation(a) for a in raw.get("allocations", ())),
        chosen=tuple((str(m), _number(a), _number(b)) for m, a, b in raw.get("chosen", ())),
        initials=tuple(_initial(i) for i in raw.get("initials", ())),
        rewrites=tuple(_rewrite(r) for r in raw.get("rewrites", ())),
        storages=tuple(_storage(s) for s in raw.get("storages", ())),
        stretches=tuple(_stretch(s) for s in raw.get("stretches", ())),
        merged=tuple((_number(a), _number(b)) for a, b in raw.get("merged", ())),
        holes=tuple((_number(a), _number(b)) for a, b in raw.get("holes", ())),
        instances=tuple(_instance(i) for i in raw.get("instances", ())),
        departed=_strings(raw.get("departed", [])),
    )


def _number(raw: Any) -> int:
    if type(raw) is not int or not 0 <= raw < 1 << 64:
        raise ValueError(f"{str(raw)[:40]} is no address, size or count")
    return raw


def _strings(raw: Any) -> tuple[str, ...]:
    if not isinstance(raw, list):
        raise TypeError("no list of names")
    return tuple(str(s) for s in raw)


def _cells(raw: Any) -> tuple[tuple[int, int, int], ...]:
    return tuple((_number(a), _number(b), _number(c)) for a, b, c in raw)


def _bodies(raw: Any) -> tuple[Body, ...]:
    return tuple(Body(str(b["name"]), _number(b["start"]), _number(b["end"])) for b in raw)


def _allocation(raw: dict[str, Any]) -> Allocation:
    kinds = ("text", "read_only", "data", "cells", "islands")
    return Allocation(str(raw["object"]), *(_number(raw[kind]) for kind in kinds))


def _initial(raw: dict[str, Any]) -> Initial:
    return Initial(_number(raw["address"]), str(raw["digest"]), str(raw["shown"]), bool(raw["written"]))


def _rewrite(raw: dict[str, Any]) -> Rewrite:
    old, new = (bytes.fromhex(raw[name]).hex() for name in ("old", "new"))
    return Rewrite(_number(raw["address"]), old, new, str(raw.get("module", "")))


def _placed(raw: dict[str, Any]) -> Placed:
    return Placed(
        str(raw["name"]),
        _strings(raw["names"]),
        str(raw["kind"]),
        str(raw["module"]),
        str(raw["unit"]),
        bool(raw["local"]),
        _number(raw["address"]),
        _number(raw["size"]),
        str(raw.get("type", "")),
        str(raw.get("scope", "")),
        bool(raw.get("moved", False)),
        *(int(raw.get(name, -1)) for name in ("depth", "order")),
    )


def _stretch(raw: dict[str, Any]) -> Stretch:
    return Stretch(
        _number(raw["generation"]),
        _number(raw["start"]),
        _number(raw["end"]),
        tuple(_number(a) for a in raw["uses"]),
        tuple(_allocation(a) for a in raw["taken"]),
        bool(raw["searched"]),
    )


def _storage(raw: dict[str, Any]) -> Storage:
    return Storage(
        str(raw["name"]),
        _strings(raw["names"]),
        str(raw["module"]),
        str(raw["unit"]),
        bool(raw["local"]),
        _number(raw["address"]),
        _number(raw["size"]),
        _number(raw["old"]),
        _number(raw["old_size"]),
        _strings(raw["types"]),
        str(raw["layout"]),
        str(raw["by"]),
    )


def _instance(raw: dict[str, Any]) -> Instance:
    return Instance(str(raw["path"]), _number(raw["address"]), _number(raw["inode"]), _number(raw["written"]))


def _redirect(raw: dict[str, Any]) -> Redirect:
    return Redirect(
        str(raw["name"]),
        _strings(raw["names"]),
        str(raw["module"]),
        str(raw["unit"]),
        bool(raw["local"]),
        _number(raw["original"]),
        _number(raw["size"]),
        _number(raw["arena"]),
        _number(raw["index"]),
        _number(raw["copy"]),
        bytes.fromhex(raw["entry"]).hex(),
        _cells(raw["cells"]),
        tuple((_number(start), _number(end)) for start, end in raw.get("pieces", ())),
        _number(raw.get("copied", 0)),
    )
