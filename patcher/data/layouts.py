"""LAYOUTS: whether new code may see the data that a process has, type by type and variable by variable.

What a unit declares is compared with what the process has of that unit: the program's debug information, and the
objects applied since. A type that differs is judged by who can have a value of it (`Standing`):

- *nothing live*, if it is a struct or union that only functions name as a local variable: no variable with static
  storage has it or leads to it, no pointer or reference to it (or to what contains it) is declared, no function
  takes or returns it, no other unit knows it, and the old code of every function that changed stores into its own
  frame only and takes no address of that. A function whose code stays the same cannot tell the layouts apart.
- *variables*, if only variables with static storage have it, and again nobody declares a pointer to it or has it as a
  local variable. Where other units know it, that has to hold for each: the verdict names them.
- *the heap*, for all else. An enum's values are numbers, and numbers go anywhere.

Types that a unit had no knowledge of, and the process has, are compared by name through `dwarf`.
"""

from __future__ import annotations

import gc
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

from patcher.data.compare import Comparison
from patcher.data.declared import Declared, Kind, Variable
from patcher.data.dies import Elsewhere, Header, NotUnderstood, Sections, units
from patcher.data.prepare import reading, sections
from patcher.data.shapes import Form, Part, Shape
from patcher.elf import tables as t

_NAMED = 4  # differences, variables and functions that a message lists
_ADDRESS, _CONSTANT_4, _CONSTANT_8 = b"\x03", b"\x0c", b"\x0e"  # DW_OP_addr, const4u, const8u
_LARGEST = 8 << 20  # bytes of a program's debug information that are searched for who else knows a type


class Standing(Enum):
    """Who can have a value of a type."""

    DEAD = "nothing live can have one"
    STATIC = "only variables with static storage have one"
    HEAP = "whether one is on the heap cannot be told"


@dataclass(frozen=True, slots=True)
class Restructured:
    """A variable with static storage whose type changed; `defined`: by this unit, and `scoped`: within a function."""

    name: str
    old: Shape
    new: Shape
    defined: bool = True
    scoped: bool = False
    constant: bool = False


@dataclass(frozen=True, slots=True)
class LayoutVerdict:
    """A type (or the type of one variable: then `type` is its name) whose layout changed, and who has values of it.

    `variables` have it within themselves; `leading` are those that lead to it by pointers; `functions` name it. For a
    type that only variables have: `elsewhere` are the files of other units that know it, or know one of the variables
    (None: that is not known), `lost` are variables that the unit does not have any more, `fresh` says whether the new
    code too declares no pointer to it, and `past` whether only a change that was taken back had it. `carried`: the
    values are carried over, `obstacles` say why they are not.
    """

    type: str
    details: tuple[str, ...]
    kind: Standing
    variables: tuple[Restructured, ...] = ()
    leading: tuple[str, ...] = ()
    functions: tuple[str, ...] = ()
    allowed: bool = False
    of_variable: bool = False
    file: str = ""
    elsewhere: tuple[str, ...] | None = ()
    lost: tuple[str, ...] = ()
    fresh: bool = True
    past: bool = False
    carried: bool = False
    obstacles: tuple[str, ...] = ()

    @property
    def accepted(self) -> bool:
        return self.allowed or self.carried or self.kind is Standing.DEAD

    @property
    def reason(self) -> str:
        """Why it is accepted, or what stands against it."""
        if self.carried:
            return "its values are carried over"
        if self.obstacles and not self.allowed:
            return f"its values cannot be carried over: {_listed(self.obstacles, '; ')}"
        return "--allow-layout-change" if self.allowed and self.kind is not Standing.DEAD else self.kind.value

    def describe(self) -> str:
        """Return type and differences."""
        return f"`{self.type}`: {_listed(self.details, '; ')}"

    def concerns(self) -> str:
        """Return whom it concerns, as the end of a sentence; empty if nobody is known."""
        variables = _listed([f"`{v.name}`" for v in self.variables if v.name != self.type])
        leading = _listed([f"`{name}`" for name in self.leading])
        functions = _listed([f"`{name}`" for name in self.functions])
        said = (("held by", variables), ("reached through", leading), ("used in", functions))
        return ", ".join(f"{words} {names}" for words, names in said if names)


def _listed(items: Sequence[str], separator: str = ", ") -> str:
    more = len(items) - _NAMED
    return separator.join(items[:_NAMED]) + (f"{separator}and {more} more" if more > 0 else "")


