"""DEBUGGING INFORMATION ENTRIES: where the types and variables of one unit are declared, and what is said of them.

Goes through a unit's `.debug_info` once and keeps the places of what has a layout (`Entry`); attributes are decoded
when they are asked for. Decides nothing about types: `declared` makes them of entries.

Knows the 32-bit form of DWARF 4 and 5 as compilers write it into an object or a linker into a program. Whatever else
there is (`NotUnderstood`: type units, split or supplementary files) is for a reader that knows all of it.
Specification: DWARF 5, sections 7.5 (entries and forms) and 7.26 (string offsets).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache


class Tag:
    """The tags of entries that have to do with layouts (DWARF 5, table 7.3)."""

    ARRAY = 0x01
    CLASS = 0x02
    ENUMERATION = 0x04
    PARAMETER = 0x05
    LEXICAL_BLOCK = 0x0B
    MEMBER = 0x0D
    POINTER = 0x0F
    REFERENCE = 0x10
    COMPILE_UNIT = 0x11
    STRUCTURE = 0x13
    SUBROUTINE_TYPE = 0x15
    TYPEDEF = 0x16
    UNION = 0x17
    INHERITANCE = 0x1C
    POINTER_TO_MEMBER = 0x1F
    SUBRANGE = 0x21
    BASE = 0x24
    CONST = 0x26
    ENUMERATOR = 0x28
    SUBPROGRAM = 0x2E
    VARIABLE = 0x34
    VOLATILE = 0x35
    RESTRICT = 0x37
    NAMESPACE = 0x39
    UNSPECIFIED = 0x3B
    RVALUE_REFERENCE = 0x42
    ATOMIC = 0x47


class At:
    """The attributes that are looked at (DWARF 5, table 7.5)."""

    SIBLING = 0x01
    LOCATION = 0x02
    NAME = 0x03
    BYTE_SIZE = 0x0B
    BIT_OFFSET = 0x0C
    BIT_SIZE = 0x0D
    COMP_DIR = 0x1B
    CONST_VALUE = 0x1C
    PRODUCER = 0x25
    UPPER_BOUND = 0x2F
    ABSTRACT_ORIGIN = 0x31
    COUNT = 0x37
    MEMBER_LOCATION = 0x38
    DECLARATION_FILE = 0x3A
    DECLARATION = 0x3C
    ENCODING = 0x3E
    EXTERNAL = 0x3F
    SPECIFICATION = 0x47
    TYPE = 0x49
    VIRTUALITY = 0x4C
    VTABLE_SLOT = 0x4D
    DATA_BIT_OFFSET = 0x6B
    LINKAGE_NAME = 0x6E
    STR_OFFSETS_BASE = 0x72
    ADDR_BASE = 0x73
    DWO_NAME = 0x76
    GNU_DWO_NAME = 0x2130


_LEB, _SIGNED, _STRING, _BLOCK, _SHORT_BLOCK, _MIDDLE_BLOCK, _LONG_BLOCK = -1, -2, -3, -4, -5, -6, -7
# Sizes of forms, or what tells the size (DWARF 5, table 7.6; the offsets of its 32-bit form).
_FORMS = {
    0x01: 8, 0x03: _MIDDLE_BLOCK, 0x04: _LONG_BLOCK, 0x05: 2, 0x06: 4, 0x07: 8, 0x08: _STRING, 0x09: _BLOCK,
    0x0A: _SHORT_BLOCK, 0x0B: 1, 0x0C: 1, 0x0D: _SIGNED, 0x0E: 4, 0x0F: _LEB, 0x10: 4, 0x11: 1, 0x12: 2, 0x13: 4,
    0x14: 8, 0x15: _LEB, 0x17: 4, 0x18: _BLOCK, 0x19: 0, 0x1A: _LEB, 0x1B: _LEB, 0x1E: 16, 0x1F: 4, 0x21: 0,
    0x22: _LEB, 0x23: _LEB, 0x25: 1, 0x26: 2, 0x27: 3, 0x28: 4, 0x29: 1, 0x2A: 2, 0x2B: 3, 0x2C: 4,
}  # fmt: skip
_FLAG_PRESENT, _IMPLICIT = 0x19, 0x21
_STRINGS, _LINE_STRINGS, _INDEXED_STRINGS = 0x0E, 0x1F, (0x1A, 0x25, 0x26, 0x27, 0x28)
_TEXTS = (_STRINGS, _LINE_STRINGS, *_INDEXED_STRINGS)
_IN_UNIT = (0x11, 0x12, 0x13, 0x14, 0x15)
_REFERENCE = 0x13  # in four bytes, within the unit
_CODES = {1: "B", 2: "H", 4: "I", 8: "Q", 16: "16s"}

_OUTER = frozenset(
    (Tag.STRUCTURE, Tag.CLASS, Tag.UNION, Tag.ENUMERATION, Tag.NAMESPACE, Tag.SUBPROGRAM, Tag.LEXICAL_BLOCK, Tag.ARRAY)
)
_INNER = frozenset((Tag.MEMBER, Tag.INHERITANCE, Tag.SUBRANGE, Tag.ENUMERATOR, Tag.VARIABLE, Tag.TYPEDEF))

Value = int | bytes | tuple[int, int]


class NotUnderstood(Exception):
    """Debug information in a form that is not read here."""


class Elsewhere(NotUnderstood):
    """The debug information is in another file."""


@dataclass(frozen=True, slots=True)
class Sections:
    """The debug sections of a file: inflated, and relocated if it is an object."""

    info: bytes
    abbreviations: bytes
    strings: bytes
    line_strings: bytes
    string_offsets: bytes
    addresses: bytes = b""
    tables: dict[int, _Abbreviations] = field(default_factory=dict, repr=False, compare=False)

    def table(self, place: int) -> _Abbreviations:
        """Return the abbreviations at a place, which units may share."""
        if place not in self.tables:
            self.tables[place] = _Abbreviations(self.abbreviations, place)
        return self.tables[place]


@dataclass(slots=True, eq=False)
class _Abbreviation:
    """How an entry is written. What is fixed in size is decoded at once (`fixed`), the rest one by one."""

    tag: int
    children: bool
    attributes: tuple[tuple[int, int], ...]  # and their forms, those that take room
    constants: dict[int, int]  # the attributes whose value stands in the abbreviation
    size: int  # negative: it varies
    action: int  # what a walk does with the entry
    inner: bool
    kept: bool
    complete: bool
    block: int  # where its only part of varying size begins, if that is a block; else 0
    behind: int  # bytes behind that
    location: int  # where the first operation of its location is, if it is known
    pieces: tuple[int, ...]  # sizes, runs of fixed ones joined
    fixed: struct.Struct | None
    references: tuple[int, ...]
    texts: tuple[tuple[int, int], ...]  # attributes that are strings elsewhere, and the forms that say where
    name: int  # where the offset of its name in `.debug_str` is; -1: elsewhere, or there is another entry to ask
    typed: bool  # whether it has a type
    type: int  # where the reference to that is; -1: not at a fixed place


_COMPILE, _SKELETON, _SPLIT = 1, 4, 5  # kinds of units (DWARF 5, table 7.2)
_PASS, _SKIP, _OPEN, _KEEP, _LOCATED = range(5)
_FRAME_BASE = 0x91  # DW_OP_fbreg: a place on the stack


@dataclass(slots=True, eq=False)
class Entry:
    """An entry that is kept; `inner` are those of its children that belong to it, `outer` is what it stands in."""

    offset: int
    tag: int
    outer: Entry | None
    complete: bool
    inner: list[Entry]


@dataclass(frozen=True, slots=True)
class Header:
    """A unit's extent in `.debug_info`, and the source file it was compiled from."""

    start: int
    first: int  # its root entry
    end: int
    version: int
    abbreviations: int
    file: str
    strings_base: int
    addresses_base: int = 8


