"""TYPES: how a program and an object lay out the types that both know, and where they differ.

Code is new, data stays: a type whose layout changed makes old data and new code disagree. Layouts are compared,
not names: a renamed member is no change, a member that moved, grew or hid in padding is one.

drgn reads the debug information; it lists no types of a unit, so the candidates are the identifiers in the
object's `.debug_str`. Specification: DWARF 5, section 5.7.
"""

from __future__ import annotations

import os
import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from patcher.elf import tables as t
from patcher.errors import PatcherError


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """Set an environment variable that is not set, for a library that looks at it only as it is loaded."""
    given = name in os.environ
    os.environ.setdefault(name, value)
    try:
        yield
    finally:
        if not given:
            del os.environ[name]


# While its threads wait for work they spin by default, for 20 ms of processor time after each small object. The
# programs that are started from here must not inherit the setting.
with _environment("OMP_WAIT_POLICY", "passive"):
    import drgn

_IDENTIFIER = re.compile(rb"[A-Za-z_]\w*")
_TAGS = ("struct ", "union ", "enum ", "")
_DTPOFF64, _DTPOFF32, _NONE = 17, 21, 0
_NAMED = 4  # differences that a message lists
_DENSEST = 100  # debug information that is smaller than this part of itself when compressed is made to fill memory


@dataclass(frozen=True, slots=True)
class TypeChange:
    """A type that the process has in another layout; `details` says where they differ."""

    name: str
    details: tuple[str, ...]

    def describe(self) -> str:
        shown = "; ".join(self.details[:_NAMED])
        more = len(self.details) - _NAMED
        return f"`{self.name}`: {shown}" + (f"; and {more} more" if more > 0 else "")


class Layouts:
    """The types of one program; `name` is for messages."""

    def __init__(self, program: Any, name: str) -> None:
        self._program = program
        self._name = name
        self._found: dict[tuple[str, str], Any] = {}

    @classmethod
    def of_program(cls, file: Path) -> Layouts | None:
        """Read a module's debug information; None when it has none."""
        program = _load(str(file), str(file))
        return cls(program, str(file)) if program is not None else None

    @classmethod
    def of_object(cls, data: bytes, name: str) -> Layouts | None:
        """Read a relocatable object's debug information; None when it has none."""
        descriptor = os.memfd_create("object", os.MFD_CLOEXEC)
        try:
            with os.fdopen(descriptor, "wb", closefd=False) as file:
                file.write(_readable(data, name))
            program = _load(f"/proc/self/fd/{descriptor}", name)
        finally:
            os.close(descriptor)
        return cls(program, name) if program is not None else None

    def find(self, name: str, file: str = "") -> Any:
        """Return a complete type, of that source file if one is given, or None.

        Raises `PatcherError` when the debug information is damaged.
        """
        key = name, file
        if key not in self._found:
            with _reading(self._name):
                self._found[key] = self._look_up(name, file)
        return self._found[key]

    def _look_up(self, name: str, file: str) -> Any:
        try:
            return self._program.type(name, file) if file else self._program.type(name)
        except (LookupError, SyntaxError, ValueError):
            return None


def changed_types(old: Layouts, data: bytes, name: str = "the object") -> tuple[TypeChange, ...]:
    """Return the types that an object uses in another layout than the program does.

    `data` is the object's contents, `name` for messages. Types that only one of the two knows are no change. Where the
    program has several types of one name, a change is one only if none of them, in any file the object was made from,
    fits. Raises `PatcherError` when the debug information of either is damaged.
    """
    new = Layouts.of_object(data, name)
    if new is None:
        return ()
    strings = _debug_strings(t.read_raw(name, data))
    with _reading(name):  # members are read when they are looked at
        return tuple(_causes(_changes(old, new, strings)))


def _changes(old: Layouts, new: Layouts, strings: bytes) -> list[TypeChange]:
    changes = []
    for name in _candidates(strings):
        ours = old.find(name)  # remembered from save to save, so asked first
        if ours is None or not _laid_out(ours):
            continue
        theirs = new.find(name)
        if theirs is None or not _laid_out(theirs) or _same(ours, theirs):
            continue
        if not any((other := old.find(name, f)) is not None and _same(other, theirs) for f in _files(strings)):
            changes.append(TypeChange(name, tuple(_differences(ours, theirs))))
    return changes


