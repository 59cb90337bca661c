"""UNDESCRIBED: data of other units that new code uses, and the object's debug information does not declare.

clang describes no variable that a unit only refers to, nor types that only such variables have. Finds these variables
by the symbols that the object misses and the process has data for; whoever can compile says what types the unit sees
them have (`Enquiry`), and they are judged against the units that define them. Where that cannot be asked, only a
reference beyond the end of a variable is told from others; the names are reported as unchecked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from patcher.blocks import External, Reference
from patcher.code.instructions import UndecodableCode, decode_lite, field_end
from patcher.code.pointed import reached_through
from patcher.data.declared import Declared, Variable
from patcher.data.layouts import LayoutVerdict, Standing, declared_by
from patcher.data.prepare import reading
from patcher.elf import SymbolType
from patcher.elf.relocations import R, is_pc_relative
from patcher.image import Definition
from patcher.match import Status
from patcher.part import Part

Probed = tuple[bytes, frozenset[int]]
_DATA = (SymbolType.OBJECT, SymbolType.COMMON, SymbolType.TLS)


@dataclass(frozen=True, slots=True)
class Enquiry:
    """Who may be asked about names: what one denotes in the process, and what types the unit sees several have.

    `types` returns an object in whose debug information the member `value` of struct `prefix` + index has the type of
    a name, and the indexes of names for which there is none; None when that cannot be asked.
    """

    denoted: Callable[[str], Definition | None]
    types: Callable[[tuple[str, ...]], Probed | None]
    prefix: str


@dataclass(frozen=True, slots=True)
class Foreign:
    """A variable that a unit uses and does not describe: how the unit that defines it does."""

    symbol: str
    unit: Declared
    variable: Variable
    size: int

    @property
    def expression(self) -> str:
        """What the variable is called behind the last line of a text that uses it."""
        return f"::{self.variable.name}" if "::" in self.variable.name else self.variable.name


@dataclass(frozen=True, slots=True)
class Described:
    """What a unit sees some variables have: in debug information that is not the object's own."""

    unit: Declared
    data: bytes
    variables: tuple[Foreign, ...]


def missing(part: Part, declared: Sequence[Declared]) -> tuple[str, ...]:
    """Return the symbols that an object misses, and that its debug information declares no variable for."""
    described = {v.symbol for d in declared for every in d.variables.values() for v in every}
    symbols = part.delta.blocks.object.symbols
    return tuple(dict.fromkeys(s.name for s in symbols if s.undefined and s.name and s.name not in described))


def is_data(definition: Definition | None) -> bool:
    return definition is not None and definition.type in _DATA


def describe(part: Part, file: str, found: Sequence[Foreign], enquiry: Enquiry) -> Described | None:
    """Ask what types a unit, compiled from `file`, sees variables have; None when nobody can tell."""
    names = tuple(f.expression for f in found)
    answer = enquiry.types(names)
    if answer is None:
        return None
    data, lost = answer
    units = declared_by(data, part.source)
    if len(units) != 1:
        return None
    with reading(part.source):
        unit = units[0]
        seen = {name: every for name, every in unit.variables.items() if not name.startswith(enquiry.prefix)}
        known = []
        for index, foreign in enumerate(found):
            type_ = _value(unit, f"{enquiry.prefix}{index}") if index not in lost else 0
            if type_:
                name = foreign.variable.name
                seen[name] = (Variable(name, type_, False, external=True, symbol=foreign.symbol),)
                known.append(foreign)
        unit.stand_for(file, tuple(v for every in seen.values() for v in every))
    return Described(unit, data, tuple(known))


def _value(unit: Declared, struct: str) -> int:
    """Return the type of a struct's only member, which is static in C++; 0 when there is none."""
    static = [v.type for v in unit.variables.get(f"{struct}::value", ())]
    members = [m.type for place in unit.types.get(f"struct {struct}", ()) for m in unit.node(place).members]
    return (*static, *members, 0)[0]


def types_within(unit: Declared, names: Sequence[str]) -> tuple[str, ...]:
    """Return the types that variables have, that these contain, and that they lead to."""
    places: set[int] = set()
    waiting = [v.type for name in names for v in unit.variables[name]]
    while waiting:
        place = unit.bare(waiting.pop())
        if place not in places:
            places.add(place)
            node = unit.node(place)
            waiting += [m.type for m in node.members] + ([node.of] if node.of else [])
    return tuple(name for name, every in unit.types.items() if not places.isdisjoint(every))


# --- beyond the end ---------------------------------------------------------------------------------------------------


def beyond(part: Part, file: str, unchecked: Sequence[Foreign]) -> Iterator[LayoutVerdict]:
    """Find new code that refers to what is behind the end of a variable."""
    sizes = {f.symbol: f for f in unchecked if f.size}
    for block in part.blocks.functions if sizes else ():
        if part.status(block) is Status.SAME:
            continue
        for reference in part.blocks.references(block):
            target = reference.target
            foreign = sizes.get(target.name) if isinstance(target, External) else None
            offset = _farthest(block.data, reference, foreign.size) if foreign is not None else None
            if foreign is not None and offset is not None:
                detail = f"`{block.name}` refers to byte {offset} of it, and it has {foreign.size}"
                yield LayoutVerdict(foreign.variable.name, (detail,), Standing.HEAP, of_variable=True, file=file)


_CELLS = (R.GOTPCREL, R.GOTPCRELX, R.REX_GOTPCRELX)


def _farthest(code: bytes, reference: Reference, size: int) -> int | None:
    """Return the offset beyond the end of a variable that a reference leads to, if it does."""
    if reference.type in _CELLS:
        return max((o for o in reached_through(code, reference.offset) if o >= size), default=None)
    offset = reference.addend
    if is_pc_relative(reference.type):
        try:
            offset += 4 + field_end(code, None, reference.offset)
        except UndecodableCode:
            offset += 4
    return offset if offset > size or (offset == size and _goes_there(code, reference.offset)) else None


def _goes_there(code: bytes, field: int) -> bool:
    """Tell whether the instruction around a field goes to memory there: loops end where a variable does."""
    try:
        instruction = next(i for i in decode_lite(code, 0) if i[0] <= field < i[0] + i[1])
    except (UndecodableCode, StopIteration):
        return True
    return instruction[2] != "lea" and "[" in instruction[3]
