"""Which variables get new storage because their layout changed, and what fills it.

A variable of static storage whose size or type differs from what the process has is not to be had in place: it gets
new storage, initialised as the new source says, which is filled from the old before any new code runs. All code that
refers to it must be new (`holders` sees to that). The old storage is never written: it is what a revert goes back to.

Decides which variables, and whether a function of the new source fills one, or bytes are moved (`carry` says where).
How that is done is `filling`'s business.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from patcher.blocks import Block, External, Kind, Place
from patcher.constructors import belonging, touched
from patcher.data.carry import is_function, symbols_of
from patcher.data.comparison import Comparison, Layout, Spec, same
from patcher.data.names import guard_of, spelling
from patcher.data.outcome import Fate
from patcher.data.shapes import Carried, Form, Move, Shape
from patcher.errors import UnsafeChange
from patcher.live import LiveVariable, base_name
from patcher.match import Status, is_private_piece

if TYPE_CHECKING:
    from patcher.data.layouts import LayoutVerdict
    from patcher.part import Part
    from patcher.patch.journal import ArenaView, Storage

PREFIX = "patcher_migrate_"

_MANGLED = re.compile(r"_Z(?:L|N12_GLOBAL__N_1)?(\d+)(\w+)")


def plain_name(symbol: str) -> str:
    """Return the name that the source has for a symbol, as far as it stands in it."""
    found = _MANGLED.fullmatch(symbol)
    return found[2][: int(found[1])] if found else symbol


@dataclass(frozen=True, slots=True)
class ByFunction:
    """A function of the new source fills it, element by element, called as f(new, old)."""

    part: Part
    function: Block
    count: int
    new_step: int
    old_step: int

    @property
    def name(self) -> str:
        return plain_name(self.function.name)


@dataclass(frozen=True, slots=True)
class ByMoves:
    """Bytes of the old storage go to places in the new one."""

    moves: tuple[Move, ...]
    told: str
    name: str = ""

    def moved(self, old: bytes) -> list[tuple[int, bytes]]:
        """Return what stands where in the new storage. Raises `OverflowError` for a number that has no room there."""
        return [(m.target, m.carried(old)) for m in self.moves]


@dataclass(frozen=True, slots=True)
class ByInitialiser(ByMoves):
    """Nothing fills it: it starts with the initial value of the new source, as the user wants."""


How = ByFunction | ByMoves


@dataclass(frozen=True, slots=True)
class Migration:
    """A variable that gets new storage: its block in the new object, what the process has, and what fills it."""

    part: Part
    variable: Block
    old: LiveVariable
    layout: Layout | None
    how: How
    qualified: str = ""  # of a static variable of a function

    @property
    def name(self) -> str:
        return self.qualified or base_name(self.variable.name)

    def names(self, symbols: tuple[str, ...]) -> tuple[str, ...]:
        """Return what it is found by in later changes: its symbols, where these last."""
        return (self.qualified,) if self.qualified else symbols

    @property
    def note(self) -> str:
        return self.how.told if isinstance(self.how, ByMoves) else f"{self.sizes}, by {self.how.name}"

    @property
    def sizes(self) -> str:
        return f"{self.old.size} -> {self.variable.size} bytes"

    @property
    def fate(self) -> Fate:
        return Fate.REINITIALISED if isinstance(self.how, ByInitialiser) else Fate.MIGRATED


def started_anew(migration: Migration) -> Migration:
    """Return a migration that carries nothing over. Raises `UnsafeChange` where code gives the variable its value."""
    part, variable = migration.part, migration.variable
    guards = {guard_of(s.name) for s in variable.symbols}
    guarded = any(s.name in guards for b in part.blocks.data_blocks() for s in b.symbols)
    started = belonging(part.blocks, [s.function for s in part.starters]).values()
    if guarded or variable in touched(part.blocks, frozenset().union(*started)):
        raise UnsafeChange(
            f"`{migration.name}` of {part.source} got its initial value from code, which does not run again",
            "leave out --reinit for it, or restart the program",
            code="reinit",
        )
    return replace(migration, how=ByInitialiser((), migration.sizes))


Functions = dict[str, list[tuple["Part", Block]]]


def functions_of(parts: Iterable[Part]) -> Functions:
    """Return the functions that fill something, by the name of what they fill."""
    found: Functions = {}
    for part in parts:
        for block in part.blocks.functions:
            if PREFIX in block.name and (name := plain_name(block.name)).startswith(PREFIX):
                found.setdefault(name.removeprefix(PREFIX), []).append((part, block))
    return found


def concerned(parts: Sequence[Part], view: ArenaView) -> bool:
    """Tell whether layouts of single variables have to be known at all: something is migrated, or was."""
    return bool(functions_of(parts)) or bool(view.journal.storages_at(view.generation))


def taken_care_of(parts: Sequence[Part], storages: Sequence[Storage]) -> tuple[str, ...]:
    """Return the types that may differ from the program's, since every variable that has them is compared by itself.

    Those of a variable that was carried over are as that has them.
    """
    functions = functions_of(parts)
    found = {name for s in storages if s.by or _is_as_stored(parts, s) for name in s.types} | set(functions)
    for part in parts:
        for name, comparison in part.layouts.items():
            if comparison.new is not None and (
                plain_name(name) in functions or functions.keys() & set(comparison.new.names)
            ):
                found |= set(comparison.new.types)
    return tuple(sorted(found))


def stored_variables(parts: Sequence[Part], storages: Sequence[Storage]) -> tuple[str, ...]:
    """Return the variables that were carried over and have now the layout that they got then."""
    return tuple(s.name for s in storages if not s.by and _is_as_stored(parts, s))


def _is_as_stored(parts: Sequence[Part], storage: Storage) -> bool:
    """Tell whether a variable that was carried over has the layout that it got then."""
    known = [c for p in parts for name in storage.names if (c := p.layouts.get(name)) is not None]
    return any(c.is_same for c in known) and not any(c.differs for c in known)


def migrations(
    parts: Sequence[Part],
    living: Callable[[Part, Block], LiveVariable | None],
    denoted: Callable[[Part, str], LiveVariable | None],
    function: Callable[[Block], str],
) -> tuple[Migration, ...]:
    """Return the variables of some units that get new storage.

    `living` says where the process has a variable that a unit defines, `denoted` what a name denotes that it does not,
    `function` in which function a variable is.
    Raises `UnsafeChange` for one that changed and that nothing fills.
    """
    functions = functions_of(parts)
    found = []
    for part in parts:
        carried = _carried_blocks(part, function)
        for block in part.blocks.data_blocks():
            if block.kind is Kind.DATA and block.symbols:
                migration = _migration(part, block, functions, carried.get(block), living)
                found += [migration] if migration is not None else []
    _check_externals(parts, found, denoted)
    return tuple(found)


def _carried_blocks(part: Part, function: Callable[[Block], str]) -> dict[Block, Carried]:
    """Return the blocks of the variables that are carried over. Raises `UnsafeChange` for one that is not whole."""
    found = {}
    for name, carried in part.carried.items():
        blocks = _blocks_of(part, name, carried, function)
        if len(blocks) != 1 or blocks[0].size != carried.new.size or (carried.scoped and blocks[0].exported):
            raise _taken_apart(part, name)
        found[blocks[0]] = carried
    return found


def _blocks_of(part: Part, name: str, carried: Carried, function: Callable[[Block], str]) -> list[Block]:
    every = [b for b in part.blocks.data_blocks() if b.kind is Kind.DATA and b.symbols]
    if not carried.scoped:
        wanted = symbols_of(name)
        return [b for b in every if any(s.name in wanted for s in b.symbols)]
    outer, _, own = name.rpartition("::")
    scoped = (b for b in every if (said := spelling(b.name)).scoped and not said.guard and said.source == own)
    return [b for b in scoped if is_function(function(b), outer)]


def _migration(
    part: Part,
    block: Block,
    functions: Functions,
    carried: Carried | None,
    living: Callable[[Part, Block], LiveVariable | None],
) -> Migration | None:
    if spelling(block.name).scoped:
        if carried is not None:
            return _carried_static(part, block, carried, functions, living)
        _check_static(part, block, functions)
        return None
    old = living(part, block)
    comparison = part.layouts.get(block.name, Comparison(None, None))
    if old is None and (comparison.old is not None or carried is not None):
        raise _taken_apart(part, plain_name(block.name))
    fillable = {plain_name(block.name), *(comparison.new.types if comparison.new is not None else ())}
    if old is not None and carried is not None and old.size == block.size and comparison.is_same:
        return None  # an earlier change gave it this layout
    if old is not None and carried is not None and not functions.keys() & fillable:
        return _carried(part, block, old, comparison, carried)
    if old is None or not ((old.size and block.size and old.size != block.size) or comparison.differs):
        return None
    name = plain_name(block.name)
    own = functions.get(name)
    if own:
        function = _one_of(own, part)
        how = ByFunction(*function, 1, block.size, old.size)
        return Migration(part, block, old, comparison.new, how)
    return Migration(part, block, old, comparison.new, _by_type(part, block, old, comparison, functions))


def _carried(part: Part, block: Block, old: LiveVariable, comparison: Comparison, carried: Carried) -> Migration:
    if old.size != carried.old.size or not _fits(comparison.old, carried.old):
        raise UnsafeChange(
            f"`{plain_name(block.name)}` of {part.source} has {old.size} bytes in the process, and another layout than "
            "its program was built with; what it is, only the controller knows that changed it",
            f"write `void {PREFIX}{plain_name(block.name)}(void *new_object, const void *old_object)`, which fills the "
            "new one; or restart the program",
            code="layout",
        )
    return Migration(part, block, old, comparison.new, ByMoves(carried.moves, carried.note))


def _carried_static(
    part: Part,
    block: Block,
    carried: Carried,
    functions: Functions,
    living: Callable[[Part, Block], LiveVariable | None],
) -> Migration | None:
    """Have a function's static variable filled from what it was, unless an earlier change has done that."""
    old = living(part, block)
    if old is None:
        raise _taken_apart(part, carried.name)
    view, layout = part.unit.view, _layout_of(carried.new)
    storage = next((s for s in view.journal.storages_at(view.generation) if s.address == old.address), None)
    before = Layout.from_text(storage.layout) if storage is not None else _layout_of(carried.old)
    if storage is not None and before is not None and Comparison(before, layout).is_same and old.size == block.size:
        return None
    migration = _carried(part, block, old, Comparison(before, layout), carried)
    if storage is not None and before is None:
        raise _taken_apart(part, carried.name)
    how = _filled_static(part, block, carried, functions) or migration.how
    return replace(migration, qualified=carried.name, how=how)