def has_types(data: bytes, name: str = "the object") -> bool:
    """Tell whether an object has debug information, and in a form that can be read here.

    Raises `PatcherError` when it is damaged; `name` is for its message.
    """
    raw = t.read_raw(name, data)
    debug = [i for i in range(len(raw.section_headers)) if raw.section_name(i).startswith(".debug_")]
    if not any(raw.section_name(i) == ".debug_info" for i in debug):
        return False
    packed = [i for i in debug if int(raw.section_headers[i]["flags"]) & t.SHF_COMPRESSED]
    return all(_inflate(raw, i) is not None for i in packed)


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Refuse a file whose debug information turns out to be damaged, or of a form that drgn does not know."""
    try:
        yield
    except (PatcherError, MemoryError):
        raise
    except Exception as error:  # drgn has no class of its own for what libelf refuses
        raise _unreadable(name, str(error)) from None


def _unreadable(name: str, why: str) -> PatcherError:
    return PatcherError(
        f"the debug information of {name} cannot be read: {why}",
        "compile it again with plain -g; or without -g, then the layouts of its types are not checked",
        code="debug-info",
    )


def _load(path: str, name: str) -> Any:
    program = drgn.Program()
    module = program.extra_module("patcher", create=True)
    module = module[0] if isinstance(module, tuple) else module
    module.address_range = (0, (1 << 47) - 1)
    with _reading(name):
        module.try_file(path, force=True)
    return program if module.debug_file_status == drgn.ModuleFileStatus.HAVE else None


def _readable(data: bytes, name: str) -> bytes:
    """Return an object as drgn can read it: without the debug relocations that it does not know (offsets of
    thread-locals, which are no types), and with compressed debug sections inflated, behind the end of the file."""
    raw = t.read_raw(name, data)
    _check_apart(raw)
    patched = bytearray(data)
    for index in range(len(raw.section_headers)):
        header = raw.section_headers[index]
        if ".debug" not in raw.section_name(index):
            continue
        if int(header["type"]) == t.SHT_RELA:
            _drop_tls(raw, index, patched)
        elif int(header["flags"]) & t.SHF_COMPRESSED:
            _append_inflated(raw, index, patched)
    return bytes(patched)


def _check_apart(raw: t.RawFile) -> None:
    """Refuse sections that share bytes with something: drgn relocates debug sections in place, libelf goes on
    reading what it wrote over, and the two end this process."""
    headers = raw.section_headers
    taken = headers[(headers["type"] != t.SHT_NOBITS) & (headers["type"] != t.SHT_NULL) & (headers["size"] > 0)]
    table = int.from_bytes(raw.data[40:48], "little")  # e_shoff
    extents = [(0, t.EHDR.itemsize), (table, table + headers.nbytes)]
    extents += [(start, start + size) for start, size in taken[["offset", "size"]].tolist()]
    extents.sort()
    if any(end > start for (_, end), (start, _) in pairwise(extents)) or extents[-1][1] > len(raw.data):
        raise _unreadable(raw.name, "its sections overlap, or reach beyond its end")


def _drop_tls(raw: t.RawFile, index: int, patched: bytearray) -> None:
    rows = raw.table(index, t.RELA)
    start = int(raw.section_headers[index]["offset"])
    for row in ((rows["type"] == _DTPOFF64) | (rows["type"] == _DTPOFF32)).nonzero()[0].tolist():
        struct.pack_into("<I", patched, start + row * t.RELA.itemsize + 8, _NONE)


def _append_inflated(raw: t.RawFile, index: int, patched: bytearray) -> None:
    contents = _inflate(raw, index) or b""
    headers = int.from_bytes(raw.data[40:48], "little")  # e_shoff
    place = headers + index * t.SHDR.itemsize
    flags = int(raw.section_headers[index]["flags"]) & ~t.SHF_COMPRESSED
    struct.pack_into("<Q", patched, place + 8, flags)
    struct.pack_into("<QQ", patched, place + 24, len(patched), len(contents))
    struct.pack_into("<Q", patched, place + 48, 1)
    patched += contents


def _debug_strings(raw: t.RawFile) -> bytes:
    found = b""
    for index in range(len(raw.section_headers)):
        if raw.section_name(index) in (".debug_str", ".debug_line_str"):
            compressed = int(raw.section_headers[index]["flags"]) & t.SHF_COMPRESSED
            found += b"\0" + ((_inflate(raw, index) or b"") if compressed else bytes(raw.contents(index)))
    return found


def _inflate(raw: t.RawFile, index: int) -> bytes | None:
    """Return what a compressed section holds, or None when it is not in zlib's format (but in zstd's).

    Raises `PatcherError` when it is damaged.
    """
    contents, name = bytes(raw.contents(index)), raw.section_name(index)
    # Elf64_Chdr: type, reserved, size, alignment (System V ABI, "Section compression"); 1 is zlib
    kind, size = int.from_bytes(contents[:4], "little"), int.from_bytes(contents[8:16], "little")
    if kind != 1:
        return None
    if size > _DENSEST * len(contents):
        raise _unreadable(raw.name, f"{name} claims {size} bytes, compressed to {len(contents)}")
    try:
        return zlib.decompressobj().decompress(contents[24:], size) if size else b""
    except zlib.error as error:
        raise _unreadable(raw.name, f"{name}: {error}") from None


def _candidates(strings: bytes) -> Iterator[str]:
    for word in sorted({s for s in strings.split(b"\0") if _IDENTIFIER.fullmatch(s)}):
        for tag in _TAGS:
            yield tag + word.decode()


def _files(strings: bytes) -> list[str]:
    names = {
        s.rpartition(b"/")[2] for s in strings.split(b"\0") if s.endswith((b".h", b".c", b".hpp", b".cc", b".cpp"))
    }
    return sorted(n.decode("utf-8", "replace") for n in names)


# --- comparing ----------------------------------------------------------------------------------------------------


def _bare(kind: Any) -> Any:
    while kind.kind == drgn.TypeKind.TYPEDEF:
        kind = kind.type
    return kind


def _laid_out(kind: Any) -> bool:
    """Tell whether a type has a layout of its own to compare: a complete struct, union or enum."""
    bare = _bare(kind)
    if bare.kind in (drgn.TypeKind.STRUCT, drgn.TypeKind.UNION, drgn.TypeKind.CLASS):
        return bool(bare.is_complete())
    return bare.kind == drgn.TypeKind.ENUM and bool(bare.is_complete())


def _same(ours: Any, theirs: Any, depth: int = 0) -> bool:
    a, b = _bare(ours), _bare(theirs)
    if a.kind != b.kind:
        return {a.kind, b.kind} <= _WHOLE_NUMBERS and a.size == b.size
    if a.kind in (drgn.TypeKind.STRUCT, drgn.TypeKind.UNION, drgn.TypeKind.CLASS):
        return _same_members(a, b, depth)
    if a.kind == drgn.TypeKind.ENUM:
        return depth > 0 or not list(_enum_differences(a, b))
    if a.kind == drgn.TypeKind.ARRAY:
        return bool(a.length == b.length) and _same(a.type, b.type, depth + 1)
    if a.kind in (drgn.TypeKind.POINTER, drgn.TypeKind.FUNCTION, drgn.TypeKind.VOID):
        return True  # what a pointer leads to is a type of its own
    return bool(a.size == b.size)


_WHOLE_NUMBERS = {drgn.TypeKind.INT, drgn.TypeKind.BOOL, drgn.TypeKind.ENUM}


def _same_members(a: Any, b: Any, depth: int) -> bool:
    if not a.is_complete() or not b.is_complete():
        return True
    if a.size != b.size or len(a.members) != len(b.members):
        return False
    if depth and a.tag is not None and a.tag == b.tag:
        return True  # a type of that name is compared by itself
    if _swapped(a, b):
        return False
    return all(
        _same_place(m, n) and _same(m.type, n.type, depth + 1) for m, n in zip(a.members, b.members, strict=True)
    )


def _swapped(a: Any, b: Any) -> bool:
    """Tell whether a member stands where another one stood; one that is only renamed does not."""
    places = {m.name: m.bit_offset for m in a.members if m.name}
    return any(places.get(m.name, m.bit_offset) != m.bit_offset for m in b.members)


def _same_place(m: Any, n: Any) -> bool:
    return bool(m.bit_offset == n.bit_offset and m.bit_field_size == n.bit_field_size)


def _enum_differences(a: Any, b: Any) -> Iterator[str]:
    values = {e.name: e.value for e in b.enumerators}
    for e in a.enumerators:
        if e.name in values and values[e.name] != e.value:
            yield f"`{e.name}` {e.value} -> {values[e.name]}"


def _differences(ours: Any, theirs: Any) -> Iterator[str]:
    a, b = _bare(ours), _bare(theirs)
    if a.kind != b.kind:
        yield "it is another kind of type"
        return
    if a.kind == drgn.TypeKind.ENUM:
        yield from _enum_differences(a, b)
        return
    if a.size != b.size:
        yield f"size {a.size} -> {b.size}"
    after = {m.name: m for m in b.members}
    before = {m.name: m for m in a.members}
    for name, m in before.items():
        n = after.get(name)
        if n is None:
            yield f"member `{name or 'without a name'}` at offset {m.bit_offset // 8} is gone"
        elif m.bit_offset != n.bit_offset:
            yield f"member `{name}` offset {_offset(m)} -> {_offset(n)}"
        elif m.bit_field_size != n.bit_field_size or not _same(m.type, n.type, 1):
            yield f"member `{name}` at offset {_offset(m)} has another type"
    for name, n in after.items():
        if name not in before:
            yield f"member `{name or 'without a name'}` is new at offset {_offset(n)}"


def _offset(member: Any) -> str:
    return f"{member.bit_offset // 8}" + (f".{member.bit_offset % 8}" if member.bit_offset % 8 else "")


def _causes(changes: list[TypeChange]) -> list[TypeChange]:
    """Leave out typedefs that only repeat the change of their struct."""
    seen: set[tuple[str, ...]] = set()
    kept = []
    for change in sorted(changes, key=lambda c: " " not in c.name):
        if change.details not in seen:
            seen.add(change.details)
            kept.append(change)
    return kept