def units(sections: Sections, *, every: bool = True) -> Iterator[Header]:
    """Find the units of a file; if not `every` one is needed, those that are understood. Raises `NotUnderstood`."""
    info, place = sections.info, 0
    while place < len(info):
        end = place + 4 + _number(info, place, 4)
        if end > len(info):
            raise NotUnderstood("a unit that is cut off, or of the 64-bit form")
        try:
            yield _header(sections, place, end)
        except NotUnderstood:
            if every:
                raise
        place = end


def _header(sections: Sections, start: int, end: int) -> Header:
    info, version = sections.info, _number(sections.info, start + 4, 2)
    if version == 5 and info[start + 6] in (_SKELETON, _SPLIT):
        raise Elsewhere("it is in another file")
    if version not in (4, 5) or (version == 5 and info[start + 6] != _COMPILE):
        raise NotUnderstood("a unit of another version or kind")
    at, first = (start + 8, start + 12) if version == 5 else (start + 6, start + 11)
    return _with_names(sections, Header(start, first, end, version, _number(info, at, 4), "", 8))


def _with_names(sections: Sections, header: Header) -> Header:
    root = Dies(sections, header).attributes(header.first)
    if At.DWO_NAME in root or At.GNU_DWO_NAME in root:
        raise Elsewhere("it is in another file")
    strings, addresses = root.get(At.STR_OFFSETS_BASE, 8), root.get(At.ADDR_BASE, 8)
    header = replace(header, strings_base=_int(strings, 8), addresses_base=_int(addresses, 8))
    dies = Dies(sections, header)
    name, folder = dies.text(root.get(At.NAME)), dies.text(root.get(At.COMP_DIR))
    return replace(header, file=os.path.normpath(os.path.join(folder, name)) if name else "")


