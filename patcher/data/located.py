"""Variables as debug information declares them: in which function, on which line, of what type, and where.

The static variables of functions are what this is for: their symbols have no names that last. Only what has an address
is listed, one unit at a time, and of types no more than their layout, as a short text. What cannot be read is left
out: whoever asks then knows less, and decides by other evidence.

In an object an address is a section's number and an offset in it (`place`). Specification: DWARF 4 and 5, sections
2.6 (locations), 3.5 (lexical blocks), 4.1 (data objects), 7.5 (encoding).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np

from patcher.elf import tables as t
from patcher.errors import PatcherError

_PLACE = 40  # bits of an address in an object that are the offset in its section
_DEPTH = 6  # of types within types

_COMPILE_UNIT, _SUBPROGRAM, _BLOCK, _VARIABLE = 0x11, 0x2E, 0x0B, 0x34
_INLINED = 0x1D
_SCOPES = frozenset((_SUBPROGRAM, _BLOCK, _INLINED))
_WITHOUT_STORAGE = frozenset((0x13, 0x17, 0x02, 0x04, 0x15, 0x01))  # types: what they declare is defined elsewhere
_NAME, _LOCATION, _SIZE, _TYPE, _ORIGIN, _SPECIFICATION = 0x03, 0x02, 0x0B, 0x49, 0x31, 0x47
_LINKAGE, _EXTERNAL, _LINE, _COUNT, _UPPER = 0x6E, 0x3F, 0x3B, 0x37, 0x2F
_ENCODING, _MEMBER_AT, _STRINGS_BASE, _ADDRESSES_BASE = 0x3E, 0x38, 0x72, 0x73
_WANTED = frozenset((_NAME, _LOCATION, _SIZE, _TYPE, _ORIGIN, _SPECIFICATION, _LINKAGE, _EXTERNAL, _LINE, _COUNT))
_WANTED |= {_UPPER, _ENCODING, _MEMBER_AT, _STRINGS_BASE, _ADDRESSES_BASE}
_SIBLING = 0x01
_FIXED = {0x0B: 1, 0x05: 2, 0x06: 4, 0x07: 8, 0x1E: 16, 0x0C: 1, 0x11: 1, 0x12: 2, 0x13: 4, 0x14: 8, 0x01: 8}
_FIXED |= {0x0E: 4, 0x17: 4, 0x10: 4, 0x1F: 4, 0x1D: 4, 0x1C: 4, 0x20: 8, 0x19: 0, 0x21: 0, 0x24: 8}
_FIXED |= {0x25: 1, 0x26: 2, 0x27: 3, 0x28: 4, 0x29: 1, 0x2A: 2, 0x2B: 3, 0x2C: 4, 0x1F20: 4, 0x1F21: 4}


@dataclass(frozen=True, slots=True)
class Declared:
    """A variable with static storage. `function` is "" outside of functions; `depth` counts the blocks around it."""

    name: str
    function: str
    depth: int
    line: int
    type: str
    external: bool
    address: int
    thread_local: bool

    @property
    def scope(self) -> str:
        """What a message calls the place of its declaration."""
        where = f" of `{self.function}`" if self.function else ""
        return f"line {self.line}{where}" if self.line else where.removeprefix(" ")


@dataclass(frozen=True, slots=True)
class Declarations:
    """The variables of a unit, by address, and the functions that it has, inlined ones included."""

    variables: dict[tuple[bool, int], Declared] = field(default_factory=dict)
    functions: frozenset[str] = frozenset()

    def at(self, address: int, *, thread_local: bool = False) -> Declared | None:
        return self.variables.get((thread_local, address))


NONE = Declarations()


def place(section: int, offset: int) -> int:
    """Return the address that stands for a place in an object."""
    return section << _PLACE | offset


def declared_in_object(data: bytes, name: str) -> Declarations:
    """Read what a relocatable object declares; nothing when that cannot be read."""
    try:
        return _read(_relocated(t.read_raw(name, data)), lambda unit: True)
    except _DAMAGE:
        return NONE


@lru_cache(maxsize=64)
def declared_in_program(path: Path, stamp: int, file: str) -> Declarations:
    """Read what the units of a module that were made from `file` declare, by link-time address.

    `stamp` tells one state of the module's file from another.
    """
    try:
        with path.open("rb") as opened:
            raw = t.read_raw(str(path), t.OpenFile(str(path), opened.fileno()))
            sections = {raw.section_name(i): _contents(raw, i) for i in _debug_sections(raw)}
        return _read(sections, lambda unit: unit.rpartition("/")[2] == file)
    except _DAMAGE:
        return NONE


_DAMAGE = (PatcherError, OSError, IndexError, ValueError, KeyError, OverflowError, RecursionError, zlib.error)
_READ = (".debug_info", ".debug_abbrev", ".debug_str", ".debug_line_str", ".debug_str_offsets", ".debug_addr")


def _debug_sections(raw: t.RawFile) -> list[int]:
    return [i for i in range(len(raw.section_headers)) if raw.section_name(i) in _READ]


def _contents(raw: t.RawFile, index: int) -> bytes:
    contents = bytes(raw.contents(index))
    if not int(raw.section_headers[index]["flags"]) & t.SHF_COMPRESSED:
        return contents
    size = int.from_bytes(contents[8:16], "little")  # Elf64_Chdr: type, reserved, size, alignment; 1 is zlib
    if contents[:4] != b"\1\0\0\0" or size > 200 * len(contents):
        raise ValueError("compressed in another way")
    return zlib.decompress(contents[24:])


def _relocated(raw: t.RawFile) -> dict[str, bytes]:
    """Return an object's debug sections with their relocations applied; addresses are places."""
    found: dict[str, bytes] = {}
    relocations = {
        int(h["info"]): i for i, h in enumerate(raw.section_headers) if int(h["type"]) == t.SHT_RELA and int(h["info"])
    }
    for index in _debug_sections(raw):
        name, contents = raw.section_name(index), _contents(raw, index)
        if name in found:
            raise ValueError("several units of debug information")  # COMDAT groups: type units
        found[name] = _apply(raw, relocations[index], contents) if index in relocations else contents
    return found