def _filled_static(part: Part, block: Block, carried: Carried, functions: Functions) -> ByFunction | None:
    """Return the function of the user's that fills a static variable; None if there is none.

    Raises `UnsafeChange` when there is one for a part of it only.
    """
    own = functions.get(spelling(block.name).source)
    if own:
        return ByFunction(*_one_of(own, part), 1, carried.new.size, carried.old.size)
    old, new, count = carried.old, carried.new, 1
    while old.element is not None and new.element is not None:
        old, new, count = old.element, new.element, count * min(old.count, new.count)
    name = _type_name(new)
    if name in functions and name == _type_name(old):
        return ByFunction(*_one_of(functions[name], part), count, new.size, old.size)
    if functions.keys() & set(_type_names(carried.new)):
        raise _to_be_moved_out(part, carried.name)
    return None


def _type_name(shape: Shape) -> str:
    return shape.text.rpartition(" ")[2].rpartition("::")[2]


def _type_names(shape: Shape) -> Iterator[str]:
    yield _type_name(shape)
    for inner in (shape.element, *(p.shape for p in shape.parts)):
        if inner is not None:
            yield from _type_names(inner)


def _layout_of(shape: Shape) -> Layout | None:
    count = 1
    while shape.element is not None:
        count, shape = count * shape.count, shape.element
    spec = _spec(shape)
    return Layout((), count, spec, ()) if spec is not None else None


