"""The layouts of variables' types, as debug information has them.

Decides what is to be known of a type, so that two can be compared and one be kept in the journal: see `migrate`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePath
from typing import Any

import drgn

from patcher.blocks import Kind
from patcher.data.comparison import Comparison, Layout, Spec
from patcher.data.dwarf import Layouts
from patcher.data.migrate import plain_name
from patcher.live import base_name
from patcher.part import Part

_RECORDS = (drgn.TypeKind.STRUCT, drgn.TypeKind.UNION, drgn.TypeKind.CLASS)


def layout_of(layouts: Layouts, name: str, file: str = "") -> Layout | None:
    """Return the layout of a variable of a program or object, None when its debug information does not tell.

    `file` is the source file that defines it, for one that other files may have a namesake of.
    """
    flags = drgn.FindObjectFlags.VARIABLE
    program = layouts._program
    try:
        kind = program.object(plain_name(name), flags, PurePath(file).name if file else None).type_
        return _layout(kind)
    except (LookupError, ValueError, SyntaxError, TypeError):
        return None


def comparisons(part: Part, old: Layouts | None, new: Layouts | None) -> dict[str, Comparison]:
    """Return, by symbol, how the variables that a unit defines or uses are laid out now and in its new object."""
    view = part.unit.view
    known = {n: Layout.from_text(s.layout) for s in view.journal.storages_at(view.generation) for n in s.names}
    found = {}
    for name, file in _variables(part):
        # A number may be that of a piece of a variable that the compiler took apart.
        whole = base_name(name)
        before = known[name] if name in known else layout_of(old, whole, file) if old is not None else None
        after = layout_of(new, whole, file) if new is not None else None
        found[name] = Comparison(before, after)
    return found


def _variables(part: Part) -> Iterable[tuple[str, str]]:
    """Yield the variables' symbols, each with the file that a local one is of."""
    for block in part.blocks.data_blocks():
        if block.kind is Kind.DATA and block.symbols:
            yield block.name, "" if block.exported else part.unit.key.partition("#")[0]
    for symbol in part.blocks.object.symbols:
        if symbol.undefined and symbol.name:
            yield symbol.name, ""


def _layout(kind: Any) -> Layout | None:
    count = 1
    element = kind
    while (bare := _bare(element)).kind == drgn.TypeKind.ARRAY:
        count *= bare.length or 0
        element = bare.type
    spec = _spec(element)
    return Layout(tuple(_names(element)), count, spec, tuple(sorted(set(_within(element))))) if spec else None


def _bare(kind: Any) -> Any:
    while kind.kind == drgn.TypeKind.TYPEDEF:
        kind = kind.type
    return kind


def _names(kind: Any) -> Iterable[str]:
    while kind.kind == drgn.TypeKind.TYPEDEF:
        yield kind.name
        kind = kind.type
    tag = getattr(kind, "tag", None)
    if tag:
        yield tag.rpartition("::")[2]


def _within(kind: Any) -> Iterable[str]:
    """Yield the names of a type and of every type that objects of it contain."""
    yield from _names(kind)
    bare = _bare(kind)
    if bare.kind in _RECORDS:
        for member in bare.members or ():
            yield from _within(member.type)
    elif bare.kind == drgn.TypeKind.ARRAY:
        yield from _within(bare.type)


def _spec(kind: Any) -> Spec | None:
    bare = _bare(kind)
    if bare.kind in _RECORDS:
        if not bare.is_complete():
            return None
        members = [[m.name or "", m.bit_offset, m.bit_field_size or 0, _spec(m.type)] for m in bare.members]
        return ["record", bare.size, members]
    if bare.kind == drgn.TypeKind.ARRAY:
        return ["array", bare.length or 0, _spec(bare.type)]
    if bare.kind == drgn.TypeKind.POINTER:
        return ["pointer", bare.size]
    if bare.kind == drgn.TypeKind.FLOAT:
        return ["float", bare.size]
    size = getattr(bare, "size", None)
    return ["whole", size] if size else None