def _apply(raw: t.RawFile, table: int, contents: bytes) -> bytes:
    rows = raw.table(table, t.RELA)
    symbols = raw.table(int(raw.section_headers[table]["link"]), t.SYM)[rows["symbol"]]
    allocated = (raw.section_headers["flags"] & 2 != 0).tolist()
    data = np.frombuffer(contents, np.uint8).copy()
    values = symbols["value"].astype(np.int64) + rows["addend"]
    homes = symbols["section"].astype(np.int64)
    real = np.array([h < len(allocated) and allocated[h] for h in homes.tolist()], bool)
    values = np.where(real, values + (homes << _PLACE), values)
    for width, types in ((8, (1, 17)), (4, (10, 21))):  # R_X86_64_64, DTPOFF64; R_X86_64_32, DTPOFF32
        taken = np.isin(rows["type"], types)
        offsets, chosen = rows["offset"][taken].astype(np.int64), values[taken]
        if width == 4:
            chosen = np.where(np.isin(rows["type"][taken], (21,)), chosen & 0xFFFFFFFF, chosen)
        if len(offsets) and int(offsets.max()) + width > len(data):
            raise ValueError("a relocation beyond the end")
        for byte in range(width):
            data[offsets + byte] = (chosen >> (8 * byte)) & 0xFF
    return data.tobytes()


# --- entries --------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Entry:
    offset: int
    tag: int
    children: bool
    values: dict[int, tuple[int, int | bytes]]  # attribute -> form, raw value


@dataclass(slots=True)
class _Shape:
    tag: int
    children: bool
    attributes: tuple[tuple[int, int, int], ...]  # attribute, form, implicit constant
    fixed: int  # bytes of all attributes together, -1 where that differs from entry to entry
    sibling: int  # where among them the next entry on the same level is told, -1 where it is not


def _read(sections: dict[str, bytes], wanted: Callable[[str], bool]) -> Declarations:
    found: dict[tuple[bool, int], Declared] = {}
    functions: set[str] = set()
    for unit in _units(sections):
        if wanted(unit.name):
            for declared in unit.variables(functions):
                found.setdefault((declared.thread_local, declared.address), declared)
    return Declarations(found, frozenset(functions))