def _fits(layout: Layout | None, shape: Shape) -> bool:
    """Tell whether a layout, where it is known, is that of a shape."""
    if layout is None:
        return True
    count = 1
    while shape.element is not None:
        count, shape = count * shape.count, shape.element
    return count == layout.count and same(layout.spec, _spec(shape))


_SPECS = {Form.NUMBER: "whole", Form.FLOAT: "float", Form.POINTER: "pointer"}


def _spec(shape: Shape) -> Spec | None:
    if shape.form in (Form.STRUCT, Form.UNION):
        return ["record", shape.size, [[p.name, p.offset, p.bits, _spec(p.shape)] for p in shape.parts]]
    if shape.element is not None:
        return ["array", shape.count, _spec(shape.element)]
    return [_SPECS[shape.form], shape.size] if shape.form in _SPECS else None


def _by_type(part: Part, block: Block, old: LiveVariable, comparison: Comparison, functions: Functions) -> How:
    before, after = comparison.old, comparison.new
    typed = next((functions[n] for n in after.names if n in functions), None) if after is not None else None
    sizes = f"{old.size} -> {block.size} bytes" if old.size != block.size else "the same size, other members"
    if typed is None or after is None:
        raise UnsafeChange(
            f"`{plain_name(block.name)}` of {part.source} has another layout in the process ({sizes})",
            f"write `void {PREFIX}{plain_name(block.name)}(void *new_object, const void *old_object)`, which fills the "
            "new one; or restart the program, or keep the layout",
            code="layout",
        )
    if before is None or not comparison.elements_differ or not after.element_size:
        raise UnsafeChange(
            f"`{plain_name(block.name)}` of {part.source} has another layout in the process ({sizes}), and "
            + ("its debug information does not tell which" if before is None else "not because of its elements' type"),
            f"write `void {PREFIX}{plain_name(block.name)}(void *new_object, const void *old_object)`",
            code="layout",
        )
    count = min(before.count, after.count)
    return ByFunction(*_one_of(typed, part), count, after.element_size, before.element_size)


