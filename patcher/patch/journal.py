"""What patcher has done to a process, as records, and their form in the target's memory.

The journal lives inside the target, so that any later controller can list, undo and go on. It is a
sequence of records, each a frame (length, CRC-32) around zlib-compressed JSON; a record is complete or,
by its checksum, absent. Which generation is live is not in a record but in the arena's first slot,
which flips in the same write as the functions do.

What is read here was in the memory of another process: lengths are bounded, checksums checked,
fields converted one by one, and nothing is evaluated.
"""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import asdict, dataclass, field
from typing import Any

from patcher.errors import UnsafeChange

_FRAME = struct.Struct("<II")
_MAX_RECORD = 64 << 20


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

    @property
    def born(self) -> bool:
        return not self.entry


@dataclass(frozen=True, slots=True)
class Placed:
    """A block that stands in an arena. For code: a body; for data: storage that lives as long as the process."""

    name: str
    names: tuple[str, ...]
    kind: str
    module: str
    unit: str
    local: bool
    address: int
    size: int


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
    used: tuple[tuple[int, int, int, int], ...]  # arena, and the ends of its r--, r-x and rw- regions in use
    cells: tuple[tuple[int, int, int], ...] = ()  # GOT cells set to an island: address, old, new


@dataclass
class Journal:
    """Every record of one process, and the look-ups that the records give."""

    generations: dict[int, GenerationRecord] = field(default_factory=dict)

    def add(self, record: GenerationRecord) -> None:
        self.generations[record.number] = record

    @property
    def next_number(self) -> int:
        return max(self.generations, default=0) + 1

    @property
    def redirects(self) -> list[Redirect]:
        return [r for g in self.generations.values() for r in g.redirects]

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

    def bodies_at(self, number: int) -> dict[tuple[int, int], int]:
        """Return (arena, slot index) -> body address for every function that generation `number` has changed."""
        bodies: dict[tuple[int, int], int] = {}
        for record in self.lineage(number):
            for arena, index, body in record.bodies:
                bodies[arena, index] = body
        return bodies


def encode(record: GenerationRecord) -> bytes:
    """Return a record as it stands in the target's memory."""
    body = zlib.compress(json.dumps(asdict(record), separators=(",", ":")).encode(), 1)
    return _FRAME.pack(len(body), zlib.crc32(body)) + body


def decode(data: bytes) -> Journal:
    """Read back every record of a journal area. Raises `UnsafeChange` when one is damaged."""
    journal, position = Journal(), 0
    while position + _FRAME.size <= len(data):
        size, checksum = _FRAME.unpack_from(data, position)
        if size == 0:
            break
        position += _FRAME.size
        body = data[position : position + size]
        if size > _MAX_RECORD or len(body) != size or zlib.crc32(body) != checksum:
            raise UnsafeChange(
                f"the journal in the process is damaged at byte {position}",
                "restart the program; its memory was overwritten",
                code="damaged-journal",
            )
        position += size
        journal.add(_parse(body))
    return journal


def _parse(body: bytes) -> GenerationRecord:
    try:
        unpacker = zlib.decompressobj()
        text = unpacker.decompress(body, _MAX_RECORD)
        return _record(json.loads(text))
    except (zlib.error, ValueError, KeyError, TypeError) as error:
        raise UnsafeChange(
            f"a record of the journal in the process cannot be read: {error}",
            "restart the program; its memory was overwritten",
            code="damaged-journal",
        ) from None


def _record(raw: dict[str, Any]) -> GenerationRecord:
    return GenerationRecord(
        number=int(raw["number"]),
        parent=int(raw["parent"]),
        time=float(raw["time"]),
        files=_strings(raw["files"]),
        bodies=tuple((int(a), int(b), int(c)) for a, b, c in raw["bodies"]),
        statuses=tuple((str(a), str(b), str(c)) for a, b, c in raw["statuses"]),
        placed=tuple(_placed(p) for p in raw["placed"]),
        redirects=tuple(_redirect(r) for r in raw["redirects"]),
        used=tuple((int(a), int(b), int(c), int(d)) for a, b, c, d in raw["used"]),
        cells=_cells(raw["cells"]),
    )


def _strings(raw: Any) -> tuple[str, ...]:
    return tuple(str(s) for s in raw)


def _cells(raw: Any) -> tuple[tuple[int, int, int], ...]:
    return tuple((int(a), int(b), int(c)) for a, b, c in raw)


def _placed(raw: dict[str, Any]) -> Placed:
    return Placed(
        str(raw["name"]),
        _strings(raw["names"]),
        str(raw["kind"]),
        str(raw["module"]),
        str(raw["unit"]),
        bool(raw["local"]),
        int(raw["address"]),
        int(raw["size"]),
    )


def _redirect(raw: dict[str, Any]) -> Redirect:
    return Redirect(
        str(raw["name"]),
        _strings(raw["names"]),
        str(raw["module"]),
        str(raw["unit"]),
        bool(raw["local"]),
        int(raw["original"]),
        int(raw["size"]),
        int(raw["arena"]),
        int(raw["index"]),
        int(raw["copy"]),
        bytes.fromhex(raw["entry"]).hex(),
        _cells(raw["cells"]),
    )