class Dies:
    """The entries of one unit."""

    def __init__(self, sections: Sections, header: Header) -> None:
        self.sections = sections
        self.header = header
        self._info = sections.info
        self._abbreviations = sections.table(header.abbreviations)

    def walk(self) -> list[Entry]:
        """Return the entries of types, of what may be a variable with static storage, and of what they stand in."""
        info, table, place, end = self._info, self._abbreviations, self.header.first, self.header.end
        unit, steps = self.header.start, table.steps
        found: list[Entry] = []
        outer: Entry | None = None
        open_: list[Entry | None] = []
        while place < end:
            start = place
            code = info[place]
            place += 1
            if code >= 0x80:
                code, place = _leb(info, start)
            if not code:
                if not open_:
                    break
                outer = open_.pop()
                continue
            size, action, children, block, step = steps.get(code) or table.step(code)
            at = place
            if size >= 0:
                place += size
            elif block and info[place + block] < 0x80:  # one short block, as most locations are
                place += block + 1 + info[place + block] + step.behind
            else:
                place = _past(info, place, step)
            if not action:
                if children:
                    open_.append(outer)
            elif action == _SKIP:
                place = unit + int.from_bytes(info[place - 4 : place], "little")
            elif action == _LOCATED and info[at + step.location] == _FRAME_BASE:
                if children:
                    open_.append(outer)
            else:
                entry = Entry(start, step.tag, outer, step.complete, [])
                if step.inner and outer is not None:
                    outer.inner.append(entry)
                if step.kept:
                    found.append(entry)
                if children:
                    open_.append(outer)
                    if action == _OPEN:
                        outer = entry
        return found

    def typed(self, tags: frozenset[int]) -> Iterator[tuple[int, int, int, int]]:
        """Return the tags, places, types (0: none) and depths of all entries of some tags."""
        info, table, place, end, start = (
            self._info,
            self._abbreviations,
            self.header.first,
            self.header.end,
            self.header.start,
        )
        depth = 0
        while place < end:
            begin, code = place, info[place]
            place += 1
            if code >= 0x80:
                code, place = _leb(info, begin)
            if not code:
                depth -= 1
                if depth <= 0:
                    return
                continue
            step = table[code]
            if step.tag in tags:
                at, type_ = place + step.type, 0
                if step.type >= 0:
                    type_ = start + int.from_bytes(info[at : at + 4], "little")
                elif step.typed:
                    type_ = self.reference(self.attributes(begin)[At.TYPE])
                yield step.tag, begin, type_, depth
            place = place + step.size if step.size >= 0 else _past(info, place, step)
            depth += step.children

    def tag(self, offset: int) -> int:
        return self._abbreviations[_leb(self._info, offset)[0]].tag

    def type_at(self, offset: int) -> int:
        """Return the place of an entry's type, 0 for none. Raises `NotUnderstood` for one elsewhere."""
        code, place = _leb(self._info, offset)
        step = self._abbreviations[code]
        if step.type < 0:
            return self.reference(self.attributes(offset).get(At.TYPE))
        place += step.type
        return self.reference(self.header.start + int.from_bytes(self._info[place : place + 4], "little"))

    def attributes(self, offset: int) -> dict[int, Value]:
        """Return an entry's attributes: references as places in the section, strings as what `text` takes."""
        info, start = self._info, self.header.start
        code = info[offset]
        place = offset + 1
        if code >= 0x80:
            code, place = _leb(info, offset)
        abbreviation = self._abbreviations[code]
        if abbreviation.fixed is not None:
            names, values = abbreviation.attributes, abbreviation.fixed.unpack_from(info, place)
            found: dict[int, Value] = {a: v for (a, _), v in zip(names, values, strict=True)}
        else:
            found = self._one_by_one(abbreviation, place)
        for attribute in abbreviation.references:
            found[attribute] += start  # type: ignore[operator]
        for attribute, form in abbreviation.texts:
            found[attribute] = form, found[attribute]  # type: ignore[assignment]
        found.update(abbreviation.constants)
        return found

    def _one_by_one(self, abbreviation: _Abbreviation, place: int) -> dict[int, Value]:
        info = self._info
        found: dict[int, Value] = {}
        for attribute, form in abbreviation.attributes:
            size = _FORMS[form]
            if size > 0:
                found[attribute] = int.from_bytes(info[place : place + size], "little")
                place += size
            elif size == _LEB:
                found[attribute], place = _leb(info, place)
            elif size == _SIGNED:
                found[attribute], place = _signed(info, place)
            elif size == _STRING:
                close = info.index(b"\0", place)
                found[attribute], place = info[place:close], close + 1
            else:
                length, place = _block(info, place, size)
                found[attribute], place = info[place : place + length], place + length
        return found

    def plain_name(self, offset: int) -> str:
        """Return an entry's name if that is quickly told, else an empty string."""
        info = self._info
        code, place = (info[offset], offset + 1) if info[offset] < 0x80 else _leb(info, offset)
        at = self._abbreviations[code].name
        if at < 0:
            return ""
        place += at
        strings, start = self.sections.strings, int.from_bytes(info[place : place + 4], "little")
        return strings[start : strings.index(b"\0", start)].decode("utf-8", "replace")

    def reference(self, found: Value | None) -> int:
        """Return the place that an attribute refers to, 0 for none. Raises `NotUnderstood` for one elsewhere."""
        if found is None:
            return 0
        if not isinstance(found, int) or not self.header.first <= found < self.header.end:
            raise NotUnderstood("a reference to another unit")
        return found

    def text(self, found: Value | None) -> str:
        """Return an attribute that is a string; empty when there is none."""
        if found is None or isinstance(found, int):
            return ""
        if isinstance(found, bytes):
            return found.decode("utf-8", "replace")
        form, value = found
        if form == _STRINGS:
            return _string(self.sections.strings, value)
        if form == _LINE_STRINGS:
            return _string(self.sections.line_strings, value)
        place = self.header.strings_base + 4 * value
        return _string(self.sections.strings, _number(self.sections.string_offsets, place, 4))