def _one_of(functions: Sequence[tuple[Part, Block]], part: Part) -> tuple[Part, Block]:
    own = [f for f in functions if f[0] is part] or list(functions)
    if len(own) > 1:
        raise UnsafeChange(
            f"`{plain_name(own[0][1].name)}` is defined by {' and '.join(p.source for p, _ in own)}",
            "define it once",
            code="ambiguous-symbol",
        )
    return own[0]


def _check_static(part: Part, block: Block, functions: Functions) -> None:
    """Refuse a function's static variable that a function of the user's would have to fill."""
    name = spelling(block.name).source
    comparison = part.layouts.get(block.name, Comparison(None, None))
    known = [layout for layout in (comparison.old, comparison.new) if layout is not None]
    if comparison.differs or (known and (name in functions or any(n in functions for k in known for n in k.names))):
        raise _taken_apart(part, name)
    # Debug information is read by name, which a variable of a function has only there.
    sizes = {c.new.element_size for c in part.layouts.values() if c.new for n in c.new.names if n in functions}
    if name in functions or any(size and block.size % size == 0 for size in sizes):
        raise _to_be_moved_out(part, name)


def check_statics(part: Part, verdicts: Iterable[LayoutVerdict]) -> None:
    """Refuse functions' static variables of types that may differ because functions of the user's fill them, if these
    cannot be carried over: nobody would fill them."""
    for verdict in verdicts:
        for variable in verdict.variables if verdict.allowed and not verdict.carried else ():
            if variable.scoped:
                raise _to_be_moved_out(part, variable.name)


def _to_be_moved_out(part: Part, name: str) -> UnsafeChange:
    return UnsafeChange(
        f"`{name}` of {part.source} is a static variable of a function, and may be of a type that is migrated",
        "move it out of the function, to the level of the file",
        code="layout",
    )


def _taken_apart(part: Part, name: str) -> UnsafeChange:
    return UnsafeChange(
        f"the compiler made several variables of `{name}` of {part.source}, or none, so that it cannot be migrated",
        "restart the program; a variable that is not static, or whose address is taken, stays whole",
        code="layout",
    )


def _check_externals(
    parts: Sequence[Part], found: Sequence[Migration], denoted: Callable[[Part, str], LiveVariable | None]
) -> None:
    """Refuse code that uses a variable of a unit that is not there, in another layout than that unit has it."""
    brought = {s.name for m in found for s in m.variable.symbols if not s.local}
    for part in parts:
        for symbol in part.blocks.object.symbols:
            if not symbol.undefined or symbol.name in brought or symbol.name not in part.layouts:
                continue
            if part.layouts[symbol.name].differs and denoted(part, symbol.name) is not None:
                raise UnsafeChange(
                    f"`{symbol.name}`, which {part.source} uses, has another layout in the process, and the file that "
                    "defines it is not part of the change",
                    "save that file as well",
                    code="layout",
                )


def require_users(parts: Sequence[Part], found: Sequence[Migration]) -> None:
    """Have every function of the units new that refers to a variable with new storage, changed or not."""
    blocks = {m.variable for m in found}
    names = {s.name for m in found for s in m.variable.symbols if not s.local}
    for part in parts:
        wanted: set[Block] = set()
        while True:
            more = {f for f in part.blocks.functions if f not in wanted and _refers(part, f, blocks | wanted, names)}
            if not more:
                break
            # A piece that was split off is entered by its function alone: that has to be new with it.
            wanted |= {f for f in more if is_private_piece(f.name)}
            for function in more:
                if part.status(function) in (Status.SAME, Status.LINE_ONLY):
                    part.require(function)
            if not any(is_private_piece(f.name) for f in more):
                break


def _refers(part: Part, function: Block, blocks: set[Block], names: set[str]) -> bool:
    return any(
        (isinstance(r.target, Place) and r.target.block in blocks)
        or (isinstance(r.target, External) and r.target.name in names)
        for r in part.blocks.references(function)
    )


def users(part: Part, found: Sequence[Migration]) -> tuple[Block, ...]:
    """Return the functions of a unit that refer to variables with new storage."""
    blocks = {m.variable for m in found}
    names = {s.name for m in found for s in m.variable.symbols if not s.local}
    return tuple(f for f in part.blocks.functions if _refers(part, f, blocks, names))