class Program:
    """The types of a module's units, read when a unit is asked for."""

    def __init__(self, found: Sections, file: Path) -> None:
        self.file = file
        self._sections = found
        self._headers: dict[str, list[Header]] = {}
        with reading(str(file)), suppress(NotUnderstood):
            for header in units(found, every=False):
                self._headers.setdefault(header.file, []).append(header)
        self._known: dict[Header, Declared] = {}

    @classmethod
    def of_file(cls, file: Path) -> Program | None:
        """Read a module's debug information; None when it has none. Raises `PatcherError` when it is damaged."""
        with file.open("rb") as opened:
            raw = t.read_raw(str(file), t.OpenFile(str(file), opened.fileno()))
            try:
                found = sections(raw)
            except NotUnderstood:
                found = Sections(b"", b"", b"", b"", b"")
        return cls(found, file) if found is not None else None

    def units_of(self, file: str) -> tuple[Declared, ...]:
        """Return what the units compiled from a source file declare."""
        return tuple(self._declared(h) for h in self._headers.get(file, ()))

    def others(self, file: str) -> Iterator[Declared] | None:
        """Return what all other units declare; None if that would be too much to look through."""
        if len(self._sections.info) > _LARGEST or not self._headers:
            return None
        return (self._declared(h) for name, every in self._headers.items() if name != file for h in every)

    def defining(self, symbol: str, address: int, *, thread_local: bool = False) -> Declared | None:
        """Return the unit that defines a variable at a link-time address; of a thread-local, its offset."""
        number = address.to_bytes(8, "little")
        info, addresses = self._sections.info, self._sections.addresses
        headers = [h for every in self._headers.values() for h in every]
        patterns = (_CONSTANT_8 + number, _CONSTANT_4 + number[:4]) if thread_local else (_ADDRESS + number,)
        starts = sorted(headers, key=lambda h: h.start)
        found = [_last(starts, [h.start for h in starts], p) for pattern in patterns for p in _places(info, pattern)]
        if not thread_local and addresses:
            bases = sorted(headers, key=lambda h: h.addresses_base)
            known = [h.addresses_base for h in bases]
            found += [_last(bases, known, p) for p in _places(addresses, number) if not p % 4]
        for header in dict.fromkeys(h for h in found if h is not None):
            declared = self._declared(header)
            if any(v.defined and v.symbol == symbol for every in declared.variables.values() for v in every):
                return declared
        return None

    def _declared(self, header: Header) -> Declared:
        if header not in self._known:
            with reading(str(self.file)):
                self._known[header] = Declared(self._sections, header)
        return self._known[header]


def _places(data: bytes, pattern: bytes) -> Iterator[int]:
    """Find where bytes stand."""
    place = data.find(pattern)
    while place >= 0:
        yield place
        place = data.find(pattern, place + 1)


def _last(headers: Sequence[Header], starts: Sequence[int], place: int) -> Header | None:
    """Return the last of some headers that begins at or before a place."""
    at = bisect_right(starts, place) - 1
    return headers[at] if at >= 0 else None