def _units(sections: dict[str, bytes]) -> Iterator[_Unit]:
    info, position = sections.get(".debug_info", b""), 0
    shapes: dict[int, dict[int, _Shape]] = {}
    while position + 11 <= len(info):
        length = int.from_bytes(info[position : position + 4], "little")
        if length >= 0xFFFFFFF0:
            return  # the 64-bit form
        end = position + 4 + length
        version = int.from_bytes(info[position + 4 : position + 6], "little")
        kind, start = 1, position + 11
        at = position + 6
        if version == 5:
            kind, at, start = info[position + 6], position + 8, position + 12
        table = int.from_bytes(info[at : at + 4], "little")
        if version in (3, 4, 5) and kind == 1:
            if table not in shapes:
                shapes[table] = _shapes(sections[".debug_abbrev"], table)
            yield _Unit(sections, shapes[table], position, start, end)
        position = end


def _shapes(data: bytes, position: int) -> dict[int, _Shape]:
    found: dict[int, _Shape] = {}
    while True:
        code, position = _uleb(data, position)
        if not code:
            return found
        tag, position = _uleb(data, position)
        children = bool(data[position])
        position += 1
        attributes = []
        while True:
            attribute, position = _uleb(data, position)
            form, position = _uleb(data, position)
            constant = 0
            if form == 0x21:
                constant, position = _sleb(data, position)
            if not attribute and not form:
                break
            attributes.append((attribute, form, constant))
        sizes = [_FIXED.get(form, -1) for _, form, _ in attributes]
        known = next((i for i, a in enumerate(attributes) if a[0] == _SIBLING and a[1] == 0x13), -1)
        sibling = sum(sizes[:known]) if known >= 0 and min(sizes[:known], default=0) >= 0 else -1
        fixed = sum(sizes) if min(sizes, default=0) >= 0 else -1
        found[code] = _Shape(tag, children, tuple(attributes), fixed, sibling)


def _uleb(data: bytes, position: int) -> tuple[int, int]:
    byte = data[position]
    if byte < 0x80:
        return byte, position + 1
    value, shift = byte & 0x7F, 7
    while True:
        position += 1
        byte = data[position]
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, position + 1


def _sleb(data: bytes, position: int) -> tuple[int, int]:
    start = position
    value, position = _uleb(data, position)
    bits = 7 * (position - start)
    return (value - (1 << bits) if value >> (bits - 1) & 1 else value), position


