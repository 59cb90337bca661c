"""Mutants of good objects: what stands in a file that a broken or hostile tool made.

A mutation knows the tables of the format: it puts into a field what a reader is likely to trip over, or exchanges
whole entries, or damages the bytes of one kind of section. Some know nothing and change any byte. The same seed and
index give the same mutant.

Specification: System V ABI, chapter 4; AMD64 supplement, chapter 4; ar(5).
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from fuzz.corpus import Sample

Field = tuple[int, int]  # offset within the entry, and bytes

EHDR: tuple[Field, ...] = (
    (4, 1), (5, 1), (6, 1), (7, 1), (16, 2), (18, 2), (20, 4), (24, 8), (32, 8), (40, 8),
    (48, 4), (52, 2), (54, 2), (56, 2), (58, 2), (60, 2), (62, 2),
)  # fmt: skip
SHDR: tuple[Field, ...] = ((0, 4), (4, 4), (8, 8), (16, 8), (24, 8), (32, 8), (40, 4), (44, 4), (48, 8), (56, 8))
SYM: tuple[Field, ...] = ((0, 4), (4, 1), (5, 1), (6, 2), (8, 8), (16, 8))
RELA: tuple[Field, ...] = ((0, 8), (8, 4), (12, 4), (16, 8))
WORD: tuple[Field, ...] = ((0, 4),)
COMPRESSION: tuple[Field, ...] = ((0, 4), (8, 8), (16, 8))
ARCHIVE: tuple[Field, ...] = ((0, 16), (16, 12), (28, 6), (34, 6), (40, 8), (48, 10), (58, 2))

SECTION_TYPES = (*range(20), 0x6FFFFFF6, 0x6FFF4C00, 0x6FFF4C03, 0x70000001, 0x7FFFFFFF, 0x80000000)
SECTION_INDEXES = (0, 1, 0xFEFF, 0xFF00, 0xFF02, 0xFFF1, 0xFFF2, 0xFFFF)
FLAGS = (1, 2, 4, 0x10, 0x20, 0x40, 0x80, 0x100, 0x200, 0x400, 0x800, 0x10000000, 0x80000000)
NUMBERS = (0, 1, 2, 3, 7, 8, 16, 255, 4096, 0x10000, 1 << 24, 1 << 30, 1 << 31, 1 << 32, 1 << 40, 1 << 47, 1 << 62)
TEXTS = (
    b"", b"0", b"1", b"-1", b"60", b"61", b"9999999999", b"/", b"//", b"/0", b"/1", b"/999999", b"/SYM64/", b"#1/20",
    b"..", b"../", b"/dev/zero", b"/dev/tty", b"/proc/self/mem", b"a\0b/", b"\0", b"\xff\xfe", b"`\n", b"0x10", b"1 2",
    b"\xb2", b"pie-thin.a",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Table:
    """Entries of one size that stand one after another."""

    kind: str
    start: int
    entry: int
    count: int
    fields: tuple[Field, ...]


@dataclass(frozen=True, slots=True)
class Shape:
    """Where things stand in a good object or archive."""

    tables: tuple[Table, ...]
    regions: dict[str, tuple[tuple[int, int], ...]]  # kind of section -> first byte, one beyond the last

    def of(self, kind: str) -> list[Table]:
        return [t for t in self.tables if t.kind == kind and t.count]


@cache
def shape(data: bytes) -> Shape:
    """Find the tables of an object, or of the members of an archive."""
    tables: list[Table] = []
    regions: dict[str, list[tuple[int, int]]] = {}
    if data[:4] == b"\x7fELF":
        _add_object(data, 0, tables, regions)
    else:
        position, thin = 8, data[:8] == b"!<thin>\n"
        while position + 60 <= len(data):
            size, name = int(data[position + 48 : position + 58]), data[position : position + 16].rstrip()
            tables.append(Table("archive", position, 60, 1, ARCHIVE))
            position += 60
            if name in (b"/", b"//"):
                regions.setdefault("index", []).append((position, position + size))
            elif data[position : position + 4] == b"\x7fELF":
                _add_object(data[position : position + size], position, tables, regions)
            position += 0 if thin and name not in (b"/", b"//") else size + (size & 1)
    return Shape(tuple(tables), {kind: tuple(found) for kind, found in regions.items()})


def _add_object(data: bytes, base: int, tables: list[Table], regions: dict[str, list[tuple[int, int]]]) -> None:
    headers, count, names = *struct.unpack_from("<Q", data, 40), *struct.unpack_from("<HH", data, 60)
    rows = [struct.unpack_from("<IIQQQQIIQQ", data, headers + 64 * i) for i in range(count)]
    tables.append(Table("header", base, 64, 1, EHDR))
    tables.append(Table("section", base + headers, 64, count, SHDR))
    for name, kind, flags, _, offset, size, *_ in rows:
        start, end = base + offset, base + offset + size
        at = rows[names][4] + name
        text = data[at : data.index(b"\0", at)]
        if kind == 2:
            tables.append(Table("symbol", start, 24, size // 24, SYM))
        elif kind == 4:
            debug = b".debug" in text
            tables.append(Table("debug relocation" if debug else "relocation", start, 24, size // 24, RELA))
        elif kind == 17:
            tables.append(Table("group", start, 4, size // 4, WORD))
        elif kind == 3:
            regions.setdefault("names", []).append((start, end))
        elif text.startswith(b".debug") and size:
            regions.setdefault("debug", []).append((start, end))
            if flags & 0x800:
                tables.append(Table("compression", start, 24, 1, COMPRESSION))
        elif flags & 2 and kind != 8 and size:
            regions.setdefault("code" if flags & 4 else "data", []).append((start, end))


# --- mutations ----------------------------------------------------------------------------------------------------


class Mutant:
    """A copy of a good object that mutations change."""

    def __init__(self, chance: random.Random, data: bytes) -> None:
        self.chance = chance
        self.data = bytearray(data)
        self.shape = shape(data)

    def any_bytes(self) -> None:
        """Change bytes anywhere."""
        for _ in range(self.chance.choice((1, 2, 8, 40))):
            self._change_byte(0, len(self.data))

    def section_bytes(self) -> None:
        """Change bytes of one kind of section."""
        kinds = sorted(self.shape.regions)
        if not kinds:
            return
        kind = self.chance.choice(kinds)
        start, end = self.chance.choice(self.shape.regions[kind])
        if kind == "names" and self.chance.random() < 0.2:
            self.data[start:end] = bytes(b or 0x41 for b in self.data[start:end])  # strings without an end
        for _ in range(self.chance.choice((1, 1, 2, 8, 40))):
            self._change_byte(start, end)

    def _change_byte(self, start: int, end: int) -> None:
        end = min(end, len(self.data))
        if start >= end:
            return
        at, how = self.chance.randrange(start, end), self.chance.random()
        if how < 0.3:
            self.data[at] = self.chance.choice((0, 1, 0x7F, 0x80, 0xFF))
        elif how < 0.6:
            self.data[at] ^= 1 << self.chance.randrange(8)
        else:
            self.data[at] = self.chance.randrange(256)

    def field(self, kind: str) -> Callable[[], None]:
        """Return the mutation that changes one field, or the same one of some entries, of a table of this kind."""

        def change() -> None:
            tables = self.shape.of(kind)
            if not tables:
                return
            table = self.chance.choice(tables)
            field = self.chance.choice(table.fields)
            for _ in range(self.chance.choice((1, 1, 1, 2, 10))):
                self._change_field(table, self.chance.randrange(table.count), field)

        return change

    def _change_field(self, table: Table, row: int, field: Field) -> None:
        at, width = table.start + row * table.entry + field[0], field[1]
        if at + width > len(self.data):
            return
        if table.kind == "archive":
            text = self.chance.choice((*TEXTS, str(self.chance.choice((len(self.data), *NUMBERS))).encode()))
            self.data[at : at + width] = text[:width].ljust(width)
            return
        value = int.from_bytes(self.data[at : at + width], "little")
        other = table.start + self.chance.randrange(table.count) * table.entry + field[0]
        choices: list[Sequence[int]] = [
            (value + 1, value - 1, value * 2, value // 2, -value),
            (value ^ 1 << self.chance.randrange(8 * width),),
            (-1, -2, (1 << 8 * width - 1) - 1, 1 << 8 * width - 1),
            (len(self.data), len(self.data) - 1, len(self.data) + 1, len(self.data) - value),
            (int.from_bytes(self.data[other : other + width], "little"),),
            NUMBERS,
            (self.chance.randrange(1 << 8 * width),),
            _meaningful(table.kind, field, value),
        ]
        new = self.chance.choice(self.chance.choice(choices))
        self.data[at : at + width] = (new & (1 << 8 * width) - 1).to_bytes(width, "little")

    def exchange(self) -> None:
        """Exchange two entries of a table, or copy one over another."""
        tables = [t for t in self.shape.tables if t.count > 1]
        if not tables:
            return
        table = self.chance.choice(tables)
        left, right = (table.start + self.chance.randrange(table.count) * table.entry for _ in range(2))
        size = self.chance.choice((table.entry, table.entry, *(width for _, width in table.fields)))
        if max(left, right) + size > len(self.data):
            return
        copies = bytes(self.data[left : left + size]), bytes(self.data[right : right + size])
        self.data[right : right + size] = copies[0]
        if self.chance.random() < 0.6 and left != right:
            self.data[left : left + size] = copies[1]

    def overlap(self) -> None:
        """Let a section stand where another one does, as large as that or as it was."""
        tables = self.shape.of("section")
        if not tables:
            return
        table = self.chance.choice(tables)
        left, right = (table.start + self.chance.randrange(table.count) * table.entry for _ in range(2))
        size = self.chance.choice((8, 16))  # sh_offset, and sh_size
        self.data[left + 24 : left + 24 + size] = self.data[right + 24 : right + 24 + size]

    def move(self) -> None:
        """Move a stretch of the file over another."""
        size = self.chance.choice((1, 4, 8, 24, 64, 200))
        if size >= len(self.data):
            return
        source, destination = (self.chance.randrange(len(self.data) - size) for _ in range(2))
        self.data[destination : destination + size] = self.data[source : source + size]

    def cut(self) -> None:
        """Leave out the end, or something within, or add something."""
        how, at = self.chance.random(), self.chance.randrange(len(self.data))
        if how < 0.6:
            del self.data[at:]
        elif how < 0.8:
            del self.data[at : at + self.chance.choice((1, 8, 64, 1000))]
        else:
            self.data[at:at] = bytes(self.chance.choice((1, 8, 64, 1000)))


def _meaningful(kind: str, field: Field, value: int) -> Sequence[int]:
    """Return values that a field's readers give a meaning to."""
    if kind in ("relocation", "debug relocation"):
        return {8: range(44), 12: range(20), 0: range(0, 64, 3)}.get(
            field[0], (-4, -5, 0, 4, 1 << 31, -(1 << 31), 1 << 20)
        )
    if kind == "section":
        return {4: SECTION_TYPES, 8: [value ^ flag for flag in FLAGS]}.get(field[0], range(12))
    if kind == "symbol":
        return {4: [b << 4 | t for b in (0, 1, 2, 10) for t in (0, 1, 2, 3, 4, 5, 6, 10)], 6: SECTION_INDEXES}.get(
            field[0], range(0, 64, 4)
        )
    return SECTION_INDEXES


def mutant(samples: Sequence[Sample], seed: int, index: int) -> tuple[Sample, bytes]:
    """Return one mutant, and what it was."""
    chance = random.Random(f"{seed}.{index}")
    sample = samples[index % len(samples)]
    made = Mutant(chance, sample.data)
    archive = bool(made.shape.of("archive"))
    mutations: list[tuple[int, Callable[[], None]]] = [
        (10, made.any_bytes),
        (14, made.section_bytes),
        (5, made.field("header")),
        (16, made.field("section")),
        (14, made.field("symbol")),
        (16, made.field("relocation")),
        (3, made.field("debug relocation")),
        (3, made.field("group")),
        (3, made.field("compression")),
        (60 if archive else 0, made.field("archive")),
        (7, made.exchange),
        (5, made.overlap),
        (2, made.move),
    ]
    weights, functions = [weight for weight, _ in mutations], [function for _, function in mutations]
    for change in chance.choices(functions, weights, k=chance.choice((1, 1, 1, 2, 3))):
        change()
    if chance.random() < 0.04:
        made.cut()
    return sample, bytes(made.data)