def _string(section: bytes, place: int) -> str:
    return section[place : section.index(b"\0", place)].decode("utf-8", "replace")


def _int(value: Value, otherwise: int) -> int:
    return value if isinstance(value, int) else otherwise


def _number(data: bytes, place: int, size: int) -> int:
    return int.from_bytes(data[place : place + size], "little")


def _leb(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
        shift += 7


def _signed(data: bytes, place: int) -> tuple[int, int]:
    value, after = _leb(data, place)
    bits = 7 * (after - place)
    return (value - (1 << bits) if value >> (bits - 1) else value), after


def _block(info: bytes, place: int, size: int) -> tuple[int, int]:
    """Return the length of a block's contents, and where they begin."""
    if size == _BLOCK:
        return _leb(info, place)
    width = {_SHORT_BLOCK: 1, _MIDDLE_BLOCK: 2, _LONG_BLOCK: 4}[size]
    return _number(info, place, width), place + width


def _past(info: bytes, place: int, abbreviation: _Abbreviation) -> int:
    """Return where an entry of varying size ends."""
    for piece in abbreviation.pieces:
        if piece >= 0:
            place += piece
        elif piece == _BLOCK and info[place] < 0x80:
            place += 1 + info[place]
        elif piece in (_LEB, _SIGNED):
            while info[place] >= 0x80:
                place += 1
            place += 1
        elif piece == _STRING:
            place = info.index(b"\0", place) + 1
        else:
            length, place = _block(info, place, piece)
            place += length
    return place


class _Abbreviations(dict[int, _Abbreviation]):
    """A unit's abbreviations by code, read as far as they are needed: of most units only the root is looked at."""

    def __init__(self, data: bytes, place: int) -> None:
        super().__init__()
        self.steps: dict[int, tuple[int, int, bool, int, _Abbreviation]] = {}
        self._data = data
        self._place = place

    def step(self, code: int) -> tuple[int, int, bool, int, _Abbreviation]:
        """Return an abbreviation, and of it what a walk needs of every entry."""
        found = self[code]
        self.steps[code] = found.size, found.action, found.children, found.block, found
        return self.steps[code]

    def __missing__(self, wanted: int) -> _Abbreviation:
        while True:
            code, place = _leb(self._data, self._place)
            if not code:
                raise NotUnderstood(f"no abbreviation {wanted}")
            tag, place = _leb(self._data, place)
            children = self._data[place] == 1
            attributes, self._place = _attributes(self._data, place + 1)
            self[code] = _abbreviation(tag, children, tuple(attributes))
            if code == wanted:
                return self[code]


def _attributes(data: bytes, place: int) -> tuple[list[tuple[int, int, int]], int]:
    found: list[tuple[int, int, int]] = []
    while True:
        attribute, place = _leb(data, place)
        form, place = _leb(data, place)
        implicit = 1 if form == _FLAG_PRESENT else 0
        if form == _IMPLICIT:
            implicit, place = _signed(data, place)
        if not attribute and not form:
            return found, place
        if form not in _FORMS:
            raise NotUnderstood(f"form {form:#x}")
        found.append((attribute, form, implicit))


@lru_cache(maxsize=1 << 13)  # compilers use the same ones again and again
def _abbreviation(tag: int, children: bool, every: tuple[tuple[int, int, int], ...]) -> _Abbreviation:
    attributes = tuple((a, form) for a, form, _ in every if _FORMS[form])
    pieces: list[int] = []
    for _, form in attributes:
        size = _FORMS[form]
        if size >= 0 and pieces and pieces[-1] >= 0:
            pieces[-1] += size
        else:
            pieces.append(size)
    fixed = not pieces or (len(pieces) == 1 and pieces[0] >= 0)
    codes = [_CODES.get(_FORMS[form], "") for _, form in attributes]
    names = {a: form for a, form, _ in every}
    virtual = tag == Tag.SUBPROGRAM and (At.VIRTUALITY in names or At.VTABLE_SLOT in names)
    one_block = len(pieces) in (2, 3) and pieces[1] == _BLOCK and all(size >= 0 for size in (pieces[0], *pieces[2:]))
    block = pieces[0] if one_block else 0
    location = block + 1 if block and (At.LOCATION, 0x18) in attributes else 0
    return _Abbreviation(
        tag=tag,
        children=children,
        attributes=attributes,
        constants={a: value for a, form, value in every if not _FORMS[form]},
        size=sum(pieces) if fixed else -1,
        action=_action(tag, children, attributes, names, virtual, location),
        inner=tag in _INNER or virtual,
        kept=tag in _OUTER or tag in (Tag.TYPEDEF, Tag.VARIABLE) or (tag == Tag.MEMBER and At.DECLARATION in names),
        complete=At.DECLARATION not in names,
        block=block,
        behind=sum(pieces[2:]) if block else 0,
        location=location,
        pieces=tuple(pieces),
        fixed=struct.Struct("<" + "".join(codes)) if fixed and all(codes) else None,
        references=tuple(a for a, form in attributes if form in _IN_UNIT),
        texts=tuple((a, form) for a, form in attributes if form in _TEXTS),
        name=-1
        if At.SPECIFICATION in names or At.ABSTRACT_ORIGIN in names
        else _place_of(At.NAME, _STRINGS, attributes),
        typed=At.TYPE in names,
        type=_place_of(At.TYPE, _REFERENCE, attributes),
    )


def _place_of(wanted: int, as_form: int, attributes: tuple[tuple[int, int], ...]) -> int:
    place = 0
    for attribute, form in attributes:
        if attribute == wanted:
            return place if form == as_form else -1
        if _FORMS[form] < 0:
            return -1
        place += _FORMS[form]
    return -1


def _action(
    tag: int,
    children: bool,
    attributes: tuple[tuple[int, int], ...],
    names: Mapping[int, int],
    virtual: bool,
    location: int,
) -> int:
    if tag == Tag.SUBPROGRAM and At.DECLARATION in names and not virtual:
        # A function's declaration in a class has parameters, but neither types nor variables of its own.
        return _SKIP if children and attributes[-1:] == ((At.SIBLING, _REFERENCE),) else _PASS
    if tag in _OUTER:
        return _OPEN
    if tag == Tag.VARIABLE and At.DECLARATION not in names:
        if names.get(At.LOCATION) != 0x18:  # not a single place
            return _KEEP if At.SPECIFICATION in names else _PASS
        return _LOCATED if location else _KEEP
    return _KEEP if tag in _INNER else _PASS