class _Unit:
    def __init__(
        self, sections: dict[str, bytes], shapes: dict[int, _Shape], header: int, start: int, end: int
    ) -> None:
        self._sections = sections
        self._info = sections[".debug_info"]
        self._shapes = shapes
        self._header, self._start, self._end = header, start, end
        self._types: dict[int, str] = {}
        self._strings_base = self._addresses_base = 8
        root = self._entry(start)[0]
        if root is not None:
            self._strings_base = self._number(root, _STRINGS_BASE) or 8
            self._addresses_base = self._number(root, _ADDRESSES_BASE) or 8
        self.name = self._text(root, _NAME) if root is not None else ""

    def variables(self, functions: set[str]) -> Iterator[Declared]:
        """Yield the variables that have an address, and add the names of functions to a set."""
        position = self._start
        around: list[_Entry | None] = []
        while position < self._end:
            skipped = self._passed_over(position)
            if skipped is not None:
                position, children = skipped
                if children:
                    around.append(None)
                continue
            entry, position = self._entry(position)
            if entry is None:
                if around:
                    around.pop()
                continue
            if entry.tag == _SUBPROGRAM:
                functions.add(self._function_name(entry))
            elif entry.tag == _VARIABLE and _LOCATION in entry.values:
                declared = self._declared(entry, [e for e in around if e is not None])
                if declared is not None:
                    yield declared
            if entry.children:
                around.append(entry if entry.tag in _SCOPES else None)

    def _passed_over(self, position: int) -> tuple[int, bool] | None:
        """Return what follows an entry that is neither a variable nor a scope, and whether that is its children."""
        code, position = _uleb(self._info, position)
        shape = self._shapes.get(code)
        if shape is None or shape.tag in _SCOPES or shape.tag == _VARIABLE:
            return None
        if shape.sibling >= 0 and shape.tag in _WITHOUT_STORAGE:
            at = position + shape.sibling
            following = int.from_bytes(self._info[at : at + 4], "little") + self._header
            return (following, False) if following > position else None
        return (position + shape.fixed, shape.children) if shape.fixed >= 0 else None

    def _declared(self, entry: _Entry, around: list[_Entry]) -> Declared | None:
        where = self._address(entry)
        if where is None:
            return None
        origin = self._followed(entry)
        function = next((e for e in reversed(around) if e.tag in (_SUBPROGRAM, _INLINED)), None)
        blocks = around[around.index(function) :] if function is not None else []
        return Declared(
            name=self._text_of(origin, _NAME),
            function=self._function_name(function) if function is not None else "",
            depth=sum(e.tag == _BLOCK for e in blocks),
            line=next((n for e in origin if (n := self._number(e, _LINE))), 0),
            type=next((self._type(r) for e in origin if (r := self._reference(e, _TYPE))), ""),
            external=any(self._number(e, _EXTERNAL) for e in origin),
            address=where[1],
            thread_local=where[0],
        )

    def _function_name(self, entry: _Entry) -> str:
        origin = self._followed(entry)
        return self._text_of(origin, _LINKAGE) or self._text_of(origin, _NAME)

    def _followed(self, entry: _Entry) -> list[_Entry]:
        """Return an entry and what it completes or repeats."""
        found = [entry]
        while len(found) < _DEPTH:
            reference = self._reference(found[-1], _ORIGIN) or self._reference(found[-1], _SPECIFICATION)
            following = self._entry(reference)[0] if reference else None
            if following is None:
                break
            found.append(following)
        return found

    def _address(self, entry: _Entry) -> tuple[bool, int] | None:
        """Return whether it is thread-local, and the address or the offset in the module's block."""
        expression = entry.values[_LOCATION][1]
        if not isinstance(expression, bytes) or not expression:
            return None
        operation, rest = expression[0], expression[1:]
        if operation == 0x03 and len(rest) == 8:  # DW_OP_addr
            return False, int.from_bytes(rest, "little")
        if operation == 0xA1:  # DW_OP_addrx
            index, used = _uleb(rest, 0)
            at = self._addresses_base + 8 * index
            address = self._sections[".debug_addr"][at : at + 8]
            return (False, int.from_bytes(address, "little")) if used == len(rest) and len(address) == 8 else None
        # DW_OP_const4u, const8u, then DW_OP_form_tls_address or GNU_push_tls_address
        width = {0x0C: 4, 0x0E: 8}.get(operation, 0)
        if width and rest[width:] in (b"\x9b", b"\xe0"):
            return True, int.from_bytes(rest[:width], "little")
        return None

    # --- types --------------------------------------------------------------------------------------------------

    def _type(self, offset: int, depth: int = 0) -> str:
        if offset not in self._types:
            self._types[offset] = "..." if depth > _DEPTH else ""
            self._types[offset] = self._described(offset, depth)
        return self._types[offset]

    def _described(self, offset: int, depth: int) -> str:
        entry, following = self._entry(offset)
        if entry is None or depth > _DEPTH:
            return "..."
        size, name, inner = self._number(entry, _SIZE), self._text(entry, _NAME), self._reference(entry, _TYPE)
        if entry.tag in (0x16, 0x26, 0x35, 0x37, 0x47):  # typedef, const, volatile, restrict, _Atomic
            described = self._type(inner, depth) if inner else "void"
            nameless = entry.tag == 0x16 and described.startswith(("struct {", "union {"))
            return f"{described[: described.index('{')]}{name} ({_size_in(described)})" if nameless else described
        if entry.tag in (0x0F, 0x10, 0x42, 0x1F):  # pointers, references, pointers to members
            return "pointer" if entry.tag != 0x1F else "pointer to member"
        if entry.tag == 0x24:
            kind = {0x04: "float", 0x03: "complex"}.get(self._number(entry, _ENCODING), "integer")
            return f"{kind} ({size})"
        if entry.tag == 0x04:
            return f"integer ({size})"
        if entry.tag == 0x01:
            bounds = "".join(f"[{n}]" for n in self._bounds(following))
            return (self._type(inner, depth) if inner else "void") + bounds
        word = {0x13: "struct", 0x17: "union", 0x02: "struct"}.get(entry.tag)
        if word is None:
            return ""
        return f"{word} {name} ({size})" if name else f"{word} {{{self._members(following, depth)}}} ({size})"

    def _bounds(self, position: int) -> Iterator[int]:
        while True:
            entry, position = self._entry(position)
            if entry is None:
                return
            if _COUNT in entry.values:
                yield self._number(entry, _COUNT)
            else:
                yield self._number(entry, _UPPER) + 1 if _UPPER in entry.values else 0

    def _members(self, position: int, depth: int) -> str:
        found: list[str] = []
        level = 0
        while True:
            entry, position = self._entry(position)
            if entry is None:
                if not level:
                    return ", ".join(found)
                level -= 1
                continue
            if entry.tag == 0x0D and not level:
                inner = self._reference(entry, _TYPE)
                found.append(f"{self._type(inner, depth + 1)} at {self._number(entry, _MEMBER_AT)}" if inner else "")
            level += entry.children

    # --- attributes ---------------------------------------------------------------------------------------------

    def _entry(self, position: int) -> tuple[_Entry | None, int]:
        """Read the entry at an offset and where the next one is; None ends the children of one."""
        offset, info = position, self._info
        code, position = _uleb(info, position)
        if not code:
            return None, position
        shape = self._shapes[code]
        values: dict[int, tuple[int, int | bytes]] = {}
        for attribute, form, constant in shape.attributes:
            start = position
            while form == 0x16:  # DW_FORM_indirect
                form, start = _uleb(info, start)
            size = _FIXED.get(form)
            if size is not None:
                position = start + size
                if attribute in _WANTED:
                    number = int.from_bytes(info[start:position], "little", signed=form == 0x0D)
                    values[attribute] = form, constant if form == 0x21 else 1 if form == 0x19 else number
                continue
            value, position = self._varying(form, start)
            if attribute in _WANTED:
                values[attribute] = form, value
        return _Entry(offset, shape.tag, shape.children, values), position

    def _varying(self, form: int, position: int) -> tuple[int | bytes, int]:
        info = self._info
        if form in (0x0F, 0x15, 0x1A, 0x1B, 0x22, 0x23, 0x1F01, 0x1F02):  # udata, ref_udata, strx, addrx, lists
            return _uleb(info, position)
        if form == 0x0D:
            return _sleb(info, position)
        if form == 0x08:
            end = info.index(b"\0", position)
            return info[position:end], end + 1
        width = {0x0A: 1, 0x03: 2, 0x04: 4}.get(form)  # block1, block2, block4
        if width is not None:
            size, start = int.from_bytes(info[position : position + width], "little"), position + width
        elif form in (0x09, 0x18):  # block, exprloc
            size, start = _uleb(info, position)
        else:
            raise ValueError(f"form {form:#x}")
        return info[start : start + size], start + size

    def _number(self, entry: _Entry, attribute: int) -> int:
        value = entry.values.get(attribute, (0, 0))[1]
        return value if isinstance(value, int) else 0

    def _reference(self, entry: _Entry, attribute: int) -> int:
        form, value = entry.values.get(attribute, (0, 0))
        if not isinstance(value, int) or form in (0x20, 0x1C):  # signatures, other files
            return 0
        found = value if form == 0x10 else value + self._header if form else 0
        return found if self._start <= found < self._end else 0

    def _text_of(self, entries: list[_Entry], attribute: int) -> str:
        return next((text for e in entries if (text := self._text(e, attribute))), "")

    def _text(self, entry: _Entry, attribute: int) -> str:
        form, value = entry.values.get(attribute, (0, b""))
        if isinstance(value, bytes):
            return value.decode("utf-8", "replace")
        if form in (0x1A, 0x25, 0x26, 0x27, 0x28):  # strx
            at = self._strings_base + 4 * value
            value = int.from_bytes(self._sections[".debug_str_offsets"][at : at + 4], "little")
            return t.string_at(self._sections[".debug_str"], value)
        section = {0x0E: ".debug_str", 0x1F: ".debug_line_str"}.get(form)
        return t.string_at(self._sections[section], value) if section else ""


def _size_in(described: str) -> str:
    return described.rpartition("(")[2].removesuffix(")")