@contextmanager
def _uncollected() -> Iterator[None]:
    """Do not look for garbage: among many values that are made and stay, that takes as long as making them."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def declared_by(data: bytes, name: str, previous: Sequence[Declared] = ()) -> tuple[Declared, ...]:
    """Return what the units of an object declare; nothing if only drgn can read its debug information.

    `previous` is what an earlier object of the same unit declares: most edits change code only. Raises `PatcherError`
    when the debug information is damaged, `Elsewhere` when it is in another file.
    """
    raw = t.read_raw(name, data)
    try:
        with reading(name):
            found = sections(raw)
            if found is None or (previous and previous[0].sections == found):
                return tuple(previous) if found is not None else ()
            with _uncollected():
                return tuple(Declared(found, h) for h in units(found))
    except Elsewhere:
        raise
    except NotUnderstood:
        return ()


class Judgement:
    """The verdicts on one unit of an object.

    `layers` are what the process has of the unit, what counts first: the first that knows a name says what its layout
    is. Each is of several when the program has several units of that source file; then one that fits will do.
    Variables are compared with `current` only, the newest text and the program's: what a patch brought and a later one
    took out again gets new storage when it comes back with another type.
    `keeping` returns the functions that change and whose old code may keep values beyond its frame.
    """

    def __init__(
        self,
        layers: Sequence[tuple[Declared, ...]],
        current: Sequence[tuple[Declared, ...]],
        new: Declared,
        program: Program,
        keeping: Callable[[], bool],
        patched: Sequence[Declared] = (),
        reverted: Sequence[Declared] = (),
    ) -> None:
        """`patched` is what earlier changes brought of other units, `reverted` the layers that count last."""
        self.new = new
        self._patched = patched
        self._reverted = reverted
        self._current = current
        self._layers = [layer for layer in layers if layer]
        self._program = program
        self._keeping = keeping
        self._comparisons: dict[Declared, Comparison] = {}

    def unknown(self) -> tuple[str, ...]:
        """Return the types that the process is not known to have in this unit."""
        known = set().union(*(old.types.keys() for layer in self._layers for old in layer))
        return tuple(self.new.types.keys() - known)

    def verdicts(self) -> tuple[LayoutVerdict, ...]:
        """Judge every type and variable that differs. Raises what `Declared` raises."""
        with _uncollected():
            found = [v for name in self.new.types for v in self._of_type(name)]
            found += [v for name in self.new.plain_typedefs for v in self._of_typedef(name)]
            found += [v for name in self.new.variables for v in self._of_variable(name)]
        return tuple(found)

    def verdicts_of(self, types: Collection[str], variables: Collection[str]) -> tuple[LayoutVerdict, ...]:
        """Judge some types and variables only. Raises what `Declared` raises."""
        with _uncollected():
            found = [v for name in types for v in self._of_type(name)]
            found += [v for name in variables for v in self._of_variable(name)]
        return tuple(found)

    def _compared(self, old: Declared) -> Comparison:
        if old not in self._comparisons:
            self._comparisons[old] = Comparison(old, self.new)
        return self._comparisons[old]

    def _differing(
        self, names: Callable[[Declared], Mapping[str, tuple[int, ...]]], name: str
    ) -> Iterator[tuple[Declared, int, int, tuple[str, ...]]]:
        """Find how each new type of a name differs from all that the process has."""
        layer = next((found for each in self._layers if (found := [o for o in each if name in names(o)])), [])
        for after in names(self.new)[name] if layer else ():
            pairs = [(old, before) for old in layer for before in names(old)[name]]
            differences = None
            for old, before in pairs:
                said = tuple(self._compared(old).differences(before, after))
                if not said:
                    break
                differences = differences or (old, before, after, said)
            else:
                if differences is not None:
                    yield differences

    def _of_type(self, name: str) -> Iterator[LayoutVerdict]:
        for old, before, after, details in self._differing(_types, name):
            yield self._judged(name, old, before, after, details)

    def _of_typedef(self, name: str) -> Iterator[LayoutVerdict]:
        for *_, details in self._differing(_typedefs, name):
            yield LayoutVerdict(name, details, Standing.HEAP)

    def _of_variable(self, name: str) -> Iterator[LayoutVerdict]:
        variables = self.new.variables[name]
        layer = next((found for each in self._current if (found := [o for o in each if name in o.variables])), [])
        pairs = [(old, v) for old in layer for v in old.variables[name]]
        if not layer and not variables[0].defined:
            pairs = [(o, v) for o in self._program.others(self.new.file) or () for v in o.variables.get(name, ())]
            pairs = [(o, v) for o, v in pairs if v.defined]
        if all(any(self._compared(o).alike(v.type, new.type) for new in variables) for o, v in pairs):
            return  # what there was is there; a second one of its name, in another block of the function, is new
        for variable in variables:
            if variable.constant and variable.defined and all(v.constant for _, v in pairs):
                continue
            if any(self._compared(old).alike(v.type, variable.type) for old, v in pairs):
                continue
            old, v = pairs[0]
            details = tuple(self._compared(old).differences(v.type, variable.type))
            shapes = (self._restructured(old, v, variable),)
            verdict = LayoutVerdict(name, details, Standing.STATIC, shapes, (), self._users_of(name))
            elsewhere = self._elsewhere("", [variable]) if self._is_single() else None
            yield replace(verdict, of_variable=True, file=self.new.file, elsewhere=elsewhere)

    def _restructured(self, old: Declared, before: Variable, after: Variable) -> Restructured:
        shapes = shape_of(old, before.type), shape_of(self.new, after.type)
        scoped = bool(self._users_of(before.name))
        return Restructured(before.name, *shapes, after.defined, scoped, before.constant or after.constant)

    def _users_of(self, variable: str) -> tuple[str, ...]:
        function = variable.rpartition("::")[0]
        return (function,) if function and function in self.new.functions else ()

    # --- who has one ------------------------------------------------------------------------------------------

    def _judged(self, name: str, old: Declared, before: int, after: int, details: tuple[str, ...]) -> LayoutVerdict:
        had = Holders(old, before)
        pairs = [(v, found) for v in had.variables for found in self.new.variables.get(v.name, ())[:1]]
        variables = tuple(self._restructured(old, v, found) for v, found in pairs)
        elsewhere = self._elsewhere(name, had.variables)
        standing = self._standing(name, had, elsewhere)
        if standing is Standing.STATIC and not self._is_single():
            elsewhere = None
        lost = tuple(v.name for v in had.variables if v.name not in self.new.variables)
        fresh, functions = True, had.functions
        if standing is Standing.STATIC or not functions:  # all of a large unit is looked through for it
            has = Holders(self.new, after)
            fresh, functions = not (has.escaping or has.leading or has.local), functions or has.functions
        verdict = LayoutVerdict(name, details, standing, variables, had.leading, functions, file=self.new.file)
        return replace(verdict, elsewhere=elsewhere, lost=lost, fresh=fresh, past=old in self._reverted)

    def _standing(self, name: str, had: Holders, elsewhere: tuple[str, ...] | None) -> Standing:
        enum = had.unit.node(had.type).kind is Kind.ENUM
        if enum or had.escaping or had.leading or elsewhere is None or not self._is_confined(name, had):
            return Standing.HEAP
        if had.variables:
            return Standing.HEAP if had.local else Standing.STATIC
        return Standing.HEAP if elsewhere or self._keeping() else Standing.DEAD

    def _is_single(self) -> bool:
        """Tell whether the program has no more than one unit of this source file."""
        return len(self._program.units_of(self.new.file)) < 2

    def _elsewhere(self, type_: str, variables: Sequence[Variable]) -> tuple[str, ...] | None:
        """Return the files of other units that know a type, or one of some variables; None if these are too many."""
        others = self._program.others(self.new.file)
        if others is None:
            return None
        names = [v.name for v in variables if v.external]
        every = (*others, *self._patched)
        knowing = (o for o in every if type_ in o.types or any(_has_external(o, name) for name in names))
        return tuple(dict.fromkeys(o.file for o in knowing))

    def _is_confined(self, name: str, had: Holders) -> bool:
        """Tell whether nothing else that the process has of this unit has a pointer to a type."""
        rest = [
            Holders(o, p) for layer in self._layers for o in layer if o is not had.unit for p in o.types.get(name, ())
        ]
        return not any(h.escaping or h.leading for h in rest)


def _types(unit: Declared) -> Mapping[str, tuple[int, ...]]:
    return unit.types


def _typedefs(unit: Declared) -> Mapping[str, tuple[int, ...]]:
    return unit.plain_typedefs


def _has_external(unit: Declared, name: str) -> bool:
    return any(v.external for v in unit.variables.get(name, ()))


class Holders:
    """Who has values of a type in one unit."""

    def __init__(self, unit: Declared, type_: int) -> None:
        self.unit = unit
        self.type = unit.bare(type_)
        self._within: dict[int, bool] = {}
        every = [v for each in unit.variables.values() for v in each]
        self.variables = tuple(v for v in every if self.contains(v.type))
        self.leading = tuple(
            dict.fromkeys(v.name for v in every if v not in self.variables and self._leads(v.type, set()))
        )
        self.escaping = any(map(self.contains, unit.pointed | unit.passed))
        self.functions = unit.functions_naming(self.type)
        self.local = any(map(self.contains, unit.automatic))

    def contains(self, place: int) -> bool:
        """Tell whether a value of a type has one of this type in it."""
        place = self.unit.bare(place)
        if place not in self._within:
            self._within[place] = place == self.type
            node = self.unit.node(place)
            parts: Iterable[int] = [m.type for m in node.members]
            if node.kind is Kind.ARRAY:
                parts = [node.of]
            self._within[place] = place == self.type or any(self.contains(p) for p in parts)
        return self._within[place]

    def _leads(self, place: int, seen: set[int]) -> bool:
        place = self.unit.bare(place)
        if place in seen:
            return False
        seen.add(place)
        node = self.unit.node(place)
        inner = [m.type for m in node.members] + ([node.of] if node.of else [])
        return place == self.type or any(self._leads(p, seen) for p in inner)


# --- shapes -----------------------------------------------------------------------------------------------------------

_FORMS = {
    Kind.WHOLE: Form.NUMBER,
    Kind.ENUM: Form.NUMBER,
    Kind.FLOAT: Form.FLOAT,
    Kind.POINTER: Form.POINTER,
    Kind.STRUCT: Form.STRUCT,
    Kind.UNION: Form.UNION,
    Kind.ARRAY: Form.ARRAY,
}


def shape_of(unit: Declared, place: int) -> Shape:
    """Return a type as a value of its own."""
    node = unit.node(place)
    form = _FORMS.get(node.kind, Form.OTHER)
    text = unit.text(place) if form is not Form.ARRAY else ""
    if form is Form.ARRAY:
        return _array(shape_of(unit, node.of), [bound or 0 for bound in node.bounds])
    if any("(virtual" in m.name for m in node.members):
        return Shape(node.size, Form.OTHER, text)  # where such a part begins is known at run time only
    parts = tuple(Part(m.name, m.offset, m.bits, shape_of(unit, m.type)) for m in node.members)
    return Shape(node.size, form, text, parts, signed=node.signed)


def _array(element: Shape, bounds: Sequence[int]) -> Shape:
    for bound in reversed(bounds):
        element = Shape(bound * element.size, Form.ARRAY, "", (), bound, element)
    return element
