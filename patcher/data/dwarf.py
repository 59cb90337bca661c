"""TYPES BY NAME: how all of a program and an object lay out the types that both know, and where they differ.

For what `layouts` cannot compare unit by unit: types that a unit starts to use and another unit has, and debug
information of other forms. Layouts are compared, not names: a renamed member is no change, a member that moved, grew
or hid in padding is one.

drgn reads the debug information; it lists no types of a unit, so where the names are not known, the candidates are
the identifiers in the object's `.debug_str`. Specification: DWARF 5, section 5.7.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patcher.data.prepare import debug_strings, readable, reading
from patcher.elf import tables as t


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
_NAMED = 4  # differences that a message lists


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
                file.write(readable(data, name))
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
            with reading(self._name):
                self._found[key] = self._look_up(name, file)
        return self._found[key]

    def _look_up(self, name: str, file: str) -> Any:
        try:
            return self._program.type(name, file) if file else self._program.type(name)
        except (LookupError, SyntaxError, ValueError):
            return None


def changed_types(
    old: Layouts, data: bytes, name: str = "the object", names: Collection[str] | None = None
) -> tuple[TypeChange, ...]:
    """Return the types that an object uses in another layout than the program does.

    `data` is the object's contents, `name` for messages; `names` are the types to look at, None for all. Types that
    only one of the two knows are no change. Where the program has several types of one name, a change is one only if
    none of them, in any file the object was made from, fits. Raises `PatcherError` when the debug information of
    either is damaged.
    """
    if names is not None and not any((found := old.find(n)) is not None and _laid_out(found) for n in names):
        return ()
    new = Layouts.of_object(data, name)
    if new is None:
        return ()
    strings = debug_strings(t.read_raw(name, data))
    with reading(name):  # members are read when they are looked at
        return tuple(_causes(_changes(old, new, strings, names)))


def _changes(old: Layouts, new: Layouts, strings: bytes, names: Collection[str] | None) -> list[TypeChange]:
    changes = []
    for name in _candidates(strings) if names is None else names:
        ours = old.find(name)  # remembered from save to save, so asked first
        if ours is None or not _laid_out(ours):
            continue
        theirs = new.find(name)
        if theirs is None or not _laid_out(theirs) or _same(ours, theirs):
            continue
        if not any((other := old.find(name, f)) is not None and _same(other, theirs) for f in _files(strings)):
            changes.append(TypeChange(name, tuple(_differences(ours, theirs))))
    return changes


def _load(path: str, name: str) -> Any:
    program = drgn.Program()
    module = program.extra_module("patcher", create=True)
    module = module[0] if isinstance(module, tuple) else module
    module.address_range = (0, (1 << 47) - 1)
    with reading(name):
        module.try_file(path, force=True)
    return program if module.debug_file_status == drgn.ModuleFileStatus.HAVE else None


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
